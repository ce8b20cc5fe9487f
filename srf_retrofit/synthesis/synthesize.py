"""Text that a teacher writes itself: what it knows, without the data it was trained on.

Batches come from `sampling.Writer`, pass the filters of `text_filters`, and are kept until there are tokens enough.
With an output file, every batch is saved as it is done, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
import transformers
from tqdm.auto import tqdm

from ..data.token_blocks import check_tokenizer
from ..files import write_json
from .sampling import Draft, Prompts, Sampling, Writer
from .text_filters import SeenTexts, repeated_share

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz")
# Batches in a row of which nothing was kept, after which the settings and not chance are to blame.
_FRUITLESS = 20


@dataclass(frozen=True)
class Filters:
    """What is kept of what was written.

    Parameters
    ----------
    min_tokens : int
        Texts with fewer tokens of their own are dropped.
    max_repeated : float
        As are texts with a larger share of repeated 4-grams, see `repeated_share`; 1 keeps all.
    similarity : float
        And those this similar to an earlier one, see `SeenTexts`.

    Raises
    ------
    ValueError
        For values out of range.
    """

    min_tokens: int = 16
    max_repeated: float = 0.3
    similarity: float = 0.7

    def __post_init__(self) -> None:
        if self.min_tokens < 1:
            raise ValueError(f"min_tokens must be at least 1, got {self.min_tokens}")
        if not 0 <= self.max_repeated <= 1:
            raise ValueError(f"max_repeated must be in [0, 1], got {self.max_repeated}")
        if not 0 < self.similarity <= 1:
            raise ValueError(f"similarity must be in (0, 1], got {self.similarity}")


@dataclass(frozen=True)
class Synthesis:
    """What was written and kept.

    `rows` have `text`, `tokens` (of the text, as it was written), `finished`, `seed`, `batch` (its number), and of
    conversations `messages`. `counts` says how many texts were `written`, `kept`, and dropped: `unanswered` (no user's
    turn to answer), `short`, `repetitive`, `duplicate`, `near_duplicate`; `surplus` were good and beyond the budget.
    """

    rows: list[dict[str, Any]]
    counts: dict[str, int]

    @property
    def documents(self) -> list[str]:
        """The texts."""
        return [row["text"] for row in self.rows]

    @property
    def tokens(self) -> int:
        """Tokens of all rows together."""
        return sum(row["tokens"] for row in self.rows)


def synthesize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    prompts: Prompts = "bos",
    sampling: Sampling | None = None,
    filters: Filters | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Synthesis:
    """Let a model write text until there are `tokens` tokens of it that are worth keeping.

    The same on one machine for the same model and settings, interrupted or not; the batch size is one of them.

    Parameters
    ----------
    model : PreTrainedModel
        The teacher, in its dtype and on its device.
    tokenizer : PreTrainedTokenizerBase
    tokens : int
        Writing ends with the first text that reaches this.
    prompts : "bos", "chat" or a sequence
        See `Writer`.
    sampling : Sampling, optional
    filters : Filters, optional
    output : path, optional
        A `.jsonl` file to write, also `.gz` or `.xz`, one row a line; `OUTPUT.json` beside it has settings and counts.
        Until it is complete, finished batches lie in `OUTPUT.partial/`, and a call with the same settings (`tokens`
        may change) goes on from them.
    overwrite : bool
        Replace an output that is there.
    progress : bool
        Show a bar on standard error.
    **settings
        Fields of `Sampling` and `Filters`, instead of these.

    Raises
    ------
    ValueError
        For settings out of range, a tokenizer that does not fit the model, an output that may not be replaced, or
        batches of an earlier run with other settings.
    RuntimeError
        When nothing is kept of 20 batches in a row.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    sampling, filters = _resolved(sampling, filters, settings)
    check_tokenizer(tokenizer, model)
    writer = Writer(model, tokenizer, prompts, sampling)
    described = _description(model, tokenizer, prompts, sampling, filters)
    store = None if output is None else _Store(Path(output), described, overwrite=overwrite)
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter(dict.fromkeys(("written", "kept", *_DROPPED, "surplus"), 0))
    seen = SeenTexts(filters.similarity)
    total, batch, fruitless = 0, 0, 0
    with tqdm(total=tokens, unit="token", desc="synthesize", disable=not progress) as bar:
        while total < tokens:
            drafts = None if store is None else store.read(batch)
            if drafts is None:
                drafts = writer.write(batch)
                if store is not None:
                    store.write(batch, drafts)
            counts["written"] += sampling.batch_size
            counts["unanswered"] += sampling.batch_size - len(drafts)
            kept = 0
            for draft in drafts:
                reason = _reason_to_drop(draft, filters, seen)
                kept += reason is None
                if reason is None and total >= tokens:
                    reason = "surplus"
                counts[reason or "kept"] += 1
                if reason is None:
                    rows.append(_row(draft, sampling.seed, batch))
                    total += draft.tokens
                    bar.update(draft.tokens)
            fruitless = 0 if kept else fruitless + 1
            if fruitless == _FRUITLESS:
                dropped = ", ".join(f"{name} {counts[name]}" for name in _DROPPED if counts[name])
                raise RuntimeError(
                    f"nothing was kept of the last {_FRUITLESS} batches ({len(rows)} texts before; dropped: "
                    f"{dropped}): change the prompts, the temperature, or the filters"
                )
            batch += 1
    result = Synthesis(rows, dict(counts))
    if store is not None:
        store.finish(result)
    return result


