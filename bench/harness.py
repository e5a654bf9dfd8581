"""What the benchmarks share. It lives in the package, where `lowbit-muon bench` needs it."""

from lowbit_muon.benchmark.report import machine
from lowbit_muon.benchmark.report import write_document as write_json
from lowbit_muon.benchmark.timing import interleaved, medians, ratios

__all__ = ["interleaved", "machine", "medians", "ratios", "write_json"]
