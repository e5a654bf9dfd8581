"""One optimizer step: its options and the update."""
