"""Ablated and localized models in lmms-eval: its tasks, its metrics, one entry point.

    args = write_recipe("few.json", "reference:llava-s", policy=Policy(ranking.top(0.05)))
    # lmms-eval --model mech --model_args "$args" --tasks mmbench_en_dev

It takes a recipe (which heads are dense, or ablated) and gives a model of lmms-eval. The recipe's content is in
``model_args`` as a hash, because lmms-eval replays answers that it has cached for the same arguments: two recipes of
one name must not share answers. lmms-eval is imported only where it asked for the model.
"""

from typing import Any

from mech.lmms.recipe import Recipe, read_recipe, write_recipe

__all__ = ["Recipe", "manifest", "read_recipe", "write_recipe"]


def manifest() -> Any:
    """What lmms-eval finds under its entry points ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(model_id="mech", simple_class_path="mech.lmms.model.Mech")
