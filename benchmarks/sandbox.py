"""Scripts in the sandbox: how long a start, a resume and a fork take, with 1 and with 1,000 live scripts.

A start goes from the source to the script's first await; a resume from one await to the next; a fork from
the parent's await to the child's next one. Wall time, one after the other, beside scripts that wait. The
rows in brackets are what the machine takes for the least that a turn can do: a sandbox process that answers
a message, asked without this library, and a thread that is woken and wakes the other.

    python benchmarks/sandbox.py [--full] [--live 1 1000] [--out FOLDER]
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from _reporting import Bars, Report, arguments, median, quantile
from pydantic_monty import FunctionSnapshot, Monty

from aici_vllm.controller.branch import Branch
from aici_vllm.controller.group import Group
from aici_vllm.controller.limits import Limits
from aici_vllm.controller.sandbox import SandboxPool
from aici_vllm.controller.sandbox.program import SandboxProgram
from constraints import Vocabulary

SOURCE = """
import pyaici.server as aici

async def main():
    seen = []
    for number in range(1_000_000):
        seen.append(number)
        await aici.FixedTokens(f"line {number}")
        seen = seen[-50:]

aici.start(main())
"""
GOALS = {"start": 3.0, "resume": 0.3, "fork": 1.0}
"""Milliseconds at p50; p99 may be five times that."""
PAUSE = 0.001
"""Seconds between two messages in brackets: a script too has slept for about a step when its turn comes."""


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--live", type=int, nargs="+", default=[1, 1000])
    options = parser.parse_args()
    rounds = 1000 if options.full else 200
    columns = ("what", "live scripts", "p50 ms", "p99 ms", "p99 / p50", "goal p50 ms", "met")
    report = Report("sandbox", f"scripts in the sandbox, {rounds} of each", columns)
    for what, times in {"(a process)": process_answers(rounds), "(a thread)": thread_answers(rounds)}.items():
        middle, worst = median(times) * 1e3, quantile(times, 0.99) * 1e3
        report.rows.append([what, None, middle, worst, worst / middle, None, None])
    for live in options.live:
        pool = SandboxPool(Limits())
        try:
            for what, times in measure(pool, live, rounds).items():
                middle, worst = median(times) * 1e3, quantile(times, 0.99) * 1e3
                met = middle <= GOALS[what] and worst <= 5 * GOALS[what]
                cells = [middle, worst, worst / middle, GOALS[what], "yes" if met else "no"]
                report.rows.append([what, live, *cells])
        finally:
            pool.close()
    report.notes.append("met: p50 within the goal, and p99 within five times the goal")
    report.show()
    groups = [
        (row[0] if row[1] is None else f"{row[0]}, {row[1]} live", (row[2], row[3], row[5]))
        for row in report.rows
    ]
    report.write(options.out, Bars(("p50", "p99", "goal for p50"), groups, "ms"))
    return 0


def measure(pool: SandboxPool, live: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each start, resume and fork."""
    waiting = [started(pool) for _ in range(live)]
    times: dict[str, list[float]] = {"start": [], "resume": [], "fork": []}
    for index in range(rounds):
        began = time.perf_counter()
        program = started(pool)
        times["start"].append(time.perf_counter() - began)
        program.close()
        program = waiting[index * 7919 % live]
        began = time.perf_counter()
        resumed(pool, program)
        times["resume"].append(time.perf_counter() - began)
        began = time.perf_counter()
        child = program.fork(branch())
        resumed(pool, child)
        times["fork"].append(time.perf_counter() - began)
        child.close()
    return times


def process_answers(rounds: int) -> list[float]:
    """Seconds from an answer to a process's question to its next question."""
    times = []
    limits: Any = {"max_suspensions": 2 * rounds + 100}
    with Monty(min_processes=1, max_processes=1) as monty, monty.checkout(limits=limits) as session:
        asked: Any = session.feed_start("while True:\n    ask()")
        for _ in range(rounds):
            while not isinstance(asked, FunctionSnapshot):
                asked = asked.resume()
            time.sleep(PAUSE)
            began = time.perf_counter()
            asked = asked.resume({"return_value": 1})
            times.append(time.perf_counter() - began)
    return times


def thread_answers(rounds: int) -> list[float]:
    """Seconds until a thread that was woken has woken this one."""
    there, back = threading.Semaphore(0), threading.Semaphore(0)

    def answer() -> None:
        for _ in range(rounds):
            there.acquire()
            back.release()

    other = threading.Thread(target=answer)
    other.start()
    times = []
    for _ in range(rounds):
        time.sleep(PAUSE)
        began = time.perf_counter()
        there.release()
        back.acquire()
        times.append(time.perf_counter() - began)
    other.join()
    return times


def started(pool: SandboxPool) -> SandboxProgram:
    """A script at its first await."""
    program = pool.program(SOURCE, branch())
    program.resume()
    return at_await(pool, program)


def resumed(pool: SandboxPool, program: SandboxProgram) -> SandboxProgram:
    """The script at its next await."""
    program.resume([1])
    return at_await(pool, program)


def at_await(pool: SandboxPool, program: SandboxProgram) -> SandboxProgram:
    turn: Any = None
    while (turn := program.poll()) is None:
        pool.wait(0.05)
    if not hasattr(turn, "tokens"):
        raise RuntimeError(f"the script came to {turn!r}")
    return program


VOCABULARY = Vocabulary([*(bytes([byte]) for byte in range(256)), None], eos_token_ids=[256])


def branch() -> Branch:
    """What a script writes: one token a byte."""
    return Group(VOCABULARY, [65], max_tokens=100_000, context=1_000_000).root


if __name__ == "__main__":
    sys.exit(main())
