"""How much a study measures: the settings that determine its numbers, and the defaults of each model.

    Settings(n_test=200)                       # more test samples, all else by default
    default_settings(["reference:smol"])       # what `mech study --model reference:smol` uses

Sizes are chosen by cost: the number of forwards times the time of one. The models of the package are small, and are
studied in several domains with a hundred test samples each; a forward of ``reference:smol`` takes seventy times as
long, so it is studied in two domains, with fewer samples and sets, and its heads are patched in the first (docs/smol.md
has the counts).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from mech.arguments import NOT_EMPTY, Amount, Count, Rule, Seed, Whole, checked, some_of
from mech.interventions import METHODS
from mech.sparse.frontier.acceleration import CHOICES

Some = Annotated[int, Rule("a whole number of at least 2", lambda value: value >= 2)]


@checked
@dataclass(frozen=True)
class Settings:
    """What determines the numbers of a study; a folder made with other settings is refused.

    Attributes:
        n_find: samples of each domain that find the heads.
        n_test: other samples, that test them under the first method of ablation.
        n_other: how many of those test the other methods, at most.
        n_maps: samples whose attention maps are drawn.
        n_causal: test samples on which heads are patched one by one; 0 leaves this out.
        causal_domains: how many of a model's domains are patched, from the first on; 0 for all.
        n_gating: samples that the gates of heads are fitted to (causal head gating, few steps); 0 leaves this out.
        n_order: samples that order the heads for patching.
        n_random: random sets of the size at which the claim is made (a twentieth of the heads, by the first method):
            the p-value over sets cannot fall below 1 / (1 + n_random).
        n_control: random sets of every other size, method and control, at most: intervals over few sets cover the
            truth less often than they state.
        fractions: sizes of the bands under mean ablation; an int is a number of heads.
        other_fractions: sizes under the other methods.
        methods: how heads are ablated.
        shares: of the KV heads that stay dense in sparse inference; an empty tuple leaves this out.
        choices: how the dense heads are chosen.
        n_sets: random sets of dense heads for each share.
        n_long: samples of sparse inference: some rank the heads, the others test them.
        pages: pages in those samples; 0 takes the domain with the longest prompts.
        n_forms: scenes shown as pictures and written out, half of them to find heads; for a model tuned from a language
            model that can still be opened. 0 leaves this out.
        seed: of samples, random sets and resampling.
        batch_size: samples per forward.

    Raises:
        ExperimentError: a number too small to say anything, a share above 1, an unknown method.
    """

    n_find: Some = 32
    n_test: Some = 100
    n_other: Some = 32
    n_maps: Count = 3
    n_causal: Whole = 10
    causal_domains: Whole = 0
    n_gating: Whole = 6
    n_order: Some = 6
    n_random: Count = 25
    n_control: Count = 6
    fractions: Annotated[tuple[Amount, ...], NOT_EMPTY] = (1, 0.02, 0.05, 0.1, 0.2)
    other_fractions: Annotated[tuple[Amount, ...], NOT_EMPTY] = (0.05, 0.2)
    methods: some_of(METHODS) = METHODS
    shares: tuple[Amount, ...] = (0.02, 0.08, 0.25)
    choices: some_of(CHOICES) = CHOICES
    n_sets: Count = 8
    n_long: Some = 64
    pages: Whole = 0
    n_forms: Whole = 0
    seed: Seed = 0
    batch_size: Count = 16

    def of_domain(self, place: int) -> "Settings":
        """The settings of a model's domain at this index: those from ``causal_domains`` on have no causal report."""
        return replace(self, n_causal=0) if 0 < self.causal_domains <= place else self


SMOL = Settings(
    n_test=48, n_other=24, n_causal=12, causal_domains=1, n_gating=0, n_order=4, n_random=20, n_control=5,
    fractions=(1, 0.05, 0.2), other_fractions=(0.05,), methods=("mean", "zero", "resample"), shares=(0.25,),
    choices=("ram", "bottom", "random", "vision", "layers"), n_sets=8, n_long=32, pages=8, n_forms=48, batch_size=8,
)  # fmt: skip
# Models with their own sizes, and the domains they are studied in.
OWN = {"reference:smol": (SMOL, ("documents", "grounding"))}


def default_settings(models: Sequence[str]) -> Settings:
    """The sizes of a study of these models: a single model's own if it has them, else the defaults."""
    return OWN[models[0]][0] if len(models) == 1 and models[0] in OWN else Settings()


def default_domains(models: Sequence[str]) -> tuple[str, ...] | None:
    """The domains that go with ``default_settings``; None for all domains of a model."""
    return OWN[models[0]][1] if len(models) == 1 and models[0] in OWN else None
