"""`srf-retrofit bench decode` on a GPU: the attention step alone, and whole models beside the best exact decoding.

    srf-retrofit bench decode --device cuda --output decode-gpu.json
    srf-retrofit bench decode --device cuda --models llama-3.2-1b --batches 32 --lengths 32768 --no-compile

Everything is replayed from CUDA graphs, on both sides: an eager step of a model with a billion parameters waits for
Python, at any context. Contexts are set by filling states and caches with random values at that position. Each part has
its gate: the step against `recurrent.attend_token`, the graphs against eager tokens (`gates`, `decode_sides`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..files import write_json
from ..modeling.configuration import SRFConfig
from ..modeling.ops import fold
from ..modeling.recurrent import attend_token
from ..modeling.state import SRFState
from ..testing import random_feature_map
from ..timing import captured, choose_device, on_gpu, release, time_calls
from .decode_compiled import check_compiled
from .decode_models import SIDES, ModelBench
from .decode_sides import MODELS, ModelShape, check_graphs, fill_state_
from .gates import check_step
from .measurement import aligned, check_output, environment, figure, finish_text, positive_sizes
from .plot import Panel, plot_panels, short
from .roofline import Ceilings, measure_ceilings

CONTEXTS = (1024, 8192, 32768, 131072)
BATCHES = (1, 32, 256)
CONFIG = SRFConfig(num_features=64, window=32, sinks=4, retained=64)
RIVALS = ("exact", "dynamic", "static")


def decode(
    *,
    models: Sequence[str | ModelShape] = tuple(MODELS),
    contexts: Sequence[int] = CONTEXTS,
    batches: Sequence[int] = BATCHES,
    config: SRFConfig = CONFIG,
    rivals: Sequence[str] = RIVALS,
    compile: bool | None = None,
    largest: bool | None = None,
    device: str | None = None,
    dtype: str = "bfloat16",
    seconds: float = 0.2,
    seed: int = 0,
    output: str | Path | None = None,
    plot: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Time of a decoding step: of the attention alone, and of whole models with random weights.

    Parameters
    ----------
    models : sequence of names in `decode_sides.MODELS`, or ModelShape
        The first one's heads are those of the attention step.
    contexts, batches : sequence of int
        The largest context is also measured at the largest batch that the exact side fits.
    config : SRFConfig
    rivals : sequence of {"exact", "dynamic", "static"}
        The best exact side, and Transformers' two caches.
    compile : bool, optional
        Also measure both sides compiled, see `decode_compiled`; by default on a GPU.
    largest : bool, optional
        Also run our side at 90 % of the largest batch computed for a context of 32k; by default on a GPU.
    device, dtype, seconds, seed, output, plot, quiet
        See `bench.attention.attention`. `output` is also written after every cell, with `complete` false.

    Returns
    -------
    dict
        `step`: cells of the attention step (`microseconds`, `bytes`, `share` of the measured copy bandwidth).
        `model`: cells by model, side, batch and context (`milliseconds` a token, `tokens_per_second`, `bytes`,
        `share`), or `missing` with the reason. `state`: bytes of a sequence, and what they are worth in tokens of a
        key/value cache. `max_batch`: what fits at 32k, with every term of the computation. `ceilings`, `gate`.

    Raises
    ------
    ValueError, RuntimeError
        As `bench.attention.attention`.
    """
    device = choose_device(device)
    contexts, batches = positive_sizes("contexts", contexts), positive_sizes("batches", batches)
    if contexts[0] < 2:
        raise ValueError(f"contexts must be at least 2 tokens, got {contexts[0]}")
    unknown = [m for m in models if isinstance(m, str) and m not in MODELS]
    if unknown or not models:
        raise ValueError(f"models are {' and '.join(MODELS)}, got {unknown or 'none'}")
    if set(rivals) - set(RIVALS):
        raise ValueError(f"rivals are {', '.join(RIVALS)}, got {sorted(set(rivals) - set(RIVALS))}")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype!r}")
    check_output(output, plot)
    shapes = [MODELS[m] if isinstance(m, str) else m for m in models]
    kind: torch.dtype = getattr(torch, dtype)
    step, count_bytes = _step_of(device)
    first = shapes[0]
    heads = {"heads": first.heads, "kv_heads": first.kv_heads, "head_dim": first.head_dim}
    maps = random_feature_map(first.kv_heads, config.num_features, first.head_dim, geometry="preconditioner").to(device)
    gate: dict[str, Any] = {"step": check_step(step, maps, config, dtype=kind, device=device, seed=seed, **heads)}
    gate |= check_graphs(config, device=device, dtype=kind, seed=seed)
    compile, largest = (on_gpu(device) if flag is None else flag for flag in (compile, largest))
    sides = ["ours", *rivals]
    if compile:
        gate["compiled"] = check_compiled(config, device=device, dtype=kind, seed=seed)
        sides += [f"{side}_compiled" for side in ("ours", "exact") if side in sides]
    release(device)

    small = {} if on_gpu(device) else {"copy_bytes": 1 << 20, "matmul_size": 128}
    ceilings = measure_ceilings(device, **small)
    result: dict[str, Any] = {
        "benchmark": "decode",
        "environment": environment(device),
        "seed": seed,
        "dtype": dtype,
        "config": config.to_dict(),
        "ceilings": ceilings.to_dict(),
        "gate": gate,
        "shapes": {shape.name: asdict(shape) for shape in shapes},
        "step": [],
        "model": [],
        "state": {},
        "max_batch": {},
        "complete": False,
    }

    def save() -> None:
        if output is not None:
            write_json(Path(output), result)

    for batch in batches:
        cell = _measure_step(step, count_bytes, first, batch, maps, config, ceilings, device, kind, seconds)
        result["step"].append(cell)
        save()
        release(device)
    for shape in shapes:
        bench = ModelBench(shape, config, ceilings, count_bytes, device, kind, seconds, seed)
        bench.run(contexts, batches, sides, largest, result, save)
        del bench
        release(device)
    result["complete"] = True
    if plot is not None:
        plot_result(result, plot)
    result = finish_text(result, render(result), output, quiet)
    failed = [c for c in result["model"] if c["side"].startswith("ours") and "missing" in c]
    if failed:
        raise RuntimeError(f"{len(failed)} cell(s) of our own have no figure, the first: {failed[0]['missing']}")
    return result


