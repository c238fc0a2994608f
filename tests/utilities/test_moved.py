"""Import paths of earlier versions are those of the present one, and say so."""

import subprocess
import sys
from importlib import import_module

import pytest
import torch

from lq_plugin.ptq.own_parameters import Refused
from lq_plugin.ranges import Sample, compare_ranges
from lq_plugin.search.space.constraint import Constraint
from lq_plugin.utilities.moved import MOVED, MOVED_NAMES


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_a_module_that_moved_is_the_module_and_warns(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    module = import_module(new)
    spec = module.__spec__
    with pytest.warns(DeprecationWarning, match=f"^{old} is {new} now$"):
        assert import_module(old) is module
    assert (module.__name__, module.__spec__) == (new, spec)
    monkeypatch.delitem(sys.modules, old)


@pytest.mark.parametrize(("old", "new"), MOVED_NAMES.items())
def test_a_name_that_moved_is_the_name_and_warns(old: str, new: str) -> None:
    (package, _, name), (home, _, present) = old.rpartition("."), new.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"^{old} is {new} now$"):
        assert getattr(import_module(package), name) is getattr(import_module(home), present)


def test_former_attributes_are_the_present_ones_and_warn() -> None:
    limit = Constraint.parse("effective_bits <= 4.5")
    table = compare_ranges(Sample.from_tensor(torch.randn(4, 16)), "int4")
    refused = Refused("bn", "it has no running statistics")
    for name in ("layer", "producer", "batch_norm"):
        with pytest.warns(DeprecationWarning, match=rf"^Refused.{name} is Refused.name now$"):
            assert getattr(refused, name) == refused.name == "bn"
    with pytest.warns(DeprecationWarning, match=r"^Constraint.bound is Constraint.limit now$"):
        assert limit.bound == 4.5
    with pytest.warns(DeprecationWarning, match=r"^RangeTable.fit is RangeTable.fitted now$"):
        assert table.fit is table.fitted


def test_the_warning_points_at_the_line_of_the_user() -> None:
    code = "from lq_plugin.spec import QuantSpec\nfrom lq_plugin.report import study_report\n"
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=True)
    said = {line.partition(" DeprecationWarning")[0] for line in done.stderr.splitlines() if " now" in line}
    assert said == {"<string>:1:", "<string>:2:"}
