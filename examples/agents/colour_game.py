"""The colour game: a model guesses a colour, checks filter its guesses, and retries search a tree.

Without options a scripted model plays, so the program needs no server:

    python examples/agents/colour_game.py
    python examples/agents/colour_game.py --base-url http://localhost:8000/v1 --model NAME
"""

from __future__ import annotations

import argparse
import logging
import re
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

PROMPT = (
    "Guess what color I'm thinking. It could be: blue, red, black, white, yellow. Answer with 1 word only"
)
SCRIPT = ["Blue", "Black", "blue", "red", "blue", "blue", "yellow", "yellow"]


def play(model: PromptSchema) -> AICall:
    """Play one game; the colour is yellow."""
    # Two samples per round, and the server makes both in one request.
    out = AIGenerate(
        model, PROMPT, verbose=False, config=RetryConfig(n_samples=2), api_kwargs={"n": 2, "max_tokens": 20}
    )
    run(out)

    # Each check filters the samples; a retry starts from the most promising one, with the feedback added.
    airetry(lambda x: len(re.split(r" |\.", last_output(x))) == 1, out, "You must answer with 1 word only.")
    airetry(lambda x: last_output(x).islower(), out, "You must answer in lowercase.")
    airetry(lambda x: last_output(x).startswith("y"), out, 'It starts with "y"')
    return out


def main() -> None:
    """Play with the model named on the command line, and show the tree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", help="an OpenAI-compatible server")
    parser.add_argument("--model", help="the model's name there; without it a scripted model plays")
    parser.add_argument("--html", type=Path, help="write the tree as a page to this file")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    out = play(
        OpenAIModel(options.model, base_url=options.base_url) if options.model else ScriptedModel(SCRIPT)
    )
    print(f"Answer: {last_output(out)} (solved: {out.is_valid}, samples generated: {out.config.calls})")
    print_samples(out.samples)
    for sample in PostOrderDFS(out.samples):
        message = sample.data[-1]
        if isinstance(message, AIMessage):  # otherwise it is feedback
            print(f"ID: {sample.id}, Answer: {message.content}")
    if options.html:
        page = samples_html(out.samples, title="Colour game", active_id=out.active_sample_id)
        options.html.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
