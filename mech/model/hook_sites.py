"""Where each activation point meets the Hugging Face model.

A ``HookSite`` says that a point is the input (or the output) of a module, seen in a certain shape. Sites are data; a
torch hook exists only while the wrapped model runs and only for hooked points, so an idle model carries none and an
exception leaves none behind.

Hooks are registered with ``prepend=True``: at their first forward, transformers' models install their own hooks that
capture outputs, and LLaVA's projector reads what these captured. A hook that runs after them changes nothing.

``hook_rot_q``, ``hook_rot_k``, ``hook_attn_scores`` and ``hook_pattern`` have no site: they are inside the attention
function (``attention.py``).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from mech.errors import UnsupportedModel
from mech.model.architectures.families import (
    Family,
    ModelConfig,
    Stack,
    layers_of,
    live_vision_layers,
    module_at,
    part_at,
)
from mech.model.named.projections import LinearMap, by_head, is_quantized, is_random, linear_map
from mech.model.points import LAYER_POINTS, behind_features, fire, point_name

INSIDE_ATTENTION = ("attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_attn_scores", "attn.hook_pattern")


@dataclass
class Step:
    """What the text stack is doing in this forward.

    Attributes:
        start: absolute position of its first query row: 0, or how many positions a cache has read.
        stop: absolute position after its last query row.
        batch: how many rows the batch has.
    """

    start: int = 0
    stop: int = 0
    batch: int = 0

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Pre-hook of the text stack that keeps these values current."""
        given = (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args)
        past = kwargs.get("past_key_values")
        tokens = next(value for value in given if value is not None)
        self.batch = len(tokens)
        # A cache of windowed layers is shorter than what has been read, so key lengths do not tell.
        self.start = 0 if past is None else int(past.get_seq_length())
        self.stop = self.start + tokens.shape[1]

    def held(self) -> Iterator[None]:
        """While open, another forward may run inside this one, whose values are restored afterwards."""
        outer = vars(self).copy()
        try:
            yield
        finally:
            vars(self).update(outer)


