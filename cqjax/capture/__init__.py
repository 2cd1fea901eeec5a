"""From a loss function to its value, gradients and captures."""
