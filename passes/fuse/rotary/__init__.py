"""Rotary embeddings: how exporters spell the rotation, its tables and its positions."""
