"""What compilers for neural processors ask of a graph: fixed sizes, and operators and masks that they know."""
