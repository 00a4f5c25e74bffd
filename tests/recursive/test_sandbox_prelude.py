"""The sandbox code of the helpers, run as such in a bare session."""

import pytest
from pydantic_monty import Monty

from aici_vllm.recursive.sandbox_prelude import HELPER_NAMES, PRELUDE, REBIND, VARIABLES


@pytest.fixture
def session():
    with Monty() as pool, pool.checkout() as made:
        made.feed_run(PRELUDE)
        yield made


def test_helpers_get_their_names_and_get_them_again(session):
    session.feed_run(REBIND)
    session.feed_run("FINAL = FINAL_VAR = SHOW_VARS = None")
    session.feed_run(REBIND)
    for name in HELPER_NAMES:
        assert session.feed_run(f"{name} is not None")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("1", "1"),
        ("'a'", "'a'"),
        ("[1, 'b', (2,)]", "[1, 'b', (2,)]"),
        ("{'k': [1], 2: {}}", "{'k': [1], 2: {}}"),
        ("b'x'", "b'x'"),
        ("None", "None"),
        ("{1}", "{1}"),
        ("'x' * 1000", repr("x" * 500)[:500]),
        ("list(range(60))", "[" + ", ".join(map(str, range(50))) + ", ...]"),
        ("[[[[1]]]]", "[[[[1]]]]"),
    ],
)
def test_variables_are_shown_like_repr_and_cut(session, value, shown):
    session.feed_run(f"v = {value}\nhidden = 1\nisinstance = len = locals = None")
    listed = session.feed_run(VARIABLES, inputs={"__hidden__": ["hidden"]})
    assert listed["v"] == shown and "hidden" not in listed
    assert not any(name.startswith("__") for name in listed)
