"""The benchmarks measure what they say, refuse to time a wrong answer and end in a line of JSON. No timed asserts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from srf_retrofit import SRFConfig
from srf_retrofit.bench import measurement
from srf_retrofit.bench import operator as benchmark
from srf_retrofit.bench.measurement import Shape, check_operator, growth_per_doubling, measure, positive_sizes

SMALL: dict[str, Any] = {"heads": 2, "kv_heads": 1, "head_dim": 8}
VARIANTS = {
    "exact": SRFConfig(num_features=8, window=16, sinks=2, retained=4),
    "pure": SRFConfig(num_features=8, window=0, sinks=0, retained=0),
}


def last_line(text: str) -> Any:
    return json.loads(text.splitlines()[-1])


def test_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "attention.json"
    found = benchmark.attention(
        lengths=(64, 32), variants=VARIANTS, repeats=1, memory=False, output=output, seed=3, **SMALL
    )
    printed = capsys.readouterr().out
    assert last_line(printed) == json.loads(output.read_text()) == found
    assert "forward_backward vs_softmax" in printed
    for part in ("forward", "forward_backward"):
        assert set(found[part]) == {"growth", "vs_softmax"}, "absolute times are for GPUs"
        assert set(found[part]["growth"]) == {"softmax", "exact", "pure"}
        assert set(found[part]["vs_softmax"]) == {"exact", "pure"}
        assert all(ratio > 0 for by_length in found[part]["vs_softmax"].values() for ratio in by_length.values())
        assert list(found[part]["vs_softmax"]["pure"]) == ["32", "64"]
    assert all(0 < error < 1e-4 for error in found["gate"].values())
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert found["environment"]["threads"] == torch.get_num_threads()
    assert found["variants"]["exact"] == VARIANTS["exact"].to_dict()
    assert (found["seed"], found["device"], found["heads"]) == (3, "cpu", 2)


def test_peak_memory_is_measured_in_a_process_of_its_own() -> None:
    """At least inputs, output and gradients, at most some of each, whatever this process has used before."""
    held = torch.ones(1 << 26)  # 256 MiB that must not count, nor hide what does
    lengths = (512, 4096)
    peaks = measurement.peak_memory(Shape(heads=2, kv_heads=2, head_dim=64), VARIANTS["pure"], "identity", lengths)
    tensors = 7 * 2 * 64 * 4 * lengths[1]
    assert tensors < peaks[4096] < 15 * tensors < held.nbytes
    assert peaks[512] < peaks[4096]


def test_decode(capsys: pytest.CaptureFixture[str]) -> None:
    found = benchmark.decode(contexts=(32, 80), variants=VARIANTS, steps=3, repeats=1, quiet=True, **SMALL)
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 1
    assert last_line(printed) == found
    assert found["steps"] == 16, "whole windows, so that folds are paid for"
    assert found["vs_first_context"]["pure"]["32"] == 1
    assert set(found["vs_softmax"]["exact"]) == {"32", "80"}
    assert found["kv_bytes"] == {"32": 2 * 32 * 8 * 4, "80": 2 * 80 * 8 * 4}
    assert found["state_bytes"]["pure"] == 4 * (8 * 8 + 8 + 8) + 8
    assert "milliseconds" not in found


def test_decoding_softmax_attends_to_its_whole_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rival does the work it should: every step sees the cache and the tokens before it."""
    seen = []
    monkeypatch.setattr(benchmark, "scaled_dot_product_attention", lambda q, k, v, **_: seen.append((q, k.clone(), v)))
    sizes = Shape(**SMALL)
    _, keys, values = sizes.tensors(13)
    tokens = [sizes.tensors(1, stream=i) for i in range(3)]
    benchmark._cached_softmax(keys, values, tokens)()
    assert [k.shape[2] for _, k, _ in seen] == [11, 12, 13]
    for i in range(3):
        assert torch.equal(seen[-1][1][:, :, 10 + i : 11 + i], tokens[i][1])


