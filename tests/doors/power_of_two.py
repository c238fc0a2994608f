"""A format as a project of its own adds it: integers under a power-of-two scale, of which the exponent is stored."""

import torch

from lq_plugin.quantizers import (
    INTEGER_STORAGE,
    ActivationQuantizer,
    Format,
    Part,
    Storage,
    WeightQuantizer,
    integer_container,
    register_format,
)


class PowerOfTwo:
    def bounds_to_qparams(self, minimum, maximum):
        scale, zero_point = super().bounds_to_qparams(minimum, maximum)
        return torch.exp2(torch.ceil(torch.log2(scale))), zero_point


class PowerOfTwoWeight(PowerOfTwo, WeightQuantizer):
    pass


class PowerOfTwoActivation(PowerOfTwo, ActivationQuantizer):
    takes_kernels = True  # it rounds as its base does; only the scale that is kept is another


def encode(quantizer, w, *statistics):
    parts = INTEGER_STORAGE.encode(quantizer, w, *statistics)
    exponent = torch.frexp(parts["scale"].values).exponent - 1
    return parts | {"scale": Part((exponent + 127).to(torch.int32), 8)}


def scales(values):
    return {**values, "scale": torch.exp2(values["scale"].float() - 127)}


def decode(spec, values):
    return INTEGER_STORAGE.decode(spec, scales(values))


def container(spec, values):
    return integer_container(spec, scales(values))


register_format(
    "pot",
    Format(
        "integers under a power-of-two scale",
        (2, 4, 8),
        choices=("granularity", "signed", "range"),
        uniform=True,
        scale_bits=8,
    ),
    weight=PowerOfTwoWeight,
    activation=PowerOfTwoActivation,
    storage=Storage(encode, decode, INTEGER_STORAGE.statistics, finite_codes=True),
    onnx=container,
)
