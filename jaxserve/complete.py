"""The `generate` command: prompts in, text out, the engine in this process."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxserve.config import EngineConfig
from jaxserve.engine.request import SamplingParams
from jaxserve.options import GenerateOptions


def given_sampling(options: GenerateOptions) -> dict[str, Any]:
    """Returns the sampling options that were given, by the names of `SamplingParams`."""
    return {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in ("prompt", "chat") and getattr(options, field.name) is not None
    }


def generate_text(config: EngineConfig, options: GenerateOptions) -> int:
    """Prints the text generated from each prompt and returns 0.

    Options that were not given are the model's own. With several prompts or samples a line before
    each says which it is. Raises `RequestError` for a value out of range.
    """
    given = given_sampling(options)
    SamplingParams(**given)  # a mistake shows before the model is loaded
    from jaxserve.llm import LLM

    with LLM(**dataclasses.asdict(config)) as llm:
        params = dataclasses.replace(llm.get_default_sampling_params(), **given)
        if options.chat:
            chats = [[{"role": "user", "content": text}] for text in options.prompt]
            outputs = llm.chat(chats, params, use_tqdm=False)
        else:
            outputs = llm.generate(list(options.prompt), params, use_tqdm=False)
    is_single = len(outputs) == 1 and params.n == 1
    for number, output in enumerate(outputs, 1):
        for sample in output.outputs:
            if not is_single:
                print(f"--- prompt {number}, sample {sample.index + 1}")
            print(sample.text)
    return 0
