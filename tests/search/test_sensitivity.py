"""Sensitivities against formulas that are written out here, on the same batch."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin.commands.sensitivity import as_table, run
from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.errors import QuantizationError
from lq_plugin.search import Evaluator
from lq_plugin.search.sensitivity.measure import (
    FORWARD,
    GRADIENT,
    MEASURES,
    SensitivityTable,
    measure_all,
    measure_sensitivity,
    to_csv,
)
from lq_plugin.search.sensitivity.prefix import PrefixCache

from .conftest import CPU
from .test_main import composed

BITS = [2, 4, 8]
SPACE: dict[str, Any] = {"weight": {"bit_widths": BITS, "ranges": ["mse"]}}
INPUTS: dict[str, Any] = {
    "weight": "int4",
    "input": {"bit_widths": [3, 8], "ranges": ["minmax"], "signed": False, "affine": True},
}


@pytest.fixture(scope="module")
def batch() -> list[Tensor]:
    data = DigitsDataModule(batch_size=96)
    data.setup("fit")
    torch.manual_seed(3)
    return next(iter(data.train_dataloader()))


@pytest.fixture(scope="module")
def evaluator(trained: DigitsCNN, batch: list[Tensor]) -> Any:
    fresh = DigitsCNN(width=8)
    fresh.load_state_dict(trained.state_dict())
    with Evaluator(fresh, DigitsDataModule(batch_size=96), trainer=CPU, dataloader=[batch]) as made:
        made.calibrate(SPACE)
        yield made


@pytest.fixture(scope="module")
def tables(evaluator: Evaluator) -> dict[str, SensitivityTable]:
    return {table.measure: table for table in measure_all(evaluator, MEASURES, batches=1)}


def quantize(evaluator: Evaluator, name: str, spec: str) -> None:
    evaluator.apply(evaluator.layer_plans({"rules": [{"match": name, "weight": spec}]}))


@pytest.mark.parametrize("measure", MEASURES)
def test_fewer_bits_are_worse_by_every_measure(
    evaluator: Evaluator, tables: dict[str, SensitivityTable], measure: str
) -> None:
    table = tables[measure]
    assert set(table.values) == {unit.name for unit in evaluator.space.units}
    total = {
        bits: sum(v for values in table.values.values() for c, v in values.items() if c.startswith(f"int{bits}"))
        for bits in BITS
    }
    assert total[2] > total[4] > total[8] >= 0
    assert table.rows()[0]["unit"] == max(table.values, key=lambda name: max(table.values[name].values()))
    assert all(
        q is None for layer in evaluator.layers.values() for q in (layer.weight_quantizer, layer.input_quantizer)
    ), "float again"


@pytest.mark.parametrize("name", ["stem.0", "block.conv2", "head.2"])
@pytest.mark.parametrize("bits", [2, 4])
def test_forward_measures_are_their_formulas(
    evaluator: Evaluator, tables: dict[str, SensitivityTable], batch: list[Tensor], name: str, bits: int
) -> None:
    model, layer, (x, y) = evaluator.model.eval(), evaluator.layers[name], batch
    kept: list[Tensor] = []
    hook = layer.register_forward_hook(lambda m, a, out: kept.append(out.double()))
    with torch.no_grad():
        evaluator.apply({})
        z = model(x).double()
        quantize(evaluator, name, f"int{bits} mse")
        q = model(x).double()
    hook.remove()
    evaluator.apply({})
    p = torch.softmax(z, -1)
    own, quantized = kept
    expected = {
        "kl": (p * (p.log() - torch.log_softmax(q, -1))).sum(-1).mean(),
        "sqnr": (z - q).square().sum() / z.square().sum(),
        "layer_sqnr": (own - quantized).square().sum() / own.square().sum(),
        "loss": (F.cross_entropy(q, y) - F.cross_entropy(z, y)).clamp(0),
    }
    assert set(expected) == set(FORWARD)
    for measure, value in expected.items():
        assert tables[measure].values[f"{name}.weight"][f"int{bits} mse"] == pytest.approx(
            float(value), rel=1e-3, abs=2e-7
        ), measure


@pytest.mark.parametrize("name", ["stem.0", "head.2"])
def test_gradient_measures_are_their_formulas(
    evaluator: Evaluator, tables: dict[str, SensitivityTable], batch: list[Tensor], name: str
) -> None:
    model, layer, (x, y) = evaluator.model.eval(), evaluator.layers[name], batch
    quantize(evaluator, name, "int2 mse")
    change = (layer.quantized_weight() - layer.weight).detach().clone()
    evaluator.apply({})
    key, parameters = f"{name}.weight", {n: p.detach() for n, p in model.named_parameters()}

    def loss(weight: Tensor, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(
            torch.func.functional_call(model, parameters | {key: weight}, (image[None],)), label[None]
        )

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(layer.weight.detach(), x, y)
    fisher = 0.5 * (each.square().mean(0) * change.square()).sum()
    assert tables["fisher"].values[key]["int2 mse"] == pytest.approx(float(fisher), rel=1e-3)
    first_order = (each * change).flatten(1).sum(1).square().mean()
    assert tables["first_order"].values[key]["int2 mse"] == pytest.approx(float(first_order), rel=1e-3)
    assert not layer.weight.grad, "no gradient is left behind"


class Quadratic(LightningModule):
    """Loss ½ wᵀ diag(h) w for weights w, whatever the data: its Hessian is known."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 4, bias=False), nn.Linear(4, 4, bias=False)])
        self.curvature = [scale * torch.arange(32.0).view(4, 8), scale * torch.full((4, 4), 3.0)]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self(batch[0])
        return sum(
            0.5 * (h * layer.weight.square()).sum() for h, layer in zip(self.curvature, self.layers, strict=True)
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, 0))

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(6, 8)), 3)

    train_dataloader = val_dataloader


