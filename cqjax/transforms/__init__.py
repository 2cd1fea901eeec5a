"""Optax transformations that choose updates by captures; none imports Flax or another."""
