"""Five dependent steps with checks, as one script and as five OpenAI calls from a client, on one server.

A customer's ticket is sorted: each step asks for a choice or a regex, and looks up what the answer is checked
against, which goes into the text of the next step. Both ways write the same text if they sample the same
answers. Two cases:

- *ticket alone*: a short ticket, and nothing before it;
- *after instructions*: before the ticket stand instructions with worked examples, the same for all tickets,
  as a prompt for such work has them. vLLM's prefix cache holds them, for both ways.

Every round is another ticket, so nothing of it is in the prefix cache when its first step begins.

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
"""The embedded model's, at the start of both ways."""
INSTRUCTIONS = """You sort the tickets that customers of a shop for household and office electronics write.
Read the ticket, then fill in the form below it, one line after the other. The sentiment is that of the
customer, not that of the shop. The product is what the customer bought, not what they bought before or want
instead. The main problem is the one that the customer would have solved first. Urgency is 1 for a question
that can wait and 5 for danger, for the loss of data, and for anybody who cannot work. The records between the
lines come from the shop itself and are always right, whatever the ticket says.

Ticket 1: The screen of my new laptop flickers when it is warm, and I have to hand in my thesis on Monday.
Sentiment: negative
Product: laptop
Record: laptops have two years of warranty, and a replacement is lent during repairs.
Main problem: screen quality
Record: flickering screens are exchanged without being sent in first.
Urgency from 1 to 5: 5
First name of whoever shall call back: Maria

Ticket 2: Thank you for the quick delivery! The washing machine is quiet and does what it should.
Sentiment: positive
Product: washing machine
Record: washing machines have five years of warranty, and repairs are done at home.
Main problem: customer service
Record: praise is passed on to the people who earned it.
Urgency from 1 to 5: 1
First name of whoever shall call back: Jonas

"""
TICKET = (
    "Ticket {number}: The battery of this phone is empty by noon, and nobody answers the hotline.\nSentiment:"
)
STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    (TICKET, {"choice": [" positive", " negative", " neutral"]}),
    ("\nProduct:", {"choice": [" phone", " laptop", " washing machine"]}),
    ("\nMain problem:", {"choice": [" battery life", " screen quality", " customer service"]}),
    ("\nUrgency from 1 to 5:", {"regex": " [1-5]"}),
    ("\nFirst name of whoever shall call back:", {"regex": r" [A-Z][a-z]{2,8}\n"}),
)
RECORDS = {
    " phone": "\nRecord: phones have two years of warranty, batteries one year.",
    " laptop": "\nRecord: laptops have two years of warranty, and a replacement is lent during repairs.",
    " washing machine": "\nRecord: washing machines have five years of warranty, and are repaired at home.",
    " battery life": "\nRecord: a battery under 80 % of its capacity is replaced free of charge.",
    " screen quality": "\nRecord: flickering screens are exchanged without being sent in first.",
    " customer service": "\nRecord: whoever was not answered is called back within two hours.",
    " 5": "\nRecord: a ticket of urgency 5 goes to the head of the department.",
}
"""What the check of an answer finds, to be written behind it."""
SCRIPT = f"""
import pyaici.server as aici

STEPS = {STEPS!r}
RECORDS = {RECORDS!r}

async def main():
    answers = []
    for text, asked in STEPS:
        await aici.FixedTokens(text.replace("{{number}}", aici.controller_arg()))
        if "choice" in asked:
            answer = await aici.gen_text(options=asked["choice"], max_tokens=12)
        else:
            answer = await aici.gen_text(regex=asked["regex"], max_tokens=12)
        if answer in RECORDS:
            await aici.FixedTokens(RECORDS[answer])
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
    cases = {"ticket alone": "", "after instructions": INSTRUCTIONS}
    columns = ("case", "way", "seconds", "forward passes", "answers")
    report = Report("script_steps", f"five dependent steps, medians of {rounds} rounds", columns)
    groups = []
    with server() as url:
        client = OpenAI(base_url=url, api_key="none", timeout=600)
        for case, before in cases.items():
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            counts: dict[str, tuple[str, int]] = {}
            # The first round compiles, and is not counted.
            for index in range(rounds + 1):
                for turn, (name, way) in enumerate(ways.items()):
                    number = str(1000 + 2 * index + turn)
                    began = time.perf_counter()
                    counts[name] = way(client, before, number)
                    seconds[name].append(time.perf_counter() - began)
            for name in ways:
                answers, passes = counts[name]
                report.rows.append([case, name, median(seconds[name][1:]), passes, answers.strip()])
                groups.append((f"{case}, {name}", (report.rows[-1][2],)))
            ratios = [b / a for a, b in zip(seconds["one script"], seconds["five calls"], strict=True)][1:]
            met = "met" if median(ratios) >= GOAL else "not met"
            report.notes.append(
                f"{case}: the calls take {median(ratios):.2f} times as long; goal {GOAL}: {met}"
            )
            report.details[case] = seconds
    report.show()
    report.write(options.out, Bars(("seconds",), groups, "s"))
    return 0


def by_script(client: OpenAI, before: str, number: str) -> tuple[str, int]:
    """The answers, and the forward passes they took."""
    answer = client.completions.create(
        model="embedded",
        prompt=BOS + before,
        max_tokens=500,
        temperature=0.0,
        extra_body={"vllm_xargs": {"controller": SCRIPT, "controller_arg": number}},
    )
    found: Any = answer.model_extra["kv_transfer_params"]["controller"]  # type: ignore[index]
    error = found["branches"][0]["error"]
    if error is not None:
        raise RuntimeError(f"the script failed: {error}")
    return found["variables"]["answers"], found["usage"]["forward_passes"]


def by_calls(client: OpenAI, before: str, number: str) -> tuple[str, int]:
    """The same from the client: a call for every answer."""
    text, answers, passes = BOS + before, [], 0
    for step, asked in STEPS:
        text += step.replace("{number}", number)
        done = client.completions.create(
            model="embedded",
            prompt=text,
            max_tokens=12,
            temperature=0.0,
            extra_body={"structured_outputs": asked},
        )
        answer = done.choices[0].text
        passes += done.usage.completion_tokens  # type: ignore[union-attr]
        text += answer + RECORDS.get(answer, "")
        answers.append(answer)
    return ",".join(answers), passes


if __name__ == "__main__":
    sys.exit(main())
