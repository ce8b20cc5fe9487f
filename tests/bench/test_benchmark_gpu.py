"""The GPU benchmarks, run on a CPU with tiny shapes: formulas, gates, tables, pictures, refusals. No timed asserts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_inputs import ATTENTION, CONFIG, png
from typer.testing import CliRunner

from srf_retrofit.bench import attention as benchmark_gpu
from srf_retrofit.bench import decode as benchmark_decode
from srf_retrofit.bench import decode_compiled, decode_models, decode_sides, gates
from srf_retrofit.bench import train as benchmark_train
from srf_retrofit.bench.decode_sides import ModelShape
from srf_retrofit.bench.roofline import Ceilings, softmax_work
from srf_retrofit.cli import main as cli
from srf_retrofit.modeling.state import SRFState
from srf_retrofit.testing import random_feature_map

TINY = ModelShape("tiny", 32, 48, 2, 4, 2, 8, 64)
DECODE: dict[str, Any] = {
    "models": [TINY], "contexts": (8, 16), "batches": (1, 2), "config": CONFIG, "dtype": "float32", "device": "cpu",
    "seconds": 0.01,
}  # fmt: skip
TRAIN: dict[str, Any] = {
    "model": TINY, "lengths": (16,), "tokens": 32, "config": CONFIG, "weights": "float32", "chunk_size": 20,
    "device": "cpu", "seconds": 0.01,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate at a length that suits these shapes; ragged all the same."""
    check = benchmark_train.check_attention
    monkeypatch.setattr(benchmark_train, "check_attention", lambda *a, **kw: check(*a, **{**kw, "length": 37}))


# -- decode ----------------------------------------------------------------------------------------------------------


def test_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, plot = tmp_path / "d.json", tmp_path / "d.png"
    found = benchmark_decode.decode(**DECODE, output=output, plot=plot)
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == json.loads(output.read_text()) == found
    assert png(plot)
    assert [c["batch"] for c in found["step"]] == [1, 2]
    assert {c["side"] for c in found["model"]} == {"ours", "exact", "dynamic", "static"}
    # Transformers' own caches at the shortest context alone.
    assert len(found["model"]) == 2 * 4 + 2 * 2
    assert found["complete"] is True
    assert all(c["tokens_per_second"] > 0 for c in found["model"])
    state = SRFState.empty(CONFIG, 1, 2, 8, dtype=torch.float32).nbytes()
    assert found["state"]["tiny"] == {
        "bytes": 2 * state, "kv_bytes_per_token": 2 * 2 * 2 * 8 * 4, "kv_tokens": 2 * state / 256,
    }  # fmt: skip
    assert found["gate"]["tokens"] == 2 * (2 * CONFIG.window + 5)


