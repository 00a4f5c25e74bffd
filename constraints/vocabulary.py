"""`Vocabulary`: the exact bytes of every token id, and the model's own way to write text as tokens."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, wraps
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary
from zipfile import BadZipFile

import numpy as np

from constraints.errors import ConstraintError
from constraints.token_bytes import read_tokenizer
from constraints.token_set import Row, TokenSet, freeze, pack

FORMAT = b"vocabulary 1"
"""Part of every key: raise when the same tokenizer gives another vocabulary than before."""

MAX_BEYOND = 4096
"""Texts whose longer tokens a vocabulary remembers."""

Made = TypeVar("Made")

Beyond = tuple[list[int], list[tuple[int, ...]]]
"""Two tokens that write a text and a byte, [] for none; and the ids of all tokens that begin with both."""

_known: WeakValueDictionary[str, Vocabulary] = WeakValueDictionary()


class Vocabulary:
    """Token ids and their bytes. Equal content gives equal `key`s; every cache of this package uses them.

    `tokens[i]` is the bytes of token i, `None` where no token exists; `specials` maps the ids of special
    tokens to their spelling; `encode` writes text as ids and adds nothing. `size` is what the model's
    output has, at least `len(tokens)`: the ids in between are padding and never allowed.
    """

    def __init__(
        self,
        tokens: Sequence[bytes | None],
        *,
        specials: dict[int, bytes] | None = None,
        eos_token_ids: Iterable[int] = (),
        bos_token_id: int | None = None,
        encode: Callable[[str], Sequence[int]] | None = None,
        size: int | None = None,
    ):
        self.size = len(tokens) if size is None else size
        if self.size < len(tokens):
            raise ConstraintError(f"size {size} is smaller than the tokenizer's {len(tokens)} tokens")
        self.num_words = (self.size + 31) // 32
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.bos_token_id = bos_token_id
        self._specials = {int(i): bytes(text) for i, text in (specials or {}).items()}
        self._check_ids()
        for token in self.eos_token_ids:
            self._specials.setdefault(token, tokens[token] or b"")
        texts = [b"" if text is None else bytes(text) for text in tokens]
        self._bytes = [b"" if i in self._specials else text for i, text in enumerate(texts)]
        self._bytes += [b""] * (self.size - len(tokens))
        self._encode = encode
        self._beyond: dict[bytes, list[Beyond]] = {}

    def _check_ids(self) -> None:
        named = [*self.eos_token_ids, *self._specials]
        if self.bos_token_id is not None:
            named.append(self.bos_token_id)
        if bad := [i for i in named if not 0 <= i < self.size]:
            raise ConstraintError(f"special token ids {bad} are not in 0..{self.size - 1}")

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Any, size: int | None = None, *, eos_token_ids: Iterable[int] | None = None
    ) -> Vocabulary:
        """The vocabulary of a tokenizer; the same object for the same content.

        Args:
            tokenizer: a Hugging Face fast tokenizer, a `tokenizers.Tokenizer`, mistral_common's Tekkenizer
                or a tiktoken Encoding.
            size: tokens in the model's output, when it has more than the tokenizer.
            eos_token_ids: the ids that end a sequence, when the tokenizer's own is not all of them.

        Raises:
            ConstraintError: the tokenizer's tokens have no exact bytes, or `size` is too small.
        """
        read = read_tokenizer(tokenizer)
        made = cls(
            read.tokens,
            specials=read.specials,
            eos_token_ids=read.eos if eos_token_ids is None else eos_token_ids,
            bos_token_id=read.bos,
            encode=read.encode,
            size=size,
        )
        return _known.setdefault(made.key, made)

    @cached_property
    def key(self) -> str:
        """Hex hash of the content: sizes, bytes, special tokens, and how a probe text is tokenized."""
        digest = hashlib.sha256(FORMAT)
        specials = sorted((i, text.hex()) for i, text in self._specials.items())
        head = [self.size, self.eos_token_ids, self.bos_token_id, specials, self._probe()]
        digest.update(json.dumps(head).encode())
        digest.update(np.array([len(text) for text in self._bytes], np.int32).tobytes())
        digest.update(b"".join(self._bytes))
        return digest.hexdigest()

    def _probe(self) -> list[int]:
        """Tokenizers may share their tokens and differ in how they split text."""
        return self.tokenize('  def f(x1):\n\treturn {"Größe": [1234, "日本語"]}  \n') if self._encode else []

    def save(self, path: Path) -> None:
        """Write everything but the tokenizer's way of splitting text; `load` reads it."""
        head = {
            "size": self.size,
            "eos": self.eos_token_ids,
            "bos": self.bos_token_id,
            "specials": {i: text.hex() for i, text in self._specials.items()},
        }
        lengths = np.array([len(text) for text in self._bytes], np.int32)
        text = np.frombuffer(b"".join(self._bytes), np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            np.savez(file, head=np.array(json.dumps(head)), lengths=lengths, text=text)
        # Whoever reads meanwhile finds the whole file or none.
        os.replace(file.name, path)

    @classmethod
    def load(cls, path: Path, encode: Callable[[str], Sequence[int]] | None = None) -> Vocabulary:
        """The vocabulary that `save` wrote. `ConstraintError` when the file is not one."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                head, text = json.loads(str(stored["head"])), stored["text"].tobytes()
                ends = np.cumsum(stored["lengths"]).tolist()
        except (OSError, ValueError, KeyError, BadZipFile, EOFError) as error:
            raise ConstraintError(f"{path} holds no vocabulary: {error}; delete it") from None
        return cls(
            [text[a:b] for a, b in zip([0, *ends], ends, strict=False)],
            specials={int(i): bytes.fromhex(spelling) for i, spelling in head["specials"].items()},
            eos_token_ids=head["eos"],
            bos_token_id=head["bos"],
            encode=encode,
            size=head["size"],
        )

    @property
    def eos_token_id(self) -> int:
        """The first end-of-sequence id. `ConstraintError` when the tokenizer names none."""
        if not self.eos_token_ids:
            raise ConstraintError("the tokenizer names no end-of-sequence token; pass eos_token_ids")
        return self.eos_token_ids[0]

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` adds to the text: none for special tokens and for padding."""
        return self._bytes[self._checked(token)]

    @property
    def texts(self) -> list[bytes]:
        """`token_bytes` of every id. Not to be changed."""
        return self._bytes

    def token_text(self, token: int) -> bytes:
        """As `token_bytes`, with special tokens spelled out."""
        return self._specials.get(token) or self.token_bytes(token)

    def is_special(self, token: int) -> bool:
        return self._checked(token) in self._specials

    def _checked(self, token: int) -> int:
        if not 0 <= token < self.size:
            raise IndexError(f"token {token} is not in 0..{self.size - 1}")
        return token

    @cached_property
    def ids_by_bytes(self) -> dict[bytes, tuple[int, ...]]:
        """All text tokens by their bytes: several where the tokenizer has duplicates."""
        grouped: dict[bytes, tuple[int, ...]] = {}
        for token, text in enumerate(self._bytes):
            if text:
                grouped[text] = (*grouped.get(text, ()), token)
        return grouped

    @cached_property
    def spellings(self) -> list[bytes]:
        """The bytes of all text tokens, sorted, each once."""
        return sorted(self.ids_by_bytes)

    def beyond(self, text: bytes) -> list[Beyond]:
        """The tokens that begin with `text` and go on, by the byte that follows it. Remembered."""
        known = self._beyond.get(text)
        if known is None:
            if len(self._beyond) >= MAX_BEYOND:
                self._beyond.clear()
            known = self._beyond[text] = self._going_beyond(text)
        return known

    def _going_beyond(self, text: bytes) -> list[Beyond]:
        found: dict[int, list[tuple[int, ...]]] = {}
        place = bisect_right(self.spellings, text)
        while place < len(self.spellings) and (longer := self.spellings[place]).startswith(text):
            found.setdefault(longer[len(text)], []).append(self.ids_by_bytes[longer])
            place += 1
        whole = self.ids_by_bytes.get(text)
        groups: list[Beyond] = []
        for byte, ids in found.items():
            alone = self.ids_by_bytes.get(bytes((byte,)))
            groups.append(([whole[0], alone[0]] if whole and alone else [], ids))
        return groups

    @cached_property
    def longest_token(self) -> int:
        """Bytes in the longest token."""
        return max(map(len, self._bytes), default=0)

    @cached_property
    def longest_text(self) -> int:
        """Bytes in the longest token, special ones as they are spelled."""
        return max([self.longest_token, *map(len, self._specials.values())])

    @cached_property
    def text_tokens(self) -> TokenSet:
        """Every token that adds bytes: no special token, no padding. Read-only."""
        ids = np.flatnonzero(np.array([bool(text) for text in self._bytes]))
        return TokenSet(self.size, self, freeze(pack(ids, self.size)))

    @cached_property
    def eos_row(self) -> Row:
        """The mask that allows the end of the sequence and nothing else. Read-only."""
        return freeze(pack(np.array(self.eos_token_ids, np.int64), self.size))

    def token_set(self, ids: Iterable[int] = ()) -> TokenSet:
        """A set of `ids` whose repr spells the tokens."""
        return TokenSet.of(ids, self.size, self)

    def all_tokens(self) -> TokenSet:
        """Every id, special tokens included."""
        everything = TokenSet(self.size, self)
        everything.set_all(True)
        return everything

    def tokenize(self, text: str | bytes) -> list[int]:
        """Text as the model's tokenizer writes it: nothing added in front, special spellings recognised.

        Bytes that are no UTF-8 become U+FFFD, except a character cut off at the end: its bytes are kept, as
        the longest tokens that fit.
        """
        if isinstance(text, str):
            return self._tokenize_text(text)
        cut = len(text) - len(_incomplete_tail(text))
        return self._tokenize_text(text[:cut].decode(errors="replace")) + self.greedy(text[cut:])

    def _tokenize_text(self, text: str) -> list[int]:
        if not text:
            return []
        if self._encode is None:
            return self.greedy(text.encode(errors="replace"))
        return [int(i) for i in self._encode(text)]

    def greedy(self, text: bytes) -> list[int]:
        """`text` as the longest tokens that fit, from the left.

        `ConstraintError` for a byte without a token.
        """
        ids: list[int] = []
        place = 0
        while place < len(text):
            for end in range(min(len(text), place + self.longest_token), place, -1):
                if found := self.ids_by_bytes.get(text[place:end]):
                    ids.append(found[0])
                    place = end
                    break
            else:
                raise ConstraintError(f"no token of the vocabulary spells byte {text[place]:#04x}")
        return ids

    def detokenize(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens; special tokens, padding and ids out of range add none."""
        size = self.size
        return b"".join([self._bytes[i] for i in ids if 0 <= i < size])

    def token_repr(self, token: int) -> str:
        """For logs: quoted text, `EOS`, `EMPTY[id]` for special tokens, `HEX[..]` for no UTF-8, `OOB[id]`."""
        if not 0 <= token < self.size:
            return f"OOB[{token}]"
        if token in self.eos_token_ids:
            return "EOS"
        text = self._bytes[token]
        if not text:
            return f"EMPTY[{token}]"
        try:
            return json.dumps(text.decode(), ensure_ascii=False)
        except UnicodeDecodeError:
            return f"HEX[{text.hex()}]"

    def tokens_repr(self, ids: Iterable[int]) -> str:
        """For logs: text tokens joined by `‧` inside one pair of quotes, others in `≺≻`."""
        names = [self.token_repr(token) for token in ids]
        return '"' + "‧".join(n[1:-1] if n.startswith('"') else f"≺{n}≻" for n in names) + '"'

    def __repr__(self) -> str:
        return f"Vocabulary({self.size} tokens, {self.key[:12]})"


def once_per_vocabulary(make: Callable[[Vocabulary], Made]) -> Callable[[Vocabulary], Made]:
    """`make`, which keeps what it made of a vocabulary as long as the vocabulary lives."""
    made: WeakKeyDictionary[Vocabulary, Made] = WeakKeyDictionary()

    @wraps(make, updated=())
    def find(vocabulary: Vocabulary) -> Made:
        known = made.get(vocabulary)
        if known is None:
            known = made[vocabulary] = make(vocabulary)
        return known

    return find


def _incomplete_tail(text: bytes) -> bytes:
    """The bytes at the end of `text` that begin a UTF-8 character and do not finish it."""
    for length in range(1, min(4, len(text) + 1)):
        lead = text[-length]
        if lead & 0xC0 != 0x80:
            needed = (
                2 if 0xC2 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4 if 0xF0 <= lead < 0xF5 else 1
            )
            return text[-length:] if needed > length else b""
    return b""
