"""Orthogonal changes of basis in which no channel is much larger than the others."""
