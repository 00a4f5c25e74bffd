"""Vocabularies of real tokenizers, and a place for caches that no other run sees."""

from __future__ import annotations

from pathlib import Path

import mistral_common
import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers import Tokenizer

from constraints import Vocabulary
from constraints.index import builder


@pytest.fixture(scope="session", autouse=True)
def indexes_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    builder.folder = tmp_path_factory.mktemp("indexes")


@pytest.fixture(scope="session")
def tekken() -> Vocabulary:
    """The 131,072 tokens of Mistral's tekken."""
    folder = Path(mistral_common.__file__).parent / "data"
    return Vocabulary.from_tokenizer(Tekkenizer.from_file(folder / "tekken_240911.json"))


@pytest.fixture(scope="session")
def embedded_tokenizer_file(embedded_folder: Path) -> Path:
    return embedded_folder / "tokenizer.json"


@pytest.fixture(scope="session")
def smol(embedded_tokenizer_file: Path) -> Vocabulary:
    """The 49,152 tokens of the embedded model."""
    return Vocabulary.from_tokenizer(Tokenizer.from_file(str(embedded_tokenizer_file)), eos_token_ids=[2])
