"""Heads of attentions: which ones go, and everything that counts them."""
