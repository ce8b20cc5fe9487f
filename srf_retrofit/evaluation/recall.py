"""How well a model recalls what stood far back: accuracy on the rows of `recall_data`, by distance and by depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..data import TokenBlocks
from .perplexity import ablation
from .recall_data import (
    KINDS,
    RecallRows,
    copy_rows,
    mqar_rows,
    ordinary_tokens,
    passkey_rows,
    recall_rows,
    word_tokens,
)
from .scoring import evaluating, rows_at_once, score_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "CONTEXTS",
    "DEPTHS",
    "DISTANCES",
    "GAPS",
    "KINDS",
    "PAIRS",
    "Recall",
    "RecallRows",
    "copy_by_distance",
    "copy_rows",
    "mqar_grid",
    "mqar_rows",
    "ordinary_tokens",
    "passkey_grid",
    "passkey_rows",
    "recall_rows",
    "score_recall",
    "word_tokens",
]

DISTANCES = (50, 100, 200, 300, 500, 900)
PAIRS = (8, 32, 64)
GAPS = (0, 256)
CONTEXTS = (1024, 2048, 4096)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Recall:
    """How much was recalled.

    Attributes
    ----------
    accuracy : float
        Share of scored tokens that were the likeliest ones, each with the right tokens before it.
    stderr : float
        Of `accuracy`, over rows: tokens of one row stand and fall together. 0 for a single row.
    whole : float
        Share of rows with every scored token right.
    tokens, rows : int
    """

    accuracy: float
    stderr: float
    whole: float
    tokens: int
    rows: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def score_recall(model: PreTrainedModel, rows: RecallRows, *, mode: str = "full", batch_tokens: int = 16384) -> Recall:
    """Greedy accuracy at the scored tokens, teacher-forced.

    Parameters
    ----------
    model : PreTrainedModel
    rows : RecallRows
    mode : str
        See `perplexity.ablation`.
    batch_tokens : int
        Tokens at once; changes memory and time, not the result.

    Raises
    ------
    ValueError
        When a row has nothing to score.
    """
    counts = rows.scored.sum(-1)
    if not bool((counts > 0).all()):
        raise ValueError("every row must have a token to score")
    parts = []
    with evaluating(model), ablation(model, mode):
        size = rows_at_once(rows.input_ids.shape[1], batch_tokens)
        for ids, scored in zip(rows.input_ids.split(size), rows.scored.split(size), strict=True):
            parts.append(score_tokens(model, ids, scored).right)
    right = torch.cat(parts).cpu()
    per_row = torch.stack([row.double().mean() for row in right.split(counts.tolist())])
    n = len(per_row)
    return Recall(
        accuracy=float(right.double().mean()),
        stderr=float(per_row.std() / n**0.5) if n > 1 else 0.0,
        whole=float((per_row == 1).double().mean()),
        tokens=len(right),
        rows=n,
    )


def _score_cells(
    model: PreTrainedModel,
    cells: Sequence[dict[str, Any]],
    make: Callable[..., RecallRows],
    label: str,
    mode: str,
    batch_tokens: int,
    progress: bool,
) -> list[dict[str, float]]:
    """`Recall` on the rows that `make` makes for each cell, beside what names the cell."""
    bar = tqdm(cells, desc=f"{label}, {mode}", disable=not progress, leave=False)
    return [
        {**cell, **score_recall(model, make(**cell), mode=mode, batch_tokens=batch_tokens).to_dict()} for cell in bar
    ]


def copy_by_distance(
    model: PreTrainedModel,
    vocabulary: torch.Tensor,
    *,
    distances: Sequence[int] = DISTANCES,
    trials: int = 16,
    filler: TokenBlocks | None = None,
    mode: str = "full",
    seed: int = 0,
    batch_tokens: int = 16384,
    progress: bool = False,
) -> list[dict[str, float]]:
    """`Recall` of `trials` copies at each distance, as dictionaries with their `distance`. See `copy_rows`."""
    cells = [{"distance": distance} for distance in distances]
    make = partial(copy_rows, trials, vocabulary, filler=filler, seed=seed)
    return _score_cells(model, cells, make, "copies", mode, batch_tokens, progress)


def mqar_grid(
    model: PreTrainedModel,
    vocabulary: torch.Tensor,
    *,
    pairs: Sequence[int] = PAIRS,
    gaps: Sequence[int] = GAPS,
    trials: int = 16,
    filler: TokenBlocks | None = None,
    mode: str = "full",
    seed: int = 0,
    batch_tokens: int = 16384,
    progress: bool = False,
) -> list[dict[str, float]]:
    """`Recall` for every number of pairs and every gap, as dictionaries with `pairs` and `gap`. See `mqar_rows`."""
    cells = [{"pairs": n, "gap": gap} for n in pairs for gap in gaps]
    make = partial(mqar_rows, trials, vocabulary, filler=filler, seed=seed)
    return _score_cells(model, cells, make, "associations", mode, batch_tokens, progress)


def passkey_grid(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    filler: TokenBlocks,
    *,
    contexts: Sequence[int] = CONTEXTS,
    depths: Sequence[float] = DEPTHS,
    trials: int = 8,
    mode: str = "full",
    seed: int = 0,
    batch_tokens: int = 16384,
    progress: bool = False,
) -> list[dict[str, float]]:
    """`Recall` for every context and depth, as dictionaries with `context` and `depth`. See `passkey_rows`."""
    cells = [{"context": context, "depth": depth} for context in contexts for depth in depths]
    make = partial(passkey_rows, trials, tokenizer, filler, seed=seed)
    return _score_cells(model, cells, make, "pass keys", mode, batch_tokens, progress)
