"""`lq-sensitivity`: measures the sensitivity of each tensor of a model to its choices."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lq_plugin import plots
from lq_plugin.commands.search import load_model, read_space
from lq_plugin.export.planned import known_target
from lq_plugin.extras import need_packages
from lq_plugin.model.measure.cost import FLOAT_BITS
from lq_plugin.ptq.registry import check_phases, names_and_options
from lq_plugin.search.evaluation.evaluator import Evaluator
from lq_plugin.search.sensitivity.measure import SensitivityTable, check_measures, measure_all, to_csv
from lq_plugin.utilities.brief import two_digits
from lq_plugin.utilities.files import make_folder, write_file
from lq_plugin.utilities.hydra_files import plain
from lq_plugin.utilities.instantiate import instantiate_for
from lq_plugin.utilities.lightning_packages import any_package

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> list[SensitivityTable]:
    """Measures as `cfg` (composed from `sensitivity.yaml`) says, prints the layers by sensitivity, and writes files.

    Raises:
        QuantizationError: see `measure_sensitivity`.
    """
    need_packages("lq-sensitivity", "matplotlib")
    output_dir = make_folder(cfg.paths.output_dir)
    # A wrong request is refused before a float model is trained.
    space = read_space(cfg)
    phases = plain(cfg.search.phases)
    check_phases(*names_and_options(phases))
    measures = [cfg.measures] if isinstance(cfg.measures, str) else list(cfg.measures)
    check_measures(measures, cfg.others)
    if cfg.search.target is not None:
        known_target(cfg.search.target)
    datamodule: LightningDataModule = instantiate(cfg.data)
    model = load_model(cfg, datamodule, output_dir)
    any_package().seed_everything(cfg.seed, workers=True, verbose=False)
    evaluator = Evaluator(
        model,
        datamodule,
        trainer=partial(instantiate_for, model, cfg.trainer),
        calibration_batches=cfg.search.calibration_batches,
        phases=phases,
        seed=cfg.seed,
        target=cfg.search.target,
    )
    with evaluator:
        evaluator.calibrate(space)
        tables = measure_all(evaluator, measures, cfg.batches, cfg.others)
    Console().print(as_table(tables[0]))
    write(
        tables,
        output_dir,
        {"weights": evaluator.weights, "batches": cfg.batches, "others": cfg.others, "seed": cfg.seed},
    )
    log.info("written to %s: sensitivity.csv, sensitivity.json, sensitivity.png", output_dir)
    return tables


def as_table(measured: SensitivityTable) -> Table:
    """Returns tensors as rows, the most sensitive first, and bit-widths as columns, each with its best choice."""
    rows = measured.by_bits()
    widths = sorted({bits for row in rows.values() for bits in row})
    table = Table(title=f"sensitivity ({measured.measure}, more is worse): the best choice of each bit-width")
    table.add_column("tensor", overflow="fold")
    for bits in widths:
        table.add_column("float" if bits == FLOAT_BITS else f"{bits} bits", justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(Text(name), *(two_digits(row[bits]) if bits in row else "" for bits in widths))
    return table


def write(tables: list[SensitivityTable], folder: Path, about: dict[str, Any]) -> None:
    """Writes `sensitivity.csv` and `sensitivity.json` with all measures, and `sensitivity.png` of the first one.

    Args:
        tables: one for each measure.
        folder: for the files.
        about: further entries of the JSON file.
    """
    write_file(folder / "sensitivity.csv", to_csv(tables))
    content = {**about, "measures": {table.measure: table.values for table in tables}}
    write_file(folder / "sensitivity.json", json.dumps(content, indent=1) + "\n")
    first = tables[0]
    plots.save(plots.sensitivity_map(first.by_bits(), first.measure), folder / "sensitivity.png")
