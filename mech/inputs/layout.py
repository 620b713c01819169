"""``TokenLayout``: what every position of a row is, and which positions a region covers.

    layout.positions(Box(12, 30, 40, 58))          # the visual tokens of a box, in pixels of the original image
    layout.positions(Pages(3))                     # all tokens of the fourth image;  Frames(0, 1) for a video
    layout.positions("question")                   # the question's own tokens
    layout.positions(Box(12, 30, 40, 58), view="tiles")    # in the tiles only, where a picture is cut into tiles
    layout.rectangle(17)                           # and back: the pixels that position 17 stands for
    layout.overlay(image, Box(12, 30, 40, 58))     # a picture of them

Positions count padding, so that they index the tensors of the batch. The layout holds no tensor and depends on no
model; a token's rectangle is where its patch was cut, not everything it has seen (see ``mech.inputs.canvas``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw

from mech.arguments import Count, Reading, checking
from mech.data.regions import Frames, Region
from mech.data.regions import where as read_where
from mech.errors import RegionError, suggestion
from mech.indices import Indices
from mech.inputs.regions import covered, whole_images
from mech.notebook import Shown

TEXT, IMAGE, VIDEO, PADDING = 0, 1, 2, 3
Where = Annotated[
    Region | str | Sequence[int] | Sequence[Region] | np.ndarray,
    Reading(read_where, "a name, a region, regions, positions or a mask"),
]


@checking(RegionError)
@dataclass(frozen=True, eq=False, repr=False)
class TokenLayout(Shown):
    """What every position of one row is; the arrays are as long as the row, padding included.

    Attributes:
        kind: ``TEXT`` 0, ``IMAGE`` 1 (a visual token of an image), ``VIDEO`` 2, ``PADDING`` 3.
        image: index of the image, or -1 (text, and the tokens of a video).
        frame: index of the first frame of the token's temporal patch, or -1.
        row: row in the grid of visual tokens of that image or frame (tiles share one grid), or -1.
        col: column in that grid, or -1. A visual token with no row and column stands for no pixels (a line break).
        view: 0 for a token that shows the whole picture (its base view or thumbnail), 1 and up for its tiles, or -1.
        rect: pixel rectangle ``(x0, y0, x1, y1)`` in the original image or frame; ``nan`` where there is none.
        tokens: printable token strings that join to the text; "" for a token that only begins a character: the last of
            its tokens shows it.
        spans: named sets of positions: "question" and, if given, "answer" and the passages of a context.
        images: (width, height) of every original image, or of every frame of the video.
        frames_per_token: frames in one visual token of a video, else 1.
        memory: the layout of the visual tokens if they are not in the sequence but in what cross-attention layers
            attend to, else ``None``.
    """

    kind: Int[np.ndarray, " pos"]
    image: Int[np.ndarray, " pos"]
    frame: Int[np.ndarray, " pos"]
    row: Int[np.ndarray, " pos"]
    col: Int[np.ndarray, " pos"]
    view: Int[np.ndarray, " pos"]
    rect: Float[np.ndarray, "pos 4"]
    tokens: tuple[str, ...]
    spans: Mapping[str, tuple[int, ...]]
    images: tuple[tuple[int, int], ...] = ()
    frames_per_token: Count = 1
    memory: "TokenLayout | None" = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        parts = []
        if (padded := int((self.kind == PADDING).sum())) > 0:
            parts.append(f"{padded} padding")
        for index in range(len(self.images) if self.has_images else 0):
            name = "image" if len(self.images) == 1 else f"image {index}"
            parts.append(f"{(self.image == index).sum()} tokens of {name} ({'x'.join(map(str, self.grid(index)))})")
        if self.has_video:
            count, size = (self.kind == VIDEO).sum(), "x".join(map(str, self.grid(frame=0)))
            parts.append(f"{count} tokens of {len(self.images)} video frames ({size}, {self.frames_per_token} a token)")
        parts += [f"{name} {_ranges(positions)}" for name, positions in self.spans.items()]
        parts += [] if self.memory is None else [f"a memory of {self.memory!r}"]
        return f"{len(self)} positions: {', '.join(parts) or 'text'}"

    @property
    def visual(self) -> "TokenLayout":
        """The layout that has the visual tokens: the memory's, or this one."""
        return self if self.memory is None else self.memory

    def beside(self, memory: "TokenLayout") -> "TokenLayout":
        """The same row with its visual tokens in a memory."""
        return replace(self, memory=memory)

    @property
    def pictured(self) -> Int[np.ndarray, " pos"]:
        """The positions of all visual tokens; none for text alone."""
        return np.flatnonzero((self.kind == IMAGE) | (self.kind == VIDEO))

    @property
    def has_images(self) -> bool:
        return bool((self.kind == IMAGE).any())

    @property
    def has_video(self) -> bool:
        return bool((self.kind == VIDEO).any())

    @checking(RegionError)
    def positions(
        self, where: Where, *, image: int | None = None, coverage: float = 0.0, view: str | None = None
    ) -> Int[np.ndarray, " pos"]:
        """The positions that ``where`` names, in ascending order and never empty.

        Args:
            where: a region; several regions (their union); "image" (all visual tokens, also of a video), "text" (all
                positions neither visual nor padding), "last", "all" (all but padding) or the name of a span such as
                "question"; or positions, which are checked and returned; or a boolean mask of the row.
            image: for a box or a mask, the image it lies in, instead of its own; for "image", the one image meant.
            coverage: a token counts if more than this share of its rectangle lies in the region; 0 is any overlap.
            view: for regions and "image", "whole" (the view of the whole picture) or "tiles"; both by default.

        Raises:
            RegionError: there are no such positions, or ``where`` is unknown.
        """
        if not 0 <= coverage < 1:
            raise RegionError(
                f"coverage={coverage}", "0 <= coverage < 1", "use 0 for any overlap, 0.5 for more than half"
            )
        asked = read_where("positions", where)
        if isinstance(asked, str):
            return self._seen(self._named(asked, image), view, where)
        if isinstance(asked, Indices):
            return self._seen(self._checked(asked), view, where)
        regions = [asked] if isinstance(asked, Region) else asked
        inside = np.any([covered(self, region, image, coverage) for region in regions], axis=0)
        return self._seen(np.flatnonzero(inside), view, where)

    def _seen(self, positions: Int[np.ndarray, " pos"], view: str | None, where: Where) -> Int[np.ndarray, " pos"]:
        """Those of the given positions that belong to a view."""
        if view is None:
            return positions
        if view not in ("whole", "tiles"):
            raise RegionError(f"view={view!r}", "'whole' or 'tiles'", suggestion(view, ("whole", "tiles")))
        seen = positions[self.view[positions] > 0] if view == "tiles" else positions[self.view[positions] == 0]
        if not len(seen):
            raise RegionError(
                f"{where!r} has no tokens in the view {view!r}",
                "a picture that has this view",
                "leave out view=: a family may show small pictures without tiles, or long ones without the whole view",
            )
        return seen

    def _named(self, name: str, image: int | None) -> Int[np.ndarray, " pos"]:
        named = {
            "image": self.pictured,
            "text": np.flatnonzero(self.kind == TEXT),
            "all": np.flatnonzero(self.kind != PADDING),
            **{span: np.asarray(positions, dtype=int) for span, positions in self.spans.items()},
        }
        named["last"] = named["all"][-1:]
        if name not in named:
            raise RegionError(
                f"no positions are called {name!r}", "a region, positions, or a name", suggestion(name, named)
            )
        if image is not None:
            if name != "image":
                raise RegionError(
                    f"image={image} with {name!r}", "image= with a box, a mask or 'image'", "leave it out"
                )
            return np.flatnonzero(whole_images(self, [image]))
        if not len(named[name]):
            raise RegionError(f"this row has no {name!r} positions", f"a row with {name!r}", f"look at {self!r}")
        return named[name]

    def _checked(self, positions: Indices) -> Int[np.ndarray, " pos"]:
        positions.check_mask("positions", (len(self),), RegionError)
        if not (positions and all(-len(self) <= p < len(self) for p in positions)):
            raise RegionError(
                f"positions {list(positions[:8])!r}",
                f"whole numbers from {-len(self)} to {len(self) - 1}",
                "give a region, a name such as 'question', or positions in range",
            )
        return np.unique(np.asarray(positions, dtype=int) % len(self))

    def _of_picture(self, image: int, frame: int | None) -> Bool[np.ndarray, " pos"]:
        return whole_images(self, [image]) if frame is None else covered(self, Frames(frame), None, 0.0)

    def _finest(self, here: Bool[np.ndarray, " pos"]) -> Bool[np.ndarray, " pos"]:
        """The tokens of a picture's tiles, or all its tokens if it has no tiles."""
        tiles = here & (self.view > 0)
        return tiles if (self.row[tiles] >= 0).any() else here

    def first_difference(self, other: "TokenLayout") -> int | None:
        """The first position that differs in kind or place from another layout."""
        shared = min(len(self), len(other))
        names = ("kind", "image", "frame", "row", "col", "view")
        differs = np.any([getattr(self, n)[:shared] != getattr(other, n)[:shared] for n in names], axis=0)
        if differs.any():
            return int(differs.argmax())
        return None if len(self) == len(other) else shared

    @checking(RegionError)
    def describe(self, position: int) -> str:
        """A position in words: its token, or its picture and where in it."""
        if position >= len(self):
            return "nothing"
        if self.kind[position] == PADDING:
            return "padding"
        if self.kind[position] == TEXT:
            whole = next((token for token in self.tokens[position:] if token), "")
            return repr(whole) if self.tokens[position] else f"a part of {whole!r}"
        picture = f"image {self.image[position]}" if self.kind[position] == IMAGE else f"frame {self.frame[position]}"
        return f"row {self.row[position]}, column {self.col[position]} of {picture}"

    @checking(RegionError)
    def rectangle(self, position: int) -> tuple[float, float, float, float]:
        """``(x0, y0, x1, y1)`` of a visual token in the original image."""
        index = int(self.positions([position])[0])
        if np.isnan(self.rect[index]).any():
            raise RegionError(
                f"position {position} ({self.tokens[index]!r}) has no rectangle",
                "a visual token that shows part of the picture",
                "take one of layout.positions('image')",
            )
        x0, y0, x1, y1 = self.rect[index].tolist()
        return x0, y0, x1, y1

    @checking(RegionError)
    def grid(self, image: int = 0, frame: int | None = None) -> tuple[int, int]:
        """Rows and columns of the visual tokens of an image or a frame of the video; of its tiles if it has any."""
        here = self._finest(self._of_picture(image, frame))
        return int(self.row[here].max()) + 1, int(self.col[here].max()) + 1

    @checking(RegionError)
    def cells(self, rows: Count, cols: Count, image: int = 0, frame: int | None = None) -> dict[str, list[int]]:
        """The visual tokens of a picture in ``rows`` x ``cols`` equal cells "row,col", by where their centres lie.

        Raises:
            RegionError: a cell holds the centre of no token.
        """
        here = np.flatnonzero(self._of_picture(image, frame) & ~np.isnan(self.rect).any(axis=1))
        if rows * cols > len(here):  # refused before so many cells are made
            raise RegionError(
                f"{rows} x {cols} cells of {len(here)} visual tokens",
                f"at most {' x '.join(map(str, self.grid(image, frame)))} cells",
                "ask for fewer cells",
            )
        width, height = self.images[image if frame is None else frame]
        x0, y0, x1, y1 = self.rect[here].T
        at = [np.clip(middle * count / size, 0, count - 1).astype(int)
              for middle, count, size in (((y0 + y1) / 2, rows, height), ((x0 + x1) / 2, cols, width))]  # fmt: skip
        by_cell = {
            f"{row},{col}": here[(at[0] == row) & (at[1] == col)].tolist() for row in range(rows) for col in range(cols)
        }
        if empty := [name for name, positions in by_cell.items() if not positions]:
            raise RegionError(
                f"{rows} x {cols} cells, of which {len(empty)} hold no visual token, the first is {empty[0]}",
                f"at most {' x '.join(map(str, self.grid(image, frame)))} cells",
                "ask for fewer cells",
            )
        return by_cell

    @checking(RegionError)
    def words(self, span: str = "question") -> dict[str, list[int]]:
        """The words of a span, each with its positions; repeated words are numbered ("the 2")."""
        groups: list[list[int]] = []
        text = ""  # of the last group; white space alone, or a part of a character, waits for what follows
        for position in self.positions(span).tolist():
            token = self.tokens[position]
            if not groups or (text.strip() and (token[:1].isspace() or (token and text[-1:].isspace()))):
                groups.append([])
                text = ""
            groups[-1].append(position)
            text += token
        if not text.strip() and len(groups) > 1:
            groups[-2:] = [groups[-2] + groups[-1]]
        by_word: dict[str, list[int]] = {}
        seen: dict[str, int] = {}
        for group in groups:
            word = "".join(self.tokens[position] for position in group).strip()
            seen[word] = seen.get(word, 0) + 1
            by_word[word if seen[word] == 1 else f"{word} {seen[word]}"] = group
        return by_word

    @checking(RegionError)
    def shifted(self, left: int, length: int) -> "TokenLayout":
        """The same row with ``left`` positions of padding in front, ``length`` positions in total."""
        right = length - left - len(self)
        if left < 0 or right < 0:
            raise RegionError(
                f"{len(self)} positions moved right by {left} in a row of {length}",
                f"a row of at least {len(self) + max(left, 0)}",
                "give the length of the batch",
            )

        def pad(values: np.ndarray, filler: float) -> np.ndarray:
            widths = [(left, right)] + [(0, 0)] * (values.ndim - 1)
            return np.pad(values, widths, constant_values=filler)

        return replace(
            self,
            kind=pad(self.kind, PADDING),
            image=pad(self.image, -1),
            frame=pad(self.frame, -1),
            row=pad(self.row, -1),
            col=pad(self.col, -1),
            view=pad(self.view, -1),
            rect=pad(self.rect, np.nan),
            tokens=("",) * left + self.tokens + ("",) * right,
            spans={name: tuple(p + left for p in positions) for name, positions in self.spans.items()},
        )

    @checking(RegionError)
    def overlay(
        self,
        picture: Image.Image,
        where: Where | None = None,
        values: Sequence[float] | np.ndarray | None = None,
        *,
        image: int = 0,
        frame: int | None = None,
        colour: tuple[int, int, int] = (230, 97, 0),
    ) -> Image.Image:
        """The picture with the rectangles of visual tokens drawn over it.

        Args:
            picture: the original image (or a frame of it), at any scale.
            where: the tokens to draw, as in ``positions``; by default all of the picture's, or of its tiles if it has
                any. Tiles are drawn over the whole view.
            values: one number for each drawn position (opacity, relative to the largest); by default outlines.
            image: which image the picture is.
            frame: which frame of the video the picture is.
            colour: of the rectangles.
        """
        here = self._of_picture(image, frame)
        chosen = np.flatnonzero(self._finest(here)) if where is None else self.positions(where)
        if values is None:
            opacity = np.full(len(chosen), 0.35)
        elif len(values) != len(chosen):
            raise RegionError(
                f"{len(values)} values for {len(chosen)} positions",
                "one value for each position",
                "pass where= as well",
            )
        else:
            numbers = np.clip(np.nan_to_num(np.asarray(values, dtype=float)), 0, None)
            opacity = 0.85 * numbers / max(numbers.max(), 1e-12)
        width, height = self.images[frame if frame is not None else image]
        scale = np.array([picture.width / width, picture.height / height] * 2)
        drawn = picture.convert("RGBA")
        for tiles in (False, True):
            layer = Image.new("RGBA", picture.size, (0, 0, 0, 0))
            draw = ImageDraw.Draw(layer)
            for position, alpha in zip(chosen, opacity, strict=True):
                if not here[position] or np.isnan(self.rect[position]).any() or (self.view[position] > 0) != tiles:
                    continue
                x0, y0, x1, y1 = self.rect[position] * scale
                corners = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))
                outline = (*colour, 255) if values is None else None
                draw.rectangle(corners, fill=(*colour, round(255 * alpha)), outline=outline)
            drawn = Image.alpha_composite(drawn, layer)
        return drawn.convert("RGB")


def _ranges(positions: Sequence[int]) -> str:
    """``3-5,9`` for 3, 4, 5, 9."""
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][1] + 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "none"
