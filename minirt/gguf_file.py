"""GGUF, the model file of llama.cpp: a header, key-value metadata, a table of tensors, then their data.

A file is untrusted. Every count, length and offset is checked against the file before it is used, in Python integers
that cannot overflow, so opening any file costs at most its tables, and those at most METADATA_LIMIT bytes. Tensor data
is mapped, never read, at open. A file must not shrink while it is open: reading past its new end is a SIGBUS.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .errors import ModelError

METADATA_LIMIT = 64 << 20  # bytes before the tensor data; the largest tokenizers take 20 MB
MAX_ENTRIES = 1 << 16  # keys, and tensors; a model of 126 layers has 1,100 tensors
MAX_STRINGS = 1 << 21  # strings in all arrays together; the largest vocabularies with merges have 800,000
MAX_PARTS = 1000  # files of a split model

Value = Any  # int, float, bool, str, list[str], or a NumPy array of numbers
D = TypeVar("D")


class TensorType(NamedTuple):
    """How a row of weights is stored: blocks of `block_size` elements in `block_bytes` bytes."""

    id: int  # ggml's number
    name: str
    block_size: int
    block_bytes: int


TENSOR_TYPES = {
    t.name: t
    for t in (
        TensorType(0, "F32", 1, 4),
        TensorType(1, "F16", 1, 2),
        TensorType(30, "BF16", 1, 2),
        TensorType(2, "Q4_0", 32, 18),
        TensorType(3, "Q4_1", 32, 20),
        TensorType(6, "Q5_0", 32, 22),
        TensorType(7, "Q5_1", 32, 24),
        TensorType(8, "Q8_0", 32, 34),
        TensorType(10, "Q2_K", 256, 84),
        TensorType(11, "Q3_K", 256, 110),
        TensorType(12, "Q4_K", 256, 144),
        TensorType(13, "Q5_K", 256, 176),
        TensorType(14, "Q6_K", 256, 210),
        TensorType(20, "IQ4_NL", 32, 18),
        TensorType(23, "IQ4_XS", 256, 136),
    )
}
_TYPE_BY_ID = {t.id: t for t in TENSOR_TYPES.values()}
_UNSUPPORTED_TYPES = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8",
    33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4",
    40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

_BOOL, _STRING, _ARRAY = 7, 8, 9  # metadata value types that are not plain numbers
_NUMBERS = {
    number: np.dtype(code)
    for number, code in enumerate(["<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "<u1", "", "", "<u8", "<i8", "<f8"])
    if code
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class Tensor:
    """A weight as it lies in the file."""

    name: str
    type: TensorType
    shape: tuple[int, ...]  # NumPy order, outermost first: GGUF's dimensions reversed
    data: np.ndarray  # uint8 [rows, row_bytes], rows = product of shape[:-1]; read-only view of the mapped file


def release(tensor: Tensor) -> None:
    """Gives the memory of a tensor's pages back, for a device that has made a copy; reading it again fetches them."""
    base: Any = tensor.data
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if not isinstance(base, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = tensor.data.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    first, stop = (
        -(-start // mmap.PAGESIZE) * mmap.PAGESIZE,
        (start + tensor.data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE,
    )
    if first < stop:
        base.madvise(mmap.MADV_DONTNEED, first, stop - first)


class _Required:
    """The default of a key that must be in the file."""


_REQUIRED = _Required()


class GGUFFile:
    """An open, validated model file: metadata, and tensors by name. Use `GGUFFile.open`, and as a context manager.

    The getters return the value of a metadata key checked for type and range, or `default` where the key is absent;
    without a default an absent key is an error. A ModelError names the file, the key, its value and what is expected.
    """

    def __init__(self, path: Path, version: int, metadata: dict[str, Value], tensors: dict[str, Tensor]):
        self.path = path
        self.version = version
        self.metadata: Mapping[str, Value] = MappingProxyType(metadata)
        self.tensors: Mapping[str, Tensor] = MappingProxyType(tensors)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Maps and checks the file, and its siblings if it is the first of a split model. Raises ModelError."""
        limits = _Limits()
        file = _read(Path(path), limits)
        n_parts = file.get_int("split.count", 1, low=0, high=MAX_PARTS)
        return file if n_parts <= 1 else _join(file, n_parts, limits)

    def close(self) -> None:
        """Forgets the tensors; the mapping goes with the last view of it."""
        self.tensors = MappingProxyType({})

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def error(self, text: str) -> ModelError:
        return ModelError(f"{self.path}: {text}")

    def get_int(self, key: str, default: D | _Required = _REQUIRED, low: int = 0, high: int = 2**31 - 1) -> int | D:
        """An integer of any width within low..high."""
        if key not in self.metadata:
            return self._absent(key, default)
        value = self.metadata[key]
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._unexpected(key, value, f"an integer from {low} to {high}")
        return value

    def get_float(
        self, key: str, default: D | _Required = _REQUIRED, low: float = -math.inf, high: float = math.inf
    ) -> float | D:
        """A finite number within low..high."""
        if key not in self.metadata:
            return self._absent(key, default)
        value = self.metadata[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            bounds = "" if (low, high) == (-math.inf, math.inf) else f" from {low:g} to {high:g}"
            raise self._unexpected(key, value, f"a finite number{bounds}")
        return float(value)

    def get_str(self, key: str, default: D | _Required = _REQUIRED) -> str | D:
        if key not in self.metadata:
            return self._absent(key, default)
        value = self.metadata[key]
        if not isinstance(value, str):
            raise self._unexpected(key, value, "a string")
        return value

    def get_bool(self, key: str, default: D | _Required = _REQUIRED) -> bool | D:
        if key not in self.metadata:
            return self._absent(key, default)
        value = self.metadata[key]
        if not isinstance(value, bool):
            raise self._unexpected(key, value, "true or false")
        return value

    def get_array(self, key: str, of: type, default: D | _Required = _REQUIRED, length: int | None = None) -> Any | D:
        """An array of strings (of=str, a list[str]), integers (of=int) or floats (of=float), as NumPy of the file's
        own width; a float may be anything, NaN included. `length` is the only one allowed, if given."""
        if key not in self.metadata:
            return self._absent(key, default)
        value = self.metadata[key]
        fits = isinstance(value, list) if of is str else isinstance(value, np.ndarray)
        if not fits or (of is not str and value.dtype.kind not in {int: "iu", float: "f"}[of]):
            raise self._unexpected(key, value, f"an array of {of.__name__}")
        if length is not None and len(value) != length:
            raise self._unexpected(key, value, f"{length} entries")
        return value

    def _absent(self, key: str, default: D | _Required) -> D:
        if isinstance(default, _Required):
            raise self.error(f"key not found in model: {key}")
        return default

    def _unexpected(self, key: str, value: Value, expected: str) -> ModelError:
        return self.error(f"{key} is {show(value)}, expected {expected}")


def raw_keys(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """The metadata of a file as it lies there, key and value, by key: for a copy with other tensors. ModelError."""
    scan = _Scan(Path(path), _map(Path(path)), _Limits())
    _, _, n_keys = scan.header()
    entries: dict[str, bytes] = {}
    for _ in range(n_keys):
        start = scan.pos
        key = scan.string("a key")
        scan.value(f"key {show(key)}")
        entries[key] = scan.data[start : scan.pos]
    return entries


def show(value: Value) -> str:
    """A value from a file for an error line: one line, no control characters, not too long."""
    if isinstance(value, (list, np.ndarray)):
        return f"an array of {len(value)} {'str' if isinstance(value, list) else value.dtype.name}"
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _read(path: Path, limits: _Limits) -> GGUFFile:
    """Scans one file. The order of the checks is the order of the file. What it took is taken from the limits."""
    scan = _Scan(path, _map(path), limits)
    version, n_tensors, n_keys = scan.header()

    metadata: dict[str, Value] = {}
    for _ in range(n_keys):
        key = scan.string("a key")
        if key in metadata:
            raise scan.error(f"duplicate key {show(key)}")
        metadata[key] = scan.value(f"key {show(key)}")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise scan.error(f"general.alignment is {show(alignment)}, expected a power of two of at least 8")

    infos: dict[str, tuple[TensorType, tuple[int, ...], int]] = {}
    for _ in range(n_tensors):
        name = scan.string("a tensor name")
        if name in infos:
            raise scan.error(f"duplicate tensor {show(name)}")
        infos[name] = scan.tensor_info(f"tensor {show(name)}", alignment)

    limits.nbytes -= scan.pos
    limits.entries -= n_keys + n_tensors
    tensors: dict[str, Tensor] = {}
    previous, previous_end = "", 0
    data_start = -(-scan.pos // alignment) * alignment
    for name, (kind, shape, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
        rows, row_bytes = math.prod(shape[:-1]), shape[-1] // kind.block_size * kind.block_bytes
        start, end = data_start + offset, data_start + offset + rows * row_bytes
        if end > len(scan.data):
            raise scan.error(
                f"truncated file: tensor {show(name)} takes bytes {start} to {end}, the file has {len(scan.data)}"
            )
        if start < previous_end:
            raise scan.error(f"tensors {show(previous)} and {show(name)} overlap")
        view = np.frombuffer(scan.data, np.uint8, rows * row_bytes, start).reshape(rows, row_bytes)
        tensors[name] = Tensor(name, kind, shape, view)
        previous, previous_end = name, end
    return GGUFFile(path, version, metadata, tensors)


def _map(path: Path) -> mmap.mmap:
    """The bytes of a regular file, mapped read-only: a device or a pipe could block or never end."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size:
                    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ModelError(f"{path}: cannot open: {getattr(error, 'strerror', None) or error}") from None
    what = "is empty" if stat.S_ISREG(mode) else "is a directory" if stat.S_ISDIR(mode) else "is not a regular file"
    raise ModelError(f"{path}: {what}, expected a GGUF file")


def _join(first: GGUFFile, n_parts: int, limits: _Limits) -> GGUFFile:
    """The whole of a split model, from its first part: the tensors of all parts under the metadata of the first."""

    def invalid(text: str) -> ModelError:
        return first.error(f"invalid split file: {text}")

    part = first.get_int("split.no", low=0, high=n_parts - 1)
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", first.path.name, re.DOTALL)
    if match is None or (int(match[2]), int(match[3])) != (part + 1, n_parts):
        raise invalid(f"part {part + 1} of {n_parts} must be named NAME-{part + 1:05}-of-{n_parts:05}.gguf")
    names = [f"{match[1]}-{i + 1:05}-of-{n_parts:05}.gguf" for i in range(n_parts)]
    if part != 0:
        raise invalid(f"this is part {part + 1} of {n_parts}, open {names[0]}")

    tensors = dict(first.tensors)
    for i, name in enumerate(names[1:], 1):
        path = first.path.with_name(name)
        if not path.exists():
            raise invalid(f"part {i + 1} of {n_parts} is missing: {name}")
        other = _read(path, limits)
        found = (other.metadata.get("split.no"), other.metadata.get("split.count"))
        if found != (i, n_parts):
            raise invalid(f"{name} has split.no, split.count = {show(found)}, expected {(i, n_parts)}")
        if twice := tensors.keys() & other.tensors.keys():
            raise invalid(f"tensor {show(min(twice))} of {name} is in an earlier part too")
        tensors.update(other.tensors)
    expected = first.get_int("split.tensors.count")
    if len(tensors) != expected:
        raise invalid(f"split.tensors.count is {expected}, but the {n_parts} parts hold {len(tensors)} tensors")
    return GGUFFile(first.path, first.version, dict(first.metadata), tensors)


@dataclass
class _Limits:
    """What reading a model may still take, all its parts together."""

    nbytes: int = METADATA_LIMIT
    strings: int = MAX_STRINGS
    entries: int = 2 * MAX_ENTRIES  # keys and tensors


class _Scan:
    """A cursor over a mapped file. Every read is checked against the end first."""

    def __init__(self, path: Path, data: mmap.mmap, limits: _Limits):
        self.path, self.data, self.pos = path, data, 0
        self.end = min(len(data), limits.nbytes)
        self.limits = limits

    def error(self, text: str) -> ModelError:
        return ModelError(f"{self.path}: {text}")

    def too_short(self, what: str, size: int) -> ModelError:
        if self.end < len(self.data):
            return self.error(f"{what} goes beyond the {METADATA_LIMIT >> 20} MiB allowed for metadata")
        return self.error(f"truncated file: {what} needs {size} bytes at {self.pos}, the file has {self.end}")

    def take(self, size: int, what: str) -> int:
        """Moves past the next `size` bytes and returns their offset."""
        start = self.pos
        if size > self.end - start:
            raise self.too_short(what, size)
        self.pos = start + size
        return start

    def u32(self, what: str) -> int:
        return _U32.unpack_from(self.data, self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack_from(self.data, self.take(8, what))[0]

    def count(self, what: str, smallest: int, most: int) -> int:
        """A 64-bit number of entries, checked before anything is allocated: each takes `smallest` bytes or more."""
        n = self.u64(what)
        if n * smallest > self.end - self.pos:
            raise self.too_short(f"{what} {n}", n * smallest)
        if n > most:
            raise self.error(f"{what} is {n}, expected at most {most}")
        return n

    def header(self) -> tuple[int, int, int]:
        """The version and the numbers of tensors and keys."""
        magic = self.data[:4]
        if magic != b"GGUF":
            raise self.error(f"invalid magic characters: {ascii(magic)[1:]}, expected 'GGUF'; not a GGUF file")
        self.pos = 4
        version = self.u32("the version")
        if version == 1:
            raise self.error("GGUFv1 is no longer supported, expected version 2 or 3")
        if version not in (2, 3):
            if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3):
                raise self.error("this GGUF file is big-endian, expected a little-endian one")
            raise self.error(f"GGUF version is {version}, expected 2 or 3")
        most = min(MAX_ENTRIES, self.limits.entries)
        n_tensors = self.count("number of tensors", 8 + 4 + 8 + 4 + 8, most)
        return version, n_tensors, self.count("number of keys", 8 + 4 + 1, most)

    def string(self, what: str) -> str:
        start = self.take(self.u64(what), what)
        try:
            return str(self.data[start : self.pos], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} at {start} is not valid UTF-8: {error.reason} at byte {error.start}") from None

    def value(self, what: str) -> Value:
        """The type and the value of a metadata key."""
        kind = self.u32(what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            return self.numbers(kind, 1, what)[0].item()
        kind = self.u32(what)
        if kind == _ARRAY:
            raise self.error(f"{what} is an array of arrays, which is not supported")
        if kind == _STRING:
            return self.strings(self.count(f"{what}: array length", 8, self.limits.strings), what)
        return self.numbers(kind, self.count(f"{what}: array length", 1, self.end), what)

    def numbers(self, kind: int, n: int, what: str) -> np.ndarray:
        dtype = _NUMBERS.get(kind)
        if dtype is None:
            raise self.error(f"{what} has value type {kind}, expected 0 to 12")
        values = np.frombuffer(self.data, dtype, n, self.take(n * dtype.itemsize, what)).copy()
        if kind == _BOOL:
            if np.any(values > 1):
                raise self.error(f"{what} is a bool of {values.max()}, expected 0 or 1")
            values = values.astype(bool)
        return values

    def strings(self, n: int, what: str) -> list[str]:
        """n strings, in a tight loop: vocabularies are most of the time of an open."""
        self.limits.strings -= n
        data, pos, end, length_at = self.data, self.pos, self.end, _U64.unpack_from
        values: list[str] = []
        try:
            for _ in range(n):
                start = pos + 8
                pos = start + length_at(data, pos)[0]
                if pos > end:
                    raise self.too_short(f"{what}, string {len(values)}", pos - start)
                values.append(str(data[start:pos], "utf-8"))
        except struct.error:
            raise self.too_short(f"{what}, string {len(values)}", 8) from None
        except UnicodeDecodeError as error:
            raise self.error(f"{what}, string {len(values)} is not valid UTF-8: {error.reason}") from None
        self.pos = pos
        return values

    def tensor_info(self, what: str, alignment: int) -> tuple[TensorType, tuple[int, ...], int]:
        """Type, shape in NumPy order, and offset into the data, of the tensor whose name was just read."""
        n_dims = self.u32(what)
        if not 1 <= n_dims <= 4:
            raise self.error(f"{what} has {n_dims} dimensions, expected 1 to 4")
        shape = tuple(self.u64(what) for _ in range(n_dims))[::-1]
        if 0 in shape:
            raise self.error(f"{what} has shape {shape}, expected no zero")
        number = self.u32(what)
        kind = _TYPE_BY_ID.get(number)
        if kind is None:
            name = _UNSUPPORTED_TYPES.get(number, f"unknown type {number}")
            raise self.error(f"{what} is {name}, which is not supported; expected one of {', '.join(TENSOR_TYPES)}")
        if shape[-1] % kind.block_size:
            raise self.error(
                f"{what} has rows of {shape[-1]}, expected a multiple of {kind.block_size} for {kind.name}"
            )
        offset = self.u64(what)
        if offset % alignment:
            raise self.error(f"{what} has offset {offset}, expected a multiple of {alignment}")
        return kind, shape, offset
