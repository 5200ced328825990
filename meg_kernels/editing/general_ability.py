"""General ability: whether an edited model still reads what it was not edited on as it did before.

    perplexity = exp(mean over all tokens of -log p(token | the passage before it))

The edited model meets a passage as it meets a query. The gate sees the passage's beginning, its
first sentence; if it takes that for an edited query, the neuron is mounted for the whole passage.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from meg_kernels.editing.prompting import PromptedModel
from meg_kernels.pretrained import tokenized
from meg_kernels.progress import progress_bar


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of text, before and after it was edited.

    Args:
        base, edited: perplexity of the base and of the edited model; equal where no passage was
            accepted.
        passages: how many there were.
        accepted: of them, those whose beginning the gate took for an edited query.
        tokens: that were predicted: all but each passage's first.
    """

    base: float
    edited: float
    passages: int
    accepted: int
    tokens: int


_SENTENCE = re.compile(r".*?(?:[.!?][\"'”’)\]]*(?=\s|$)|(?=\n)|$)", re.DOTALL)


def first_sentence(text: str) -> str:
    """The beginning of a text, which is what the gate sees of it.

    It ends with the first full stop, question mark or exclamation mark that white space follows, or
    at the first line break.

    >>> first_sentence("Pi is 3.14 or so. It has no end.")
    'Pi is 3.14 or so.'
    >>> first_sentence('"Who is there?" she asked.')
    '"Who is there?"'
    """
    found = _SENTENCE.match(text.strip())
    assert found is not None  # the end of the text matches
    return found.group()


@torch.no_grad()
def perplexity(
    prompted: PromptedModel,
    texts: Sequence[str],
    mount_edited: Callable[[str], AbstractContextManager[bool]],
    progress: bool = False,
) -> Perplexity:
    """The perplexity of `texts`, with and without the edits.

    Args:
        prompted: the base model; its template is not used.
        texts: passages, read without a template and one at a time, up to the model's context
            length.
        mount_edited: mounts the neuron of this query, if it is an edited one, and says whether it
            is.
        progress: show a progress bar.

    Raises:
        ValueError: no texts, or one of a single token.
    """
    if isinstance(texts, str):
        raise TypeError("texts is a str; pass a list of texts")
    if not texts:
        raise ValueError("there are no texts to read")
    longest = prompted.positions
    base_loss = edited_loss = 0.0  # nats
    accepted = counted = 0
    for text in progress_bar(texts, desc="reading", unit="passage", shown=progress, leave=False):
        tokens = tokenized(prompted.tokenizer, text).input_ids[:longest]
        if len(tokens) < 2:
            raise ValueError(f"the text {text!r} has {len(tokens)} tokens; two are needed at least")
        batch = prompted.batch([(tokens[:1], tokens[1:])])
        predicted = len(tokens) - 1
        base_loss += predicted * prompted.score(batch).losses.item()
        with mount_edited(first_sentence(text)) as taken:
            edited_loss += predicted * prompted.score(batch).losses.item()
        accepted += taken
        counted += predicted
    return Perplexity(
        math.exp(base_loss / counted),
        math.exp(edited_loss / counted),
        len(texts),
        accepted,
        counted,
    )
