"""The text of a distillation: rows to train on, in one fixed order, rows to calibrate on, and text to judge on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data import DocumentBlocks, Mixture, TokenBlocks, load_documents, pack, split_documents
from ..evaluation.recall_data import KINDS, recall_rows, word_tokens
from ..evaluation.settings import needed_tokens
from .settings import DistillSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REFERENCE = "the Python language reference"
_FILLER_BLOCKS = 256  # blocks of prose that recall-shaped rows are filled up from


class RecallDataset(torch.utils.data.Dataset):
    """Recall-shaped rows as training items, copies, associations and pass keys in turn; item `i` is a function of `i`.

    Every position is a label: what the teacher expects is to be learned everywhere, and most of a row is prose.

    Parameters
    ----------
    count, length : int
        Rows, and tokens of each.
    tokenizer : PreTrainedTokenizerBase
    prose : TokenBlocks
        To fill up with.
    boundaries : {"cross", "respect", "pad"}
        Of the data the rows are mixed with, whose items they resemble.
    seed : int
    """

    def __init__(
        self,
        count: int,
        length: int,
        tokenizer: PreTrainedTokenizerBase,
        prose: TokenBlocks,
        *,
        boundaries: str = "cross",
        seed: int = 0,
    ) -> None:
        self.count, self.length, self.tokenizer = count, length, tokenizer
        self.prose, self.boundaries, self.seed = prose, boundaries, seed
        self.vocabulary = word_tokens(tokenizer)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rows = recall_rows(
            KINDS[index % len(KINDS)],
            batch_size=1,
            length=self.length,
            vocabulary=self.vocabulary,
            filler=self.prose,
            tokenizer=self.tokenizer,
            seed=self.seed,
            start=index,
        )
        ids = next(rows).input_ids[0]
        item = {"input_ids": ids}
        if self.boundaries == "pad":
            item["attention_mask"] = torch.ones_like(ids)
        elif self.boundaries == "respect":
            item["position_ids"] = torch.arange(len(ids))
        return {**item, "labels": ids.clone()}


@dataclass(frozen=True)
class DistillText:
    """What `prepare` made.

    Attributes
    ----------
    training : Mixture
        Rows of attention transfer, then those of the logit stage; where there are no steps, one row that nobody reads.
    calibration : TokenBlocks
        Rows of training text, without boundaries.
    asking : list of dict
        Rows that ask for what stood far back, for the slots; as `RecallDataset` makes them.
    held_out : TokenBlocks or None
        None where the evaluation reads no text.
    facts : dict
        Sources, tokens, rows and epochs, for the report.
    """

    training: Mixture
    calibration: TokenBlocks
    asking: list[dict[str, torch.Tensor]]
    held_out: TokenBlocks | None
    facts: dict[str, Any]

    def rows(self, first: int, count: int) -> torch.utils.data.Subset:
        """`count` rows of the training text from number `first` on."""
        return torch.utils.data.Subset(self.training, range(first, first + count))


def prepare(settings: DistillSettings, tokenizer: PreTrainedTokenizerBase) -> DistillText:
    """Read, split, tokenise and mix the text; the same for the same settings.

    Raises
    ------
    ValueError
        For a source that cannot be read, and when there is less text than the settings ask for; the message says how
        many tokens there are, how many are needed, and what to change.
    """
    wanted = (settings.tune_steps + settings.transfer_steps + settings.steps) * settings.rows_per_step
    judged = needed_tokens(settings.eval)
    training, held_out = _documents(settings, tokenizer, split=bool(judged))
    # Where nothing is trained, a row of each source stands for it.
    limit = max(1, wanted)
    blocks = [_pack(source, documents, settings, tokenizer, limit) for source, documents in training.items()]
    some = next(iter(training.values()))
    length = settings.calibration_length or settings.length
    calibration = _cross("calibration", some, tokenizer, length, max(1, settings.calibration_tokens // length))
    sources: list[Any] = list(blocks)
    weights = list(settings.text_weights or [len(block) for block in blocks])
    prose = calibration
    if settings.recall_share and wanted:
        prose = _cross("filler", some, tokenizer, settings.length, _FILLER_BLOCKS)
        count = math.ceil(wanted * settings.recall_share) + 2
        sources.append(
            RecallDataset(
                count, settings.length, tokenizer, prose, boundaries=settings.boundaries, seed=settings.seed + 1
            )
        )
        total = sum(weights)
        weights = [(1 - settings.recall_share) * weight / total for weight in weights] + [settings.recall_share]
    mixture = Mixture(sources, weights, length=limit, seed=settings.seed)
    names = list(training)
    _check_amount(settings, names, blocks, mixture, wanted)
    judge_on = None
    if judged:
        judge_on = _cross("held-out", held_out, tokenizer, settings.eval.length, -(-judged // settings.eval.length))
    counts, epochs_read = list(mixture.counts), list(mixture.epochs)
    if not wanted:
        counts, epochs_read = [0] * len(counts), [0.0] * len(counts)
    facts = {
        "sources": [
            {"name": name, "tokens": block.num_tokens, "rows": count, "epochs": round(epochs, 4)}
            for name, block, count, epochs in zip(names, blocks, counts, epochs_read, strict=False)
        ],
        "recall_rows": counts[-1] if settings.recall_share else 0,
        "calibration_tokens": calibration.num_tokens,
        "held_out_tokens": judge_on.num_tokens if judge_on else 0,
    }
    count = -(-settings.spread_recall_tokens // length)
    recall = RecallDataset(count, length, tokenizer, prose, seed=settings.seed + 2)
    return DistillText(mixture, calibration, [recall[i] for i in range(count)], judge_on, facts)


def _documents(
    settings: DistillSettings, tokenizer: PreTrainedTokenizerBase, split: bool
) -> tuple[dict[str, list[str]], list[str]]:
    """Training documents by source, and held-out ones."""
    how: dict[str, Any] = {
        "field": settings.text_field, "split": settings.text_split, "limit": settings.text_limit,
        "template": settings.template, "tokenizer": tokenizer,
    }  # fmt: skip
    training: dict[str, list[str]] = {}
    held_out: list[str] = []
    for source in settings.sources:
        name = _REFERENCE if source is None else str(source)
        if name in training:
            raise ValueError(f"text names {name} twice: give each source once, and text_weights")
        documents = load_documents(source, **how)
        if split and settings.held_out is None:
            # The share between the two counts as training text: a geometry fitted to it learns no text.
            try:
                parts = split_documents(documents, held_out=settings.held_out_share, calibration=0.01)
            except ValueError as error:
                raise ValueError(f"text {name}: {error}") from None
            documents, part = [*parts.calibration, *parts.training], parts.held_out
            held_out += part
        training[name] = documents
    if split and settings.held_out is not None:
        held_out = load_documents(settings.held_out, **{**how, "limit": None})
        if {".txt", ".md"} & set(Path(settings.held_out).suffixes):
            held_out = ["\n\n".join(held_out)]  # sections of one text are judged as one text
    return training, held_out


def _pack(
    name: str, documents: list[str], settings: DistillSettings, tokenizer: PreTrainedTokenizerBase, limit: int
) -> TokenBlocks | DocumentBlocks:
    try:
        return pack(documents, tokenizer, settings.length, limit=limit, boundaries=settings.boundaries)
    except ValueError as error:
        raise ValueError(f"training text {name}: {error}") from None


def _cross(what: str, documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int, limit: int) -> TokenBlocks:
    try:
        return pack(documents, tokenizer, length, limit=limit, boundaries="cross")
    except ValueError as error:
        raise ValueError(f"{what} text: {error}") from None


def _check_amount(
    settings: DistillSettings,
    names: list[str],
    blocks: list[TokenBlocks | DocumentBlocks],
    mixture: Mixture,
    wanted: int,
) -> None:
    for name, block, epochs in zip(names, blocks, mixture.epochs, strict=False):
        if epochs <= settings.max_epochs:
            continue
        have, need = len(block) * settings.length, math.ceil(epochs * len(block)) * settings.length
        raise ValueError(
            f"the training text {name} fills {have:,} tokens of rows, and {need:,} are needed (tokens="
            f"{settings.tokens:,}, transfer_tokens={settings.transfer_tokens:,} and "
            f"tune_tokens={settings.tune_tokens:,} are {wanted:,} rows of {settings.length}): give more text, ask for "
            f"fewer tokens, or allow max_epochs: {math.ceil(epochs)}"
        )
