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
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.render(text) == text
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
    monkeypatch.setattr(tables, "BLOCKS", {})
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"not there: attention-gpu.json"):
        tables.render(markers)
    for name, value in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    text = tables.render(markers)
    assert "| 32/8 heads of 128: cuDNN attention | 5.7 | - |" in text
    assert "| 32/8 heads of 128: ours, window + retained | 7.51 | 7.6 |" in text
    assert "| m, batch 32: ours, CUDA graph | 1.5 |" in text
    assert "m, batch 32: exact" not in text
    assert "| m: state in tokens of cache | 213 |" in text
    assert "| retrofitted, distilled from the softmax model | 2k | 123,457 | 2.0 |" in text
    assert tables.render("no markers") == "no markers"
