"""Counted work against counting by hand, the roofline's share, and how calls are timed. No timed asserts."""

from __future__ import annotations

from typing import Any

import pytest

from srf_retrofit import SRFConfig, timing
from srf_retrofit.bench.roofline import (
    Ceilings,
    Sizes,
    Work,
    boundary_bytes,
    exact_keys,
    linear_work,
    softmax_work,
    srf_work,
    tensor_bytes,
)

CONFIG = SRFConfig(num_features=8, window=4, sinks=1, retained=2)


# -- formulas --------------------------------------------------------------------------------------------------------


def test_softmax_work_by_hand() -> None:
    sizes = Sizes(batch=3, heads=4, kv_heads=2, head_dim=8, length=10, itemsize=2)
    products = 3 * 4 * (10 * 10 / 2) * 2 * 8
    row = 3 * 10 * 8 * 2
    assert softmax_work(sizes, backward=False) == Work(2 * products, 12 * row + 4 * 3 * 4 * 10)
    assert softmax_work(sizes, backward=True) == Work(7 * products, (12 + 24) * row + 2 * 4 * 3 * 4 * 10)
    assert tensor_bytes(sizes) == 2 * 12 * row
    assert boundary_bytes(sizes, True) > tensor_bytes(sizes)


@pytest.mark.parametrize("config", [CONFIG, CONFIG.replace(retained=0), CONFIG.replace(window=0, retained=0)])
def test_exact_keys_by_counting(config: SRFConfig) -> None:
    """Key by key, from the definition of the exact part."""
    w, s, h, length = config.window, config.sinks, config.retained, 23
    total = 0
    for i in range(length):
        near = set(range(max(i // w - 1, 0) * w, i + 1)) if w else set()
        sinks = set(range(min(s, i + 1)))
        others = set(range(i + 1)) - near - sinks
        total += len(near | sinks) + (min(h, len(others)) if w else 0)
    assert exact_keys(config, length) == pytest.approx(total / length)


def test_srf_work_by_hand() -> None:
    sizes = Sizes(batch=1, heads=4, kv_heads=2, head_dim=8, length=16)
    config = SRFConfig(num_features=6, window=0, sinks=0, retained=0)
    features, fold, tail = 6 * 2 * 6 * 8, 2 * (2 * 6 * 8 + 12), 4 * (2 * 6 * 8 + 12)
    assert srf_work(sizes, config, backward=False, geometry=False).flops == 16 * (features + fold + tail)
    assert srf_work(sizes, config, backward=True, geometry=False).flops == 16 * (3 * features + 4 * fold + 3 * tail)
    assert srf_work(sizes, config, backward=False).flops == 16 * (features + 6 * 2 * 64 + fold + tail)
    assert srf_work(sizes, config, backward=True).bytes == softmax_work(sizes, backward=True).bytes
    twice = Sizes(batch=1, heads=4, kv_heads=2, head_dim=8, length=32)
    assert srf_work(twice, config, backward=True).flops == 2 * srf_work(sizes, config, backward=True).flops
    assert linear_work(sizes, 6, backward=False) == Work(16 * 4 * 4 * 6 * 8, 16 * 4 * (12 + 16) * 2)


def test_roofline_share() -> None:
    ceilings = Ceilings(copy_bytes_per_second=100.0, matmul_flops_per_second=1000.0)
    assert ceilings.judge(Work(500.0, 100.0), 2.0) == {"flops": 500.0, "bytes": 100.0, "bound": "memory", "share": 0.5}
    assert ceilings.judge(Work(4000.0, 100.0), 5.0)["bound"] == "compute"
    assert ceilings.least_seconds(Work(4000.0, 100.0)) == 4.0


# -- timing ----------------------------------------------------------------------------------------------------------


def test_time_calls_rotates_and_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    spans = iter([2.0, 4.0, 6.0, 5.0])

    def fake(calls: Any, device: str) -> list[float]:
        for call in calls:
            call()
        return [next(spans) for _ in calls]

    monkeypatch.setattr(timing, "_spans", fake)
    found = timing.time_calls([lambda: seen.append("a"), lambda: seen.append("b")], "cpu", seconds=5.0, per_call=2)
    assert "".join(seen) == "ab" + "a" + "aba"
    assert found == timing.Timing(2.5, 2.0, 3.0, 3)
    assert found.to_dict()["milliseconds"] == 2500


def test_on_a_cpu_a_graph_is_the_step_itself() -> None:
    seen: list[int] = []
    call = timing.captured(lambda: seen.append(1), "cpu", warmup=2)
    assert len(seen) == 2
    call()
    assert len(seen) == 3
    assert timing.peak_bytes(call, "cpu") is None


def test_commit_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert timing.commit() == "abc"
