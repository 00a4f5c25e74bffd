"""The process that runs code: limits, capture, and that nothing outlives it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from aici_vllm.agents.coding.process import MAX_OUTPUT, run_in_process


def test_output_and_names_come_back() -> None:
    result = run_in_process("import sys\nprint('out')\nprint('err', file=sys.stderr)\nx = [1, 2]")
    assert not result.timed_out
    assert sorted(result.stdout.split()) == ["err", "out"]
    assert result.report is not None
    assert result.report["error"] is None
    assert result.report["output"]["x"] == {"literal": True, "text": "[1, 2]"}


def test_an_endless_loop_is_killed() -> None:
    result = run_in_process("print('before', flush=True)\nwhile True: pass", timeout=1)
    assert result.timed_out
    assert result.report is None
    assert result.stdout == "before\n"


def test_code_that_ignores_signals_is_killed() -> None:
    code = "import signal\nfor s in (2, 15): signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
    assert run_in_process(code, timeout=1).timed_out


def alive(pid: int) -> bool:
    """Whether the process runs; one that is dead but not yet collected by its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("leaves_group", [False, True])
@pytest.mark.parametrize("ending", ["", "\nwhile True: pass", "\nos._exit(3)"])
def test_children_are_killed_too(ending: str, leaves_group: bool) -> None:
    code = (
        f"import os, subprocess\np = subprocess.Popen(['sleep', '600'], start_new_session={leaves_group})\n"
        f"print(p.pid, flush=True){ending}"
    )
    result = run_in_process(code, timeout=2)
    pid = int(result.stdout.split()[0])
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)


def test_a_forked_child_does_not_hold_the_result_back() -> None:
    code = "import os, time\nif os.fork() == 0: time.sleep(600)\nx = 1"
    result = run_in_process(code, timeout=30)
    assert not result.timed_out
    assert result.report is not None


def test_a_process_that_leaves_without_a_report() -> None:
    result = run_in_process("import os\nos._exit(7)")
    assert (result.report, result.timed_out, result.exit_code) == (None, False, 7)
    result = run_in_process("import os\nos.kill(os.getpid(), 11)")
    assert result.exit_code == -signal.SIGSEGV


def test_the_memory_limit() -> None:
    result = run_in_process("x = bytearray(1 << 30)", memory_limit=512 << 20)
    assert result.report is not None
    assert result.report["error"]["type"] == "MemoryError"


def test_a_flood_of_output_is_cut() -> None:
    result = run_in_process("for _ in range(40): print('x' * 100_000)")
    assert result.report is not None
    kept, note = result.stdout.rsplit("\n... (", 1)
    assert len(kept) == MAX_OUTPUT
    assert note == f"{40 * 100_001 - MAX_OUTPUT} bytes of output dropped)"
    assert run_in_process("while True: print('x' * 1000)", timeout=1).timed_out


def test_a_large_program_and_a_large_report() -> None:
    result = run_in_process("x = '" + "a" * 300_000 + "'\ny = 'b' * 90_000")
    assert result.report is not None
    assert not result.report["output"]["x"]["literal"]
    assert result.report["output"]["y"]["text"] == repr("b" * 90_000)


def test_the_environment_is_not_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hidden")
    result = run_in_process("import os\nprint(os.environ.get('SECRET_KEY'), os.getcwd(), os.environ['HOME'])")
    secret, folder, home = result.stdout.split()
    assert secret == "None"
    assert folder == home
    assert not os.path.exists(folder)


def test_there_is_no_input() -> None:
    result = run_in_process("input()")
    assert result.report is not None
    assert result.report["error"]["type"] == "EOFError"


def test_prefix_and_suffix_share_the_module() -> None:
    result = run_in_process("y = x + 1", prefix="x = 1", suffix="z = y * 10")
    assert result.report is not None
    assert {name: item["text"] for name, item in result.report["output"].items()} == {
        "x": "1",
        "y": "2",
        "z": "20",
    }


def test_the_module_behaves_like_a_program() -> None:
    code = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport pickle, threading\n"
        "@dataclass\nclass P:\n    x: int\nassert pickle.loads(pickle.dumps(P(1))) == P(1)\n"
        "def late():\n    import time; time.sleep(0.05); print('thread')\n"
        "threading.Thread(target=late).start()\n"
        "if __name__ == '__main__': print('main')"
    )
    result = run_in_process(code)
    assert result.report is not None
    assert result.report["error"] is None, result.report
    assert result.stdout.split() == ["main", "thread"]


def test_closed_and_replaced_streams() -> None:
    assert run_in_process("import sys\nsys.stdout.close()").report is not None
    assert run_in_process("import sys\nsys.stdout = None").report is not None


def test_output_may_pass_through(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_in_process("print('seen')", capture_stdout=False).stdout == ""
    assert capfd.readouterr().out == "seen\n"
