"""Changes of weights that cancel across a product: scales by channel, steps along axes."""
