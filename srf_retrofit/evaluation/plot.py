"""The picture of an evaluation: as many panels as it has figures for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..report import MODES, short_count

_COLOURS = {
    "teacher": "#5b6770",
    "full": "#2a6f97",
    "no_retained": "#7b5ea7",
    "no_tail": "#e08e45",
    "tail_only": "#b5475b",
}
_GRID = {"color": "#e6e6e6", "lw": 0.8}
_COLUMNS = 3
_FAR = 4.0  # times the best line, from which on a line is left out


def plot(results: dict[str, Any], path: str | Path) -> bool:
    """Write a PNG; False, and nothing, for results without anything to draw.

    Panels: perplexity by position and by length, recall against distance, pass keys by context and depth, tasks, the
    share of the tail and the error of every head.
    """
    # The object interface: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[tuple[str, Callable[[Any, dict[str, Any]], None]]] = [
        ("lengths", _draw_positions),
        ("lengths", _draw_lengths),
        ("copy", _draw_copies),
        ("passkey", _draw_passkeys),
        ("mqar", _draw_associations),
        ("tasks", _draw_tasks),
        ("tail_share", _draw_tails),
        ("tail_share", _draw_shares),
        ("head_error", _draw_heads),
    ]
    drawn = [draw for key, draw in panels if results.get(key)]
    if not drawn:
        return False
    columns = min(_COLUMNS, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.9 * rows), layout="constrained", dpi=130)
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, draw in zip(axes, drawn, strict=False):
        axis.spines[["top", "right"]].set_visible(False)
        draw(axis, results)
        axis.tick_params(labelsize=9)
    for axis in axes[len(drawn) :]:
        axis.set_axis_off()
    scratch = Path(path).with_name(f".{Path(path).name}.partial")
    try:
        figure.savefig(scratch, format="png")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return True


def _sides(results: dict[str, Any], key: str) -> list[tuple[str, str, Any]]:
    """`(name, label, figures)` of the teacher and of every mode."""
    sides = []
    if key in results.get("teacher", {}):
        sides.append(("teacher", "teacher", results["teacher"][key]["full"]))
    sides += [(mode, _label(mode, results), results[key][mode]) for mode in MODES if mode in results[key]]
    return sides


def _label(mode: str, results: dict[str, Any]) -> str:
    return ("retrofitted" if results["model"]["srf"] else "model") if mode == "full" else MODES[mode]


def _style(name: str) -> dict[str, Any]:
    return {
        "color": _COLOURS[name],
        "ls": "--" if name == "teacher" else "-",
        "lw": 2.2 if name == "full" else 1.5,
        "marker": "o",
        "ms": 4,
        "zorder": 3 if name == "full" else 2,
    }


def _draw_positions(axis: Any, results: dict[str, Any]) -> None:
    sides = _sides(results, "lengths")
    longest = max(sides[0][2], key=int)
    ranges = sides[0][2][longest]["by_position"]
    _draw_perplexities(
        axis,
        [(name, label, [row["ppl"] for row in found[longest]["by_position"]]) for name, label, found in sides],
        [f"{short_count(r['start'])}-{short_count(r['end'])}" for r in ranges],
    )
    axis.set_xlabel(f"position in windows of {int(longest):,} tokens")
    axis.set_title("Perplexity by position, lower is better", loc="left", fontsize=11)
    axis.legend(frameon=False, fontsize=9)


def _draw_lengths(axis: Any, results: dict[str, Any]) -> None:
    sides = _sides(results, "lengths")
    lengths = list(sides[0][2])
    _draw_perplexities(
        axis,
        [(name, label, [found[n]["ppl"] for n in lengths]) for name, label, found in sides],
        [short_count(int(n)) for n in lengths],
    )
    axis.set_xlabel("length of the windows")
    axis.set_title("Perplexity by length", loc="left", fontsize=11)


def _draw_perplexities(axis: Any, lines: list[tuple[str, str, list[float]]], places: list[str]) -> None:
    """Lines on a logarithmic scale; one far above all others would flatten them, and is named instead."""
    best = min(max(values) for _, _, values in lines)
    far = [(label, values) for _, label, values in lines if min(values) > _FAR * best]
    for name, label, values in lines:
        if min(values) <= _FAR * best:
            axis.plot(values, label=label, **_style(name))
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(low / (high / low) ** 0.1, high * (high / low) ** 0.1)
    if far:
        note = "; ".join(f"{label}: {min(values):,.0f} to {max(values):,.0f}" for label, values in far)
        axis.text(0.02, 0.03, f"not shown: {note}", transform=axis.transAxes, fontsize=8, color="#777777")
    axis.set_xticks(range(len(places)), places)
    axis.set_ylabel("perplexity (log scale)")
    _plain_log_ticks(axis)


def _plain_log_ticks(axis: Any) -> None:
    """Numbers as people write them: evenly spaced ones over a small range, steps of the decades over a large one."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    low, high = axis.get_ylim()
    if high / low < 4:
        ticks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
    else:
        digits = (1, 3) if high / low > 30 else (1, 1.5, 2, 3, 5, 7)
        ticks = [d * 10**e for e in range(-3, 12) for d in digits]
    axis.yaxis.set_major_locator(FixedLocator([y for y in ticks if low <= y <= high]))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 100 else f"{y:.4g}"))
    axis.grid(axis="y", **_GRID)
    axis.set_axisbelow(True)


