"""The index of a regex: same masks, bounded, survives on disk, arrives in mid-sequence."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from random import Random

import pytest

from constraints import ConstraintError, TokenSet, Vocabulary
from constraints.index import Builder, Index, build, load, path_of, trim
from constraints.regex_constraint import RegexConstraint, RegexMachine
from tests.constraints.test_regex_constraint import PATTERNS, VOCABULARY


def all_states(machine: RegexMachine, limit: int = 200) -> list[int]:
    found, queue = [machine.start], [machine.start]
    while queue and len(found) < limit:
        for after in machine.automaton.row(queue.pop()):
            if after >= 0 and after not in found:
                found.append(after)
                queue.append(after)
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_index_has_the_masks_of_the_walk(pattern: str, tmp_path: Path):
    build(VOCABULARY, pattern, tmp_path / "index.npy")
    index = load(tmp_path / "index.npy", VOCABULARY)
    assert index is not None
    machine = RegexMachine(VOCABULARY, pattern)
    machine.index = index
    for state in all_states(machine):
        row = machine.indexed_row(state)
        if row is not None:
            assert (row == machine.walked_row(state)).all()
    assert machine.indexed_row(machine.start) is not None


def test_it_takes_over_in_mid_sequence_and_no_mask_changes(
    tmp_path: Path, smol: Vocabulary, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("constraints.regex_constraint.WORTH_SECONDS", float("inf"))
    builder = Builder(tmp_path)
    pattern = r'"[a-z]+(, [a-zé]+){0,3}"'
    one, two = (RegexConstraint(RegexMachine(smol, pattern, builder)) for _ in range(2))
    random = Random(0)
    for step in range(30):
        if step == 3:
            assert one.machine.index is None and two.machine.index is None
            assert builder.ask(smol, pattern, one.machine._use)
            builder.wait()
            assert one.machine.index is not None and two.machine.index is None, builder.failures
        assert (one.mask_row() == two.mask_row()).all()
        onward = [
            t for t in TokenSet(smol.size, row=one.mask_row()).ids().tolist() if t not in smol.eos_token_ids
        ]
        if not onward:
            break
        token = random.choice(onward)
        one.append_token(token)
        two.append_token(token)
    again = RegexMachine(smol, pattern, Builder(tmp_path))
    assert again.index is not None, "the file on disk is found by the next process"
    assert not builder.ask(smol, pattern, one.machine._use)


def test_a_pattern_that_costs_time_asks_for_its_index(tmp_path: Path):
    builder = Builder(tmp_path)
    machine = RegexMachine(VOCABULARY, "[ab]+c", builder)
    machine.spent(1.0)
    builder.wait()
    assert machine.index is not None, builder.failures


def test_what_is_too_large_fails_and_the_pattern_works_on(tmp_path: Path):
    builder = Builder(tmp_path, max_seconds=0.01)
    machine = RegexMachine(VOCABULARY, "[ab]+c", builder)
    assert builder.ask(VOCABULARY, "[ab]+c", machine._use)
    builder.wait()
    assert machine.index is None and len(builder.failures) == 1
    assert RegexConstraint(machine).mask_row().any()
    with pytest.raises(ConstraintError, match="100 states"):
        build(VOCABULARY, "(a|b)*a(a|b){30}", tmp_path / "index.npy", max_states=100)


def test_what_was_used_longest_ago_is_deleted_first(tmp_path: Path):
    for age, name in enumerate(("index-new", "index-old", "index-oldest")):
        for suffix in (".npy", ".states.npy"):
            (tmp_path / (name + suffix)).write_bytes(b"." * 100)
            os.utime(tmp_path / (name + suffix), (1000 - age, 1000 - age))
    # One file of an index that was used says that of the other.
    os.utime(tmp_path / "index-oldest.npy", (2000, 2000))
    (tmp_path / "index-gone-x1.tmp").write_bytes(b"." * 100)
    os.utime(tmp_path / "index-gone-x1.tmp", (1, 1))
    trim(tmp_path, 500)
    names = {"index-new.npy", "index-new.states.npy", "index-oldest.npy", "index-oldest.states.npy"}
    assert {path.name for path in tmp_path.iterdir()} == names
    trim(tmp_path, 399)
    assert {path.name for path in tmp_path.iterdir()} == {"index-oldest.npy", "index-oldest.states.npy"}


def test_the_folder_is_trimmed_after_a_build_and_the_index_is_used(tmp_path: Path):
    builder = Builder(tmp_path, max_bytes=0)
    machine = RegexMachine(VOCABULARY, "[ab]+c", builder)
    assert builder.ask(VOCABULARY, "[ab]+c", machine._use)
    builder.wait()
    assert not list(tmp_path.iterdir()), builder.failures
    row = machine.indexed_row(machine.start)
    assert row is not None and (row == machine.walked_row(machine.start)).all()


def test_who_finds_an_index_uses_it(tmp_path: Path):
    path = path_of(tmp_path, VOCABULARY, "a+")
    build(VOCABULARY, "a+", path)
    os.utime(path, (1000, 1000))
    assert Builder(tmp_path).find(VOCABULARY, "a+") is not None
    assert path.stat().st_mtime > 1000


def test_a_process_that_is_killed_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    builder = Builder(tmp_path)
    path = path_of(tmp_path, VOCABULARY, "[ab]+c")
    other = tmp_path / "index-other-x1.tmp"

    def run(*args: object, **how: object) -> None:
        path.with_name(f"{path.stem}-x1.tmp").touch()
        other.touch()
        raise subprocess.TimeoutExpired("build", 1)

    monkeypatch.setattr(subprocess, "run", run)
    assert builder.ask(VOCABULARY, "[ab]+c", lambda index: None)
    builder.wait()
    assert path in builder.failures
    assert list(tmp_path.glob("*.tmp")) == [other], "another process writes the other one"


def test_no_error_ends_the_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("constraints.index.MAX_ASKED", 1)
    builder = Builder(tmp_path)

    def broken(index: Index) -> None:
        raise KeyError("nobody expects this")

    for pattern in ("a+", "b+"):
        build(VOCABULARY, pattern, path_of(tmp_path, VOCABULARY, pattern))
    monkeypatch.setattr(builder, "_build", lambda *job: None)
    for pattern in ("a+", "b+"):
        assert builder.ask(VOCABULARY, pattern, broken)
    builder.wait()
    assert caplog.text.count("KeyError: ") == 2
    assert list(builder.failures) == [path_of(tmp_path, VOCABULARY, "b+")]
    assert builder.ask(VOCABULARY, "a+", lambda index: None), "it was forgotten when the next one was asked"
    builder.wait()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x93NUMPY\x01\x00"])
def test_a_broken_file_is_no_index(tmp_path: Path, content: bytes):
    path = path_of(tmp_path, VOCABULARY, "a+")
    build(VOCABULARY, "a+", path)
    assert load(path, VOCABULARY) is not None
    for part in (path, path.with_suffix(".states.npy")):
        kept = part.read_bytes()
        part.write_bytes(content)
        assert load(path, VOCABULARY) is None
        part.write_bytes(kept)


def test_states_have_the_same_names_in_another_order_of_discovery():
    one, two = (
        RegexMachine(VOCABULARY, "(a|é){2,5}b|c+").automaton,
        RegexMachine(VOCABULARY, "(a|é){2,5}b|c+").automaton,
    )
    for text in (b"a", b"aa", b"\xc3", b"c", b"a\xc3\xa9a"):
        one.step(one.start, text)
    for text in (b"c", b"a\xc3\xa9a", b"\xc3", b"aa", b"a"):
        assert two.digest(two.step(two.start, text)) == one.digest(one.step(one.start, text))


def test_without_llguidance_the_walk_gives_the_same_masks():
    for pattern in PATTERNS[:12]:
        machine = RegexMachine(VOCABULARY, pattern)
        for state in all_states(machine, 20):
            machine.accepts(state)
        plain, walked = RegexConstraint(machine), RegexConstraint(RegexMachine(VOCABULARY, pattern))
        walked.machine.fresh = None
        assert (plain.mask_row() == walked.mask_row()).all()
