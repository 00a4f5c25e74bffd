"""KV blocks under a sequence that is cut and forked: who owns them, and which hash may stand.

Two rules keep the prefix cache true. A block that has a hash, or a second owner, is never written
again: a cut inside it continues in a copy. And a request's `block_hashes` end where its tokens
changed. Copies ride on vLLM's own copy-on-write list, which both model runners apply before the
forward pass.
"""

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
from vllm.v1.request import Request


def can_share(manager: KVCacheManager) -> bool:
    """Whether blocks stay where their tokens are, so that a prefix of them can be kept or shared.

    True for full attention. Sliding-window and state-space layers drop or move blocks; their sequences
    are recomputed from the prefix cache instead.
    """
    return all(type(group) is FullAttentionManager for group in manager.coordinator.single_type_managers)


def keep_prefix(manager: KVCacheManager, request: Request, num_tokens: int) -> int:
    """Drop the blocks past `num_tokens`; returns how many tokens still have their KV, at most that.

    The block that the cut goes through is kept if this request alone owns it and no hash names its
    content; else it is replaced by a copy; else, with no free block, it is dropped.
    """
    kept = num_tokens if can_share(manager) else 0
    for group in manager.coordinator.single_type_managers:
        kept = min(kept, _keep_group_prefix(group, request.request_id, kept))
    if not kept:
        # Without a trace of the request, vLLM looks its prefix up in the cache again.
        manager.free(request)
    return kept


def share_prefix(manager: KVCacheManager, parent: Request, child: Request, num_tokens: int) -> int:
    """Give `child` the KV of the parent's first `num_tokens` tokens; returns how many it got.

    Full blocks are shared by reference, the last partial one is copied on the device.
    """
    if not num_tokens or not can_share(manager):
        return 0
    # A shared block must have its hash before it has two owners, or both would try to name it.
    manager.cache_blocks(parent, num_tokens)
    shared = num_tokens
    for group in manager.coordinator.single_type_managers:
        shared = min(shared, _share_group_prefix(group, parent.request_id, child.request_id, num_tokens))
    if not shared:
        manager.free(child)
    return shared


def move_prefix(manager: KVCacheManager, source: Request, target: Request, num_tokens: int) -> int:
    """Hand the KV of the source's first `num_tokens` tokens over; returns how many `target` got.

    The source has no block afterwards.
    """
    moved = keep_prefix(manager, source, num_tokens)
    for group in manager.coordinator.single_type_managers:
        if source.request_id in group.req_to_blocks:
            group.req_to_blocks[target.request_id] = group.req_to_blocks.pop(source.request_id)
            group.num_cached_block[target.request_id] = group.num_cached_block.pop(source.request_id)
    return moved


def forget_uncomputed(manager: KVCacheManager, request: Request) -> None:
    """Take the hashes off blocks whose tokens were scheduled and will not be computed."""
    for group in manager.coordinator.single_type_managers:
        blocks = group.req_to_blocks.get(request.request_id, ())
        first = request.num_computed_tokens // group.block_size
        group.block_pool.evict_blocks({block.block_id for block in blocks[first:] if not block.is_null})


def drop_copies(manager: KVCacheManager) -> None:
    """Forget the copies still to be made. Nobody may hold them: their requests have lost their blocks."""
    _, retained = manager.take_kv_cache_block_copies()
    manager.block_pool.free_blocks(retained)


def _keep_group_prefix(group: SingleTypeKVCacheManager, request_id: str, num_tokens: int) -> int:
    blocks = group.req_to_blocks.get(request_id)
    if not blocks:
        return 0
    num_full, rest = divmod(num_tokens, group.block_size)
    keep = num_full
    if rest and num_full < len(blocks):
        if group.block_pool.is_block_writable(blocks[num_full]):
            keep += 1
        elif (copy := _copy_block(group, blocks[num_full])) is not None:
            group.block_pool.free_blocks([blocks[num_full]])
            blocks[num_full] = copy
            keep += 1
    dropped = blocks[keep:]
    del blocks[keep:]
    group.block_pool.free_blocks(reversed(dropped))
    group.num_cached_block[request_id] = min(group.num_cached_block.get(request_id, 0), num_full)
    return min(num_tokens, keep * group.block_size)


def _share_group_prefix(
    group: SingleTypeKVCacheManager, parent_id: str, child_id: str, num_tokens: int
) -> int:
    parent_blocks = group.req_to_blocks.get(parent_id, [])
    num_full, rest = divmod(num_tokens, group.block_size)
    blocks = list(parent_blocks[:num_full])
    group.block_pool.touch(blocks)
    shared = num_full * group.block_size
    if rest and num_full < len(parent_blocks):
        copy = _copy_block(group, parent_blocks[num_full])
        if copy is not None:
            blocks.append(copy)
            shared = num_tokens
    group.req_to_blocks[child_id] = blocks
    group.num_cached_block[child_id] = num_full
    return shared


def _copy_block(group: SingleTypeKVCacheManager, source: KVCacheBlock) -> KVCacheBlock | None:
    """A block that the worker fills from `source` before the next forward pass; None if none is free."""
    if group.block_pool.get_num_free_blocks() < 1:
        return None
    # Copies of one step run together, so a copy of a block that is itself still to be filled must
    # read what that one reads.
    for pending_source, pending_copy in group._pending_cow_copies:
        if pending_copy is source:
            source = pending_source
            break
    copy = group.block_pool.get_new_blocks(1)[0]
    # vLLM releases one reference of both when the copy has run.
    group.block_pool.touch([source, copy])
    group._pending_cow_copies.append((source, copy))
    return copy
