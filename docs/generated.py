"""Pages that are written from the code when the documentation is built, and docstrings made fit for it.

``docs/api/*.md`` (every public name, grouped by the package it lives in, each module introduced by its own docstring),
``docs/howto/*.md`` (the sections of the guide), ``docs/commands.md``, ``docs/families.md``, ``docs/axes.md`` and copies
of the notebooks. All of them are git-ignored.
"""

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
from pathlib import Path

import typer

import mech
from mech import axes
from mech.cli import app
from mech.model.check import family_table

DOCS = Path(__file__).parent
HOW_TO = (
    "A page for each job. Blocks of Python run from page to page, as the tests run them: `docs/guide.md` in one piece."
)
CONTINUES = "*Goes on from the pages before: names such as `model`, `find` and `test` were made [there](index.md).*"
CAUSAL = ("patching", "paths", "circuits", "circuit_tasks", "attribution", "causal", "metrics")
# First fitting prefix wins: page, title, what stands on it.
PAGES = (
    ("data", "Data", "Samples with evidence, and where they come from.", ("mech.data",)),
    ("inputs", "Inputs", "What each position of a sequence is.", ("mech.inputs",)),
    ("model", "The model", "A stock Hugging Face model with named activation points.",
     ("mech.model", "mech.reference")),
    ("interventions", "Interventions", "What is changed, where and when, as frozen values.", ("mech.interventions",)),
    ("patching", "Patching, paths and attribution", "What carries the answer.",
     tuple(f"mech.experiments.{name}" for name in CAUSAL)),
    ("heads", "Scores, rankings and other readings of heads", "What heads attend to, and how sure that is.",
     ("mech.experiments",)),
    ("sparse", "Sparse inference", "Few dense heads, the rest local.", ("mech.sparse",)),
    ("papers", "What the papers claim", "Published statements, measured on any model.", ("mech.papers",)),
    ("scale", "Beyond one machine", "Blocks, workers and the folder they share.", ("mech.scale",)),
    ("results", "Results, views and the study", "Labelled arrays, files and pictures.", ("mech",)),
)  # fmt: skip
# Modules that are worth a place though no public name lives in them.
MODULES = (
    "mech.reference.planted",
    "mech.model.check",
    "mech.model.points",
    "mech.results.store",
    "mech.scale",
    "mech.data.lmms_tasks",
    "mech.lmms",
    "mech.study",
    "mech.experiments.findings.summary",
    "mech.experiments.ranking.selection",
    "mech.experiments.statistics",
)


# What is markup as it stands (literals, emphasis, bullets, lists of parameters), or a sign that is none.
STRAY = re.compile(
    r"(``.*?``|`[^`]+`|\*\*[^*]+\*\*|(?<!\w)\*[^*\s](?:[^*]*[^*\s])?\*(?!\w)|^\s*\* |^:param \\?\*+)|[*|]"
)


def write(app) -> None:
    """All generated pages."""
    folder = _emptied(DOCS / "api")
    _emptied(DOCS / "howto")
    for page, text in _api().items():
        (folder / f"{page}.md").write_text(text, encoding="utf-8")
    known = family_table() + "\n"
    (DOCS / "families.md").write_text((DOCS / "_parts" / "families.md").read_text("utf-8") + known, "utf-8")
    rows = "".join(f"| `{word}` | {meaning} |\n" for word, meaning in axes.WORDS.items())
    (DOCS / "axes.md").write_text((DOCS / "_parts" / "axes.md").read_text("utf-8") + rows, "utf-8")
    (DOCS / "commands.md").write_text((DOCS / "_parts" / "commands.md").read_text("utf-8") + _commands(), "utf-8")
    for page, text in how_tos((DOCS / "guide.md").read_text(encoding="utf-8")).items():
        (_made(DOCS / "howto") / f"{page}.md").write_text(text, encoding="utf-8")
    for notebook in (DOCS.parent / "notebooks").glob("*.ipynb"):
        shutil.copy(notebook, _made(DOCS / "notebooks") / notebook.name)


def how_tos(guide: str) -> dict[str, str]:
    """A page for each job: the sections of the guide, which stays one file that is run from top to bottom."""
    _, *sections = re.split(r"^## ", guide, flags=re.MULTILINE)
    pages = {}
    for section in sections:
        title, body = section.split("\n", 1)
        body = re.sub(r"\]\((?!https?:|#|/)", "](../", body)
        body = re.sub(r"^###", "##", body, flags=re.MULTILINE)  # the section is a page now
        begun = f"\n{CONTINUES}\n" if pages and "```python" in body else ""
        pages[re.sub(r"\W+", "-", title.lower()).strip("-")] = f"# {title}\n{begun}{body}"
    entries = "\n".join(pages)
    return pages | {"index": f"# How to\n\n{HOW_TO}\n\n```{{toctree}}\n:maxdepth: 1\n\n{entries}\n```\n"}


