"""Worker pools: the sandbox processes of this host process, started on first use."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from concurrent.futures import ThreadPoolExecutor

from pydantic_monty import AsyncMonty, Monty

MAX_WORKERS = 1024
"""Worker processes of this host process; each live RLM node holds one while it runs (about 8 MiB)."""


class SandboxError(RuntimeError):
    """A sandbox could not be started."""


class Pools:
    """The worker pools of one process.

    The threads that talk to the workers do not survive a fork, so a process that was forked from one that had
    pools cannot have any; a process started by spawn can.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid: int | None = None
        self._sync: Monty | None = None
        self._async: AsyncMonty | None = None

    def _check_process(self) -> None:
        if self._pid not in (None, os.getpid()):
            raise SandboxError(
                "this process was forked from one that runs sandboxes, and cannot run any itself; start it "
                "with the spawn method of multiprocessing, or fork before the first sandbox"
            )
        self._pid = os.getpid()

    def sync(self) -> Monty:
        with self._lock:
            self._check_process()
            if self._sync is None:
                self._sync = Monty(max_processes=MAX_WORKERS)
                self._sync.__enter__()
            return self._sync

    def asynchronous(self) -> AsyncMonty:
        with self._lock:
            self._check_process()
            if self._async is None:
                # Entered on a loop of its own, so that every loop of the process can use the one pool.
                with ThreadPoolExecutor(1) as thread:
                    self._async = thread.submit(
                        asyncio.run, _entered(AsyncMonty(max_processes=MAX_WORKERS))
                    ).result()
            return self._async

    def close(self) -> None:
        with self._lock:
            if self._sync is not None and self._pid == os.getpid():
                self._sync.__exit__(None, None, None)
                self._sync = None


async def _entered(pool: AsyncMonty) -> AsyncMonty:
    return await pool.__aenter__()


POOLS = Pools()
atexit.register(POOLS.close)
