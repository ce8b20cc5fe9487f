"""A run's results as a page to read: Markdown, one figure, and the JSON they were made from.

All functions take the `results` dictionary that `demo.run` returns; it holds JSON types only. Keys used here:
`model`, `config`, `settings`, `versions`; `perplexity[model][mode] = {"nll", "ppl", "tokens"}`;
`distance[model] = {"kl", "agreement"}`; `head_error[model]` (layers x heads); `memory`; `decode`; `samples`; `reload`;
`timings` in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .files import write_json, write_text
from .modeling.configuration import SRFConfig

MODELS = {"teacher": "teacher (softmax)", "zero_shot": "retrofitted, untrained", "tuned": "retrofitted, tuned"}
MODES = {
    "full": "full",
    "no_retained": "no retained keys",
    "no_tail": "exact keys only",
    "tail_only": "features only",
}
_COLOURS = {"teacher": "#5b6770", "zero_shot": "#e08e45", "tuned": "#2a6f97"}


def write_report(results: dict[str, Any], directory: str | Path) -> Path:
    """Write `report.md`, `report.png` and `results.json` into an existing directory; returns the path of the page."""
    directory = Path(directory)
    plot(results, directory / "report.png")
    write_text(directory / "report.md", markdown(results))
    write_json(directory / "results.json", results)
    return directory / "report.md"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def perplexity_table(results: dict[str, Any]) -> str:
    """Perplexity by model and mode, with the distance to the teacher."""
    perplexity, distance = results["perplexity"], results.get("distance", {})
    modes = [mode for mode in MODES if any(mode in row for row in perplexity.values())]
    rows = []
    for name in (m for m in MODELS if m in perplexity):
        cells = [f"{perplexity[name][mode]['ppl']:.2f}" if mode in perplexity[name] else "-" for mode in modes]
        far = distance.get(name)
        cells += [f"{far['kl']:.3f}", f"{100 * far['agreement']:.1f} %"] if far else ["-", "-"]
        rows.append([MODELS[name], *cells])
    header = ["perplexity", *(MODES[mode] for mode in modes), "KL to teacher (nats/token)", "same next token"]
    return table(header, rows)


def format_bytes(count: float) -> str:
    """Bytes with a binary unit, three significant digits."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def memory_table(memory: dict[str, Any]) -> str:
    """State against key/value cache, one row a context length."""
    rows = [
        [f"{length:,}", format_bytes(kv), format_bytes(memory["state_bytes"]), f"{kv / memory['state_bytes']:.1f}"]
        for length, kv in zip(memory["lengths"], memory["kv_bytes"], strict=True)
    ]
    return table(["context", "key/value cache", "state", "ratio"], rows)


def decode_table(decode: dict[str, Any]) -> str:
    """Milliseconds per generated token, one row a context length."""
    columns = zip(decode["contexts"], decode["teacher_ms"], decode["student_ms"], strict=True)
    rows = [[f"{context:,}", f"{teacher:.1f}", f"{student:.1f}"] for context, teacher, student in columns]
    return table(["context", "teacher, ms/token", "retrofitted, ms/token"], rows)


def markdown(results: dict[str, Any]) -> str:
    """The whole page."""
    config, settings = results["config"], results["settings"]
    span = next(iter(results["perplexity"]["teacher"].values()))["tokens"]
    parts = [
        f"# {results['model']}, retrofitted",
        f"Every softmax attention layer replaced by {config['projection']} random features: "
        f"{config['num_features']} features, blocks of {config['window']} positions, {config['sinks']} sinks, "
        f"{SRFConfig.from_dict(config).retained_text} retained keys. Trained for {settings['steps']} steps of "
        f"{settings['train_tokens']:,} tokens in all on {settings['text']}, from the teacher's logits.",
        "![Perplexity, memory, time per token and error per head](report.png)",
        "## Quality on held-out text",
        perplexity_table(results),
        f"{span:,} predicted tokens in non-overlapping windows of {settings['length']}, the same for every cell. "
        "*Exact keys only* drops the features, *features only* drops sinks, window and retained keys: a model that is "
        "as good without its features does not use them.",
    ]
    if "memory" in results:
        memory = results["memory"]
        parts += [
            "## Memory of one sequence",
            memory_table(memory),
            f"In {memory['dtype']}; the state stays this size at any length and is the smaller from "
            f"{memory['break_even']:,} tokens on.",
        ]
    if "decode" in results:
        parts += ["## Time per generated token", decode_table(results["decode"])]
    if "reload" in results:
        same = "bit-equal" if results["reload"]["bit_equal"] else "**different**"
        parts += [
            "## Saved and loaded again",
            f"A fresh process loaded the saved model; its logits were {same} (largest difference "
            f"{results['reload']['max_difference']:g}).",
        ]
    if results.get("samples"):
        parts.append("## Generated")
        for sample in results["samples"]:
            parts.append(f"Prompt: {_quoted(sample['prompt'])}")
            parts += [f"{MODELS[name]}:\n\n{_fenced(sample[name])}" for name in MODELS if name in sample]
    parts += ["## This run", _run_table(results)]
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _fenced(text: str) -> str:
    return "```text\n" + text.strip().replace("```", "'''") + "\n```"


