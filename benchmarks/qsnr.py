"""Signal to quantization noise ratio of every weight format on synthetic data, with the bits that an element takes.

    python -m benchmarks.qsnr --json out.json

QSNR = 10 log10(Σ x² / Σ (x - x̂)²) over all elements, in dB, on:

    gaussian    N(0, 1)
    laplace     Laplace(0, 1)
    relu        max(0, N(0, 1)); integer formats are unsigned there
    row_scaled  N(0, σ²) with one σ ~ |N(0, 1)| a row, as in Darvish Rouhani et al., ISCA 2023, figure 7

Known values stand in parentheses: MX of that figure; MXFP4, NVFP4, INT4 and VS-Quant of own computation (INT4's range,
the largest of a row, depends on the length of rows: these are for the default of 1024);
binary and ternary in closed form; k-means from the Lloyd-Max tables (Max 1960; Jayant and Noll 1984).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks import common
from lq_plugin import QuantSpec
from lq_plugin.functional.error import sqnr_db
from lq_plugin.model.measure.cost import spec_bits
from lq_plugin.quantizers import make_weight_quantizer

ROWS, COLUMNS = 512, 1024


@dataclass(frozen=True)
class Entry:
    """One format.

    Args:
        name: for the table.
        spec: of the weight.
        unsigned: the spec for data that is nowhere negative, where the format has one.
        known: QSNR in dB from elsewhere, by data.
    """

    name: str
    spec: str
    unsigned: str | None = None
    known: Mapping[str, float] = field(default_factory=dict)


def _integers() -> Iterator[Entry]:
    known = {"minmax": {"gaussian": 16.9, "laplace": 13.2}}
    for bits in range(2, 9):
        for estimator in ("minmax", "mse"):
            words = f"per_channel {estimator}"
            yield Entry(
                f"int{bits} {estimator}",
                f"int{bits} {words} narrow",
                f"uint{bits} {words}",
                known.get(estimator, {}) if bits == 4 else {},
            )


ENTRIES: tuple[Entry, ...] = (
    *_integers(),
    Entry("VS-Quant 4/16:4", "int4 group16:4 narrow", "uint4 group16:4", {"gaussian": 21.1, "laplace": 19.2}),
    Entry("MX4", "mx4", known={"row_scaled": 15.8}),
    Entry("MX6", "mx6", known={"row_scaled": 28.4}),
    Entry("MX9", "mx9", known={"row_scaled": 46.6}),
    Entry("MXFP8 E4M3", "mxfp8_e4m3"),
    Entry("MXFP8 E5M2", "mxfp8_e5m2"),
    Entry("MXFP6 E3M2", "mxfp6_e3m2"),
    Entry("MXFP6 E2M3", "mxfp6_e2m3"),
    Entry("MXFP4 floor", "mxfp4:floor", known={"gaussian": 18.8, "laplace": 17.9}),
    Entry("MXFP4 rceil", "mxfp4:rceil", known={"gaussian": 18.75, "laplace": 17.6}),
    Entry("MXFP4 mse", "mxfp4:mse", known={"gaussian": 19.05, "laplace": 18.24}),
    Entry("MXINT8", "mxint8"),
    Entry("NVFP4", "nvfp4", known={"gaussian": 20.4, "laplace": 20.7}),
    Entry("NVFP4 four over six", "nvfp4:four_six", known={"gaussian": 21.19, "laplace": 21.19}),
    Entry("IF4", "if4"),
    Entry("FP8 E4M3", "fp8 per_channel"),
    Entry("FP8 E5M2", "fp8:e5m2 per_channel"),
    Entry("binary", "bwn", known={"gaussian": 4.40, "laplace": 3.01}),
    Entry("ternary 0.7", "twn", known={"gaussian": 7.18, "laplace": 5.49}),
    Entry("ternary exact", "twn:exact", known={"gaussian": 7.21, "laplace": 5.78}),
    Entry("SEQ ternary", "seq:ternary per_channel mse", known={"gaussian": 7.22, "laplace": 5.78}),
    Entry("SEQ 2 bit", "seq per_channel mse", known={"gaussian": 9.25, "laplace": 7.02}),
    Entry("k-means 2 bit", "kmeans2", known={"gaussian": 9.30, "laplace": 7.54}),
    Entry("k-means 3 bit", "kmeans3", known={"gaussian": 14.62, "laplace": 12.64}),
    Entry("k-means 4 bit", "kmeans4", known={"gaussian": 20.22, "laplace": 18.13}),
)


def _gaussian(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _laplace(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return torch.empty(shape).exponential_(generator=generator) * signs


def _relu(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).relu()


def _row_scaled(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * torch.randn(shape[0], 1, generator=generator).abs()


#: By name: a sample of a shape.
DATA: dict[str, Callable[[tuple[int, int], torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "laplace": _laplace,
    "relu": _relu,
    "row_scaled": _row_scaled,
}


def quantized(x: Tensor, spec: QuantSpec) -> Tensor:
    """`x` `[C_out, C_in]` as a weight of this spec."""
    quantizer = make_weight_quantizer(spec, "benchmark", tuple(x.shape)).eval()
    with torch.no_grad():
        quantizer.calibrate(x)
        return quantizer(x)


def measure(entry: Entry, samples: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A row for each sample."""
    rows = []
    for name, x in samples.items():
        spec = QuantSpec.parse(entry.unsigned if entry.unsigned and x.min() >= 0 else entry.spec)
        rows.append(
            {
                "format": entry.name,
                "spec": str(spec),
                "effective_bits": spec_bits(spec, tuple(x.shape)) / x.numel(),
                "data": name,
                "qsnr_db": round(sqnr_db(x, quantized(x, spec)).item(), 4),
                "known_db": entry.known.get(name),
            }
        )
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__, data=False)
    names = [entry.name for entry in ENTRIES]
    parser.add_argument(
        "--formats", nargs="+", choices=names, default=names, metavar="NAME", help="formats to measure (default: all)"
    )
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help=f"rows of the data (default: {ROWS})")
    parser.add_argument(
        "--columns", type=int, default=COLUMNS, metavar="N", help=f"elements of a row (default: {COLUMNS})"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the data (default: 0)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    common.start(options)
    console = Console()
    shape = options.rows, options.columns
    samples = {name: draw(shape, torch.Generator().manual_seed(options.seed)) for name, draw in DATA.items()}
    results: dict[str, Any] = {"rows": options.rows, "columns": options.columns, "seed": options.seed, "results": []}
    chosen = [entry for entry in ENTRIES if entry.name in options.formats]
    with Progress(console=console, transient=True) as progress:
        for entry in progress.track(chosen, description="quantizing"):
            results["results"] += measure(entry, samples)
    common.write_json(options.json, results)
    console.print(table(results))
    return results


def table(results: dict[str, Any]) -> Table:
    """Formats down in the order of their bits, data across; known values in parentheses."""
    rows = results["results"]
    result = Table(title=f"QSNR in dB (known), {results['rows']} rows of {results['columns']}")
    result.add_column("format")
    for heading in ("bits", *DATA):
        result.add_column(heading, justify="right")
    # The signed spec's bits; an unsigned one takes as many.
    bits = {row["format"]: row["effective_bits"] for row in rows}
    for name in sorted(bits, key=lambda name: bits[name]):
        cells = {row["data"]: _cell(row) for row in rows if row["format"] == name}
        result.add_row(name, f"{bits[name]:.2f}", *(cells[data] for data in DATA))
    return result


def _cell(row: dict[str, Any]) -> str:
    known = "" if row["known_db"] is None else f" ({row['known_db']:g})"
    return f"{row['qsnr_db']:.2f}{known}"


if __name__ == "__main__":
    main()
