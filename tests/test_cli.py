"""The command line's manners: exit statuses, and what goes to which stream."""

from __future__ import annotations

from pathlib import Path

import pytest

from aici_vllm.cli import SUBCOMMANDS, main


def test_model_prints_its_folder(embedded_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--cache", str(embedded_folder.parents[1])]) == 0
    assert capsys.readouterr().out == f"{embedded_folder}\n"


def test_an_error_is_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--cache", str(tmp_path), "--wheel", "/nowhere.whl"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("aici model: /nowhere.whl is not a file")
    assert captured.err.count("\n") == 1


def test_an_unknown_subcommand_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["nonsense"])
    assert stopped.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_help_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(subcommand.name in shown for subcommand in SUBCOMMANDS)


def test_check_tells_every_line_that_the_sandbox_would_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text("import aici\nasync def main():\n    pass\naici.start(main())\n")
    bad.write_text("import aici, socket\nasync def main():\n    del x\naici.start(main())\n")
    assert main(["check", str(good)]) == 0
    assert capsys.readouterr().out == ""
    assert main(["check", str(good), str(bad), str(tmp_path / "none.py")]) == 1
    said = capsys.readouterr()
    first, second = said.out.splitlines()
    assert first.startswith(f"{bad}:1: the sandbox has no module 'socket'")
    assert second.startswith(f"{bad}:3: the sandbox has no del")
    assert "none.py" in said.err and said.err.count("\n") == 1


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tags", "--base-url", "http://127.0.0.1:9/v1"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("aici tags: http://127.0.0.1:9/v1: ")
