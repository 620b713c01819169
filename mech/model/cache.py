"""The ``ActivationCache`` that ``run_with_cache`` returns: TransformerLens', adapted to a stock multimodal model.

    _, cache = model.run_with_cache(inputs)
    parts, labels = cache.decompose_resid(return_labels=True)      # sums to the final residual stream
    attributions = cache.logit_attrs(parts, " cat")[:, 0, -1]      # sums to the logit (less the unembedding's bias)

TransformerLens divides by a cached norm scale and expects the norm's weight to be folded into the next matrix. Nothing
is folded here, so ``apply_ln`` passes every part through the norm, weight included, with the scale fixed at the cached
stream (``frozen_norm``). Anything a model adds between layers (Qwen3-VL's DeepStack features) is a separate part called
"remainder".

A cache is stored without its model (``cache.save("run.safetensors")``, ``ActivationCache.load("run.safetensors")``),
and pickled without it too. Methods that need the weights then ask for ``cache.model = model``.

Refused: parts by head or neuron where a post-norm (Gemma) or a gate stands between them and the stream, parts by head
where some layers have no heads, neurons of mixtures of experts, state-space methods, and ``logit_lens``.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import transformer_lens
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.slice import Slice

from mech.errors import InputError, MechError, OutputError, PointError
from mech.files import parse_json, write
from mech.model.architectures.families import ModelConfig
from mech.model.named.norms import frozen_norm
from mech.model.points import dims_of
from mech.model.run_options import is_reached

_KIND = "mech activation cache 1"


class ActivationCache(transformer_lens.ActivationCache):
    """Activations by full name (``cache["blocks.3.attn.hook_z"]``) or shorthand (``cache["z", 3]``)."""

    model: Any

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": _Elsewhere.of(self.model)}

    def __copy__(self) -> "ActivationCache":
        return type(self)(dict(self.cache_dict), self.model, self.has_batch_dim)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ActivationCache":
        return type(self)(copy.deepcopy(self.cache_dict, memo), self.model, self.has_batch_dim)

    def save(self, path: str | Path) -> Path:
        """Write all activations to one safetensors file, atomically and without the model.

        Raises:
            OutputError: the file cannot be written.
        """
        model, seen = _Elsewhere.of(self.model), set()
        tensors: dict[str, Tensor] = {}
        for name, value in self.items():
            value = value.detach().cpu().contiguous()
            # Safetensors refuses tensors that share memory, such as slices of one tensor.
            shared = (start := value.untyped_storage().data_ptr()) in seen
            tensors[name] = value.clone() if shared else value
            seen.add(start)
        about = {
            "model": model.name, "cfg": dataclasses.asdict(model.cfg), "has_batch_dim": self.has_batch_dim,
            "names": list(tensors),
        }  # fmt: skip
        return write(path, save(tensors, {"kind": _KIND, "about": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> "ActivationCache":
        """Read a file written by ``save``, onto the CPU.

        Args:
            path: path of the file.
            model: the hooked model that made it, for methods that need its weights; can be set later (``cache.model``).

        Raises:
            OutputError: there is no such file, it is damaged, or it holds something else.
            InputError: ``model`` has different sizes.
        """
        path = Path(path)
        if not path.is_file():
            raise OutputError(f"there is no file {path}", "a file written by ActivationCache.save", "check the path")
        try:
            with safe_open(path, "pt") as opened:
                header = opened.metadata() or {}
                if header.get("kind") != _KIND:
                    raise OutputError(
                        f"{path} is not an activation cache", "a file written by ActivationCache.save", "check the path"
                    )
                about = parse_json(header["about"])
                tensors = {str(name): opened.get_tensor(name) for name in about["names"]}  # as they fired
            sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about["cfg"].items()}
            cfg = ModelConfig(**sizes)
            origin = _Elsewhere(str(about["model"]), cfg)
            made = cls(tensors, model or origin, has_batch_dim=bool(about["has_batch_dim"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, MechError):
                raise
            raise OutputError(
                f"{path} cannot be read ({type(error).__name__}: {error})", "a complete file", "save it again"
            ) from error
        if model is not None and model.cfg != cfg:
            raise InputError(
                f"a cache of {origin.name} with the model {model.name}, whose sizes differ",
                f"{origin.name}", "load it with the model that made it, or without one",
            )  # fmt: skip
        return made

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "ActivationCache":
        made = super().apply_slice_to_batch_dim(batch_slice)
        return type(self)(made.cache_dict, self.model, made.has_batch_dim)

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

        Anything else the model adds to the stream (DeepStack) is a final part called "remainder".
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
        """Each part's contribution to a layer's input: through its norm, weight included, with the scale frozen.

        The parts of the stream sum to the norm's output less its bias. ``recompute_ln=True`` applies the norm to each
        part separately instead (the logit lens).
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
            "project the result: stack_neuron_results(..., apply_ln=True) @ direction",
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
                "heads that write into the stream", "use hook_result, which comes before it",
            )  # fmt: skip
        if len(cfg.attention_layers) < cfg.n_layers:
            raise MechError(
                f"the heads of all layers of {cfg.family}: only layers {list(cfg.attention_layers)} have heads",
                "a stack of attention layers", "use cache['result', layer] of these layers",
            )  # fmt: skip


