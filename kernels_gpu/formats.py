"""The block formats of weights as kernels know them: see formats.cuh. And those of single numbers."""

from __future__ import annotations

from typing import NamedTuple

GROUP = 32  # weights that are read together
SUPER = 256  # that share a word of scales


class Format(NamedTuple):
    low_bits: int
    high_bits: int = 0
    offset: int = 0
    scales: str = "HALF"
    looked_up: bool = False

    @property
    def is_super(self) -> bool:
        return self.scales.startswith("SUPER")

    @property
    def scale_bytes(self) -> int:
        """Of a group."""
        return 4 if self.scales == "HALF_MIN" else 2

    @property
    def constants(self) -> dict[str, int | str]:
        return {
            "LOW_BITS": self.low_bits, "HIGH_BITS": self.high_bits, "OFFSET": self.offset, "SCALES": self.scales,
            "LOOKED_UP": int(self.looked_up),
        }  # fmt: skip


FORMATS = {
    "Q4_0": Format(4, 0, 8),
    "Q4_1": Format(4, 0, 0, "HALF_MIN"),
    "Q5_0": Format(4, 1, 16),
    "Q5_1": Format(4, 1, 0, "HALF_MIN"),
    "Q8_0": Format(8),
    "Q2_K": Format(4, 0, 0, "SUPER_MIN_16"),
    "Q3_K": Format(4, 0, 4, "SUPER_16"),
    "Q4_K": Format(4, 0, 0, "SUPER_MIN"),
    "Q5_K": Format(4, 1, 0, "SUPER_MIN"),
    "Q6_K": Format(4, 2, 32, "SUPER_16"),
    "IQ4_NL": Format(4, looked_up=True),
    "IQ4_XS": Format(4, 0, 0, "SUPER_16", looked_up=True),
}
NUMBERS = ("F32", "F16", "BF16")
