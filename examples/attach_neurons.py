"""Fit a neuron of your own to a transformers model, and give it to one row of a batch.

    python examples/attach_neurons.py

The model is tiny and random, so that this runs in seconds without a download. With a real one only
the first lines change.
"""

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from meg_kernels import Neurons, attach

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
)
model = LlamaForCausalLM(config).eval().requires_grad_(False)
prompt, wanted = torch.randint(100, (1, 8)), torch.tensor([42])

attached = attach(model, layer=2)

# One neuron: y += (x · key) value in that layer. Gradients reach it through the model.
key = torch.nn.Parameter(0.1 * torch.randn(1, 64))
value = torch.nn.Parameter(torch.zeros(1, 64))
optimizer = torch.optim.Adam([key, value], lr=0.05)
steps = 0
while True:
    with attached.neurons(Neurons(key=key, bias=None, value=value)):
        loss = F.cross_entropy(model(prompt).logits[:, -1], wanted)
    if loss < 0.05 or steps == 200:
        break
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    steps += 1
print(f"fitted in {steps} steps")

# A batch of three copies of the prompt: the first and the last row carry the neuron.
neurons = Neurons(key=key.detach(), bias=None, value=value.detach())
rows = prompt.repeat(3, 1)
plain = model(rows).logits[:, -1]
with attached.neurons(neurons, torch.tensor([0, -1, 0])):
    edited = model(rows).logits[:, -1]
print("most likely next token without it:", plain.argmax(-1).tolist())
print("most likely next token with it:   ", edited.argmax(-1).tolist())
print("the row without a neuron, bit for bit as before:", torch.equal(plain[1], edited[1]))

attached.detach()
