"""Passes that turn concepts into the operators of a target."""
