"""Heads removed for good: a smaller checkpoint that plain ``transformers`` loads.

    heads  = lowest_groups(ranking, model.cfg, 4)         # the four lowest KV groups of every layer
    pruned = mech.prune_heads(model, heads, to="mean", reference=find)
    pruned.save("smaller")                                # a folder for AutoModelForImageTextToText.from_pretrained
    print(mech.pruning_report(model, pruned, test))       # size, cache, speed, accuracy with its interval

A head writes ``z W_O`` to the residual stream. ``to="zero"`` drops it; ``to="mean"`` leaves its mean output over the
reference's *text* positions as a constant in the bias of the output projection. That is mean ablation with one mean for
all positions; ``Ablate(to="mean")`` has one for text and one for visual tokens, which no bias can hold. (On the
reference models the mean over text cost less than that over all positions: answers are made at text positions.)

A config holds one number of heads for all layers, so the file shrinks by what *every* layer can give up: the layer that
keeps the most KV groups, and the group that keeps the most query heads, set the shape. Heads that a layer gives up
beyond that are ``silent``: they no longer do anything, but keep their place, with zero weights. Under grouped-query
attention a KV head is removed with the last of its query heads. Whether a class can express a shape is tried, not
looked up: the new config is built without weights, and every shape is compared. Classes that derive the size of a head
from the number of heads (Qwen2-VL, Qwen2.5-VL, GLM-4.1V, Mllama) are refused, as is ``to="mean"`` where the output
projection has no bias and no config gives it one (Mistral, Qwen2, Phi3).

The model is not retrained. The vision stack is left unchanged.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from mech.arguments import checked, one_of
from mech.data.samples import Sample, Samples
from mech.errors import ExperimentError, MechError, OutputError, UnsupportedModel
from mech.experiments.ranking.ranking import Head, Heads
from mech.files import make_folder
from mech.indices import Pairs
from mech.interventions import Ablate, Reference, reference_activations
from mech.interventions.reference import TEXT_KIND
from mech.interventions.specs import Z
from mech.model import HookedMLLM
from mech.model.architectures.families import layers_of
from mech.model.hook_sites import attention_of
from mech.model.loading import no_bars
from mech.model.named.projections import is_stock
from mech.results import write_json

Slots = tuple[tuple[int | None, ...], ...]  # per new KV group the original query heads, None for an empty place


@dataclass(frozen=True)
class Shape:
    """The heads of a layer, the same in all layers: query heads, KV heads, size of a head."""

    n_heads: int
    n_kv_heads: int
    d_head: int


@dataclass(frozen=True, eq=False)
class Pruned:
    """A model with fewer heads.

    Attributes:
        model: the smaller model, wrapped; its Hugging Face model has the class of the original.
        heads: all removed heads, numbered as in the original model.
        silent: how many of them keep a place, with zero weights.
        to: what they were replaced by.
        shape: the heads of a layer after pruning.
        slots: layer -> new KV group -> the original query heads in it.
        other_model: the model that the mean was taken from, if it was another one.
    """

    model: HookedMLLM
    heads: Heads
    silent: int
    to: str
    shape: Shape
    slots: Mapping[int, Slots] = field(repr=False)
    other_model: str = ""

    def save(self, folder: str | Path) -> Path:
        """Write weights, config, tokenizer, image processor, and ``pruning.json`` with what was removed.

        Raises:
            OutputError: the folder cannot be written, or the disk is full.
        """
        folder, processor = Path(folder), self.model.processor
        if processor.tokenizer.chat_template is None:
            processor.tokenizer.chat_template = processor.chat_template
        make_folder(folder)
        try:
            with no_bars():
                self.model.hf_model.save_pretrained(folder)
            processor.tokenizer.save_pretrained(folder)
            processor.image_processor.save_pretrained(folder)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{folder} cannot be written ({error})", "disk space for the weights", "free some space"
            ) from error
        origin = {layer: [list(group) for group in groups] for layer, groups in self.slots.items()}
        record = {"to": self.to, "heads": self.heads, "silent": self.silent, "slots": origin}
        record |= {"other_model": self.other_model} if self.other_model else {}
        write_json(record, folder / "pruning.json")
        return folder


@checked
def prune_heads(
    model: HookedMLLM,
    heads: Pairs,
    *,
    to: one_of(("mean", "zero")) = "mean",
    reference: Samples | Sequence[Sample] | Reference | None = None,
    allow_other_model: bool = False,
) -> Pruned:
    """A copy of the model without some of its text heads; the model itself is left unchanged.

    ``b_O' = b_O + sum over removed heads h of mean(z_h) W_O[h]`` for ``to="mean"``; nothing is added for ``"zero"``.

    Args:
        model: a hooked model with weights in floating point.
        heads: (layer, head) pairs. The file shrinks by what every layer gives up: see ``lowest_groups``.
        to: ``"mean"`` or ``"zero"``.
        reference: samples (or their activations) over which the mean is taken.
        allow_other_model: accept activations of another model of this shape; ``Pruned.other_model`` records it.

    Raises:
        ExperimentError: heads the model does not have, no reference, or heads whose removal makes no config smaller.
        UnsupportedModel: its class cannot have this shape, or has no bias to hold a mean.

    Cost: one forward for each reference sample; the memory of a second, smaller model.

    References: pruning heads, arXiv 1905.10650; why mean and zero differ, 2407.08734.
    """
    gone = tuple(sorted({Head(int(layer), int(head)) for layer, head in heads}))
    samples = reference if reference is None or isinstance(reference, Reference) else Samples(reference)
    Ablate(heads=gone, to=to, reference=samples, allow_other_model=allow_other_model).check(model)
    other = samples.check(model, Z, allow_other_model) if isinstance(samples, Reference) else ""
    shape, slots = _fitted(model, gone)
    config = _config(model, shape, with_bias=to == "mean")
    if isinstance(samples, Samples) and to == "mean":
        samples = reference_activations(model, samples)
    means = samples.mean[TEXT_KIND] if isinstance(samples, Reference) and to == "mean" else None
    with torch.no_grad():
        state = _state(model, gone, shape, slots, means)
    small = _built(model, config, state)
    silent = sum(head is None for groups in slots.values() for group in groups for head in group)
    try:
        processor = model.processor
    except MechError:  # a model may have none
        processor = None
    wrapped = HookedMLLM.from_hf(small, processor, name=f"{model.name} without {len(gone)} heads")
    return Pruned(wrapped, gone, silent, to, shape, slots, other)


def _fitted(model: HookedMLLM, gone: Heads) -> tuple[Shape, dict[int, Slots]]:
    """The smallest shape that all layers fit into, and which head each of its places holds."""
    cfg = model.cfg
    layers = cfg.attention_layers
    sizes = {(cfg.kv_heads[layer], cfg.d_heads[layer]) for layer in layers}
    if len(sizes) > 1:
        raise UnsupportedModel(
            f"{model.name} has layers with {sorted(sizes)} (KV heads, size of a head)", "the same in all layers",
            "ablate the heads instead: mech.intervene",
        )  # fmt: skip
    per_group = cfg.n_heads // cfg.n_kv_heads
    kept: dict[int, list[list[int]]] = {}
    for layer in layers:
        alive = [h for h in range(cfg.n_heads) if Head(layer, h) not in set(gone)]
        groups = [[h for h in alive if h // per_group == group] for group in range(cfg.n_kv_heads)]
        kept[layer] = [group for group in groups if group]
    groups = max(1, *map(len, kept.values()))
    width = max([1, *(len(group) for of_layer in kept.values() for group in of_layer)])
    if groups * width == cfg.n_heads:
        fullest = max(layers, key=lambda layer: (len(kept[layer]), max(map(len, kept[layer]), default=0)))
        raise ExperimentError(
            f"layer {fullest} keeps a head in each of its {groups} KV groups and all of one group, so that no config "
            "can be smaller",
            "heads of whole KV groups, in every layer (a config has one number of heads for all layers)",
            "use mech.sparse.groups.lowest_groups(ranking, model.cfg, 1), or mech.intervene and leave the file",
        )  # fmt: skip
    slots: dict[int, Slots] = {}
    for layer, of_layer in kept.items():
        filled = [tuple(group) + (None,) * (width - len(group)) for group in of_layer]
        slots[layer] = (*filled, *[(None,) * width] * (groups - len(filled)))
    return Shape(groups * width, groups, cfg.d_heads[layers[0]]), slots


def _config(model: HookedMLLM, shape: Shape, with_bias: bool) -> Any:
    """The config of the smaller model, built without weights to check that its class really has that shape."""
    config = copy.deepcopy(model.hf_model.config)
    text = config.get_text_config()
    text.num_attention_heads, text.num_key_value_heads = shape.n_heads, shape.n_kv_heads
    text.head_dim = shape.d_head
    stack = model.family.text
    biased = _attention_modules(model.hf_model, model)[0][1].get_submodule(stack.o).bias is not None
    if with_bias and not biased and hasattr(text, "attention_bias"):
        text.attention_bias = True
    kind = type(model.hf_model)
    try:
        with torch.device("meta"):
            empty = kind._from_config(config)
        first = _attention_modules(empty, model)[0][1]
    except (ValueError, AttributeError, RuntimeError) as error:
        raise _unfit(model, shape, str(error).splitlines()[0]) from error
    out: Any = first.get_submodule(stack.o)
    if out.in_features != shape.n_heads * shape.d_head:
        raise _unfit(model, shape, f"its output projection then reads {out.in_features} numbers")
    if with_bias and (out.bias is None or stack.gated):
        why = "gates a head's output after attention" if stack.gated else "has no bias at its output projection"
        raise UnsupportedModel(
            f"{kind.__name__} {why}, and no config can change that", "a bias that can hold the heads' mean output",
            'use prune_heads(to="zero"), or mech.intervene with to="mean"',
        )  # fmt: skip
    return config


def _unfit(model: HookedMLLM, shape: Shape, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(model.hf_model).__name__} cannot have {shape.n_heads} heads of size {shape.d_head}: {why}",
        "a class whose config gives the number and the size of heads separately",
        "ablate the heads instead: mech.intervene(model, mech.Ablate(heads=..., to='mean', reference=...))",
    )


def _attention_modules(hf_model: nn.Module, model: HookedMLLM) -> list[tuple[int, nn.Module]]:
    """The attention module of every layer that has heads."""
    stack = model.family.text
    layers = layers_of(hf_model, stack)
    found = [(layer, attention_of(layers[layer], stack)) for layer in model.cfg.attention_layers]
    return [(layer, module) for layer, module in found if module is not None]


def _state(
    model: HookedMLLM, gone: Heads, shape: Shape, slots: dict[int, Slots], means: Float[Tensor, "layer head d"] | None
) -> dict[str, Tensor]:
    """All weights of the smaller model, under the names of the larger one."""
    hf, stack, cfg = model.hf_model, model.family.text, model.cfg
    state = dict(hf.state_dict())
    names = {id(module): name for name, module in hf.named_modules()}
    per_group = cfg.n_heads // cfg.n_kv_heads
    for layer, module in _attention_modules(hf, model):
        queries = [head for group in slots[layer] for head in group]
        groups = [next((head // per_group for head in group if head is not None), None) for group in slots[layer]]
        parts = {stack.q: queries, stack.k: groups, stack.v: groups}
        if stack.qkv:
            fused = [*queries, *(_shifted(groups, cfg.n_heads)), *(_shifted(groups, cfg.n_heads + cfg.n_kv_heads))]
            parts = {stack.q: fused}
        if not all(is_stock(module.get_submodule(path)) for path in (*parts, stack.o)):
            raise UnsupportedModel(
                f"quantized, offloaded or adapted weights in layer {layer}", "plain weights in floating point",
                "open the model without quantization= and device_map=, and merge its adapters first",
            )  # fmt: skip
        for path, places in parts.items():
            projection: Any = module.get_submodule(path)
            prefix = names[id(projection)]
            n = cfg.n_heads + 2 * cfg.n_kv_heads if stack.qkv else cfg.n_heads if path == stack.q else cfg.n_kv_heads
            state[f"{prefix}.weight"] = _taken(projection.weight.unflatten(0, (n, -1)), places).flatten(0, 1)
            if projection.bias is not None:
                state[f"{prefix}.bias"] = _taken(projection.bias.unflatten(0, (n, -1)), places).flatten()
            elif means is not None:
                state[f"{prefix}.bias"] = projection.weight.new_zeros(len(places) * shape.d_head)
        out: Any = module.get_submodule(stack.o)
        weight = out.weight.unflatten(1, (cfg.n_heads, -1)).transpose(0, 1)  # head, d_model, d_head
        state[f"{names[id(out)]}.weight"] = _taken(weight, queries).transpose(0, 1).flatten(1)
        if means is not None:
            lost = [head for at, head in gone if at == layer]
            mean = means[layer, lost, : shape.d_head].to(weight.device).double()
            constant = torch.einsum("hmd,hd->m", weight[lost].double(), mean)
            bias = weight.new_zeros(weight.shape[1]) if out.bias is None else out.bias
            state[f"{names[id(out)]}.bias"] = (bias.double() + constant).to(weight)
    return state


def _shifted(places: Sequence[int | None], by: int) -> list[int | None]:
    return [None if place is None else place + by for place in places]


def _taken(heads: Float[Tensor, "head ..."], places: Sequence[int | None]) -> Float[Tensor, "place ..."]:
    """The heads at these places, zeros where there is none."""
    index = torch.tensor([0 if place is None else place for place in places], device=heads.device)
    taken = heads[index]
    taken[torch.tensor([place is None for place in places], device=heads.device)] = 0
    return taken


def _built(model: HookedMLLM, config: Any, state: dict[str, Tensor]) -> Any:
    """The Hugging Face model with these weights, loaded by transformers itself."""
    kind = type(model.hf_model)
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in kind._from_config(config).state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    wrong = [name for name in wanted if given.get(name) != wanted[name]]
    if wrong:
        raise UnsupportedModel(
            f"{wrong[0]!r} would be {given.get(wrong[0])}, and {kind.__name__} has {wanted[wrong[0]]} there",
            "attention whose weights are laid out head by head",
            "ablate the heads instead: mech.intervene",
        )
    with no_bars():
        made = kind.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
    made.generation_config = copy.deepcopy(model.hf_model.generation_config)
    return made.to(model.device).eval()
