"""Five dependent steps with checks, as one script and as five OpenAI calls from a client, on one server.

A review is sorted: each step asks for a choice or a regex, checks the answer, and puts it into the text of
the next step. Both use prefix caching, and write the same text if they sample the same answers.

    python benchmarks/script_steps.py [--full] [--rounds N] [--out FOLDER]
"""

from __future__ import annotations

import sys
import time
from typing import Any

from _engines import server
from _reporting import Bars, Report, arguments, median
from openai import OpenAI

GOAL = 2.0
"""Wall time of the calls, of that of the script, at the least."""
BOS = "<|im_start|>"
"""The embedded model's; the plugin puts it in place of an empty prompt, so the calls start with it too."""
STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "Review: The battery of this phone is empty by noon, and nobody answers the hotline.\nSentiment:",
        {"choice": [" positive", " negative", " neutral"]},
    ),
    ("\nProduct:", {"choice": [" phone", " laptop", " washing machine"]}),
    ("\nMain problem:", {"choice": [" battery life", " screen quality", " customer service"]}),
    ("\nUrgency from 1 to 5:", {"regex": " [1-5]"}),
    ("\nFirst name of whoever shall call back:", {"regex": r" [A-Z][a-z]{2,8}\n"}),
)
SCRIPT = f"""
import pyaici.server as aici

STEPS = {STEPS!r}

async def main():
    answers = []
    for text, asked in STEPS:
        await aici.FixedTokens(text)
        if "choice" in asked:
            answer = await aici.gen_text(options=asked["choice"], max_tokens=12)
        else:
            answer = await aici.gen_text(regex=asked["regex"], max_tokens=12)
        if answer in answers:
            await aici.FixedTokens(" (again)")
        answers.append(answer)
    aici.set_var("answers", ",".join(answers))

aici.start(main())
"""


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int)
    options = parser.parse_args()
    rounds = options.rounds or (20 if options.full else 5)
    ways = {"one script": by_script, "five calls": by_calls}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    counts: dict[str, tuple[str, int]] = {}
    with server() as url:
        client = OpenAI(base_url=url, api_key="none", timeout=600)
        for way in ways.values():
            way(client)
        for _ in range(rounds):
            for name, way in ways.items():
                began = time.perf_counter()
                counts[name] = way(client)
                seconds[name].append(time.perf_counter() - began)
    columns = ("way", "seconds", "forward passes", "answers")
    report = Report("script_steps", f"five dependent steps, medians of {rounds} rounds", columns)
    for name in ways:
        report.rows.append([name, median(seconds[name]), counts[name][1], counts[name][0].strip()])
    ratios = [b / a for a, b in zip(seconds["one script"], seconds["five calls"], strict=True)]
    met = "met" if median(ratios) >= GOAL else "not met"
    report.notes.append(f"the calls take {median(ratios):.2f} times as long; goal {GOAL}: {met}")
    report.details = {"seconds": seconds}
    report.show()
    report.write(options.out, Bars(("seconds",), [(row[0], (row[1],)) for row in report.rows], "s"))
    return 0


def by_script(client: OpenAI) -> tuple[str, int]:
    """The answers, and the forward passes they took."""
    answer = client.completions.create(
        model="embedded",
        prompt="",
        max_tokens=500,
        temperature=0.0,
        extra_body={"vllm_xargs": {"controller": SCRIPT}},
    )
    found: Any = answer.model_extra["kv_transfer_params"]["controller"]  # type: ignore[index]
    error = found["branches"][0]["error"]
    if error is not None:
        raise RuntimeError(f"the script failed: {error}")
    return found["variables"]["answers"], found["usage"]["forward_passes"]


def by_calls(client: OpenAI) -> tuple[str, int]:
    """The same from the client: a call for every answer."""
    text, answers, passes = BOS, [], 0
    for step, asked in STEPS:
        done = client.completions.create(
            model="embedded",
            prompt=text + step,
            max_tokens=12,
            temperature=0.0,
            extra_body={"structured_outputs": asked},
        )
        answer = done.choices[0].text
        passes += done.usage.completion_tokens  # type: ignore[union-attr]
        text += step + answer + (" (again)" if answer in answers else "")
        answers.append(answer)
    return ",".join(answers), passes


if __name__ == "__main__":
    sys.exit(main())
