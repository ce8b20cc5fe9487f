"""The parts of an evaluation, one method each, on one model."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..data import TokenBlocks
from ..modeling.attention import srf_attentions
from . import choices, harness, long_text, recall
from . import perplexity as evaluation
from .scoring import rows_at_once
from .settings import ANALYSIS, EvalSettings
from .tail_share import tail_shares

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CPU_TOKENS = 4096
# The distance holds the logits of both models, in the models' dtype.
_DISTANCE_TOKENS = 8192
_HARNESS_LENGTH = 512  # of a row, as far as its batches are concerned

# Where each part's figures stand in a result; the others under their own names.
KEYS = {"heads": "head_error", "tails": "tail_share"}


@dataclass
class Measurement:
    """One model, and what it is measured on. Every method is a part; most take a mode of `perplexity.ablation`.

    Attributes
    ----------
    model, tokenizer, settings
    text : TokenBlocks, optional
        Needed by the parts that read text, see `suite.check`.
    progress : bool
    seconds : dict
        Filled by `run`: seconds of each part.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: EvalSettings
    text: TokenBlocks | None = None
    progress: bool = True
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, parts: Iterable[str], modes: dict[str, tuple[str, ...]]) -> dict[str, Any]:
        """Measure `parts`, each in its `modes`; figures by `KEYS`, then by mode."""
        out: dict[str, Any] = {}
        for part in parts:
            start = time.perf_counter()
            measure = getattr(self, part)
            if part in ANALYSIS:
                found = measure()
            else:
                found = {mode: measure(mode) for mode in modes[part]}
            out[KEYS.get(part, part)] = found
            self.seconds[part] = time.perf_counter() - start
        return out

    @property
    def batch_tokens(self) -> int:
        """Tokens at once."""
        return self.settings.batch_tokens or (long_text.BATCH_TOKENS if self._on_gpu else _CPU_TOKENS)

    @property
    def task_batch_tokens(self) -> int:
        """Tokens at once in tasks, whose rows have few positions that need logits."""
        return self.settings.task_batch_tokens or (choices.BATCH_TOKENS if self._on_gpu else _CPU_TOKENS)

    @property
    def _on_gpu(self) -> bool:
        return self.model.device.type == "cuda"

    def _text(self) -> TokenBlocks:
        if self.text is None:
            raise ValueError("this part needs text: give TokenBlocks")
        return self.text

    def _windows(self) -> TokenBlocks:
        """The first `tokens` tokens in windows of `length`."""
        s = self.settings
        return long_text.windows(self._text(), s.length).first(max(1, s.tokens // s.length))

    def perplexity(self, mode: str) -> dict[str, float]:
        """See `perplexity.perplexity`."""
        size = self.settings.batch_size or rows_at_once(self.settings.length, self.batch_tokens)
        found = evaluation.perplexity(self.model, self._windows(), mode=mode, batch_size=size, progress=self.progress)
        return found.to_dict()

    def distance(self, teacher: PreTrainedModel) -> dict[str, float]:
        """See `perplexity.distance`."""
        start = time.perf_counter()
        size = self.settings.batch_size or rows_at_once(self.settings.length, min(self.batch_tokens, _DISTANCE_TOKENS))
        found = evaluation.distance(teacher, self.model, self._windows(), batch_size=size, progress=self.progress)
        self.seconds["distance"] = time.perf_counter() - start
        return found.to_dict()

    def lengths(self, mode: str) -> dict[str, Any]:
        """See `long_text.length_perplexity`."""
        text, most = self._text(), self.settings.length_tokens
        if most is not None:
            text = TokenBlocks(text.blocks.flatten()[:most].unsqueeze(0))
        return long_text.length_perplexity(
            self.model,
            text,
            lengths=self.settings.lengths,
            tokenizer=self.tokenizer,
            mode=mode,
            batch_tokens=self.batch_tokens,
            progress=self.progress,
        )

    def copy(self, mode: str) -> list[dict[str, float]]:
        """See `recall.copy_by_distance`."""
        words = recall.word_tokens(self.tokenizer)
        return recall.copy_by_distance(
            self.model, words, distances=self.settings.distances, filler=self._filler(), **self._recalled(mode)
        )

    def mqar(self, mode: str) -> list[dict[str, float]]:
        """See `recall.mqar_grid`."""
        s = self.settings
        return recall.mqar_grid(
            self.model,
            recall.word_tokens(self.tokenizer),
            pairs=s.pairs,
            gaps=s.gaps,
            filler=self._filler(),
            **self._recalled(mode),
        )

    def passkey(self, mode: str) -> list[dict[str, float]]:
        """See `recall.passkey_grid`."""
        s = self.settings
        return recall.passkey_grid(
            self.model, self.tokenizer, self._text(), contexts=s.contexts, depths=s.depths, **self._recalled(mode)
        )

    def _filler(self) -> TokenBlocks | None:
        return self._text() if self.settings.prose else None

    def _recalled(self, mode: str) -> dict[str, Any]:
        s = self.settings
        return {
            "trials": s.trials,
            "mode": mode,
            "seed": s.seed,
            "batch_tokens": self.batch_tokens,
            "progress": self.progress,
        }

    def tasks(self, mode: str) -> dict[str, dict[str, float]]:
        """See `choices.score_items`; by name of task."""
        out = {}
        for path in self.settings.tasks:
            name = harness.task_name(path)
            out[name] = choices.score_items(
                self.model,
                self.tokenizer,
                choices.read_items(path, limit=self.settings.limit),
                mode=mode,
                batch_tokens=self.task_batch_tokens,
                label=name,
                progress=self.progress,
            )
        return out

    def harness(self, mode: str) -> dict[str, dict[str, float]]:
        """See `harness.harness_scores`."""
        s = self.settings
        return harness.harness_scores(
            self.model,
            self.tokenizer,
            s.harness_tasks,
            include_path=s.harness_path,
            limit=s.limit,
            # lm-eval forms the logits of whole batches.
            batch_size=rows_at_once(_HARNESS_LENGTH, self.task_batch_tokens // 2),
            mode=mode,
        )

    def _analysed(self) -> TokenBlocks:
        s = self.settings
        return long_text.windows(self._text(), s.analysis_length).first(s.analysis_blocks)

    def heads(self) -> list[list[float]]:
        """See `perplexity.head_errors`."""
        return evaluation.head_errors(self.model, self._analysed(), progress=self.progress)

    def tails(self) -> dict[str, list[list[float]]]:
        """See `tail_share.tail_shares`."""
        return tail_shares(self.model, self._analysed(), progress=self.progress).to_dict()


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """What was measured: class, size, dtype, device, and the attention's configuration."""
    layers = srf_attentions(model)
    device = model.device
    return {
        "name": str(getattr(model.config, "_name_or_path", "") or type(model).__name__),
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "srf": dict(model.config.srf) if layers else None,
    }
