"""The contents of a study folder's files: kinds of ``xarray.Dataset``, built and checked here.

A study folder is

    study.json                              settings and provenance
    {model}/{domain}/ram.nc                 kind "ram":      RAM of every head, per example
    {model}/{domain}/ablation.nc            kind "ablation": what happens without some heads, per condition and example
    {model}/{domain}/maps.nc                kind "maps":     attention of a few heads over a few pictures
    {model}/{domain}/map{i}_{k}.png         those pictures
    {model}/{domain}/causal.nc              kind "causal":   what every head does to the answer (mech.causal_report)

Dimensions are named as in ``mech.axes``; units and signs are attributes of each variable, so a figure can label its
axes from the file alone. The example axis is kept everywhere: intervals and paired tests need it. ``check`` refuses a
dataset that a reader would misread (a missing variable, dimensions in another order, a condition without its name).

    >>> dataset = ram_dataset(scores, vision_mass, size_null, n_evidence)      # doctest: +SKIP
    >>> check(dataset, "ram")                                                  # doctest: +SKIP

Nothing here knows about models, files or how the numbers were made.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from mech.axes import CONDITION, EXAMPLE, HEAD, LAYER, TOKEN
from mech.errors import OutputError, suggestion
from mech.files import parse_json

VERSION = 1
METHODS = ("none", "mean", "zero", "resample", "uniform", "paper")
BANDS = ("none", "top", "bottom", "middle", "random", "unneeded", "unrestricted", "layer_matched", "by SCORE")
WITH_TOP = "unrestricted, with top"  # sets of the unrestricted control that contain a tested head: shown separately
MAP_FACTS = ("question", "answer", "prediction", "pictures", "evidence")

Kind = Literal["ram", "ablation", "maps", "causal"]


@dataclass(frozen=True)
class _Layout:
    """One kind of dataset: the dimensions of every variable and coordinate it must have."""

    variables: Mapping[str, tuple[str, ...]]
    coords: Mapping[str, tuple[str, ...]]
    units: Mapping[str, tuple[str, str]]  # variable -> (unit, sign)
    attrs: tuple[str, ...] = ()  # attributes it must have, each a JSON text
    made_by: str = "mech.results"


KINDS: dict[str, _Layout] = {
    "ram": _Layout(
        variables={
            "ram": (EXAMPLE, LAYER, HEAD),
            "vision_mass": (EXAMPLE, LAYER, HEAD),
            "size_null": (EXAMPLE,),
            "n_evidence": (EXAMPLE,),
        },
        coords={},
        units={
            "ram": ("attention mass, 0 to 1", "more: the question attends more to the evidence"),
            "vision_mass": ("attention mass, 0 to 1", "more: the question attends more to visual tokens of any kind"),
            "size_null": ("attention mass, 0 to 1", "what attention spread evenly over visible keys would give"),
            "n_evidence": ("visual tokens", "more: larger evidence"),
        },
        made_by="mech.results.ram_dataset",
    ),
    "ablation": _Layout(
        variables={"accuracy": (CONDITION, EXAMPLE), "logit_diff": (CONDITION, EXAMPLE)},
        coords={name: (CONDITION,) for name in ("method", "band", "fraction", "n_heads", "draw")},
        units={
            "accuracy": ("share of answers, 0 or 1 per example", "more: better"),
            "logit_diff": ("logits, right minus wrong answer", "more: better"),
        },
        made_by="mech.results.ablation_dataset",
    ),
    "maps": _Layout(
        variables={
            "attention": (EXAMPLE, "shown", TOKEN),
            "rect": (EXAMPLE, TOKEN, "corner"),
            "token_image": (EXAMPLE, TOKEN),
        },
        coords={name: ("shown",) for name in ("shown_layer", "shown_head", "shown_band", "shown_ram")},
        units={
            "attention": ("attention mass, 0 to 1", "more: the question attends more to this visual token"),
            "rect": ("pixels of the original picture", "x0, y0, x1, y1; x to the right, y down"),
            "token_image": ("index of the picture, -1 for padding", ""),
        },
        attrs=("facts",),
        made_by="mech.results.maps_dataset",
    ),
    "causal": _Layout(
        variables={"ram": (LAYER, HEAD), "quadrant": (LAYER, HEAD)},
        coords={},
        units={},
        attrs=("agreement", "paths", "members"),
        made_by="mech.causal_report",
    ),
}


def ram_dataset(
    ram: Float[np.ndarray, "example layer head"],
    vision_mass: Float[np.ndarray, "example layer head"],
    size_null: Float[np.ndarray, "example"],
    n_evidence: Int[np.ndarray, "example"],
    *,
    layers: Sequence[int] | None = None,
    examples: Sequence[str] | None = None,
    **attrs: Any,
) -> xr.Dataset:
    """Retrieval attention mass of every head on every example, with its two controls.

    Args:
        ram: attention of the question's tokens on the evidence.
        vision_mass: the same over all visual tokens (a "vision head" score).
        size_null: the share of visible keys that are evidence: what even attention would score.
        n_evidence: visual tokens of the evidence.
        layers: which layers of the model these are, if some have no heads.
        examples: ids of the examples.
        attrs: ``provenance``, ``model``, ``domain`` and other attributes of the whole dataset.
    """
    values = {"ram": ram, "vision_mass": vision_mass, "size_null": size_null, "n_evidence": n_evidence}
    coords = {EXAMPLE: (EXAMPLE, _names(examples))} if examples is not None else {}
    if np.ndim(ram) == 3:
        coords |= {dim: (dim, np.arange(size)) for dim, size in zip((LAYER, HEAD), np.shape(ram)[1:], strict=True)}
        if layers is not None:
            coords[LAYER] = (LAYER, np.asarray(layers, dtype=np.int64))
    return _build("ram", values, coords, attrs)


def ablation_dataset(
    accuracy: Float[np.ndarray, "condition example"] | Bool[np.ndarray, "condition example"],
    logit_diff: Float[np.ndarray, "condition example"],
    *,
    method: Sequence[str],
    band: Sequence[str],
    fraction: Sequence[float],
    n_heads: Sequence[int],
    draw: Sequence[int],
    heads: Sequence[Sequence[tuple[int, int]]] | None = None,
    examples: Sequence[str] | None = None,
    **attrs: Any,
) -> xr.Dataset:
    """Accuracy and logit difference of every example under every condition.

    A condition is one set of heads ablated in one way; the unablated baseline is the condition ``method="none"``,
    ``band="none"``, ``fraction=0``. ``draw`` numbers the random sets of one size and method and is 0 for the others.
    ``heads`` says which heads a condition ablated (as text: ``"L0H2 L3H1"``; files of earlier versions do not have it).
    A single condition is a valid dataset: that is how conditions are saved while a study runs.
    """
    coords = {
        "method": (CONDITION, _names(method)),
        "band": (CONDITION, _names(band)),
        "fraction": (CONDITION, np.asarray(fraction, dtype=np.float64)),
        "n_heads": (CONDITION, np.asarray(n_heads, dtype=np.int64)),
        "draw": (CONDITION, np.asarray(draw, dtype=np.int64)),
    }
    if heads is not None:
        coords["heads"] = (CONDITION, _names([heads_text(chosen) for chosen in heads]))
    if examples is not None:
        coords[EXAMPLE] = (EXAMPLE, _names(examples))
    values = {"accuracy": np.asarray(accuracy, dtype=np.float64), "logit_diff": logit_diff}
    return _build("ablation", values, coords, attrs)


def heads_text(heads: Sequence[tuple[int, int]]) -> str:
    """Heads as text, as results store them: ``"L0H2 L3H1"``."""
    return " ".join(f"L{layer}H{head}" for layer, head in heads)


def with_top_apart(effects: xr.Dataset) -> xr.Dataset:
    """Give unrestricted control sets that contain a head of the top band of their size a band of their own."""
    if "heads" not in effects.coords or "unrestricted" not in effects["band"].values:
        return effects
    columns = [effects[name].values for name in ("method", "n_heads", "band", "heads")]
    tops = {(m, n): set(str(heads).split()) for m, n, band, heads in zip(*columns, strict=True) if band == "top"}
    named = [
        WITH_TOP if band == "unrestricted" and tops.get((m, n), set()) & set(str(heads).split()) else str(band)
        for m, n, band, heads in zip(*columns, strict=True)
    ]
    return effects.assign_coords(band=(CONDITION, _names(named)))


class ShownHead(NamedTuple):
    """A head whose maps are shown, the band it is shown for ("top", "bottom", ...), and its RAM."""

    layer: int
    head: int
    band: str
    ram: float


def maps_dataset(
    attention: Float[np.ndarray, "example shown token"],
    rect: Float[np.ndarray, "example token 4"],
    token_image: Int[np.ndarray, "example token"],
    facts: Sequence[Mapping[str, Any]],
    shown: Sequence[ShownHead],
    **attrs: Any,
) -> xr.Dataset:
    """What a few heads attend to in a few examples.

    Args:
        attention: mean attention of the question's tokens on each visual token; nan if an example has fewer tokens.
        rect: pixel rectangle of each visual token in its original picture.
        token_image: index of the picture a token lies in, -1 for padding.
        facts: for each example a dict with ``question, answer, prediction, pictures`` (file names beside the dataset)
            and ``evidence`` (lists ``[picture, x0, y0, x1, y1]``); optionally ``digests`` (of the pictures' pixels), to
            check the files, and ``queries``: for each head shown ``"question"`` (the mean over its tokens) or the one
            token that attends, with the share of the answer that is lost there. Stored as one JSON string in
            ``attrs["facts"]``.
        shown: which heads are shown, and why.
    """
    layer, head, band, ram = zip(*shown, strict=True)
    coords = {
        "shown_layer": ("shown", np.asarray(layer, dtype=np.int64)),
        "shown_head": ("shown", np.asarray(head, dtype=np.int64)),
        "shown_band": ("shown", _names(band)),
        "shown_ram": ("shown", np.asarray(ram, dtype=np.float64)),
    }
    values = {"attention": attention, "rect": rect, "token_image": token_image}
    return _build("maps", values, coords, {**attrs, "facts": json.dumps([dict(known) for known in facts])})


def check(dataset: xr.Dataset, kind: Kind | str) -> xr.Dataset:
    """Return the dataset if it is a valid ``kind``, otherwise raise an ``OutputError`` that names what is wrong."""
    if kind not in KINDS:
        raise OutputError.unknown("kind of result", kind, KINDS)
    layout = KINDS[kind]
    for what, required, present in (
        ("variable", layout.variables, dataset.data_vars),
        ("coordinate", layout.coords, dataset.coords),
    ):
        for name, dims in required.items():
            if name not in present:
                raise OutputError(
                    f"a {kind!r} dataset without the {what} {name!r}; it has {sorted(map(str, present)) or 'none'}",
                    f"{what} {name!r} over ({', '.join(dims)})",
                    f"build it with {layout.made_by}",
                )
            if dataset[name].dims != dims:
                given = f"{name!r} of a {kind!r} dataset has dimensions ({', '.join(map(str, dataset[name].dims))})"
                raise OutputError(given, f"({', '.join(dims)}), in this order", f"transpose it to {dims}")
    for name in layout.attrs:
        if name not in dataset.attrs:
            raise OutputError(f"a {kind!r} dataset without attrs[{name!r}]", "", f"use {layout.made_by}")
        try:
            parse_json(dataset.attrs[name])
        except (TypeError, ValueError) as error:
            raise OutputError(
                f"attrs[{name!r}] of a {kind!r} dataset is not JSON ({error})", "JSON", f"use {layout.made_by}"
            ) from error
    if kind == "ablation":
        _check_words(dataset, "method", METHODS)
        _check_words(dataset, "band", BANDS)
    if kind == "maps":
        _check_maps(dataset)
    return dataset


def map_facts(dataset: xr.Dataset) -> list[dict[str, Any]]:
    """The facts about each example of a "maps" dataset: its question, answer, prediction, pictures and evidence.

    Raises:
        OutputError: ``attrs["facts"]`` is damaged.
    """
    try:
        facts = parse_json(dataset.attrs["facts"])
    except (KeyError, TypeError, ValueError) as error:
        raise OutputError(f"attrs['facts'] is not a list ({error})", "one entry for each example") from error
    if not isinstance(facts, list) or not all(isinstance(known, Mapping) for known in facts):
        raise OutputError("attrs['facts'] is not a list of records", "one entry for each example")
    return facts


def _build(kind: str, values: Mapping[str, Any], coords: Mapping[str, Any], attrs: Mapping[str, Any]) -> xr.Dataset:
    layout = KINDS[kind]
    arrays = {name: np.asarray(value) for name, value in values.items()}
    for name, value in arrays.items():
        if value.ndim != len(layout.variables[name]):
            raise OutputError(
                f"{name!r} has shape {value.shape}",
                f"dimensions ({', '.join(layout.variables[name])})",
                "give an array with these dimensions, in this order",
            )
    try:
        dataset = xr.Dataset({name: (layout.variables[name], value) for name, value in arrays.items()}, dict(coords))
    except ValueError as error:  # xarray names the dimension and both lengths
        shapes = ", ".join(f"{name} {value.shape}" for name, value in arrays.items())
        raise OutputError(f"lengths that differ: {shapes}", str(error), "make the shared dimensions equal") from error
    for name, (unit, sign) in layout.units.items():
        dataset[name].attrs.update(unit=unit, sign=sign)
    dataset.attrs.update(attrs, kind=kind, schema=VERSION)
    return check(dataset, kind)


def _names(values: Sequence[str]) -> np.ndarray:
    # An empty list would become float64 and fail the next concatenation.
    return np.asarray([str(value) for value in values], dtype=str)


def _check_words(dataset: xr.Dataset, coord: str, known: tuple[str, ...]) -> None:
    for word in np.unique(dataset[coord].values.astype(str)):
        if word not in known and not (coord == "band" and word.startswith("by ")):
            raise OutputError(f"a condition has {coord}={str(word)!r}", ", ".join(known), suggestion(str(word), known))


def _check_maps(dataset: xr.Dataset) -> None:
    facts = map_facts(dataset)
    if len(facts) != dataset.sizes[EXAMPLE]:
        raise OutputError(
            f"{len(facts)} entries in attrs['facts'] for {dataset.sizes[EXAMPLE]} examples",
            "one entry for each example",
        )
    for i, known in enumerate(facts):
        if missing := [name for name in MAP_FACTS if name not in known]:
            raise OutputError(f"example {i} does not say its {', '.join(missing)}", ", ".join(MAP_FACTS))
        for name in ("pictures", "digests"):
            texts = known.get(name, known["pictures"])
            if not _is_list(texts, str) or len(texts) != len(known["pictures"]) or not texts:
                raise OutputError(f"example {i} has other {name}: {texts!r:.80}", "a string for each picture")
        boxes = known["evidence"]
        if not _is_list(boxes, list) or not all(len(box) == 5 and _is_list(box, int | float) for box in boxes):
            raise OutputError(f"example {i} has other evidence: {boxes!r:.80}", "a list of [picture, x0, y0, x1, y1]")
    if dataset.sizes["corner"] != 4:
        raise OutputError(f"'rect' has {dataset.sizes['corner']} corners", "4: x0, y0, x1, y1")


def _is_list(value: Any, of: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, of) for item in value)
