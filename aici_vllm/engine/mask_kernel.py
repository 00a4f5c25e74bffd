"""Masks applied to logits by one Triton kernel, for devices that have Triton."""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

BLOCK_WORDS = 128
"""Words of a mask that one program unpacks: 4,096 tokens."""


@triton.jit
def _mask_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    table,
    table_stride,
    slots,
    num_tokens,
    num_words,
    BLOCK_WORDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
        # No word, no token: the padding behind a vocabulary is never allowed.
        words = tl.load(table + slot * table_stride + word, mask=word < num_words, other=0)
        bit = tl.arange(0, 32)
        token = word[:, None] * 32 + bit[None, :]
        refused = ((words[:, None] >> bit[None, :]) & 1) == 0
        tl.store(
            logits + row * logits_stride + token,
            float("-inf"),
            mask=refused & (token < num_tokens),
        )


def apply_masks(logits: torch.Tensor, table: torch.Tensor, slots: torch.Tensor) -> None:
    """Set `logits[i]` to -inf wherever `table[slots[i]]` has no bit; a negative slot leaves the row alone.

    In place, in the current stream; nothing is read back and nothing allocated.

    Args:
        logits: [rows, tokens] of any float type, contiguous within a row.
        table: int32[capacity, words], 32 tokens a word.
        slots: int32[rows], on the device.
    """
    rows, num_tokens = logits.shape
    # Allowed tokens are not touched at all, so the logits are never read.
    grid = (rows, triton.cdiv(num_tokens, 32 * BLOCK_WORDS))
    _mask_kernel[grid](
        logits,
        logits.stride(0),
        table,
        table.stride(0),
        slots,
        num_tokens,
        table.shape[1],
        BLOCK_WORDS=BLOCK_WORDS,
    )
