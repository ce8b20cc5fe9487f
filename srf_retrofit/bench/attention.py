"""`srf-retrofit bench attention` on a GPU: training attention against the best exact one and other linear ones.

    srf-retrofit bench attention --device cuda --output attention-gpu.json
    srf-retrofit bench attention --device cuda --lengths 32768,131072,1048576 --rivals cudnn

measures all there is to the tables: forward, and forward and backward, in bf16, the same number of tokens at each
length, everything in one run, medians over CUDA events (`timing`), beside counted FLOPs and bytes (`roofline`). No time
is taken of a function that has not agreed with the float64 oracle first, outputs and gradients (`gates`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..modeling.configuration import SRFConfig
from ..modeling.ops import fold, srf_attention
from ..testing import random_feature_map
from ..timing import Call, choose_device, on_gpu, peak_bytes, reason, release, time_calls
from .gates import check_attention
from .measurement import aligned, check_output, environment, figure, finish_text, positive_sizes
from .plot import Panel, plot_panels, short
from .rivals import Function, Rival, Tensors, exact_rival, leaves, linear_rivals, seed_rival
from .roofline import Ceilings, Sizes, measure_ceilings, srf_work, tensor_bytes

# Query heads, key/value heads, head dimension: a Llama of 8B parameters, and SmolLM2-135M.
SHAPES: tuple[tuple[int, int, int], ...] = ((32, 8, 128), (9, 3, 64))
LENGTHS = (1024, 2048, 4096, 8192, 32768)
TOKENS = 65536
RIVALS = ("cudnn", "flash", "fla", "seed")
PASSES = ("forward", "forward_backward")
OURS = {"window": "ours, window", "retained": "ours, window + retained", "pure": "ours, pure"}
# Input sets rotate so that none lies in a cache; above this size one set is more than any cache holds.
_ROTATE_BELOW = 4 << 30


def variants_of(head_dim: int) -> dict[str, SRFConfig]:
    """The three forms measured, with as many features as dimensions: a window, with retained keys, and neither."""
    return {
        "window": SRFConfig(num_features=head_dim, window=64, sinks=4, retained=0),
        "retained": SRFConfig(num_features=head_dim, window=64, sinks=4, retained=64),
        "pure": SRFConfig(num_features=head_dim, window=0, sinks=0, retained=0),
    }


@dataclass
class Run:
    """What all cells of a run share."""

    device: str
    dtype: torch.dtype
    seconds: float
    seed: int
    ceilings: Ceilings


def attention(
    *,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    lengths: Sequence[int] = LENGTHS,
    tokens: int = TOKENS,
    variants: Mapping[str, SRFConfig] | None = None,
    rivals: Sequence[str] = RIVALS,
    backend: str = "triton",
    dtype: str = "bfloat16",
    device: str | None = None,
    geometry: str = "preconditioner",
    seconds: float = 0.3,
    seed: int = 0,
    output: str | Path | None = None,
    plot: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Time, work and memory of causal attention by shape, length, pass and operator.

    Parameters
    ----------
    shapes : sequence of (heads, kv_heads, head_dim)
    lengths : sequence of int
        Sequences of a length fill a batch of `tokens` tokens; a longer one stands alone.
    variants : mapping of names to SRFConfig, optional
        `variants_of(head_dim)` by default.
    rivals : sequence of {"cudnn", "flash", "default", "fla", "seed"}
    backend : {"triton", "torch", "auto"}
        Of `ops.srf_attention`: forced, so that no other is measured in its place.
    dtype : {"bfloat16", "float16", "float32"}
    device : str, optional
        CUDA where there is one.
    geometry : str
        Of the feature maps, see `calibration.calibrate`.
    seconds : float
        Time spent on a cell, its warm-up apart. Rivals whose call would take ten times as long are left out, with a
        note.
    output, plot : path, optional
        JSON and PNG file to write, whole or not at all.
    quiet : bool
        Print the JSON line alone.

    Returns
    -------
    dict
        `cells`, a list with one entry for each shape, length, pass and operator: `milliseconds` (median; `low` and
        `high`), `flops`, `bytes`, `bound` and `share` of the roofline, `peak_bytes` (on top of q, k, v and the gradient
        of the output) and `peak_ratio` (all of it over inputs, output and gradients), or `missing` with the reason;
        `ceilings`, `gate`, `notes`, `environment`.

    Raises
    ------
    ValueError
        For what cannot be measured, before anything is.
    RuntimeError
        When the gate is red, or one of our own cells failed (after everything else has been written and printed).
    """
    device = choose_device(device)
    lengths = positive_sizes("lengths", lengths)
    positive_sizes("tokens", (tokens,))
    unknown = set(rivals) - {*RIVALS, "default"}
    if unknown:
        raise ValueError(f"rivals are cudnn, flash, default, fla and seed, got {sorted(unknown)}")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype must be bfloat16, float16 or float32, got {dtype!r}")
    for heads, kv_heads, head_dim in shapes:
        if min(heads, kv_heads, head_dim) < 1 or heads % kv_heads:
            raise ValueError(f"a shape is heads/kv_heads,head_dim with whole groups, got {heads}/{kv_heads},{head_dim}")
    check_output(output, plot)
    kind: torch.dtype = getattr(torch, dtype)

    result: dict[str, Any] = {
        "benchmark": "attention",
        "environment": environment(device),
        "seed": seed,
        "dtype": dtype,
        "tokens": tokens,
        "geometry": geometry,
        "backend": backend,
        "gate": {},
        "variants": {},
        "notes": {},
        "cells": [],
    }
    own: dict[tuple[int, int, int], list[Rival]] = {}
    for shape in shapes:
        configs = variants_of(shape[2]) if variants is None else variants
        result["variants"][shape_name(shape)] = {name: config.to_dict() for name, config in configs.items()}
        own[shape] = [_ours(name, config, shape, geometry, backend, device) for name, config in configs.items()]
        result["gate"][shape_name(shape)] = {
            name: check_attention(
                mine.function, _maps(shape, config, geometry, device), config, heads=shape[0], kv_heads=shape[1],
                head_dim=shape[2], dtype=kind, device=device, seed=seed,
            )
            for mine, (name, config) in zip(own[shape], configs.items(), strict=True)
        }  # fmt: skip
    release(device)

    small = {} if on_gpu(device) else {"copy_bytes": 1 << 20, "matmul_size": 128}
    run = Run(device, kind, seconds, seed, measure_ceilings(device, **small))
    result["ceilings"] = run.ceilings.to_dict()
    with tqdm(total=len(shapes) * len(lengths), desc="attention", file=sys.stderr, leave=False) as bar:
        for shape in shapes:
            others = _rivals(rivals, shape, run, result["notes"])
            slow: dict[tuple[str, str], float] = {}
            for length in lengths:
                result["cells"] += _measure_length(run, shape, length, tokens, [*own[shape], *others], slow)
                bar.update()
    text = render(result)
    if plot is not None:
        plot_result(result, plot)
    result = finish_text(result, text, output, quiet)
    failed = [c for c in result["cells"] if "missing" in c and c["operator"] in OURS]
    if failed:
        first = failed[0]
        raise RuntimeError(
            f"{len(failed)} cell(s) of our own have no figure, the first is {first['operator']} at "
            f"L={first['length']}: {first['missing']}"
        )
    return result


