"""Weights that share a few trained numbers: k-means codebooks."""

from __future__ import annotations

import hashlib
from typing import cast

import torch
from torch import Tensor, nn

from lq_plugin.errors import SpecError
from lq_plugin.functional.codebook import Gradient, Method, assign, codebook_kmeans, fake_quantize_codebook, lookup
from lq_plugin.functional.grouping import blocks, from_rows, to_rows, unblocks
from lq_plugin.intent.builtin_formats import CODEBOOK_METHODS
from lq_plugin.intent.formats import FORMATS
from lq_plugin.intent.spec import PerGroup, QuantSpec
from lq_plugin.quantizers.base import Levels, float32
from lq_plugin.quantizers.registry import Container, Part, Parts, Statistics, Storage, Values, register_format
from lq_plugin.quantizers.ternary import no_table
from lq_plugin.quantizers.weight import WeightQuantizer
from lq_plugin.ranges import Sample


class CodebookWeightQuantizer(WeightQuantizer):
    """Table of 2^b centroids and an index for each weight (see `lq_plugin.functional.codebook`).

    `calibrate` finds both from the weight. The optimizer then trains the centroids; the indices stay (`fixed`, the
    paper's), or the weight under them is trained on and each epoch starts with the nearest centroid (`reassign`).
    """

    no_weight_decay = ("centroids",)
    indices: Tensor

    def make_qparams(self) -> None:
        self.needs_calibration = True
        group = self.spec.granularity
        if isinstance(group, PerGroup) and self.shape[1] % group.group_size:
            raise SpecError(
                f"{self.name} ({self.spec}): a codebook is of a whole group, and {group.group_size} does not divide "
                f"its {self.shape[1]} input channels"
            )
        tables = torch.Size(self.scale_shape).numel()
        self.centroids = nn.Parameter(float32(0.0, (tables, 2**self.spec.bit_width)))
        members = torch.Size(self.shape).numel() // tables
        self.register_buffer("indices", torch.zeros(tables, members, dtype=torch.uint8))
        words = self.spec.format_options
        self.method = cast(Method, next((word for word in words if word in CODEBOOK_METHODS), "exact"))
        self.gradient: Gradient = "sum" if "sum" in words else "mean"
        self.reassign = "reassign" in words

    def qparams(self, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the largest magnitude of each table; there is no zero point."""
        largest = self.centroids.detach().abs().amax(1).reshape(self.scale_shape)
        return largest, torch.zeros_like(largest)

    def levels(self, x: Tensor | None = None) -> Levels:
        table = self.centroids.detach().sort(1).values
        step = (table[:, -1] - table[:, 0]) / max(table.shape[1] - 1, 1)
        return Levels(*(value.reshape(self.scale_shape) for value in (table[:, 0], table[:, -1], step)))

    def quantize_values(self, x: Tensor) -> Tensor:
        w = blocks(x, self.spec.granularity)
        rows = to_rows(w, self.scale_shape)
        if self.reassign:
            values = fake_quantize_codebook(rows, self.centroids, self.indices, self.gradient)
        else:
            values = lookup(self.centroids, self.indices, self.gradient).to(x.dtype)
            if torch.is_grad_enabled():
                # The weight takes part with factor 0: DDP refuses parameters without a gradient.
                values = values + 0.0 * rows
        return unblocks(from_rows(values, w.shape, self.scale_shape), self.shape, self.spec.granularity)

    def calibrate(self, weight: Tensor) -> None:
        super().calibrate(weight)  # checks for NaN and Inf
        rows = to_rows(blocks(weight.detach().float(), self.spec.granularity), self.scale_shape)
        seed = int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=7).digest(), "big")
        generator = torch.Generator(device=rows.device).manual_seed(seed)
        with torch.no_grad():
            self.centroids.copy_(codebook_kmeans(rows, self.centroids.shape[1], self.method, generator))
            self.indices.copy_(assign(rows, self.centroids))

    def new_epoch(self, weight: Tensor) -> None:
        if self.reassign:
            rows = to_rows(blocks(weight.detach().float(), self.spec.granularity), self.scale_shape)
            with torch.no_grad():
                # Training may have changed their order; momentum belongs to the centroid, so the table stays as it is.
                ordered, order = self.centroids.sort(1)
                self.indices.copy_(order.gather(1, assign(rows, ordered).long()))

    def load_sample(self, sample: Sample) -> None:
        self.set_calibrated()


def _statistics(quantizer: CodebookWeightQuantizer, w: Tensor) -> Statistics:
    tables, scale = quantizer.centroids.detach(), quantizer.scale_shape
    if max(scale[1:], default=1) > 1:
        tables = tables.view(*scale, -1)
    return from_rows(quantizer.indices, w.shape, scale), tables


def _encode(quantizer: CodebookWeightQuantizer, w: Tensor, indices: Tensor, centroids: Tensor) -> Parts:
    return {"codes": Part(indices.to(torch.int32), quantizer.spec.bit_width), "centroids": Part(centroids)}


def _decode(spec: QuantSpec, parts: Values) -> Tensor:
    tables, codes = parts["centroids"], parts["codes"]
    scale = tuple(tables.shape[:-1]) if tables.ndim > 2 else (len(tables), *[1 for _ in codes.shape[1:]])
    values = tables.flatten(0, -2).gather(1, to_rows(codes, scale).long())
    return from_rows(values, codes.shape, scale)


def _container(spec: QuantSpec, values: Values) -> Container:
    return Container(values["codes"], 8, False, table=values["centroids"][0])


register_format(
    "kmeans",
    FORMATS["kmeans"],
    weight=CodebookWeightQuantizer,
    storage=Storage(_encode, _decode, _statistics, finite_codes=True),
    onnx=_container,
    onnx_fault=no_table,
    default_options="exact:mean:fixed",
)
