"""The text of a branch against decoding all of its bytes again."""

from __future__ import annotations

import codecs

from hypothesis import given
from hypothesis import strategies as st

from aici_vllm.server.text import BranchText

PIECES = st.one_of(
    st.text(max_size=3).map(str.encode),
    st.binary(max_size=3),
    st.sampled_from([b"\xf0\x9f", b"\x92\x9c", b""]),
)
STEPS = st.lists(st.one_of(st.lists(PIECES, max_size=4), st.integers(0, 6)), max_size=12)


def decoded(tokens: list[bytes]) -> str:
    """Every whole character, with a tail that could still become one held back."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(tokens))


@given(STEPS)
def test_what_is_shown_is_what_the_bytes_say(steps: list[list[bytes] | int]) -> None:
    text, tokens, shown = BranchText(), list[bytes](), ""
    for step in steps:
        if isinstance(step, int):
            gone = text.take_back(step)
            tokens = tokens[: max(len(tokens) - step, 0)]
            assert shown.endswith(gone)
            shown = shown[: len(shown) - len(gone)]
        else:
            shown += text.add(step)
            tokens += step
        assert shown == decoded(tokens)
    assert shown + text.finish() == b"".join(tokens).decode(errors="replace")


def test_half_a_character_waits_for_its_other_half() -> None:
    text = BranchText()
    first, second = "ß".encode()[:1], "ß".encode()[1:]
    assert text.add([b"a", first]) == "a"
    assert text.add([second]) == "ß"
    assert text.take_back(1) == "ß"
    assert text.finish() == "\ufffd"