def _draw_copies(axis: Any, results: dict[str, Any]) -> None:
    sides = _sides(results, "copy")
    distances = [row["distance"] for row in sides[0][2]]
    srf = results["model"]["srf"]
    if srf and srf["window"]:
        reach = 2 * srf["window"]
        axis.axvspan(min(min(distances), reach) * 0.8, reach, color="#f1f1ec", zorder=0)
        axis.text(reach, 1.06, "window ", fontsize=8, color="#777777", ha="right", va="center")
    for name, label, found in sides:
        axis.errorbar(
            distances,
            [row["accuracy"] for row in found],
            yerr=[row["stderr"] for row in found],
            label=label,
            elinewidth=1,
            capsize=2,
            **_style(name),
        )
    axis.set_xscale("log")
    axis.set_xticks(distances, [f"{d:,}" for d in distances])
    axis.minorticks_off()
    axis.set_xlim(min(distances) * 0.8, max(distances) * 1.2)
    _share_axis(axis)
    axis.set_xlabel("distance (tokens)")
    axis.set_ylabel("tokens copied right")
    axis.set_title("Copying a random string", loc="left", fontsize=11)
    axis.legend(frameon=False, fontsize=9)


def _draw_associations(axis: Any, results: dict[str, Any]) -> None:
    sides = _sides(results, "mqar")
    cells = sides[0][2]
    width = 0.8 / len(sides)
    for i, (name, label, found) in enumerate(sides):
        places = [x + (i - (len(sides) - 1) / 2) * width for x in range(len(cells))]
        axis.bar(places, [row["accuracy"] for row in found], width * 0.92, color=_COLOURS[name], label=label)
    axis.set_xticks(range(len(cells)), [f"{row['pairs']}\ngap {row['gap']}" for row in cells], fontsize=8)
    _share_axis(axis)
    axis.set_ylabel("values named right")
    axis.set_title("Associations: pairs of key and value", loc="left", fontsize=11)
    axis.legend(frameon=False, fontsize=9)


def _share_axis(axis: Any) -> None:
    axis.set_ylim(-0.03, 1.12)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axis.grid(axis="y", **_GRID)
    axis.set_axisbelow(True)


def _draw_passkeys(axis: Any, results: dict[str, Any]) -> None:
    cells = {(c["depth"], c["context"]): c["accuracy"] for c in results["passkey"]["full"]}
    theirs = results.get("teacher", {}).get("passkey", {}).get("full", ())
    beside = {(c["depth"], c["context"]): c["accuracy"] for c in theirs}
    depths, contexts = (sorted({key[i] for key in cells}) for i in (0, 1))
    image = axis.imshow([[cells[d, c] for c in contexts] for d in depths], aspect="auto", cmap="YlGnBu", vmin=0, vmax=1)
    for y, depth in enumerate(depths):
        for x, context in enumerate(contexts):
            value = cells[depth, context]
            text = f"{100 * value:.0f}" + (f" ({100 * beside[depth, context]:.0f})" if beside else "")
            axis.text(x, y, text, ha="center", va="center", fontsize=9, color="white" if value > 0.55 else "#333333")
    axis.set_xticks(range(len(contexts)), [short_count(c) for c in contexts])
    axis.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
    axis.tick_params(length=0)
    axis.set_xlabel("context (tokens)")
    axis.set_ylabel("depth of the key")
    axis.set_title("Pass key: digits right, %" + (" (teacher)" if beside else ""), loc="left", fontsize=11)
    _no_frame(axis, image, None)


