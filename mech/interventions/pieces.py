"""Chunked prefill: a prompt that is read into a KV cache piece by piece, and what specs mean there.

    run.generate(inputs, prefill_chunk_size=512)          # positions are those of the whole prompt, in every piece

So a prompt in pieces gives the same result as in one run. Refused are cases in which an early piece depends on later
ones (``Ablate(to="paper")``, prompts that look ahead), and a cache that was filled before, because what was done to its
positions is unknown.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mech.errors import ExperimentError
from mech.inputs import Inputs
from mech.interventions.specs import Ablate, Spec
from mech.model import HookedMLLM
from mech.model.generation import looks_ahead


def check_pieces(model: HookedMLLM, specs: Sequence[Spec], inputs: Inputs, options: Mapping[str, Any]) -> None:
    """Refuse a prompt in pieces that would not give the same result as the whole.

    Raises:
        ExperimentError: a cache that holds positions already; a spec or prompt for which a piece needs later ones.
    """
    cache, chunk = options.get("past_key_values"), options.get("prefill_chunk_size")
    if cache is not None and (read := int(cache.get_seq_length())):
        raise ExperimentError(
            f"interventions after a cache that has read {read} positions: their effect on these is unknown",
            "the whole prompt in one call", "leave past_key_values out; generate(prefill_chunk_size=...) saves memory",
        )  # fmt: skip
    if chunk is None or chunk >= len(inputs.layouts[0].kind):
        return
    for spec in specs:
        if isinstance(spec, Ablate) and spec.to == "paper":
            raise ExperimentError(
                f"{spec!r} on a prompt in chunks: every position attends to the whole prompt", "a prompt in one chunk",
                "leave prefill_chunk_size out",
            )  # fmt: skip
    if looks_ahead(model.hf_model, inputs.tensors):
        raise ExperimentError(
            f"a prompt of {model.cfg.family} in chunks: some of its positions attend to later ones", "a causal prompt",
            "leave prefill_chunk_size out",
        )  # fmt: skip


def counterpart(source: Tensor, value: Tensor, start: int, stop: int, square: bool) -> Tensor:
    """Another run's activation at the positions of ``value``; positions without a counterpart keep their value.

    Args:
        source: the activation from a run on the whole prompt.
        value: the activation at positions ``start`` to ``stop``: a piece of the prompt, or prompt and generated tokens.
        square: both are scores or a pattern, with query rows before keys; the cache holds keys up to ``stop``.
    """
    if source.shape[1:] == value.shape[1:] and start == 0:
        return source
    new, axis = value.clone(), 2 if square else 1
    rows = min(stop, source.shape[axis]) - start
    if not square:
        new[:, :rows] = source[:, start : start + rows].to(value)
        return new
    # A windowed layer's cache has dropped its first keys, and a static one has room for more than was read.
    first = max(0, stop - value.shape[3])
    keys = min(source.shape[3] - first, value.shape[3])
    new[:, :, :rows, :keys] = source[:, :, start : start + rows, first : first + keys].to(value)
    return new
