"""A tokenizer of bytes with a model of its size, and one of letters with a chat template: text without a download."""

from __future__ import annotations

from builders import build_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = "the quick brown fox jumps over a lazy dog and then café walks home under every star in sight "


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and `</s>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"</s>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="</s>")


def byte_llama(seed: int = 0) -> PreTrainedModel:
    """A random softmax model for the tokens of `byte_tokenizer`."""
    return build_llama(seed, vocab_size=257, num_hidden_layers=2, bos_token_id=0, eos_token_id=0)


def letters(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per letter, and one per special word."""
    special = ["<pad>", "<user>", "<assistant>", "<end>"]
    words = {word: i for i, word in enumerate([*special, "?", "\n", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    out = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="?",
        eos_token="<end>",
        pad_token="<pad>",
        extra_special_tokens=special[1:3],
    )
    out.chat_template = template
    return out
