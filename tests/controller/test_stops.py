"""A client's stops, against a search of the whole text after each token."""

import random

import pytest

from aici_vllm import aici
from aici_vllm.controller.branch import Branch
from aici_vllm.controller.group import Group
from aici_vllm.controller.program import Controller, NativeProgram
from aici_vllm.controller.stops import Stop, Stops
from constraints import Vocabulary
from tests.controller.fake_engine import FakeEngine
from tests.controller.native import PROMPT, saying
from tests.controller.scripts import VOCABULARY as BYTES

TEXTS = [b"", b"a", b"b", b"ab", b"ba", b"aab", b"bb", "é".encode(), b"\xc3", b"\xa9", b" "]
VOCABULARY = Vocabulary(TEXTS, eos_token_ids=[0])


def text_of(tokens: list[int]) -> bytes:
    return b"".join(TEXTS[token] for token in tokens)


def expected(stops: Stops, tokens: list[int], first: int) -> tuple[int, str | int, bytes] | None:
    """The token from `first` on that ends the text, why, and what the client sees: all anew each time."""
    for index in range(max(first, stops.min_tokens), len(tokens)):
        before, text = text_of(tokens[:index]), text_of(tokens[: index + 1])
        if tokens[index] in stops.tokens:
            return index, tokens[index], text if stops.shown else before
        ends = []
        for order, string in enumerate(stops.strings):
            wanted = string.encode()
            for start in range(len(text) - len(wanted) + 1):
                end = start + len(wanted)
                if text[start:end] == wanted and end > len(before):
                    ends.append((end, order, start))
                    break
        if ends:
            end, order, start = min(ends)
            return index, stops.strings[order], text[: end if stops.shown else start]
    return None


@pytest.mark.parametrize("seed", range(200))
def test_a_stop_is_found_where_a_search_of_the_whole_text_finds_it(seed: int) -> None:
    rng = random.Random(seed)
    tokens = [rng.randrange(1, len(TEXTS)) for _ in range(30)]
    prompt_len = rng.randrange(3)
    strings = tuple(
        "".join(rng.choice(["a", "b", "é", " "]) for _ in range(rng.randint(1, 6)))
        for _ in range(rng.randrange(3))
    )
    stops = Stops(
        strings,
        frozenset(rng.sample(range(len(TEXTS)), rng.randrange(2))),
        shown=rng.random() < 0.5,
        min_tokens=rng.choice([0, 0, 4, 10]),
    )
    wanted = expected(stops, tokens[prompt_len:], 0)
    # However the tokens come, one by one or in splices, the stop is the same.
    position, found = prompt_len, None
    while position < len(tokens) and found is None:
        new = tokens[position : position + rng.randint(1, 8)]
        found = stops.find(VOCABULARY, tokens, prompt_len, position, new)
        if found is None:
            position += len(new)
    if found is None:
        assert wanted is None
        return
    index = position + found.index
    seen = text_of(tokens[prompt_len : index + 1])
    assert wanted == (index - prompt_len, found.reason, seen[: len(seen) - found.hidden])


def ended(controller: Controller, stops: Stops, said: str = "") -> Branch:
    """The branch of a controller that a client's stop is to end."""
    group = Group(BYTES, PROMPT, max_tokens=200, min_tokens=stops.min_tokens, context=1000, stops=stops)
    engine = FakeEngine(group, choose=saying(said))
    engine.run(lambda branch: NativeProgram(controller, "", branch))
    return group.root


async def fixed() -> None:
    await aici.FixedTokens("one two three")
    await aici.gen_tokens(max_tokens=5)


async def gen() -> None:
    await aici.gen_tokens(max_tokens=50)
    await aici.FixedTokens(" never")


def test_fixed_text_ends_with_the_token_that_completes_a_stop() -> None:
    branch = ended(fixed, Stops(("e t",)))
    assert BYTES.detokenize(branch.sequence.tokens[2:]) == b"one t"
    assert (branch.finish_reason, branch.error) == ("stop", None)
    assert branch.stopped_by == Stop(4, "e t", 3)
    assert branch.settled == len(branch.sequence) - 1


def test_a_generation_ends_where_the_stop_does() -> None:
    branch = ended(gen, Stops(("cd",)), "abcdef")
    assert BYTES.detokenize(branch.sequence.tokens[2:]) == b"abcd"


def test_a_prompt_that_holds_the_stop_ends_nothing() -> None:
    branch = ended(gen, Stops(("pq", "qa")), "abc")
    assert branch.stopped_by is None


def test_a_stop_token_may_not_come_before_min_tokens() -> None:
    branch = ended(gen, Stops(tokens=frozenset([ord("b")]), min_tokens=3), "abbbb")
    text = BYTES.detokenize(branch.sequence.tokens[2:])
    assert text[3:] == b"b" and b"b" not in text[:3]
    assert branch.stopped_by == Stop(0, ord("b"), 1)
