"""The engines that masks.py compares: this library, its peers used directly, vLLM's backend classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import outlines_core
import xgrammar
from llguidance import LLMatcher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm.v1.structured_output.backend_guidance import GuidanceBackend
from vllm.v1.structured_output.backend_outlines import OutlinesBackend
from vllm.v1.structured_output.backend_types import StructuredOutputBackend, StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

from constraints import Vocabulary, guidance, json_schema, regex
from constraints.token_bytes import BYTE_ALPHABET

Step = Callable[[int | None], bool]
"""Takes a token, None at the start, and makes the mask; False when the engine refuses the token."""


@dataclass(frozen=True)
class Source:
    """A pattern, or the JSON text of a schema."""

    name: str
    text: str
    is_schema: bool

    @property
    def kind(self) -> str:
        return "JSON" if self.is_schema else "regex"


Sequences = Callable[[], Step]
Engine = Callable[[Source], Sequences]
"""Compiles a source into a maker of sequences."""


def ours(vocabulary: Vocabulary) -> Engine:
    def compile_source(source: Source) -> Sequences:
        make = partial(json_schema if source.is_schema else regex, vocabulary, source.text)

        def sequence() -> Step:
            constraint = make()

            def step(token: int | None) -> bool:
                if token is not None:
                    constraint.append_token(token)
                constraint.mask_row()
                return True

            return step

        return sequence

    return compile_source


def with_llguidance(vocabulary: Vocabulary) -> Engine:
    tokenizer = guidance.tokenizer_of(vocabulary)

    def compile_source(source: Source) -> Sequences:
        if source.is_schema:
            grammar = LLMatcher.grammar_from_json_schema(source.text)
        else:
            grammar = f"start: /{source.text}/{guidance.NO_FORCING}"
        fresh = LLMatcher(tokenizer, grammar, log_level=0)
        if fresh.is_error():
            raise ValueError(fresh.get_error())

        def sequence() -> Step:
            at = fresh.deep_copy()

            def step(token: int | None) -> bool:
                if token is not None and not at.consume_token(token):
                    return False
                np.frombuffer(at.compute_bitmask(), np.int32)
                return True

            return step

        return sequence

    return compile_source


def with_xgrammar(vocabulary: Vocabulary) -> Engine:
    spelled = [vocabulary.token_bytes(i) for i in range(vocabulary.size)]
    info = xgrammar.TokenizerInfo(
        spelled, xgrammar.VocabType.RAW, vocab_size=vocabulary.size, stop_token_ids=[vocabulary.eos_token_id]
    )
    bits = xgrammar.allocate_token_bitmask(1, vocabulary.size)

    def compile_source(source: Source) -> Sequences:
        # A compiler of its own, because it caches what it compiled.
        compiler = xgrammar.GrammarCompiler(info, max_threads=1)
        if source.is_schema:
            grammar = compiler.compile_json_schema(source.text, any_whitespace=True)
        else:
            grammar = compiler.compile_regex(source.text)

        def sequence() -> Step:
            at = xgrammar.GrammarMatcher(grammar)

            def step(token: int | None) -> bool:
                if token is not None and not at.accept_token(token):
                    return False
                at.fill_next_token_bitmask(bits)
                return True

            return step

        return sequence

    return compile_source


def with_outlines(vocabulary: Vocabulary) -> Engine:
    by_bytes = {text: list(ids) for text, ids in vocabulary.ids_by_bytes.items()}
    words = outlines_core.Vocabulary(vocabulary.eos_token_id, by_bytes)
    row = np.zeros(vocabulary.num_words, np.int32)

    def compile_source(source: Source) -> Sequences:
        build = outlines_core.json_schema.build_regex_from_schema
        index = outlines_core.Index(build(source.text) if source.is_schema else source.text, words)

        def sequence() -> Step:
            guide = outlines_core.Guide(index)

            def step(token: int | None) -> bool:
                if token is not None:
                    if not guide.accepts_tokens([token]):
                        return False
                    guide.advance(token, return_tokens=False)
                guide.write_mask_into(row.ctypes.data, row.size, row.itemsize)
                return True

            return step

        return sequence

    return compile_source


def hugging_face(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """A tokenizer with the tokens of `vocabulary`, as vLLM's backends want one. It only knows their bytes."""
    letters = {byte: letter for letter, byte in BYTE_ALPHABET.items()}
    words: dict[str, int] = {}
    for token in range(vocabulary.size):
        spelled = "".join(letters[byte] for byte in vocabulary.token_bytes(token))
        words[spelled if spelled and spelled not in words else f"<|{token}|>"] = token
    plain = Tokenizer(models.BPE(vocab=words, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    specials = [i for i in range(vocabulary.size) if vocabulary.is_special(i)]
    plain.add_special_tokens([f"<|{token}|>" for token in specials])
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=f"<|{vocabulary.eos_token_id}|>")


def backend(kind: type[StructuredOutputBackend], vocabulary: Vocabulary) -> StructuredOutputBackend:
    """One of vLLM's backends, with the settings that a server without options has."""
    settings = SimpleNamespace(disable_any_whitespace=False, disable_additional_properties=False)
    config: Any = SimpleNamespace(
        structured_outputs_config=settings, model_config=None, speculative_config=None
    )
    return kind(vllm_config=config, tokenizer=hugging_face(vocabulary), vocab_size=vocabulary.size)


def with_vllm(kind: type[StructuredOutputBackend], vocabulary: Vocabulary) -> Engine:
    made = backend(kind, vocabulary)
    bits = made.allocate_token_bitmask(1)

    def compile_source(source: Source) -> Sequences:
        request = StructuredOutputOptions.JSON if source.is_schema else StructuredOutputOptions.REGEX
        if isinstance(made, XgrammarBackend):
            made.compiler.clear_cache()
        if isinstance(made, OutlinesBackend):
            made.cache.clear()
        first = [made.compile_grammar(request, source.text)]

        def sequence() -> Step:
            # vLLM compiles for every request and leaves it to the backend's cache to be quick.
            grammar = first.pop() if first else made.compile_grammar(request, source.text)

            def step(token: int | None) -> bool:
                if token is not None and not grammar.accept_tokens("", [token]):
                    return False
                grammar.fill_bitmask(bits, 0)
                return True

            return step

        return sequence

    return compile_source


ENGINES: dict[str, Callable[[Vocabulary], Engine]] = {
    "this library": ours,
    "llguidance": with_llguidance,
    "xgrammar": with_xgrammar,
    "outlines-core": with_outlines,
    "vLLM guidance": partial(with_vllm, GuidanceBackend),
    "vLLM xgrammar": partial(with_vllm, XgrammarBackend),
    "vLLM outlines": partial(with_vllm, OutlinesBackend),
}
