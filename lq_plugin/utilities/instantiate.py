"""Trainers, callbacks and loggers of a config, from the Lightning package that the model was written with."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import hydra.utils
from omegaconf import OmegaConf

from lq_plugin.utilities.lightning_packages import package_of

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

#: What the same class is called in the other package, by the package that is wanted.
_SIBLINGS = {
    "lightning.pytorch": [(r"pytorch_lightning\.", "lightning.pytorch."), (r"lightning_fabric\.", "lightning.fabric.")],
    "pytorch_lightning": [
        (r"lightning\.fabric\.", "lightning_fabric."),
        (r"lightning\.(pytorch\.)?", "pytorch_lightning."),
    ],
}


def instantiate_for(model: LightningModule, config: Any, **options: Any) -> Any:
    """Instantiates a config; each `_target_` of the other Lightning package becomes its sibling in the model's package.

    A Trainer accepts modules, data modules and most callbacks of its own package only; ours are the same in both.
    """
    package = package_of(model).__name__
    config = copy.deepcopy(config)  # it stays where it is in the whole config: interpolations work
    for node in _nodes(config):
        target = node.get("_target_")
        for pattern, sibling in _SIBLINGS[package] if isinstance(target, str) else ():
            target = re.sub(f"^{pattern}", sibling, target)
        if target is not None:
            node["_target_"] = target
    return hydra.utils.instantiate(config, **options)


def _nodes(config: Any) -> Iterator[Any]:
    keys: Iterable[Any] = ()
    if OmegaConf.is_dict(config):
        yield config
        keys = config
    elif OmegaConf.is_list(config):
        keys = range(len(config))
    for key in keys:
        # What stands elsewhere in the config is not ours to change.
        if not OmegaConf.is_interpolation(config, key) and not OmegaConf.is_missing(config, key):
            yield from _nodes(config[key])
