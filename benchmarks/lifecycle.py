"""The life of a quantized model, for models of every kind: inject, switch off, calibrate, train, save, load, compile.

    python -m benchmarks.lifecycle --json out.json

For each model, all layers at 8 bits (`w8a8`):

    layers              that hold quantizers; every one of them must run, in training and in evaluation
    weight_coverage     share of the weights that are quantized
    compute_coverage    share of the multiply-accumulates of one batch whose operands all are
    with_products       the same under `w8a8 products`
    counted             whether MACs and the share that `w8a8` quantizes are those counted by hand; of some models
    disabled_bit_equal  with all quantizers off, outputs are those of the float model, bit for bit
    removed_bit_equal   the same, with the quantizers taken out
    sqnr_db             of the outputs after calibration, in dB
    packed_bit_equal    a packed file, loaded into a fresh model: outputs bit-equal; or why there is none
    checkpoint          three steps of QAT, a checkpoint, loaded into a fresh model in a new process: outputs bit-equal
    onnx                "verified": ONNX Runtime computes what the model does, 99 % of the elements within one step of 8
                        bits; otherwise the share, or why there is no file
    compile             "ok": torch.compile takes the quantized model in one graph; otherwise what it said

A model that fails is listed with its message, and the others go on. Weights and data are random (seed 0).
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import subprocess
import sys
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
from lq_plugin import QAT, Ledger, QuantPlan, calibrate, load_checkpoint, prepare, remove
from lq_plugin.errors import ExportError
from lq_plugin.export import export_onnx, load_packed, save_packed, verify
from lq_plugin.functional.error import sqnr_db
from lq_plugin.model import quantizers
from lq_plugin.model.calibrate import evaluating, float_forward
from lq_plugin.model.graph.record import Recording, record
from lq_plugin.model.prepare import quantized_layers

PACKAGES = ("transformers", "timm", "torch_geometric", "peft", "onnxruntime")
BATCH_SIZE = 8
STEPS = 3
#: Share of the elements that ONNX Runtime has within one step.
VERIFIED = 0.99


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


def fit(case: Case, path: Path) -> Student:
    """A model after `STEPS` steps of quantization-aware training, whose checkpoint is written to `path`."""
    module, inputs = student(case, quantized=case.adapt is not None)[0], inputs_of(case)
    with torch.no_grad():
        answers = torch.randn_like(student(case)[0](*inputs))
    loader = DataLoader(TensorDataset(*inputs, answers), BATCH_SIZE)
    trainer = L.Trainer(
        callbacks=[QAT(case.plan)], max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=path.parent,
    )  # fmt: skip
    trainer.fit(module.train(), loader, loader)
    trainer.save_checkpoint(path)
    return module.eval()


def keep_trained(case: Case, folder: Path) -> None:
    """Trains a model and keeps its checkpoint and what it computes, for `reload` in another process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        trained = fit(case, folder / f"{CASES.index(case)}.ckpt")
    with torch.no_grad():
        torch.save(trained(*inputs_of(case, seed=2)), folder / f"{CASES.index(case)}.pt")


def reload(folder: Path) -> dict[str, Any]:
    """Returns by model whether a fresh one computes what the trained one did once it has loaded its checkpoint."""
    found: dict[str, Any] = {}
    for path in folder.glob("*.pt"):
        case = CASES[int(path.stem)]
        try:
            fresh, _ = student(case, seed=4)
            load_checkpoint(fresh, path.with_suffix(".ckpt"))
            with torch.no_grad():
                found[case.name] = torch.equal(fresh.eval()(*inputs_of(case, seed=2)), torch.load(path))
        except Exception as error:
            found[case.name] = f"{type(error).__name__}: {first_line(error)}"
    return found


def packed(case: Case, module: Student, inputs: Inputs, folder: Path) -> bool | str:
    """Returns whether a fresh model computes what this one does, bit for bit, once it has read its packed file."""
    try:
        save_packed(module, folder / "model.safetensors", inputs=inputs)
        fresh, _ = student(case, seed=4)
        load_packed(fresh, folder / "model.safetensors")
    except ExportError as error:
        return reason_of(error)
    with torch.no_grad():
        return torch.equal(fresh.eval()(*inputs), module(*inputs))


def in_onnx(module: Student, inputs: Inputs, folder: Path) -> str:
    """`"verified"`, the share of the outputs within one step, or why there is no file."""
    try:
        export_onnx(module, inputs, folder / "model.onnx")
        within = verify(module, folder / "model.onnx", [inputs]).within_one_step
    except ExportError as error:
        return reason_of(error)
    return "verified" if within >= VERIFIED else f"{within:.1%} within one step"


def reason_of(error: ExportError) -> str:
    """The first of the reasons of a refusal."""
    lines = [line for line in str(error).splitlines() if line.strip().startswith("-")] or str(error).splitlines()
    return f"refused: {lines[0].strip(' -')}"


def counted(case: Case, ledger: Ledger) -> bool | None:
    """Returns whether a ledger has the MACs, and the share that is quantized, that were counted by hand."""
    if case.macs is None:
        return None
    macs = sum(entry.macs or 0 for entry in ledger)
    return macs == case.macs and ledger.compute_coverage == (case.macs - case.products) / case.macs


