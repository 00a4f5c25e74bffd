"""The sandbox: state, host functions, limits, and what happens when its process dies."""

import asyncio
import os
import signal
import threading
import time

import pytest

from aici_vllm.recursive import Sandbox, SandboxError, SandboxLimits
from aici_vllm.recursive.chat import Reply, run_to_end
from aici_vllm.recursive.deadline import Deadline, DeadlineExceeded


class Session:
    """A sandbox driven synchronously."""

    def __init__(self, tools=None, variables=None, **limits):
        self.finals = []
        self.box = Sandbox(tools or {}, variables or {}, SandboxLimits(**limits), on_final=self.take)

    def take(self, answer):
        self.finals.append(answer)
        return f"FINAL({answer})"

    def run(self, code, deadline=None):
        return run_to_end(self.box.run(code, Deadline(deadline)))

    def out(self, code):
        outcome = self.run(code)
        assert outcome.error is None, outcome.trace
        return outcome.stdout

    def variables(self):
        return run_to_end(self.box.variables())


@pytest.fixture
def session():
    sessions = []

    def make(*args, **kwargs):
        sessions.append(Session(*args, **kwargs))
        return sessions[-1]

    yield make
    for made in sessions:
        run_to_end(made.box.close())


def test_state_lives_from_block_to_block(session):
    repl = session(variables={"context": "some text"})
    repl.out("count = len(context)\ndef twice(n):\n    return 2 * n")
    assert repl.out("print(twice(count))") == "18\n"


def test_prints_of_a_failing_block_are_kept(session):
    outcome = session().run("print('before')\nraise ValueError('boom')\nprint('after')")
    assert outcome.stdout == "before\n"
    assert outcome.error == "ValueError: boom"
    assert "line 2" in outcome.trace


def test_the_value_of_the_last_statement_is_not_printed(session):
    assert session().out("'a value'") == ""


def test_host_functions_take_arguments_and_give_plain_values(session):
    repl = session(
        {"ask": lambda prompt, model=None: Reply(f"{prompt}/{model}"), "many": lambda prompts: prompts}
    )
    assert repl.out("print(ask('a', model='m'), many(['x', 'y']))") == "a/m ['x', 'y']\n"
    assert repl.out("f = ask\nprint(f('b'))") == "b/None\n"


def test_an_error_of_a_host_function_can_be_caught_by_the_block(session):
    def broken(prompt):
        raise ConnectionError("model is down")

    repl = session({"ask": broken})
    assert (
        repl.out("try:\n    ask('a')\nexcept Exception as e:\n    print('caught', e)")
        == "caught model is down\n"
    )
    assert "model is down" in repl.run("ask('a')").error


def test_a_host_value_that_cannot_cross_is_an_error_of_the_block(session):
    repl = session({"ask": lambda: object()})
    assert "ask" in repl.run("ask()").trace or "object" in repl.run("ask()").trace
    assert repl.out("print('alive')") == "alive\n"


def test_broken_unicode_cannot_break_the_session(session):
    def broken():
        raise ValueError("half \ud800")

    repl = session({"ask": lambda: ["half \ud800"], "fail": broken}, {"context": "c\ud800"})
    assert repl.out("print(ask()[0], context)") == "half ? c?\n"
    assert repl.run("fail()").error == "RuntimeError: half ?"
    assert repl.out("print('\ud800')") == "?\n"
    assert repl.out("print(len(chr(233)))") == "1\n"


def test_reassigned_host_functions_come_back_with_the_next_block(session):
    repl = session({"ask": lambda: "answer"})
    repl.out("ask = 1\nFINAL = 2\nSHOW_VARS = 3\nlen = 4\nstr = 5")
    assert repl.out("print(ask(), FINAL('x'))") == "answer FINAL(x)\n"
    assert "ask" in repl.out("print(SHOW_VARS())")


def test_final_helpers_call_the_side_channel_with_text(session):
    repl = session()
    repl.out(
        "x = {'a': [1, 2]}\nprint(FINAL(x))\nFINAL_VAR('x')\n"
        "FINAL_VAR('missing')\nnothing = None\nFINAL_VAR('nothing')"
    )
    assert repl.finals == ["{'a': [1, 2]}", "{'a': [1, 2]}"]


def test_final_var_gives_the_text_of_either_marker(session):
    assert session().out("x = 5\nprint(FINAL_VAR('x'), FINAL_VAR('y'), FINAL_VAR('not a name'))") == (
        "FINAL(5) FINAL_VAR(y) FINAL_VAR(not a name)\n"
    )


