"""The whole way on a real Llama: calibrate, retrofit, distil, judge, save, load in a fresh process, generate."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainingArguments, set_seed

from . import recipes
from .calibration import (
    DEFAULT_GEOMETRY,
    GEOMETRIES,
    calibrate,
    calibrate_foresight,
    calibrate_gain,
    calibrate_slots,
    least_row,
)
from .data import TextParts, TokenBlocks, load_documents, pack, split_documents
from .evaluation import perplexity as evaluation
from .files import atomic_directory, check_writable
from .modeling.configuration import SRFConfig
from .pretrained import SMOLLM2, load_model
from .report import write_report
from .surgery import plan_retrofit, retrofit
from .timing import versions
from .training.callbacks import ResampleFeaturesCallback, ResampleSchedule
from .training.distillation import DistillationTrainer

PROMPTS = (
    "What is a list in Python?",
    "Explain in two sentences what a function is.",
)
# The whole model, window and other exact keys without the features, and the features alone.
JUDGED = ("full", "no_tail", "tail_only")
_PACKAGES = ("srf-retrofit", "torch", "transformers", "accelerate")
LENGTHS = tuple(2**n for n in range(7, 16))

# What the fresh process runs: nothing but the import and the load that any user would write.
_RELOAD = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
import srf_retrofit
directory, probe, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = AutoModelForCausalLM.from_pretrained(directory).eval()
saved = load_file(probe)
with torch.no_grad():
    logits = model(saved["input_ids"]).logits
difference = (logits - saved["logits"]).abs().max().item()
print(json.dumps({"bit_equal": torch.equal(logits, saved["logits"]), "max_difference": difference}))
"""


