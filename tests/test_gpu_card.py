"""On a real card, a few shapes of what only an emulated one is tested with besides: caches of codes, the coded index,
latents. They are few because a bare machine compiles the kernels of each first, for seconds."""

from __future__ import annotations

from typing import Any

import pytest
import test_gpu_attention as attention
import test_gpu_eviction as eviction
import test_gpu_latents as latents
import test_gpu_sparse as sparse
from emulated import device_ops, has_card

STORES = [("q8_0", (4, 2, 64)), ("q4_0", (4, 2, 64))]  # rotated


@pytest.fixture(scope="module", params=["gpu"] if has_card() else [])
def ops(request: pytest.FixtureRequest) -> Any:
    return device_ops(request.param)


@pytest.mark.parametrize(("store", "heads"), STORES, ids=str)
def test_caches_of_codes(ops: Any, store: str, heads: tuple[int, int, int]) -> None:
    attention.test_rows_are_as_the_reference_stores_them(ops, store, heads[2])
    attention.test_attend(ops, store, heads)
    attention.test_attend_to_far_slots(ops, store, heads)
    attention.test_attend_chunk(ops, store, heads)
    sparse.test_whole_keys_and_rows(ops, store, *heads)


@pytest.mark.parametrize(("store", "heads"), STORES, ids=str)
def test_evicting_codes(ops: Any, store: str, heads: tuple[int, int, int]) -> None:
    eviction.test_column_sums(ops, store, heads, 20, 40)
    eviction.test_rows(ops, store, heads)
    eviction.test_merging(ops, eviction.RULES[0], store, heads)


@pytest.mark.parametrize(("store", "heads"), [("f16", (4, 2, 64)), STORES[0]], ids=str)
def test_coded_index(ops: Any, store: str, heads: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for tokens in (1024, 0):
        sparse.test_codes(ops, store, *heads, tokens, monkeypatch)


def test_several_blocks_choose(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse.test_several_blocks_choose(ops, monkeypatch)
    sparse.test_more_blocks_than_have_a_share(ops, (700, 0, 20, 131, 46), 20, 2, monkeypatch)
    sparse.test_several_blocks_choose_by_codes(ops, monkeypatch)


@pytest.mark.parametrize("name", latents.NAMES)
def test_latents(ops: Any, name: str) -> None:
    latents.test_rows_are_the_same(ops, name, 96)
    latents.test_rebuilt_rows(ops, latents.SHAPES[1], name)
    latents.test_attention(ops, latents.SHAPES[1], name)


def test_latents_of_a_prompt(ops: Any) -> None:
    latents.test_prompts(ops, latents.SHAPES[1])
    latents.test_overwritten_rows(ops)
    latents.test_sums_of_groups(ops)
