"""The building blocks of every family's geometry: ``Canvas``, ``Tokens``, ``Shown``.

A processor resizes, pads or crops a picture onto a *canvas*; the vision tower cuts the canvas into squares, one visual
token each, row by row. ``Canvas`` holds that map and ``Canvas.tokens`` lists the squares:

    canvas = Canvas(48, 32, scale_x=48 / 97, scale_y=32 / 61)         # a picture of 97 x 61 pixels
    grid   = canvas.tokens(side=8, size=(97, 61))                      # 4 rows of 6 tokens, with their rectangles
    tile   = grid[grid.row < 2]                                        # any subset or order is Tokens again

A ``Shown`` is what a picture becomes in the sequence: runs of tokens, and the text that the family writes between them.

The rectangles are nominal. Resizing mixes neighbouring pixels by a kernel's width, and a vision tower with attention
spreads everything over the whole picture: the map says where a token *is*, not everything it has seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from jaxtyping import Float, Int

Size = tuple[int, int]  # width, height


@dataclass(frozen=True, eq=False)
class Tokens:
    """Visual tokens that are adjacent in the sequence, in order.

    Attributes:
        row: row in the grid of the whole picture (tiles share one grid), or -1.
        col: column in that grid, or -1.
        rect: pixels ``(x0, y0, x1, y1)`` of the original picture; ``nan`` for a token that stands for no pixel.
        view: 0 for a view of the whole picture, 1 and up for its tiles.
        frame: first frame of a video that the token holds, or -1.
    """

    row: Int[np.ndarray, " token"]
    col: Int[np.ndarray, " token"]
    rect: Float[np.ndarray, "token 4"]
    view: Int[np.ndarray, " token"]
    frame: Int[np.ndarray, " token"]

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, which: slice | np.ndarray) -> "Tokens":
        return Tokens(**{field.name: getattr(self, field.name)[which] for field in fields(self)})

    @classmethod
    def nowhere(cls, count: int, view: int = 0) -> "Tokens":
        """Tokens that stand for no pixels: class tokens, line breaks."""
        none = np.full(count, -1)
        return cls(none, none, np.full((count, 4), np.nan), np.full(count, view), none)

    @classmethod
    def join(cls, parts: Sequence["Tokens"]) -> "Tokens":
        """Several runs as one."""
        return cls(
            **{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)}
        )

    def at(self, view: int | None = None, frame: int | None = None, row: int = 0, col: int = 0) -> "Tokens":
        """The same tokens in another view or frame, moved down by ``row`` and right by ``col`` in the grid."""
        view_ = self.view if view is None else np.full(len(self), view)
        frame_ = self.frame if frame is None else np.full(len(self), frame)
        return replace(self, row=self.row + row, col=self.col + col, view=view_, frame=frame_)

    def tiled(self, rows: int, columns: int) -> list["Tokens"]:
        """A grid cut into tiles of ``rows`` by ``columns`` tokens: view 1, 2, ... from left to right, row by row."""
        down, right = self.row // rows, self.col // columns
        number = down * (right.max() + 1) + right
        return [self[number == tile].at(view=int(tile) + 1) for tile in np.unique(number)]


@dataclass(frozen=True)
class Canvas:
    """Where the original picture lies on the canvas that the vision tower sees.

    Pixel ``x`` of the original is at ``x * scale_x + left`` of a canvas of ``width`` by ``height``; a negative ``left``
    means that columns were cropped away, a positive one that there is padding. If the canvas is cut into tiles,
    ``tile`` is their (width, height).
    """

    width: int
    height: int
    scale_x: float = 1.0
    scale_y: float = 1.0
    left: float = 0.0
    top: float = 0.0
    tile: Size | None = None

    @classmethod
    def stretched(cls, size: Size, width: int, height: int, tile: Size | None = None) -> "Canvas":
        """A picture of ``size`` resized to fill the canvas, without keeping its shape."""
        return cls(width, height, width / size[0], height / size[1], tile=tile)

    def grid(self, side: int) -> tuple[int, int]:
        """Rows and columns of tokens."""
        starts_x, starts_y = self._starts(side)
        return len(starts_y), len(starts_x)

    def rectangles(self, side: int, size: Size) -> Float[np.ndarray, "token 4"]:
        """``(x0, y0, x1, y1)`` of every token in the original picture of ``size`` (width, height).

        Rectangles are cut at the border of the picture; a token that shows only padding has ``nan``. Neighbours share
        exactly the same edge, so that no token's rectangle overlaps another's by a rounding error.
        """
        x, y = self._starts(side)
        return self._between(x, x + side, y, y + side, size)

    def tokens(self, side: int, size: Size) -> Tokens:
        """The tokens of the canvas row by row, as view 0."""
        rows, columns = self.grid(side)
        return _tokens(rows, columns, self.rectangles(side, size))

    def resampled(self, side: int, size: Size, rows: int, columns: int, cropped: tuple[slice, slice]) -> Tokens:
        """Tokens from interpolating the ``cropped`` (rows, columns) of the canvas' grid to another number of them."""
        lines = []
        for starts, part, count in zip(self._starts(side), cropped[::-1], (columns, rows), strict=True):
            edges = np.append(starts, starts[-1] + side)
            lines.append(np.interp(np.linspace(part.start, part.stop, count + 1), np.arange(len(edges)), edges))
        x, y = lines
        return _tokens(rows, columns, self._between(x[:-1], x[1:], y[:-1], y[1:], size))

    def _starts(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """Where tokens begin, in x and in y; the tower drops what is left over at the end of a tile."""
        wide, high = self.tile or (self.width, self.height)
        x = np.add.outer(np.arange(0, self.width - wide + 1, wide), np.arange(wide // side) * side)
        y = np.add.outer(np.arange(0, self.height - high + 1, high), np.arange(high // side) * side)
        return x.ravel(), y.ravel()

    def _between(
        self, x0: np.ndarray, x1: np.ndarray, y0: np.ndarray, y1: np.ndarray, size: Size
    ) -> Float[np.ndarray, "token 4"]:
        """Rectangles between lines of the canvas, in pixels of the original."""
        # Rounded, or padding would show slivers of 1e-15 pixels.
        x0, x1 = (np.clip(np.round((x - self.left) / self.scale_x, 9), 0, size[0]) for x in (x0, x1))
        y0, y1 = (np.clip(np.round((y - self.top) / self.scale_y, 9), 0, size[1]) for y in (y0, y1))
        corners = (*np.meshgrid(x0, y0), *np.meshgrid(x1, y1))
        rects = np.stack(corners, axis=-1).reshape(-1, 4)
        rects[(rects[:, 0] >= rects[:, 2]) | (rects[:, 1] >= rects[:, 3])] = np.nan
        return rects


def _tokens(rows: int, columns: int, rects: np.ndarray) -> Tokens:
    row, col = np.divmod(np.arange(rows * columns), columns)
    return Tokens(row, col, rects, np.zeros_like(row), np.full_like(row, -1))


Piece = str | Tokens


@dataclass(frozen=True, eq=False)
class Shown:
    """What one picture becomes.

    Attributes:
        pieces: its part of the sequence, in order: runs of visual tokens, and text written between them.
        tile: width and height of what the vision tower takes at a time.
        tiles: how many of these the picture is cut into.
        memory: the visual tokens, if they are not in the sequence.
    """

    pieces: tuple[Piece, ...]
    tile: Size
    tiles: int = 1
    memory: Tokens | None = None
