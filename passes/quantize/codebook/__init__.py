"""Codes that stand for entries of a table, instead of steps of a scale."""
