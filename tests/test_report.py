"""The page says what the results say, and the figure draws whatever parts there are."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from srf_retrofit import report


def cell(ppl: float) -> dict[str, float]:
    return {"nll": 3.0, "ppl": ppl, "tokens": 4096}


def results() -> dict[str, Any]:
    modes = {"full": 24.5, "no_retained": 31.0, "no_tail": 25.25, "tail_only": 1650.0}
    return {
        "model": "SmolLM2-135M-Instruct",
        "config": {"projection": "simplex", "num_features": 64, "window": 32, "sinks": 4, "retained": 64},
        "settings": {"steps": 40, "train_tokens": 40960, "text": "the language reference", "length": 512},
        "perplexity": {
            "teacher": {"full": cell(19.63)},
            "zero_shot": {mode: cell(ppl) for mode, ppl in modes.items()},
            "tuned": {mode: cell(ppl * 0.9) for mode, ppl in modes.items()},
        },
        "distance": {"zero_shot": {"kl": 0.4321, "agreement": 0.71}, "tuned": {"kl": 0.2, "agreement": 0.8}},
        "head_error": {"tuned": [[0.1 * layer + 0.01 * head for head in range(9)] for layer in range(4)]},
        "memory": {
            "dtype": "bfloat16",
            "state_bytes": 2 * 2**20,
            "lengths": [128, 1024, 8192],
            "kv_bytes": [2**20, 8 * 2**20, 64 * 2**20],
            "break_even": 256,
        },
        "decode": {"contexts": [1024, 4096], "teacher_ms": [40.0, 90.0], "student_ms": [35.0, 35.5]},
        "reload": {"bit_equal": True, "max_difference": 0.0},
        "samples": [{"prompt": "What is\na `list`?", "teacher": "a list ```x```", "tuned": "a thing"}],
        "timings": {"distil": 300.0},
        "peak_memory": 4 * 2**30,
        "versions": {"torch": "2.13.0"},
    }


def png_size(path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_report_files(tmp_path) -> None:
    page = report.write_report(results(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.md", "report.png", "results.json"]
    assert json.loads((tmp_path / "results.json").read_text()) == results()
    width, height = png_size(tmp_path / "report.png")
    assert width >= 1200
    assert height >= 800
    text = page.read_text()
    assert "![" in text
    for words in ("19.63", "24.50", "22.05", "0.432", "71.0 %", "4,096 predicted tokens", "bit-equal", "256 tokens"):
        assert words in text


def test_tables_are_rectangular() -> None:
    text = report.markdown(results())
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert len(blocks) == 4
    for lines in blocks:
        assert len({line.count("|") for line in lines}) == 1


def test_model_text_cannot_break_the_page() -> None:
    text = report.markdown(results())
    assert "`What is a 'list'?`" in text
    assert text.count("```") == 4


@pytest.mark.parametrize("missing", ["head_error", "memory", "decode", "samples", "reload", "distance"])
def test_parts_may_be_missing(tmp_path, missing) -> None:
    some = results()
    del some[missing]
    assert report.write_report(some, tmp_path).exists()


def test_a_different_reload_is_said_loudly() -> None:
    some = results()
    some["reload"] = {"bit_equal": False, "max_difference": 0.5}
    assert "**different**" in report.markdown(some)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1.02e+03 B"), (1024, "1 KiB"), (3 * 2**20, "3 MiB"), (5 * 2**40, "5.12e+03 GiB")],
)
def test_bytes(count, text) -> None:
    assert report.format_bytes(count) == text
