"""What every test shares: no network, fixed seeds, and the one place where a test may be skipped."""

from __future__ import annotations

import os

# Before any library reads it: tests never reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    # A core a process, also for the processes that tests start: two threads on a core that another test holds wait for
    # each other at every step (a notebook took four times as long).
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Settled when Triton is first imported, by whichever test: without a GPU its kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples every time, and no limit on the time of one: machines differ.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


# Fixtures: of the tests that call the command line, and of those of the fused kernels.
pytest_plugins = ["shell", "fused_checks"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is no CUDA device; nothing else is ever skipped.

    The few long tests come first, so that no process is left alone with one at the end.
    """
    items.sort(key=lambda item: item.get_closest_marker("real") is None)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_runtest_logfinish() -> None:
    """After an illegal access nothing on the device works any more: have xdist start another process for the rest."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            # Processes share the device: what none of its tests holds is the others'.
            torch.cuda.empty_cache()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same global generator, whichever tests ran before it."""
    torch.manual_seed(0)
