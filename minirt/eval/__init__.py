"""What a KV policy costs in quality: tasks, their scores, and results that pair policies example by example.

    tasks = make_tasks(["repetition", "qa"])
    with Llama.load("model.gguf", n_ctx=2304) as llama:
        llama.set_policy("sparq:r=16:k=128")
        for task in tasks:
            for example in task.examples(llama.tokenizer, length=2048, n_ctx=llama.n_ctx, n=8, seed=0):
                print(task.name, example.name, attempt(llama, task, example).score)

The tasks are those of SparQ Attention (arXiv 2312.04985, section 4 and appendix), save TriviaQA. A context of 2048
tokens has the sizes of that paper; another one has them in proportion.
"""

from .example import Example
from .grid import Setup, expand, fitted, record, run
from .results import Results, fingerprint
from .runner import BASELINE, NO_CONTEXT, Outcome, attempt, summarise
from .sources import TASKS, File, Task, make_tasks

__all__ = [
    "BASELINE",
    "NO_CONTEXT",
    "TASKS",
    "Example",
    "File",
    "Outcome",
    "Results",
    "Setup",
    "Task",
    "attempt",
    "expand",
    "fingerprint",
    "fitted",
    "make_tasks",
    "record",
    "run",
    "summarise",
]
