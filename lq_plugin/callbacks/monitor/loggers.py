"""One report, to one Lightning logger, as far as it can take it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lq_plugin.intent.flat_keys import layer_keys
from lq_plugin.intent.plan import QuantPlan
from lq_plugin.utilities.csv_text import to_csv
from lq_plugin.utilities.files import file_name, temporary_folder, write_file
from lq_plugin.utilities.lightning_packages import either

if TYPE_CHECKING:
    from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
    from PIL.Image import Image

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Picture:
    """A drawing: `kind` is the panel it belongs to, `name` its caption there."""

    kind: str
    name: str
    png: bytes

    @property
    def path(self) -> str:
        """Kind and name, once where they are the same."""
        return self.kind if self.kind == self.name else f"{self.kind}/{self.name}"

    @property
    def file(self) -> str:
        """The path as that of a file."""
        return "/".join(file_name(part) for part in dict.fromkeys((self.kind, self.name)))

    def image(self) -> Image:
        """The decoded picture."""
        from PIL import Image

        return Image.open(io.BytesIO(self.png)).convert("RGB")


@dataclass(frozen=True)
class Report:
    """The report to be shown.

    Args:
        step: optimizer steps so far.
        scalars: by key, finite.
        tables: rows by name.
        pictures: drawings.
        plan: the plan in force.
        final: the last report of a run; files that are kept for good are written now.
        pages: further files of the last report, by name.
        metrics: what the model scores and takes, in the last report.
    """

    step: int
    scalars: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, Rows] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    plan: QuantPlan | None = None
    final: bool = False
    pages: Mapping[str, bytes] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        """Plan and tables as files, by name."""
        files = {f"{name}.csv": to_csv(rows, columns_of(rows), "\n").encode() for name, rows in self.tables.items()}
        if self.plan is not None:
            files["plan.yaml"] = self.plan.to_yaml().encode()
        return files | dict(self.pages)

    def files_and_pictures(self) -> dict[str, bytes]:
        """Plan, tables and pictures as files, by name; those of pictures have the step."""
        return self.files() | {f"step_{self.step:06d}/{picture.file}.png": picture.png for picture in self.pictures}


def report_to(logger: Logger, report: Report) -> None:
    """Shows a report: scalars in every logger, the rest where the logger has a place for it."""
    if report.scalars:
        logger.log_metrics(dict(report.scalars), step=report.step)
    if isinstance(logger, either("loggers.WandbLogger")):
        _to_wandb(logger, report)
    elif isinstance(logger, either("loggers.TensorBoardLogger")):
        _to_tensorboard(logger, report)
    elif isinstance(logger, either("loggers.MLFlowLogger")):
        _to_mlflow(logger, report)
    elif isinstance(logger, either("loggers.CSVLogger")):
        _to_files(logger, report)


def _to_wandb(logger: WandbLogger, report: Report) -> None:
    import wandb  # not at the top: it takes a second, and not every Trainer has it

    run = logger.experiment
    if report.plan is not None:
        run.config.update({"quantization": report.plan.to_dict()}, allow_val_change=True)
    shown: dict[str, Any] = {}
    for name, rows in report.tables.items():
        columns = columns_of(rows)
        # A column of a W&B table holds one kind of value: infinities are text in a log and break charts.
        shown[f"quant/{name}"] = wandb.Table(
            columns=[*columns], data=[[_finite(row.get(column)) for column in columns] for row in rows]
        )
    for picture in report.pictures:
        # A panel each: a gallery wants pictures of one size.
        shown[f"quant/{picture.path}"] = wandb.Image(picture.image(), caption=picture.name)
    if shown:
        # As `log_table` and `log_image` do it, but as one row of the run's history.
        logger.log_metrics(shown, step=report.step)
    if report.final and (files := report.files()):
        artifact = wandb.Artifact(f"quantization-{run.id}", type="quantization")
        with temporary_folder("artifact") as folder:
            for name, content in files.items():
                path = Path(folder, name)
                path.write_bytes(content)
                # W&B keeps a copy of its own.
                artifact.add_file(str(path), name=name)
            run.log_artifact(artifact)


def _to_tensorboard(logger: TensorBoardLogger, report: Report) -> None:
    writer = logger.experiment
    if report.plan is not None:
        # Four spaces make a code block in Markdown.
        text = "\n".join(f"    {line}" for line in report.plan.to_yaml().splitlines())
        writer.add_text("quant/plan", text, report.step)
    for name, rows in report.tables.items():
        writer.add_text(f"quant/{name}", _markdown(rows), report.step)
    for picture in report.pictures:
        writer.add_image(f"quant/{picture.path}", np.asarray(picture.image()), report.step, dataformats="HWC")
    if report.final and report.plan is not None and report.metrics:
        add_hparams(logger, "quant", layer_keys(report.plan), report.metrics)


def add_hparams(logger: TensorBoardLogger, name: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Writes a row of TensorBoard's HParams, as a run of its own under the logger's: of a run the first row counts.

    Args:
        logger: whose run it is under.
        name: of the run.
        params: numbers and texts.
        metrics: that can be compared; those that are not finite are left out.
    """
    writer = logger.experiment
    # TensorBoardX, which Lightning takes where there is no tensorboard, has another word for it.
    key = "name" if type(writer).__module__.startswith("tensorboardX") else "run_name"
    finite = {metric: value for metric, value in metrics.items() if isfinite(value)}
    writer.add_hparams(dict(params), finite, **{key: name})


def _to_mlflow(logger: MLFlowLogger, report: Report) -> None:
    files = report.files_and_pictures()
    if not files:
        return
    with temporary_folder("artifact") as folder:
        for name, content in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        # Files of the same names take the place of those of the report before.
        logger.experiment.log_artifacts(logger.run_id, folder, "quant")


def _to_files(logger: CSVLogger, report: Report) -> None:
    # Before any file: a CSV log that is opened on a folder with files in it clears that folder.
    folder = logger.experiment.log_dir.rstrip("/") + "/quant"
    system, folder = url_to_fs(folder)
    for name, content in report.files_and_pictures().items():
        path = f"{folder}/{name}"
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        if isinstance(system, LocalFileSystem):
            write_file(path, content)
        else:
            with system.open(path, "wb") as stream:
                stream.write(content)


def columns_of(rows: Rows) -> list[str]:
    """Returns the keys of all rows, in the order of their first place: a row may lack what another one has."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _markdown(rows: Rows) -> str:
    columns = columns_of(rows)
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    # A bar would end the cell.
    return (f"{value:.5g}" if isinstance(value, float) else str(value)).replace("|", "\\|")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not isfinite(value) else value
