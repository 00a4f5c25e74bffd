"""A real server and the stock `openai` client: results, streams, choices, and every kind of bad request."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from aici_vllm.client import Client, ServerError

EXAMPLES = Path(__file__).parents[2] / "examples" / "scripts"
GREETING = "import aici\nasync def main():\n    await aici.FixedTokens('Hello')\n    {}\naici.start(main())\n"


@dataclass
class Server:
    """A running server: `client` for OpenAI requests, `http` for everything else."""

    client: openai.OpenAI
    http: httpx.Client

    def complete(self, script: str, prompt: str = "", **more: Any) -> Any:
        """The response of a completion that runs `script`."""
        arguments = {"max_tokens": 200, "temperature": 0.0, **more}
        return self.client.completions.create(
            model="m", prompt=prompt, extra_body={"vllm_xargs": {"controller": script}}, **arguments
        )

    def run(self, script: str, prompt: str = "", **more: Any) -> dict[str, Any]:
        """The controller's results of a completion that runs `script`."""
        return dict(self.complete(script, prompt, **more).kv_transfer_params["controller"])

    def kv_usage(self) -> float:
        """The share of KV blocks in use."""
        metrics = self.http.get("/metrics").text
        lines = re.findall(r"^vllm:kv_cache_usage_perc.*$", metrics, re.MULTILINE)
        return max(float(line.split()[-1]) for line in lines)


AICI_SERVE = (sys.executable, "-m", "aici_vllm.cli", "serve")


