"""A distillation as a page to read: how the losses fell, and what the evaluation found."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..evaluation import plot as evaluation_plot
from ..evaluation import report as evaluation_report
from ..files import write_json, write_text
from ..modeling.configuration import SRFConfig
from ..report import table

_COLOURS = {"tune": "#6a994e", "transfer": "#e08e45", "logits": "#2a6f97", "logits-settled": "#7b5ea7"}
_NAMES = {
    "tune": "softmax model on the text",
    "transfer": "attention transfer",
    "logits": "logits",
    "logits-settled": "logits, features settled",
}
_TITLES = {
    "tune": "Softmax model, tuned: loss of the next token",
    "transfer": "Attention transfer: error of a layer's output",
    "logits": "Logits: distance from the teacher",
}


def write_distillation(results: dict[str, Any], directory: str | Path) -> Path:
    """Write `report.md`, `report.png`, `evaluation.png` (where there is something to draw) and `results.json`.

    Parameters
    ----------
    results : dict
        Of `pipeline.run`.
    directory : path
        That of the run.

    Returns
    -------
    Path
        Of the page.
    """
    directory = Path(directory)
    if results["training"]:
        plot(results, directory / "report.png")
    evaluation = results.get("evaluation")
    drawn = bool(evaluation) and evaluation_plot.plot(evaluation, directory / "evaluation.png")  # type: ignore[arg-type]
    write_text(directory / "report.md", markdown(results, figure="evaluation.png" if drawn else None))
    write_json(directory / "results.json", results)
    return directory / "report.md"


def markdown(results: dict[str, Any], *, figure: str | None = None) -> str:
    """The whole page; `figure` is the path of the evaluation's picture."""
    settings, srf = results["settings"], results["settings"]["srf"]
    spread = results["retrofit"].get("slots")
    steps = settings["tokens"] // settings["tokens_per_step"]
    tuned = ""
    if "tune" in results["training"]:
        tokens = results["training"]["tune"]["tokens"]
        tuned = (
            f" The teacher is the softmax model after next-token training on the first {tokens:,} tokens of the text."
        )
    gate = ", a forget gate" if srf["forget_gate"] else ""
    slots = f"{SRFConfig.from_dict(srf).retained_text} retained keys{' on average' if spread else ''}"
    how = (
        f"Fitted on {results['text']['calibration_tokens']:,} tokens in rows of {settings['length']:,}, not distilled."
    )
    if steps:
        how = (
            f"{steps:,} steps of {settings['tokens_per_step']:,} tokens towards the teacher's logits, in rows of "
            f"{settings['length']:,}; trained: {settings['train']}."
        )
    parts = [
        f"# {Path(settings['model']).name}, {'distilled' if steps else 'retrofitted'}",
        f"{srf['num_features']} `{srf['feature_map']}` features, blocks of {srf['window']} positions, {srf['sinks']} "
        f"sinks, {slots}{gate}. {how}{tuned}",
        *([f"{spread}."] if spread else []),
        *(["![Losses by step](report.png)", "## Training", _training(results)] if results["training"] else []),
        "## Text",
        _text(results["text"]),
    ]
    if results.get("untrained") and results.get("evaluation"):
        runs = [results["untrained"], results["evaluation"]]
        compared = evaluation_report.compare(runs, ["retrofitted, untrained", "distilled"])
        parts += ["## What the training was worth", compared]
    if results.get("evaluation"):
        # Its sections become subsections of this page.
        page = evaluation_report.markdown(results["evaluation"], figure=figure)
        parts.append(re.sub(r"^(#+) ", r"#\1 ", page, flags=re.MULTILINE).strip())
    parts += ["## Stages", _stages(results)]
    return "\n\n".join(parts) + "\n"


def summary(results: dict[str, Any]) -> str:
    """The losses of every training, and the evaluation's headline, in a few lines."""
    lines = [
        f"{_NAMES[name]:26} loss {found['first_loss']:9.4f} -> {found['last_loss']:9.4f}   ({found['tokens']:,} tokens)"
        for name, found in results["training"].items()
    ]
    evaluation = results.get("evaluation") or {}
    for row in evaluation.get("against_teacher", ()):
        lines.append(f"{row['figure']:26} {row['model']:14.4f}   (teacher {row['teacher']:.4f})")
    if "distance" in evaluation:
        far = evaluation["distance"]
        lines.append(f"{'KL to teacher':26} {far['kl']:14.4f}   (same next token {100 * far['agreement']:.1f} %)")
    return "\n".join(lines)


def _training(results: dict[str, Any]) -> str:
    rows = [
        [
            _NAMES[name],
            f"{found['steps']:,}",
            f"{found['tokens']:,}",
            f"{found['first_loss']:.4f}",
            f"{found['last_loss']:.4f}",
            f"{found['seconds']:.0f} s",
        ]
        for name, found in results["training"].items()
    ]
    return table(["", "steps", "tokens", "first loss", "last loss", "time"], rows)


def _text(facts: dict[str, Any]) -> str:
    rows = [[x["name"], f"{x['tokens']:,}", f"{x['rows']:,}", f"{x['epochs']:.2f}"] for x in facts["sources"]]
    more = f"{facts['calibration_tokens']:,} tokens to calibrate on, {facts['held_out_tokens']:,} to judge on"
    if facts["recall_rows"]:
        more += f", {facts['recall_rows']:,} recall-shaped rows"
    return table(["source", "tokens", "rows read", "epochs"], rows) + f"\n\n{more}."


def _stages(results: dict[str, Any]) -> str:
    rows = [[line["name"], f"{line['seconds']:.1f} s"] for line in results["stages"]]
    rows += [[name, value] for name, value in results["versions"].items()]
    return table(["", "value"], rows)


def curve(history: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Steps and losses of a trainer's log."""
    lines = [line for line in history if "loss" in line]
    return [int(line["step"]) for line in lines], [float(line["loss"]) for line in lines]


def plot(results: dict[str, Any], path: str | Path) -> None:
    """Write a PNG: a panel each for tuning, attention transfer and the logit stage; losses on logarithmic scales."""
    # The object interface: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    training = results["training"]
    panels = [names for names in (("tune",), ("transfer",), ("logits", "logits-settled")) if set(names) & set(training)]
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    for axis, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        first = 0
        for name in (name for name in names if name in training):
            steps, losses = curve(training[name]["history"])
            axis.plot([first + step for step in steps], losses, color=_COLOURS[name], lw=1.6, label=_NAMES[name])
            first += training[name]["steps"]
        axis.set_yscale("log")
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("loss (log scale)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axis.set_title(_TITLES[names[0]], loc="left", fontsize=11)
        if len(set(names) & set(training)) > 1:
            axis.legend(frameon=False, fontsize=9)
    scratch = Path(path).with_name(f".{Path(path).name}.partial")
    try:
        figure.savefig(scratch, format="png")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
