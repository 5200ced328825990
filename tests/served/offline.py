"""Answers prompts with vLLM's `LLM` in a process of its own, and writes their tokens as JSON.

    python offline.py '{"model": ..., "edited": ..., "prompts": [...], "out": ..., "engine": {...}}'

With MEG_TEST_V2=1, vLLM's second model runner runs in Triton's interpreter; by itself vLLM takes it
without a GPU only where Triton compiles for the CPU.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

if os.environ.get("MEG_TEST_V2") == "1":  # here, so that each process does so that vLLM starts
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


def main() -> None:
    given = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    from meg_kernels.integrations.vllm import additional_config

    llm = LLM(
        given["model"],
        additional_config=additional_config(given["edited"]),
        **given["engine"],
    )
    uses_second = llm.llm_engine.vllm_config.use_v2_model_runner
    assert uses_second == (os.environ.get("MEG_TEST_V2") == "1")
    params = SamplingParams(temperature=0, max_tokens=given["most"])
    off = SamplingParams(temperature=0, max_tokens=given["most"], extra_args={"meg": "off"})
    rounds = []
    for sampling in (params, params, off):
        said = llm.generate(given["prompts"], sampling, use_tqdm=False)
        rounds.append([list(answer.outputs[0].token_ids) for answer in said])
    with open(given["out"], "w", encoding="utf-8") as out:
        json.dump(rounds, out)


if __name__ == "__main__":
    main()
