"""Tables of kernels, and of what the machine does at most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.report.markdown import results, table

ISAS = ("baseline", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx")
SIZES = ("64", "256", "576", "1024", "2048")  # rows of README's orthogonalised matrices


def kernel_rows(name: str) -> list[dict[str, Any]]:
    """The timed rows of a benchmark of kernels at the highest level; torch's belong to any."""
    rows = [row for row in results(name) if row["median"] is not None]
    levels = {row["isa"] for row in rows}
    highest = max((isa for isa in levels if isa in ISAS), key=ISAS.index)
    return [row for row in rows if row["isa"] in (None, highest)]


def with_most_threads(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """(shape, name) -> row on as many threads as any."""
    most = max(row["threads"] for row in rows)
    return {(shape(row), row["name"]): row for row in rows if row["threads"] == most}


def shape(row: dict[str, Any]) -> str:
    """As in "1024x4096"."""
    return "x".join(map(str, row["shape"]))


def of_roof(row: dict[str, Any]) -> str:
    """The share of its roof that a row reaches, in brackets."""
    return "" if row["fraction"] is None else f" ({row['fraction']:.0%})"


def by_shape(
    found: dict[tuple[str, str], dict[str, Any]],
    shapes: Sequence[str],
    names: Sequence[str],
    cell: Callable[[dict[str, Any]], str],
) -> str:
    """A table of cells, a column for each shape."""

    def text(of: str, name: str) -> str:
        return cell(found[of, name]) if (of, name) in found else ""

    return table(("", *shapes), ([name, *(text(of, name) for of in shapes)] for name in names))


def lut_gemm() -> str:
    """Products of codes, times as fast as torch.mm of the decoded matrix (share of their roof)."""
    found = with_most_threads(kernel_rows("lut_gemm"))
    shapes = list(dict.fromkeys(of for of, _ in found))
    names = dict.fromkeys(name for (_, name), row in found.items() if row["ratio"] is not None)
    return by_shape(found, shapes, list(names), lambda row: f"{1 / row['ratio']:.1f}{of_roof(row)}")


ISA_SHAPE = "1024x4096"


def isas() -> str:
    """Products of codes by instruction set and threads, times as fast as torch.mm (of roof)."""
    rows = [r for r in results("lut_gemm") if r["ratio"] is not None and shape(r) == ISA_SHAPE]
    ours = {(r["name"], r["isa"], r["threads"]): r for r in rows if r["isa"] in ISAS}
    columns = sorted(
        {(isa, threads) for _, isa, threads in ours}, key=lambda key: (ISAS.index(key[0]), key[1])
    )
    headings = (f"{isa}, {threads}" for isa, threads in columns)
    return table(
        ("level, threads", *headings),
        (
            [name, *(_cell(ours.get((name, *column))) for column in columns)]
            for name in dict.fromkeys(name for name, _, _ in ours)
        ),
    )


def _cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{1 / row['ratio']:.1f}{of_roof(row)}"


def orthogonalize() -> str:
    """Times the time of the plain float32 iteration (share of their roof)."""
    found = with_most_threads(kernel_rows("orthogonalize"))
    shapes = [of for of in dict.fromkeys(of for of, _ in found) if of.split("x")[0] in SIZES]
    names = dict.fromkeys(
        name
        for (_, name), row in found.items()
        if row["ratio"] is not None and not name.startswith("X")
    )
    return by_shape(found, shapes, list(names), lambda row: f"{row['ratio']:.2f}{of_roof(row)}")


def codec() -> str:
    """Throughput against a copy of as many bytes, matrices from memory, by number of threads."""
    rows = [row for row in kernel_rows("codec") if row["ratio"] is not None]
    first = shape(rows[0])
    cells: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        operation, cache, *peer = row["name"].split()
        if cache == "cold" and shape(row) == first:
            name = " ".join([f"`{row['format']}`" if row["format"] else "nf4", *peer])
            by_operation = cells.setdefault(name, {"quantize": [], "dequantize": []})
            by_operation[operation].append(f"{1 / row['ratio']:.2f}{of_roof(row)}")
    return table(
        ("", "quantise", "dequantise"),
        ([name, *map(", ".join, found.values())] for name, found in cells.items()),
    )


def machine() -> str:
    """What the machine does at most, by number of threads: G operations, or GB, a second."""
    rows = results("machine")
    threads = sorted({row["threads"] for row in rows})
    speeds = {
        (row["name"], row["threads"]): f"{row['work'] / row['median'] / 1e9:,.0f}" for row in rows
    }
    return table(
        ("threads", *map(str, threads)),
        (
            [name, *(speeds.get((name, count), "") for count in threads)]
            for name in dict.fromkeys(row["name"] for row in rows)
        ),
    )