def test_the_trace_of_a_known_hessian_is_found() -> None:
    module = Quadratic()
    with Evaluator(module, trainer=CPU, calibration_batches=1) as evaluator:
        evaluator.calibrate(SPACE)
        values = measure_sensitivity(evaluator, "hessian").values
        for index, trace in enumerate((sum(range(32)), 48)):
            layer = evaluator.layers[f"layers.{index}"]
            quantize(evaluator, f"layers.{index}", "int2 mse")
            noise = float((layer.quantized_weight() - layer.weight).detach().square().sum())
            evaluator.apply({})
            # Random signs are exact for a diagonal Hessian.
            assert values[f"layers.{index}.weight"]["int2 mse"] == pytest.approx(
                trace / layer.weight.numel() * noise, rel=1e-4
            )


def test_others_may_be_at_their_widest(evaluator: Evaluator, batch: list[Tensor]) -> None:
    table = measure_sensitivity(evaluator, "kl", 1, others="widest").values
    assert all(row["int8 mse"] == pytest.approx(0, abs=1e-9) for row in table.values()), "nothing comes on top"
    model, x = evaluator.model.eval(), batch[0]
    wide = {"match": "*", "weight": "int8 mse"}
    with torch.no_grad():
        evaluator.apply(evaluator.layer_plans({"rules": [wide]}))
        p = torch.softmax(model(x).double(), -1)
        evaluator.apply(evaluator.layer_plans({"rules": [wide, {"match": "down.0", "weight": "int2 mse"}]}))
        expected = (p * (p.log() - torch.log_softmax(model(x).double(), -1))).sum(-1).mean()
    evaluator.apply({})
    assert table["down.0.weight"]["int2 mse"] == pytest.approx(float(expected), rel=1e-3)


def test_activations_are_measured_too(model: DigitsCNN) -> None:
    with Evaluator(model, DigitsDataModule(batch_size=120), trainer=CPU, calibration_batches=1) as evaluator:
        evaluator.calibrate(INPUTS)
        for table in measure_all(evaluator, ("kl", "layer_sqnr"), 1):
            assert set(table.values) == {f"{name}.input" for name in evaluator.layers}
            assert all(list(row) == [3, 8] and row[3] > row[8] > 0 for row in table.by_bits().values())


