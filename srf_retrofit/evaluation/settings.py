"""What an evaluation measures, and on how much: one frozen set of settings for YAML, command line and Python."""

from __future__ import annotations

from dataclasses import dataclass

from .long_text import LENGTHS
from .perplexity import MODES
from .recall import CONTEXTS, DEPTHS, DISTANCES, GAPS, PAIRS
from .recall_data import STRING

PARTS = ("perplexity", "distance", "lengths", "copy", "mqar", "passkey", "heads", "tails", "tasks", "harness")
RECALL = ("copy", "mqar", "passkey")
ANALYSIS = ("heads", "tails")  # of retrofitted layers
_COUNTS = ("length", "tokens", "length_tokens", "trials", "analysis_length", "analysis_blocks", "limit",
           "batch_size", "batch_tokens", "task_batch_tokens")  # fmt: skip


@dataclass(frozen=True)
class EvalSettings:
    """What to measure, and on how much.

    Attributes
    ----------
    model, teacher : str
        For the command line: what to load. The teacher "exact" is the model's own softmax form.
    text, text_field, all_text
        For the command line: the text, and whether all of it is judged on or its held-out part alone.
    device, dtype : str, optional
        For the command line.
    parts : tuple of str
        Of `PARTS`. "distance" is left out without a teacher, "heads" and "tails" without retrofitted layers.
    modes, recall_modes, task_modes : tuple of str
        Modes of `perplexity.ablation` for perplexities, for recall, and for tasks; of these a softmax model has
        "full" alone, and a retrofitted one those that leave out something it has.
    length, tokens : int
        Perplexity and distance: tokens per window, tokens in all.
    lengths : tuple of int
        Perplexity by length and position.
    length_tokens : int, optional
        Tokens at each of these lengths; all of the text by default.
    distances, pairs, gaps, contexts, depths, trials, prose
        Recall, see `recall`. Copies and associations are of frequent words; `prose` fills them up with text, as which
        a pretrained model knows it, rather than with random words.
    analysis_length, analysis_blocks : int
        Windows for the error and the share of the tail of each head.
    tasks : tuple of str
        Files of `choices`.
    harness_tasks : tuple of str; harness_path : str, optional
        Tasks of lm-eval, and a directory of further ones.
    limit : int, optional
        Items of each task.
    batch_size : int, optional
        Perplexity and distance: windows at once, instead of `batch_tokens`.
    batch_tokens, task_batch_tokens : int, optional
        Tokens at once, padding included; by default 32k and 64k on a GPU, 4k on a CPU.
    seed : int

    Raises
    ------
    ValueError
        For unknown parts or modes, or sizes out of range.
    """

    model: str = "smollm2"
    teacher: str | None = None
    text: str | None = None
    text_field: str = "text"
    all_text: bool = False
    device: str | None = None
    dtype: str = "float32"
    output: str | None = None
    overwrite: bool = False
    parts: tuple[str, ...] = ("perplexity", "distance")
    modes: tuple[str, ...] = MODES
    recall_modes: tuple[str, ...] = ("full", "no_tail")
    task_modes: tuple[str, ...] = ("full",)
    length: int = 512
    tokens: int = 8192
    lengths: tuple[int, ...] = LENGTHS
    length_tokens: int | None = None
    distances: tuple[int, ...] = DISTANCES
    pairs: tuple[int, ...] = PAIRS
    gaps: tuple[int, ...] = GAPS
    contexts: tuple[int, ...] = CONTEXTS
    depths: tuple[float, ...] = DEPTHS
    trials: int = 16
    prose: bool = True
    analysis_length: int = 1024
    analysis_blocks: int = 4
    tasks: tuple[str, ...] = ()
    harness_tasks: tuple[str, ...] = ()
    harness_path: str | None = None
    limit: int | None = None
    batch_size: int | None = None
    batch_tokens: int | None = None
    task_batch_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _known("parts", self.parts, PARTS)
        for name in ("modes", "recall_modes", "task_modes"):
            _known(name, getattr(self, name), MODES)
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        for name, least in (("lengths", 2), ("distances", STRING + 1), ("pairs", 1), ("contexts", 2)):
            if any(isinstance(x, bool) or not isinstance(x, int) or x < least for x in getattr(self, name)):
                raise ValueError(f"{name} must be whole numbers >= {least}, got {list(getattr(self, name))}")
        if "tasks" in self.parts and not self.tasks:
            raise ValueError("the part 'tasks' needs files: give tasks")
        if "harness" in self.parts and not self.harness_tasks:
            raise ValueError("the part 'harness' needs names of tasks: give harness_tasks")


def _known(name: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [value for value in values if value not in known]
    if unknown:
        raise ValueError(f"{name} must be among {', '.join(known)}, got {', '.join(map(repr, unknown))}")


def needed_tokens(settings: EvalSettings) -> int:
    """Tokens of text that the parts make use of; less will do, down to the longest single window."""
    wanted = {
        "perplexity": settings.tokens,
        "distance": settings.tokens,
        "lengths": settings.length_tokens or max(settings.tokens, 4 * max(settings.lengths, default=0)),
        "passkey": 4 * max(settings.contexts, default=0),
        "heads": settings.analysis_length * settings.analysis_blocks,
        "tails": settings.analysis_length * settings.analysis_blocks,
    }
    if settings.prose:
        wanted["copy"] = 4 * max(settings.distances, default=0)
        wanted["mqar"] = 4 * (4 * max(settings.pairs, default=0) + max(settings.gaps, default=0))
    return max([wanted.get(part, 0) for part in settings.parts], default=0)