# -- the attention step ----------------------------------------------------------------------------------------------


def _step_of(device: str) -> tuple[Callable[..., torch.Tensor], Callable[..., int]]:
    """The fused step and its count of bytes; on another device than a GPU the PyTorch step and the whole state."""
    if on_gpu(device):
        from ..modeling.triton_decode import decode_bytes, decode_step_

        return decode_step_, decode_bytes

    def step(q: Any, k: Any, v: Any, active: Any, state: SRFState, maps: Any, config: SRFConfig, scaling: float) -> Any:
        o, new = attend_token(q, k, v, active, state, maps, config, scaling)
        state.copy_(new)
        return o.to(q.dtype)

    def count(config: SRFConfig, batch: int, kv_heads: int, heads: int, head_dim: int, dtype: torch.dtype) -> int:
        state = SRFState.empty(config, batch, kv_heads, head_dim, dtype=dtype, device="meta")
        return state.nbytes() + 2 * batch * (heads + kv_heads) * head_dim * dtype.itemsize

    return step, count


def _measure_step(
    step: Callable[..., torch.Tensor],
    count_bytes: Callable[..., int],
    shape: ModelShape,
    batch: int,
    maps: Any,
    config: SRFConfig,
    ceilings: Ceilings,
    device: str,
    dtype: torch.dtype,
    seconds: float,
) -> dict[str, Any]:
    """One step of attention, averaged over a model's layers and over a whole block, so that folds count in full."""
    states = [
        SRFState.empty(config, batch, shape.kv_heads, shape.head_dim, dtype=dtype, device=device)
        for _ in range(shape.layers)
    ]
    for state in states:  # rows of different lengths
        fill_state_(state, 4096 + 5 * torch.arange(batch, device=device))
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (torch.randn(batch, n, 1, shape.head_dim, device=device).to(dtype) for n in heads)
    folded, scaling, block = fold(maps, dtype), shape.head_dim**-0.5, max(config.window, 1)

    def run() -> None:
        with torch.no_grad():
            for _ in range(block):
                for state in states:
                    step(q, k, v, None, state, folded, config, scaling)

    timing = time_calls([captured(run, device, warmup=1)], device, seconds=seconds, per_call=block * shape.layers)
    moved = count_bytes(config, batch, shape.kv_heads, shape.heads, shape.head_dim, dtype)
    return {
        "batch": batch,
        "microseconds": 1e6 * timing.median,
        "low": 1e6 * timing.low,
        "high": 1e6 * timing.high,
        "bytes": moved,
        "share": moved / ceilings.copy_bytes_per_second / timing.median,
    }


