"""`srf-retrofit synthesize`: text to distil with, written by the model itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import recipes

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SynthesisSettings:
    """Settings of `synthesize`; `chat` None takes conversations where the tokenizer has a chat template."""

    model: str = "smollm2"
    output: str | None = None
    overwrite: bool = False
    tokens: int = 1_000_000
    length: int = 512
    batch_size: int = 64
    chat: bool | None = None
    temperature: float = 1.0
    top_p: float = 0.95
    max_repeated: float = 0.3
    similarity: float = 0.7
    static_cache: bool = False
    device: str | None = None
    dtype: str | None = None
    seed: int = 0


def synthesize(
    output: Annotated[str | None, typer.Option(help="File to write: .jsonl, .jsonl.gz or .jsonl.xz.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML recipe.")] = None,
    model: Annotated[str | None, typer.Option(help="smollm2, a directory, or a hub name. [default: smollm2]")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to keep. [default: 1000000]")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a document at most. [default: 512]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Documents written at once. [default: 64]")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Conversations, or plain text. [default: by the chat template]"),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the sampling. [default: 1.0]")] = None,
    top_p: Annotated[float | None, typer.Option(help="Probability to sample from. [default: 0.95]")] = None,
    max_repeated: Annotated[
        float | None, typer.Option(help="Share of repeated 4-grams to bear. [default: 0.3]")
    ] = None,
    similarity: Annotated[float | None, typer.Option(help="From here on a text is a duplicate. [default: 0.7]")] = None,
    static_cache: Annotated[
        bool | None, typer.Option("--static-cache", help="Static key/value cache; compiled on a GPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: cuda where there is one]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. [default: float32; on a GPU bfloat16]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every draw. [default: 0]")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace the file of an earlier run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Let a model write text to distil with; filters what repeats, and goes on where it was interrupted."""
    given: dict[str, Any] = {
        "output": output, "model": model, "tokens": tokens, "length": length, "batch_size": batch_size, "chat": chat,
        "temperature": temperature, "top_p": top_p, "max_repeated": max_repeated, "similarity": similarity,
        "static_cache": static_cache, "device": device, "dtype": dtype, "seed": seed, "overwrite": overwrite,
    }  # fmt: skip
    settings = recipes.resolve(SynthesisSettings, recipes.read_recipe(config), **given)
    summary = run(settings, progress=not as_json)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    counts = summary["counts"]
    dropped = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n and name not in _KEPT)
    typer.echo(f"{summary['rows']:,} texts of {summary['tokens']:,} tokens in {settings.output}")
    typer.echo(f"of {counts['written']:,} written; dropped: {dropped or 'none'}")


_KEPT = ("written", "kept")


def run(settings: SynthesisSettings, *, progress: bool = True) -> dict[str, Any]:
    """Write the file; what was kept and dropped, as JSON.

    Raises
    ------
    ValueError
        For a missing output, an unknown dtype, and see `synthesis.synthesize`.
    """
    import torch

    from ..pretrained import load_model
    from ..synthesis import synthesize as synthesis
    from ..timing import choose_device, on_gpu

    if settings.output is None:
        raise ValueError("no output file: pass --output FILE.jsonl.gz")
    device = choose_device(settings.device)
    dtype = settings.dtype or ("bfloat16" if on_gpu(device) else "float32")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    synthesis.check_output(settings.output, overwrite=settings.overwrite)
    model, tokenizer = load_model(settings.model, getattr(torch, dtype))
    if settings.chat and not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {settings.model} has no chat template: pass --no-chat")
    model.to(device)  # type: ignore[arg-type]
    chat = bool(tokenizer.chat_template) if settings.chat is None else settings.chat
    result = synthesis.synthesize(
        model,
        tokenizer,
        tokens=settings.tokens,
        prompts="chat" if chat else "bos",
        length=settings.length,
        batch_size=settings.batch_size,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_repeated=settings.max_repeated,
        similarity=settings.similarity,
        cache="static" if settings.static_cache else "dynamic",
        seed=settings.seed,
        output=settings.output,
        overwrite=settings.overwrite,
        progress=progress,
    )
    return {
        "output": settings.output,
        "rows": len(result.rows),
        "tokens": result.tokens,
        "counts": result.counts,
        "settings": {**recipes.to_dict(settings), "chat": chat, "device": device, "dtype": dtype},
    }
