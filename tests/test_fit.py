"""What fits a card, on an emulated one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Cli, only_line
from emulated import EmulatedDevice, emulated_ops

import kernels_gpu
from minirt.config import ModelConfig
from minirt.devices import open_ops
from minirt.errors import ModelError, UsageError
from minirt.fit import RESERVE, check_fit, largest_context, weight_bytes
from minirt.gguf_file import GGUFFile
from minirt.ops import Ops
from minirt.policies import Dense, parse_policy
from minirt.stores import get_stores


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> EmulatedDevice:
    """The card that --device gpu opens."""
    ops = emulated_ops().ops
    monkeypatch.setattr(kernels_gpu, "open_card", lambda: ops)
    device: EmulatedDevice = ops.device
    return device


def with_room(card: EmulatedDevice, nbytes: int) -> Ops:
    card.memory = RESERVE + nbytes, 1 << 40
    return open_ops("gpu", None)


def test_what_fits_is_told(card: EmulatedDevice, tiny: Path) -> None:
    with GGUFFile.open(tiny) as file:
        config = replace(ModelConfig.from_gguf(file), n_head=2, n_head_kv=1, head_dim=32)
        policy, f16 = Dense(), get_stores("f16")
        weights, one = weight_bytes(file), policy.plan(config, 1, *f16).nbytes(config)

        def refused(n_ctx: int, room: int, kv: str = "f16") -> str:
            with pytest.raises(UsageError) as e:
                check_fit(with_room(card, room), file, config, policy, n_ctx, *get_stores(kv))
            return str(e.value)

        check_fit(with_room(card, weights + 2048 * one), file, config, policy, 2048, *f16)
        tight = refused(2048, weights + 2048 * one - 1)
        assert "do not fit into" in tight
        assert "--kv q8_0, --kv q4_0, --ctx 1792, --policy tova --budget 512" in tight
        half = refused(2048, weights + 1024 * one)
        assert "what fits: --kv q4_0, --ctx 1024, --policy tova" in half
        assert "what fits: --device cpu" in refused(2048, weights + one)
        assert refused(2048, weights - 1).endswith("--device cpu has no such limit")
        assert "--kv" not in refused(4096, weights + one, "q4_0").partition("what fits")[2]
        check_fit(open_ops("cpu", None), file, config, policy, 1 << 20, *f16)


def test_the_largest_context(tiny: Path) -> None:
    with GGUFFile.open(tiny) as file:
        config = ModelConfig.from_gguf(file)
    policy, f16 = Dense(), get_stores("f16")
    one = policy.plan(config, 1, *f16).nbytes(config)
    for n_ctx, room, found in ((4096, 4096 * one, 4096), (4096, 1000 * one, 768), (300, 1 << 40, 300), (4096, one, 0)):
        assert largest_context(config, policy, n_ctx, *f16, room) == found
    bounded = parse_policy("window:budget=64")
    assert largest_context(config, bounded, 4096, *f16, bounded.plan(config, 4096, *f16).nbytes(config)) == 4096


def test_commands(card: EmulatedDevice, cli: Cli, tiny: Path) -> None:
    card.memory = RESERVE + 1, 1 << 40
    result = cli("run", tiny, "-p", "x", "--device", "gpu")
    assert result.exit_code == 2
    assert "do not fit" in only_line(result.stderr)
    card.memory = 1 << 40, 1 << 41
    result = cli("info", tiny, "--device")
    assert result.exit_code == 0, result.stderr
    assert "emulated, --device gpu" in result.stdout
    assert "1024.00 GiB free of 2048.00 GiB" in result.stdout
    facts = json.loads(cli("info", tiny, "--device", "--json").stdout)
    assert facts["device"]["fitting_contexts"]["f16"] == 256
    assert "device" not in json.loads(cli("info", tiny, "--json").stdout)


def test_a_card_that_nobody_asked_for_is_left_alone_if_it_is_too_small(
    card: EmulatedDevice, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minirt import Llama

    monkeypatch.setattr("minirt.devices.has_cupy", lambda: True)
    assert open_ops("auto", None).name == "gpu"
    card.memory = 1, 1
    with Llama.load(tiny) as llama:
        assert llama.decoder.ops.name == "cpu"


def test_memory_of_the_host_is_for_its_own_devices(
    card: EmulatedDevice, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card may have more."""
    from minirt import Llama

    monkeypatch.setattr("minirt.llama.physical_memory", lambda: 1)
    with Llama.load(tiny, device="gpu") as llama:
        llama.set_policy("window:budget=32")
        assert len(llama.generate([[1], [2]], max_tokens=1)) == 2
        monkeypatch.setattr(llama.decoder.ops, "memory", lambda: None)
        with pytest.raises(UsageError, match="of KV cache, this machine has"):
            llama.set_policy("dense")
        assert llama.decoder.policy.name == "window"
    for device in ("cpu", "reference"):
        with pytest.raises(UsageError, match="of KV cache, this machine has"):
            Llama.load(tiny, device=device)


def test_no_card(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise ModelError("--device gpu: no NVIDIA card was found")

    monkeypatch.setattr(kernels_gpu, "open_card", none)
    for command in (("run", tiny, "-p", "x", "--device", "gpu"), ("info", tiny, "--device")):
        result = cli(*command)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "no NVIDIA card" in only_line(result.stderr)
    monkeypatch.setattr("minirt.devices.has_cupy", lambda: True)
    assert open_ops("auto", None).name == "cpu"


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    with pytest.raises(ModelError, match=r"needs CuPy: pip install 'minirt\[cuda13\]'"):
        open_ops("gpu", None)
