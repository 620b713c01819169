"""How an architecture is described: where every activation sits in the Hugging Face model.

A family is a text stack and a vision stack plus the few modules between them, written as module paths. The table is in
``rows.py``: one ``Stack`` for each kind of transformer (by the ``model_type`` of its config), and one ``Row`` for each
multimodal architecture, which says where its stacks are. Outside of it only ``generation.py`` names architectures.

    family = family_of(hf_model)
    family.text.attn            # ("self_attn",)
    layers_of(hf_model, family.text)

Two questions decide whether a row is enough:

* Does every attention layer of both stacks call transformers' ``AttentionInterface``? (All current ones do.)
* Is the tensor that enters the second norm the same tensor that is added back after the MLP? (True for every pre-norm
  layer written as ``residual = hidden_states; hidden_states = norm(hidden_states)``.)

An architecture without a row still opens if its text stack is laid out like a known one: it then has text points but no
vision points, and a ``PartialSupport`` warning says so.

This file does not know how a point is hooked (``hook_sites.py``) or how pictures become tensors (``mech.inputs``).
"""

import warnings
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mech.errors import UnsupportedModel
from mech.model.architectures.rows import LAYOUTS, ROWS, TEXT, VISION
from mech.model.architectures.stack import Family, Stack


class PartialSupport(UserWarning):
    """The model opens, but a part of it has no activation points."""


RECIPE = (
    "add a Row (and a Stack, if its text or vision model has none) to mech/model/architectures/rows.py, a tiny "
    "config to mech/reference/tiny.py, and run `mech check`"
)


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a model, under the names TransformerLens gives them; ``vision_*`` for the vision stack.

    ``attention_layers`` are the text layers that have heads; in the others (linear attention, convolutions) attention
    points are refused by name. ``cross_layers`` are the attention layers whose keys are visual tokens outside the
    sequence. ``n_kv_heads`` and ``d_head`` are those of the first layer; ``kv_heads`` and ``d_heads`` list them for
    every layer, since a few architectures vary them (0 where a layer has no heads).
    """

    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    vocab: int
    vision_layers: int
    vision_heads: int
    vision_d_model: int
    vision_d_head: int
    vision_d_mlp: int
    attention_layers: tuple[int, ...] = ()
    cross_layers: tuple[int, ...] = ()
    kv_heads: tuple[int, ...] = ()
    d_heads: tuple[int, ...] = ()
    attn_only: bool = False
    normalization_type: str = "RMS"

    @property
    def n_key_value_heads(self) -> int:
        return self.n_kv_heads

    @property
    def d_vocab(self) -> int:
        return self.vocab

    @property
    def device(self) -> None:
        """Where TransformerLens' functions put their results: torch's default, wherever the model is."""


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face model: from its row, or of its text stack alone if that can be recognised.

    Raises:
        UnsupportedModel: the architecture has no row and its text layers are not laid out like known ones.
    """
    config: Any = model.config
    kind = getattr(config, "model_type", None)
    row = ROWS.get(kind or "")
    if row is None:
        text = _recognised(model)
        if text is None:
            raise UnsupportedModel(f"no family row for the architecture {kind!r}", f"one of {sorted(ROWS)}", RECIPE)
        _notice(
            f"the architecture {kind!r} has no row: its text layers are laid out like known ones, so it opens "
            "with text points only and without model.inputs(...); try `mech check`"
        )
        return Family(str(kind), text=text, vision=None, projector="")
    inner = getattr(config.text_config, "model_type", None)
    text = TEXT[inner] if inner in TEXT else _recognised(model.get_submodule(row.text))
    if text is not None and inner not in TEXT:
        _notice(
            f"the text model {inner!r} of this {kind!r} model has no row: its layers are laid out like known ones, "
            "but what they do between these parts is not known; try `mech check`"
        )
    if text is None:
        raise UnsupportedModel(f"the text_config of this {kind!r} model is {inner!r}", f"one of {sorted(TEXT)}", RECIPE)
    tower = getattr(config.vision_config, "model_type", None)
    if tower not in VISION:
        _notice(f"the vision tower {tower!r} of this {kind!r} model has no row: its points are not available")
    return Family(
        row.model_type,
        text=replace(text, root=row.text),
        vision=replace(VISION[tower], root=row.vision) if tower in VISION else None,
        projector=row.projector,
        apart=row.apart,
        feature_layer=row.feature_layer,
        needs=row.needs,
        unembed=row.unembed,
    )


