"""One way through: what is left of an arrow imports nothing of what is right of it; and the door opens fast."""

import ast
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
    "notebook",
    "data",
    "inputs",
    "reference",
    "model",
    "interventions",
    "results",
    "experiments",
    "sparse",
    "papers",
    "views",
]
PROGRAMS = {"study.py", "terminal.py", "__init__.py", *(path.name for path in ROOT.glob("cli*.py"))}


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


def test_every_folder_says_what_it_does():
    for folder in [ROOT, *(p for p in ROOT.iterdir() if (p / "__init__.py").exists())]:
        assert len(ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")) or "")) > 60
