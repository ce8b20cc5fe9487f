"""`srf-retrofit bench train` on a GPU: distilling a retrofitted model against plain fine-tuning of the softmax one.

    srf-retrofit bench train --device cuda --output train-gpu.json
    srf-retrofit bench train --device cuda --model smollm2

Whole optimizer steps, both sides with the same weights, tokens, optimizer (fused AdamW) and precision. Plain
fine-tuning uses the faster of PyTorch's exact attentions at each length and is measured with Transformers' own loss and
with a loss in chunks; the faster one is what the ratio is taken to. Distillation is what `distillation.distill` does:
the softmax teacher's forward, the student's forward and backward, the divergence of their logits in chunks. With
`--compile` every objective is also measured with compiled decoder layers (`training.compilation`; the cross-entropy of
a loss in chunks is compiled as well) in a CUDA graph (`training.graphs`), and like is compared with like.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..files import write_json
from ..modeling.configuration import SRFConfig
from ..modeling.ops import fold, srf_attention
from ..pretrained import load_model
from ..surgery import retrofit
from ..testing import random_feature_map
from ..timing import choose_device, on_gpu, reason, release, time_calls
from ..training.compilation import compiled_layers
from ..training.divergence import chunked_losses
from ..training.graphs import WARM_UP, GraphedSteps, causal_alone
from ..training.teacher import frozen_copy
from .decode_sides import MODELS, ModelShape, build_model
from .gates import GateError, check_attention
from .losses import chunked_cross_entropy
from .measurement import aligned, check_output, environment, figure, finish_text, positive_sizes
from .plot import Panel, plot_panels, short
from .rivals import exact_backend, exact_rival
from .roofline import Sizes, Work, measure_ceilings, softmax_work, srf_work

LENGTHS = (2048, 16384)
TOKENS = 32768
OBJECTIVES = {
    "plain": "softmax, fine-tuning, Transformers' loss",
    "plain_chunked": "softmax, fine-tuning, loss in chunks",
    "student": "retrofitted, fine-tuning, loss in chunks",
    "distill": "retrofitted, distilled from the softmax model",
}
_PLAIN = ("plain", "plain_chunked")
WAYS = {"eager": "", "compiled": ", compiled", "graph": ", compiled, CUDA graph"}


def train(
    *,
    model: str | ModelShape = "smollm2-135m",
    lengths: Sequence[int] = LENGTHS,
    tokens: int = TOKENS,
    config: SRFConfig | None = None,
    weights: str = "bfloat16",
    chunk_size: int = 4096,
    compile: bool = False,
    device: str | None = None,
    seconds: float = 2.0,
    seed: int = 0,
    output: str | Path | None = None,
    plot: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Tokens per second and peak memory of an optimizer step, by length and objective.

    Parameters
    ----------
    model : str or ModelShape
        A shape of `decode_sides.MODELS` with random weights, or anything that `pretrained.load_model` loads.
    lengths : sequence of int
    tokens : int
        Tokens of a step: rows of a length fill it, a longer row stands alone.
    config : SRFConfig, optional
    weights : {"bfloat16", "float32"}
        Of the model and its optimizer; float32 weights run under bf16 autocast. The same on both sides.
    chunk_size : int
        Positions whose logits exist at once, where the loss is taken in chunks.
    compile : bool
        Also measure every objective with compiled layers, on a GPU in a CUDA graph.
    device, seconds, seed, output, plot, quiet
        See `bench.attention.attention`.

    Returns
    -------
    dict
        `cells`: `milliseconds` a step, `tokens_per_second`, `peak_bytes` (of everything), `flops` and `share` of the
        measured products' ceiling, `loss`, `way` (of `WAYS`); or `missing`. `ratio`: by way and length, tokens per
        second of the distillation over the faster plain fine-tuning. `attention`: the exact backend used. `ceilings`,
        `gate`.

    Raises
    ------
    ValueError, RuntimeError
        As `bench.attention.attention`; also when a loss is not finite.
    """
    device = choose_device(device)
    lengths = positive_sizes("lengths", lengths)
    positive_sizes("tokens", (tokens,))
    positive_sizes("chunk_size", (chunk_size,))
    if lengths[0] < 2:
        raise ValueError(f"lengths must be at least 2, got {lengths[0]}: a token has to predict another")
    if weights not in ("bfloat16", "float32"):
        raise ValueError(f"weights must be bfloat16 or float32, got {weights!r}")
    check_output(output, plot)
    config = SRFConfig() if config is None else config
    bench = TrainBench(model, config, weights, chunk_size, device, seconds, seed)
    shape = bench.shape
    result: dict[str, Any] = {
        "benchmark": "train",
        "environment": environment(device),
        "seed": seed,
        "model": shape.name,
        "shape": asdict(shape),
        "weights": weights,
        "tokens": tokens,
        "chunk_size": chunk_size,
        "config": config.to_dict(),
        "gate": bench.gate(),
        "ceilings": bench.ceilings.to_dict(),
        "attention": {},
        "cells": [],
        "ratio": {},
    }
    ways = ["eager", "graph" if on_gpu(device) else "compiled"] if compile else ["eager"]
    with tqdm(total=len(lengths) * len(OBJECTIVES) * len(ways), desc="train", file=sys.stderr, leave=False) as bar:
        for length, way in itertools.product(lengths, ways):
            backend = bench.fastest_backend(length, tokens)
            result["attention"][length] = backend
            found = {}
            for objective in OBJECTIVES:
                found[objective] = bench.cell(objective, length, tokens, backend, way)
                bar.update()
            result["cells"] += found.values()
            speeds = {n: c["tokens_per_second"] for n, c in found.items() if "tokens_per_second" in c}
            plain = [speeds[name] for name in _PLAIN if name in speeds]
            if plain and "distill" in speeds:
                result["ratio"].setdefault(way, {})[length] = speeds["distill"] / max(plain)
            if output is not None:
                # A run that is cut off leaves what it has.
                write_json(Path(output), result | {"incomplete": True})
    if plot is not None:
        plot_result(result, plot)
    result = finish_text(result, render(result), output, quiet)
    failed = [c for c in result["cells"] if "missing" in c and c["objective"] not in _PLAIN]
    if failed:
        raise RuntimeError(f"{len(failed)} cell(s) of our own have no figure, the first: {failed[0]['missing']}")
    return result