def _notice(text: str) -> None:
    warnings.warn(text, PartialSupport, stacklevel=4)


def _recognised(model: nn.Module) -> Stack | None:
    """The stack of the first transformer whose layers are laid out like Llama's, Gemma3's or Cohere2's."""
    for path, module in model.named_modules():
        layers = getattr(module, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(module, "embed_tokens"):
            continue
        for stack in LAYOUTS:
            if all(_is_laid_out(layer, stack) for layer in layers):
                return replace(stack, root=path)
    return None


def _is_laid_out(layer: nn.Module, stack: Stack) -> bool:
    attn = getattr(layer, stack.attn[0], None)
    if attn is None or not hasattr(layer, stack.mlp):
        return False
    if not all(hasattr(attn, name) for name in (stack.q, stack.k, stack.v, stack.o)):
        return False
    norms = {name for name, _ in layer.named_children() if "norm" in name}
    return norms == {"input_layernorm", stack.mid, stack.attn_out, stack.mlp_out} - {""}


def sizes(config: Any, family: Family) -> ModelConfig:
    """Read every size from the Hugging Face config."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    first = text.per_layer_config[0]  # Gemma4 varies its heads by layer, and refuses to name one size
    tower = config.vision_config if family.vision else None
    # Qwen2-VL calls the width of its tower embed_dim and the width of the text hidden_size.
    width = 0 if tower is None else getattr(tower, "embed_dim", None) or tower.hidden_size
    tower_heads = 0 if tower is None else first_of(tower, "num_attention_heads", "num_heads", "attention_heads")
    return ModelConfig(
        family=family.model_type,
        n_layers=text.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=getattr(first, "num_key_value_heads", None) or heads,
        d_model=text.hidden_size,
        d_head=getattr(first, "head_dim", None) or text.hidden_size // heads,
        d_mlp=getattr(text, "intermediate_size", 0),  # absent where every layer is a mixture of experts
        vocab=text.vocab_size,
        vision_layers=0
        if tower is None
        else first_of(tower, "num_hidden_layers", "depth") + getattr(tower, "num_global_layers", 0),
        vision_heads=tower_heads,
        vision_d_model=width,
        vision_d_head=width // tower_heads if tower_heads else 0,
        vision_d_mlp=0 if tower is None else getattr(tower, "intermediate_size", None) or width * tower.mlp_ratio,
    )


def first_of(config: Any, *names: str) -> int:
    """The first of several config fields that is set."""
    return next(value for name in names if (value := getattr(config, name, None)))


def live_vision_layers(config: Any, family: Family, layers: int) -> int:
    """How many of a tower's layers, counted from the first, can reach the logits.

    LLaVA-1.5 takes the output of the second-to-last layer (``vision_feature_layer = -2``): the last layer runs, and
    its output is dropped.
    """
    if not family.feature_layer:
        return layers
    chosen = getattr(config, family.feature_layer)
    indices = [chosen] if isinstance(chosen, int) else list(chosen)
    # Index 0 is the input of layer 0, index l + 1 the output of layer l.
    return max(index % (layers + 1) for index in indices)


def layers_of(model: nn.Module, stack: Stack) -> list[nn.Module]:
    """The layers of a stack, in order."""
    return [layer for path in stack.layers for layer in module_at(model, f"{stack.root}.{path}").children()]


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a row's path.

    Raises:
        UnsupportedModel: this model has no such module, so the row does not describe it.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise UnsupportedModel(
            f"{type(model).__name__} has no module {path!r}",
            "the module paths of its row in mech/model/architectures/rows.py",
            RECIPE,
        ) from None


def part_at(module: nn.Module | None, path: str) -> Any:
    """The object at a path below a module, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
    return module
