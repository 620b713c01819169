"""Forward, RAM and one ablation on models of published size with random weights, as the context grows.

    python benchmarks/fullsize.py --config qwen3-vl-8b --device cuda --tokens 600 2000 8000
    python benchmarks/fullsize.py --config llava-onevision-7b            # on a CPU: real depth and heads, narrow

A figure depends on the shape, so the weights are random. ``CONFIGS`` are the sizes of the published ``config.json``
files, written down from memory, not downloaded. On a CPU (or with ``--narrow``) every head is 16 wide and the rest in
proportion, the vocabulary is cut, and depth, heads and key/value heads stay the same.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from models import layout
from record import interleaved, one_thread, ratio, record
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

from mech.experiments.scores.ram import evidence_mass
from mech.inputs import Inputs
from mech.interventions import Ablate, intervene
from mech.model import HookedMLLM

_QWEN_TEXT = {"vocab_size": 152064, "max_position_embeddings": 128000, "bos_token_id": None, "eos_token_id": None}
_SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
           "num_attention_heads": 16, "patch_size": 14, "image_size": 384, "vision_use_head": False}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
                        "max_position_embeddings": 16384},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
                          "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
                          "projection_dim": 768},
    },
    "llava-onevision-7b": {
        "model_type": "llava_onevision",
        "text_config": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                        "num_attention_heads": 28, "num_key_value_heads": 4, "rope_theta": 1e6, **_QWEN_TEXT},
        "vision_config": _SIGLIP,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": [[384, 384], [384, 768], [768, 384], [768, 768]],
    },
    "qwen2.5-vl-7b": {
        "model_type": "qwen2_5_vl",
        "text_config": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                        "num_attention_heads": 28, "num_key_value_heads": 4, **_QWEN_TEXT,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
        "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                          "out_hidden_size": 3584, "patch_size": 14, "window_size": 112, "spatial_merge_size": 2,
                          "temporal_patch_size": 2, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2},
    },
    "qwen3-vl-8b": {
        "model_type": "qwen3_vl",
        "text_config": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
                        "num_attention_heads": 32, "num_key_value_heads": 8, **_QWEN_TEXT,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}},
        "vision_config": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
                          "out_hidden_size": 4096, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
                          "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]},
    },
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NARROW_HEAD, NARROW_VOCAB = 16, 2048
IMAGE, VIDEO, START, END = 2, 3, 4, 5  # placeholders; text is drawn from 10 up


def narrowed(sizes: dict[str, Any]) -> dict[str, Any]:
    """Heads 16 wide, the rest in proportion: depth and the numbers of heads stay the same."""
    heads = sizes.get("num_attention_heads") or sizes["num_heads"]
    factor = heads * NARROW_HEAD / sizes["hidden_size"]
    small = {**sizes, "hidden_size": heads * NARROW_HEAD}
    small["intermediate_size"] = max(64, round(sizes["intermediate_size"] * factor / 16) * 16)
    if "vocab_size" in sizes:
        small |= {"vocab_size": NARROW_VOCAB, "head_dim": NARROW_HEAD}
    if "rope_parameters" in sizes:
        small["rope_parameters"] = {**sizes["rope_parameters"], "mrope_section": [2, 3, 3]}
    return small


def config_of(name: str, narrow: bool) -> PreTrainedConfig:
    """The Hugging Face config of a published model, with placeholder ids that fit any vocabulary."""
    given = dict(CONFIGS[name])
    text, vision = dict(given["text_config"]), dict(given["vision_config"])
    if narrow:
        text, vision = narrowed(text), narrowed(vision)
        if "out_hidden_size" in vision:
            vision["out_hidden_size"] = text["hidden_size"]
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    if "qwen" in name:
        ids |= {"vision_start_token_id": START, "vision_end_token_id": END}
    kind = given.pop("model_type")
    rest = {key: value for key, value in given.items() if not key.endswith("_config")}
    return AutoConfig.for_model(kind, text_config=text, vision_config=vision, **ids, **rest, tie_word_embeddings=False)


def inputs_of(config: PreTrainedConfig, tokens: int, device: str, dtype: torch.dtype) -> Inputs:
    """One row of ``tokens`` positions (or what an image needs), as many of them visual as whole images allow."""
    generator = torch.Generator().manual_seed(0)
    vision: Any = config.vision_config
    more: dict[str, torch.Tensor] = {}
    if config.model_type.startswith("qwen"):
        side = max(1, int((0.9 * tokens) ** 0.5))
        patch = 3 * vision.temporal_patch_size * vision.patch_size**2
        more["pixel_values"] = torch.randn(4 * side * side, patch, generator=generator)
        more["image_grid_thw"] = torch.tensor([[1, 2 * side, 2 * side]])
        visual = [START, *[IMAGE] * side**2, END]
    else:
        each = (vision.image_size // vision.patch_size) ** 2
        onevision = config.model_type == "llava_onevision"
        each += onevision  # a line break after each image
        # OneVision cuts a lone image into tiles, so there are at least two.
        images = max(1 + onevision, (tokens - 40) // each)
        visual = [IMAGE] * (images * each)
        tokens = max(tokens, len(visual) + 40)
        size = (3, vision.image_size, vision.image_size)
        if onevision:
            more["pixel_values"] = torch.randn(images, 1, *size, generator=generator)
            more["image_sizes"] = torch.full((images, 2), vision.image_size)
            more["batch_num_images"] = torch.tensor([images])
        else:
            more["pixel_values"] = torch.randn(images, *size, generator=generator)
    text = torch.randint(10, 1000, (tokens - len(visual),), generator=generator).tolist()
    ids = torch.tensor([text[:4] + visual + text[4:]])
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
    if config.model_type.startswith("qwen"):
        tensors["mm_token_type_ids"] = (ids == IMAGE).long()
    return Inputs(tensors, (layout(ids[0] == IMAGE),)).to(device, dtype)


def runs(model: HookedMLLM, inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """A forward without hooks, RAM of all heads, and a forward with every tenth head ablated."""
    heads = [(layer, head) for layer in model.cfg.attention_layers for head in range(model.cfg.n_heads)][::10]
    ablate = Ablate("attn.hook_z", heads=heads, to="zero")

    def ablated() -> torch.Tensor:
        with intervene(model, ablate) as changed:
            return changed(inputs, logits_to_keep=1)

    keys = inputs.layout.positions("image")[:16]
    return {
        "forward": lambda: model(inputs, logits_to_keep=1),
        "ram": lambda: evidence_mass(model, inputs, [keys]),
        "ablation": ablated,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="qwen3-vl-8b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16, but fp32 on a CPU")
    parser.add_argument("--tokens", type=int, nargs="*", default=[600, 2000, 8000])
    parser.add_argument("--narrow", action="store_true", help="heads of width 16; always so on a CPU")
    parser.add_argument("--seconds", type=float, default=10, help="time for each length")
    given = parser.parse_args()
    narrow = given.narrow or given.device == "cpu"
    given.dtype = given.dtype or ("fp32" if given.device == "cpu" else "bf16")
    dtype = DTYPES[given.dtype]
    config = config_of(given.config, narrow)
    with one_thread():
        torch.manual_seed(0)
        with torch.device(given.device):
            model = HookedMLLM.from_hf(AutoModelForImageTextToText.from_config(config, dtype=dtype).eval())
        print(f"{model}{', narrow' if narrow else ''}, {given.dtype} on {given.device}")
        print(f"{'tokens':>7} {'visual':>7} {'forward s':>10} {'RAM x':>7} {'ablation x':>10} {'peak GiB':>9}")
        rows = {
            tokens: measured(model, inputs_of(config, tokens, given.device, dtype), given) for tokens in given.tokens
        }
        record(
            f"fullsize_{given.config}{'_narrow' if narrow else ''}", max(row["ram"] for row in rows.values()), unit="x",
            compared_with="one forward", what="RAM of all heads, random weights, published sizes",
            dtype=given.dtype, by_tokens=rows,
        )  # fmt: skip


def measured(model: HookedMLLM, inputs: Inputs, given: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    cuda = given.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = interleaved(runs(model, inputs), given.seconds, least=1)
    ids = inputs.tensors["input_ids"]
    row = {
        "visual": int((ids == IMAGE).sum()),
        "forward_seconds": round(sorted(times["forward"])[len(times["forward"]) // 2], 3),
        "ram": round(ratio(times, "ram", "forward"), 3),
        "ablation": round(ratio(times, "ablation", "forward"), 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
    }
    print(
        f"{ids.shape[1]:>7}",
        *(f"{value!s:>{size}}" for value, size in zip(row.values(), (7, 10, 7, 10, 9), strict=True)),
    )
    return row


if __name__ == "__main__":
    main()
