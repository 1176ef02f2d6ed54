"""TOVA, Token Omission Via Attention (arXiv 2401.06104, section 3.2): the token that the newest one heeds least goes.

After each step the token with the lowest probability in that step's attention, averaged over all query heads of the
layer, is evicted, the same for all heads; any token may be, the first and the newest included. There is no other
parameter than the budget. `--per head` decides for each KV head by the average over its own query heads (appendix A).

The paper generates with one cut after the prompt, by its last query (--compress oneshot), and measures perplexity with
the rule applied at every position (stepwise). Of equal scores the token in the first slot goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..ops import Array, Ops
from .base import parameter
from .evicting import Evicting, Room


@dataclass(frozen=True)
class TOVA(Evicting):
    name: ClassVar[str] = "tova"
    per: str = parameter("layer", "Whether a layer or each of its heads decides.", str, of=("layer", "head"))
    accumulates = False

    @property
    def shared(self) -> bool:
        return self.per == "layer"

    def score(self, ops: Ops, q: Array, room: Room, start: int, lse: Array) -> None:
        ops.attend_weights(q[-1:], room.kv, np.array([room.n], np.int32), room.scores[None], False)
