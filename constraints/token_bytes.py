"""How tokenizers spell their tokens: the exact bytes of every id, and how to encode text plainly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from constraints.errors import ConstraintError

EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>")
"""What a tokenizer without settings calls its end of sequence, most usual first."""

LONG = 4096
"""Characters that are encoded in some 4 ms, in which no other thread runs."""

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass
class TokenBytes:
    """What a vocabulary needs to know of a tokenizer."""

    tokens: list[bytes | None]
    """Bytes by id. Special tokens have none; `None` marks an id without a token."""
    specials: dict[int, bytes]
    """The spelling of every special token, by id."""
    encode: Callable[[str], Sequence[int]]
    """Text to ids: no special token added, no artificial leading space, special spellings recognised."""
    eos: list[int] = field(default_factory=list)
    bos: int | None = None


def read_tokenizer(tokenizer: Any) -> TokenBytes:
    """Read a Hugging Face fast tokenizer, a `tokenizers.Tokenizer`, a Tekkenizer or a tiktoken encoding.

    Raises `ConstraintError` for a tokenizer whose tokens have no exact bytes.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        return _read_hugging_face(tokenizer, backend)
    tekken = getattr(getattr(tokenizer, "instruct_tokenizer", None), "tokenizer", tokenizer)
    if hasattr(tekken, "id_to_byte_piece") and hasattr(tekken, "num_special_tokens"):
        return _read_tekken(tekken)
    if hasattr(tokenizer, "_mergeable_ranks"):
        return _read_tiktoken(tokenizer)
    raise ConstraintError(
        f"cannot read the bytes of the tokens of a {type(tokenizer).__name__}; give a Hugging Face fast"
        " tokenizer, a tokenizers.Tokenizer, a mistral_common Tekkenizer or a tiktoken Encoding"
    )


def _read_hugging_face(tokenizer: Any, backend: Any) -> TokenBytes:
    spec = json.loads(backend.to_str())
    spell = _speller(spec)
    model = spec["model"]
    vocab = model["vocab"]
    pieces = vocab.items() if isinstance(vocab, dict) else ((p[0], i) for i, p in enumerate(vocab))
    spelled = {index: spell(piece) for piece, index in pieces}
    specials: dict[int, bytes] = {}
    for added in spec.get("added_tokens") or []:
        spelled[added["id"]] = added["content"].encode()
        if added["special"]:
            specials[added["id"]] = added["content"].encode()
    for index in _unknown_ids(model):
        specials.setdefault(index, spelled.get(index, b""))
    tokens: list[bytes | None] = [spelled.get(i) for i in range(max(spelled, default=-1) + 1)]
    plain = _plain_encoder(backend, spec)
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        by_name = {text: index for index, text in specials.items()}
        eos = next((by_name[n.encode()] for n in EOS_NAMES if n.encode() in by_name), None)
    return TokenBytes(
        tokens=tokens,
        specials=specials,
        encode=lambda text: _encoded(plain, text),
        eos=[eos] if isinstance(eos, int) else list(eos or []),
        bos=getattr(tokenizer, "bos_token_id", None),
    )


def _unknown_ids(model: dict[str, Any]) -> list[int]:
    """The ids of the unknown token, which stands for no bytes."""
    if isinstance(model.get("unk_id"), int):
        return [model["unk_id"]]
    unknown = model.get("unk_token")
    vocab = model["vocab"]
    return [vocab[unknown]] if isinstance(vocab, dict) and unknown in vocab else []


