"""Where in a prompt a question may stand: the sentences of what was said last, and all of it.

An encoder makes one condition of a text, and what stands around a question moves it away from the
question's own. A prompt is therefore looked at in spans, and the best one decides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from meg_kernels.conversation import Prompt

MOST_SPANS = 256  # of one prompt; of a longer one, those at its end and at its beginning
MOST_CHARACTERS = 2000  # of a span: an encoder reads no more
FOLLOW_UP = 12, 80  # words and characters of a message, at most, that may be about the one before

# A sentence ends behind its mark and the quotes that close with it, or at a line break. A full stop
# ends none within a number or an address, or behind an initial or a title.
_QUOTES = r"""["'”’»)\]]*"""
_END = re.compile(
    rf"""(?<=[?!…؟।]){_QUOTES}(?=\s)"""
    rf"""|(?<=\.)(?<!\b[A-Z]\.)(?<!\b(?:Dr|Mr|Ms|St|vs)\.)(?<!\b(?:Mrs|Jun|Sen|etc|e\.g|i\.e)\.)"""
    rf"""{_QUOTES}(?=\s)"""
    r"""|(?<=[。！？])["'”’»」』）]*|[\r\n]+"""
)


@dataclass(frozen=True)
class Span:
    """A part of what was said in which a question may stand.

    Args:
        text: as the encoder gets it.
        start: its first character in what was said last; where what was said before comes first,
            that of the part that was said last.
        follows: what was said before that comes first in it. A follow-up asks for a fact only if
            it is closer to it than that is by itself.
        is_sentence: whether it is one of several sentences.
    """

    text: str
    start: int
    follows: str = ""
    is_sentence: bool = False


def sentences(text: str) -> list[Span]:
    """The sentences of a text, none of them empty.

    >>> [span.text for span in sentences("Hello. Who wrote Emma? I ask for a friend.")]
    ['Hello.', 'Who wrote Emma?', 'I ask for a friend.']
    """
    found, begin = [], 0
    for end in (*(match.end() for match in _END.finditer(text)), len(text)):
        part = text[begin:end]
        if stripped := part.strip():
            found.append(Span(stripped, begin + len(part) - len(part.lstrip())))
        begin = end
    return found


def spans(prompt: Prompt) -> list[Span]:
    """Where a question may stand, at least one span.

    It is the whole of what was said last, unless that is long and has sentences, and its sentences.

    Args:
        prompt: a text, or a conversation whose last message is looked at. A short last message is
            also looked at together with the user's message before it, which it may be about.
    """
    said = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    whole = Span(said.strip(), len(said) - len(said.lstrip()))
    parts = sentences(said)
    found = [whole] if len(whole.text) <= MOST_CHARACTERS or len(parts) < 2 else []
    if len(parts) > 1:
        found += [replace(part, is_sentence=True) for part in _bounded(parts)]
    words, characters = FOLLOW_UP
    short = len(said.split()) <= words and len(said) <= characters
    if not isinstance(prompt, str) and parts and short:
        before = [message["content"] for message in prompt[:-1] if message["role"] == "user"]
        if before and (asked := sentences(before[-1])):
            follows = asked[-1].text
            found.append(Span(f"{follows} {whole.text}", whole.start, follows))
    return found


def _bounded(parts: list[Span]) -> list[Span]:
    """Of too many, those at the end, where questions mostly stand, and at the beginning."""
    if len(parts) <= MOST_SPANS:
        return parts
    early = MOST_SPANS // 4
    return parts[:early] + parts[early - MOST_SPANS :]
