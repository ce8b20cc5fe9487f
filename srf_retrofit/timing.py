"""Medians over CUDA events (a clock elsewhere), CUDA graphs, peak memory: how the GPU benchmarks measure.

A call is timed on rotating sets of inputs, so that none finds its own in a cache, after a warm-up that also compiles.
No call waits for the one before: the figure is the device's time while the host keeps ahead of it, and the host's where
it cannot.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, fastest and slowest of `repeats`."""

    median: float
    low: float
    high: float
    repeats: int

    def to_dict(self) -> dict[str, float]:
        """In milliseconds, for a result."""
        return {
            "milliseconds": 1e3 * self.median,
            "low": 1e3 * self.low,
            "high": 1e3 * self.high,
            "repeats": self.repeats,
        }


def on_gpu(device: str | torch.device) -> bool:
    """Whether a device is a CUDA one."""
    return torch.device(device).type == "cuda"


def choose_device(device: str | None) -> str:
    """The device asked for; by default CUDA where there is one.

    Raises
    ------
    ValueError
        For a CUDA device that PyTorch does not see.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if on_gpu(device) and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but PyTorch sees no CUDA device: use device='cpu'")
    return device


def time_calls(
    calls: Sequence[Call],
    device: str,
    *,
    seconds: float = 0.5,
    least: int = 3,
    most: int = 50,
    per_call: int = 1,
) -> Timing:
    """Time calls that do the same work on different inputs, in turn.

    Parameters
    ----------
    calls : sequence of callables
        Each is called once to warm up (and compile), then one more call estimates the time.
    device : str
    seconds : float
        Budget of the timed part; at least `least` calls are made even so, and at most `most`.
    per_call : int
        Units of work in a call (steps of a loop): the figures are divided by it.

    Returns
    -------
    Timing
    """
    for call in calls:
        call()
    estimate = _spans([calls[0]], device)[0]
    repeats = max(least, min(most, math.ceil(seconds / max(estimate, 1e-7))))
    spans = [x / per_call for x in _spans([calls[i % len(calls)] for i in range(repeats)], device)]
    return Timing(statistics.median(spans), min(spans), max(spans), repeats)


def _spans(calls: Sequence[Call], device: str) -> list[float]:
    """Seconds of each call, one after the other."""
    if not on_gpu(device):
        spans = []
        for call in calls:
            start = time.perf_counter()
            call()
            spans.append(time.perf_counter() - start)
        return spans
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
    torch.cuda.synchronize()
    for call, (start_event, end_event) in zip(calls, events, strict=True):
        start_event.record()
        call()
        end_event.record()
    torch.cuda.synchronize()
    return [start_event.elapsed_time(end_event) / 1e3 for start_event, end_event in events]


def captured(step: Call, device: str, *, warmup: int = 3) -> Call:
    """A call that replays `step` as one CUDA graph; on another device `step` itself.

    `step` runs `warmup` times before (state that it advances has advanced by that much) and may neither wait for the
    device nor allocate what has to outlive it.
    """
    if not on_gpu(device):
        for _ in range(warmup):
            step()
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak_bytes(call: Call, device: str) -> float | None:
    """Bytes allocated on top of what there was, at the highest point of a call; None where nobody counts them."""
    if not on_gpu(device):
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()  # what it returns is part of what it needs
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return float(peak)


def release(device: str) -> None:
    """Give cached blocks back to the device, so that the next measurement does not stumble over fragments."""
    if on_gpu(device):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def reason(error: BaseException) -> str:
    """The first line of an error, for a cell that holds no figure."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Version of Python and of each installed package, "not installed" for the others."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """Commit of the sources: `GIT_COMMIT` of the environment, or what git says of this directory, or None."""
    given = os.environ.get("GIT_COMMIT")
    if given:
        return given
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() or None
