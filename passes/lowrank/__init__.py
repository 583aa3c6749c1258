"""Passes that make matrices of low rank."""