def shape_name(shape: tuple[int, int, int]) -> str:
    """(32, 8, 128) as `32/8,128`."""
    return f"{shape[0]}/{shape[1]},{shape[2]}"


def _maps(shape: tuple[int, int, int], config: SRFConfig, geometry: str, device: str) -> Any:
    maps = random_feature_map(shape[1], config.num_features, shape[2], geometry=geometry, seed=config.seed)
    return maps.to(device)


def _ours(name: str, config: SRFConfig, shape: tuple[int, int, int], geometry: str, backend: str, device: str) -> Rival:
    """Our operator as a layer calls it: the feature map folded once, as `SRFFeatures` keeps it."""
    folded = fold(_maps(shape, config, geometry, device))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return srf_attention(q, k, v, folded, config, backend=backend)[0]

    preconditioned = geometry in ("preconditioner", "proposal")
    return Rival(
        name,
        OURS.get(name, name),
        attend,
        leaves,
        lambda sizes, backward: srf_work(sizes, config, backward=backward, geometry=preconditioned),
    )


def _rivals(names: Sequence[str], shape: tuple[int, int, int], run: Run, notes: dict[str, str]) -> list[Rival]:
    found: list[Rival] = []
    for name in names:
        try:
            if name == "fla":
                found += linear_rivals(*shape, run.device, run.dtype)
            elif name == "seed":
                found.append(seed_rival(*shape, run.device))
            else:
                found.append(exact_rival(name, *shape, run.device, run.dtype))
        except (ImportError, AttributeError) as error:
            notes[name] = f"not measured: {reason(error)}"
    notes.update({f"{shape_name(shape)} {rival.name}": rival.note for rival in found if rival.note})
    return found


