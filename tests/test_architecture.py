"""One way through: what is left of an arrow imports nothing of what is right of it; and the door opens fast."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mech

ROOT = Path(mech.__file__).parent
# Vocabulary that everybody may use, then the flow. `reference` holds weights and a path; its training script is a
# program of its own, as are the study and the command line.
ORDER = [
    "axes",
    "errors",
    "deprecation",
    "arguments",
    "indices",
    "identity",
    "files",
    "notebook",
    "data",
    "inputs",
    "reference",
    "model",
    "interventions",
    "results",
    "scale",
    "experiments",
    "sparse",
    "papers",
    "views",
    "explorer",
]
PROGRAMS = {"study.py", "settings.py", "__init__.py", "__main__.py"}
PROGRAMS |= {path.relative_to(ROOT).as_posix() for place in ("cli", "lmms") for path in ROOT.glob(f"{place}/**/*.py")}


def imports(path: Path) -> set[str]:
    """The parts of mech that a file imports, also inside functions; not what is only for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mech":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mech.")}
    return found


@pytest.mark.parametrize(
    "path", [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).as_posix() not in PROGRAMS], ids=lambda p: p.stem
)
def test_nothing_imports_what_is_right_of_it(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    own = ORDER.index(part)
    wrong = {name for name in imports(path) if name in ORDER and ORDER.index(name) > own}
    assert not wrong, f"{path.name} ({part}) imports {wrong}"


@pytest.mark.parametrize("call", ["import mech", "import mech.cli", "import mech.views", "import mech.results"])
def test_the_door_is_light(call):
    code = f"import sys; {call}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "transformer_lens", "sklearn"} & set(loaded)
    if call in ("import mech", "import mech.cli"):
        assert not {"numpy", "xarray", "plotly", "rich.progress", "PIL"} & set(loaded)


def test_every_public_name_can_be_had():
    for name in mech.__all__:
        assert getattr(mech, name) is not None
    assert set(mech.__all__) <= set(dir(mech))
    with pytest.raises(AttributeError, match="no attribute 'ablatoin'"):
        _ = mech.ablatoin


# The same inside experiments: a folder or file imports nothing of those that come after it.
EXPERIMENTS = ["metrics", "gradients", "statistics", "power", "effects", "ranking", "attention", "scores"]
EXPERIMENTS += ["ablation", "patching", "paths", "attribution", "circuit_tasks", "causal", "findings"]


def module(path: Path) -> str:
    return ".".join(("mech", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def files_imported(path: Path, known: set[str]) -> set[str]:
    """The files of mech that a file imports, also inside functions and for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def test_no_circle_of_files():
    import networkx as nx

    files = {module(path): path for path in ROOT.rglob("*.py")}
    del files["mech"]  # the public names, which commands and notebooks import from
    graph = nx.DiGraph((name, other) for name, path in files.items() for other in files_imported(path, set(files)))
    circles = [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]
    assert not circles and not list(nx.selfloop_edges(graph))


def test_experiments_build_on_one_another_one_way():
    files = {module(path): path for path in (ROOT / "experiments").rglob("*.py")}
    for name, path in files.items():
        own, *_ = name.removeprefix("mech.experiments").lstrip(".").split(".")
        for other in files_imported(path, set(files)):
            theirs = other.split(".")[2] if other.count(".") > 1 else ""
            assert not own or theirs == own or EXPERIMENTS.index(theirs) < EXPERIMENTS.index(own), f"{name} -> {other}"


def test_every_folder_says_what_it_does():
    for folder in {path.parent for path in ROOT.rglob("*.py")}:
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert len(said) > 60, folder


def test_no_folder_is_crowded():
    for folder in {path.parent for path in ROOT.rglob("*.py")}:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 12, folder


def test_no_file_is_long():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, path


def test_functions_are_read_at_one_go():
    """Without signature and docstring at most 55 lines; with them at most 100, for measurements of many options."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                long = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert long <= 55 and node.end_lineno - node.lineno < 100, f"{path.name}: {node.name}"


# Signatures that are another library's, columns of one table, and commands, whose parameters are their options.
WIDE = {"run_with_cache", "ablation_dataset", "explore", "_training", "plan"}


def test_options_that_travel_together_are_one_value():
    """Functions of the package's own use take at most eight parameters; researchers' measurements have keywords."""
    public = {*mech.__all__, *WIDE}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name not in public:
                given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert len([name for name in given if name != "self"]) <= 8, f"{path.name}: {node.name}"


def test_the_map_shows_this_house():
    text = (ROOT.parent / "docs" / "contributing.md").read_text(encoding="utf-8")
    rows = text.split("## The house")[1].split("## The way")[0]
    for folder in {path.parent for path in ROOT.rglob("__init__.py")} - {ROOT}:
        assert re.search(rf"[`/ ]{folder.name}[`/:]", rows), folder
    named = re.findall(r"`(mech/[\w/]+\.py): ([\w.]+)`", text)
    assert len(named) > 8
    for path, name in named:
        source = (ROOT.parent / path).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"^ *(def|class) {part}\b", source, re.MULTILINE), f"{path}: {name}"


def test_tests_lie_where_the_code_does():
    here = Path(__file__).parent
    for path in here.rglob("test_*.py"):
        assert (ROOT / path.parent.relative_to(here)).is_dir(), path
