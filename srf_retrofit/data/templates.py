"""Rows of data sets as text: conversations by a chat template, instructions by a named one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = ("alpaca", "chat")

# The names of speakers in the ShareGPT format, as chat templates know them.
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def render_messages(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation as one text, by the tokenizer's chat template; white space after the last turn is dropped.

    Parameters
    ----------
    messages : sequence of {"role", "content"} or, as ShareGPT has it, {"from", "value"}
    tokenizer : PreTrainedTokenizerBase

    Raises
    ------
    ValueError
        For turns of another form, a tokenizer without a chat template, or a conversation the template refuses.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template to render conversations with: take an instruct model's")
    turns = []
    for message in messages:
        turn = message if isinstance(message, dict) else {}
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"a turn needs texts under 'role' and 'content', got {str(message)[:80]!r}")
        turns.append({"role": _ROLES.get(role, role), "content": content})
    if not turns:
        raise ValueError("a conversation without turns")
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False)).rstrip()
    except Exception as error:  # templates raise errors of their own, and Jinja's
        raise ValueError(f"the chat template refuses a conversation: {error}") from error


def render_instruction(row: dict[str, Any], template: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """An instruction with its answer as one text.

    Parameters
    ----------
    row : dict
        Texts under `instruction` and `output`, and perhaps under `input`: what the instruction is about.
    template : {"alpaca", "chat"}
        The prompt of Stanford Alpaca, which suits models without a chat template; or the instruction, a blank line
        and the input as the user's turn of the tokenizer's own chat template.
    tokenizer : PreTrainedTokenizerBase
        Needed for "chat".

    Raises
    ------
    ValueError
        For another template, a row without these texts, and see `render_messages`.
    """
    _check_template(template, tokenizer)
    given: dict[str, Any] = {name: row.get(name) for name in ("instruction", "input", "output")}
    given["input"] = given["input"] or ""
    wrong = [name for name, value in given.items() if not isinstance(value, str)]
    if wrong:
        raise ValueError(f"no text under {wrong[0]!r} for the template {template!r}; {_fields(row)}")
    instruction, about, output = (given[name].strip() for name in ("instruction", "input", "output"))
    if template == "chat":
        assert tokenizer is not None
        user = {"role": "user", "content": "\n\n".join(filter(None, (instruction, about)))}
        return render_messages([user, {"role": "assistant", "content": output}], tokenizer)
    context = ", paired with an input that provides further context" if about else ""
    parts = [
        f"Below is an instruction that describes a task{context}. Write a response that appropriately completes the "
        "request.",
        f"### Instruction:\n{instruction}",
        *([f"### Input:\n{about}"] if about else []),
        f"### Response:\n{output}",
    ]
    return "\n\n".join(parts)


def _check_template(template: str | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if template is not None and template not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")
    if template == "chat" and tokenizer is None:
        raise ValueError("the template 'chat' is the tokenizer's own: pass the tokenizer")


def _fields(row: dict[str, Any]) -> str:
    return f"the row has {', '.join(map(repr, row)) or 'no fields'}"


def row_reader(field: str, template: str | None, tokenizer: PreTrainedTokenizerBase | None) -> Callable[[Any], str]:
    """A function from a row of a data set to its document.

    Parameters
    ----------
    field : str
        Holds a text, or a conversation for `render_messages`. Not read where there is a template.
    template : {"alpaca", "chat"} or None
        See `render_instruction`.
    tokenizer : PreTrainedTokenizerBase or None

    Raises
    ------
    ValueError
        For an unknown template, here; and from the function, for rows that do not have what they should.
    """
    _check_template(template, tokenizer)

    def read(row: Any) -> str:
        if not isinstance(row, dict):
            raise ValueError(f"no text under {field!r}: the row is a {type(row).__name__}, not a mapping")
        if template is not None:
            return render_instruction(row, template, tokenizer)
        value = row.get(field)
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value and isinstance(value[0], dict):
            if tokenizer is None:
                raise ValueError(f"{field!r} holds conversations: pass the tokenizer, whose chat template renders them")
            return render_messages(value, tokenizer)
        if field in row:
            raise ValueError(f"no text under {field!r} but {type(value).__name__}; name the field to read")
        hint = "; for instructions pass template='alpaca' or 'chat'" if "instruction" in row else ""
        raise ValueError(f"no text under {field!r}; {_fields(row)}: name the field to read{hint}")

    return read
