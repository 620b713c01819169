"""A KV cache that is really smaller: dense groups keep every key, the others keep sinks and a ring of the window.

    cache = fast.cache()                                        # generate makes its own
    fast.model(inputs, past_key_values=cache, use_cache=True)
    cache.nbytes                                                # bytes of the keys and values held

Each layer has a ``SplitLayer``: one store (``stores.py``) for the KV groups that a dense head reads, with every key (or
the layer's own sliding window), and one for the other groups, with the pinned keys and the last ``window``. A layer
takes new keys, returns them unchanged, and then computes attention from what it holds (``attend``). So a family must
pass keys and values on as the cache returned them; one that does not is refused when it happens.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from mech.errors import UnsupportedModel
from mech.model import AttentionCall
from mech.sparse.kernels import dense_heads, fused, near_heads, of_heads
from mech.sparse.masks import Near
from mech.sparse.plan import Keys, Plan, take
from mech.sparse.policy import Policy
from mech.sparse.stores import FullStore, RingStore, Store


class WholeLayer(CacheLayerMixin):
    """A layer that keeps every key, in a reserve that grows by a sixteenth."""

    is_croppable = False
    supports_early_init = False

    def __init__(self, sliding: bool = False):
        super().__init__()
        self.is_sliding, self.seen = sliding, 0
        self.whole = FullStore()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        k, v, _ = self.whole.extend(key_states, value_states)
        return k, v

    def stores(self) -> list[Store]:
        return [self.whole]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0  # masks count every position, held or not

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for store in self.stores())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for store in self.stores():
            store.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for store in self.stores():
            store.select(torch.arange(store.rows).repeat_interleave(repeats))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Stores are made when the first keys come; ``keys`` and ``values`` are empty, but Mllama reads them."""
        self.is_initialized, self.keys, self.values = True, key_states.new_empty(0), value_states.new_empty(0)

    def _refuse(self, *args: Any) -> None:
        raise UnsupportedModel(
            "a generation that drops tokens from the cache or moves keys", "a cache that only grows",
            "generate without an assistant model and without offloading, or with phase='prefill'",
        )  # fmt: skip

    reset = crop = offload = prefetch = _refuse


