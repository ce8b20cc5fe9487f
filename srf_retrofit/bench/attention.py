"""`srf-retrofit bench attention` on a GPU: training attention against the best exact one and other linear ones.

    srf-retrofit bench attention --device cuda --output attention-gpu.json
    srf-retrofit bench attention --device cuda --lengths 1024,8192 --rivals cudnn --budget 120

measures all there is to the tables: forward, and forward and backward, in bf16, the same number of tokens at each
length up to it and one row at each beyond, everything in one run, medians over CUDA events (`timing`), beside counted
FLOPs and bytes (`roofline`). Kernels are compiled first, on all cores (`warm`). No time is taken of a function that has
not agreed with the float64 oracle, outputs and gradients (`gates`). The file is rewritten after every length: a run
that is cut off leaves what it has, with `complete` false.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..files import write_json
from ..modeling.configuration import SRFConfig
from ..modeling.ops import fold, srf_attention
from ..testing import random_feature_map
from ..timing import Call, choose_device, on_gpu, peak_bytes, reason, release, time_calls
from .attention_report import OURS, PASSES, linearity, plot_result, render
from .gates import GATE_BATCH, GATE_LENGTH, check_attention
from .measurement import check_output, environment, finish_text, positive_sizes
from .rivals import Function, Rival, Tensors, exact_rival, leaves, linear_rivals, seed_rival
from .roofline import Ceilings, Sizes, measure_ceilings, srf_work, tensor_bytes
from .warm import Task, compile_ahead

Shape = tuple[int, int, int]
# Query heads, key/value heads, head dimension: a Llama of 8B parameters, and SmolLM2-135M.
SHAPES: tuple[Shape, ...] = ((32, 8, 128), (9, 3, 64))
# Rows that fill a batch of `TOKENS`, and single rows to see whether time and memory are linear.
LENGTHS = (1024, 2048, 4096, 8192, 32768, 131072, 1048576)
TOKENS = 65536
RIVALS = ("cudnn", "flash", "fla", "seed")
# Input sets rotate so that none lies in a cache; above this size one set is more than any cache holds.
_ROTATE_BELOW = 4 << 30
# A rival is left out where a call is expected to take so many times the time of a cell.
_TOO_SLOW = 10


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
    geometry: str
    backend: str
    seconds: float
    seed: int
    deadline: float
    ceilings: Ceilings | None = None


def attention(
    *,
    shapes: Sequence[Shape] = SHAPES,
    lengths: Sequence[int] = LENGTHS,
    tokens: int = TOKENS,
    variants: Mapping[str, SRFConfig] | None = None,
    rivals: Sequence[str] = RIVALS,
    backend: str = "triton",
    dtype: str = "bfloat16",
    device: str | None = None,
    geometry: str = "preconditioner",
    seconds: float = 0.3,
    budget: float | None = None,
    processes: int | None = None,
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
    budget : float, optional
        Seconds after which no further cell is begun, counted from the start of the run.
    processes : int, optional
        That compile kernels before anything else, see `warm.compile_ahead`.
    output, plot : path, optional
        JSON and PNG file to write. The JSON is written after each length, whole each time; the picture at the end.
    quiet : bool
        Print the JSON line alone.

    Returns
    -------
    dict
        `cells`, a list with one entry for each shape, length, pass and operator: `milliseconds` (median; `low` and
        `high`), `flops`, `bytes`, `bound` and `share` of the roofline, `peak_bytes` (on top of q, k, v and the gradient
        of the output) and `peak_ratio` (all of it over inputs, output and gradients), or `missing` with the reason;
        `linear`, see `attention_report.linearity`; `ceilings`, `warm`, `gate`, `notes`, `environment`, `complete`, and
        the `elapsed` seconds.

    Raises
    ------
    ValueError
        For what cannot be measured, before anything is.
    RuntimeError
        When a gate is red, or one of our own cells failed (after everything else has been written and printed).
    """
    start = time.monotonic()
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
    deadline = float("inf") if budget is None else start + budget
    run = Run(device, getattr(torch, dtype), geometry, backend, seconds, seed, deadline)
    configs = {shape: dict(variants_of(shape[2]) if variants is None else variants) for shape in shapes}
    result: dict[str, Any] = {
        "benchmark": "attention",
        "environment": environment(device),
        "seed": seed,
        "dtype": dtype,
        "tokens": tokens,
        "geometry": geometry,
        "backend": backend,
        "variants": {shape_name(s): {n: c.to_dict() for n, c in forms.items()} for s, forms in configs.items()},
        "complete": False,
        "gate": {},
        "notes": {},
        "cells": [],
        "linear": {},
    }

    def keep() -> None:
        result["elapsed"] = time.monotonic() - start
        result["linear"] = linearity(result)
        if output is not None:
            write_json(Path(output), result)

    result["warm"] = compile_ahead(_rehearsals(run, configs, lengths, tokens, rivals), device, processes)
    own = {
        shape: [_ours(name, config, shape, run) for name, config in forms.items()] for shape, forms in configs.items()
    }
    red: dict[tuple[Shape, str], str] = {}
    for shape, forms in configs.items():
        gates: dict[str, Any] = {}
        result["gate"][shape_name(shape)] = gates
        for mine, (name, config) in zip(own[shape], forms.items(), strict=True):
            try:
                gates[name] = check_attention(
                    mine.function, _maps(shape, config, run), config, heads=shape[0], kv_heads=shape[1],
                    head_dim=shape[2], dtype=run.dtype, device=device, seed=seed,
                )  # fmt: skip
            except (RuntimeError, ValueError) as error:
                # Nothing is timed behind a red gate; the others still are, and the run ends red.
                red[shape, name] = gates[name] = reason(error)
            release(device)
    keep()

    small = {} if on_gpu(device) else {"copy_bytes": 1 << 20, "matmul_size": 128}
    run.ceilings = measure_ceilings(device, **small)
    result["ceilings"] = run.ceilings.to_dict()
    others = {shape: _rivals(rivals, shape, run, result["notes"]) for shape in shapes}
    slow: dict[tuple[str, str, str], float] = {}
    with tqdm(total=len(shapes) * len(lengths), desc="attention", file=sys.stderr, leave=False) as bar:
        # Lengths outside: a run that is cut off has all shapes at the lengths that it has.
        for length, shape in itertools.product(lengths, shapes):
            reds = {name: why for (s, name), why in red.items() if s == shape}
            result["cells"] += _measure_length(run, shape, length, tokens, [*own[shape], *others[shape]], reds, slow)
            keep()
            bar.update()
    result["complete"] = True
    keep()
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


