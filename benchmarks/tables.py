"""Write the measured tables of README.md from the results kept in benchmarks/results/.

`python benchmarks/tables.py` rewrites the marked blocks there and in docs/, `--check` fails if they differ. Blocks of
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
    operators = ("window", "retained", "pure", "cudnn", "fla", "fla_maps", "seed")
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


Runs = list[dict[str, Any]]


def quality_runs() -> dict[str, list[Runs]]:
    """All runs that are kept, by name: those that differ in their seed alone together, the longest schedule first."""
    found: dict[str, dict[int, Runs]] = {}
    for path in sorted(RESULTS.glob("quality-gpu*.json")):
        for name, runs in load(path.stem)["runs"].items():
            for run in runs:
                if "zero_shot" in run:
                    found.setdefault(name, {}).setdefault(planned(run), []).append(run)
    return {name: [runs for _, runs in sorted(by_tokens.items(), reverse=True)] for name, by_tokens in found.items()}


def perplexities(runs: Runs, budget: str, n: int = 1024) -> list[float]:
    """Perplexity in windows of `n` after a budget of training, of each run that has it."""
    found = []
    for run in runs:
        by_budget = {in_millions(at): each for at, each in stages(run).items()}
        by_length = by_budget.get(budget, {}).get("full", {})
        if str(n) in by_length:
            found.append(by_length[str(n)]["ppl"])
    return found


def stages(run: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What a run's model was judged to be, by tokens of text, those that its teacher was tuned on among them."""
    found = {run["settings"].get("tuned") or 0: run["zero_shot"]["perplexity"]} | {
        int(at): each for at, each in run.get("milestones", {}).items()
    }
    return found | ({planned(run): run["trained"]["perplexity"]} if "trained" in run else {})


def planned(run: dict[str, Any]) -> int:
    """Tokens of all schedules of a run."""
    return int(run["settings"]["tokens"] + run["settings"].get("then", {}).get("tokens", 0))


def in_millions(tokens: int) -> str:
    return f"{tokens / 1e6:.2g}M" if tokens else "0"


def mean_and_spread(values: list[float], digits: int = 2) -> str:
    """The mean, and half of the distance between the extremes where there are several."""
    if not values:
        return ""
    text = f"{sum(values) / len(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ±{(max(values) - min(values)) / 2:.{digits}f}"


def perplexity_table(groups: list[tuple[str, Runs]]) -> str:
    """By form of attention: state, perplexity at 1k by tokens of training, and longer windows at the last of them."""
    budgets = [in_millions(n) for n in sorted({at for _, runs in groups for run in runs for at in stages(run)})]
    budgets = list(dict.fromkeys(budgets))
    rows = []
    for name, runs in groups:
        state = runs[0]["zero_shot"]["state"]
        # Runs that were cut off have no end.
        last = in_millions(max(at for run in runs for at in stages(run)))
        cells = [mean_and_spread(perplexities(runs, budget)) for budget in budgets]
        cells += [mean_and_spread(perplexities(runs, last, n)) for n in (4096, 8192)]
        rows.append([name, f"{state['kv_tokens']:.0f}" if state else "", *cells])
    title = "WikiText-2 perplexity, windows of 1k, by tokens of text"
    return table([title, "state", *budgets, "last, 4k", "last, 8k"], rows)


def shown(tuned: bool) -> list[tuple[str, Runs]]:
    """Runs whose teacher was tuned, or was not, the best first; in front of the former the softmax model."""
    groups = [(name, runs) for name, several in quality_runs().items() for runs in several]

    def best(group: tuple[str, Runs]) -> float:
        return min(each["full"]["1024"]["ppl"] for run in group[1] for each in stages(run).values())

    def setting(group: tuple[str, Runs], key: str) -> Any:
        return group[1][0]["settings"].get(key)

    found = sorted((g for g in groups if bool(setting(g, "tuned")) == tuned and not setting(g, "softmax")), key=best)
    softmax = max((g for g in groups if setting(g, "softmax")), key=lambda g: setting(g, "tokens"), default=None)
    return [softmax, *found] if tuned and softmax else found


