"""The store against a dictionary, against other processes, and against disks that fail at every step."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aici_vllm.server import store as store_module
from aici_vllm.server.errors import ServiceError, StoreError, UnknownControllerError
from aici_vllm.server.store import UNFINISHED, Store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "store")
    yield made
    made.close()


def test_a_source_comes_back_under_the_hash_of_its_bytes(store: Store) -> None:
    source = "print('grüße')\r\n".encode()
    stored = store.put(source)
    assert stored.module_id == hashlib.sha256(source).hexdigest()
    assert stored.size == len(source)
    assert store.get(stored.module_id).encode() == source
    assert store.put(source) == stored
    assert store.sources() == [stored]


def test_an_unknown_hash_is_an_error_of_its_own(store: Store) -> None:
    with pytest.raises(UnknownControllerError, match="0000"):
        store.get("0" * 64)
    with pytest.raises(UnknownControllerError, match="upload it first"):
        store.move_tags("0" * 64, ["t"], "ann")


def test_an_empty_store_has_nothing_and_makes_no_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert store.sources() == [] and store.tags() == [] and store.tag("t") is None
    assert not (tmp_path / "store").exists()


def test_tags_move_and_are_listed_newest_first(store: Store) -> None:
    one, two = (store.put(source).module_id for source in (b"1", b"2"))
    store.move_tags(one, ["a", "b"], "ann")
    store.move_tags(two, ["a"], "ann")
    assert [(tag.tag, tag.module_id) for tag in store.tags()] == [("a", two), ("b", one)]
    found = store.tag("a")
    assert found is not None and (found.owner, found.updated_by) == ("ann", "ann")


def test_only_the_owner_and_admins_move_a_tag(store: Store) -> None:
    one, two = (store.put(source).module_id for source in (b"1", b"2"))
    store.move_tags(one, ["a"], "ann")
    with pytest.raises(ServiceError, match="belongs to ann"):
        store.move_tags(two, ["new", "a"], "bob")
    assert [tag.tag for tag in store.tags()] == ["a"], "all tags of a request move, or none"
    (moved,) = store.move_tags(two, ["a"], "root", admin=True)
    assert (moved.module_id, moved.owner, moved.updated_by) == (two, "ann", "root")
    store.move_tags(one, ["a"], "ann")


def test_another_process_s_changes_are_seen_at_once(store: Store) -> None:
    one, two = (store.put(source).module_id for source in (b"1", b"2"))
    other = Store(store.folder)
    for turn in range(200):
        # Same length, same clock tick, and an inode number that was just freed: a stale copy looks alike.
        wanted = (one, two)[turn % 2]
        other.move_tags(wanted, ["a"], "ann")
        found = store.tag("a")
        assert found is not None and found.module_id == wanted
    other.close()


def test_a_damaged_source_is_refused_and_mended_by_an_upload(store: Store) -> None:
    stored = store.put(b"good")
    (store.folder / "sources" / f"{stored.module_id}.py").write_bytes(b"evil")
    with pytest.raises(StoreError, match="damaged on disk: upload it again"):
        store.get(stored.module_id)
    store.put(b"good")
    assert store.get(stored.module_id) == "good"


def test_a_source_that_was_read_is_missed_when_its_file_goes_or_changes(store: Store) -> None:
    stored = store.put(b"good")
    path = store.folder / "sources" / f"{stored.module_id}.py"
    assert store.get(stored.module_id) == "good"
    # Same size and inode; the clock that stamps files may not have ticked since.
    path.write_bytes(b"evil")
    os.utime(path, ns=(0, 0))
    with pytest.raises(StoreError, match="damaged on disk"):
        store.get(stored.module_id)
    store.put(b"good")
    assert store.get(stored.module_id) == "good"
    path.unlink()
    with pytest.raises(UnknownControllerError, match="there is no controller"):
        store.get(stored.module_id)


def test_a_source_is_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    module_id = store.put(b"good").module_id
    read = []
    original = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        read.append(path)
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert [store.get(module_id) for _ in range(3)] == ["good"] * 3
    assert len(read) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"tags": [{"tag": "a"}]}', '{"tags": 5}'])
def test_a_damaged_file_of_tags_says_what_to_do(store: Store, content: str) -> None:
    store.put(b"1")
    (store.folder / "tags.json").write_text(content)
    with pytest.raises(StoreError, match="restore it, or remove it"):
        store.tags()


def test_sources_have_room_up_to_the_operators_limit(tmp_path: Path) -> None:
    store = Store(tmp_path, limit_bytes=10)
    store.put(b"123456")
    store.put(b"123456")
    with pytest.raises(StoreError, match="6 of the 10 bytes") as caught:
        store.put(b"12345")
    assert caught.value.status == 507
    store.put(b"1234")


def test_there_are_so_many_tags_and_no_more(tmp_path: Path) -> None:
    store = Store(tmp_path, most_tags=4, most_tags_of_user=2)
    one, two = (store.put(source).module_id for source in (b"1", b"2"))
    store.move_tags(one, ["ann.a", "ann.b"], "ann")
    with pytest.raises(ServiceError, match="a user 2 tags, and these would make 3") as refused:
        store.move_tags(one, ["ann.c"], "ann")
    assert refused.value.status == 403
    store.move_tags(one, ["bob.a"], "bob")
    store.move_tags(one, ["c"], "root", admin=True)
    for user, admin in (("bob", False), ("root", True)):
        with pytest.raises(StoreError, match="allows 4 tags, and these would make 5: move others") as full:
            store.move_tags(one, ["d"], user, admin)
        assert full.value.status == 507
    less = Store(tmp_path, most_tags=1, most_tags_of_user=1)
    less.move_tags(two, ["ann.a", "ann.b"], "ann")
    assert [tag.tag for tag in less.tags() if tag.module_id == two] == ["ann.a", "ann.b"]
    assert len(less.tags()) == 4
    less.close()
    store.close()


def test_an_admin_may_have_more_tags_than_a_user(tmp_path: Path) -> None:
    store = Store(tmp_path, most_tags=3, most_tags_of_user=1)
    store.move_tags(store.put(b"1").module_id, ["a", "b", "c"], "root", admin=True)
    assert len(store.tags()) == 3
    store.close()


# Disks that fail.

SYSTEM_CALLS = ["open", "write", "fsync", "close", "replace", "stat", "listdir"]
CLOSE = os.close


class Failing:
    """Stands for one function of `os`, and raises at its n-th call."""

    def __init__(self, function: Callable[..., Any], at: int, code: int):
        self.function, self.at, self.code, self.calls = function, at, code, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            if self.function is CLOSE:
                self.function(*args)  # Linux lets go of the file whatever it answers.
            raise OSError(self.code, os.strerror(self.code))
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", SYSTEM_CALLS)
def test_a_write_that_fails_anywhere_leaves_the_old_or_the_new_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    failed = 0
    for at in range(1, 40):
        folder = tmp_path / f"{at}"
        store = Store(folder)
        old = store.put(b"old").module_id
        store.move_tags(old, ["a"], "ann")
        new = hashlib.sha256(b"new").hexdigest()
        with monkeypatch.context() as patch:
            failing = Failing(getattr(os, call), at, code)
            patch.setattr(store_module.os, call, failing)
            try:
                store.put(b"new")
                store.move_tags(new, ["a", "b"], "ann")
            except StoreError as error:
                failed += 1
                assert os.strerror(code) in error.message
                assert str(folder) in str(error) and str(folder) not in error.message
                assert error.status == (507 if code == errno.ENOSPC else 503)
        fresh = Store(folder)
        state = {tag.tag: tag.module_id for tag in fresh.tags()}
        assert state in ({"a": old}, {"a": new, "b": new})
        assert fresh.get(old) == "old"
        assert new not in state.values() or fresh.get(new) == "new"
        fresh.put(b"next")
        assert not list(folder.rglob(f"{UNFINISHED}*"))
        if failing.calls < at:
            break
    assert failed >= 1
    assert failing.calls < at, "every call of this kind has failed once"


def test_a_folder_that_cannot_be_read_is_an_error_for_everything(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "store")
    for use in (store.tags, store.sources, lambda: store.get("0" * 64), lambda: store.put(b"1")):
        with pytest.raises(StoreError, match="Not a directory"):
            use()


def test_a_full_disk_of_its_own(tmp_path: Path) -> None:
    """On a file system with 64 KiB, where this machine lets us make one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system here")
    try:
        store = Store(place / "store")
        kept = [store.put(bytes([65 + n]) * 8000).module_id for n in range(3)]
        with pytest.raises(StoreError, match="No space left") as caught:
            for n in range(20):
                store.put(bytes([97 + n]) * 8000)
        assert caught.value.status == 507
        assert all(store.get(module_id) for module_id in kept)
        store.close()
    finally:
        subprocess.run(["umount", str(place)], check=True)


