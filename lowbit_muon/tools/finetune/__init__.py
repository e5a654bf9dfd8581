"""Fine-tuning a pretrained language model with low-bit Muon, as `lowbit-muon finetune` does it."""
