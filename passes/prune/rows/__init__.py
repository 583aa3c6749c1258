"""Rows and columns that leave a weight, and what stands in for them."""
