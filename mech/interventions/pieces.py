"""A prompt that is read in pieces, one behind the other into a KV cache, and what specs mean there.

    run.generate(inputs, prefill_chunk_size=512)          # positions are those of the whole prompt, in every piece

So a prompt in pieces gives what it gives in one run. Refused is what an early piece would have to know of later ones:
``Ablate(to="paper")`` and prompts that look ahead; and a cache that was filled before, as nobody knows what was done
to the positions in it.
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
    """Refuse pieces of a prompt that would not give what the whole gives.

    Raises:
        ExperimentError: a cache that has read something, a spec or a prompt of which a piece needs later ones.
    """
    cache, chunk = options.get("past_key_values"), options.get("prefill_chunk_size")
    if cache is not None and (read := int(cache.get_seq_length())):
        raise ExperimentError(
            f"interventions behind a cache that has read {read} positions: what they do to these is not known",
            "the whole prompt in one call", "leave past_key_values out; generate(prefill_chunk_size=...) saves memory",
        )  # fmt: skip
    if chunk is None or chunk >= len(inputs.layouts[0].kind):
        return
    for spec in specs:
        if isinstance(spec, Ablate) and spec.to == "paper":
            raise ExperimentError(
                f"{spec!r} of a prompt in pieces: every position attends to the whole prompt", "a prompt in one piece",
                "leave prefill_chunk_size out",
            )  # fmt: skip
    if looks_ahead(model.hf_model, inputs.tensors):
        raise ExperimentError(
            f"a prompt of {model.cfg.family} in pieces: some of its positions see later ones", "a causal prompt",
            "leave prefill_chunk_size out",
        )  # fmt: skip


def counterpart(source: Tensor, value: Tensor, start: int, stop: int, square: bool) -> Tensor:
    """Another run's activation at the positions of ``value``; what has no counterpart there stays as it is.

    Args:
        source: the activation of a run of the whole prompt.
        value: that of positions ``start`` to ``stop``: a piece of the prompt, or the prompt and what is written.
        square: both are scores or a pattern, with query rows before keys, which a cache holds up to ``stop``.
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
