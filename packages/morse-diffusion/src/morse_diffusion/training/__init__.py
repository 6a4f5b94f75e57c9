"""Training of a Dot on accelerate, and the data that it learns from."""
