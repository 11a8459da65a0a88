"""Every Python code block of README.md and docs/ runs, and warns of nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def script_of(page: Path) -> str:
    """Return the blocks of a page, in order, as one script in which every line keeps its number."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        fence = re.match(r"\s*```(\w*)", line)
        if fence:
            inside = not inside and fence[1] == "python"
        lines.append(line if inside and not fence else "")
    return "\n".join(lines) + "\n"


WITH_CODE = [page for page in PAGES if script_of(page).strip()]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_blocks_of_a_page_run(page, tmp_path):
    # In a process of its own: pages register backends, and a reader starts with a fresh interpreter too.
    script = tmp_path / f"{page.stem}.py"
    script.write_text(script_of(page))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # torch itself uses its deprecated jit.script when forward mode is first used.
    warnings = ["-W", "error", "-W", "ignore::DeprecationWarning:torch.jit._script"]
    command = [sys.executable, *warnings, str(script)]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, f"{page.relative_to(ROOT)}:\n{finished.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_pages_have_code():
    names = {page.name for page in WITH_CODE}
    assert {"README.md", "index.md", "conventions.md", "differentiation.md", "new-problem.md"} <= names
