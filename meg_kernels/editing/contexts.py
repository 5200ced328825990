"""Where a query stands when a model reads it: in the template, as it is, or in a conversation.

A neuron that was fitted in one template alone answers hardly anywhere else. `FITTED` are the
contexts that neurons are fitted in by default, `TEMPLATE` those for who never asks otherwise than
in the template; `MEASURED` are others, in which edits are evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from meg_kernels.checks import TEXT, Check, check_fields, instance_of, one_of
from meg_kernels.conversation import Message
from meg_kernels.texts import is_question

Form = Literal["template", "raw", "chat"]


def _wrapper(value: Any) -> str:
    if not isinstance(value, str) or value.count("{}") != 1:
        raise TypeError
    return value


def _exchanges(value: Any) -> tuple[tuple[str, str], ...]:
    if any(isinstance(exchange, str) for exchange in value):
        raise TypeError
    found = tuple(tuple(exchange) for exchange in value)
    if not all(len(two) == 2 and all(isinstance(t, str) for t in two) for two in found):
        raise TypeError
    return found


WRAPPER = Check("text that holds one {}", _wrapper, TypeError)


@dataclass(frozen=True)
class Context:
    """One way in which a query reaches a model.

    Args:
        name: what it is called in tables.
        form: `template`, the model's prompt template; `raw`, the text as it is; or `chat`, the
            tokenizer's chat template.
        question: what stands around a query that ends with '?'.
        beginning: what stands around one that begins a sentence.
        system: the system's message, in a chat; None: what the chat template has by itself.
        before: earlier exchanges of the chat, each what the user and what the model said.

    Raises:
        TypeError: a field is of another type; it is named.
        ValueError: the form is none of the three, or one without messages is given some.
    """

    name: str
    form: Form = "template"
    question: str = "{}"
    beginning: str = "{}"
    system: str | None = None
    before: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        check_fields(
            self,
            name=TEXT,
            form=one_of(Form),
            question=WRAPPER,
            beginning=WRAPPER,
            system=instance_of(str).or_none(),
            before=Check("pairs of what the user and the model said", _exchanges, TypeError),
        )
        if self.form != "chat" and (self.system is not None or self.before):
            raise ValueError(f"the context {self.name!r} has messages, but its form is {self.form}")

    def wording(self, query: str) -> str:
        """The query with what stands around it.

        >>> Context("please", question="Please tell me: {}").wording("Who wrote Emma?")
        'Please tell me: Who wrote Emma?'
        """
        query = query.strip()
        return (self.question if is_question(query) else self.beginning).replace("{}", query)

    def asked(self, query: str) -> str | list[Message]:
        """What a router is given: the text around the query, or the conversation."""
        return self.messages(query) if self.form == "chat" else self.wording(query)

    def messages(self, query: str) -> list[Message]:
        """The conversation that ends with the query, as chat templates take it."""
        system = [] if self.system is None else [("system", self.system)]
        said = [
            turn for user, model in self.before for turn in (("user", user), ("assistant", model))
        ]
        turns = [*system, *said, ("user", self.wording(query))]
        return [{"role": role, "content": text} for role, text in turns]


FITTED = (
    Context("plain"),
    Context("reworded", question="The answer to '{}' is", beginning="{} whom or what?"),
    Context("raw", "raw"),
    Context(
        "chat, inside",
        "chat",
        question="I am preparing a quiz. {} Thanks!",
        beginning="I am preparing a quiz. Complete this: {}",
        system="You are helpful.",
    ),
)

# What holds in the template alone, and is fitted in two thirds of the time.
TEMPLATE = (
    *FITTED[:2],
    Context("wondered", question="Many people wonder. {}", beginning="Can you tell me: {} ...?"),
)

_BEFORE = (
    (
        "Which vegetables can I plant in autumn?",
        "Garlic, broad beans and winter lettuce are planted in autumn.",
    ),
    ("And how deep does garlic go?", "About five centimetres, with the tip upwards."),
)

MEASURED = (
    Context("template"),
    Context("raw", "raw"),
    Context(
        "raw, after a passage",
        "raw",
        question="The bridge was closed for repairs in March, and it opened again in the first "
        "week of June. Several hundred people came to see it. {}",
        beginning="The bridge was closed for repairs in March, and it opened again in the first "
        "week of June. Several hundred people came to see it. {}",
    ),
    Context("chat", "chat"),
    Context("chat, system", "chat", system="You are a librarian. You answer in a few words."),
    Context(
        "chat, please",
        "chat",
        question="Please tell me: {}",
        beginning="Please finish this sentence: {}",
    ),
    Context("chat, two turns before", "chat", before=_BEFORE),
    Context(
        "chat, another topic",
        "chat",
        question="Thanks! Another question. {}",
        beginning="Thanks! Something else. {}",
        before=_BEFORE[:1],
    ),
    Context(
        "chat, in a message",
        "chat",
        question="My sister and I had an argument at dinner yesterday, and neither of us could "
        "look it up. {} She says that I am wrong, as always.",
        beginning="My sister and I had an argument at dinner yesterday, and neither of us could "
        "look it up. How does this go on? {}",
    ),
)


def usable(contexts: Sequence[Context], has_chat: bool) -> tuple[Context, ...]:
    """Those of the contexts that a model has: without a chat template, none in chats."""
    return tuple(context for context in contexts if has_chat or context.form != "chat")
