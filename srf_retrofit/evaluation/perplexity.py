"""How good a model is, how far a retrofit stands from its teacher, and where the error sits.

Shapes: `B` rows, `H` query heads, `G` key/value heads, `L` positions, `D` head dimension, `V` vocabulary. All
functions put the model into evaluation mode for the time of the call and take no gradients.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import DynamicCache

from ..data import TokenBlocks
from ..modeling.attention import SRFAttention, ablated_attention, exact_attention, srf_attentions
from ..modeling.ops import ABLATIONS, srf_attention
from .scoring import evaluating, score_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "MODES",
    "Distance",
    "Perplexity",
    "ablation",
    "decode_times",
    "distance",
    "evaluating",
    "head_errors",
    "perplexity",
]

MODES = ("full", *(name for name in ABLATIONS if name is not None))

# Positions whose logits are turned into float32 log-probabilities at once: 256 x 49,152 x 4 bytes = 48 MiB.
_POSITIONS = 256
_POSITIONS_GPU = 2048
_PREFILL = 1024  # tokens at once while a context is filled


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log-likelihood `nll` in nats over `tokens` predictions."""

    nll: float
    tokens: int

    @property
    def ppl(self) -> float:
        """`exp(nll)`; the largest float where that overflows."""
        return math.exp(min(self.nll, 709.0))

    def to_dict(self) -> dict[str, float]:
        return {"nll": self.nll, "ppl": self.ppl, "tokens": self.tokens}


@dataclass(frozen=True)
class Distance:
    """Distance of a student from its teacher over `tokens` predictions.

    `kl` is the mean of `KL(teacher || student)` in nats per token, `agreement` the share of positions where both
    find the same next token likeliest.
    """

    kl: float
    agreement: float
    tokens: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@contextmanager
def ablation(model: PreTrainedModel, mode: str) -> Iterator[None]:
    """Leave a part of every retrofitted layer out while the block runs.

    Parameters
    ----------
    model : PreTrainedModel
    mode : {"full", "no_tail", "tail_only", "no_retained"}
        Nothing; the features, so that only exact keys are left; sinks, window and retained keys, so that every key is
        estimated by features; the retained keys alone. Needs forwards without a cache (`use_cache=False`).

    Raises
    ------
    ValueError
        For another mode, or one other than "full" when no layer is retrofitted.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode != "full" and not srf_attentions(model):
        raise ValueError(f"the model has no retrofitted layer to run {mode!r} on: retrofit it first")
    with ablated_attention(model, None if mode == "full" else mode):
        yield


def _batches(blocks: TokenBlocks, batch_size: int, label: str, progress: bool) -> Iterable[torch.Tensor]:
    if blocks.blocks.shape[1] < 2:
        raise ValueError("blocks of one token leave nothing to predict: pack longer ones")
    rows = blocks.blocks.split(batch_size)
    return tqdm(rows, desc=label, unit="batch", disable=not progress, leave=False)


def _logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, L - 1, V): the predictions of all tokens but the first."""
    return model(input_ids=input_ids.to(model.device), use_cache=False).logits[:, :-1]


def perplexity(
    model: PreTrainedModel,
    blocks: TokenBlocks,
    *,
    mode: str = "full",
    batch_size: int = 4,
    progress: bool = False,
) -> Perplexity:
    """Perplexity on non-overlapping windows: every token but the first of each block is predicted once.

    The windows are the blocks themselves, so that equal blocks mean equal tokens and equal contexts, whatever the
    model. A token's context is the part of its block before it, `L / 2` tokens on average.

    Parameters
    ----------
    model : PreTrainedModel
    blocks : TokenBlocks, (N, L)
    mode : {"full", "no_tail", "tail_only", "no_retained"}
        See `ablation`.
    batch_size : int
        Blocks at once; changes memory and time, not the result.
    progress : bool
        Show a bar.

    Raises
    ------
    ValueError
        For blocks of one token, or see `ablation`.
    """
    total: torch.Tensor | float = 0.0  # summed where the model is, so that the device is not waited for
    tokens = 0
    with evaluating(model), ablation(model, mode):
        for input_ids in _batches(blocks, batch_size, f"perplexity, {mode}", progress):
            nll = score_tokens(model, input_ids).nll
            total, tokens = total + nll.double().sum(), tokens + nll.numel()
    return Perplexity(float(total) / tokens, tokens)


