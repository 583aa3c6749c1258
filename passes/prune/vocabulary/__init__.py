"""Tokens: where a model has its vocabulary, and what stands for a token that is gone."""
