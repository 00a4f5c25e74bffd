"""What the front-end refuses before a request reaches the engine, and what it tells the engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from aici_vllm.controller.errors import BadRequestError
from aici_vllm.controller.limits import Limits
from aici_vllm.engine import admission
from aici_vllm.engine.admission import CHOICES, MOST_STOP_BYTES, MOST_STOPS, STOP_TOKENS
from tests.engine.test_admission_names import SCRIPT, config

HALF = "a\ud800"
"""A JSON body can hold half a character; nothing can encode it."""


def params(extra: dict[str, Any] | None = None, **more: Any) -> SamplingParams:
    return SamplingParams(extra_args={"controller": SCRIPT, **(extra or {})}, **more)


@pytest.mark.parametrize("key", ["controller", "controller_arg", "controller_checkpoint", "controller_drop"])
def test_half_a_character_is_refused(key: str) -> None:
    text = f"{SCRIPT}# {HALF}" if key == "controller" else HALF
    with pytest.raises(BadRequestError, match="half a character"):
        admission.checked_arguments(config(), params({key: text}))


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"controller": 5}, "controller must be a string, not int"),
        ({"controller": b"pickle"}, "no pickled functions"),
        ({"controller_arg": 5}, "controller_arg must be a string, not int"),
        ({"controller_checkpoint": ""}, "1 to 200 characters"),
        ({"controller_drop": "a" * 201}, "1 to 200 characters"),
        ({"controller_from": 5}, "controller_from must be a string"),
        (
            {"controller_args": "x"},
            "unknown argument 'controller_args'; there are controller, controller_arg,",
        ),
        ({"mine": HALF}, "mine holds half a character"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(extra: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequestError, match=said):
        admission.checked_arguments(config(), params(extra))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"structured_outputs": StructuredOutputsParams(regex="a")}, "structured outputs"),
        ({"prompt_logprob_token_ids": [[1]]}, "use prompt_logprobs"),
        ({"extra": {"controller_from": "a/0"}, "prompt_logprobs": 1}, "computes no prompt"),
    ],
)
def test_parameters_that_do_not_go_with_a_controller_are_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequestError, match=said):
        admission.checked_arguments(config(), params(**more))


def test_stop_strings_are_as_many_and_as_long_as_the_engine_can_look_for() -> None:
    taken = [["a"] * MOST_STOPS, ["a" * MOST_STOP_BYTES], ["é" * (MOST_STOP_BYTES // 2)]]
    for stop in taken:
        admission.checked_arguments(config(), params(stop=stop))
        with pytest.raises(BadRequestError, match=f"{MOST_STOPS} stop strings of {MOST_STOP_BYTES} bytes"):
            admission.checked_arguments(config(), params(stop=[*stop, "b"]))
    plain = SamplingParams(stop=["a"] * (MOST_STOPS + 1))
    assert admission.admit(config(), {}, plain) == ({}, plain)


def test_what_is_set_for_the_engine_is_not_the_clients() -> None:
    sent = params({CHOICES: -1, STOP_TOKENS: "x"}, n=2, stop_token_ids=[7])
    _, told = admission.admit(config(), {"prompt_token_ids": [1]}, sent)
    assert told.extra_args == {"controller": SCRIPT, CHOICES: 2, STOP_TOKENS: [7]}
    assert sent.extra_args == {"controller": SCRIPT, CHOICES: -1, STOP_TOKENS: "x"}


def test_a_request_that_was_admitted_is_admitted_again_as_it_is() -> None:
    prompt = {"prompt_token_ids": [1]}
    once = admission.admit(config(), prompt, params(n=2, stop_token_ids=[7]))[1]
    assert admission.admit(config(), prompt, once)[1].extra_args == once.extra_args


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "must be a mapping, not"),
        (None, "must be a mapping, not None"),
        ({"sever": {}}, "unknown setting aici.sever; there are server, limits, functions"),
        ({"limits": None}, "aici.limits must be a mapping, not None"),
        ({"server": []}, "aici.server must be a mapping"),
        ({"functions": "no"}, "aici.functions must be true or false, not 'no'"),
    ],
)
def test_an_operators_typo_stops_the_start(settings: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        admission.operator_limits(SimpleNamespace(additional_config={"aici": settings}))  # type: ignore[arg-type]


@pytest.mark.parametrize("additional", [{}, {"other": 1}, {"aici": {}}, object()])
def test_without_settings_the_defaults_hold(additional: Any) -> None:
    found = admission.operator_limits(SimpleNamespace(additional_config=additional))  # type: ignore[arg-type]
    assert found == Limits()
