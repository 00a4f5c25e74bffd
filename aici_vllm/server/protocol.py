"""The bodies of requests and answers, as the OpenAPI page shows them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MODULE_ID = r"^[0-9a-f]{64}$"
TAG = r"^[A-Za-z][A-Za-z0-9_.-]{0,49}$"

TagName = Annotated[str, Field(pattern=TAG)]


class Error(BaseModel):
    """What is wrong and what to do about it."""

    message: str
    type: str
    param: str | None = None
    code: int


class ErrorAnswer(BaseModel):
    """The body of every refusal, in the shape of OpenAI's errors."""

    error: Error


class Uploaded(BaseModel):
    """A stored controller. The sizes are both those of its source: upstream compiled it, and we do not."""

    module_id: str = Field(description="sha256 of the source: name the controller by it, or tag it")
    wasm_size: int = Field(description="bytes of source")
    compiled_size: int = Field(description="bytes of source")
    time: int = Field(description="milliseconds that checking and storing took")


class InstalledController(BaseModel):
    """A controller that the operator installed."""

    name: str
    target: str = Field(description="module:function")


class StoredController(BaseModel):
    """A controller that somebody uploaded."""

    module_id: str
    size: int = Field(description="bytes of source")
    uploaded_at: int = Field(description="seconds since 1970")
    tags: list[str]


class Controllers(BaseModel):
    """Everything that `controller` can name here."""

    installed: list[InstalledController]
    stored: list[StoredController]


class MoveTags(BaseModel):
    """Make tags, or move them, all or none."""

    model_config = ConfigDict(extra="forbid")

    module_id: str = Field(pattern=MODULE_ID)
    tags: list[TagName] = Field(min_length=1, max_length=100)


class Tag(BaseModel):
    """A name for a stored controller."""

    tag: str
    module_id: str
    owner: str = Field(description="only they and admins move it")
    updated_at: int = Field(description="seconds since 1970")
    updated_by: str
    wasm_size: int = Field(description="bytes of source")
    compiled_size: int = Field(description="bytes of source")


class Tags(BaseModel):
    """Tags, the one that moved last first."""

    tags: list[Tag]


class RunRequest(BaseModel):
    """A controller, and the text that it goes on from."""

    model_config = ConfigDict(extra="forbid")

    controller: str = Field(
        min_length=1,
        description="hash or tag of a stored controller, name of an installed one, source text, `pyctrl` "
        "(the source is controller_arg), or `none` (plain generation)",
    )
    controller_arg: Any = Field(
        default="", description="a string for the controller; anything else reaches it as JSON text"
    )
    prompt: str = Field(default="", description="text before the controller's own")
    messages: list[dict[str, Any]] | None = Field(
        default=None, description="a conversation in place of prompt, written with the model's chat template"
    )
    model: str | None = Field(default=None, description="the server's first model by default")
    temperature: float | None = Field(default=0.0, ge=0, description="0, the default, is greedy")
    top_p: float | None = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(
        default=-1, ge=-1, le=2**31 - 1, description="-1 is all tokens; 0 is no number of tokens"
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="of each branch, fixed ones too; by default what the context has room for",
    )
    ignore_eos: bool = Field(default=False, description="go on after an end-of-sequence token")


class WriteVar(BaseModel):
    """A variable was set, or added to."""

    name: str
    value: str = Field(description="bytes, in hex")
    op: Literal["Set", "Append"]
    when_version_is: int | None = None


class Storage(BaseModel):
    """One write to the request's variables."""

    WriteVar: WriteVar


class Part(BaseModel):
    """A piece of a branch's text.

    `taken_back` holds what stood last in the branch's text and is gone.
    """

    kind: Literal["sampled", "spliced", "taken_back"]
    text: str


def _is_none(value: Any) -> bool:
    return value is None


FinishReason = Literal["aici-stop", "length", "fail", "abort", "eos", "deadlock"]


class Fork(BaseModel):
    """What happened in one branch since its last event."""

    index: int
    finish_reason: FinishReason | None = Field(default=None, exclude_if=_is_none)
    text: str = Field(description="new text after the prompt; ` ↩ ` stands where text was taken back")
    parts: list[Part] = Field(description="the same, with where it came from and what was taken back")
    error: str = ""
    logs: str = ""
    storage: list[Storage] = []


class Usage(BaseModel):
    """What the request cost so far."""

    sampled_tokens: int
    ff_tokens: int = Field(description="tokens the model computed, of the prompt too; cached ones are free")
    cost: int = Field(description="2 * sampled_tokens + ff_tokens")
    spliced_tokens: int = 0
    forward_passes: int = 0
    discarded_rows: int = 0


class InitialRun(BaseModel):
    """The first event of a run."""

    id: str
    object: Literal["initial-run"] = "initial-run"
    created: int
    model: str


class Run(BaseModel):
    """Every further event; the last one of a controller carries `results`."""

    object: Literal["run"] = "run"
    forks: list[Fork]
    usage: Usage
    results: dict[str, Any] | None = Field(
        default=None,
        exclude_if=_is_none,
        description="branches, variables and usage, as under `controller` in OpenAI responses",
    )


class RunEvent(BaseModel):
    """One server-sent event: `data` is the JSON text of an event, or `[DONE]` at the end."""

    data: InitialRun | Run | str
