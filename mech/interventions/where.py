"""Where and when a spec acts in one run: worked out from the layouts of the inputs, before the run.

Rows of a prompt are chosen by name, region or position; a generated token belongs to the positions "all" and "text". A
teacher-forced answer stands for what decoding would have generated, and is treated the same way.
"""

import zlib
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mech.data.regions import Region
from mech.errors import ExperimentError
from mech.inputs import PADDING, Inputs, TokenLayout
from mech.interventions.reference import TEXT_KIND, kinds
from mech.interventions.specs import PerRow, Where
from mech.model import AttentionCall

N_DRAWS = 4096  # positions after which the sequence of draws repeats


class Plan:
    """One run's positions. ``start`` and ``stop`` index the sequence, generated tokens included."""

    def __init__(self, inputs: Inputs):
        self.layouts = inputs.layouts
        self.length = len(inputs.layouts[0].kind)
        self.kind = torch.stack([kinds(layout) for layout in inputs.layouts])
        # A teacher-forced answer is not part of the prompt: the prompt must not see it, nor its draws depend on it.
        self.prompt_end = torch.tensor([min(layout.spans.get("answer") or [self.length]) for layout in inputs.layouts])
        self.seeds = [
            zlib.crc32(row[:end][row_kind[:end] >= 0].numpy().tobytes())
            for row, row_kind, end in zip(inputs.tensors["input_ids"].cpu(), self.kind, self.prompt_end, strict=True)
        ]
        self._draws: dict[tuple[int, int], Tensor] = {}
        self._chosen: dict[tuple[str, str], Bool[Tensor, "batch pos"]] = {}

    def prepare(self, where: Where, phase: str = "both") -> None:
        """Work out a choice of positions, so that a wrong one is refused before the run."""
        wanted = zip(self._by_row(where), self.layouts, strict=True)
        self._chosen[repr(where), phase] = torch.stack([_chosen(part, phase, layout) for part, layout in wanted])

    def _by_row(self, where: Where) -> Sequence[Where]:
        rows = where.rows if isinstance(where, PerRow) else (where,) * len(self.layouts)
        if len(rows) != len(self.layouts):
            raise ExperimentError(
                f"positions for {len(rows)} rows, but inputs of {len(self.layouts)}",
                "one for each row of the batch",
                "give one for each row, or a single one without PerRow",
            )
        return rows

    def rows(
        self, where: Where, phase: str, start: int, stop: int, written: Sequence[str] = ("all", "text")
    ) -> Bool[Tensor, "batch pos"]:
        """Which positions from ``start`` to ``stop`` are meant; the names in ``written`` include generated ones."""
        known = self._chosen[repr(where), phase][:, start : min(stop, self.length)]
        if stop <= self.length:
            return known
        generated = isinstance(where, str) and where in written and phase != "prefill"
        return torch.cat([known, torch.full((len(known), stop - max(start, self.length)), generated)], dim=1)

    def keys(self, where: Where, call: AttentionCall) -> Bool[Tensor, "batch key_pos"]:
        """Which keys of an attention call are meant: keys of the memory, if the layer attends to one."""
        count = call.k.shape[2]
        if call.cross:
            wanted = zip(self._by_row(where), self.layouts, strict=True)
            return torch.stack([_remembered(part, layout.visual) for part, layout in wanted])
        # A windowed layer's cache has dropped its first keys, and a static one has room for more than was read.
        start = max(0, call.query_start + call.q.shape[2] - count)
        return self.rows(where, "both", start, start + count)

    def kinds(self, start: int, stop: int) -> Int[Tensor, "batch pos"]:
        """Visual or text; padding and generated tokens count as text."""
        kind = torch.nn.functional.pad(self.kind, (0, max(0, stop - self.length)), value=TEXT_KIND)
        return kind[:, start:stop].clamp(min=0)

    def draw(self, seed: int, n: int, start: int, stop: int) -> Int[Tensor, "batch pos"]:
        """Which draw each position takes: the same in every layer and in any batch."""
        rows = []
        for row, of_prompt in enumerate(self.seeds):
            if (seed, row) not in self._draws:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + of_prompt)
                self._draws[seed, row] = torch.randint(n, (N_DRAWS,), generator=generator)
            padding = int((self.kind[row] < 0).sum())
            rows.append(self._draws[seed, row][(torch.arange(start, stop) - padding) % N_DRAWS])
        return torch.stack(rows)


def check_positions(inputs: Inputs, where: Where, phase: str = "both") -> None:
    """Refuse positions that these inputs do not have.

    Raises:
        RegionError: there are none, or a mask has another length.
    """
    Plan(inputs).prepare(where, phase)


def _chosen(where: Where, phase: str, layout: TokenLayout) -> Bool[Tensor, " pos"]:
    chosen = torch.zeros(len(layout.kind), dtype=torch.bool)
    real = torch.as_tensor(layout.kind) != PADDING
    written = torch.zeros_like(chosen)
    written[list(layout.spans.get("answer", ()))] = True
    if isinstance(where, str) and where == "last":
        chosen[int((real & ~written).nonzero()[-1])] = True
    elif layout.memory is not None and _is_region(where):
        return chosen  # its tokens are not in the sequence
    elif isinstance(where, str) and where == "image" and not (kinds(layout) == 1).any():
        return chosen
    else:
        chosen[torch.as_tensor(layout.positions(where))] = True
    if phase == "prefill":
        chosen &= ~written
    elif phase == "decode":
        chosen &= written
    return chosen


def _remembered(where: Where, memory: TokenLayout) -> Bool[Tensor, " key_pos"]:
    chosen = torch.zeros(len(memory), dtype=torch.bool)
    if _is_region(where) or (isinstance(where, str) and where in ("image", "all")):
        chosen[torch.as_tensor(memory.positions(where))] = True
    return chosen


def _is_region(where: Where) -> bool:
    listed = where if isinstance(where, list | tuple) else [where]
    return bool(listed) and all(isinstance(part, Region) for part in listed)


def for_beams(rows: Tensor, batch: int) -> Tensor:
    """Each row repeated, for generation that runs several continuations of it side by side."""
    times = batch // len(rows)
    return rows.repeat_interleave(times, dim=0) if times > 1 else rows
