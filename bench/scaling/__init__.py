"""Muon over 1 to 4096 processes on paper: bytes, operations and state, and a check of the bytes."""
