"""Certificates of exported files on the report page."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from lq_plugin.commands.report import report as lq_report
from lq_plugin.commands.report_sources import load_report
from lq_plugin.errors import QuantizationError
from lq_plugin.export.certificate import Certificate, LayerParity
from lq_plugin.export.target import Products
from lq_plugin.export.verify import Verification
from lq_plugin.report import ReportData
from lq_plugin.report.data import FileReport
from tests.report.browser import chromium, why_not
from tests.report.synthetic import deep_report

CERTIFICATE = Certificate(
    "onnx", "onnxruntime", "net.onnx", 12_345, Verification(360, False, 0.9972, 1e-3, 1.5, 0.993),
    (LayerParity("conv1", 0.0, 0.0), LayerParity("conv2", 2.0, 0.01)), Products({"QLinearConv": 7}, {"Gemm": 1}),
    {"model": {"val/acc": 0.91}, "file": {"val/acc": 0.9}}, {"onnxruntime": "1.32.0"}, "2026-11-30T08:00:00+00:00",
    "a processor",
)  # fmt: skip
SHOWN = FileReport(
    "net.onnx", "onnx", "onnxruntime", 12_345, 360, 0.9972, 0.993, 1.5, 7, 8, dict(CERTIFICATE.metrics), "conv2",
    "2026-11-30T08:00:00+00:00", "a processor", {"onnxruntime": "1.32.0"},
)  # fmt: skip


def test_a_folder_with_certificates_alone_is_a_report(tmp_path: Path) -> None:
    CERTIFICATE.write(tmp_path / "net.onnx.certificate.json")
    nan = Verification(8, False, 0.5, float("nan"), float("nan"), 0.1)
    replace(CERTIFICATE, file="nan.onnx", verification=nan, products=None).write(tmp_path / "nan.onnx.certificate.json")
    of_nan, found = load_report(tmp_path).files
    assert found == SHOWN
    assert (of_nan.largest_steps, of_nan.products) == (None, None)
    assert ReportData.from_json(load_report(tmp_path).to_json()).files == [of_nan, found]


def test_next_to_a_run_they_are_on_its_page(tmp_path: Path) -> None:
    deep_report(layers=3, width=8).save(tmp_path / "quant" / "report.json")
    CERTIFICATE.write(tmp_path / "net.onnx.certificate.json")
    report = load_report(tmp_path)
    assert report.model is not None
    assert report.files == [SHOWN]
    assert lq_report([str(tmp_path), "--output", str(tmp_path / "page.html"), "--no-pictures"]) == 0
    assert "Exported files" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the certificate .*net.onnx.certificate.json"),
        ("[1]", "is no certificate of lq_plugin: it has no verification"),
        (json.dumps({"verification": {"samples": "many"}}), "net.onnx.certificate.json"),
    ],
)
def test_damaged_certificates_are_said(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "net.onnx.certificate.json").write_text(text)
    with pytest.raises(QuantizationError, match=message):
        load_report(tmp_path)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_the_page_draws_the_table(tmp_path: Path) -> None:
    from lq_plugin.report import write_page
    from tests.report.browser import Page

    CERTIFICATE.write(tmp_path / "net.onnx.certificate.json")
    path = write_page(load_report(tmp_path), tmp_path / "page.html")
    with chromium() as browser:
        for width, scheme in ((1280, "light"), (400, "dark")):
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            window = Page(context.new_page())
            text = window.open(path).locator("#files").inner_text()
            for part in ("net.onnx", "onnxruntime 1.32.0", "99.3 %", "7 of 8", "conv2", "0.91"):
                assert part in text
            assert window.faults == []
            assert window.sideways() <= 0
            window.page.screenshot(path=os.environ.get("LQ_SCREENSHOTS", str(tmp_path)) + f"/files_{width}.png")
            context.close()
