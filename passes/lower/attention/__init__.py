"""Attention and its KV caches in the operators of a target."""
