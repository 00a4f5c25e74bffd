"""The index of a regex: the masks of all its states, made by another process in the background.

The other process is bounded in time, memory and size of its result, and may die without harm. What it makes
is a file, mapped into memory by everyone who uses the pattern, now or after a restart.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import Full, Queue
from tempfile import NamedTemporaryFile
from threading import Lock, Thread

import numpy as np

from constraints.errors import ConstraintError
from constraints.regex_automaton import RegexAutomaton
from constraints.regex_syntax import parse
from constraints.token_set import Row, pack
from constraints.trie import StepTable, trie_of
from constraints.vocabulary import Vocabulary

FORMAT = "index 2"
"""Part of every file name: raise when masks or names of states change."""
MAX_ROW_BYTES = 64 * 1024 * 1024
"""Distinct masks of one index."""
MAX_STATES = 20_000
MAX_MEMORY = 2 * 1024**3
"""Address space of the process that builds."""
MAX_SECONDS = 20
MAX_FOLDER_BYTES = 1024**3
"""Of all files in the folder; what was used longest ago is deleted."""
WAITING = 64
"""Patterns that may wait to be built; others are not worth it."""
MAX_ASKED = 10_000
"""Patterns that are known to have been asked for, and reasons why some have no index."""

log = logging.getLogger(__name__)


def default_folder() -> Path:
    """`constraints` in `$AICI_CACHE`, else in `aici` in `$XDG_CACHE_HOME`, else in `~/.cache/aici`."""
    return _folder(os.environ.get("AICI_CACHE"), os.environ.get("XDG_CACHE_HOME"))


@lru_cache(8)
def _folder(named: str | None, base: str | None) -> Path:
    if named:
        return Path(named).expanduser() / "constraints"
    return (Path(base) if base else Path.home() / ".cache") / "aici" / "constraints"


@dataclass
class Index:
    """The masks of the states of one pattern, without the end of the sequence."""

    rows: Row
    """int32[distinct masks, num_words], mapped from the file."""
    row_of: dict[bytes, int]
    """The mask of a state, by the digest of the state."""

    def get(self, digest: bytes) -> Row | None:
        place = self.row_of.get(digest)
        return None if place is None else self.rows[place]


def path_of(folder: Path, vocabulary: Vocabulary, pattern: str) -> Path:
    return Path(_path_of(folder, vocabulary, pattern))


def _path_of(folder: Path, vocabulary: Vocabulary, pattern: str) -> str:
    """As `path_of`; a `Path` is slow to make, and a first mask waits for this."""
    named = f"{FORMAT} {vocabulary.key} {pattern}".encode(errors="surrogatepass")
    return f"{folder}/index-{hashlib.blake2b(named, digest_size=20).hexdigest()}.npy"


def load(path: Path, vocabulary: Vocabulary) -> Index | None:
    """The index in `path`; None when there is none, or a broken one."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        names = np.load(path.with_suffix(".states.npy"), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if rows.ndim != 2 or rows.dtype != np.int32 or rows.shape[1] != vocabulary.num_words:
        return None
    if names.dtype != np.uint8 or names.ndim != 2 or names.shape[1] != 20:
        return None
    places = names[:, 16:].copy().view(np.int32)[:, 0].tolist()
    if any(not 0 <= place < len(rows) for place in places):
        return None
    return Index(rows, {name.tobytes(): place for name, place in zip(names[:, :16], places, strict=True)})


