"""`minirt warmup`: compiles what models need, ahead of the first answer."""

from __future__ import annotations

import time

import click

from ..errors import ModelError
from .options import Engine, engine_options
from .policy_flags import PolicyCommand


@click.command(
    cls=PolicyCommand,
    epilog="""\b
Examples:
  minirt warmup                        for the default model
  minirt warmup a.gguf b.gguf --kv f32
  minirt warmup --policy sparq
""",
)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@engine_options(templates=False)
def warmup(models: tuple[str, ...], engine: Engine) -> None:
    """Compiles the kernels of models for this CPU.

    They are kept in the user's cache folder, so that no first answer has to wait for them. Which kernels a model needs
    depends on its types and heads, on --kv and on --policy.
    """
    from ..devices import compilations
    from ..llama import PROMPT

    for model in models or (None,):
        before, begun = compilations(), time.perf_counter()
        with engine.load(model) as llama:
            for n in (5, PROMPT):  # logits of many rows, as a batch or `perplexity` wants them
                if compilations()[1] == before[1]:  # what is not kept is of no use
                    llama.logits([0] * min(n, llama.n_ctx))
            name = llama.file.path.name
        (compiled, unkept), seconds = compilations(), time.perf_counter() - begun
        if unkept > before[1]:
            raise ModelError(f"{name}: the cache folder cannot be written, so compiled kernels are not kept")
        n = compiled - before[0]
        click.echo(f"{name}: {f'{n} kernels compiled in' if n else 'already compiled; loaded in'} {seconds:.1f} s")
