"""The files that Hydra writes about a job, without the passwords of its storages."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lq_plugin.utilities.files import write_file
from lq_plugin.utilities.passwords import passwords_in, without

#: Where a job's storage is: in a config of `lq-search`, and in Hydra's part of any config.
_STORAGES = ("search.storage",)
_SWEEPER = "sweeper.storage"


def plain(cfg: Any) -> Any:
    """Returns a config as nested mappings and lists, resolved; other values as they are."""
    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg


def storage_passwords(cfg: DictConfig) -> set[str]:
    """Returns the passwords of the storages of this job."""
    storages = [OmegaConf.select(cfg, key, throw_on_resolution_failure=False) for key in _STORAGES]
    if HydraConfig.initialized():
        hydra: Any = HydraConfig.get()
        storages.append(OmegaConf.select(hydra, _SWEEPER, throw_on_resolution_failure=False))
    return passwords_in([plain(storage) for storage in storages])


def hide_passwords(passwords: Collection[str]) -> None:
    """Removes these passwords from the files that Hydra wrote for this job, and from arguments, which W&B stores."""
    if not passwords:
        return
    sys.argv[1:] = without(sys.argv[1:], passwords)
    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    files = [Path(hydra.sweep.dir, "multirun.yaml")] if hydra.sweep.dir else []
    if hydra.output_subdir is not None:
        files += sorted(Path(hydra.runtime.output_dir, hydra.output_subdir).glob("*.yaml"))
    for path in files:
        if path.is_file():
            write_file(path, hidden_yaml(OmegaConf.load(path), passwords))


def hidden_yaml(cfg: Any, passwords: Collection[str]) -> str:
    """Returns a config as YAML without these passwords; interpolations stay."""
    return OmegaConf.to_yaml(OmegaConf.create(without(OmegaConf.to_container(cfg, resolve=False), passwords)))
