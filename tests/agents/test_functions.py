"""The AI functions: generate, extract, classify, scan, embed, and how they find their model."""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from aici_vllm.agents import (
    AIClassify,
    AIEmbed,
    AIExtract,
    AIGenerate,
    AIMessage,
    AIScan,
    AITemplate,
    Conversation,
    DataMessage,
    ModelCallError,
    NoModelError,
    RetryConfig,
    ScriptedModel,
    UserMessage,
    aiclassify,
    aiembed,
    aiextract,
    aigenerate,
    airetry,
    aiscan,
    is_valid,
    last_output,
    run,
    set_default_model,
)


@pytest.fixture
def default() -> Iterator[ScriptedModel]:
    model = ScriptedModel(lambda prompt: f"reply to {prompt[-1].content}")
    previous = set_default_model(model)
    yield model
    set_default_model(previous)


def test_where_the_model_comes_from(default: ScriptedModel) -> None:
    given, schema = ScriptedModel(["given"]), ScriptedModel(["schema"])

    def plain(conversation: Conversation, **kwargs: Any) -> Conversation:
        return [*conversation, AIMessage("plain")]

    assert last_output(aigenerate("x")) == "reply to x"
    assert last_output(aigenerate("x", model=given)) == "given"
    assert last_output(aigenerate(schema, "x", model="name")) == "schema"
    assert schema.calls[0].kwargs["model"] == "name"
    assert last_output(aigenerate([UserMessage("x")], model=plain)) == "plain"
    aigenerate("x", model="some name")
    assert default.calls[-1].kwargs["model"] == "some name"


def test_no_model() -> None:
    previous = set_default_model(None)
    try:
        with pytest.raises(NoModelError, match="set_default_model"):
            aigenerate("x")
    finally:
        set_default_model(previous)
    with pytest.raises(TypeError):
        set_default_model("gpt")  # type: ignore[arg-type]


def test_prompts(default: ScriptedModel) -> None:
    conversation = aigenerate(AITemplate("BlankSystemUser"), system="S", user="U")
    assert [message.content for message in conversation] == ["S", "U", "reply to U"]
    assert len(aigenerate("x", no_system_message=True)) == 2
    for bad in ((), ("a", "b"), (3,)):
        with pytest.raises(TypeError):
            aigenerate(*bad)


class Person(BaseModel):
    name: str
    age: int


def test_extract() -> None:
    model = ScriptedModel(['{"name": "Bob", "age": 3}'])
    call = AIExtract(model, "Who?", return_type=Person)
    run(call)
    assert last_output(call) == Person(name="Bob", age=3)
    assert isinstance(call.conversation[-1], DataMessage)
    sent = model.calls[0].kwargs["api_kwargs"]
    assert sent["response_format"]["json_schema"]["schema"] == Person.model_json_schema()
    assert sent["temperature"] == 0.701


def test_extract_several_and_fenced() -> None:
    model = ScriptedModel(['```json\n{"name": "A", "age": 1}\n```', '{"name": "B", "age": 2}'])
    conversation = aiextract("x", model=model, return_type=Person, api_kwargs={"n": 2})
    assert [message.content for message in conversation[2:]] == [
        Person(name="A", age=1),
        Person(name="B", age=2),
    ]
    assert [message.sample_id for message in conversation[2:]] == [1, 2]


def test_an_invalid_extraction_can_be_retried(caplog: pytest.LogCaptureFixture) -> None:
    model = ScriptedModel(["nope", '{"name": "Bob", "age": 3}', '{"name": "Bobby", "age": 3}'])
    call = AIExtract(model, "Who?", return_type=Person, config=RetryConfig(catch_errors=True))
    run(call)
    assert isinstance(call.error, ModelCallError)
    assert call.error.body == "nope"
    airetry(is_valid, call)
    assert last_output(call).name == "Bob"
    with caplog.at_level(logging.WARNING, logger="aici_vllm.agents"):
        airetry(lambda c: len(last_output(c).name) > 3, call, "Longer.")
    assert last_output(call).name == "Bobby"
    assert "Data messages" in caplog.text


def test_extract_needs_a_pydantic_model() -> None:
    with pytest.raises(TypeError, match="pydantic"):
        aiextract("x", model=ScriptedModel(["x"]), return_type=dict)


@pytest.mark.parametrize(
    ("reply", "label"), [("2", "no"), (" 1. ", "yes"), ("NO", "no"), ("3", "3"), ("maybe", "maybe")]
)
def test_classify(reply: str, label: str) -> None:
    model = ScriptedModel([reply])
    call = AIClassify(model, "Is it?", choices=["yes", ("no", "not at all")])
    run(call)
    assert last_output(call) == label
    assert str(model.calls[0].prompt[-1].content).endswith("1. yes\n2. no (not at all)")


def test_classify_asks_once_however_often_it_is_retried() -> None:
    model = ScriptedModel(["maybe", "1"])
    call = AIClassify(model, "Is it?", choices=["yes", "no"])
    airetry(lambda c: last_output(c) in ("yes", "no"), run(call), "Pick one.")
    assert last_output(call) == "yes"
    text = "".join(str(message.content) for message in model.calls[1].prompt)
    assert text.count("1. yes") == 1


def test_classify_arguments() -> None:
    with pytest.raises(ValueError, match="choice"):
        aiclassify("x", model=ScriptedModel(["1"]), choices=[])
    model = ScriptedModel(["1", "1"])
    aiclassify("x", model=model, choices=["a"])
    assert model.calls[0].kwargs["api_kwargs"] == {"temperature": 0}
    aiclassify("x", model=model, choices=["a"], api_kwargs={"temperature": 0.5})
    assert model.calls[1].kwargs["api_kwargs"] == {"temperature": 0.5}


def test_scan_attaches_images_once(tmp_path: Path) -> None:
    image = tmp_path / "dot.png"
    image.write_bytes(b"\x89PNG")
    data_url = "data:image/png;base64," + base64.b64encode(b"\x89PNG").decode()
    model = ScriptedModel(["blurry", "a dot"])
    call = AIScan(model, "What is it?", image_url="http://example.org/a.png", image_path=image)
    airetry(lambda c: "dot" in last_output(c), run(call), "Look again.")
    for request in model.calls:
        attached = [message.images for message in request.prompt if isinstance(message, UserMessage)]
        assert attached[0] == ("http://example.org/a.png", data_url)
        assert all(images == () for images in attached[1:])


def test_embed() -> None:
    model = ScriptedModel([], embedding=lambda text: [float(len(text)), 1.0])
    call = AIEmbed(model, "four {{x}}", x="more")
    run(call)
    assert last_output(call) == [9.0, 1.0]
    assert len(call.conversation) == 2
    with pytest.raises(TypeError, match="embed"):
        aiembed("x", model=lambda conversation, **kwargs: conversation)


def test_functions_without_a_user_message_or_reply() -> None:
    model = ScriptedModel(["x"])
    with pytest.raises(ValueError, match="user message"):
        aiscan([AIMessage("x")], model=model, image_url="http://example.org/a.png")
    with pytest.raises(ModelCallError, match="no reply"):
        aiextract("x", model=lambda conversation, **kwargs: conversation, return_type=Person)


def test_generate_keeps_its_kwargs_from_the_messages() -> None:
    model = ScriptedModel(["a", "b"])
    call = AIGenerate(model, "{{n}} and {{temperature}}")
    run(call)
    assert model.calls[0].prompt[1].content == "{{n}} and {{temperature}}"
