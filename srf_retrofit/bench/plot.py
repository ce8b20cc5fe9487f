"""One picture for the benchmarks: lines of a quantity against a length, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# Ours in warm colours and full lines, the others in greys and blues, dashed.
_COLOURS = ("#d1495b", "#e08e45", "#edae49", "#2a6f97", "#5b6770", "#8d99ae", "#00798c", "#999999")


@dataclass
class Panel:
    """One pair of axes: `lines` maps a name to points (x, y); names in `ours` are drawn full, the others dashed."""

    title: str
    ylabel: str
    lines: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    ours: tuple[str, ...] = ()
    xlabel: str = "sequence length (tokens)"


def plot_panels(panels: Sequence[Panel], path: str | Path, heading: str = "") -> None:
    """Draw the panels side by side into a PNG file, whole or not at all; lines without points are left out."""
    # The object interface: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure = Figure(figsize=(5.6 * len(panels), 4.4), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        ticks: set[float] = set()
        named = {name: sorted(points) for name, points in panel.lines.items() if points}
        ordered = [n for n in panel.ours if n in named] + [n for n in named if n not in panel.ours]
        for i, name in enumerate(ordered):
            xs, ys = zip(*named[name], strict=True)
            own = name in panel.ours
            style = {"lw": 2.0 if own else 1.4, "ls": "-" if own else "--", "ms": 4, "marker": "o"}
            colour = _COLOURS[(i if own else 3 + i - sum(n in panel.ours for n in ordered)) % len(_COLOURS)]
            axis.plot(xs, ys, color=colour, label=name, **style)
            ticks.update(xs)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sorted(ticks), [short(int(x)) for x in sorted(ticks)])
        low, high = axis.get_ylim()
        # A narrow range holds no power of ten to name.
        steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high < 5 * low else (1, 2, 5) if high < 200 * low else (1,)
        axis.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e5e5", lw=0.6)
        axis.set_xlabel(panel.xlabel)
        axis.set_ylabel(panel.ylabel)
        axis.set_title(panel.title, loc="left", fontsize=11)
        if named:
            axis.legend(frameon=False, fontsize=8)
    if heading:
        figure.suptitle(heading, x=0.01, ha="left", fontsize=11)
    scratch = Path(path).with_name(f".{Path(path).name}.partial")
    try:
        figure.savefig(scratch, format="png")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def short(count: int) -> str:
    """1024 as `1k`, 1048576 as `1M`."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)
