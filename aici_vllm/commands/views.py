"""How a run looks while it goes on: a live picture in a terminal, plain lines elsewhere."""

import base64
from collections.abc import Iterable
from typing import Any, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.rule import Rule
from rich.text import Text

from aici_vllm.commands.branches import STRUCK, Picture, Pictures

STYLES = {"spliced": "cyan", "sampled": "bold yellow", STRUCK: "dim strike red"}
WORDS = {"spliced": "fixed", "sampled": "sampled", STRUCK: "taken back"}


class View(Protocol):
    """Is shown every event, then the end."""

    def show(self, event: dict[str, Any]) -> None:
        """One event of the run."""
        ...

    def end(self, results: dict[str, Any] | None) -> None:
        """The run is over; `results` are the engine's, where it sent any."""
        ...


class Silent:
    """Shows nothing."""

    def show(self, event: dict[str, Any]) -> None:
        pass

    def end(self, results: dict[str, Any] | None) -> None:
        pass


class PlainLines:
    """One line for each stretch of text of one branch and kind, then every branch, cost and variables."""

    def __init__(self, out: TextIO):
        self._out = out
        self._pictures = Pictures()
        self._sampled: dict[int, str] = {}

    def show(self, event: dict[str, Any]) -> None:
        self._pictures.update(event)
        for fork in event.get("forks", []):
            for part in fork["parts"]:
                self._show_part(fork["index"], part["kind"], part["text"])
            if fork.get("finish_reason"):
                self._flush(fork["index"])

    def end(self, results: dict[str, Any] | None) -> None:
        for picture in self._pictures.branches.values():
            self._flush(picture.index)
            self._line(f"--- branch {picture.index} ({_ending(picture)})")
            self._line(picture.text)
            for line in picture.logs.splitlines():
                self._line(f"[{picture.index}] {line}")
        for line in closing_lines(self._pictures.usage, results):
            self._line(line)

    def _show_part(self, index: int, kind: str, text: str) -> None:
        # Sampled tokens come one by one: a line each would be hard to read.
        if kind == "sampled":
            self._sampled[index] = self._sampled.get(index, "") + text
        else:
            self._flush(index)
            self._line(f"[{index}] {WORDS[kind]}: {text!r}")

    def _flush(self, index: int) -> None:
        if text := self._sampled.pop(index, ""):
            self._line(f"[{index}] {WORDS['sampled']}: {text!r}")

    def _line(self, text: str) -> None:
        print(text, file=self._out, flush=True)


class LivePicture:
    """Every branch at once, redrawn as it grows: fixed text, sampled text, and struck out what was taken
    back."""

    def __init__(self, console: Console):
        self._console = console
        self._pictures = Pictures()
        self._live = Live(console=console, refresh_per_second=12, transient=True, get_renderable=self._draw)

    def __enter__(self) -> "LivePicture":
        self._live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._live.stop()

    def show(self, event: dict[str, Any]) -> None:
        self._pictures.update(event)

    def end(self, results: dict[str, Any] | None) -> None:
        # What is too tall for the screen is cut while it is live, and whole in what stays.
        self._console.print(self._draw(logs=True))
        for line in closing_lines(self._pictures.usage, results):
            self._console.print(Text(line))

    def _draw(self, logs: bool = False) -> Group:
        return Group(key(), *(row for one in self._pictures.branches.values() for row in _rows(one, logs)))


def key() -> Text:
    """What the styles mean."""
    key = Text()
    for kind, style in STYLES.items():
        key.append(WORDS[kind], style).append("  ")
    return key


def _rows(picture: Picture, logs: bool) -> Iterable[Rule | Text]:
    yield Rule(Text(f"branch {picture.index}: {_ending(picture)}"), align="left", style="dim")
    text = Text()
    for piece in picture.pieces:
        text.append(piece.text, STYLES[piece.kind])
    yield text
    if logs:
        yield from (Text(f"[{picture.index}] {line}", "dim") for line in picture.logs.splitlines())


def _ending(picture: Picture) -> str:
    ending = picture.finish_reason or "running"
    return f"{ending}: {picture.error}" if picture.error else ending


def closing_lines(usage: dict[str, int], results: dict[str, Any] | None) -> list[str]:
    """What the run cost, and its variables."""
    lines = []
    if usage:
        lines.append(
            f"--- {usage['sampled_tokens']} tokens sampled, {usage['spliced_tokens']} spliced, "
            f"{usage['forward_passes']} forward passes"
        )
    return lines + [f"{name} = {value}" for name, value in sorted(_variables(results or {}).items())]


def _variables(results: dict[str, Any]) -> dict[str, str]:
    binaries = results.get("variables_base64", {})
    shown = {name: base64.b64decode(text).decode(errors="replace") for name, text in binaries.items()}
    return {**results.get("variables", {}), **shown}