# -- reading a result ------------------------------------------------------------------------------------------------


def by_side(result: dict[str, Any], model: str, batch: int) -> dict[str, dict[int, dict[str, Any]]]:
    """Cells of a model and batch size, by side and context."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in result["model"]:
        if (cell["model"], cell["batch"]) == (model, batch):
            found.setdefault(cell["side"], {})[cell["context"]] = cell
    return found


def batches_of(result: dict[str, Any], model: str) -> list[int]:
    """Batch sizes that a model was measured at."""
    return sorted({cell["batch"] for cell in result["model"] if cell["model"] == model})


def render(result: dict[str, Any]) -> str:
    """Tables in plain text: the step, each model, its state and its largest batch."""
    rows = [["attention step: batch", "us", "MB", "share of copy bandwidth"]]
    rows += [
        [f"{c['batch']}", figure(c["microseconds"]), figure(c["bytes"] / 1e6), f"{100 * c['share']:.0f} %"]
        for c in result["step"]
    ]
    parts, remarks = [aligned(rows, 1)], []
    for model, state in result["state"].items():
        for batch in batches_of(result, model):
            cells = by_side(result, model, batch)
            contexts = sorted({n for x in cells.values() for n in x})
            rows = [["ms a token (share of roofline)", *map(short, contexts)]]
            rows += [[SIDES[side], *(_time(x.get(n)) for n in contexts)] for side, x in cells.items()]
            rows += [
                [f"tokens/s, {SIDES[side]}", *(figure(x.get(n, {}).get("tokens_per_second")) for n in contexts)]
                for side, x in cells.items()
                if side.startswith(("ours", "exact"))
            ]
            parts.append(f"{model}, batch {batch}\n{aligned(rows, 1)}")
            for side, x in cells.items():
                remarks += [
                    f"{model}, batch {batch}, {short(n)}, {SIDES[side]}: {c['missing']}"
                    for n, c in x.items()
                    if "missing" in c
                ]
        most = result["max_batch"][model]
        parts.append(
            f"{model}: state of a sequence {state['bytes'] / 2**20:.2f} MiB, worth {state['kv_tokens']:.0f} tokens of "
            f"keys and values\n"
            f"largest batch at {short(most['context'])}: (total {most['total']:,} - weights {most['weights']:,} - "
            f"reserve {most['reserve']:,}) / row: exact {most['exact']:,} rows of {most['row_exact']:,} bytes, ours "
            f"{most['ours']:,} of {most['row_ours']:,}"
        )
    ceilings = result["ceilings"]
    parts.append(f"copy {ceilings['copy_bytes_per_second'] / 1e12:.2f} TB/s in this run")
    return "\n\n".join([*parts, *(["\n".join(remarks)] if remarks else [])])


def _time(cell: dict[str, Any] | None) -> str:
    if cell is None or "milliseconds" not in cell:
        return "-"
    return f"{figure(cell['milliseconds'])} ({100 * cell['share']:.0f}%)"


def plot_result(result: dict[str, Any], path: str | Path) -> None:
    """Milliseconds a token against context, one panel a model, ours and the best exact side at each batch size."""
    panels = []
    for model in result["state"]:
        panel = Panel(model, "ms a token", xlabel="context (tokens)")
        for batch in batches_of(result, model):
            sides = by_side(result, model, batch)
            for side, x in sides.items():
                points = [(float(n), c["milliseconds"]) for n, c in x.items() if "milliseconds" in c]
                # The compiled sides where they were measured: what both can do at best.
                best = {f"{name}_compiled" if f"{name}_compiled" in sides else name for name in ("ours", "exact")}
                if side not in best or len(points) < 2:
                    continue
                panel.lines[f"{side.removesuffix('_compiled')}, batch {batch}"] = points
        panel.ours = tuple(name for name in panel.lines if name.startswith("ours"))
        panels.append(panel)
    plot_panels(panels, path, f"{result['environment']['device']}, {result['dtype']}, CUDA graphs on both sides")
