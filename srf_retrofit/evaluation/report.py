"""An evaluation as a page to read: Markdown, one figure, and the JSON they were made from; several runs side by side.

All functions take results of `suite.evaluate_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..files import atomic_directory, write_json, write_text
from ..modeling.configuration import SRFConfig
from ..report import MODES, format_bytes, table
from .plot import plot
from .suite import headline

MARK = "results.json"
_LOWER_IS_BETTER = ("perplexity", "bits per byte", "KL", "state")


def write_evaluation(results: dict[str, Any], directory: str | Path, *, overwrite: bool = False) -> Path:
    """Write `report.md`, `report.png` and `results.json` into a new directory, whole or not at all.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    ValueError
        See `files.check_writable`; a directory with a `results.json` can be replaced with `overwrite`.
    """
    with atomic_directory(directory, overwrite=overwrite, mark=MARK) as scratch:
        drawn = plot(results, scratch / "report.png")
        write_text(scratch / "report.md", markdown(results, figure="report.png" if drawn else None))
        write_json(scratch / MARK, results)
    return Path(directory) / "report.md"


def markdown(results: dict[str, Any], *, figure: str | None = None) -> str:
    """The whole page; `figure` is the path of the picture in it."""
    model = results["model"]
    parts = [f"# Evaluation of {model['name']}", _introduction(results)]
    if figure is not None:
        parts.append(f"![Perplexity by position, recall, share of the tail]({figure})")
    if "against_teacher" in results:
        parts += ["## Beside the teacher", _against_teacher(results)]
    sections = [
        ("perplexity", "Perplexity", _perplexity),
        ("lengths", "By length and position", _lengths),
        ("copy", "Copies at a distance", _copies),
        ("mqar", "Associations", _associations),
        ("passkey", "Pass keys in prose", _passkeys),
        ("tasks", "Tasks", _tasks),
        ("harness", "Tasks, through lm-eval", _harness),
        ("head_error", "Heads against exact softmax", _heads),
        ("tail_share", "Share of the tail", _tails),
    ]
    for key, title, section in sections:
        if key in results:
            parts += [f"## {title}", section(results)]
    parts += ["## This run", _run(results)]
    return "\n\n".join(parts) + "\n"


def compare(results: Sequence[dict[str, Any]], names: Sequence[str] | None = None, *, mode: str = "full") -> str:
    """A Markdown table of several runs, one a column; the best of each row is bold where they differ.

    Parameters
    ----------
    results : sequence of dict
        Of models measured on the same text and with the same settings, for the figures to mean the same.
    names : sequence of str, optional
        Column titles; by default the names of the models.
    mode : str
        Mode of the figures.

    Raises
    ------
    ValueError
        For no results, or another number of names.
    """
    names = [run["model"]["name"] for run in results] if names is None else list(names)
    if not results or len(names) != len(results):
        raise ValueError(f"compare needs a name for each result, got {len(names)} for {len(results)}")
    teacher = next((run["teacher"] for run in results if "teacher" in run), None)
    columns = []
    for run in results:
        figures = headline(run, mode)
        if "distance" in run:
            figures["KL to teacher"] = run["distance"]["kl"]
            figures["same top token as teacher"] = run["distance"]["agreement"]
        if run.get("state"):
            figures["state, tokens of cache"] = run["state"]["kv_tokens"]
        columns.append(figures)
    theirs = headline(teacher) if teacher else {}
    rows = []
    for figure in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(figure) for column in columns]
        known = [value for value in values if value is not None]
        best = min(known) if figure.startswith(_LOWER_IS_BETTER) or " perplexity" in figure else max(known)
        differ = min(known) < max(known)
        cells = ["-" if v is None else f"**{_number(v)}**" if differ and v == best else _number(v) for v in values]
        rows.append([figure, *([_number(theirs[figure]) if figure in theirs else "-"] if teacher else []), *cells])
    return table(["", *(["teacher"] if teacher else []), *names], rows)


def _number(value: float) -> str:
    """Three or four significant digits, without an exponent where it can be read."""
    size = abs(value)
    if value == 0 or 1e-3 <= size <= 1:
        return f"{value:.3f}"
    if 1 < size < 1e7:
        return f"{value:,.2f}" if size < 1000 else f"{value:,.0f}"
    return f"{value:.2e}"


def _introduction(results: dict[str, Any]) -> str:
    model, state = results["model"], results["state"]
    text = f"`{model['class']}`, {model['parameters']:,} parameters in {model['dtype']}, on {model['device']}."
    if state is None:
        return f"{text} A softmax model: its cache grows with every token."
    c = model["srf"]
    exact = "no exact keys" if not (c["window"] or c["sinks"]) else (
        f"{c['sinks']} sinks, blocks of {c['window']} positions, {SRFConfig.from_dict(c).retained_text} retained keys"
    )  # fmt: skip
    return (
        f"{text} {state['layers']} layers attend by {c['num_features']} features (`{c['projection']}`, "
        f"`{c.get('feature_map', 'random')}`) with {exact}; {state['softmax_layers']} keep softmax. The state "
        f"of a sequence is {format_bytes(state['state_bytes'])} at any length, the cache of "
        f"{state['kv_tokens']:,.0f} tokens."
    )


def _against_teacher(results: dict[str, Any]) -> str:
    rows = [
        [
            row["figure"],
            _number(row["model"]),
            _number(row["teacher"]),
            "-" if row["ratio"] is None else f"{row['ratio']:.3f}",
            f"{row['difference']:+.3f}",
        ]
        for row in results["against_teacher"]
    ]
    page = table(["", "model", "teacher", "ratio", "difference"], rows)
    if "distance" in results:
        far = results["distance"]
        page += (
            f"\n\nKL(teacher || model) is {far['kl']:.4f} nats a token, and the same token is the likeliest at "
            f"{100 * far['agreement']:.1f} % of {far['tokens']:,} positions."
        )
    return page


def _sides(results: dict[str, Any], key: str) -> dict[str, Any]:
    """Figures of a part by printed name: the teacher, then the model's modes."""
    sides = {}
    if key in results.get("teacher", {}):
        sides["teacher"] = results["teacher"][key]["full"]
    sides.update({MODES[mode]: results[key][mode] for mode in MODES if mode in results[key]})
    return sides


