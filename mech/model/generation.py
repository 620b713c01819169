"""Settings of a generation: greedy, with a KV cache, and without a word about what greedy decoding does not use."""

import copy
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

# Values at which transformers keeps quiet about sampling settings. None would not do: it is filled in from the
# checkpoint, and then warned about.
_NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


def generation_config(stock: GenerationConfig, asked: Mapping[str, Any], pad_token_id: int) -> GenerationConfig:
    """A copy of a checkpoint's settings, made greedy unless ``asked`` says ``do_sample=True``.

    Penalties and stop tokens of the checkpoint stay in force.
    """
    settings = {"use_cache": True, "do_sample": False, "max_length": None, **asked}
    if not settings["do_sample"]:
        settings = {**_NEUTRAL, **settings}
    if stock.pad_token_id is None:
        settings.setdefault("pad_token_id", pad_token_id)
    config = copy.deepcopy(stock)
    config.update(**settings)
    return config