# Other processes.

RACER = """
import sys
from pathlib import Path
from aici_vllm.server.store import Store
folder, name, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
store = Store(folder)
shared = store.put(b"shared").module_id
for n in range(rounds):
    module_id = store.put(f"{name} {n}".encode()).module_id
    store.move_tags(module_id, [f"{name}-last", f"{name}-{n}"], name)
    assert store.tag(f"{name}-last").module_id == module_id
    assert store.get(shared) == "shared"
"""


def start(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE)


def test_processes_that_race_lose_no_change(tmp_path: Path) -> None:
    racers = [start(RACER, str(tmp_path), name, "15") for name in ("ann", "bob", "cid")]
    assert [racer.wait(60) for racer in racers] == [0, 0, 0]
    tags = {tag.tag: tag for tag in Store(tmp_path).tags()}
    assert len(tags) == 3 * 16
    assert all(tags[f"{name}-last"].module_id == tags[f"{name}-14"].module_id for name in ("ann", "bob"))
    assert len(Store(tmp_path).sources()) == 46


WRITER = """
import sys
from pathlib import Path
from aici_vllm.server.store import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
n = 0
while True:
    module_id = store.put((f"{n} " + "x" * 20000).encode()).module_id
    store.move_tags(module_id, ["first", "second"], "ann")
    n += 1
"""


