"""Writes the files of the build that runs it: checkpoints, packed files, a plan, a report, studies, and their numbers.

    python -m tests.compatibility.write tests/compatibility/written/NAME.zip

All is seeded and small. See README.md.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import torch
from safetensors.torch import save_file
from torch import Tensor

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.export import load_packed, save_packed
from lq_plugin.model.measure.cost import cost
from lq_plugin.report import model_report
from tests.compatibility.families import (
    FAMILIES,
    FEATURES,
    SAMPLES,
    Data,
    Family,
    Module,
    Searched,
    evaluated,
    resume,
    state_of,
    train,
)
from tests.compatibility.studies import own_answers, run_search, run_sweep, searched

#: Of one family the state dict of `prepare` and `calibrate` is kept too, as torch and as safetensors write it.
PREPARED = "integer_forward"
#: What goes into the archive: neither pictures and pages nor the lock files of a database.
KEPT = {".ckpt", ".pt", ".safetensors", ".json", ".yaml", ".csv", ".db"}
PLAN = QuantPlan(
    [
        Rule("*", weight="int4 per_channel mse", input="uint8 affine ema"),
        Rule("type:Linear", weight="int4 group16:4"),
        Rule("re:head\\.(1|2)", weight="float", start="epoch 2"),
        Rule("block.*", weight="ttq", output="int8", start="step 500"),
    ],
    {"activations_start": "epoch 1", "observer_freeze": "step 900", "batch_norm_freeze": "epoch 8"},
)


def make_data() -> Data:
    """Samples from a fixed seed, most of them positive."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, FEATURES, generator=generator) + 0.5
    return Data(x, torch.randn(SAMPLES, 1, generator=generator))


def write_family(name: str, family: Family, data: Data, folder: Path) -> dict[str, Any]:
    """The files of one family; its numbers."""
    checkpoint = folder / "checkpoints" / f"{name}.ckpt"
    module = train(family, data, checkpoint)
    state, found = state_of(module), evaluated(module, data.x)
    numbers = {"cost": _cost(module), "plan": family.quant_plan().to_dict()}
    if family.packed:
        packed = folder / "packed" / f"{name}.safetensors"
        save_packed(module, packed)
        other = family.module(1)
        load_packed(other, packed)
        found |= {f"packed/{key}": value for key, value in state_of(other).items()}
    if family.phases:
        numbers["loss"] = float(module.loss((data.x, data.y)))
    else:
        resumed = state_of(resume(family, data, checkpoint))
        found |= {
            f"resumed/{key}": value
            for key, value in resumed.items()
            if not torch.equal(value, state.get(key, value.new_empty(0)))
        }
    _save(found, folder / "expected" / f"{name}.safetensors")
    return numbers


def write_prepared(data: Data, folder: Path) -> None:
    """The bare state dict of a model without Lightning."""
    family = FAMILIES[PREPARED]
    net = family.module().net
    plan = prepared_plan(family)
    prepare(net, plan)
    calibrate(net, [data.x])
    torch.save(net.state_dict(), folder / "prepared.pt")
    _save(net.state_dict(), folder / "prepared.safetensors")


def prepared_plan(family: Family) -> QuantPlan:
    """The family's plan for the network alone."""
    return QuantPlan(
        [
            Rule(rule.match.replace("net\\.", ""), weight=rule.weight, input=rule.input)
            for rule in family.quant_plan().rules
        ]
    )


def write_all(folder: Path) -> None:
    """Every file, into an empty folder."""
    for part in ("checkpoints", "packed", "expected"):
        (folder / part).mkdir()
    data = make_data()
    _save({"x": data.x, "y": data.y}, folder / "data.safetensors")
    numbers: dict[str, Any] = {
        "families": {name: write_family(name, family, data, folder) for name, family in FAMILIES.items()}
    }
    write_prepared(data, folder)
    PLAN.to_yaml(folder / "plan.yaml")
    numbers["plan"] = PLAN.to_dict()

    module = Module(Searched())
    prepare(module, "w4a8")
    calibrate(module, [data.x])
    model_report(module, QuantPlan.parse("w4a8"), metrics={"val/loss": 0.5}, title="small").save(folder / "report.json")

    torch.manual_seed(0)
    module = Module(Searched())
    _save(module.state_dict(), folder / "searched.safetensors")
    numbers["search"] = searched(run_search(module, own_answers(module, data), folder / "search", 4))
    numbers["sweep"] = run_sweep(folder / "sweep", 4)
    for database in folder.rglob("study.db"):
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    (folder / "numbers.json").write_text(json.dumps(numbers, indent=1))


def archive(folder: Path, path: Path) -> None:
    """All files of a folder, compressed, with one date for all: the same files make the same archive."""
    with ZipFile(path, "w", ZIP_DEFLATED, compresslevel=9) as file:
        for source in sorted(folder.rglob("*")):
            if source.suffix in KEPT and source.name != "multirun.yaml":  # which names the folder
                entry = ZipInfo(str(source.relative_to(folder)))
                entry.compress_type = ZIP_DEFLATED
                file.writestr(entry, source.read_bytes())


def _cost(module: Module) -> dict[str, float]:
    found = cost(module)
    return {name: getattr(found, name) for name in ("effective_bits", "bytes")}


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({key: value.detach().clone().contiguous() for key, value in tensors.items()}, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        write_all(Path(temporary))
        archive(Path(temporary), Path(sys.argv[1]))
