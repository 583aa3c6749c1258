"""Attention: how exporters spell it, and what each part of it means."""
