"""Blocks of a transformer: what they do, and a model without some of them."""
