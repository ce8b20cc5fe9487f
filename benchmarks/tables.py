"""Write the measured tables of README.md from the results kept in benchmarks/results/.

`python benchmarks/tables.py` rewrites the marked blocks, `--check` fails if they differ from the results.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from srf_retrofit.report import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def length(tokens: str | int) -> str:
    return f"{int(tokens) // 1024}k"


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


BLOCKS = {"demo": demo_table, "attention": attention_table, "decode": decode_table}


def render(text: str) -> str:
    """`text` with every marked block replaced by its table."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name}: from benchmarks/results -->", f"<!-- end {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
        if not pattern.search(text):
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


if __name__ == "__main__":
    main()
