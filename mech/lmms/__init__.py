"""Ablated and localized models in lmms-eval: its tasks, its metrics, one entry point.

    args = write_recipe("few.json", "reference:llava-s", policy=Policy(ranking.top(0.05)))
    # lmms-eval --model mech --model_args "$args" --tasks mmbench_en_dev

It turns a recipe (which heads are dense, or ablated) into an lmms-eval model. ``model_args`` contains a hash of the
recipe, because lmms-eval replays answers that it has cached for the same arguments: two recipes with the same name must
not share answers. lmms-eval is imported only when it asks for the model.
"""

from typing import Any

from mech.lmms.recipe import Recipe, read_recipe, write_recipe

__all__ = ["Recipe", "manifest", "read_recipe", "write_recipe"]


def manifest() -> Any:
    """What lmms-eval finds in its entry point group ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(model_id="mech", simple_class_path="mech.lmms.model.Mech")
