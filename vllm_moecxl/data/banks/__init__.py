"""Banks: the places that home slabs."""
