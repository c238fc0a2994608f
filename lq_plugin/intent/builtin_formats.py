"""The formats that come with the library, declared; `lq_plugin.quantizers` computes them."""

from __future__ import annotations

from typing import Any

from lq_plugin.intent.formats import MAX_BIT_WIDTH, Format, IntegerGrid, declare_format
from lq_plugin.intent.granularity import PerChannel, PerGroup

#: Ways to find the exponent of an OCP MX block (`lq_plugin.functional.ocp_mx`).
MX_SCALE_MODES = ("floor", "rceil", "ceil", "even", "mse")
#: What the largest magnitude of an NVFP4 block is mapped to (`lq_plugin.functional.nvfp4`).
NVFP4_TARGETS = ("max", "four_six")
#: Ways to find the codebook of a tensor (`lq_plugin.functional.codebook`).
CODEBOOK_METHODS = ("exact", "linear", "quantile", "kmeans++")
#: Ways to find the scale of a ternary block (`lq_plugin.quantizers.half_scale`).
TERNARY_SCALES = ("mean", "exact", "max")
#: Elements of `fp8` by their word, the first without one.
FP8_ELEMENTS = ("e4m3", "e5m2")
#: Ranges that search among integer levels.
_INTEGER_RANGES = ("mse", "kl", "aciq", "aciq_exact", "octav")
#: MX formats (integer mantissas under shared exponents) by name, with the bits of an element.
MX_ELEMENTS = {"mx9": 8, "mx6": 5, "mx4": 3}
#: OCP MX formats by name, with the bits of an element and what it is.
OCP_ELEMENTS = {
    "mxfp8_e4m3": (8, "E4M3"),
    "mxfp8_e5m2": (8, "E5M2"),
    "mxfp6_e3m2": (6, "E3M2"),
    "mxfp6_e2m3": (6, "E2M3"),
    "mxfp4": (4, "E2M1"),
    "mxint8": (8, "8-bit integer"),
}


def _sign_faults(spec: Any) -> list[str]:
    faults = []
    if "float_eval" in spec.format_options and not spec.stochastic:
        faults.append("sign:float_eval is how stochastic binarization is evaluated: write 'sign:float_eval stochastic'")
    if spec.stochastic and any(map(spec.kind.is_number, spec.format_options)):
        faults.append("a threshold is of deterministic binarization: the stochastic one has probabilities")
    return faults


def _kmeans_faults(spec: Any) -> list[str]:
    group = spec.granularity
    if not (isinstance(group, PerGroup) and group.ragged):
        return []
    # Zeros that fill the last group would count as its members.
    return [f"{spec.format} has a codebook for each whole group, got {group}: choose a size that divides the inputs"]


def _float_range_faults(spec: Any) -> list[str]:
    if spec.range_name not in _INTEGER_RANGES:
        return []
    return [f"range {spec.range!r} is of integers; {spec.format} takes minmax, percentile, ema and dynamic"]


def _seq_range_faults(spec: Any) -> list[str]:
    if spec.range in ("minmax", "mse", "lsq"):
        return []
    return [f"{spec.format} takes the ranges minmax, mse and lsq, got {spec.range!r}"]


declare_format(
    "int",
    Format(
        "uniform integer levels",
        tuple(range(1, MAX_BIT_WIDTH + 1)),
        choices=("granularity", "signed", "affine", "narrow_range", "range"),
        uniform=True,
        scale_bits=None,
        roundings=("nearest", "stochastic"),
        gradients=("clipped", "mad", "identity"),
        dynamic=True,
        examples=("int8", "uint8"),
        defaults=("int4", "/ uint8"),
    ),
)
declare_format(
    "sign",
    Format(
        "-1 and +1 (BinaryConnect, BNN); sign:0.1 sets the threshold, sign:float_eval evaluates with the real-valued "
        "weights",
        (1,),
        choices=(),
        signs=True,
        options=(("float_eval",),),
        number=("threshold", -1.0, 1.0),
        check=_sign_faults,
        roundings=("nearest", "stochastic"),
        gradients=("clipped", "identity"),
    ),
)
declare_format(
    "xnor",
    Format(
        "sign of an input; the output is multiplied by K, the mean magnitude of each of the input's windows",
        (1,),
        choices=(),
        slots=("input",),
        signs=True,
        scales_output=True,
        defaults=(),
    ),
)
declare_format(
    "bwn",
    Format(
        "sign times the mean magnitude of a filter; bwn:paper takes the paper's gradient",
        (1,),
        PerChannel(),
        scale_bits=32,
        slots=("weight",),
        signs=True,
        options=(("plain", "paper"),),
    ),
)
declare_format(
    "twn",
    Format(
        "-a, 0, +a with the threshold 0.7 E|w|; twn:0.75 sets the factor, twn:exact finds the optimum",
        (2,),
        scale_bits=32,
        slots=("weight",),
        options=(("exact",),),
        number=("threshold", 0.0, 2.0),
    ),
)
declare_format(
    "ttq",
    Format(
        "-Wn, 0, +Wp with learned scales and the threshold 0.05 max|w|; ttq:0.1 sets the factor",
        (2,),
        scale_bits=64,
        slots=("weight",),
        number=("threshold", 0.0, 0.95),
        learned=True,
    ),
)
declare_format(
    "kmeans",
    Format(
        "a codebook whose centroids are trained: kmeans2:linear, kmeans4:exact:reassign; sum takes the paper's "
        "gradient of a centroid",
        tuple(range(1, 9)),
        codebook=True,
        check=_kmeans_faults,
        slots=("weight",),
        options=(CODEBOOK_METHODS, ("mean", "sum"), ("fixed", "reassign")),
        learned=True,
        examples=("kmeans2",),
    ),
)
for name, bits in MX_ELEMENTS.items():
    declare_format(
        name,
        Format(
            f"{name[2:]} bits with an exponent for 16 elements and a microexponent for 2",
            (bits,),
            PerGroup(16, ragged=True),
            choices=(),
            scale_bits=8 + 16 // 2,
            sign_magnitude=True,
            defaults=(name,) if name == "mx6" else (),
        ),
    )
