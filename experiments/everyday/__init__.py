"""Six kinds of everyday work, and the optimizers that compete on them."""
