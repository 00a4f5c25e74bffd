"""The README shows what is there: its script is the example, its map names folders that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_readmes_script_is_the_example() -> None:
    example = (ROOT / "examples" / "scripts" / "tour.py").read_text()
    shown = re.search(r"```python\n(import pyaici\.server.*?)```", README, re.DOTALL)
    assert shown is not None
    assert example.split('"""\n\n', 1)[1] == shown.group(1)


def test_every_place_in_the_map_exists() -> None:
    rows = re.findall(r"^\| (`.*?) \|", README, re.MULTILINE)
    places = [place for row in rows for place in re.findall(r"`([^`]+)`", row)]
    assert len(places) > 8
    for place in places:
        assert any((folder / place).exists() for folder in (ROOT, ROOT / "aici_vllm")), place


def test_every_link_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), (page.name, target)
