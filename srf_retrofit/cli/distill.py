"""`srf-retrofit distill CONFIG.yaml`: a whole distillation, from the softmax model to the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import recipes


def distill(
    config: Annotated[Path | None, typer.Argument(help="YAML recipe, as those in configs/.")] = None,
    model: Annotated[str | None, typer.Option(help="smollm2, a directory, or a hub name. [default: smollm2]")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Softmax model; 'exact': the model's own form. [default: before surgery]")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Files, directories or hub data sets, with commas. [default: Python language reference]"),
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="Field of .jsonl rows or data set. [default: text]")] = None,
    held_out: Annotated[str | None, typer.Option(help="Text to judge on. [default: a share of --text]")] = None,
    output: Annotated[str | None, typer.Option(help="Directory of the run.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of the logit stage. [default: 4194304]")] = None,
    tokens_per_step: Annotated[int | None, typer.Option(help="Tokens of an optimizer step. [default: 16384]")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a row. [default: 2048]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in one forward. [default: 4]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="At its peak. [default: 1e-4]")] = None,
    tune_tokens: Annotated[int | None, typer.Option(help="Tokens to tune the softmax model on. [default: 0]")] = None,
    transfer_tokens: Annotated[int | None, typer.Option(help="Tokens of attention transfer. [default: 0]")] = None,
    recall_share: Annotated[float | None, typer.Option(help="Share of recall-shaped rows. [default: 0]")] = None,
    settle: Annotated[str | None, typer.Option(help="none, freeze or train. [default: none]")] = None,
    train: Annotated[str | None, typer.Option(help="all, weights, attention, lora, ... [default: all]")] = None,
    num_features: Annotated[int | None, typer.Option(help="Features per key/value head. [default: 64]")] = None,
    window: Annotated[int | None, typer.Option(help="Positions per exact block. [default: 32]")] = None,
    sinks: Annotated[int | None, typer.Option(help="Leading positions kept exact. [default: 4]")] = None,
    retained: Annotated[int | None, typer.Option(help="Slots for keys kept exact. [default: 128]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: cuda where there is one]")] = None,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="Autocast. [default: where CUDA supports it]")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing/--no-checkpointing", help="Trade time for memory."),
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. [default: 100]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every draw. [default: 0]")] = None,
    resume: Annotated[bool | None, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace an earlier run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Retrofit a softmax model, distil it from itself, judge it, and save model and report."""
    given: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("config", "as_json") and v is not None}
    if text is not None and "," in text:
        given["text"] = tuple(part.strip() for part in text.split(",") if part.strip())
    from ..pipeline import run as pipeline
    from ..pipeline.report import summary
    from ..pipeline.settings import DistillSettings

    settings = recipes.resolve(DistillSettings, recipes.read_recipe(config), **given)
    results = pipeline.run(settings)
    if as_json:
        json.dump(results, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    typer.echo(summary(results))
    typer.echo(f"\nmodel: {Path(str(settings.output)) / 'model'}\nreport: {Path(str(settings.output)) / 'report.md'}")