def test_seed_operator(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Against a stand-in with the seed's interface; the real one is an extra of the benchmark alone."""
    import sys
    import types

    calls = []

    class Seed:
        def __init__(self, *, d: int, causal: bool, device: str) -> None:
            assert (d, causal, device) == (8, True, "cpu")

        def __call__(self, q: Any, k: Any, v: Any, *, mode: str, attn_fn: str, chunk_size: int) -> torch.Tensor:
            calls.append((mode, attn_fn, chunk_size))
            assert q.shape == k.shape == v.shape == (1, 2, 48, 8)
            return q + k + v

    module = types.ModuleType("srf_attention")
    module.Attention = Seed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "srf_attention", module)
    found = benchmark.seed_operator(length=48, repeats=1, heads=2, head_dim=8)
    assert last_line(capsys.readouterr().out) == found
    assert found["speedup"] == min(found["speedup_by_tile"].values()) > 0
    assert set(calls) == {("train", "torch", tile) for tile in (256, 1024)}


def test_seed_operator_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "srf_attention", None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps srf-attention==1.0.16"):
        benchmark.seed_operator(length=48)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_gate_is_green(name: str, dtype: str) -> None:
    assert check_operator(Shape(dtype=dtype, **SMALL), VARIANTS[name]) < (1e-4 if dtype == "float32" else 1e-1)


@pytest.mark.parametrize("fault", ["output", "gradient"])
def test_no_figure_behind_a_red_gate(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = measurement.srf_attention

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> Any:
        if fault == "gradient":
            k = k.detach() + 0 * k
        o, state = right(q, k, v, *args)
        return (o * 1.001 if fault == "output" else o), state

    monkeypatch.setattr(measurement, "srf_attention", wrong)
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("a wrong operator was timed"))
    with pytest.raises(RuntimeError, match="no speed figure, the operator differs from the oracle"):
        benchmark.attention(lengths=(32,), variants=VARIANTS, memory=False, **SMALL)


def test_measure_interleaves_and_takes_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    # Starts and ends of a and b in turn: two rounds to warm up, the second of which sets the repeats, three timed.
    clock = iter([0, 90, 0, 90, 0, 10, 0, 4, 0, 5, 0, 3, 0, 7, 0, 6, 0, 6, 0, 9])
    monkeypatch.setattr(measurement.time, "perf_counter", lambda: next(clock))
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = measure(calls, 3, "cpu", "test", least_seconds=10)
    assert "".join(order) == "abab" + 3 * "abbb"
    assert found == {"a": 6, "b": 2}


def test_growth_per_doubling() -> None:
    assert growth_per_doubling({1024: 1.0, 2048: 2.0, 8192: 32.0}) == pytest.approx({2048: 2.0, 8192: 4.0})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Shape(heads=4, kv_heads=3), "heads=4 must be a multiple of kv_heads=3"),
        (lambda: Shape(head_dim=0), "head_dim must be >= 1, got 0"),
        (lambda: Shape(dtype="int8"), "dtype must be float32, bfloat16 or float16"),
        (lambda: positive_sizes("lengths", []), "lengths must be integers >= 1, got none"),
        (lambda: benchmark.attention(lengths=(0,)), "lengths must be integers >= 1"),
        (lambda: benchmark.attention(repeats=0), "repeats must be integers >= 1"),
        (lambda: benchmark.decode(variants={}), "variants must name at least one"),
        (lambda: benchmark.decode(output="missing/directory/x.json"), "is not a directory"),
    ],
)
def test_bad_input_is_refused_before_any_work(call: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "check_operator", lambda *_: pytest.fail("work was done first"))
    with pytest.raises(ValueError, match=message):
        call()


def test_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees no CUDA device"):
        Shape(device="cuda")


@pytest.mark.gpu
def test_absolute_times_on_a_gpu() -> None:
    found = benchmark.attention(lengths=(128, 256), variants=VARIANTS, repeats=1, device="cuda", **SMALL)
    assert found["forward"]["milliseconds"]["pure"]["256"] > 0
    assert found["peak_memory"]["bytes"]["pure"]["256"] > 0
