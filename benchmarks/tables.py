"""Write the measured tables of README.md from the results kept in benchmarks/results/.

`python benchmarks/tables.py` rewrites the marked blocks, `--check` fails if they differ from the results. Blocks of
GPU results are written where README.md has their markers; a marked block without its results is an error. Pictures of
GPU results go to docs/.
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from srf_retrofit.bench import attention_report
from srf_retrofit.bench import decode as benchmark_decode
from srf_retrofit.bench import train as benchmark_train
from srf_retrofit.bench.measurement import figure
from srf_retrofit.bench.plot import short
from srf_retrofit.report import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise SystemExit(f"README.md shows results that are not there: {path.relative_to(ROOT)}")
    return json.loads(path.read_text(encoding="utf-8"))


def length(tokens: str | int) -> str:
    return short(int(tokens))


def demo_table() -> str:
    """Perplexity of teacher, zero-shot and tuned model, whole and by parts, and the distance to the teacher."""
    results = load("demo")
    names = {"teacher": "teacher (softmax)", "zero_shot": "retrofitted, no training", "tuned": "retrofitted, tuned"}
    modes = ("full", "no_tail", "tail_only")
    rows = []
    for key, name in names.items():
        perplexity = results["perplexity"][key]
        cells = [f"{perplexity[mode]['ppl']:.2f}" if mode in perplexity else "" for mode in modes]
        distance = results["distance"].get(key)
        rows.append(
            [name, *cells, *([f"{distance['kl']:.3f}", f"{distance['agreement']:.3f}"] if distance else ["", ""])]
        )
    return table(["", "perplexity", "exact keys only", "features only", "KL to teacher", "same top token"], rows)


def attention_table() -> str:
    """Time of the operator as a share of softmax attention's, and peak memory, by length."""
    results = load("attention-cpu")
    lengths = list(results["forward"]["vs_softmax"]["default"])
    rows = []
    for variant in ("default", "pure"):
        for key, name in (("forward", "forward"), ("forward_backward", "forward + backward")):
            ratios = results[key]["vs_softmax"][variant]
            rows.append([f"{variant}, {name}", *(f"{ratios[n]:.2f}" for n in lengths)])
    return table(["time / time of softmax (SDPA)", *map(length, lengths)], rows)


def decode_table() -> str:
    """Time of one decoding step of a layer against context, and the bytes that it keeps."""
    results = load("decode-cpu")
    contexts = list(results["vs_first_context"]["softmax"])
    rows = [
        [name, *(f"{results['vs_first_context'][key][n]:.2f}" for n in contexts)]
        for key, name in (("softmax", "softmax, KV cache"), ("default", "default"), ("pure", "pure"))
    ]
    return table(["time of a step / its time at 1k", *map(length, contexts)], rows)


def milliseconds(cell: dict[str, Any] | None) -> str:
    return figure(cell["milliseconds"]) if cell is not None and "milliseconds" in cell else "-"


def attention_gpu_table(name: str = "attention-gpu") -> str:
    """Milliseconds of attention, forward and backward, by shape, operator and length."""
    results = load(name)
    # Lengths that were not reached have no column.
    lengths = sorted({cell["length"] for cell in results["cells"] if "milliseconds" in cell})
    operators = ("window", "retained", "cudnn", "fla", "fla_maps", "seed")
    rows = []
    for shape in dict.fromkeys(cell["shape"] for cell in results["cells"]):
        heads, _, dimension = shape.partition(",")
        found = attention_report.by_operator(results, shape, "forward_backward")
        for operator in (name for name in operators if name in found):
            times = (attention_report.scaled(results, found[operator].get(n)) for n in lengths)
            cells = ["-" if ms is None else figure(ms) for ms in times]
            rows.append([f"{heads} heads of {dimension}: {attention_report.title(operator)}", *cells])
    device = results["environment"]["device"]
    header = f"forward + backward, ms for {results['tokens']:,} tokens, {device}"
    return table([header, *map(length, lengths)], rows)


