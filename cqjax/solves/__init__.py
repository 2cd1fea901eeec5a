"""What a transformation is told of each layer, the solves, and what is kept between steps."""
