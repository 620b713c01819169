"""A KV cache that is really smaller: dense groups keep every key, the others sinks and a ring of the window.

    cache = fast.cache()                                        # generate makes its own
    fast.model(inputs, past_key_values=cache, use_cache=True)
    cache.nbytes                                                # bytes of keys and values that are held

For each layer a ``SplitLayer``: a ``Store`` of the KV groups a dense head reads, with every key (or the layer's own
sliding window), and one of the other groups, with the pinned keys and the last ``window``. It takes new keys, hands
them back as they are, and keeps for the attention function, which knows the layer, what it has to look at
(``reading``). So a family must pass the keys and values on as the cache returned them: one that does not is refused
when it happens.

Stores grow by a sixteenth, so that a token costs no copy of what is held; what is reserved counts as held.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from mech.errors import UnsupportedModel
from mech.model import AttentionCall
from mech.sparse.kernels import Keys, Plan, dense_heads, fused, near_heads, take
from mech.sparse.masks import Near


class Grown:
    """Keys and values of some KV groups, as long as what was appended, in a larger reserve."""

    def __init__(self, reserve: int = 64):
        self.length, self._reserve = 0, reserve
        self._k: Tensor | None = None
        self._v: Tensor | None = None

    def append(self, k: Float[Tensor, "batch kv_head key d_head"], v: Float[Tensor, "batch kv_head key d_head"]):
        self._room(k, v, k.shape[2])
        for held, new in ((self._k, k), (self._v, v)):
            assert held is not None
            held[:, :, self.length : self.length + new.shape[2]] = new
        self.length += k.shape[2]

    def _room(self, k: Tensor, v: Tensor, more: int) -> None:
        wanted = self.length + more
        if self._k is not None and wanted <= self._k.shape[2]:
            return
        size = wanted + max(self._reserve, wanted // 16) if self._reserve else wanted
        for name, like in (("_k", k), ("_v", v)):
            held = getattr(self, name)
            grown = like.new_empty(*like.shape[:2], size, like.shape[3])
            if held is not None:
                grown[:, :, : self.length] = held[:, :, : self.length]
            setattr(self, name, grown)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Take the keys of the next positions; all of them in order, and the position of the first."""
        self.append(k, v)
        return self.k, self.v, 0

    def ordered(self) -> tuple[Tensor, Tensor, int]:
        """Everything that is held, in order, and the position of the first."""
        return self.k, self.v, 0

    def now(self, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask of everything the newest position sees."""
        return self.k, self.v, mask

    @property
    def k(self) -> Float[Tensor, "batch kv_head key d_head"]:
        assert self._k is not None
        return self._k[:, :, : self.length]

    @property
    def v(self) -> Float[Tensor, "batch kv_head key d_head"]:
        assert self._v is not None
        return self._v[:, :, : self.length]

    @property
    def rows(self) -> int:
        return len(self.k)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self._k, self._v) if x is not None)

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        for name in ("_k", "_v"):
            if (held := getattr(self, name)) is not None:
                setattr(self, name, held[rows.to(held.device)])


class Ring:
    """The last ``window`` keys of some KV groups in a ring, and behind it the pinned ones."""

    def __init__(self, window: int, near: Near | None):
        self.window, self.near, self.seen = window, near, 0
        reserve = 64 if near is not None and near.policy.keep_text else 0
        self._held = Grown(reserve)
        self.pins: Int[Tensor, "batch pin"] | None = None
        self._last_pin, self._padded = -1, False

    def append(self, k: Tensor, v: Tensor) -> None:
        """Take the keys of the next positions."""
        new = k.shape[2]
        if not self._held.length:
            self._held.append(k.new_zeros(*k.shape[:2], self.window, k.shape[3]),
                              v.new_zeros(*v.shape[:2], self.window, v.shape[3]))  # fmt: skip
            self.pins = torch.zeros(len(k), 0, dtype=torch.long, device=k.device)
        if new == 1:
            self._held.k[:, :, self.seen % self.window] = k[:, :, 0]
            self._held.v[:, :, self.seen % self.window] = v[:, :, 0]
        else:
            kept = min(new, self.window)
            slots = torch.arange(self.seen + new - kept, self.seen + new, device=k.device) % self.window
            self._held.k[:, :, slots] = k[:, :, new - kept :]
            self._held.v[:, :, slots] = v[:, :, new - kept :]
        self._pin(k, v)
        self.seen += new

    def _pin(self, k: Tensor, v: Tensor) -> None:
        if self.near is None or (not self.near.policy.keep_text and self.seen >= self.near.sinks_end):
            return
        near = self.near.to(k.device).of_batch(len(k))
        stop = self.seen + k.shape[2]
        at = near.listed(self.seen, stop)
        if not at.shape[1]:
            return
        index = (at - self.seen).clamp(min=0)[:, None, :, None]
        self._held.append(*(x.gather(2, index.expand(*x.shape[:2], -1, x.shape[3])) for x in (k, v)))
        assert self.pins is not None
        self.pins = torch.cat([self.pins, at], dim=1)
        self._last_pin, self._padded = int(at.max()), self._padded or bool((at < 0).any())

    def positions(self) -> Int[Tensor, "batch key"]:
        """The position of every key that is held, -1 for an empty place."""
        assert self.pins is not None
        slots = torch.arange(self.window, device=self.pins.device)
        last = self.seen - 1
        ring = last - (last - slots) % self.window  # negative where nothing has been written yet
        return torch.cat([ring.clamp(min=-1).expand(len(self.pins), -1), self.pins], dim=1)

    def now(self, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask of everything the newest position sees."""
        k, v = self._held.k, self._held.v
        if self.seen <= self.window:  # the ring has not come round: all of it in order, pinned keys included
            here = slice(self.seen)
            return k[:, :, here], v[:, :, here], mask if mask is None else mask[..., here]
        full = self._last_pin <= self.seen - 1 - self.window and not self._padded
        if mask is None and full:
            return k, v, None
        at = self.positions()
        seen = at >= 0
        seen[:, self.window :] &= (
            at[:, self.window :] <= self.seen - 1 - self.window
        )  # in the window it is there already
        seen = seen[:, None, None, :]
        if mask is not None:
            own = mask.expand(len(seen), -1, -1, -1)
            own = own.gather(3, at.clamp(min=0)[:, None, None, :].expand(*own.shape[:3], -1))
            seen = own & seen if own.dtype == torch.bool else own.masked_fill(~seen, float("-inf"))
        return k, v, seen

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Take the keys of the next positions; what a window before them still sees, in order, and them behind it."""
        held = self.ordered() if self.seen else (k[:, :, :0], v[:, :, :0], 0)
        self.append(k, v)
        return torch.cat([held[0], k], dim=2), torch.cat([held[1], v], dim=2), held[2]

    def ordered(self) -> tuple[Tensor, Tensor, int]:
        """The window in order, and the position of its first key."""
        start = max(0, self.seen - self.window)
        slots = torch.arange(start, self.seen, device=self._held.k.device) % self.window
        return self._held.k[:, :, slots], self._held.v[:, :, slots], start

    @property
    def pinned(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, keys and values of the pinned."""
        assert self.pins is not None
        return self.pins, self._held.k[:, :, self.window :], self._held.v[:, :, self.window :]

    @property
    def length(self) -> int:
        return self._held.length

    @property
    def rows(self) -> int:
        return self._held.rows

    @property
    def nbytes(self) -> int:
        return self._held.nbytes

    def select(self, rows: Tensor) -> None:
        self._held.select(rows)
        if self.pins is not None:
            self.pins = self.pins[rows.to(self.pins.device)]


Store = Grown | Ring


class WholeLayer(CacheLayerMixin):
    """A layer that keeps every key, in a reserve that grows by a sixteenth."""

    is_croppable = False
    supports_early_init = False

    def __init__(self, sliding: bool = False):
        super().__init__()
        self.is_sliding, self.seen = sliding, 0
        self.whole = Grown()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        k, v, _ = self.whole.extend(key_states, value_states)
        return k, v

    def stores(self) -> list[Store]:
        return [self.whole]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0  # masks count every position, whatever is held of them

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
        """Stores are made when the first keys come; ``keys`` and ``values`` hold nothing, but Mllama asks for them."""
        self.is_initialized, self.keys, self.values = True, key_states.new_empty(0), value_states.new_empty(0)

    def _refuse(self, *args: Any) -> None:
        raise UnsupportedModel(
            "a generation that takes tokens back, or moves keys elsewhere", "a cache that only grows",
            "generate without an assistant model and without offloading, or with phase='prefill'",
        )  # fmt: skip

    reset = crop = offload = prefetch = _refuse


class SplitLayer(WholeLayer):
    """A layer that keeps every key of some KV groups, and pinned keys and a window of the others.

    While the prompt is read and the policy's phase is "decode", all groups are kept whole; then the layer splits.
    """

    def __init__(self, cache: "SplitCache", plan: Plan, sliding_window: int | None):
        super().__init__(sliding_window is not None)
        self._cache, self._plan, self._own = cache, plan, sliding_window
        self.split = False
        self.dense: Store = Grown()
        self.local: Ring | None = None
        self.given: Tensor | None = None  # the keys of this step, as they were handed back
        self.linear: dict[str, tuple[Tensor, Tensor, int]] = {}  # of a step of several tokens: everything in order

    def stores(self) -> list[Store]:
        found = [self.dense, self.local] if self.split else [self.whole]
        return [store for store in found if store is not None and store.length]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        near, before, new = self._cache.near, self.seen, key_states.shape[2]
        assert near is not None
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
            self.whole = Grown()
        return k, v

    def attend(self, call: AttentionCall, dropout: float = 0.0) -> Float[Tensor, "batch pos head d_head"] | None:
        """z of all heads over what is held, after ``update``; None where the call itself holds every key.

        Raises:
            UnsupportedModel: the model made other keys of those that ``update`` handed back.
        """
        given, self.given = self.given, None
        if given is None or self.seen == given.shape[2]:
            return None
        if call.k.data_ptr() != given.data_ptr() or call.k.shape != given.shape:
            raise UnsupportedModel(
                f"keys that layer {call.layer} changes after they were cached", "keys and values passed on untouched",
                "use phase='prefill', which keeps the whole cache",
            )  # fmt: skip
        assert self._cache.near is not None
        near, plan = self._cache.near.to(call.q.device).of_batch(len(call.q)), self._plan
        linear, self.linear = self.linear, {}
        one, parts = call.q.shape[2] == 1, []
        if len(plan.whole):
            parts.append(self._whole_heads(call, near, plan, linear.get("dense"), dropout))
        if self.local is not None:
            mine = take(call, plan.local_heads)
            if one:
                parts.append(fused(mine, mine.q, *self.local.now(call.mask), dropout=dropout))
            else:
                parts.append(near_heads(mine, Keys(*linear["local"], *self.local.pinned), near, None, dropout))
        return torch.cat(parts, dim=1)[:, plan.inverse].transpose(1, 2)

    def _whole_heads(
        self, call: AttentionCall, near: Near, plan: Plan, linear: tuple[Tensor, Tensor, int] | None, dropout: float
    ) -> Float[Tensor, "batch head pos d_head"]:
        """The heads of groups that are kept whole: dense ones, and local ones beside them."""
        if linear is None:
            packed = take(call, plan.packed.flatten())
            z = fused(packed, packed.q, *self.dense.now(call.mask), dropout=dropout)[:, plan.slots]
        else:
            k, v, start = linear
            own = replace(call, mask=None if call.mask is None else call.mask[..., start:])
            groups = torch.searchsorted(plan.whole, plan.dense_groups)
            z = dense_heads(take(own, plan.dense), k[:, groups], v[:, groups], dropout)
        if len(plan.dense) == len(plan.whole_heads):
            return z
        mine, policy = take(call, plan.whole_heads), near.policy
        plain = linear is None and call.mask is None and not policy.keep_text
        if plain and isinstance(self.dense, Grown) and self.seen >= policy.sinks + policy.window:
            sinks, window = slice(policy.sinks), slice(-policy.window, None)
            k, v = (torch.cat([x[:, :, sinks], x[:, :, window]], dim=2) for x in (self.dense.k, self.dense.v))
            every = fused(mine, mine.q, k, v, None, dropout=dropout)
        else:
            keys = Keys.of(*(linear or self.dense.ordered()), near)
            every = near_heads(mine, keys, near, None, dropout)
        return every.index_copy_(1, plan.inside, z)

    def _start(self, near: Near, device: torch.device) -> None:
        if self.split:
            return
        self.split, self._plan = True, self._plan.to(device)
        self.dense = Grown() if self._own is None else Ring(self._own, None)
        if len(self._plan.local):
            self.local = Ring(min(near.policy.window, self._own or near.policy.window), near)

    def _take(self, k: Tensor, v: Tensor, read: bool) -> None:
        groups = {"dense": self._plan.whole, "local": self._plan.local}
        for name, store in (("dense", self.dense), ("local", self.local)):
            if store is None or not len(groups[name]):
                continue
            own = k[:, groups[name]], v[:, groups[name]]
            if read:
                self.linear[name] = store.extend(*own)
            else:
                store.append(*own)


class SplitCache(DynamicCache):
    """The cache of a localized model, for ``past_key_values=``; layers without such heads are Hugging Face's own.

    Attributes:
        near: what the policy means for the rows of this run; set when it begins.
    """

    def __init__(self, config: Any, plans: dict[int, Plan], split: bool):
        super().__init__(config=config)
        self.near: Near | None = None
        for index, plan in plans.items():
            window = getattr(self.layers[index], "sliding_window", None)
            if split:
                self.layers[index] = SplitLayer(self, plan, window)
            elif window is None:  # a windowed layer holds no more than its window anyway
                self.layers[index] = WholeLayer()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are held, what is reserved included."""
        held = 0
        for layer in self.layers:
            if isinstance(layer, WholeLayer):
                held += layer.nbytes
            else:
                tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
                held += sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return held
