"""Files of earlier builds: what they held is read bit-equal, and training, searches and sweeps go on from them.

Stored tensors and the weights they stand for are compared bit by bit. Outputs, and all that a further training step
changes, are sums of floats: they depend on the order in which a processor adds, and get a tolerance of a few such
errors.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lq_plugin import PTQ, QuantPlan, load_checkpoint
from lq_plugin.commands.report_sources import load_report
from lq_plugin.export import load_packed
from lq_plugin.model.measure.cost import cost
from lq_plugin.quantizers.staged import present_keys
from lq_plugin.report import ReportData, render
from lq_plugin.report.data import VERSION
from tests.compatibility.families import FAMILIES, Data, Module, Searched, evaluated, resume, state_of, train, trainer
from tests.compatibility.studies import own_answers, run_search, run_sweep, searched
from tests.compatibility.write import PREPARED, prepared_plan

ARCHIVES = sorted((Path(__file__).parent / "written").glob("*.zip"))

pytestmark = [
    # An archive of a newer Lightning, read with the oldest one that is supported.
    pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning"),
    pytest.mark.filterwarnings("ignore:`max_epochs` was not set"),
]


@dataclass(frozen=True)
class Written:
    """The files of one archive, in a folder."""

    folder: Path

    @cached_property
    def numbers(self) -> dict[str, Any]:
        return json.loads((self.folder / "numbers.json").read_text())

    @cached_property
    def data(self) -> Data:
        return Data(**load_file(self.folder / "data.safetensors"))

    def checkpoint(self, family: str) -> Path:
        return self.folder / "checkpoints" / f"{family}.ckpt"

    def _stored_state(self, family: str) -> dict[str, Tensor]:
        return torch.load(self.checkpoint(family), weights_only=True)["state_dict"]

    def state(self, family: str) -> dict[str, Tensor]:
        """The checkpoint's tensors by the names that they have today."""
        stored = self._stored_state(family)
        present = present_keys(list(stored))
        return {present[key]: value for key, value in stored.items()}

    def expected(self, family: str, part: str = "") -> dict[str, Tensor]:
        """Tensors of one part, without its name; of all that `evaluated` gives where there is none."""
        found = load_file(self.folder / "expected" / f"{family}.safetensors")
        if not part:
            return {key: value for key, value in found.items() if key.startswith(("weight/", "output/"))}
        values = {key.removeprefix(f"{part}/"): value for key, value in found.items() if key.startswith(f"{part}/")}
        present = present_keys(list(self._stored_state(family)))
        return {present.get(key, key): value for key, value in values.items()}


def cases(kind: str) -> list[Any]:
    """Archives with each of their families that has a file of a kind."""
    found = []
    for path in ARCHIVES:
        with ZipFile(path) as file:
            names = [Path(name).stem for name in file.namelist() if name.startswith(f"{kind}/")]
        found += [pytest.param(path, name, id=f"{path.stem}-{name}") for name in names]
    return found


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Written]:
    found = {}
    for path in ARCHIVES:
        folder = tmp_path_factory.mktemp(path.stem)
        with ZipFile(path) as file:
            file.extractall(folder)
        found[path] = Written(folder)
    return found


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.stem)
def written(request: pytest.FixtureRequest, unpacked: Mapping[Path, Written]) -> Written:
    return unpacked[request.param]


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    differing = [
        key for key, value in found.items() if value.dtype != wanted[key].dtype or not torch.equal(value, wanted[key])
    ]
    assert differing == []


