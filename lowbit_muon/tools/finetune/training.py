"""One fine-tune from start to end: evaluate, train, save, evaluate, report."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lowbit_muon.optimizers.gradient_release import attach_gradient_release
from lowbit_muon.tools.console import MIB, Progress
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.finetune.checkpoint import CheckpointStore
from lowbit_muon.tools.finetune.llama import Llama
from lowbit_muon.tools.finetune.optimizers import build_optimizer, count_formats, count_matrices
from lowbit_muon.tools.finetune.processes import AveragedLoss, Processes
from lowbit_muon.tools.finetune.report import peak_memory_bytes, plot_losses
from lowbit_muon.tools.finetune.settings import MUON, FinetuneSettings
from lowbit_muon.tools.finetune.smollm2 import load_model
from lowbit_muon.tools.finetune.text import make_corpus, read_text
from lowbit_muon.tools.output import write_json

PROMPT_TOKENS = 16
SAMPLE_TEMPERATURE = 0.7
SAMPLE_TOP_K = 40
MOST_EXPONENT = 709  # of math.exp


@dataclass
class History:
    """What a run has measured so far; saved in its checkpoints. Losses in nats per token."""

    train_loss: list[float] = field(default_factory=list)  # of each step
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss)
    samples: list[tuple[int, str]] = field(default_factory=list)  # (steps done, text)
    model_seconds: list[float] = field(default_factory=list)  # forward and backward, each step
    optimizer_seconds: list[float] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.train_loss)


class FinetuneRun:
    """A model, its data and its optimizer, at some step of a fine-tune."""

    def __init__(
        self,
        settings: FinetuneSettings,
        folder: Path,
        console: Console,
        processes: Processes | None = None,
    ) -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.processes = processes or Processes()
        settings.check_processes(self.processes.count)
        self.folder = folder
        self.console = console
        self.model, self.tokenizer = load_model(settings.model)
        self.corpus = make_corpus(
            read_text(settings.text),
            self.tokenizer.encode,
            settings.held_out_tokens,
            settings.sequence_length,
        )
        self.optimizer = build_optimizer(self.model, settings, self.processes.group)
        self.loss = AveragedLoss(self.model, self.processes)
        if settings.gradient_release:
            attach_gradient_release(self.model, self.optimizer)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.history = History()
        self.progress = Progress(console, "step", settings.steps, transient=False)
        self.store = CheckpointStore(folder / "checkpoints")
        self.saved_step: int | None = None

    def restore(self, payload: dict[str, Any]) -> None:
        """Continue from what `save` wrote; empties `payload`, or its tensors stay in memory."""
        try:
            self.model.load_state_dict(payload["model"])
            self.optimizer.load_state_dict(payload["optimizer"])
            self.history = History(**payload["history"])
            self.progress = Progress(
                self.console, "step", self.settings.steps, done=self.history.steps, transient=False
            )
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"--out: expected a checkpoint of such a run, got {error}") from None
        self.saved_step = self.history.steps
        payload.clear()

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on, unless it is there.

        It is the same for any number of processes.
        """
        if self.saved_step == self.history.steps:
            return
        payload = {
            "settings": dataclasses.asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.processes.whole_state(self.optimizer.state_dict()),
            "history": dataclasses.asdict(self.history),
        }
        self.processes.first(lambda: self.store.save(self.history.steps, payload))
        self.saved_step = self.history.steps

    def train(self) -> dict[str, Any]:
        """Run the steps that are left; returns what `result.json` holds.

        Where nothing can be printed any more, steps that are done are saved before it ends.
        """
        try:
            self._train()
        except OSError:
            if self.settings.save_every:
                self.save()
            raise
        return self.result()

    def _train(self) -> None:
        settings, history = self.settings, self.history
        if settings.eval_before and not history.held_out and history.steps == 0:
            self.observe()
        with self.progress:
            while history.steps < settings.steps:
                loss = self.step()
                seconds = history.model_seconds[-1] + history.optimizer_seconds[-1]
                self.progress.advance(
                    f"loss {loss:.4f}  {settings.tokens_per_step / seconds:,.0f} tokens/s  "
                    f"state {self.optimizer.state_bytes() / MIB:,.1f} MiB"
                )
                if _due(history.steps, settings.eval_every) and history.steps < settings.steps:
                    self.evaluate()
                if _due(history.steps, settings.save_every) and history.steps < settings.steps:
                    self.save()
        if not history.held_out or history.held_out[-1][0] < history.steps:
            self.observe()
        if settings.save_every:
            self.save()

    def step(self) -> float:
        """One optimizer step; returns the training loss before it."""
        settings, history = self.settings, self.history
        step = history.steps
        factor = settings.learning_rate_factor(step)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        started = time.perf_counter()
        batch = self.corpus.batch(step, settings.sequences_per_step, settings.seed)
        batch = self.processes.share(batch)
        # One sequence at a time: as fast per token on a CPU, and activations take a fraction. But
        # a gradient that is released has to be complete.
        parts = (batch,) if settings.gradient_release else batch.split(1)
        loss = 0.0
        with matmul_precision(settings.precision):
            for number, sequences in enumerate(parts, start=1):
                with self.loss.accumulating(more=number < len(parts)):
                    part = self.loss(sequences) * (len(sequences) / len(batch))
                    loss += self.processes.mean(part.item())
                    _check_finite(loss, f"training loss is {loss} in step {step + 1}")
                    part.backward()
                if number < len(parts):
                    self.progress.note(f"sequence {number}/{len(parts)}, loss {loss:.4f} in sum")
        between = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        history.train_loss.append(loss)
        history.model_seconds.append(between - started)
        history.optimizer_seconds.append(time.perf_counter() - between)
        return loss

    def observe(self) -> None:
        """Held-out loss and, on the first process, a text sample at this point of the run."""
        loss = self.evaluate()
        self.console.print(
            f"held-out loss after {self.history.steps} steps: {loss:.4f} "
            f"(perplexity {math.exp(min(loss, MOST_EXPONENT)):.2f})"
        )
        if self.settings.sample_tokens and self.processes.is_first:
            text = self.sample()
            self.history.samples.append((self.history.steps, text))
            self.console.print(f"sample: {text!r}")

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over all held-out text, noted in the history."""
        windows = self.corpus.held_out_windows()[self.processes.rank :: self.processes.count]
        losses = []
        with matmul_precision(self.settings.precision):
            for number, window in enumerate(windows, start=1):
                losses.append(self.model.loss(window).item())
                self.progress.note(f"evaluated {number}/{len(windows)} pieces of held-out text")
        loss = statistics.fmean(itertools.chain(*self.processes.gather(losses)))
        _check_finite(loss, f"held-out loss is {loss} after {self.history.steps} steps")
        self.history.held_out.append((self.history.steps, loss))
        return loss

    def sample(self) -> str:
        """A prompt and the model's continuation, drawn with a fixed seed."""
        prompt = self.tokenizer.encode(self.settings.prompt)
        if not prompt:
            prompt = self.corpus.held_out[:PROMPT_TOKENS].tolist()
        ids = continue_text(self.model, prompt, self.settings.sample_tokens)
        return self.tokenizer.decode(ids)

    def result(self) -> dict[str, Any]:
        """The run in plain values: settings, losses, sizes in bytes (of one process), seconds."""
        history, settings = self.history, self.settings
        state_bytes = self.processes.gather(self.optimizer.state_bytes())
        peaks = self.processes.gather(peak_memory_bytes())
        return {
            "method": settings.method,
            "settings": dataclasses.asdict(settings),
            "muon_options": settings.muon_options if settings.optimizer == MUON else None,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "muon_matrices": count_matrices(self.optimizer),
            "formats": count_formats(self.optimizer, self.processes),
            "train_tokens": self.corpus.train.numel(),
            "held_out_tokens": len(self.corpus.held_out_windows()) * settings.sequence_length,
            "held_out_before": dict(history.held_out).get(0),
            "held_out_after": history.held_out[-1][1],
            "processes": self.processes.count,
            "state_bytes": max(state_bytes),
            "state_bytes_of_processes": state_bytes,
            "peak_memory_bytes": max(peaks),
            "peak_memory_bytes_of_processes": peaks,
            "seconds_per_step": statistics.median(
                map(sum, zip(history.model_seconds, history.optimizer_seconds, strict=True))
            ),
            "optimizer_seconds_per_step": statistics.median(history.optimizer_seconds),
            "torch_threads": torch.get_num_threads(),
            "torch_version": torch.__version__,
            **dataclasses.asdict(history),
        }


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Within it, "bf16" lets torch round the factors of fp32 products to bfloat16.

    Only the model runs in it: the optimizer's products stay in fp32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "bf16" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check_finite(loss: float, where: str) -> None:
    if not math.isfinite(loss):
        raise UserError(f"the {where}: the run diverged; lower --lr")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@torch.no_grad()