_DROPPED = ("unanswered", "short", "repetitive", "duplicate", "near_duplicate")


def _reason_to_drop(draft: Draft, filters: Filters, seen: SeenTexts) -> str | None:
    if len(draft.ids) < filters.min_tokens:
        return "short"
    if repeated_share(draft.ids) > filters.max_repeated:
        return "repetitive"
    return seen.add(draft.text, draft.ids)


def _row(draft: Draft, seed: int, batch: int) -> dict[str, Any]:
    row = {"text": draft.text, "tokens": draft.tokens, "finished": draft.finished, "seed": seed, "batch": batch}
    return row if draft.messages is None else {**row, "messages": draft.messages}


def _resolved(sampling: Sampling | None, filters: Filters | None, settings: dict[str, Any]) -> tuple[Sampling, Filters]:
    values = {**asdict(sampling or Sampling()), **asdict(filters or Filters())}
    unknown = sorted(set(settings) - set(values))
    if unknown:
        raise TypeError(f"unknown setting(s) {', '.join(unknown)}; known: {', '.join(values)}")
    values.update(settings)
    names = Sampling.__dataclass_fields__
    return (
        Sampling(**{name: value for name, value in values.items() if name in names}),
        Filters(**{name: value for name, value in values.items() if name not in names}),
    )


def _description(model, tokenizer, prompts: Prompts, sampling: Sampling, filters: Filters) -> dict[str, Any]:
    """Everything that the rows depend on, as JSON."""
    given = prompts if isinstance(prompts, str) else [p if isinstance(p, str) else list(p) for p in prompts]
    digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
    return {
        "model": model.config._name_or_path or type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "tokenizer": tokenizer.name_or_path or type(tokenizer).__name__,
        "vocabulary": len(tokenizer),
        "prompts": given if isinstance(given, str) else {"number": len(given), "sha256": digest},
        "sampling": asdict(sampling),
        "filters": asdict(filters),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def check_output(path: str | Path, *, overwrite: bool = False) -> None:
    """Refuse an output file before any work is done for it.

    Raises
    ------
    ValueError
        For another suffix than `.jsonl`, `.jsonl.gz` or `.jsonl.xz`, or a file that is there and may not be replaced.
    """
    path = Path(path)
    if not path.name.endswith(_SUFFIXES):
        raise ValueError(f"output {path.name}: expected a name that ends in {', '.join(_SUFFIXES)}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise ValueError(f"output {path} is there: choose another, or overwrite it (--overwrite)")


class _Store:
    """The output file, and the batches on the way to it."""

    def __init__(self, path: Path, described: dict[str, Any], *, overwrite: bool) -> None:
        self.path = path.absolute()
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.described = described
        check_output(path, overwrite=overwrite)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        settings = self.partial / "settings.json"
        if settings.is_file():
            earlier = json.loads(settings.read_text(encoding="utf-8"))
            other = sorted(name for name in {*earlier, *described} if earlier.get(name) != described.get(name))
            if other:
                raise ValueError(
                    f"{self.partial} holds batches of an interrupted run with another {', '.join(other)} "
                    f"({'; '.join(str(earlier.get(name)) for name in other)}): run with its settings, or remove it"
                )
        else:
            self.partial.mkdir(exist_ok=True)
            write_json(settings, described)

    def read(self, batch: int) -> list[Draft] | None:
        """The drafts of a batch that is done."""
        file = self._file(batch)
        if not file.is_file():
            return None
        return [Draft(**draft) for draft in json.loads(file.read_text(encoding="utf-8"))]

    def write(self, batch: int, drafts: list[Draft]) -> None:
        write_json(self._file(batch), [asdict(draft) for draft in drafts])

    def finish(self, result: Synthesis) -> None:
        """Write the file and its settings, and take the batches away."""
        facts = {"rows": len(result.rows), "tokens": result.tokens, "counts": result.counts, **self.described}
        with _atomic_lines(self.path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
        write_json(self.path.with_name(f"{self.path.name}.json"), facts)
        shutil.rmtree(self.partial)

    def _file(self, batch: int) -> Path:
        return self.partial / f"{batch:06d}.json"


@contextmanager
def _atomic_lines(path: Path) -> Iterator[TextIO]:
    """A text file to write, compressed as its suffix says, that takes its place when the block ends well.

    The same lines make the same bytes: the time of writing is not part of them.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with scratch.open("wb") as raw:
            packed: Any = raw
            if path.suffix == ".gz":
                packed = gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0)
            elif path.suffix == ".xz":
                packed = lzma.LZMAFile(raw, "wb")  # noqa: SIM115
            # Closing the text closes what compresses it.
            with io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as file:
                yield file
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
