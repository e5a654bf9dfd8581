"""`lowbit-muon bench`: what a step and its parts cost on this machine, against torch's own."""
