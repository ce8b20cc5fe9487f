"""What a distillation does, from the softmax model to the report: one frozen set of settings."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from typing import Any

from ..calibration import DEFAULT_GEOMETRY, GEOMETRIES, SLOTS_BY
from ..data import BOUNDARIES, TEMPLATES
from ..evaluation.settings import EvalSettings
from ..modeling.configuration import SRFConfig
from ..training.callbacks import ResampleSchedule

TRAIN = ("all", "weights", "attention", "queries_keys", "features", "lora")
TRANSFER_TRAIN = ("attention", "queries_keys", "features")
SETTLE = ("none", "freeze", "train")
DTYPES = ("float32", "bfloat16")
REPORTS = ("none", "tensorboard")
RECALL_LENGTH = 192  # tokens that a recall-shaped row has at the least
EXACT = "exact"
# Fields of the evaluation's own settings that a distillation decides itself.
_NOT_OF_EVALUATION = ("model", "teacher", "text", "text_field", "all_text", "device", "dtype", "output", "overwrite")
_LEAST = {
    "length": 2, "tokens": 0, "tokens_per_step": 1, "batch_size": 1, "calibration_tokens": 1, "calibration_length": 2,
    "transfer_tokens": 0, "spread_tokens": 0, "spread_recall_tokens": 0, "tune_tokens": 0, "lora_rank": 1,
    "lora_alpha": 1, "chunk_size": 1, "save_every": 0, "seed": 0, "max_epochs": 1, "warmup_steps": 0,
}  # fmt: skip


def default_srf() -> SRFConfig:
    """What SmolLM2-135M did best with so far: a state worth 265 tokens of its cache."""
    return SRFConfig(num_features=64, window=32, sinks=4, retained=128)


@dataclass(frozen=True)
class DistillSettings:
    """Everything about a distillation; sizes in tokens unless said otherwise.

    Attributes
    ----------
    model : str
        smollm2, a directory, or a hub name; a softmax model, or a retrofitted one with the same `srf` to train further.
    teacher : str, optional
        None: the model itself before surgery. "exact": the model's own softmax form, also of a retrofitted one.
        Otherwise what to load, a softmax model with the same vocabulary.
    text : str or tuple of str, optional
        One or several sources, see `data.iterate_documents`; None is the Python language reference.
    text_weights : tuple of float, optional
        Shares of the sources; by default their sizes.
    text_field, text_split, text_limit, template
        See `data.iterate_documents`; the limit is in documents, of each source.
    held_out : str, optional
        Text to judge on; by default a share of `held_out_share` of the characters of `text`, kept out of training.
    max_epochs : int
        How often the text may be read.
    output, overwrite, resume
        Directory; replace an earlier run; go on where an interrupted run of the same settings stopped.
    length : int
        Tokens of a row.
    tokens, tokens_per_step : int
        Budget of the logit stage, and its share of one optimizer step; padding counts. 0 tokens: the model is fitted
        to the text (`calibration.calibrate_all`), and not distilled.
    batch_size : int
        Rows in one forward.
    boundaries : {"cross", "respect", "pad"}
        See `data.pack`.
    recall_share : float
        Share of rows that ask for what stood far back (`recall_data`), in [0, 1).
    geometry, calibration_tokens, calibration_length, weigh_features
        See `calibration.calibrate` and `calibration.calibrate_gain`; for random features. All fits are made on rows of
        that length, by default those of the training.
    foresee, foresight_factor
        Whether slots go by a forecast, see `calibration.foresight`; on the calibration tokens, where rows are
        long enough. The weight in it of the attention that a key has received.
    spread_tokens, spread_by, spread_recall_tokens
        Calibration tokens by which slots are spread over heads or layers, see `calibration.slots`; 0: all have as many.
        And tokens of rows that ask for what stood far back, by which they are spread as well.
    tune_tokens, tune_learning_rate
        Before anything else, next-token training of the softmax model on the text: it is then the teacher, and knows
        what the student is taught on. 0 tokens leave it out.
    transfer_tokens, transfer_learning_rate, transfer_train
        Attention transfer before the logits are matched; 0 tokens leave it out.
    learning_rate, feature_learning_rate, warmup_steps, adam_beta2, max_grad_norm
        Of the logit stage: AdamW, cosine decay; the second is that of feature maps (by default the same), also in
        attention transfer of other parts.
    schedule : str
        When features are drawn anew, see `ResampleSchedule`.
    settle, settle_share
        "none"; or, after this share of the logit stage's steps (0: before, 1: after it), random features become maps
        like any weight (`settling`), which are kept ("freeze") or trained ("train") from there on.
    train : {"all", "weights", "attention", "queries_keys", "features", "lora"}
        See `teacher.training_only`; "lora" trains adapters alone.
    lora_rank, lora_alpha, lora_targets, lora_merge
        Adapters on the modules of these names. They are saved as `OUTPUT/adapter`, and with `lora_merge` also merged
        into the final model.
    temperature, cross_entropy_weight, chunk_size
        See `distillation.DistillationTrainer`.
    dtype : {"float32", "bfloat16"}
        Of the weights in memory. Training them all needs float32 (`bf16` still computes in bfloat16).
    device : str, optional
        cpu or cuda; by default CUDA where there is one.
    bf16 : bool, optional
        Autocast; by default where CUDA supports it.
    gradient_checkpointing : bool
    compile : bool
        Whether tuning and the logit stage run compiled layers, see `training.compilation`; not with gradient
        checkpointing.
    cuda_graph : bool
        Whether it replays its steps from a CUDA graph, see `training.graphs`; for rows without padding or boundaries,
        one batch a step.
    save_every : int
        Optimizer steps between checkpoints inside a stage; 0 saves at the end of stages alone.
    report_to : {"none", "tensorboard"}
    seed : int
    eval : EvalSettings
        What to measure at the end; `parts: []` measures nothing. Text, device and so on are those of the run.
    eval_untrained : bool
        Measure the same before any training, too: what the training was worth.
    srf : SRFConfig

    Raises
    ------
    ValueError
        For values out of range, and for settings that contradict one another.
    """

    model: str = "smollm2"
    teacher: str | None = None
    text: str | tuple[str, ...] | None = None
    text_weights: tuple[float, ...] | None = None
    text_field: str = "text"
    text_split: str = "train"
    text_limit: int | None = None
    template: str | None = None
    held_out: str | None = None
    held_out_share: float = 0.05
    max_epochs: int = 1
    output: str | None = None
    overwrite: bool = False
    resume: bool = False
    length: int = 2048
    tokens: int = 4_194_304
    tokens_per_step: int = 16384
    batch_size: int = 4
    boundaries: str = "cross"
    recall_share: float = 0.0
    geometry: str = DEFAULT_GEOMETRY
    calibration_tokens: int = 16384
    calibration_length: int | None = None
    weigh_features: bool = True
    foresee: bool = True
    foresight_factor: float | None = 1.0
    spread_tokens: int = 0
    spread_by: str = "head"
    spread_recall_tokens: int = 0
    tune_tokens: int = 0
    tune_learning_rate: float = 1e-4
    transfer_tokens: int = 0
    transfer_learning_rate: float = 1e-3
    transfer_train: str = "attention"
    learning_rate: float = 1e-4
    feature_learning_rate: float | None = None
    warmup_steps: int | None = None
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    schedule: str = "fixed"
    settle: str = "none"
    settle_share: float = 0.5
    train: str = "all"
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    lora_merge: bool = True
    temperature: float = 1.0
    cross_entropy_weight: float = 0.0
    chunk_size: int = 1024
    dtype: str = "float32"
    device: str | None = None
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    cuda_graph: bool = False
    save_every: int = 100
    report_to: str = "none"
    seed: int = 0
    eval: EvalSettings = field(default_factory=EvalSettings)
    eval_untrained: bool = False
    srf: SRFConfig = field(default_factory=default_srf)

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        for name, known in (
            ("geometry", GEOMETRIES), ("boundaries", BOUNDARIES), ("train", TRAIN), ("settle", SETTLE),
            ("transfer_train", TRANSFER_TRAIN), ("dtype", DTYPES), ("report_to", REPORTS),
            ("spread_by", SLOTS_BY),
        ):  # fmt: skip
            _one_of(name, getattr(self, name), known)
        if self.template is not None:
            _one_of("template", self.template, TEMPLATES)
        for name in (
            "learning_rate",
            "tune_learning_rate",
            "transfer_learning_rate",
            "feature_learning_rate",
            "temperature",
        ):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be > 0, got {value}")
        for name, low, high in (("recall_share", 0, 0.999), ("settle_share", 0, 1), ("cross_entropy_weight", 0, 1),
                                ("adam_beta2", 0, 0.99999), ("held_out_share", 1e-6, 0.9)):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
        if self.foresight_factor is not None and not 0 <= self.foresight_factor <= 2:
            raise ValueError(f"foresight_factor must be in [0, 2], got {self.foresight_factor}")
        if self.spread_recall_tokens and not self.spread_tokens:
            raise ValueError(
                f"spread_recall_tokens={self.spread_recall_tokens} are beside spread_tokens=0: set both, or neither"
            )
        if self.max_grad_norm < 0:
            raise ValueError(f"max_grad_norm must be >= 0 (0: gradients are not clipped), got {self.max_grad_norm}")
        self._check_sizes()
        self._check_tuning()
        self._check_features()
        self._check_adapters()
        self._check_evaluation()

    def _check_sizes(self) -> None:
        if self.compile and self.gradient_checkpointing:
            raise ValueError("compile and gradient_checkpointing exclude one another: leave one of them off")
        if self.cuda_graph and self.tokens_per_step != self.length * self.batch_size:
            raise ValueError(
                f"cuda_graph cannot add gradients up: tokens_per_step={self.tokens_per_step} must be length x "
                f"batch_size = {self.length} x {self.batch_size}"
            )
        if self.cuda_graph and self.boundaries != "cross":
            raise ValueError(f"cuda_graph needs boundaries='cross', got {self.boundaries!r}")
        rows = self.length * self.batch_size
        if self.tokens_per_step % rows:
            raise ValueError(
                f"tokens_per_step={self.tokens_per_step} must be a multiple of length x batch_size = {self.length} x "
                f"{self.batch_size} = {rows}: {max(1, self.tokens_per_step // rows) * rows} would be one"
            )
        for name in ("tokens", "tune_tokens", "transfer_tokens"):
            if 0 < getattr(self, name) < self.tokens_per_step:
                raise ValueError(
                    f"{name}={getattr(self, name)} is less than one step of tokens_per_step={self.tokens_per_step}"
                )
        fitted_on = self.calibration_length or self.length
        for name, length in (("recall_share", self.length), ("spread_recall_tokens", fitted_on)):
            value = getattr(self, name)
            if value and length < RECALL_LENGTH:
                raise ValueError(f"{name}={value} needs rows of length >= {RECALL_LENGTH}, got {length}")
        if self.text == ():
            raise ValueError("text is an empty list: name at least one source, or leave it out")
        if self.text_weights is not None and len(self.text_weights) != len(self.sources):
            raise ValueError(f"text_weights has {len(self.text_weights)} entries for {len(self.sources)} sources")
        if any(not weight > 0 for weight in self.text_weights or ()):
            raise ValueError(f"text_weights must be > 0, got {list(self.text_weights or ())}")
        if self.text_limit is not None and self.text_limit < 1:
            raise ValueError(f"text_limit must be at least 1 document, got {self.text_limit}")
        if self.transfer_tokens and self.boundaries == "respect":
            raise ValueError(
                "attention transfer takes whole rows: boundaries must be 'cross' or 'pad' with transfer_tokens > 0, "
                "got 'respect'"
            )

    def _check_tuning(self) -> None:
        if self.tune_tokens and self.teacher is not None:
            raise ValueError(
                f"tune_tokens makes the tuned model the teacher, but teacher={self.teacher!r}: leave one of them out"
            )
        if self.tune_tokens and self.dtype != "float32":
            raise ValueError(
                f"tune_tokens trains all weights, which needs dtype float32, got {self.dtype!r}: change it, or leave "
                "tune_tokens out"
            )

    def _check_features(self) -> None:
        schedule = ResampleSchedule.parse(self.schedule)
        if self.settle != "none":
            if not self.random_features:
                raise ValueError(
                    f"settle={self.settle!r} is for random features, but srf has feature_map={self.srf.feature_map!r} "
                    f"and num_features={self.srf.num_features}: use settle 'none'"
                )
            if schedule.settle is not None:
                raise ValueError(
                    f"schedule={self.schedule!r} settles by itself: leave that out and use settle_share, or settle "
                    "'none'"
                )
            if self.train not in ("all", "weights", "lora"):
                raise ValueError(f"settle={self.settle!r} needs train 'all', 'weights' or 'lora', got {self.train!r}")
            if self.settle == "train" and (self.train != "all" or self.settle_share == 1):
                raise ValueError(
                    "settle 'train' trains the maps with all else: it needs train 'all' and settle_share below 1, got "
                    f"train={self.train!r}, settle_share={self.settle_share}; use settle 'freeze'"
                )
        learned = self.srf.num_features > 0 and self.srf.feature_map != "random"
        if self.transfer_tokens and self.transfer_train == "features" and not learned:
            raise ValueError(
                "transfer_train 'features' needs maps that can be trained: srf.feature_map 'trained', 'hedgehog' or "
                f"'relu', got {self.srf.feature_map!r} with {self.srf.num_features} features"
            )
        if self.train == "features" and not learned:
            raise ValueError(f"train 'features' needs maps that can be trained, got {self.srf.feature_map!r}")
        if 0 < self.settle_share < 1 and self.settle != "none" and not 0 < self.steps_before_settling < self.steps:
            raise ValueError(f"settle_share={self.settle_share} of {self.steps} step(s) leaves one side without a step")

    def _check_adapters(self) -> None:
        if self.train == "lora":
            if not self.lora_targets:
                raise ValueError("lora_targets is empty: name modules, such as q_proj")
            if self.settle != "none" and self.settle_share:
                raise ValueError(
                    f"with train 'lora' features settle first: settle_share must be 0, got {self.settle_share}"
                )
            return
        if self.dtype != "float32":
            raise ValueError(
                f"training weights in dtype={self.dtype!r} loses small updates: use dtype float32 with bf16: true, or "
                "train: lora"
            )

    def _check_evaluation(self) -> None:
        default = EvalSettings()
        for name in _NOT_OF_EVALUATION:
            if getattr(self.eval, name) != getattr(default, name):
                raise ValueError(f"eval.{name} is decided by the run: leave it out (the text to judge on is held_out)")

    @property
    def sources(self) -> tuple[str | None, ...]:
        """The sources of text, one or several; None is the language reference."""
        return self.text if isinstance(self.text, tuple) else (self.text,)

    @property
    def random_features(self) -> bool:
        """Whether the retrofitted model has random features."""
        return self.srf.feature_map == "random" and self.srf.num_features > 0

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step."""
        return self.tokens_per_step // self.length

    @property
    def accumulation(self) -> int:
        """Forwards of one optimizer step."""
        return self.rows_per_step // self.batch_size

    @property
    def steps(self) -> int:
        """Optimizer steps of the logit stage."""
        return self.tokens // self.tokens_per_step

    @property
    def tune_steps(self) -> int:
        """Optimizer steps of tuning the softmax model."""
        return self.tune_tokens // self.tokens_per_step

    @property
    def transfer_steps(self) -> int:
        """Optimizer steps of attention transfer."""
        return self.transfer_tokens // self.tokens_per_step

    @property
    def steps_before_settling(self) -> int:
        """Optimizer steps of the logit stage with random features."""
        return self.steps if self.settle == "none" else round(self.settle_share * self.steps)

    @property
    def warmup(self) -> int:
        """Optimizer steps of warm-up: by default a twentieth of the logit stage, and at most 100."""
        return min(100, -(-self.steps // 20)) if self.warmup_steps is None else self.warmup_steps


def check_installed(settings: DistillSettings) -> None:
    """Refuse what this machine cannot do, before anything is loaded.

    Raises
    ------
    ValueError
        For LoRA without peft, or a report to TensorBoard without it; the message says how to install it.
    """
    if settings.train == "lora" and importlib.util.find_spec("peft") is None:
        raise ValueError("train 'lora' needs peft, which is not installed: pip install 'srf-retrofit[peft]'")
    if settings.report_to == "tensorboard" and not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
        raise ValueError("report_to 'tensorboard' needs it installed: pip install tensorboard, or report_to: none")


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
