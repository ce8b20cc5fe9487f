"""`bench attention` on a GPU, run on a CPU with tiny shapes: gates, rivals, what is kept when. No timed asserts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_inputs import ATTENTION, png

from srf_retrofit import SRFConfig, timing
from srf_retrofit.bench import attention as benchmark_gpu
from srf_retrofit.bench import attention_report


@pytest.fixture(autouse=True)
def _small_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate at a length that suits these shapes; ragged all the same."""
    check = benchmark_gpu.check_attention
    monkeypatch.setattr(benchmark_gpu, "check_attention", lambda *a, **kw: check(*a, **{**kw, "length": 37}))


def test_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_COMMIT", "abc")
    output, plot = tmp_path / "a.json", tmp_path / "a.png"
    found = benchmark_gpu.attention(**ATTENTION, output=output, plot=plot)
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == json.loads(output.read_text()) == found
    assert png(plot)
    assert "ours, window + retained" in printed
    assert "share of roofline" in printed
    cells = found["cells"]
    assert len(cells) == 2 * 2 * 2
    assert {(c["length"], c["batch"]) for c in cells} == {(16, 4), (32, 2)}
    for cell in cells:
        assert cell["milliseconds"] > 0
        assert cell["share"] > 0
    assert set(found["gate"]["2/1,8"]["retained"]) >= {"o", "dq", "dk", "dv", "all_dq"}
    assert found["environment"]["commit"] == "abc"
    assert found["complete"]


@pytest.mark.parametrize("fault", ["output", "gradient", "other_head"])
def test_a_wrong_attention_is_not_timed(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = benchmark_gpu.srf_attention

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if fault == "gradient":
            k = k.detach() + 0.9 * (k - k.detach())
        o, state = right(q, k, v, *args, **kwargs)
        if fault == "other_head":  # not the one that the oracle looks at
            o = o * torch.tensor([1.01, 1.0]).view(1, 2, 1, 1)
        return (o * 1.01 if fault == "output" else o), state

    monkeypatch.setattr(benchmark_gpu, "srf_attention", wrong)
    monkeypatch.setattr(benchmark_gpu, "time_calls", lambda *_, **__: pytest.fail("a wrong operator was timed"))
    with pytest.raises(RuntimeError, match=r"2 cell\(s\) of our own have no figure.*no speed figure"):
        benchmark_gpu.attention(**{**ATTENTION, "shapes": [(2, 2, 8)], "lengths": (16,), "rivals": ()})
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "no speed figure" in found["gate"]["2/2,8"]["retained"]
    assert not any("milliseconds" in cell for cell in found["cells"])


def test_a_rival_that_refuses_is_reported_and_one_of_ours_ends_red(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = benchmark_gpu.time_calls

    def refuses(calls: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("No available kernel.\nmore lines")

    monkeypatch.setattr(benchmark_gpu, "time_calls", refuses)
    with pytest.raises(RuntimeError, match=r"4 cell\(s\) of our own have no figure.*No available kernel"):
        benchmark_gpu.attention(**ATTENTION)
    printed = capsys.readouterr().out
    assert "SDPA, 2/1,8, L=16: RuntimeError: No available kernel." in printed
    assert json.loads(printed.splitlines()[-1])["cells"][0]["missing"]

    monkeypatch.setattr(benchmark_gpu, "time_calls", real)
    found = benchmark_gpu.attention(**{**ATTENTION, "rivals": ("fla",)})
    assert "not measured" in found["notes"]["fla"]


def test_rivals_that_take_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        benchmark_gpu, "time_calls", lambda *_, **__: timing.Timing(median=1.0, low=1.0, high=1.0, repeats=3)
    )
    found = benchmark_gpu.attention(**{**ATTENTION, "seconds": 0.15})
    cells = {(c["operator"], c["length"]): c for c in found["cells"]}
    assert "milliseconds" in cells["default", 16]
    assert cells["default", 32]["missing"] == "left out: about 2 s a call"
    assert "milliseconds" in cells["retained", 32]


def test_a_run_that_is_cut_off_leaves_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "a.json"
    monkeypatch.setattr(benchmark_gpu, "render", lambda _: pytest.fail("there is nothing to read yet"))
    draw = benchmark_gpu._draw

    def cut_off(run: Any, sizes: Any, stream: int) -> Any:
        if sizes.length == 32:
            raise KeyboardInterrupt
        return draw(run, sizes, stream)

    monkeypatch.setattr(benchmark_gpu, "_draw", cut_off)
    with pytest.raises(KeyboardInterrupt):
        benchmark_gpu.attention(**ATTENTION, output=output)
    found = json.loads(output.read_text())
    assert found["complete"] is False
    assert {c["length"] for c in found["cells"]} == {16}
    assert all(c["milliseconds"] > 0 for c in found["cells"])


def test_no_cell_is_begun_beyond_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="the run's time was up"):
        benchmark_gpu.attention(**ATTENTION, budget=0.0)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["cells"]) == 8
    assert all(c["missing"] == "left out: the run's time was up" for c in found["cells"])


def test_linear_is_said_of_single_rows_only() -> None:
    def cell(length: int, batch: int, ms: float, operator: str = "window") -> dict[str, Any]:
        pair = {"shape": "s", "operator": operator, "length": length, "batch": batch, "milliseconds": ms}
        return {**pair, "pass": "forward_backward", "peak_ratio": 1.0 + length / 80}

    cells = [cell(1, 4, 9.0), cell(8, 1, 2.0), cell(16, 1, 5.0), cell(8, 1, 1.0, "cudnn")]
    result = {"cells": cells, "tokens": 4}
    assert attention_report.linearity(result) == {
        "s": {
            "window": {
                "forward_backward": {8: 1.0, 16: 1.25},
                "peak": {8: 1.0, 16: pytest.approx(1.2 / 1.1)},
                "peak_ratio": 1.2,
            }
        }
    }
    assert attention_report.scaled(result, cells[0]) == 9.0
    assert attention_report.scaled(result, cells[2]) == 1.25
    assert attention_report.scaled(result, {"missing": "why"}) is None


@pytest.mark.gpu
def test_attention_on_a_gpu() -> None:
    config = SRFConfig(num_features=64, window=64, sinks=4, retained=64)
    found = benchmark_gpu.attention(
        shapes=[(4, 2, 64)], lengths=(512, 4096), tokens=2048, variants={"retained": config}, rivals=("cudnn", "flash"),
        seconds=0.01, processes=2, device="cuda",
    )  # fmt: skip
    assert found["complete"]
    assert found["warm"]["kernels"] > 10
    assert found["warm"]["failed"] == []
    assert found["linear"]["4/2,64"]["retained"]["peak_ratio"] > 1
    cells = [c for c in found["cells"] if c["pass"] == "forward_backward" and "milliseconds" in c]
    assert all(c["peak_ratio"] > 0 for c in cells)
