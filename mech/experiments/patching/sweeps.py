"""How a patching sweep is run: the wavefront, and its literal twin. ``patching.activation_patching`` chooses.

A *cell* is one patch: at one layer (or several at once), one head or all, one set of positions. Both algorithms give
the metric of every cell, and the same one.

``literal`` runs the whole model once for each cell. ``wavefront`` keeps one run of the model that is patched *into*
and does, for a group of cells, a single pass through the layers with one growing batch:

* a cell is *born* at its layer. Where the point lies behind attention (z, attn_out, resid_mid, the MLP) or acts on
  queries only (q, scores, pattern), nothing but the patched rows can change in that layer: only they are run through
  the stock layer, with the keys of the cached run. Keys and values change every later row, so there the layer is run on
  all of them. A patch of the stream is written into it;
* everything behind is run once for all cells that are born already, for the rows that can have changed, against the
  clean keys and values of the earlier ones (``mech.model.partial``); the last layer only for the rows that are read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mech.inputs import Inputs
from mech.model import HookedMLLM
from mech.model.partial.continuation import Continuation, stretch
from mech.model.partial.room import LOGITS, fitting
from mech.model.points import point_name

# point -> how its cells are born
ENTRY = {"hook_resid_pre": 0, "hook_resid_post": 1}  # written into the stream that enters this layer, or the next
BEHIND_ATTENTION = (
    "attn.hook_z", "attn.hook_result", "hook_attn_out", "hook_resid_mid", "mlp.hook_post", "hook_mlp_out",
)  # fmt: skip
QUERIES = ("attn.hook_q", "attn.hook_rot_q", "attn.hook_attn_scores", "attn.hook_pattern")
KEYS = ("attn.hook_k", "attn.hook_rot_k", "attn.hook_v")
SQUARE = ("attn.hook_attn_scores", "attn.hook_pattern")  # [batch head query_pos key_pos]

FEW = 64  # rows that may be run once more, unchanged, beside the variants: cheaper than a pass of their own

Measure = Callable[[Float[Tensor, "variant read vocab"]], Float[Tensor, " variant"]]


@dataclass(frozen=True)
class Cell:
    """One patch. ``head`` is None for all heads, or a point without heads; ``region`` counts the sets of positions."""

    layers: tuple[int, ...]
    head: int | None
    region: int


@dataclass(frozen=True, eq=False)
class Patches:
    """Cells at one point, and the positions that their regions count."""

    point: str
    cells: Sequence[Cell]
    regions: Sequence[Bool[Tensor, "batch pos"]]

    def sums(self, at: Mapping[str, Tensor]) -> Float[Tensor, "batch cell"]:
        """A value of every cell: the sum over its layers, and over heads where it is all of them.

        ``at``: by full name of the point, values over (batch, region) or (batch, region, head).
        """
        values = []
        for cell in self.cells:
            parts = [at[name][:, cell.region] for name in names_of(self.point, cell.layers)]
            parts = [part[:, cell.head] if cell.head is not None else part for part in parts]
            values.append(sum(part.sum(-1) if part.ndim == 2 else part for part in parts))
        return torch.stack(values, 1)


def literal(
    model: HookedMLLM,
    base: Inputs,
    patches: Patches,
    source: Mapping[str, Tensor],
    score: Callable[[Inputs], Float[Tensor, " batch"]],
    tick: Callable[[], None] = lambda: None,
) -> Float[Tensor, "batch cell"]:
    """Every cell by a forward of its own: hooks that write the source's activation at the cell's places."""
    values = []
    for cell in patches.cells:
        heads, region = None if cell.head is None else [cell.head], patches.regions[cell.region]
        hooks = [(name, _edit(source[name], region, heads, name)) for name in names_of(patches.point, cell.layers)]
        with torch.no_grad(), model.hooks(hooks):
            values.append(score(base))
        tick()
    return torch.stack(values, 1)


def names_of(point: str, layers: Sequence[int]) -> list[str]:
    """Full names: ``vision.`` in front of a point is the vision stack; points without a layer stay as they are."""
    if point in ("hook_embed", "projector.hook_out"):
        return [point]
    stack = "vision" if point.startswith("vision.") else "text"
    return [point_name(point.removeprefix("vision."), layer, stack) for layer in layers]


def _edit(
    source: Tensor, where: Bool[Tensor, "batch pos"], heads: Sequence[int] | None, name: str
) -> Callable[[Tensor, HookPoint], Tensor]:
    """A hook that writes ``source`` at some positions of every row, for one head of each row or for all.

    The rows are examples or variants; ``source`` may have one row for all of them.
    """

    def write(value: Tensor, hook: HookPoint) -> Tensor:
        if name == "projector.hook_out":
            chosen = where[:, None]
        elif name.endswith(SQUARE):
            chosen = _for_heads(where, heads, value.shape[1]).transpose(1, 2)[..., None]
        elif value.ndim == 4:
            chosen = _for_heads(where, heads, value.shape[2])[..., None]
        else:
            chosen = where[..., None]
        return torch.where(chosen.to(value.device, non_blocking=True), source.to(value), value)

    return write


def _for_heads(where: Bool[Tensor, "batch pos"], heads: Sequence[int] | None, count: int) -> Bool[Tensor, "b p head"]:
    if heads is None:
        return where[..., None].expand(-1, -1, count)
    chosen = torch.nn.functional.one_hot(torch.as_tensor(heads, device=where.device), count).bool()
    return where[..., None] & chosen[:, None]


@dataclass(eq=False)
class Wavefront:
    """The cells of one example, by a single pass through the layers for each group of them.

    Attributes:
        row: the example of the run that is patched into.
        point: a point of the text stack in ``ENTRY``, ``BEHIND_ATTENTION``, ``QUERIES`` or ``KEYS``.
        source: what is written, by full name of the point; ``[1 ...]``, this example's.
        regions: the patched positions of each region, on the CPU.
    """

    row: Continuation
    point: str
    source: Mapping[str, Tensor]
    regions: Sequence[Bool[Tensor, " pos"]]

    def measure(
        self, cells: Sequence[Cell], measure: Measure, tick: Callable[[], None], check: bool = False
    ) -> Float[Tensor, " cell"]:
        """The metric of every cell. Memory: as much as there is room for, or one column of cells.

        Raises:
            NotResumable: ``check``, and running on an unchanged variant is not the cached run. Before any cell.
            ExperimentError: not even one cell fits into memory; where fewer than usual do, that is said once.
        """
        values: dict[int, Tensor] = {}
        groups = self._groups(cells)
        first, stop = self.row.span(min(map(self._first, self.regions)))
        along = check and stop - first <= FEW
        if check and not along:
            self.row.faithful()
        self.row.kept.room.reserve(self.row.model, max(map(len, groups)) * (stop - first))

        def run(group: Sequence[int]) -> Tensor:
            nonlocal along
            x = self._pass(cells, group, along)
            if along:
                self.row.agree(self.row.logits(x[:1])[0])
                x, along = x[1:], False
            step = max(1, LOGITS // (x.shape[1] * self.row.model.cfg.vocab))
            return torch.cat([measure(self.row.logits(part)) for part in x.split(step)])

        for group in groups:
            for part, found in fitting(self.row.kept.room, group, run):
                for index, value in zip(part, found, strict=True):
                    values[index] = value
                    tick()
        return torch.stack([values[index] for index in range(len(cells))])

    @staticmethod
    def _first(region: Bool[Tensor, " pos"]) -> int:
        return int(region.int().argmax()) if region.any() else len(region) - 1

    def _groups(self, cells: Sequence[Cell]) -> list[list[int]]:
        """Cells that go through the layers together: those that begin at about the same row, in any layer."""
        firsts = [self._first(region) for region in self.regions]
        columns: dict[tuple[int, int, int], list[int]] = {}
        for index, cell in enumerate(cells):
            columns.setdefault((firsts[cell.region], cell.region, -1 if cell.head is None else cell.head), []).append(
                index
            )
        groups: list[list[int]] = []
        room = 0
        for key in sorted(columns):
            column = columns[key]
            if not groups or len(groups[-1]) + len(column) > room:
                first, stop = self.row.span(key[0])
                groups.append([])
                room = max(len(column), self.row.kept.room.held // (stop - first))
            groups[-1] += column
        return [sorted(group, key=lambda i: cells[i].layers) for group in groups]

    def _pass(self, cells: Sequence[Cell], group: Sequence[int], along: bool) -> Float[Tensor, "cell read d_model"]:
        """What leaves the last layer at the read rows, by one pass through the layers.

        ``group`` is in the order of its layers, so births are at the end.
        With ``along`` an unchanged variant goes before them.
        """
        row = self.row
        shift = ENTRY.get(self.point, 0)
        chosen = torch.stack([self.regions[cells[index].region] for index in group])
        changed = chosen.any(0).nonzero()
        first, stop = row.span(int(changed.min()) if len(changed) else len(chosen[0]) - 1)
        rows = torch.arange(first, stop)
        last = len(row) - 1
        x: Tensor | None = row.stream(0)[None, first:stop] if along else None
        for layer in range(len(row) + 1):
            born = [i for i, index in enumerate(group) if cells[index].layers == (layer - shift,)]
            if born and self.point in ENTRY:
                x = _joined(x, self._entering(layer, chosen[born], rows, read=layer > last))
            if born and self.point not in ENTRY:
                x = self._born(layer, x, chosen[born], [cells[group[i]].head for i in born], rows)
            elif x is not None and layer <= last:
                x = self._behind(layer, x, rows)
        assert x is not None  # every group holds a cell
        return x

    def _entering(self, layer: int, chosen: Bool[Tensor, "cell pos"], rows: Tensor, read: bool) -> Tensor:
        """The stream that enters a layer with the source's written into it."""
        name = point_name(self.point, layer - ENTRY[self.point])
        places, stream = stretch(self.row.reads if read else rows), self.row.stream(layer)
        chosen = chosen[:, places, None].to(stream.device, non_blocking=True)
        return torch.where(chosen, self.source[name][:, places].to(stream.device), stream[places])

    def _behind(self, layer: int, x: Tensor, rows: Tensor) -> Tensor:
        """The stream behind a layer, of variants that entered it; behind the last one at the read rows only."""
        return self.row.finish(x, rows) if layer == len(self.row) - 1 else self.row.run(layer, x, rows)

    def _born(
        self,
        layer: int,
        x: Float[Tensor, "variant row d_model"] | None,
        chosen: Bool[Tensor, "cell pos"],
        heads: Sequence[int | None],
        rows: Tensor,
    ) -> Float[Tensor, "variant row d_model"]:
        """The stream behind the layer in which these cells are patched, after that of variants born before."""
        row, name, n = self.row, point_name(self.point, layer), len(chosen)
        local, last = self.point not in KEYS, layer == len(row) - 1
        reach = chosen.any(0)
        reach[int(rows[-1]) + 1 :] = False  # rows that no read row depends on
        places = reach.nonzero()[:, 0] if local else rows
        some = None if heads[0] is None else [int(head) for head in heads if head is not None]
        cut = stretch(places) if len(places) else places
        source, chosen = self.source[name], chosen[:, places]
        source = source[:, :, cut] if self.point in SQUARE else source[:, cut]
        entering = row.stream(layer)[None, cut].expand(n, -1, -1)
        after_attention = self.point in BEHIND_ATTENTION
        if (
            x is not None
            and after_attention
            and not last
            and len(places) == len(rows)
            and len(x) + n <= row.at_once(rows)
        ):  # few rows: a layer's weights are read once for old and new variants
            chosen = torch.nn.functional.pad(chosen, (0, 0, len(x), 0))
            edit = _edit(source, chosen, some if some is None else [0] * len(x) + some, name)
            return row.run(layer, torch.cat((x, entering)), rows, n_unchanged=n, hooks=[(name, edit)])
        new = row.stream(layer + 1)[None, stretch(rows)].repeat(n, 1, 1)
        if len(places):
            keys = "z" if after_attention else "kept" if local else "own"
            edit = _edit(source, chosen, some, name)
            own = row.run(layer, entering.clone(), places, keys=keys, hooks=[(name, edit)])
            new[:, stretch(places - rows[0])] = own
        old = None if x is None else self._behind(layer, x, rows)
        return _joined(old, new[:, stretch(row.reads - rows[0])] if last else new)


def _joined(x: Tensor | None, new: Tensor) -> Tensor:
    return new if x is None else torch.cat((x, new))
