"""Run code in another process with hard limits on time, memory and output."""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from aici_vllm.agents.coding.worker import CODE_FILENAME

WORKER = Path(__file__).with_name("worker.py")
MAX_OUTPUT = 1 << 20
MAX_REPORT = 32 << 20
CHUNK = 1 << 16
EXIT_GRACE = 1.0


@dataclass(frozen=True)
class ProcessResult:
    """How a run ended: captured output, the worker's report (None without one), and why there is none."""

    stdout: str
    report: dict[str, Any] | None
    timed_out: bool
    exit_code: int | None


def run_in_process(
    code: str,
    *,
    prefix: str = "",
    suffix: str = "",
    timeout: float = 60.0,
    memory_limit: int | None = None,
    capture_stdout: bool = True,
    last_value: bool = False,
) -> ProcessResult:
    """Run prefix, code and suffix in a fresh interpreter and wait for at most `timeout` seconds.

    The process starts in an empty temporary folder, without this process's environment variables, in a
    process group of its own that is killed at the end. So is, on Linux, what left the group, as long as it
    still has the environment it was given. `memory_limit` is in bytes of
    address space. Output beyond 1 MiB is dropped. With `last_value` the report holds the last expression's
    value instead of the names the code defined.
    """
    parts = [("__prefix", prefix), (CODE_FILENAME, code), ("__suffix", suffix)]
    job = {
        "parts": [part for part in parts if part[1]],
        "memory_limit": memory_limit,
        "last_value": last_value,
    }
    with tempfile.TemporaryDirectory(prefix="aicode-", ignore_cleanup_errors=True) as folder:
        process, channel = _start(folder, capture_stdout)
        exchange = _Exchange(process, channel, json.dumps(job).encode())
        try:
            finished = exchange.run(time.monotonic() + timeout)
            exit_code = _exit_code(process) if finished and exchange.report is None else None
        finally:
            _kill_group(process)
            _kill_strays(folder)
            exchange.close()
    return ProcessResult(exchange.text(), exchange.report, not finished, exit_code)


def _start(folder: str, capture_stdout: bool) -> tuple[subprocess.Popen[bytes], int]:
    channel, worker_end = os.pipe()
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
    }
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", str(WORKER), str(worker_end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if capture_stdout else None,
            stderr=subprocess.STDOUT if capture_stdout else None,
            cwd=folder,
            env=environment,
            pass_fds=(worker_end,),
            start_new_session=True,
            bufsize=0,
        )
    except BaseException:
        os.close(channel)
        raise
    finally:
        os.close(worker_end)
    return process, channel


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # The group exists until its leader is waited for, so its number cannot mean another group yet.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _kill_strays(folder: str) -> None:
    """Kill processes of the run that left its group; their environment names the run's folder."""
    mark = f"HOME={folder}".encode()
    killed: set[Path] = set()
    while strays := {entry for entry in Path("/proc").glob("[0-9]*") if _has(entry, mark)} - killed:
        for entry in strays:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(entry.name), signal.SIGKILL)
        # Once more, for those that they started meanwhile.
        killed |= strays


def _has(process: Path, variable: bytes) -> bool:
    """Whether this process was started with the variable; not for one that is over, or is another user's."""
    try:
        return variable in (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code (minus the signal's number) of a process that closed its channel; None if it lives on."""
    with open(os.pidfd_open(process.pid), "rb") as watched:
        ended, _, _ = select.select([watched], [], [], EXIT_GRACE)
    if not ended:
        return None
    # WNOWAIT keeps the group's number taken until _kill_group has used it.
    status = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    if status is None:
        return None
    return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status


class _Exchange:
    """The pipes between this process and the worker: the job in, output and the report out."""

    def __init__(self, process: subprocess.Popen[bytes], channel: int, job: bytes) -> None:
        self.report: dict[str, Any] | None = None
        self._job = memoryview(job)
        self._output, self._dropped, self._report = bytearray(), 0, bytearray()
        self._channel = channel
        self._input: IO[bytes] = process.stdin  # type: ignore[assignment]
        self._stdout: IO[bytes] | None = process.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._input, selectors.EVENT_WRITE)
        self._selector.register(channel, selectors.EVENT_READ)
        os.set_blocking(self._input.fileno(), False)
        if self._stdout is not None:
            self._selector.register(self._stdout, selectors.EVENT_READ)
            os.set_blocking(self._stdout.fileno(), False)

    def run(self, deadline: float) -> bool:
        """Move bytes until the report is there or the worker closed its channel; False when time ran out."""
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                self._read_output()
                return False
            for key, _ in self._selector.select(remaining):
                if key.fileobj is self._input:
                    self._write_job()
                elif key.fileobj is self._stdout:
                    self._read_output()
                elif self._read_report():
                    self._read_output()
                    return True

    def text(self) -> str:
        """The captured output, with a note where it was cut."""
        text = self._output.decode("utf-8", errors="replace")
        return text + (f"\n... ({self._dropped} bytes of output dropped)" if self._dropped else "")

    def close(self) -> None:
        """Close every pipe."""
        self._selector.close()
        os.close(self._channel)
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        if self._stdout is not None:
            self._stdout.close()

    def _write_job(self) -> None:
        try:
            sent = os.write(self._input.fileno(), self._job[:CHUNK])
        except BlockingIOError:
            return
        except BrokenPipeError:
            sent = len(self._job)
        self._job = self._job[sent:]
        if not self._job:
            self._selector.unregister(self._input)
            self._input.close()

    def _read_output(self) -> None:
        """Take what is there, at most one pipe's worth and a bit, so that a flood cannot hold the loop."""
        for _ in range(4):
            try:
                data = os.read(self._stdout.fileno(), CHUNK) if self._stdout is not None else b""
            except BlockingIOError:
                return
            if not data:
                if self._stdout is not None and self._stdout in self._selector.get_map():
                    self._selector.unregister(self._stdout)
                return
            room = MAX_OUTPUT - len(self._output)
            self._output += data[: max(0, room)]
            self._dropped += max(0, len(data) - max(0, room))

    def _read_report(self) -> bool:
        """Take a piece of the report; True when it is complete, too long, or will not come."""
        data = os.read(self._channel, CHUNK)
        self._report += data
        if self._report.endswith(b"\n"):
            with contextlib.suppress(ValueError):
                found = json.loads(self._report)
                self.report = found if isinstance(found, dict) else None
            return True
        return not data or len(self._report) > MAX_REPORT
