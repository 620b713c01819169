"""``Inputs``: the tensors a model's forward takes, together with what every position is.

``collate`` joins rows into a batch: sequences are padded on the left, so that the last column is the last token of
every row; pictures are concatenated in the order of the rows, as the Hugging Face models count them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mech.arguments import checking
from mech.errors import InputError
from mech.inputs.layout import IMAGE, VIDEO, TokenLayout
from mech.notebook import Shown

# Tensors as long as the sequence, and their value at padding (None: the tokenizer's padding token).
_PADDING: dict[str, int | None] = {
    "input_ids": None,
    "attention_mask": 0,
    "mm_token_type_ids": 0,
    "token_type_ids": 0,
    "cross_attention_mask": 0,
}


@checking(InputError)
@dataclass(frozen=True, eq=False)
class Inputs(Shown):
    """One or more rows for a model.

    Attributes:
        tensors: what the Hugging Face forward takes (``input_ids``, ``attention_mask``, ``pixel_values``, ...). Instead
            of pixels there may be a mapping, ``mm_encoder_outputs``: pictures that are already encoded.
        layouts: what every position is, one layout for each row.
        made_by: the ``mark`` of the processor that made them; empty if they were put together by hand.
    """

    tensors: dict[str, Any]
    layouts: tuple[TokenLayout, ...]
    made_by: str = ""

    def __post_init__(self):
        shape = getattr(self.tensors.get("input_ids"), "shape", ())
        if len(shape) != 2:
            raise InputError(
                f"input_ids of shape {tuple(shape)}", "(row, position)", "build inputs with mech.inputs.build"
            )
        rows, length = shape
        lengths = [len(layout) for layout in self.layouts]
        if lengths != [length] * rows:
            raise InputError(
                f"input_ids of {rows} rows and {length} positions with layouts of {lengths} positions",
                "one layout for each row, as long as the row",
                "build inputs with mech.inputs.build or encode, and join them with collate",
            )

    def __len__(self) -> int:
        return len(self.layouts)

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{name} {tuple(value.shape) if isinstance(value, Tensor) else ', '.join(value)}"
            for name, value in self.tensors.items()
        )
        layout = repr(self.layouts[0]) if len(self) == 1 else f"{len(self)} rows"
        return f"Inputs({layout}; {shapes})"

    @property
    def shape(self) -> torch.Size:
        """Rows and positions, like a tensor of tokens: TransformerLens' patching functions take inputs as tokens."""
        return self.tensors["input_ids"].shape

    @property
    def layout(self) -> TokenLayout:
        """The layout of the only row."""
        if len(self) != 1:
            raise InputError(
                f".layout of a batch of {len(self)} rows", "a single row", "use .layouts[row] to say which row"
            )
        return self.layouts[0]

    def check_same_layout(self, other: "Inputs") -> None:
        """Refuse inputs whose positions do not correspond: patching moves values position by position.

        Words may differ (another question with the same number of tokens), but not what each position is.

        Raises:
            InputError: with the first position that differs, and both tokens there.
        """
        if len(self) != len(other):
            raise InputError(
                f"inputs of {len(self)} and of {len(other)} rows", "the same number of rows", "pair them row by row"
            )
        for row, (mine, theirs) in enumerate(zip(self.layouts, other.layouts, strict=True)):
            at = mine.first_difference(theirs)
            if at is None:
                continue
            if len(mine) != len(theirs):  # the tokens differ before the kinds do
                pairs = enumerate(zip(mine.tokens, theirs.tokens, strict=False))
                at = min(at, next((i for i, (first, other) in pairs if first != other), at))
            raise InputError(
                f"inputs that differ in layout, in row {row} first at position {at}: {mine.describe(at)} against "
                f"{theirs.describe(at)} ({len(mine)} and {len(theirs)} positions)",
                "the same number and kind of tokens at every position",
                "use a counterfactual with pictures of the same size and a question of the same number of tokens",
            )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Inputs":
        """The same on another device; ``dtype`` applies to pixels only (times and indices keep theirs)."""
        moved = {
            name: value.to(device=device, dtype=dtype if name.startswith("pixel_values") else None)
            for name, value in self.tensors.items()
            if isinstance(value, Tensor)
        }
        moved |= {name: value for name, value in self.tensors.items() if name not in moved}
        return replace(self, tensors=moved)


