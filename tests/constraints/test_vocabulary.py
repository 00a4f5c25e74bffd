"""Vocabularies of every kind of tokenizer: exact bytes, plain text to ids, content keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from constraints import ConstraintError, Vocabulary, token_bytes

TEXTS = ["hello world", " two  spaces", "Größe 日本語 😀", "a\n\n\tb", "1234.5", "", "<|im_end|> x"]


def sentencepiece(prefix: bool = True) -> Tokenizer:
    """A tiny tokenizer in the way of SentencePiece: `▁` for a space, `<0xNN>` for bytes without a token."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", "a", "b", "▁a", "ab", "é"]:
        vocab[piece] = len(vocab)
    bpe = models.BPE(vocab, [("▁", "a"), ("a", "b")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def byte_level() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)} | {"Ġa": 256}, [("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_tokens(["naïve tool"])
    return tokenizer


def test_sentencepiece_bytes():
    v = Vocabulary.from_tokenizer(sentencepiece())
    assert v.token_bytes(3 + 0xC3) == b"\xc3"
    assert v.ids_by_bytes[b" a"] and v.token_bytes(v.tokenize(" a")[0]) == b" a"
    assert v.ids_by_bytes[b" "] == (3 + 0x20, 259)
    assert v.eos_token_ids == (2,)
    assert [v.token_bytes(i) for i in (0, 1, 2)] == [b"", b"", b""]
    assert v.token_text(2) == b"</s>" and v.is_special(2) and not v.is_special(3)
    # No artificial space in front, and bytes for what has no token.
    assert v.detokenize(v.tokenize("ab")) == b"ab"
    assert v.detokenize(v.tokenize("a 日b")) == "a 日b".encode()


class Batches:
    """A tokenizer that takes long texts in batches only."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.lengths: list[int] = []

    def encode(self, text: str, add_special_tokens: bool):
        self.lengths.append(len(text))
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool):
        return self.tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


@pytest.mark.parametrize("tokenizer", [sentencepiece(), byte_level()], ids=["sentencepiece", "byte level"])
def test_a_long_text_is_encoded_where_other_threads_may_run(tokenizer: Tokenizer, monkeypatch):
    batches: list[Batches] = []
    plain_encoder = token_bytes._plain_encoder

    def encoder(backend, spec):
        batches.append(Batches(plain_encoder(backend, spec)))
        return batches[-1]

    monkeypatch.setattr(token_bytes, "_plain_encoder", encoder)
    read = token_bytes.read_tokenizer(tokenizer)
    (only,) = batches
    long = " naïve tool<s> a日b<|endoftext|>" * 200
    assert list(read.encode(long)) == only.tokenizer.encode(long, add_special_tokens=False).ids
    assert list(read.encode("ab")) == only.tokenizer.encode("ab", add_special_tokens=False).ids
    assert only.lengths == [2]


def test_unigram_and_metaspace():
    pieces = [("<unk>", 0.0), ("▁a", -1.0), ("b", -1.0), ("a", -2.0), ("▁", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    v = Vocabulary.from_tokenizer(tokenizer, eos_token_ids=[0])
    assert [v.token_bytes(i) for i in range(5)] == [b"", b" a", b"b", b"a", b" "]
    assert v.detokenize(v.tokenize("ab a")) == b"ab a"


def test_byte_level_bytes():
    v = Vocabulary.from_tokenizer(byte_level())
    assert {v.token_bytes(i) for i in range(256)} == {bytes([b]) for b in range(256)}
    assert v.token_bytes(256) == b" a"
    assert v.eos_token_ids == (257,) and v.token_bytes(257) == b""
    assert v.token_bytes(258) == "naïve tool".encode() and not v.is_special(258)
    assert v.detokenize(v.tokenize("a a")) == b"a a"
    assert v.tokenize("x<|endoftext|>")[-1] == 257


def test_a_tokenizer_without_exact_bytes_is_refused():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "##a": 1}))
    with pytest.raises(ConstraintError, match="WordPiece"):
        Vocabulary.from_tokenizer(tokenizer)
    with pytest.raises(ConstraintError, match="cannot read"):
        Vocabulary.from_tokenizer(object())


@pytest.mark.parametrize("name", ["smol", "tekken"])
def test_real_tokenizers_spell_text_exactly(name: str, request: pytest.FixtureRequest):
    v: Vocabulary = request.getfixturevalue(name)
    for text in TEXTS:
        ids = v.tokenize(text)
        assert b"".join(map(v.token_text, ids)).decode() == text
        plain = text.replace("<|im_end|>", "")
        assert v.detokenize(v.tokenize(plain)).decode() == plain
    assert v.detokenize(range(v.size)) == b"".join(v.token_bytes(i) for i in range(v.size))
    assert len(set(v.ids_by_bytes)) == v.text_tokens.num_set()


def test_the_bytes_of_the_embedded_model_are_what_its_tokenizer_decodes(
    smol: Vocabulary, embedded_tokenizer_file: Path
):
    tokenizer = Tokenizer.from_file(str(embedded_tokenizer_file))
    for token in range(0, smol.size, 7):
        if smol.token_bytes(token):
            assert tokenizer.decode([token]) == smol.token_bytes(token).decode(errors="replace")


def test_special_spellings_are_recognised(smol: Vocabulary, tekken: Vocabulary):
    assert smol.tokenize("<|im_end|>") == [2]
    assert tekken.tokenize("a[INST]b")[1] == 3
    assert smol.detokenize([2, 10**9, -1]) == b""


def test_bytes_are_decoded_lossily_but_for_a_tail_cut_off(smol: Vocabulary):
    assert smol.detokenize(smol.tokenize("日本".encode()[:-1])) == "日本".encode()[:-1]
    assert smol.detokenize(smol.tokenize(b"a\xffb")).decode() == "a\ufffdb"
    assert smol.tokenize("日".encode()) == smol.tokenize("日")
    assert smol.tokenize(b"\xff")[0] and smol.detokenize(smol.tokenize(b"\xff")).decode() == "\ufffd"


def test_padding_is_no_token(embedded_tokenizer_file: Path):
    tokenizer = Tokenizer.from_file(str(embedded_tokenizer_file))
    v = Vocabulary.from_tokenizer(tokenizer, size=49_200)
    assert v.size == 49_200 and v.num_words == 1538
    assert v.token_bytes(49_199) == b"" and not v.text_tokens[49_199] and v.all_tokens()[49_199]
    with pytest.raises(ConstraintError, match="smaller"):
        Vocabulary.from_tokenizer(tokenizer, size=100)
    with pytest.raises(IndexError):
        v.token_bytes(49_200)


def test_equal_content_is_one_vocabulary():
    one = Vocabulary.from_tokenizer(sentencepiece())
    assert Vocabulary.from_tokenizer(sentencepiece()) is one
    others = [
        Vocabulary.from_tokenizer(sentencepiece(), size=300),
        Vocabulary.from_tokenizer(sentencepiece(), eos_token_ids=[1, 2]),
        Vocabulary.from_tokenizer(byte_level()),
    ]
    assert len({one.key, *(other.key for other in others)}) == 4


def test_saved_and_loaded(tmp_path: Path):
    v = Vocabulary.from_tokenizer(byte_level(), size=300)
    v.save(tmp_path / "v.npz")
    again = Vocabulary.load(tmp_path / "v.npz", encode=v._encode)
    assert again.key == v.key
    for content in (b"", b"garbage", (tmp_path / "v.npz").read_bytes()[:200]):
        (tmp_path / "v.npz").write_bytes(content)
        with pytest.raises(ConstraintError, match="no vocabulary"):
            Vocabulary.load(tmp_path / "v.npz")


def test_representations():
    v = Vocabulary(
        [b"", b"", b'a"', b"\xff", "é".encode()], specials={0: b"</s>", 1: b"<s>"}, eos_token_ids=[0]
    )
    assert [v.token_repr(i) for i in range(6)] == ["EOS", "EMPTY[1]", '"a\\""', "HEX[ff]", '"é"', "OOB[5]"]
    assert v.tokens_repr([2, 4, 0, 9]) == '"a\\"‧é‧≺EOS≻‧≺OOB[9]≻"'
    assert json.loads(v.token_repr(2)) == 'a"'


def test_without_an_end_token():
    v = Vocabulary([b"a"])
    assert v.eos_token_ids == () and not v.eos_row.any()
    with pytest.raises(ConstraintError, match="eos_token_ids"):
        _ = v.eos_token_id
    with pytest.raises(ConstraintError, match=r"not in 0\.\.0"):
        Vocabulary([b"a"], eos_token_ids=[1])
    with pytest.raises(ConstraintError, match="no token of the vocabulary"):
        v.tokenize("b")
