"""Forced runs: bytes that must come next, as the tokens that the model's own tokenizer writes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from constraints.vocabulary import Vocabulary

CONTEXT = 6
"""Tokens before the run that are tokenized with it, so that it joins them as the model would write it."""
PROBES = (" ", "a", "Z", "0", "\n", '"', ",", "}", "é", "  x")
"""What may stand after an open run. Tokens that any of these would change are left to the model."""


def canonical_run(
    vocabulary: Vocabulary,
    recent: Sequence[int],
    forced: bytes,
    follow: Iterable[int] | None,
) -> list[int]:
    """The tokens that spell `forced` after the tokens `recent`, as far as nothing that follows changes them.

    `follow` is the bytes that may come after the run: empty when the text ends there, None when unknown.
    Returns [] when the model has a choice of tokens from the start.
    """
    closed = follow is not None and not tuple(follow)
    for count in dict.fromkeys((min(CONTEXT, len(recent)), min(1, len(recent)), 0)):
        context = list(recent[len(recent) - count :])
        text = _decoded(vocabulary.detokenize(context) + forced, closed)
        if text is None:
            continue
        ids = vocabulary.tokenize(text)
        if ids[:count] != context or vocabulary.detokenize(ids) != text.encode():
            continue
        kept = ids if closed else _settled(vocabulary, text, ids, follow)
        return kept[count:]
    return []


def is_left_open(vocabulary: Vocabulary, forced: bytes, follow: bytes) -> bool:
    """Whether one token can spell all of `forced` and a byte of `follow`.

    Then `canonical_run` is [] whatever came before, and need not be asked.
    """
    if not follow or len(forced) >= vocabulary.longest_token or not forced.isascii():
        return False
    return _begins_a_token(vocabulary, forced, _ends(follow))


def _decoded(text: bytes, closed: bool) -> str | None:
    """`text` as a string; of an open text, without the character that is cut off at its end."""
    for cut in range(1 if closed else 4):
        try:
            return text[: len(text) - cut].decode()
        except UnicodeDecodeError:
            continue
    return None


def _settled(vocabulary: Vocabulary, text: str, ids: list[int], follow: Iterable[int] | None) -> list[int]:
    """The tokens at the start of `ids` that stay whatever follows `text`."""
    end = _first_extendable(vocabulary, text.encode(), None if follow is None else bytes(follow))
    kept: list[int] = []
    place = 0
    for token in ids:
        place += len(vocabulary.token_bytes(token))
        if place > end:
            break
        kept.append(token)
    for probe in PROBES:
        if not kept:
            break
        longer = vocabulary.tokenize(text + probe)
        kept = _common(kept, longer)
    return kept


def _common(left: list[int], right: list[int]) -> list[int]:
    for place, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return left[:place]
    return left[: len(right)]


def _first_extendable(vocabulary: Vocabulary, text: bytes, follow: bytes | None) -> int:
    """The first place in `text` from which some token runs past its end into a byte of `follow`."""
    ends = _ends(follow)
    for start in range(max(0, len(text) - vocabulary.longest_token), len(text)):
        if _begins_a_token(vocabulary, text[start:], ends):
            return start
    return len(text)


def _ends(follow: bytes | None) -> list[bytes]:
    """What a token must have after the text that is left, to count as one that runs past its end."""
    return [b""] if follow is None or len(follow) > 16 else [bytes([byte]) for byte in follow]


def _begins_a_token(vocabulary: Vocabulary, text: bytes, ends: list[bytes]) -> bool:
    """Whether some token is `text`, one of `ends` and perhaps more."""
    spellings = vocabulary.spellings
    for end in ends:
        wanted = text + end
        place = bisect_left(spellings, wanted)
        # Without `end`, the token must be longer than the text that is left.
        place += place < len(spellings) and not end and spellings[place] == wanted
        if place < len(spellings) and spellings[place].startswith(wanted):
            return True
    return False
