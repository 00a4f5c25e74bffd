"""What must hold between any two calls of the scheduler."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm.v1.core.kv_cache_utils import get_block_hash, hash_block_tokens
from vllm.v1.request import RequestStatus

from tests.simulator.engine import Engine, EngineError, block_hash, lora_names
from tests.simulator.model import Prefix


class Checker:
    """The checks of one engine; it remembers the hashes that it has recomputed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._hashes: dict[Prefix, bytes] = {}

    def check(self) -> None:
        """Everything that holds at any time.

        Raises:
            EngineError: it does not.
        """
        self.check_owners()
        self.check_hashes()
        self.check_queues()

    def check_owners(self) -> None:
        """Every block is held as often as it is counted, and those nobody holds are free."""
        pool, scheduler = self._engine.pool, self._engine.scheduler
        held: Counter[int] = Counter()
        known = {*scheduler.requests, *(kept.request_id for kept in scheduler.checkpoints._requests.values())}
        for manager in self._managers():
            for request_id, blocks in manager.req_to_blocks.items():
                if blocks and request_id not in known:
                    raise EngineError(f"{request_id} is over and holds {len(blocks)} blocks")
                held.update(block.block_id for block in blocks)
            for pair in manager._pending_cow_copies:
                held.update(block.block_id for block in pair)
        free = {block.block_id for block in pool.free_block_queue.get_all_free_blocks()}
        if len(free) != pool.get_num_free_blocks():
            raise EngineError(f"{pool.get_num_free_blocks()} blocks count as free, and {len(free)} are")
        for block in pool.blocks:
            if block.is_null:
                continue
            if block.ref_cnt != held[block.block_id]:
                raise EngineError(f"block {block.block_id} is counted {block.ref_cnt} times, and held {held}")
            if (block.block_id in free) != (block.ref_cnt == 0):
                raise EngineError(f"block {block.block_id} is counted {block.ref_cnt} times, free: {free}")

    def check_hashes(self) -> None:
        """Every hash in the prefix cache is that of what the block's slots hold."""
        pool = self._engine.pool
        for block in pool.blocks:
            if block.block_hash is None:
                continue
            held = self._hash_of(block.block_id)
            if held is None or get_block_hash(block.block_hash) != held:
                raise EngineError(
                    f"block {block.block_id} has a stale hash; its slots hold "
                    f"{self._engine.worker.slots[block.block_id]}"
                )

    def check_queues(self) -> None:
        """Every request stands in the one queue that its status says, or in none while it is parked."""
        scheduler = self._engine.scheduler
        queued: Counter[str] = Counter()
        for queue in (scheduler.running, scheduler.waiting, scheduler.kv_holding_waiting):
            queued.update(request.request_id for request in queue)
        running = {request.request_id for request in scheduler.running}
        for request_id, request in scheduler.requests.items():
            member = scheduler._controlled.get(request_id)
            wanted = 0 if member is not None and member.parked else 1
            if queued[request_id] != wanted:
                raise EngineError(f"{request_id} stands in {queued[request_id]} queues, and must in {wanted}")
            if (request_id in running) != (request.status is RequestStatus.RUNNING):
                raise EngineError(
                    f"{request_id} is {request.status}, among the running: {request_id in running}"
                )
        if lost := queued.keys() - scheduler.requests.keys():
            raise EngineError(f"{sorted(lost)} are over, and queued")

    def check_end(self) -> None:
        """When all is over, nothing is left but checkpoints."""
        engine = self._engine
        self.check()
        while engine.scheduler.checkpoints.free_one():
            self.check()
        for name in ("requests", "_groups", "_controlled", "_thinking", "_unsettled", "_outputs"):
            if left := getattr(engine.scheduler, name):
                raise EngineError(f"when all is over, {name} holds {left}")
        if engine.pool.get_num_free_blocks() != engine.free_at_start:
            raise EngineError(
                f"{engine.free_at_start} blocks were free at the start, "
                f"and {engine.pool.get_num_free_blocks()} are at the end"
            )

    def _hash_of(self, block_id: int) -> bytes | None:
        """The prefix cache's hash of what a block holds; None if that is no run of tokens."""
        worker = self._engine.worker
        slots = worker.slots[block_id]
        if not all(slot is not None and slot.parent is before for slot, before in _pairs(slots)):
            return None
        last = slots[-1]
        assert last is not None
        return self._chain(last) if last.length % len(slots) == 0 else None

    def _chain(self, prefix: Prefix) -> bytes:
        if (known := self._hashes.get(prefix)) is not None:
            return known
        size = self._engine.settings.block_size
        tokens, start = [], prefix
        for _ in range(size):
            tokens.append(start.token)
            assert start.parent is not None
            start = start.parent
        parent: Any = self._chain(start) if start.length else None
        made = hash_block_tokens(block_hash, parent, tokens[::-1], self._extra(start))
        self._hashes[prefix] = made
        return made

    def _extra(self, start: Prefix) -> Any:
        """What the hash of a block after `start` is made of besides tokens."""
        root = start
        while root.parent is not None:
            root = root.parent
        salt, adapter = next(key for key, found in self._engine.roots.items() if found is root)
        name, _, folder = lora_names(adapter)
        extra = [("lora", name, folder)] if adapter else []
        extra += [("cache_salt", salt)] if salt is not None and not start.length else []
        return tuple(extra) or None

    def _managers(self) -> Any:
        return self._engine.scheduler.kv_cache_manager.coordinator.single_type_managers


def _pairs(slots: list[Prefix | None]) -> Any:
    """Each slot with the one before; the first with its own parent."""
    first = slots[0]
    return zip(slots, [None if first is None else first.parent, *slots[:-1]], strict=True)