@dataclass(frozen=True)
class DemoSettings:
    """What the demonstration does; lengths in tokens.

    `steps` optimizer steps of `batch_size` blocks of `length` tokens, at `learning_rate` with linear warm-up and
    cosine decay. `resample` says when features are drawn anew, see `ResampleSchedule`; `weigh_tokens` calibration
    tokens decide how loud each head's features are, and 0 leaves them as they are. With `foresee` the calibration
    tokens also say which keys are worth a slot, and `spread_tokens` of them how many slots each head gets; 0: as many
    as any other. See `calibration`.
    """

    model: str = SMOLLM2
    text: str | None = None
    text_field: str = "text"
    output: str = "demo-output"
    overwrite: bool = False
    geometry: str = DEFAULT_GEOMETRY
    calibration_tokens: int = 4096
    weigh_tokens: int = 1024
    foresee: bool = True
    spread_tokens: int = 2048
    steps: int = 28
    batch_size: int = 1
    length: int = 512
    learning_rate: float = 3e-5
    resample: str = "fixed"
    eval_tokens: int = 4096
    error_tokens: int = 1024
    decode_contexts: tuple[int, ...] = (256, 1024, 4096)
    new_tokens: int = 48
    seed: int = 0
    srf: SRFConfig = field(default_factory=lambda: SRFConfig(num_features=16, retained=120, state_dtype="bfloat16"))

    def __post_init__(self) -> None:
        least = {"calibration_tokens": 1, "steps": 1, "batch_size": 1, "length": 2, "eval_tokens": 2, "error_tokens": 2}
        least |= {"new_tokens": 1, "seed": 0, "weigh_tokens": 0, "spread_tokens": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be >= {bound}, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be > 0, got {self.learning_rate}")
        ResampleSchedule.parse(self.resample)
        if self.geometry not in GEOMETRIES:
            raise ValueError(f"geometry must be one of {', '.join(GEOMETRIES)}, got {self.geometry!r}")


class Stages:
    """Says what is being done, and remembers how long each stage took, in seconds."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.say(f"{name.replace('_', ' ')} ...")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 2)

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


def run(settings: DemoSettings, *, quiet: bool = False) -> dict[str, Any]:
    """Run the demonstration and write `model/`, `report.md`, `report.png` and `results.json` to its output directory.

    Returns
    -------
    dict
        The contents of `results.json`, see `report`.

    Raises
    ------
    ValueError
        For text that does not fill its parts, a model that cannot be loaded or retrofitted, or an output directory
        that cannot be written: all before anything is trained.
    """
    check_writable(Path(settings.output), overwrite=settings.overwrite, mark="results.json")
    set_seed(settings.seed)
    stage = Stages(quiet)
    with stage("load"):
        teacher, tokenizer = load_model(settings.model)
        calibration, training, held_out = _blocks(settings, tokenizer)
    results: dict[str, Any] = {
        "model": Path(teacher.config._name_or_path or settings.model).name,
        "settings": {
            **recipes.to_dict(settings),
            "text": settings.text or "the Python language reference",
            "train_tokens": settings.steps * settings.batch_size * settings.length,
        },
        "versions": {**versions(_PACKAGES), "threads": str(torch.get_num_threads())},
    }
    with stage("calibrate_and_retrofit"):
        results["memory"] = memory(teacher, settings.srf)
        student = copy.deepcopy(teacher)
        retrofit(student, settings.srf)
        report = calibrate(student, calibration.batches(1), geometry=settings.geometry, max_tokens=None)
        stage.say(str(report))
        if settings.foresee and settings.srf.retained and settings.length > least_row(settings.srf):
            stage.say(str(calibrate_foresight(student, calibration.batches(1), factor=None)))
        weighs = settings.weigh_tokens and settings.srf.feature_map == "random" and settings.srf.num_features
        heard = calibration.first(max(1, settings.weigh_tokens // settings.length))
        if weighs:
            stage.say(str(calibrate_gain(student, heard.batches(1))))
        if settings.spread_tokens and settings.srf.retained:
            few = calibration.first(max(1, settings.spread_tokens // settings.length))
            stage.say(str(calibrate_slots(student, few.batches(1))))
            if weighs:
                stage.say(str(calibrate_gain(student, heard.batches(1))))
        results["config"] = dict(student.config.srf)
    with stage("judge_before"):
        results["perplexity"] = {"teacher": judge(teacher, held_out, ("full",), quiet)}
        results["perplexity"]["zero_shot"] = judge(student, held_out, JUDGED, quiet)
        results["distance"] = {"zero_shot": compare(teacher, student, held_out, quiet)}
        few = held_out.first(max(1, settings.error_tokens // settings.length))
        results["head_error"] = {"zero_shot": evaluation.head_errors(student, few, progress=not quiet)}
    with stage("distil"):
        results["training"] = distil(teacher, student, training, settings, quiet)
    with stage("judge_after"):
        results["perplexity"]["tuned"] = judge(student, held_out, JUDGED, quiet)
        results["distance"]["tuned"] = compare(teacher, student, held_out, quiet)
        results["head_error"]["tuned"] = evaluation.head_errors(student, few, progress=not quiet)
    with stage("generate"):
        results["samples"] = samples(teacher, student, tokenizer, settings.new_tokens)
    with stage("time_decoding"):
        results["decode"] = decoding(teacher, student, settings.decode_contexts, quiet)
    with atomic_directory(settings.output, overwrite=settings.overwrite, mark="results.json") as directory:
        with stage("save_and_reload"):
            student.save_pretrained(directory / "model")
            tokenizer.save_pretrained(directory / "model")
            results["reload"] = reload(student, directory / "model", held_out.blocks[:1])
        results["timings"] = {**stage.seconds, "total": round(sum(stage.seconds.values()), 2)}
        results["peak_memory"] = peak_memory()
        write_report(results, directory)
    return results


def _blocks(settings: DemoSettings, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenBlocks, TokenBlocks, TokenBlocks]:
    """Calibration, training and held-out blocks, from parts that share no document."""
    parts: TextParts = split_documents(load_documents(settings.text, field=settings.text_field))

    def blocks(name: str, documents: list[str], tokens: int) -> TokenBlocks:
        try:
            return pack(documents, tokenizer, settings.length, limit=max(1, tokens // settings.length))
        except ValueError as error:
            raise ValueError(f"{name} text: {error}") from error

    needed = settings.steps * settings.batch_size * settings.length
    return (
        blocks("calibration", parts.calibration, settings.calibration_tokens),
        blocks("training", parts.training, needed),
        blocks("held-out", parts.held_out, settings.eval_tokens),
    )


def judge(model: PreTrainedModel, blocks: TokenBlocks, modes: tuple[str, ...], quiet: bool) -> dict[str, Any]:
    """Perplexities by mode, as JSON."""
    return {mode: evaluation.perplexity(model, blocks, mode=mode, progress=not quiet).to_dict() for mode in modes}


def compare(teacher: PreTrainedModel, student: PreTrainedModel, blocks: TokenBlocks, quiet: bool) -> dict[str, Any]:
    """Distance to the teacher, as JSON."""
    return evaluation.distance(teacher, student, blocks, progress=not quiet).to_dict()


def distil(
    teacher: PreTrainedModel, student: PreTrainedModel, blocks: TokenBlocks, settings: DemoSettings, quiet: bool
) -> dict[str, Any]:
    """Train the student on the teacher's logits with the Hugging Face Trainer; returns first and last loss."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, settings.steps // 10),
            weight_decay=0.0,
            logging_steps=max(1, settings.steps // 20),
            save_strategy="no",
            report_to=[],
            seed=settings.seed,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=quiet,
            remove_unused_columns=False,
        )
        trainer = DistillationTrainer(
            model=student,
            teacher=teacher,
            args=arguments,
            train_dataset=blocks,
            callbacks=[ResampleFeaturesCallback(settings.resample)],
        )
        if quiet:
            trainer.remove_callback(PrinterCallback)
        # The trainer prints its losses; standard output belongs to the caller.
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    student.zero_grad(set_to_none=True)
    del trainer
    gc.collect()  # the optimizer's moments are twice the model
    student.eval()
    return {"first_loss": losses[0], "last_loss": losses[-1]}


def memory(model: PreTrainedModel, config: SRFConfig) -> dict[str, Any]:
    """State bytes against key/value bytes of one sequence in bfloat16, the usual type of a served model, as JSON."""
    with torch.device("meta"):
        skeleton: Any = type(model)(model.config)
    plan = plan_retrofit(skeleton.to(torch.bfloat16), config)
    return {
        "dtype": plan.dtype,
        "state_bytes": plan.state_bytes,
        "lengths": list(LENGTHS),
        "kv_bytes": [plan.kv_bytes(length) for length in LENGTHS],
        "break_even": plan.break_even_length,
    }


def samples(
    teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokens: int
) -> list[dict[str, str]]:
    """Greedy answers of both models to the same prompts."""
    out = []
    for prompt in PROMPTS:
        sample = {"prompt": prompt}
        for name, model in (("teacher", teacher), ("tuned", student)):
            sample[name] = generate(model, tokenizer, prompt, new_tokens=new_tokens)
        out.append(sample)
    return out


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    new_tokens: int,
    chat: bool = True,
    temperature: float = 0.0,
) -> str:
    """Continue a prompt, or answer it where the tokenizer has a chat template; greedy at temperature 0."""
    chat = chat and tokenizer.chat_template is not None
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    inputs: Any = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    ids, mask = (inputs[name].to(model.device) for name in ("input_ids", "attention_mask"))
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling["temperature"] = temperature
    generator: Any = model
    with evaluation.evaluating(model):
        out = generator.generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def decoding(
    teacher: PreTrainedModel, student: PreTrainedModel, contexts: tuple[int, ...], quiet: bool
) -> dict[str, Any]:
    """Milliseconds per generated token of both models, as JSON."""
    ms = [evaluation.decode_times(model, contexts, progress=not quiet) for model in (teacher, student)]
    return {"contexts": list(contexts), "teacher_ms": ms[0], "student_ms": ms[1]}


def reload(model: PreTrainedModel, directory: Path, input_ids: torch.Tensor) -> dict[str, Any]:
    """Load the saved model in a fresh Python process and compare its logits (B, L, V) bit for bit."""
    with evaluation.evaluating(model), tempfile.TemporaryDirectory() as scratch:
        probe = Path(scratch) / "probe.safetensors"
        here: Any = model if model.device.type == "cpu" else copy.deepcopy(model)
        save_file({"input_ids": input_ids, "logits": here.to("cpu")(input_ids).logits.contiguous()}, probe)
        command = [sys.executable, "-c", _RELOAD, str(directory), str(probe), str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the saved model could not be loaded in a fresh process: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
