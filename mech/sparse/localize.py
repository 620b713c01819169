"""``localize``: a few heads attend to everything, all others only nearby, in prefill and generation alike.

    fast = mech.localize(model, dense_heads=ranking.top(0.05), sinks=4, window=256)
    fast.generate_text(inputs, max_new_tokens=32)
    print(fast.budgets(8192), fast.nbytes)        # the most it can save; bytes of KV cache the generation held
    fast.close()                                  # or: with mech.localize(model, ...) as fast

While it is open the *model itself* is localized: everything that runs it (``run_with_cache``, ``intervene``, patching,
a study) sees the masked heads, also in ``hook_pattern``; patching then takes whole forwards instead of its faster
sweeps. Closing restores the model. Generation keeps a split cache (``cache.py``), and on a GPU takes a captured step
for each token (``step/``); while attention is hooked or observed it keeps a whole cache, so that every key can be
shown, and saves nothing. ``dense_static`` is the dense twin for comparison.

Limits: linear-attention and convolution layers have no heads and are unchanged; layers that attend to visual tokens
outside the sequence (Mllama) stay dense and say so; families whose layers share keys and values (Gemma 3n, small
Gemma 4) are refused. It does not choose heads: whether they are the right ones, accuracy must show.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DummyLayer, DynamicCache

from mech.arguments import Count, Whole, checked, one_of
from mech.errors import ExperimentError, UnsupportedModel
from mech.indices import Pairs
from mech.inputs import TEXT, Inputs, TokenLayout
from mech.model import AttentionCall, HookedMLLM
from mech.sparse.cache import SplitCache, SplitLayer
from mech.sparse.expect import Expected, expected
from mech.sparse.kernels import by_definition, split_heads
from mech.sparse.masks import Near
from mech.sparse.plan import Plan, start_of
from mech.sparse.policy import PHASES, Budgets, Policy, StillDense
from mech.sparse.step.fixed import FixedCache, FixedLayer
from mech.sparse.step.loop import Loop, Step, Uncaptured, why_not

AUTO = ("auto",)


@checked
def localize(
    model: HookedMLLM,
    policy: Policy | None = None,
    *,
    dense_heads: Pairs = (),
    sinks: Whole | None = None,
    window: Count | None = None,
    keep_text: bool | None = None,
    phase: one_of(PHASES) | None = None,
    graph: bool | one_of(AUTO) = "auto",
    auto: bool = False,
) -> "Localized":
    """Let a few heads attend to everything and all others only to sinks and a window, until the handle is closed.

    Exact: logits and generated tokens are those of the dense model under the masks of ``mech.sparse.masks``, for every
    family, padding and cache.

    Args:
        model: a hooked model.
        policy: a ``Policy`` (from ``Policy.fit``, for example), instead of the arguments that follow.
        dense_heads, sinks, window, keep_text, phase: see ``Policy``, also for defaults.
        graph: how tokens are generated: "auto" captures the step in a CUDA graph on a GPU and uses a growing cache on a
            CPU; True takes the same fixed-shape step everywhere; False never does.
        auto: whether runs for which ``expects`` predicts no gain stay dense, bit for bit.

    Raises:
        ExperimentError: heads of another model; a model that is localized already; a policy and its parts. When it is
            run: a window that is smaller than the question.
        UnsupportedModel: layers that share keys and values.

    Cost: none. Warns (``StillDense``) of layers it leaves dense, and of runs so short that everything is in reach.

    References:
        Xiao et al. 2023 (2309.17453): sinks and a window. Xiao et al. 2024 (2410.10819): by KV head, with a full cache
        for some. 2606.05843: dense heads from RAM; there in 128-token blocks, and decoding stays dense.
    """
    parts: dict[str, Any] = {"sinks": sinks, "window": window, "keep_text": keep_text, "phase": phase}
    parts = {name: value for name, value in parts.items() if value is not None}
    if policy is None:
        policy = Policy(dense_heads, **parts)
    elif tuple(dense_heads) or parts:
        given = " and ".join(["dense_heads"] * bool(tuple(dense_heads)) + list(parts))
        raise ExperimentError(f"a policy and {given}", "one of the two", f"put {given} into the policy")
    return Localized(model, policy, graph, auto)


@checked
def dense_static(model: HookedMLLM, *, graph: bool | one_of(AUTO) = "auto") -> "Localized":
    """The dense twin that a localized model is to be compared with: the same step of fixed shapes, every head dense.

    Prompts are read as the idle model reads them, bit for bit; tokens are generated from stores that are allocated
    beforehand, on a card in a CUDA graph.

    Args:
        model: a hooked model.
        graph: see ``localize``.

    Raises:
        ExperimentError: a model that is localized already.
        UnsupportedModel: layers that share keys and values.

    Cost: none.
    """
    heads = [(layer, head) for layer in model.cfg.attention_layers for head in range(model.cfg.n_heads)]
    return Localized(model, Policy(heads), graph)


class Localized:
    """What ``localize`` returns: the model under a policy, a context manager or closed by hand."""

    def __init__(self, model: HookedMLLM, policy: Policy, graph: bool | str = "auto", auto: bool = False):
        self.model, self.policy, self.graph, self.auto = model, policy, graph, auto
        policy.check(model)
        if model.localized is not None:
            raise ExperimentError(f"{model.name} is already localized", "one policy at a time", "close() the other")
        self._config = model.hf_model.config.get_text_config(decoder=True)
        layers = DynamicCache(config=self._config).layers
        if any(isinstance(layer, DummyLayer) for layer in layers):
            raise UnsupportedModel(
                f"{model.cfg.family} whose layers share keys and values", "a separate cache in every layer",
                "localize a model of another family",
            )  # fmt: skip
        found = {index: getattr(layer, "sliding_window", None) for index, layer in enumerate(layers)}
        self.windows: dict[int, int] = {index: window for index, window in found.items() if window is not None}
        self.layer_types: tuple[str, ...] = tuple(getattr(self._config, "layer_types", None) or ())
        self.near: Near | None = None
        self._cache: SplitCache | FixedCache | None = None  # of the run
        self._nbytes = 0
        self.step: Step | None = None  # of the last generation at fixed shapes
        self.decoding = ""
        self._said: set[str] = set()
        self._layers = []
        for record in model.text_attention():
            if record.cross:
                _notice(f"layer {record.layer} attends to visual tokens outside the sequence: it stays dense")
                continue
            heads = policy.dense(record.layer, model.cfg.n_heads)
            record.head_mask = LocalLayer(self, heads, Plan.of(heads, model.cfg.kv_heads[record.layer]))
            self._layers.append(record)
        model.localized = self

    def __enter__(self) -> "Localized":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the model back as it was; closing twice does nothing."""
        if self.model.localized is self:
            self.model.localized = None
            for record in self._layers:
                record.head_mask = None
            self.step = None

    def __repr__(self) -> str:
        state = "" if self.model.localized is self else ", closed"
        return f"Localized({self.model.name}, {self.policy!r}{state})"

    # -- running ------------------------------------------------------------------------------------------------------

    def __call__(self, inputs: Any = None, **options: Any) -> Float[Tensor, "batch pos vocab"]:
        """The logits of ``inputs`` under the policy."""
        return self._open().model(inputs, **options)

    def run_with_cache(self, inputs: Any = None, **options: Any):
        """``HookedMLLM.run_with_cache`` under the policy."""
        return self._open().model.run_with_cache(inputs, **options)

    def generate(self, inputs: Any = None, **options: Any) -> Int[Tensor, "batch new_pos"]:
        """``HookedMLLM.generate`` under the policy."""
        return self._open().model.generate(inputs, **options)

    def generate_text(self, inputs: Any, **options: Any) -> list[str]:
        """``HookedMLLM.generate_text`` under the policy."""
        return self._open().model.generate_text(inputs, **options)

    def answer(self, inputs: Any, **options: Any) -> str:
        """``HookedMLLM.answer`` under the policy."""
        return self._open().model.answer(inputs, **options)

    def cache(self, split: bool = True) -> SplitCache:
        """An empty KV cache, for ``past_key_values=``; the first forward with it is the prompt.

        With ``split=False``, or while somebody hooks or observes attention, it keeps every key of every head.
        """
        split &= self.policy.phase != "prefill" and not any(record.has_listeners() for record in self._layers)
        plans: dict[int, Plan] = {record.layer: record.head_mask.plan for record in self._layers}
        return self._made(SplitCache(self._config, plans, split))

    def _made(self, cache: SplitCache) -> SplitCache:
        cache.policy = self.policy
        return cache

    def _cache_for_step(self, free: bool) -> SplitCache:
        """One whose every layer can move into stores of fixed size: whole where every head is dense in decoding."""
        whole = free or self.policy.phase == "prefill"
        plans: dict[int, Plan] = {}
        for record in self._layers:
            mine: LocalLayer = record.head_mask
            plans[record.layer] = (
                Plan.of(torch.ones_like(mine.dense), self.model.cfg.kv_heads[record.layer]) if whole else mine.plan
            )
        return self._made(SplitCache(self._config, plans, True))

    def budgets(self, length: int, text: int = 0) -> Budgets:
        """``Policy.budgets`` for this model's layers."""
        return self.policy.budgets(self.model.cfg, length, text=text, windows=self.windows)

    def expects(self, length: int, new_tokens: int = 1, batch: int = 1) -> Expected:
        """Whether the policy gains on this machine with a prompt of this length, predicted; see ``mech.sparse.expect``.

        Args:
            length: tokens of the prompt.
            new_tokens: that are generated behind it.
            batch: rows.
        """
        return expected(
            self.model, self.policy, length, new_tokens=new_tokens, batch=batch, captured=self.captures,
            windows=self.windows,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that the last generation held at its end; 0 before there was one."""
        return self._nbytes

    # -- what the model asks of it ------------------------------------------------------------------------------------

    @contextmanager
    def running(self, inputs: Any, given: dict[str, Any], config: GenerationConfig | None = None) -> Iterator[None]:
        """One run: the model calls this around it. ``config`` is that of a generation, which gets a cache here."""
        cache = given.get("past_key_values")
        if isinstance(cache, SplitCache) and cache.policy != self.policy:
            raise ExperimentError(
                "a split cache of another policy", "one made under this policy, which decides what each layer keeps",
                "make a new one with cache()",
            )  # fmt: skip
        begun = cache.near if isinstance(cache, SplitCache) else None
        new_tokens = None if config is None else config.max_new_tokens or 0
        near = self._begin(inputs, given, cache, new_tokens) if begun is None else begun
        if config is not None and cache is None and config.use_cache and not config.cache_implementation:
            given["past_key_values"] = cache = self._cache_of(near, given, config)
        before = self.near, self._cache
        self.near, self._cache = near, cache if isinstance(cache, SplitCache) else None
        if isinstance(cache, SplitCache):
            cache.near = near
        try:
            yield
            self._nbytes = self._nbytes if self._cache is None else self._cache.nbytes
        finally:
            self.near, self._cache = before

    def _cache_of(self, near: Near, given: dict[str, Any], config: GenerationConfig) -> SplitCache:
        """The cache of a generation, and what runs it in place of Hugging Face's loop, if something does."""
        self.decoding = "loop"
        if self.graph is True or (self.graph == "auto" and self.captures):
            cache = self._cache_for_step(near.free)
            if not (why := why_not(self.model, cache, given, config)):
                given["custom_generate"] = Loop(self)
                return cache
            self.stays_in_loop(why)
        return self.cache(split=not near.free)

    # -- what the step of fixed shapes asks of it (``mech.sparse.step.loop``) -----------------------------------------

    @property
    def captures(self) -> bool:
        """Whether steps are captured in a CUDA graph: the whole model lies on one card."""
        devices = {parameter.device for parameter in self.model.hf_model.parameters()}
        return self.graph is not False and len(devices) == 1 and devices.pop().type == "cuda"

    def run_on(self, cache: FixedCache) -> None:
        """Attention goes over these stores until the run ends."""
        self._cache = cache

    def stays_in_loop(self, why: str) -> None:
        """Say once why a generation is not a step of fixed shapes."""
        self.decoding = "loop"
        if why not in self._said:
            self._said.add(why)
            warnings.warn(f"generation continues in Hugging Face's loop: {why}", Uncaptured, stacklevel=2)

    def _begin(self, inputs: Any, given: dict[str, Any], cache: Cache | None, new_tokens: int | None) -> Near:
        ids, mask = given["input_ids"], given.get("attention_mask")
        rows, length = ids.shape
        layouts = inputs.layouts if isinstance(inputs, Inputs) else None
        first = torch.zeros(rows, dtype=torch.long, device=ids.device)
        if mask is not None and mask.ndim == 2:
            first = mask.to(torch.uint8).argmax(1)
        prompt = torch.full((rows,), length, device=ids.device)
        past = 0 if cache is None else int(cache.get_seq_length())
        if past:  # somebody's own cache: a single token behind it is being written
            prompt += past if length > 1 else past - length
        if layouts is None:
            if self.policy.keep_text:
                raise ExperimentError(
                    "keep_text=True with plain tensors", "Inputs, whose layout says which positions are text",
                    "build inputs with model.inputs(...), or localize without keep_text",
                )  # fmt: skip
            text = None
        else:
            if len(self.policy.dense_heads) < self.model.cfg.n_heads * len(self._layers):
                check_question(self.policy, layouts)
            text = torch.tensor([(layout.kind == TEXT).tolist() for layout in layouts], device=ids.device)
            if new_tokens is None:
                prompt = torch.tensor(
                    [min(layout.spans.get("answer") or [length]) for layout in layouts], device=ids.device
                )
        reach = self.policy.sinks + self.policy.window
        longest = past + length - int(first.min()) + (new_tokens or 0)
        if longest <= reach and len(self.policy.dense_heads) < self.model.cfg.n_heads * len(self._layers):
            _notice(
                f"{longest} tokens are within {self.policy.sinks} sinks and a window of {self.policy.window}: "
                "every head attends to everything, and the run is dense",
                stacklevel=7,
            )
        free = new_tokens is not None and longest <= self.policy.window
        if self.auto and cache is None and not free:
            found = self.expects(longest - (new_tokens or 0), new_tokens or 0, rows)
            free = found.runs == "dense"
            if free:
                _notice(f"at {longest} tokens the policy gains nothing ({found}): the run is dense", stacklevel=7)
        return Near(self.policy, first, prompt, text if self.policy.keep_text else None, free)

    def _open(self) -> "Localized":
        if self.model.localized is not self:
            raise ExperimentError(f"{self!r} was closed", "one that is open", "call mech.localize again")
        return self


def check_question(policy: Policy, layouts: Sequence[TokenLayout]) -> None:
    """Refuse a window that local heads could not read the question in.

    Raises:
        ExperimentError: a question that is longer than the window.
    """
    longest = max(len(layout.spans.get("question", ())) for layout in layouts)
    if longest > policy.window and not policy.keep_text:
        raise ExperimentError(
            f"a window of {policy.window} with a question of {longest} tokens",
            "a window that holds the question: local heads could not even read it all",
            f"use window={longest} or more, or keep_text=True",
        )


class LocalLayer:
    """One layer under a policy: what the attention function asks."""

    def __init__(self, owner: Localized, dense: Bool[Tensor, " head"], plan: Plan):
        self.owner, self.dense, self.plan = owner, dense, plan

    def seen(self, call: AttentionCall, rows: Tensor) -> Bool[Tensor, "batch head rows key_pos"]:
        """Which keys each head may attend to."""
        keys = start_of(call) + torch.arange(call.k.shape[2], device=rows.device)
        return self._near(call).heads(call.query_start + rows, keys, self.dense)

    def attend(self, call: AttentionCall, dropout: float) -> Float[Tensor, "batch pos head d_head"] | None:
        """z, or None where no head is local."""
        cache = self.owner._cache
        layer = None if cache is None else cache.layers[call.layer]
        if isinstance(layer, FixedLayer):
            return layer.attend(call)
        if isinstance(layer, SplitLayer) and (z := layer.attend(call, dropout)) is not None:
            return z
        near = self._near(call)
        if near.free or bool(self.dense.all()):
            return None
        rows = call.query_start + torch.arange(call.q.shape[2], device=call.q.device)
        local = near.local_rows(rows)
        if not local.any():
            return None
        if local.all():
            return split_heads(call, near, self.plan.to(call.q.device), dropout)
        # A prompt with its answer in one forward, in a policy of one phase.
        return by_definition(call, near, self.dense, dropout)

    def _near(self, call: AttentionCall) -> Near:
        near = self.owner.near
        assert near is not None  # the model runs through HookedMLLM, which says so
        return near.to(call.q.device).of_batch(len(call.q))


def _notice(text: str, stacklevel: int = 4) -> None:
    warnings.warn(text, StillDense, stacklevel=stacklevel)