def test_show_vars_lists_what_exists_at_the_call(session):
    repl = session({"ask": len}, {"context": "c"})
    repl.out("first = 1")
    shown = repl.out(
        "second = 2\ndef inner():\n    hidden = 3\n    return SHOW_VARS()\nprint(inner())\nthird = 4"
    )
    assert shown == "['FINAL', 'FINAL_VAR', 'SHOW_VARS', 'ask', 'context', 'first', 'inner', 'second']\n"


def test_variables_are_shown_shortened(session):
    repl = session(variables={"context": "c" * 10_000})
    repl.out("n = 1\nwords = ['w' * 1000] * 1000\ntable = {'k': (1,)}")
    shown = repl.variables()
    assert set(shown) == {"context", "n", "words", "table"}
    assert shown["n"] == "1" and shown["table"] == "{'k': (1,)}"
    assert all(len(text) <= 500 for text in shown.values())


def test_files_environment_and_network_are_out_of_reach(session):
    repl = session()
    for code in (
        "open('/etc/passwd').read()",
        "import os\nos.listdir('/')",
        "import os\nprint(os.environ)",
        "import socket",
        "import subprocess",
        "__import__('os')",
    ):
        assert repl.run(code).error is not None, code


def test_the_code_runs_in_another_process(session):
    repl = session()
    repl.out("x = 1")
    assert repl.box._pid not in (None, os.getpid())


def test_string_constants_can_be_imported(session):
    assert session().out(
        "import string\nfrom string import digits\nprint(string.ascii_lowercase[:3], digits)"
    ) == ("abc 0123456789\n")


# Limits


def test_a_block_that_computes_too_long_is_stopped_and_earlier_state_is_rebuilt(session):
    calls = []
    repl = session({"ask": lambda: calls.append(1) or "answer"}, {"context": "text"}, block_seconds=0.3)
    repl.out("x = ask()\nFINAL('recorded once')")
    outcome = repl.run("y = 1\nwhile True:\n    pass")
    assert outcome.error.startswith("TimeoutError: this block computed for more than 0.3 s")
    assert "rebuilt" in outcome.trace
    assert repl.out("print(x, context)") == "answer text\n"
    assert repl.run("print(y)").error == "NameError: name 'y' is not defined"
    assert calls == [1] and repl.finals == ["recorded once"]


def test_waiting_for_a_host_function_is_not_charged(session):
    repl = session({"ask": lambda: time.sleep(0.4) or "late"}, block_seconds=0.2)
    assert repl.out("a = ask()\nb = ask()\nprint(a, b)") == "late late\n"


@pytest.mark.parametrize("code", ["x = 'a' * 10**9", "x = [0]\nwhile True:\n    x = x + x"])
def test_a_block_that_takes_too_much_memory_is_stopped(session, code):
    repl = session(memory_bytes=30_000_000)
    repl.out("kept = 1")
    outcome = repl.run(code)
    assert outcome.error.startswith("MemoryError: this block needed more than 28 MiB")
    assert repl.out("print(kept)") == "1\n"


def test_endless_output_is_cut_and_counted(session):
    repl = session(block_seconds=0.3, output_chars=1000)
    outcome = repl.run("while True:\n    print('x' * 99)")
    assert outcome.stdout.startswith("x" * 99 + "\n") and len(outcome.stdout) < 1100
    assert "more chars were printed and dropped" in outcome.stdout


def test_the_memory_of_a_context_comes_on_top_of_the_limit(session):
    repl = session(variables={"context": "é" * 20_000_000}, memory_bytes=30_000_000)
    assert repl.out("print(len(context), context.count('e'))") == "20000000 0\n"


def test_a_context_that_does_not_fit_is_a_clear_error(session):
    with pytest.raises(SandboxError, match=r"raise SandboxLimits\.memory_bytes"):
        session(variables={"data": ["x" * 1000] * 100_000}, memory_bytes=10_000_000).run("1")


def test_too_many_host_calls_end_in_an_error(session):
    repl = session({"ask": lambda: 1}, host_calls=50)
    outcome = repl.run("while True:\n    ask()")
    assert "host calls" in outcome.error
    assert repl.out("print('alive')") == "alive\n"