def test_a_killed_writer_leaves_a_whole_state(tmp_path: Path) -> None:
    moments = [0.0, 0.002, 0.005, 0.011, 0.017, 0.023]
    for moment in moments:
        writer = start(WRITER, str(tmp_path))
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        time.sleep(moment)
        writer.send_signal(signal.SIGKILL)
        writer.wait(10)
        store = Store(tmp_path)
        tags = {tag.tag: tag.module_id for tag in store.tags()}
        assert tags.keys() in (set(), {"first", "second"})
        assert len(set(tags.values())) <= 1, "both tags move in one step"
        for module_id in tags.values():
            assert store.get(module_id).endswith("x" * 20000)
        for stored in store.sources():
            store.get(stored.module_id)
        store.put(b"goes on")
        assert not list(tmp_path.rglob(f"{UNFINISHED}*")), "the next writer clears up"
        store.close()


def test_a_writer_waits_for_a_lock_and_gives_up_with_a_word(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.05)
    with store._writing(), pytest.raises(StoreError, match="busy"):
        Store(store.folder).put(b"1")
    store.put(b"1")


def test_the_file_of_tags_is_plain_json(store: Store) -> None:
    module_id = store.put(b"1").module_id
    store.move_tags(module_id, ["a"], "ann")
    (row,) = json.loads((store.folder / "tags.json").read_text())["tags"]
    assert (row["tag"], row["module_id"], row["owner"]) == ("a", module_id, "ann")
