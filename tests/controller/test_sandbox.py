"""Scripts in the sandbox: what they write, what they see, how they fork, wait and fail."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aici_vllm.controller.branch import Next
from aici_vllm.controller.group import Group
from aici_vllm.controller.limits import Limits
from aici_vllm.controller.program import NativeProgram
from aici_vllm.controller.sandbox import SandboxPool
from tests.controller.fake_engine import FakeEngine
from tests.controller.scripts import VOCABULARY, new_group, run_script, script


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    pool = SandboxPool(Limits())
    yield pool
    pool.close()


def texts(engine: FakeEngine) -> list[str]:
    return [engine.text(branch) for branch in engine.group.branches]


def log(engine: FakeEngine) -> str:
    return str(engine.group.root.log)


def error(engine: FakeEngine) -> str | None:
    assert engine.group.root.finish_reason == "fail"
    return engine.group.root.error


def processes() -> list[int]:
    """The sandbox processes that this process has started."""
    children = [
        int(pid)
        for listing in Path(f"/proc/{os.getpid()}/task").glob("*/children")
        for pid in listing.read_text().split()
    ]
    return [pid for pid in children if "monty" in _name(pid)]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "ended meanwhile"


def until(condition: Callable[[], bool], pool: SandboxPool, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        pool.wait(0.01)


# What scripts write.

FORKING = """
async def main():
    await aici.FixedTokens("say hello in")
    branch = await aici.fork(3)
    if branch == 0:
        first, second = await aici.wait_vars("one", "two")
        await aici.FixedTokens(f" both: {first.decode()}{second.decode()}.")
        await aici.gen_tokens(max_tokens=2, regex="[k-m]*")
    else:
        name = ["zero", "one", "two"][branch]
        await aici.FixedTokens(f" tongue {branch}")
        await aici.gen_tokens(regex=f"<{branch}>[a-c]{{2}}", store_var=name)
