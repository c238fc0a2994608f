"""Options of learned rounding."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lq_plugin.errors import QuantizationError, raise_all
from lq_plugin.ptq.layerwise.activation_cache import DEFAULT_CACHE_BYTES

METHODS = ("adaround", "signround")
#: Options that mean nothing to SignRound.
_ADAROUND = ("learning_rate", "scale_learning_rate", "regularization", "beta", "warm_up")


@dataclass(frozen=True)
class ReconstructOptions:
    """The options of learned rounding.

    Args:
        iterations: optimizer steps of each unit.
        batch_size: samples of a step.
        learning_rate: of AdaRound's V, by Adam. The paper's 1e-3 takes thousands of steps.
        scale_learning_rate: of the factors on weight scales; 0 keeps the calibrated ones, with SignRound also, for
            which it has no other meaning.
        input_learning_rate: of the factors on input scales; 0 keeps the calibrated ones.
        bias_learning_rate: of biases (in the layer, or in the batch norm after it), in standard deviations of the
            channel; 0: fixed.
        regularization: λ: weight of the regulariser's mean over all weights against the error, which is 1 at the start;
            like `beta` and `warm_up` of AdaRound alone.
        beta: β of the regulariser, from and to.
        warm_up: share of the iterations without regulariser.
        drop: probability that an element of an input stays float (QDrop); 0.5 in its paper.
        correct_batch_norm: first correct the statistics of batch norms, as `lq_plugin.ptq.batch_norm.correct` does.
        seed: of samples and of dropping.
        cache_bytes: memory for activations; what is more goes to disk.
        folder: keeps what is finished, so that the same call again goes on after it, with the same result; None:
            nothing is kept.
        method: `"adaround"`, or `"signround"`: offsets and ranges by signed steps of 1 / iterations, falling to 0.
    """

    iterations: int = 300
    batch_size: int = 32
    learning_rate: float = 1e-1
    scale_learning_rate: float = 1e-3
    input_learning_rate: float = 1e-3
    bias_learning_rate: float = 1e-3
    regularization: float = 10.0
    beta: tuple[float, float] = (20.0, 2.0)
    warm_up: float = 0.2
    drop: float = 0.0
    correct_batch_norm: bool = True
    seed: int = 0
    cache_bytes: int = DEFAULT_CACHE_BYTES
    folder: str | None = None
    method: str = "adaround"

    def __post_init__(self) -> None:
        faults = [
            f"{name} is an integer from {low}, got {getattr(self, name)!r}"
            for name, low in (("iterations", 0), ("batch_size", 1), ("seed", 0), ("cache_bytes", 0))
            if isinstance(getattr(self, name), bool)
            or not isinstance(getattr(self, name), int)
            or getattr(self, name) < low
        ]
        faults += [
            f"{name} must not be negative, got {getattr(self, name)!r}"
            for name in (
                "learning_rate",
                "scale_learning_rate",
                "input_learning_rate",
                "bias_learning_rate",
                "regularization",
            )
            if not getattr(self, name) >= 0
        ]
        faults += [
            f"{name} is a share in 0..1, got {getattr(self, name)!r}"
            for name in ("warm_up", "drop")
            if not 0 <= getattr(self, name) < 1
        ]
        if self.method not in METHODS:
            faults.append(f"method is one of {', '.join(METHODS)}, got {self.method!r}")
        if self.method == "signround":
            faults += [f"{name} is an option of adaround, not of signround" for name in self._of_adaround()]
        if not isinstance(self.folder, str | None):
            faults.append(f"folder is a path, got {self.folder!r}")
        raise_all(QuantizationError, "impossible ReconstructOptions", faults)

    def _of_adaround(self) -> list[str]:
        """Returns the options of AdaRound that are not as by default; scales may be kept with SignRound also."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name in _ADAROUND}
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        changed = [field.name for field in fields(self) if plain.get(field.name, field.default) != field.default]
        return [name for name in changed if (name, given[name]) != ("scale_learning_rate", 0)]