def _measure_length(
    run: Run,
    shape: tuple[int, int, int],
    length: int,
    tokens: int,
    operators: Sequence[Rival],
    slow: dict[tuple[str, str], float],
) -> list[dict[str, Any]]:
    """All cells of one length. `slow` holds seconds per pair of tokens of the exact rivals' last cells."""
    sizes = Sizes(max(tokens // length, 1), *shape, length, run.dtype.itemsize)
    everything = tensor_bytes(sizes)
    sets = 2 if everything < _ROTATE_BELOW else 1
    drawn = [_draw(run, sizes, stream) for stream in range(sets)]
    cells: list[dict[str, Any]] = []
    for operator in operators:
        cell: dict[str, Any] = {
            "shape": shape_name(shape), "length": length, "batch": sizes.batch, "operator": operator.name,
        }  # fmt: skip
        entries = [cell | {"pass": name} for name in PASSES]
        cells += entries
        if operator.longest is not None and length > operator.longest:
            for entry in entries:
                entry["missing"] = f"not measured beyond {operator.longest} tokens"
            continue
        try:
            inputs = [
                (operator.prepare(q, k, v), do.transpose(1, 2).contiguous() if operator.by_token else do)
                for q, k, v, do in drawn
            ]
            for entry in entries:
                _measure_cell(run, sizes, operator, inputs, entry, slow, everything)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            for entry in entries:
                if "milliseconds" not in entry:
                    entry["missing"] = reason(error)
        inputs = []
        release(run.device)
    return cells


def _measure_cell(
    run: Run,
    sizes: Sizes,
    operator: Rival,
    inputs: Sequence[tuple[Tensors, torch.Tensor]],
    entry: dict[str, Any],
    slow: dict[tuple[str, str], float],
    everything: float,
) -> None:
    backward = entry["pass"] == "forward_backward"
    pairs = sizes.batch * sizes.length**2
    key = (operator.name, entry["pass"])
    expected = slow.get(key, 0.0) * pairs
    if operator.name not in OURS and expected > 10 * run.seconds:
        entry["missing"] = f"left out: about {expected:.0f} s a call"
        return
    calls: list[Call] = [partial(_call, operator.function, tensors, do, backward) for tensors, do in inputs]
    timing = time_calls(calls, run.device, seconds=run.seconds)
    entry |= timing.to_dict()
    if operator.name in ("cudnn", "flash", "default"):
        slow[key] = timing.median / pairs
    if operator.work is not None:
        entry |= run.ceilings.judge(operator.work(sizes, backward), timing.median)
    if backward:
        peak = peak_bytes(calls[0], run.device)
        if peak is not None:
            tensors, do = inputs[0]
            held = sum(x.numel() * x.element_size() for x in (*tensors, do))
            entry |= {"peak_bytes": peak, "peak_ratio": (peak + held) / everything}


def _call(function: Function, tensors: Tensors, do: torch.Tensor, backward: bool) -> Any:
    with torch.set_grad_enabled(backward):
        o = function(*tensors)
    if not backward:
        return o
    return o, torch.autograd.grad(o, tensors, do)


def _draw(run: Run, sizes: Sizes, stream: int) -> tuple[torch.Tensor, ...]:
    """Fresh normal q, k, v and gradient of the output, drawn on the device: too many for the CPU's generator."""
    generator = torch.Generator(device=run.device).manual_seed(run.seed * 7919 + stream)

    def draw(heads: int) -> torch.Tensor:
        shape = (sizes.batch, heads, sizes.length, sizes.head_dim)
        return torch.empty(shape, dtype=run.dtype, device=run.device).normal_(generator=generator)

    return draw(sizes.heads), draw(sizes.kv_heads), draw(sizes.kv_heads), draw(sizes.heads)


# -- reading a result ------------------------------------------------------------------------------------------------


def by_operator(result: dict[str, Any], shape: str, name: str) -> dict[str, dict[int, dict[str, Any]]]:
    """Cells of a shape and pass, by operator and length."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in result["cells"]:
        if cell["shape"] == shape and cell["pass"] == name:
            found.setdefault(cell["operator"], {})[cell["length"]] = cell
    return found


def title(operator: str) -> str:
    """An operator's name in tables and pictures."""
    others = {"cudnn": "cuDNN attention", "flash": "flash attention", "default": "SDPA", "seed": "seed's operator"}
    others |= {"fla": "fla, bare kernel", "fla_maps": "fla, Hedgehog maps"}
    return {**OURS, **others}.get(operator, operator)


def render(result: dict[str, Any]) -> str:
    """Tables in plain text: milliseconds with the share of the roofline, then the roofline and the memory in full."""
    parts = []
    for shape in dict.fromkeys(cell["shape"] for cell in result["cells"]):
        for name in PASSES:
            cells = by_operator(result, shape, name)
            lengths = sorted({n for x in cells.values() for n in x})
            rows = [["ms (share of roofline)", *map(short, lengths)]]
            rows += [[title(op), *(_time(x.get(n)) for n in lengths)] for op, x in cells.items()]
            parts.append(f"heads/kv heads, dimension {shape}: {name.replace('_', ' + ')}\n{aligned(rows, 1)}")
        rows = [["forward + backward", "L", "ms", "TFLOP", "GB", "bound", "share of roofline", "peak / tensors"]]
        for op, x in by_operator(result, shape, "forward_backward").items():
            rows += [[title(op), short(n), *_work(x[n])] for n in sorted(x) if "milliseconds" in x[n]]
        parts.append(f"heads/kv heads, dimension {shape}: roofline and memory\n{aligned(rows, 1)}")
    ceilings = result["ceilings"]
    parts.append(
        f"ceilings of this run: copy {ceilings['copy_bytes_per_second'] / 1e12:.2f} TB/s, bf16 products "
        f"{ceilings['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s"
    )
    remarks = dict(result["notes"])
    for cell in result["cells"]:
        if "missing" in cell:
            remarks[f"{title(cell['operator'])}, {cell['shape']}, L={short(cell['length'])}"] = cell["missing"]
    parts.append("\n".join(f"{name}: {why}" for name, why in remarks.items()))
    return "\n\n".join(parts)


def _time(cell: dict[str, Any] | None) -> str:
    if cell is None or "milliseconds" not in cell:
        return "-"
    return figure(cell["milliseconds"]) + (f" ({100 * cell['share']:.0f}%)" if "share" in cell else "")


def _work(cell: dict[str, Any]) -> list[str]:
    counted = (
        [figure(cell["flops"] / 1e12), figure(cell["bytes"] / 1e9), cell["bound"], f"{100 * cell['share']:.0f} %"]
        if "share" in cell
        else ["", "", "", ""]
    )
    return [figure(cell["milliseconds"]), *counted, figure(cell.get("peak_ratio"))]


def plot_result(result: dict[str, Any], path: str | Path) -> None:
    """Forward and backward time against length, one panel a shape, both axes logarithmic."""
    panels = []
    for shape in dict.fromkeys(cell["shape"] for cell in result["cells"]):
        heads, _, dimension = shape.partition(",")
        panel = Panel(f"{heads} heads, dimension {dimension}", "forward + backward, ms", ours=tuple(OURS.values()))
        for op, x in by_operator(result, shape, "forward_backward").items():
            # The same number of tokens everywhere, so that a line that rises costs more for each of them.
            points = [(float(n), c["milliseconds"]) for n, c in x.items() if "milliseconds" in c]
            panel.lines[title(op)] = points
        panels.append(panel)
    plot_panels(panels, path, f"{result['tokens']:,} tokens, {result['dtype']}, {result['environment']['device']}")
