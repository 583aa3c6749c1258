"""How many bits each weight gets."""