def decode_gpu_table() -> str:
    """Milliseconds a token of whole models by batch and context, ours and the best exact side."""
    results = load("decode-gpu")
    contexts = sorted({cell["context"] for cell in results["model"]})
    rows = []
    for model, state in results["state"].items():
        for batch in benchmark_decode.batches_of(results, model):
            sides = benchmark_decode.by_side(results, model, batch)
            best = [side for side in ("ours_compiled", "exact_compiled") if side in sides]
            for side, cells in ((side, sides[side]) for side in best or ("ours", "exact") if side in sides):
                if any("milliseconds" in cell for cell in cells.values()):
                    title = f"{model}, batch {batch:,}: {benchmark_decode.SIDES[side]}"
                    rows.append([title, *(milliseconds(cells.get(n)) for n in contexts)])
        rows.append([f"{model}: state in tokens of cache", *[f"{state['kv_tokens']:.0f}"] * len(contexts)])
    return table([f"ms a token, {results['environment']['device']}", *map(length, contexts)], rows)


def train_gpu_table() -> str:
    """Tokens per second and peak memory of training steps by length."""
    results = load("train-gpu")
    rows = []
    for objective, cells in benchmark_train.by_objective(results).items():
        for n, cell in sorted(cells.items()):
            if "tokens_per_second" in cell:
                speed = f"{cell['tokens_per_second']:,.0f}"
                memory = f"{cell['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in cell else ""
                rows.append([objective, length(n), speed, memory])
    title = f"{results['model']}, {results['tokens']:,} tokens a step, {results['environment']['device']}"
    return table([title, "length", "tokens/s", "peak GiB"], rows)


def quality_table() -> str:
    """Perplexity by form of attention before and after distillation, and recall after it."""
    files = [load(path.stem) for path in sorted(RESULTS.glob("quality-gpu*.json"))]
    lengths, teacher = files[0]["lengths"], files[0]["teacher"]

    def cells(found: dict[str, Any]) -> list[str]:
        return [f"{found['perplexity']['full'][str(n)]['ppl']:.2f}" for n in lengths]

    def recall(found: dict[str, Any]) -> list[str]:
        if "passkey" not in found:
            return ["", ""]
        far = [x["accuracy"] for x in found["passkey"] if x["context"] == 2048]
        near = [x["accuracy"] for x in found["copies"] if x["distance"] == 100]
        return [f"{sum(far) / len(far):.2f}", f"{near[0]:.2f}"]

    rows = []
    for name, runs in (item for results in files for item in results["runs"].items()):
        for run in (run for run in runs if "trained" in run):
            trained = run["trained"]
            state = f"{trained['state']['kv_tokens']:.0f}" if trained["state"] else ""
            millions = f"{run['tokens'] / 1e6:.1f}"
            rows.append([name, state, millions, *cells(run["zero_shot"])[:1], *cells(trained), *recall(trained)])
    # The best first; equal budgets stand together.
    rows.sort(key=lambda row: (-round(float(row[2])), float(row[4])))
    rows.insert(0, ["SmolLM2-135M itself (softmax)", "", "", "", *cells(teacher), *recall(teacher)])
    header = ["WikiText-2 perplexity", "state, tokens of cache", "trained on, M tokens", "untrained, 1k"]
    return table([*header, *(f"trained, {length(n)}" for n in lengths), "pass key, 2k", "copy, 100"], rows)


BLOCKS = {"demo": demo_table, "attention": attention_table, "decode": decode_table}
PICTURES: dict[str, Any] = {
    "attention-gpu": attention_report,
    "decode-gpu": benchmark_decode,
    "train-gpu": benchmark_train,
}
GPU_BLOCKS = {
    "attention-gpu": attention_gpu_table,
    "attention-gpu-rivals": partial(attention_gpu_table, "attention-gpu-rivals"),
    "decode-gpu": decode_gpu_table,
    "train-gpu": train_gpu_table,
    "quality-gpu": quality_table,
}


def render(text: str) -> str:
    """`text` with every marked block replaced by its table."""
    for name, make in {**BLOCKS, **GPU_BLOCKS}.items():
        begin, end = f"<!-- {name}: from benchmarks/results -->", f"<!-- end {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
        if not pattern.search(text):
            if name in GPU_BLOCKS and begin not in text:
                continue
            raise SystemExit(f"README.md has no block {name!r}")
        block = f"{begin}\n{make()}\n{end}"
        text = pattern.sub(lambda _, block=block: block, text)
    return text


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = render(text)
    if "--check" in sys.argv[1:]:
        if new != text:
            raise SystemExit("README.md differs from benchmarks/results: run python benchmarks/tables.py")
        return
    path.write_text(new, encoding="utf-8")
    for name, module in PICTURES.items():
        if (RESULTS / f"{name}.json").is_file():
            module.plot_result(load(name), ROOT / "docs" / f"{name}.png")


if __name__ == "__main__":
    main()