def _parts(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A tokenizer component and the components inside it, flat."""
    if not spec:
        return []
    inner = spec.get("decoders") or spec.get("pretokenizers") or spec.get("normalizers") or []
    return [spec, *(part for child in inner for part in _parts(child))]


def _speller(spec: dict[str, Any]) -> Callable[[str], bytes]:
    """The function from a vocabulary entry to its bytes."""
    parts = _parts(spec.get("decoder")) + _parts(spec.get("pre_tokenizer"))
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        return _byte_level
    kind = spec["model"].get("type")
    if kind == "WordPiece" or kinds & {"WordPiece", "BPEDecoder", "CTC"}:
        raise ConstraintError(f"a {kind} tokenizer has no exact bytes for its tokens; use a byte-level one")
    space = next((p.get("replacement", "▁") for p in parts if p["type"] == "Metaspace"), None)
    if space is None:
        space = next((p["pattern"]["String"] for p in parts if _writes_space(p)), None)
    fallback = bool(spec["model"].get("byte_fallback")) or "ByteFallback" in kinds
    return lambda piece: _pieces(piece, space, fallback)


def _writes_space(part: dict[str, Any]) -> bool:
    return part["type"] == "Replace" and part.get("content") == " " and "String" in part.get("pattern", {})


def _pieces(piece: str, space: str | None, fallback: bool) -> bytes:
    if fallback and (byte := BYTE_TOKEN.fullmatch(piece)):
        return bytes([int(byte[1], 16)])
    return (piece.replace(space, " ") if space else piece).encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in set(kept)]
    letters = {chr(byte): byte for byte in kept}
    letters.update({chr(256 + place): byte for place, byte in enumerate(shifted)})
    return letters


BYTE_ALPHABET = _byte_alphabet()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes([BYTE_ALPHABET[letter] for letter in piece])
    except KeyError:
        return piece.encode()


def _plain_encoder(backend: Any, spec: dict[str, Any]) -> Any:
    """A copy of `backend` that neither pads, truncates nor adds a leading space."""
    spec["padding"] = spec["truncation"] = None
    spec["normalizer"] = _without_prepend(spec.get("normalizer"))
    for part in _parts(spec.get("pre_tokenizer")):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
            part.pop("add_prefix_space", None)
        elif part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    return type(backend).from_str(json.dumps(spec))


def _encoded(plain: Any, text: str) -> Sequence[int]:
    if len(text) <= LONG:
        encoding = plain.encode(text, add_special_tokens=False)
    else:
        # Only a batch lets other threads run meanwhile; one text of it is computed in this one all the same.
        (encoding,) = plain.encode_batch_fast([text], add_special_tokens=False)
    ids: Sequence[int] = encoding.ids
    return ids


def _without_prepend(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    if not normalizer or normalizer["type"] == "Prepend":
        return None
    if normalizer["type"] == "Sequence":
        kept = [_without_prepend(child) for child in normalizer["normalizers"]]
        return {**normalizer, "normalizers": [child for child in kept if child]}
    return normalizer


def _read_tekken(tekken: Any) -> TokenBytes:
    count = tekken.num_special_tokens
    tokens: list[bytes | None] = [b""] * count
    tokens += [tekken.id_to_byte_piece(i) for i in range(count, tekken.n_words)]
    specials = {i: tekken.id_to_piece(i).encode() for i in range(count)}
    by_text = {text.decode(): index for index, text in specials.items() if text}
    return TokenBytes(
        tokens=tokens,
        specials=specials,
        encode=_with_specials(lambda text: tekken.encode(text, bos=False, eos=False), by_text),
        eos=[tekken.eos_id],
        bos=tekken.bos_id,
    )


def _read_tiktoken(encoding: Any) -> TokenBytes:
    tokens: list[bytes | None] = [None] * encoding.n_vocab
    for piece, index in encoding._mergeable_ranks.items():
        tokens[index] = piece
    specials = {index: text.encode() for text, index in encoding._special_tokens.items()}
    for index in specials:
        tokens[index] = b""
    return TokenBytes(
        tokens=tokens,
        specials=specials,
        encode=lambda text: encoding.encode(text, allowed_special="all"),
        eos=[encoding.eot_token],
    )


def _with_specials(
    encode: Callable[[str], Sequence[int]], specials: dict[str, int]
) -> Callable[[str], Sequence[int]]:
    """`encode` for text in which special tokens may be spelled out."""
    split = re.compile("(" + "|".join(re.escape(s) for s in sorted(specials, key=len, reverse=True)) + ")")

    def encode_all(text: str) -> list[int]:
        ids: list[int] = []
        for piece in split.split(text) if specials else [text]:
            ids.extend([specials[piece]] if piece in specials else encode(piece) if piece else [])
        return ids

    return encode_all
