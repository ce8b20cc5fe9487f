"""Multiple choice and cloze by log-likelihood, batched by length, with the conventions of lm-eval 0.4.

A task is a file of JSON lines (`.jsonl`, `.gz` or `.xz` too), all of one kind:

- multiple choice: `{"context": str, "choices": [str, ...], "gold": int}`; choices begin with their space;
- cloze: `{"context": str, "continuation": str}`, as in LAMBADA.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm

from .perplexity import ablation
from .scoring import batches_by_length, evaluating, pad_rows, score_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 65536


@dataclass(frozen=True)
class Item:
    """One question: a context and its possible continuations.

    `gold` is the index of the right one; None marks a cloze item, whose only continuation is the right one.
    """

    context: str
    continuations: tuple[str, ...]
    gold: int | None


class Likelihood(NamedTuple):
    """Log-likelihood of a continuation in nats, and whether every token of it was the likeliest."""

    log_likelihood: float
    greedy: bool


def read_items(path: str | Path, *, limit: int | None = None) -> list[Item]:
    """The items of a file, the first `limit` of them.

    Raises
    ------
    ValueError
        For a missing or empty file, or a line that is not an item of the kind of the first; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such task file: {path}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be >= 1, got {limit}")
    opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    items: list[Item] = []
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if len(items) == limit:
                    break
                if line.strip():
                    items.append(_item(line, f"{path.name}, line {number}"))
                    if (items[-1].gold is None) != (items[0].gold is None):
                        raise ValueError(f"{path.name}, line {number}: choices and cloze items cannot share a file")
    except (UnicodeDecodeError, gzip.BadGzipFile, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path.name} cannot be read as UTF-8 text: {error}") from error
    if not items:
        raise ValueError(f"there are no items in {path}")
    return items


def _item(line: str, where: str) -> Item:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg})") from error
    if not isinstance(row, dict) or not isinstance(row.get("context"), str):
        raise ValueError(f"{where}: an item needs a string under 'context'")
    choices, gold, continuation = row.get("choices"), row.get("gold"), row.get("continuation")
    if choices is None:
        if not isinstance(continuation, str) or not continuation:
            raise ValueError(f"{where}: an item needs 'choices' and 'gold', or a 'continuation' that is not empty")
        return Item(row["context"], (continuation,), None)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError(f"{where}: 'choices' must be two or more strings that are not empty, got {choices!r}")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"{where}: 'gold' must be an index into {len(choices)} choices, got {gold!r}")
    return Item(row["context"], tuple(choices), gold)


def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    mode: str = "full",
    batch_tokens: int = BATCH_TOKENS,
    label: str = "log-likelihoods",
    progress: bool = False,
) -> list[Likelihood]:
    """Score continuations after their contexts, as lm-eval's `loglikelihood` requests.

    Both are tokenised together, with the special tokens that the tokenizer adds, and split where the context alone
    ends; trailing spaces of a context go to the continuation first. An empty context is the BOS token (EOS where there
    is none). What is longer than the model's context loses its beginning.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    pairs : sequence of (context, continuation)
    mode : str
        See `perplexity.ablation`.
    batch_tokens : int
        Padded tokens at once; changes memory and time, not the result.
    label : str
        Of the progress bar.
    progress : bool

    Returns
    -------
    list of Likelihood, one a pair

    Raises
    ------
    ValueError
        When a continuation has no token of its own, or more than the model's context holds.
    """
    encoded = _encode_pairs(tokenizer, pairs)
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    rows: list[list[int]] = []
    scored: list[int] = []
    for (context, continuation), (context_ids, ids) in zip(pairs, encoded, strict=True):
        if not ids:
            raise ValueError(f"the continuation {continuation!r} has no token of its own after {context[-40:]!r}")
        row = context_ids + ids
        if most is not None:
            row = row[-(most + 1) :]
        if len(row) <= len(ids):
            raise ValueError(
                f"the continuation {continuation[:40]!r} has {len(ids)} tokens, the model's context {most}"
            )
        rows.append(row)
        scored.append(len(ids))
    found: list[Likelihood | None] = [None] * len(rows)
    batches = list(batches_by_length([len(row) for row in rows], batch_tokens))
    parts: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []
    with evaluating(model), ablation(model, mode):
        for batch in tqdm(batches, desc=label, unit="batch", disable=not progress, leave=False):
            input_ids = pad_rows([rows[i] for i in batch])
            ends = torch.tensor([len(rows[i]) for i in batch]).unsqueeze(1)
            counts = torch.tensor([scored[i] for i in batch])
            places = torch.arange(input_ids.shape[1])
            nll, right = score_tokens(model, input_ids, (places >= ends - counts.unsqueeze(1)) & (places < ends))
            # One number a row, summed on the device; the host waits for it only after the last batch.
            owner = torch.repeat_interleave(torch.arange(len(batch)), counts).to(nll.device)
            sums = torch.zeros(len(batch), dtype=torch.float64, device=nll.device).index_add_(0, owner, nll.double())
            wrong = torch.zeros(len(batch), dtype=torch.int64, device=nll.device).index_add_(0, owner, (~right).long())
            parts.append((batch, sums, wrong))
    for batch, sums, wrong in parts:
        for i, total, misses in zip(batch, sums.tolist(), wrong.tolist(), strict=True):
            found[i] = Likelihood(-total, misses == 0)
    return [one for one in found if one is not None]


