"""What facts say: the inputs of a generator that knows answers, such as a hypernetwork."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meg_kernels.editing.prompting import PromptedModel
from meg_kernels.facts import Fact
from meg_kernels.nn import input_device
from meg_kernels.routing.ridge import ANSWER, scaled
from meg_kernels.text_encoder import TextEncoder


@torch.no_grad()
def known_answers(prompted: PromptedModel, encoder: TextEncoder, facts: Sequence[Fact]) -> Tensor:
    """What is known of the facts' answers, [N, A] float32 on the CPU: three parts of set lengths.

    These are the text encoder's vector of the answer, and the language model's embeddings of its
    tokens: of the first one, and of all in the mean. They do not depend on the query.

    Args:
        prompted: the language model.
        encoder: makes vectors of texts.
        facts: N facts.
    """
    answers = [*dict.fromkeys(fact.answer for fact in facts)]
    places = {answer: place for place, answer in enumerate(answers)}
    embed: Any = prompted.model.get_input_embeddings()
    device, prompt = input_device(prompted.model), prompted.prompt("Who?")
    first, mean = [], []
    for answer in answers:
        _, ids = prompted.target(prompt, answer)
        tokens = embed(torch.tensor(ids, device=device)).float().cpu()
        first.append(tokens[0])
        mean.append(tokens.mean(0))
    dim = embed.weight.shape[1]
    parts = (
        encoder.encode(answers).cpu(),
        torch.stack(first) if first else torch.empty(0, dim),
        torch.stack(mean) if mean else torch.empty(0, dim),
    )
    each = torch.cat([scaled(part, square) for part, square in zip(parts, ANSWER, strict=True)], 1)
    return each[[places[fact.answer] for fact in facts]]
