"""`Histogram`: streaming statistics of activations in one pass and bounded memory.

A bin is all numbers that share sign, exponent and the first mantissa bits: `SUB_BINS` bins per
octave, each less than 1 % of its value wide. Bins therefore do not depend on the data. Only the
window of octaves that is kept follows the largest magnitude seen; when it grows, the lowest bins
are folded into the one at zero. So

* two histograms merge by adding counts, exactly as if all data had been one stream, in any order;
* one outlier costs a few octaves at the bottom, not the resolution where the mass is;
* multiplying the data by a power of two changes nothing but the labels.

The same idea as HdrHistogram's; a histogram with equal bins (TensorRT, torch's HistogramObserver)
loses its resolution to one outlier.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from lq_plugin.errors import CalibrationError
from lq_plugin.functional.affine import extremes
from lq_plugin.native.statistics import statistics_kernels
from lq_plugin.ranges.sample import Sample, refuse_non_finite

#: Mantissa bits that tell bins apart, and bins per octave.
MANTISSA_BITS = 7
SUB_BINS = 2**MANTISSA_BITS
#: `sample()` joins bins narrower than this share of the root mean square.
FINEST_BIN = 1 / 256
#: Elements of one update that are counted, where not all are.
MAX_SAMPLES = 2**16
_SHIFT = 23 - MANTISSA_BITS
_CHUNK = 2**17


class Histogram:
    """Counts, exact bounds and exact number of zeros of `rows` streams.

    State (all tensors, for `state_dict`, DDP or a cache): `counts [rows, 2 * bins]` int64, negative
    values first by ascending magnitude, then positive ones; `zeros [rows]` and `total [rows]` int64;
    `minimum [rows]`, `maximum [rows]` float32; `octave [rows]` int64, the biased float32 exponent
    of the largest magnitude seen.

    Across DDP ranks, first agree on the window, then add::

        histogram.rebin(all_reduce(histogram.common_range(), MAX))
        all_reduce(histogram.counts, SUM); all_reduce(histogram.zeros, SUM); ...

    Args:
        rows: independent streams, 1 or the number of channels.
        bins: bins for each sign, a multiple of 128 (bins an octave); 2048 covers 16 octaves.
        max_samples: about this many elements of one update, at most, are counted in bins, taken
            with a stride that is coprime with the row length, so that no pixel or channel is
            preferred; at least 1024 a row. Bounds, zeros and total are always exact. None counts all, whatever the
            order of the data; in one row what is smaller than 2^-133 counts as zero then.
        device: where the state lives.
        name: what error messages call the tensor.

    >>> histogram = Histogram()
    >>> histogram.update(torch.tensor([[0.0, 0.0, 1.0, -3.0]]))
    >>> int(histogram.zeros), float(histogram.minimum), float(histogram.maximum)
    (2, -3.0, 1.0)
    """

    # Calibration runs under inference mode; tensors made there could not be updated outside of it.
    @torch.inference_mode(False)
    def __init__(
        self,
        rows: int = 1,
        bins: int = 2048,
        max_samples: int | None = MAX_SAMPLES,
        device: torch.device | str | None = None,
        name: str = "tensor",
    ) -> None:
        if bins < SUB_BINS or bins % SUB_BINS:
            raise CalibrationError(f"{name}: bins must be a positive multiple of {SUB_BINS}, got {bins}")
        if rows < 1 or (max_samples is not None and max_samples < 1):
            raise CalibrationError(f"{name}: rows and max_samples must be positive, got {rows} and {max_samples}")
        self.rows, self.bins, self.max_samples, self.name = rows, bins, max_samples, name
        self.counts = torch.zeros(rows, 2 * bins, dtype=torch.int64, device=device)
        self.zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        self.total = torch.zeros(rows, dtype=torch.int64, device=device)
        self.minimum = torch.full((rows,), torch.inf, device=device)
        self.maximum = torch.full((rows,), -torch.inf, device=device)
        self.octave = torch.zeros(rows, dtype=torch.int64, device=device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Adds one batch; the state follows it to its device.

        Args:
            x: floating point `[rows, n]`; with `rows=1` any shape, read in memory order without a copy.

        Raises:
            CalibrationError: wrong number of rows, NaN or Inf; the statistics are left as they were.
        """
        x = self._as_rows(x.detach())
        if x.numel() == 0:
            return
        minimum, maximum = (bound.flatten().float() for bound in extremes(x, (self.rows, 1)))
        refuse_non_finite(minimum, maximum, self.name)
        if x.device != self.counts.device:
            for key, value in self.state_dict().items():
                setattr(self, key, value.to(x.device))
        self.minimum = torch.minimum(self.minimum, minimum)
        self.maximum = torch.maximum(self.maximum, maximum)
        self.total += x.shape[1]
        self.rebin(torch.maximum(self.octave, _octave(torch.maximum(maximum, -minimum))))
        if self.rows == 1 and self.max_samples is None:
            if (native := statistics_kernels(x)) is not None and x.dtype == torch.float32:
                self.zeros += native.count_bins(x, self.counts.view(2, self.bins), int(self._lowest_key()))
            else:
                self._add_keys(_count_keys(x[0]))
            return
        self.zeros += x.shape[1] - _count_nonzero(x, signed=bool((minimum < 0).any()))
        stride = self._stride(x.shape[1])
        # Adding zero turns -0 into +0 in the same pass that gathers the elements.
        bits = (x[:, ::stride].float() + 0.0).view(torch.int32)
        # One stride for the whole row: every counted element stands for `stride` elements.
        self.counts += self._count(bits).mul_(stride)

    def _as_rows(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise CalibrationError(f"{self.name}: ranges are estimated on floating point values, got {x.dtype}")
        if self.rows == 1:
            if x.is_contiguous():
                return x.view(1, -1)
            # channels_last and other dense layouts: flattening in memory order needs no copy.
            order = sorted(range(x.dim()), key=x.stride, reverse=True)
            return x.permute(order).reshape(1, -1)
        if x.dim() != 2 or x.shape[0] != self.rows:
            raise CalibrationError(f"{self.name}: expected [{self.rows}, n], got {list(x.shape)}")
        return x

    def _stride(self, n: int) -> int:
        if self.max_samples is None:
            return 1
        stride = -(-n // max(self.max_samples // self.rows, 1024))
        while gcd(stride, n) > 1:
            stride += 1
        return stride

    def _lowest_key(self) -> Tensor:
        """Returns the key (float32 bits without the sign, shifted) of the first bin, `[rows]`."""
        key: Tensor = ((self.octave + 1) * SUB_BINS - self.bins).clamp(min=0)
        return key

    def _add_keys(self, per_key: Tensor) -> None:
        """Adds counts of all keys, negative and positive `[2, keys]`; key 0 holds the zeros."""
        self.zeros += per_key[:, 0].sum()
        per_key[:, 0] = 0
        position = torch.arange(per_key.shape[1], device=per_key.device) - self._lowest_key()
        self.counts.view(2, self.bins).index_add_(1, position.clamp_(0, self.bins - 1), per_key)

    def _count(self, bits: Tensor) -> Tensor:
        key = (bits & 0x7FFFFFFF).bitwise_right_shift_(_SHIFT)
        index = key.sub_(self._lowest_key().to(torch.int32).unsqueeze(1)).clamp_(min=0)
        # bits >> 31 is -1 for negative numbers.
        index.add_((bits >> 31).add_(1), alpha=self.bins)
        if self.rows > 1:
            index = index + torch.arange(self.rows, device=index.device).unsqueeze(1) * (2 * self.bins)
        counted = torch.bincount(index.reshape(-1), minlength=self.counts.numel()).view_as(self.counts)
        # Zeros fell into the lowest positive bin; they are counted apart.
        counted[:, self.bins] -= (bits == 0).sum(dim=1)
        return counted

    def common_range(self) -> Tensor:
        """Returns the window, `[rows]`: histograms take the maximum of theirs before their counts are added."""
        return self.octave.clone()

    @torch.inference_mode(False)
    @torch.no_grad()
    def rebin(self, octave: Tensor) -> None:
        """Raises the window to `octave [rows]`, folding bins that fall out of it into the lowest one.

        Raises:
            CalibrationError: when it would lower a window, which would lose the largest values.
        """
        if bool((octave < self.octave).any()):
            raise CalibrationError(f"{self.name}: a histogram's range can only grow")
        before = self._lowest_key()
        self.octave = octave.to(self.octave).clone()
        shift = self._lowest_key() - before
        if not bool(shift.any()):
            return
        position = torch.arange(self.bins, device=shift.device) - shift.unsqueeze(1)
        position = position.clamp_(min=0).repeat_interleave(2, dim=0)
        per_sign = self.counts.view(2 * self.rows, self.bins)
        self.counts = torch.zeros_like(per_sign).scatter_add_(1, position, per_sign).view_as(self.counts)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, other: Histogram) -> None:
        """Adds another stream's statistics; the result is that of one stream with all the data.

        Raises:
            CalibrationError: when rows or bins differ.
        """
        if (self.rows, self.bins) != (other.rows, other.bins):
            raise CalibrationError(
                f"{self.name}: cannot merge histograms of {self.rows} x {self.bins} and {other.rows} x {other.bins} "
                "(rows x bins)"
            )
        theirs = Histogram(other.rows, other.bins, other.max_samples, other.counts.device, other.name)
        theirs.load_state_dict(other.state_dict())
        common = torch.maximum(self.common_range(), theirs.common_range().to(self.octave))
        self.rebin(common)
        theirs.rebin(common)
        self.counts += theirs.counts.to(self.counts)
        self.zeros += theirs.zeros.to(self.zeros)
        self.total += theirs.total.to(self.total)
        self.minimum = torch.minimum(self.minimum, theirs.minimum.to(self.minimum))
        self.maximum = torch.maximum(self.maximum, theirs.maximum.to(self.maximum))

    def edges(self) -> Tensor:
        """Returns the bin edges, ascending through zero, float32 `[rows, 2 * bins + 1]`."""
        key = self._lowest_key().unsqueeze(1) + torch.arange(self.bins + 1, device=self.octave.device)
        # The edge after the largest finite number would be Inf.
        positive = (key << _SHIFT).clamp_(max=0x7F7FFFFF).to(torch.int32).view(torch.float32)
        positive[:, 0] = 0.0
        return torch.cat([-positive.flip(1)[:, :-1], positive], dim=1)

    def sample(self) -> Sample:
        """Returns the stream so far as a `Sample`, zeros as one exact point.

        Raises:
            CalibrationError: when nothing was seen.
        """
        if bool((self.total == 0).any()):
            raise CalibrationError(f"{self.name}: no data was seen, so there is no range to estimate")
        counts = torch.cat([self.counts[:, : self.bins].flip(1), self.counts[:, self.bins :]], dim=1)
        edges = self.edges()
        # The extremes are known exactly even where the stride missed them.
        for extreme in (self.minimum, self.maximum):
            inside = torch.searchsorted(edges, extreme.unsqueeze(1), right=True).sub_(1).clamp_(0, 2 * self.bins - 1)
            missed = (counts.gather(1, inside) == 0) & (extreme.unsqueeze(1) != 0)
            counts.scatter_add_(1, inside, missed.to(counts.dtype))
        edges, mass = _join_fine_bins(edges, counts.double())
        # Strided counts are scaled to the exact number of elements that are not zero.
        mass *= ((self.total - self.zeros) / mass.sum(dim=1).clamp(min=1.0)).unsqueeze(1)
        return Sample.from_histogram(edges, mass, self.zeros, self.minimum, self.maximum, self.name)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns copies of the statistics as tensors."""
        return {key: getattr(self, key).clone() for key in ("counts", "zeros", "total", "minimum", "maximum", "octave")}

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Loads the statistics of `state_dict()`.

        Raises:
            CalibrationError: naming the tensors that are missing or have another shape.
        """
        mine = self.state_dict()
        faults = [f"{key} is missing" for key in mine if key not in state]
        faults += [
            f"{key} has shape {list(state[key].shape)}, expected {list(value.shape)}"
            for key, value in mine.items()
            if key in state and state[key].shape != value.shape
        ]
        if faults:
            raise CalibrationError(f"{self.name}: cannot load histogram: " + "; ".join(faults))
        for key, value in mine.items():
            setattr(self, key, state[key].to(value).clone())


def _octave(magnitude: Tensor) -> Tensor:
    """Returns the biased exponent of float32 numbers, int64."""
    return (magnitude.contiguous().view(torch.int32) >> 23).clamp_(min=0).long()


def _count_keys(x: Tensor) -> Tensor:
    """Returns how many of `x [n]` have each sign and key, int64 `[2, 2^15]`.

    It works in pieces that stay in the cache, which takes a sixth of the time of `_count`.
    """
    # With 7 mantissa bits sign and key are the upper half of a float32; arithmetic shifts put the negative ones first.
    counted = torch.zeros(2**16, dtype=torch.int64, device=x.device)
    for piece in x.split(2 * _CHUNK):
        upper = piece.float().view(torch.int32).bitwise_right_shift(_SHIFT).add_(2**15)
        counted += torch.bincount(upper, minlength=2**16)
    return counted.view(2, -1)


def _count_nonzero(x: Tensor, signed: bool) -> Tensor:
    """Returns the elements per row that are not 0, int64 `[rows]`; 4 times as fast as `count_nonzero`, by pieces."""
    rows, n = x.shape
    step = max(_CHUNK // rows, 1)
    counted = torch.zeros(rows, dtype=torch.float64, device=x.device)
    buffer = torch.empty(rows, min(step, n), dtype=x.dtype, device=x.device)
    for piece in x.split(step, dim=1):
        out = torch.sign(piece, out=buffer[:, : piece.shape[1]])
        # A piece has fewer than 2^24 elements: a float32 sum of ones is exact.
        counted += (out.abs_() if signed else out).sum(dim=1, dtype=torch.float32)
    return counted.long()


def _join_fine_bins(edges: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Joins bins narrower than `FINEST_BIN` of the row's root mean square; drops empty outer bins."""
    centre = edges[:, :-1].double() * 0.5 + edges[:, 1:].double() * 0.5
    rms = ((centre.square() * mass).sum(1) / mass.sum(1).clamp(min=1e-300)).sqrt()
    finest = 2.0 ** torch.floor(torch.log2((rms * FINEST_BIN).clamp(min=1e-300)))
    # An edge stays when it is a multiple of `finest`; edges of wider bins all are.
    multiple = edges.double() / finest.unsqueeze(1)
    keep = multiple == multiple.round()
    used = (mass > 0).to(torch.int8)
    before = used.cummax(1).values
    after = used.flip(1).cummax(1).values.flip(1)
    # An edge is needed from the last one at or below the first used bin on.
    keep[:, 1:-1] &= (before[:, :-1] & after[:, 1:]).bool() | (used[:, :-1] | used[:, 1:]).bool()
    keep[:, 0] = True
    keep[:, -1] = True
    index = keep.long().cumsum(1) - 1
    size = int(index[:, -1].max()) + 1
    joined = torch.zeros(mass.shape[0], size - 1, dtype=mass.dtype, device=mass.device)
    joined.scatter_add_(1, index[:, :-1], mass)
    # Rows with fewer edges repeat their last one: bins without width and mass.
    # One column more than needed takes the edges that are dropped.
    out = edges[:, -1:].repeat(1, size + 1)
    out.scatter_(1, torch.where(keep, index, size), edges)
    return out[:, :size].contiguous(), joined
