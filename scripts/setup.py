"""Put everything the project needs into `.venv`: `python3 scripts/setup.py [cpu|cuda]`.

Only the standard library is needed. A stamp in `.venv` names what was installed; while it still matches,
nothing is done. An interrupted run leaves a mark, and the next one makes `.venv` again from nothing: pip
would take a package that was half installed for a whole one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup.json"
UNFINISHED = VENV / "setup.unfinished"
OLDEST = (3, 11)

TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""pip picks CUDA builds of these for vLLM's CPU build; importing them fails, and vLLM runs without them."""


def main(argv: list[str]) -> int:
    build = argv[1] if len(argv) > 1 else "cpu"
    if build not in ("cpu", "cuda") or len(argv) > 2:
        print("usage: setup.py [cpu|cuda]", file=sys.stderr)
        return 2
    if sys.version_info < OLDEST:
        print(
            f"Python {sys.version.split()[0]} is too old: 3.11 or later is needed; name one with PYTHON=…",
            file=sys.stderr,
        )
        return 1
    with one_at_a_time():
        wanted = what_to_install(build)
        if read_stamp() == wanted:
            return 0
        try:
            install(build)
        except subprocess.CalledProcessError as error:
            print(f"set-up stopped: {' '.join(map(str, error.cmd))} failed (see above)", file=sys.stderr)
            if error.returncode > 0:  # pip gave up by itself, and took back what it had begun.
                UNFINISHED.unlink(missing_ok=True)
            return 1
        except KeyboardInterrupt:
            print("set-up interrupted; the next one starts over", file=sys.stderr)
            return 130
        STAMP.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
        UNFINISHED.unlink()
    return 0


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let a second set-up of the same folder wait for the first."""
    with (ROOT / "pyproject.toml").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def what_to_install(build: str) -> dict[str, str]:
    """The stamp's content: it changes when an installed environment would no longer be right."""
    files = (ROOT / "pyproject.toml", Path(__file__))
    content = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return {"build": build, "content": content, "root": str(ROOT)}


def read_stamp() -> dict[str, str] | None:
    try:
        stamp: dict[str, str] = json.loads(STAMP.read_text(encoding="utf-8"))
        return stamp
    except (FileNotFoundError, ValueError):
        return None


def install(build: str) -> None:
    if UNFINISHED.exists() or holds_other_build(build) or not venv_works():
        print("making .venv", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    UNFINISHED.touch()
    STAMP.unlink(missing_ok=True)
    print(f"installing the project with vLLM's {build} build; the first time takes minutes", flush=True)
    if build == "cpu":
        install_torch_for_cpu()
    pip("install", "--editable", f"{ROOT}[{build},test]")
    if build == "cpu":
        pip("uninstall", "--yes", *UNWANTED)


def holds_other_build(build: str) -> bool:
    """vLLM's two builds own the same files, so one cannot replace the other in place."""
    stamp = read_stamp()
    return stamp is not None and stamp.get("build") != build


def venv_works() -> bool:
    if not PYTHON.exists():
        return False
    check = f"import sys, pip; sys.exit(sys.version_info < {OLDEST})"
    return subprocess.run([str(PYTHON), "-c", check], capture_output=True).returncode == 0


def install_torch_for_cpu() -> None:
    try:
        pip("install", TORCH, quiet_failure=True)
    except subprocess.CalledProcessError:
        print(f"{TORCH} is not in the configured package index; trying {TORCH_INDEX}", flush=True)
        pip("install", TORCH, "--extra-index-url", TORCH_INDEX)


def pip(*arguments: str, quiet_failure: bool = False) -> None:
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    if not sys.stdout.isatty():
        command.append("-qq")  # -q still warns about every index page that is missing
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL if quiet_failure else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
