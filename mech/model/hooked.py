"""``HookedMLLM``: a stock Hugging Face multimodal model with TransformerLens hooks.

    model  = HookedMLLM.from_pretrained("reference:llava-m")
    inputs = model.inputs("Which digit is in the red frame?", images=[picture])
    logits, cache = model.run_with_cache(inputs, names_filter=["blocks.3.attn.hook_z"])

    def without_head_5(z, hook):
        z[:, :, 5] = 0
        return z

    with model.hooks([("blocks.3.attn.hook_z", without_head_5)]):
        model.generate_text(inputs, max_new_tokens=4)

The Hugging Face model inside (``.hf_model``) keeps its classes and weights. Torch hooks are attached only while this
wrapper runs it, and only for points that are hooked; its attention implementation is set to ``mech`` until
``unwrap()``. Without hooks the logits are those of transformers with SDPA, bit for bit.

Threads may share a model: their runs take turns, and a block of hooks belongs to the thread that opened it.

The wrapper does not change weights, fold norms or centre anything, so ``hook_resid_*`` are what the model was trained
with. Calling ``.hf_model`` directly runs it without hooks.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedModel

from mech.arguments import Rule, checked, checking, one_of
from mech.errors import InputError, MechError, PointError, UnsupportedModel
from mech.model import attention, hook_sites, run_options, wiring
from mech.model.architectures.families import family_of, module_at, sizes
from mech.model.cache import ActivationCache, Kept, points_until
from mech.model.eager import in_python, original, uncheckpointed, uncompiled
from mech.model.encoding import Encoding
from mech.model.generation import Generating
from mech.model.loading import open_checkpoint, stock_model
from mech.model.named.projections import execution_device
from mech.model.named.weights import NamedWeights
from mech.model.points import NamesFilter, select
from mech.model.turns import Turns


def _is_device(given: Any) -> bool:
    try:
        return bool(torch.device(given))
    except RuntimeError:
        return False


Device = Annotated[torch.device | str, Rule("a device such as 'cpu' or 'cuda:0'", _is_device)]
Hook = tuple[str | Callable[[str], bool], Callable]


class HookedMLLM(Generating, Encoding, NamedWeights, HookedRootModule):
    """A Hugging Face multimodal model whose activations can be read and written by name."""

    weights_here = True  # not in ``LaidOut``

    def __init__(self, hf_model: PreTrainedModel, processor: Any = None, *, name: str | None = None):
        super().__init__()
        self._given = (hf_model,)  # what unwrap() returns; in a tuple so that it is not a submodule
        hf_model = stock_model(hf_model, self.weights_here)
        self.family = family_of(hf_model)
        self.cfg = sizes(hf_model.config, self.family)
        self.hf_model = hf_model
        self.training = hf_model.training
        self.name = name or hf_model.config.name_or_path or type(hf_model).__name__
        self._source: str | None = None
        self.revision: str | None = None
        if hasattr(processor, "check_belongs"):
            processor.check_belongs(hf_model.config)
        self._processor = processor
        self._running = False
        self.turns = Turns()  # lets threads share the model
        self.localized: Any = None  # set while ``mech.localize`` is open
        self.step = hook_sites.Step()
        self._cuts_rows = hook_sites.cuts_rows(module_at(hf_model, self.family.text.root))
        offered, self._refused, live = hook_sites.offered(hf_model, self.family, self.cfg, self.step)
        # Kept in plain dicts, not as submodules: the Hugging Face modules must not be renamed or listed twice.
        self.hook_dict = {site if isinstance(site, str) else site.point: HookPoint() for site in offered}
        for point, hook_point in self.hook_dict.items():
            hook_point.name = point
        self.mod_dict = dict(self.hook_dict)
        self._sites = [site for site in offered if not isinstance(site, str)]
        self._observers: dict[str, list[attention.Observer]] = {"text": [], "vision": []}
        self._layers = wiring.attention_layers(self, live)
        self.cfg = hook_sites.measured(self.cfg, self._layers, self._sites)
        self._untie = wiring.tie(self)

    @classmethod
    @checking(InputError)
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: Device | None = None,
        revision: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        quantization: str | None = None,
    ) -> "HookedMLLM":
        """Open a reference model ("reference:llava-m"), a folder or a hub id, in eval mode, on the GPU if there is one.

        Args:
            name: what to open.
            dtype: dtype of the weights; the checkpoint's own if None.
            device: where to put the whole model.
            revision: of a hub id; for a reference model, a training checkpoint (``mech.reference.revisions``).
            device_map: where to put each part ("auto" spreads them over the GPUs), instead of ``device``.
            quantization: "8bit" or "4bit" weights (the extra ``quant``), without ``hook_result`` and W_O.

        Raises:
            InputError: no such folder; options that exclude each other, or need a package that is not installed.
            UnsupportedModel: no row for it, or its weights are missing, truncated, incomplete or of the wrong shape.
        """
        hf_model, source = open_checkpoint(
            name, dtype=dtype, device=device, revision=revision, device_map=device_map, quantization=quantization
        )
        model = cls(hf_model, name=str(name))
        model._source, model.revision = source, revision
        return model

    @classmethod
    def from_hf(cls, hf_model: PreTrainedModel, processor: Any = None, *, name: str | None = None) -> "HookedMLLM":
        """Wrap a loaded model; ``processor`` is a ``mech.inputs.Processor`` or a Hugging Face processor.

        For a PEFT model, or one inside ``DistributedDataParallel``, the model inside runs, adapters included.
        Everything read from it is what the merged model would give.

        Raises:
            UnsupportedModel: no row for it; or a wrapper around it changes what it computes or where its weights are.
        """
        return cls(hf_model, processor, name=name)

    def unwrap(self) -> Any:
        """Restore and return the model that was passed in. This wrapper cannot run afterwards.

        A wrapper that is garbage-collected restores its model too.
        """
        if self._untie.alive and self._untie():
            self.hf_model.set_attn_implementation(self._stock_attention)
        self._layers, self._sites = [], []
        return self._given[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> "HookedMLLM":
        """A copy with its own weights, wrapped again; hooks stay with the original."""
        if self.localized is not None:
            raise MechError("a copy of a localized model", "the model itself", "copy it outside mech.localize")
        with self.turns.taken():
            copied = copy.deepcopy(self.hf_model, memo)
        copied.set_attn_implementation(self._stock_attention)
        made = type(self)(copied, self._processor, name=self.name)
        made._source, made.revision = self._source, self.revision
        return made

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise MechError(
            "a wrapped model cannot be pickled",
            "its weights, or copy.deepcopy(model) for a second one in this process",
            "save model.hf_model.save_pretrained(folder), and open the folder",
        )  # fmt: skip

    def __repr__(self) -> str:
        cfg, count = self.cfg, sum(parameter.numel() for parameter in self.hf_model.parameters())
        return (
            f"HookedMLLM({self.name!r}, {cfg.family}, text {cfg.n_layers} x {cfg.n_heads} heads, "
            f"vision {cfg.vision_layers} x {cfg.vision_heads} heads, {count / 1e6:.1f}M parameters)"
        )

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the Hugging Face model inside, as ``torch.nn.Module.compile``; runs with hooks stay eager."""
        self.hf_model.compile(*args, **options)

    # -- running ------------------------------------------------------------------------------------------------------

    @in_python
    def forward(
        self,
        inputs: Any = None,
        *,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
        **tensors: Any,
    ) -> Any:
        """Logits for ``Inputs``, a mapping of tensors, or the Hugging Face model's own keyword arguments.

        Args:
            inputs: what to run.
            return_type: "logits", "loss" (of the next text token, in nats), "both" (a pair), or None.
            loss_per_token: return the loss of every token after the first instead of the mean.
            stop_at_layer: stop before this layer and return the residual stream that enters it.
            tensors: keyword arguments of the Hugging Face model's forward.

        Raises:
            InputError: an unknown keyword, tensors that do not belong together, or another model's inputs.
        """
        given = self._tensors(inputs, tensors)
        run_options.check_returned(return_type, loss_per_token, stop_at_layer, given, self.hf_model.config)
        if "past_key_values" not in given:
            given.setdefault("use_cache", False)
        if stop_at_layer is not None:
            layer = run_options.layer_of(stop_at_layer, self.cfg.n_layers)
            return run_options.stopped(self, layer, lambda: self._run(inputs, given))
        logits = self._run(inputs, given)
        if return_type in ("logits", None):
            return logits if return_type else None
        loss = run_options.next_token_loss(logits, given, self.hf_model.config, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def _run(self, inputs: Any, given: dict[str, Any]) -> Float[Tensor, "batch pos vocab"]:
        with self.turns.taken(running=True), self._localized_run(inputs, given), self._attached():
            # torch.compile returns another module around the model.
            run: Any = self._given[0] if original(self._given[0]) is self.hf_model else self.hf_model
            return run(**given).logits

    @contextmanager
    @checking(PointError)
    def hooks(
        self,
        fwd_hooks: Sequence[Hook] = (),
        bwd_hooks: Sequence[Hook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator["HookedMLLM"]:
        """TransformerLens' ``hooks``, with every name checked before any hook is added.

        While the block is open, other threads' runs wait (see ``mech.model.turns``).

        Raises:
            PointError: a name is misspelt or its point is not live, or a predicate matches no point.
            ExperimentError: another thread keeps hooks open without running the model.
        """
        forward: list[Any] = [(point, hook) for names, hook in fwd_hooks for point in self.select(names)]
        backward: list[Any] = [(point, hook) for names, hook in bwd_hooks for point in self.select(names)]
        with self.turns.taken(), super().hooks(forward, backward, reset_hooks_end, clear_contexts):
            yield self

    @checking(PointError)
    def add_hook(self, name: str | Callable[[str], bool], hook: Callable, *args: Any, **options: Any) -> None:
        """TransformerLens' ``add_hook``: the hook stays until ``reset_hooks()``, in all threads' runs."""
        with self.turns.taken():
            for point in self.select(name):
                super().add_hook(point, hook, *args, **options)

    def remove_all_hook_fns(self, *args: Any, **options: Any) -> None:
        """TransformerLens' method, for hooked points only; the original visits every point after every run."""
        for point in self.hook_dict.values():
            if point.fwd_hooks or point.bwd_hooks:
                point.remove_hooks(*args, **options)

    @checking(InputError)
    def run_with_cache(
        self,
        inputs: Any = None,
        *,
        names_filter: NamesFilter = None,
        device: Device | None = None,
        remove_batch_dim: bool = False,
        pos_slice: Any = None,
        incl_bwd: bool = False,
        return_cache_object: bool = True,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **tensors: Any,
    ) -> tuple[Any, Any]:
        """Return what ``forward`` returns, and a cache with a copy of every point that ``names_filter`` selects.

        Args:
            inputs: as in ``forward``, whose other keywords are accepted too.
            names_filter: a name, a list of names, a predicate over names, or None for all but ``hook_result``. Naming
                scores or pattern makes that layer compute attention step by step.
            device: where to keep the copies.
            remove_batch_dim: drop the batch dimension of a single row.
            pos_slice: positions to keep, as TransformerLens' ``Slice`` takes them (-1, a tuple for a range, a list);
                query positions in scores and pattern. Rotated keys, memories and the vision stack are kept whole.
            incl_bwd: differentiate the loss (needs ``return_type="loss"``) and keep its gradient at every cached point
                it depends on, under the point's name plus ``_grad``. No parameter's ``.grad`` changes.
            return_cache_object: False for a plain dict.
            reset_hooks_end: remove hooks at the end, as in ``hooks``.
            clear_contexts: clear their contexts then, too.

        Raises:
            PointError: a name is misspelt, not live or after ``stop_at_layer`` (before the forward), or nothing passed
                through a named point (a vision point without an image).
            InputError: as ``forward``; positions out of range, or ``incl_bwd`` where there can be no gradient.
        """
        chosen = self.select(names_filter)
        by_name = names_filter is not None and not callable(names_filter)
        if (stop := tensors.get("stop_at_layer")) is not None:
            chosen = points_until(chosen, run_options.layer_of(stop, self.cfg.n_layers), by_name)
        cached = Kept.of(self, inputs, tensors, device, pos_slice, incl_bwd, remove_batch_dim)
        with self.hooks([(name, cached.save) for name in chosen], (), reset_hooks_end, clear_contexts):
            returned = self.forward(inputs, **tensors)
            cached.differentiate(returned)
        silent = [name for name in chosen if name not in cached.stored]
        if silent and by_name:
            raise PointError(
                f"nothing passed through {silent[0]!r}", "inputs with an image or a video", "add one, or drop the name"
            )
        cache = ActivationCache(cached.stored, self)
        if remove_batch_dim:
            cache.remove_batch_dim(1)
        return returned, cache if return_cache_object else cache.cache_dict

    @contextmanager
    @checked
    def attending(self, fn: attention.Observer, stack: one_of(("text", "vision")) = "text") -> Iterator["HookedMLLM"]:
        """While open, ``fn`` receives an ``AttentionCall`` from every attention layer of a stack, after z is computed.

        A tensor it returns replaces z (before ``hook_z`` fires); None keeps it. Works in ``generate`` too.
        """
        with self.turns.taken():
            self._observers[stack].append(fn)
            try:
                yield self
            finally:
                self._observers[stack].remove(fn)

    # -- names --------------------------------------------------------------------------------------------------------

    def points(self) -> list[str]:
        """The names of all live points, in the order in which they fire."""
        return list(self.hook_dict)

    @checking(PointError)
    def select(self, names: NamesFilter) -> list[str]:
        """The live points that a name, a list of names or a predicate selects; see ``mech.model.points.select``."""
        return select(names, list(self.hook_dict), self._refused)

    @property
    def device(self) -> torch.device:
        """Where inputs go; if accelerate offloads the weights, the device that computes first."""
        device = self.hf_model.device
        return execution_device(self.hf_model) if device.type == "meta" else device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf_model.dtype

    # -- inside -------------------------------------------------------------------------------------------------------

    def text_attention(self) -> list[attention.LayerRecord]:
        """The attention function's records of the text layers that have heads."""
        self._check_wired()
        return [record for _, record in self._layers if record.stack == "text"]

    def _localized_run(self, *run: Any) -> AbstractContextManager:
        return nullcontext() if self.localized is None else self.localized.running(*run)

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """Attach hooks, run, detach; everything that touches the Hugging Face model is undone here."""
        self._check_wired()
        if self._running:  # a hook that runs the model itself: hooks are already attached
            yield from self.step.held()
            return
        self._running = True
        handles = []
        try:
            # Each is prepended, so the last one attached fires first.
            for site in reversed(self._sites):
                point = self.hook_dict[site.point]
                if point.fwd_hooks or point.bwd_hooks:
                    handles.append(site.attach(point))
            for module, record in self._layers:
                record.active = record.wanted()
                keyword = getattr(self.family, record.stack).windows
                if record.active and keyword:
                    merge = hook_sites.merge_windows(keyword, partial(setattr, record, "windows"))
                    handles.append(module.register_forward_pre_hook(merge, prepend=True, with_kwargs=True))
            busy = bool(handles) or any(record.active for _, record in self._layers)
            root = module_at(self.hf_model, self.family.text.root)
            for first, wanted in ((hook_sites.all_rows, busy or self._cuts_rows), (self.step.begin, busy)):
                if wanted:
                    handles.append(root.register_forward_pre_hook(first, prepend=True, with_kwargs=True))
            # Without a backward pass checkpointing saves nothing, and would drop a cache in train mode.
            plain = uncheckpointed(self.hf_model) if busy or not torch.is_grad_enabled() else nullcontext()
            with plain, uncompiled() if busy else nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()
            for _, record in self._layers:
                record.active, record.windows = False, None
            self._running = False

    def _check_wired(self) -> None:
        """Refuse to run if the points inside attention would silently be dead."""
        if not self._layers:
            raise UnsupportedModel("this model has been unwrapped", "a wrapped model", "call HookedMLLM.from_hf again")
        if not self._running:
            wiring.rewire(self)
        config = self.hf_model.config
        switched = {config.get_text_config()._attn_implementation}
        if self.family.vision is not None:
            switched.add(config.vision_config._attn_implementation)
        if switched != {attention.IMPLEMENTATION}:
            raise UnsupportedModel(
                f"the attention implementation was changed to {sorted(switched - {attention.IMPLEMENTATION})}",
                f"{attention.IMPLEMENTATION!r}, which runs SDPA itself",
                "unwrap() before you change it, then wrap again",
            )
        if any(attention.owner_of(module) is not self for module, _ in self._layers):
            raise UnsupportedModel(
                "this wrapper is a copy, and its hooks are not connected", "a wrapper made by from_hf",
                "copy the Hugging Face model (copy.deepcopy(model.unwrap())) and wrap the copy",
            )  # fmt: skip

    def _tensors(self, inputs: Any, options: Mapping[str, Any], also: Iterable[str] = ()) -> dict[str, Any]:
        """Keyword arguments for the Hugging Face model; refused if they would silently mean something else."""
        if isinstance(inputs, Tensor):
            given: dict[str, Any] = {"input_ids": inputs, **options}
        elif inputs is None or isinstance(inputs, Mapping):
            given = {**(inputs or {}), **options}
        elif not hasattr(inputs, "tensors"):
            raise InputError(
                f"inputs of type {type(inputs).__name__}",
                "Inputs, or a mapping of the tensors the Hugging Face model takes",
                "build them with model.inputs(question, images=...)",
            )
        else:
            self._check_made(inputs)
            given = {**inputs.to(self.device, self.dtype).tensors, **options}
        seen = given.get("mm_encoder_outputs")
        if seen is not None and (not seen or "cross_attention_states" in seen):  # Mllama knows them by this name
            given |= given.pop("mm_encoder_outputs")
        run_options.check_keywords(given, self.hf_model, self.family.text.root, also)
        run_options.check_tensors(given, self.hf_model, self.family)
        return given
