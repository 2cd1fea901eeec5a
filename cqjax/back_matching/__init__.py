"""Back-matching (Zhang, Chen and Liu): layer-wise rates, and the exact propagation."""