class TrainBench:
    """What all cells share: a softmax model that every objective starts from."""

    def __init__(
        self,
        model: str | ModelShape,
        config: SRFConfig,
        weights: str,
        chunk_size: int,
        device: str,
        seconds: float,
        seed: int,
    ) -> None:
        self.config, self.chunk_size = config, chunk_size
        self.device, self.seconds, self.seed = device, seconds, seed
        self.autocast = weights == "float32" and on_gpu(device)
        dtype: torch.dtype = getattr(torch, weights)
        shape = MODELS.get(model) if isinstance(model, str) else model
        if shape is not None:
            self.base: Any = build_model(shape, device="cpu", dtype=dtype, seed=seed)
        else:
            self.base, _ = load_model(str(model), dtype)
            conf = self.base.config
            dim = getattr(conf, "head_dim", None) or conf.hidden_size // conf.num_attention_heads
            shape = ModelShape(
                str(model), conf.hidden_size, conf.intermediate_size, conf.num_hidden_layers,
                conf.num_attention_heads, conf.num_key_value_heads, dim, conf.vocab_size,
            )  # fmt: skip
        self.shape = shape
        self.parameters = sum(p.numel() for p in self.base.parameters())
        # What the attention sees.
        self.dtype = torch.bfloat16 if self.autocast else dtype
        small = {} if on_gpu(device) else {"copy_bytes": 1 << 20, "matmul_size": 128}
        self.ceilings = measure_ceilings(device, **small)
        release(device)

    def gate(self) -> dict[str, float]:
        """The attention as the student calls it, against the oracle."""
        s, config = self.shape, self.config
        maps = random_feature_map(s.kv_heads, config.num_features, s.head_dim, geometry="preconditioner")
        maps = maps.to(self.device)
        folded = fold(maps, self.dtype)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return srf_attention(q, k, v, folded, config)[0]

        return check_attention(
            attend, maps, config, heads=s.heads, kv_heads=s.kv_heads, head_dim=s.head_dim, dtype=self.dtype,
            device=self.device, seed=self.seed,
        )  # fmt: skip

    def sizes(self, length: int, tokens: int) -> Sizes:
        """Shape of one layer's attention."""
        s = self.shape
        return Sizes(max(tokens // length, 1), s.heads, s.kv_heads, s.head_dim, length, self.dtype.itemsize)

    def fastest_backend(self, length: int, tokens: int) -> str:
        """The exact attention that takes the least time forward and backward at this shape, with grouped heads."""
        if not on_gpu(self.device):
            return "default"
        sizes, s = self.sizes(length, tokens), self.shape
        # As a model hands them over: heads behind positions.
        drawn = [
            torch.randn(sizes.batch, length, n, s.head_dim, device=self.device).to(self.dtype).transpose(1, 2)
            for n in (s.heads, s.kv_heads, s.kv_heads, s.heads)
        ]
        times = {}
        for name in ("cudnn", "flash"):
            rival = exact_rival(name, s.heads, s.kv_heads, s.head_dim, self.device, self.dtype)
            if rival.note:  # the model hands grouped heads over
                continue

            def both(rival: Any = rival, tensors: Any = None) -> None:
                torch.autograd.grad(rival.function(*tensors), tensors, drawn[3])

            try:
                call = partial(both, tensors=rival.prepare(*drawn[:3]))
                times[name] = time_calls([call], self.device, seconds=0.1).median
            except RuntimeError:
                continue
        release(self.device)
        return min(times, key=lambda name: times[name]) if times else "default"

    def cell(self, objective: str, length: int, tokens: int, backend: str, way: str) -> dict[str, Any]:
        """One objective at one length."""
        entry: dict[str, Any] = {"objective": objective, "length": length, "batch": max(tokens // length, 1)}
        entry["way"] = way
        try:
            entry |= self._measure(objective, length, tokens, backend, way)
        except GateError:
            raise
        except RuntimeError as error:
            entry["missing"] = reason(error)
        release(self.device)
        return entry

    def _measure(self, objective: str, length: int, tokens: int, backend: str, way: str) -> dict[str, Any]:
        sizes = self.sizes(length, tokens)
        generator = torch.Generator().manual_seed(self.seed)
        batches = [
            torch.randint(3, self.shape.vocabulary, (sizes.batch, length), generator=generator).to(self.device)
            for _ in range(2)
        ]
        compiled = way != "eager"
        loss_of, student, models = self._objective(objective, compiled)
        # A step small enough that random weights stay finite however many are taken.
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0, fused=on_gpu(self.device))
        losses: list[torch.Tensor] = []
        kind = torch.device(self.device).type

        def gradients(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            alone = causal_alone(*models) if way == "graph" else contextlib.nullcontext()
            with alone, torch.autocast(kind, torch.bfloat16, enabled=self.autocast):
                return loss_of(inputs["ids"])

        steps = GraphedSteps(gradients, student) if way == "graph" else None

        def step(ids: torch.Tensor) -> None:
            with exact_backend(backend):
                if steps is None:
                    loss = gradients({"ids": ids})
                    loss.backward()
                else:
                    loss = steps({"ids": ids})
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())

        if compiled:
            torch.compiler.reset()
        with compiled_layers(*models) if compiled else contextlib.nullcontext():
            for _ in range(1 if steps is None else WARM_UP + 1):
                step(batches[0])  # compiles, records, and makes the optimizer's state
            if on_gpu(self.device):
                torch.cuda.reset_peak_memory_stats()
            timing = time_calls([partial(step, ids) for ids in batches], self.device, seconds=self.seconds, most=20)
        if not bool(torch.stack(losses).isfinite().all()):
            raise GateError(f"the loss of {OBJECTIVES[objective]} at L={length} is not finite")
        count = sizes.batch * length
        found = timing.to_dict() | {"tokens_per_second": count / timing.median, "loss": float(losses[-1])}
        work = self.work(objective, sizes)
        found |= {"flops": work.flops, "share": self.ceilings.least_seconds(work) / timing.median}
        if on_gpu(self.device):
            # What a graph works in is reserved for it, and counts as allocated only in part.
            graphed = way == "graph"
            found["peak_bytes"] = torch.cuda.max_memory_reserved() if graphed else torch.cuda.max_memory_allocated()
        return found

    def work(self, objective: str, sizes: Sizes) -> Work:
        """FLOPs that a step needs: 6 a weight and token, attention forward and backward; a teacher 2 and its forward.

        Heads that are computed again in chunks are not counted twice; memory traffic is not counted.
        """
        count = sizes.batch * sizes.length
        exact = partial(softmax_work, sizes)
        own = exact(backward=True) if objective in _PLAIN else srf_work(sizes, self.config, backward=True)
        flops = 6 * self.parameters * count + self.shape.layers * own.flops
        if objective == "distill":
            flops += 2 * self.parameters * count + self.shape.layers * exact(backward=False).flops
        return Work(flops, 0.0)

    def _objective(
        self, objective: str, compiled: bool
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], Any, list[Any]]:
        """The loss of a batch of tokens, the model it trains, and all that have layers to compile."""
        student = copy.deepcopy(self.base).to(self.device).train().requires_grad_(True)
        teacher: Any = None
        if objective not in _PLAIN:
            retrofit(student, self.config)
        if objective == "distill":
            teacher = frozen_copy(student)
        models = [each for each in (student, teacher) if each is not None]
        if objective == "plain":
            return lambda ids: student(input_ids=ids, labels=ids, use_cache=False).loss, student, models

        def hidden(model: Any, ids: torch.Tensor) -> torch.Tensor:
            states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            return states.reshape(-1, states.shape[-1])

        def loss(ids: torch.Tensor) -> torch.Tensor:
            labels = ids[:, 1:].reshape(-1)
            if teacher is None:
                return chunked_cross_entropy(hidden(student, ids), labels, student.lm_head, self.chunk_size, compiled)
            with torch.no_grad():
                known = hidden(teacher, ids)
            sums = chunked_losses(
                hidden(student, ids), known, labels, student.lm_head, teacher.lm_head, chunk_size=self.chunk_size,
                parameters=student.lm_head.parameters(),
            )  # fmt: skip
            return sums[0] / labels.numel()

        return loss, student, models


# -- reading a result ------------------------------------------------------------------------------------------------


def by_objective(result: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """Cells by what was measured, in words, and length."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in result["cells"]:
        name = OBJECTIVES[cell["objective"]] + WAYS[cell["way"]]
        found.setdefault(name, {})[cell["length"]] = cell
    return found


def render(result: dict[str, Any]) -> str:
    """One table in plain text, and the ratios."""
    rows = [["objective", "L", "ms a step", "tokens/s", "peak GiB", "TFLOP", "share of products' ceiling"]]
    for objective, cells in by_objective(result).items():
        for length, cell in sorted(cells.items()):
            figures = [cell.get("missing", ""), "", "", "", ""]
            if "milliseconds" in cell:
                peak = cell["peak_bytes"] / 2**30 if "peak_bytes" in cell else None
                figures = [figure(cell["milliseconds"]), figure(cell["tokens_per_second"]), figure(peak)]
                figures += [figure(cell["flops"] / 1e12), f"{100 * cell['share']:.0f} %"]
            rows.append([objective, short(length), *figures])
    parts = [f"{result['model']}, {result['tokens']:,} tokens a step, {result['weights']} weights\n{aligned(rows, 1)}"]
    parts += [
        f"L={short(int(n))}: distillation runs at {ratio:.2f} of the speed of the faster plain fine-tuning{WAYS[way]} "
        f"(exact attention: {result['attention'][n]})"
        for way, ratios in result["ratio"].items()
        for n, ratio in ratios.items()
    ]
    return "\n\n".join(parts)


def plot_result(result: dict[str, Any], path: str | Path) -> None:
    """Milliseconds a step against length, the same number of tokens at each."""
    panel = Panel(f"{result['model']}, {result['tokens']:,} tokens a step", "ms a step")
    for objective, cells in by_objective(result).items():
        points = [(float(n), c["milliseconds"]) for n, c in cells.items() if "milliseconds" in c]
        panel.lines[objective] = points
    panel.ours = tuple(name for name in panel.lines if name.startswith("retrofitted"))
    plot_panels([panel], path, result["environment"]["device"])