def all_rows(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Pre-hook that makes a text stack run all rows where it might run only some.

    Gemma4 runs layers without their own keys only for the rows whose logits are kept, and loses causality there unless
    its attention is called "sdpa".
    """
    return args, {**kwargs, "logits_to_keep": 0} if "logits_to_keep" in kwargs else kwargs


def cuts_rows(root: nn.Module) -> bool:
    """Whether a text stack may run only some rows."""
    return "logits_to_keep" in signature(root.forward).parameters


@dataclass(frozen=True)
class HookSite:
    """One point at one module.

    Attributes:
        point: full name of the point.
        module: the module whose input or output the point is.
        side: "in", "out", "mid" (an input that is also the skip connection), "result" (heads of an output) or
            "features" (what ``get_image_features`` returns).
        heads: number of heads the last dimension is split into, 0 for none.
        part: which of these heads belong to the point, if queries, keys and values are one projection.
        width: how much of each head belongs to the point, if a gate follows it; 0 for all.
        gain: what the module's output is multiplied by before it is added to the stream.
        argument: the keyword of the input, if it is not positional.
        flat: whether all leading dimensions are merged (the projector's tokens).
        memory: knows how many rows the batch has, if the module sees the tiles of all rows as one batch.
    """

    point: str
    module: nn.Module
    side: str
    heads: int = 0
    part: slice | None = None
    width: int = 0
    gain: Callable[[], Tensor | None] | None = None
    argument: str = "hidden_states"
    flat: bool = False
    memory: Step | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """The activation in the shape that the table of points lists."""
        if self.flat:
            return tensor.reshape(-1, tensor.shape[-1])
        if self.memory is not None:
            tensor = tensor.reshape(self.memory.batch, -1, tensor.shape[-1])
        if tensor.ndim == 4:  # the value norm already sees heads
            return tensor
        rows = tensor if tensor.ndim == 3 else tensor.unsqueeze(0)
        if not self.heads:
            return rows
        return self._own(rows.unflatten(-1, (self.heads, -1)))

    def _own(self, heads: Tensor) -> Tensor:
        heads = heads if self.part is None else heads[..., self.part, :]
        return heads[..., : self.width] if self.width else heads

    def restore(self, written: Tensor, tensor: Tensor) -> Tensor:
        """Back from the point's shape to the module's."""
        if self.part is None and not self.width:
            return written.reshape(tensor.shape)
        whole = tensor.unflatten(-1, (self.heads, -1)).clone()
        own = self._own(whole)
        own.copy_(written.reshape(own.shape))
        return whole.reshape(tensor.shape)

    def run(self, point: HookPoint, tensor: Tensor) -> Tensor:
        """The tensor with the point's hooks applied.

        What the hooks saw is put back even if they returned nothing: they may have written in place, and a tensor they
        kept for its gradient must be on the path to the logits.
        """
        gain = None if self.gain is None else self.gain()
        if gain is None:
            return self.restore(fire(point, self.view(tensor)), tensor)
        # Only the change goes back through the gain, so that unwritten values keep their own rounding. Nothing can be
        # written through a gate of exactly zero.
        seen, gain = self.view(tensor) * gain.detach(), torch.where(gain == 0, torch.inf, gain.detach())
        written = fire(point, seen.clone())
        return tensor.detach() + ((written - seen.detach()) / gain).reshape(tensor.shape)

    def attach(self, point: HookPoint) -> "RemovableHandle | _Features":
        """Register the torch hook that serves the point."""
        if self.side == "features":
            return _Features(self, point)
        if self.side in ("in", "mid"):
            before = _on_stream if self.side == "mid" else _on_input
            return self.module.register_forward_pre_hook(partial(before, self, point), prepend=True, with_kwargs=True)
        if self.side == "result":
            if is_random(self.module):
                raise UnsupportedModel(
                    f"{point.name} of a projection with dropout, in training mode",
                    "a projection that gives the same output for the same input", "call hf_model.eval()",
                )  # fmt: skip
            after = partial(_on_heads, self, point, linear_map(self.module))
        else:
            after = partial(_on_output, self, point)
        return self.module.register_forward_hook(after, prepend=True)


class _Features:
    """Serves the features of all images of a call at once, for a model that runs its projector image by image.

    No module outputs them together; only the model's own ``get_image_features`` returns them so. It is therefore
    wrapped on the instance, until ``remove()``.
    """

    def __init__(self, site: HookSite, point: HookPoint):
        self.owner: Any = site.module
        stock = self.owner.get_image_features

        def features(*args: Any, **kwargs: Any) -> Any:
            output = stock(*args, **kwargs)
            parts = output.pooler_output
            written = site.run(point, torch.cat(list(parts)))
            output.pooler_output = list(written.split([len(part) for part in parts]))
            return output

        self.owner.get_image_features = features

    def remove(self) -> None:
        del self.owner.get_image_features


def _on_input(site: HookSite, point: HookPoint, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (site.run(point, args[0]), *args[1:]), kwargs
    # The stream comes first, whatever its name: Llama4's tower calls it hidden_state.
    name = site.argument if site.argument in kwargs else next(iter(kwargs))
    return args, {**kwargs, name: site.run(point, kwargs[name])}


def _on_stream(site: HookSite, point: HookPoint, module: nn.Module, args: tuple, kwargs: dict) -> None:
    # The layer adds this same tensor back after the MLP. Only writing into it reaches both branches without rounding;
    # the hooks get a copy, so that what they keep is not overwritten.
    stream = args[0] if args else kwargs[site.argument]
    stream.copy_(site.run(point, stream.clone()))


def _on_output(site: HookSite, point: HookPoint, module: nn.Module, args: tuple, output: Any) -> Any:
    if isinstance(output, Tensor):
        return site.run(point, output)
    if isinstance(output, tuple):
        # Llama4's experts flatten the batch; their input still has it.
        rows = output[0].reshape(args[0].shape) if output[0].ndim == 2 and args[0].ndim == 3 else output[0]
        return (site.run(point, rows), *output[1:])
    output.pooler_output = site.run(point, output.pooler_output)
    return output


def _on_heads(
    site: HookSite, point: HookPoint, of_heads: LinearMap, module: nn.Module, args: tuple, output: Tensor
) -> Tensor:
    weight, bias = of_heads
    z = site.view(args[0])
    result = torch.einsum("bphd,hdm->bphm", z, by_head(weight, site.heads))
    # A copy: a hook may write in place, and its change must still be known.
    before = result.detach().clone()
    written = fire(point, result)
    # Only the difference is added, so heads that were not written keep the projection's own rounding. The constants
    # are detached so that the gradient of the output flows through what the hook returned.
    change = (written - before).sum(2).reshape(output.shape)
    return output.detach() + change + (0.0 if bias is None else bias - bias.detach())


def stack_sites(
    model: nn.Module, stack: Stack, kind: str, layers: int, d_head: int, step: Step
) -> tuple[list[HookSite | str], dict[str, str]]:
    """The points that one stack's first ``layers`` layers offer.

    Args:
        model: the Hugging Face model.
        stack: its paths.
        kind: "text" or "vision".
        layers: how many layers are live.
        d_head: size of a head, if the attention module does not say.
        step: what the text stack is doing.

    Returns:
        The sites in the order in which they fire (a bare name for a point inside the attention function), and the
        points that do not exist, with the reasons.
    """
    blocks = layers_of(model, stack)
    sites: list[HookSite | str] = []
    refused: dict[str, str] = {}
    for index, block in enumerate(blocks[:layers]):
        behind = block
        if stack.post_at == "next":
            last = index + 1 == len(blocks)
            behind = module_at(model, f"{stack.root}.{stack.norm}") if last else blocks[index + 1]
        offered = _layer_seams(block, stack, d_head, step)
        offered["hook_resid_post"] = ("out" if behind is block else "in", behind, {})
        for point in LAYER_POINTS:
            name, at = point_name(point, index, kind), offered[point]
            if isinstance(at, str):
                refused[name] = f"layer {index}: {at}"
            elif at is None:
                sites.append(name)
            else:
                sites.append(HookSite(name, at[1], at[0], **at[2]))
    return sites, refused


def _layer_seams(block: nn.Module, stack: Stack, d_head: int, step: Step) -> dict[str, Any]:
    """Point -> (side, module, options of the site), None inside the attention function, or why there is none."""
    attn = attention_of(block, stack)
    offered: dict[str, Any] = {"hook_resid_pre": ("in", block, {})}

    def at(point: str, side: str, module: nn.Module | None, path: str, **options: Any) -> None:
        if point in stack.absent and (module is None or not path or part_at(module, path) is None):
            offered[point] = stack.absent[point]
        else:
            assert module is not None
            offered[point] = (side, module_at(module, path), options)

    if attn is None:
        path, what = next((path, what) for path, what in stack.headless.items() if hasattr(block, path))
        offered |= dict.fromkeys((point for point in LAYER_POINTS if point.startswith("attn.")), f"{what}: no heads")
    else:
        path = next(path for path in stack.attn if getattr(block, path, None) is attn)
        width = getattr(attn, "head_dim", d_head)
        projections: Any = {
            letter: part_at(attn, name)
            for letter, name in zip("qkvo", (stack.q, stack.k, stack.v, stack.o), strict=True)
        }
        heads = projections["o"].in_features // width
        offered |= dict.fromkeys(INSIDE_ATTENTION)
        if stack.qkv:
            total = projections["q"].out_features // width
            shared = (total - heads) // 2
            ends = (0, heads, heads + shared, total)
            for first, letter in enumerate("qkv"):
                part = slice(ends[first], ends[first + 1])
                at(f"attn.hook_{letter}", "out", attn, getattr(stack, letter), heads=total, part=part)
        else:
            at("attn.hook_q", "out", attn, stack.q, heads=heads, width=width if stack.gated else 0)
            for letter in "kv":
                module = projections[letter]
                count = getattr(module, "out_features", 0) // width
                of_memory = step if path == stack.cross else None
                at(f"attn.hook_{letter}", "out", attn, getattr(stack, letter), heads=count, memory=of_memory)
        at("attn.hook_z", "in", attn, stack.o, heads=heads)
        at("attn.hook_result", "result", attn, stack.o, heads=heads)
        if is_quantized(projections["o"]):
            offered["attn.hook_result"] = "W_O is quantized, so what single heads add is not known; use attn.hook_z"
    at("hook_attn_out", "out", block, stack.attn_out or path, gain=_gain(stack.attn_gain, block))
    at("hook_resid_mid", "mid", block, stack.mid)
    at("mlp.hook_post", "in", getattr(block, stack.mlp, None), stack.down)
    at("hook_mlp_out", "out", block, stack.mlp_out or stack.mlp, gain=_gain(stack.mlp_gain, block))
    return offered


def _gain(of_layer: Callable | None, block: nn.Module) -> Callable[[], Tensor | None] | None:
    return None if of_layer is None else partial(of_layer, block)


def attention_of(block: nn.Module, stack: Stack) -> nn.Module | None:
    """A layer's attention module; None if a module without heads replaces it.

    Raises:
        UnsupportedModel: the layer has neither.
    """
    for path in stack.attn:
        if getattr(block, path, None) is not None:
            return getattr(block, path)
    if any(hasattr(block, path) for path in stack.headless):
        return None
    return module_at(block, stack.attn[0])


def offered(
    model: nn.Module, family: Family, cfg: ModelConfig, step: Step
) -> tuple[list[HookSite | str], dict[str, str], int]:
    """A model's sites in the order of firing, the refused points with reasons, and how many vision layers are live."""
    sites: list[HookSite | str] = []
    refused: dict[str, str] = {}
    live = 0
    if family.vision is not None:
        layers = len(layers_of(model, family.vision))
        live = live_vision_layers(model.config, family, layers)
        sites, refused = stack_sites(model, family.vision, "vision", live, cfg.vision_d_head, step)
        refused |= behind_features(live, layers)
    between, behind = joining_seams(model, family)
    text, none = stack_sites(model, family.text, "text", cfg.n_layers, cfg.d_head, step)
    return [*sites, *between, *text, *behind], refused | none, live


def measured(cfg: ModelConfig, layers: list[tuple[nn.Module, Any]], sites: list[HookSite]) -> ModelConfig:
    """The sizes, completed from the modules; ``layers`` are the attention modules with their records."""
    text = {record.layer: (module, record) for module, record in layers if record.stack == "text"}
    groups = cfg.n_heads // cfg.n_kv_heads
    d_heads = {layer: getattr(module, "head_dim", cfg.d_head) for layer, (module, _) in text.items()}
    kv_heads = {
        layer: cfg.n_heads // getattr(module, "num_key_value_groups", groups) for layer, (module, _) in text.items()
    }
    d_mlp: dict[bool, int] = {}
    for site in sites:
        if site.point.endswith("mlp.hook_post"):
            d_mlp.setdefault(site.point.startswith("vision."), getattr(site.module, "in_features", 0))
    every = range(cfg.n_layers)
    return replace(
        cfg,
        attention_layers=tuple(text),
        cross_layers=tuple(layer for layer, (_, record) in text.items() if record.cross),
        d_heads=tuple(d_heads.get(layer, 0) for layer in every),
        kv_heads=tuple(kv_heads.get(layer, 0) for layer in every),
        d_mlp=d_mlp.get(False) or cfg.d_mlp,
        vision_d_mlp=d_mlp.get(True) or cfg.vision_d_mlp,
    )


def joining_seams(model: nn.Module, family: Family) -> tuple[list[HookSite], list[HookSite]]:
    """The sites between the stacks, and those after them."""
    root, embed = family.text.root, family.text.embed
    between = [
        HookSite("hook_embed", module_at(model, f"{root}.{embed}"), "out")
        if embed
        else HookSite("hook_embed", module_at(model, root), "in", argument="inputs_embeds")
    ]
    if family.projector:
        side = "features" if family.apart else "out"
        between.insert(0, HookSite("projector.hook_out", module_at(model, family.projector), side, flat=True))
    return between, [HookSite("ln_final.hook_normalized", module_at(model, family.final_norm), "out")]


def merge_windows(keyword: str, store: Callable[[Tensor], None]) -> Callable:
    """A pre-hook for an attention module that calls attention once per window.

    The module then sees one window of full length, and ``store`` receives the true boundaries, which the attention
    function turns into a block-diagonal mask. Hooks and observers thus see the whole layer at once.
    """

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        boundaries = kwargs[keyword]
        store(boundaries)
        return args, {**kwargs, keyword: torch.stack((boundaries[0], boundaries[-1]))}

    return before
