"""Where text comes from: files, directories, hub data sets, conversations and instructions, as plain documents."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .templates import row_reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A text file without document boundaries is cut at blank lines into sections of about this many characters.
SECTION_CHARACTERS = 4000
HUB_LIMIT = 2000  # documents taken from a hub data set unless told otherwise

_CHUNK_CHARACTERS = 1 << 20  # of a text file, in memory at once
_KINDS = (".txt", ".md", ".jsonl")
_PACKINGS = (".gz", ".xz")


@dataclass(frozen=True)
class TextParts:
    """Documents for three purposes; no document is in two of them."""

    calibration: list[str]
    training: list[str]
    held_out: list[str]


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


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _kind(path: Path) -> str:
    """The suffix that says what is in a file, without that of its compression."""
    return next((s for s in reversed(path.suffixes) if s not in _PACKINGS), "")


def _paragraphs(file: TextIO) -> Iterator[str]:
    """`file.read().split("\\n\\n")`, a chunk of the file at a time."""
    rest = ""
    while chunk := file.read(_CHUNK_CHARACTERS):
        *paragraphs, rest = (rest + chunk).split("\n\n")
        yield from paragraphs
    yield rest


def _sections(file: TextIO) -> Iterator[str]:
    section: list[str] = []
    size = 0
    for paragraph in _paragraphs(file):
        section.append(paragraph)
        size += len(paragraph)
        if size >= SECTION_CHARACTERS:
            yield "\n\n".join(section)
            section, size = [], 0
    if section:
        yield "\n\n".join(section)


def _lines(file: TextIO, name: str, read: Callable[[Any], str]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield read(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: not JSON ({error.msg})") from error
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from error


def _file_documents(path: Path, read: Callable[[Any], str]) -> Iterator[str]:
    if not path.is_file():
        raise ValueError(f"no such text file: {path}")
    kind = _kind(path)
    if kind not in _KINDS:
        raise ValueError(
            f"{path.name}: expected .txt, .md or .jsonl (also with .gz or .xz), got {kind or 'no suffix'!r}"
        )
    try:
        with _open_text(path) as file:
            if kind == ".jsonl":
                yield from _lines(file, path.name, read)
            else:
                yield from (section for section in _sections(file) if section.strip())
    except (UnicodeDecodeError, gzip.BadGzipFile, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path.name} cannot be read as UTF-8 text: {error}") from error


def read_documents(
    path: str | Path,
    *,
    field: str = "text",
    template: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[str]:
    """Documents of a UTF-8 file: `.txt` and `.md` cut into sections at blank lines, `.jsonl` one a line; `.gz`, `.xz`.

    Parameters and errors are those of `iterate_documents`.
    """
    return list(_file_documents(Path(path), row_reader(field, template, tokenizer)))


def _hub_documents(name: str, split: str, limit: int | None, read: Callable[[Any], str]) -> Iterator[str]:
    from datasets import load_dataset

    name, _, configuration = name.partition(":")

    def failed(error: Exception) -> ValueError:
        return ValueError(f"{name!r} is neither a text file nor a hub data set that can be loaded: {error}")

    try:
        rows = iter(load_dataset(name, configuration or None, split=split, streaming=True))
    except Exception as error:  # the libraries below raise a dozen types; the reason is passed on
        raise failed(error) from error
    for number in range(HUB_LIMIT if limit is None else limit):
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise failed(error) from error
        try:
            text = read(row)
        except ValueError as error:
            raise ValueError(f"data set {name!r}, row {number}: {error}") from error
        yield text


def hub_documents(
    name: str,
    *,
    split: str = "train",
    field: str = "text",
    limit: int = HUB_LIMIT,
    template: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[str]:
    """The first `limit` documents of a data set on the Hugging Face hub, streamed; `name` may be `owner/name:config`.

    Parameters and errors are those of `iterate_documents`.
    """
    return list(_hub_documents(name, split, limit, row_reader(field, template, tokenizer)))


def iterate_documents(
    source: str | Path | Sequence[str | Path] | None = None,
    *,
    field: str = "text",
    split: str = "train",
    limit: int | None = None,
    template: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[str]:
    """Documents of a source one after the other, none of them kept; empty ones are left out.

    Parameters
    ----------
    source : path or name, or several of them
        None for the language reference; a UTF-8 file, `.txt` or `.md` cut into sections at blank lines, `.jsonl` one
        document a line, compressed with `.gz` or `.xz` or not; a directory of such files, read in the order of their
        names; the name of a data set on the hub, `owner/name` or `owner/name:config`, streamed.
    field : str
        Of a `.jsonl` row or a hub data set. It may also hold a conversation (`messages`), which the tokenizer's chat
        template renders.
    split : str
        Of a hub data set.
    limit : int, optional
        At most this many documents; by default all of a file, and `HUB_LIMIT` of a hub data set.
    template : {"alpaca", "chat"}, optional
        Reads rows with `instruction`, `input` and `output` instead of `field`, see `render_instruction`.
    tokenizer : PreTrainedTokenizerBase, optional
        For its chat template.

    Raises
    ------
    ValueError
        For a missing file or data set, another suffix, bytes that are not UTF-8, a row without such a field; the
        message names the file and the line. Raised when the document is reached.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 document, got {limit}")
    read = row_reader(field, template, tokenizer)
    sources = [source] if source is None or isinstance(source, str | Path) else list(source)
    return islice((text for one in sources for text in _documents(one, split, limit, read) if text.strip()), limit)


def _documents(source: str | Path | None, split: str, limit: int | None, read: Callable[[Any], str]) -> Iterable[str]:
    if source is None:
        return language_reference()
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) in _KINDS)
        if not files:
            raise ValueError(f"{path} holds no .txt, .md or .jsonl file (also with .gz or .xz)")
        return (text for file in files for text in _file_documents(file, read))
    if path.exists() or path.suffix in (*_KINDS, *_PACKINGS):
        return _file_documents(path, read)
    return _hub_documents(str(source), split, limit, read)


def load_documents(
    source: str | Path | Sequence[str | Path] | None = None,
    *,
    field: str = "text",
    split: str = "train",
    limit: int | None = None,
    template: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[str]:
    """`iterate_documents` as a list, whose text is in memory once.

    Raises
    ------
    ValueError
        When there is no text in the source, and see `iterate_documents`.
    """
    documents = list(
        iterate_documents(source, field=field, split=split, limit=limit, template=template, tokenizer=tokenizer)
    )
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
