"""What Linux is asked directly: memory placement and topology, with the standard library alone."""
