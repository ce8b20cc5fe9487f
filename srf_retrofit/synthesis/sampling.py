"""A model writes text: freely, as a conversation with itself, or as the continuation of prompts; batch by batch.

A batch is a function of the model, the settings and its number: what is written does not depend on the batches before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..data.templates import render_messages
from ..data.token_blocks import beginning
from ..evaluation.perplexity import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompts = str | Sequence[str | Sequence[dict[str, str]]]

_WORD_MARKS = ("\u2581", "\u0120")  # before a word: SentencePiece's, and that of byte-level vocabularies
_MARK = "USERTURNSTANDSHERE"  # where the user's words stand in a rendered template


@dataclass(frozen=True)
class Sampling:
    """How text is sampled.

    Parameters
    ----------
    length : int
        Tokens of a document at most, prompt included; at least 8.
    batch_size : int
        Documents written at once.
    temperature : float
        `> 0`.
    top_p : float
        Tokens are drawn from the likeliest ones that have this much probability together; in (0, 1]. At 1 small models
        lose the thread.
    greedy_tokens : int
        Of a text written freely: this many tokens after the random first one are the likeliest ones (2305.17888,
        section 2.1, takes three to five), so that the text finds a beginning that makes sense.
    seed : int
    cache : {"dynamic", "static"}
        The key/value cache of `generate`. On a GPU, Transformers compiles the model for a static one, which takes a
        minute or so and pays in long runs; there, prompts of different lengths compile again.

    Raises
    ------
    ValueError
        For values outside these ranges.
    """

    length: int = 512
    batch_size: int = 16
    temperature: float = 1.0
    top_p: float = 0.95
    greedy_tokens: int = 3
    seed: int = 0
    cache: str = "dynamic"

    def __post_init__(self) -> None:
        for name, least in (("length", 8), ("batch_size", 1), ("greedy_tokens", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be > 0, got {self.temperature}: a greedy text is the same every time")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.cache not in ("dynamic", "static"):
            raise ValueError(f"cache must be 'dynamic' or 'static', got {self.cache!r}")


@dataclass(frozen=True)
class Draft:
    """A text as the model wrote it.

    `ids` are the tokens of its own, without prompt and template; `tokens` counts all of `text`. A text is `finished`
    when the model ended it and not the length. `messages` are the turns of a conversation.
    """

    text: str
    ids: list[int]
    tokens: int
    finished: bool
    messages: list[dict[str, str]] | None = field(default=None)


class _GreedyBeginning(LogitsProcessor):
    """Leaves only the likeliest token for the first `count` tokens after a prompt of `width`."""

    def __init__(self, width: int, count: int) -> None:
        self.end = width + count

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if input_ids.shape[1] >= self.end:
            return scores
        likeliest: Any = scores.argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, likeliest, 0.0)  # type: ignore[return-value]


class Writer:
    """Writes batches of drafts.

    Parameters
    ----------
    model : PreTrainedModel
        Softmax or retrofitted.
    tokenizer : PreTrainedTokenizerBase
    prompts : "bos", "chat", or a sequence
        "bos": from the token that stands between documents and one random ordinary token on (LLM-QAT, 2305.17888).
        "chat": the model writes the user's turn behind the chat template's beginning of one, then answers it (Magpie,
        2406.08464). A sequence: texts are continued, lists of messages are answered, round and round.
    sampling : Sampling

    Raises
    ------
    ValueError
        For other or empty prompts, a tokenizer without a chat template where one is needed, prompts that leave no room
        in `length`, or a length beyond the model's positions.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, sampling: Sampling
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and sampling.length > positions:
            raise ValueError(f"length={sampling.length} is beyond the {positions} positions of the model")
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        self.ends = self.special | {*(ends if isinstance(ends, list) else [] if ends is None else [ends])}
        if prompts == "bos":
            self.start, self.first = _start(tokenizer), ordinary_tokens(tokenizer, self.special)
        elif prompts == "chat":
            before, self.after = user_frame(tokenizer)
            self.before = self._encode(before)
            self._check_room(len(self.before), "the chat template's beginning")
        elif isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"prompts must be 'bos', 'chat' or a sequence of texts or conversations, got {prompts!r}")
        else:
            self.frames = [self._frame(prompt) for prompt in prompts]
            for number, (_, ids, _) in enumerate(self.frames):
                self._check_room(len(ids), f"prompt {number}")
        self.prompts = prompts

    def write(self, batch: int) -> list[Draft]:
        """The drafts of one batch, `batch_size` of them or fewer: a conversation without an end of its first turn, or
        without a word in it, is left out."""
        if self.prompts == "bos":
            return self._write_freely(batch)
        if self.prompts == "chat":
            return self._answer(self._ask(batch), batch)
        first = batch * self.sampling.batch_size
        chosen = [self.frames[(first + row) % len(self.frames)] for row in range(self.sampling.batch_size)]
        return self._answer(chosen, batch)

    def _write_freely(self, batch: int) -> list[Draft]:
        generator = torch.Generator().manual_seed(self._seed(batch, "first"))
        chosen = torch.randint(len(self.first), (self.sampling.batch_size,), generator=generator).tolist()
        rows = [[self.start, self.first[i]] for i in chosen]
        drafts = []
        for row, (ids, finished) in zip(rows, self._continue(rows, batch, "text", greedy=True), strict=True):
            own = [row[1], *ids]
            drafts.append(Draft(self._decode(own), own, len(own), finished))
        return drafts

    def _ask(self, batch: int) -> list[tuple[list[dict[str, str]] | None, list[int], str]]:
        """User's turns that the model wrote and ended, as frames for `_answer`."""
        # The turn may take half of the length, so that there is room for an answer.
        most = max(self.sampling.length // 2, len(self.before) + 4)
        rows = [self.before] * self.sampling.batch_size
        frames = []
        for ids, ended in self._continue(rows, batch, "user", most=most):
            words = self._decode(ids)
            if self.after:  # the template ends the turn with ordinary text, as Llama 2's "[/INST]"
                words, mark, _ = words.partition(self.after)
                ended = ended or bool(mark)
            if words.strip() and ended:
                frame = self._frame([{"role": "user", "content": words.strip()}])
                if len(frame[1]) <= self.sampling.length - 4:
                    frames.append(frame)
        return frames

    def _answer(self, frames: list[tuple[list[dict[str, str]] | None, list[int], str]], batch: int) -> list[Draft]:
        if not frames:
            return []
        drafts = []
        written = self._continue([ids for _, ids, _ in frames], batch, "answer")
        for (messages, prompt, text), (ids, finished) in zip(frames, written, strict=True):
            answer = self._decode(ids)
            own, said = ids, None
            if messages is not None:
                said = [*messages, {"role": "assistant", "content": answer.strip()}]
                if self.prompts == "chat":
                    own = [*self._encode(messages[-1]["content"]), *ids]
                # A text that the length cut off must not look as if the model had ended it.
                text = render_messages(said, self.tokenizer) if finished else text + answer
            else:
                text += answer
            drafts.append(Draft(text, own, len(prompt) + len(ids), finished, said))
        return drafts

    def _frame(self, prompt: Any) -> tuple[list[dict[str, str]] | None, list[int], str]:
        """Messages, token ids and text of a prompt."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise ValueError("a prompt is empty")
            ids = list(self.tokenizer(prompt)["input_ids"])
            return None, ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids, prompt
        messages = list(prompt)
        render_messages(messages, self.tokenizer)  # for its checks
        text = str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        return messages, self._encode(text), text

    def _continue(
        self, rows: list[list[int]], batch: int, stage: str, *, most: int | None = None, greedy: bool = False
    ) -> list[tuple[list[int], bool]]:
        """The tokens written behind each row, up to a special one, and whether there was one.

        Row and tokens are at most `most` together, which is the length of a document by default.
        """
        sampling, width = self.sampling, max(map(len, rows))
        most = sampling.length if most is None else most
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        # Left padding: all rows go on at the same place.
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        # Everything that the model's own generation settings might turn on is set.
        config = GenerationConfig(
            max_new_tokens=most - min(map(len, rows)),
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            min_p=0.0,
            typical_p=1.0,
            epsilon_cutoff=0.0,
            eta_cutoff=0.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            num_beams=1,
            eos_token_id=sorted(self.ends),
            pad_token_id=pad,
            use_cache=True,
            cache_implementation="static" if sampling.cache == "static" else None,
        )
        beginning = [_GreedyBeginning(width, sampling.greedy_tokens)] if greedy else []
        generator: Any = self.model
        device = self.model.device
        with evaluating(self.model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed(batch, stage))
            out = generator.generate(
                ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList(beginning)
            )
        written = out[:, width:].tolist()
        return [self._cut(ids[: most - len(row)]) for row, ids in zip(rows, written, strict=True)]

    def _cut(self, ids: list[int]) -> tuple[list[int], bool]:
        end = next((i for i, token in enumerate(ids) if token in self.ends), None)
        return (ids, False) if end is None else (ids[:end], True)

    def _seed(self, batch: int, stage: str) -> int:
        digest = hashlib.sha256(f"{self.sampling.seed} {batch} {stage}".encode()).digest()
        return int.from_bytes(digest[:7], "big")

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: Iterable[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _check_room(self, tokens: int, what: str) -> None:
        if tokens > self.sampling.length - 4:
            raise ValueError(f"{what} has {tokens} tokens, which leaves no room in length={self.sampling.length}")


def _start(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before a document: the tokenizer's own, or the one that ended the document before."""
    begin = beginning(tokenizer)
    if begin is not None:
        return begin
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token: set one, texts begin behind it")
    return int(tokenizer.eos_token_id)


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase, special: Iterable[int] = ()) -> list[int]:
    """Token ids that a text can begin with: those that begin a word, where the tokenizer marks them, and a letter.

    Raises
    ------
    ValueError
        When there are none.
    """
    ids = sorted(set(tokenizer.get_vocab().values()) - set(special))
    words = tokenizer.batch_decode([[i] for i in ids])
    found = [i for i, word in zip(ids, words, strict=True) if word.strip()[:1].isalpha()]
    pieces = tokenizer.convert_ids_to_tokens(found)
    found = [i for i, piece in zip(found, pieces, strict=True) if piece.startswith(_WORD_MARKS)] or found
    if not found:
        raise ValueError("the tokenizer has no token that begins with a letter: give prompts")
    return found


def user_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What a chat template puts before the first user's words; and the ordinary text, if any, right after them.

    Raises
    ------
    ValueError
        When there is no chat template, or it does not show the user's words once.
    """
    rendered = render_messages([{"role": "user", "content": _MARK}], tokenizer)
    before, mark, after = rendered.partition(_MARK)
    if not mark or _MARK in after:
        raise ValueError("the chat template does not show the user's words once: give prompts")
    ids = list(tokenizer(after, add_special_tokens=False)["input_ids"])
    ordinary = tokenizer.decode(ids[:1], skip_special_tokens=True) if ids else ""
    return before, after.strip() if ordinary else ""