def score_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    mode: str = "full",
    batch_tokens: int = BATCH_TOKENS,
    label: str = "items",
    progress: bool = False,
) -> dict[str, Any]:
    """Accuracy on items of one kind, with standard errors, under lm-eval's names.

    Parameters are those of `log_likelihoods`.

    Returns
    -------
    dict
        Multiple choice: `acc` takes the likeliest choice, `acc_norm` divides its log-likelihood by the choice's length
        in characters, `acc_bytes` in UTF-8 bytes. Cloze: `acc` is the share of continuations with every token the
        likeliest, `perplexity` is per continuation, not per token. Each with its `*_stderr`, of an accuracy over items,
        of the perplexity by the delta method (lm-eval draws bootstrap samples); and `items`.

    Raises
    ------
    ValueError
        When there are no items, or of both kinds; see also `log_likelihoods`.
    """
    if len({item.gold is None for item in items}) != 1:
        raise ValueError(f"items must be of one kind, and at least one, got {len(items)}")
    pairs = [(item.context, continuation) for item in items for continuation in item.continuations]
    found = iter(
        log_likelihoods(
            model, tokenizer, pairs, mode=mode, batch_tokens=batch_tokens, label=f"{label}, {mode}", progress=progress
        )
    )
    answers = [[next(found) for _ in item.continuations] for item in items]
    if items[0].gold is None:
        log_likelihood = [answer[0].log_likelihood for answer in answers]
        # An average of -709 nats overflows; JSON has no infinity.
        perplexity = math.exp(min(-statistics.fmean(log_likelihood), 709.0))
        return {
            "items": len(items),
            "perplexity": perplexity,
            "perplexity_stderr": perplexity * _stderr(log_likelihood),
            **_accuracy("acc", [answer[0].greedy for answer in answers]),
        }
    lengths: dict[str, Any] = {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode())}
    out: dict[str, Any] = {"items": len(items)}
    for name, length in lengths.items():
        right = []
        for item, answer in zip(items, answers, strict=True):
            scores = [a.log_likelihood / length(c) for a, c in zip(answer, item.continuations, strict=True)]
            right.append(scores.index(max(scores)) == item.gold)
        out.update(_accuracy(name, right))
    return out


def _accuracy(name: str, right: Sequence[bool]) -> dict[str, float]:
    values = [float(x) for x in right]
    return {name: statistics.fmean(values), f"{name}_stderr": _stderr(values)}


def _stderr(values: Sequence[float]) -> float:
    """Of the mean, from the sample's deviation; 0 for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Tokens of contexts and of continuations, see `log_likelihoods`."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    split = []
    for context, continuation in pairs:
        kept = context.rstrip()
        split.append((kept, context + continuation) if context else ("", continuation))
    encoded = _encode(tokenizer, sorted({text for pair in split for text in pair}), first)
    out = []
    for (context, _), (kept, whole) in zip(pairs, split, strict=True):
        if context:
            ids = encoded[whole][len(encoded[kept]) :]
            if encoded[kept]:
                out.append((encoded[kept], ids))
                continue
        else:
            ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        if first is None:
            raise ValueError("an empty context needs a tokenizer with a BOS or EOS token: give items a context")
        out.append((ids[:1], ids[1:]) if ids[:1] == [first] else ([first], ids))
    return out


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], first: int | None) -> dict[str, list[int]]:
    """Tokens of each text; a text that begins with the BOS token gets no second one."""
    begin = str(tokenizer.decode([first])) if first is not None else ""
    out: dict[str, list[int]] = {}
    for special in (True, False):
        some = [text for text in texts if bool(begin and text.startswith(begin)) != special]
        if some:
            out.update(zip(some, tokenizer(some, add_special_tokens=special, verbose=False)["input_ids"], strict=True))
    return out
