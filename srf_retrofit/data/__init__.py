"""Text to calibrate, train and judge on, in one place: `corpus`, `templates`, `token_blocks` and `mixture`."""

from __future__ import annotations

from .corpus import (
    HUB_LIMIT,
    SECTION_CHARACTERS,
    TextParts,
    hub_documents,
    iterate_documents,
    language_reference,
    load_documents,
    read_documents,
    split_documents,
)
from .mixture import Mixture
from .templates import TEMPLATES, render_instruction, render_messages
from .token_blocks import BOUNDARIES, DocumentBlocks, TokenBlocks, check_tokenizer, pack, tokenise

__all__ = [
    "BOUNDARIES",
    "HUB_LIMIT",
    "SECTION_CHARACTERS",
    "TEMPLATES",
    "DocumentBlocks",
    "Mixture",
    "TextParts",
    "TokenBlocks",
    "check_tokenizer",
    "hub_documents",
    "iterate_documents",
    "language_reference",
    "load_documents",
    "pack",
    "read_documents",
    "render_instruction",
    "render_messages",
    "split_documents",
    "tokenise",
]
