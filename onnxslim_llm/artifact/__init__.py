"""The output folder: built beside its final place, journalled for --resume, published by one rename, described by a manifest."""