"""


@pytest.mark.parametrize(
    "imported", ["import pyaici.server as aici", "import aici", "from aici_vllm import aici"]
)
@pytest.mark.parametrize("started", ["aici.start(main())", "aici.start(main)"])
def test_forks_and_waits_under_every_import(pool: SandboxPool, imported: str, started: str) -> None:
    engine = run_script(pool, f"{imported}\n{FORKING}\n{started}\n")
    assert texts(engine) == [
        "say hello in both: <1>aa<2>aa.kk",
        "say hello in tongue 1<1>aa",
        "say hello in tongue 2<2>aa",
    ]
    assert engine.group.variables.snapshot() == {"one": b"<1>aa", "two": b"<2>aa"}
    assert [branch.finish_reason for branch in engine.group.branches] == ["stop"] * 3


def test_label_takes_text_back(pool: SandboxPool) -> None:
    engine = run_script(
        pool,
        script(
            """
            await aici.FixedTokens("hello")
            label = aici.Label()
            await aici.FixedTokens(" one")
            print(label.text_since(), label.tokens_since(), label.ptr)
            await aici.FixedTokens(" two", following=label)
            later = aici.Label()
            await aici.FixedTokens("", following=label)
            try:
                later.text_since()
            except ValueError as error:
                print("gone:", error)
            """
        ),
    )
    assert texts(engine) == ["hello"]
    assert " one [32, 111, 110, 101] 2\n" in log(engine)
    assert "gone: this label is gone" in log(engine)


SAME_BOTH_WAYS = {
    "words": """
        prompt = await aici.GetPrompt()
        print(prompt, aici.get_prompt_len(), aici.get_tokens())
        print(aici.tokenize("hello world"), aici.detokenize([104, 256, 258]), aici.eos_token())
        print(aici.token_repr(65), aici.tokens_repr([65, 258]), aici.get_config("fork"), aici.get_config("x"))
        aici.set_var("a", "1")
        aici.append_var("a", b"2")
        print(aici.get_var("a"), aici.get_var("b"), aici.fork_supported(), aici.backtrack_supported())
        aici.check_vars({"a": "12"})
        try:
            aici.check_var("a", "3")
        except AssertionError as error:
            print(error)
        print(aici.controller_arg())
        await aici.FixedTokens("end")
    """,
    "generation": """
        text = await aici.gen_text(regex="[b-d]+x?", max_tokens=4, store_var="v")
        print(text, aici.get_var("v"))
        print(await aici.gen_tokens(options=["hello", "he", "hx"]))
        print(await aici.gen_tokens(max_tokens=0))
        print(await aici.gen_text(regex="ab(c|d)", stop_at="b"))
        aici.log_level = 0
        print(await aici.gen_text(json_schema={"type": "boolean"}))
    """,
    "constraints": """
        word = aici.RegexConstraint("a(b|c)+")
        token = aici.ConstrainedToken(lambda: word)
        for _ in range(3):
            print(await token, token.finished, token.value, word.eos_allowed(), word.eos_forced())
        print(word.token_allowed(98), word.token_allowed(97))
        print(await aici.gen_text(constraint=aici.ChooseConstraint(["x", "y"])))
    """,
    "decisions": """
        await aici.FixedTokens("abc")
        mask = aici.all_tokens()
        mask.set_all(False)
        mask[120] = True
        mask[121] = True
        mask[121] = False
        print(mask[120], mask[121], mask.num_set())
        splice = aici.Splice(backtrack=1, ff_tokens=[65, 66])
        splice.add_splice(aici.Splice(backtrack=3, ff_tokens=[67]))
        index = await aici.fork(
            [
                aici.Branch(splices=[splice]),
                aici.Branch(sample_mask=mask),
                aici.Branch(
                    sample_mask=mask,
                    splices=[aici.Splice(when_sampled=[120], backtrack=1, ff_tokens=[90])],
                ),
            ]
        )
        print(index, aici.get_tokens())
        full = aici.all_tokens()
        print(full.num_set(), full[0])
    """,
    "errors": """
        for bad in (3, None, ["a"]):
            try:
                await aici.FixedTokens(bad)
            except TypeError as error:
                print("TypeError", error)
        for bad in ("(", "[", "a{"):
            try:
                await aici.gen_text(regex=bad)
            except ValueError as error:
                print("ValueError", error)
        await aici.gen_tokens(max_tokens=1)
        raise LookupError("lost")
    """,
    "exception in a branch": """
        await aici.FixedTokens("x")
        branch = await aici.fork(2)
        if branch == 1:
            raise ValueError("only here")
        await aici.gen_tokens(max_tokens=1)
    """,
    "deadlock": """
        await aici.FixedTokens("x")
        await aici.fork(2)
        await aici.wait_vars("a", "b")
    """,
    "stop": """
        await aici.FixedTokens("x")
        await aici.Noop()
        await aici.StopToken()
        print("never")
    """,
}


@pytest.mark.parametrize("body", SAME_BOTH_WAYS.values(), ids=SAME_BOTH_WAYS)
def test_same_as_plain_python(pool: SandboxPool, body: str) -> None:
    source = script(body)
    engine = run_script(pool, source, new_group(arg="the arg"))
    native = run_natively(source, new_group(arg="the arg"))
    assert texts(engine) == texts(native)
    assert engine.group.variables.snapshot() == native.group.variables.snapshot()
    assert engine.steps == native.steps
    for ours, plain in zip(engine.group.branches, native.group.branches, strict=True):
        assert ours.finish_reason == plain.finish_reason
        assert (ours.error or "").split(" (line")[0] == (plain.error or "")
        assert str(ours.log).split("Traceback")[0] == str(plain.log).split("Traceback")[0]


def run_natively(source: str, group: Group) -> FakeEngine:
    """The same script as a coroutine function in this process."""
    from aici_vllm import aici

    aici.log_level = 1
    source = source.replace("import aici\n", "from aici_vllm import aici\n").replace("aici.start(main())", "")
    names: dict[str, Any] = {}
    exec(compile(source, "<script>", "exec"), names)
    engine = FakeEngine(group)
    engine.run(lambda branch: NativeProgram(names["main"], group.arg, branch))
    return engine


def test_own_next_token(pool: SandboxPool) -> None:
    source = """
