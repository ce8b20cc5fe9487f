"""What the benchmarks share: a shape and its tensors, the gate, interleaved timing, peak memory, the report.

No figure is taken before the operator has agreed with the float64 oracle on the same device (`check_operator`).
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from tqdm.auto import tqdm

from ..files import write_json
from ..modeling.configuration import SRFConfig
from ..modeling.feature_map import FeatureMap
from ..modeling.ops import srf_attention
from ..modeling.random_features import stream_seed
from ..testing import assert_close, quadratic_attention, random_feature_map
from ..timing import choose_device, commit, on_gpu, versions

# Ragged, and past every block boundary of the defaults.
GATE_LENGTH = 197
_GPU_PACKAGES = ("triton", "fla-core", "srf-attention")

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """Shape of the attention measured; the defaults are SmolLM2-135M's."""

    batch_size: int = 1
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        choose_device(self.device)

    def tensors(self, length: int, *, stream: int = 0, requires_grad: bool = False) -> Triple:
        """Standard normal q (B, H, L, D), k and v (B, G, L, D), the same for equal arguments."""
        generator = torch.Generator().manual_seed(stream_seed(self.seed, step=stream))

        def draw(heads: int) -> torch.Tensor:
            x = torch.randn(self.batch_size, heads, length, self.head_dim, generator=generator)
            return x.to(self.device, getattr(torch, self.dtype)).requires_grad_(requires_grad)

        return draw(self.heads), draw(self.kv_heads), draw(self.kv_heads)

    def feature_map(self, config: SRFConfig, geometry: str) -> FeatureMap:
        """A random feature map of these heads, with a geometry of the given level (see `calibration.calibrate`)."""
        maps = random_feature_map(
            self.kv_heads, config.num_features, self.head_dim, geometry=geometry, seed=config.seed
        )
        return maps.to(self.device)


def check_operator(shape: Shape, config: SRFConfig, geometry: str = "preconditioner") -> float:
    """The gate: outputs and all three gradients against the float64 oracle, at a ragged length.

    Returns
    -------
    float
        Largest error, relative to the largest entry of its tensor.

    Raises
    ------
    RuntimeError
        When it is above the tolerance of the dtype (1e-5 for float32, 1e-2 otherwise; ten times that for gradients,
        whose sums are longer): there is no point in timing a wrong answer.
    """
    tolerance = 1e-5 if shape.dtype == "float32" else 1e-2
    maps = shape.feature_map(config, geometry)
    q, k, v = shape.tensors(GATE_LENGTH, requires_grad=True)
    exact_q, exact_k, exact_v = (x.detach().double().cpu().requires_grad_() for x in (q, k, v))
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(shape.seed)).to(q)
    o, _ = srf_attention(q, k, v, maps, config)
    expected, _ = quadratic_attention(exact_q, exact_k, exact_v, maps, config, dtype=q.dtype)
    results = [o.detach(), *torch.autograd.grad(o, (q, k, v), weight)]
    truths = [
        expected.detach(),
        *torch.autograd.grad(expected, (exact_q, exact_k, exact_v), weight.double().cpu()),
    ]
    worst = 0.0
    for name, result, truth in zip(("o", "dq", "dk", "dv"), results, truths, strict=True):
        try:
            assert_close(result, truth, tolerance if name == "o" else 10 * tolerance, name)
        except AssertionError as error:
            raise RuntimeError(f"no speed figure, the operator differs from the oracle: {error}") from None
        worst = max(worst, float((result.double().cpu() - truth).abs().max() / truth.abs().max()))
    return worst


def measure(
    calls: Mapping[Any, Call], repeats: int, device: str, label: str, *, least_seconds: float = 0.1
) -> dict[Any, float]:
    """Median seconds of each call, over `repeats` rounds that go through all of them in turn.

    Two rounds before them warm up and tell how often a call is to be repeated within a round to take `least_seconds`.
    """
    synchronize = torch.cuda.synchronize if is_gpu(device) else lambda: None
    counts: dict[Any, int] = dict.fromkeys(calls, 1)
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    with tqdm(total=(repeats + 2) * len(calls), desc=label, file=sys.stderr, leave=False, mininterval=1) as bar:
        for turn in range(-2, repeats):
            for name, call in calls.items():
                synchronize()
                start = time.perf_counter()
                for _ in range(counts[name]):
                    call()
                synchronize()
                taken = (time.perf_counter() - start) / counts[name]
                if turn >= 0:
                    seconds[name].append(taken)
                elif turn == -1:  # the very first call may have loaded or compiled something
                    counts[name] = math.ceil(max(least_seconds, taken) / max(taken, 1e-6))
                bar.update()
    return {name: statistics.median(times) for name, times in seconds.items()}


