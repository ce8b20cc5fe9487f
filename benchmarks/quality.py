"""Quality at equal tokens and equal state: distil SmolLM2 into several forms of attention and judge them alike.

    python benchmarks/quality.py prepare TEXT.jsonl.xz TOKENS.bin
    python benchmarks/quality.py run RUNS.yaml TOKENS.bin --held-out WIKITEXT.txt.gz --output RESULTS.json [--tasks A B]
    python benchmarks/quality.py merge RESULTS.json PART.json PART.json ...

Documents are shuffled by a fixed seed, joined by the end-of-text token and written as 16-bit token ids. Every run sees
the same tokens in the same order. The teacher, and every model before and after training, is judged on the first
98,304 tokens of the held-out text, in windows of 1,024, 4,096 and 8,192, and by recall; the tasks are scored in full.
Models are judged in bfloat16.

Of what `RUNS.yaml` may say of a run: `milestones` are numbers of tokens after which perplexity is also taken: every
budget of one schedule. `softmax: true` fine-tunes the softmax model itself on the same tokens: what the text alone
does. `tuned: N` does that with the first N tokens, and retrofits and distils what comes out with the others: the tuned
model is then the teacher. Where that leaves no tokens, what is fitted is judged, and nothing trained. `then: {tokens,
length, learning_rate}` goes on in rows of another length, in a schedule of its own. `recall_share` puts rows among the
text that ask for what stood far back. `lora: {rank, alpha, targets}` trains adapters alone, which are merged before a
model is judged. `fit_length` is that of the rows that fits are made on, where it is not the training's.

What has been found is in RESULTS.json at any time; a run without `trained` was cut off. The last line printed is JSON.
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
from transformers import TrainerCallback

from srf_retrofit import SRFConfig, calibrate, retrofit
from srf_retrofit.bench.measurement import environment
from srf_retrofit.calibration import calibrate_foresight, calibrate_gain, calibrate_slots
from srf_retrofit.data import Mixture, TokenBlocks, load_documents, read_documents, tokenise
from srf_retrofit.evaluation.choices import read_items, score_items
from srf_retrofit.evaluation.long_text import length_perplexity
from srf_retrofit.evaluation.recall import copy_by_distance, passkey_grid, word_tokens
from srf_retrofit.evaluation.suite import state_cost
from srf_retrofit.files import write_json
from srf_retrofit.modeling.attention import srf_attentions
from srf_retrofit.modeling.features import SRFFeatures
from srf_retrofit.pipeline.data import RecallDataset
from srf_retrofit.pretrained import load_smollm2
from srf_retrofit.training.adapters import with_adapters
from srf_retrofit.training.distillation import distill
from srf_retrofit.training.settling import settle_features

EVALUATED = 98_304
LENGTHS = (1024, 4096, 8192)
EDGES = (0, 256, 512, 1024, 2048, 3072, 4096, 6144, 8192)


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
        start = time.perf_counter()
        model = copy.deepcopy(model)
        if hasattr(model, "peft_config"):
            model = model.merge_and_unload()
        model.to(torch.bfloat16)
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
        out["seconds"] = time.perf_counter() - start
        return out


class Milestones(TrainerCallback):
    """Perplexity of the model under training after given numbers of optimizer steps."""

    def __init__(self, steps: dict[int, int], untrained: Any, judge: Judge, log: Any) -> None:
        self.steps, self.judge, self.log = steps, judge, log
        # The trainer wraps the model's forward: weights go into a model that it does not know.
        self.twin = copy.deepcopy(untrained)
        self.found: dict[int, dict[str, Any]] = {}
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Judge, when it is time."""
        tokens = self.steps.get(state.global_step)
        if tokens is None:
            return
        self.twin.load_state_dict(model.state_dict())
        found = self.judge(self.twin, recall=False, tasks=False)
        self.seconds += found["seconds"]
        # Written out by what follows: a run that is cut off leaves its milestones.
        self.found[tokens] = found["perplexity"]
        self.log(f"after {tokens:,} tokens", found)


