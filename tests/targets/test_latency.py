"""Tables of latencies in runtimes of integer programs, and searches for their targets."""

import pytest
import torch
from torch import nn

from lq_plugin import QuantPlan, Rule, calibrate, prepare
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import ExportError
from lq_plugin.export.latency import LatencyOptions, latency_table, model_latency
from lq_plugin.intent.plan import LayerPlan
from lq_plugin.intent.spec import QuantSpec
from lq_plugin.search import search
from lq_plugin.search.study.latency import TABLE
from tests.search.conftest import CPU

pytestmark = pytest.mark.filterwarnings("ignore")  # of the two packages: each import of them gives some
RUNTIMES = {"executorch": "executorch", "ai_edge_litert": "litert"}


def plan(weight, read="uint8 affine"):
    return LayerPlan(weight=QuantSpec.parse(weight), input=QuantSpec.parse(read) if read else None)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_every_layer_under_every_pair(runtime):
    """Weights of 2 and 8 bits are bytes in these files: one measurement."""
    pytest.importorskip(runtime)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    x, options = torch.randn(2, 3, 8, 8), LatencyOptions(runtime, batch=2, rounds=2)
    plans = [{"0": plan("int8 per_channel")}, {"0": plan("int2 per_channel")}, {"4": plan("int4 per_channel mse")}]
    table = latency_table(net, [x], plans, options)
    assert {name: list(row) for name, row in table.layers.items()} == {
        "0": ["float", "int8 per_channel / 8 bit"],
        "4": ["float", "int8 per_channel / 8 bit"],
    }
    assert all(value > 0 for row in table.layers.values() for value in (*row.values(), table.float_model))
    gain = table.layers["0"]["int8 per_channel / 8 bit"] - table.layers["0"]["float"]
    assert table.predict(plans[1]) == pytest.approx(max(table.float_model + gain, 0.0) / 2)
    with pytest.raises(ExportError, match="0 under 'int8 per_channel / float': .*the input is float"):
        latency_table(net, [x], [{"0": plan("int8 per_channel", None)}], options)
    prepare(net, QuantPlan([Rule("*", weight="int4 per_channel", input="uint8 affine")]))
    calibrate(net, [x])
    assert model_latency(net, [x], options) > 0


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_search_weighs_milliseconds_of_its_target(runtime, tmp_path):
    pytest.importorskip(runtime)
    rule = {"match": "head.2", "weight": ["int8 per_channel", "int4 per_channel"], "input": "uint8 affine"}
    found = search(
        DigitsCNN(), DigitsDataModule(batch_size=120), {"weight": "float", "rules": [rule]}, "val/acc",
        cost="latency", n_trials=2, trainer=CPU, calibration_batches=1, progress=False, seeds=1,
        target=RUNTIMES[runtime], latency={"rounds": 2},
    )  # fmt: skip
    table = found.study.user_attrs[TABLE]
    assert table["options"]["runtime"] == runtime
    rows = table["layers"]["head.2"]
    want = max(table["float_model"] + rows["int8 per_channel / 8 bit"] - rows["float"], 0.0)
    assert [candidate.cost for candidate in found.candidates] == pytest.approx([want] * len(found.candidates))


def test_the_number_of_threads_of_open_programs_stays(tmp_path):
    """ExecuTorch has one pool of threads for a process; programs that were made for an earlier one crash."""
    pytest.importorskip("executorch")
    from lq_plugin.export.executorch_file import float_executorch, open_executorch

    net, x = nn.Linear(4, 3), torch.randn(2, 4)
    float_executorch(net, (x,), tmp_path / "net.pte")
    reader = open_executorch(tmp_path / "net.pte", threads=2)
    with pytest.raises(ExportError, match="open programs run on 2, and 1 were asked for"):
        open_executorch(tmp_path / "net.pte", threads=1)
    torch.testing.assert_close(reader.run(x)[0], net(x).detach())
    del reader
    torch.testing.assert_close(open_executorch(tmp_path / "net.pte", threads=1).run(x)[0], net(x).detach())
