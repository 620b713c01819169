"""``Inputs``: the tensors a model's forward takes, and beside them what every position is.

``collate`` joins rows into a batch: sequences are padded on the left, so that the last column is the last token of
every row; pictures are laid one after the other in the order of the rows, as the Hugging Face models count them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mech.errors import InputError
from mech.inputs.layout import TokenLayout

# What is as long as the sequence, and its value at padding (None: the tokenizer's padding token).
_PADDING: dict[str, int | None] = {"input_ids": None, "attention_mask": 0, "mm_token_type_ids": 0}


@dataclass(frozen=True, eq=False)
class Inputs:
    """One or more rows for a model.

    Attributes:
        tensors: what the Hugging Face forward takes (``input_ids``, ``attention_mask``, ``pixel_values``, ...).
        layouts: what every position is, one layout for each row.
    """

    tensors: dict[str, Tensor]
    layouts: tuple[TokenLayout, ...]

    def __post_init__(self):
        rows, length = self.tensors["input_ids"].shape
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
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.tensors.items())
        layout = repr(self.layouts[0]) if len(self) == 1 else f"{len(self)} rows"
        return f"Inputs({layout}; {shapes})"

    @property
    def layout(self) -> TokenLayout:
        """The layout of the only row."""
        if len(self) != 1:
            raise InputError(
                f".layout of a batch of {len(self)} rows", "a single row", "use .layouts[row] to say which row"
            )
        return self.layouts[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Inputs":
        """The same on another device; ``dtype`` is for pixels only (times and indices keep theirs)."""
        moved = {
            name: value.to(device=device, dtype=dtype if name.startswith("pixel_values") else None)
            for name, value in self.tensors.items()
        }
        return Inputs(moved, self.layouts)


def collate(rows: Sequence[Inputs], pad_token_id: int) -> Inputs:
    """Rows as one batch, padded on the left.

    Args:
        rows: inputs of the same model; rows without pictures may stand beside rows with pictures.
        pad_token_id: the token at padded positions (it is masked, so that any will do).
    """
    if not rows:
        raise InputError("an empty list of inputs", "at least one", "pass the inputs to be joined")
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
        elif len({part.shape[1:] for part in parts}) > 1:
            raise InputError(
                f"{name!r} of shapes {[tuple(part.shape) for part in parts]}",
                "rows whose pictures were made by the same image processor",
                "build every row with the same processor",
            )
        joined[name] = torch.cat(parts)
    layouts = [layout.shifted(length - len(layout), length) for row in rows for layout in row.layouts]
    return Inputs(joined, tuple(layouts))


def _pad_left(part: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(part, (length - part.shape[1], 0), value=value)
