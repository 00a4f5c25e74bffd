"""The picture of a branch: what stands, and what was struck out, where it stood."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aici_vllm.commands.branches import STRUCK, Picture, Pictures


def fork(*parts: tuple[str, str], index: int = 0, **more: Any) -> dict[str, Any]:
    return {"index": index, "parts": [{"kind": kind, "text": text} for kind, text in parts], **more}


def test_text_taken_back_stays_in_its_place() -> None:
    picture = Picture(0)
    picture.update(fork(("spliced", "Say "), ("sampled", "no"), ("sampled", "w")))
    picture.update(fork((STRUCK, "y now"), ("spliced", "ng")))
    assert [(piece.kind, piece.text) for piece in picture.pieces] == [
        ("spliced", "Sa"),
        (STRUCK, "y "),
        (STRUCK, "now"),
        ("spliced", "ng"),
    ]
    assert picture.text == "Sang"


STEPS = st.lists(st.one_of(st.tuples(st.sampled_from(["spliced", "sampled"]), st.text()), st.integers(0, 9)))


@given(STEPS)
def test_what_stands_is_the_text(steps: list[tuple[str, str] | int]) -> None:
    picture, stands, written = Picture(0), "", ""
    for step in steps:
        if isinstance(step, int):
            gone = stands[max(len(stands) - step, 0) :]
            picture.update(fork((STRUCK, gone)))
            stands = stands[: len(stands) - len(gone)]
        else:
            picture.update(fork(step))
            stands += step[1]
            written += step[1]
        assert picture.text == stands
        assert "".join(piece.text for piece in picture.pieces) == written


def test_branches_are_kept_apart() -> None:
    pictures = Pictures()
    pictures.update({"forks": [fork(("sampled", "a"), logs="x"), fork(("sampled", "b"), index=1)]})
    pictures.update({"forks": [fork(index=1, finish_reason="fail", error="no")], "usage": {"cost": 1}})
    first, second = pictures.branches.values()
    assert (first.text, first.logs, first.finish_reason) == ("a", "x", None)
    assert (second.text, second.finish_reason, second.error) == ("b", "fail", "no")
    assert pictures.usage == {"cost": 1}
