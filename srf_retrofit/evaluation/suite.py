"""The whole judgement of a model in one call: settings in, a dictionary of JSON types out.

The result of `evaluate_model`; keys of parts that did not run are missing:

- `format`, `settings`, `versions`, `seconds` (by part), `model` (see `parts.describe`);
- `state`: what a sequence's state costs beside the cache of keys and values it replaces, see `state_cost`;
- `perplexity[mode]`, `lengths[mode][length]`, `copy[mode]`, `mqar[mode]`, `passkey[mode]`, `tasks[mode][name]`,
  `harness[mode][name]`, and `distance`, `head_error`, `tail_share`, see the functions they come from;
- `teacher`: the teacher's `model`, `seconds` and figures under the same keys, in mode "full" alone;
- `against_teacher`: the figures of `headline` side by side,
  `{"figure", "model", "teacher", "difference", "ratio"}`, the ratio None where the teacher has 0.
"""

from __future__ import annotations

import platform
from contextlib import nullcontext
from importlib.metadata import version
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..data import TokenBlocks
from ..modeling.attention import exact_attention, srf_attentions
from ..modeling.state import SRFState
from ..recipes import to_dict
from . import choices, harness
from .long_text import windows
from .parts import Measurement, describe
from .perplexity import MODES
from .settings import ANALYSIS, PARTS, EvalSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "PARTS",
    "EvalSettings",
    "check",
    "check_files",
    "evaluate_model",
    "headline",
    "sensible_modes",
    "state_cost",
]

