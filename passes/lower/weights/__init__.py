"""Products and look-ups with few-bit weights in the operators of a target."""