def build(vocabulary: Vocabulary, pattern: str, path: Path, max_states: int = MAX_STATES) -> int:
    """Write the index of `pattern` to `path`; return how many states it has.

    `ConstraintError` when it is too large.
    """
    automaton = RegexAutomaton(parse(pattern))
    trie = trie_of(vocabulary)
    steps = StepTable(automaton.row)
    places: dict[bytes, int] = {}
    rows: list[Row] = []
    place_of: dict[int, int] = {}
    queue = [automaton.start]
    most = max(1, MAX_ROW_BYTES // (4 * vocabulary.num_words))
    while queue:
        state = queue.pop()
        if state in place_of:
            continue
        ends = trie.walk_by(steps, state)
        allowed = np.flatnonzero(ends >= 0)
        row = pack(allowed, vocabulary.size)
        place = places.setdefault(row.tobytes(), len(rows))
        if place == len(rows):
            rows.append(row)
        place_of[state] = place
        if len(rows) > most or len(place_of) > max_states:
            raise ConstraintError(f"the index needs more than {most} masks or {max_states} states")
        queue.extend(np.unique(ends[allowed]).tolist())
    _write(path, np.stack(rows), {automaton.digest(state): place for state, place in place_of.items()})
    return len(place_of)


def _write(path: Path, rows: Row, places: dict[bytes, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = b"".join(digest + place.to_bytes(4, "little") for digest, place in places.items())
    for target, array in (
        (path.with_suffix(".states.npy"), np.frombuffer(names, np.uint8).reshape(-1, 20)),
        (path, rows),
    ):
        with NamedTemporaryFile(dir=path.parent, prefix=f"{path.stem}-", suffix=".tmp", delete=False) as file:
            np.save(file, array)
        os.replace(file.name, target)


def trim(folder: Path, max_bytes: int) -> None:
    """Delete what was used longest ago, until the rest of `folder` takes `max_bytes`.

    Who has such a file mapped keeps what is in it.
    """
    sizes: dict[str, int] = {}
    used: dict[str, int] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            # Both files of an index are one: one without the other is of no use.
            name = entry.name.partition(".")[0]
            # Another process may delete what is listed.
            with suppress(FileNotFoundError):
                about = entry.stat()
                sizes[name] = sizes.get(name, 0) + about.st_size
                used[name] = max(used.get(name, 0), about.st_mtime_ns)
    total = sum(sizes.values())
    for name in sorted(used, key=used.__getitem__):
        if total <= max_bytes:
            return
        _delete(folder, f"{name}.*")
        total -= sizes[name]


def _delete(folder: Path, names: str) -> None:
    for path in folder.glob(names):
        with suppress(OSError):
            path.unlink()


class Builder:
    """Builds indexes one at a time, each in a process of its own. `failures` says why a path has none."""

    def __init__(
        self,
        folder: Path | None = None,
        max_seconds: float = MAX_SECONDS,
        max_bytes: int = MAX_FOLDER_BYTES,
    ):
        self.folder = folder
        self.max_seconds = max_seconds
        self.max_bytes = max_bytes
        self.failures: dict[Path, str] = {}
        self._queue: Queue[tuple[Vocabulary, str, Path, Callable[[Index], None]]] = Queue(WAITING)
        self._asked: set[Path] = set()
        self._thread: Thread | None = None
        self._lock = Lock()

    def find(self, vocabulary: Vocabulary, pattern: str) -> Index | None:
        """The index on disk, None when there is none."""
        path = _path_of(self.folder or default_folder(), vocabulary, pattern)
        if not os.path.exists(path):
            return None
        # `trim` takes this for the time of its last use; a folder that is only read is trimmed by nobody.
        with suppress(OSError):
            os.utime(path)
        return load(Path(path), vocabulary)

    def ask(self, vocabulary: Vocabulary, pattern: str, ready: Callable[[Index], None]) -> bool:
        """Build in the background and call `ready` from there.

        False when it was asked for before, or too many wait.
        """
        path = self._path(vocabulary, pattern)
        with self._lock:
            if path in self._asked:
                return False
            try:
                self._queue.put_nowait((vocabulary, pattern, path, ready))
            except Full:
                return False
            if len(self._asked) >= MAX_ASKED:
                self._asked.clear()
            self._asked.add(path)
            if self._thread is None:
                self._thread = Thread(target=self._work, name="constraint indexes", daemon=True)
                self._thread.start()
        return True

    def wait(self) -> None:
        """Until everything that was asked for is built or has failed."""
        self._queue.join()

    def _path(self, vocabulary: Vocabulary, pattern: str) -> Path:
        return path_of(self.folder or default_folder(), vocabulary, pattern)

    def _work(self) -> None:
        while True:
            vocabulary, pattern, path, ready = self._queue.get()
            try:
                self._build(vocabulary, pattern, path)
                index = load(path, vocabulary)
                if index is not None:
                    ready(index)
                trim(path.parent, self.max_bytes)
            except (OSError, subprocess.SubprocessError, ConstraintError) as error:
                # Without an index the pattern runs on as before; the reason is kept for whoever asks.
                self._failed(path, error)
            except Exception as error:
                log.exception("an index failed to be built; others still are")
                self._failed(path, error)
            finally:
                self._queue.task_done()

    def _failed(self, path: Path, error: Exception) -> None:
        if len(self.failures) >= MAX_ASKED:
            self.failures.clear()
        self.failures[path] = str(error)
        # A process that is killed leaves what it was writing.
        _delete(path.parent, f"{path.stem}-*.tmp")

    def _build(self, vocabulary: Vocabulary, pattern: str, path: Path) -> None:
        stored = path.parent / f"vocabulary-{vocabulary.key[:40]}.npz"
        if not stored.exists():
            vocabulary.save(stored)
        job = json.dumps({"vocabulary": str(stored), "pattern": pattern, "path": str(path)})
        done = subprocess.run(
            [sys.executable, "-c", "from constraints.index import main; main()"],
            input=job,
            text=True,
            capture_output=True,
            timeout=self.max_seconds,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            check=False,
        )
        if done.returncode:
            raise ConstraintError(done.stderr.strip().rsplit("\n", 1)[-1] or f"exit status {done.returncode}")


def main() -> None:
    """The process that builds one index: bounded before it reads its job."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    os.nice(19)
    if sys.platform == "linux":
        # An index is for later: no forward pass may wait for it. Some containers forbid the call.
        with suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    job = json.load(sys.stdin)
    build(Vocabulary.load(Path(job["vocabulary"])), job["pattern"], Path(job["path"]))


builder = Builder()
"""The builder of this process. It writes to `default_folder()`."""
