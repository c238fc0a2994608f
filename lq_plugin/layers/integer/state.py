"""The state of a layer that may compute its training forward pass with integers."""

from __future__ import annotations

from dataclasses import dataclass, field

#: A layer computes with integers where its trial takes less than this share of the time. More than 1: what the trial
#: does not see is that less is kept for the backward pass, and that the next layers get channels-last images, which
#: are faster for them.
WORTH = 1.25
#: On a GPU, where nobody has measured the latter.
WORTH_ON_GPU = 1.0


@dataclass
class IntegerForward:
    """The state of one layer.

    Args:
        chosen: whether it computes with integers where it can; None: a trial decides.
        reason: why it never can; None: it can.
        ratio: time of the integer step over that of fake quantization, once tried.
        worth: below this ratio integers are chosen.
        refusals: why single calls were computed by fake quantization.
    """

    chosen: bool | None = None
    reason: str | None = None
    ratio: float | None = None
    worth: float = WORTH
    refusals: dict[str, None] = field(default_factory=dict)

    def describe(self) -> str:
        """A line for logs.

        >>> IntegerForward(True, ratio=0.5).describe()
        'integer (0.50 of the time)'
        """
        measured = "" if self.ratio is None else f" ({self.ratio:.2f} of the time)"
        if self.reason is not None:
            return f"fake-quantized: {self.reason}"
        if self.chosen is None:
            return "not tried yet" + "".join(f"; fake-quantized where {refusal}" for refusal in self.refusals)
        if not self.chosen:
            return "fake-quantized: integers are slower here" + measured
        return "integer" + measured + "".join(f"; fake-quantized where {refusal}" for refusal in self.refusals)