def _perplexity(results: dict[str, Any]) -> str:
    sides = _sides(results, "perplexity")
    rows = [[name, f"{found['ppl']:,.3f}", f"{found['nll']:.4f}"] for name, found in sides.items()]
    tokens = next(iter(sides.values()))["tokens"]
    return table(["", "perplexity", "nats a token"], rows) + (
        f"\n\n{tokens:,} predicted tokens in non-overlapping windows of {results['settings']['length']:,}, the same in "
        "every row."
    )


def _lengths(results: dict[str, Any]) -> str:
    sides = _sides(results, "lengths")
    lengths = list(next(iter(sides.values())))
    pages = []
    for name, unit in (("ppl", "perplexity"), ("bits_per_byte", "bits per byte")):
        if name in sides[next(iter(sides))][lengths[0]]:
            rows = [[side, *(_number(found[n][name]) for n in lengths)] for side, found in sides.items()]
            pages.append(table([f"{unit} in windows of", *(f"{int(n):,}" for n in lengths)], rows))
    longest = max(lengths, key=int)
    ranges = sides[next(iter(sides))][longest]["by_position"]
    rows = [[side, *(_number(r["ppl"]) for r in found[longest]["by_position"])] for side, found in sides.items()]
    pages.append(table([f"perplexity in {int(longest):,}, by position", *(_span(r) for r in ranges)], rows))
    return "\n\n".join(pages)


def _span(row: dict[str, Any]) -> str:
    return f"{row['start']:,} to {row['end'] - 1:,}"