def test_decode_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both sides, one compiled layer for all layers and contexts of a batch, and a result at every moment."""
    monkeypatch.setattr(decode_compiled, "BACKEND", "aot_eager")
    # Timed, two contexts may want two layouts, and each is a graph.
    monkeypatch.setattr(decode_models, "fastest_exact", lambda *_: ("default", True))
    output, seen = tmp_path / "d.json", []
    monkeypatch.setattr(benchmark_decode, "finish_text", lambda result, *_: result)
    counters, reset = torch._dynamo.utils.counters, torch.compiler.reset
    graphs: list[int] = []

    def counted() -> None:
        graphs.append(counters["stats"]["unique_graphs"])
        reset()

    monkeypatch.setattr(torch.compiler, "reset", counted)
    run = decode_models.ModelBench.guarded

    def guarded(self: Any, *args: Any) -> dict[str, Any]:
        seen.append(json.loads(output.read_text()))
        return run(self, *args)

    monkeypatch.setattr(decode_models.ModelBench, "guarded", guarded)
    found = benchmark_decode.decode(**{**DECODE, "rivals": ("exact",)}, compile=True, output=output)
    cells = {(c["side"], c["batch"], c["context"]): c for c in found["model"]}
    assert len(cells) == 4 * 4
    assert all("milliseconds" in c for c in cells.values()), found["model"]
    assert found["gate"]["compiled"]["ours"]["tokens"] == 1
    assert found["gate"]["compiled"]["exact"]["logits"] < 1e-5
    assert [len(x["model"]) for x in seen] == list(range(16))
    assert not any(x["complete"] for x in seen)
    # Before a layer, a layer, after it; two sides in the gate, then one a side and batch.
    assert counters["stats"]["unique_graphs"] - graphs[0] == 3 * (2 + 4)


def test_a_compiled_step_that_computes_something_else_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_compiled, "BACKEND", "eager")
    end = decode_compiled._end
    monkeypatch.setattr(decode_compiled, "_COMPILED", {})

    def wrong(model: Any, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits = end(model, hidden, tokens)
        tokens.add_(1).remainder_(256)
        return logits

    monkeypatch.setattr(decode_compiled, "_end", wrong)
    with pytest.raises(gates.GateError, match="its own logits do not explain"):
        decode_compiled.check_compiled(CONFIG, device="cpu", dtype=torch.float32)


def test_largest_batch_is_computed_from_its_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = decode_models.ModelBench(TINY, CONFIG, Ceilings(1, 1), lambda *_: 1, "cpu", torch.float32, 0.0, 0)
    monkeypatch.setattr(decode_models, "on_gpu", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"total_memory": 80 << 30}))
    most = bench.max_batch(1024)
    room = (80 << 30) - most["weights"] - most["reserve"]
    assert most["row_exact"] == 1024 * 256 + 64 * 4
    assert most["exact"] == room // most["row_exact"]
    assert most["ours"] == room // (bench.state_bytes + 256)
    assert most["ratio"] == most["ours"] / most["exact"]


def test_a_full_cache_is_read_whole_and_keeps_its_length() -> None:
    cache = decode_sides.exact_cache(TINY, 2, 9, "cpu", torch.float32)
    k, v = torch.ones(2, 2, 1, 8), torch.full((2, 2, 1, 8), 2.0)
    keys, values = cache.update(k, v, 1)
    assert keys.shape == (2, 2, 9, 8)
    assert torch.equal(keys[:, :, -1:], k)
    assert torch.equal(values[:, :, -1:], v)
    assert cache.get_seq_length() == 8


@pytest.mark.parametrize("packed", [False, True])
def test_both_layouts_of_exact_decoding_are_softmax_attention(packed: bool) -> None:
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    o = decode_sides.decode_attention("default", packed)(q, k, v)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    torch.testing.assert_close(o, (q @ k.mT * 8**-0.5).softmax(-1) @ v)


def test_gate_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    right, _ = benchmark_decode._step_of("cpu")
    maps = random_feature_map(1, 8, 8, geometry="preconditioner")
    shape: dict[str, Any] = {"heads": 2, "kv_heads": 1, "head_dim": 8, "dtype": torch.float32, "device": "cpu"}
    assert gates.check_step(right, maps, CONFIG, **shape)["o"] < 1e-5

    def forgets(q: Any, k: Any, v: Any, active: Any, state: SRFState, *args: Any) -> torch.Tensor:
        mean = state.kv_mean.clone()
        o = right(q, k, v, active, state, *args)
        state.kv_mean.copy_(mean)  # no fold
        return o

    with pytest.raises(gates.GateError, match="no speed figure"):
        gates.check_step(forgets, maps, CONFIG, **shape)

    def stands_still(q: Any, k: Any, v: Any, active: Any, state: SRFState, *args: Any) -> torch.Tensor:
        length = state.length.clone()
        o = right(q, k, v, active, state, *args)
        state.length.copy_(length)
        return o

    with pytest.raises(gates.GateError):
        gates.check_step(stands_still, maps, CONFIG, **shape)


def test_gate_of_the_tokens() -> None:
    assert gates.check_tokens("x", [[1, 2]], [[1, 2]]) == 2
    with pytest.raises(gates.GateError, match="replayed tokens differ"):
        gates.check_tokens("x", [[1, 2]], [[1, 3]])


def test_graphs_that_do_not_replay_the_step_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(step: Any, device: str, **kwargs: Any) -> Any:
        def replay() -> None:
            step()
            step.tokens.add_(1)

        return replay

    monkeypatch.setattr(decode_sides, "captured", broken)
    with pytest.raises(gates.GateError, match="replayed tokens differ"):
        decode_sides.check_graphs(CONFIG, device="cpu", dtype=torch.float32)


# -- train -----------------------------------------------------------------------------------------------------------


def test_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, plot = tmp_path / "t.json", tmp_path / "t.png"
    found = benchmark_train.train(**TRAIN, output=output, plot=plot)
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == json.loads(output.read_text()) == found
    assert png(plot)
    speeds = {c["objective"]: c["tokens_per_second"] for c in found["cells"]}
    assert set(speeds) == set(benchmark_train.OBJECTIVES)
    best = max(speeds["plain"], speeds["plain_chunked"])
    assert found["ratio"]["eager"]["16"] == pytest.approx(speeds["distill"] / best)
    assert "distillation runs at" in printed


def test_plain_losses_are_one_loss_and_a_teacher_agrees_with_itself() -> None:
    """Before any step: both plain objectives give the same loss, and exact attention would have no divergence."""
    bench = benchmark_train.TrainBench(TINY, CONFIG, "float32", 7, "cpu", 0.0, 0)
    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    plain, chunked = (bench._objective(name, False)[0](ids) for name in ("plain", "plain_chunked"))
    torch.testing.assert_close(plain, chunked)
    loss, student, _ = bench._objective("distill", False)
    assert float(loss(ids).detach()) > 0
    for layer in student.model.layers:
        layer.self_attn.exact = True
    assert float(loss(ids).detach()) == pytest.approx(0, abs=1e-6)


def test_work_of_a_training_step() -> None:
    bench = benchmark_train.TrainBench(TINY, CONFIG, "float32", 7, "cpu", 0.0, 0)
    sizes = bench.sizes(16, 32)
    plain = bench.work("plain", sizes).flops
    assert plain == 6 * bench.parameters * 32 + 2 * softmax_work(sizes, backward=True).flops
    teacher = 2 * bench.parameters * 32 + 2 * softmax_work(sizes, backward=False).flops
    assert bench.work("distill", sizes).flops == bench.work("student", sizes).flops + teacher


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: benchmark_gpu.attention(**{**ATTENTION, "rivals": ("cuDNN",)}), "rivals are cudnn, flash"),
        (lambda: benchmark_gpu.attention(**{**ATTENTION, "shapes": [(3, 2, 8)]}), "whole groups, got 3/2,8"),
        (lambda: benchmark_gpu.attention(**{**ATTENTION, "lengths": ()}), "lengths must be integers >= 1"),
        (lambda: benchmark_gpu.attention(**{**ATTENTION, "dtype": "int8"}), "dtype must be bfloat16"),
        (lambda: benchmark_gpu.attention(**ATTENTION, plot="no/such/directory/x.png"), "is not a directory"),
        (lambda: benchmark_decode.decode(**{**DECODE, "models": ["gpt"]}), "models are llama-3.2-1b and smollm2-135m"),
        (lambda: benchmark_decode.decode(**{**DECODE, "contexts": (1,)}), "contexts must be at least 2"),
        (lambda: benchmark_decode.decode(**{**DECODE, "rivals": ("x",)}), "rivals are exact, dynamic, static"),
        (lambda: benchmark_train.train(**{**TRAIN, "weights": "int8"}), "weights must be bfloat16 or float32"),
        (lambda: benchmark_train.train(**{**TRAIN, "lengths": (1,)}), "lengths must be at least 2"),
    ],
)
def test_bad_input_is_refused_before_any_work(call: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((benchmark_gpu, "check_attention"), (benchmark_decode, "check_step")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("work was done first"))
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "bench train measures a GPU"),
        (["attention", "--device", "cuda"], "sees no CUDA device"),
        (["attention", "--tokens", "64"], "bench attention on a CPU takes no --tokens"),
        (["decode", "--compile"], "bench decode on a CPU takes no --compile"),
    ],
)
def test_the_command_refuses_in_one_line(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(cli.app, ["bench", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_command_hands_its_options_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmark_gpu, "attention", lambda **kw: calls.update(attention=kw))
    monkeypatch.setattr(benchmark_decode, "decode", lambda **kw: calls.update(decode=kw))
    monkeypatch.setattr(benchmark_train, "train", lambda **kw: calls.update(train=kw))
    output = str(tmp_path / "x.json")
    shape = ["--heads", "4", "--kv-heads", "2", "--head-dim", "64"]
    for arguments in (
        ["attention", "--rivals", "cudnn, flash", *shape, "--output", output, "--json"],
        ["decode", "--lengths", "64", "--batches", "1,2", "--models", "smollm2-135m", "--compile"],
        ["train", "--model", "smollm2", "--weights", "float32", "--seconds", "1"],
    ):
        result = CliRunner().invoke(cli.app, ["bench", *arguments])
        assert result.exit_code == 0, result.output
    assert calls["attention"]["shapes"] == [(4, 2, 64)]
    assert calls["attention"]["rivals"] == ["cudnn", "flash"]
    assert calls["attention"]["plot"] == str(tmp_path / "x.png")
    assert calls["attention"]["quiet"] is True
    assert (calls["decode"]["contexts"], calls["decode"]["batches"]) == ([64], [1, 2])
    assert calls["decode"]["compile"] is True
    assert (calls["train"]["model"], calls["train"]["weights"]) == ("smollm2", "float32")
    assert calls["train"]["device"] == "cuda"


# -- on a GPU --------------------------------------------------------------------------------------------------------

SMALL = ModelShape("small", 256, 384, 2, 4, 2, 64, 512)


@pytest.mark.gpu
def test_decode_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # The largest batches would want the device for themselves.
    monkeypatch.setattr(decode_models, "_FIT", 0.002)
    few: dict[str, Any] = {"contexts": (256,), "batches": (2,), "seconds": 0.01, "compile": False, "largest": False}
    found = benchmark_decode.decode(models=[SMALL], **few, device="cuda")
    assert any(c["side"] == "exact" and "milliseconds" in c for c in found["model"])


@pytest.mark.gpu
def test_train_on_a_gpu() -> None:
    found = benchmark_train.train(model=SMALL, lengths=(256,), tokens=512, seconds=0.01, device="cuda")
    assert found["ratio"]["eager"]["256"] > 0
