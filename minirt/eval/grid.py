"""A grid of tasks and policies: every policy gets the same examples, and what is known already is not run again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench import model_type
from ..config import ModelConfig
from ..errors import UsageError
from ..gguf_file import GGUFFile
from ..llama import Llama
from ..policies import Budget, Policy, parse_policy
from ..policies.base import BoundedPolicy
from ..policies.budget import FEWEST
from ..session import Progress
from ..stores import get_stores, stores_text
from ..tokenizer import Tokenizer
from .example import TOKENS, Example
from .results import Results, fingerprint
from .runner import BASELINE, NO_CONTEXT, Row, attempt, summarise
from .sources import Task

ROOM = 256  # tokens of context that are kept free behind a prompt; more than any task generates


def expand(policies: Sequence[str], budgets: Sequence[str] = (), flags: Sequence[tuple[str, str]] = ()) -> list[str]:
    """Policies as `parse_policy` writes them, each once, dense first, since the others are compared with it.

    A bounded policy without a budget comes once for each of `budgets`. flags: parameters of the one beside dense.
    Raises UsageError as `parse_policy`.
    """
    others = [policy for policy in policies if policy != BASELINE] or policies
    if flags and len(others) > 1:
        raise UsageError("flags of a policy go with one --policy; of several each has its own: sparq:r=16,topk:k=64")
    found: list[str] = []
    for policy in (parse_policy(text, flags if text in others else ()) for text in policies):
        if isinstance(policy, BoundedPolicy) and policy.budget is None and budgets:
            found += [str(dataclasses.replace(policy, budget=budget)) for budget in budgets]
        else:
            found.append(str(policy))
    return sorted(dict.fromkeys(found), key=lambda policy: policy != BASELINE)


@dataclass(frozen=True)
class Setup:
    """What is asked of which model."""

    path: Path
    fingerprint: str  # of the model's file
    config: ModelConfig
    kv: str
    n_ctx: int
    length: int  # tokens of context
    seed: int
    examples: Mapping[str, Sequence[Example]]  # of each task

    @classmethod
    def of(
        cls, path: Path, kv: str, tasks: Iterable[Task], n: int, seed: int, length: int | None, n_ctx: int | None
    ) -> Setup:
        """n examples of each task, for contexts of `length` tokens in a session of n_ctx; None: what suits the model.

        Of the model only the file's tables are read. Raises UsageError if the length does not fit the context, and
        ModelError as `Task.examples`.
        """
        with GGUFFile.open(path) as file:
            config = ModelConfig.from_gguf(file)
            tokenizer = Tokenizer.from_metadata(file.metadata, str(file.path))
        kv = stores_text(*get_stores(kv, config.palu))
        limit = n_ctx or config.n_ctx_train
        if length is None:
            length = min(TOKENS, max(limit - ROOM, limit // 2))
        if length >= limit:
            whose = "see --ctx" if n_ctx else "all the model was trained for; see --ctx"
            raise UsageError(f"--length {length} does not fit the context of {limit} tokens ({whose})")
        n_ctx = n_ctx or min(length + ROOM, config.n_ctx_train)
        examples = {task.name: task.examples(tokenizer, length, n_ctx, n, seed) for task in tasks}
        return cls(path, fingerprint(path), config, kv, n_ctx, length, seed, examples)

    def key(self, task: str, policy: str, example: Example) -> dict[str, Any]:
        """Of `Results`."""
        return {
            "model": self.path.name,
            "fingerprint": self.fingerprint,
            "kv": self.kv,
            "n_ctx": self.n_ctx,
            "policy": policy,
            "task": task,
            "length": self.length,
            "seed": self.seed,
            "example": example.name,
            "digest": example.digest,
        }

    def rows(self, task: str, policy: str, results: Results) -> list[Row]:
        """The results there are."""
        found = (results.find(**self.key(task, policy, example)) for example in self.examples[task])
        return [row for row in found if row is not None]

    def missing(self, task: str, policy: str, results: Results) -> list[Example]:
        """The examples without a result."""
        return [e for e in self.examples[task] if results.find(**self.key(task, policy, e)) is None]

    def check(self, policies: Iterable[str]) -> None:
        """Raises UsageError for a policy that does not fit the model, the context or a prompt, or for an unknown kv."""
        stores = get_stores(self.kv, self.config.palu)
        shortest = min(len(example.prompt) for examples in self.examples.values() for example in examples)
        for policy in policies:
            fitted(policy, shortest).check(self.config, self.n_ctx, *stores)


def fitted(policy: str, n_prompt: int) -> Policy:
    """A policy as a prompt of so many tokens gets it: a budget that is a fraction is one of the prompt.

    So each example loses the same share of its context, as in the paper's length scaling (k = S/c), however much room
    there is behind it.
    """
    made = parse_policy(BASELINE if policy == NO_CONTEXT else policy)
    if not isinstance(made, BoundedPolicy) or not isinstance(made.budget, Budget) or made.budget.unit != "context":
        return made
    return dataclasses.replace(made, budget=max(FEWEST, int(made.budget.amount * n_prompt)))


def run(
    llama: Llama, setup: Setup, task: Task, policy: str, results: Results, progress: Progress | None = None
) -> Iterator[Example]:
    """Runs the missing examples of a task, adds each one's result and yields it.

    policy: also NO_CONTEXT. progress: of each prompt. Raises UsageError as `Llama.set_policy`.
    """
    current = None  # as long as the policy is the same, what a prompt shares with the last one is not computed again
    for example in setup.missing(task.name, policy, results):
        own = fitted(policy, len(example.prompt))
        if own != current:
            llama.set_policy(own)
            current = own
        outcome = attempt(llama, task, example, context=policy != NO_CONTEXT, progress=progress)
        results.add(setup.key(task.name, policy, example) | dataclasses.asdict(outcome))
        yield example


def record(llama: Llama, setup: Setup, task: Task, policy: str, results: Results) -> dict[str, Any] | None:
    """What is known of a task under a policy, as JSON: `summarise`, and what it was measured on. None: nothing."""
    rows = setup.rows(task.name, policy, results)
    if not rows:
        return None
    summary = summarise(rows, setup.rows(task.name, BASELINE, results) if policy != BASELINE else [])
    if policy == NO_CONTEXT:
        summary["share_of_dense"] = None  # of what is not there
    k, v = get_stores(setup.kv, setup.config.palu)
    return {
        "model_filename": str(setup.path),
        "model_type": model_type(llama.file, llama.config),
        "backends": llama.decoder.ops.name,
        "type_k": k.name,
        "type_v": v.name,
        "n_ctx": setup.n_ctx,
        "length": setup.length,
        "seed": setup.seed,
        "task": task.name,
        "metric": task.metric,
        "policy": policy,
    } | summary
