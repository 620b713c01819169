"""The planted circuits: which heads each has, and what is true of it. ``planted.circuit(name)`` builds one.

Each function states one circuit: its heads as wires (``planting``), its corruption (``scenes``) and, derived by
reasoning rather than by running it, what patching, zeroing and every path does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mech.reference.planted.planting import (
    FALLBACK_KEY,
    FALLBACK_QUERY,
    HARD,
    HEADS,
    LOGIT,
    Head,
    Wire,
    distance,
)

FAMILIES = ("llava", "qwen2_5_vl")
RECENCY = 10.0  # the recency head scores RECENCY * cos(PACE * distance)
Roles = tuple[str, ...]


class Effect(NamedTuple):
    """What switching something (heads' z at all positions, or one path) does, in shares of clean minus corrupted.

    ``lost`` is what noising takes away: the corrupted value in the clean run. ``recovered`` is what denoising gives
    back: the clean value in the corrupted run. On a scale where 0 is the corrupted run and 1 the clean one, noising
    reads ``1 - lost`` and denoising ``recovered``.
    """

    lost: float
    recovered: float


WHOLE, NOTHING = Effect(1.0, 1.0), Effect(0.0, 0.0)


@dataclass(frozen=True)
class Circuit:
    """One circuit as data; ``Truth`` in ``planted`` says what most of the fields are.

    ``corruption`` changes the ``fill`` of the evidence, takes it away (``removed``), asks another ``question`` or swaps
    two names (``order``). ``words`` follow the colour's word in the question. ``gate`` is the gain of the product
    ``left * right`` in the MLP of layer 1.
    """

    heads: Mapping[str, Head]
    corruption: str
    effects: Mapping[Roles, Effect]
    zeroed: Mapping[Roles, float]
    edges: Mapping[tuple[str, str], Effect]
    ram_of: Mapping[str, float | str]  # RAM of each role: a number, "evenly" or "near"
    words: str = ""
    answer_mark: bool = False
    gate: float = 0.0
    kv_heads: int = HEADS
    families: tuple[str, ...] = FAMILIES

    @property
    def logit_diff(self) -> tuple[float, float]:
        # Against "none", which always has half a colour's logit; or against a colour that is not there.
        return (LOGIT / 2, -LOGIT / 2) if self.corruption == "removed" else (LOGIT, -LOGIT)


def _fetch(
    layer: int, head: int, by: str = "ask", on: str = "cell", to: str = "answer", **more: tuple[Wire, ...]
) -> Head:
    """A retrieval head: attends to the cell whose ``on`` is the colour it has in ``by``, writes that cell's fill.

    ``more`` wires go to its ``query``, ``value`` and ``write``.
    """
    return Head(
        layer,
        head,
        query=(Wire(by, "match", HARD), FALLBACK_QUERY, *more.get("query", ())),
        key=(Wire(on, "match"), FALLBACK_KEY),
        value=(Wire("fill", "colour"), *more.get("value", ())),
        write=(Wire(to, "colour"), *more.get("write", ())),
    )


def _carry(layer: int, head: int, what: str, to: str) -> Head:
    """A head that attends from anywhere to the colour's word and writes there what the word's position holds."""
    return Head(
        layer,
        head,
        query=(Wire("constant", "sink", HARD),),
        key=(Wire("word", "sink"), Wire("first", "sink", 0.5)),
        value=(Wire(what, "colour"),),
        write=(Wire(to, "colour"),),
    )


def _roles(kv_heads: int) -> Circuit:
    """Four ways to attend, in layer 1: a retrieval head (RAM 1), a sink head (all mass on the first token, RAM 0), one
    that attends evenly (RAM |evidence| / visible keys, averaged over the question) and one that attends to what is
    near.

    The question has four words and the colour is the first: the head ``carry`` brings it to the others, so that the
    retrieval head attends to the evidence from each. Only that head writes to the answer; the other three write the
    fills they see to a subspace that nothing reads. The corruption gives the evidence another fill: ``carry`` is needed
    (without it no head knows what is asked) but does the same in both runs, so that patching cannot see it.

    With two key/value heads (``gqa``) retrieval and sink head share keys and values, as do the other two: in the first
    group exactly one query head retrieves.
    """
    unread = (Wire("unread", "colour"),)
    fills = (Wire("fill", "colour"),)
    heads = {
        "carry": _carry(0, 0, "ask", "asked"),
        "retrieval": _fetch(1, 0, by="asked"),
        "sink": Head(1, 1, (FALLBACK_QUERY,), (FALLBACK_KEY,), fills, unread),
        "uniform": Head(1, 2, value=fills, write=unread),
        "recency": Head(1, 3, distance(RECENCY), (Wire("constant", "near"),), fills, unread),
    }
    idle = {(role,): NOTHING for role in ("carry", "sink", "uniform", "recency")}
    return Circuit(
        heads,
        "fill",
        effects={("retrieval",): WHOLE, **idle},
        zeroed={("carry",): 0.0, ("retrieval",): 0.0, ("sink",): LOGIT, ("uniform",): LOGIT, ("recency",): LOGIT},
        edges={
            ("retrieval", "logits"): WHOLE,
            ("carry", "retrieval.q"): NOTHING,
            ("uniform", "logits"): NOTHING,
        },
        ram_of={"carry": 0.0, "retrieval": 1.0, "sink": 0.0, "uniform": "evenly", "recency": "near"},
        words=" which colour ?",
        kv_heads=kv_heads,
    )


def _q_composition() -> Circuit:
    """``carry`` brings the colour that is asked for from its word to the last token; ``retrieval`` queries with it.

    The corruption asks for another colour in the same picture: the cells are unchanged, so all of the effect passes
    through the query of ``retrieval``, none through its keys and values, and none goes straight to the logits (nothing
    but a query reads what ``carry`` writes).
    """
    heads = {"carry": _carry(0, 0, "ask", "asked"), "retrieval": _fetch(1, 0, by="asked")}
    return Circuit(
        heads,
        "question",
        effects={("carry",): WHOLE, ("retrieval",): WHOLE},
        zeroed={("carry",): 0.0, ("retrieval",): 0.0},
        edges={**_one_way("carry", "retrieval", "q"), ("retrieval", "logits"): WHOLE},
        ram_of={"carry": 0.0, "retrieval": 1.0},
        words=" ?",
    )


def _k_composition() -> Circuit:
    """Asked "red", the model says the fill of the cell *after* the red one.

    ``previous`` writes into each position the name of the cell before (score ``8000 cos(PACE (distance - 1))``: the
    next best key is 40 below); ``retrieval`` uses that as its key. The corruption swaps two names and keeps all fills:
    the effect passes through the keys of ``retrieval`` only. Distances are 1-D positions, so this is LLaVA only.
    """
    previous = Head(
        0,
        0,
        query=distance(8000.0, shift=1),
        key=(Wire("constant", "near"),),
        value=(Wire("cell", "colour"),),
        write=(Wire("before", "colour"),),
    )
    return Circuit(
        {"previous": previous, "retrieval": _fetch(1, 0, on="before")},
        "order",
        effects={("previous",): WHOLE, ("retrieval",): WHOLE},
        zeroed={("previous",): 0.0, ("retrieval",): 0.0},
        edges={**_one_way("previous", "retrieval", "k"), ("retrieval", "logits"): WHOLE},
        ram_of={"previous": 0.0, "retrieval": 1.0},
        families=("llava",),
    )


def _and() -> Circuit:
    """Two heads fetch the same fill, and the MLP of layer 1 says a colour if both did: ``left * right``.

    The corruption takes the fill away. Noising one of the heads loses everything, denoising one recovers nothing. The
    gradient at the corrupted run is zero for each (the other factor is zero): attribution from there finds nothing.
    """
    return Circuit(
        {"left": _fetch(0, 0, to="left"), "right": _fetch(0, 1, to="right")},
        "removed",
        effects={("left",): Effect(1.0, 0.0), ("right",): Effect(1.0, 0.0), ("left", "right"): WHOLE},
        zeroed={("left",): -LOGIT / 2, ("right",): -LOGIT / 2, ("left", "right"): -LOGIT / 2},
        edges={(side, "mlp.1"): Effect(1.0, 0.0) for side in ("left", "right")}
        | {(side, "logits"): NOTHING for side in ("left", "right")},
        ram_of={"left": 1.0, "right": 1.0},
        gate=1.0,
    )


def _or() -> Circuit:
    """Two heads fetch the same fill and each writes the answer; the MLP subtracts ``left * right`` again.

    That is ``left + right - left * right``: one is as good as two. Noising one of the heads loses nothing, denoising
    one recovers everything. Single paths tell another story: the direct path of either head is worth the whole (noised
    alone: 0 + 1 - 1), and the path through the MLP is worth minus the whole in the clean run (1 + 1 - 0) and nothing in
    the corrupted one.
    """
    heads = {side: _fetch(0, i, to=side, write=(Wire("answer", "colour"),)) for i, side in enumerate(("left", "right"))}
    return Circuit(
        heads,
        "removed",
        effects={("left",): Effect(0.0, 1.0), ("right",): Effect(0.0, 1.0), ("left", "right"): WHOLE},
        zeroed={("left",): LOGIT / 2, ("right",): LOGIT / 2, ("left", "right"): -LOGIT / 2},
        edges={(side, "logits"): WHOLE for side in ("left", "right")}
        | {(side, "mlp.1"): Effect(-1.0, 0.0) for side in ("left", "right")},
        ram_of={"left": 1.0, "right": 1.0},
        gate=-1.0,
    )


def _backup() -> Circuit:
    """``first`` fetches the fill, writes the answer and a flag ``seen``; ``second``, in layer 1, fetches it if the
    flag is missing: the flag lifts the score of the first token from 20 to 60, above the evidence's 40.

    So ``second`` has RAM 0 and no effect, until ``first`` is noised or zeroed. The direct effect of ``first`` is the
    whole; the path through the query of ``second`` gives it back (noised alone, both say the answer: lost -1).
    """
    return Circuit(
        {
            "first": _fetch(0, 0, value=(Wire("fill", "flag"),), write=(Wire("seen", "flag"),)),
            "second": _fetch(1, 0, query=(Wire("seen", "sink", HARD),)),
        },
        "removed",
        effects={("first",): Effect(0.0, 1.0), ("second",): NOTHING, ("first", "second"): WHOLE},
        zeroed={("first",): LOGIT / 2, ("second",): LOGIT / 2, ("first", "second"): -LOGIT / 2},
        edges={
            ("first", "logits"): WHOLE,
            ("first", "second.q"): Effect(-1.0, 0.0),
            ("first", "second.k"): NOTHING,
            ("first", "second.v"): NOTHING,
            ("second", "logits"): NOTHING,
        },
        ram_of={"first": 1.0, "second": 0.0},
    )


def _mover() -> Circuit:
    """``retrieval`` fetches the fill at the colour's word; ``mover`` carries it on to the last token, ``<answer>``.

    The mover never attends to the picture (RAM 0) and is as necessary as the head that does. All of the effect passes
    through its values: it attends to the same word in both runs. The path is linear, so attribution is exact.
    """
    return Circuit(
        {"retrieval": _fetch(0, 0, to="left"), "mover": _carry(1, 0, "left", "answer")},
        "fill",
        effects={("retrieval",): WHOLE, ("mover",): WHOLE},
        zeroed={("retrieval",): 0.0, ("mover",): 0.0},
        edges={**_one_way("retrieval", "mover", "v"), ("mover", "logits"): WHOLE},
        ram_of={"retrieval": 1.0, "mover": 0.0},
        answer_mark=True,
    )


def _one_way(sender: str, receiver: str, path: str) -> dict[tuple[str, str], Effect]:
    edges = {(sender, f"{receiver}.{p}"): WHOLE if p == path else NOTHING for p in "qkv"}
    return {**edges, (sender, "logits"): NOTHING}


CIRCUITS: dict[str, Circuit] = {
    "roles": _roles(kv_heads=HEADS),
    "gqa": _roles(kv_heads=HEADS // 2),
    "q_composition": _q_composition(),
    "k_composition": _k_composition(),
    "and": _and(),
    "or": _or(),
    "backup": _backup(),
    "mover": _mover(),
}
