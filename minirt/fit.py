"""Whether weights and a cache fit into the memory of a card, and what would if they do not."""

from __future__ import annotations

from collections.abc import Iterator

from .config import ModelConfig
from .errors import UsageError
from .gguf_file import GGUFFile
from .ops import Ops
from .policies import Policy, parse_policy
from .stores import Store, get_stores, stores_text

RESERVE = 384 << 20  # bytes of a card that CUDA itself, compiled kernels and scratch may take
SMALLER = ("q8_0", "q4_0")  # KV types to propose
BOUNDED = "tova:budget=512"  # ... and a policy
STEP = 256  # contexts to propose are multiples of this


def check_fit(
    ops: Ops, file: GGUFFile, config: ModelConfig, policy: Policy, n_ctx: int, k_store: Store, v_store: Store
) -> None:
    """UsageError with both sizes, and with what would fit, if a device with memory of its own has too little."""
    memory = ops.memory()
    if memory is None:
        return
    weights, cache = weight_bytes(file), policy.plan(config, n_ctx, k_store, v_store).nbytes(config)
    room = memory[0] - RESERVE
    if weights + cache <= room:
        return
    text = f"{ops.device_name}: weights of {_size(weights)} and a cache of {_size(cache)} (--ctx {n_ctx}) do not fit "
    text += f"into {_size(max(room, 0))} that are free"
    if weights > room:
        raise UsageError(f"{text}; --device cpu has no such limit")
    found = list(_what_fits(config, policy, n_ctx, k_store, v_store, room - weights))
    raise UsageError(f"{text}; what fits: {', '.join(found) or '--device cpu'}")


def weight_bytes(file: GGUFFile) -> int:
    return sum(tensor.data.nbytes for tensor in file.tensors.values())


def largest_context(config: ModelConfig, policy: Policy, n_ctx: int, k_store: Store, v_store: Store, room: int) -> int:
    """The most tokens, up to n_ctx and in steps of 256, whose cache takes no more bytes than there is room for."""
    low, high = 0, -(-n_ctx // STEP)
    while low < high:
        middle = (low + high + 1) // 2
        fits = policy.plan(config, STEP * middle, k_store, v_store).nbytes(config) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return min(STEP * low, n_ctx)


def _what_fits(
    config: ModelConfig, policy: Policy, n_ctx: int, k_store: Store, v_store: Store, room: int
) -> Iterator[str]:
    """Flags, each of which is enough."""
    for kv in SMALLER if stores_text(k_store, v_store) in ("f16", "f32") else ():
        stores = get_stores(kv)
        if config.head_dim % stores[0].length == 0 and policy.plan(config, n_ctx, *stores).nbytes(config) <= room:
            yield f"--kv {kv}"
    if tokens := largest_context(config, policy, n_ctx, k_store, v_store, room):
        yield f"--ctx {tokens}"
    bounded = parse_policy(BOUNDED)
    if n_ctx > 512 and bounded.plan(config, n_ctx, k_store, v_store).nbytes(config) <= room:
        yield "--policy tova --budget 512"


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB"