def _run_table(results: dict[str, Any]) -> str:
    rows = [[name.replace("_", " "), f"{seconds:.0f} s"] for name, seconds in results.get("timings", {}).items()]
    if "peak_memory" in results:
        rows.append(["peak memory", format_bytes(results["peak_memory"])])
    rows += [[name, str(value)] for name, value in results["versions"].items()]
    return table(["", "value"], rows)


def plot(results: dict[str, Any], path: str | Path) -> None:
    """Four panels: perplexities, memory against length, time per token against context, error per layer and head."""
    # The object interface: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.6), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    panels: list[tuple[Any, Callable[[Any, Any], None], str]] = [
        (axes[0, 0], _plot_perplexity, "perplexity"),
        (axes[0, 1], _plot_heads, "head_error"),
        (axes[1, 0], _plot_memory, "memory"),
        (axes[1, 1], _plot_decode, "decode"),
    ]
    for axis, draw, key in panels:
        axis.spines[["top", "right"]].set_visible(False)
        if key in results:
            draw(axis, results[key])
        else:
            axis.set_axis_off()
    scratch = Path(path).with_name(f".{Path(path).name}.partial")
    try:
        figure.savefig(scratch, format="png")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _plot_perplexity(axis, perplexity: dict[str, dict[str, dict[str, float]]]) -> None:
    names = [name for name in MODELS if name in perplexity]
    modes = [mode for mode in MODES if any(mode in perplexity[name] for name in names)]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = [x for x, mode in enumerate(modes) if mode in perplexity[name]]
        heights = [perplexity[name][modes[x]]["ppl"] for x in places]
        bars = axis.bar(
            [x + (i - (len(names) - 1) / 2) * width for x in places],
            heights,
            width * 0.94,
            color=_COLOURS[name],
            label=MODELS[name],
        )
        labels = [f"{h:.1f}" if h < 100 else f"{h:.0f}" for h in heights]
        axis.bar_label(bars, labels=labels, padding=2, fontsize=8, color="#333333")
    values = [cell["ppl"] for row in perplexity.values() for cell in row.values()]
    axis.set_yscale("log")
    axis.set_ylim(min(values) * 0.6, max(values) * 1.8)
    axis.set_xticks(range(len(modes)), [MODES[mode].replace(" ", "\n", 1) for mode in modes])
    axis.axhline(perplexity["teacher"]["full"]["ppl"], color=_COLOURS["teacher"], lw=0.8, ls=":", zorder=0)
    axis.set_ylabel("perplexity (log scale)")
    axis.set_title("Held-out perplexity, lower is better", loc="left", fontsize=11)
    axis.legend(frameon=False, fontsize=9, loc="upper left")


def _plot_heads(axis, head_error: dict[str, list[list[float]]]) -> None:
    name = "tuned" if "tuned" in head_error else next(iter(head_error))
    grid = list(zip(*head_error[name], strict=True))  # heads x layers
    image = axis.imshow(grid, aspect="auto", origin="lower", cmap="viridis", vmin=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("layer")
    axis.set_ylabel("query head")
    bar = axis.figure.colorbar(image, ax=axis, pad=0.02)
    bar.set_label("relative error")
    bar.outline.set_visible(False)
    axis.set_title(f"Attention output against exact softmax ({MODELS[name]})", loc="left", fontsize=11)


def _plot_memory(axis, memory: dict[str, Any]) -> None:
    lengths, state = memory["lengths"], memory["state_bytes"] / 2**20
    axis.plot(
        lengths, [b / 2**20 for b in memory["kv_bytes"]], "o-", color=_COLOURS["teacher"], ms=4, label="key/value cache"
    )
    axis.plot(lengths, [state] * len(lengths), "o-", color=_COLOURS["tuned"], ms=4, label="state")
    if lengths[0] <= memory["break_even"] <= lengths[-1]:
        axis.axvline(memory["break_even"], color="#999999", lw=0.8, ls=":")
        axis.annotate(
            f" same at {memory['break_even']:,} tokens",
            (memory["break_even"], state / 1.4),
            fontsize=9,
            color="#555555",
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [short_count(n) for n in lengths])
    axis.minorticks_off()
    axis.set_xlabel("context (tokens)")
    axis.set_ylabel("MiB for one sequence")
    axis.set_title(f"Memory while generating ({memory['dtype']})", loc="left", fontsize=11)
    axis.legend(frameon=False, fontsize=9)


def _plot_decode(axis, decode: dict[str, Any]) -> None:
    contexts = decode["contexts"]
    axis.plot(contexts, decode["teacher_ms"], "o-", color=_COLOURS["teacher"], ms=4, label=MODELS["teacher"])
    axis.plot(contexts, decode["student_ms"], "o-", color=_COLOURS["tuned"], ms=4, label="retrofitted")
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [short_count(n) for n in contexts])
    axis.minorticks_off()
    axis.set_ylim(0, 1.15 * max(*decode["teacher_ms"], *decode["student_ms"]))
    axis.set_xlabel("context (tokens)")
    axis.set_ylabel("ms per generated token")
    axis.set_title("Time per generated token (CPU)", loc="left", fontsize=11)
    axis.legend(frameon=False, fontsize=9)


def short_count(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)
