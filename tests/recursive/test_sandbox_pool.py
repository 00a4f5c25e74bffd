"""Worker pools, one of each kind per process."""

import asyncio
import subprocess
import sys

from aici_vllm.recursive.sandbox_pool import Pools

FORKING = """
import os
from aici_vllm.recursive import Sandbox
from aici_vllm.recursive.chat import run_to_end

def sandboxed(code):
    box = Sandbox({}, {})
    try:
        return run_to_end(box.run(code)).stdout.strip()
    except RuntimeError as error:
        return str(error)

print(sandboxed("print('parent')"), flush=True)
child = os.fork()
if not child:
    print(sandboxed("print('child')"), flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
print(status, sandboxed("print('parent again')"), flush=True)
"""


def test_one_pool_of_each_kind_is_made_and_used_again():
    pools = Pools()
    assert pools.sync() is pools.sync()
    assert pools.asynchronous() is pools.asynchronous()
    pools.close()


def test_one_pool_serves_several_event_loops():
    pools = Pools()

    async def compute():
        async with pools.asynchronous().checkout() as session:
            return await session.feed_run("1 + 1")

    assert [asyncio.run(compute()), asyncio.run(compute())] == [2, 2]


def test_a_forked_process_is_refused_with_what_to_do_instead():
    shown = subprocess.run(
        [sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=60, check=True
    )
    parent, child, again = shown.stdout.splitlines()
    assert (parent, again) == ("parent", "0 parent again")
    assert "was forked" in child and "spawn" in child
