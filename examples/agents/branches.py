"""Retries inside the engine: a small model is asked until it answers in one word, on vLLM in this process.

    python examples/agents/branches.py [--model FOLDER_OR_NAME]

Without a model the embedded one plays. Each round of samples is one request whose branches share the prompt,
a retry goes on from the branch that the engine kept, and a branch ends as soon as its second word begins.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from aici_vllm.agents import (
    AICall,
    AIGenerate,
    EngineSampler,
    PrefixChecked,
    RetryConfig,
    airetry,
    last_output,
    print_samples,
    run,
)

if TYPE_CHECKING:
    from vllm import LLM


def one_word(text: str) -> bool:
    """Whether a reply that begins like this may still be a single word."""
    return len(text.split()) <= 1


def ask(llm: LLM) -> AICall:
    """Ask for a colour, and retry until the answer is one word."""
    check = PrefixChecked(lambda call: one_word(last_output(call)), one_word)
    with EngineSampler(llm, condition=check) as sampler:
        call = AIGenerate(
            "Name a colour.",
            config=RetryConfig(n_samples=4, max_retries=5),
            api_kwargs={"max_tokens": 40, "seed": 1},
            sampler=sampler,
        )
        return airetry(check, run(call), "Answer with one word only.")


def main() -> None:
    """Start the engine, play, and show the tree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model that vLLM can run; by default the embedded one")
    options = parser.parse_args()

    from vllm import LLM

    import aici_vllm

    model = options.model or str(aici_vllm.embedded_model())
    llm = LLM(model, max_model_len=2048, enforce_eager=True, **aici_vllm.engine_args())
    call = ask(llm)
    print(f"Answer: {last_output(call)!r} (solved: {call.is_valid}, samples generated: {call.config.calls})")
    print_samples(call.samples)


if __name__ == "__main__":
    main()
