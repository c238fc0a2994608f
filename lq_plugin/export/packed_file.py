"""Container of a packed model: a safetensors file of two tensors, written and read piece by piece.

    blob      uint8: bit planes of all integers (`lq_plugin.export.bit_planes`), and raw float numbers
    table     uint8: zlib-compressed JSON: what lies where in the blob
    metadata  format, version, checksum of both and of the plan, plan (rules), effective_bits

A place in the blob is `[offset, shape, bits]`, or `[offset, shape, dtype]`. Neither side holds more of a file than a
chunk of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lq_plugin.errors import ExportError, is_integer
from lq_plugin.export.bit_planes import pack, packed_size, unpack

FORMAT, VERSION = "lq_plugin.packed", "1"
#: Types of tensors that are stored as their bytes in memory.
DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128", "bool",
        "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    )
}  # fmt: skip
#: Elements of a weight that are processed at a time, and bytes that are read at a time.
CHUNK = 2**16
Place = list[Any]


def size_of(place: Place) -> int:
    """Returns the bytes of a place.

    >>> size_of([0, [3, 5], 2]), size_of([0, [3, 5], "float32"])
    (4, 60)
    """
    _, shape, kind = place
    count = math.prod(shape)
    return packed_size(count, kind) if isinstance(kind, int) else count * DTYPES[kind].itemsize


def row_chunks(shape: tuple[int, ...], multiple: int = 1) -> Iterator[slice]:
    """Yields slices of rows, a chunk of elements each; all but the last begin with a whole byte of each bit plane.

    Args:
        shape: of the tensor.
        multiple: of the number of rows of a chunk.

    >>> list(row_chunks((20, 2**15)))
    [slice(0, 8, None), slice(8, 16, None), slice(16, 20, None)]
    """
    whole = math.lcm(8, multiple)
    step = max(CHUNK // max(math.prod(shape[1:]), 1) // whole, 1) * whole
    yield from (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


class PackedWriter:
    """Writer of a packed file from front to end, the header's place first.

    Args:
        stream: seekable, for reading and writing.
        plan: rules as JSON.
        effective_bits: of the model.
        limit: upper bound of the file's size in bytes.
    """

    def __init__(self, stream: BinaryIO, plan: str, effective_bits: float, limit: int) -> None:
        self.stream, self.plan = stream, plan
        self.metadata = {
            "format": FORMAT, "version": VERSION, "checksum": "0" * 32, "plan": plan,
            "effective_bits": f"{effective_bits:.6f}",
        }  # fmt: skip
        self.start = len(self._header(limit, limit))
        self.size = 0
        stream.write(bytes(self.start))

    def reserve(self, shape: tuple[int, ...], kind: int | str) -> Place:
        """Returns a place at the end, to be filled by `write_rows`."""
        place = [self.size, list(shape), kind]
        self.size += size_of(place)
        return place

    def add(self, tensor: Tensor) -> Place:
        """Writes a tensor as its bytes; returns its place."""
        plain = tensor.detach().cpu().contiguous()
        place = self.reserve(tuple(plain.shape), str(plain.dtype).removeprefix("torch."))
        self._write(place[0], _bytes(plain))
        return place

    def write_rows(self, place: Place, values: Tensor, start: int) -> bytes:
        """Writes rows of a place from row `start` on; returns the bytes written.

        Args:
            place: reserved.
            values: integers or floats, `[rows, ...]`.
            start: first row; the place of integers has a whole byte of each bit plane there.
        """
        offset, shape, kind = place
        before = start * math.prod(shape[1:])
        if not isinstance(kind, int):
            content = _bytes(values.detach().cpu().contiguous().to(DTYPES[kind]))
            self._write(offset + before * DTYPES[kind].itemsize, content)
            return bytes(content)
        packed = pack(values.cpu().numpy(), kind).reshape(kind, packed_size(values.numel(), 1))
        plane = packed_size(math.prod(shape), 1)
        for index, row in enumerate(packed):
            self._write(offset + index * plane + before // 8, row.data)
        return packed.tobytes()

    def drop(self, size: int) -> None:
        """Forgets what was reserved after so many bytes."""
        self.size = size

    def _write(self, offset: int, content: Any) -> None:
        self.stream.seek(self.start + offset)
        self.stream.write(content)

    def finish(self, table: Any) -> int:
        """Writes the table and the header; returns the size of the file."""
        content = zlib.compress(json.dumps(table, separators=(",", ":")).encode(), 9)
        self._write(self.size, content)
        total = self.start + self.size + len(content)
        self.stream.truncate(total)
        self.stream.seek(self.start)
        self.metadata["checksum"] = _checksum(self.plan, iter(lambda: self.stream.read(CHUNK), b""))
        self.stream.seek(0)
        self.stream.write(self._header(self.size, len(content), self.start))
        return total

    def _header(self, blob: int, table: int, room: int = 0) -> bytes:
        """Returns the header for these sizes, padded with spaces."""
        entries = {
            "__metadata__": self.metadata,
            "blob": {"dtype": "U8", "shape": [blob], "data_offsets": [0, blob]},
            "table": {"dtype": "U8", "shape": [table], "data_offsets": [blob, blob + table]},
        }
        content = json.dumps(entries, separators=(",", ":")).encode()
        content = content.ljust(room - 8 if room else -(-len(content) // 8) * 8)
        return len(content).to_bytes(8, "little") + content


def _bytes(plain: Tensor) -> Any:
    return plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b""


def _checksum(plan: str, pieces: Iterable[bytes]) -> str:
    """Returns the checksum of the plan and of the bytes of blob and table."""
    digest = hashlib.blake2b(plan.encode(), digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


class PackedReader:
    """Open packed file with a valid checksum.

    Raises:
        ExportError: no such file, no packed file, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="numpy") as file:
                self.metadata = file.metadata() or {}
                names = set(file.keys())
            if self.metadata.get("format") != FORMAT:
                raise ExportError(
                    f"{path} is a safetensors file, but no packed model of lq_plugin; load_checkpoint reads state dicts"
                )
            if self.metadata.get("version") != VERSION:
                version = self.metadata.get("version")
                raise ExportError(
                    f"{path} has version {version!r} of the packed format, this lq_plugin reads {VERSION!r}"
                )
            self.stream = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise ExportError(f"cannot open {path}: {error.strerror or error}") from error
        except SafetensorError as error:
            advice = "; it looks like a checkpoint, which load_checkpoint reads" if zipfile.is_zipfile(path) else ""
            raise ExportError(f"{path} is no packed file, or a damaged one: {error}{advice}") from error
        try:
            self._find(names)
        except BaseException:
            self.stream.close()
            raise

    def _find(self, names: set[str]) -> None:
        length = int.from_bytes(self.stream.read(8), "little")
        header = json.loads(self.stream.read(length))
        if names != {"blob", "table"} or any(header[name]["dtype"] != "U8" for name in names):
            raise self.damaged("it has other tensors than a blob and a table of bytes")
        (self.first, last), (start, end) = (header[name]["data_offsets"] for name in ("blob", "table"))
        self.base, self.size, self.table = 8 + length, last - self.first, (start, end)
        pieces = (piece for offset, end in ((self.first, last), self.table) for piece in self._pieces(offset, end))
        if _checksum(self.metadata.get("plan", ""), pieces) != self.metadata.get("checksum"):
            raise self.damaged("its checksum does not fit its content")

    def _pieces(self, offset: int, end: int) -> Iterator[bytes]:
        for start in range(offset, end, CHUNK):
            self.stream.seek(self.base + start)
            yield self.stream.read(min(CHUNK, end - start))

    def damaged(self, why: str) -> ExportError:
        return ExportError(f"{self.path} is damaged: {why}")

    def content(self, limit: int) -> Any:
        """Returns the table; refuses one of more than `limit` bytes unpacked."""
        start, end = self.table
        self.stream.seek(self.base + start)
        machine = zlib.decompressobj()
        try:
            content = machine.decompress(self.stream.read(end - start), limit + 1)
            if len(content) > limit:
                raise ExportError(
                    f"{self.path} is damaged, or of another model: its table of contents is larger than any of this one"
                )
            return json.loads(content)
        except (ValueError, RecursionError, zlib.error) as error:
            if isinstance(error, ExportError):
                raise
            raise self.damaged(f"its table of contents cannot be read: {error}") from error

    def fault(self, place: Any) -> str | None:
        """Returns what is wrong with a place, or None where its bytes are there."""
        if not isinstance(place, list) or len(place) != 3:
            return f"{str(place)[:100]} is no place"
        offset, shape, kind = place
        if not isinstance(shape, list) or not all(is_integer(size, 0) for size in (offset, *shape)):
            return f"{str(place)[:100]} is no place"
        if not (isinstance(kind, str) and kind in DTYPES) and not (is_integer(kind, 0) and kind <= 16):
            return f"{kind!r} is neither a number of bits, 0 to 16, nor a dtype"
        size = size_of(place)
        return f"{size} bytes at {offset} of a blob of {self.size}" if offset + size > self.size else None

    def read(self, place: Place) -> Tensor:
        """Returns a whole tensor: floats as stored, integers as int32."""
        return (
            self.read_rows(place, slice(0, place[1][0]))
            if isinstance(place[2], int)
            else self._raw(place[0], place[1], place[2])
        )

    def read_rows(self, place: Place, rows: slice) -> Tensor:
        """Returns rows of a tensor; rows of integers begin with a whole byte, see `row_chunks`."""
        offset, shape, kind = place
        each = math.prod(shape[1:])
        some = [rows.stop - rows.start, *shape[1:]]
        if not isinstance(kind, int):
            return self._raw(offset + rows.start * each * DTYPES[kind].itemsize, some, kind)
        plane, before, count = packed_size(math.prod(shape), 1), rows.start * each // 8, math.prod(some)
        planes = [self._bytes(offset + index * plane + before, packed_size(count, 1)) for index in range(kind)]
        return torch.from_numpy(unpack(np.frombuffer(b"".join(planes), np.uint8), kind, count)).reshape(some)

    def _raw(self, offset: int, shape: list[int], kind: str) -> Tensor:
        dtype = DTYPES[kind]
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        content = bytearray(math.prod(shape) * dtype.itemsize)
        self.stream.seek(self.base + self.first + offset)
        if self.stream.readinto(content) != len(content):
            raise self.damaged("it became shorter while it was read")
        return torch.frombuffer(content, dtype=dtype).reshape(shape)

    def _bytes(self, offset: int, size: int) -> bytes:
        self.stream.seek(self.base + self.first + offset)
        content = self.stream.read(size)
        if len(content) != size:
            raise self.damaged("it became shorter while it was read")
        return content

    def __enter__(self) -> PackedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
