"""Ask another vLLM whether the project would work with it: `.venv/bin/python scripts/check_vllm.py 0.33.0`.

Takes a version, which pip downloads, or a wheel; nothing is installed. Three questions: is everything there
that the project uses, by name; which of the functions that the scheduler was written after read differently,
for somebody to read; and do the simulator's schedules come to the same on that vLLM's own scheduler.
"""

from __future__ import annotations

import argparse
import difflib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 28, 31, 34, 35)]

RUN_ON = """
import sys
sys.path[:0] = [sys.argv[1], "."]
from tests.engine.regimes import load_shim_here
load_shim_here()
# Its build for another device names no platform here; the scheduler needs one only to have a name.
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform
vllm.platforms._current_platform = CpuPlatform()
import pytest
sys.exit(pytest.main(["-q", "--no-header", "--show-capture=no", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("vllm", help="a version, or the path of a wheel")
    parser.add_argument("--diff", action="store_true", help="show how the functions differ")
    parser.add_argument("--schedules", type=int, default=400, help="how many the simulator runs")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(given.vllm) if given.vllm.endswith(".whl") else download(given.vllm, Path(folder))
        unpacked = unpack(wheel, Path(folder, "unpacked"))
        tell_what_differs(wheel, given.diff)
        environment = {**os.environ, "VLLM_SOURCES": str(wheel.resolve())}
        names = run([sys.executable, "-m", "pytest", "-q", "tests/engine/test_compat.py"], environment)
        environment |= {
            "SIMULATOR_SCHEDULES": str(given.schedules),
            "VLLM_CACHE_ROOT": str(Path(folder, "cache")),
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        tests = [f"tests/simulator/test_{name}.py" for name in ("found", "schedules")]
        simulated = run([sys.executable, "-c", RUN_ON, str(unpacked), *tests], environment)
    return names or simulated


def download(version: str, folder: Path) -> Path:
    """The wheel of vLLM's CUDA build of that version; its Python files are those of every build."""
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *platforms]
    subprocess.run([*command, f"--dest={folder}", f"vllm=={version}"], check=True)
    return next(folder.glob("vllm-*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """The Python files of a wheel, in `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.endswith(".py")])
    return folder


def tell_what_differs(wheel: Path, whole: bool) -> None:
    """Print which functions read differently there, comments aside, and how if `whole`."""
    sys.path.insert(0, str(ROOT))
    from tests.engine.vllm_internals import MIRRORED
    from tests.engine.vllm_sources import Sources

    here, there = Sources.installed(), Sources(wheel)
    for path in MIRRORED:
        ours, theirs = here.body(path), there.body(path)
        if ours == theirs:
            continue
        lines = list(
            difflib.unified_diff((ours or "").splitlines(), (theirs or "").splitlines(), lineterm="")
        )
        changed = sum(line[0] in "+-" for line in lines[2:])
        print(f"read again ({changed} lines): {path}")
        if whole:
            print("\n".join(lines[2:]))


def run(command: list[str], environment: dict[str, str]) -> int:
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