FORMAT = 1


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvalSettings | None = None,
    *,
    teacher: PreTrainedModel | None = None,
    text: TokenBlocks | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a model, retrofitted or not, as it is: on its device, in its dtype, without autocast.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    settings : EvalSettings, optional
        Names of models, text, device and output in it are for the command line and not looked at.
    teacher : PreTrainedModel, optional
        Measured beside it on the same tokens; `model` itself stands for its own softmax form.
    text : TokenBlocks, optional
        Held-out text, of any block length: its stream is cut anew for every part.
    progress : bool
        Show bars.

    Returns
    -------
    dict
        See the module.

    Raises
    ------
    ValueError
        Before anything runs, see `check`.
    """
    settings = settings or EvalSettings()
    parts = check(model, settings, teacher=teacher, text=text)
    mine = Measurement(model, tokenizer, settings, text, progress)
    out: dict[str, Any] = {
        "format": FORMAT,
        "settings": to_dict(settings),
        "model": describe(model),
        "state": state_cost(model),
        **mine.run((part for part in parts if part != "distance"), _modes(model, settings)),
    }
    if teacher is not None:
        if "distance" in parts:
            out["distance"] = mine.distance(teacher)
        theirs = Measurement(teacher, tokenizer, settings, text, progress)
        shared = [part for part in parts if part != "distance" and part not in ANALYSIS]
        with exact_attention(teacher) if teacher is model else nullcontext():
            found = theirs.run(shared, dict.fromkeys(PARTS, ("full",)))
        out["teacher"] = {"model": describe(teacher), **found, "seconds": theirs.seconds}
        out["against_teacher"] = _side_by_side(headline(out), headline(found))
    out["seconds"] = mine.seconds
    out["versions"] = {"python": platform.python_version()}
    out["versions"].update({name: version(name) for name in ("torch", "transformers")})
    return out


def check(
    model: PreTrainedModel,
    settings: EvalSettings,
    *,
    teacher: PreTrainedModel | None = None,
    text: TokenBlocks | None = None,
) -> tuple[str, ...]:
    """The parts that will run, in order.

    "distance" is left out without a teacher, "heads" and "tails" without a retrofitted layer.

    Raises
    ------
    ValueError
        When text is missing or too short for a part, a task file is missing or not one, or lm-eval is.
    """
    left_out = set(() if srf_attentions(model) else ANALYSIS) | ({"distance"} if teacher is None else set())
    parts = tuple(part for part in PARTS if part in settings.parts and part not in left_out)
    for part, length in _longest_window(settings).items():
        if part not in parts:
            continue
        if text is None:
            raise ValueError(f"{part} needs text: give TokenBlocks")
        try:
            windows(text, length)
        except ValueError as error:
            raise ValueError(f"{part}: {error}") from None
    check_files(settings)
    return parts


def check_files(settings: EvalSettings) -> None:
    """Refuse what is missing on this machine; needs no model.

    Raises
    ------
    ValueError
        When a task file is missing or not one, two have the same name, or lm-eval is not installed.
    """
    if "tasks" in settings.parts:
        names = [harness.task_name(path) for path in settings.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"task files need different names, got {', '.join(names)}")
        for path in settings.tasks:
            choices.read_items(path, limit=settings.limit)
    if "harness" in settings.parts:
        harness.check_installed()


def _longest_window(settings: EvalSettings) -> dict[str, int]:
    """Tokens that each part that reads text needs at the least."""
    s = settings
    needed = {
        "perplexity": s.length,
        "distance": s.length,
        "lengths": max(s.lengths, default=2),
        "passkey": max(s.contexts, default=2),
        "heads": s.analysis_length,
        "tails": s.analysis_length,
    }
    if s.prose:
        needed.update(
            copy=max(s.distances, default=2) + 128, mqar=4 * max(s.pairs, default=1) + max(s.gaps, default=0) + 128
        )
    return needed


def _modes(model: PreTrainedModel, settings: EvalSettings) -> dict[str, tuple[str, ...]]:
    """The modes of each part."""
    texts, recalled, tasks = (
        sensible_modes(model, modes) for modes in (settings.modes, settings.recall_modes, settings.task_modes)
    )
    return {
        **dict.fromkeys(("perplexity", "lengths"), texts),
        **dict.fromkeys(("copy", "mqar", "passkey"), recalled),
        **dict.fromkeys(("tasks", "harness"), tasks),
    }


def sensible_modes(model: PreTrainedModel, modes: tuple[str, ...] = MODES) -> tuple[str, ...]:
    """Those of `modes` that leave out something the model has, and not all of it; "full" for a softmax model."""
    configs = [layer.srf_config for layer in srf_attentions(model)]
    means = {
        "full": True,
        "no_tail": any(c.num_features for c in configs) and all(c.window for c in configs),
        "tail_only": any(c.window or c.sinks for c in configs) and all(c.num_features for c in configs),
        "no_retained": any(c.retained for c in configs),
    }
    return tuple(mode for mode in modes if means[mode])


def state_cost(model: PreTrainedModel) -> dict[str, Any] | None:
    """What the retrofitted layers keep of one sequence, at any length; None for a softmax model.

    Returns
    -------
    dict
        `layers`, `softmax_layers` (counts), `state_bytes`, `kv_bytes_per_token` (of the cache that the state replaces,
        in the model's dtype) and `kv_tokens`, their ratio: the state is worth the cache of so many tokens.
    """
    layers = srf_attentions(model)
    if not layers:
        return None
    state = kv = 0
    for layer in layers:
        heads = layer.config.num_attention_heads // layer.num_key_value_groups
        dtype = model.dtype
        state += SRFState.empty(layer.srf_config, 1, heads, layer.head_dim, dtype=dtype, device="meta").nbytes()
        kv += 2 * heads * layer.head_dim * dtype.itemsize
    return {
        "layers": len(layers),
        "softmax_layers": model.config.num_hidden_layers - len(layers),
        "state_bytes": state,
        "kv_bytes_per_token": kv,
        "kv_tokens": state / kv,
    }


def headline(results: dict[str, Any], mode: str = "full") -> dict[str, float]:
    """One number a figure, of one mode: what is compared between models. Missing parts give none."""
    out: dict[str, float] = {}
    if mode in results.get("perplexity", {}):
        out["perplexity"] = results["perplexity"][mode]["ppl"]
    for length, found in results.get("lengths", {}).get(mode, {}).items():
        out[f"perplexity at {int(length):,}"] = found["ppl"]
        if "bits_per_byte" in found:
            out[f"bits per byte at {int(length):,}"] = found["bits_per_byte"]
    for row in results.get("copy", {}).get(mode, ()):
        out[f"copy at distance {row['distance']:,}"] = row["accuracy"]
    for row in results.get("mqar", {}).get(mode, ()):
        out[f"{row['pairs']} associations, gap {row['gap']:,}"] = row["accuracy"]
    cells = results.get("passkey", {}).get(mode, ())
    for context in sorted({cell["context"] for cell in cells}):
        some = [cell for cell in cells if cell["context"] == context]
        out[f"pass key in {context:,}, digits"] = fmean(cell["accuracy"] for cell in some)
        out[f"pass key in {context:,}, whole"] = fmean(cell["whole"] for cell in some)
    for part in ("tasks", "harness"):
        for name, scores in results.get(part, {}).get(mode, {}).items():
            kept = {k: v for k, v in scores.items() if k.startswith(("acc", "perplexity")) and "stderr" not in k}
            suffix = " (lm-eval)" if part == "harness" else ""
            out.update({f"{name} {metric}{suffix}": value for metric, value in kept.items()})
    return out


def _side_by_side(mine: dict[str, float], theirs: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "figure": name,
            "model": mine[name],
            "teacher": theirs[name],
            "difference": mine[name] - theirs[name],
            "ratio": mine[name] / theirs[name] if theirs[name] else None,
        }
        for name in mine
        if name in theirs
    ]
