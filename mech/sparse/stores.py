"""What a cache layer holds for some KV groups: every key, or the pinned ones and a ring of the last ``window``.

    store = RingStore(window, near)
    store.append(k, v)                   # the keys of the next positions
    k, v, mask = store.now(mask)         # all that the newest position sees
    k, v, start = store.extend(k, v)     # the same for several tokens: what they see, in order, themselves included

Both stores have the same methods, so a layer need not know which it has. ``FullStore`` has a reserve of a sixteenth, so
that a token does not copy what is held; the reserve counts as held.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech.sparse.masks import Near


class FullStore:
    """Keys and values of some KV groups, as many as were appended, in a larger buffer."""

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
        """Append the keys of the next positions; returns everything held, in order, and the first position."""
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


class RingStore:
    """The last ``window`` keys of some KV groups in a ring, followed by the pinned ones."""

    def __init__(self, window: int, near: Near | None):
        self.window, self.near, self.seen = window, near, 0
        reserve = 64 if near is not None and near.policy.keep_text else 0
        self._held = FullStore(reserve)
        self.pins: Int[Tensor, "batch pin"] | None = None
        self._last_pin, self._padded = -1, False

    def append(self, k: Tensor, v: Tensor) -> None:
        """Append the keys of the next positions."""
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
        """The position of every key held, -1 for an empty slot."""
        assert self.pins is not None
        slots = torch.arange(self.window, device=self.pins.device)
        last = self.seen - 1
        ring = last - (last - slots) % self.window  # negative where nothing has been written yet
        return torch.cat([ring.clamp(min=-1).expand(len(self.pins), -1), self.pins], dim=1)

    def now(self, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask of everything the newest position sees."""
        k, v = self._held.k, self._held.v
        if self.seen <= self.window:  # the ring has not wrapped around: all of it in order, pinned keys included
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
        """Append the keys of the next positions; returns the window before them and then them, and its start."""
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
        """Positions, keys and values of the pinned tokens."""
        assert self.pins is not None
        return self.pins, self._held.k[:, :, self.window :], self._held.v[:, :, self.window :]

    @property
    def k(self) -> Float[Tensor, "batch kv_head slot d_head"]:
        """The ring, followed by the pinned keys."""
        return self._held.k

    @property
    def v(self) -> Float[Tensor, "batch kv_head slot d_head"]:
        return self._held.v

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


Store = FullStore | RingStore
