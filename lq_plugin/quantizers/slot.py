"""Base of all that quantizes one tensor of a layer, with the switches in its state dict."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn


class SlotQuantizer(nn.Module):
    """Base of `Quantizer`, which has one spec, and `StagedQuantizer`, which has one after another.

    Buffers of shape [1] say what it does, as in `enabled`. A forward pass reads Python copies of them, since reading a
    tensor would synchronize the device at every call. A subclass names the buffers in `switches` and copies them in
    `_read_switches`.
    """

    #: Names of the buffers; one that an object does not have is passed over, all but the first.
    switches: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        super().__init__()
        self._written: int | None = None

    def stages(self) -> tuple[Any, ...]:
        """Returns the quantizers of its stages in order, an `Unquantized` where one is float."""
        raise NotImplementedError

    @property
    def current(self) -> Any:
        """The quantizer in force; None while the stage is float."""
        raise NotImplementedError

    def _write(self, switch: str, value: int) -> None:
        self._buffers[switch].fill_(value)  # type: ignore[union-attr]
        self._written = None if self._written is None else self._written + 1

    def _read_switches(self) -> None:
        raise NotImplementedError

    def follow_buffers(self) -> None:
        """Reads the switches again if somebody has written to them in place, such as a weight average.

        Asks no device where nobody has. What `.data` was written to shows with the next `eval()` only. In compiled code
        the switches are those of the last call outside of it.
        """
        if torch.compiler.is_compiling():
            return
        buffers = self._buffers
        written: int | None = 0
        try:
            for name in self.switches:
                if (buffer := buffers.get(name)) is not None:
                    written += buffer._version  # type: ignore[operator]
        except RuntimeError:  # made in inference mode, where torch does not count
            written = None
        if (written is None or written != self._written) and not buffers[self.switches[0]].is_meta:  # type: ignore[union-attr]
            self._read_switches()
            self._written = written

    def forget_switches(self) -> None:
        """Has the switches read again at the next call."""
        self._written = None

    def train(self, mode: bool = True) -> Any:
        if mode:
            self.follow_buffers()
        else:
            self.forget_switches()
        return super().train(mode)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.forget_switches()  # a copy's tensors are counted anew

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget_switches()  # other tensors, with counts of their own
        return super()._apply(fn, recurse)
