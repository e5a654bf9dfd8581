"""`lowbit-muon doctor`: what storing the momentum did to each matrix of a run."""
