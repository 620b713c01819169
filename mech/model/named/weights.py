"""The weights of the text stack under TransformerLens' names.

    model.W_O[3, 5], model.W_K[3, 1]          # [d_head d_model], [d_model d_head]: stacked over layers
    model.blocks[3].attn.W_O                  # [head d_head d_model], a view of the stock weight
    model.blocks[3].mlp.W_out, model.W_E, model.W_U, model.b_U

These are the weights the model multiplies by, adapters included; nothing is folded or centred. Keys and values have one
matrix for each key/value head, not one for each query head.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mech.errors import InputError, UnsupportedModel
from mech.model.architectures.families import layers_of, module_at, part_at
from mech.model.architectures.stack import Family, Stack
from mech.model.hook_sites import attention_of
from mech.model.named.projections import LinearMap, by_head, embedding, is_quantized, linear_map
from mech.model.named.tokens import Tokens


def _map_at(module: nn.Module | None, path: str) -> LinearMap | None:
    """The map at a path below a module; None if there is none, or its weights are quantized."""
    part = part_at(module, path) if path else None
    return None if part is None or is_quantized(part) else linear_map(part)


def _read(what: str, which: int) -> Any:
    """A property: the matrix (0) or the bias (1) of a projection."""
    return property(lambda self: None if (pair := self.projection(what)) is None else pair[which])


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's attention: ``W_Q``, ``W_K``, ``W_V`` ``[head d_model d_head]``, ``W_O`` ``[head d_head d_model]``.

    Read on access. None where the layer has no such weight, or not in floating point.
    """

    module: nn.Module | None
    stack: Stack
    d_head: int

    def projection(self, letter: str) -> tuple[Tensor, Tensor | None] | None:
        """The matrix, by head, and the bias of "Q", "K", "V" or "O"; all biases but O's are ``[head d_head]``."""
        stack = self.stack
        if letter == "O":
            mapped = _map_at(self.module, stack.o)
            return mapped and (by_head(mapped.weight, mapped.weight.shape[1] // self.d_head), mapped.bias)
        path = {"Q": stack.q, "K": stack.k, "V": stack.values or stack.v}[letter]
        if letter == "V" and part_at(self.module, path) is None:
            path = stack.k if stack.values else path  # values are made from the keys' projection
        mapped = _map_at(self.module, path)
        if mapped is None:
            return None
        width = self.d_head * (2 if stack.gated and letter == "Q" else 1)
        heads: list[Any] = [None if part is None else part.unflatten(0, (-1, width)) for part in mapped]
        if stack.qkv:
            own = part_at(self.module, stack.o).in_features // self.d_head
            shared = (len(heads[0]) - own) // 2
            first = {"Q": 0, "K": own, "V": own + shared}[letter]
            heads = [
                None if matrix is None else matrix[first : first + (own if letter == "Q" else shared)]
                for matrix in heads
            ]
        weight, bias = (None if matrix is None else matrix[:, : self.d_head] for matrix in heads)
        return weight.transpose(1, 2), bias  # type: ignore[union-attr]

    W_Q, b_Q = _read("Q", 0), _read("Q", 1)
    W_K, b_K = _read("K", 0), _read("K", 1)
    W_V, b_V = _read("V", 0), _read("V", 1)
    W_O, b_O = _read("O", 0), _read("O", 1)


@dataclass(frozen=True)
class MLPWeights:
    """One layer's feed-forward: ``W_in``, ``W_gate`` ``[d_model d_mlp]``, ``W_out`` ``[d_mlp d_model]``.

    Read on access. None where the layer has no such weight (experts), or not in floating point.
    """

    module: nn.Module | None
    stack: Stack

    def projection(self, name: str) -> tuple[Tensor, Tensor | None] | None:
        """The matrix and the bias of "in", "gate" or "out"."""
        path = {"in": self.stack.up, "gate": self.stack.gate, "out": self.stack.down}[name]
        mapped = _map_at(self.module, path)
        if mapped is None:
            return None
        weight, bias = mapped
        if name != "out" and self.stack.up == self.stack.gate:  # one projection: the gate, then what it gates
            half = slice(weight.shape[0] // 2) if name == "gate" else slice(weight.shape[0] // 2, None)
            weight, bias = weight[half], None if bias is None else bias[half]
        return weight.T, bias

    W_in, b_in = _read("in", 0), _read("in", 1)
    W_gate = _read("gate", 0)
    W_out, b_out = _read("out", 0), _read("out", 1)


def _stacked(part: str, name: str, doc: str) -> Any:
    """A property that stacks one weight over all layers."""

    def of_all(self: "NamedWeights") -> Tensor:
        return self._over_layers(part, name)

    of_all.__doc__ = f"{doc}, over all layers (a copy; ``blocks[layer].{part}.{name}`` is a view)."
    return property(of_all)


class NamedWeights(Tokens):
    """TransformerLens' weight attributes, read from the Hugging Face model inside."""

    hf_model: Any
    family: Family
    cfg: Any
    name: str
    dtype: torch.dtype

    W_Q = _stacked("attn", "W_Q", "``[layer head d_model d_head]``")
    W_K = _stacked("attn", "W_K", "``[layer kv_head d_model d_head]``")
    W_V = _stacked("attn", "W_V", "``[layer kv_head d_model d_head]``")
    W_O = _stacked("attn", "W_O", "``[layer head d_head d_model]``")
    b_Q = _stacked("attn", "b_Q", "``[layer head d_head]``, zeros where there is none")
    b_K = _stacked("attn", "b_K", "``[layer kv_head d_head]``, zeros where there is none")
    b_V = _stacked("attn", "b_V", "``[layer kv_head d_head]``, zeros where there is none")
    b_O = _stacked("attn", "b_O", "``[layer d_model]``, zeros where there is none")
    W_in = _stacked("mlp", "W_in", "``[layer d_model d_mlp]``")
    W_gate = _stacked("mlp", "W_gate", "``[layer d_model d_mlp]``")
    W_out = _stacked("mlp", "W_out", "``[layer d_mlp d_model]``")
    b_in = _stacked("mlp", "b_in", "``[layer d_mlp]``, zeros where there is none")
    b_out = _stacked("mlp", "b_out", "``[layer d_model]``, zeros where there is none")

    @property
    def blocks(self) -> list[SimpleNamespace]:
        """``blocks[layer].attn.W_O``, ``.attn.b_O``, ``.mlp.W_out``, ``.mlp.b_out``, ...; None where there is none."""
        stack, views = self.family.text, []
        for layer in layers_of(self.hf_model, stack):
            module = attention_of(layer, stack)
            attn = AttentionWeights(module, stack, getattr(module, "head_dim", self.cfg.d_head))
            views.append(SimpleNamespace(attn=attn, mlp=MLPWeights(part_at(layer, stack.mlp), stack)))
        return views

    def _over_layers(self, part: str, name: str) -> Tensor:
        """One weight of all layers.

        Raises:
            UnsupportedModel: a layer lacks it, or has it in another shape.
        """
        blocks = [getattr(block, part) for block in self.blocks]
        weights = [getattr(block, f"W_{name[2:]}") for block in blocks]
        for layer, weight in enumerate(weights):
            if weight is None or weight.shape != weights[0].shape:
                why = self._why_none(blocks[layer], name) if weight is None else "other sizes than layer 0"
                raise UnsupportedModel(
                    f"{name} of all layers of {self.name}, whose layer {layer} has {why}", "layers of one kind",
                    f"read those that have it: model.blocks[layer].{part}.{name}",
                )  # fmt: skip
        if name.startswith("b_"):
            like = [weight[..., 0, :] if name != "b_O" else weight[0, 0] for weight in weights]
            values = [getattr(block, name) for block in blocks]
            weights = [zero.new_zeros(zero.shape) if b is None else b for b, zero in zip(values, like, strict=True)]
        return torch.stack([weight.to(weights[0].device) for weight in weights])

    def _why_none(self, block: AttentionWeights | MLPWeights, name: str) -> str:
        if block.module is None:
            return "no heads"
        stack = self.family.text
        paths = {"Q": stack.q, "K": stack.k, "V": stack.values or stack.v, "O": stack.o, "out": stack.down,
                 "in": stack.up, "gate": stack.gate}  # fmt: skip
        if part_at(block.module, paths[name[2:]]) is not None:
            return "quantized weights"
        if isinstance(block, MLPWeights):
            return "a mixture of experts as its feed-forward"
        return "none of its own: " + stack.absent.get("attn.hook_k", "it takes those of another layer")

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """What each token adds to the stream; scaled if the model scales its embeddings."""
        return embedding(self.hf_model.get_input_embeddings())

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        return linear_map(self._unembed()).weight.T

    @property
    def b_U(self) -> Float[Tensor, " vocab"]:
        """Zeros where the unembedding has no bias."""
        weight, bias = linear_map(self._unembed())
        return weight.new_zeros(len(weight)) if bias is None else bias

    def token_id(self, token: str | int) -> int:
        """The id of a token, given as a string of one token or as an id.

        Raises:
            InputError: a string of several tokens, or an id outside the vocabulary (-5 does not count from its end).
        """
        if isinstance(token, str):
            return self.to_single_token(token)
        known = self.W_U.shape[1]
        if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < known:
            raise InputError(f"the token {token!r}", f"a string, or an id from 0 to {known - 1}", "give its text")
        return int(token)

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Float[Tensor, "*tokens d_model"]:
        """The columns of W_U for these tokens; their product with the *normalised* stream is the logit."""
        if isinstance(tokens, Tensor):
            for token in tokens.flatten().tolist():
                self.token_id(token)
        index = tokens if isinstance(tokens, Tensor) else self.token_id(tokens)
        return self.W_U.detach().T[index if isinstance(index, int) or index.numel() > 1 else int(index)]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The summed output biases of the layers below ``layer``; with ``mlp_input``, of its own attention too."""
        blocks = self.blocks
        biases = [block.attn.b_O for block in blocks[: layer + mlp_input]]
        if include_mlp_biases:
            biases += [block.mlp.b_out for block in blocks[:layer]]
        zero = torch.zeros(self.cfg.d_model, dtype=self.dtype, device=self.device)
        return torch.stack([zero, *(bias.detach().to(zero) for bias in biases if bias is not None)]).sum(0)

    def set_use_split_qkv_input(self, use: bool) -> None:
        """TransformerLens' switch that lets heads read different streams, which a stock model does not support.

        Raises:
            UnsupportedModel: ``use`` is True.
        """
        if use:
            raise UnsupportedModel(
                "use_split_qkv_input: a copy of the residual stream for each head's q, k and v",
                "a stock model, whose heads read one stream", "patch the paths with mech.path_patching",
            )  # fmt: skip

    def norm(self, layer: int, mlp_input: bool = False) -> nn.Module:
        """The norm before a layer's attention, before its MLP, or (``layer=n_layers``) before the unembedding."""
        if layer == self.cfg.n_layers:
            return module_at(self.hf_model, self.family.final_norm)
        block = layers_of(self.hf_model, self.family.text)[layer]
        if mlp_input:
            return module_at(block, self.family.text.mid)
        part = part_at(block, "input_layernorm")
        if part is None:
            raise UnsupportedModel(
                f"layer {layer} of {self.family.model_type} has no norm before its attention",
                "a pre-norm layer", "use apply_ln=False, or the final norm (layer=None)",
            )  # fmt: skip
        return part

    def _unembed(self) -> Any:
        return module_at(self.hf_model, self.family.unembed)
