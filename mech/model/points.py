"""The activation points: which ones exist, under which names, in which shapes, and how a wrong name is refused.

Names follow TransformerLens: ``blocks.{layer}.attn.hook_z`` for the text stack, ``vision.blocks.{layer}.attn.hook_z``
for the vision stack, and three names without a layer. ``LAYER_POINTS`` is the table.

What writing to a point means, where this is not obvious:

* ``hook_resid_mid`` is the residual stream between attention and MLP: the MLP's input *and* the skip connection change.
  Where attention and MLP read the same stream (Cohere2), it does not exist.
* ``hook_resid_post`` of a text layer is exactly what the next layer receives: anything a model adds between layers
  (Qwen3-VL's DeepStack features) is included, so on visual tokens of such layers it is not ``resid_mid + mlp_out``.
* ``hook_attn_out`` and ``hook_mlp_out`` are what is added to the stream: after a post-norm (Gemma, GLM-4V), a layer
  scale (InternVL's tower) or a gate (Mllama). There ``hook_result``, which precedes these, does not sum to
  ``hook_attn_out``.
* ``hook_rot_k`` sees every key that is attended to, so while generating with a cache it also sees all earlier keys (in
  a sliding-window layer, those the cache still holds); every other point sees only the positions of this step.
  ``hook_k`` and ``hook_v`` come before the cache.
* ``hook_attn_scores`` is masked (``-inf`` where the layer may not attend) and at least float32, as is ``hook_pattern``.
  It includes a softcap but not an attention sink, which takes a share of the pattern: rows then sum to less than one.
* ``hook_z`` is what W_O reads: after the gate where attention is gated (Qwen3.5). ``hook_q`` is the query alone.
* ``hook_result`` is ``z`` times W_O head by head, without the output bias; it is computed only while it is hooked.
* Layers with linear attention or a convolution have no heads: their ``attn.`` points are refused with that reason, and
  ``cfg.attention_layers`` lists the layers that do. A mixture of experts has no ``mlp.hook_post``.
* In layers that attend to a memory (Mllama's, ``cfg.cross_layers``) ``hook_k``, ``hook_v``, ``hook_rot_k`` and every
  ``key_pos`` index the memory (``layout.memory``). Where text sees no picture, the model drops ``hook_mlp_out`` there.
* ``hook_v`` of Gemma4 comes after the value norm: some layers compute keys and values with one projection, which is
  ``hook_k``. What Gemma4 adds after the feed-forward (per-layer inputs) is in ``hook_resid_post`` and has no point.
* The vision stack of the Qwen family sees one row with all patches of all images, in the tower's own order (Qwen2.5-VL
  sorts them by window), and its scores and pattern are block-diagonal over images and windows. Pixtral's does the same,
  block-diagonal over images.
* ``projector.hook_out`` is ``[visual_pos d_model]``: all visual tokens of the call in the order of their
  placeholders. DeepStack features enter later and are not part of it, nor are newlines between rows of tiles; after
  it, LLaVA-NeXT and OneVision drop tokens of the padding, and OneVision interpolates.
* ``ln_final.hook_normalized`` times ``W_U`` gives the logits, before the model's own softcap (Gemma2) or scale.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mech.errors import PointError, suggestion

LAYER_POINTS: dict[str, str] = {
    "hook_resid_pre": "batch pos d_model",
    "attn.hook_q": "batch pos head d_head",
    "attn.hook_k": "batch pos kv_head d_head",
    "attn.hook_v": "batch pos kv_head d_head",
    "attn.hook_rot_q": "batch pos head d_head",
    "attn.hook_rot_k": "batch key_pos kv_head d_head",
    "attn.hook_attn_scores": "batch head query_pos key_pos",
    "attn.hook_pattern": "batch head query_pos key_pos",
    "attn.hook_z": "batch pos head d_head",
    "attn.hook_result": "batch pos head d_model",
    "hook_attn_out": "batch pos d_model",
    "hook_resid_mid": "batch pos d_model",
    "mlp.hook_post": "batch pos d_mlp",
    "hook_mlp_out": "batch pos d_model",
    "hook_resid_post": "batch pos d_model",
}
GLOBAL_POINTS: dict[str, str] = {
    "projector.hook_out": "visual_pos d_model",
    "hook_embed": "batch pos d_model",
    "ln_final.hook_normalized": "batch pos d_model",
}
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


def point_name(point: str, layer: int, stack: str = "text") -> str:
    """``point_name("attn.hook_z", 3)`` is ``"blocks.3.attn.hook_z"``."""
    return f"{'vision.' if stack == 'vision' else ''}blocks.{layer}.{point}"


def behind_features(live: int, layers: int) -> dict[str, str]:
    """The points of vision layers that cannot reach the logits, with the reason."""
    return {
        point_name(point, layer, "vision"): (
            f"vision layer {layer} comes after the selected feature layer: the image features are the output of vision "
            f"layer {live - 1}, and nothing computed later reaches the logits"
        )
        for layer in range(live, layers)
        for point in LAYER_POINTS
    }


def select(names: NamesFilter, live: Sequence[str], refused: Mapping[str, str]) -> list[str]:
    """Turn a name, a list of names or a predicate into names of live points, in the order they fire.

    ``None`` selects every point except ``hook_result``, which is as large as all heads' outputs together and is cached
    only on request.

    Raises:
        PointError: a name is not a point (with the nearest one), a point is not live (with the reason), or a predicate
            matches nothing.
    """
    if names is None:
        return [name for name in live if not name.endswith("hook_result")]
    if callable(names):
        chosen = [name for name in live if names(name)]
        if not chosen:
            raise PointError("the names filter matches no activation point", "at least one", "print model.points()")
        return chosen
    wanted = [names] if isinstance(names, str) else list(names)
    known = set(live)
    for name in wanted:
        if name in refused:
            raise PointError(
                f"{name!r} is not live", refused[name], "choose another layer or point; print model.points()"
            )
        if name not in known:
            raise PointError(
                f"no activation point is called {name!r}", "a name from model.points()", suggestion(str(name), live)
            )
    if not wanted:
        raise PointError("the list of activation points is empty", "at least one name", "print model.points()")
    asked = set(wanted)
    return [name for name in live if name in asked]


def dims_of(name: str) -> str:
    """The dimensions of a point in words: ``"batch pos head d_head"``."""
    return GLOBAL_POINTS.get(name) or LAYER_POINTS[name.split("blocks.")[1].split(".", 1)[1]]


def checked(written: object, value: Tensor, name: str, dims: str) -> Tensor:
    """What a hook returned, if it has the activation's shape: a broadcast would silently be another experiment.

    Raises:
        PointError: it is not a tensor, or has another shape.
    """
    if not isinstance(written, Tensor):
        raise PointError(
            f"the hook at {name!r} returned {type(written).__name__}", "a tensor, or None", "return the activation"
        )
    if written.shape != value.shape:
        raise PointError(
            f"the hook at {name!r} returned the shape {tuple(written.shape)}",
            f"{tuple(value.shape)} ({dims})",
            "return a tensor of the shape that came in; expand it yourself if a broadcast is meant",
        )
    return written.to(value) if (written.dtype, written.device) != (value.dtype, value.device) else written


def fire(point: HookPoint, value: Tensor) -> Tensor:
    """Run a point's hooks on a value and return the value to use in its place."""
    written = point(value)
    return value if written is value else checked(written, value, str(point.name), dims_of(str(point.name)))


def hooked(points: Iterable[HookPoint]) -> bool:
    """Whether any of the points has hooks."""
    return any(point.fwd_hooks or point.bwd_hooks for point in points)