import aici

class Pick:
    def __init__(self, token):
        self.token = token

    def mid_process(self):
        mask = aici.TokenSet()
        mask[self.token] = True
        return aici.MidProcessResult.bias(mask)

    def post_process(self, backtrack, tokens):
        self.value = (backtrack, tokens, self.finished)

async def main():
    for token in (104, 105, 256):
        pick = Pick(token)
        print(await pick, pick.curr_tokens)

aici.test(main())
"""
    engine = run_script(pool, source)
    assert texts(engine) == ["hi"]
    assert (
        log(engine) == "(0, [104], False) [104]\n(0, [105], False) [105]\n(0, [256], True) [256]\nTEST OK\n"
    )


def test_identifiers(pool: SandboxPool) -> None:
    body = """
    lexer = aici.DynamicLexer("")
    lexer.add("fib")
    token = aici.ConstrainedToken(lambda: lexer.constraint())
    constraint = lexer.constraint()
    print(constraint.token_allowed(102), constraint.token_allowed(103))
    lexer.add("go")
    print(constraint.token_allowed(103))
    await token
    """
    assert log(run_script(pool, script(body))) == "True False\nTrue\n"


def test_forked_constraints_go_their_own_ways(pool: SandboxPool) -> None:
    body = """
    word = aici.RegexConstraint("ab|cd|ef")
    index = await aici.fork(3)
    word.append_token([97, 99, 101][index])
    print(await aici.gen_text(constraint=word))
    """
    engine = run_script(pool, script(body))
    assert texts(engine) == ["b", "d", "f"]


def test_prints_stand_between_the_branch_s_own_lines(pool: SandboxPool) -> None:
    body = """
    print("before", end="; ")
    await aici.FixedTokens("a")
    import sys
    print("to stderr", file=sys.stderr)
    await aici.gen_tokens(max_tokens=1, regex="b")
    print("after")
    """
    assert log(run_script(pool, script(body))) == "before; FIXED 'a'\nto stderr\nGEN: 'b'\nafter\n"


def test_function_that_takes_the_argument(pool: SandboxPool) -> None:
    source = "import aici\nasync def main(arg):\n    await aici.FixedTokens(arg)\naici.start(main)\n"
    assert texts(run_script(pool, source, new_group(arg="hello"))) == ["hello"]


def test_gathered_awaits_happen_one_after_the_other(pool: SandboxPool) -> None:
    body = """
    import asyncio
    print(await asyncio.gather(aici.FixedTokens("a"), aici.gen_text(regex="b"), aici.FixedTokens("c")))
    """
    engine = run_script(pool, script(body))
    assert texts(engine) == ["abc"]
    assert log(engine).endswith("[[97], 'b', [99]]\n")


@pytest.mark.parametrize("constraint", ["regex='ab[c-e]{3}'", "constraint=word"])
def test_generations_that_were_asked_for_before_a_fork_are_each_branch_s_own(
    pool: SandboxPool, constraint: str
) -> None:
    body = f"""
    import asyncio
    word = aici.RegexConstraint("ab[c-e]{{3}}")
    forks = (aici.fork(2), aici.fork(2))
    print(await asyncio.gather(*forks, aici.gen_text({constraint}), aici.FixedTokens("f")))
    print(word.eos_allowed())
    """
    engine = run_script(pool, script(body))
    assert texts(engine) == ["abcccf"] * 4
    moved = "constraint" in constraint
    for branch in engine.group.branches:
        assert str(branch.log).endswith(f", 'abccc', [102]]\n{moved}\n")


def test_a_variable_named_again_is_copied_for_each_name_up_to_a_size(pool: SandboxPool) -> None:
    body = """
    aici.set_var("a", "1")
    aici.set_var("long", "x" * 500_000)
    print(await aici.wait_vars("a", "a"), len((await aici.wait_vars("long", "long"))[1]))
    await aici.wait_vars("long", "long", "long")
    """
    engine = run_script(pool, script(body))
    assert error(engine) == (
        "ValueError: the values of one call may hold 1048576 characters, not 1500003 (line 8)"
    )
    assert log(engine).startswith("[b'1', b'1'] 500000\n")


# How scripts fail.


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import aici\nx = 1\n", "the script never called aici.start(...)"),
        (
            script("aici.FixedTokens('a')"),
            "the controller awaited nothing, so it generated nothing; is an `await` missing?",
        ),
        (
            "import aici\naici.start(3)\n",
            "TypeError: aici.start() takes an async function or its coroutine, not int (line 2)",
        ),
        (
            "import aici\ndef main():\n    pass\naici.start(main)\n",
            "TypeError: aici.start() takes an async function; the one it got returned no coroutine",
        ),
        (
            script("aici.start(main)"),
            "RuntimeError: aici.start() can be called once only (line 5)",
        ),
        (script("await nothing()"), "NameError: name 'nothing' is not defined (line 5)"),
        (
            script("await aici.nothing()"),
            "AttributeError: 'module' object has no attribute 'nothing' (line 5)",
        ),
        (
            script("await aici.FixedTokens()"),
            "TypeError: FixedTokens(): missing a required argument: 'text' (line 5)",
        ),
        (script("await aici.fork(0)"), "ValueError: fork() needs at least 1 branch (line 5)"),
        (
            script("await aici.gen_text(max_tokens=9999)"),
            "ValueError: max_tokens=9999 is more than the model's context of 1000 tokens (line 5)",
        ),
        (
            script("len(aici.TokenSet())"),
            "TypeError: object of type 'TokenSet' has no len() here: the vocabulary has "
            "aici.all_tokens().num_set() tokens (line 5)",
        ),
        (script("x = sorted([1], key=aici.token_repr)\nawait x"), None),
        (
            script("await aici.GetPrompt()\nawait aici.GetPrompt()"),
            "RuntimeError: GetPrompt() must be the first thing a controller awaits (line 6)",
        ),
        (script("import time\nawait aici.FixedTokens(str(time.time()))"), None),
        ("x = (\n", "SyntaxError: unexpected EOF while parsing (line 2)"),
        ("class A(B): pass\n", None),
    ],
)
def test_errors_name_the_script_s_line(pool: SandboxPool, source: str, message: str | None) -> None:
    found = error(run_script(pool, source))
    if message is not None:
        assert found == message
    else:
        assert found is not None and "(line " in found and "monty" not in found


def test_traceback_in_the_logs_is_the_script_s_own(pool: SandboxPool) -> None:
    source = """import aici

