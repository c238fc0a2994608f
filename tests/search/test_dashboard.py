"""optuna-dashboard reads the storage of a search."""

import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from lq_plugin.demo.digits import DigitsCNN, DigitsDataModule
from lq_plugin.search import search
from tests.report.browser import chromium, why_not

from .conftest import CPU

SPACE = {"weight": {"bit_widths": [2, 4, 8], "ranges": ["minmax"]}}


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.slow
def test_the_dashboard_shows_the_study(model: DigitsCNN, tmp_path: Path) -> None:
    search(
        model, DigitsDataModule(batch_size=120), SPACE, "val/acc", 8, study_name="digits_bits", output_dir=tmp_path,
        seeds=0, trainer=CPU,
        calibration_batches=1, progress=False,
    )  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    code = "from optuna_dashboard._cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        f"sqlite:///{tmp_path / 'study.db'}",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with (
        (tmp_path / "dashboard.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
        chromium() as opened,
    ):
        try:
            until = time.monotonic() + 60
            while time.monotonic() < until:
                try:
                    urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                    break
                except URLError:
                    time.sleep(0.2)
            page = opened.new_page()
            errors: list[str] = []
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(f"http://127.0.0.1:{port}/dashboard/studies/1")
            page.wait_for_selector("text=digits_bits", timeout=60_000)
            page.wait_for_selector(".js-plotly-plot svg", state="attached", timeout=60_000)
            page.goto(f"http://127.0.0.1:{port}/dashboard/studies/1/trials")
            page.wait_for_selector("text=stem.0.weight.bits", timeout=60_000)
            assert not errors
        finally:
            process.terminate()
