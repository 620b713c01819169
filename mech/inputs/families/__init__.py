"""How each family of models turns pictures and videos into tokens: one file for each way of cutting them.

    FAMILIES["qwen3_vl"].show(size, image_processor, geometry, alone=True)

The size of a picture and the settings of an image processor give the visual tokens, with the pixels each of them stands
for. Importing the folder fills ``family.FAMILIES``. Nothing here depends on questions, prompts or models.

To add a family, write ``show(size, image_processor, geometry, alone) -> Shown`` (or use one of those in ``fixed``,
``tiles`` and ``dynamic``; ``canvas`` has the building blocks) and add a row to ``FAMILIES`` at the end of the file.
"""

from mech.inputs.families import dynamic, fixed, gemma4, glm4v, lfm2, mllama, pixtral, tiles

__all__ = ["dynamic", "fixed", "gemma4", "glm4v", "lfm2", "mllama", "pixtral", "tiles"]
