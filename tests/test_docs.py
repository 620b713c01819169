"""What README, guide and notebook show must run, as a reader would run it."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(page: Path) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL))


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/papers.md", "docs/data.md"])
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = blocks(ROOT / page)
    assert code.count("\n") > 10
    exec(compile(code, page, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_is_committed_without_outputs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert 3 <= len(cells) <= 25
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert "assert" in "".join(code[-1]["source"])
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(code):
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec"), namespace)


def test_pages_point_at_files_that_are_there():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_reference_model_is_what_its_card_says():
    """Files are there, and the card claims what it was trained for."""
    from mech import reference

    assert reference.names() == ("llava-m", "llava-s", "llava-s-seed1", "qwen-s")
    total = sum(file.stat().st_size for file in reference.FOLDER.rglob("*"))
    assert total < 25e6
    for name in reference.names():
        card = reference.card(name)
        assert set(card["accuracy"]) == set(card["domains"])
        assert min(card["accuracy"].values()) >= 0.95, name
        assert tuple(card.get("checkpoints", ())) == reference.revisions(name)
    learning = [*reference.card("llava-s-seed1")["checkpoints"].values(), reference.card("llava-s-seed1")["accuracy"]]
    for before, after in pairwise(learning):
        assert all(before[domain] < after[domain] for domain in before)
