"""Where generation is, as tensors on the device: which position comes next, and which keys it sees.

    clock.begin()                 # starts a step: what the last one computed is forgotten
    clock.slot(kind)              # where the new key of a store of this kind goes
    clock.seen(kind)              # which of its slots the new token sees
    clock.advance()

Positions count from each row's first token, so left padding has no position: whatever the lengths of the rows, a row
sees the first slots of a store, and a kernel that is given a number of keys needs no mask.

Nothing here reads a number back from the device, and every tensor keeps its shape and address, so a CUDA graph captured
at one position is correct at all later ones. A store of every key is a ring that never wraps around.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mech.sparse.masks import Near
from mech.sparse.policy import Policy


@dataclass(frozen=True)
class Kind:
    """Which keys a store holds: those of the last ``ring`` positions, followed by pinned ones.

    Attributes:
        ring: slots of the ring; position p lies in slot ``p % ring``.
        pinned: whether the pinned keys follow.
        own: the layer's own sliding window, or the length of its chunks.
        chunked: whether the layer sees its own chunk instead of a window.
    """

    ring: int
    pinned: bool = False
    own: int | None = None
    chunked: bool = False

    @property
    def in_front(self) -> bool:
        """Whether the slots that are seen come first: not where a layer's own window drops pinned keys."""
        return not self.pinned or self.own is None or (self.ring == self.own and not self.chunked)


@dataclass(frozen=True, eq=False)
class Seen:
    """Which slots of a store the new token of every row sees.

    Attributes:
        mask: which slots.
        counts: whether these are each row's first slots.
        used: how many there are.
        rows: 0, 1, 2, ...: where the queries of each row begin, and where the last end.
        begins: the same for the slots of each row.
    """

    mask: Bool[Tensor, "batch 1 1 slot"]
    counts: bool
    used: Int[Tensor, " batch"]
    rows: Int[Tensor, " batch_and_1"]
    begins: Int[Tensor, " batch_and_1"]


@dataclass(frozen=True)
class Shape:
    """What a step is made for; another run of the same shape can use it.

    Attributes:
        rows: rows of the batch.
        room: positions, for prompt and new tokens together.
        pins: places for pinned keys.
        pinning: whether tokens yet to be generated will be pinned.
        padded: whether there is padding after the first token of a row.
        uneven: whether rows pin different numbers of keys.
    """

    rows: int
    room: int
    pins: int
    pinning: bool
    padded: bool = False
    uneven: bool = False


class Clock:
    """The position of the token being fed, and what it sees of the stores.

    Attributes:
        position: position of that token, in each row.
        first: where each row's first token stands in the batch: padding comes before it.
        real: which positions are not padding; None if there is no padding.
        pins: positions of the pinned keys, -1 for an empty place.
        next_pin: where the next pinned key goes; the last place takes what is not pinned.
    """

    def __init__(self, shape: Shape, policy: Policy, device: torch.device):
        self.shape, self.sinks, self.keep_text = shape, policy.sinks, policy.keep_text
        self.position = torch.zeros(shape.rows, dtype=torch.long, device=device)
        self.first = torch.zeros(shape.rows, dtype=torch.long, device=device)
        self.real = torch.ones(shape.rows, shape.room, dtype=torch.bool, device=device) if shape.padded else None
        self.pins = torch.full((shape.rows, shape.pins), -1, dtype=torch.long, device=device)
        self.next_pin = torch.zeros(1, dtype=torch.long, device=device)
        self._known: dict[object, Any] = {}

    def load(self, near: Near, seen: int, pins: Int[Tensor, "batch pin"] | None, mask: Tensor | None) -> None:
        """Set the clock to the end of a prompt of ``seen`` positions, with these pinned and this padding mask."""
        self.first.copy_(near.first)
        self.position.copy_(seen - near.first)
        self.pins.fill_(-1)
        count = 0 if pins is None else pins.shape[1]
        if pins is not None:
            self.pins[:, :count] = torch.where(pins < 0, pins, pins - near.first[:, None])
        self.next_pin.fill_(count)
        if self.real is not None and mask is not None:
            at = near.first[:, None] + torch.arange(self.shape.room, device=mask.device)
            known = mask.bool().gather(1, at.clamp(max=mask.shape[1] - 1))
            self.real.copy_(known | (at >= mask.shape[1]))

    def begin(self) -> None:
        """Before a step: pin the new token if it is to stay."""
        self._known.clear()
        if self.shape.pinning:
            pinned = self.position >= 0 if self.keep_text else self.position < self.sinks
            column = torch.where(pinned, self.position, -1)[:, None]
            self.pins.index_copy_(1, self.next_pin, column)

    def advance(self) -> None:
        """After a step."""
        self.position += 1
        if self.shape.pinning:
            self.next_pin.add_(1).clamp_(max=self.shape.pins - 1)

    def slot(self, kind: Kind) -> Int[Tensor, " batch"]:
        """Where the new key of each row goes in the ring of a store."""
        return self._once(("slot", kind.ring), lambda: self.position % kind.ring)

    def seen(self, kind: Kind) -> Seen:
        """Which slots of a store the new token sees."""

        def work_out() -> Seen:
            now = self.position[:, None]
            ring = now - (now - torch.arange(kind.ring, device=now.device)) % kind.ring
            parts = [self._visible(ring, kind)]
            if kind.pinned:  # a pinned key within the window is there already
                parts.append(self._visible(self.pins, kind) & (self.pins <= now - kind.ring))
            return self._of(torch.cat(parts, dim=1), kind)

        return self._once(("seen", kind), work_out)

    def nearby(self, whole: Kind, kind: Kind) -> tuple[Int[Tensor, "batch slot"], Seen]:
        """What a local head sees of a store that keeps more: slots of it, and which of them count.

        Args:
            whole: the store.
            kind: what the store of a local head would be.
        """

        def work_out() -> tuple[Tensor, Seen]:
            now = self.position[:, None]
            at = torch.cat([now - torch.arange(kind.ring, device=now.device), self.pins], dim=1)
            behind = at <= now - kind.ring
            behind[:, : kind.ring] = True
            return at.clamp(min=0) % whole.ring, self._of(self._visible(at, kind) & behind, kind)

        return self._once(("nearby", whole, kind), work_out)

    def _of(self, mask: Bool[Tensor, "batch slot"], kind: Kind) -> Seen:
        rows = torch.arange(len(mask) + 1, dtype=torch.int32, device=mask.device)
        counts = kind.in_front and not self.shape.padded and not self.shape.uneven
        used = mask.sum(-1, dtype=torch.int32)
        return Seen(mask[:, None, None], counts, used, rows, rows * mask.shape[1])

    def _visible(self, at: Int[Tensor, "batch slot"], kind: Kind) -> Bool[Tensor, "batch slot"]:
        """Which positions the layer itself lets the new token see."""
        seen, now = at >= 0, self.position[:, None]
        if kind.chunked and kind.own is not None:
            seen = seen & (at // kind.own == now // kind.own)
        elif kind.own is not None:
            seen = seen & (now - at < kind.own)
        if self.real is not None:
            seen = seen & self.real.gather(1, at.clamp(min=0))
        return seen

    def _once(self, name: object, work_out: Callable[[], Any]) -> Any:
        """Computed once, shared by the layers of one step."""
        if name not in self._known:
            self._known[name] = work_out()
        return self._known[name]