def test_a_prefix_is_computed_once_and_changes_no_bit(evaluator: Evaluator, batch: list[Tensor]) -> None:
    model = evaluator.model.eval()
    layers: dict[str, Any] = dict(evaluator.layers)
    calls: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda m, a, name=name: calls.append(name)) for name, module in layers.items()
    ]
    computed: list[int] = []
    with torch.no_grad():
        for budget in (2**30, 500_000, 0):
            cache = PrefixCache(layers, budget)
            evaluator.apply({})
            with cache.recording():
                model(batch[0])
            order, calls[:] = list(calls), []
            for name in layers:
                quantize(evaluator, name, "int2 mse")
                expected = model(batch[0])
                watched, forward = [], nn.functional.conv2d
                try:
                    nn.functional.conv2d = lambda *a, f=forward, w=watched, **k: (w.append(1), f(*a, **k))[1]
                    with cache.replaying([name]):
                        got = model(batch[0])
                finally:
                    nn.functional.conv2d = forward
                assert torch.equal(got, expected)
                computed.append(len(watched))
            calls[:] = []
    for hook in hooks:
        hook.remove()
    assert not any("forward" in layer.__dict__ for layer in layers.values())
    evaluator.apply({})
    whole, some, none = (computed[i : i + len(layers)] for i in range(0, len(computed), len(layers)))
    assert whole == [sum(isinstance(layers[n], nn.Conv2d) for n in order[order.index(name) :]) for name in layers]
    assert sum(whole) < sum(some) < sum(none), "what does not fit the budget is computed"


def test_a_model_that_calls_its_layers_in_another_order_is_refused() -> None:
    layers = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    cache = PrefixCache(layers)
    with cache.recording():
        layers["b"](layers["a"](torch.ones(1, 2)))
    with pytest.raises(QuantizationError, match="call 0 is of b, it was of a"), cache.replaying(["b"]):
        layers["a"](layers["b"](torch.ones(1, 2)))


def test_a_loss_that_is_no_mean_over_samples_gives_one_gradient_a_batch(caplog: pytest.LogCaptureFixture) -> None:
    class Sum(Quadratic):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).sum()

    module = Sum()
    x = torch.randn(3, 8)
    with Evaluator(module, trainer=CPU, dataloader=[[x]]) as evaluator:
        evaluator.calibrate(SPACE)
        value = measure_sensitivity(evaluator, "first_order", 1).values["layers.1.weight"]["int2 mse"]
        layer = evaluator.layers["layers.1"]
        quantize(evaluator, "layers.1", "int2 mse")
        change = (layer.quantized_weight() - layer.weight).detach()
        gradient = module.layers[0](x).sum(0).expand(4, 4).detach()
        assert value == pytest.approx(float((gradient * change).sum().square()), rel=1e-4)
    assert "the loss is no mean over samples" in caplog.text


