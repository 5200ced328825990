"""vLLM's renderers, each made to show the front end what is asked.

Completions are routed by their text, chats by their messages, as `MeGEditor.generate` does with
either; and only after they have become tokens, so that what is too long for the model is refused
before it is looked at. A renderer knows no parameters of sampling: who wants the base model is
found out where the engine's request is made.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meg_kernels.editing.config import EditorConfig
from meg_kernels.integrations.vllm.front_end import Asked, FrontEnd, conversation
from meg_kernels.integrations.vllm.settings import KEY, Settings
from meg_kernels.integrations.vllm.workers import NEURON
from meg_kernels.routing.manifest import read_manifest
from meg_kernels.routing.router import Router

ORIGINALS: dict[str, tuple[str, str]] = {}  # by their modes: module and class of vLLM's own
SAID = "meg_said"  # in a prompt: the conversation that it was made of
OFF = ("0", "off", "base", "false", "no")  # vllm_xargs={"meg": ...}: the base model shall answer
ON = ("1", "on", "true", "yes")


def __getattr__(mode: str) -> Any:
    if mode not in ORIGINALS:
        raise AttributeError(f"module {__name__!r} has no attribute {mode!r}")
    module, name = ORIGINALS[mode]
    return _routing_renderer(getattr(importlib.import_module(module), name))


@functools.cache
def _routing_renderer(base: Any) -> type:
    class RoutingRenderer(base):
        """vLLM's renderer; with a front end, if an edited model is served."""

        def __init__(self, config: Any, tokenizer: Any):
            super().__init__(config, tokenizer)
            settings = Settings.of(config)
            self.meg = None if settings is None else front_end(settings.edited)
            if self.meg is not None:
                self.meg.tokenizer = tokenizer
                tell_the_engine()

        def render_messages(self, messages: Any, params: Any) -> Any:
            said, prompt = super().render_messages(messages, params)
            return said, prompt if self.meg is None else {**prompt, SAID: conversation(messages)}

        async def render_messages_async(self, messages: Any, params: Any) -> Any:
            said, prompt = await super().render_messages_async(messages, params)
            return said, prompt if self.meg is None else {**prompt, SAID: conversation(messages)}

        def tokenize_prompts(self, prompts: Sequence[Any], params: Any) -> list[Any]:
            found = super().tokenize_prompts(prompts, params)
            if self.meg is None:
                return found
            neurons = self.meg.decide([_asked(prompt) for prompt in found])
            return [{**p, NEURON: n} for p, n in zip(found, neurons, strict=True)]

        async def tokenize_prompts_async(self, prompts: Sequence[Any], params: Any) -> list[Any]:
            found = await super().tokenize_prompts_async(prompts, params)
            if self.meg is None:
                return found
            neurons = await self.meg.decide_async([_asked(prompt) for prompt in found])
            return [{**p, NEURON: n} for p, n in zip(found, neurons, strict=True)]

        def process_for_engine(self, prompt: Any, *rest: Any, **more: Any) -> Any:
            return self._salted(prompt, super().process_for_engine(prompt, *rest, **more))

        async def process_for_engine_async(self, prompt: Any, *rest: Any, **more: Any) -> Any:
            made = await super().process_for_engine_async(prompt, *rest, **more)
            return self._salted(prompt, made)

        def _salted(self, prompt: Any, engine_input: Any) -> Any:
            if self.meg is not None and NEURON in prompt:
                salt = self.meg.salt(prompt[NEURON], engine_input.get("cache_salt"))
                engine_input["cache_salt"] = salt
            return engine_input

    RoutingRenderer.__name__ = RoutingRenderer.__qualname__ = base.__name__
    return RoutingRenderer


def _asked(prompt: Any) -> Asked:
    """What is looked at in a prompt: its conversation, its text, or else its token ids."""
    if SAID in prompt:
        return prompt[SAID]
    return prompt.get("prompt") or prompt.get("prompt_token_ids")


@functools.cache
def front_end(folder: str) -> FrontEnd:
    """This process's front end for an edited model."""
    config = EditorConfig.from_dict(read_manifest(Path(folder))["config"])
    assert config.template is not None  # an editor saves the one that it used
    # The accelerators are the workers'.
    return FrontEnd(Router.from_pretrained(folder, "cpu"), config.template)


def tell_the_engine() -> None:
    """Have vLLM's requests say which neuron they have, and by which salt they are cached; once."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    own = InputProcessor.process_inputs
    if getattr(own, "tells", False):
        return

    @functools.wraps(own)
    def process_inputs(self: Any, *arguments: Any, **more: Any) -> Any:
        request = own(self, *arguments, **more)
        meg = getattr(self.renderer, "meg", None)
        try:
            return request if meg is None else _told(meg, request)
        except ValueError as error:  # vLLM's own is the user's to mend, and answered with 400
            raise VLLMValidationError(str(error)) from error

    process_inputs.tells = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs


def _told(meg: FrontEnd, request: Any) -> Any:
    """VLLM's request with its neuron, or without one where the user wants none."""
    if request.resumable:
        raise ValueError("edited models take no streamed input; send the whole prompt")
    params = request.sampling_params
    salted = meg.resolve(request.cache_salt)
    extra = {name: value for name, value in (params.extra_args or {}).items() if name != NEURON}
    choice = extra.pop(KEY, "on")
    if str(choice).lower() not in ON + OFF:
        raise ValueError(f"vllm_xargs has {KEY}={choice!r}; it must be 'on' or 'off'")
    is_off = str(choice).lower() in OFF
    if is_off:
        request.cache_salt = meg.salt(None, salted.salt)
    elif salted.neuron is not None:
        extra[NEURON] = salted.neuron
    params.extra_args = extra or None
    meg.count(request.request_id, salted.neuron, is_off)
    return request