def start_server(
    folder: Path, *flags: str, command: tuple[str, ...] = AICI_SERVE, **environment: str
) -> Iterator[Server]:
    """A server of the model in `folder` on a free port, stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    arguments = [*command, str(folder), "--served-model-name", "m", "--port", port]
    arguments += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048", *flags]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **environment}
    process = subprocess.Popen(arguments, env=environment, start_new_session=True)
    base = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=base, timeout=300, transport=httpx.HTTPTransport(retries=0)) as http:
            _wait(process, http)
            yield Server(openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0), http)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _wait(process: "subprocess.Popen[bytes]", http: httpx.Client) -> None:
    for _ in range(600):
        assert process.poll() is None, "the server ended while it started"
        try:
            if http.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("the server did not answer within 300 s")


@pytest.fixture(scope="module")
def server(embedded_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"aici": {"server": {"store": str(tmp_path_factory.mktemp("store"))}}}
    yield from start_server(embedded_folder, "--additional-config", json.dumps(settings))


@pytest.mark.parametrize("name", ["tour", "take_back", "branches", "fields"])
def test_examples_give_the_same_streamed_and_not(server: Server, name: str) -> None:
    script = (EXAMPLES / f"{name}.py").read_text()
    whole = server.complete(script)
    results = whole.kv_transfer_params["controller"]
    assert [branch["error"] for branch in results["branches"]] == [None] * len(results["branches"])
    assert whole.choices[0].text == results["branches"][0]["text"]
    text, last = "", None
    for chunk in server.complete(script, stream=True):
        text += chunk.choices[0].text
        last = chunk.choices[0]
    assert text == whole.choices[0].text
    assert last is not None and last.finish_reason == whole.choices[0].finish_reason == "stop"
    streamed = json.loads(last.stop_reason)["controller"]
    assert streamed["variables"] == results["variables"]
    # Which branch computes shared text depends on whose script is quicker, and some of it on who is left.
    for usage in (streamed["usage"], results["usage"]):
        assert usage.pop("computed_tokens") > 0
    assert streamed["usage"] == results["usage"]


def test_variables_and_branches_of_an_example(server: Server) -> None:
    results = server.run((EXAMPLES / "branches.py").read_text())
    hot, day = results["variables"]["hot"], results["variables"]["day"]
    texts = [branch["text"] for branch in results["branches"]]
    assert texts == [
        f"The opposite of hot is{hot} and the opposite of day is{day}",
        f"The opposite of hot is{hot}",
        f"The opposite of day is{day}",
    ]


def test_fixed_text_costs_no_forward_pass(server: Server) -> None:
    script = GREETING.format("await aici.FixedTokens(' word' * 300); await aici.gen_tokens(max_tokens=3)")
    usage = server.run(script, max_tokens=500)["usage"]
    assert usage["sampled_tokens"] == usage["forward_passes"] == 3
    assert usage["spliced_tokens"] > 300


def chat_request(script: str, **more: Any) -> dict[str, Any]:
    """Arguments of a chat completion that runs `script`."""
    return {
        "model": "m",
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 50,
        "temperature": 0.0,
        "extra_body": {"vllm_xargs": {"controller": script}},
        **more,
    }


def test_chat_uses_the_template_and_streams(server: Server) -> None:
    script = GREETING.format("await aici.gen_tokens(max_tokens=4)")
    request = chat_request(script)
    whole = server.client.chat.completions.create(**request)
    assert whole.choices[0].message.content.startswith("Hello")
    assert whole.kv_transfer_params["controller"]["usage"]["sampled_tokens"] == 4
    chunks = list(server.client.chat.completions.create(stream=True, **request))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert "controller" in json.loads(chunks[-1].choices[0].stop_reason)


def test_fork_branches_fill_the_choices(server: Server) -> None:
    script = GREETING.format("i = await aici.fork(2); await aici.FixedTokens(f' number {i}')")
    answer = server.complete(script, n=4, temperature=0.5)
    assert [choice.text for choice in answer.choices] == ["Hello number 0", "Hello number 1", "", ""]
    assert len(answer.kv_transfer_params["controller"]["branches"]) == 2
    streamed = ["", "", "", ""]
    for chunk in server.complete(script, n=4, stream=True, temperature=0.5):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == ["Hello number 0", "Hello number 1", "", ""]


def test_a_stream_holds_back_what_a_label_may_take_back(server: Server) -> None:
    body = "l = aici.Label(); await aici.gen_tokens(max_tokens=5); "
    body += "await aici.FixedTokens(' there', following=l)"
    chunks = [chunk.choices[0].text for chunk in server.complete(GREETING.format(body), stream=True)]
    assert "".join(chunks) == "Hello there"


def test_the_argument_reaches_the_script(server: Server) -> None:
    script = GREETING.format("await aici.FixedTokens(' ' + aici.controller_arg())")
    answer = server.client.completions.create(
        model="m",
        prompt="",
        max_tokens=20,
        extra_body={"vllm_xargs": {"controller": script, "controller_arg": "world"}},
    )
    assert answer.choices[0].text == "Hello world"


def test_sixty_four_at_once_half_of_them_plain(server: Server) -> None:
    script = (EXAMPLES / "take_back.py").read_text()

    def plain(prompt: str) -> str:
        answer = server.client.completions.create(model="m", prompt=prompt, max_tokens=8, temperature=0.0)
        return answer.choices[0].text

    prompts = [f"Number {i} is" for i in range(32)]
    alone = [plain(prompt) for prompt in prompts]
    controlled_alone = server.run(script)
    with ThreadPoolExecutor(64) as pool:
        plains = [pool.submit(plain, prompt) for prompt in prompts]
        controlled = [pool.submit(server.run, script) for _ in range(32)]
        assert [future.result() for future in plains] == alone
        assert {future.result()["branches"][0]["text"] for future in controlled} == {
            controlled_alone["branches"][0]["text"]
        }
    plain("The last step reports the blocks")
    assert server.kv_usage() == 0


def test_a_client_that_leaves_frees_every_branch(server: Server) -> None:
    script = GREETING.format("i = await aici.fork(4); await aici.gen_tokens(max_tokens=1500)")
    stream = server.complete(script, stream=True, max_tokens=1900)
    next(iter(stream))
    stream.close()
    for _ in range(200):
        server.client.completions.create(model="m", prompt="a", max_tokens=1)
        if server.kv_usage() == 0:
            return
    raise AssertionError("blocks are still in use")


REFUSED_AT_ONCE = {
    "syntax error": ("def f(:\n", "line 1"),
    "never starts": ("import aici\nprint(1)\n", "start"),
    "inheritance": ("import aici\nclass A(int):\n    pass\naici.start(A)\n", "line 2"),
    "unknown name": ("no_such_controller", "no_such_controller"),
    "too large": ("#" * (1 << 20) + "\nimport aici\n", "1048576"),
}


@pytest.mark.parametrize("case", REFUSED_AT_ONCE)
def test_bad_requests_get_a_400(server: Server, case: str) -> None:
    script, said = REFUSED_AT_ONCE[case]
    with pytest.raises(openai.BadRequestError) as caught:
        server.complete(script)
    assert said in str(caught.value)


@pytest.mark.parametrize("case", REFUSED_AT_ONCE)
def test_bad_streams_get_a_400_too(server: Server, case: str) -> None:
    script, said = REFUSED_AT_ONCE[case]
    with pytest.raises(openai.BadRequestError, match=said):
        server.complete(script, stream=True)
    with pytest.raises(openai.BadRequestError, match=said):
        server.client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            extra_body={"vllm_xargs": {"controller": script}},
        )


def test_max_tokens_over_the_context_gets_a_400(server: Server) -> None:
    with pytest.raises(openai.BadRequestError):
        server.complete(GREETING.format("pass"), max_tokens=100_000)


def test_structured_outputs_beside_a_controller_get_a_400(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="structured outputs"):
        server.client.completions.create(
            model="m",
            prompt="",
            extra_body={
                "vllm_xargs": {"controller": GREETING.format("pass")},
                "structured_outputs": {"regex": "a"},
            },
        )


def test_min_tokens_and_ignore_eos_hold_off_the_end(server: Server) -> None:
    script = "import aici\nasync def f():\n    await aici.gen_tokens(max_tokens=30)\naici.start(f())\n"
    prompt = "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n"
    plain = server.run(script, prompt)["usage"]["sampled_tokens"]
    assert plain < 25
    for more in ({"min_tokens": 25}, {"ignore_eos": True}):
        answer = server.client.completions.create(
            model="m",
            prompt=prompt,
            max_tokens=200,
            temperature=0.0,
            extra_body={"vllm_xargs": {"controller": script}, **more},
        )
        assert answer.kv_transfer_params["controller"]["usage"]["sampled_tokens"] >= 25


def streamed(server: Server, script: str, **more: Any) -> tuple[str, Any, dict[str, Any], list[Any]]:
    """A stream's text, last choice, results, and logprobs of each token as (token, logprob)."""
    text, logprobs, last = "", [], None
    for chunk in server.complete(script, stream=True, **more):
        last = chunk.choices[0]
        text += last.text
        if last.logprobs is not None:
            logprobs += zip(last.logprobs.tokens, last.logprobs.token_logprobs, strict=True)
    assert last is not None
    return text, last, json.loads(last.stop_reason)["controller"], logprobs