@pytest.mark.parametrize(
    ("measure", "others", "message"),
    [
        ("kll", "float", "unknown sensitivity measure 'kll'; valid: auto, kl, .*Did you mean 'kl'"),
        ("kl", "widst", "unknown others 'widst'.*Did you mean 'widest'"),
    ],
)
def test_unknown_words_are_refused(evaluator: Evaluator, measure: str, others: str, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        measure_sensitivity(evaluator, measure, 1, others)


def test_measures_that_do_not_fit_are_refused(model: DigitsCNN) -> None:
    with Evaluator(model, DigitsDataModule(batch_size=120), trainer=CPU, calibration_batches=1) as evaluator:
        evaluator.calibrate(INPUTS)
        for name in GRADIENT:
            with pytest.raises(QuantizationError, match=f"measure '{name}' is for weights; stem.0.input"):
                measure_sensitivity(evaluator, name, 1)


def test_a_module_without_a_usable_loss_or_classes_is_told_what_to_use() -> None:
    class OneOutput(Quadratic):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.layers[1] = nn.Linear(4, 1, bias=False)
            self.curvature[1] = torch.ones(1, 4)
            self.automatic_optimization = False

    with Evaluator(OneOutput(), trainer=CPU, calibration_batches=1) as evaluator:
        evaluator.calibrate(SPACE)
        with pytest.raises(
            QuantizationError, match="has no training_step that returns a loss.*use the measures kl or sqnr"
        ):
            measure_sensitivity(evaluator, "loss")
        with pytest.raises(QuantizationError, match="the last layer has one output: use sqnr or loss"):
            measure_sensitivity(evaluator, "kl")
        assert measure_sensitivity(evaluator, "sqnr").values["layers.0.weight"]["int2 mse"] > 0


def test_a_value_that_is_not_finite_is_refused() -> None:
    with Evaluator(Quadratic(float("inf")), trainer=CPU, calibration_batches=1) as evaluator:
        evaluator.calibrate(SPACE)
        with pytest.raises(
            QuantizationError,
            match="the sensitivity loss is not finite for 6 choices, first of layers.0.weight, int2 mse",
        ):
            measure_sensitivity(evaluator, "loss")


def test_the_command_prints_and_writes_what_it_measured(tmp_path: Path, capsys: Any) -> None:
    cfg = composed(tmp_path, "measures=[kl,fisher]", "batches=1", name="sensitivity")
    kl, fisher = run(cfg)
    folder = tmp_path / "digits_search"
    assert "sensitivity (kl, more is worse)" in capsys.readouterr().out
    rows = list(csv.DictReader((folder / "sensitivity.csv").read_text().splitlines()))
    assert [row["unit"] for row in rows if row["choice"] == "int2 per_channel mse"] == kl.order
    assert {(row["unit"], row["choice"]): float(row["fisher"]) for row in rows} == {
        (name, choice): value for name, values in fisher.values.items() for choice, value in values.items()
    }
    content = json.loads((folder / "sensitivity.json").read_text())
    assert content["measures"] == {"kl": kl.values, "fisher": fisher.values}
    assert content["batches"] == 1
    assert (folder / "sensitivity.png").read_bytes().startswith(b"\x89PNG")


def test_tables_show_the_best_choice_of_each_width() -> None:
    table = SensitivityTable(
        "kl", {"a": {"int4 mse": 0.2, "int4 minmax": 0.3, "int2 mse": 0.5}, "b": {"float": 0.0, "int2 mse": 0.7}}
    )
    assert table.by_bits() == {"b": {32: 0.0, 2: 0.7}, "a": {4: 0.2, 2: 0.5}}
    shown = as_table(table)
    assert [column.header for column in shown.columns] == ["tensor", "2 bits", "4 bits", "float"]
    assert [list(map(str, column.cells)) for column in shown.columns] == [
        ["b", "a"],
        [".7", ".5"],
        ["", ".2"],
        ["0", ""],
    ]
    assert to_csv([table]).splitlines()[:2] == ["unit,choice,kl", "b,float,0.0"]


class Regression(LightningModule):
    """One output, and a loss for it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch[0])[:, 0], batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.mse_loss(self(batch[0])[:, 0], batch[1]))


def test_auto_fits_a_model_with_one_output():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(64, 6), torch.randn(64))
    module = Regression()
    module.train_dataloader = module.val_dataloader = lambda: DataLoader(data, 32)
    with Evaluator(module, None, trainer=CPU, calibration_batches=1) as evaluator:
        evaluator.calibrate({"weight": {"bit_widths": [2, 8], "ranges": ["mse"]}})
        assert measure_sensitivity(evaluator, batches=1).measure == "sqnr"
        with pytest.raises(QuantizationError, match="the last layer has one output: use sqnr or loss"):
            measure_sensitivity(evaluator, "kl", 1)
