"""Text to calibrate, train and judge on: where it comes from, how it is kept apart, how it becomes token blocks."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A text file without document boundaries is cut at blank lines into sections of about this many characters.
SECTION_CHARACTERS = 4000
HUB_LIMIT = 2000  # documents taken from a hub data set unless told otherwise


@dataclass(frozen=True)
class TextParts:
    """Documents for three purposes; no document is in two of them."""

    calibration: list[str]
    training: list[str]
    held_out: list[str]


class TokenBlocks(torch.utils.data.Dataset):
    """Packed token blocks of one length, ready for `Trainer`, `calibrate` and `evaluation`.

    Items are `{"input_ids": (L,), "labels": (L,)}` int64; the labels are the inputs, as causal models expect.

    Parameters
    ----------
    blocks : (N, L) int64
    """

    def __init__(self, blocks: torch.Tensor) -> None:
        if blocks.ndim != 2 or not blocks.numel():
            raise ValueError(f"blocks must be a non-empty (N, L) tensor of token ids, got shape {tuple(blocks.shape)}")
        self.blocks = blocks.to(torch.int64)

    def __len__(self) -> int:
        return self.blocks.shape[0]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}

    @property
    def num_tokens(self) -> int:
        return self.blocks.numel()

    def first(self, count: int) -> TokenBlocks:
        """The first `count` blocks, or all of them where there are fewer."""
        return TokenBlocks(self.blocks[:count])

    def batches(self, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Batches `{"input_ids": (B, L)}` in order; the last one may be smaller."""
        for rows in self.blocks.split(batch_size):
            yield {"input_ids": rows}


def language_reference() -> list[str]:
    """The Python language reference that every Python carries, about half a megabyte of English prose and code.

    Its topics repeat one another: a chapter and its sections are both listed. Each paragraph is kept once, in the
    longest topic that has it, so that documents share no text and can be dealt out to training and to judging.
    The wording differs a little between Python versions, and with it every figure measured on it.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for _, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        kept = []
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                kept.append(paragraph.rstrip())
        if kept:
            documents.append("\n\n".join(kept).strip("\n"))
    return documents


def _open_text(path: Path):
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _sections(text: str) -> Iterator[str]:
    section: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        section.append(paragraph)
        size += len(paragraph)
        if size >= SECTION_CHARACTERS:
            yield "\n\n".join(section)
            section, size = [], 0
    if section:
        yield "\n\n".join(section)


def read_documents(path: str | Path, *, field: str = "text") -> list[str]:
    """Documents of a UTF-8 file: `.txt` cut into sections at blank lines, `.jsonl` one a line; `.gz` and `.xz` too.

    Raises
    ------
    ValueError
        For a missing file, another suffix, bytes that are not UTF-8, or a line without a string under `field`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such text file: {path}")
    kind = next((s for s in reversed(path.suffixes) if s not in (".gz", ".xz")), "")
    if kind not in (".txt", ".md", ".jsonl"):
        raise ValueError(
            f"{path.name}: expected .txt, .md or .jsonl (also with .gz or .xz), got {kind or 'no suffix'!r}"
        )
    try:
        with _open_text(path) as file:
            if kind != ".jsonl":
                return [section for section in _sections(file.read()) if section.strip()]
            documents = []
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path.name}, line {number}: not JSON ({error.msg})") from error
                if not isinstance(row, dict) or not isinstance(row.get(field), str):
                    raise ValueError(f"{path.name}, line {number}: no text under {field!r}; name the field to read")
                documents.append(row[field])
            return documents
    except (UnicodeDecodeError, gzip.BadGzipFile, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path.name} cannot be read as UTF-8 text: {error}") from error