@pytest.mark.parametrize("shown", [False, True])
def test_a_stop_string_ends_the_text_and_the_results_arrive(server: Server, shown: bool) -> None:
    script = GREETING.format("await aici.FixedTokens(' one two three'); aici.set_var('never', 'x')")
    extra = {"include_stop_str_in_output": shown, "vllm_xargs": {"controller": script}}
    more: dict[str, Any] = {
        "prompt": "",
        "model": "m",
        "max_tokens": 50,
        "stop": ["o th", "never"],
        "extra_body": extra,
    }
    answer = server.client.completions.create(**more)
    choice, results = answer.choices[0], answer.kv_transfer_params["controller"]
    expected = "Hello one two th" if shown else "Hello one tw"
    assert choice.text == results["branches"][0]["text"] == expected
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "o th")
    chunks = [chunk.choices[0] for chunk in server.client.completions.create(stream=True, **more)]
    assert "".join(chunk.text for chunk in chunks) == expected
    assert chunks[-1].finish_reason == "stop"
    assert json.loads(chunks[-1].stop_reason)["controller"]["branches"] == results["branches"]
    assert results["branches"][0]["stop_reason"] == "o th"


def test_a_stop_token_ends_the_text(server: Server) -> None:
    script = GREETING.format("await aici.FixedTokens(' one two three')")
    whole = server.run(script)["branches"][0]["token_ids"]
    extra = {"stop_token_ids": [whole[2]], "vllm_xargs": {"controller": script}}
    answer = server.client.completions.create(model="m", prompt="", max_tokens=50, extra_body=extra)
    assert (answer.choices[0].text, answer.choices[0].stop_reason) == ("Hello one", whole[2])
    assert answer.kv_transfer_params["controller"]["branches"][0]["token_ids"] == whole[:3]


def test_logprobs_of_a_completion_streamed_and_not(server: Server) -> None:
    body = (
        "l = aici.Label(); await aici.gen_tokens(max_tokens=4); await aici.FixedTokens(' so', following=l); "
    )
    script = GREETING.format(body + "await aici.gen_tokens(max_tokens=4)")
    answer = server.complete(script, logprobs=2)
    results = answer.kv_transfer_params["controller"]["branches"][0]
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.token_logprobs == pytest.approx(results["logprobs"])
    zero = [logprob == 0.0 for logprob in logprobs.token_logprobs]
    assert zero == [kind == "spliced" for kind, count in results["sources"] for _ in range(count)]
    text, _, again, pairs = streamed(server, script, logprobs=2)
    assert text == answer.choices[0].text and again["branches"][0] == results
    assert [token for token, _ in pairs] == logprobs.tokens
    assert [logprob for _, logprob in pairs] == pytest.approx(logprobs.token_logprobs)


