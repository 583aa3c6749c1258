"""Forms of weights with many zeros."""
