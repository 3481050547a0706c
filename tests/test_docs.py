"""The documents: links lead somewhere, the exercises' lines stand in the code, README keeps to its size.

    pytest tests/test_docs.py
"""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "tests/README.md", *sorted((ROOT / "assets").glob("*.md"))]


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings: lower case, blanks become hyphens, other signs go."""
    titles = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    text = file.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_lines_that_exercises_change_stand_in_the_code():
    """Each once, so that a reader finds it, in a file that the exercise names."""
    text = (ROOT / "assets/EXERCISES.md").read_text(encoding="utf-8")
    exercises = re.split(r"(?m)^### \d+\. ", text)[1:]
    for exercise in exercises:
        code = (ROOT / re.search(r"`([\w/]+\.py)`", exercise)[1]).read_text(encoding="utf-8").splitlines()
        for line in re.findall(r"(?m)^-(.*)$", re.search(r"```diff\n(.*?)```", exercise, re.S)[1]):
            assert code.count(line) == 1, line
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert len(exercises) >= 12 and f"{len(exercises)} [exercises]" in readme


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 170 and len(text.split()) <= 1900 and max(map(len, lines)) <= 120
