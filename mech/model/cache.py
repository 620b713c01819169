"""The ``ActivationCache`` that ``run_with_cache`` returns: TransformerLens' own, right for a stock multimodal model.

    _, cache = model.run_with_cache(inputs)
    parts, labels = cache.decompose_resid(return_labels=True)      # sums to the final residual stream
    attributions = cache.logit_attrs(parts, " cat")[:, 0, -1]      # sums to the logit (less the unembedding's bias)

TransformerLens divides by a cached norm scale and expects the norm's weight to be folded into the next matrix. Nothing
is folded here, so ``apply_ln`` sends every part through the norm as it is at the cached stream, weight included
(``frozen_norm``). And what a model adds between layers (Qwen3-VL's DeepStack features) is a part of its own, called
"remainder".

Refused: parts by head or neuron where a post-norm (Gemma) or a gate stands between them and the stream or some layers
have no heads, neurons of mixtures of experts, state-space methods, and ``logit_lens``.
"""

from typing import Any, Literal, NoReturn

import torch
import transformer_lens
from torch import Tensor
from transformer_lens.utilities.slice import Slice

from mech.errors import MechError, PointError
from mech.model.named.norms import frozen_norm


class ActivationCache(transformer_lens.ActivationCache):
    """Activations by full name (``cache["blocks.3.attn.hook_z"]``) or shorthand (``cache["z", 3]``)."""

    model: Any

    def __getitem__(self, key: Any) -> Tensor:
        try:
            return super().__getitem__(key)
        except KeyError as missing:
            raise _NotCached(
                f"{key!r} is not in the cache", f"one of the {len(self)} cached points",
                f"cache {missing.args[0]!r} too: run_with_cache(..., names_filter=[...])",
            ) from None  # fmt: skip

    def decompose_resid(
        self, layer: int | None = None, mlp_input: bool = False, mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False, pos_slice: Any = None, incl_embeds: bool = True, return_labels: bool = False,
    ) -> Any:  # fmt: skip
        """TransformerLens' ``decompose_resid``; with ``mode="all"`` and embeddings the parts sum to the stream.

        Where the model adds something else to the stream (DeepStack), it is a last part called "remainder".
        """
        split: Any = super().decompose_resid(
            layer, mlp_input=mlp_input, mode=mode, pos_slice=pos_slice, incl_embeds=incl_embeds, return_labels=True
        )
        parts, labels = split
        layer = self._top(layer)
        if mode == "all" and incl_embeds:
            parts, labels = self._with_remainder(parts, labels, layer, mlp_input, pos_slice)
        if apply_ln:
            parts = self.apply_ln_to_stack(parts, layer, mlp_input, pos_slice)
        return (parts, labels) if return_labels else parts

    def apply_ln_to_stack(
        self, residual_stack: Tensor, layer: int | None = None, mlp_input: bool = False, pos_slice: Any = None,
        batch_slice: Any = None, has_batch_dim: bool = True, recompute_ln: bool = False,
    ) -> Tensor:  # fmt: skip
        """What each part contributes to the input of a layer: through its norm, weight included, the scale frozen.

        The parts of the stream sum to the norm's output less its bias. ``recompute_ln=True`` applies the norm to each
        part by itself instead (the logit lens).
        """
        layer = self._top(layer)
        batch = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
        if has_batch_dim:
            residual_stack = batch.apply(residual_stack, dim=1)
        norm = self.model.norm(layer, mlp_input)
        if recompute_ln:
            with torch.no_grad():
                return norm(residual_stack)
        stream = _sliced(pos_slice).apply(self._stream(layer, mlp_input), dim=-2)
        if self.has_batch_dim:
            stream = batch.apply(stream, dim=0)
        return frozen_norm(norm, stream)(residual_stack)

    def get_full_resid_decomposition(
        self, layer: int | None = None, mlp_input: bool = False, expand_neurons: bool = True, apply_ln: bool = False,
        pos_slice: Any = None, return_labels: bool = False, project_output_onto: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """TransformerLens' ``get_full_resid_decomposition``, with the "remainder" that ``decompose_resid`` has.

        Cost: ``layers * (heads + d_mlp) * positions * d_model`` numbers; choose positions with ``pos_slice``.
        """
        layer = self._top(layer)
        split: Any = super().get_full_resid_decomposition(
            layer, mlp_input, expand_neurons, pos_slice=pos_slice, return_labels=True
        )
        parts, labels = split
        parts, labels = self._with_remainder(parts, labels, layer, mlp_input, pos_slice)
        if apply_ln:
            parts = self.apply_ln_to_stack(parts, layer, mlp_input, pos_slice)
        if project_output_onto is not None:
            parts = parts @ project_output_onto
        return (parts, labels) if return_labels else parts

    def compute_head_results(self) -> None:
        self._check_heads()
        super().compute_head_results()

    def stack_head_results(self, *args: Any, **options: Any) -> Any:
        self._check_heads()
        return super().stack_head_results(*args, **options)

    def get_neuron_results(self, layer: int, *args: Any, **options: Any) -> Tensor:
        stack = self.model.family.text
        if stack.mlp_out or stack.mlp_gain or self.model.blocks[layer].mlp.W_out is None:
            raise MechError(
                f"what single neurons of layer {layer} of {self.model.cfg.family} add to the stream",
                "one matrix between neurons and stream (no experts, post-norm or gate)", "use cache['mlp_out', layer]",
            )  # fmt: skip
        return super().get_neuron_results(layer, *args, **options)

    def _stack_neuron_results_apply_ln_projected(self, *_: Any, **__: Any) -> NoReturn:
        raise MechError(
            "apply_ln together with project_output_onto", "one of the two",
            "project what it returns: stack_neuron_results(..., apply_ln=True) @ direction",
        )  # fmt: skip

    def logit_lens(self, **_: Any) -> NoReturn:
        raise MechError(
            "TransformerLens' logit_lens, which reads the modules of a bridge", "a stock model",
            "use cache.accumulated_resid(apply_ln=True) @ model.W_U",
        )  # fmt: skip

    def ssm_layers(self, *_: Any, **__: Any) -> NoReturn:
        raise MechError("a state-space method of the cache", "layers with a state", "this stack has attention layers")

    compute_ssm_state = compute_ssm_effective_attention = ssm_layers

    def _top(self, layer: int | None) -> int:
        return self.model.cfg.n_layers if layer is None or layer == -1 else layer

    def _with_remainder(
        self, parts: Tensor, labels: list[str], layer: int, mlp_input: bool, pos_slice: Any
    ) -> tuple[Tensor, list[str]]:
        rest = _sliced(pos_slice).apply(self._stream(layer, mlp_input), dim=-2) - parts.sum(0)
        # Rounding grows with the number of parts; what a model adds on purpose is far larger.
        if rest.abs().max() > 4 * len(parts) * torch.finfo(rest.dtype).eps * parts.abs().max():
            return torch.cat([parts, rest[None]]), [*labels, "remainder"]
        return parts, labels

    def _stream(self, layer: int, mlp_input: bool) -> Tensor:
        if mlp_input:
            return self["resid_mid", layer]
        top = layer == self.model.cfg.n_layers
        return self["resid_post", layer - 1] if top else self["resid_pre", layer]

    def _check_heads(self) -> None:
        cfg, stack = self.model.cfg, self.model.family.text
        between = f"{stack.attn_out!r} stands" if stack.attn_out else "a gate stands" if stack.attn_gain else ""
        if between:
            raise MechError(
                f"what single heads add to the stream of {cfg.family}: {between} between them and the stream",
                "heads that write into the stream", "use hook_result, before that",
            )  # fmt: skip
        if len(cfg.attention_layers) < cfg.n_layers:
            raise MechError(
                f"the heads of all layers of {cfg.family}: only layers {list(cfg.attention_layers)} have heads",
                "a stack of attention layers", "use cache['result', layer] of these layers",
            )  # fmt: skip


class _NotCached(PointError, KeyError):
    """A KeyError for the code that catches one, with this package's wording."""

    __str__ = PointError.__str__


def _sliced(positions: Any) -> Slice:
    return positions if isinstance(positions, Slice) else Slice(positions)
