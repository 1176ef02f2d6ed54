"""Sections and symbols of a 64-bit little-endian ELF file: a host library, an object file or a cubin."""

from __future__ import annotations

import struct
from dataclasses import dataclass

ALLOCATED, EXECUTED, THREAD_LOCAL = 0x2, 0x4, 0x400  # flags of sections
OBJECT, TLS = 1, 6  # types of symbols
SYMBOL_TABLE, NO_BITS = 2, 8  # types of sections


@dataclass(frozen=True)
class Section:
    name: str
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int


@dataclass(frozen=True)
class Symbol:
    name: str
    type: int
    section: int  # 0: undefined
    value: int
    size: int


class Elf:
    """`sections` by number, `symbols` of the full table. Raises ValueError if the bytes are no such file."""

    def __init__(self, data: bytes) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError("not a 64-bit little-endian ELF file")
        self.data = data
        table, size, count, names = struct.unpack_from("<Q10xHHH", data, 0x28)
        headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]
        strings = headers[names][4]
        self.sections = [Section(self._string(strings + h[0]), *h[1:8]) for h in headers]
        self.symbols = [
            Symbol(self._string(self.sections[table.link].offset + name), kind & 15, section, value, size)
            for table in self.sections
            if table.type == SYMBOL_TABLE
            for name, kind, _, section, value, size in struct.iter_unpack("<IBBHQQ", self.content(table))
        ]

    def content(self, section: Section) -> bytes:
        return b"" if section.type == NO_BITS else self.data[section.offset : section.offset + section.size]

    def _string(self, offset: int) -> str:
        return self.data[offset : self.data.index(b"\0", offset)].decode()
