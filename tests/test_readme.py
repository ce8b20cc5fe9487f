"""The README's tables are those of the kept results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tables() -> Any:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_generated_from_the_kept_results(tables: Any) -> None:
    for page, blocks in {"README.md": tables.BLOCKS | tables.GPU_BLOCKS, **tables.ELSEWHERE}.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert tables.render(text, blocks) == text
    assert (ROOT / "docs" / "demo.png").is_file()


def test_tables_of_gpu_results(tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From small results made up here; a marked block without its results is an error, a missing one is not."""
    device = {"device": "NVIDIA X"}
    cells = [
        {"shape": "32/8,128", "pass": "forward_backward", "operator": op, "length": n, "batch": 65536 // n, **found}
        for op, n, found in (
            ("cudnn", 1024, {"milliseconds": 5.7, "share": 0.8}),
            ("cudnn", 8192, {"missing": "refused"}),
            ("retained", 1024, {"milliseconds": 7.512, "share": 0.4}),
            ("retained", 8192, {"milliseconds": 7.6, "share": 0.41}),
        )
    ]
    model = {"model": "m", "batch": 32, "context": 1024}
    results: dict[str, Any] = {
        "attention-gpu": {"environment": device, "tokens": 65536, "cells": cells},
        "decode-gpu": {
            "environment": device,
            "state": {"m": {"kv_tokens": 213.4}},
            "model": [model | {"side": "ours", "milliseconds": 1.5}, model | {"side": "exact", "missing": "x"}],
        },
        "train-gpu": {
            "environment": device,
            "model": "m",
            "tokens": 32768,
            "cells": [
                {
                    "objective": "distill",
                    "way": "eager",
                    "length": 2048,
                    "tokens_per_second": 123456.7,
                    "peak_bytes": 2**31,
                }
            ],
        },
    }
    markers = "\n".join(f"<!-- {name}: from benchmarks/results -->\n<!-- end {name} -->" for name in results)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"not there: attention-gpu.json"):
        tables.render(markers, tables.GPU_BLOCKS)
    for name, value in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    text = tables.render(markers, tables.GPU_BLOCKS)
    assert "| 32/8 heads of 128: cuDNN attention | 5.7 | - |" in text
    assert "| 32/8 heads of 128: ours, window + retained | 7.51 | 7.6 |" in text
    assert "| m, batch 32: ours, CUDA graph | 1.5 |" in text
    assert "m, batch 32: exact" not in text
    assert "| m: state in tokens of cache | 213 |" in text
    assert "| retrofitted, distilled from the softmax model | 2k | 123,457 | 2.0 |" in text
    assert tables.render("no markers", tables.GPU_BLOCKS) == "no markers"


def test_table_of_quality(tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds become a mean and half their range, a run that was cut off keeps its milestones, softmax stands first."""

    def judged(ppl: float, **more: Any) -> dict[str, Any]:
        windows = {str(n): {"ppl": ppl - n / 4096} for n in (1024, 4096)}
        return {"perplexity": {"full": windows}, "state": {"kv_tokens": 199.4}, **more}

    def run(tokens: int, untrained: float, milestones: dict[str, float], end: float | None, **more: Any) -> Any:
        found = {"settings": {"tokens": tokens} | more, "zero_shot": judged(untrained + 0.25)}
        found["milestones"] = {at: judged(ppl + 0.25)["perplexity"] for at, ppl in milestones.items()}
        return found | ({} if end is None else {"trained": judged(end + 0.25)})

    first = {"tuned": 1_000_000}
    softmax = run(10_000_000, 20, {"1000000": 18}, 17, softmax=True)
    softmax["zero_shot"]["state"] = None
    results = {
        "a": {"ours": [run(10_000_000, 19, {"2500000": 18.5}, 18.0, **first)], "softmax": [softmax]},
        "b": {
            "ours": [run(10_000_000, 19, {"2500000": 18.7}, 18.1, **first), {"settings": {}, "error": "x"}],
            "cut off": [run(18_100_000, 30, {"2500000": 25}, None, **first)],
            "plain": [run(18_100_000, 21, {}, 20)],
        },
    }
    for name, runs in results.items():
        (tmp_path / f"quality-gpu-{name}.json").write_text(json.dumps({"runs": runs}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = tables.quality_tuned_table().splitlines()
    assert lines[0].split("|")[2:-1] == [" state ", " 0 ", " 1M ", " 2.5M ", " 10M ", " last, 4k ", " last, 8k "]
    assert lines[2:] == [
        "| softmax |  | 20.00 | 18.00 |  | 17.00 | 16.25 |  |",
        "| ours | 199 |  | 19.00 ±0.00 | 18.60 ±0.10 | 18.05 ±0.05 | 17.30 ±0.05 |  |",
        "| cut off | 199 |  | 30.00 | 25.00 |  | 24.25 |  |",
    ]
    assert [line.split(" | ")[0] for line in tables.quality_untuned_table().splitlines()[2:]] == ["| plain"]
    monkeypatch.setattr(tables, "HEADLINE", ("softmax", "ours"))
    assert tables.quality_table().splitlines()[2:] == lines[2:4]


def test_headline_names_runs_that_are_kept(tables: Any) -> None:
    assert sorted(name for name, _ in tables.headline()) == sorted(tables.HEADLINE)
