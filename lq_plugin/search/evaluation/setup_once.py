"""Sets a datamodule up once for many validations: reading a data set anew would cost more than a trial."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule


class SetUpOnce:
    """Sets each stage of `datamodule` up only the first time between `open` and `close`.

    `teardown` waits until `close`. None is accepted and left alone.
    """

    def __init__(self, datamodule: LightningDataModule | None) -> None:
        self._datamodule: Any = datamodule
        self._stages: list[Any] = []
        self._prepared = False

    def open(self) -> None:
        """Replaces `prepare_data`, `setup` and `teardown` of the instance."""
        if self._datamodule is None:
            return
        original = {name: getattr(self._datamodule, name) for name in ("prepare_data", "setup")}

        def prepare_data() -> None:
            if not self._prepared:
                original["prepare_data"]()
            self._prepared = True

        def setup(stage: Any = None) -> None:
            if stage not in self._stages:
                original["setup"](stage=stage)
                self._stages.append(stage)

        def teardown(stage: Any = None) -> None:
            pass

        self._datamodule.__dict__ |= {"prepare_data": prepare_data, "setup": setup, "teardown": teardown}

    def close(self) -> None:
        """Restores the methods and tears down what was set up."""
        if self._datamodule is None or "setup" not in self._datamodule.__dict__:
            return
        for name in ("prepare_data", "setup", "teardown"):
            del self._datamodule.__dict__[name]
        for stage in self._stages:
            self._datamodule.teardown(stage=stage)
        self._stages.clear()


def without_memory(datamodule: LightningDataModule | None) -> LightningDataModule | None:
    """Returns a copy with its own methods, for other processes, which set it up themselves."""
    if datamodule is None:
        return None
    copied = copy.copy(datamodule)
    for name in ("prepare_data", "setup", "teardown"):
        copied.__dict__.pop(name, None)
    copied.trainer = None
    return copied
