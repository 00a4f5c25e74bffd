"""Rewrite a Llama model in a GGUF file as a Hugging Face model directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gguf import GGUFReader
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""

TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

CONTROL_TOKEN = 3


class GGUFFormatError(Exception):
    """The GGUF file is not a Llama model with a byte-level BPE tokenizer of a known kind."""


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama model, and whether its output matrix is its embedding matrix."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    context: int
    vocabulary: int
    rope_theta: float
    norm_epsilon: float
    tied: bool


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids with a role; `pad` falls back to `eos` where the file names none."""

    bos: int
    eos: int
    unknown: int | None
    pad: int


def convert(gguf_file: Path, folder: Path, progress: Progress | None = None) -> None:
    """Write `config.json`, `generation_config.json`, `model.safetensors` (float32), `tokenizer.json` and
    `tokenizer_config.json` into `folder`, which must exist.

    Quantized weights are written as the exact float32 values they stand for.

    Raises `GGUFFormatError` when the file is of a kind that this conversion does not know.
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    try:
        reader = GGUFReader(gguf_file)
    except (ValueError, IndexError) as error:
        raise GGUFFormatError(f"{gguf_file} cannot be read as GGUF: {error}") from error
    shape, special = _shape(reader), _special_tokens(reader)
    weights = dict(_weights(reader, shape, progress or (lambda done, total: None)))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(shape, special))
    _write_json(folder / "generation_config.json", _ids(special))
    _tokenizer(reader).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(reader, shape, special))


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise GGUFFormatError(
            f"the GGUF file has no field `{name}`; only Llama models with one are converted"
        )
    return field.contents()


def _optional(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _shape(reader: GGUFReader) -> LlamaShape:
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise GGUFFormatError(f"the GGUF file holds a `{architecture}` model; only `llama` is converted")
    return LlamaShape(
        layers=_field(reader, "llama.block_count"),
        hidden=_field(reader, "llama.embedding_length"),
        feed_forward=_field(reader, "llama.feed_forward_length"),
        heads=_field(reader, "llama.attention.head_count"),
        kv_heads=_field(reader, "llama.attention.head_count_kv"),
        context=_field(reader, "llama.context_length"),
        vocabulary=len(_field(reader, "tokenizer.ggml.tokens")),
        rope_theta=_field(reader, "llama.rope.freq_base"),
        # The file stores a float32; seven digits give back the decimal number that was meant.
        norm_epsilon=float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        tied=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )


def _special_tokens(reader: GGUFReader) -> SpecialTokens:
    eos = _field(reader, "tokenizer.ggml.eos_token_id")
    pad = _optional(reader, "tokenizer.ggml.padding_token_id")
    return SpecialTokens(
        bos=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos=eos,
        unknown=_optional(reader, "tokenizer.ggml.unknown_token_id"),
        pad=eos if pad is None else pad,
    )


def _weights(
    reader: GGUFReader, shape: LlamaShape, progress: Progress
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    from gguf.quants import dequantize

    total = len(reader.tensors)
    rotary_heads = {"self_attn.q_proj.weight": shape.heads, "self_attn.k_proj.weight": shape.kv_heads}
    for done, tensor in enumerate(reader.tensors, start=1):
        name = _hugging_face_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        for suffix, heads in rotary_heads.items():
            if name.endswith(suffix):
                weight = _rows_from_llama_cpp(weight, heads)
        yield name, np.ascontiguousarray(weight)
        progress(done, total)


def _hugging_face_name(name: str) -> str:
    if name in TOP_LEVEL:
        return TOP_LEVEL[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    part = PER_LAYER.get(rest.removesuffix(".weight"))
    if not (name.startswith("blk.") and block.isdigit() and rest.endswith(".weight") and part):
        raise GGUFFormatError(f"the GGUF file holds a tensor `{name}` that a plain Llama model does not have")
    return f"model.layers.{block}.{part}.weight"


def _rows_from_llama_cpp(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's row order, where the two halves of a rotary pair are neighbours.

    `weight` is [heads * head size, columns]; the result has the same shape.
    """
    rows, columns = weight.shape
    half = rows // heads // 2
    return weight.reshape(heads, half, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _ids(special: SpecialTokens) -> dict[str, Any]:
    return {"bos_token_id": special.bos, "eos_token_id": special.eos, "pad_token_id": special.pad}


def _config(shape: LlamaShape, special: SpecialTokens) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "vocab_size": shape.vocabulary,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        **_ids(special),
    }


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    """The byte-level BPE tokenizer of the file; tokens that the file marks as control tokens are special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (_field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise GGUFFormatError(
            f"the GGUF file's tokenizer is of kind {kind}; only ('gpt2', 'smollm') is known"
        )
    tokens = _field(reader, "tokenizer.ggml.tokens")
    left_right = [merge.split(" ") for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=[(left, right) for left, right in left_right],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = _field(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _tokenizer_config(reader: GGUFReader, shape: LlamaShape, special: SpecialTokens) -> dict[str, Any]:
    tokens = _field(reader, "tokenizer.ggml.tokens")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.context,
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[special.bos],
        "eos_token": tokens[special.eos],
        "pad_token": tokens[special.pad],
        "chat_template": _optional(reader, "tokenizer.chat_template"),
    }
    if special.unknown is not None:
        config["unk_token"] = tokens[special.unknown]
    return {key: value for key, value in config.items() if value is not None}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
