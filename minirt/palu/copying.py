"""A copy of a GGUF file with keys added and tensors replaced: what is not replaced stays byte for byte."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from ..gguf_file import TENSOR_TYPES, GGUFFile, Tensor, TensorType, raw_keys

_VALUE_TYPES = {"<u4": 4, "<i4": 5, "<f4": 6, "|b1": 7}
_STRING, _ARRAY = 8, 9


class NewTensor(NamedTuple):
    """A tensor to be written as F32 or F16."""

    name: str
    type: str
    shape: tuple[int, int]  # NumPy order


# The float32 arrays of some new tensors, asked for when their turn comes.
Make = Callable[[], Sequence[np.ndarray]]


def write_copy(
    target: BinaryIO,
    file: GGUFFile,
    keys: Mapping[str, str | np.ndarray | np.generic],
    replaced: Mapping[str, tuple[Sequence[NewTensor], Make]],
) -> None:
    """Writes `file` to target, a split one in one piece.

    keys: metadata to add, a str, or a NumPy scalar or vector of uint32, int32, float32 or bool. replaced: for a
    tensor's name what stands in its place. Raises ModelError if a value is beyond its type's range.
    """
    entries = {key: raw for key, raw in raw_keys(file.path).items() if not key.startswith("split.")}
    entries |= {key: _text(key) + _value(value) for key, value in keys.items()}
    alignment = file.metadata.get("general.alignment", 32)
    infos, offset = [], 0
    for tensor in file.tensors.values():
        new = replaced[tensor.name][0] if tensor.name in replaced else [tensor]
        for one in new:
            kind = TENSOR_TYPES[one.type] if isinstance(one, NewTensor) else one.type
            infos.append(_info(one.name, kind, one.shape, offset))
            nbytes = int(np.prod(one.shape)) // kind.block_size * kind.block_bytes
            offset += -(-nbytes // alignment) * alignment
    target.write(struct.pack("<4sIQQ", b"GGUF", file.version, len(infos), len(entries)))
    target.writelines([*entries.values(), *infos])
    _pad(target, alignment)
    for tensor in file.tensors.values():
        if tensor.name not in replaced:
            target.write(tensor.data.data)
            _pad(target, alignment)
            continue
        specs, make = replaced[tensor.name]
        for spec, values in zip(specs, make(), strict=True):
            target.write(_encode(file, spec, values))
            _pad(target, alignment)


def new_type(tensor: Tensor) -> str:
    """Of what replaces a tensor: nothing is lost of float32, and nothing else has more than float16 holds."""
    return "F32" if tensor.type.name == "F32" else "F16"


def _encode(file: GGUFFile, spec: NewTensor, values: np.ndarray) -> bytes:
    assert values.shape == spec.shape
    with np.errstate(over="ignore"):
        stored = values.astype({"F32": "<f4", "F16": "<f2"}[spec.type])
    if not np.isfinite(stored).all():
        raise file.error(f"'{spec.name}' would hold {np.abs(values).max():g}, which is beyond {spec.type}")
    return stored.tobytes()


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: str | np.ndarray | np.generic) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    array = np.asarray(value)
    kind = _VALUE_TYPES[array.dtype.str]
    head = struct.pack("<IIQ", _ARRAY, kind, len(array)) if array.ndim else struct.pack("<I", kind)
    return head + array.tobytes()


def _info(name: str, kind: TensorType, shape: tuple[int, ...], offset: int) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind.id, offset)


def _pad(target: BinaryIO, alignment: int) -> None:
    target.write(bytes(-target.tell() % alignment))
