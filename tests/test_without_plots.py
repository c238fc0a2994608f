"""Without matplotlib and Pillow everything but pictures works, and what draws says so before any work."""

import subprocess
import sys

WITHOUT = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def hidden(name, path=None, target=None):
    return None if name.partition(".")[0] in ("matplotlib", "PIL", "torchvision") else find(name, path, target)
PathFinder.find_spec = hidden
# torchmetrics asks what is installed, not what can be imported.
from importlib.metadata import Distribution, PackageNotFoundError
installed = Distribution.from_name
def hidden_distribution(name):
    if name.lower() in ("matplotlib", "pillow", "torchvision"):
        raise PackageNotFoundError(name)
    return installed(name)
Distribution.from_name = hidden_distribution
"""
QUANTIZED = """
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from lq_plugin import PTQ, QAT, QuantMonitor
from lq_plugin.export import load_packed, save_packed

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 4)
    def training_step(self, batch):
        return self.layer(batch).square().mean()
    def validation_step(self, batch):
        self.log("val/loss", self.layer(batch).square().mean())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

batches = DataLoader(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), 8)
def trainer(*callbacks):
    return Trainer(max_epochs=1, callbacks=list(callbacks), logger=CSVLogger(".", "run", ""), accelerator="cpu",
                   enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
"""


def run(code: str, folder, arguments=("-W", "ignore")) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments, "-c", WITHOUT + code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_training_files_and_the_page_need_no_plots(tmp_path):
    done = run(
        QUANTIZED
        + """
net = Net()
trainer(QAT("w4a8"), QuantMonitor(images=False)).fit(net, batches, batches)
trainer(PTQ("w4a8", dataloader=batches)).validate(other := Net(), batches, verbose=False)
save_packed(net, "net.safetensors")
load_packed(again := Net(), "net.safetensors")
assert torch.equal(again.layer(x := torch.ones(2, 8)), net.eval().layer(x))
assert not {"matplotlib", "PIL"} & set(sys.modules)
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "quant" / "report.html").stat().st_size > 10_000


REFUSED = {
    "trainer(QAT('w4a8'), QuantMonitor()).fit(Net(), batches, batches)": (
        "QuantMonitor with pictures (images=False leaves them out) needs matplotlib and PIL, which are"
    ),
    "lq_plugin.plots.pareto([(1.0, 2.0)])": "lq_plugin.plots.pareto needs matplotlib, which is",
    "lq_plugin.report.write_pictures": "lq_plugin.report.write_pictures needs matplotlib, which is",
    "lq_plugin.search.search(Net(), None, {}, 'val/loss', output_dir='study')": (
        "search(output_dir=...), which draws the front, needs matplotlib, which is"
    ),
}


def test_what_draws_says_so_first(tmp_path):
    code = """
import lq_plugin.plots, lq_plugin.report, lq_plugin.search
from lq_plugin.commands.report import report
for line in CODES:
    try:
        eval(line)
        print("nothing was raised")
    except ImportError as error:
        print(error)
sys.exit(report(["report.json"]))
"""
    (tmp_path / "report.json").write_text("{}")
    done = run(QUANTIZED + f"CODES = {list(REFUSED)}" + code, tmp_path)
    end = ' not installed: pip install "lq_plugin[plots]"'
    printed = done.stdout.splitlines()
    assert printed[: len(REFUSED)] == [start + end for start in REFUSED.values()], done.stderr[-2000:]
    assert done.returncode == 2
    said = " ".join((done.stdout + done.stderr).split())
    assert "lq-report with figures (--no-pictures leaves them out) needs matplotlib" in said
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.json"]
