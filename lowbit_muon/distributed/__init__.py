"""Muon over several processes: each matrix has an owner, which keeps its momentum and steps it."""