def _draw_tasks(axis: Any, results: dict[str, Any]) -> None:
    sides = _sides(results, "tasks")
    names = list(sides[0][2])
    height = 0.8 / len(sides)
    for i, (name, label, found) in enumerate(sides):
        places = [y + (i - (len(sides) - 1) / 2) * height for y in range(len(names))]
        bars = axis.barh(
            places,
            [found[task]["acc"] for task in names],
            height * 0.92,
            xerr=[found[task]["acc_stderr"] for task in names],
            error_kw={"elinewidth": 1, "ecolor": "#333333"},
            color=_COLOURS[name],
            label=label,
        )
        axis.bar_label(bars, [f"{100 * found[t]['acc']:.1f}" for t in names], padding=4, fontsize=8, color="#333333")
    axis.set_yticks(range(len(names)), [name.removeprefix("eval_").replace("_", " ") for name in names])
    axis.set_ylim(max(len(names), 3) - 0.5, -0.5)  # one task alone is no thicker than one of three
    axis.set_xlim(0, 1.05)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axis.set_xlabel("accuracy")
    axis.set_title("Tasks", loc="left", fontsize=11)
    axis.legend(
        frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=len(sides), borderaxespad=0
    )


def _draw_tails(axis: Any, results: dict[str, Any]) -> None:
    _map(axis, results["tail_share"]["estimated"], "share of the normaliser", "magma", 1.0)
    axis.set_title("What the features carry", loc="left", fontsize=11)


def _draw_shares(axis: Any, results: dict[str, Any]) -> None:
    share = results["tail_share"]
    layers = len(share["exact"])
    place = [layer for layer, row in enumerate(share["exact"]) for _ in row]
    exact, estimated = ([x for row in share[key] for x in row] for key in ("exact", "estimated"))
    top = 1.08 * max(*exact, *estimated, 1e-3)
    axis.plot([0, top], [0, top], color="#999999", lw=0.9, ls=":", zorder=1)
    points = axis.scatter(exact, estimated, c=place, cmap="viridis", s=18, vmin=0, vmax=max(layers - 1, 1), alpha=0.85)
    axis.set_xlim(-0.02 * top, top)
    axis.set_ylim(-0.02 * top, top)
    axis.set_xlabel("share in exact softmax")
    axis.set_ylabel("share by the features")
    axis.set_title("Share of the tail, one point a head", loc="left", fontsize=11)
    bar = axis.figure.colorbar(points, ax=axis, pad=0.02)
    bar.set_label("layer")
    bar.outline.set_visible(False)


def _draw_heads(axis: Any, results: dict[str, Any]) -> None:
    errors = results["head_error"]
    _map(axis, errors, "relative error", "viridis", max(x for row in errors for x in row) or 1.0)
    axis.set_title("Heads against exact softmax", loc="left", fontsize=11)


def _map(axis: Any, values: list[list[float]], label: str, colours: str, top: float) -> None:
    grid = list(zip(*values, strict=True))  # heads x layers
    image = axis.imshow(grid, aspect="auto", origin="lower", cmap=colours, vmin=0, vmax=top, interpolation="nearest")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("layer")
    axis.set_ylabel("query head")
    _no_frame(axis, image, label)


def _no_frame(axis: Any, image: Any, label: str | None) -> None:
    axis.spines[:].set_visible(False)
    if label is not None:
        bar = axis.figure.colorbar(image, ax=axis, pad=0.02)
        bar.set_label(label)
        bar.outline.set_visible(False)