def hub_documents(name: str, *, split: str = "train", field: str = "text", limit: int = HUB_LIMIT) -> list[str]:
    """The first `limit` documents of a data set on the Hugging Face hub, streamed; `name` may be `owner/name:config`.

    Raises
    ------
    ValueError
        When the data set cannot be loaded or has no such text field.
    """
    from datasets import load_dataset

    name, _, configuration = name.partition(":")
    try:
        rows: Iterable[Any] = load_dataset(name, configuration or None, split=split, streaming=True)
        documents = [row[field] for row in islice(rows, limit)]
    except KeyError as error:
        raise ValueError(f"data set {name!r} has no field {field!r}") from error
    except Exception as error:  # the libraries below raise a dozen types; the reason is passed on
        raise ValueError(f"{name!r} is neither a text file nor a hub data set that can be loaded: {error}") from error
    return documents


def load_documents(source: str | Path | None = None, *, field: str = "text") -> list[str]:
    """Documents of `source`: None for the language reference, a text file, or the name of a hub data set.

    Raises
    ------
    ValueError
        When there is no such source, or no text in it.
    """
    if source is None:
        documents = language_reference()
    elif Path(source).exists() or Path(source).suffix in (".txt", ".md", ".jsonl", ".gz", ".xz"):
        documents = read_documents(source, field=field)
    else:
        documents = hub_documents(str(source), field=field)
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise ValueError(f"there is no text in {source}")
    return documents


def split_documents(documents: Sequence[str], *, held_out: float = 0.2, calibration: float = 0.1) -> TextParts:
    """Deal documents out to calibration, training and judging, deterministically and with no text in two parts.

    Documents are ordered by a hash of their text, so that neighbours do not stay together and the order of the source
    does not matter; then filled into the held-out part, the calibration part and training by their share of characters.

    Parameters
    ----------
    documents : sequence of str
        Exact duplicates count once. At least three different ones.
    held_out, calibration : float
        Shares of the characters, in (0, 1); training gets the rest.

    Raises
    ------
    ValueError
        For fewer than three documents, or shares that leave no training text.
    """
    if not (held_out > 0 and calibration > 0 and held_out + calibration < 1):
        raise ValueError(f"shares must be positive and leave some training text, got {held_out=}, {calibration=}")
    ordered = sorted(set(documents), key=lambda text: hashlib.sha256(text.encode(errors="surrogatepass")).digest())
    if len(ordered) < 3:
        raise ValueError(
            "three different documents are needed, one each for calibration, training and judging; "
            f"got {len(ordered)}: give more text, or text with blank lines between paragraphs"
        )
    total = sum(map(len, ordered))
    parts: list[list[str]] = [[], [], []]
    filled = 0
    for position, text in enumerate(ordered):
        reached = filled / total
        part = 0 if reached < held_out else 1 if reached < held_out + calibration else 2
        # One long document must not leave a later part empty: that part then takes over early.
        left = len(ordered) - position
        part = max(part, 3 - left)
        if part == 2 and not parts[1]:
            part = 1
        parts[part].append(text)
        filled += len(text)
    return TextParts(calibration=parts[1], training=parts[2], held_out=parts[0])


def pack(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, *, limit: int | None = None
) -> TokenBlocks:
    """Tokenise documents, join them with the end-of-text token and cut the stream into blocks of `length` tokens.

    Tokens after the last full block are dropped. Attention inside a block crosses the joints, for teacher and student
    alike.

    Parameters
    ----------
    documents : iterable of str
    tokenizer : PreTrainedTokenizerBase
        Needs an `eos_token_id`.
    length : int
        Tokens per block, at least 2.
    limit : int, optional
        At most this many blocks.

    Raises
    ------
    ValueError
        When the text does not fill one block, or the tokenizer has no end-of-text token.
    """
    if length < 2:
        raise ValueError(f"blocks need at least 2 tokens to predict anything, got length={length}")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token: set one, documents are joined with it")
    stream: list[int] = []
    for text in documents:
        if limit is not None and len(stream) >= limit * length:
            break
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        stream.append(tokenizer.eos_token_id)
    count = len(stream) // length
    if limit is not None:
        count = min(count, limit)
    if count < 1:
        raise ValueError(f"{len(stream)} tokens do not fill one block of {length}: give more text or a smaller length")
    return TokenBlocks(torch.tensor(stream[: count * length]).view(count, length))
