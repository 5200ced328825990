"""Conversations: messages become a prompt, by the tokenizer's own chat template."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from meg_kernels.checks import shown
from meg_kernels.pretrained import tokenized
from meg_kernels.texts import as_texts, is_ordered, is_unicode

Message = dict[str, str]
Prompt = str | Sequence[Message]
"""A query, a text with a query in it, or a conversation."""
Prompts = Iterable[Prompt] | Sequence[Message]
"""Several prompts, or one conversation."""

ROLES = ("system", "user", "assistant")


class ChatPrompt(str):
    """A prompt that a chat template made: the special tokens that it begins with stand in it."""

    __slots__ = ()


class OpenPrompt(str):
    """A prompt whose answer may have several lines: no line break ends it."""

    __slots__ = ()


def opened(prompt: str, answer: str) -> str:
    """The prompt, as one of which this is an answer; a conversation's may always have lines."""
    is_open = "\n" in answer.strip() and not isinstance(prompt, ChatPrompt)
    return OpenPrompt(prompt) if is_open else prompt


@dataclass(frozen=True)
class ChatFormat:
    """How a chat template writes what the model says.

    Args:
        lead: what stands between the prompt and the model's first word.
        end: the token that ends what the model says.
    """

    lead: str
    end: int


def has_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def as_messages(name: str, messages: Any) -> list[Message]:
    """A conversation as a list of messages, whose last one is the user's.

    Only role and content of a message are kept.

    Raises:
        TypeError: it is no list of dicts with role and content, both texts.
        ValueError: there are no messages, a role is unknown, or the last one is not the user's.
    """
    if isinstance(messages, str | dict) or not isinstance(messages, Sequence):
        raise TypeError(
            f"{name} is {shown(messages)}; it must be a list of messages, such as "
            "[{'role': 'user', 'content': 'Who wrote Emma?'}]"
        )
    found = []
    for place, message in enumerate(messages):
        keys = message.keys() if isinstance(message, dict) else ()
        if not {"role", "content"} <= {*keys} or not isinstance(message["content"], str):
            raise TypeError(
                f"{name}[{place}] is {shown(message)}; it must be a dict with role and content, "
                "both texts"
            )
        if message["role"] not in ROLES:
            raise ValueError(
                f"{name}[{place}] has role {shown(message['role'])}; it must be one of "
                f"{', '.join(map(repr, ROLES))}"
            )
        if not is_unicode(message["content"]):
            raise ValueError(
                f"{name}[{place}] is {shown(message['content'])}; it must be text without halves "
                "of surrogate pairs, which no tokenizer takes"
            )
        found.append({"role": message["role"], "content": message["content"]})
    if not found or found[-1]["role"] != "user" or not found[-1]["content"].strip():
        raise ValueError(f"{name} must end with what the user says")
    return found


def as_prompts(name: str, prompts: Prompts) -> list[Prompt]:
    """Texts and conversations as a list; one conversation alone makes a list of one.

    Raises:
        TypeError: one of them is neither a text nor a list of messages.
        ValueError: a conversation does not end with what the user says, or has an unknown role.
    """
    if isinstance(prompts, Sequence) and prompts and isinstance(prompts[0], dict):
        return [as_messages(name, prompts)]
    if isinstance(prompts, str) or not is_ordered(prompts):
        return [*as_texts(name, prompts)]  # type: ignore[arg-type]  # which says what is wrong
    given = [*prompts]
    if not any(isinstance(prompt, list | tuple) for prompt in given):
        return [*as_texts(name, given)]
    return [
        as_messages(f"{name}[{place}]", prompt)
        if isinstance(prompt, list | tuple)
        else as_texts(name, [prompt])[0]
        for place, prompt in enumerate(given)
    ]


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> ChatPrompt:
    """The prompt after which the model says what follows the messages.

    A system's message goes to the front of the user's first one where the template knows no
    system. Models that may think before they speak are asked not to.

    Raises:
        ValueError: the tokenizer has no chat template, or its template refuses these messages.
    """
    if not has_chat(tokenizer):
        raise ValueError(
            "the tokenizer has no chat template, and without one there are no conversations; take "
            "a model that was tuned for chat, or set tokenizer.chat_template"
        )
    try:
        text = _rendered(tokenizer, messages, add_generation_prompt=True)
    except ValueError:
        if [message["role"] for message in messages[:2]] != ["system", "user"]:
            raise
        system, first, *others = messages
        whole = f"{system['content']}\n\n{first['content']}"
        joined = [{"role": "user", "content": whole}, *others]
        text = _rendered(tokenizer, joined, add_generation_prompt=True)
    return ChatPrompt(text)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                [*messages], tokenize=False, enable_thinking=False, **options
            )
        )
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"the model's chat template refuses these messages: {error}") from error


def chat_format(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """How the tokenizer's chat template writes what the model says.

    Raises:
        ValueError: it has none, or its template does not write down what a model says.
    """
    return _chat_format(tokenizer, str(getattr(tokenizer, "chat_template", None)))


@functools.lru_cache(maxsize=8)
def _chat_format(tokenizer: PreTrainedTokenizerBase, template: str) -> ChatFormat:
    """`chat_format` of a tokenizer for as long as it has this template."""
    asked, said = {"role": "user", "content": "A?"}, "Beebeebee"
    prompt = chat_prompt(tokenizer, [asked])
    whole = _rendered(tokenizer, [asked, {"role": "assistant", "content": said}])
    before, _, behind = whole.partition(said)
    lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
    tokens = tokenized(tokenizer, behind, add_special_tokens=False).input_ids
    end = next((token for token in tokens if token in special), tokenizer.eos_token_id)
    return ChatFormat(lead, end)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt; one of a conversation has its special tokens already."""
    special = not isinstance(prompt, ChatPrompt)
    return list(tokenized(tokenizer, prompt, add_special_tokens=special).input_ids)
