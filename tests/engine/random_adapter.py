"""Random LoRA adapters of the random model, and the same weights without an adapter."""

import json
import shutil
from pathlib import Path

import numpy as np

from tests.engine.random_model import FEED_FORWARD, HEADS, HIDDEN, KV_HEADS, LAYERS

RANK = 8
ALPHA = 16
"""The adapter adds ALPHA / RANK times its product to a weight."""

_KV = HIDDEN // HEADS * KV_HEADS
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (_KV, HIDDEN),
    "self_attn.v_proj": (_KV, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED_FORWARD),
}
"""What the adapter changes: rows and columns of each weight."""


def random_adapter(folder: Path, seed: int) -> Path:
    """Write an adapter in the format of the PEFT library, large enough to change what the model says."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    weights = {}
    for layer in range(LAYERS):
        for name, (rows, columns) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{prefix}.lora_A.weight"] = _matrix(random, RANK, columns)
            weights[f"{prefix}.lora_B.weight"] = _matrix(random, rows, RANK)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [name.split(".")[1] for name in SHAPES],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def merged_model(model: Path, adapter: Path, folder: Path) -> Path:
    """Write a model that says by itself what `model` says with `adapter`."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(model, folder)
    weights = load_file(model / "model.safetensors")
    parts = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in parts if name.endswith(".lora_A.weight")]:
        prefix = name.removesuffix(".lora_A.weight")
        change = parts[f"{prefix}.lora_B.weight"] @ parts[name] * (ALPHA / RANK)
        weights[prefix.removeprefix("base_model.model.") + ".weight"] += change
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _matrix(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
