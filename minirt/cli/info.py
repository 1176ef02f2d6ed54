"""`minirt info`: what is in a model file, and what it needs."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from .options import json_option, model_argument
from .terminal import for_stdout, one_line, printable

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..gguf_file import GGUFFile
    from ..tokenizer import Tokenizer

CONTEXTS = (2048, 8192, 32768)  # rows of the memory table, besides the context the model was trained for
MAX_CONTEXT = 1 << 30


@click.command(
    epilog="""\b
Examples:
  minirt info
  minirt info model.gguf --ctx 32768
  minirt info model.gguf --json | jq .model.n_layer
"""
)
@model_argument
@click.option(
    "--ctx", "-c", "n_ctx", type=click.IntRange(1, MAX_CONTEXT), metavar="N", help="A context to tell the memory of."
)
@click.option("--device", is_flag=True, help="Tell of the card that --device gpu would use, and what fits it.")
@click.option("--show-template", is_flag=True, help="Print the chat template and nothing else.")
@json_option
def info(model: str | None, n_ctx: int | None, device: bool, show_template: bool, as_json: bool) -> None:
    """Shows what is in a model file, and the memory it needs.

    Hyper-parameters, tensor types, tokenizer, chat template, the KV cache at several context lengths, and what each KV
    policy holds and reads of it. The file is checked as it is for use, but no weights are read. One that holds only a
    vocabulary will do.
    """
    from ..config import ModelConfig
    from ..gguf_file import GGUFFile
    from ..llama import default_model_path
    from ..tokenizer import Tokenizer
    from ..weights import check_tensors

    with GGUFFile.open(model if model is not None else default_model_path()) as file:
        if show_template:
            click.echo(for_stdout(_template(file) or ""))
            return
        config = None
        if file.tensors:
            config = ModelConfig.from_gguf(file)
            check_tensors(file, config)
        facts = _facts(file, config, Tokenizer.from_metadata(file.metadata, str(file.path)), n_ctx)
        if device:
            facts["device"] = _device(config, facts["weight_bytes"])
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        click.echo(printable(_text(facts)))


def _facts(file: GGUFFile, config: ModelConfig | None, tokenizer: Tokenizer, n_ctx: int | None) -> dict[str, Any]:
    types: dict[str, dict[str, int]] = {}
    for tensor in file.tensors.values():
        entry = types.setdefault(tensor.type.name, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += tensor.data.nbytes
    ids = {name: getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "eot", "eom", "unk", "pad")}
    special = {name: {"id": i, "text": tokenizer.token_text(i)} for name, i in ids.items() if i is not None}
    return {
        "file": str(file.path),
        "file_bytes": file.path.stat().st_size,
        "gguf_version": file.version,
        "model": dataclasses.asdict(config) if config else None,
        "weight_bytes": sum(entry["bytes"] for entry in types.values()),
        "tensor_types": types,
        "tokenizer": {
            "kind": tokenizer.kind,
            "pre": tokenizer.pre,
            "n_vocab": tokenizer.n_vocab,
            "special": special,
            "end_of_generation": sorted(tokenizer.eog_ids),
            "add_bos": tokenizer.add_bos,
            "add_eos": tokenizer.add_eos,
        },
        "chat_template": _template(file),
        "memory": _memory(config, n_ctx) if config else [],
        "policies": _policies(config, n_ctx or config.n_ctx_train) if config else [],
    }


def _memory(config: ModelConfig, n_ctx: int | None) -> list[dict[str, int]]:
    """Bytes of a full KV cache, by context length (1: of a token) and store."""
    from ..policies import Dense
    from ..stores import LATENT_BITS, STORES, get_stores

    policy = Dense()
    names = [name for name, s in STORES.items() if not name.endswith("-plain") and config.head_dim % s.length == 0]
    names = names if config.palu is None else ["f16", *LATENT_BITS]
    stores = {name: get_stores(name, config.palu) for name in names}
    lengths = {n for n in CONTEXTS if n < config.n_ctx_train} | {1, config.n_ctx_train} | ({n_ctx} if n_ctx else set())
    return [
        {"n_ctx": n} | {name: policy.plan(config, n, *pair).nbytes(config) for name, pair in stores.items()}
        for n in sorted(lengths)
    ]


def _policies(config: ModelConfig, n_ctx: int) -> list[dict[str, Any]]:
    """What each KV policy that fits holds of a full context, and reads of it for a token: bytes, of the cache that the
    model has if nothing else is asked for."""
    from ..errors import UsageError
    from ..policies import POLICIES, parse_policy
    from ..stores import get_stores

    found, stores = [], get_stores("auto", config.palu)
    for name in POLICIES:
        policy = parse_policy(name)
        try:
            policy.check(config, n_ctx, *stores)
        except UsageError:
            continue
        plan = policy.plan(config, n_ctx, *stores)
        read = policy.bytes_read(config, plan, n_ctx)
        held = max(plan.nbytes(config), read)  # a layer may turn out to need more than was planned
        found.append({"policy": name, "n_ctx": n_ctx, "bytes_held": held, "bytes_read": read})
    return found


def _device(config: ModelConfig | None, weights: int) -> dict[str, Any]:
    """The card, and how many tokens of a dense cache fit beside the weights, by store. ModelError without a card."""
    from kernels_gpu import open_card

    from ..fit import RESERVE, largest_context
    from ..policies import Dense
    from ..stores import STORES

    card = open_card().device
    free, total = card.memory
    contexts = {}
    for name, store in STORES.items():
        if config and config.palu is None and not name.endswith("-plain") and config.head_dim % store.length == 0:
            room = free - RESERVE - weights
            contexts[name] = largest_context(config, Dense(), config.n_ctx_train, store, store, room)
    return {
        "name": card.name,
        "compute_capability": ".".join(map(str, card.capability)),
        "multiprocessors": card.multiprocessors,
        "cuda_of_driver": card.driver,
        "memory_bytes": total,
        "free_bytes": free,
        "fitting_contexts": contexts,
    }


def _template(file: GGUFFile) -> str | None:
    return file.get_str("tokenizer.chat_template", None)


def _text(facts: dict[str, Any]) -> str:
    model, tokenizer = facts["model"], facts["tokenizer"]
    name = one_line(model["name"]) if model else "a vocabulary without weights"
    lines = [f"{facts['file']}: {name}", f"  GGUF version {facts['gguf_version']}, {_size(facts['file_bytes'])}", ""]
    if model:
        scaling = model["rope_scaling"]
        lines += [
            f"{model['architecture']}, trained for {model['n_ctx_train']} tokens",
            f"  layers           {model['n_layer']}",
            f"  embedding        {model['n_embd']}, feed-forward {model['n_ff']}, vocabulary {model['n_vocab']}",
            f"  heads            {model['n_head']} of {model['head_dim']}, {model['n_head_kv']} for keys and values",
            f"  RMS epsilon      {model['rms_eps']:g}",
            f"  RoPE             base {model['rope_base']:g}, {model['rope_dim']} dimensions, scaling {scaling['kind']}"
            + (f" x {scaling['factor']:g}" if scaling["kind"] != "none" else ""),
        ]
        if model["palu"]:
            lines += _palu_lines(model)
        if model["sliding_window"]:
            lines.append(f"  sliding window   {model['sliding_window']}")
        lines += ["", f"weights, {_size(facts['weight_bytes'])}"]
        for kind, entry in sorted(facts["tensor_types"].items(), key=lambda item: -item[1]["bytes"]):
            lines.append(f"  {kind:16} {entry['tensors']:4d} tensors, {_size(entry['bytes'])}")
        lines.append("")
    kind = {"spm": "SentencePiece", "bpe": "byte-level BPE"}[tokenizer["kind"]]
    lines.append(f"tokenizer, {kind}{tokenizer['pre'] and ', pre ' + tokenizer['pre']}, {tokenizer['n_vocab']} tokens")
    for role, token in tokenizer["special"].items():
        lines.append(f"  {role:16} {token['id']} {token['text']!r}")
    lines.append(f"  ends an answer   {' '.join(map(str, tokenizer['end_of_generation']))}")
    added = [name for name in ("bos", "eos") if tokenizer[f"add_{name}"]]
    lines.append(f"  added to a text  {' and '.join(added) or 'nothing'}")
    template = facts["chat_template"]
    shown = "none in the file" if template is None else template.strip().partition("\n")[0][:70] + " ..."
    lines += ["", "chat template", f"  {shown}"]
    if facts["memory"]:
        stores = [name for name in facts["memory"][0] if name != "n_ctx"]
        lines += ["", "memory of the KV cache, in all (with the weights)"]
        lines.append("  context  " + "".join(f"{'--kv ' + name:>24}" for name in stores))
        for row in facts["memory"]:
            whole, weights = row["n_ctx"] > 1, facts["weight_bytes"]
            cells = (f"{_size(row[s])} ({_size(row[s] + weights)})" if whole else f"{row[s]} bytes" for s in stores)
            lines.append(f"  {row['n_ctx']:7d}  " + "".join(f"{cell:>24}" for cell in cells))
        kv = f"latent-{model['palu']['latent']}" if model["palu"] else "f16"
        lines += ["", f"KV policies at {facts['policies'][0]['n_ctx']} tokens, --kv {kv}"]
        lines.append(f"  --policy    {'held':>12}{'read per token':>18}")
        for row in facts["policies"]:
            lines.append(f"  {row['policy']:12}{_size(row['bytes_held']):>12}{_size(row['bytes_read']):>18}")
    if "device" in facts:
        lines += ["", *_device_lines(facts["device"])]
    return "\n".join(lines)


def _device_lines(card: dict[str, Any]) -> list[str]:
    lines = [
        f"{card['name']}, --device gpu",
        f"  capability       {card['compute_capability']}, {card['multiprocessors']} multiprocessors",
        f"  driver           for CUDA {card['cuda_of_driver']}",
        f"  memory           {_size(card['free_bytes'])} free of {_size(card['memory_bytes'])}",
    ]
    for kv, tokens in card["fitting_contexts"].items():
        fits = f"--ctx {tokens} beside the weights" if tokens else "nothing beside the weights"
        lines.append(f"  --kv {kv:12}{fits}")
    return lines


def _palu_lines(model: dict[str, Any]) -> list[str]:
    palu = model["palu"]
    lines = [
        f"  Palu             groups of {palu['group_size']} KV heads, "
        f"{palu['latent']} latents{', rotated' if palu['hadamard'] else ''}"
    ]
    for what, ranks in (("keys", palu["k_ranks"]), ("values", palu["v_ranks"])):
        mean, full = sum(ranks) / len(ranks), palu["group_size"] * model["head_dim"]
        lines.append(f"  ranks of {what:8}{min(ranks)} to {max(ranks)}, mean {mean:.1f}, of {full}")
    return lines


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"
