"""The command line: `srf-retrofit demo | retrofit | plan | distill | synthesize | eval | generate | bench`.

Every setting has a default, a recipe (`--config FILE.yaml`) overrides it, and an option overrides both. With `--json`
standard output holds one JSON value and nothing else; progress goes to standard error.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from .. import recipes
from ..modeling.configuration import SRFConfig
from . import bench as cli_bench
from . import distill as cli_distill
from . import evaluate as cli_eval
from . import synthesize as cli_synthesize

# Mistakes of the user and of the machine; anything else is a fault of this package and keeps its traceback.
_EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError)


class OneLineErrors(typer.core.TyperGroup):
    """Ends a command that fails in an expected way with one line and exit status 2, unless `--debug` is given."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _EXPECTED as error:
            # The command line library signals exits through RuntimeError, too.
            if ctx.params.get("debug") or type(error).__module__.startswith(("typer", "click")):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            typer.echo(f"error: {reason}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
) -> None:
    """Retrofit pretrained Llama models with simplex-random-feature attention."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


# Options that several commands share. None means "as the recipe says, or else the default".
Model = Annotated[str | None, typer.Option(help="smollm2, a directory, or a hub name. [default: smollm2]")]
Text = Annotated[
    str | None,
    typer.Option(help="Text file (.txt, .jsonl, also .gz, .xz) or hub data set. [default: Python language reference]"),
]
TextField = Annotated[str | None, typer.Option(help="Field of .jsonl rows or data set. [default: text]")]
Config = Annotated[Path | None, typer.Option(help="YAML recipe.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Overwrite = Annotated[bool | None, typer.Option("--overwrite", help="Replace the output directory of an earlier run.")]
NumFeatures = Annotated[int | None, typer.Option(help="Random features per key/value head. [default: 64]")]
Window = Annotated[int | None, typer.Option(help="Positions per exact block. [default: 32]")]
Sinks = Annotated[int | None, typer.Option(help="Leading positions kept exact. [default: 4]")]
Retained = Annotated[int | None, typer.Option(help="Slots for keys kept exact. [default: 64]")]
Projection = Annotated[str | None, typer.Option(help="simplex, orthogonal or iid. [default: simplex]")]
Seed = Annotated[int | None, typer.Option(help="Seed of every draw. [default: 0]")]
Geometry = Annotated[str | None, typer.Option(help="identity, shift, preconditioner or proposal.")]
CalibrationTokens = Annotated[int | None, typer.Option(help="Tokens to fit the geometry on. [default: 8192]")]
Length = Annotated[int | None, typer.Option(help="Tokens per block. [default: 512]")]
Layers = Annotated[str | None, typer.Option(help="Layers to replace, as 0-3,7. [default: all]")]


@dataclass(frozen=True)
class RetrofitSettings:
    """Settings of `retrofit` and `plan`."""

    model: str = "smollm2"
    text: str | None = None
    text_field: str = "text"
    output: str | None = None
    overwrite: bool = False
    geometry: str = "preconditioner"
    calibration_tokens: int = 8192
    length: int = 512
    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536)
    srf: SRFConfig = field(default_factory=SRFConfig)


@app.command()
def demo(
    output: Annotated[str | None, typer.Option(help="Directory to create. [default: demo-output]")] = None,
    config: Config = None,
    model: Model = None,
    text: Text = None,
    text_field: TextField = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of the distillation.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Blocks per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    length: Length = None,
    eval_tokens: Annotated[int | None, typer.Option(help="Held-out tokens to judge on.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate for each prompt.")] = None,
    calibration_tokens: CalibrationTokens = None,
    geometry: Geometry = None,
    num_features: NumFeatures = None,
    window: Window = None,
    sinks: Sinks = None,
    retained: Retained = None,
    projection: Projection = None,
    seed: Seed = None,
    overwrite: Overwrite = None,
    as_json: Json = False,
) -> None:
    """Calibrate, retrofit, distil, judge, save, reload and generate with a real Llama; writes a report."""
    from .. import demo as demonstration
    from ..report import perplexity_table

    given = _given(locals())
    recipe = recipes.read_recipe(config)
    settings = recipes.resolve(demonstration.DemoSettings, recipe, **given)
    results = demonstration.run(settings)
    if as_json:
        _print_json(results)
        return
    typer.echo("\n" + perplexity_table(results))
    typer.echo(f"\nreport: {Path(settings.output) / 'report.md'}")


@app.command()
def retrofit(
    output: Annotated[str | None, typer.Option(help="Directory to create for the retrofitted model.")] = None,
    config: Config = None,
    model: Model = None,
    text: Text = None,
    text_field: TextField = None,
    layers: Layers = None,
    calibration_tokens: CalibrationTokens = None,
    length: Length = None,
    geometry: Geometry = None,
    num_features: NumFeatures = None,
    window: Window = None,
    sinks: Sinks = None,
    retained: Retained = None,
    projection: Projection = None,
    seed: Seed = None,
    overwrite: Overwrite = None,
    as_json: Json = False,
) -> None:
    """Replace the attention of a pretrained model, fit its geometry to text, and save it; no training."""
    from ..calibration import calibrate
    from ..data import load_documents, pack
    from ..files import atomic_directory, check_writable
    from ..pretrained import load_model
    from ..surgery import plan_retrofit
    from ..surgery import retrofit as apply

    settings = recipes.resolve(RetrofitSettings, recipes.read_recipe(config), **_given(locals()))
    if settings.output is None:
        raise ValueError("no output directory: pass --output DIR")
    check_writable(Path(settings.output), overwrite=settings.overwrite, mark="recipe.json")
    loaded, tokenizer = load_model(settings.model)
    plan = plan_retrofit(loaded, settings.srf)
    documents = load_documents(settings.text, field=settings.text_field)
    blocks = pack(documents, tokenizer, settings.length, limit=max(1, settings.calibration_tokens // settings.length))
    apply(loaded, settings.srf)
    calibrate(loaded, blocks.batches(1), geometry=settings.geometry, max_tokens=None)
    with atomic_directory(settings.output, overwrite=settings.overwrite, mark="recipe.json") as directory:
        loaded.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / "recipe.json").write_text(json.dumps(recipes.to_dict(settings), indent=2) + "\n")
    if as_json:
        _print_json({"output": settings.output, "plan": plan.to_dict(), "settings": recipes.to_dict(settings)})
        return
    typer.echo(f"{plan}\n\nsaved to {settings.output}")


@app.command()
def plan(
    config: Config = None,
    model: Model = None,
    layers: Layers = None,
    num_features: NumFeatures = None,
    window: Window = None,
    sinks: Sinks = None,
    retained: Retained = None,
    projection: Projection = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Say what `retrofit` would change, and what it would save; changes nothing and loads no weights."""
    from ..pretrained import load_skeleton
    from ..surgery import plan_retrofit

    settings = recipes.resolve(RetrofitSettings, recipes.read_recipe(config), **_given(locals()))
    found = plan_retrofit(load_skeleton(settings.model), settings.srf)
    if as_json:
        _print_json(found.to_dict())
    else:
        typer.echo(str(found))


