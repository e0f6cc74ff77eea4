"""Reads the header of GGUF files: what the model says of itself, and its tensors. Knows the format, no model.

A header may be damaged or made to harm: every count is bounded before it is believed, and what is wrong is a
sentence. Source: the format's specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from pathlib import Path
from typing import IO, Any

import msgspec

MAX_HEADER_BYTES = 256 * 2**20  # vocabularies are the most of it; the largest have some 20 MiB
MAX_TEXT_BYTES = 16 * 2**20
MAX_NAME_BYTES = 2**16
MAX_KEYS = 100_000
MAX_TENSORS = 1_000_000
MAX_ITEMS = 4_000_000  # of all arrays of texts together
MAX_KEPT_ITEMS = 4096  # longer arrays are vocabularies: passed over
MAX_ELEMENTS = 2**50
MAX_DIMENSIONS = 8

# Number of a tensor's type -> name, elements of a block, bytes of a block.
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}

# `general.file_type` -> the quantization's name, as in names of files.
FILE_TYPES: dict[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4",
    39: "NVFP4",
    40: "Q1_0",
}

LAYER = re.compile(r"blk\.(\d{1,5})\.")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


class Damaged(ValueError):
    """A file cannot be what its name says; the text says why."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What one file says.

    `metadata` has numbers, texts and lists of numbers; of longer lists and of lists of texts the length alone, in
    `lengths`. `types` counts the elements of each type; `tensor_bytes` is None where a type is unknown. `layers` has
    the bytes of each layer's tensors, by its number.
    """

    version: int
    metadata: dict[str, Any]
    lengths: dict[str, int]
    tensors: int
    elements: int
    types: dict[str, int]
    tensor_bytes: int | None
    layers: dict[int, int]


def read_header(path: Path) -> Header:
    """The header of one GGUF file.

    Raises:
        Damaged: it is none, or is not whole.
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=2**20) as file:
        size_bytes = file.seek(0, 2)
        file.seek(0)
        try:
            return _Reader(file, size_bytes).header()
        except Damaged as exc:
            raise Damaged(f"{path.name} is no whole GGUF file: {exc}.") from exc


