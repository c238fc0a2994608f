"""Rotations folded into weights: outliers of a few channels spread over all, the float function kept.

For an orthogonal Q and a norm without weight, RMSNorm(x Q) = RMSNorm(x) Q, as Q keeps the length of x. So the residual
stream x of a pre-norm transformer can be x Q instead, and nothing that the model returns changes::

    writers of x:          W ← Qᵀ W,  b ← b Q;   embeddings E ← E Q
    norms that read it:    γ and β go into the readers first, W ← W diag(γ), b ← b + W β
    readers of the norms:  W ← W Q

Layer norm subtracts the mean also. Its Q has Q 1 = 1, so that x Q has the mean of x, and the model keeps its layer
norms (SliceGPT and QuaRot make them RMSNorms). Between the values of attention and the output projection a head's
channels are only summed over tokens: there each head is rotated by an R of its own size, W_v ← Rᵀ W_v, W_o ← W_o R.

Lifecycle: one batch is recorded; parameters get new values, objects and keys stay; the batch runs again, and what is
returned, and what the layers put out that undo the rotation (proof.py), must be what it was, or the values are put back
and the part refused. After an exception all values are those before. Rotate before ranges are found, and before
SmoothQuant, which writes into the norms.

Reference: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS 2024 (arXiv 2404.00456),
sections 3 and 4, stage 1; Liu et al., "SpinQuant: LLM Quantization with Learned Rotations", ICLR 2025 (arXiv
2405.16406), section 3.1: R1 and R2. Rotations at run time (R3, R4) are not made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lq_plugin.errors import QuantizationError, is_integer, raise_all
from lq_plugin.functional.rotation import hadamard, random_rotation
from lq_plugin.model.calibrate import evaluating, float_forward, refuse_ranges
from lq_plugin.model.graph.record import Recording, record, without_compile
from lq_plugin.ptq.own_parameters import Refused, write_all
from lq_plugin.ptq.rotation.heads import HeadPair, find_head_pairs
from lq_plugin.ptq.rotation.proof import Seen, watch, watched_layers
from lq_plugin.ptq.rotation.streams import Stream, find_streams, is_leaf, is_linear
from lq_plugin.ptq.smooth_quant.groups import input_dim

__all__ = ["HeadPair", "Rotation", "Stream", "rotate"]


_NO_PROOF = (
    "nothing shows that the function stays: no layer that reads it gave a floating-point tensor in the recorded batch, "
    "and the run returned none but scalars; a run that returns the model's output shows it"
)


@dataclass(frozen=True, eq=False)
class Rotation:
    """The result of `rotate`.

    Args:
        streams: residual streams that are rotated.
        heads: pairs of layers whose heads are.
        matrices: Q or R, float64, of each stream (by its first writer) and pair (by its value projection).
        refused: what stays as it is, with the reason.
        change: largest ‖y' - y‖ / ‖y‖ of what the run returned for the recorded batch and of the layers compared.
    """

    streams: tuple[Stream, ...]
    heads: tuple[HeadPair, ...]
    matrices: dict[str, Tensor]
    refused: tuple[Refused, ...]
    change: float


def rotate(
    model: nn.Module,
    batch: Any,
    run: Callable[[Any], Any] | None = None,
    kind: str | None = None,
    seed: int = 0,
    heads: bool = True,
) -> Rotation:
    """Rotates residual streams and attention heads, in place. Values change, objects and keys do not.

    Computed in float64 and rounded once to each tensor's dtype. The model runs float and in evaluation mode.

    Args:
        model: float or prepared, without ranges.
        batch: one batch of data, which is recorded and proves the result.
        run: runs the model on it; `model(batch)` when None. It may return nothing, as steps of training do.
        kind: "hadamard", "orthogonal" (uniformly random), or None: Hadamard of the sizes that have one here.
        seed: of the random signs or matrices.
        heads: rotate the heads between value and output projections also.

    Raises:
        CalibrationError: quantizers have ranges already. They would be those of other weights.
        QuantizationError: impossible options, or values that overflow their dtype. After these, and after whatever
            the run raises, nothing is changed.

    >>> _ = torch.manual_seed(0)
    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.embed, self.norm, self.mlp = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 8)
    ...         self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 2)
    ...     def forward(self, x):
    ...         x = self.embed(x)
    ...         return self.head(self.last(x + self.mlp(self.norm(x)).relu()))
    >>> print(rotate(Block(), torch.randn(4, 3)).refused[0])
    'add_0': 'relu_0' (relu) writes it, which is no linear layer or embedding
    """
    check_rotation(kind, seed, heads)
    refuse_ranges(model, "rotate", "rotated")
    run = run or model
    with evaluating(model), float_forward(model), torch.no_grad(), without_compile():
        recording = record(model, lambda: run(batch), is_leaf=is_leaf)
        streams, refused = find_streams(model, recording)
        pairs, unpaired = find_head_pairs(model, recording) if heads else ([], [])
        refused += unpaired
        parts: list[Stream | HeadPair] = [*streams, *pairs]
        if kind == "hadamard":
            sizes = {_name(part): part.size for part in parts}
            unknown = {name: size for name, size in sizes.items() if hadamard(size) is None}
            faults = [f"{name!r}: no Hadamard matrix of size {size} is known here" for name, size in unknown.items()]
            raise_all(QuantizationError, "cannot rotate", faults)
        values = _Values(model)
        try:
            done, unproven, change = _rotate_proven(values, recording, parts, lambda: run(batch), kind, seed)
        except BaseException:  # an interrupt also would leave a rotation that nothing has proven
            values.restore()
            raise
    return Rotation(
        tuple(part for part, _ in done if isinstance(part, Stream)),
        tuple(part for part, _ in done if isinstance(part, HeadPair)),
        {_name(part): matrix for part, matrix in done},
        (*refused, *unproven),
        change,
    )


def _rotate_proven(
    values: _Values,
    recording: Recording,
    parts: Sequence[Stream | HeadPair],
    run: Callable[[], Any],
    kind: str | None,
    seed: int,
) -> tuple[list[tuple[Stream | HeadPair, Tensor]], list[Refused], float]:
    """Returns the parts that are rotated with their matrices, those put back with the reason, and the largest change.

    Args:
        values: of the model's parameters.
        recording: of one float pass.
        parts: streams, then pairs.
        run: runs the model on the recorded batch.
        kind: as of `rotate`.
        seed: as of `rotate`.
    """
    generator = torch.Generator().manual_seed(seed)
    done: list[tuple[Stream | HeadPair, Tensor]] = []
    refused: list[Refused] = []
    largest = 0.0
    returned = watch(values.model, (), run).returned
    # A stream turns the output projections that the proof of the heads looks at, so those are seen after the streams.
    groups: list[list[Stream | HeadPair]] = [[part] for part in parts if isinstance(part, Stream)]
    if pairs := [part for part in parts if isinstance(part, HeadPair)]:
        groups.append([*pairs])
    for group in groups:
        layers = watched_layers(values.model, recording, group)
        before = Seen(returned, watch(values.model, layers, run).layers)
        for part in group:
            keeps_mean = isinstance(part, Stream) and part.keeps_mean
            matrix = random_rotation(part.size, generator, kind, keeps_mean)
            if not before.holds_proof(part):
                refused.append(Refused(_name(part), _NO_PROOF))
                continue
            values.rotate(part, matrix)
            originals = values.write()
            change = before.change(watch(values.model, layers, run))
            if change > before.tolerance():
                for parameter, original in originals:
                    parameter.copy_(original)
                reason = f"the outputs of the recorded batch would differ by {change:.2g}"
                refused.append(Refused(_name(part), reason))
                continue
            largest = max(largest, change)
            done.append((part, matrix))
    return done, refused, largest


def check_rotation(kind: str | None = None, seed: int = 0, heads: bool = True) -> None:
    """Refuses impossible options.

    Args:
        kind, seed, heads: as in `rotate`.

    Raises:
        QuantizationError: naming them.
    """
    faults = []
    if kind not in (None, "hadamard", "orthogonal"):
        faults.append(f"kind is 'hadamard', 'orthogonal' or None, got {kind!r}")
    if not is_integer(seed):
        faults.append(f"seed is an integer, got {seed!r}")
    if not isinstance(heads, bool):
        faults.append(f"heads is True or False, got {heads!r}")
    raise_all(QuantizationError, "cannot rotate", faults)


def _name(part: Stream | HeadPair) -> str:
    return part.writers[0] if isinstance(part, Stream) else part.value


class _Values:
    """New values of parameters, float64, until a rotation's are all known."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.new: dict[str, Tensor] = {}
        self.first: dict[str, Tensor] = {}

    def rotate(self, part: Stream | HeadPair, matrix: Tensor) -> None:
        """Rotates a part by its matrix."""
        if isinstance(part, Stream):
            self.rotate_stream(part, matrix)
        else:
            self.rotate_heads(part, matrix)

    def rotate_stream(self, stream: Stream, q: Tensor) -> None:
        """Norms into their readers, then Q into writers and readers."""
        for norm, readers in stream.norms:
            weight, bias = (getattr(self.modules[norm], key, None) for key in ("weight", "bias"))
            for reader in readers:
                self._read(reader, q, None if weight is None else self._get(f"{norm}.weight"),
                           None if bias is None else self._get(f"{norm}.bias"))  # fmt: skip
            if weight is not None:
                self.new[f"{norm}.weight"] = torch.ones_like(self._get(f"{norm}.weight"))
            if bias is not None:
                self.new[f"{norm}.bias"] = torch.zeros_like(self._get(f"{norm}.bias"))
        for name in stream.writers:
            if is_linear(self.modules.get(name)):
                self._write(name, q)
            else:  # an embedding, or a parameter that is added
                key = f"{name}.weight" if name in self.modules else name
                self.new[key] = self._get(key) @ q.to(self._get(key).device)

    def rotate_heads(self, pair: HeadPair, r: Tensor) -> None:
        """R into the rows of the value projection and the columns of the output projection, head by head."""
        self._write(pair.value, torch.block_diag(*[r] * (self._rows(pair.value) // pair.size)))
        columns = self.model.get_parameter(f"{pair.output}.weight").shape[input_dim(self.modules[pair.output])]
        self._read(pair.output, torch.block_diag(*[r] * (columns // pair.size)))

    def _rows(self, name: str) -> int:
        return self.model.get_parameter(f"{name}.weight").shape[1 - input_dim(self.modules[name])]

    def _read(self, name: str, q: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> None:
        """W ← W diag(γ) Q and b ← b + W β."""
        turned = input_dim(self.modules[name]) == 0
        weight = self._get(f"{name}.weight")
        weight = weight.T if turned else weight
        if shift is not None and bool(shift.any()):
            self.new[f"{name}.bias"] = self._get(f"{name}.bias") + weight @ shift
        weight = (weight if scale is None else weight * scale) @ q.to(weight.device)
        self.new[f"{name}.weight"] = weight.T if turned else weight

    def _write(self, name: str, q: Tensor) -> None:
        """W ← Qᵀ W and b ← b Q."""
        turned = input_dim(self.modules[name]) == 0
        weight = self._get(f"{name}.weight")
        q = q.to(weight.device)
        self.new[f"{name}.weight"] = weight @ q if turned else q.T @ weight
        if getattr(self.modules[name], "bias", None) is not None:
            self.new[f"{name}.bias"] = self._get(f"{name}.bias") @ q

    def _get(self, name: str) -> Tensor:
        return self.new[name] if name in self.new else self.model.get_parameter(name).detach().double()

    def write(self) -> list[tuple[Tensor, Tensor]]:
        """Gives the parameters their new values, all or none; returns those before."""
        new, self.new = self.new, {}
        changes = [(name, self.model.get_parameter(name), value) for name, value in new.items()]
        originals: list[tuple[Tensor, Tensor]] = [(t, t.detach().clone()) for _, t, _ in changes]
        write_all(changes, "rotate")
        for name, (_, original) in zip(new, originals, strict=True):
            self.first.setdefault(name, original)
        return originals

    def restore(self) -> None:
        """Gives the parameters the values that they had before the first write."""
        for name, original in self.first.items():
            self.model.get_parameter(name).copy_(original)
