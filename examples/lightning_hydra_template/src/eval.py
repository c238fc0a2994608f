"""Evaluates a checkpoint on the test set."""

import logging
import os
import sys
from pathlib import Path

# The template does this with `rootutils.setup_root`.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PROJECT_ROOT", str(ROOT))

import hydra  # noqa: E402
from lightning import LightningDataModule, LightningModule, Trainer  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from src.utils import instantiate_loggers  # noqa: E402

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> dict:
    datamodule: LightningDataModule = hydra.utils.instantiate(cfg.data)
    model: LightningModule = hydra.utils.instantiate(cfg.model)
    logger = instantiate_loggers(cfg.get("logger"))
    trainer: Trainer = hydra.utils.instantiate(cfg.trainer, logger=logger)

    log.info("Starting testing!")
    trainer.test(model=model, datamodule=datamodule, ckpt_path=cfg.ckpt_path)
    return dict(trainer.callback_metrics)


@hydra.main(version_base="1.3", config_path="../configs", config_name="eval.yaml")
def main(cfg: DictConfig) -> None:
    evaluate(cfg)


if __name__ == "__main__":
    main()
