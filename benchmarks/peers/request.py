"""Request to a peer. Read on both sides, so it imports nothing that an environment may lack."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Request:
    """One quantization of a ResNet for CIFAR-10.

    Attributes:
        weights: file of the float weights.
        depth: layers of the ResNet they are for.
        data: folder with the images.
        calibration: rows of the train split to calibrate and learn on, `(start, stop)`.
        scored: split and rows whose accuracy is asked for; stop None: to the end.
        setting: bits of weights and inputs, "W3A8".
        iterations: of learned rounding, a layer.
        batch_size: images of a batch that goes through the model.
        seed: of random numbers.
        threads: of torch.

    Raises:
        ValueError: for a setting that is not of that form, or fewer than one iteration.

    >>> Request("a.safetensors", "data", "W3A8").bits
    (3, 8)
    """

    weights: str
    data: str
    setting: str
    iterations: int = 200
    depth: int = 20
    calibration: tuple[int, int] = (0, 1024)
    scored: tuple[str, int, int | None] = field(default=("test", 0, None))
    batch_size: int = 128
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if not re.fullmatch(r"W\d+A\d+", self.setting):
            raise ValueError(f"setting must be of the form 'W3A8', got {self.setting!r}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of weights and of inputs."""
        weights, inputs = self.setting[1:].split("A")
        return int(weights), int(inputs)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """The request that `to_json` wrote.

        >>> request = Request("a.safetensors", "data", "W3A8", scored=("train", 5, 9))
        >>> Request.from_json(request.to_json()) == request
        True
        """
        content = json.loads(text)
        return cls(**{**content, "calibration": tuple(content["calibration"]), "scored": tuple(content["scored"])})
