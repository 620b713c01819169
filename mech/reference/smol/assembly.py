"""Puts ``reference:smol`` together: SmolLM2 from its own package, and what was trained here, into a stock LLaVA.

What ships with mech is ``adapter.safetensors``: vision tower, projector and LoRA. When the model is first opened, they
and the base become one folder in the user's cache (``$XDG_CACHE_HOME/mech`` or ``~/.cache/mech``), as
``save_pretrained`` writes it; from then on that folder is opened. Its name contains a checksum over both, so that
another adapter or another base makes another folder. It is written under another name and renamed at the end: a folder
that exists is complete.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mech.data import haystacks
from mech.reference.smol import base
from mech.reference.smol.words import IMAGE

ADAPTER = "adapter.safetensors"
UNTUNED = "base.safetensors"
PREFIX = "model.language_model."


def cache() -> Path:
    """Where assembled models are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "mech"


def assembled(folder: Path) -> Path:
    """The folder of the whole model, made if it is not in the cache yet.

    Args:
        folder: what ships with mech: the adapter and its card.

    Raises:
        UnsupportedModel: the base's package is missing, or holds other weights than those that were tuned.
    """
    digest = hashlib.sha256(f"{base.SHA256} {hashlib.sha256((folder / ADAPTER).read_bytes()).hexdigest()}".encode())
    kept = cache() / f"{folder.name}-{digest.hexdigest()[:16]}"
    if not (kept / "config.json").is_file():
        file = base.find()
        kept.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f"{kept.name}.", dir=kept.parent))
        try:
            assemble(file, folder / ADAPTER, made)
            shutil.copy(folder / "card.json", made)
            made.chmod(0o755)
            made.rename(kept)
        except OSError:
            if not (kept / "config.json").is_file():  # otherwise another process was quicker
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return kept


def assemble(file: Path, adapter: Path, folder: Path) -> None:
    """Writes the model with ``adapter`` merged, its processor, and the attention weights that it had before."""
    import torch
    from safetensors.torch import load_file, save_file

    from mech.reference.smol.adapter import UP, merge

    language, words, trained = base.language_model(file), base.tokenizer(file), load_file(adapter)
    model = empty(language.config, words)
    weights = {name.replace("model.", PREFIX, 1): value for name, value in language.state_dict().items()
               if name.startswith("model.")}  # fmt: skip
    placeholder = torch.zeros(len(words) - language.config.vocab_size, language.config.hidden_size)
    table = f"{PREFIX}embed_tokens.weight"
    weights[table] = torch.cat([weights[table], placeholder])
    weights["lm_head.weight"] = weights[table]
    weights |= {name: value.float() for name, value in trained.items() if not name.startswith(PREFIX)}
    adapters = {name: value for name, value in trained.items() if name.startswith(PREFIX)}
    tuned = [f"{name.removesuffix(f'.{UP}')}.weight" for name in adapters if name.endswith(UP)]
    save_file({name: weights[name].half().contiguous() for name in tuned}, folder / UNTUNED)
    merge(weights, adapters)
    model.load_state_dict(weights, assign=True)
    model.half().save_pretrained(folder)
    # Stored in half precision to be small, but run in single precision.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=1) + "\n", encoding="utf-8")
    words.save_pretrained(folder)
    image_processor().save_pretrained(folder)


def vision_config() -> Any:
    """The tower of ``reference:llava-s``, from which this one's training began."""
    from transformers import CLIPVisionConfig

    from mech.reference.recipe import RECIPES

    return CLIPVisionConfig(**RECIPES["llava-s"].vision)


def image_processor() -> Any:
    from mech.reference import recipe

    return recipe.image_processor("llava")


def empty(text_config: Any, words: Any) -> Any:
    """The architecture without weights: a stock LLaVA around the language model of this config."""
    import torch
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = text_config.to_dict() | {"vocab_size": len(words), "pad_token_id": words.pad_token_id}
    config = LlavaConfig(
        tie_word_embeddings=True,
        vision_config=vision_config(),
        text_config=LlamaConfig(**text),
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        image_seq_length=(haystacks.SIDE // haystacks.CELL) ** 2,
        vision_feature_layer=-1,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    return model
