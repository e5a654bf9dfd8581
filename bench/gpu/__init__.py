"""What `python -m bench.gpu_check` runs: correctness, timings, and estimates on paper."""
