"""The experiments of the source documents: ``python -m experiments NAME``."""
