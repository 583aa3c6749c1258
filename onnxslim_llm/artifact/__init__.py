"""The output folder: built beside its final place, journalled, published in one step, described by a manifest."""
