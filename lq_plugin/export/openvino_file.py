"""Writer of OpenVINO's own files (IR): the graph of an ONNX file, with weights of 2 and 3 bits as they are.

OpenVINO's reader of ONNX has no integers below 4 bits; its own files have u2, four in a byte, and u3, eight in three
bytes. A weight becomes `(u - z) · s` with unsigned numbers `u` and whole `z`:

    u = q - min(q)                     z = zero point - min(q)

Next to quantized inputs a Convert to int8 stands between the constant and what follows: OpenVINO computes it on
loading, and integer kernels then take weights of any number of bits. Without it, seen with OpenVINO 2026.4.1 on a
CPU, a matrix product multiplies floats with constants of 4 and 2 bits as they stand, and a convolution is float. Next
to float inputs that product is the fastest one; from 5 rows on its sums over 2 bits are wrong unless their number is
a multiple of 4, and of 3 bits there is none. Both stay at 4 bits.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lq_plugin.errors import ExportError
from lq_plugin.export.openvino import OpenVINOSession
from lq_plugin.utilities.files import replacing, temporary_folder

#: Types of constants that are looked at, with the bits of each.
_TYPES = {"i4": 4, "u4": 4, "i8": 8, "u8": 8}
#: Operations that read a weight.
_LAYERS = (
    "MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "Gather",
)  # fmt: skip
#: Operations between a weight's scale and the layer that reads it.
_SHAPES = ("Reshape", "Transpose", "Convert", "Unsqueeze", "Squeeze")


def write_ir(onnx_file: Path, path: Path, three_bits: bool) -> int:
    """Writes an ONNX file as `path`, with its constants in a `.bin` of the same name.

    Both files are complete before either takes its place; a process that ends between the two leaves one of each.

    Args:
        onnx_file: to read.
        path: of the `.xml` file.
        three_bits: linear layers with float inputs also have u3, which makes the file smaller and its products slower.

    Returns:
        The size of both files, in bytes.

    Raises:
        ExportError: OpenVINO cannot open the ONNX file, or a file cannot be written.
    """
    import openvino  # type: ignore[import-untyped]

    _try(onnx_file, path)
    model = openvino.Core().read_model(str(onnx_file))
    narrow(model, three_bits)
    constants = path.with_suffix(".bin")
    with temporary_folder("openvino") as folder:
        graph, numbers = Path(folder, "model.xml"), Path(folder, "model.bin")
        openvino.serialize(model, str(graph), str(numbers))
        _try(graph, path)
        with replacing(constants, ExportError) as first, replacing(path, ExportError) as second:
            for source, stream in ((numbers, first), (graph, second)):
                with source.open("rb") as content:
                    shutil.copyfileobj(content, stream)
        return graph.stat().st_size + numbers.stat().st_size


def _try(file: Path, path: Path) -> None:
    """Refuses a file for `path` that OpenVINO cannot open."""
    try:
        OpenVINOSession(file)
    except ExportError as error:
        raise ExportError(f"{path}: OpenVINO cannot open such a file: {str(error).partition(': ')[2]}") from error


def narrow(model: Any, three_bits: bool) -> None:
    """Stores the quantized weights of an `openvino.Model` in 2 and 3 bits, where kernels stay as fast.

    Args:
        model: changed in place.
        three_bits: linear layers with float inputs also have u3.
    """
    for constant in model.get_ops():
        if constant.get_type_name() != "Constant" or len(constant.shape) < 2:
            continue
        kind = constant.get_element_type().get_type_name()
        if kind in _TYPES and (weight := _Weight.read_by(constant)) is not None:
            weight.narrow(_numbers(constant, _TYPES[kind], kind[0] == "i"), three_bits)


class _Weight:
    """A constant, the Converts to floats after it, and what follows.

    Args:
        constant: the node.
        convert: the last one, where there are several.
        minus: the Subtract of zero points after it; None: there is none.
        reader: the layer's node.
        port: of the reader that the weight comes in by.
    """

    def __init__(self, constant: Any, convert: Any, minus: Any | None, reader: Any, port: int) -> None:
        self.constant, self.convert, self.minus, self.reader, self.port = constant, convert, minus, reader, port

    @classmethod
    def read_by(cls, constant: Any) -> _Weight | None:
        """Returns the weight that a constant holds; None: it holds something else, or several nodes read it."""
        convert, after = constant, _only_reader(constant)
        while after is not None and after.get_type_name() == "Convert":
            convert, after = after, _only_reader(after)
        if convert is constant or not convert.get_element_type().is_real():
            return None
        minus = after if after is not None and after.get_type_name() == "Subtract" else None
        scaled = _only_reader(minus or convert)
        if scaled is None or scaled.get_type_name() != "Multiply":
            return None
        before, reader = scaled, _only_reader(scaled)
        while reader is not None and reader.get_type_name() in _SHAPES:
            before, reader = reader, _only_reader(reader)
        if reader is None:
            return None
        ports = [port for port, value in enumerate(reader.input_values()) if value.get_node() == before]
        if reader.get_type_name() not in _LAYERS or ports not in ([0], [1]):
            return None
        return cls(constant, convert, minus, reader, ports[0])

    def narrow(self, numbers: NDArray[np.int64], three_bits: bool) -> None:
        """Replaces the constant by a smaller one, and floats by integers next to a quantized input."""
        import openvino
        from openvino import opset13 as ops

        low, high = int(numbers.min()), int(numbers.max())
        bits = max(2, (high - low).bit_length())
        integer = self._is_between_integers() and high < 128
        if bits > 3 or not (integer or self._multiplies(bits, three_bits)):
            low, held = 0, self.constant
        else:
            tensor = openvino.Tensor(openvino.Type.u2 if bits == 2 else openvino.Type.u3, openvino.Shape(numbers.shape))
            tensor.data.reshape(-1).view(np.uint8)[:] = pack(numbers - low, bits)
            held = ops.constant(tensor)
        dtype, after = self.convert.get_element_type().to_dtype(), self.convert
        if integer:
            made = ops.convert(ops.add(ops.convert(held, np.int8), np.int8(low)), dtype)
        elif held is self.constant:
            return
        else:
            zero = ops.constant(np.array(-low, dtype))
            if self.minus is not None:
                after, zero = self.minus, ops.add(self.minus.input_value(1), zero)  # of constants, made on loading
            made = ops.subtract(ops.convert(held, dtype), zero)
        for target in list(after.output(0).get_target_inputs()):
            target.replace_source_output(made.output(0))

    def _is_between_integers(self) -> bool:
        """Returns True for a product with a quantized input."""
        other = self.reader.input_value(1 - self.port).get_node()
        return self.reader.get_type_name() != "Gather" and _is_quantized(other)

    def _multiplies(self, bits: int, three_bits: bool) -> bool:
        """Returns True where few bits next to float inputs are right, and as fast as 4 or wanted."""
        if self.reader.get_type_name() != "MatMul":
            return True
        attributes, shape = self.reader.get_attributes(), self.reader.input_value(self.port).get_shape()
        last = attributes["transpose_b"] if self.port == 1 else not attributes["transpose_a"]
        return three_bits if bits == 3 else shape[-1 if last else -2] % 4 == 0


def pack(numbers: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """Returns unsigned numbers of 2 or 3 bits in the bytes of an OpenVINO constant.

    Four numbers of 2 bits are a byte, the first in its lowest bits. Eight of 3 bits are three bytes: the lower two bits
    of four numbers each in the first two, the third bits in the last, and the first number in the highest bits. A last
    byte, or three of them, is filled with zeros. Seen with openvino 2026.4.1.

    >>> pack(np.array([1, 2, 3, 0, 1]), 2).tolist(), pack(np.array([5, 0, 0, 0, 0, 0, 0, 2]), 3).tolist()
    ([57, 1], [64, 2, 128])
    """
    share = 4 if bits == 2 else 8
    held = np.zeros(-(-numbers.size // share) * share, np.uint8)
    held[: numbers.size] = numbers.reshape(-1)
    pairs = np.stack([held & 1, held >> 1 & 1], -1)  # the lowest bit first
    if bits == 2:
        return np.packbits(pairs.reshape(-1), bitorder="little")
    low = np.packbits(pairs[:, ::-1].reshape(-1)).reshape(-1, 2)
    high = np.packbits(held >> 2 & 1).reshape(-1, 1)
    return np.concatenate([low, high], 1).reshape(-1)


def _numbers(constant: Any, bits: int, signed: bool) -> NDArray[np.int64]:
    """Returns the integers of a constant, in its shape."""
    count, shape = int(np.prod(constant.shape)), tuple(constant.shape)
    held = np.asarray(constant.get_data()).view(np.uint8).reshape(-1)
    if bits == 4:
        held = np.stack([held & 15, held >> 4], 1).reshape(-1)[:count]
    half = 1 << (bits - 1)
    numbers = held.astype(np.int64).reshape(shape)
    return np.where(numbers >= half, numbers - 2 * half, numbers) if signed else numbers


def _only_reader(node: Any) -> Any | None:
    """Returns the node that reads another one's numbers; None: there are several, or none."""
    readers = [target.get_node() for target in node.output(0).get_target_inputs()]
    readers = [reader for reader in readers if reader.get_type_name() != "ShapeOf"]
    return readers[0] if len(readers) == 1 else None


def _is_quantized(node: Any) -> bool:
    """Returns True for values that were rounded to integers: FakeQuantize, or a product with the scale of integers."""
    while node.get_type_name() in (*_SHAPES, "Multiply", "Subtract"):
        if node.get_type_name() == "Convert" and not node.input_value(0).get_element_type().is_real():
            return True
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")
