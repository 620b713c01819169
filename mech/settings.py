"""How much a study measures: what decides its numbers, and what each model is studied with by default.

    Settings(n_test=200)                       # more test samples, all else by default
    default_settings(["reference:smol"])       # what `mech study --model reference:smol` takes

Sizes are chosen by counted cost: forwards, times what a forward takes. The models of the package are small, and studied
in several domains with a hundred test samples each; a forward of ``reference:smol`` takes seventy times as long, so it
is studied in two domains, with fewer samples and sets, and its heads are patched in the first (docs/smol.md counts it).
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
    """What decides the numbers of a study; the folder of another setting is refused.

    Attributes:
        n_find: samples of each domain that find the heads.
        n_test: other samples, that test them under the first method of ablation.
        n_other: those of them that test the other methods, at most.
        n_maps: pictures that are drawn.
        n_causal: test samples whose heads are patched one by one; 0 leaves that out.
        causal_domains: of a model's domains so many, from the first on, are patched; 0 for all.
        n_gating: samples that gates of heads are fitted to (causal head gating, few steps); 0 leaves that out.
        n_order: samples that order heads for that.
        n_random: random sets of the size that the claim is made at (a twentieth of the heads, by the first method):
            the p-value over sets cannot fall below 1 / (1 + n_random).
        n_control: random sets of every other size, method and control, at most: intervals over few sets are covered
            less often than they say.
        fractions: sizes of the bands under mean ablation; an int is a number of heads.
        other_fractions: sizes under the other methods.
        methods: how heads are ablated.
        shares: of the KV heads that stay dense in sparse inference; none leaves that out.
        choices: how the dense heads are chosen.
        n_sets: random sets of dense heads of each share.
        n_long: samples of sparse inference: some rank the heads, the others test them.
        pages: pages of those samples; 0 takes the domain with the longest prompts.
        n_forms: scenes shown and written out, half of them to find heads; for a model that was tuned from a language
            model which can still be opened. 0 leaves that out.
        seed: of samples, random sets and resampling.
        batch_size: samples per forward.

    Raises:
        ExperimentError: a number that is too small to say anything, a share of more than all, an unknown method.
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
        """The settings of a model's domain at this place: those after ``causal_domains`` have no causal report."""
        return replace(self, n_causal=0) if 0 < self.causal_domains <= place else self


SMOL = Settings(
    n_test=48, n_other=24, n_causal=12, causal_domains=1, n_gating=0, n_order=4, n_random=20, n_control=5,
    fractions=(1, 0.05, 0.2), other_fractions=(0.05,), methods=("mean", "zero", "resample"), shares=(0.25,),
    choices=("ram", "bottom", "random", "vision", "layers"), n_sets=8, n_long=32, pages=8, n_forms=48, batch_size=8,
)  # fmt: skip
# Models with sizes of their own, and the domains they are studied in.
OWN = {"reference:smol": (SMOL, ("documents", "grounding"))}


def default_settings(models: Sequence[str]) -> Settings:
    """The sizes of a study of these models: those of the one model that has its own, else the defaults."""
    return OWN[models[0]][0] if len(models) == 1 and models[0] in OWN else Settings()


def default_domains(models: Sequence[str]) -> tuple[str, ...] | None:
    """The domains that go with ``default_settings``; None for all that a model knows."""
    return OWN[models[0]][1] if len(models) == 1 and models[0] in OWN else None
