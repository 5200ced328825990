"""What a prompt must be answered: transformers, one prompt at a time."""

from __future__ import annotations

import torch

from meg_kernels import MeGEditor
from meg_kernels.conversation import chat_prompt, prompt_tokens

MOST = 12
# As vLLM's attention on a CPU takes them; two heads, for two workers.
SHAPE = {
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


class Oracle:
    """What transformers generates with a prompt's neuron, one prompt at a time."""

    def __init__(self, editor: MeGEditor):
        self.editor = editor

    @torch.no_grad()
    def tokens(self, prompt, edited: bool = True, most: int = MOST) -> list[int]:
        """Greedily, of a text as it is, or of a conversation."""
        editor = self.editor
        text = prompt if isinstance(prompt, str) else chat_prompt(editor.tokenizer, prompt)
        ids = torch.tensor([prompt_tokens(editor.tokenizer, text)])
        asked = prompt
        if isinstance(prompt, str):  # of the template
            asked = prompt.removeprefix("Q: ").removesuffix("\nA:")
        neurons, index = editor.router.neurons(editor.router.route([asked]))
        if neurons is None or not edited:
            said = editor.model.generate(ids, max_new_tokens=most, do_sample=False)
        else:
            with editor.attached.neurons(neurons, index):
                said = editor.model.generate(ids, max_new_tokens=most, do_sample=False)
        return said[0, ids.shape[1] :].tolist()

    def __call__(self, prompt, edited: bool = True, most: int = MOST) -> str:
        tokens = self.tokens(prompt, edited, most)
        return self.editor.tokenizer.decode(tokens, skip_special_tokens=True)
