"""How a weight becomes codes: rounding, searching, compensating, polishing; the recorded work of all that."""
