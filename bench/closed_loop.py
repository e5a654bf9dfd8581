"""Which state format trains as fp32 Muon does: a small GPT from scratch, closed loop, over seeds.

    python -m bench.closed_loop [--formats A,B,...] [--seeds N] [--steps N] [--lr X] [--json FILE]

A byte-level GPT with learned positions, LayerNorm and GELU (0.6M parameters; SmolLM2 is a Llama
with rotary positions, RMSNorm and SwiGLU), on the King James Bible excerpt, with torch's momentum
and Nesterov for every format but muonq4; its other parameters with AdamW. Results accumulate in the
JSON file, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from bench.harness import write_json
from lowbit_muon import Muon
from lowbit_muon.finetune.text import read_text

WIDTH, LAYERS, HEADS, CONTEXT = 128, 3, 4, 64
BATCH = 8
HELD_OUT_BATCHES = 160  # of BATCH sequences: 82k bytes
FORMATS = "fp32,spectral4,spectral3,spectral2,mulaw4,muonq4,linear8"


class Block(nn.Module):
    """Attention and a GELU MLP, each after a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.query, self.key, self.value, self.out = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, context, WIDTH] to the same."""
        normed = self.norms[0](x)
        query, key, value = (
            layer(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class ByteGPT(nn.Module):
    """A GPT over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy in nats of ids [batch, CONTEXT + 1]."""
        x = self.tokens(ids[:, :-1]) + self.positions.weight
        logits = self.head(self.norm(self.blocks(x)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def batches(text: Tensor, count: int, seed: int) -> list[Tensor]:
    """Random windows, int64 [BATCH, CONTEXT + 1] each."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - CONTEXT - 1, (count, BATCH, 1), generator=generator)
    return [text[start + torch.arange(CONTEXT + 1)] for start in starts]


def train(name: str, seed: int, steps: int, lr: float, text: Tensor) -> float:
    """Held-out loss after training with the momentum stored in format `name`.

    A name with "/stored" behind it orthogonalises the codes (ns_input="stored").
    """
    state_format = name.removesuffix("/stored")
    torch.manual_seed(seed)
    model = ByteGPT()
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    muon = Muon(
        matrices,
        lr=lr,
        weight_decay=0.0,
        adjust_lr_fn="match_rms_adamw",
        state_format=state_format,
        ns_input="exact" if name == state_format else "stored",
        nesterov=name != "muonq4",
        seed=seed,
    )
    adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    cut = int(0.95 * len(text))
    for step, ids in enumerate(batches(text[:cut], steps, seed)):
        # Twenty steps of warm-up, and down to a tenth over the last 40%.
        decay = 1 - 0.9 * max(0.0, (step - 0.6 * steps) / (0.4 * steps))
        factor = min(1.0, (step + 1) / 20) * decay
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = lr * factor, 3e-3 * factor
        model.loss(ids).backward()
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        held_out = batches(text[cut:], HELD_OUT_BATCHES, seed=12345)
        return statistics.fmean(model.loss(ids).item() for ids in held_out)


def show(losses: dict[str, dict[str, float]], console: Console) -> None:
    """Mean, spread over seeds and the gap to fp32 of each format, as a table."""
    table = Table(title="byte-level GPT, held-out loss")
    for heading in ("format", "seeds", "loss", "sd", "minus fp32, paired by seed"):
        table.add_column(heading, justify="left" if heading == "format" else "right")
    full = losses.get("fp32", {})
    for name, by_seed in losses.items():
        values = list(by_seed.values())
        gaps = [value - full[seed] for seed, value in by_seed.items() if seed in full]
        table.add_row(
            name,
            str(len(values)),
            f"{statistics.fmean(values):.4f}",
            f"{statistics.stdev(values):.4f}" if len(values) > 1 else "",
            f"{statistics.fmean(gaps):+.4f}" if gaps else "",
        )
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="closed-loop quality of the state formats")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--json", type=Path, default=Path("bench/results/closed_loop.json"))
    options = parser.parse_args(arguments)
    key = f"steps {options.steps}, lr {options.lr:g}"
    results: dict[str, dict[str, dict[str, float]]] = {}
    if options.json.exists():
        results = json.loads(options.json.read_text())["results"]
    losses = results.setdefault(key, {})
    text = torch.frombuffer(bytearray(read_text("").encode()), dtype=torch.uint8).long()
    plans = [(s, f) for s in range(options.seeds) for f in options.formats.split(",")]
    for seed, name in track(plans, description=key):
        by_seed = losses.setdefault(name, {})
        if str(seed) not in by_seed:
            by_seed[str(seed)] = train(name, seed, options.steps, options.lr, text)
            write_json(options.json, results)
    show(losses, Console())


if __name__ == "__main__":
    main()
