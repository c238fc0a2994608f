"""Errors name the packages that are missing, which are those of the extras."""

import re
import sys
from pathlib import Path

import pytest

from lq_plugin.errors import ExportError
from lq_plugin.extras import EXTRAS, need_packages

ROOT = Path(__file__).parent.parent
#: Packages that are imported by another name.
IMPORTED = {"pillow": "PIL", "mlflow-skinny": "mlflow"}


def test_the_extras_are_those_of_the_project():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {extra: {re.split("[<>=;]", wanted)[0] for wanted in project[extra]} for extra in EXTRAS}
    imported = {
        extra: {IMPORTED.get(name, name.replace("-", "_")) for name in wanted} for extra, wanted in names.items()
    }
    assert imported == {extra: set(packages) for extra, packages in EXTRAS.items()}


def test_a_missing_package_is_an_import_error_and_one_of_ours(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    for kind in (ImportError, ExportError):
        with pytest.raises(
            kind,
            match=r'latency needs onnx and openvino, which are not installed: pip install "lq_plugin\[onnx,openvino\]"',
        ):
            need_packages("latency", "onnx", "numpy", "openvino")


@pytest.mark.parametrize(
    ("name", "package"),
    [("export_onnx", "onnxscript"), ("onnx_session", "onnxruntime"), ("OpenVINOSession", "openvino")],
)
def test_functions_name_what_they_need(name, package, monkeypatch):
    import lq_plugin.export

    monkeypatch.delitem(vars(lq_plugin.export), name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    vars(lq_plugin.export).pop(name, None)  # it may have been asked for before
    with pytest.raises(ImportError, match=rf"{name} needs {package}, which is not installed: pip install"):
        getattr(lq_plugin.export, name)("model.onnx")
