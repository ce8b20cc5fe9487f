"""Quality at equal tokens and equal state: distil SmolLM2 into several forms of attention and judge them alike.

    python benchmarks/quality.py prepare TEXT.jsonl.xz TOKENS.bin
    python benchmarks/quality.py run RUNS.yaml TOKENS.bin --held-out WIKITEXT.txt.gz --output RESULTS.json [--tasks A B]

Documents are shuffled by a fixed seed, joined by the end-of-text token and written as 16-bit token ids. Every run sees
the same tokens in the same order. The teacher, and every model before and after training, is judged on the first
98,304 tokens of the held-out text, in windows of 1,024 and 4,096, and by recall; the tasks are scored in full. Models
are judged in bfloat16. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from srf_retrofit import SRFConfig, calibrate, retrofit
from srf_retrofit.bench.measurement import environment
from srf_retrofit.data import TokenBlocks, load_documents, read_documents, tokenise
from srf_retrofit.evaluation.choices import read_items, score_items
from srf_retrofit.evaluation.long_text import length_perplexity
from srf_retrofit.evaluation.recall import copy_by_distance, passkey_grid, word_tokens
from srf_retrofit.evaluation.suite import state_cost
from srf_retrofit.files import write_json
from srf_retrofit.foresight import calibrate_foresight
from srf_retrofit.modeling.attention import srf_attentions
from srf_retrofit.modeling.features import SRFFeatures
from srf_retrofit.pretrained import load_smollm2
from srf_retrofit.tail_gain import calibrate_gain
from srf_retrofit.training.distillation import distill
from srf_retrofit.training.settling import settle_features

EVALUATED = 98_304
LENGTHS = (1024, 4096)
EDGES = (0, 256, 512, 1024, 2048, 3072, 4096)


def prepare(text: str, output: str) -> None:
    """Documents of `text`, shuffled, as one stream of 16-bit token ids."""
    _, tokenizer = load_smollm2()
    documents = load_documents(text)
    random.Random(0).shuffle(documents)
    ids = np.concatenate([np.asarray(x, dtype=np.uint16) for x in tokenise(documents, tokenizer)])
    ids.tofile(output)
    print(f"{len(documents):,} documents, {len(ids):,} tokens")


class Judge:
    """The same questions to every model."""

    def __init__(self, tokenizer: Any, held_out: str, tasks: list[str], filler: TokenBlocks) -> None:
        self.tokenizer, self.filler = tokenizer, filler
        ids = tokenizer("\n\n".join(read_documents(held_out)), add_special_tokens=False, verbose=False)["input_ids"]
        self.text = TokenBlocks(torch.tensor(ids[:EVALUATED]).view(1, -1))
        self.tasks = {Path(task).name.split(".")[0]: read_items(task) for task in tasks}

    def __call__(self, model: Any, *, recall: bool, tasks: bool) -> dict[str, Any]:
        model = copy.deepcopy(model).to(torch.bfloat16)
        layers = srf_attentions(model)
        modes = ["full", "no_tail"] if layers and layers[0].srf_config.num_features else ["full"]
        if layers and not layers[0].srf_config.window:
            modes = ["full"]
        out: dict[str, Any] = {
            "perplexity": {m: length_perplexity(model, self.text, lengths=LENGTHS, edges=EDGES, mode=m) for m in modes},
            "state": state_cost(model),
        }
        if recall:
            out["passkey"] = passkey_grid(model, self.tokenizer, self.filler, contexts=(1024, 2048), trials=8)
            out["copies"] = copy_by_distance(model, word_tokens(self.tokenizer), distances=(50, 100, 200, 500))
        if tasks:
            out["tasks"] = {name: score_items(model, self.tokenizer, items) for name, items in self.tasks.items()}
        return out


def one_run(
    run: dict[str, Any], base: Any, teacher: Any, stream: torch.Tensor, judge: Judge, seed: int, log: Any
) -> dict[str, Any]:
    """Retrofit, train and judge one form of attention, as `RUNS.yaml` describes it."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    retrofit(model, SRFConfig(**run["srf"], seed=seed))
    length, tokens = run.get("length", 2048), run["tokens"]
    rows = run.get("tokens_per_step", 16384) // length
    blocks = TokenBlocks(stream[: len(stream) // length * length].view(-1, length))
    out: dict[str, Any] = {"settings": run, "seed": seed}
    random_features = any(isinstance(x.attn_fn, SRFFeatures) for x in srf_attentions(model))
    if random_features and run.get("geometry", "preconditioner") != "identity":
        calibrate(model, blocks.first(8).batches(1), geometry=run.get("geometry", "preconditioner"), max_tokens=None)
    if random_features and run.get("weigh") and run["srf"].get("num_features", 64):
        report = calibrate_gain(model, blocks.first(4).batches(2))
        out["weigh"] = {"before": report.before, "after": report.after}
    if run.get("foresight"):
        # Other rows than those trained on first: there is enough text.
        rows_seen = TokenBlocks(blocks.blocks[-run["foresight"]["rows"] :])
        out["foresight"] = str(
            calibrate_foresight(model, rows_seen.batches(2), factor=run["foresight"].get("factor", 1.0))
        )
    if run.get("settle"):
        settle_features(model)
    out["zero_shot"] = judge(model, recall=run.get("recall", False), tasks=False)
    log(run["name"], "zero-shot", out["zero_shot"])
    steps = tokens // (rows * length)
    transfer = int(run.get("transfer", {}).get("share", 0) * steps)
    common: dict[str, Any] = {
        "batch_size": rows // run.get("accumulate", 1),
        "gradient_accumulation_steps": run.get("accumulate", 1),
        "progress": False,
        "seed": seed,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused" if base.device.type == "cuda" else "adamw_torch",
        "use_cpu": base.device.type == "cpu",
    }
    start = time.perf_counter()
    if transfer:
        part = TokenBlocks(blocks.blocks[: transfer * rows])
        rate = run["transfer"]["learning_rate"]
        found = distill(
            model, None, part, steps=transfer, output_dir="runs/quality", objective="attention",
            learning_rate=rate, train=run["transfer"].get("train", "features"), **common,
        )  # fmt: skip
        out["transfer"] = [line["loss"] for line in found["history"] if "loss" in line]
    part = TokenBlocks(blocks.blocks[transfer * rows : steps * rows])
    found = distill(
        model, teacher, part, steps=steps - transfer, output_dir="runs/quality",
        learning_rate=run.get("learning_rate", 1e-4), feature_learning_rate=run.get("feature_learning_rate"),
        schedule=run.get("schedule", "fixed"), **common,
    )  # fmt: skip
    out["losses"] = [line["loss"] for line in found["history"] if "loss" in line]
    out["tokens"], out["seconds"] = steps * rows * length, time.perf_counter() - start
    out["trained"] = judge(model, recall=run.get("recall", False), tasks=run.get("tasks", False))
    log(run["name"], f"after {out['tokens']:,} tokens in {out['seconds']:.0f} s", out["trained"])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare")
    first.add_argument("text")
    first.add_argument("output")
    second = commands.add_parser("run")
    second.add_argument("runs")
    second.add_argument("tokens")
    second.add_argument("--held-out", required=True)
    second.add_argument("--tasks", nargs="*", default=[])
    second.add_argument("--only", nargs="*", help="names of runs")
    second.add_argument("--seeds", nargs="*", type=int, default=[0])
    second.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    second.add_argument("--seconds", type=float, default=float("inf"), help="begin no further run after that")
    second.add_argument("--output")
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.text, args.output)
        return

    start = time.perf_counter()
    runs = yaml.safe_load(Path(args.runs).read_text())
    if args.only:
        missing = set(args.only) - {run["name"] for run in runs}
        if missing:
            raise SystemExit(f"no run is called {', '.join(sorted(missing))}")
        runs = [run for run in runs if run["name"] in args.only]
    base, tokenizer = load_smollm2()
    base.to(args.device)
    teacher = copy.deepcopy(base).to(torch.bfloat16).requires_grad_(False)
    stream = torch.from_numpy(np.fromfile(args.tokens, dtype=np.uint16).astype(np.int64))
    # The last tokens are nobody's training data: stories to hide a pass key in.
    judge = Judge(tokenizer, args.held_out, args.tasks, TokenBlocks(stream[-524288:].view(-1, 2048)))
    stream = stream[:-524288]

    def log(name: str, stage: str, found: dict[str, Any]) -> None:
        ppl = {m: [round(x["ppl"], 3) for x in by.values()] for m, by in found["perplexity"].items()}
        more = {k: round(v["acc"], 4) for k, v in found.get("tasks", {}).items()}
        for kind in ("passkey", "copies"):
            if kind in found:
                more[kind] = [round(x["accuracy"], 2) for x in found[kind]]
        print(f"[{time.perf_counter() - start:6.1f}] {name}, {stage}: {ppl} {more}", flush=True)

    results: dict[str, Any] = {"benchmark": "quality", "environment": environment(args.device), "lengths": LENGTHS}
    results["teacher"] = judge(base, recall=True, tasks=any(run.get("tasks") for run in runs))
    log("teacher", "as it is", results["teacher"])
    results["runs"] = {}
    for run in runs:
        for seed in args.seeds:
            if time.perf_counter() - start > args.seconds:
                print(f"out of time before {run['name']}, seed {seed}", flush=True)
                continue
            try:
                found = one_run(dict(run), base, teacher, stream, judge, seed, log)
            except (RuntimeError, ValueError, FloatingPointError) as error:
                # Hours of other runs are worth more than this one; what went wrong is part of the result.
                found = {"settings": run, "seed": seed, "error": f"{type(error).__name__}: {error}"}
                print(f"{run['name']}: {found['error']}", flush=True)
            results["runs"].setdefault(run["name"], []).append(found)
            if args.output:
                write_json(Path(args.output), results)
    print(json.dumps(results))
    failed = [name for name, found in results["runs"].items() if any("error" in run for run in found)]
    if failed:
        raise SystemExit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
