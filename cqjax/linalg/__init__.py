"""Linear algebra on arrays; knows no pytrees and no models."""
