"""The page says what the results say, the picture is there, and a directory is written whole or not at all."""

from __future__ import annotations

import json

import pytest
from matplotlib.image import imread

from srf_retrofit.evaluation import report as evaluation_report
from srf_retrofit.evaluation.plot import plot
from srf_retrofit.evaluation.report import compare, markdown, write_evaluation
from srf_retrofit.modeling.configuration import SRFConfig


def by_length(level: float) -> dict:
    ranges = [
        {"start": s, "end": e, "nll": 2.0, "ppl": level + s / 100, "tokens": 9} for s, e in ((0, 256), (256, 512))
    ]
    one = {"nll": 2.0, "ppl": level, "tokens": 510, "bytes": 2000, "bits_per_byte": level / 10, "by_position": ranges}
    return {"256": {**one, "by_position": ranges[:1]}, "512": one}


def copies(*values: float) -> list[dict]:
    return [
        {"distance": d, "accuracy": a, "stderr": 0.02, "whole": 0.0, "tokens": 90, "rows": 3}
        for d, a in zip((50, 300), values, strict=True)
    ]


def cells(value: float) -> list[dict]:
    return [
        {"context": c, "depth": d, "accuracy": value, "whole": 0.5, "stderr": 0.1, "tokens": 5, "rows": 1}
        for c in (1024, 2048)
        for d in (0.1, 0.9)
    ]


def mqar(value: float) -> list[dict]:
    return [{"pairs": 8, "gap": 0, "accuracy": value, "stderr": 0.1, "whole": 0.0, "tokens": 8, "rows": 1}]


def task(acc: float) -> dict:
    return {"eval_piqa": {"items": 9, "acc": acc, "acc_stderr": 0.05, "acc_norm": 0.5, "acc_norm_stderr": 0.05}}


def results(level: float = 12.25) -> dict:
    return {
        "format": 1,
        "settings": {"length": 512, "trials": 3, "depths": [0.1, 0.9]},
        "model": {"name": "tuned", "class": "SRFLlamaForCausalLM", "parameters": 1000, "dtype": "float32",
                  "device": "cpu", "srf": SRFConfig().to_dict()},
        "state": {"layers": 2, "softmax_layers": 0, "state_bytes": 2**20, "kv_bytes_per_token": 4096,
                  "kv_tokens": 256.0},
        "perplexity": {"full": {"nll": 2.5, "ppl": level, "tokens": 511},
                       "no_tail": {"nll": 2.6, "ppl": 13.5, "tokens": 511}},
        "distance": {"kl": 0.125, "agreement": 0.875, "tokens": 511},
        "lengths": {"full": by_length(level), "tail_only": by_length(400.0)},
        "copy": {"full": copies(0.9, 0.4), "no_tail": copies(0.8, 0.1)},
        "mqar": {"full": mqar(0.25)},
        "passkey": {"full": cells(0.6)},
        "tasks": {"full": task(0.625)},
        "head_error": [[0.1, 0.2], [0.3, 0.5]],
        "tail_share": {"estimated": [[0.0, 0.1], [0.2, 0.3]], "exact": [[0.1, 0.1], [0.1, 0.7]]},
        "teacher": {
            "model": {"name": "softmax", "class": "LlamaForCausalLM", "srf": None},
            "perplexity": {"full": {"nll": 2.3, "ppl": 9.75, "tokens": 511}},
            "lengths": {"full": by_length(9.75)},
            "copy": {"full": copies(1.0, 1.0)},
            "passkey": {"full": cells(0.95)},
            "tasks": {"full": task(0.7)},
            "seconds": {"perplexity": 1.0},
        },
        "against_teacher": [
            {"figure": "perplexity", "model": level, "teacher": 9.75, "difference": level - 9.75,
             "ratio": level / 9.75},
            {"figure": "copy at distance 50", "model": 0.9, "teacher": 0.0, "difference": 0.9, "ratio": None},
        ],
        "seconds": {"perplexity": 1.5, "copy": 0.25},
        "versions": {"python": "3.11"},
    }  # fmt: skip


def test_page_says_what_was_measured() -> None:
    page = markdown(results(), figure="report.png")
    for line in (
        "# Evaluation of tuned",
        "the cache of 256 tokens",
        "| perplexity | 12.25 | 9.75 | 1.256 | +2.500 |",
        "| copy at distance 50 | 0.900 | 0.000 | - | +0.900 |",
        "KL(teacher || model) is 0.1250 nats a token",
        "| exact keys only | 13.500 | 2.6000 |",
        "| perplexity in windows of | 256 | 512 |",
        "| perplexity in 512, by position | 0 to 255 | 256 to 511 |",
        "| features only | 400.00 | 402.56 |",
        "| teacher | 1.000 | 1.000 |",
        "| full, 2,048 | 0.60 | 0.60 | 0.50 |",
        "| eval_piqa, acc | 0.700 ± 0.050 | 0.625 ± 0.050 |",
        "| 1 | 0.400 | 0.500 |",
        "| all | 0.150 | 0.300 | 0.250 | 0.700 |",
        "![Perplexity by position, recall, share of the tail](report.png)",
    ):
        assert line in page
    for row in page.splitlines():
        if row.startswith("|"):
            assert row.endswith("|")


def test_a_page_of_one_part() -> None:
    few = {key: results()[key] for key in ("settings", "model", "state", "perplexity", "seconds", "versions")}
    few["model"]["srf"], few["state"] = None, None
    page = markdown(few)
    assert "A softmax model" in page
    assert "teacher" not in page
    assert "![" not in page


def test_written_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    page = write_evaluation(results(), tmp_path / "out")
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.md", "report.png", "results.json"]
    assert json.loads((page.parent / "results.json").read_text()) == results()
    pixels = imread(page.parent / "report.png")
    assert min(pixels.shape[:2]) > 1000
    assert pixels[..., :3].std() > 0.1
    with pytest.raises(ValueError, match="not empty"):
        write_evaluation(results(), tmp_path / "out")
    write_evaluation({**results(), "format": 2}, tmp_path / "out", overwrite=True)
    assert json.loads((page.parent / "results.json").read_text())["format"] == 2
    monkeypatch.setattr(evaluation_report, "markdown", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_evaluation(results(), tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nothing_to_draw_is_no_picture(tmp_path) -> None:
    assert not plot({"model": {"srf": None}, "perplexity": {}}, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_runs_side_by_side() -> None:
    page = compare([results(12.25), results(11.0)], ["ours", "hedgehog"])
    assert "|  | teacher | ours | hedgehog |" in page
    assert "| perplexity | 9.75 | 12.25 | **11.00** |" in page
    assert "| copy at distance 50 | 1.000 | 0.900 | 0.900 |" in page
    assert "| KL to teacher | - | 0.125 | 0.125 |" in page
    only = results()
    del only["teacher"]
    assert compare([only]).splitlines()[0] == "|  | tuned |"
    with pytest.raises(ValueError, match="a name for each result, got 1 for 2"):
        compare([results(), results()], ["one"])