class _Elsewhere:
    """What a stored cache knows about its model: name and sizes. Anything else needs the model itself."""

    def __init__(self, name: str, cfg: ModelConfig):
        self.name, self.cfg = name, cfg

    @classmethod
    def of(cls, model: Any) -> "_Elsewhere":
        return cls(model.name, model.cfg)

    def __getattr__(self, asked: str) -> NoReturn:
        if asked.startswith("__"):
            raise AttributeError(asked)
        raise MechError(
            f"model.{asked} of a cache that was stored without its model", "a cache with its model",
            "set cache.model = model, the model that made it",
        )  # fmt: skip


@dataclasses.dataclass
class Kept:
    """What a run stores at the cached points: copies of activations and, on request, their gradients.

    Attributes:
        stored: copies by name; gradients under the name plus ``_grad``.
        device: where copies go; None to leave them where they are.
        positions: which text positions are kept, None for all.
        crossing: the layers whose keys and values are a memory.
        live: the activations themselves, at which gradients are taken; None if no gradient is requested.
    """

    device: torch.device | str | None
    positions: Slice | None
    crossing: tuple[int, ...]
    live: dict[str, Tensor] | None
    stored: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, model: Any, inputs: Any, tensors: Mapping[str, Any], device: Any, pos_slice: Any, incl_bwd: bool,
        remove_batch_dim: bool,
    ) -> "Kept":  # fmt: skip
        """Check the options before the forward, and start with nothing stored.

        Raises:
            InputError: positions out of range, a batch dimension of several rows, or no single loss to differentiate.
        """
        given = inputs if isinstance(inputs, Mapping) else getattr(inputs, "tensors", {"input_ids": inputs})
        ids = {**given, **tensors}.get("input_ids")
        rows, length = ids.shape if isinstance(ids, Tensor) and ids.ndim == 2 else (1, 1)
        if remove_batch_dim and rows != 1:
            raise InputError(f"remove_batch_dim with {rows} rows", "one row", "keep the batch dimension")
        if incl_bwd:
            if tensors.get("return_type") != "loss" or tensors.get("loss_per_token"):
                raise InputError(
                    "incl_bwd without a single loss", "a number to differentiate", "add return_type='loss'"
                )
            if not torch.is_grad_enabled() or not any(p.requires_grad for p in model.hf_model.parameters()):
                raise InputError(
                    "incl_bwd where nothing requires a gradient", "gradients enabled, and weights that require them",
                    "leave torch.no_grad(), or call model.hf_model.requires_grad_(True)",
                )  # fmt: skip
        live: dict[str, Tensor] | None = {} if incl_bwd else None
        return cls(device, _positions(pos_slice, length), model.cfg.cross_layers, live)

    def save(self, value: Tensor, hook: HookPoint) -> None:
        """A hook that stores a copy: some points share memory, and a later hook may write in place."""
        name = str(hook.name)
        self._store(name, name, value.detach())
        if self.live is not None and value.requires_grad:
            self.live[name] = value

    def differentiate(self, returned: Any) -> None:
        """Store the gradient of what the run returned at every point it depends on."""
        if not self.live:
            return
        gradients = torch.autograd.grad(returned, list(self.live.values()), allow_unused=True)
        for name, slope in zip(self.live, gradients, strict=True):
            if slope is not None:
                self._store(name, f"{name}_grad", slope)

    def _store(self, point: str, key: str, value: Tensor) -> None:
        dims = dims_of(point).split()
        axis = next((at for at, dim in enumerate(dims) if dim in ("pos", "query_pos")), None)
        if self.positions is not None and axis is not None and self._counts_positions(point):
            value = self.positions.apply(value, dim=axis)
        self.stored[key] = value.clone() if self.device is None else value.to(self.device, copy=True)

    def _counts_positions(self, point: str) -> bool:
        """Whether a point is indexed by sequence positions, not by patches of pictures or the keys of a memory."""
        parts = point.split(".")
        if parts[0] == "vision":
            return False
        return not (parts[-1] in ("hook_k", "hook_v") and int(parts[1]) in self.crossing)


def _positions(pos_slice: Any, length: int) -> Slice | None:
    if pos_slice is None:
        return None
    try:
        chosen = Slice.unwrap(pos_slice)
        positions = chosen.apply(torch.arange(length))
    except (ValueError, IndexError, TypeError, RuntimeError):
        positions = None
    if positions is None or not positions.numel():
        raise InputError(
            f"pos_slice={pos_slice!r} of {length} positions", f"positions from {-length} to {length - 1}",
            "use a number, (start, stop), or a list of positions",
        )  # fmt: skip
    return chosen


def points_until(chosen: Sequence[str], layer: int, by_name: bool) -> list[str]:
    """Which of the chosen points a run that stops at ``layer`` passes through.

    Raises:
        PointError: one requested by name is not among them, or none is.
    """
    passed = [name for name in chosen if is_reached(name, layer)]
    if not passed or (by_name and len(passed) < len(chosen)):
        behind = next(name for name in chosen if not is_reached(name, layer))
        raise PointError(
            f"{behind!r} in a run that stops at layer {layer}", "points before it",
            "leave the point out, or raise stop_at_layer",
        )  # fmt: skip
    return passed


class _NotCached(PointError, KeyError):
    """A KeyError, for code that catches one, with this package's wording."""

    __str__ = PointError.__str__


def _sliced(positions: Any) -> Slice:
    return positions if isinstance(positions, Slice) else Slice(positions)