def collate(rows: Sequence[Inputs], pad_token_id: int) -> Inputs:
    """Rows as one batch, padded on the left.

    Args:
        rows: inputs for the same model; some may have pictures and others none.
        pad_token_id: the token at padded positions (it is masked, so any will do).
    """
    if not rows:
        raise InputError("an empty list of inputs", "at least one", "pass the inputs to be joined")
    _check_memories(rows)
    makers = sorted({row.made_by for row in rows if row.made_by})
    if len(makers) > 1:
        raise InputError(
            f"rows made for different models: {', '.join(makers)}", "rows for one model",
            "build every row with the same processor",
        )  # fmt: skip
    if any("mm_encoder_outputs" in row.tensors for row in rows):
        raise InputError("inputs whose pictures are already encoded", "inputs with pixels", "collate, then encode")
    for name in _PADDING:
        if len({name in row.tensors for row in rows}) > 1:
            raise InputError(
                f"some rows have {name!r} and some do not",
                "rows that were built for the same model",
                "build every row with the same processor",
            )
    length = max(row.tensors["input_ids"].shape[1] for row in rows)
    names = dict.fromkeys(name for row in rows for name in row.tensors)
    joined = {}
    for name in names:
        parts = [row.tensors[name] for row in rows if name in row.tensors]
        if name in _PADDING:
            value = _PADDING[name]
            parts = [_pad_left(part, length, pad_token_id if value is None else value) for part in parts]
        elif _tiled(name, parts):
            parts = [_pad_tiles(part, max(other.shape[1] for other in parts)) for part in parts]
        elif name == "pixel_values" and parts[0].ndim == 4 and "image_sizes" in names:
            parts = [
                _pad_canvas(part, [max(other.shape[axis] for other in parts) for axis in (2, 3)]) for part in parts
            ]
        elif len({part.shape[1:] for part in parts}) > 1:
            raise InputError(
                f"{name!r} of shapes {[tuple(part.shape) for part in parts]}",
                "rows whose pictures were made by the same image processor",
                "build every row with the same processor",
            )
        joined[name] = torch.cat(parts)
    _refuse_one_token_for_both(rows)
    layouts = [layout.shifted(length - len(layout), length) for row in rows for layout in row.layouts]
    return Inputs(joined, tuple(layouts), "".join(makers))


def _pad_left(part: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(part, (0, 0) * (part.ndim - 2) + (length - part.shape[1], 0), value=value)


def _check_memories(rows: Sequence[Inputs]) -> None:
    counts = [mask.shape[2] if (mask := row.tensors.get("cross_attention_mask")) is not None else 0 for row in rows]
    if len(set(counts)) > 1:
        raise InputError(
            f"rows with {', '.join(map(str, counts))} pictures for a model with cross-attention",
            "rows with the same number of pictures: text that sees none attends to the whole memory, "
            "which other rows make longer",
            "run them in separate batches, or one by one",
        )


def _pad_canvas(part: Tensor, size: list[int]) -> Tensor:
    """Pad with zeros at the right and the bottom, which ``image_sizes`` tells the model to leave out."""
    return torch.nn.functional.pad(part, (0, size[1] - part.shape[3], 0, size[0] - part.shape[2]))


def _refuse_one_token_for_both(rows: Sequence[Inputs]) -> None:
    """Refuse images and a video in one batch if the model writes both with one token, as GLM-4.1V does."""
    if not any("pixel_values_videos" in row.tensors for row in rows):
        return
    written: dict[int, set[int]] = {IMAGE: set(), VIDEO: set()}
    for row in rows:
        for layout, ids in zip(row.layouts, row.tensors["input_ids"], strict=True):
            for kind, tokens in written.items():
                tokens.update(ids[torch.from_numpy(layout.kind == kind)].tolist())
    if written[IMAGE] & written[VIDEO]:
        raise InputError(
            "images and a video in one batch, for a model that uses one token for both",
            "rows with images, or rows with a video",
            "collate the two kinds separately",
        )


def _tiled(name: str, parts: list[Tensor]) -> bool:
    """Whether these are tiles of pictures, ``[picture, tile, ...]``: pictures may have different numbers of them."""
    dimensions = {"pixel_values": 5, "pixel_attention_mask": 4}.get(name)
    return all(part.ndim == dimensions for part in parts) and len({part.shape[2:] for part in parts}) == 1


def _pad_tiles(part: Tensor, tiles: int) -> Tensor:
    """Pad with zeros for the missing tiles; the models leave them out again."""
    return torch.cat([part, part.new_zeros(part.shape[0], tiles - part.shape[1], *part.shape[2:])], dim=1)
