"""What is taken of a loss: statistics of its sites, by a plan, in one backward pass."""