def _copies(results: dict[str, Any]) -> str:
    sides = _sides(results, "copy")
    distances = [row["distance"] for row in next(iter(sides.values()))]
    rows = [[side, *(f"{row['accuracy']:.3f}" for row in found)] for side, found in sides.items()]
    trials = results["settings"]["trials"]
    return table(["distance", *(f"{d:,}" for d in distances)], rows) + (
        f"\n\nShare of tokens named right in the second copy of a random string, {trials} strings a cell."
    )


def _associations(results: dict[str, Any]) -> str:
    sides = _sides(results, "mqar")
    cells = [(row["pairs"], row["gap"]) for row in next(iter(sides.values()))]
    rows = [[side, *(f"{row['accuracy']:.3f}" for row in found)] for side, found in sides.items()]
    return table(["pairs, gap", *(f"{pairs}, {gap:,}" for pairs, gap in cells)], rows)


def _passkeys(results: dict[str, Any]) -> str:
    rows = []
    for side, found in _sides(results, "passkey").items():
        for context in sorted({cell["context"] for cell in found}):
            cells = sorted((c for c in found if c["context"] == context), key=lambda c: c["depth"])
            rows.append(
                [
                    f"{side}, {context:,}",
                    *(f"{c['accuracy']:.2f}" for c in cells),
                    f"{fmean(c['whole'] for c in cells):.2f}",
                ]
            )
    depths = results["settings"]["depths"]
    return table(["context; depth", *(f"{d:g}" for d in sorted(depths)), "whole key"], rows) + (
        "\n\nShare of the key's digits named right, by its depth in the prose; in the last column the share of keys "
        "named whole, at all depths."
    )


def _tasks(results: dict[str, Any], key: str = "tasks") -> str:
    sides = _sides(results, key)
    metrics = ("acc", "acc_norm", "acc_bytes", "perplexity")
    rows = []
    for name, first in next(iter(sides.values())).items():
        for metric in (m for m in metrics if m in first):
            cells = []
            for found in sides.values():
                error = found[name].get(f"{metric}_stderr")
                cells.append(_number(found[name][metric]) + (f" ± {_number(error)}" if error is not None else ""))
            rows.append([f"{name}, {metric}", *cells])
    return table(["", *sides], rows)


def _harness(results: dict[str, Any]) -> str:
    return _tasks(results, "harness")


def _heads(results: dict[str, Any]) -> str:
    return _layer_table({"error": results["head_error"]}) + (
        "\n\nRelative error of a head's output against exact softmax on the same queries, keys and values: mean and "
        "largest over the heads of a layer."
    )


def _tails(results: dict[str, Any]) -> str:
    share = results["tail_share"]
    return _layer_table({"features": share["estimated"], "exact softmax": share["exact"]}) + (
        "\n\nShare of the normaliser that belongs to keys outside the exact ones: as the features have it, and as "
        "exact softmax would on the same queries and keys."
    )


def _layer_table(maps: dict[str, list[list[float]]]) -> str:
    """Mean and largest of each layer's heads; layers as columns would be too many, so they are rows."""
    header = ["layer", *(f"{name}, {what}" for name in maps for what in ("mean", "largest"))]
    rows = []
    for layer in range(len(next(iter(maps.values())))):
        cells = [f"{f(values[layer]):.3f}" for values in maps.values() for f in (fmean, max)]
        rows.append([str(layer), *cells])
    rows.append(["all", *(f"{f([x for row in v for x in row]):.3f}" for v in maps.values() for f in (fmean, max))])
    return table(header, rows)


def _run(results: dict[str, Any]) -> str:
    rows = [[part, f"{seconds:.1f} s"] for part, seconds in results["seconds"].items()]
    theirs = results.get("teacher", {}).get("seconds", {})
    rows += [[f"{part}, teacher", f"{seconds:.1f} s"] for part, seconds in theirs.items()]
    rows += [[name, str(value)] for name, value in results["versions"].items()]
    return table(["", "value"], rows)
