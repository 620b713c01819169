"""What README, guide and notebook show must run, as a reader would run it."""

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


# Blocks that are shown, and cells that are run when the documentation is built (options of theirs begin with a colon).
BLOCK = re.compile(r"```(?:python|\{code-cell\}[^\n]*)\n(?::[^\n]*\n)*(.*?)```", flags=re.DOTALL)
BUILT = (
    "_build",
    "_parts",
    "api",
    "howto",
    "notebooks",
    "axes.md",
    "commands.md",
    "families.md",
)  # written by docs/generated.py
PAGES = [
    path for path in sorted((ROOT / "docs").rglob("*.md")) if path.relative_to(ROOT / "docs").parts[0] not in BUILT
]


def blocks(page: Path) -> str:
    return "\n".join(BLOCK.findall(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "page", [page for page in [ROOT / "README.md", *PAGES] if blocks(page)], ids=lambda page: page.stem
)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(page), page.name, "exec"), {"__name__": "__main__"})


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
    for page in [ROOT / "README.md", *PAGES]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            there = (page.parent / target).resolve()
            built = there.is_relative_to(ROOT / "docs") and there.relative_to(ROOT / "docs").parts[0] in BUILT
            assert target.startswith("http") or built or there.exists(), f"{page.name}: {target}"


def commands() -> list[str]:
    """Lines of the command line that pages show, in blocks and where a block is indented."""
    shown = [page.read_text(encoding="utf-8").replace("\\\n", " ") for page in [ROOT / "README.md", *PAGES]]
    lines = {
        line.split("  #")[0].strip() for text in shown for line in re.findall(r"^(?: {4})?mech [a-z].*", text, re.M)
    }
    return sorted(lines)


@pytest.mark.parametrize("line", commands())
def test_a_command_that_is_shown_has_these_options(line, mech):
    _, *words = shlex.split(line)
    code, out, err = mech(*words, "--help")  # options that do not exist are refused before help is printed
    assert code == 0 and "Usage" in out, err


def test_views_in_the_documentation_share_one_copy_of_plotly(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import frames

    from mech.views.drawing.page import View, chart

    view = View("Two points", chart([{"x": [1, 2], "y": [3, 4]}], {}, height=200, label="points"), height=321)
    page = frames.lightened(f"<p>{view._repr_html_()}</p>", tmp_path, "../")
    (inner,) = (tmp_path / "_views").iterdir()
    assert f'src="../_views/{inner.name}"' in page and "height:321px" in page and "srcdoc" not in page
    text = inner.read_text(encoding="utf-8")
    assert "../_static/plotly.js" in text and "mechHeight" in text and len(text) < 100_000


def test_every_reference_model_is_what_its_card_says():
    """Files are there, and the card claims what it was trained for."""
    from mech import reference

    sparse = ("llava-s-sparse", "qwen-long-sparse")
    assert reference.names() == tuple(
        sorted(("llava-m", "llava-s", "llava-s-seed1", "qwen-long", "qwen-s", "smol", *sparse))
    )
    total = sum(file.stat().st_size for file in reference.FOLDER.rglob("*"))
    assert total < 32e6
    for name in reference.names():
        card = reference.card(name)
        assert set(card["accuracy"]) == set(card["domains"])
        assert min(card["accuracy"].values()) >= (0.9 if name == "smol" else 0.95), name
        assert tuple(card.get("checkpoints", ())) == reference.revisions(name) or name == "smol"
    longer = reference.card("qwen-long")["longer"]
    assert {row["domain"] for row in longer if row["visual_tokens"] > 2000} == {"pages", "video"}
    assert min(row["accuracy"] for row in longer) >= 0.95
    learning = [*reference.card("llava-s-seed1")["checkpoints"].values(), reference.card("llava-s-seed1")["accuracy"]]
    for before, after in pairwise(learning):
        assert all(before[domain] < after[domain] for domain in before)
