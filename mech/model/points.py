"""The grammar of activation points: what exists, under which name, in which shape, and how a wrong name is refused.

Names are TransformerLens': ``blocks.{layer}.attn.hook_z`` for the text stack, ``vision.blocks.{layer}.attn.hook_z``
for the vision stack, and three without a layer. ``LAYER_POINTS`` is the table.

What writing a point means where it is not obvious:

* ``hook_resid_mid`` is the residual stream between attention and MLP: the MLP's input *and* the skip connection change.
  Where both read the same stream (Cohere2) there is none.
* ``hook_resid_post`` of a text layer is exactly what the next layer receives: what a model adds between layers
  (Qwen3-VL's DeepStack features) is included, so on visual tokens of such layers it is not ``resid_mid + mlp_out``.
* ``hook_attn_out`` and ``hook_mlp_out`` are what is added to the stream: after a post-norm (Gemma, GLM-4V), a layer
  scale (InternVL's tower) or a gate (Mllama). There ``hook_result``, which stands before these, does not sum to it.
* ``hook_rot_k`` sees every key that is attended, so all earlier ones too while generating with a cache (in a layer with
  a sliding window, those the cache still holds); every other point sees the positions of this step only. ``hook_k``
  and ``hook_v`` are written before the cache.
* ``hook_attn_scores`` is masked (``-inf`` where the layer may not attend) and at least float32, as is ``hook_pattern``.
  A softcap is in it; an attention sink is not, and takes from the pattern, whose rows then sum to less than one.
* ``hook_z`` is what W_O reads: behind the gate where attention is gated (Qwen3.5). ``hook_q`` is the query alone.
* ``hook_result`` is ``z`` times W_O head by head, without the output bias; it exists only while somebody hooks it.
* Layers with linear attention or a convolution have no heads: their ``attn.`` points are refused with that reason, and
  ``cfg.attention_layers`` names the others. A mixture of experts has no ``mlp.hook_post``.
* In layers that attend to a memory (Mllama's, ``cfg.cross_layers``) ``hook_k``, ``hook_v``, ``hook_rot_k`` and every
  ``key_pos`` count the memory (``layout.memory``). Text that sees no picture drops ``hook_mlp_out`` there.
* ``hook_v`` of Gemma4 stands behind the norm of values: some layers make keys and values from one projection, which is
  ``hook_k``. What it adds behind the feed-forward (per-layer inputs) is in ``hook_resid_post`` and has no point.
* The vision stack of the Qwen family is one row of all patches of all images, in the order the tower keeps them
  (Qwen2.5-VL sorts them by window), and its scores and pattern are block-diagonal over images and windows. So is
  Pixtral's, over images.
* ``projector.hook_out`` is ``[visual_pos d_model]``: all visual tokens of the call in the order of their
  placeholders. DeepStack features enter later and are not part of it, nor are newlines between rows of tiles;
  LLaVA-NeXT and OneVision drop tokens of the padding behind it, and OneVision interpolates.
* ``ln_final.hook_normalized`` times ``W_U`` is the logits, before a softcap (Gemma2) or scale of the model's own.
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
            f"vision layer {layer} lies behind the selected feature layer: the image features are the output of vision "
            f"layer {live - 1}, and nothing computed later reaches the logits"
        )
        for layer in range(live, layers)
        for point in LAYER_POINTS
    }


def select(names: NamesFilter, live: Sequence[str], refused: Mapping[str, str]) -> list[str]:
    """Turn a name, a list of names or a predicate into names of live points, in the order they fire.

    ``None`` is every point but ``hook_result``, which is as large as all heads' outputs together and is cached only
    when it is asked for.

    Raises:
        PointError: a name is no point (with the nearest one), a point is not live (with the reason), or a predicate
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
    """What a hook returned, if it fits where it is to be written: a broadcast would silently be another experiment.

    Raises:
        PointError: it is no tensor, or its shape is another.
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
    """Run a point's hooks on a value and return what is to be used in its place."""
    written = point(value)
    return value if written is value else checked(written, value, str(point.name), dims_of(str(point.name)))


def hooked(points: Iterable[HookPoint]) -> bool:
    """Whether anybody listens at one of the points."""
    return any(point.fwd_hooks or point.bwd_hooks for point in points)
