"""Rows that ask for what stood far back: copies at a distance, associations, pass keys; to judge on and to train on.

Every row is made of ordinary tokens and says which of its tokens are scored: those that a model can name only if it
still finds what it read before. The makers of rows are pure functions of their seed.

Shapes: `N` rows of `L` tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..data import TokenBlocks
from ..data.token_blocks import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("copy", "mqar", "passkey")
STRING = 32  # tokens of a string that is copied
UNSCORED = 3  # first tokens of its second copy, before anything tells that it is one
_LEAD = 64  # rows begin at a random place of so many tokens, so that no block boundary is always at the same token
_KEY_DIGITS = 5
_ROUNDS = 50
_WORD = re.compile("[\u0120\u2581][A-Za-z]{3,}")  # the marks of a space: byte-level and SentencePiece vocabularies
_FEWEST_WORDS = 256


class RecallRows(NamedTuple):
    """Rows, and which of their tokens are to be named from the tokens before them."""

    input_ids: torch.Tensor  # (N, L) int64
    scored: torch.Tensor  # (N, L) bool, never the first token

    @property
    def labels(self) -> torch.Tensor:
        """(N, L) int64 as Transformers takes them: the scored tokens at their own places, -100 elsewhere."""
        return self.input_ids.masked_fill(~self.scored, IGNORED)

    def to(self, device: torch.device | str) -> RecallRows:
        """The same rows on another device."""
        return RecallRows(self.input_ids.to(device), self.scored.to(device))


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """(V',) int64: the vocabulary without special and added tokens.

    Raises
    ------
    ValueError
        When nothing is left.
    """
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    ids = [i for i in range(len(tokenizer)) if i not in special]
    if not ids:
        raise ValueError("the tokenizer has special tokens only: give a vocabulary of ordinary ones")
    return torch.tensor(ids)


def word_tokens(tokenizer: PreTrainedTokenizerBase, count: int = 4096) -> torch.Tensor:
    """(V',) int64: up to `count` tokens that are a space and three or more plain letters, those of lowest id first.

    A vocabulary learned by merging pairs has frequent words first. Small models copy these; over rare tokens, that
    they hardly saw, they stumble with exact attention, too, and a comparison says little. Where the tokenizer has fewer
    than 256 such tokens, all `ordinary_tokens`.
    """
    ordinary = ordinary_tokens(tokenizer)
    texts = tokenizer.convert_ids_to_tokens(ordinary.tolist())
    words = [i for i, text in zip(ordinary.tolist(), texts, strict=True) if _WORD.fullmatch(text)]
    return torch.tensor(words[:count]) if len(words) >= _FEWEST_WORDS else ordinary


def copy_rows(
    count: int,
    vocabulary: torch.Tensor,
    *,
    distance: int,
    string: int = STRING,
    filler: TokenBlocks | None = None,
    seed: int = 0,
) -> RecallRows:
    """A random string, filler, and the same string again: each token returns `distance` positions after itself.

    Parameters
    ----------
    count : int
        Rows `N`, of `64 + distance + string` tokens.
    vocabulary : (V',) int64
        Tokens to draw from; a string holds each at most once, so that there is only one place to copy from.
    distance : int
    string : int
        Tokens of the string; the first three of the second copy are not scored.
    filler : TokenBlocks, optional
        Prose to fill up with; random tokens by default.
    seed : int

    Raises
    ------
    ValueError
        When the string does not fit into the distance or the vocabulary, or there is too little filler.
    """
    if not UNSCORED < string < distance:
        raise ValueError(f"string must be above {UNSCORED} and below distance={distance}, got {string}")
    _check(count, string, vocabulary)
    generator = torch.Generator().manual_seed(seed)
    strings = _distinct(count, string, vocabulary, generator)
    between = _filler(count, distance - string, vocabulary, filler, generator, strings)
    scored = torch.zeros(count, distance + string, dtype=torch.bool)
    scored[:, distance + UNSCORED :] = True
    return _placed(torch.cat([strings, between, strings], 1), scored, vocabulary, filler, generator, strings)


def mqar_rows(
    count: int,
    vocabulary: torch.Tensor,
    *,
    pairs: int,
    gap: int = 0,
    filler: TokenBlocks | None = None,
    seed: int = 0,
) -> RecallRows:
    """Multi-query associative recall (Zoology, 2312.04927): pairs of a key and a value, then every key asked for.

    A row is `[k1 v1 ... kN vN | gap | ki vi ...]`, the second part in random order; its values are scored.

    Parameters
    ----------
    count : int
        Rows, of `64 + 4 pairs + gap` tokens.
    vocabulary : (V',) int64
        Keys come from its first half, values from its second, none twice in a row.
    pairs : int
    gap : int
        Tokens of filler between the pairs and the questions.
    filler, seed
        As in `copy_rows`.

    Raises
    ------
    ValueError
        For no pairs, a negative gap, or a vocabulary of less than two tokens a pair.
    """
    if gap < 0:
        raise ValueError(f"gap must be >= 0, got {gap}")
    half = len(vocabulary) // 2
    _check(count, pairs, vocabulary[:half])
    generator = torch.Generator().manual_seed(seed)
    keys = _distinct(count, pairs, vocabulary[:half], generator)
    told = torch.stack([keys, _distinct(count, pairs, vocabulary[half:], generator)], -1)  # (N, pairs, 2)
    order = torch.rand(count, pairs, generator=generator).argsort(-1)
    asked = told.gather(1, order.unsqueeze(-1).expand(-1, -1, 2))
    between = _filler(count, gap, vocabulary, filler, generator, told.flatten(1))
    core = torch.cat([told.flatten(1), between, asked.flatten(1)], 1)
    scored = torch.zeros(core.shape, dtype=torch.bool)
    scored[:, 2 * pairs + gap + 1 :: 2] = True
    return _placed(core, scored, vocabulary, filler, generator, told.flatten(1))


def passkey_rows(
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    filler: TokenBlocks,
    *,
    context: int,
    depth: float,
    seed: int = 0,
) -> RecallRows:
    """A number told once in prose, and asked for at the end.

    Parameters
    ----------
    count : int
        Rows, of exactly `context` tokens, question and answer included.
    tokenizer : PreTrainedTokenizerBase
    filler : TokenBlocks
        Text to hide the key in, from a random place for every row; at least `context` tokens.
    context : int
    depth : float
        Where the key is told, as a share of the prose: 0 at its beginning, 1 at its end.
    seed : int

    Raises
    ------
    ValueError
        For a depth outside [0, 1], too short a context, or too little filler.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be in [0, 1], got {depth}")
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")

    def ids(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    generator = torch.Generator().manual_seed(seed)
    rows, masks = [], []
    for key_digits in torch.randint(10, (count, _KEY_DIGITS), generator=generator).tolist():
        key = "".join(map(str, key_digits))
        told = ids(f"\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n")
        question, answer = ids("\n\nWhat is the pass key? The pass key is"), ids(f" {key}")
        rest = context - len(told) - len(question) - len(answer)
        if rest < 1:
            raise ValueError(f"context={context} leaves no room for prose: the key and its question take {-rest} more")
        prose = _filler(1, rest, answer, filler, generator)[0]
        place = round(depth * rest)
        rows.append(torch.cat([prose[:place], told, prose[place:], question, answer]))
        # A space before the digits that is a token of its own needs no key to be guessed.
        space = ids(" ").tolist()
        given = len(space) if answer[: len(space)].tolist() == space and len(answer) > len(space) else 0
        masks.append(torch.arange(context) >= context - len(answer) + given)
    return RecallRows(torch.stack(rows), torch.stack(masks))


def recall_rows(
    kind: str,
    *,
    batch_size: int,
    length: int,
    vocabulary: torch.Tensor,
    filler: TokenBlocks | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    start: int = 0,
) -> Iterator[RecallRows]:
    """Batches without end to train on, every row with a difficulty of its own.

    Batch `i` depends on `seed` and `start + i` alone: a run that resumes at step `i` passes `start=i`.

    Parameters
    ----------
    kind : {"copy", "mqar", "passkey"}
        Copies have distances up to what fits, spread evenly in their logarithm, of strings of 8 to 64 tokens; pairs
        number 4 to what fits, up to 64, and the gap takes the rest; pass keys stand at any depth.
    batch_size : int
    length : int
        Tokens per row `L`, at least 192.
    vocabulary, filler
        As in `copy_rows`.
    tokenizer : PreTrainedTokenizerBase, optional
        Needed, with `filler`, by pass keys.
    seed, start : int

    Yields
    ------
    RecallRows of (batch_size, length)

    Raises
    ------
    ValueError
        At the first batch, for another kind, rows that are too short, or what a kind needs and was not given.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if length < 3 * _LEAD or batch_size < 1:
        raise ValueError(f"rows need length >= {3 * _LEAD} and batch_size >= 1, got {length=}, {batch_size=}")
    if kind == "passkey" and (tokenizer is None or filler is None):
        raise ValueError("pass keys need a tokenizer and prose: give tokenizer and filler")
    room = length - _LEAD
    step = start
    while True:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        parts = []
        for _ in range(batch_size):
            draw = float(torch.rand((), generator=generator))
            row_seed = int(torch.randint(2**62, (), generator=generator))
            given: dict[str, Any] = {"filler": filler, "seed": row_seed}
            if kind == "copy":
                string = int(torch.randint(8, 65, (), generator=generator))
                least, most = string + 1, room - string
                distance = min(most, int(least * (most / least) ** draw))
                part = copy_rows(1, vocabulary, distance=distance, string=string, **given)
            elif kind == "mqar":
                pairs = 4 + int(draw * (min(64, room // 4, len(vocabulary) // 2) - 4))
                part = mqar_rows(1, vocabulary, pairs=pairs, gap=room - 4 * pairs, **given)
            else:
                assert tokenizer is not None
                assert filler is not None
                part = passkey_rows(1, tokenizer, filler, context=length, depth=draw, seed=row_seed)
            parts.append(_cut_to(part, length, vocabulary, filler, generator))
        yield RecallRows(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        step += 1


def _check(count: int, drawn: int, vocabulary: torch.Tensor) -> None:
    if count < 1 or drawn < 1:
        raise ValueError(f"at least one row and one token are needed, got {count} rows of {drawn}")
    if len(vocabulary) < drawn:
        raise ValueError(f"{drawn} different tokens are needed, and the vocabulary has {len(vocabulary)}")


def _distinct(count: int, length: int, vocabulary: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(count, length): every row drawn without replacement."""
    picks = [torch.randperm(len(vocabulary), generator=generator)[:length] for _ in range(count)]
    return vocabulary.cpu()[torch.stack(picks)]


def _filler(
    count: int,
    length: int,
    vocabulary: torch.Tensor,
    prose: TokenBlocks | None,
    generator: torch.Generator,
    avoid: torch.Tensor | None = None,
) -> torch.Tensor:
    """(count, length): random tokens, or runs of prose from random places.

    `avoid` (count, A) holds tokens that a row's random filler does without, so that there is one place to find them:
    those drawn are drawn again, as long as a few rounds last.
    """
    if prose is None:
        out = vocabulary.cpu()[torch.randint(len(vocabulary), (count, length), generator=generator)]
        for _ in range(_ROUNDS if avoid is not None else 0):
            assert avoid is not None
            taken = (out.unsqueeze(-1) == avoid.unsqueeze(1)).any(-1)
            again = int(taken.sum())
            if not again:
                break
            out[taken] = vocabulary.cpu()[torch.randint(len(vocabulary), (again,), generator=generator)]
        return out
    stream = prose.blocks.flatten().cpu()
    if len(stream) < length:
        raise ValueError(f"{length} tokens of filler are needed in a row, got {len(stream)}: give more text")
    starts = torch.randint(len(stream) - length + 1, (count, 1), generator=generator)
    return stream[starts + torch.arange(length)]


def _placed(
    core: torch.Tensor,
    scored: torch.Tensor,
    vocabulary: torch.Tensor,
    prose: TokenBlocks | None,
    generator: torch.Generator,
    avoid: torch.Tensor,
) -> RecallRows:
    """(N, C) at a random place in rows of `64 + C` tokens, never at their beginning, where sinks are."""
    count, width = core.shape
    rows = _filler(count, _LEAD + width, vocabulary, prose, generator, avoid)
    places = torch.randint(_LEAD // 8, _LEAD + 1, (count, 1), generator=generator) + torch.arange(width)
    masks = torch.zeros(rows.shape, dtype=torch.bool)
    return RecallRows(rows.scatter(1, places, core), masks.scatter(1, places, scored))


def _cut_to(
    rows: RecallRows, length: int, vocabulary: torch.Tensor, prose: TokenBlocks | None, generator: torch.Generator
) -> RecallRows:
    """Fill rows up with filler that is not scored."""
    missing = length - rows.input_ids.shape[1]
    assert missing >= 0
    more = _filler(len(rows.input_ids), missing, vocabulary, prose, generator)
    nothing = torch.zeros(more.shape, dtype=torch.bool)
    return RecallRows(torch.cat([rows.input_ids, more], 1), torch.cat([rows.scored, nothing], 1))
