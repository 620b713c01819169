"""The weights of the text stack under TransformerLens' names, and norms as the linear maps they are at one point.

    model.blocks[3].attn.W_O                  # [head d_head d_model], a view of the stock weight
    model.blocks[3].mlp.W_out, model.W_U, model.b_U
    model.tokens_to_residual_directions(" cat") # the column of W_U

Nothing is folded, centred or copied. ``frozen_norm`` is what takes folding's place: at a given input a norm is a linear
map (its scale is a number there), so parts of the residual stream can be sent through it one by one and still sum to
what the model computed.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mech.errors import InputError, UnsupportedModel
from mech.model.architectures.families import layers_of, module_at, part_at
from mech.model.architectures.stack import Family
from mech.model.hook_sites import attention_of, head_weights


class NamedWeights:
    """What TransformerLens asks of a model's weights, read from the Hugging Face model inside."""

    hf_model: Any
    family: Family
    cfg: Any
    tokenizer: Any

    @property
    def blocks(self) -> list[SimpleNamespace]:
        """``blocks[layer].attn.W_O``, ``.attn.b_O``, ``.mlp.W_out``, ``.mlp.b_out``; None where a layer has none."""
        stack, found = self.family.text, []
        for layer in layers_of(self.hf_model, stack):
            attention, mlp_module = attention_of(layer, stack), part_at(layer, stack.mlp)
            o, down = part_at(attention, stack.o), part_at(mlp_module, stack.down)
            heads = (
                None
                if o is None or not o.weight.is_floating_point()
                else head_weights(o, o.in_features // getattr(attention, "head_dim", self.cfg.d_head))
            )
            attn = SimpleNamespace(W_O=heads, b_O=getattr(o, "bias", None))
            mlp = SimpleNamespace(W_out=None if down is None else down.weight.T, b_out=getattr(down, "bias", None))
            found.append(SimpleNamespace(attn=attn, mlp=mlp))
        return found

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        return self._unembed().weight.T

    @property
    def b_U(self) -> Float[Tensor, " vocab"] | None:
        return self._unembed().bias

    def to_single_token(self, text: str) -> int:
        """The id of a string that is one token.

        Raises:
            InputError: it is several, with their texts.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            pieces = [self.tokenizer.decode([token]) for token in ids]
            raise InputError(f"{text!r} is {len(ids)} tokens: {pieces}", "a string of one token", "give a token id")
        return ids[0]

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Float[Tensor, "*tokens d_model"]:
        """The columns of W_U of these tokens; their product with the *normalised* stream is the logit."""
        index = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        return self._unembed().weight.detach()[index if isinstance(index, int) or index.numel() > 1 else int(index)]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of the output biases of the layers below ``layer``; with ``mlp_input`` its own attention's too."""
        blocks = self.blocks
        biases = [block.attn.b_O for block in blocks[: layer + mlp_input]]
        if include_mlp_biases:
            biases += [block.mlp.b_out for block in blocks[:layer]]
        zero = self._unembed().weight.new_zeros(self.cfg.d_model)
        return torch.stack([zero, *(bias.detach() for bias in biases if bias is not None)]).sum(0)

    def set_use_split_qkv_input(self, use: bool) -> None:
        """TransformerLens' way to let heads read different streams, which a stock model has not.

        Raises:
            UnsupportedModel: it is asked for.
        """
        if use:
            raise UnsupportedModel(
                "use_split_qkv_input: a copy of the residual stream for each head's q, k and v",
                "a stock model, whose heads read one stream", "patch the paths with mech.path_patching",
            )  # fmt: skip

    def norm(self, layer: int, mlp_input: bool = False) -> nn.Module:
        """The norm before attention of a layer, before its MLP, or (``layer=n_layers``) before the unembedding."""
        if layer == self.cfg.n_layers:
            return module_at(self.hf_model, self.family.final_norm)
        block = layers_of(self.hf_model, self.family.text)[layer]
        if mlp_input:
            return module_at(block, self.family.text.mid)
        found = part_at(block, "input_layernorm")
        if found is None:
            raise UnsupportedModel(
                f"layer {layer} of {self.family.model_type} has no norm before its attention",
                "a pre-norm layer", "use apply_ln=False, or the final norm (layer=None)",
            )  # fmt: skip
        return found

    def _unembed(self) -> Any:
        return module_at(self.hf_model, self.family.unembed)


@torch.no_grad()
def frozen_norm(
    norm: Callable[[Tensor], Tensor], stream: Float[Tensor, "*batch d_model"]
) -> Callable[[Tensor], Tensor]:
    """The linear map that a norm is at ``stream``: its scale is taken from there, its weight is its own.

    Works for every norm of the form ``weight * (x - centre * mean(x)) / scale(x) + bias``, whatever its weight is
    called (Gemma adds one to it) and whether it centres (LayerNorm) or not (RMSNorm): the parts are found by probing.

    Returns:
        a function of parts of the stream, ``[... *batch d_model]``; the parts of ``stream`` sum to ``norm(stream) -
        bias``.
    """
    wide = torch.promote_types(stream.dtype, torch.float32)
    ones = torch.ones_like(stream[..., :1, :].reshape(-1, stream.shape[-1])[:1])
    signs = ones.clone()
    signs[:, 1::2] = -1
    # Large enough for the epsilon inside to vanish; of mean zero and mean square one but for the factor.
    weight = ((norm(signs * 1e3) - norm(signs * -1e3)).to(wide) / 2 * signs).reshape(-1)
    bias = ((norm(signs * 1e3) + norm(signs * -1e3)).to(wide) / 2).reshape(-1)
    plain = norm(ones * 1e3).to(wide).reshape(-1)
    centred = bool((plain - bias).norm() < 0.5 * weight.norm())

    def spread(parts: Tensor) -> Tensor:
        parts = parts.to(wide)
        return weight * (parts - parts.mean(-1, keepdim=True) if centred else parts)

    normed = norm(stream).to(wide) - bias
    scale = spread(stream).norm(dim=-1, keepdim=True) / normed.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return lambda parts: (spread(parts) / scale).to(parts.dtype)