for name, (bits, element) in OCP_ELEMENTS.items():
    declare_format(
        name,
        Format(
            f"OCP MX: {element} elements, a power-of-two scale for 32 of them; mxfp4:rceil sets how the scale is "
            "rounded, mxfp4:mse takes the best of three",
            (bits,),
            PerGroup(32, ragged=True),
            choices=(),
            scale_bits=8,
            options=(MX_SCALE_MODES,),
            defaults=(name,) if name == "mxfp4" else (),
        ),
    )
declare_format(
    "nvfp4",
    Format(
        "E2M1 elements, an E4M3 scale for 16 of them, one float scale above; nvfp4:four_six maps the largest of a "
        "block to 4 where that errs less than 6, nvfp4:unit has no scale above (MLX)",
        (4,),
        PerGroup(16, True),
        choices=(),
        scale_bits=8,
        tensor_bits=32,
        options=(NVFP4_TARGETS, ("unit",)),
    ),
)
declare_format(
    "if4",
    Format(
        "blocks of 16 E2M1 elements or of integers -7..7, whichever err less, under NVFP4's scales",
        (4,),
        PerGroup(16, True),
        choices=(),
        scale_bits=8,
        tensor_bits=32,
    ),
)
#: Of a block under one float16 scale (`lq_plugin.quantizers.half_scale`).
_HALF_SCALE: dict[str, Any] = {
    "choices": (),
    "uniform": True,
    "scale_bits": 16,
    "slots": ("weight",),
    "gradients": ("clipped", "identity"),
    "defaults": (),
}
declare_format(
    "q4_0",
    Format(
        "GGUF's Q4_0: a float16 scale for 32 elements, by which the largest of them is -8 of -8..7, whatever its sign",
        (4,),
        PerGroup(32, ragged=True),
        # The levels are -8..7 or, where the largest element is positive, -7..8.
        grid=lambda spec: IntegerGrid(-8, 7, affine=True),
        **_HALF_SCALE,
    ),
)
declare_format(
    "q8_0",
    Format(
        "GGUF's Q8_0: -127..127 times a float16 scale for 32 elements",
        (8,),
        PerGroup(32, ragged=True),
        sign_magnitude=True,
        **_HALF_SCALE,
    ),
)
# The same values, in a file of 2.0625 and of 1.6875 bits an element: five to a byte, 52 bytes a block, are unpacked
# more slowly.
for name, packed in {"tq2_0": {}, "tq1_0": {"code_bits": 0, "scale_bits": 52 * 8 + 16}}.items():
    declare_format(
        name,
        Format(
            f"GGUF's {name.upper()}: -d, 0, +d with a float16 d for 256 elements, their mean magnitude (BitNet b1.58); "
            f"{name}:exact has the least squared error, {name}:max the largest magnitude",
            (2,),
            PerGroup(256, ragged=True),
            sign_magnitude=True,
            options=(TERNARY_SCALES,),
            **(_HALF_SCALE | packed),
        ),
    )
declare_format(
    "fp8",
    Format(
        "8-bit floats under a float scale: E4M3, or fp8:e5m2",
        (8,),
        choices=("granularity", "range"),
        scale_bits=32,
        blocks=True,
        dynamic=True,
        options=(FP8_ELEMENTS,),
        check=_float_range_faults,
        examples=("fp8",),
    ),
)
declare_format(
    "seq",
    Format(
        "four levels spread evenly over a range (ParetoQ's SEQ), or three: seq:ternary; lsq learns the range",
        (2,),
        choices=("granularity", "range"),
        scale_bits=32,
        slots=("weight",),
        options=(("ternary",),),
        learns_range=True,
        check=_seq_range_faults,
        examples=("seq",),
        defaults=("seq per_channel mse",),
    ),
)
