"""What a client reads of a script that raised, and that a long script is not taken apart for it."""

from __future__ import annotations

import pydantic_monty
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aici_vllm.controller.limits import Limits
from aici_vllm.controller.sandbox import faults
from aici_vllm.controller.sandbox.faults import script_fault

LINES = st.lists(st.text(alphabet="ab \r", max_size=4), min_size=1, max_size=30)


def raised(source: str) -> pydantic_monty.MontyRuntimeError:
    with (
        pydantic_monty.Monty(max_processes=1) as monty,
        monty.checkout() as session,
        pytest.raises(pydantic_monty.MontyRuntimeError) as caught,
    ):
        # The script is the second thing that a session is fed.
        session.feed_run("None")
        session.feed_run(source)
    return caught.value


class Whole(str):
    """A source that nobody may take apart at once."""

    def split(self, *_: object) -> list[str]:
        raise AssertionError("all lines were split")

    splitlines = split


def test_the_lines_of_a_traceback_are_found_in_a_long_source() -> None:
    source = "def f():\n    1 / 0\n" + "\n" * 100_000 + "  \nf()  # " + "x" * 5000 + "\n" * 100_000
    fault = script_fault(raised(source), Whole(source), Limits())
    assert fault.message == "ZeroDivisionError: division by zero (line 2)"
    call = "f()  # " + "x" * (faults.LONGEST_MESSAGE - 7)
    assert fault.details == (
        "Traceback (most recent call last):\n"
        f'  File "<script>", line 100004, in <module>\n    {call}\n'
        '  File "<script>", line 2, in f\n    1 / 0\n'
        "ZeroDivisionError: division by zero\n"
    )


@given(LINES, st.integers(1, 9))
def test_any_line_is_found_whatever_the_pieces(lines: list[str], piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "PIECE", piece)
        for number, line in enumerate(lines, start=1):
            assert faults._line("\n".join(lines), number) == line
