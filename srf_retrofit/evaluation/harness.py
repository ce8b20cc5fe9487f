"""Tasks of lm-eval (EleutherAI's language model evaluation harness) on a model that is already loaded.

`choices` scores the same files faster; this is the reference it is compared with, and the way to every task that
lm-eval knows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .choices import read_items
from .perplexity import ablation
from .scoring import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTALL = "pip install 'lm-eval>=0.4.13'"


def check_installed() -> None:
    """Refuse where lm-eval is missing.

    Raises
    ------
    ValueError
        With the line that installs it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"these tasks run through lm-eval, which is not installed: {INSTALL}")


def task_of_file(path: str | Path) -> dict[str, Any]:
    """The lm-eval task over a file of `choices`, as the mapping that a task's YAML would hold.

    Raises
    ------
    ValueError
        See `choices.read_items`.
    """
    path = Path(path)
    chooses = read_items(path, limit=1)[0].gold is not None
    task: dict[str, Any] = {
        "task": task_name(path),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.absolute())}},
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "target_delimiter": "",
        "metadata": {"version": 1},
    }
    if chooses:
        names = ["acc", "acc_norm", "acc_bytes"]
        task |= {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"}
    else:
        names = ["acc", "perplexity"]
        task |= {"output_type": "loglikelihood", "doc_to_target": "{{continuation}}"}
    return {**task, "metric_list": [{"metric": name} for name in names]}


def task_name(path: str | Path) -> str:
    """`eval_piqa` of `data/eval_piqa.jsonl.gz`."""
    return Path(path).name.split(".")[0]


def harness_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Path],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    mode: str = "full",
) -> dict[str, dict[str, float]]:
    """Run tasks through lm-eval.

    Parameters
    ----------
    model : PreTrainedModel
        As it is: its device and dtype are kept.
    tokenizer : PreTrainedTokenizerBase
    tasks : sequence
        Names of lm-eval tasks, or files as in `choices`.
    include_path : path, optional
        Directory of further task YAMLs.
    limit : int, optional
        Items of each task.
    batch_size : int
    mode : str
        See `perplexity.ablation`; tasks that generate need "full" or "no_tail".

    Returns
    -------
    dict
        Of each task its numbers under lm-eval's names, with `*_stderr`.

    Raises
    ------
    ValueError
        When lm-eval is missing, a file is, or a task is not known.
    """
    check_installed()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"no such directory of tasks: {include_path}")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    chosen: list[Any] = []
    for task in tasks:
        if Path(task).suffix in (".gz", ".xz", ".jsonl"):
            chosen.append(task_of_file(task))
        elif str(task) in manager.all_tasks:
            chosen.append(str(task))
        else:
            raise ValueError(f"lm-eval knows no task {str(task)!r}: name one, or a .jsonl file, or give include_path")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    with evaluating(model), ablation(model, mode):
        found = simple_evaluate(
            model=wrapped, tasks=chosen, task_manager=manager, limit=limit, bootstrap_iters=1000, log_samples=False
        )
    return {name: _numbers(row) for name, row in found["results"].items()}


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """`{"acc,none": 0.5}` as `{"acc": 0.5}`; names and other text are left out."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in row.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