def continue_text(model: Llama, prompt: Sequence[int], tokens: int, seed: int = 0) -> list[int]:
    """`prompt` and `tokens` more ids, each drawn from the most likely SAMPLE_TOP_K."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([list(prompt)])
    for _ in range(tokens):
        scores: Tensor = model.logits(model(ids)[0, -1])
        best, choices = scores.topk(min(SAMPLE_TOP_K, scores.numel()))
        drawn = torch.multinomial((best / SAMPLE_TEMPERATURE).softmax(0), 1, generator=generator)
        ids = torch.cat([ids, choices[drawn][None]], dim=1)
    return [int(token) for token in ids[0]]


def finetune(
    settings: FinetuneSettings,
    folder: Path,
    console: Console,
    payload: dict[str, Any] | None,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Run a fine-tune into `folder`, from its start or from a checkpoint's `payload`.

    Leaves `result.json`, `loss.png`, `loss.svg` and checkpoints there; returns the result. Several
    processes call it alike and share each step's sequences; the first of them writes.
    """
    started = time.perf_counter()
    run = FinetuneRun(settings, folder, console, processes)
    console.print(
        f"{settings.model}: {sum(p.numel() for p in run.model.parameters()):,} parameters, "
        f"{count_matrices(run.optimizer)} matrices with Muon; "
        f"{run.corpus.train.numel():,} tokens to train on, {run.corpus.held_out.numel():,} held out"
    )
    if run.processes.count > 1:
        console.print(
            f"{run.processes.count} processes of {torch.get_num_threads()} threads, "
            f"{settings.sequences_per_step // run.processes.count} sequences of a step on each"
        )
    if payload is not None:
        run.restore(payload)
        console.print(f"continuing after step {run.history.steps} of {settings.steps}")
    elif settings.save_every:
        console.print(
            f"if interrupted, continue with: lowbit-muon finetune --resume --out {folder}"
        )
    result = run.train()
    result["wall_seconds"] = time.perf_counter() - started
    if len(result["formats"]) > 1:
        counts = ", ".join(f"{name} x {n}" for name, n in result["formats"].items())
        console.print(f"momentum in {counts}")
    console.print(
        f"{settings.method}: held-out loss {result['held_out_after']:.4f}, "
        f"state {_mebibytes(result['state_bytes_of_processes'], '.1f')}, "
        f"peak {_mebibytes(result['peak_memory_bytes_of_processes'], '.0f')}, "
        f"{result['seconds_per_step']:.2f} s/step, {result['wall_seconds']:.0f} s in all"
    )
    if run.processes.is_first:
        write_json(folder / "result.json", result, "--out")
        plot_losses(folder, {settings.method: [result]}, console)
    console.print(f"written to {folder}")
    return result


def _mebibytes(sizes: Sequence[int], spec: str) -> str:
    """Bytes of each process in MiB."""
    return " + ".join(format(size / MIB, "," + spec) for size in sizes) + " MiB"


# What comparisons read of a result.
_RESULT_KEYS = {
    "settings", "held_out_before", "held_out_after", "train_loss", "held_out", "state_bytes",
    "peak_memory_bytes", "seconds_per_step",
}  # fmt: skip


def read_result(folder: Path) -> dict[str, Any] | None:
    """The `result.json` of a finished run, or None if the folder holds none that is whole."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(result, dict) and isinstance(result.get("settings"), dict)
    return result if whole and not _RESULT_KEYS - result.keys() else None