def test_logprobs_of_a_stream_without_any_token(server: Server) -> None:
    script = GREETING.replace("await aici.FixedTokens('Hello')", "await aici.FixedTokens('')").format("pass")
    assert streamed(server, script, logprobs=1)[:1] == ("",)


def test_logprobs_of_a_chat(server: Server) -> None:
    script = GREETING.format("await aici.gen_tokens(max_tokens=4)")
    request = chat_request(script, logprobs=True, top_logprobs=2)
    content = server.client.chat.completions.create(**request).choices[0].logprobs.content
    assert content[0].token == "Hello" and content[0].logprob == 0.0
    assert [len(entry.top_logprobs) for entry in content] == [1, 2, 2, 2, 2]
    assert all(entry.logprob < 0 for entry in content[1:])
    chunks = server.client.chat.completions.create(stream=True, **request)
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    again = [entry for part in parts if part is not None for entry in part.content]
    assert [entry.token for entry in again] == [entry.token for entry in content]


def test_echo_brings_the_logprobs_of_the_prompt(server: Server) -> None:
    script = GREETING.format("await aici.gen_tokens(max_tokens=2)")
    plain = server.client.completions.create(
        model="m", prompt="The capital of", max_tokens=1, temperature=0.0, echo=True, logprobs=0
    )
    answer = server.complete(script, "The capital of", echo=True, logprobs=0)
    choice = answer.choices[0]
    assert choice.text.startswith("The capital ofHello")
    prompt = plain.choices[0].logprobs.token_logprobs[:-1]
    found = choice.logprobs.token_logprobs
    assert found[0] is prompt[0] is None
    assert found[1 : len(prompt)] == pytest.approx(prompt[1:], abs=1e-3)
    assert found[len(prompt)] == 0.0 and len(found) == len(prompt) + 3


FAILS_WHILE_RUNNING = {
    "raises first": ("import aici\nasync def f():\n    raise KeyError('k')\naici.start(f())\n", "KeyError"),
    "raises later": (GREETING.format("raise ValueError('later')"), "ValueError: later"),
    "awaits nothing": ("import aici\nasync def f():\n    pass\naici.start(f())\n", "await"),
    "bad regex": (GREETING.format("await aici.gen_tokens(regex='(')"), "never closed"),
    "fork(0)": (GREETING.format("await aici.fork(0)"), "at least 1"),
    "gen over the context": (GREETING.format("await aici.gen_tokens(max_tokens=10**6)"), "2048"),
    "text over any context": (GREETING.format("await aici.FixedTokens('a' * 10**6)"), "2048"),
    "dead label": (
        GREETING.format(
            "a = aici.Label(); await aici.FixedTokens('x'); b = aici.Label(); "
            "await aici.FixedTokens('y', following=a); await aici.FixedTokens('z', following=b)"
        ),
        "label",
    ),
    "past the start": (
        GREETING.format("await aici.fork([aici.Branch(splices=[aici.Splice(backtrack=99, ff_tokens=[])])])"),
        "backtrack",
    ),
    "deadlock": (GREETING.format("await aici.wait_vars('never')"), "'never'"),
}


@pytest.mark.parametrize("case", FAILS_WHILE_RUNNING)
def test_a_script_that_fails_says_why_and_harms_nobody(server: Server, case: str) -> None:
    script, said = FAILS_WHILE_RUNNING[case]
    branch = server.run(script)["branches"][0]
    assert said in branch["error"], branch["error"]
    assert branch["finish_reason"] in ("fail", "deadlock")
    chunks = list(server.complete(script, stream=True))
    results = json.loads(chunks[-1].choices[0].stop_reason)["controller"]
    assert results["branches"][0]["error"] == branch["error"]
    assert server.run(GREETING.format("pass"))["branches"][0]["text"] == "Hello"


def test_text_awaited_before_an_exception_is_not_lost(server: Server) -> None:
    assert server.run(GREETING.format("raise ValueError"))["branches"][0]["text"] == "Hello"


def test_text_over_the_budget_ends_with_length(server: Server) -> None:
    branch = server.run(GREETING.format("await aici.FixedTokens(' a' * 5000)"))["branches"][0]
    assert branch["finish_reason"] == "length" and branch["error"] is None


