"""Recipes: how to change a model before lmms-eval runs it.

    args = write_recipe("few.json", "reference:llava-s", ablate=Ablate(heads=[(0, 1)], to="zero"))
    args                               # "pretrained=reference:llava-s,recipe=/.../few.json,recipe_sha=sha-1f3c..."
    read_recipe("few.json", "sha-1f3c...")

A recipe is a small file, identified by the hash of its content.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mech.arguments import Text, checked
from mech.errors import ExperimentError, OutputError
from mech.interventions import Ablate
from mech.results.store import read_json, write_json
from mech.sparse.policy import Policy

UNREFERENCED = ("zero", "uniform", "paper")  # ablation methods that need no reference samples


@dataclass(frozen=True)
class Recipe:
    """A head policy, or heads to ablate; with neither, the model is unchanged."""

    policy: Policy | None = None
    ablate: Ablate | None = None

    def record(self) -> dict[str, Any]:
        """The same in plain values."""
        if self.policy is not None:
            return {"policy": {**asdict(self.policy), "dense_heads": sorted(map(list, self.policy.dense_heads))}}
        if self.ablate is not None:
            return {"ablate": {"heads": sorted(map(list, self.ablate.heads or ())), "to": self.ablate.to}}
        return {}

    @property
    def sha(self) -> str:
        """A hash of the record; its prefix keeps lmms-eval from reading it as a number."""
        return "sha-" + hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()[:16]


@checked
def write_recipe(path: str | Path, model: Text, *, policy: Policy | None = None, ablate: Ablate | None = None) -> str:
    """Write a recipe, and return the ``--model_args`` that name it.

    Args:
        path: of the file.
        model: a reference model, a folder or a hub id.
        policy: a policy of sparse inference, or
        ablate: an ablation of whole heads, by a method that needs no reference samples.

    Raises:
        ExperimentError: both, or an ablation that needs reference samples or covers only some positions.
        OutputError: the file cannot be written, or path or model contain a comma or an equals sign.
    """
    if policy is not None and ablate is not None:
        raise ExperimentError("a policy and an ablation", "one of the two", "write a recipe for each")
    if ablate is not None and (ablate.to not in UNREFERENCED or ablate.heads is None or ablate.positions != "all"):
        raise ExperimentError(
            f"{ablate!r} in a recipe", f"heads, at all positions, by {', '.join(UNREFERENCED)}", 'set to="zero"'
        )
    place = Path(path).expanduser().resolve()
    if set(",=") & set(str(place) + model):
        raise OutputError(f"{place} has a comma or an equals sign", "a path without them", "give another path")
    recipe = Recipe(policy, ablate)
    write_json(recipe.record(), place)
    return f"pretrained={model},recipe={place},recipe_sha={recipe.sha}"


def read_recipe(path: str | Path, sha: str) -> Recipe:
    """The recipe in a file, which must have the given hash.

    Raises:
        OutputError: it cannot be read, or has another hash.
    """
    try:
        record = read_json(path)
        policy, ablate = record.get("policy"), record.get("ablate")
        recipe = Recipe(
            Policy(**{**policy, "dense_heads": [tuple(head) for head in policy["dense_heads"]]}) if policy else None,
            Ablate(heads=[tuple(head) for head in ablate["heads"]], to=ablate["to"]) if ablate else None,
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OutputError(
            f"{path} cannot be read ({error})", "a file written by write_recipe", "write it again"
        ) from error
    if recipe.sha != sha:
        raise OutputError(
            f"{path} is the recipe {recipe.sha}, but recipe_sha={sha}",
            "the hash of what the file says: lmms-eval replays answers that it cached for the same arguments",
            f"pass recipe_sha={recipe.sha}",
        )
    return recipe
