"""Examples to copy: each trains a small model with momentum in fp32, in 4 bits, and with AdamW.

    python -m lowbit_muon.examples.nanochat [--plot FILE] [--steps N] [--seed N]

So do `lora` (needs peft), `convnet`, `moe` and `diffusion`; a plot needs matplotlib. Each takes
less than a minute on one CPU core. The guide `gallery.md` says what one sees.
"""
