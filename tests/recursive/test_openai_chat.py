"""Chat functions against an HTTP server that speaks the OpenAI protocol."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from aici_vllm.recursive import LocalRLMRunner, Usage
from aici_vllm.recursive.openai_chat import ChatServerError, async_openai_chat, openai_chat


class Handler(BaseHTTPRequestHandler):
    """Answers with the last message in capitals, or with what the model name asks for."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        status, answer = 200, self.answer(body)
        if body["model"] == "missing":
            status, answer = 404, {"error": "no such model"}
        if body["model"] == "odd":
            answer = {"nothing": 1}
        payload = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def answer(self, body):
        text = body["messages"][-1]["content"].upper()
        if len(body["messages"]) > 1:
            text = "```repl\nprint(FINAL(llm_query('leaf')))\n```"
        usage = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
        return {
            "choices": [{"message": {"content": text}}],
            "usage": usage if body["model"] != "silent" else None,
        }

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.seen = []
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


def url(server):
    return f"http://127.0.0.1:{server.server_address[1]}/v1/"


def test_a_request_has_model_messages_key_and_sampling(server):
    chat = openai_chat(url(server), "small", api_key="secret", temperature=0)
    reply = chat([{"role": "user", "content": "hi"}])
    assert reply == "HI" and reply.usage == Usage(9, 4, 3)
    path, key, body = server.seen[-1]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body == {"model": "small", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    chat([{"role": "user", "content": "hi"}], "big")
    assert server.seen[-1][2]["model"] == "big"


def test_a_server_without_usage_reports_none(server):
    assert openai_chat(url(server), "silent")([{"role": "user", "content": "hi"}]).usage is None


@pytest.mark.parametrize(("model", "message"), [("missing", "answered 404"), ("odd", "chat completion")])
def test_refusals_are_clear_errors(server, model, message):
    with pytest.raises(ChatServerError, match=message):
        openai_chat(url(server), model)([{"role": "user", "content": "hi"}])


def test_a_run_over_http(server):
    result = LocalRLMRunner(openai_chat(url(server), "small")).run("c", "t")
    assert result.final_answer == "LEAF"
    assert result.tree.totals()["prompt_tokens"] == 18


def test_a_run_over_http_inside_an_event_loop(server):
    result = asyncio.run(LocalRLMRunner(async_openai_chat(url(server), "small")).arun("c", "t"))
    assert result.final_answer == "LEAF"
    assert result.tree.totals()["cached_tokens"] == 8
