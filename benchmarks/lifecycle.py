"""The life of a quantized model, for models of every kind: inject, switch off, calibrate, train, save, load, compile.

    python -m benchmarks.lifecycle --json out.json

For each model, all layers at 8 bits (`w8a8`):

    layers              that hold quantizers; every one of them must run, in training and in evaluation
    weight_coverage     share of the weights that are quantized
    compute_coverage    share of the multiply-accumulates of one batch whose operands all are (results counted, as
                        macs_in_quantized_layers, those of layers of which any tensor is)
    disabled_bit_equal  with all quantizers off, outputs are those of the float model, bit for bit
    sqnr_db             of the logits after calibration, in dB
    round_trip          two steps of QAT, a checkpoint, loaded into a fresh model: outputs bit-equal
    compile             "ok": torch.compile takes the quantized model in one graph; otherwise what it said

A model that fails is listed with its message, and the others go on. Weights and data are random (seed 0).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import common
from benchmarks.lifecycle_models import CASES, PLAN, Case, Inputs
from lq_plugin import QAT, Ledger, calibrate, load_checkpoint, prepare
from lq_plugin.functional.error import sqnr_db
from lq_plugin.model import quantizers
from lq_plugin.model.calibrate import evaluating, float_forward
from lq_plugin.model.graph.record import record
from lq_plugin.model.prepare import quantized_layers

BATCH_SIZE = 8
STEPS = 2


class Student(L.LightningModule):
    """Trains any model on random answers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*inputs)

    def training_step(self, batch: Inputs, batch_idx: int) -> Tensor:
        *inputs, answers = batch
        return F.mse_loss(self(*inputs), answers)

    def validation_step(self, batch: Inputs, batch_idx: int) -> None:
        self(*batch[:-1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)


def inputs_of(case: Case, seed: int = 0) -> Inputs:
    """The case's data, the same in every call."""
    return case.inputs(torch.Generator().manual_seed(seed))


def student(case: Case, quantized: bool = False, seed: int = 0) -> tuple[Student, Ledger]:
    """The case's model, float or prepared, in evaluation mode; the same weights in every call with one seed.

    Raises:
        ModuleNotFoundError: the case needs a package that is not installed.
    """
    if case.package is not None and find_spec(case.package) is None:
        raise ModuleNotFoundError(f"{case.package} is not installed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Student(case.build())
        if case.adapt is not None:
            if quantized:
                prepare(module, PLAN)
            module.model = case.adapt(module.model)
    return module.eval(), prepare(module, case.plan) if quantized else Ledger()


def table_of(layer: nn.Module) -> object:
    """The parameter that a layer reads: modules that share it are one table to a plan."""
    return layer._parameters.get("weight", layer)


def idle(module: nn.Module, ledger: Ledger, inputs: Inputs, training: bool) -> list[str]:
    """Names of the quantizers that do not run in one forward pass although the ledger says that their layers are
    quantized. A shared table counts as read where one of its modules reads it."""
    chosen = [
        (q, table_of(cast(nn.Module, layer)))
        for name, layer in quantized_layers(module)
        if ledger[name].quantized
        for q in quantizers(cast(nn.Module, layer))
    ]
    ran: set[int] = set()
    handles = [
        q.register_forward_hook(lambda q, _args, _y, table=table: ran.update([id(q), id(table)])) for q, table in chosen
    ]
    try:
        with evaluating(module), torch.no_grad():
            module.train(training)
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    shared = Counter(id(layer._parameters.get("weight")) for _, layer in quantized_layers(module))
    return [q.name for q, table in chosen if id(q) not in ran and not (shared[id(table)] > 1 and id(table) in ran)]


def fit(case: Case, folder: Path) -> tuple[Student, Path]:
    """A model after `STEPS` steps of quantization-aware training, and the checkpoint of that moment."""
    module, inputs = student(case, quantized=case.adapt is not None)[0], inputs_of(case)
    with torch.no_grad():
        answers = torch.randn_like(student(case)[0](*inputs))
    loader = DataLoader(TensorDataset(*inputs, answers), BATCH_SIZE)
    trainer = L.Trainer(
        callbacks=[QAT(case.plan)], max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module.train(), loader, loader)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module.eval(), folder / "last.ckpt"


def round_trip(case: Case) -> bool:
    """Whether a fresh model computes what the trained one does, bit for bit, once it has loaded its checkpoint."""
    inputs = inputs_of(case, seed=2)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        trained, path = fit(case, Path(folder))
        fresh, _ = student(case, seed=4)
        load_checkpoint(fresh, path)
    with torch.no_grad():
        return torch.equal(fresh.eval()(*inputs), trained(*inputs))


def graph_breaks(module: nn.Module, inputs: Inputs) -> list[str]:
    """Why torch.compile splits the model; nothing when it becomes one graph."""
    torch.compiler.reset()
    with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
        found = torch._dynamo.explain(module)(*inputs)
    torch.compiler.reset()
    return [first_line(reason.reason) for reason in found.break_reasons]


def compiles(module: nn.Module, plain: nn.Module, inputs: Inputs) -> str:
    """`"ok"` for a model in one graph with the numbers of the one that is not compiled; otherwise what is wrong."""
    try:
        if breaks := graph_breaks(module, inputs):
            return f"{len(breaks)} graph breaks ({len(graph_breaks(plain, inputs))} of the float model): {breaks[0]}"
        with torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
            # The captured graph run as it is: what a code generator makes of it may round differently.
            compiled = torch.compile(module, backend="eager", fullgraph=True)(*inputs)
            return "ok" if torch.equal(compiled, module(*inputs)) else "other numbers than without torch.compile"
    except torch._dynamo.exc.TorchDynamoException as error:
        return first_line(error)
    finally:
        torch.compiler.reset()


def first_line(message: object) -> str:
    """Of an error that goes on about its origins."""
    return (str(message).splitlines() or [""])[0]


def measure(case: Case) -> dict[str, Any]:
    """One row. Nothing raises: what fails is in its `error`."""
    row: dict[str, Any] = {"model": case.name} | dict.fromkeys(
        (
            "layers",
            "weight_coverage",
            "compute_coverage",
            "disabled_bit_equal",
            "sqnr_db",
            "round_trip",
            "compile",
            "error",
        )
    )
    try:
        for key, value in _measured(case):
            row[key] = value
    except Exception as error:
        # The benchmark reports what fails in any of the libraries involved, and goes on.
        row["error"] = f"{type(error).__name__}: {first_line(error)}"
    return row


def _measured(case: Case) -> Iterator[tuple[str, Any]]:
    plain, _ = student(case)
    module, ledger = student(case, quantized=True)
    inputs = inputs_of(case)
    with torch.no_grad():
        logits = plain(*inputs)
        with float_forward(module):
            ledger.add_recording(record(module, lambda: module(*inputs)))
            yield "layers", len(ledger.quantized)
            yield from ledger.coverages().items()
            with ordinary_paths():
                yield "disabled_bit_equal", torch.equal(module(*inputs), plain(*inputs))
        rows = [tuple(part) for part in zip(*(tensor.split(BATCH_SIZE) for tensor in inputs), strict=True)]
        calibrate(module, rows, lambda batch: module(*batch))
        yield "sqnr_db", sqnr_db(logits, module(*inputs)).item()
    if never := sorted({*idle(module, ledger, inputs, False), *idle(module, ledger, inputs, True)}):
        raise RuntimeError(f"quantizers that never ran: {', '.join(never)}")
    yield "round_trip", round_trip(case)
    yield "compile", compiles(module, plain, inputs)


@contextmanager
def ordinary_paths() -> Iterator[None]:
    """Without the fused kernels of evaluation, which round differently and which quantized encoder layers do not
    call."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Advice of torch, Lightning and transformers stays out of the table."""
    chosen = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "transformers")]
    levels = [logger.level for logger in chosen]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in chosen:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(chosen, levels, strict=True):
                logger.setLevel(level)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__, data=False)
    names = [case.name for case in CASES]
    parser.add_argument(
        "--models", nargs="+", choices=names, default=names, metavar="NAME", help="models to run (default: all)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    common.start(options)
    console = Console()
    results: dict[str, Any] = {"results": []}
    chosen = [case for case in CASES if case.name in options.models]
    with Progress(console=console, transient=True) as progress, quiet():
        task = progress.add_task("", total=len(chosen))
        for case in chosen:
            progress.update(task, description=case.name)
            results["results"].append(measure(case))
            common.write_json(options.json, results, packages=("transformers", "timm", "peft"))
            progress.advance(task)
    console.print(table(results))
    return results


def table(results: dict[str, Any]) -> Table:
    """Models down; what failed is said below."""
    rows = results["results"]
    failed = [f"{row['model']}: {row['error']}" for row in rows if row["error"] is not None]
    result = Table(
        title=f"w8a8: {len(rows)} models, {len(failed)} failed",
        caption=escape("\n".join(failed)),
        caption_justify="left",
    )
    result.add_column("model", no_wrap=True)
    for heading in ("layers", "weights", "compute", "off", "dB", "saved"):
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("compile")
    forms = {"layers": "{}", "weight_coverage": "{:.1%}", "compute_coverage": "{:.1%}", "disabled_bit_equal": "{}"}
    forms |= {"sqnr_db": "{:.1f}", "round_trip": "{}", "compile": "{}"}
    for row in rows:
        result.add_row(
            row["model"], *("" if row[key] is None else text.format(row[key]) for key, text in forms.items())
        )
    return result


if __name__ == "__main__":
    main()
