"""A server's parsers of reasoning and of tool calls read what scripts write as they read other text."""

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import AddedToken, Tokenizer

from tests.engine.test_server import Server, start_server

PARSERS = ["--reasoning-parser", "qwen3", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
THINKS = """
import aici

async def main():
    await aici.FixedTokens("<think>")
    thought = await aici.gen_text(regex="[a-z ]{12,20}!", max_tokens=30)
    await aici.FixedTokens("</think>")
    answer = await aici.gen_text(regex="[A-Z][a-z ]{6,12}[.]")
    aici.set_var("thought", thought)
    aici.set_var("answer", answer)

aici.start(main())
"""
FIXES_ALL = """
import aici

async def main():
    await aici.FixedTokens("<think>all of it</think>is fixed")

aici.start(main())
"""
CALLS = """
import aici

CALL = '\\{"name": "weather", "arguments": \\{"city": "[A-Z][a-z]{2,5}", "days": [37]\\}\\}'

async def main():
    await aici.FixedTokens("<think>I must ask.</think>")
    await aici.FixedTokens("<tool_call>\\n")
    call = await aici.gen_text(regex=CALL, max_tokens=60)
    await aici.FixedTokens("\\n</tool_call>")
    aici.set_var("call", call)

aici.start(main())
"""


@pytest.fixture(scope="module")
def server(random_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The random model, with the tags as tokens of its own, as models that think and call have them."""
    folder = tmp_path_factory.mktemp("tags") / "model"
    shutil.copytree(random_folder, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer.save(str(folder / "tokenizer.json"))
    yield from start_server(folder, *PARSERS)


def chat(server: Server, script: str | None, **more: Any) -> Any:
    """A chat request; with a script, its controller."""
    arguments = {"temperature": 0.0, "max_tokens": 200, **more}
    body = arguments.pop("extra_body", {})
    if script is not None:
        body = {**body, "vllm_xargs": {"controller": script}}
    messages = [{"role": "user", "content": arguments.pop("content", "What now?")}]
    return server.client.chat.completions.create(model="m", messages=messages, extra_body=body, **arguments)


def message(response: Any) -> dict[str, Any]:
    """What the client reads: reasoning, content, and the name and arguments of each call."""
    found = response.choices[0].message.model_dump()
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in found["tool_calls"] or []]
    return {"reasoning": found.get("reasoning"), "content": found["content"], "calls": calls}


def streamed(chunks: Any) -> tuple[dict[str, Any], Any]:
    """The same, put together from a stream, and the choice of its last chunk."""
    texts: dict[str, str | None] = {"reasoning": None, "content": None}
    calls: dict[int, list[str]] = {}
    last = None
    for chunk in chunks:
        for last in chunk.choices:
            delta = last.delta.model_dump()
            for name in texts:
                texts[name] = (texts[name] or "") + delta[name] if delta.get(name) else texts[name]
            for call in delta.get("tool_calls") or []:
                parts = calls.setdefault(call["index"], ["", ""])
                parts[0] += call["function"].get("name") or ""
                parts[1] += call["function"].get("arguments") or ""
    return {**texts, "calls": [tuple(parts) for parts in calls.values()]}, last


def test_thoughts_and_answer_come_apart(server: Server) -> None:
    whole = chat(server, THINKS)
    results = whole.kv_transfer_params["controller"]
    assert results["branches"][0]["error"] is None
    wanted = {
        "reasoning": results["variables"]["thought"],
        "content": results["variables"]["answer"],
        "calls": [],
    }
    assert results["branches"][0]["text"] == "<think>{reasoning}</think>{content}".format_map(wanted)
    assert message(whole) == wanted
    parts, last = streamed(chat(server, THINKS, stream=True))
    assert parts == wanted
    assert json.loads(last.stop_reason)["controller"]["variables"] == results["variables"]
    assert last.finish_reason == whole.choices[0].finish_reason == "stop"


def test_a_splice_over_both_tags_comes_apart(server: Server) -> None:
    wanted = {"reasoning": "all of it", "content": "is fixed", "calls": []}
    assert message(chat(server, FIXES_ALL)) == wanted
    assert streamed(chat(server, FIXES_ALL, stream=True))[0] == wanted


def test_a_call_is_one_for_the_client(server: Server) -> None:
    """And the same as a plain request's of the same text, which vLLM's structured outputs make it say."""
    whole = chat(server, CALLS, tools=[TOOL])
    results = whole.kv_transfer_params["controller"]
    assert results["branches"][0]["error"] is None
    call = json.loads(results["variables"]["call"])
    found = message(whole)
    [(name, arguments)] = found["calls"]
    assert (name, json.loads(arguments)) == (call["name"], call["arguments"])
    assert (found["reasoning"], whole.choices[0].finish_reason) == ("I must ask.", "tool_calls")

    parts, last = streamed(chat(server, CALLS, tools=[TOOL], stream=True))
    [(name, arguments)] = parts["calls"]
    assert (name, json.loads(arguments)) == (call["name"], call["arguments"])
    assert (parts["reasoning"], last.finish_reason) == ("I must ask.", "tool_calls")
    assert json.loads(last.stop_reason)["controller"]["variables"] == results["variables"]

    text = results["branches"][0]["text"].partition("</think>")[2]
    said = {
        "extra_body": {"structured_outputs": {"choice": [text]}},
        "content": "<think></think>",
        "tools": [TOOL],
    }
    plain = message(chat(server, None, **said))
    assert (plain["calls"], plain["content"]) == (found["calls"], found["content"])
    assert streamed(chat(server, None, stream=True, **said))[0]["calls"] == parts["calls"]


def test_masks_hold_while_plain_requests_think(server: Server) -> None:
    """vLLM puts its own masks off until the reasoning ends; those of a script beside it count at once."""
    grammar = {"structured_outputs": {"regex": "[a-f]{4}"}}
    with ThreadPoolExecutor(8) as pool:
        thinking = [pool.submit(chat, server, None, extra_body=grammar, max_tokens=40) for _ in range(4)]
        scripts = [pool.submit(chat, server, THINKS) for _ in range(4)]
    plain = {json.dumps(message(one.result())) for one in thinking}
    assert len(plain) == 1 and json.loads(plain.pop())["content"] is None, "the plain requests did not think"
    for one in scripts:
        found = message(one.result())
        assert re.fullmatch("[a-z ]{12,20}!", found["reasoning"])
        assert re.fullmatch("[A-Z][a-z ]{6,12}[.]", found["content"])


def test_a_choice_of_tool_that_vllm_would_enforce_is_refused(server: Server) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        with pytest.raises(openai.BadRequestError, match="constrain inside the script"):
            chat(server, CALLS, tools=[TOOL], tool_choice=choice)
    assert message(chat(server, CALLS, tools=[TOOL], tool_choice="none"))["calls"] == []
