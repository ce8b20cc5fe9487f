"""Kernels compiled ahead, on all cores, so that a benchmark does not wait for one after the other.

Triton compiles a kernel when it is first launched. Here several processes walk through the same calls without launching
anything: each compiles its share of the kernels they come to, candidates of an autotuner included, and leaves them in
Triton's cache on disk, where the benchmark finds them. What the calls compute is nobody's business: nothing is written.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from ..modeling.triton_launch import ALIGNMENT, integer_class
from ..timing import on_gpu, reason

Task = Callable[[], object]


def compile_ahead(tasks: Sequence[Task], device: str, processes: int | None = None) -> dict[str, Any]:
    """Compile every kernel that `tasks` launch, in parallel; a task that fails leaves the rest to be compiled later.

    Parameters
    ----------
    tasks : sequence of callables without arguments
        Picklable (`functools.partial` of functions of a module); their kernels must not depend on computed values.
    device : str
        Nothing happens unless it is a CUDA device.
    processes : int, optional
        One a core by default; 0 compiles nothing ahead.

    Returns
    -------
    dict
        `processes`, `kernels` compiled, `seconds`, and `failed`: reasons of tasks that did not come to their end.
    """
    count = (os.cpu_count() or 1) if processes is None else processes
    if not on_gpu(device) or count < 1 or not tasks:
        return {"processes": 0, "kernels": 0, "seconds": 0.0, "failed": []}
    start = time.perf_counter()
    kernels, failed = 0, []
    # Spawned: a forked process cannot use the parent's CUDA context.
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        shares = [pool.submit(_compile_share, list(tasks), share, count) for share in range(count)]
        for future in shares:
            try:
                compiled, reasons = future.result()
            except Exception as error:  # a process that died compiles nothing; the benchmark will
                compiled, reasons = 0, [reason(error)]
            kernels += compiled
            failed += reasons
    return {
        "processes": count,
        "kernels": kernels,
        "seconds": time.perf_counter() - start,
        "failed": sorted(set(failed)),
    }


def _compile_share(tasks: Sequence[Task], share: int, shares: int) -> tuple[int, list[str]]:
    import torch

    torch.set_num_threads(1)
    failed = []
    with compile_only(share, shares) as compiled:
        for task in tasks:
            try:
                task()
            except Exception as error:
                failed.append(reason(error))
    return len(compiled), failed


@contextlib.contextmanager
def compile_only(share: int = 0, shares: int = 1) -> Iterator[list[str]]:
    """Inside this context Triton launches nothing, and compiles every `shares`-th kernel it is asked for.

    Yields
    ------
    list of str
        Names of the kernels compiled so far, one entry for each form of one.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    run, tune = JITFunction.run, Autotuner.run
    known: dict[Hashable, int] = {}
    compiled: list[str] = []

    def compile_one(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        form = _form(self, args, kwargs)
        if form not in known:
            known[form] = len(known)
            if known[form] % shares == share:
                try:
                    run(self, *args, grid=grid, warmup=True, **kwargs)
                    compiled.append(self.__name__)
                except Exception:
                    # As an autotuner does: a candidate that does not fit is none. Other kernels fail where they are
                    # launched.
                    pass
        return _Nothing()

    def compile_candidates(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            self.fn.run(*args, **kwargs, **config.all_kwargs())
        return _Nothing()

    JITFunction.run, Autotuner.run = compile_one, compile_candidates
    try:
        yield compiled
    finally:
        JITFunction.run, Autotuner.run = run, tune


class _Nothing:
    """In place of a compiled kernel: launches nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _form(kernel: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Hashable:
    """What Triton compiles a kernel for, as far as calls differ in it. Too fine a form is compiled twice, no more."""
    constants = {p.name for p in kernel.params if p.is_constexpr}
    named = [*zip(kernel.arg_names, args, strict=False), *sorted(kwargs.items())]
    kinds = tuple((name, _kind(x, name in constants or name not in kernel.arg_names)) for name, x in named)
    return kernel.__module__, kernel.__name__, kinds


def _kind(x: Any, constant: bool) -> Hashable:
    if hasattr(x, "data_ptr"):
        return str(x.dtype), x.data_ptr() % ALIGNMENT == 0
    if isinstance(x, int) and not isinstance(x, bool) and not constant:
        return integer_class(x)
    return type(x).__name__ if isinstance(x, float) and not constant else repr(x)
