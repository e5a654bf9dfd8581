"""Training quality: small language models on real text, over learning rates and seeds."""
