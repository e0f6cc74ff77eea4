"""Reads the headers of safetensors files: names, types and shapes of tensors. Reads no weights.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import msgspec

from registry.gguf import MAX_ELEMENTS, Damaged

MAX_HEADER_BYTES = 32 * 2**20
MAX_INDEX_BYTES = 64 * 2**20
MAX_FILES = 10_000


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What one file says: elements by type (F32, BF16, I32, ...), and bytes of all its tensors."""

    tensors: int
    elements: int
    types: dict[str, int]
    tensor_bytes: int


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


_header = msgspec.json.Decoder(dict[str, msgspec.Raw])
_tensor = msgspec.json.Decoder(_Tensor)
_index = msgspec.json.Decoder(_Index)


def read_header(path: Path) -> Header:
    """The header of one safetensors file.

    Raises:
        Damaged: it is none, or is not whole.
        OSError: it cannot be read.
    """
    try:
        return _read(path)
    except Damaged as exc:
        raise Damaged(f"{path.name} is no whole safetensors file: {exc}.") from exc


def read_index(path: Path) -> tuple[str, ...]:
    """The names of the files of an index, `*.safetensors.index.json`, sorted.

    Raises:
        Damaged: it is none, or names files of other folders.
        OSError: it cannot be read.
    """
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise Damaged(f"it is longer than {MAX_INDEX_BYTES // 2**20} MiB")
        names = sorted(set(_index.decode(path.read_bytes()).weight_map.values()))
        if len(names) > MAX_FILES:
            raise Damaged(f"it names {len(names)} files")
        if strange := next((name for name in names if "/" in name or "\\" in name or "\0" in name), None):
            raise Damaged(f"it names {strange[:100]!r}, which is no file beside it")
    except (Damaged, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise Damaged(f"{path.name} is no index of safetensors files: {exc}.") from exc
    return tuple(names)


def _read(path: Path) -> Header:
    with path.open("rb") as file:
        size_bytes = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size_bytes < 8 or length > size_bytes - 8:
            raise Damaged("it ends within its header")
        if length > MAX_HEADER_BYTES:
            raise Damaged(f"its header is longer than {MAX_HEADER_BYTES // 2**20} MiB")
        text = file.read(length)
    try:
        named = _header.decode(text)
        tensors = [_tensor.decode(raw) for name, raw in named.items() if name != "__metadata__"]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise Damaged(f"its header cannot be read ({exc})") from exc
    types: Counter[str] = Counter()
    tensor_bytes = end = 0
    for tensor in tensors:
        begin, of_this_end = tensor.data_offsets
        if not 0 <= begin <= of_this_end or len(tensor.shape) > 64 or any(n < 0 for n in tensor.shape):
            raise Damaged("a tensor has no sensible place or shape")
        elements = math.prod(tensor.shape)
        if elements > MAX_ELEMENTS:
            raise Damaged(f"a tensor has {elements} elements")
        types[tensor.dtype[:16]] += elements
        tensor_bytes += of_this_end - begin
        end = max(end, of_this_end)
    if 8 + length + end > size_bytes:
        raise Damaged(f"its tensors end at byte {8 + length + end}, and it has {size_bytes}")
    return Header(tensors=len(tensors), elements=sum(types.values()), types=dict(types), tensor_bytes=tensor_bytes)
