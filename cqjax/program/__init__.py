"""What a loss computes: its program as a flat list, and where parameters meet activations in it."""
