"""The first stage of training: a vision tower is pretrained against the words that its tokens show.

This stands in for the pretraining against text that the towers of real MLLMs come with. What a token shows is known,
because the scenes are generated.
"""

import torch
from jaxtyping import Float

from mech.data import haystacks
from mech.data.haystacks import Scene
from mech.inputs import Inputs, TokenLayout

KEYS = (*haystacks.COLOURS, *haystacks.NAMES)


def contents(scene: Scene, layout: TokenLayout) -> tuple[list[int], list[int]]:
    """(digit + 1, key + 1) of every visual token of a scene, 0 where there is none, in the order of the sequence."""
    digit, key = {}, {}
    for item in scene.items:
        row, col = item.y // haystacks.CELL, (item.x + 4) // haystacks.CELL
        digit[item.picture, row, col] = item.digits[0] + 1
        line = scene.domain in ("documents", "pages")
        for column in range(haystacks.SIDE // haystacks.CELL) if line else [col]:
            key[item.picture, row, column] = KEYS.index(item.key) + 1
    shown = layout.positions("image")
    picture = (layout.frame if scene.domain == "video" else layout.image)[shown]
    cells = list(zip(picture.tolist(), layout.row[shown].tolist(), layout.col[shown].tolist(), strict=True))
    return [digit.get(cell, 0) for cell in cells], [key.get(cell, 0) for cell in cells]


class Alignment(torch.nn.Module):
    """Which words a visual token shows, read off with the text model's own embeddings of those words.

    ``logits = sharpness * rms_norm(visual token) . embedding(word)``, against a learned logit for "nothing": once over
    the digits, once over the colours and names.
    """

    sharpness = 4.0

    def __init__(self, words):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(2))
        self.words = [[str(digit) for digit in range(10)], [f" {key}" for key in KEYS]]
        self.ids = [torch.tensor([words(word).input_ids for word in group]).flatten() for group in self.words]

    def loss(self, model, inputs: Inputs, scenes: list[Scene]) -> tuple[Float[torch.Tensor, ""], float]:
        seen = torch.cat(list(_image_features(model, inputs.tensors)))
        seen = self.sharpness * torch.nn.functional.rms_norm(seen, seen.shape[-1:])
        shown = [contents(scene, layout) for scene, layout in zip(scenes, inputs.layouts, strict=True)]
        total, right = seen.new_zeros(()), 0.0
        for group, ids in enumerate(self.ids):
            label = torch.tensor([index for row in shown for index in row[group]], device=seen.device)
            logits = seen @ model.get_input_embeddings().weight[ids].T
            logits = torch.cat([self.nothing[group].expand(len(seen), 1), logits], dim=1)
            total = total + torch.nn.functional.cross_entropy(logits, label)
            if group == 0:
                right = (logits.argmax(-1) == label)[label > 0].float().mean().item()
        return total, right


def vision_tower(model) -> list[torch.nn.Module]:
    """What is frozen after pretraining: the tower from its pixels on, not what maps it into the text model."""
    if hasattr(model.model, "vision_tower"):
        return [model.model.vision_tower]
    visual = model.model.visual
    return [visual.patch_embed, visual.blocks]


def _image_features(model, tensors: dict[str, torch.Tensor]):
    if "pixel_values_videos" in tensors:
        features = model.model.get_video_features(tensors["pixel_values_videos"], tensors["video_grid_thw"])
    elif "image_grid_thw" in tensors:
        features = model.model.get_image_features(tensors["pixel_values"], tensors["image_grid_thw"])
    else:
        features = model.model.get_image_features(tensors["pixel_values"])
    return features.pooler_output
