"""A study folder as the report reads it: the summary, and for each setting (a model on a domain) its datasets."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xarray as xr

from mech.errors import OutputError
from mech.files import is_below
from mech.results import store
from mech.results.older import older_file

AGAIN = "run the same `mech study` command again; it computes only what is missing"


@dataclass(frozen=True)
class Setting:
    """One model on one domain: its part of the summary and its datasets."""

    model: str
    domain: str
    facts: Mapping[str, Any]
    folder: Path
    ram: xr.Dataset
    ablation: xr.Dataset
    maps: xr.Dataset
    causal: xr.Dataset | None = None  # studies may leave it out

    @property
    def name(self) -> str:
        return f"{self.model} on {self.domain}"


def read_summary(study: Path) -> dict[str, Any]:
    """``summary.json``.

    Raises:
        OutputError: it is missing or broken, or names no model.
    """
    summary = read_json(study / "summary.json")
    if not summary.get("models"):
        raise OutputError(f"{study / 'summary.json'} names no models", "a summary of schema 1", AGAIN)
    return summary


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the folder.

    Raises:
        OutputError: it is missing or broken.
    """
    try:
        record = store.read_json(path)
    except OSError as error:
        raise OutputError(f"{path} is not there or cannot be read", "a finished study", AGAIN) from error
    except ValueError as error:
        raise OutputError(f"{path} is not JSON ({error})", "a finished study", f"delete it and {AGAIN}") from error
    if not isinstance(record, dict):
        raise OutputError(f"{path} holds a {type(record).__name__}", "a JSON object", f"delete it and {AGAIN}")
    return record


def read_settings(study: Path, summary: Mapping[str, Any]) -> list[Setting]:
    """Every setting of the summary with its datasets.

    Raises:
        OutputError: a dataset is missing or cannot be read, or the summary names no domains.
    """
    found = []
    for model, of_model in summary["models"].items():
        for domain, facts in of_model.get("domains", {}).items():
            folder = _folder(study, model, domain)
            parts = {kind: _part(older_file(folder / f"{kind}.nc")) for kind in ("ram", "ablation", "maps")}
            patched = _part(folder / "causal.nc") if "quadrants" in (facts.get("causal") or {}) else None
            found.append(Setting(model, domain, facts, folder, **parts, causal=patched))
    if not found:
        raise OutputError(f"{study / 'summary.json'} names no domains", "at least one model on one domain", AGAIN)
    return found


def read_forms(study: Path, summary: Mapping[str, Any]) -> dict[str, dict[str, xr.Dataset]]:
    """Model -> the datasets of pictures against text, for the models that have them.

    Raises:
        OutputError: a dataset is missing or cannot be read.
    """
    asked = [model for model, facts in summary["models"].items() if "forms" in facts]
    return {
        model: {
            kind: _part(_folder(study, model, "forms") / f"{kind}.nc") for kind in ("question", "answer", "transfer")
        }
        for model in asked
    }


def _folder(study: Path, model: str, domain: str) -> Path:
    # A model may be named by its source ("reference:llava-m"); its folder then has only the last part.
    names = (model, model.replace(":", "/").rsplit("/", 1)[-1], model.replace("/", "--").replace(":", "--"))
    candidates = [study / name / domain for name in names]
    for folder in candidates:
        if folder.is_dir() and is_below(folder, study):
            return folder
    raise OutputError(f"{candidates[0]} is not there", f"the results of {model} on {domain}", AGAIN)


def _part(path: Path) -> xr.Dataset:
    if not path.exists():
        raise OutputError(f"{path} is not there", "a finished study", AGAIN)
    return store.load(path)