def _commands() -> str:
    """Every command of ``mech`` with its examples and options."""
    parts = []
    for name, command in typer.main.get_command(app).commands.items():
        examples = re.sub(r"\[bold\](.*?)\[/\]", r"`\1`", command.epilog or "").split("\n\n")
        rows = [_option(option) for option in command.params if option.name != "help"]
        head = ["| | | default |", "|---|---|---|"]
        said = "\n".join(f"* {example}" for example in examples if example)
        parts.append(f"## mech {name}\n\n{command.help}\n\n{said}\n\n" + "\n".join(head + rows) + "\n")
    return "\n".join(parts)


def _option(option) -> str:
    names = ", ".join(f"`{word}`" for word in option.opts)
    default = "" if option.default is None or option.default is False else f"`{option.default}`"
    meaning = re.sub(r"(?<![`\w])(--[\w-]+)", r"`\1`", getattr(option, "help", "") or "")
    return f"| {names} | {meaning} | {default} |"


def _api() -> dict[str, str]:
    """The text of every page of the reference."""
    homes: dict[str, dict[str, list[str]]] = {page: {} for page, *_ in PAGES}
    for name in mech.__all__:
        if name != "__version__":
            homes[_page(_home(name))].setdefault(_home(name), []).append(name)
    for module in MODULES:
        homes[_page(module)].setdefault(module, [])
    texts = {}
    for page, title, what, _ in PAGES:
        if homes[page]:
            sections = "\n".join(_section(module, names) for module, names in homes[page].items())
            texts[page] = f"# {title}\n\n{what}\n\n{sections}"
    entries = "\n".join(f"api/{page}" for page in texts)
    index = (DOCS / "_parts" / "api.md").read_text("utf-8")
    return texts | {"index": index + f"\n```{{toctree}}\n:maxdepth: 2\n\n{entries.replace('api/', '')}\n```\n"}


def _home(name: str) -> str:
    """The module that defines a public name: where a package re-exports it, one below."""
    value = getattr(mech, name)
    return getattr(value, "__module__", None) or mech._NAMES[name]


def _page(module: str) -> str:
    for page, _, _, prefixes in PAGES:
        if module.startswith(prefixes):
            return page
    raise LookupError(module)


def _section(module: str, names: list[str]) -> str:
    lines = [f".. automodule:: {module}", "   :no-index:" if names else "   :members:", ""]
    if names:
        lines += [".. currentmodule:: mech", ""]
    for name in names:
        if inspect.isclass(getattr(mech, name)):
            lines += [f".. autoclass:: {name}", "   :members:", ""]
        else:
            lines += [f".. autofunction:: {name}", ""]
    title = ", ".join(names) if 0 < len(names) <= 3 else module
    return f"## {title}\n\n```{{eval-rst}}\n" + "\n".join(lines) + "```\n"


def readable(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Docstrings as Sphinx wants them: worked snippets are code, a stray ``*`` or ``|`` is no markup."""
    if what in ("property", "attribute") and ":type:" in (starts := [line[:6] for line in lines]):
        # napoleon takes the words before a colon for a type.
        kind = lines.pop(starts.index(":type:"))
        lines[0] = f"{kind[7:]}: {lines[0]}"
    found, code, listed = [], False, False
    for i, line in enumerate(lines):
        begins = bool(line.strip()) and not (i and lines[i - 1].strip())
        if begins:
            was, code = code, line.startswith("    ") and not listed
            if code and not was:
                found += ["::", ""]
        if line.strip() and not line.startswith(" "):
            listed = line.startswith(("* ", "- ", ":", ".."))
        found.append(line if code else STRAY.sub(lambda mark: mark[1] or "\\" + mark[0], line))
    lines[:] = found


def signature(app, what: str, name: str, obj, options, given, returned):
    """The signature as it is written in the source: names of types, not what they stand for."""
    try:
        if inspect.isclass(obj):
            if dataclasses.is_dataclass(obj) and not _is_written(obj.__init__):
                return _fields(obj), None
            obj = obj.__init__
            returned = None
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(obj)))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(tree, ast.FunctionDef):
        return None
    arguments = tree.args
    for some in (arguments.posonlyargs, arguments.args):
        if some and some[0].arg in ("self", "cls"):
            some.pop(0)
    returns = tree.returns if returned is not None else None
    if isinstance(returns, ast.Constant) and isinstance(returns.value, str):  # a class that is not there yet
        return f"({ast.unparse(arguments)})", returns.value
    return f"({ast.unparse(arguments)})", returns and ast.unparse(returns)


def _is_written(method) -> bool:
    return method.__code__.co_filename != "<string>"


def _fields(cls: type) -> str:
    """A dataclass' arguments: fields as written, defaults that are no plain values as dots."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    written = {node.target.id: node for node in tree.body if isinstance(node, ast.AnnAssign)}
    parts = []
    for field in dataclasses.fields(cls):
        if field.init and field.name in written:
            node = written[field.name]
            plain = node.value is not None and not isinstance(node.value, ast.Call)
            default = "" if node.value is None else f" = {ast.unparse(node.value) if plain else '...'}"
            parts.append(f"{field.name}: {ast.unparse(node.annotation)}{default}")
    return f"({', '.join(parts)})"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return _made(folder)
