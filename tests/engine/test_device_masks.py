"""The masks of every path, the Triton kernel included, against bits looked at one by one."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.interpreter import InterpretedFunction

from aici_vllm.engine import mask_kernel
from aici_vllm.engine.device_masks import DeviceMasks, apply_by_torch, apply_on_cpu
from aici_vllm.engine.masks import NO_MASK

Apply = Callable[[torch.Tensor, torch.Tensor, np.ndarray], None]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel runs as if TRITON_INTERPRET=1 had been set when it was imported."""
    monkeypatch.setattr(mask_kernel, "_mask_kernel", InterpretedFunction(mask_kernel._mask_kernel.fn))
    yield


def by_kernel(logits: torch.Tensor, table: torch.Tensor, slots: np.ndarray) -> None:
    mask_kernel.apply_masks(logits, table, torch.from_numpy(slots))


def by_torch(logits: torch.Tensor, table: torch.Tensor, slots: np.ndarray) -> None:
    rows = np.flatnonzero(slots != NO_MASK)
    apply_by_torch(logits, table, torch.from_numpy(rows), torch.from_numpy(slots[rows]))


def one_by_one(logits: torch.Tensor, table: torch.Tensor, slots: np.ndarray) -> torch.Tensor:
    masked = logits.clone()
    words = table.numpy()
    for row, slot in enumerate(slots.tolist()):
        for token in range(logits.shape[1] if slot != NO_MASK else 0):
            word = int(words[slot, token // 32]) if token // 32 < words.shape[1] else 0
            if not word >> token % 32 & 1:
                masked[row, token] = float("-inf")
    return masked


def bits_of(logits: torch.Tensor) -> torch.Tensor:
    """Bit patterns, among which a NaN equals itself."""
    return logits.view(torch.int32 if logits.dtype == torch.float32 else torch.int16)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("apply", [by_kernel, by_torch, apply_on_cpu])
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize(("tokens", "words"), [(32, 1), (100, 4), (750, 24), (200, 3), (4100, 128), (70, 4)])
def test_masked_logits_equal_brute_force(apply: Apply, dtype: torch.dtype, tokens: int, words: int) -> None:
    rng = np.random.default_rng(tokens)
    rows = rng.integers(-(2**31), 2**31, (9, words), dtype=np.int64).astype(np.int32)
    rows[1], rows[2] = -1, 0
    rows[4] = -1
    rows[4, [0, -1]] = rows[3, [0, -1]]
    table = torch.from_numpy(rows)
    slots = np.array([NO_MASK, 3, 8, NO_MASK, 1, 2, 4], np.int32)
    logits = torch.from_numpy(rng.standard_normal((7, tokens))).to(dtype)
    logits[1, :4] = torch.tensor([float("inf"), float("nan"), float("-inf"), -0.0])
    expected = one_by_one(logits, table, slots)
    apply(logits, table, slots)
    assert torch.equal(bits_of(logits), bits_of(expected))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("apply", [by_kernel, by_torch, apply_on_cpu])
def test_rows_of_a_wider_tensor_are_masked_in_place(apply: Apply) -> None:
    whole = torch.zeros(4, 100)
    table = torch.tensor([[0b101, 0]], dtype=torch.int32)
    apply(whole[1:3, 10:74], table, np.array([0, NO_MASK], np.int32))
    expected = torch.zeros(4, 100)
    expected[1, 10:74] = float("-inf")
    expected[1, [10, 12]] = 0
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize(
    "target", [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)], ids=["sm80", "sm90"]
)
def test_the_kernel_compiles_for_a_gpu(
    dtype: torch.dtype, target: GPUTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The backend that the engine tests add compiles nothing.
    monkeypatch.delitem(backends, "cpu", raising=False)
    signature = {name: "i32" for name in mask_kernel._mask_kernel.arg_names}
    signature |= {"logits": f"*{NAMES[dtype]}", "table": "*i32", "slots": "*i32", "BLOCK_WORDS": "constexpr"}
    source = ASTSource(mask_kernel._mask_kernel, signature, {"BLOCK_WORDS": mask_kernel.BLOCK_WORDS})
    compiled = compile(source, target=target)
    assert compiled.asm["cubin"]
    # Logits are only written: one load for the slot, the others for words of the mask.
    assert "ld.global.b16" not in compiled.asm["ptx"]


def test_the_table_takes_rows_anywhere() -> None:
    masks = DeviceMasks(torch.device("cpu"), capacity=100, words=2, max_requests=4)
    masks.write([90, 0], np.array([[1, 0], [0, 1]], np.int32))
    logits = torch.zeros(3, 64)
    masks.apply(logits, np.array([0, NO_MASK, 90], np.int32))
    assert torch.isfinite(logits).sum(1).tolist() == [1, 64, 1]
    assert logits[0, 32] == 0 and logits[2, 0] == 0
