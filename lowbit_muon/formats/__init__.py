"""What a stored momentum looks like; no tensors."""