def _rehearsals(
    run: Run,
    configs: Mapping[Shape, Mapping[str, SRFConfig]],
    lengths: Sequence[int],
    tokens: int,
    rivals: Sequence[str],
) -> list[Task]:
    """Calls that come to every kernel of the run, on few tokens: what Triton compiles does not depend on the rest."""
    tasks: list[Task] = [
        partial(_rehearse_ours, name, config, shape, run)
        for shape, forms in configs.items()
        for name, config in forms.items()
    ]
    # The batch size is a constant of some kernels of flash-linear-attention.
    batches = dict.fromkeys(max(tokens // length, 1) for length in lengths)
    if "fla" in rivals:
        tasks += [partial(_rehearse_fla, shape, batch, run) for shape in configs for batch in batches]
    return tasks


def _rehearse_ours(name: str, config: SRFConfig, shape: Shape, run: Run) -> None:
    _rehearse(_ours(name, config, shape, run), shape, GATE_BATCH, GATE_LENGTH, run)


def _rehearse_fla(shape: Shape, batch: int, run: Run) -> None:
    try:
        found = linear_rivals(*shape, run.device, run.dtype)
    except ImportError:
        return
    for rival in found:
        _rehearse(rival, shape, batch, 64, run)


def _rehearse(operator: Rival, shape: Shape, batch: int, length: int, run: Run) -> None:
    q, k, v, do = _draw(run, Sizes(batch, *shape, length, run.dtype.itemsize), 0)
    tensors = operator.prepare(q, k, v)
    _call(operator.function, tensors, do.transpose(1, 2).contiguous() if operator.by_token else do, True)


def shape_name(shape: Shape) -> str:
    """(32, 8, 128) as `32/8,128`."""
    return f"{shape[0]}/{shape[1]},{shape[2]}"


def _maps(shape: Shape, config: SRFConfig, run: Run) -> Any:
    maps = random_feature_map(shape[1], config.num_features, shape[2], geometry=run.geometry, seed=config.seed)
    return maps.to(run.device)


def _ours(name: str, config: SRFConfig, shape: Shape, run: Run) -> Rival:
    """Our operator as a layer calls it: the feature map folded once, as `SRFFeatures` keeps it."""
    folded = fold(_maps(shape, config, run), run.dtype)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return srf_attention(q, k, v, folded, config, backend=run.backend)[0]

    preconditioned = run.geometry in ("preconditioner", "proposal")
    return Rival(
        name,
        OURS.get(name, name),
        attend,
        leaves,
        lambda sizes, backward: srf_work(sizes, config, backward=backward, geometry=preconditioned),
    )


def _rivals(names: Sequence[str], shape: Shape, run: Run, notes: dict[str, str]) -> list[Rival]:
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
    shape: Shape,
    length: int,
    tokens: int,
    operators: Sequence[Rival],
    red: Mapping[str, str],
    slow: dict[tuple[str, str, str], float],
) -> list[dict[str, Any]]:
    """All cells of one length. `slow` holds seconds per pair of tokens of the quadratic rivals' last cells."""
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
        missing = red.get(operator.name)
        if time.monotonic() > run.deadline:
            missing = "left out: the run's time was up"
        elif operator.longest is not None and length > operator.longest:
            missing = f"not measured beyond {operator.longest} tokens, its time grows with the square of the length"
        if missing is not None:
            for entry in entries:
                entry["missing"] = missing
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
    slow: dict[tuple[str, str, str], float],
    everything: float,
) -> None:
    backward = entry["pass"] == "forward_backward"
    pairs = sizes.batch * sizes.length**2
    key = (entry["shape"], operator.name, entry["pass"])
    expected = slow.get(key, 0.0) * pairs
    if expected > _TOO_SLOW * run.seconds:
        entry["missing"] = f"left out: about {expected:.0f} s a call"
        return
    calls: list[Call] = [partial(_call, operator.function, tensors, do, backward) for tensors, do in inputs]
    timing = time_calls(calls, run.device, seconds=run.seconds)
    entry |= timing.to_dict()
    if operator.quadratic:
        slow[key] = timing.median / pairs
    if operator.work is not None and run.ceilings is not None:
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
