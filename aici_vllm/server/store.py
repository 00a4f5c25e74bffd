"""Uploaded controllers on disk, under the hash of their text, and the tags that name them.

    store/lock           held by whoever writes
    store/sources/ID.py  ID is the sha256 of the file's bytes
    store/tags.json      every tag

A file appears or changes by one rename of a copy that is already on disk, so a crash at any instant
leaves the old state or the new one. Readers take no lock. Several processes may share the folder.
"""

import errno
import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import Any

from aici_vllm.server.errors import StoreError, UnknownControllerError, forbidden

UNFINISHED = ".new-"
"""How the names of files begin that are not renamed yet."""

LOCK_SECONDS = 10.0
_LOCK_POLL = 0.01


@dataclass(frozen=True)
class StoredController:
    """An uploaded source: its hash, its size in bytes, and when it came, in seconds since 1970."""

    module_id: str
    size: int
    uploaded_at: float


@dataclass(frozen=True)
class Tag:
    """A name for a stored controller.

    Attributes:
        owner: who made the tag; only they and admins move it.
        updated_at: seconds since 1970.
    """

    tag: str
    module_id: str
    owner: str
    updated_by: str
    updated_at: float


class Store:
    """A folder of controllers.

    Every method raises `StoreError`, naming the folder and the reason, when the folder cannot be used.

    Args:
        limit_bytes: what all sources may take together.
        most_tags: how many there may be.
        most_tags_of_user: how many of them one user may own who is no admin.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int = 1 << 30,
        most_tags: int = 10_000,
        most_tags_of_user: int = 1_000,
    ):
        self.folder = folder
        self._limit_bytes = limit_bytes
        self._most_tags = most_tags
        self._most_tags_of_user = most_tags_of_user
        self._sources = folder / "sources"
        self._tags_file = folder / "tags.json"
        self._tags = _CachedFile(self._tags_file, _parse_tags)
        self._text = lru_cache(maxsize=256)(self._read_text)

    # Sources.

    def put(self, source: bytes) -> StoredController:
        """Store a source; nothing happens when it is there already.

        Raises:
            StoreError: also when the sources would take more than the operator allows.
        """
        module_id = hashlib.sha256(source).hexdigest()
        path = self._source_path(module_id)
        with self._writing():
            if not _holds(path, source):
                self._check_room(len(source))
                self._replace(path, source)
            return _stored(path)

    def get(self, module_id: str) -> str:
        """The text of a controller.

        Raises:
            UnknownControllerError: it is not here.
        """
        with self._reading():
            try:
                found = self._source_path(module_id).stat()
                return self._text(module_id, (found.st_mtime_ns, found.st_size, found.st_ino))
            except FileNotFoundError:
                raise UnknownControllerError(f"there is no controller {module_id}") from None

    def sources(self) -> list[StoredController]:
        """All controllers, the newest first."""
        with self._reading():
            found = [_stored(path) for path in _files(self._sources) if path.suffix == ".py"]
        return sorted(found, key=lambda one: (-one.uploaded_at, one.module_id))

    # Tags.

    def tags(self) -> list[Tag]:
        """All tags, the one that moved last first."""
        with self._reading():
            return sorted(self._tags.read().values(), key=lambda tag: (-tag.updated_at, tag.tag))

    def tag(self, name: str) -> Tag | None:
        """The tag of that name."""
        with self._reading():
            return self._tags.read().get(name)

    def move_tags(self, module_id: str, names: list[str], user: str, admin: bool = False) -> list[Tag]:
        """Make tags, or move those that exist, all of them or none.

        Raises:
            UnknownControllerError: no such controller.
            ServiceError: one of the tags belongs to somebody else, or there would be too many.
        """
        with self._writing():
            if not self._source_path(module_id).exists():
                raise UnknownControllerError(f"there is no controller {module_id}: upload it first")
            before = self._tags.read()
            tags = dict(before)
            now = time.time()
            for name in names:
                owner = tags[name].owner if name in tags else user
                if owner != user and not admin:
                    raise forbidden(f"tag {name} belongs to {owner}: only they or an admin can move it")
                tags[name] = Tag(name, module_id, owner, user, now)
            if len(tags) > len(before):
                self._check_number(tags, user, admin)
            rows = [asdict(tag) for tag in tags.values()]
            self._replace(self._tags_file, json.dumps({"version": 1, "tags": rows}, indent=1).encode())
        return [tags[name] for name in names]

    def close(self) -> None:
        """Let go of the file that is kept open."""
        self._tags.close()

    # The folder.

    def _source_path(self, module_id: str) -> Path:
        return self._sources / f"{module_id}.py"

    def _read_text(self, module_id: str, version: tuple[int, int, int]) -> str:
        """The text of a file that is there; kept as long as its `version` is the same."""
        source = self._source_path(module_id).read_bytes()
        if hashlib.sha256(source).hexdigest() != module_id:
            raise StoreError(
                f"controller {module_id} is damaged on disk: upload it again",
                self._source_path(module_id),
                HTTPStatus.INTERNAL_SERVER_ERROR,
            )
        return source.decode()

    def _check_room(self, size: int) -> None:
        used = sum(path.stat().st_size for path in _files(self._sources))
        if used + size > self._limit_bytes:
            raise StoreError(
                f"the stored controllers take {used} of the {self._limit_bytes} bytes that the operator "
                f"allows: there is no room for {size} more",
                self.folder,
                HTTPStatus.INSUFFICIENT_STORAGE,
            )

    def _check_number(self, tags: dict[str, Tag], user: str, admin: bool) -> None:
        if len(tags) > self._most_tags:
            raise StoreError(
                f"the operator allows {self._most_tags} tags, and these would make {len(tags)}: move others",
                self._tags_file,
                HTTPStatus.INSUFFICIENT_STORAGE,
            )
        own = sum(tag.owner == user for tag in tags.values())
        if own > self._most_tags_of_user and not admin:
            raise forbidden(
                f"the operator allows a user {self._most_tags_of_user} tags, and these would make {own}: "
                "move others of yours"
            )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"cannot read the stored controllers: {error.strerror}", self.folder) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the folder's lock; whatever a killed writer left half-written is removed."""
        try:
            self._sources.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._wait_for(lock)
                for folder in (self.folder, self._sources):
                    for path in _files(folder):
                        if path.name.startswith(UNFINISHED):
                            path.unlink(missing_ok=True)
                yield
            finally:
                os.close(lock)
        except OSError as error:
            raise StoreError(
                f"cannot write to the store of controllers: {error.strerror}",
                self.folder,
                HTTPStatus.INSUFFICIENT_STORAGE if _is_full(error) else HTTPStatus.SERVICE_UNAVAILABLE,
            ) from error

    def _wait_for(self, lock: int) -> None:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"the store of controllers has been busy for {LOCK_SECONDS:.0f} s: try again",
                        self.folder / "lock",
                    ) from None
                # A lock of this kind cannot be waited for with a time limit.
                time.sleep(_LOCK_POLL)

    def _replace(self, path: Path, content: bytes) -> None:
        """Give `path` new content, on disk when this returns. The lock must be held."""
        unfinished = path.with_name(f"{UNFINISHED}{os.getpid()}-{threading.get_ident()}")
        try:
            file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                left = memoryview(content)
                while left:
                    left = left[os.write(file, left) :]
                os.fsync(file)
            finally:
                os.close(file)
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class _CachedFile:
    """A file's parsed content, read again when another file stands under its name.

    The file that was read stays open, so no later one can have its inode number.
    """

    def __init__(self, path: Path, parse: Callable[[Path, bytes], Any]):
        self._path = path
        self._parse = parse
        self._lock = threading.Lock()
        self._file: int | None = None
        self._content: Any = parse(path, b"")

    def read(self) -> Any:
        with self._lock:
            if not self._is_current():
                self._load()
            return self._content

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _is_current(self) -> bool:
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            found = None
        if self._file is None or found is None:
            return self._file is found
        return os.path.samestat(found, os.fstat(self._file))

    def _load(self) -> None:
        try:
            file: int | None = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            file = None
        try:
            content = self._parse(self._path, b"" if file is None else _read_all(file))
        except BaseException:
            if file is not None:
                os.close(file)
            raise
        if self._file is not None:
            os.close(self._file)
        self._file, self._content = file, content


def _read_all(file: int) -> bytes:
    parts = []
    while part := os.read(file, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _parse_tags(path: Path, content: bytes) -> dict[str, Tag]:
    if not content:
        return {}
    try:
        return {row["tag"]: Tag(**row) for row in json.loads(content)["tags"]}
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"the file of tags is damaged ({error}): restore it, or remove it and set the tags again",
            path,
            HTTPStatus.INTERNAL_SERVER_ERROR,
        ) from None


def _files(folder: Path) -> list[Path]:
    """What is in a folder; nothing where there is none. Unlike `glob`, it hides no other error."""
    try:
        return [folder / name for name in os.listdir(folder)]
    except FileNotFoundError:
        return []


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except FileNotFoundError:
        return False


def _stored(path: Path) -> StoredController:
    found = path.stat()
    return StoredController(path.stem, found.st_size, found.st_mtime)


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
