"""The pages for people: what they link to, and the files that they name, are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("examples/*/*.md")]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
SOURCE = re.compile(r"`((?:\w+/)+\w+\.py)`")


def prose(page):
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    wrong = []
    for path, anchor in LINK.findall(prose(page)):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(f"{path}#{anchor}")
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_source_files_that_are_named_exist(page):
    """As a path from the root, or from the package; a reader's own are in folders that we haven't."""
    wrong = []
    for path in SOURCE.findall(prose(page)):
        roots = [root for root in (ROOT, ROOT / "shardserve") if (root / path.split("/")[0]).is_dir()]
        if roots and not any((root / path).is_file() for root in roots):
            wrong.append(path)
    assert wrong == []


def test_a_link_that_leads_nowhere_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One heading\n[a](#one-heading) [b](#two) [c](gone.md) `agent/gone.py`\n")
    with pytest.raises(AssertionError, match=r"#two.*gone\.md"):
        test_links_lead_somewhere(page)
    with pytest.raises(AssertionError, match=r"agent/gone\.py"):
        test_source_files_that_are_named_exist(page)
