"""Weights that a loss uses forwards and backwards: derivatives of the network, tied embeddings."""
