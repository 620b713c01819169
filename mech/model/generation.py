"""Generation: greedy, with a KV cache, and without warnings about settings that greedy decoding does not use."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from mech.arguments import Count, checking
from mech.errors import InputError, UnsupportedModel
from mech.model.eager import in_python

# Architectures whose pictures transformers cannot encode before it reads the prompt.
_WHOLE = ("llama4", "mllama")
# Values at which transformers does not warn about sampling settings. None does not work: it is filled in from the
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
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"generation settings that transformers refuses ({reason})", "other settings", "change them"
        ) from error
    return config


# What Hugging Face's generate takes besides settings and tensors, except ``custom_generate``, which runs hub code.
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
    """Refuse options that would have no effect, or a different one than their name says.

    Args:
        stock: the checkpoint's settings.
        asked: the settings given by the caller.
        options: the caller's other options.

    Raises:
        InputError: such an option, with what to use instead.
    """
    given = {**asked, **options}
    for name, do in _INSTEAD.items():
        off = name in ("verbose", "output_attentions") and given.get(name) is False
        if given.get(name) is not None and not off:
            raise InputError(f"{name}=... in generate", "an option that does what its name says", do)

    def setting(name: str) -> Any:
        return asked.get(name, getattr(stock, name))

    hidden = [name for name in _IN_OUTPUT if asked.get(name)]
    if hidden and not setting("return_dict_in_generate"):
        raise InputError(
            f"{hidden[0]} without return_dict_in_generate", "both: it is part of that output",
            "add return_dict_in_generate=True",
        )  # fmt: skip
    beams, sequences = setting("num_beams") or 1, setting("num_return_sequences") or 1
    sampled = bool(asked.get("do_sample"))
    if sequences > 1 and (beams < sequences if beams > 1 else not sampled):
        raise InputError(
            f"num_return_sequences={sequences} with num_beams={beams} and do_sample={sampled}",
            f"sampling, or at least {sequences} beams", f"use num_beams={sequences}",
        )  # fmt: skip
    if options.get("streamer") is not None and beams > 1:
        raise InputError("a streamer with beam search", "a single sequence", "use num_beams=1")


def check_way(hf_model: Any, given: Mapping[str, Any], config: GenerationConfig) -> None:
    """Refuse, before any forward, what transformers cannot do or would silently do differently.

    Raises:
        InputError: a prompt in chunks that looks ahead, or without a cache; drafts that this prompt cannot have.
        UnsupportedModel: a kind of cache that this model or machine cannot use.
    """
    if config.prefill_chunk_size is not None and config.prefill_chunk_size < given["input_ids"].shape[1]:
        _check_chunks(hf_model, given, config)
    _check_cache(hf_model, config.cache_implementation or "")
    _check_drafts(hf_model, given, config)


def looks_ahead(hf_model: Any, given: Mapping[str, Any]) -> bool:
    """Whether some position of a prompt attends to a later one: in a block of image tokens, or in a prefix."""
    make = getattr(hf_model, "create_masks_for_generate", None)
    if make is None:  # then transformers makes causal masks
        return False
    ids = given["input_ids"]
    types = {name: given.get(name) for name in ("token_type_ids", "mm_token_type_ids")}
    masks = make(
        config=hf_model.config,
        inputs_embeds=torch.empty((*ids.shape, 0), dtype=hf_model.dtype, device=ids.device),
        attention_mask=given.get("attention_mask"),
        past_key_values=None,
        position_ids=None,
        is_first_iteration=True,
        **types,
    )
    masks = masks.values() if isinstance(masks, Mapping) else [masks]
    return any(mask is not None and bool(mask.triu(1).any()) for mask in masks)


def _check_chunks(hf_model: Any, given: Mapping[str, Any], config: GenerationConfig) -> None:
    chunked = f"prefill_chunk_size={config.prefill_chunk_size}"
    do = "leave prefill_chunk_size out"
    if not config.use_cache:
        raise InputError(f"{chunked} with use_cache=False", "a cache to read the chunks into", do)
    if hf_model.config.model_type in _WHOLE and any(name.startswith("pixel_values") for name in given):
        raise InputError(
            f"{chunked} for pictures of {hf_model.config.model_type}",
            "a model whose pictures can be encoded beforehand",
            do,
        )
    if looks_ahead(hf_model, given):
        raise InputError(
            f"{chunked} for a prompt in which some positions attend to later ones (image tokens, or a prefix)",
            "a causal prompt: a chunk cannot attend to tokens that are not read yet", do,
        )  # fmt: skip


def _check_cache(hf_model: Any, kind: str) -> None:
    given, do = f"cache_implementation={kind!r}", "leave cache_implementation out"
    if kind.startswith("offloaded") and hf_model.device.type == "cpu":
        raise UnsupportedModel(f"{given} for a model on the CPU", "an accelerator, whose memory it saves", do)
    if kind == "quantized":
        raise UnsupportedModel(f"{given}: the keys and values that hooks write would be rounded", "a plain cache", do)
    layers = set(getattr(hf_model.config.get_text_config(), "layer_types", None) or ())
    if "static" in kind and hf_model.config.model_type == "paligemma" and len(layers) > 1:
        raise UnsupportedModel(f"{given} for PaliGemma with sliding-window layers", "a cache of another kind", do)


def _check_drafts(hf_model: Any, given: Mapping[str, Any], config: GenerationConfig) -> None:
    pictures = any(name.startswith("pixel_values") for name in given)
    if config.prompt_lookup_num_tokens and pictures:
        raise InputError(
            "prompt_lookup_num_tokens for a prompt with pictures: it drafts placeholders that have no picture",
            "a prompt without pictures, or an assistant_model", "leave prompt_lookup_num_tokens out",
        )  # fmt: skip
    if config.assistant_early_exit:
        raise UnsupportedModel(
            f"assistant_early_exit={config.assistant_early_exit} for a multimodal model", "an assistant_model",
            "leave assistant_early_exit out",
        )  # fmt: skip
    assistant = given.get("assistant_model")
    if assistant is not None and not isinstance(assistant, PreTrainedModel):
        raise InputError(
            f"an assistant_model of type {type(assistant).__name__}", "a Hugging Face model",
            "pass the model inside it: assistant_model=other.hf_model",
        )  # fmt: skip
    if assistant is not None and hf_model.config.model_type == "mllama" and pictures:
        raise UnsupportedModel(
            "an assistant_model for mllama with pictures",
            "one token at a time: its cross-attention mask cannot be cut",
            "leave assistant_model out",
        )  # fmt: skip


class Generating:
    """``generate`` for a hooked model, and its answers as text."""

    hf_model: Any
    name: str
    tokenizer: Any
    turns: Any
    _tensors: Any
    _pad_token_id: Any
    _localized_run: Any
    _attached: Any

    @checking(InputError)
    @in_python
    @torch.no_grad()
    def generate(
        self, inputs: Any = None, *, max_new_tokens: Count = 16, **options: Any
    ) -> Int[Tensor, "batch new_pos"] | Any:
        """Generate greedily, with live hooks and a KV cache: the *new* token ids only, padded after a row's end.

        A checkpoint's own ``repetition_penalty`` stays in force, as in Hugging Face's ``generate``.

        Args:
            inputs: as in ``forward``.
            max_new_tokens: upper limit on the number of new tokens.
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
        check_way(self.hf_model, given, config)
        with self.turns.taken(running=True), self._localized_run(inputs, given, config), self._attached():
            run: Any = self.hf_model.generate
            made = run(**given, generation_config=config)
        return made[:, given["input_ids"].shape[1] :] if isinstance(made, Tensor) else made

    @checking(InputError)
    def generate_text(self, inputs: Any, *, max_new_tokens: Count = 16, **options: Any) -> list[str]:
        """``generate``, decoded without special tokens: a list with one string per row, even for a single row.

        For one row, ``answer`` returns the string itself.
        """
        if options.get("return_dict_in_generate"):
            raise InputError("return_dict_in_generate in generate_text", "text", "use model.generate")
        options["return_dict_in_generate"] = False
        ids = self.generate(inputs, max_new_tokens=max_new_tokens, **options)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    @checking(InputError)
    def answer(self, inputs: Any, *, max_new_tokens: Count = 16, **options: Any) -> str:
        """The model's answer to one row, as a string.

        Raises:
            InputError: several rows, or several answers to one row.
        """
        rows = len(self._tensors(inputs, {})["input_ids"]) * (options.get("num_return_sequences") or 1)
        if rows > 1:
            raise InputError(
                f"one answer to {rows} rows or sequences", "one row and one sequence", "use model.generate_text"
            )
        return self.generate_text(inputs, max_new_tokens=max_new_tokens, **options)[0]
