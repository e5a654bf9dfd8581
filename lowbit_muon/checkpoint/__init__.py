"""Saved states: checked and converted before anything changes."""