class SplitLayer(WholeLayer):
    """A layer that keeps every key of some KV groups, and pinned keys and a window of the others.

    If the policy's phase is "decode", all groups are kept whole while the prompt is read; then the layer splits.
    """

    def __init__(self, cache: "SplitCache", plan: Plan, sliding_window: int | None):
        super().__init__(sliding_window is not None)
        self._cache, self.plan, self.sliding_window = cache, plan, sliding_window
        self.split = False
        self.dense: Store = FullStore()
        self.local: RingStore | None = None
        self.given: Tensor | None = None  # the keys of this step, as ``update`` returned them
        self.linear: dict[str, tuple[Tensor, Tensor, int]] = {}  # in a step of several tokens: everything in order

    def empty(self) -> None:
        """Drop what is held: it has moved elsewhere."""
        self.dense, self.local = FullStore(), None

    def stores(self) -> list[Store]:
        found = [self.dense, self.local] if self.split else [self.whole]
        return [store for store in found if store is not None and store.length]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        near, before, new = self._cache.near, self.seen, key_states.shape[2]
        if near is None:
            raise UnsupportedModel(
                "a split cache in a run of the bare Hugging Face model", "a run through the localized model",
                "call fast(inputs, past_key_values=cache), or fast.generate",
            )  # fmt: skip
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.split or near.policy.phase == "both":
            self._start(near, key_states.device)
            self.seen, self.given = before + new, key_states
            self._take(key_states, value_states, before > 0 and new > 1)
            return key_states, value_states
        self.seen = before + new
        k, v = key_states, value_states
        if before or self.seen < int(near.prompt.max()):
            k, v, _ = self.whole.extend(k, v)
        if self.seen >= int(near.prompt.max()):
            self._start(near, key_states.device)
            self._take(k, v, False)
            self.whole = FullStore()
        return k, v

    def attend(self, call: AttentionCall, dropout: float = 0.0) -> Float[Tensor, "batch pos head d_head"] | None:
        """z of all heads over what is held, after ``update``; None where the call itself holds every key.

        Raises:
            UnsupportedModel: the model changed the keys that ``update`` returned.
        """
        given, self.given = self.given, None
        if given is None or self.seen == given.shape[2]:
            return None
        if call.k.data_ptr() != given.data_ptr() or call.k.shape != given.shape:
            raise UnsupportedModel(
                f"keys that layer {call.layer} changes after they were cached", "keys and values passed on unchanged",
                "use phase='prefill', which keeps the whole cache",
            )  # fmt: skip
        assert self._cache.near is not None
        near, plan = self._cache.near.to(call.q.device).of_batch(len(call.q)), self.plan
        if call.q.shape[2] == 1:
            return self._row(call, near, plan, dropout)
        linear, self.linear = self.linear, {}
        parts = []
        if len(plan.whole):
            k, v, start = linear["dense"]
            own = replace(call, mask=None if call.mask is None else call.mask[..., start:])
            runs = [(take(own, run.heads), k[:, run.held], v[:, run.held]) for run in plan.dense_runs]
            z = torch.cat([dense_heads(*run, dropout) for run in runs], dim=1)
            if len(plan.dense) < len(plan.whole_heads):
                beside = near_heads(take(call, plan.whole_heads), Keys.of(k, v, start, near), near, None, dropout)
                z = beside.index_copy(1, plan.inside, z)
            parts.append(z)
        if self.local is not None:
            keys = Keys(*linear["local"], *self.local.pinned)
            parts.append(near_heads(take(call, plan.local_heads), keys, near, None, dropout))
        return torch.cat(parts, dim=1)[:, plan.inverse].transpose(1, 2)

    def _row(
        self, call: AttentionCall, near: Near, plan: Plan, dropout: float
    ) -> Float[Tensor, "batch pos head d_head"]:
        """z of a single query row: generation runs it for every token, so it makes as few calls as possible."""
        parts, q, dense = [], call.q.index_select(1, plan.row), plan.packed.numel()
        for store, heads in ((self.dense if dense else None, slice(dense)), (self.local, slice(dense, None))):
            if store is not None:
                own = of_heads(call, plan.row[heads])
                parts.append(fused(own, q[:, heads], *store.now(call.mask), dropout=dropout))
        if len(plan.dense) < len(plan.whole_heads):
            parts.append(self._beside(call, near, plan, dropout))
        return torch.cat(parts, dim=1).index_select(1, plan.back).transpose(1, 2)

    def _beside(
        self, call: AttentionCall, near: Near, plan: Plan, dropout: float
    ) -> Float[Tensor, "batch head pos d_head"]:
        """All heads of the groups that are kept whole, computed as local ones."""
        mine, policy = take(call, plan.whole_heads), near.policy
        plain = call.mask is None and not policy.keep_text
        if plain and isinstance(self.dense, FullStore) and self.seen >= policy.sinks + policy.window:
            sinks, window = slice(policy.sinks), slice(-policy.window, None)
            k, v = (torch.cat([x[:, :, sinks], x[:, :, window]], dim=2) for x in (self.dense.k, self.dense.v))
            return fused(mine, mine.q, k, v, None, dropout=dropout)
        return near_heads(mine, Keys.of(*self.dense.ordered(), near), near, None, dropout)

    def _start(self, near: Near, device: torch.device) -> None:
        if self.split:
            return
        self.split, self.plan = True, self.plan.to(device)
        self.dense = FullStore() if self.sliding_window is None else RingStore(self.sliding_window, None)
        if len(self.plan.local):
            self.local = RingStore(min(near.policy.window, self.sliding_window or near.policy.window), near)

    def _take(self, k: Tensor, v: Tensor, read: bool) -> None:
        groups, whole = self.plan.groups, self.plan.whole.numel()
        k, v = k.index_select(1, groups), v.index_select(1, groups)
        for name, store, own in (
            ("dense", self.dense, slice(whole)),
            ("local", self.local, slice(whole, None)),
        ):
            if store is None or not k[:, own].shape[1]:
                continue
            if read:
                self.linear[name] = store.extend(k[:, own], v[:, own])
            else:
                store.append(k[:, own], v[:, own])


class SplitCache(DynamicCache):
    """The cache of a localized model, for ``past_key_values=``; layers without a plan are Hugging Face's own.

    Attributes:
        near: what the policy means for the rows of this run; set when the run begins.
        policy: the policy it was made for, which decides what each layer keeps.
    """

    def __init__(self, config: Any, plans: dict[int, Plan], split: bool):
        super().__init__(config=config)
        self.near: Near | None = None
        self.policy: Policy | None = None
        for index, plan in plans.items():
            window = getattr(self.layers[index], "sliding_window", None)
            if split:
                self.layers[index] = SplitLayer(self, plan, window)
            elif window is None:  # a windowed layer holds no more than its window anyway
                self.layers[index] = WholeLayer()

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held, including what is reserved."""
        held = 0
        for layer in self.layers:
            if isinstance(layer, WholeLayer):
                held += layer.nbytes
            else:
                tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
                held += sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return held
