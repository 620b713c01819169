"""How a wrapper is tied to the Hugging Face model inside: which modules it listens to, and how it releases them.

Models may be rebuilt between two runs: adapters added, weights quantized, layers swapped, embeddings resized. Before
every run ``rewire`` checks whether the modules above the points are still the same, and finds the points again if they
are not; a model that has lost a point or changed its size is refused. ``tie`` makes sure that the attention
implementation is restored, by ``unwrap()`` or when the wrapper is garbage-collected.

This file does not know what a point is (``hook_sites``) or what attention does (``attention``).
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from weakref import finalize, ref

from torch import nn
from transformers import PreTrainedModel

from mech.errors import UnsupportedModel
from mech.model import attention, hook_sites
from mech.model.architectures.families import layers_of, sizes
from mech.model.eager import original
from mech.model.points import point_name

Layers = list[tuple[nn.Module, attention.LayerRecord]]
Branches = list[tuple[nn.Module, tuple[nn.Module | None, ...]]]


def attention_layers(model: Any, live: int) -> Layers:
    """The attention modules of both stacks (``live`` layers of the vision stack), each with its layer's record.

    Raises:
        UnsupportedModel: another wrapper holds them.
    """
    known = {(record.stack, record.layer): record for _, record in getattr(model, "_layers", ())}
    layers = []
    for stack, count in (("vision", live), ("text", model.cfg.n_layers)):
        row = getattr(model.family, stack)
        for index, layer in enumerate(layers_of(model.hf_model, row)[:count] if row else ()):
            module = original(hook_sites.attention_of(layer, row))
            if module is None:
                continue
            if attention.owner_of(module) not in (None, model):
                raise UnsupportedModel(
                    "this Hugging Face model is already wrapped", "one HookedMLLM for each model", "unwrap() the other"
                )
            record = known.get((stack, index))
            if record is None:
                inside = {p: model.hook_dict[point_name(p, index, stack)] for p in hook_sites.INSIDE_ATTENTION}
                record = attention.LayerRecord(stack, index, ref(model), inside, model._observers[stack])
                if stack == "text":
                    record.step, record.cross = model.step, module is original(getattr(layer, row.cross, None))
            layers.append((module, record))
    return layers


def branches(hf_model: nn.Module, modules: Iterable[nn.Module]) -> Branches:
    """Every ancestor of these modules, with its current children."""
    wanted, above = set(modules), {}
    for name, module in hf_model.named_modules():
        if module in wanted:
            names = name.split(".")
            above |= dict.fromkeys(".".join(names[:depth]) for depth in range(len(names)))
    parents = [hf_model.get_submodule(path) for path in above]
    return [(parent, tuple(parent._modules.values())) for parent in parents]


# config -> how many wrapped models share it, and their attention before the first was wrapped: models made from one
# config share one attention implementation, and only the last wrapper may switch it back.
_sharing: dict[int, tuple[int, dict[str, Any]]] = {}


def tie(model: Any) -> finalize:
    """Switch the Hugging Face model to this package's attention; the returned finalizer switches it back once."""
    hf_model, stock = model.hf_model, attention_names(model.hf_model)
    key = id(hf_model.config)
    if key in _sharing:
        stock = _sharing[key][1]
    elif attention.IMPLEMENTATION in stock.values():  # a copy of a wrapped model: its own is unknown
        stock = sdpa_names(hf_model)
    _sharing[key] = _sharing.get(key, (0, stock))[0] + 1, stock
    for module, record in model._layers:
        attention.register(module, record)
    model._branches = branches(hf_model, _listened(model))
    hf_model.set_attn_implementation(attention.IMPLEMENTATION)
    model._stock_attention = stock
    # It holds neither wrapper nor model, so that a dropped wrapper leaves the model as it found it.
    untie = finalize(model, _untie, ref(hf_model), model._layers, stock, key)
    untie.atexit = False
    return untie


def _untie(hf_model: ref, layers: Layers, stock: dict[str, Any], key: int) -> bool:
    """Release the modules; returns whether this was the last wrapper of a model with this config."""
    for module, _ in layers:
        attention.forget(module)
    layers.clear()
    others = _sharing.pop(key)[0] - 1
    if others:
        _sharing[key] = others, stock
        return False
    # An implementation chosen in the meantime stays.
    if (left := hf_model()) is not None and attention.IMPLEMENTATION in attention_names(left).values():
        left.set_attn_implementation(stock)
    return True


def _listened(model: Any) -> set[nn.Module]:
    return {site.module for site in model._sites} | {module for module, _ in model._layers}


def rewire(model: Any) -> None:
    """Find the modules of all points again if the model has been rebuilt since they were found.

    Raises:
        UnsupportedModel: it has lost or gained a point, its sizes have changed, or new attention modules run another
            implementation.

    Cost: negligible unless something has changed.
    """
    if all(tuple(parent._modules.values()) == children for parent, children in model._branches):
        return
    mend = "unwrap() before you rebuild it, and wrap again"
    try:
        offered, refused, live = hook_sites.offered(model.hf_model, model.family, model.cfg, model.step)
    except (AttributeError, TypeError, IndexError) as error:  # parts of another kind
        raise UnsupportedModel(f"modules were replaced by others: {error}", "linear projections", mend) from error
    names = [site if isinstance(site, str) else site.point for site in offered]
    if changed := sorted(set(names) ^ set(model.hook_dict)):
        why = refused.get(changed[0], "")
        raise UnsupportedModel(
            f"modules were replaced, and {changed[0]!r} is {'new' if changed[0] in names else 'gone'}"
            + (f": {why}" if why else ""), "the points it had when it was wrapped", mend,
        )  # fmt: skip
    sites = [site for site in offered if not isinstance(site, str)]
    layers = attention_layers(model, live)
    cfg = hook_sites.measured(sizes(model.hf_model.config, model.family), layers, sites)
    if replace(cfg, vocab=0) != replace(model.cfg, vocab=0) or _shapes(sites) != _shapes(model._sites):
        raise UnsupportedModel("modules were replaced by modules of another size", "the sizes it had", mend)
    others = {getattr(getattr(module, "config", None), "_attn_implementation", None) for module, _ in layers}
    if others - {attention.IMPLEMENTATION}:
        raise UnsupportedModel(
            "attention modules were replaced, and the new ones run another attention implementation", "", mend
        )
    for module, _ in model._layers:
        attention.forget(module)
    for module, record in layers:
        attention.register(module, record)
    model._sites, model._refused, model.cfg = sites, refused, cfg
    model._layers[:] = layers
    model._branches = branches(model.hf_model, _listened(model))


def _shapes(sites: list[hook_sites.HookSite]) -> dict[str, tuple]:
    return {site.point: (site.heads, site.part, site.width) for site in sites}


def attention_names(hf_model: PreTrainedModel) -> dict[str, Any]:
    """The attention implementation of the model and its parts, in the form ``set_attn_implementation`` takes."""
    config = hf_model.config
    parts = {key: getattr(config, key) for key in config.sub_configs if getattr(config, key)}
    return {key: part._attn_implementation for key, part in {"": config, **parts}.items()}


def sdpa_names(hf_model: PreTrainedModel) -> dict[str, str]:
    """SDPA for the model and its parts, eager where transformers has nothing else (Gemma2 with its softcap)."""
    eager = {id(part.config) for part in hf_model.modules() if getattr(part, "_supports_sdpa", True) is False}
    config = hf_model.config
    return {key: "eager" if key and id(getattr(config, key)) in eager else "sdpa" for key in attention_names(hf_model)}
