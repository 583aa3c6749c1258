"""Norms, activations and rotary embeddings in the operators of a target."""
