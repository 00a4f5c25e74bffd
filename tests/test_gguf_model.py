"""A GGUF file written by gguf's own writer converts to the weights and the tokenizer it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from aici_vllm.gguf_model import GGUFFormatError, convert

LAYERS, HIDDEN, FEED_FORWARD, HEADS, KV_HEADS = 2, 64, 96, 4, 2
QUANTIZATION = gguf.GGMLQuantizationType
KINDS = {"token_embd": QUANTIZATION.Q8_0, "norm": QUANTIZATION.F32}
"""By a part of the tensor's name; all others are Q4_1, as in the embedded model."""

ROWS_AND_COLUMNS = {
    "attn_norm": (HIDDEN, 0, "input_layernorm"),
    "attn_q": (HIDDEN, HIDDEN, "self_attn.q_proj"),
    "attn_k": (HIDDEN // HEADS * KV_HEADS, HIDDEN, "self_attn.k_proj"),
    "attn_v": (HIDDEN // HEADS * KV_HEADS, HIDDEN, "self_attn.v_proj"),
    "attn_output": (HIDDEN, HIDDEN, "self_attn.o_proj"),
    "ffn_norm": (HIDDEN, 0, "post_attention_layernorm"),
    "ffn_gate": (FEED_FORWARD, HIDDEN, "mlp.gate_proj"),
    "ffn_up": (FEED_FORWARD, HIDDEN, "mlp.up_proj"),
    "ffn_down": (HIDDEN, FEED_FORWARD, "mlp.down_proj"),
}


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat in 1984", "then that other cat ran"] * 3, trainer)
    return tokenizer


TOKENIZER = byte_level_tokenizer()


def neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order, row by row: row 2i of a head was its row i, and row 2i + 1 its row i + half."""
    size = weight.shape[0] // heads
    order = [
        head * size + i + half for head in range(heads) for i in range(size // 2) for half in (0, size // 2)
    ]
    return weight[order]


def tensors(random: np.random.Generator) -> dict[str, tuple[str, np.ndarray]]:
    """GGUF name → (Hugging Face name, weight in Hugging Face's row order)."""
    vocabulary = TOKENIZER.get_vocab_size()
    shapes = {
        "token_embd": (vocabulary, HIDDEN, "model.embed_tokens"),
        "output_norm": (HIDDEN, 0, "model.norm"),
    }
    for layer in range(LAYERS):
        for name, (rows, columns, target) in ROWS_AND_COLUMNS.items():
            shapes[f"blk.{layer}.{name}"] = (rows, columns, f"model.layers.{layer}.{target}")
    return {
        f"{name}.weight": (
            f"{target}.weight",
            random.standard_normal((rows, columns) if columns else rows).astype(np.float32),
        )
        for name, (rows, columns, target) in shapes.items()
    }


def quantization(name: str) -> gguf.GGMLQuantizationType:
    return next((kind for part, kind in KINDS.items() if part in name), QUANTIZATION.Q4_1)


def write_gguf(
    path: Path, architecture: str = "llama", extra_tensor: str | None = None
) -> dict[str, np.ndarray]:
    """Write a small model; the result is what each Hugging Face tensor must be."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_context_length(256)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    write_tokenizer(writer)
    expected = {}
    for name, (target, weight) in tensors(np.random.default_rng(0)).items():
        kind = quantization(name)
        expected[target] = dequantize(quantize(weight, kind), kind)
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        stored = weight if heads is None else neighbours(weight, heads)
        writer.add_tensor(name, quantize(stored, kind), raw_dtype=kind)
    if extra_tensor:
        writer.add_tensor(extra_tensor, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def write_tokenizer(writer: gguf.GGUFWriter) -> None:
    model = json.loads(TOKENIZER.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("converted")
    expected = write_gguf(folder / "model.gguf")
    convert(folder / "model.gguf", folder)
    return folder, expected


def test_weights_are_exact(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, expected = converted
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


def test_transformers_reads_what_was_meant(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder, _ = converted
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.tie_word_embeddings, str(config.dtype)) == (
        "llama",
        True,
        "torch.float32",
    )
    assert (config.num_hidden_layers, config.head_dim, config.rms_norm_eps) == (LAYERS, HIDDEN // HEADS, 1e-5)
    assert config.rope_parameters["rope_theta"] == 10000.0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the cat in 1984").input_ids == TOKENIZER.encode("the cat in 1984").ids
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|start|>",
        "<|end|>",
        "<|end|>",
    )
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


@given(text=st.text())
def test_tokenizer_agrees_with_its_source(converted: tuple[Path, dict[str, np.ndarray]], text: str) -> None:
    made = Tokenizer.from_file(str(converted[0] / "tokenizer.json"))
    ids = made.encode(text).ids
    assert ids == TOKENIZER.encode(text).ids
    assert made.decode(ids, skip_special_tokens=False) == text


def test_progress_counts_every_tensor(tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "model.gguf")
    seen: list[tuple[int, int]] = []
    convert(tmp_path / "model.gguf", tmp_path, lambda done, total: seen.append((done, total)))
    assert seen == [(done, len(expected)) for done in range(1, len(expected) + 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "`mamba`"),
        ({"extra_tensor": "blk.0.ssm_in.weight"}, r"`blk.0.ssm_in.weight`"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    write_gguf(tmp_path / "model.gguf", **changes)
    with pytest.raises(GGUFFormatError, match=message):
        convert(tmp_path / "model.gguf", tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not a model" * 10)
    with pytest.raises(GGUFFormatError, match="cannot be read as GGUF"):
        convert(tmp_path / "model.gguf", tmp_path)
