"""Passes that recognise what models are made of: norms, activations, rotary embeddings, attention."""
