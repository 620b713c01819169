"""Where generation is, as tensors on the device: which position comes next, and which keys it sees.

    clock.begin()                 # of a step: what the last one worked out is forgotten
    clock.slot(kind)              # where the new key of a store of this kind goes
    clock.seen(kind)              # which of its slots the new token sees
    clock.advance()

Nothing here reads a number back from the device, and every tensor keeps its shape and its place, so a CUDA graph that
was captured at one position is right at all later ones. A store of every key is a ring that never comes round.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mech.sparse.masks import Near
from mech.sparse.policy import Policy


@dataclass(frozen=True)
class Kind:
    """Which keys a store holds: those of the last ``ring`` positions, and pinned ones behind them.

    Attributes:
        ring: slots of the ring; the position p lies in slot ``p % ring``.
        pinned: whether the pinned keys follow.
        own: the layer's own sliding window, or the length of its chunks.
        chunked: whether the layer sees its own chunk instead of a window.
    """

    ring: int
    pinned: bool = False
    own: int | None = None
    chunked: bool = False


@dataclass(frozen=True)
class Shape:
    """What a step is made for; another run of the same shape can use it.

    Attributes:
        rows: of the batch.
        room: positions, prompt and new tokens together.
        pins: places for pinned keys.
        padded: whether some positions of some rows are padding.
        pinning: whether tokens that are still to be written will be pinned.
    """

    rows: int
    room: int
    pins: int
    padded: bool
    pinning: bool


class Clock:
    """The position of the token that is being fed, and what it sees of the stores.

    Attributes:
        position: of that token.
        first: of each row's first token.
        real: which positions are no padding; None where all are.
        pins: positions of the pinned keys, -1 for an empty place.
        next_pin: where the next pinned key goes; the last place takes what is not pinned.
    """

    def __init__(self, shape: Shape, policy: Policy, device: torch.device):
        self.shape, self.sinks, self.keep_text = shape, policy.sinks, policy.keep_text
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.first = torch.zeros(shape.rows, dtype=torch.long, device=device)
        self.real = torch.ones(shape.rows, shape.room, dtype=torch.bool, device=device) if shape.padded else None
        self.pins = torch.full((shape.rows, shape.pins), -1, dtype=torch.long, device=device)
        self.next_pin = torch.zeros(1, dtype=torch.long, device=device)
        self._known: dict[object, Tensor] = {}

    def load(self, near: Near, seen: int, pins: Int[Tensor, "batch pin"] | None, mask: Tensor | None) -> None:
        """Set it behind a prompt of ``seen`` positions, with these pinned and this padding mask."""
        self.position.fill_(seen)
        self.first.copy_(near.first)
        self.pins.fill_(-1)
        count = 0 if pins is None else pins.shape[1]
        if pins is not None:
            self.pins[:, :count] = pins
        self.next_pin.fill_(count)
        if self.real is not None:
            self.real.fill_(True)
            if mask is not None:
                self.real[:, : mask.shape[1]] = mask.bool()

    def begin(self) -> None:
        """Before a step: pin the new token if it is to stay."""
        self._known.clear()
        if self.shape.pinning:
            inside = (self.position >= self.first) & (self.position < self.first + self.sinks)
            pinned = torch.ones_like(inside) if self.keep_text else inside
            column = torch.where(pinned, self.position, -1)[:, None]
            self.pins.index_copy_(1, self.next_pin, column)

    def advance(self) -> None:
        """After a step."""
        self.position += 1
        if self.shape.pinning:
            self.next_pin.add_(1).clamp_(max=self.shape.pins - 1)

    def slot(self, kind: Kind) -> Int[Tensor, " 1"]:
        """Where the new key goes in the ring of a store."""
        return self._once(("slot", kind.ring), lambda: self.position % kind.ring)

    def seen(self, kind: Kind) -> Bool[Tensor, "#batch 1 1 slot"]:
        """Which slots of a store the new token sees."""

        def work_out() -> Tensor:
            ring = self.position - (self.position - torch.arange(kind.ring, device=self.position.device)) % kind.ring
            ring = ring[None]
            parts = [self._visible(ring, kind)]
            if kind.pinned:  # in the window a pinned key is there already
                parts.append(self._visible(self.pins, kind) & (self.pins <= self.position - kind.ring))
            rows = max(len(part) for part in parts)
            return torch.cat([part.expand(rows, -1) for part in parts], dim=1)[:, None, None]

        return self._once(("seen", kind), work_out)

    @property
    def counts(self) -> bool:
        """Whether a store's first slots are what is seen of it: not under padding, nor if rows keep different text."""
        return self.real is None and (self.shape.rows == 1 or not self.keep_text)

    def used(self, kind: Kind) -> Int[Tensor, " batch"]:
        """How many slots of a store the new token sees."""
        seen = self.seen(kind)
        return self._once(
            ("used", kind), lambda: seen.sum(-1, dtype=torch.int32).flatten().expand(self.shape.rows).contiguous()
        )

    def nearby(self, window: int, whole: Kind, kind: Kind) -> tuple[Int[Tensor, "batch slot"], Bool[Tensor, "..."]]:
        """What a local head sees of a store that keeps more: slots in it, and which of them count.

        Args:
            window: of the local head.
            whole: the store.
            kind: what the store of a local head would be.
        """

        def positions() -> Tensor:
            back = self.position - torch.arange(window, device=self.position.device)
            return torch.cat([back.expand(self.shape.rows, -1), self.pins], dim=1)

        at = self._once(("nearby", window), positions)
        behind = at <= self.position - window
        behind[:, :window] = True
        seen = self._once(("near", kind), lambda: (self._visible(at, kind) & behind)[:, None, None])
        return at.clamp(min=0) % whole.ring, seen

    def _visible(self, at: Int[Tensor, "#batch slot"], kind: Kind) -> Bool[Tensor, "#batch slot"]:
        """Which positions the layer itself lets the new token see."""
        seen = at >= 0
        if kind.chunked and kind.own is not None:
            first = self.first[:, None]
            seen = seen & ((at - first) // kind.own == (self.position - first) // kind.own)
        elif kind.own is not None:
            seen = seen & (self.position - at < kind.own)
        if self.real is not None:
            seen = seen & self.real.gather(1, at.clamp(min=0).expand(self.shape.rows, -1))
        return seen

    def _once(self, name: object, work_out: Callable[[], Tensor]) -> Tensor:
        """What the layers of one step share."""
        if name not in self._known:
            self._known[name] = work_out()
        return self._known[name]
