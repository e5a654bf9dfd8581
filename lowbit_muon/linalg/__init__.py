"""Orthogonalisation, spectra and their iterations, from matrix products alone."""
