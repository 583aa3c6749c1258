"""Passes that remove what does nothing: no new operators, same results."""
