"""What a local head may attend to: the definition that the kernels and the cache are checked against.

    near = Near(policy, attention_mask, prompt)
    near.seen(rows, keys)            # batch x row x key: sinks, window, text; the layer's own mask comes on top
    near.heads(rows, keys, dense)    # batch x head x row x key

A key is in the window of a row if it is less than ``window`` positions away: the row itself and the ``window - 1``
before it. Layers that attend ahead (bidirectional attention within an image) see equally far ahead; the layer's mask
decides whether they do. Sinks and, with ``keep_text``, text tokens are *pinned*: seen from everywhere. All of this is
intersected with the layer's own mask (padding, causality, sliding windows, image blocks), so a head never sees more
than before.

Positions count along the row of the batch, padding included: with left padding, a row's sinks come after the padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mech.sparse.policy import Policy


@dataclass(frozen=True, eq=False)
class Near:
    """What a policy means for the rows of one run.

    Attributes:
        policy: the policy, which gives sinks, window and phase.
        first: position of each row's first token.
        prompt: where each row's prompt ends; what follows is decoding, including a teacher-forced answer.
        text: which positions are text, for ``keep_text``; later positions are text too, since they are generated.
        free: whether no head is restricted in this run: it is no longer than the window, or runs dense.
    """

    policy: Policy
    first: Int[Tensor, " batch"]
    prompt: Int[Tensor, " batch"]
    text: Bool[Tensor, "batch pos"] | None = None
    free: bool = False
    _pins: dict[int, Int[Tensor, "batch pin"]] = field(default_factory=dict, repr=False)

    def of_batch(self, batch: int) -> "Near":
        """The same with every row repeated ``batch / rows`` times: generation may continue a prompt in several ways."""
        times = batch // len(self.first)
        if times <= 1:
            return self
        first, prompt = (x.repeat_interleave(times, 0) for x in (self.first, self.prompt))
        text = None if self.text is None else self.text.repeat_interleave(times, 0)
        return Near(self.policy, first, prompt, text, self.free)

    def local_rows(self, rows: Int[Tensor, " row"]) -> Bool[Tensor, "batch row"]:
        """In which rows the policy's phase makes heads local."""
        written = rows >= self.prompt[:, None]
        if self.policy.phase == "both":
            return torch.ones_like(written)
        return written if self.policy.phase == "decode" else ~written

    def pinned(self, keys: Int[Tensor, " key"]) -> Bool[Tensor, "batch key"]:
        """Which positions every row keeps seeing."""
        sinks = (keys >= self.first[:, None]) & (keys < self.first[:, None] + self.policy.sinks)
        if not self.policy.keep_text or self.text is None:
            return sinks
        known = self.text.shape[1]
        return sinks | (keys >= known) | self.text[:, keys.clamp(max=known - 1)]

    def pins(self, stop: int) -> Int[Tensor, "batch pin"]:
        """The pinned positions before ``stop`` of every row, in order, padded with -1."""
        if stop not in self._pins:
            self._pins.clear()  # the layers of one step ask for the same
            if not self.policy.keep_text:
                at = self.first[:, None] + torch.arange(self.policy.sinks, device=self.first.device)
                self._pins[stop] = at.masked_fill(at >= stop, -1)
            else:
                self._pins[stop] = self.listed(0, stop)
        return self._pins[stop]

    def listed(self, start: int, stop: int) -> Int[Tensor, "batch pin"]:
        """The pinned positions from ``start`` to ``stop`` of every row, in order, padded with -1."""
        found = _listed(self.pinned(torch.arange(start, stop, device=self.first.device)))
        return torch.where(found >= 0, found + start, found)

    @cached_property
    def sinks_end(self) -> int:
        """The position from which on no row has sinks."""
        return int(self.first.max()) + self.policy.sinks

    def seen(self, rows: Int[Tensor, " row"], keys: Int[Tensor, " key"]) -> Bool[Tensor, "batch row key"]:
        """Which keys a local head may attend to, before the layer's own mask."""
        window = (rows[:, None] - keys).abs() < self.policy.window
        return window | self.pinned(keys)[:, None]

    def heads(
        self, rows: Int[Tensor, " row"], keys: Int[Tensor, " key"], dense: Bool[Tensor, " head"] | Sequence[bool]
    ) -> Bool[Tensor, "batch head row key"]:
        """The same for every head of a layer: dense ones, and rows of another phase, see everything."""
        if self.free:
            return rows.new_ones(len(self.first), len(dense), len(rows), len(keys), dtype=torch.bool)
        free = (
            torch.as_tensor(dense, device=rows.device)[None, :, None, None] | ~self.local_rows(rows)[:, None, :, None]
        )
        return free | self.seen(rows, keys)[:, None]

    def to(self, device: torch.device) -> "Near":
        """The same on a device."""
        if self.first.device == device:
            return self
        text = None if self.text is None else self.text.to(device)
        return Near(self.policy, self.first.to(device), self.prompt.to(device), text, self.free)


def _listed(chosen: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pin"]:
    """The chosen positions of every row, in order, padded with -1."""
    most = int(chosen.sum(1).max()) if chosen.numel() else 0
    order = torch.argsort((~chosen).to(torch.uint8), dim=1, stable=True)[:, :most]
    return order.masked_fill(~chosen.gather(1, order), -1)
