"""Two ways to run a patching sweep: the wavefront and the literal sweep. ``activation_patching`` chooses one.

A *cell* is one patch: at one layer (or several at once), one head or all, one set of positions. Both algorithms give
the metric of every cell, with the same result.

``literal`` runs the whole model once for each cell. The wavefront caches the run that is patched *into*, and takes each
group of cells through the layers in a single pass with one growing batch:

* A cell is *born* (enters the batch) at its layer. If the point comes after attention (z, attn_out, resid_mid, the MLP)
  or affects queries only (q, scores, pattern), only the patched rows can change in that layer. These rows alone are run
  through the stock layer, with the keys of the cached run. Keys and values affect every later row, so there the layer
  is run on all later rows. A patch of the residual stream is written directly into it.
* Each later layer is run once for all cells in the batch, on the rows that can have changed, with the cached keys and
  values of the rows before them (``mech.model.partial``); the last layer is run only on the rows that are read.
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

# point -> how its cells enter the batch
ENTRY = {"hook_resid_pre": 0, "hook_resid_post": 1}  # written into the stream that enters this layer, or the next
BEHIND_ATTENTION = (
    "attn.hook_z", "attn.hook_result", "hook_attn_out", "hook_resid_mid", "mlp.hook_post", "hook_mlp_out",
)  # fmt: skip
QUERIES = ("attn.hook_q", "attn.hook_rot_q", "attn.hook_attn_scores", "attn.hook_pattern")
KEYS = ("attn.hook_k", "attn.hook_rot_k", "attn.hook_v")
SQUARE = ("attn.hook_attn_scores", "attn.hook_pattern")  # [batch head query_pos key_pos]

FEW = 64  # up to this many unchanged rows run along with the variants as a check: cheaper than a separate pass

Measure = Callable[[Float[Tensor, "variant read vocab"]], Float[Tensor, " variant"]]


@dataclass(frozen=True)
class Cell:
    """One patch. ``head`` is None for all heads or a point without heads; ``region`` indexes the position sets."""

    layers: tuple[int, ...]
    head: int | None
    region: int


@dataclass(frozen=True, eq=False)
class Patches:
    """Cells at one point, and the positions of their regions."""

    point: str
    cells: Sequence[Cell]
    regions: Sequence[Bool[Tensor, "batch pos"]]

    def sums(self, at: Mapping[str, Tensor]) -> Float[Tensor, "batch cell"]:
        """One value per cell: the sum over its layers, and over heads if it covers all of them.

        ``at``: values over (batch, region) or (batch, region, head), by the full name of the point.
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
    """Every cell by its own forward, with hooks that write the source's activation at the cell's positions."""
    values = []
    for cell in patches.cells:
        heads, region = None if cell.head is None else [cell.head], patches.regions[cell.region]
        hooks = [(name, _edit(source[name], region, heads, name)) for name in names_of(patches.point, cell.layers)]
        with torch.no_grad(), model.hooks(hooks):
            values.append(score(base))
        tick()
    return torch.stack(values, 1)


def names_of(point: str, layers: Sequence[int]) -> list[str]:
    """Full names: the prefix ``vision.`` means the vision stack; points without a layer are left unchanged."""
    if point in ("hook_embed", "projector.hook_out"):
        return [point]
    stack = "vision" if point.startswith("vision.") else "text"
    return [point_name(point.removeprefix("vision."), layer, stack) for layer in layers]


def _edit(
    source: Tensor, where: Bool[Tensor, "batch pos"], heads: Sequence[int] | None, name: str
) -> Callable[[Tensor, HookPoint], Tensor]:
    """A hook that writes ``source`` at some positions of every row, for one head per row or for all heads.

    The rows are examples or variants; ``source`` may have one row that serves for all.
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
    """The cells of one example, in one pass through the layers for each group of cells.

    Attributes:
        row: this example in the run that is patched into.
        point: a point of the text stack in ``ENTRY``, ``BEHIND_ATTENTION``, ``QUERIES`` or ``KEYS``.
        source: the values to write for this example, ``[1 ...]``, by the full name of the point.
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
            NotResumable: with ``check``, an unchanged variant does not reproduce the cached run. Raised before any cell
                is measured.
            ExperimentError: not even one cell fits into memory. If fewer fit than usual, there is one warning.
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
        """Cells that pass through the layers together: those that start at about the same row, in any layer."""
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
        """The output of the last layer at the read rows, from one pass through the layers.

        ``group`` is ordered by layer, so new cells are appended at the end. With ``along``, an unchanged variant comes
        first.
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
        assert x is not None  # every group has at least one cell
        return x

    def _entering(self, layer: int, chosen: Bool[Tensor, "cell pos"], rows: Tensor, read: bool) -> Tensor:
        """The stream that enters a layer, with the source's stream written into it at the chosen positions."""
        name = point_name(self.point, layer - ENTRY[self.point])
        places, stream = stretch(self.row.reads if read else rows), self.row.stream(layer)
        chosen = chosen[:, places, None].to(stream.device, non_blocking=True)
        return torch.where(chosen, self.source[name][:, places].to(stream.device), stream[places])

    def _behind(self, layer: int, x: Tensor, rows: Tensor) -> Tensor:
        """The stream after a layer for variants already in the batch; after the last layer, only at the read rows."""
        return self.row.finish(x, rows) if layer == len(self.row) - 1 else self.row.run(layer, x, rows)

    def _born(
        self,
        layer: int,
        x: Float[Tensor, "variant row d_model"] | None,
        chosen: Bool[Tensor, "cell pos"],
        heads: Sequence[int | None],
        rows: Tensor,
    ) -> Float[Tensor, "variant row d_model"]:
        """The stream after the layer in which these cells are patched, appended to that of the earlier variants."""
        row, name, n = self.row, point_name(self.point, layer), len(chosen)
        local, last = self.point not in KEYS, layer == len(row) - 1
        reach = chosen.any(0)
        reach[int(rows[-1]) + 1 :] = False  # no read row depends on these rows
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
        ):  # few rows: read the layer's weights once for old and new variants
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
