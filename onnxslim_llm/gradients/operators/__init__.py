"""What operators compute, in torch: a table for each group of them."""
