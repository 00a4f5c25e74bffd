"""The random-weight model is the same each time it is made, and its tokenizer loses nothing."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.engine.random_model import VOCABULARY, random_model, tokenizer

ROOT = Path(__file__).parents[2]
TOKENIZER = tokenizer()
MAKE = "import sys, pathlib; from tests.engine.random_model import random_model; "
MAKE += "random_model(pathlib.Path(sys.argv[1]), seed=int(sys.argv[2]))"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_another_process_makes_the_same_files(tmp_path: Path) -> None:
    here = random_model(tmp_path / "here", seed=3)
    subprocess.run([sys.executable, "-c", MAKE, str(tmp_path / "there"), "3"], cwd=ROOT, check=True)
    assert digests(here) == digests(tmp_path / "there")


def test_another_seed_makes_other_weights(tmp_path: Path) -> None:
    one, other = digests(random_model(tmp_path / "1", seed=1)), digests(random_model(tmp_path / "2", seed=2))
    assert {name for name in one if one[name] != other[name]} == {"model.safetensors"}


def test_vocabulary_is_padded(random_folder: Path) -> None:
    assert TOKENIZER.get_vocab_size() < VOCABULARY
    assert json.loads((random_folder / "config.json").read_text())["vocab_size"] == VOCABULARY


@given(text=st.text())
def test_tokenizer_round_trips(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.token_to_id("<unk>") not in ids or "<unk>" in text
    # A `▁` in the text is read as a space: tokenizers of this kind know no other spelling.
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")