def retrofitted(
    run: dict[str, Any], base: Any, blocks: TokenBlocks, tokenizer: Any, seed: int, out: dict[str, Any]
) -> Any:
    """A copy of the softmax model in the form that `RUNS.yaml` describes, calibrated; notes go to `out`."""
    model = copy.deepcopy(base)
    retrofit(model, SRFConfig(**run["srf"], seed=seed))
    random_features = any(isinstance(x.attn_fn, SRFFeatures) for x in srf_attentions(model))
    # In the order of `calibrate_all`, with rows and settings of each fit's own.
    trained = blocks.blocks.shape[1]
    length, ids = run.get("fit_length", trained), blocks.blocks.reshape(-1)
    filler = TokenBlocks(blocks.blocks[-256:])
    blocks = TokenBlocks(ids[: len(ids) // length * length].view(-1, length))
    weighs = random_features and run.get("weigh") and run["srf"].get("num_features", 64)

    def weigh() -> None:
        report = calibrate_gain(model, blocks.first(max(1, 4 * trained // length)).batches(1))
        out["weigh"] = {"before": report.before, "after": report.after}

    if run.get("foresight"):
        # Other rows than those trained on first: there is enough text.
        rows_seen = TokenBlocks(blocks.blocks[-run["foresight"]["rows"] :])
        seen = rows_seen.batches(max(1, 2 * trained // length))
        out["foresight"] = str(calibrate_foresight(model, seen, factor=run["foresight"].get("factor", 1.0)))
    geometry = run.get("geometry", "preconditioner")
    if random_features and geometry != "identity":
        seen = blocks.first(max(1, 8 * trained // length)).batches(1)
        calibrate(model, seen, geometry=geometry, max_tokens=None)
    if weighs:
        weigh()
    if run.get("spread"):
        spread = run["spread"]
        few = list(blocks.first(spread["rows"]).batches(1))
        asking = RecallDataset(spread.get("asking", 0), length, tokenizer, filler, seed=seed + 2)
        few += [asking[i]["input_ids"].unsqueeze(0) for i in range(len(asking))]
        out["slots"] = str(calibrate_slots(model, few, by=spread["by"], shares=spread["shares"]))
        if weighs:
            weigh()
    if run.get("settle"):
        settle_features(model)
    return model


def one_run(
    run: dict[str, Any],
    out: dict[str, Any],
    base: Any,
    teacher: Any,
    stream: torch.Tensor,
    judge: Judge,
    seed: int,
    log: Any,
    tuned: dict[tuple[int, ...], Any],
) -> None:
    """Retrofit, train and judge one form of attention, as `RUNS.yaml` describes it; `out` gets what is found.

    `tuned` holds the softmax model that was tuned last, by what it was tuned on: the next run may begin with the same.
    """
    torch.manual_seed(seed)
    torch.compiler.reset()
    length, tokens = run.get("length", 2048), run["tokens"]
    rows = run.get("tokens_per_step", 16384) // length
    blocks = TokenBlocks(stream[: len(stream) // length * length].view(-1, length))
    on_gpu = base.device.type == "cuda"
    common: dict[str, Any] = {
        "batch_size": rows // run.get("accumulate", 1),
        "gradient_accumulation_steps": run.get("accumulate", 1),
        "seed": seed,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused" if on_gpu else "adamw_torch",
        "use_cpu": not on_gpu,
        "output_dir": "runs/quality",
        "progress": False,
    }
    compiled = on_gpu and run.get("compile", True)
    steps = tokens // (rows * length)
    if run.get("tuned"):
        first = run["tuned"] // (rows * length)
        key = (first, rows, length, run.get("accumulate", 1), seed)
        if key not in tuned:
            base = copy.deepcopy(base)
            part = TokenBlocks(blocks.blocks[: first * rows])
            distill(base, None, part, steps=first, objective="text", learning_rate=1e-4, compile=compiled, **common)
            base.requires_grad_(False)
            tuned.clear()
            tuned[key] = base
        base = tuned[key]
        teacher = copy.deepcopy(base).to(torch.bfloat16)
        blocks, steps = TokenBlocks(blocks.blocks[first * rows :]), steps - first
        out["teacher"] = judge(base, recall=False, tasks=False)
        log(run["name"], "teacher", out["teacher"])
    model = copy.deepcopy(base) if run.get("softmax") else retrofitted(run, base, blocks, judge.tokenizer, seed, out)
    if run.get("lora"):
        model = with_adapters(model, **run["lora"], seed=seed)
    recall, tasks = run.get("recall", False), run.get("tasks", False)
    out["zero_shot"] = judge(model, recall=False, tasks=False)
    log(run["name"], "zero-shot", out["zero_shot"])
    if not steps:
        out |= {"tokens": run.get("tuned") or 0, "trained": judge(model, recall=recall, tasks=tasks)}
        log(run["name"], "fitted only", out["trained"])
        return
    transfer = int(run.get("transfer", {}).get("share", 0) * steps)
    start = time.perf_counter()
    if transfer:
        part = TokenBlocks(blocks.blocks[: transfer * rows])
        rate = run["transfer"]["learning_rate"]
        found = distill(
            model, None, part, steps=transfer, objective="attention", learning_rate=rate,
            train=run["transfer"].get("train", "features"), **common,
        )  # fmt: skip
        out["transfer"] = [line["loss"] for line in found["history"] if "loss" in line]
    part = TokenBlocks(blocks.blocks[transfer * rows : steps * rows])
    share = run.get("recall_share", 0.0)
    if share:
        asking = RecallDataset(len(part), length, judge.tokenizer, TokenBlocks(blocks.blocks[-256:]), seed=seed + 1)
        part = Mixture([part, asking], [1 - share, share], length=len(part), seed=seed)
    before = tokens // (rows * length) - steps + transfer
    after = {n // (rows * length) - before: n for n in run.get("milestones", []) if n < tokens}
    milestones = Milestones(after, model, judge, lambda stage, found: log(run["name"], stage, found))
    out["milestones"] = milestones.found
    logits: dict[str, Any] = {
        "steps": steps - transfer,
        "learning_rate": run.get("learning_rate", 1e-4),
        "compile": compiled,
        **common,
    }
    if not run.get("softmax"):
        logits |= {
            "schedule": run.get("schedule", "fixed"),
            "cross_entropy_weight": run.get("cross_entropy_weight", 0.0),
            "chunk_size": 16384 if on_gpu else 1024,
            "feature_learning_rate": run.get("feature_learning_rate"),
            "cuda_graph": on_gpu and run.get("cuda_graph", True),
            "train": "as_is" if run.get("lora") else "all",
        }
    objective, teacher = ("text", None) if run.get("softmax") else ("logits", teacher)
    found = distill(model, teacher, part, objective=objective, callbacks=[milestones], **logits)
    out["losses"] = [line["loss"] for line in found["history"] if "loss" in line]
    out["tokens"] = tokens // (rows * length) * rows * length
    if run.get("then"):
        longer, rate = run["then"]["length"], run["then"]["learning_rate"]
        later = run["then"]["tokens"] // (rows * length) * rows * length
        part = TokenBlocks(stream[out["tokens"] : out["tokens"] + later].view(-1, longer))
        logits |= {"steps": later // (rows * length), "batch_size": rows * length // longer, "learning_rate": rate}
        found = distill(model, teacher, part, objective=objective, **logits)
        out["losses"] += [line["loss"] for line in found["history"] if "loss" in line]
        out["tokens"] += later
    out["seconds"] = time.perf_counter() - start - milestones.seconds
    out["trained"] = judge(model, recall=recall, tasks=tasks)
    log(run["name"], f"after {out['tokens']:,} tokens in {out['seconds']:.0f} s", out["trained"])


def merge(output: str, parts: list[str]) -> None:
    """Runs that were made apart as one file; each keeps its device and commit."""
    whole: dict[str, Any] = {}
    for path in parts:
        part = json.loads(Path(path).read_text())
        # Those that were cut off before anything was judged say nothing.
        judged = {name: [run for run in runs if "zero_shot" in run] for name, runs in part["runs"].items()}
        part["runs"] = {name: runs for name, runs in judged.items() if runs}
        for runs in part["runs"].values():
            for run in runs:
                run |= {name: part["environment"][name] for name in ("device", "commit")}
        if not whole:
            whole = part
            continue
        if (part["lengths"], part["environment"]["versions"]) != (whole["lengths"], whole["environment"]["versions"]):
            raise SystemExit(f"{path} was measured at other lengths, or with other versions, than {parts[0]}")
        if "teacher" in part:
            whole.setdefault("teacher", part["teacher"])
        for name, runs in part["runs"].items():
            whole["runs"].setdefault(name, []).extend(runs)
    write_json(Path(output), whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare")
    first.add_argument("text")
    first.add_argument("output")
    second = commands.add_parser("run")
    second.add_argument("runs")
    second.add_argument("tokens")
    second.add_argument("--text", help="other tokens to train on; TOKENS then fill up what recall hides, no more")
    second.add_argument("--held-out", required=True)
    second.add_argument("--tasks", nargs="*", default=[])
    second.add_argument("--only", nargs="*", help="names of runs")
    second.add_argument("--seeds", nargs="*", type=int, default=[0])
    second.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    second.add_argument("--light", action="store_true", help="perplexity alone, whatever the runs ask for")
    second.add_argument("--no-teacher", action="store_true", help="judge no softmax model; another file has it")
    second.add_argument("--seconds", type=float, default=float("inf"), help="begin no further run after that")
    second.add_argument("--output")
    third = commands.add_parser("merge")
    third.add_argument("output")
    third.add_argument("parts", nargs="+")
    args = parser.parse_args()
    if args.command == "prepare":
        prepare(args.text, args.output)
        return
    if args.command == "merge":
        merge(args.output, args.parts)
        return

    start = time.perf_counter()
    runs = yaml.safe_load(Path(args.runs).read_text())
    if args.only:
        missing = set(args.only) - {run["name"] for run in runs}
        if missing:
            raise SystemExit(f"no run is called {', '.join(sorted(missing))}")
        runs = [run for run in runs if run["name"] in args.only]
    if args.light:
        runs = [run | {"recall": False, "tasks": False} for run in runs]
    base, tokenizer = load_smollm2()
    base.to(args.device)
    teacher = copy.deepcopy(base).to(torch.bfloat16).requires_grad_(False)
    stream = torch.from_numpy(np.fromfile(args.tokens, dtype=np.uint16).astype(np.int64))
    # The last tokens are nobody's training data: stories to hide a pass key in.
    judge = Judge(tokenizer, args.held_out, args.tasks, TokenBlocks(stream[-524288:].view(-1, 2048)))
    stream = stream[:-524288]
    if args.text:
        stream = torch.from_numpy(np.fromfile(args.text, dtype=np.uint16).astype(np.int64))

    def log(name: str, stage: str, found: dict[str, Any]) -> None:
        ppl = {m: [round(x["ppl"], 3) for x in by.values()] for m, by in found["perplexity"].items()}
        more = {k: round(v["acc"], 4) for k, v in found.get("tasks", {}).items()}
        for kind in ("passkey", "copies"):
            if kind in found:
                more[kind] = [round(x["accuracy"], 2) for x in found[kind]]
        print(f"[{time.perf_counter() - start:6.1f}] {name}, {stage}: {ppl} {more}", flush=True)
        if args.output:
            write_json(Path(args.output), results)

    tuned: dict[tuple[int, ...], Any] = {}
    results: dict[str, Any] = {
        "benchmark": "quality", "environment": environment(args.device), "lengths": LENGTHS, "runs": {},
    }  # fmt: skip
    if not args.no_teacher:
        results["teacher"] = judge(base, recall=True, tasks=any(run.get("tasks") for run in runs))
        log("teacher", "as it is", results["teacher"])
    for run in runs:
        for seed in args.seeds:
            if time.perf_counter() - start > args.seconds:
                print(f"out of time before {run['name']}, seed {seed}", flush=True)
                continue
            found: dict[str, Any] = {"settings": run, "seed": seed}
            results["runs"].setdefault(run["name"], []).append(found)
            try:
                one_run(run, found, base, teacher, stream, judge, seed, log, tuned)
            except (RuntimeError, ValueError, FloatingPointError) as error:
                # Hours of other runs are worth more than this one; what went wrong is part of the result.
                found["error"] = f"{type(error).__name__}: {error}"
                print(f"{run['name']}: {found['error']}", flush=True)
            if args.output:
                write_json(Path(args.output), results)
    print(json.dumps(results))
    failed = [name for name, found in results["runs"].items() if any("error" in run for run in found)]
    if failed:
        raise SystemExit(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    main()
