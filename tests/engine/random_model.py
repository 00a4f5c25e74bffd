"""A tiny random-weight Llama with a byte-fallback tokenizer, as unlike the embedded model as can be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = Path(__file__).parents[2] / "LICENSE"

LAYERS, HIDDEN, FEED_FORWARD, HEADS, KV_HEADS = 2, 64, 128, 2, 1
TOKENS = 600
VOCABULARY = 750
"""More rows than the tokenizer has tokens, and no multiple of 32, as real models have it."""


def random_model(folder: Path, seed: int = 0) -> Path:
    """Write the model into `folder` (made if missing); the same seed gives the same files.

    The tokenizer is of the SentencePiece kind: `▁` for a space, one in front of the text, and bytes for
    unknown characters. The model is float32, and its output matrix is not its embedding matrix.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "tokenizer.json"))
    save_file(_weights(np.random.default_rng(seed)), folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config", _CONFIG), ("tokenizer_config", _TOKENIZER_CONFIG)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def random_eagle(folder: Path, seed: int = 1) -> Path:
    """Write an EAGLE drafter for the random model into `folder`: one layer, fed with hidden states."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    weights = {name.removeprefix("model."): weight for name, weight in _weights(random).items()}
    weights = {name: weight for name, weight in weights.items() if name.startswith("layers.0.")}
    del weights["layers.0.input_layernorm.weight"]
    weights["fc.weight"] = random.standard_normal((HIDDEN, 2 * HIDDEN)).astype(np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**_CONFIG, "num_hidden_layers": 1}), encoding="utf-8")
    return folder


def tokenizer() -> Tokenizer:
    """The random model's tokenizer, trained on the project's license text."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train(
        [str(CORPUS)], trainers.BpeTrainer(vocab_size=TOKENS - 259, show_progress=False, special_tokens=[])
    )
    learned = json.loads(learner.to_str())["model"]
    order = sorted(learned["vocab"], key=learned["vocab"].get)
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *order]
    made = Tokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return made


def _weights(random: np.random.Generator) -> dict[str, np.ndarray]:
    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    head = HIDDEN // HEADS
    weights = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN) * 8,
        "model.norm.weight": np.ones(HIDDEN, np.float32),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN) * 4,
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        weights |= {
            f"{name}.input_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{name}.post_attention_layernorm.weight": np.ones(HIDDEN, np.float32),
            f"{name}.self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN) * 2,
            f"{name}.self_attn.k_proj.weight": matrix(KV_HEADS * head, HIDDEN) * 2,
            f"{name}.self_attn.v_proj.weight": matrix(KV_HEADS * head, HIDDEN) * 2,
            f"{name}.self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN) * 2,
            f"{name}.mlp.gate_proj.weight": matrix(FEED_FORWARD, HIDDEN),
            f"{name}.mlp.up_proj.weight": matrix(FEED_FORWARD, HIDDEN),
            f"{name}.mlp.down_proj.weight": matrix(HIDDEN, FEED_FORWARD),
        }
    return weights


_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 4096,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 4096,
    "clean_up_tokenization_spaces": False,
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "chat_template": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}",
}
