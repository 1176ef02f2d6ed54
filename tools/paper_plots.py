"""The plots of tools/results/REPORT.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from paper_numbers import FIGURE_9, SPARQ_CPU, TOVA
from paper_results import Row, Rows
from paper_tables import ALONE, CODED, FIGURE_9_POLICY, MHA, MODEL, ONE_LAYOUT, SMALL, SPARSE, WHOLE

SIZE = (6.4, 4.0)  # inches
TICKS = (5, 10, 20, 30, 50, 100, 150)  # percent
LEAST = 1e-4  # nats that are shown
NAMED = 8  # points of a frontier whose names are shown
MARKERS = {"f16": "o", "q8_0": "s", "q4_0": "v"}  # of KV types; others: a cross


Frontier = Callable[[list[Row], str, str], list[Row]]


def draw(rows: Rows, points: list[Row], frontier: Frontier, folder: Path) -> None:
    """Writes a PNG for each plot. frontier: of paper_tables."""
    folder.mkdir(exist_ok=True)
    for name, plot in (("attention", _attention), ("figure_9", _figure_9), ("throughput", _throughput)):
        figure, axes = _new()
        plot(axes, rows)
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(folder / f"{name}.png", dpi=110)
    _pareto(points, frontier, folder / "pareto.png")


def _new(rows: int = 1, columns: int = 1) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0] * columns, SIZE[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns)


def _line(axes: Any, found: dict[int, Row], value: Callable[[Row], float], **style: Any) -> None:
    axes.plot(list(found), [value(row) for row in found.values()], **style)


def _attention(axes: Any, rows: Rows) -> None:
    policies = (SMALL, SPARSE, CODED, ONE_LAYOUT)
    cells = rows.by_depth(("dense", *policies), **ALONE, model=MHA, batch=1)
    for i, policy in enumerate(policies):
        found = {depth: cell[policy] for depth, cell in cells.items()}
        _line(axes, found, lambda r: r["speed_up"], marker="o", color=f"C{i}", label=policy)
        _line(axes, found, lambda r: r["ratio_of_bytes"], linestyle=":", color=f"C{i}")
    theirs = list(SPARQ_CPU)
    axes.plot(
        theirs, [SPARQ_CPU[s][0] / SPARQ_CPU[s][1] for s in theirs], "x--", color="0.5", label="authors, r=16 k=64"
    )
    axes.set(xscale="log", yscale="log", xlabel="S", ylabel="speed-up over dense (dotted: ratio of bytes)")


def _figure_9(axes: Any, rows: Rows) -> None:
    cells = rows.by_depth(("dense", FIGURE_9_POLICY), **WHOLE, model=MODEL)
    found = {depth: cell[FIGURE_9_POLICY] for depth, cell in cells.items()}
    _line(axes, found, lambda r: r["full_speed_up"], marker="o", label="minirt, 32 layers")
    _line(axes, found, lambda r: r["full_theory"], linestyle=":", color="C0", label="ratio of bytes")
    axes.plot(
        list(FIGURE_9), [dense / sparse for dense, sparse in FIGURE_9.values()], "x--", color="0.5", label="paper"
    )
    axes.axhline(1, color="0.7", linewidth=0.8)
    axes.set(xscale="log", xlabel="S", ylabel="speed-up over dense, 7B shape, Q8_0")


def _throughput(axes: Any, rows: Rows) -> None:
    for same, label in (("memory", "minirt, same memory"), ("batch", "minirt, same batch")):
        cell = rows.by_depth(("dense",), benchmark="throughput", model=rows.file_model, same=same).get(4096, {})
        found = {int(p.partition("=")[2]): row for p, row in cell.items() if p.startswith("tova:budget=")}
        axes.plot(list(found), [row["speed_up"] for row in found.values()], "o-", label=label)
    axes.plot(list(TOVA), [gain for _, gain in TOVA.values()], "x--", color="0.5", label="TOVA's paper, same memory")
    axes.set(xscale="log", xlabel="budget of 4096 tokens", ylabel="tokens/s over dense")


def _method(point: Row) -> str:
    name: str = point["policy"].partition(":")[0]
    return "palu" if "keep" in point else name


def _pareto(points: list[Row], frontier: Frontier, path: Path) -> None:
    from matplotlib import colormaps

    figure, panels = _new(2, 2)
    colours = colormaps["tab20"]
    costs = ("kld", "KL divergence, nats", "log"), ("repetition", "characters repeated", "linear")
    for panel, (cost, name_of_cost, scale) in zip(panels, costs, strict=True):
        for axes, axis, label in zip(panel, ("read", "held"), ("read for a token", "held"), strict=True):
            for i, name in enumerate(dict.fromkeys(map(_method, points))):
                for kv in dict.fromkeys(p["kv"] for p in points):
                    own = [p for p in points if (_method(p), p["kv"]) == (name, kv) and p["kld"] > 0]
                    style = {"color": colours(i), "marker": MARKERS.get(kv, "x")}
                    axes.scatter([100 * p[axis] for p in own], [p[cost] for p in own], s=22, **style)
                axes.scatter([], [], s=22, color=colours(i), label=name)
            best = [p for p in frontier(points, axis, cost) if p["kld"] > 0]
            axes.plot([100 * p[axis] for p in best], [p[cost] for p in best], color="0.4", linewidth=0.9, zorder=0)
            for p in best[:: 1 + len(best) // NAMED]:
                axes.annotate(p["policy"], (100 * p[axis], p[cost]), (4, 4), textcoords="offset points", fontsize=6)
            axes.set(xscale="log", yscale=scale, ylabel=name_of_cost)
            axes.set_ylim(bottom=LEAST if cost == "kld" else 0)
            axes.set_xticks(TICKS, TICKS)
            axes.minorticks_off()
            axes.set(xlabel=f"cache bytes {label}, % of dense float16")
            axes.grid(alpha=0.3)
    for kv, marker in (*MARKERS.items(), ("others", "x")):
        panels[0][1].scatter([], [], s=22, color="0.4", marker=marker, label=f"--kv {kv}")
    panels[0][1].legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)
