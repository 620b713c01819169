"""How each family of models turns pictures and videos into tokens: a file for each way of cutting them.

    FAMILIES["qwen3_vl"].show(size, image_processor, geometry, alone=True)

Takes the size of a picture and the settings of an image processor, gives the visual tokens with the pixels each of them
stands for. Importing the folder fills ``family.FAMILIES``. It does not know of questions, prompts or models.

To add a family, write ``show(size, image_processor, geometry, alone) -> Shown`` (or take one of those in ``fixed``,
``tiles`` and ``dynamic``; ``canvas`` has the pieces) and add a row to ``FAMILIES`` at the end of the file.
"""

from mech.inputs.families import dynamic, fixed, gemma4, glm4v, lfm2, mllama, pixtral, tiles

__all__ = ["dynamic", "fixed", "gemma4", "glm4v", "lfm2", "mllama", "pixtral", "tiles"]
