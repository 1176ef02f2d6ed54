"""Quality against bytes: a PNG with a panel for each task. Needs matplotlib, which the extra minirt[plot] brings."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from ..errors import UsageError
from .runner import BASELINE, NO_CONTEXT

COLUMNS = 3  # of panels

Record = Mapping[str, Any]  # of one task under one policy: see minirt.eval.runner.summarise


def check_matplotlib() -> None:
    """Raises UsageError if it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'minirt[plot]'")


def write_png(records: Sequence[Record], file: BinaryIO, title: str) -> None:
    """Draws each policy's mean scores, with standard errors, over the cache bytes it reads as a share of dense's.

    A line joins the budgets of one method. Dense is the line across, its standard error the band around it; the dotted
    line is dense without the context.
    """
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(record["task"] for record in records))
    methods = list(dict.fromkeys(_method(r) for r in records if r["policy"] not in (BASELINE, NO_CONTEXT)))
    columns = min(len(tasks), COLUMNS)
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.6 * rows + 0.8), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    legend: dict[str, Any] = {}
    for axes, task in zip(panels[: len(tasks)], tasks, strict=True):
        here = [record for record in records if record["task"] == task]
        _draw(axes, here, methods)
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    for axes in panels[len(tasks) :]:
        axes.remove()
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=6)
    figure.savefig(file, format="png", dpi=150)


def _draw(axes: Any, records: Sequence[Record], methods: Sequence[str]) -> None:
    """A panel: the records of one task."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for record in records:
        if record["policy"] == BASELINE:
            low, high = (record["score"] + sign * record["score_error"] for sign in (-1, 1))
            axes.axhspan(low, high, color="0.9")
            axes.axhline(record["score"], color="0.3", label=BASELINE)
        elif record["policy"] == NO_CONTEXT:
            axes.axhline(record["score"], color="0.3", linestyle=":", label=NO_CONTEXT)
    for i, method in enumerate(methods):
        points = [record for record in records if _method(record) == method and record["share_of_dense"]]
        points.sort(key=lambda record: record["share_of_dense"])
        axes.errorbar(
            [record["share_of_dense"] for record in points],
            [record["score"] for record in points],
            [record["score_error"] for record in points],
            marker="o", markersize=4, capsize=2, alpha=0.8, color=f"C{i}", label=method,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xlim(right=max(1.0, axes.get_xlim()[1]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{records[0]['task']} ({records[0]['n_prompt']:.0f} tokens)")
    axes.set_xlabel("cache bytes read, share of dense")
    axes.set_ylabel(records[0]["metric"])
    axes.grid(alpha=0.3)


def _method(record: Record) -> str:
    """A policy's name without its parameters."""
    return str(record["policy"]).partition(":")[0]