def test_fork_17_fails_one_branch_and_the_others_go_on(server: Server) -> None:
    results = server.run(GREETING.format("i = await aici.fork(17); await aici.FixedTokens(f' {i}')"))
    errors = [branch["error"] for branch in results["branches"]]
    assert errors[:16] == [None] * 16
    assert errors[16] == "too many forks (max=16)"
    assert results["branches"][15]["text"] == "Hello 15"


def test_plain_vllm_serve_needs_two_flags_only(embedded_folder: Path, tmp_path: Path) -> None:
    """`vllm-cpu` asks for the metadata of a distribution called `vllm`; it is given some here."""
    if not any(distributions(name="vllm")):
        release = f"{version('vllm-cpu')}+cpu"
        folder = tmp_path / f"vllm-{release}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}\n")
    flags = ("--scheduler-cls", "aici_vllm.Scheduler", "--worker-cls", "aici_vllm.Worker")
    command = (str(Path(sys.executable).with_name("vllm")), "serve")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    with contextmanager(start_server)(embedded_folder, *flags, command=command, PYTHONPATH=path) as server:
        script = GREETING.format("await aici.gen_tokens(options=[' early', ' late'])")
        assert server.complete(script).choices[0].text in ("Hello early", "Hello late")


# Controllers that the server keeps, and runs told step by step.