# What README.md shows of the tuned ones: all tokens for tuning, with keys in eight bits and without, or most for
# distillation; what they are compared with; and what a tail is worth.
HEADLINE = (
    "softmax, tuned all the way",
    "tuned on 10M, hybrid in eight bits, fitted only",
    "tuned on 10M, hybrid in eight bits, 400 tokens of state, fitted only",
    "tuned on 10M, hybrid, fits on 4k, fitted only",
    "tuned on 9M, hybrid, 400 tokens of state, slots by head",
    "tuned on 10M, hybrid, 280 tokens of state, slots by head, fitted only",
    "tuned on 10M, hybrid, slots by head, fitted only",
    "tuned first, hybrid, 400 tokens of state, slots by head",
    "tuned first, hybrid, slots by head",
    "tuned first, window + retained, slots by head",
    "tuned first, window, 18M",
    "tuned first, window + Hedgehog (LoLCATs), 18M",
    "tuned first, window + FAVOR+, 18M",
    "tuned first, window + simplex, resampled (the seed's recipe), 18M",
    "tuned first, window + ReLU (T2R), 18M",
    "tuned first, pure, gated, 256 features",
    "tuned first, pure, gated, 64 features",
    "tuned first, pure, gated, 64 features, longer rows at the end",
)


def headline() -> list[tuple[str, Runs]]:
    """What `shown` has of the tuned ones that README.md names."""
    return [group for group in shown(tuned=True) if group[0] in HEADLINE]


def quality_table() -> str:
    """Retrofits of a softmax model that was tuned on the text first: those of the headline."""
    return perplexity_table(headline())


def quality_tuned_table() -> str:
    """All of them."""
    return perplexity_table(shown(tuned=True))


def quality_untuned_table() -> str:
    """Retrofits of the softmax model as it is."""
    return perplexity_table(shown(tuned=False))


def quality_tasks_table() -> str:
    """Recall and tasks of the softmax model, as it is and tuned, and of the headline's retrofits that were asked."""
    return tasks_table(headline())


def quality_all_tasks_table() -> str:
    """Recall and tasks of all retrofits that were asked."""
    return tasks_table(shown(tuned=True) + shown(tuned=False))


def tasks_table(groups: list[tuple[str, Runs]]) -> str:
    """Recall and tasks at the end of training, in front those of the softmax model as it is."""
    rows = []

    def add(name: str, judged: list[dict[str, Any]]) -> None:
        far = [[x["accuracy"] for x in found["passkey"] if x["context"] == 2048] for found in judged]
        near = [x["accuracy"] for found in judged for x in found["copies"] if x["distance"] == 100]
        tasks = [[found["tasks"][f"eval_{task}"]["acc"] for found in judged if "tasks" in found] for task in TASKS]
        recall = [[sum(x) / len(x) for x in far], near]
        rows.append([name, *map(mean_and_spread, recall), *(mean_and_spread(x, 3) for x in tasks)])

    teachers = (load(path.stem).get("teacher", {}) for path in sorted(RESULTS.glob("quality-gpu*.json")))
    add("SmolLM2-135M itself (softmax)", [next(found for found in teachers if "tasks" in found)])
    for name, runs in groups:
        judged = [run["trained"] for run in runs if "passkey" in run.get("trained", {})]
        if judged:
            add(name, judged)
    return table(["at the end", "pass key, 2k", "copy, 100", "LAMBADA", "PIQA", "ARC-easy"], rows)


TASKS = ("lambada_openai", "piqa", "arc_easy")
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
    "quality-gpu-tasks": quality_tasks_table,
}
# What README.md has no room for.
ELSEWHERE = {
    "docs/quality.md": {
        "quality-gpu-tuned": quality_tuned_table,
        "quality-gpu-all-tasks": quality_all_tasks_table,
        "quality-gpu-untuned": quality_untuned_table,
    }
}


def render(text: str, blocks: dict[str, Any]) -> str:
    """`text` with every marked block replaced by its table; only those of a GPU may be left out."""
    for name, make in blocks.items():
        begin, end = f"<!-- {name}: from benchmarks/results -->", f"<!-- end {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
        if not pattern.search(text):
            if name in GPU_BLOCKS and begin not in text:
                continue
            raise SystemExit(f"there is no block {name!r} where it should be")
        block = f"{begin}\n{make()}\n{end}"
        text = pattern.sub(lambda _, block=block: block, text)
    return text


def main() -> None:
    check = "--check" in sys.argv[1:]
    for page, blocks in {"README.md": BLOCKS | GPU_BLOCKS, **ELSEWHERE}.items():
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        new = render(text, blocks)
        if check and new != text:
            raise SystemExit(f"{page} differs from benchmarks/results: run python benchmarks/tables.py")
        if not check:
            path.write_text(new, encoding="utf-8")
    if check:
        return
    for name, module in PICTURES.items():
        if (RESULTS / f"{name}.json").is_file():
            module.plot_result(load(name), ROOT / "docs" / f"{name}.png")


if __name__ == "__main__":
    main()
