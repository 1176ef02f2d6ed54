"""Small CUDA kernels, run on the CPU by tests of the emulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from cuda_host import Function, HostDevice, KernelError

SEEDS = range(8)


class Bench:
    """Small kernels, by their bodies."""

    def __init__(self, device: HostDevice) -> None:
        self.device, self.xp = device, device.xp

    def __call__(self, body: str, parameters: str = "int* a", before: str = "", among: Sequence[str] = ()) -> Function:
        """A kernel with this body, whose threads know their index `t` and the block's size `n`.

        `among` are bodies that are compiled together, which takes less time. A body begins on line 2.
        """
        bodies = list(among) or [body]
        source = kernels(bodies, parameters, before)
        return self.device.compile(source).get_function(f"k{bodies.index(body)}")

    def ints(self, n: int, value: int = 0) -> Any:
        return self.xp.full(n, value, np.int32)

    def result(
        self, body: str, n: int, block: Sequence[int] = (32,), grid: Sequence[int] = (1,), **more: Any
    ) -> np.ndarray:
        """What the kernel writes to int a[n]; the same for every seed."""
        function, results = self(body, **more), []
        for self.device.seed in SEEDS:
            a = self.ints(n, -1)
            function(grid, block, (a,))
            results.append(a.get())
        assert all(np.array_equal(r, results[0]) for r in results)
        return results[0]

    def errors(
        self, body: str, message: str, block: Sequence[int] = (32,), grid: Sequence[int] = (1,), **more: Any
    ) -> list[str]:
        """The kernel, given a[64], ends in an error like this for every seed: the errors."""
        function, texts = self(body, **more), []
        for self.device.seed in SEEDS:
            with pytest.raises(KernelError, match=message) as e:
                function(grid, block, (self.ints(64),))
            texts.append(str(e.value))
        return texts


def bodies(cases: Sequence[tuple[str, Any]]) -> list[str]:
    return [body for body, _ in cases]


def kernels(bodies: Sequence[str], parameters: str = "int* a", before: str = "") -> str:
    """The source of kernels k0, k1 ..."""
    return before + "".join(
        f'\n#line 1\nextern "C" __global__ void k{i}({parameters}) {{ int t = threadIdx.x, n = blockDim.x;\n{body} }}'
        for i, body in enumerate(bodies)
    )
