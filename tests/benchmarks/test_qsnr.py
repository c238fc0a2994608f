"""The QSNR benchmark: the promised JSON, known values met, and data that is what its name says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import qsnr
from lq_plugin import QuantSpec


def test_json_has_the_promised_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    qsnr.main(["--json", str(out), "--rows", "8", "--columns", "64", "--formats", "int4 minmax", "MX6"])
    content = json.loads(out.read_text())
    assert [(row["format"], row["data"]) for row in content["results"]] == [
        (f, d) for f in ("int4 minmax", "MX6") for d in qsnr.DATA
    ]
    specs = {row["data"]: row["spec"] for row in content["results"] if row["format"] == "int4 minmax"}
    assert "uint4" in specs["relu"]
    assert "uint4" not in specs["gaussian"]
    assert content["environment"]["threads"] >= 1
    output = capsys.readouterr().out
    assert "MX6" in output
    assert "(28.4)" in output


def test_every_known_value_is_met() -> None:
    """All formats at the size that the known values are of; what decides INT4 is the length of its rows."""
    generator = torch.Generator().manual_seed(0)
    results = [
        row
        for entry in qsnr.ENTRIES
        for row in qsnr.measure(entry, {d: qsnr.DATA[d]((qsnr.ROWS, qsnr.COLUMNS), generator) for d in entry.known})
    ]
    assert len(results) > 20
    wrong = {
        (row["format"], row["data"]): (row["qsnr_db"], row["known_db"])
        for row in results
        if abs(row["qsnr_db"] - row["known_db"]) > 0.25
    }
    assert not wrong


@pytest.mark.parametrize("entry", qsnr.ENTRIES, ids=lambda entry: entry.name)
def test_every_entry_is_a_spec_that_costs_what_it_says(entry: qsnr.Entry) -> None:
    spec = QuantSpec.parse(entry.spec)
    assert set(entry.known) <= set(qsnr.DATA)
    x = qsnr.DATA["relu"]((16, 256), torch.Generator().manual_seed(0))
    (row,) = qsnr.measure(entry, {"relu": x})
    assert spec.bit_width <= row["effective_bits"] <= spec.bit_width + 1.1
    assert 0 < row["qsnr_db"] < 60
    if entry.unsigned:
        assert QuantSpec.parse(entry.unsigned).bit_width == spec.bit_width


def test_data() -> None:
    sample = {name: draw((64, 4096), torch.Generator().manual_seed(0)) for name, draw in qsnr.DATA.items()}
    assert sample["gaussian"].std().item() == pytest.approx(1, abs=0.01)
    assert sample["laplace"].std().item() == pytest.approx(2**0.5, abs=0.02)
    assert sample["laplace"].mean().item() == pytest.approx(0, abs=0.01)
    assert sample["relu"].eq(0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert sample["row_scaled"].std(1).max() > 10 * sample["row_scaled"].std(1).min()


def test_more_bits_less_noise() -> None:
    x = qsnr.DATA["gaussian"]((32, 512), torch.Generator().manual_seed(0))
    for estimator in ("minmax", "mse"):
        entries = [entry for entry in qsnr.ENTRIES if entry.name.startswith("int") and entry.name.endswith(estimator)]
        values = [qsnr.measure(entry, {"gaussian": x})[0]["qsnr_db"] for entry in entries]
        assert len(values) == 7
        assert values == sorted(values)