def test_deep_nesting_and_recursion_are_ordinary_errors(session):
    repl = session()
    assert "SyntaxError" in repl.run("(" * 5000 + ")" * 5000).error
    outcome = repl.run("def f(n):\n    return f(n + 1)\nf(0)")
    assert outcome.error.startswith("RecursionError") and "loop" in outcome.trace


# A process that dies


def kill(session):
    os.kill(session.box._pid, signal.SIGKILL)


def test_killed_between_blocks(session):
    repl = session(variables={"context": "text"})
    repl.out("x = 1")
    kill(repl)
    outcome = repl.run("print('never')")
    assert outcome.error.startswith("SandboxCrashed") and "rebuilt" in outcome.trace
    assert repl.out("print(x, context)") == "1 text\n"


def test_killed_while_it_waits_for_a_host_function(session):
    repl = session({"ask": lambda: kill(repl)})
    repl.out("x = [1]\nx.append(2)")
    assert repl.run("y = ask()").error.startswith("SandboxCrashed")
    assert repl.out("print(x)") == "[1, 2]\n"


def test_killed_while_it_computes(session):
    started = threading.Event()
    repl = session({"ready": started.set})
    repl.out("x = 1")

    def killer():
        started.wait()
        kill(repl)

    thread = threading.Thread(target=killer)
    thread.start()
    outcome = repl.run("ready()\nwhile True:\n    pass")
    thread.join()
    assert outcome.error.startswith("SandboxCrashed")
    assert repl.out("print(x)") == "1\n"


def test_a_rebuilt_session_draws_the_same_random_numbers(session):
    repl = session()
    drawn = repl.out("import random\nx = random.random()\nprint(x)")
    kill(repl)
    repl.run("1")
    assert repl.out("print(x)") == drawn
    assert session().out("import random\nprint(random.random())") != drawn


def test_what_cannot_be_rebuilt_is_said_to_be_lost(session):
    answers = iter([1, 1])
    repl = session({"ask": lambda: next(answers)}, {"context": "text"}, block_seconds=0.5)
    repl.out("import random\nx = 0\nif random.random() >= 0:\n    x = ask()")
    repl.box._journal[0].answers.clear()
    kill(repl)
    outcome = repl.run("1")
    assert "are lost; only `context` and `answer` are left" in outcome.trace
    assert repl.run("print(x)").error == "NameError: name 'x' is not defined"
    assert repl.out("print(context)") == "text\n"


def test_failed_blocks_are_rebuilt_too(session):
    repl = session()
    repl.run("x = 1\nraise ValueError('after the assignment')")
    kill(repl)
    repl.run("1")
    assert repl.out("print(x)") == "1\n"


# Deadlines and the event loop


def test_a_deadline_stops_a_computing_block_and_a_waiting_one(session):
    release = threading.Event()
    repl = session({"ask": release.wait}, block_seconds=60)
    for code in ("while True:\n    pass", "ask()"):
        with pytest.raises(DeadlineExceeded):
            repl.run(code, deadline=0.1)
    release.set()
    assert repl.out("print('usable again')") == "usable again\n"


def test_many_sandboxes_wait_at_once_without_a_thread_each():
    async def one(number, barrier):
        async def ask():
            await barrier.wait()
            return number

        box = Sandbox({"ask": ask}, {}, asynchronous=True)
        outcome = await box.run("print(ask())")
        await box.close()
        return outcome.stdout

    class AsyncBarrier:
        def __init__(self, parties):
            self.left, self.open = parties, asyncio.Event()

        async def wait(self):
            self.left -= 1
            if not self.left:
                self.open.set()
            await self.open.wait()

    async def main():
        before = threading.active_count()
        barrier = AsyncBarrier(40)
        tasks = [asyncio.create_task(one(number, barrier)) for number in range(40)]
        outputs = await asyncio.gather(*tasks)
        return outputs, threading.active_count() - before

    outputs, more_threads = asyncio.run(main())
    assert outputs == [f"{number}\n" for number in range(40)]
    assert more_threads < 20


def test_a_cancelled_block_leaves_no_worker_computing():
    async def main():
        box = Sandbox({}, {}, asynchronous=True)
        await box.run("x = 1")
        pid = box._pid
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(box.run("while True:\n    pass"), 0.2)
        await box.close()
        return pid

    pid = asyncio.run(main())
    for _ in range(1000):
        if not computing(pid):
            return
        time.sleep(0.01)
    pytest.fail(f"worker {pid} is still there 10 s after its block was cancelled")


def computing(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
