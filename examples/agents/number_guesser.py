"""The number guesser: a model guesses a number between 1 and 100, guided by checks and feedback.

Without options a scripted model guesses 33, so the program needs no server:

    python examples/agents/number_guesser.py
    python examples/agents/number_guesser.py 71 --base-url http://localhost:8000/v1 --model NAME
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from aici_vllm.agents import (
    AICall,
    AIGenerate,
    AIMessage,
    OpenAIModel,
    PostOrderDFS,
    PromptSchema,
    RetryConfig,
    ScriptedModel,
    airetry,
    last_output,
    print_samples,
    run,
    samples_html,
)

PROMPT = """\
I'm thinking a number between 1-100. Guess which one it is.
You must respond only with digits and nothing else.
Your guess:"""
SCRIPT = ["50", "42", "35", "35", "47", "48", "37", "32", "33", "33"]


def parse_guess(text: str) -> int | None:
    """The guess as a number, None if it is not one."""
    try:
        return int(text.strip())
    except ValueError:
        return None


def llm_guesser(user_number: int, model: PromptSchema) -> AICall:
    """Let the model guess `user_number`, which must be between 1 and 100."""
    if not 1 <= user_number <= 100:
        raise ValueError("The number must be between 1 and 100.")
    # Two samples at a time, at most 5 fixing rounds.
    out = AIGenerate(
        model, PROMPT, config=RetryConfig(n_samples=2, max_retries=5), api_kwargs={"n": 2, "max_tokens": 20}
    )
    run(out)

    # The format: digits only. Feedback can be a function of the call.
    def not_digits(aicall: AICall) -> str:
        return f"Output: {last_output(aicall)}\nFeedback: You must respond only with digits!!"

    airetry(lambda x: parse_guess(last_output(x)) is not None, out, not_digits)

    # A hint on the bounds.
    lower = user_number // 10 * 10
    upper = lower + 10

    def in_bounds(aicall: AICall) -> bool:
        guess = parse_guess(last_output(aicall))
        return guess is not None and lower <= guess <= upper

    airetry(in_bounds, out, f"The number is between or equal to {lower} to {upper}.")

    # At most three more guesses, if the budget still has them.
    def distance(aicall: AICall) -> str:
        guess = parse_guess(last_output(aicall))
        if guess is None:
            return "You must respond only with digits!!"
        return f"Your guess of {guess} is wrong, it's {abs(guess - user_number)} numbers away."

    max_retries = out.config.retries + 3
    airetry(lambda x: parse_guess(last_output(x)) == user_number, out, distance, max_retries=max_retries)
    return out


def main() -> None:
    """Play with the model named on the command line, and show the tree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("number", type=int, nargs="?", default=33, help="the number to guess (33)")
    parser.add_argument("--base-url", help="an OpenAI-compatible server")
    parser.add_argument("--model", help="the model's name there; without it a scripted model plays")
    parser.add_argument("--html", type=Path, help="write the tree as a page to this file")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    if options.model:
        out = llm_guesser(options.number, OpenAIModel(options.model, base_url=options.base_url))
    else:
        out = llm_guesser(33, ScriptedModel(SCRIPT))
    print(
        f"Results: Guess: {last_output(out)} (solved: {out.is_valid}, samples generated: {out.config.calls})"
    )
    print_samples(out.samples)
    for sample in PostOrderDFS(out.samples):
        for message in sample.data:
            if isinstance(message, AIMessage):
                print(f"ID: {sample.id}, Guess: {message.content}")
    if options.html:
        page = samples_html(out.samples, title="Number guesser", active_id=out.active_sample_id)
        options.html.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
