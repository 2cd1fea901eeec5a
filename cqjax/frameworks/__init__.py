"""What Flax tells of a loss while it is traced: who owns a parameter, and what normalises."""
