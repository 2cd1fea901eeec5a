"""Each layer's record for transformations, the solves, and their state between steps."""