def graph_breaks(module: nn.Module, inputs: Inputs) -> list[str]:
    """Returns why torch.compile splits the model; nothing when it becomes one graph."""
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
    """Returns the first line of an error that goes on about its origins."""
    return (str(message).splitlines() or [""])[0]


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """One row. Nothing raises: what fails is in its `error`.

    Args:
        case: the model.
        folder: for files; checkpoints of trained models stay there, see `reload`.
    """
    row: dict[str, Any] = {"model": case.name} | dict.fromkeys(
        (
            "layers",
            "weight_coverage",
            "compute_coverage",
            "with_products",
            "counted",
            "disabled_bit_equal",
            "removed_bit_equal",
            "sqnr_db",
            "packed_bit_equal",
            "checkpoint",
            "onnx",
            "compile",
            "error",
        )
    )
    try:
        for key, value in _measured(case, folder):
            row[key] = value
    except Exception as error:
        # The benchmark reports what fails in any of the libraries involved, and goes on.
        row["error"] = f"{type(error).__name__}: {first_line(error)}"
    return row


def _measured(case: Case, folder: Path) -> Iterator[tuple[str, Any]]:
    plain, _ = student(case)
    module, ledger = student(case, quantized=True)
    inputs = inputs_of(case)
    with torch.no_grad():
        answer = plain(*inputs)
        with float_forward(module):
            ledger.add_recording(record(module, lambda: module(*inputs)))
            yield "layers", len(ledger.quantized)
            yield from ledger.coverages().items()
            yield "with_products", with_products(case, inputs)
            yield "counted", counted(case, ledger)
            with ordinary_paths():
                yield "disabled_bit_equal", torch.equal(module(*inputs), plain(*inputs))
                taken_out = copy.deepcopy(module)
                remove(taken_out)
                yield "removed_bit_equal", torch.equal(taken_out(*inputs), plain(*inputs))
        rows = [tuple(part) for part in zip(*(tensor.split(BATCH_SIZE) for tensor in inputs), strict=True)]
        calibrate(module, rows, lambda batch: module(*batch))
        yield "sqnr_db", sqnr_db(answer, module(*inputs)).item()
    if never := sorted({*idle(module, ledger, inputs, False), *idle(module, ledger, inputs, True)}):
        raise RuntimeError(f"quantizers that never ran: {', '.join(never)}")
    yield "packed_bit_equal", packed(case, module, inputs, folder)
    keep_trained(case, folder)
    yield "onnx", in_onnx(module, tuple(part[:BATCH_SIZE] for part in inputs), folder)
    yield "compile", compiles(module, plain, inputs)


def with_products(case: Case, inputs: Inputs) -> float | None:
    """Compute coverage where products of activations are quantized, too."""
    module, _ = student(case)
    seen: Recording = record(module, lambda: module(*inputs))
    if not any(call.macs and len(call.operands) > 1 for call in seen.functional_calls) and not any(
        call.weight_macs and call.op == "MultiheadAttention" for call in seen.module_calls
    ):
        return None
    products = QuantPlan.parse("w8a8 products").rules[-1]
    ledger = prepare(module, QuantPlan([*case.plan.rules, products]), seen)
    ledger.add_recording(seen)
    return ledger.compute_coverage


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
    parser.add_argument("--reload", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    common.start(options)
    if options.reload is not None:
        with quiet():
            (options.reload / "reloaded.json").write_text(json.dumps(reload(options.reload)), encoding="utf-8")
        return {}
    console = Console()
    results: dict[str, Any] = {"results": []}
    chosen = [case for case in CASES if case.name in options.models]
    with Progress(console=console, transient=True) as progress, quiet(), tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("", total=len(chosen))
        for case in chosen:
            progress.update(task, description=case.name)
            results["results"].append(measure(case, Path(folder)))
            common.write_json(options.json, results, packages=PACKAGES)
            progress.advance(task)
        subprocess.run([sys.executable, "-m", "benchmarks.lifecycle", "--reload", folder], check=True)
        reloaded = json.loads((Path(folder) / "reloaded.json").read_text(encoding="utf-8"))
        for row in results["results"]:
            row["checkpoint"] = reloaded.get(row["model"])
        common.write_json(options.json, results, packages=PACKAGES)
    console.print(table(results))
    return results


#: Columns of the table.
FORMS = {
    "layers": "layers", "weight_coverage": "weights", "compute_coverage": "compute", "with_products": "products",
    "counted": "counted", "disabled_bit_equal": "off", "removed_bit_equal": "out", "sqnr_db": "dB",
    "packed_bit_equal": "packed", "checkpoint": "saved", "onnx": "ONNX", "compile": "compile",
}  # fmt: skip


def shown(value: Any) -> str:
    """A cell: shares below 1.5 as percentages."""
    if isinstance(value, float):
        return f"{value:.1%}" if value <= 1 else f"{value:.1f}"
    return "" if value is None else str(value)


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
    for heading in FORMS.values():
        result.add_column(heading, no_wrap=True)
    for row in rows:
        result.add_row(row["model"], *(escape(shown(row[key])) for key in FORMS))
    return result


if __name__ == "__main__":
    main()
