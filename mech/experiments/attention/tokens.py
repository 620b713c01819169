"""Attention between groups of tokens: small enough to look at, however long the sequence.

    found = token_attention(model, inputs, layers=[2, 3])        # layer, head, query, key; at most 64 groups
    mech.view(found)                                             # circuitsvis: every head, every query

Text is shown token by token while there is room, then as the words of the question with the rest in runs; every picture
is cut into equal cells. Attention to a cell is the sum over its tokens, and attention from a cell the mean over its
tokens, so that rows still sum to one. No ``S x S`` attention is kept.
"""

from collections.abc import Iterator

import numpy as np
import torch
import xarray as xr

from mech.arguments import Count, checked
from mech.axes import HEAD, LAYER
from mech.errors import ExperimentError, suggestion
from mech.indices import Layers, indices
from mech.inputs import PADDING, TEXT, Inputs, TokenLayout
from mech.model import AttentionCall, HookedMLLM

MOST = 64  # groups
ROWS = 256  # query rows at once: bounds memory at 256 x S for each head


@checked
@torch.no_grad()
def token_attention(
    model: HookedMLLM, inputs: Inputs, *, layers: Layers | None = None, groups: Count = MOST
) -> xr.DataArray:
    """The attention of every text head between groups of tokens.

    ``attention[l, h, Q, K] = mean over x in Q of ( sum over y in K of A[l, h, x, y] )``, ``A`` after the softmax.

    Sign: higher means that the query attends more to the key. Unit: attention mass; rows sum to 1.

    Args:
        model: a hooked model.
        inputs: one row.
        layers: which of the layers with attention to the sequence; all by default.
        groups: the largest number of groups.

    Returns:
        dims layer, head, query, key; queries and keys are the same groups, by name.

    Raises:
        ExperimentError: several rows, pictures in a memory, a layer that does not exist, or more pictures than groups.

    Cost: one forward, and the attention of these layers a second time, ``256 x S`` at a time.
    """
    if len(inputs) != 1 or inputs.layout.memory is not None:
        given = f"{len(inputs)} rows" if len(inputs) != 1 else "pictures in a memory, which only some layers attend to"
        raise ExperimentError(given, "one row with everything in its sequence", "use mech.attention_from")
    wanted = _layers_of(model, layers)
    named = token_groups(inputs.layout, groups)
    member = torch.zeros(len(named), len(inputs.layout), device=model.device)
    for row, positions in enumerate(named.values()):
        member[row, positions] = 1
    mean = member / member.sum(1, keepdim=True)
    seen: dict[int, torch.Tensor] = {}

    def read_call(call: AttentionCall) -> None:
        if call.layer not in wanted:
            return
        total, at = 0.0, call.q.device
        here, there = mean.to(at), member.to(at)
        for rows in torch.arange(len(inputs.layout), device=at).split(ROWS):
            pattern = call.rows(rows)[0].float()
            total = total + torch.einsum("qr,hrs,ks->hqk", here[:, rows], pattern, there)
        seen[call.layer] = torch.as_tensor(total).cpu()

    with model.attending(read_call):
        model(inputs, logits_to_keep=1)
    names = list(named)
    return xr.DataArray(
        torch.stack([seen[layer] for layer in wanted]).numpy(),
        dims=(LAYER, HEAD, "query", "key"),
        coords={LAYER: wanted, HEAD: np.arange(model.cfg.n_heads), "query": names, "key": names},
        name="token_attention",
        attrs={
            "unit": "attention mass",
            "sign": "the higher, the more the query attends to the key",
            "model": model.name,
        },
    )


def _layers_of(model: HookedMLLM, layers: Layers | None) -> list[int]:
    """These layers; if None, all with attention to the sequence."""
    known = list(model.cfg.attention_layers)
    if layers is None:
        return known
    wanted = list(indices("layers", layers).check_mask("layers", (model.cfg.n_layers,)))
    if not wanted or not set(wanted) <= set(known):
        raise ExperimentError(f"layers {wanted}", f"some of {known}", suggestion(str(wanted[:1]), map(str, known)))
    return wanted


def token_groups(layout: TokenLayout, most: int = MOST) -> dict[str, list[int]]:
    """All positions except padding in at most ``most`` named groups, in sequence order.

    Raises:
        ExperimentError: more pictures and pieces of text than groups.
    """
    pictures = _pictures(layout)
    placeless = sum(bool(np.isnan(layout.rect[run]).any()) for run in pictures.values())
    for fine in (True, False):
        text = list(_text(layout, fine))
        side = int(max(0, (most - len(text) - placeless) / max(1, len(pictures))) ** 0.5)
        if side >= 1 and (not fine or len(text) <= most // 2):
            break
    else:
        raise ExperimentError(
            f"{len(pictures)} pictures and {len(text)} pieces of text in {most} groups", "at least one group for each",
            "give fewer pictures, or more groups",
        )  # fmt: skip
    pieces = text + [piece for name, run in pictures.items() for piece in _cells(layout, name, run, side)]
    groups: dict[str, list[int]] = {}
    for name, positions in sorted(pieces, key=lambda piece: piece[1][0]):
        groups[name if name not in groups else f"{name} ({positions[0]})"] = positions
    return groups


def _pictures(layout: TokenLayout) -> dict[str, np.ndarray]:
    """The visual tokens of every image, or of every frame that has some."""
    visual = np.flatnonzero((layout.kind != TEXT) & (layout.kind != PADDING))
    owner, what = (layout.frame, "frame") if layout.has_video else (layout.image, "image")
    several = len(set(owner[visual].tolist())) > 1
    return {
        f"{what} {index}" if several else what: visual[owner[visual] == index]
        for index in dict.fromkeys(owner[visual].tolist())
    }


def _text(layout: TokenLayout, fine: bool) -> Iterator[tuple[str, list[int]]]:
    """Every text token; or the words of the question, and the remaining text in runs."""
    text = np.flatnonzero(layout.kind == TEXT)
    if fine:
        yield from ((layout.tokens[position], [position]) for position in text.tolist())
        return
    words = layout.words("question") if layout.spans.get("question") else {}
    yield from words.items()
    rest = text[~np.isin(text, [position for word in words.values() for position in word])]
    for run in np.split(rest, np.flatnonzero(np.diff(rest) > 1) + 1):
        if len(run):
            first, last = layout.tokens[run[0]].strip(), layout.tokens[run[-1]].strip()
            yield (first if len(run) == 1 else f"{first} … {last}"), run.tolist()


def _cells(layout: TokenLayout, name: str, run: np.ndarray, side: int) -> Iterator[tuple[str, list[int]]]:
    """A picture's tokens in at most ``side`` x ``side`` equal cells by their centres; those without a place apart."""
    placed = run[~np.isnan(layout.rect[run]).any(1)]
    if len(placed) < len(run):
        yield f"{name}: marks", run[np.isnan(layout.rect[run]).any(1)].tolist()
    rows, cols = (min(side, int(grid[placed].max(initial=0)) + 1) for grid in (layout.row, layout.col))
    x0, y0, x1, y1 = layout.rect[placed].T
    wide, high = x1.max(initial=1), y1.max(initial=1)
    at = [np.minimum(middle * n // size, n - 1).astype(int)
          for middle, size, n in (((y0 + y1) / 2, high, rows), ((x0 + x1) / 2, wide, cols))]  # fmt: skip
    for row in range(rows):
        for col in range(cols):
            if len(cell := placed[(at[0] == row) & (at[1] == col)]):
                yield f"{name} {row},{col}", cell.tolist()
