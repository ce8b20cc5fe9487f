"""`srf-retrofit eval`: perplexity, recall, tasks and the inside of a model, beside its teacher.

The whole of it, on a GPU:

    srf-retrofit eval --model DIR --teacher smollm2 --text wikitext2_test.txt --all-text --parts all \\
        --tasks eval_lambada.jsonl.gz,eval_piqa.jsonl.gz --dtype bfloat16 --output evaluation
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import recipes

_DTYPES = ("float32", "bfloat16", "float16")
# Parts that `--parts all` leaves to the options that name their files.
_NAMED = ("tasks", "harness")
EXACT = "exact"  # as a teacher: the model's own softmax form


def evaluate(
    model: Annotated[str | None, typer.Option(help="smollm2, a directory, or a hub name. [default: smollm2]")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Model to measure beside it; 'exact': its own softmax form.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML recipe.")] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text file (.txt, .jsonl, also .gz, .xz) or hub data set. [default: Python language reference]"
        ),
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="Field of .jsonl rows or data set. [default: text]")] = None,
    everything: Annotated[
        bool | None, typer.Option("--all-text", help="Use all text, not its held-out part alone.")
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(help="Of perplexity,distance,lengths,copy,mqar,passkey,heads,tails; or all. [default: first two]"),
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window. [default: 512]", min=2)] = None,
    tokens: Annotated[int | None, typer.Option(help="Held-out tokens to judge on. [default: 8192]", min=2)] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Perplexity by length and position, as 512,1024,2048,4096.")
    ] = None,
    recall: Annotated[
        bool | None, typer.Option("--recall/--no-recall", help="Copies, associations and pass keys, or none of them.")
    ] = None,
    distances: Annotated[str | None, typer.Option(help="Distances of copies, as 50,100,200.")] = None,
    contexts: Annotated[str | None, typer.Option(help="Contexts of pass keys, as 1024,2048.")] = None,
    trials: Annotated[int | None, typer.Option(help="Trials a cell of recall. [default: 16]", min=1)] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Files of multiple choice or cloze items (.jsonl, .gz), with commas.")
    ] = None,
    harness: Annotated[str | None, typer.Option(help="Tasks of lm-eval, with commas.")] = None,
    harness_path: Annotated[str | None, typer.Option(help="Directory of further task YAMLs for lm-eval.")] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each task. [default: all]", min=1)] = None,
    modes: Annotated[str | None, typer.Option(help="Of full,no_tail,tail_only,no_retained. [default: all]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows at once.", min=1)] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens at once. [default: 32k on a GPU, 4k on a CPU]", min=1)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: cuda where there is one]")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: float32]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the recall rows. [default: 0]")] = None,
    output: Annotated[str | None, typer.Option(help="Directory to create for report, figure and JSON.")] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Replace the output directory of an earlier run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Judge a model, retrofitted or not: perplexity, recall, tasks, and what its features do; beside its teacher."""
    from ..evaluation.settings import EvalSettings
    from ..evaluation.suite import check_files, evaluate_model
    from ..files import check_writable
    from ..timing import choose_device

    recipe = recipes.read_recipe(config)
    given: dict[str, Any] = {
        "model": model, "teacher": teacher, "text": text, "text_field": text_field, "all_text": everything,
        "length": length, "tokens": tokens, "lengths": _numbers(lengths), "distances": _numbers(distances),
        "contexts": _numbers(contexts), "trials": trials, "tasks": _names(tasks), "harness_tasks": _names(harness),
        "harness_path": harness_path, "limit": limit, "modes": _names(modes), "batch_size": batch_size,
        "batch_tokens": batch_tokens, "device": device, "dtype": dtype, "seed": seed, "output": output,
        "overwrite": overwrite,
    }  # fmt: skip
    given["parts"] = _parts(recipe, _names(parts), given, recall)
    settings = recipes.resolve(EvalSettings, recipe, **given)
    if settings.dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {settings.dtype!r}")
    where = choose_device(settings.device)
    if settings.output is not None:
        check_writable(Path(settings.output), overwrite=settings.overwrite, mark="results.json")
    check_files(settings)
    loaded = _load(settings, where)
    results = {"length": settings.length, **evaluate_model(**loaded, settings=settings)}
    results["model"]["name"] = Path(settings.model).name
    if settings.output is not None:
        from ..evaluation.report import write_evaluation

        page = write_evaluation(results, settings.output, overwrite=settings.overwrite)
    if as_json:
        json.dump(results, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    _print(results)
    if settings.output is not None:
        typer.echo(f"\nreport: {page}")


def _parts(
    recipe: dict[str, Any], asked: tuple[str, ...] | None, given: dict[str, Any], recall: bool | None
) -> tuple[str, ...]:
    """The parts that options and recipe ask for together: an option that serves a part asks for it."""
    from ..evaluation.settings import PARTS, RECALL, EvalSettings

    if asked == ("all",):
        asked = tuple(part for part in PARTS if part not in _NAMED)
    parts = set(EvalSettings.parts if asked is None else asked)
    if asked is None and isinstance(recipe.get("parts"), list):
        parts = set(map(str, recipe["parts"]))
    for option, part in (("lengths", "lengths"), ("distances", "copy"), ("contexts", "passkey")):
        if given[option] is not None:
            parts.add(part)
    for option, part in (("tasks", "tasks"), ("harness_tasks", "harness")):
        if given[option] is not None or recipe.get(option):
            parts.add(part)
    if recall is not None:
        parts = parts | set(RECALL) if recall else parts - set(RECALL)
    return tuple(part for part in PARTS if part in parts) + tuple(sorted(parts - set(PARTS)))


def _load(settings: Any, device: str) -> dict[str, Any]:
    """Model, tokenizer, teacher and text; what `evaluate_model` takes."""
    import torch

    from ..data import load_documents, pack, split_documents
    from ..evaluation.settings import needed_tokens
    from ..pretrained import load_model

    dtype = getattr(torch, settings.dtype)
    model, tokenizer = load_model(settings.model, dtype)
    model.to(device)  # type: ignore[arg-type]
    teacher = None
    if settings.teacher == EXACT:
        teacher = model
    elif settings.teacher is not None:
        teacher = load_model(settings.teacher, dtype)[0].to(device)  # type: ignore[arg-type]
    text = None
    wanted = needed_tokens(settings)
    if wanted:
        documents = load_documents(settings.text, field=settings.text_field)
        if not settings.all_text:
            documents = split_documents(documents).held_out
        elif settings.text is not None and {".txt", ".md"} & set(Path(settings.text).suffixes):
            # Its sections were one text: judged as such, without an end of text between them, as perplexities of
            # WikiText and its like are published.
            documents = ["\n\n".join(documents)]
        text = pack(documents, tokenizer, settings.length, limit=max(1, -(-wanted // settings.length)))
    return {"model": model, "tokenizer": tokenizer, "teacher": teacher, "text": text}


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str | None) -> tuple[int, ...] | None:
    from .bench import numbers

    return None if text is None else tuple(numbers(text))


def _print(results: dict[str, Any]) -> None:
    """The figures, one a line."""
    from ..evaluation.suite import headline

    for mode, found in results.get("perplexity", {}).items():
        typer.echo(f"{mode:12} perplexity {found['ppl']:10.3f}   ({found['tokens']:,} tokens)")
    if "distance" in results:
        far = results["distance"]
        typer.echo(f"{'to teacher':12} KL {far['kl']:.4f} nats/token, same next token {100 * far['agreement']:.1f} %")
    theirs = headline(results.get("teacher", {}))
    for figure, value in headline(results).items():
        beside = f"   (teacher {theirs[figure]:.3f})" if figure in theirs else ""
        if figure != "perplexity" or beside:
            typer.echo(f"{figure:36} {value:10.3f}{beside}")