def growth_per_doubling(values: Mapping[int, float]) -> dict[int, float]:
    """Factor by which a quantity grows for each doubling of its key, between neighbouring keys."""
    keys = sorted(values)
    return {b: (values[b] / values[a]) ** (1 / math.log2(b / a)) for a, b in itertools.pairwise(keys)}


def attention_call(inputs: Triple, maps: FeatureMap | None, config: SRFConfig | None, *, backward: bool) -> Call:
    """A call of the operator, or of softmax attention where there is no `config`; with gradients of q, k, v or not."""
    q, k, v = inputs

    def forward() -> torch.Tensor:
        if maps is None or config is None:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return srf_attention(q, k, v, maps, config)[0]

    def run() -> None:
        with torch.set_grad_enabled(backward):
            o = forward()
            if backward:
                torch.autograd.grad(o, inputs, torch.ones_like(o))

    return run


def peak_memory(sizes: Shape, config: SRFConfig | None, geometry: str, lengths: Sequence[int]) -> dict[int, float]:
    """Peak bytes of inputs, outputs, gradients and workspace of one forward and backward at each length."""
    if is_gpu(sizes.device):
        return _peaks(sizes, config, geometry, lengths, torch.get_num_threads())
    # A fresh process: memory that earlier work left with the allocator would be reused unseen.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peaks, (sizes, config, geometry, lengths, torch.get_num_threads()))


def _peaks(
    sizes: Shape, config: SRFConfig | None, geometry: str, lengths: Sequence[int], threads: int
) -> dict[int, float]:
    torch.set_num_threads(threads)
    maps = None if config is None else sizes.feature_map(config, geometry)
    gpu = is_gpu(sizes.device)

    def peak(length: int) -> float:
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        attention_call(sizes.tensors(length, requires_grad=True), maps, config, backward=True)()
        return float(torch.cuda.max_memory_allocated()) if gpu else _peak_resident()

    # What a first call of any length brings along (libraries, threads) is no part of the growth. Lengths rise, so the
    # high-water mark of the process is always that of the latest one.
    peak(GATE_LENGTH)
    before = float(torch.cuda.memory_allocated()) if gpu else _peak_resident()
    return {length: max(peak(length) - before, 1.0) for length in sorted(lengths)}


def _peak_resident() -> float:
    """Largest resident memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: its figure survives exec, so a child would start with its parent's peak.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def environment(device: str) -> dict[str, Any]:
    """Versions, commit, device, threads and load: what a figure needs to be compared with another."""
    gpu = is_gpu(device)
    installed = versions(("srf-retrofit", "torch", "transformers", *(_GPU_PACKAGES if gpu else ())))
    found: dict[str, Any] = {"versions": installed, "commit": commit()}
    if gpu:
        cudnn = torch.backends.cudnn.version()
        installed |= {"cuda": str(torch.version.cuda), "cudnn": str(cudnn)}
        found["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return found | {
        "device": torch.cuda.get_device_name(device) if gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def finish(result: dict[str, Any], rows: list[list[str]], output: str | Path | None, quiet: bool) -> dict[str, Any]:
    """Write, print and return a result: the table unless `quiet`, and one line of JSON at the end."""
    return finish_text(result, aligned(rows), output, quiet)


def finish_text(result: dict[str, Any], text: str, output: str | Path | None, quiet: bool) -> dict[str, Any]:
    """Write, print and return a result: `text` unless `quiet`, and one line of JSON at the end."""
    # Through JSON once, so that what is returned is what is printed: keys are strings.
    line = json.dumps(result, allow_nan=False)
    result = json.loads(line)
    if output is not None:
        write_json(Path(output), result)
    if not quiet:
        print(text)
    print(line, flush=True)
    return result


def aligned(rows: list[list[str]], left: int = 2) -> str:
    """A table in plain text; the first `left` columns are aligned left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [x.ljust(n) if i < left else x.rjust(n) for i, (x, n) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def check_output(*paths: str | Path | None) -> None:
    """Refuse files that cannot be written, before minutes are spent.

    Raises
    ------
    ValueError
        When the directory of one does not exist.
    """
    for path in paths:
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"output {path}: {Path(path).absolute().parent} is not a directory")


def figure(value: float | None) -> str:
    """Three significant digits, or nothing."""
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def positive_sizes(name: str, values: Iterable[int]) -> tuple[int, ...]:
    """`values` in rising order, each once; a ValueError that names them unless all are integers >= 1."""
    found = tuple(sorted(set(values)))
    if not found or any(isinstance(x, bool) or not isinstance(x, int) or x < 1 for x in found):
        raise ValueError(f"{name} must be integers >= 1, got {found or 'none'}")
    return found


def is_gpu(device: str) -> bool:
    """Whether absolute times are worth reporting there."""
    return on_gpu(device)
