"""Momentum matrices of a real training run, for `bench.fidelity`.

    python -m bench.capture [--steps 24] [--layers 14] [--out FILE]

Fine-tunes SmolLM2-135M with full-precision Muon, as `lowbit-muon finetune` does, and keeps the
momentum of some layers' matrices: float16, divided by the Frobenius norm, which no figure of
fidelity depends on. The set in the repository is what the defaults make.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit_muon.tools.finetune.settings import FinetuneSettings
from lowbit_muon.tools.finetune.training import FinetuneRun

SHIPPED = Path(__file__).with_name("data") / "smollm2_momentum.safetensors"
# One of each kind of shape: key projection, output projection, gate.
KINDS = ("self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj")


def capture(steps: int, layers: list[int], console: Console) -> dict[str, Tensor]:
    """name -> momentum [rows, columns], float16, of Frobenius norm sqrt(rows * columns)."""
    settings = FinetuneSettings(
        format="fp32", steps=steps, eval_before=False, sample_tokens=0, save_every=0
    )
    wanted = {f"layers.{layer}.{kind}.weight" for layer in layers for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        run = FinetuneRun(settings, Path(folder), console)
        for index in range(steps):
            console.print(f"step {index + 1} of {steps}: loss {run.step():.3f}")
        found = {}
        for name, parameter in run.model.named_parameters():
            name = name.removeprefix("model.")
            if name in wanted:
                momentum = run.optimizer.state[parameter]["dense"]
                if parameter.shape[0] > parameter.shape[1]:
                    momentum = momentum.mT
                scale = momentum.numel() ** 0.5 / momentum.norm()
                # entries of about one: float16 then rounds them by 2**-12
                found[name] = (momentum * scale).half().contiguous()
    if missing := wanted - set(found):
        raise SystemExit(f"--layers: expected layers of the model, got none for {sorted(missing)}")
    return found


def load(path: Path = SHIPPED) -> dict[str, Tensor]:
    """The captured matrices as float32 of Frobenius norm one."""
    matrices = {name: value.float() for name, value in load_file(path).items()}
    return {name: value / value.norm() for name, value in matrices.items()}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="capture momentum of the SmolLM2 fine-tune")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--layers", default="14")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    options = parser.parse_args(arguments)
    layers = [int(layer) for layer in options.layers.split(",")]
    found = capture(options.steps, layers, Console())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, options.out, metadata={"steps": str(options.steps), "model": "SmolLM2-135M"})


if __name__ == "__main__":
    main()
