"""Run on its own: Hugging Face's torchvision processors against ours, over a stand-in for torchvision.

There is no torchvision for this machine, and transformers has some processors for nothing else. The stand-in resizes
with torch's antialiased interpolation, as torchvision does, and is installed for this process only. Prints one line of
JSON for each comparison: what differs by more than rounding.

    python torchvision_oracle.py FOLDER     # FOLDER: empty, for the stand-in
"""

import json
import sys
from pathlib import Path

STAND_IN = {
    "torchvision-0.99.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99.0\n",
    "torchvision/__init__.py": "from torchvision import io, transforms\n",
    "torchvision/io.py": "class ImageReadMode: RGB = 1\nread_image = decode_image = None\n",
    "torchvision/transforms/__init__.py": (
        "import enum\n"
        "names = ['NEAREST', 'NEAREST_EXACT', 'BILINEAR', 'BICUBIC', 'BOX', 'HAMMING', 'LANCZOS']\n"
        "InterpolationMode = enum.Enum('InterpolationMode', [(name, name.lower()) for name in names])\n"
        "from torchvision.transforms import functional, v2\n"
    ),
    "torchvision/transforms/v2/__init__.py": "from torchvision.transforms.v2 import functional\n",
    "torchvision/transforms/v2/functional.py": (
        "from torchvision.transforms import InterpolationMode\nfrom torchvision.transforms.functional import *\n"
    ),
    "torchvision/transforms/functional.py": """
import torch

def resize(image, size, interpolation=None, antialias=True, **_):
    # Gemma 4's video processor passes PIL's number.
    mode = {2: "bilinear", 3: "bicubic"}.get(interpolation) or interpolation.value
    flat = image.reshape(-1, *image.shape[-3:]).float()
    made = torch.nn.functional.interpolate(flat, list(size), mode=mode, antialias=antialias, align_corners=False)
    made = made.round().clamp(0, 255).to(torch.uint8) if image.dtype == torch.uint8 else made
    return made.reshape(*image.shape[:-2], *made.shape[-2:])

def normalize(image, mean, std, inplace=False):
    return (image - torch.as_tensor(mean).view(-1, 1, 1)) / torch.as_tensor(std).view(-1, 1, 1)

def pad(image, padding, fill=0, padding_mode="constant"):
    left, top, right, bottom = padding
    return torch.nn.functional.pad(image, (left, right, top, bottom), value=0)

def grayscale_to_rgb(image):
    return image.expand(*image.shape[:-3], 3, *image.shape[-2:])

pil_to_tensor = None
""",
}
TOKENS = {
    "cohere2_vision": {
        "boi": "<|START_OF_IMG|>", "eoi": "<|END_OF_IMG|>", "image": "<|IMG_PATCH|>",
        "img_line_break": "<|IMG_LINE_BREAK|>",
    },
}  # fmt: skip
PROCESSORS = {
    "lfm2_vl": ("Lfm2Vl", "Lfm2Vl", {}),
    "mistral3": ("Pixtral", "Pixtral", {"patch_size": 4, "spatial_merge_size": 2}),
    "llava_pixtral": ("Pixtral", "Pixtral", {"patch_size": 4}),
    "llama4": ("Llama4", "Llama4", {"patch_size": 2, "pixel_shuffle_ratio": 0.5}),
    "cohere2_vision": ("Cohere2Vision", "Cohere2Vision", {}),
}
VIDEOS = {"gemma4": "Gemma4", "glm4v": "Glm4v", "qwen2_5_vl": "Qwen2VL", "qwen3_vl": "Qwen3VL"}
SIZES = [[(40, 24)], [(97, 83), (24, 24)], [(64, 64), (30, 77), (16, 16)]]


def differences(ours: dict, theirs: dict) -> list[str]:
    """Names of tensors that differ; pixels may by a grey level here and there, for PIL rounds between two passes."""
    import torch

    found = []
    for name, their in theirs.items():
        our = ours.get(name)
        if our is None or our.shape != their.shape:
            found.append(name)
        elif name.startswith("pixel_values"):
            away = (our.double() - torch.as_tensor(their).double()).abs().mean()
            found += [name] if away > 0.02 else []
        elif not torch.equal(our.double(), torch.as_tensor(their).double()):
            found.append(name)
    return found


def main(folder: str) -> None:
    for name, text in STAND_IN.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    sys.path.insert(0, folder)
    import numpy as np
    import transformers

    from mech.inputs import build
    from mech.reference import tiny_processors

    def same_settings(kind: type, name: str, **options):
        stored = tiny_processors.image_processor(name).to_dict()
        known = kind.valid_kwargs.__annotations__
        made = kind(**{**{key: stored[key] for key in known if stored.get(key) is not None}, **options})
        if name == "cohere2_vision":  # no setting, but what its processor reads: tokens along the side of a tile
            made.patch_size = stored["patch_size"]
        return made

    for name, (outer, inner, options) in PROCESSORS.items():
        base = getattr(transformers, f"{outer}Processor")
        images = same_settings(getattr(transformers, f"{inner}ImageProcessor"), name)
        ours = tiny_processors.processor(name)
        tokenizer = ours.tokenizer
        for attribute, token in TOKENS.get(name, {}).items():
            setattr(tokenizer, f"{attribute}_token", token)
            setattr(tokenizer, f"{attribute}_token_id", tokenizer.convert_tokens_to_ids(token))
        # Its check of classes refuses whatever is no processor of its own list.
        unchecked = type(base.__name__, (base,), {"check_argument_for_proper_class": lambda self, name, given: None})
        theirs = unchecked(images, tokenizer, **options)
        for sizes in SIZES:
            pictures = [tiny_processors.noise(*size, seed=k) for k, size in enumerate(sizes)]
            made = dict(theirs(images=pictures, text=ours.prompt("What?", len(pictures)), return_tensors="pt"))
            found = differences(build(ours, "What?", images=pictures).tensors, made)
            print(json.dumps({"name": name, "given": sizes, "differs": found}))
    for name, kind in VIDEOS.items():
        whole = name in ("glm4v", "qwen3_vl")
        limits = {"shortest_edge": 128, "longest_edge": 2048 if whole else 640}
        given = {} if name == "gemma4" else {"size": limits}
        theirs = same_settings(getattr(transformers, f"{kind}VideoProcessor"), name, do_sample_frames=False, **given)
        ours = tiny_processors.processor(name, video_size=given.get("size"))
        for count in (2, 4, 5):
            frames = [tiny_processors.noise(72, 30, k) for k in range(count)]
            made = dict(theirs(videos=[np.stack([np.asarray(frame) for frame in frames])], return_tensors="pt"))
            made.pop("num_soft_tokens_per_video", None)
            found = differences(build(ours, "What?", video=frames).tensors, made)
            print(json.dumps({"name": name, "given": count, "differs": found}))


if __name__ == "__main__":
    main(sys.argv[1])