def assert_evaluates_to(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    weights = [key for key in found if key.startswith("weight/")]
    assert [key for key in weights if not torch.equal(found[key], wanted[key])] == []
    for key in found.keys() - set(weights):
        torch.testing.assert_close(
            found[key], wanted[key], rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_there_are_archives() -> None:
    assert ARCHIVES


@pytest.mark.parametrize(("archive", "family"), cases("checkpoints"))
def test_a_checkpoint_is_read_bit_equal(archive: Path, family: str, unpacked: Mapping[Path, Written]) -> None:
    written = unpacked[archive]
    module = FAMILIES[family].module(1)
    load_checkpoint(module, written.checkpoint(family))
    assert_same(state_of(module), written.state(family))
    assert_evaluates_to(evaluated(module, written.data.x), written.expected(family))
    found, wanted = cost(module), written.numbers["families"][family]["cost"]
    assert {name: getattr(found, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("archive", "family"), [case for case in cases("checkpoints") if not FAMILIES[case.values[1]].phases]
)
def test_training_goes_on_for_a_step(archive: Path, family: str, unpacked: Mapping[Path, Written]) -> None:
    written = unpacked[archive]
    before, changed = written.state(family), written.expected(family, "resumed")
    found = state_of(resume(FAMILIES[family], written.data, written.checkpoint(family)))
    assert found.keys() == before.keys() | changed.keys()
    assert len(changed) > 2
    assert_same(
        {key: value for key, value in found.items() if key not in changed},
        {k: v for k, v in before.items() if k not in changed},
    )
    for key, value in changed.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.filterwarnings("ignore:.*of its values are negative and become 0")
@pytest.mark.parametrize("family", ["ranges", "inputs"])
def test_the_same_training_finds_the_same_ranges(family: str, written: Written, tmp_path: Path) -> None:
    """A default of an estimator is in no file: it shows in what a run finds from the start."""
    found, wanted = state_of(train(FAMILIES[family], written.data, tmp_path / "again.ckpt")), written.state(family)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(
    ("archive", "family"), [case for case in cases("checkpoints") if FAMILIES[case.values[1]].phases]
)
def test_a_calibrated_model_is_evaluated_as_it_was(
    archive: Path, family: str, unpacked: Mapping[Path, Written], tmp_path: Path
) -> None:
    written, definition = unpacked[archive], FAMILIES[family]
    module = definition.module(1)
    callback = PTQ(definition.quant_plan(), phases=definition.phases)
    (logged,) = trainer(tmp_path, callback).validate(
        module, datamodule=written.data, ckpt_path=written.checkpoint(family), verbose=False
    )
    assert_same(state_of(module), written.state(family))
    assert logged["val/loss"] == pytest.approx(written.numbers["families"][family]["loss"], rel=1e-5)


@pytest.mark.parametrize(("archive", "family"), cases("packed"))
def test_a_packed_file_is_read_bit_equal(archive: Path, family: str, unpacked: Mapping[Path, Written]) -> None:
    written = unpacked[archive]
    module = FAMILIES[family].module(1)
    load_packed(module, written.folder / "packed" / f"{family}.safetensors")
    assert_same(state_of(module), written.expected(family, "packed"))
    assert_evaluates_to(evaluated(module, written.data.x), written.expected(family))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_bare_state_dict_is_read_bit_equal(suffix: str, written: Written) -> None:
    family = FAMILIES[PREPARED]
    net, path = family.module(1).net, written.folder / f"prepared{suffix}"
    load_checkpoint(net, path, prepared_plan(family))
    state = torch.load(path, weights_only=True) if suffix == ".pt" else load_file(path)
    assert_same(state_of(net), state)


def test_a_plan_is_read_and_written_as_it_was(written: Written) -> None:
    path = written.folder / "plan.yaml"
    plan = QuantPlan.from_yaml(path)
    assert plan.to_dict() == written.numbers["plan"]
    assert plan.to_yaml() == path.read_text()
    for family, numbers in written.numbers["families"].items():
        assert FAMILIES[family].quant_plan().to_dict() == numbers["plan"]


def test_a_report_is_read_and_drawn(written: Written) -> None:
    path = written.folder / "report.json"
    report = ReportData.load(path)
    # Nothing of it has changed but the number of the format.
    assert json.loads(report.to_json()) == json.loads(path.read_text()) | {"version": VERSION}
    assert "val/loss" in render(report)


def test_a_search_shows_its_front_and_goes_on(written: Written, tmp_path: Path) -> None:
    shutil.copytree(written.folder / "search", tmp_path / "search")
    wanted = written.numbers["search"]
    study = load_report(tmp_path / "search").study
    assert study is not None
    assert [trial.number for trial in study.trials if trial.front] == sorted(wanted["front"])

    module = Module(Searched())
    module.load_state_dict(load_file(written.folder / "searched.safetensors"))
    before = copy.deepcopy(module.state_dict())
    data = own_answers(module, written.data)
    result = run_search(module, data, tmp_path / "search", 5)
    assert_same(state_of(module), before)
    found = searched(result)
    assert found["candidates"][:4] == wanted["candidates"]
    assert [c.number for c in result.candidates] == list(range(5))
    assert math.isfinite(result.candidates[4].metric)
    assert result.candidates[4].plan not in [c.plan for c in result.candidates[:4]]

    # The plan of its best trial scores today what it scored then.
    best = result.candidates[wanted["best"]]
    ptq = PTQ(best.plan, calibration_batches=2, seed=0)
    (logged,) = trainer(tmp_path, ptq).validate(module, datamodule=data, verbose=False)
    assert logged["val/loss"] == pytest.approx(best.metric, rel=1e-3)


def test_a_sweep_goes_on(written: Written, tmp_path: Path) -> None:
    shutil.copytree(written.folder / "sweep", tmp_path / "sweep")
    trials = run_sweep(tmp_path / "sweep", 5)
    assert trials[:4] == written.numbers["sweep"]
    assert len(trials) == 5
    assert trials[4]["values"]