class _Reader:
    """Reads forward, and never more than the file or the limits hold."""

    def __init__(self, file: IO[bytes], size_bytes: int) -> None:
        self._file = file
        self._size_bytes = size_bytes
        self._at = 0
        self._order = "<"
        self._is_narrow = False  # version 1 counts in 32 bits
        self._items = 0

    def header(self) -> Header:
        magic = self._take(4)
        if magic != b"GGUF":
            raise Damaged("it does not begin with GGUF")
        version = self._version()
        n_tensors, n_keys = self._count(MAX_TENSORS, "tensors"), self._count(MAX_KEYS, "keys")
        metadata: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        for _ in range(n_keys):
            key = self._text(MAX_NAME_BYTES)
            value = self._value(self._number("I"), depth=0)
            if isinstance(value, _Length):
                lengths[key] = value.length
            else:
                metadata[key] = value
                if isinstance(value, list):
                    lengths[key] = len(value)
        return self._with_tensors(version, metadata, lengths, n_tensors)

    def _with_tensors(self, version: int, metadata: dict[str, Any], lengths: dict[str, int], n_tensors: int) -> Header:
        types: Counter[str] = Counter()
        layers: Counter[int] = Counter()
        tensor_bytes: int | None = 0
        end = 0
        for _ in range(n_tensors):
            tensor, elements, type_number, offset = self._tensor()
            name, block, block_bytes = TENSOR_TYPES.get(type_number, (f"type {type_number}", 1, 0))
            types[name] += elements
            of_this = math.ceil(elements / block) * block_bytes
            end = max(end, offset + of_this)
            if layer := LAYER.match(tensor):
                layers[int(layer[1])] += of_this
            known = tensor_bytes is not None and type_number in TENSOR_TYPES
            tensor_bytes = tensor_bytes + of_this if known and tensor_bytes is not None else None
        alignment = metadata.get("general.alignment")
        alignment = alignment if isinstance(alignment, int) and 0 < alignment <= 2**20 else 32
        begin = -(-self._at // alignment) * alignment
        if n_tensors and begin + end > self._size_bytes:
            raise Damaged(f"its tensors end at byte {begin + end}, and it has {self._size_bytes}")
        return Header(
            version=version,
            metadata=metadata,
            lengths=lengths,
            tensors=n_tensors,
            elements=sum(types.values()),
            types=dict(types),
            tensor_bytes=tensor_bytes,
            layers=dict(layers),
        )

    def _version(self) -> int:
        raw = self._take(4)
        version = int.from_bytes(raw, "little")
        if version > 0xFFFF:  # written by a machine of the other byte order
            self._order, version = ">", int.from_bytes(raw, "big")
        if version not in (1, 2, 3):
            raise Damaged(f"its version is {version}, and 1 to 3 are known")
        self._is_narrow = version == 1
        return version

    def _tensor(self) -> tuple[str, int, int, int]:
        """Name, elements, type and offset of the next tensor."""
        name = self._text(MAX_NAME_BYTES)
        n_dimensions = self._number("I")
        if n_dimensions > MAX_DIMENSIONS:
            raise Damaged(f"tensor {name[:100]!r} has {n_dimensions} dimensions")
        elements = math.prod(self._length() for _ in range(n_dimensions))
        if elements > MAX_ELEMENTS:
            raise Damaged(f"tensor {name[:100]!r} has {elements} elements")
        return name, elements, self._number("I"), self._number("Q")

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _TEXT:
            return self._text(MAX_TEXT_BYTES)
        if kind == _ARRAY and depth < 2:
            return self._array(depth)
        raise Damaged(f"a value has type {kind}, which there is not")

    def _array(self, depth: int) -> Any:
        kind, length = self._number("I"), self._length()
        if kind in _SCALARS:
            width = struct.calcsize("=" + _SCALARS[kind])
            if length > MAX_KEPT_ITEMS:
                self._skip(length * width)
                return _Length(length)
            return list(struct.unpack(f"{self._order}{length}{_SCALARS[kind]}", self._take(length * width)))
        self._items += length
        if self._items > MAX_ITEMS:
            raise Damaged(f"its arrays have more than {MAX_ITEMS} texts")
        for _ in range(length):
            if kind == _TEXT:
                self._skip(self._length())
            else:
                self._value(kind, depth + 1)
        return _Length(length)

    def _count(self, limit: int, what: str) -> int:
        number = self._length()
        if number > limit:
            raise Damaged(f"it says that it has {number} {what}")
        return number

    def _length(self) -> int:
        return int(self._number("I" if self._is_narrow else "Q"))

    def _number(self, code: str) -> Any:
        (number,) = struct.unpack(self._order + code, self._take(struct.calcsize("=" + code)))
        return number

    def _text(self, limit: int) -> str:
        length = self._length()
        if length > limit:
            raise Damaged(f"a text in it has {length} bytes")
        return self._take(length).decode(errors="replace")

    def _take(self, n_bytes: int) -> bytes:
        self._spend(n_bytes)
        taken = self._file.read(n_bytes)
        if len(taken) < n_bytes:
            raise Damaged("it ends within its header")
        return taken

    def _skip(self, n_bytes: int) -> None:
        self._spend(n_bytes)
        if n_bytes < 2**16:
            self._file.read(n_bytes)  # a seek would throw the buffer away
        else:
            self._file.seek(n_bytes, 1)

    def _spend(self, n_bytes: int) -> None:
        self._at += n_bytes
        if self._at > self._size_bytes:
            raise Damaged("it ends within its header")
        if self._at > MAX_HEADER_BYTES:
            raise Damaged(f"its header is longer than {MAX_HEADER_BYTES // 2**20} MiB")


class _Length(msgspec.Struct, frozen=True):
    """An array that was passed over."""

    length: int
