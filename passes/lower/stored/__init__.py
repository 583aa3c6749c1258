"""Few-bit weights that a model already holds, taken in with their exact codes."""
