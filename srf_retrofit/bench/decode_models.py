"""Whole models decoding, retrofitted and exact: the cells of `bench decode` that a model is built for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..modeling.configuration import SRFConfig
from ..modeling.state import SRFState
from ..surgery import retrofit, revert
from ..timing import Call, captured, on_gpu, reason, release, time_calls
from .decode_compiled import CompiledGreedy
from .decode_sides import (
    Greedy,
    ModelShape,
    build_model,
    exact_cache,
    fastest_exact,
    move_to_,
    srf_cache,
    stock_cache,
    use_exact,
)
from .roofline import Ceilings, Work

# In this order: what may spoil a process, a capture of code that was not written for it, comes last.
SIDES = {
    "ours": "ours, CUDA graph",
    "exact": "exact, fastest attention, CUDA graph",
    "ours_compiled": "ours, compiled, CUDA graph",
    "exact_compiled": "exact, compiled, CUDA graph",
    "dynamic": "Transformers, DynamicCache, eager",
    "static": "Transformers, StaticCache, CUDA graph",
}
MAX_BATCH_CONTEXT = 32768
# Transformers' own caches are measured up to this batch, at the shortest context and at `MAX_BATCH_CONTEXT`.
STOCK = ("dynamic", "static")
STOCK_BATCH = 32
# Share of the free memory that a cache may take, and bytes left for everything else in the computed largest batch.
_FIT = 0.92
_RESERVE = 2 << 30
# Graphs of larger batches are replayed for a few steps only.
_WHOLE_BLOCKS_UP_TO = 1024


class ModelBench:
    """All cells of one model. Its two sides are one random model, retrofitted and reverted."""

    def __init__(
        self,
        shape: ModelShape,
        config: SRFConfig,
        ceilings: Ceilings,
        count_bytes: Callable[..., int],
        device: str,
        dtype: torch.dtype,
        seconds: float,
        seed: int,
    ) -> None:
        self.shape, self.config, self.ceilings, self.count_bytes = shape, config, ceilings, count_bytes
        self.device, self.dtype, self.seconds = device, dtype, seconds
        self.model: Any = build_model(shape, device=device, dtype=dtype, seed=seed)
        self.weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.kv_bytes = shape.kv_bytes_per_token(dtype.itemsize)
        state = SRFState.empty(config, 1, shape.kv_heads, shape.head_dim, dtype=dtype, device="meta")
        self.state_bytes = shape.layers * state.nbytes()
        self.fastest: dict[tuple[int, int], tuple[str, bool]] = {}
        self.compiled_for: tuple[str, int] | None = None

    def run(
        self,
        contexts: Sequence[int],
        batches: Sequence[int],
        sides: Sequence[str],
        largest: bool,
        result: dict[str, Any],
        save: Call = lambda: None,
    ) -> None:
        """Measure `sides`, and put the cells into `result`; `save` is called whenever there is another one."""
        name = self.shape.name
        result["state"][name] = {
            "bytes": self.state_bytes,
            "kv_bytes_per_token": self.kv_bytes,
            "kv_tokens": self.state_bytes / self.kv_bytes,
        }
        most = result["max_batch"][name] = self.max_batch(MAX_BATCH_CONTEXT)
        grid = [(b, n) for b in batches for n in contexts]
        if on_gpu(self.device):
            fits = int(_FIT * self.free() / (contexts[-1] * self.kv_bytes))
            if fits > 1 and fits not in batches:
                grid.append((fits, contexts[-1]))
        cells = {side: [c for c in grid if self.wanted(side, *c, contexts)] for side in SIDES if side in sides}
        if largest and "ours" in cells:
            cells["ours"] = [*grid, (int(0.9 * most["ours"]), MAX_BATCH_CONTEXT)]
        with tqdm(total=sum(map(len, cells.values())), desc=name, file=sys.stderr, leave=False) as bar:

            def record(cell: dict[str, Any]) -> None:
                result["model"].append(cell)
                save()
                bar.update()

            for side, asked in cells.items():
                if side.startswith("ours"):
                    retrofit(self.model, self.config)
                    self.ours(side, asked, record)
                    revert(self.model)
                else:
                    for batch, context in asked:
                        record(self.guarded(side, batch, context, self.exact))
                self.model.set_attn_implementation("sdpa")

    def wanted(self, side: str, batch: int, context: int, contexts: Sequence[int]) -> bool:
        """Whether a cell is measured."""
        few = batch <= STOCK_BATCH and context in (contexts[0], MAX_BATCH_CONTEXT)
        return side not in STOCK or few

    def ours(self, side: str, grid: Sequence[tuple[int, int]], record: Callable[[dict[str, Any]], None]) -> None:
        """Our side: one graph a batch size serves every context, for the state has one size."""
        for batch in dict.fromkeys(b for b, _ in grid):
            kept: dict[str, Any] = {}

            def measure(batch: int, context: int, side: str, kept: dict[str, Any] = kept) -> dict[str, Any]:
                if "replay" not in kept:
                    cache = srf_cache(self.model, batch, context, self.device)
                    kept["cache"], kept["replay"] = cache, self.step(side, cache, batch)
                move_to_(kept["cache"], context)
                # Whole blocks, so that the folds of one sequence count in full.
                block = max(self.config.window, 1) if batch <= _WHOLE_BLOCKS_UP_TO else 4
                s = self.shape
                moved = s.layers * self.count_bytes(self.config, batch, s.kv_heads, s.heads, s.head_dim, self.dtype)
                return self.timed(kept["replay"], block, batch, self.work(batch, moved, ours=True))

            for context in (n for b, n in grid if b == batch):
                record(self.guarded(side, batch, context, measure))
            kept.clear()
            release(self.device)

    def exact(self, batch: int, context: int, side: str) -> dict[str, Any]:
        """A side that keeps keys and values."""
        need = batch * context * self.kv_bytes
        if side == "dynamic":  # it copies a layer to append to it
            need += 2 * need // self.shape.layers
        if on_gpu(self.device) and need > _FIT * self.free():
            return {"missing": f"does not fit: {need / 2**30:.1f} GiB of cache, {self.free() / 2**30:.1f} GiB free"}
        found: dict[str, Any] = {}
        before = None
        if side in STOCK:
            cache, before = stock_cache(self.model, side, self.shape, batch, context, self.device)
            self.model.set_attn_implementation("sdpa")
        else:
            cache = exact_cache(self.shape, batch, context, self.device, self.dtype)
            if (batch, context) not in self.fastest:  # the compiled side takes the same
                self.fastest[batch, context] = fastest_exact(self.shape, cache, batch, self.device)
            backend, packed = self.fastest[batch, context]
            use_exact(self.model, backend, packed)
            found["attention"] = backend + (", packed groups" if packed else "")
        step = self.step(side, cache, batch, before)
        work = self.work(batch, batch * context * self.kv_bytes, context=context)
        return found | self.timed(step, 2 if side == "dynamic" else 8, batch, work)

    def guarded(self, side: str, batch: int, context: int, measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """A cell, with the reason in place of its figures when there are none."""
        cell: dict[str, Any] = {"model": self.shape.name, "side": side, "batch": batch, "context": context}
        try:
            cell |= measure(batch, context, side=side)
        except (RuntimeError, ValueError) as error:
            cell["missing"] = reason(error)
        release(self.device)
        return cell

    def timed(self, step: Call, steps: int, batch: int, work: Work) -> dict[str, Any]:
        """Median over series of `steps` steps."""

        def series() -> None:
            for _ in range(steps):
                step()

        timing = time_calls([series], self.device, seconds=self.seconds, per_call=steps)
        judged = self.ceilings.judge(work, timing.median)
        return timing.to_dict() | {"tokens_per_second": batch / timing.median} | judged

    def work(self, batch: int, cache_bytes: int, *, context: int = 0, ours: bool = False) -> Work:
        """A step reads every weight once (tied embeddings as the head), and reads and writes what its cache asks for.

        FLOPs: 2 a weight and row, `4 D` a key and query head on the exact side, and on ours the same for its exact
        keys (about `1.5 w + s + h`) and `2 M D` for each head's features and for what they weigh.
        """
        c, s = self.config, self.shape
        keys = 1.5 * c.window + c.sinks + c.retained + c.num_features if ours else context
        attention = 4 * s.head_dim * keys + (2 * c.num_features * s.head_dim if ours else 0)
        flops = batch * (2 * self.parameters + s.layers * s.heads * attention)
        return Work(flops, self.weights + cache_bytes)

    def step(self, side: str, cache: Any, batch: int, before: Call | None = None) -> Call:
        """One step of a side, as a CUDA graph where it can be one."""
        if side.endswith("_compiled"):
            if self.compiled_for != (side, batch):  # code of other batches would count against the limit of versions
                torch.compiler.reset()
                self.compiled_for = (side, batch)
            return captured(CompiledGreedy(self.model, cache, self.tokens(batch)), self.device)
        step = Greedy(self.model, cache, self.tokens(batch), before)
        return step if side == "dynamic" else captured(step, self.device)

    def tokens(self, batch: int) -> torch.Tensor:
        """First tokens of a step's input, (B, 1)."""
        return torch.arange(batch, device=self.device).remainder(self.shape.vocabulary).unsqueeze(-1)

    def free(self) -> float:
        """Free bytes of the GPU."""
        release(self.device)
        return float(torch.cuda.mem_get_info()[0])

    def max_batch(self, context: int) -> dict[str, Any]:
        """The largest batch at `context` on both sides, with every term: `(total - weights - reserve) / row`.

        A row of the exact side is its keys and values, of ours its state; both also hold logits of one position.
        """
        total = torch.cuda.get_device_properties(self.device).total_memory if on_gpu(self.device) else 0
        logits = self.shape.vocabulary * self.dtype.itemsize
        room = max(total - self.weights - _RESERVE, 0)
        rows = {"exact": context * self.kv_bytes + logits, "ours": self.state_bytes + logits}
        found: dict[str, Any] = {
            "context": context, "total": total, "weights": self.weights, "reserve": _RESERVE,
            "row_exact": rows["exact"], "row_ours": rows["ours"],
        }  # fmt: skip
        found |= {name: room // row for name, row in rows.items()}
        return found | {"ratio": found["ours"] / found["exact"] if found["exact"] else None}