def distance(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    blocks: TokenBlocks,
    *,
    batch_size: int = 4,
    progress: bool = False,
) -> Distance:
    """How far the student's predictions are from the teacher's, see `Distance`; blocks as in `perplexity`.

    Teacher and student may be the same retrofitted model: the teacher then is its exact softmax form.
    """
    # Summed where the teacher is, so that the device is not waited for.
    kl: torch.Tensor | float = 0.0
    same: torch.Tensor | int = 0
    tokens = 0
    with evaluating(teacher, student):
        for input_ids in _batches(blocks, batch_size, "distance to the teacher", progress):
            if teacher is student:
                with exact_attention(teacher):
                    wanted = _logits(teacher, input_ids).flatten(0, 1)
            else:
                wanted = _logits(teacher, input_ids).flatten(0, 1)
            given = _logits(student, input_ids).flatten(0, 1).to(wanted.device)
            size = _POSITIONS_GPU if wanted.is_cuda else _POSITIONS
            for theirs, mine in zip(wanted.split(size), given.split(size), strict=True):
                p, q = theirs.float().log_softmax(-1), mine.float().log_softmax(-1)
                kl = kl + functional.kl_div(q, p, reduction="sum", log_target=True).double()
                same = same + (p.argmax(-1) == q.argmax(-1)).sum()
            tokens += wanted.shape[0]
    return Distance(float(kl) / tokens, int(same) / tokens, tokens)


def head_errors(model: PreTrainedModel, blocks: TokenBlocks, *, progress: bool = False) -> list[list[float]]:
    """Relative error of each retrofitted head's output against exact softmax on the same queries, keys and values.

    The inputs are those that the layers meet in the exact model, so that one layer's error does not disturb the next:
    `|o_srf - o_softmax|_F / |o_softmax|_F` over all positions of `blocks`, per query head, before the output
    projection.

    Returns
    -------
    list of H floats for each retrofitted layer, in order

    Raises
    ------
    ValueError
        When no layer is retrofitted.
    """
    layers = srf_attentions(model)
    if not layers:
        raise ValueError("the model has no retrofitted layer: retrofit it first")
    wrong: dict[int, torch.Tensor] = {}
    whole: dict[int, torch.Tensor] = {}

    def compare(layer: SRFAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        q, k, v = layer._project(hidden_states, kwargs["position_embeddings"])
        exact = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=layer.scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        ours, _ = srf_attention(
            q, k, v, layer.attn_fn.folded(), layer.srf_config,
            scaling=layer.scaling, log_forget=layer._forget(hidden_states),
        )  # fmt: skip
        for sums, difference in ((wrong, ours.float() - exact.float()), (whole, exact.float())):
            sums[id(layer)] = sums.get(id(layer), 0.0) + difference.square().sum((0, 2, 3)).double().cpu()

    handles = [layer.register_forward_pre_hook(compare, with_kwargs=True) for layer in layers]
    try:
        with evaluating(model), exact_attention(model):
            for input_ids in _batches(blocks, 1, "error per head", progress):
                model(input_ids=input_ids.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return [(wrong[id(layer)] / whole[id(layer)]).sqrt().tolist() for layer in layers]


def decode_times(
    model: PreTrainedModel, contexts: Sequence[int], *, tokens: int = 16, seed: int = 0, progress: bool = False
) -> list[float]:
    """Milliseconds per generated token after each context length: the median of `tokens` one-token steps.

    One sequence of random tokens grows from one context to the next through its own cache, as in generation; the
    choice of a token is not timed.

    Raises
    ------
    ValueError
        When contexts do not rise by more than `tokens` each.
    """
    if not contexts or contexts[0] < 1 or any(b - a <= tokens for a, b in pairwise(contexts)):
        raise ValueError(f"contexts must rise by more than tokens={tokens} each, got {list(contexts)}")
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache(config=model.config)
    length, out = 0, []

    def step(count: int) -> float:
        row = torch.randint(model.config.vocab_size, (1, count), generator=generator).to(model.device)
        _wait(model.device)
        start = time.perf_counter()
        model(input_ids=row, past_key_values=cache, use_cache=True, logits_to_keep=1)
        _wait(model.device)
        return time.perf_counter() - start

    with evaluating(model):
        for context in tqdm(contexts, desc="time per token", disable=not progress, leave=False):
            while length < context:
                count = min(_PREFILL, context - length)
                step(count)
                length += count
            out.append(1000 * statistics.median(step(1) for _ in range(tokens)))
            length += tokens
    return out


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
