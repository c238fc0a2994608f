"""Builds every callback and logger that the config names."""

import logging

import hydra
from lightning import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

log = logging.getLogger(__name__)


def instantiate_callbacks(callbacks_cfg: DictConfig | None) -> list[Callback]:
    return _instantiate_all(callbacks_cfg, "callback")


def instantiate_loggers(logger_cfg: DictConfig | None) -> list[Logger]:
    return _instantiate_all(logger_cfg, "logger")


def _instantiate_all(group: DictConfig | None, kind: str) -> list:
    if not group:
        log.warning("No %s configs found! Skipping...", kind)
        return []
    if not isinstance(group, DictConfig):
        raise TypeError(f"{kind} config must be a DictConfig!")
    objects = []
    for conf in group.values():
        if isinstance(conf, DictConfig) and "_target_" in conf:
            log.info("Instantiating %s <%s>", kind, conf._target_)
            objects.append(hydra.utils.instantiate(conf))
    return objects