app.command("eval")(cli_eval.evaluate)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer or continue.")],
    model: Model = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text itself, without a chat template.")] = False,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Generate text with a model, retrofitted or not."""
    import torch

    from ..demo import generate as answer
    from ..pretrained import load_model

    name = model or "smollm2"
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    loaded, tokenizer = load_model(name)
    torch.manual_seed(seed or 0)
    text = answer(loaded, tokenizer, prompt, new_tokens=new_tokens, chat=not raw, temperature=temperature)
    if as_json:
        _print_json({"model": name, "prompt": prompt, "text": text})
    else:
        typer.echo(text)


app.command()(cli_bench.bench)
app.command()(cli_synthesize.synthesize)
app.command()(cli_distill.distill)


# What a command's own frame holds that is not a setting.
_NOT_SETTINGS = {"config", "as_json"}


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options among a command's locals, with `layers` parsed."""
    plain = (str, int, float, bool)
    given: dict[str, Any] = {k: v for k, v in arguments.items() if k not in _NOT_SETTINGS and isinstance(v, plain)}
    if "layers" in given:
        given["layers"] = parse_layers(given["layers"])
    return given


def parse_layers(text: str) -> list[int]:
    """`"0-3,7"` as `[0, 1, 2, 3, 7]`.

    Raises
    ------
    ValueError
        For anything but numbers and rising ranges.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"layers must look like 0-3,7, got {text!r}")
        stop = int(last) if dash else int(first)
        if stop < int(first):
            raise ValueError(f"layers: {part.strip()} runs backwards in {text!r}")
        found += range(int(first), stop + 1)
    return found


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    app()
