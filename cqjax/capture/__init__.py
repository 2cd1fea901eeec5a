"""Captures statistics of a loss's sites, by a plan, in one backward pass."""
