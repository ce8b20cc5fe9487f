"""The bridge to lm-eval: what needs no lm-eval is tested here, the agreement of the figures in test_choices.py."""

from __future__ import annotations

import importlib.util
import json

import pytest
from toy_tokenizers import byte_llama, byte_tokenizer

from srf_retrofit.evaluation import harness


def test_without_lm_eval_the_remedy_is_named(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed: pip install 'lm-eval"):
        harness.harness_scores(byte_llama(), byte_tokenizer(), ["piqa"])


def test_files_become_tasks(tmp_path) -> None:
    path = tmp_path / "eval_some.jsonl"
    path.write_text(json.dumps({"context": "a", "choices": [" b", " c"], "gold": 1}) + "\n")
    task = harness.task_of_file(path)
    assert task["task"] == "eval_some"
    assert task["output_type"] == "multiple_choice"
    assert task["dataset_kwargs"] == {"data_files": {"test": str(path)}}
    assert [m["metric"] for m in task["metric_list"]] == ["acc", "acc_norm", "acc_bytes"]
    path.write_text(json.dumps({"context": "a", "continuation": " b"}) + "\n")
    assert harness.task_of_file(path)["output_type"] == "loglikelihood"
    with pytest.raises(ValueError, match="no such task file"):
        harness.task_of_file(tmp_path / "none.jsonl")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: " + harness.INSTALL)
def test_unknown_tasks_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="lm-eval knows no task 'nonsense_task'"):
        harness.harness_scores(byte_llama(), byte_tokenizer(), ["nonsense_task"])
    with pytest.raises(ValueError, match="no such directory of tasks"):
        harness.harness_scores(byte_llama(), byte_tokenizer(), ["piqa"], include_path=tmp_path / "none")