def deeper():
    aici.set_var('a', 3)

async def main():
    deeper()

aici.start(main)
"""
    engine = run_script(pool, source)
    assert error(engine) == "TypeError: a variable holds str or bytes, not int (line 4)"
    assert log(engine) == (
        "Traceback (most recent call last):\n"
        '  File "<script>", line 7, in main\n'
        "    deeper()\n"
        '  File "<script>", line 4, in deeper\n'
        "    aici.set_var('a', 3)\n"
        "TypeError: a variable holds str or bytes, not int\n"
    )


# Workers.


def test_waiting_scripts_hold_no_process(pool: SandboxPool) -> None:
    body = """
    await aici.FixedTokens("a")
    (name,) = await aici.wait_vars("name")
    await aici.FixedTokens(name.decode())
    """
    groups = [new_group() for _ in range(200)]
    for group in groups:
        group.start(lambda branch: pool.program(script(body), branch))

    def advance(wanted: Next) -> bool:
        for group in groups:
            group.poll()
        return all(group.root.next is wanted for group in groups)

    until(lambda: advance(Next.WAIT), pool)
    assert len(processes()) <= 10
    for number, group in enumerate(groups):
        group.variables.set("name", str(number).encode())
        group.wake()
    until(lambda: advance(Next.END), pool)
    for number, group in enumerate(groups):
        assert VOCABULARY.detokenize(group.root.sequence.tokens) == f"pa{number}".encode()


SPINS = "import aici\nprint('spinning')\nwhile True: pass\naici.start(3)"
LONG = Limits(init_seconds=100)


@pytest.fixture
def patient_pool() -> Iterator[SandboxPool]:
    before = len(processes())
    pool = SandboxPool(LONG, workers=1)
    yield pool
    pool.close()
    assert len(processes()) == before


def test_killed_process_costs_one_branch(patient_pool: SandboxPool) -> None:
    known = set(processes())
    group = new_group(LONG)
    group.start(lambda branch: patient_pool.program(SPINS, branch))
    until(lambda: "spinning" in str(group.root.log), patient_pool)
    (pid,) = set(processes()) - known
    os.kill(pid, signal.SIGKILL)
    until(lambda: bool(group.poll()), patient_pool)
    assert group.root.error is not None and group.root.error.startswith("the sandbox process died")
    assert patient_pool.restarts == 1
    assert texts(run_script(patient_pool, script("await aici.FixedTokens('fine')"))) == ["fine"]


def test_late_turn_makes_room(patient_pool: SandboxPool) -> None:
    group = new_group(LONG)
    group.start(lambda branch: patient_pool.program(SPINS, branch))
    until(lambda: "spinning" in str(group.root.log), patient_pool)
    assert texts(run_script(patient_pool, script("await aici.FixedTokens('beside')"))) == ["beside"]
    assert group.root.next is Next.THINK
    group.abort()
    assert group.root.finish_reason == "abort"


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
def test_process_lost_between_turns_costs_nothing(sent: signal.Signals) -> None:
    known = set(processes())
    # Without late turns no process is replaced but the lost one.
    pool = SandboxPool(Limits(init_seconds=0.3), workers=1, late_workers=0)
    assert texts(run_script(pool, script("await aici.FixedTokens('a')"))) == ["a"]
    (pid,) = set(processes()) - known
    os.kill(pid, sent)
    assert texts(run_script(pool, script("await aici.FixedTokens('b')"))) == ["b"]
    assert pool.restarts == 1
    pool.close()
    assert set(processes()) == known


def test_a_large_script_is_not_late_because_it_is_large() -> None:
    # Loading and dumping this list takes several times the limit; the script itself does nothing.
    pool = SandboxPool(Limits(step_seconds=0.01, late_steps=1))
    body = """
    big = list(range(300000))
    await aici.FixedTokens("a")
    await aici.FixedTokens("b")
    await aici.FixedTokens(str(len(big)))
    """
    assert texts(run_script(pool, script(body))) == ["ab300000"]
    pool.close()


def priorities(pid: int) -> set[tuple[int, int]]:
    """Niceness and scheduling policy of each thread."""
    threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    return {(os.getpriority(os.PRIO_PROCESS, each), os.sched_getscheduler(each)) for each in threads}


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of threads")
def test_every_thread_of_a_process_lets_the_engine_go_first() -> None:
    known = set(processes())
    pool = SandboxPool(LONG, workers=1, late_workers=1)
    run_script(pool, script("await aici.FixedTokens('a')"))
    (pid,) = set(processes()) - known
    assert priorities(pid) == {(10, os.SCHED_OTHER)}
    group = new_group(LONG)
    group.start(lambda branch: pool.program(SPINS, branch))
    until(lambda: priorities(pid) == {(19, os.SCHED_IDLE)}, pool)
    group.abort()
    pool.close()


def test_closed_pool_ends_what_waits() -> None:
    pool = SandboxPool(LONG, workers=1, late_workers=0)
    groups = [new_group(LONG) for _ in range(2)]
    groups[0].start(lambda branch: pool.program(SPINS, branch))
    until(lambda: "spinning" in str(groups[0].root.log), pool)
    groups[1].start(lambda branch: pool.program(script("await aici.FixedTokens('a')"), branch))
    pool.close()
    for group in groups:
        group.poll()
        assert group.root.finish_reason == "fail"
    with pytest.raises(RuntimeError, match="the sandbox pool is closed"):
        pool.program(SPINS, groups[1].root).resume()


def test_counters(patient_pool: SandboxPool) -> None:
    run_script(patient_pool, script("await aici.FixedTokens('a')\nawait aici.FixedTokens('b')"))
    until(lambda: patient_pool.turns == 3, patient_pool)
    assert patient_pool.restarts == 0
    assert 0 < patient_pool.script_seconds < 5


def test_hung_process_costs_one_branch() -> None:
    known = set(processes())
    pool = SandboxPool(Limits(init_seconds=0.3), workers=1, late_workers=0)
    group = new_group()
    group.start(lambda branch: pool.program(SPINS, branch))
    until(lambda: "spinning" in str(group.root.log), pool)
    (pid,) = set(processes()) - known
    os.kill(pid, signal.SIGSTOP)
    until(lambda: bool(group.poll()), pool)
    assert group.root.error is not None and group.root.error.startswith("the sandbox process hung")
    assert texts(run_script(pool, script("await aici.FixedTokens('fine')"))) == ["fine"]
    pool.close()


def test_a_late_step_is_said_in_the_log_and_ends_well() -> None:
    limits = Limits(step_seconds=0.02, late_steps=1000)
    pool = SandboxPool(limits)
    body = """
    await aici.FixedTokens("a")
    for _ in range(3000000): pass
    await aici.FixedTokens("b")
    """
    engine = run_script(pool, script(body), new_group(limits))
    assert texts(engine) == ["ab"]
    assert "late: a step may take 20 ms of script time (1 of 1000)\n" in log(engine)
    assert pool.late_turns == 1
    pool.close()


def test_scripts_that_begin_never_take_all_processes() -> None:
    """Far more scripts that compute for ever before their first await than there are processes."""
    limits = Limits(init_seconds=100)
    pool = SandboxPool(limits, workers=1, late_workers=4)
    body = """
    await aici.FixedTokens("f")
    await aici.wait_vars("go")
    await aici.FixedTokens("ine")
    """
    begun = new_group(limits)
    begun.start(lambda branch: pool.program(script(body), branch))
    until(lambda: bool(begun.poll()) and begun.root.next is Next.WAIT, pool)
    groups = [new_group(limits) for _ in range(20)]
    for group in groups:
        group.start(lambda branch: pool.program(SPINS, branch))
    until(lambda: sum("spinning" in str(group.root.log) for group in groups) == 2, pool)
    begun.variables.set("go", b"")
    begun.wake()
    until(lambda: bool(begun.poll()) and begun.finished, pool)
    assert VOCABULARY.detokenize(begun.root.sequence.tokens) == b"pfine"
    assert sum("spinning" in str(group.root.log) for group in groups) == 2
    for group in groups:
        group.abort()
    pool.close()


def test_the_next_turn_of_a_late_script_comes_after_the_others() -> None:
    limits = Limits(init_seconds=100, step_seconds=0.02, late_steps=5000)
    pool = SandboxPool(limits, workers=1, late_workers=0)
    groups = {"late": new_group(limits), "prompt": new_group(limits)}
    for name, group in groups.items():
        body = f"""
        await aici.wait_vars("compute")
        for _ in range({3_000_000 if name == "late" else 1}): pass
        await aici.wait_vars("go")
        """
        group.start(partial(pool.program, script(body)))

    def all_wait() -> bool:
        return all(group.poll() or group.root.next is Next.WAIT for group in groups.values())

    def wake(variable: str) -> None:
        for group in groups.values():
            group.variables.set(variable, b"")
            group.wake()

    until(all_wait, pool)
    wake("compute")
    until(all_wait, pool)
    assert pool.late_turns == 1
    # While the only process is busy, both next turns come to wait for it.
    spinner = new_group(limits)
    spinner.start(lambda branch: pool.program(SPINS, branch))
    until(lambda: "spinning" in str(spinner.root.log), pool)
    wake("go")
    spinner.abort()
    order: list[str] = []

    def ended() -> bool:
        order.extend(name for name, group in groups.items() if group.poll() and group.finished)
        return len(order) == 2

    until(ended, pool)
    assert order == ["prompt", "late"]
    pool.close()
