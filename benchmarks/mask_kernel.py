"""Masks applied to logits: this project's way, xgrammar's, and the memory that must move.

On a GPU, the Triton kernel against xgrammar's `apply_token_bitmask_inplace` and against the copy bandwidth of
the device. Without one, what the workers do on a CPU, and torch on it, against the same function of xgrammar.
xgrammar gets one mask per row, gathered beforehand and not counted; here rows are gathered by index.

    python benchmarks/mask_kernel.py [--full] [--out FOLDER]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import torch
import xgrammar
from _reporting import Bars, Report, arguments, median

from aici_vllm.engine.device_masks import DeviceMasks, apply_by_torch
from aici_vllm.engine.masks import NO_MASK

DENSITIES = {"sparse": 0.001, "half": 0.5, "dense": 0.999}
"""Part of the tokens that a mask allows."""
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> int:
    parser = arguments(__doc__)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    name = torch.cuda.get_device_name() if on_gpu else "CPU, one thread"
    if not on_gpu:
        torch.set_num_threads(1)
    large = options.full and on_gpu
    batches = [1, 8, 64, 256, 1024] if large else [1, 8, 64] if options.full else [1, 8]
    vocabularies = [32_000, 49_152, 131_072, 151_936, 262_144] if options.full else [49_152]
    parts = [0.1, 0.5, 1.0] if options.full else [1.0]
    types = list(TYPES) if options.full or on_gpu else ["float32"]
    rounds = 100 if on_gpu else 30 if options.full else 15
    columns = [
        "rows",
        "vocabulary",
        "constrained",
        "mask",
        "type",
        "ours us",
        "xgrammar us",
        "ratio",
        "torch us",
    ]
    if on_gpu:
        columns.append("of copy bandwidth")
    bandwidth = copy_bandwidth(device)
    report = Report("mask_kernel", f"time to mask one step's logits, medians, on {name}", columns)
    report.notes.append(f"measured copy bandwidth: {bandwidth / 1e9:.1f} GB/s read and written")
    for rows, tokens, part, mask, kind in product(batches, vocabularies, parts, DENSITIES, types):
        case = Case(device, rows, tokens, part, DENSITIES[mask], TYPES[kind])
        took = case.times(rounds)
        cells = [rows, tokens, f"{part:.0%}", mask, kind, took["ours"] * 1e6]
        theirs = took.get("xgrammar")
        cells += [theirs and theirs * 1e6, theirs and took["ours"] / theirs, took["torch"] * 1e6]
        if on_gpu:
            cells.append(case.bytes_moved() / took["ours"] / bandwidth)
        report.rows.append(cells)
    report.show()
    groups = [
        (f"{row[0]} x {row[1]} {row[3]} {row[4]}", (row[5], row[6], row[8]))
        for row in report.rows
        if row[2] == "100%"
    ]
    report.write(options.out, Bars(("ours", "xgrammar", "torch"), groups, "us"))
    return 0


class Case:
    """One batch of logits, its masks, and the ways to apply them."""

    def __init__(
        self, device: torch.device, rows: int, tokens: int, part: float, density: float, dtype: torch.dtype
    ):
        rng = np.random.default_rng(0)
        words = -(-tokens // 32)
        self.device = device
        self.logits = torch.randn(rows, tokens, device=device).to(dtype)
        allowed = rng.random((64, 32 * words)) < density
        packed = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
        self.masks = DeviceMasks(device, 64, words, rows)
        self.masks.write(list(range(64)), packed)
        self.slots = np.full(rows, NO_MASK, np.int32)
        constrained = rng.choice(rows, max(1, round(part * rows)), replace=False)
        constrained.sort()
        self.slots[constrained] = rng.integers(0, 64, len(constrained))
        self.refused = int((~allowed)[self.slots[constrained]].sum())
        self.gathered = torch.zeros((rows, words), dtype=torch.int32, device=device)
        self.gathered[torch.from_numpy(constrained).to(device)] = torch.from_numpy(
            packed[self.slots[constrained]]
        ).to(device)
        self.indices = constrained.tolist()
        self.rows = torch.tensor(self.indices, device=device)
        self.row_slots = torch.from_numpy(self.slots[constrained]).to(device)

    def times(self, rounds: int) -> dict[str, float]:
        """Seconds for each way, medians of rounds taken in turn."""
        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda: self.masks.apply(self.logits, self.slots),
            "xgrammar": lambda: xgrammar.apply_token_bitmask_inplace(
                self.logits, self.gathered, indices=self.indices
            ),
            "torch": lambda: apply_by_torch(self.logits, self.masks.table, self.rows, self.row_slots),
        }
        if self.device.type == "cpu" and self.logits.dtype != torch.float32:
            # xgrammar masks float32 alone on a CPU.
            del ways["xgrammar"]
        for way in ways.values():
            way()
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                spent[name].append(timed(way, self.device))
        return {name: median(found) for name, found in spent.items()}

    def bytes_moved(self) -> int:
        """Masks read and logits written, at the least."""
        return len(self.indices) * self.gathered.shape[1] * 4 + self.refused * self.logits.element_size()


def timed(way: Callable[[], Any], device: torch.device) -> float:
    """Seconds on the device, or of this thread on a CPU."""
    if device.type == "cpu":
        began = time.thread_time_ns()
        way()
        return (time.thread_time_ns() - began) / 1e9
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    way()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, reads and writes counted, of the device's own copy."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / median([timed(lambda: target.copy_(source), device) for _ in range(10)])


if __name__ == "__main__":
    sys.exit(main())
