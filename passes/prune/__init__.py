"""Fewer weights: zeros that storage or kernels can use, and whole neurons, heads and blocks less."""
