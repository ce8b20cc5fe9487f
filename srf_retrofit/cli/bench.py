"""`srf-retrofit bench`: one command for all measurements, on a CPU or a GPU.

On a GPU these reproduce what is kept in benchmarks/results/:

    srf-retrofit bench attention --device cuda --output attention-gpu.json
    srf-retrofit bench decode --device cuda --output decode-gpu.json
    srf-retrofit bench train --device cuda --output train-gpu.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_KINDS = ("attention", "decode", "train", "seed")
_SHAPE = {"repeats", "batch_size", "heads", "kv_heads", "head_dim", "dtype"}
# Options that mean something in some measurements only; given elsewhere they are refused rather than ignored.
_OPTIONS = {
    ("attention", "CPU"): _SHAPE,
    ("decode", "CPU"): _SHAPE,
    ("seed", "CPU"): _SHAPE,
    ("seed", "GPU"): _SHAPE,
    ("attention", "GPU"): {
        "heads",
        "kv_heads",
        "head_dim",
        "dtype",
        "tokens",
        "seconds",
        "budget",
        "rivals",
        "backend",
        "plot",
    },
    ("decode", "GPU"): {"dtype", "seconds", "rivals", "models", "batches", "compile_", "largest", "plot"},
    ("train", "GPU"): {"tokens", "seconds", "models", "weights", "compile_", "plot"},
}


def bench(
    what: Annotated[str, typer.Argument(help="attention, decode, train (on a GPU), or seed.")] = "attention",
    lengths: Annotated[
        str | None, typer.Option(help="Sequence lengths or contexts, as 1024,4096 (one of them for seed).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: cuda where there is one]")] = None,
    repeats: Annotated[int | None, typer.Option(help="CPU: timed rounds. [default: 5]", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="CPU: rows. [default: 1]")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads. [default: 9; on a GPU 32 and 9]")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads. [default: 3; on a GPU 8 and 3]")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Head dimension. [default: 64; on a GPU 128 and 64]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. [default: float32; on a GPU bfloat16]")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="GPU: tokens in a batch, for attention and train.", min=1)] = None,
    seconds: Annotated[float | None, typer.Option(help="GPU: time spent on a cell.", min=0)] = None,
    budget: Annotated[
        float | None, typer.Option(help="GPU: seconds after which attention begins no further cell.", min=0)
    ] = None,
    rivals: Annotated[
        str | None, typer.Option(help="GPU: of cudnn,flash,fla,seed (attention) or exact,dynamic,static (decode).")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="GPU: triton, torch or auto, for attention.")] = None,
    models: Annotated[
        str | None, typer.Option("--models", "--model", help="GPU: llama-3.2-1b,smollm2-135m; for train also a model.")
    ] = None,
    batches: Annotated[str | None, typer.Option(help="GPU: batch sizes of decode, as 1,32,256.")] = None,
    weights: Annotated[str | None, typer.Option(help="GPU: bfloat16 or float32 (autocast), for train.")] = None,
    compile_: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="GPU: both sides of decode also compiled [default]; train compiled."
        ),
    ] = None,
    largest: Annotated[
        bool | None, typer.Option("--largest/--no-largest", help="GPU: decode also at its largest batch [default].")
    ] = None,
    plot: Annotated[str | None, typer.Option(help="GPU: PNG file to write. [default: beside --output]")] = None,
    output: Annotated[str | None, typer.Option(help="JSON file to write.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time, memory and roofline of attention, of a token (decode), of a training step (train), or beside the seed's."""
    from ..timing import choose_device, on_gpu

    if what not in _KINDS:
        raise ValueError(f"bench measures attention, decode, train or seed, got {what!r}")
    given: dict[str, Any] = {
        "repeats": repeats, "batch_size": batch_size, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
        "dtype": dtype, "tokens": tokens, "seconds": seconds, "budget": budget, "rivals": rivals, "backend": backend,
        "models": models, "batches": batches, "weights": weights, "compile_": compile_, "largest": largest,
        "plot": plot,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    device = choose_device(device)
    where = "GPU" if on_gpu(device) else "CPU"
    if (what, where) not in _OPTIONS:
        raise ValueError(f"bench {what} measures a GPU, and the device is {device!r}: run it where there is a CUDA one")
    idle = sorted(set(given) - _OPTIONS[what, where])
    if idle:
        names = ", ".join("--" + name.strip("_").replace("_", "-") for name in idle)
        raise ValueError(f"bench {what} on a {where} takes no {names}")
    sizes = None if lengths is None else numbers(lengths)
    common: dict[str, Any] = {"device": device, "output": output, "quiet": as_json}
    if what == "seed" or where == "CPU":
        _on_cpu(what, sizes, given, common)
        return
    if output is not None and "plot" not in given:
        given["plot"] = str(Path(output).with_suffix(".png"))
    _on_gpu(what, sizes, given, common)


def _on_cpu(what: str, sizes: list[int] | None, given: dict[str, Any], common: dict[str, Any]) -> None:
    from ..bench import operator as benchmark

    given = {"repeats": 5, **given}
    if what == "attention":
        benchmark.attention(lengths=sizes or benchmark.LENGTHS, **given, **common)
    elif what == "decode":
        benchmark.decode(contexts=sizes or benchmark.CONTEXTS, **given, **common)
    else:
        if sizes is not None and len(sizes) != 1:
            raise ValueError(f"the seed's operator is measured at one length, got {sizes}")
        benchmark.seed_operator(length=sizes[0] if sizes else 4096, **given, **common)


def _on_gpu(what: str, sizes: list[int] | None, given: dict[str, Any], common: dict[str, Any]) -> None:
    if "rivals" in given:
        given["rivals"] = [name.strip() for name in given["rivals"].split(",") if name.strip()]
    if "compile_" in given:
        given["compile"] = given.pop("compile_")
    if what == "attention":
        from ..bench import attention as benchmark_gpu

        shape = [given.pop(name, None) for name in ("heads", "kv_heads", "head_dim")]
        if any(x is not None for x in shape):
            if any(x is None for x in shape):
                raise ValueError("a shape is given by --heads, --kv-heads and --head-dim together")
            given["shapes"] = [tuple(shape)]
        benchmark_gpu.attention(lengths=sizes or benchmark_gpu.LENGTHS, **given, **common)
    elif what == "decode":
        from ..bench import decode as benchmark_decode

        if "models" in given:
            given["models"] = [name.strip() for name in given["models"].split(",")]
        if "batches" in given:
            given["batches"] = numbers(given["batches"])
        benchmark_decode.decode(contexts=sizes or benchmark_decode.CONTEXTS, **given, **common)
    else:
        from ..bench import train as benchmark_train

        if "models" in given:
            given["model"] = given.pop("models")
        benchmark_train.train(lengths=sizes or benchmark_train.LENGTHS, **given, **common)


def numbers(text: str) -> list[int]:
    """`"1024,4096"` as `[1024, 4096]`.

    Raises
    ------
    ValueError
        For anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"expected numbers like 1024,4096, got {text!r}")
    return [int(part) for part in parts]
