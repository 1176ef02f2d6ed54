"""Rotary frequencies of a model: plain, linear, YaRN (arXiv 2309.00071), with the file's frequency factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .config import ModelConfig

YARN_FAST, YARN_SLOW = (
    32.0,
    1.0,
)  # turns within the original context: pairs above keep their frequency, below scale fully


@dataclass(frozen=True)
class Rope:
    """Pair i of a head turns by pos * frequency[i] radians and is scaled by magnitude."""

    frequency: np.ndarray  # float64 [rope_dim / 2]
    magnitude: float
    interleaved: bool  # pairs are (2i, 2i+1), else (i, i + rope_dim/2)

    @property
    def dim(self) -> int:
        """Leading components of a head that rotate; the rest pass through."""
        return 2 * len(self.frequency)

    def angles(self, pos: np.ndarray) -> np.ndarray:
        """Cosines and sines for true positions pos [N], times the magnitude: float32 [2, N, rope_dim / 2].

        The angle itself is float64: at position 100,000 float32 would be off by a hundredth of a radian.
        """
        theta = pos[:, None] * self.frequency
        return (self.magnitude * np.stack([np.cos(theta), np.sin(theta)])).astype(np.float32)


class Angles(NamedTuple):
    """What a forward pass needs of a Rope on a device."""

    values: Any  # the device's array [2, N, rope_dim / 2]: cosines and sines, times the magnitude
    interleaved: bool
    pos: np.ndarray | None = None  # host int32 [N]: latents of keys keep it, to be turned when they are rebuilt

    def part(self, rows: slice) -> Angles:
        """Those of some of the positions, in the same memory."""
        return Angles(self.values[:, rows], self.interleaved, None if self.pos is None else self.pos[rows])


def host_angles(rope: Rope, pos: np.ndarray, out: Angles | None = None) -> Angles:
    """`Ops.angles` of devices that compute in the host's memory."""
    values = rope.angles(pos)
    if out is None:
        return Angles(values, rope.interleaved, pos)
    out.values[...] = values
    return out


def make_rope(config: ModelConfig, factors: np.ndarray | None = None) -> Rope:
    """The model's Rope. `factors` is `rope_freqs.weight` [rope_dim/2]: each divides its frequency (Llama 3.1)."""
    dim, scaling = config.rope_dim, config.rope_scaling
    pair = np.arange(dim // 2, dtype=np.float64)
    frequency = config.rope_base ** (-2.0 * pair / dim)
    if factors is not None:
        frequency = frequency / factors.astype(np.float64)
    magnitude = scaling.attention_factor
    if scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling.kind == "yarn":
        low = math.floor(_pair_that_turns(config, YARN_FAST))
        high = math.ceil(_pair_that_turns(config, YARN_SLOW))
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((pair - low) / max(0.001, high - low), 0.0, 1.0)
        frequency = frequency * ((1.0 - ramp) + ramp / scaling.factor)
        magnitude *= 1.0 + 0.1 * math.log(scaling.factor)
    return Rope(frequency, magnitude, config.rope_interleaved)


def _pair_that_turns(config: ModelConfig, times: float) -> float:
    """Index, not rounded, of the pair that turns so many times within the original context (YaRN, section 3.2)."""
    turns = config.rope_scaling.original_context / (times * 2.0 * math.pi)
    return config.rope_dim * math.log(turns) / (2.0 * math.log(config.rope_base))
