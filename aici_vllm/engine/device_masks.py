"""The mask table on a worker's device, and its rows applied to logits."""

import importlib.util

import numpy as np
import torch

from aici_vllm.engine.masks import NO_MASK


class DeviceMasks:
    """The mask table on one device, packed 32 tokens to an int32.

    Args:
        capacity: rows.
        words: int32 words in a row.
        max_requests: requests in one step, at most.
        width: rows of logits that each of them has, at most.
    """

    def __init__(self, device: torch.device, capacity: int, words: int, max_requests: int, width: int = 1):
        self.table = torch.empty((capacity, words), dtype=torch.int32, device=device)
        self._slots = torch.empty(max_requests * width, dtype=torch.int32, device=device)
        self._by_position = torch.empty((max_requests, width), dtype=torch.int32, device=device)
        self._has_kernel = device.type == "cuda" and importlib.util.find_spec("triton") is not None

    def write(self, slots: list[int], rows: np.ndarray) -> None:
        """Put `rows`, int32[k, words], into the rows `slots` of the table."""
        index = torch.tensor(slots, dtype=torch.int64)
        self.table[self._sent(index)] = self._sent(torch.from_numpy(rows))

    def apply(self, logits: torch.Tensor, slots: np.ndarray) -> None:
        """Set `logits[i]` to -inf wherever table row `slots[i]` has no bit. In place.

        Tokens past the end of a row, the padding of a vocabulary, are never allowed.

        Args:
            logits: [rows, tokens], of any float type.
            slots: int32[rows]; NO_MASK leaves the row alone.
        """
        if logits.device.type == "cpu":
            apply_on_cpu(logits, self.table, slots)
        elif self._has_kernel and logits.stride(1) == 1:
            from aici_vllm.engine.mask_kernel import apply_masks

            on_device = self._slots[: len(slots)]
            on_device.copy_(self._pinned(torch.from_numpy(slots)), non_blocking=True)
            apply_masks(logits, self.table, on_device)
        else:
            rows = np.flatnonzero(slots != NO_MASK)
            apply_by_torch(
                logits,
                self.table,
                self._sent(torch.from_numpy(rows)),
                self._sent(torch.from_numpy(slots[rows])),
            )

    def apply_by_position(
        self, logits: torch.Tensor, slots: np.ndarray, requests: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """As `apply`, where row i belongs to request `requests[i]`, behind `positions[i]` of its drafts.

        Args:
            logits: [rows, tokens], of any float type.
            slots: int32[max_requests, width]; NO_MASK leaves the row alone.
            requests, positions: integers[rows], on the device.
        """
        self._by_position.copy_(self._pinned(torch.from_numpy(slots)), non_blocking=True)
        on_device = self._slots[: len(logits)]
        on_device.copy_(self._by_position[requests.long(), positions.long()])
        if self._has_kernel and logits.stride(1) == 1:
            from aici_vllm.engine.mask_kernel import apply_masks

            apply_masks(logits, self.table, on_device)
        else:
            self.apply(logits, on_device.cpu().numpy())

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._pinned(tensor).to(self.table.device, non_blocking=True)

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        # A copy from memory that is not pinned would wait for the device.
        return tensor.pin_memory() if self.table.is_cuda else tensor


def apply_by_torch(
    logits: torch.Tensor, table: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor
) -> None:
    """Mask `logits[rows]` by `table[slots]`, on any device."""
    words = table.index_select(0, slots)
    bits = torch.arange(32, dtype=torch.int32, device=table.device)
    allowed = (words.unsqueeze(-1) >> bits).bitwise_and_(1).bool().flatten(1)
    picked = logits.index_select(0, rows)
    width = min(allowed.shape[1], picked.shape[1])
    picked[:, :width].masked_fill_(~allowed[:, :width], float("-inf"))
    picked[:, width:] = float("-inf")
    logits.index_copy_(0, rows, picked)


_PATTERNS = {torch.float32: np.int32, torch.bfloat16: np.int16, torch.float16: np.int16}


def apply_on_cpu(logits: torch.Tensor, table: torch.Tensor, slots: np.ndarray) -> None:
    """As the kernel does it. torch would split such small rows among threads, and wait for them.

    Where a mask allows nearly everything, the other tokens are looked up. Else bit patterns are computed
    instead of values chosen, so that no mask is slower than another.
    """
    integer = _PATTERNS[logits.dtype]
    minus_infinity = torch.tensor(float("-inf"), dtype=logits.dtype).view(_SIGNED[integer]).item()
    patterns = logits.view(_SIGNED[integer]).numpy()
    words = table.numpy()
    width = min(32 * words.shape[1], patterns.shape[1])
    for row in np.flatnonzero(slots != NO_MASK).tolist():
        mask, pattern = words[slots[row]], patterns[row, :width]
        patterns[row, width:] = minus_infinity
        partial = np.flatnonzero(mask != -1)
        if len(partial) < len(mask) // 8:
            bits = np.unpackbits(mask[partial, None].view(np.uint8), axis=1, bitorder="little")
            at, bit = np.nonzero(bits == 0)
            tokens = partial[at] * 32 + bit
            pattern[tokens[tokens < width]] = minus_infinity
        else:
            bits = np.unpackbits(mask.view(np.uint8), count=width, bitorder="little")
            bits -= 1
            refused = bits.view(np.int8).astype(integer)
            pattern &= ~refused
            refused &= minus_infinity
            pattern |= refused


_SIGNED = {np.int32: torch.int32, np.int16: torch.int16}
