"""Zeros in a weight: which ones, by what score, and what the rest becomes."""