def replay(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What the branches are after all events: text, logs, variables written, finish reason."""
    branches: dict[int, dict[str, Any]] = {}
    for fork in (fork for event in events for fork in event.get("forks", [])):
        new = {"text": "", "logs": "", "storage": [], "finish_reason": None}
        branch = branches.setdefault(fork["index"], new)
        for part in fork["parts"]:
            if part["kind"] == "taken_back":
                assert branch["text"].endswith(part["text"])
                branch["text"] = branch["text"].removesuffix(part["text"])
            else:
                branch["text"] += part["text"]
        branch["logs"] += fork["logs"]
        branch["storage"] += fork["storage"]
        branch["finish_reason"] = fork.get("finish_reason", branch["finish_reason"])
    return branches


def client_of(server: Server) -> Client:
    return Client(f"{server.http.base_url}/v1")


@pytest.mark.parametrize("name", ["tour", "take_back", "branches", "fields"])
def test_the_events_of_a_run_add_up_to_its_results(server: Server, name: str) -> None:
    script = (EXAMPLES / f"{name}.py").read_text()
    with client_of(server) as client:
        found = client.run_controller(script)
    results, alone = found["results"], server.run(script)
    assert [branch["text"] for branch in results["branches"]] == [
        branch["text"] for branch in alone["branches"]
    ]
    told = replay(found["response"])
    for branch in results["branches"]:
        one = told[branch["index"]]
        assert (one["text"], one["logs"]) == (branch["text"], branch["logs"])
        assert (one["finish_reason"], branch["finish_reason"]) == ("aici-stop", "stop")
    assert found["storage"] == results["variables"]
    assert found["usage"]["sampled_tokens"] == results["usage"]["sampled_tokens"]
    assert len(found["response"]) > found["usage"]["sampled_tokens"] / len(told)


def test_what_a_script_takes_back_is_seen_before_it_goes(server: Server) -> None:
    with client_of(server) as client:
        found = client.run_controller((EXAMPLES / "tour.py").read_text())
    kinds = [
        part["kind"] for event in found["response"] for f in event.get("forks", []) for part in f["parts"]
    ]
    assert "taken_back" in kinds and kinds.index("sampled") < kinds.index("taken_back")
    assert " \u21a9 " in found["text"][0]


def test_a_stored_controller_runs_by_hash_and_tag(server: Server) -> None:
    script = GREETING.format("await aici.FixedTokens(' ' + aici.controller_arg())")
    with client_of(server) as client:
        module_id = client.upload_module(script)["module_id"]
        client.tag_module(module_id, ["hello", "hello.v1"])
        for name in (module_id, "hello", "hello.v1"):
            assert client.run_controller(name, "world")["text"] == ["Hello world"]
            answer = server.client.completions.create(
                model="m",
                prompt="",
                max_tokens=20,
                extra_body={"vllm_xargs": {"controller": name, "controller_arg": "there"}},
            )
            assert answer.choices[0].text == "Hello there"
        assert {tag["tag"] for tag in client.list_tags()} >= {"hello", "hello.v1"}
        assert "recursive" in {one["name"] for one in client.list_controllers()["installed"]}
    for name in ("helo", "0" * 64):
        with pytest.raises(openai.BadRequestError, match=name):
            server.complete(name)


def test_messages_of_a_run_are_written_with_the_chat_template(server: Server) -> None:
    script = "import aici\nasync def main():\n    await aici.gen_tokens(max_tokens=8)\naici.start(main())\n"
    messages = [{"role": "user", "content": "Say hello."}]
    chat = server.client.chat.completions.create(
        model="m",
        messages=messages,  # type: ignore[arg-type]
        temperature=0.0,
        extra_body={"vllm_xargs": {"controller": script}},
    )
    with client_of(server) as client:
        assert client.run_controller(script, messages=messages)["text"] == [chat.choices[0].message.content]
        plain = client.run_controller("none", messages=messages, max_tokens=8)
        assert plain["text"] == [chat.choices[0].message.content]
        assert plain["response"][-1]["forks"][0]["finish_reason"] in ("length", "eos")


def test_a_run_whose_script_fails_is_told_in_its_events(server: Server) -> None:
    with client_of(server) as client:
        found = client.run_controller(GREETING.format("raise ValueError('later')"))
    assert "ValueError: later" in found["error"] and found["text"] == ["Hello"]
    last = found["response"][-1]
    assert last["forks"][0]["finish_reason"] == "fail"


def test_runs_that_cannot_work_get_a_400(server: Server) -> None:
    with client_of(server) as client:
        for request, said in [
            ({"controller": "def f(:\n"}, "line 1"),
            ({"controller": "helo"}, "helo"),
            ({"controller": "none", "prompt": "a " * 5000}, "2048"),
            ({"controller": "none", "prompt": "a", "max_tokens": 2048}, "2047"),
            ({"controller": "none", "messages": [{"role": "user", "content": 5}]}, "messages"),
        ]:
            with pytest.raises(ServerError, match=said) as caught:
                client.run_controller(**request)  # type: ignore[arg-type]
            assert caught.value.status == 400
        with pytest.raises(ServerError, match="does not exist") as caught:
            client.run_controller("none", model="other")
        assert caught.value.status == 404


def test_a_client_that_leaves_a_run_frees_every_branch(server: Server) -> None:
    script = GREETING.format("i = await aici.fork(4); await aici.gen_tokens(max_tokens=1500)")
    with client_of(server) as client, client.stream(script, max_tokens=1900) as events:
        assert any(fork["index"] == 3 for event in events for fork in event.get("forks", []))
    for _ in range(200):
        server.client.completions.create(model="m", prompt="a", max_tokens=1)
        if server.kv_usage() == 0:
            return
    raise AssertionError("blocks are still in use")


def curl(server: Server, *arguments: str) -> str:
    """What curl prints; `arguments[-1]` is the path."""
    *flags, path = arguments
    command = ["curl", "--silent", "--no-buffer", *flags, f"{server.http.base_url}/v1/{path}"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_all_of_it_from_curl(server: Server) -> None:
    python, as_json = ("-H", "content-type: text/x-python"), ("-H", "content-type: application/json")
    tour = EXAMPLES / "tour.py"
    module_id = json.loads(curl(server, *python, "--data-binary", f"@{tour}", "controllers"))["module_id"]
    assert module_id == hashlib.sha256(tour.read_bytes()).hexdigest()
    body = json.dumps({"module_id": module_id, "tags": ["tour"]})
    assert json.loads(curl(server, *as_json, "-d", body, "controllers/tags"))["tags"][0]["tag"] == "tour"
    assert "tour" in curl(server, "controllers/tags")
    lines = curl(server, *as_json, "-d", '{"controller": "tour"}', "run").split("\n\n")
    assert json.loads(lines[0].removeprefix("data: "))["object"] == "initial-run"
    assert lines[-2:] == ["data: [DONE]", ""]
    refused = json.loads(curl(server, *as_json, "-d", '{"controller": "tuor"}', "run"))
    assert "unknown controller 'tuor'" in refused["error"]["message"]


def test_the_openapi_page_shows_the_routes(server: Server) -> None:
    page = server.http.get("/openapi.json").json()
    assert {"/v1/run", "/v1/controllers", "/v1/controllers/tags", "/v1/completions"} <= page["paths"].keys()
    assert list(page["paths"]["/v1/run"]["post"]["responses"]["200"]["content"]) == ["text/event-stream"]
