"""Writes every table anew: see `bench.report`."""

from bench.report import FILES, fill

for file in FILES:
    file.write_text(fill(file.read_text(encoding="utf-8")), encoding="utf-8")
