"""Generation: greedy, with a KV cache, and without a word about what greedy decoding does not use."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig

from mech.errors import InputError, UnsupportedModel

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

    Raises:
        InputError: transformers refuses them.
    """
    settings = {"use_cache": True, "do_sample": False, "max_length": None, **asked}
    if not settings["do_sample"]:
        settings = {**_NEUTRAL, **settings}
    if stock.pad_token_id is None:
        settings.setdefault("pad_token_id", pad_token_id)
    config = copy.deepcopy(stock)
    try:
        config.update(**settings)
    except (ValueError, TypeError) as error:  # transformers' own rules: no temperature below 0, and so on
        said = str(error).strip().splitlines()[0]
        raise InputError(
            f"settings of a generation that transformers refuses ({said})", "others", "change them"
        ) from error
    return config


# What Hugging Face's generate takes beside settings and tensors. Not ``custom_generate``, which runs code of the hub.
OF_GENERATE = (
    *("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model"),
    *("streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "tokenizer", "assistant_tokenizer"),
)
_INSTEAD = {
    "generation_config": "pass its settings by name: generate(inputs, do_sample=True, temperature=0.7)",
    "max_length": "use max_new_tokens, which does not count the prompt",
    "output_attentions": "hook the pattern: model.hooks([('blocks.K.attn.hook_pattern', fn)])",
    "use_past_kv_cache": "use use_cache",
    "stop_at_eos": "use eos_token_id, the tokens to stop at",
    "freq_penalty": "use repetition_penalty",
    "return_type": "use generate_text or answer for text",
    "verbose": "leave it out: nothing is printed",
    "custom_generate": "write the loop yourself, with model(inputs, past_key_values=..., use_cache=True)",
}
_IN_OUTPUT = ("output_scores", "output_logits", "output_hidden_states")


def check_generation(stock: GenerationConfig, asked: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse what would have no effect, or another one than its name says.

    Args:
        stock: the checkpoint's settings.
        asked: the settings that were given.
        options: what was given besides.

    Raises:
        InputError: such an option, with what to use.
    """
    given = {**asked, **options}
    for name, do in _INSTEAD.items():
        off = name in ("verbose", "output_attentions") and given.get(name) is False
        if given.get(name) is not None and not off:
            raise InputError(f"{name}=... in generate", "an option that does here what its name says", do)

    def setting(name: str) -> Any:
        return asked.get(name, getattr(stock, name))

    hidden = [name for name in _IN_OUTPUT if asked.get(name)]
    if hidden and not setting("return_dict_in_generate"):
        raise InputError(
            f"{hidden[0]} without return_dict_in_generate", "both: it is a part of that output",
            "add return_dict_in_generate=True",
        )  # fmt: skip
    beams, sequences = setting("num_beams") or 1, setting("num_return_sequences") or 1
    sampled = bool(asked.get("do_sample"))
    if sequences > 1 and (beams < sequences if beams > 1 else not sampled):
        raise InputError(
            f"num_return_sequences={sequences} with num_beams={beams} and do_sample={sampled}",
            "sampling, or as many beams", f"use num_beams={sequences}",
        )  # fmt: skip
    if options.get("streamer") is not None and beams > 1:
        raise InputError("a streamer with beams", "one sequence that grows", "use num_beams=1")


class Generating:
    """``generate`` of a hooked model, and what it says as text."""

    hf_model: Any
    name: str
    tokenizer: Any
    turns: Any
    _tensors: Any
    _pad_token_id: Any
    _localized_run: Any
    _attached: Any

    @torch.no_grad()
    def generate(
        self, inputs: Any = None, *, max_new_tokens: int = 16, **options: Any
    ) -> Int[Tensor, "batch new_pos"] | Any:
        """The ids of the *new* tokens only, greedily, hooks live and KV cache on; padded behind a row's end.

        A checkpoint's own ``repetition_penalty`` stays in force, as in Hugging Face's ``generate``.

        Args:
            inputs: as in ``forward``.
            max_new_tokens: at most so many.
            options: those of Hugging Face's ``generate``: ``do_sample=True``, ``num_beams=4``, ``streamer=...``. With
                ``return_dict_in_generate=True`` its own output is returned, whose ``sequences`` begin with the prompt.

        Raises:
            InputError: as ``forward``; an option that ``generate`` does not have, or that would have no effect.
        """
        stock = self.hf_model.generation_config
        if stock is None:
            raise UnsupportedModel(f"{self.name} cannot generate", "a model with a generation config")
        asked = {key: options.pop(key) for key in list(options) if key in vars(stock)}
        check_generation(stock, asked, options)
        options.pop("verbose", None)  # False, or it has been refused
        config = generation_config(stock, {"max_new_tokens": max_new_tokens, **asked}, self._pad_token_id())
        if config.stop_strings and "tokenizer" not in options:
            options["tokenizer"] = self.tokenizer
        given = self._tensors(inputs, options, also=("max_new_tokens", *OF_GENERATE))
        with self.turns.taken(running=True), self._localized_run(inputs, given, config), self._attached():
            run: Any = self.hf_model.generate
            made = run(**given, generation_config=config)
        return made[:, given["input_ids"].shape[1] :] if isinstance(made, Tensor) else made

    def generate_text(self, inputs: Any, *, max_new_tokens: int = 16, **options: Any) -> list[str]:
        """``generate``, decoded without special tokens: a list with one string for each row, of one row too.

        For the text itself ask one row with ``answer``.
        """
        if options.get("return_dict_in_generate"):
            raise InputError("return_dict_in_generate in generate_text", "text", "use model.generate")
        options["return_dict_in_generate"] = False
        ids = self.generate(inputs, max_new_tokens=max_new_tokens, **options)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def answer(self, inputs: Any, *, max_new_tokens: int = 16, **options: Any) -> str:
        """What the model says to one row: the string alone.

        Raises:
            InputError: several rows, or several answers to one.
        """
        rows = len(self._tensors(inputs, {})["input_ids"]) * (options.get("num_return_sequences") or 1)
        if rows > 1:
            raise InputError(f"one answer of {rows}", "one row and one sequence", "use model.generate_text")
        return self.generate_text(inputs, max_new_tokens=max_new_tokens, **options)[0]
