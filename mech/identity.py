"""Which model a number comes from: a digest of its weights, and the refusal of results from another model.

A head belongs to one trained model: L3H5 of another model is a different head, even if both have the same shape. What
is carried from one measurement to the next (a ``Ranking``, a ``Reference``) therefore records the weights it was made
with, and is refused on others unless explicitly allowed.
"""

import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from mech.errors import ExperimentError

# The digest of every model that has not changed since the last call. Weak: it keeps no model alive.
_digests: "weakref.WeakKeyDictionary[Any, tuple[Any, str]]" = weakref.WeakKeyDictionary()

LARGE = 2**30  # bytes of weights from which on sums stand in for them: SHA-256 of 17 GB takes half a minute
SUMS = ".sums"  # the end of such a digest
_BLOCK, _AT_ONCE = 2**17, 2**6  # eight-byte words per sum, and sums at once on a GPU


def weight_digest(model: Any, *, by_bytes: bool = False) -> str | None:
    """SHA-256 over the names, shapes, dtypes and bytes of all weights; None when they cannot be read.

    For a model of ``LARGE`` bytes or more, sums computed on the weights' device stand in for their bytes (``_sums``),
    so that the digest takes as long as reading the weights there once; not with ``by_bytes``, as in earlier versions.

    The digest is cached per model and computed anew when a weight has been replaced or written in place (through torch;
    writes through ``.data`` or a numpy view go unnoticed). Weights on no device (``meta``: offloaded to disk) cannot be
    read, which gives None. The digest does not depend on the wrapper or on the device.
    """
    if (record := getattr(model, "elsewhere", None)) is not None:  # no weights here
        return record.get("weights")
    hf = inner_model(model)
    if not hasattr(hf, "state_dict"):
        return None
    tensors = ((name, w.data_ptr(), 0 if w.is_inference() else w._version) for name, w in _tensors(hf))
    marks = (by_bytes, *tensors)
    known = _digests.get(hf)
    if known is not None and known[0] == marks:
        return known[1]
    state = {name: weight for name, weight in hf.state_dict().items() if hasattr(weight, "data_ptr")}
    if any(getattr(weight, "is_meta", False) for weight in state.values()):
        return None
    summed = not by_bytes and sum(weight.nbytes for weight in state.values()) >= LARGE

    import torch  # only here: reading results does not need it

    sha = hashlib.sha256()
    for name in sorted(state):
        weight = state[name].detach()
        sha.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        flat = weight.reshape(-1).contiguous().view(torch.uint8)
        sha.update((_sums(flat) if summed else flat).cpu().numpy())
    digest = sha.hexdigest() + SUMS * summed
    _digests[hf] = (marks, digest)
    return digest


def _sums(flat: Any) -> Any:
    """For each block of 2**17 eight-byte words: the sum of word times an odd number of its place, modulo 2**64.

    Integers, so the same on every device. Any change of one word changes its sum; this is not a cryptographic digest.
    """
    import torch

    words = _filled(flat.clone() if flat.storage_offset() % 8 else flat, 8).view(torch.int64)
    mixed = torch.arange(1, _BLOCK + 1, device=flat.device) * -7046029254386353131  # 0x9E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 31)) * -4658895280553007687 | 1  # 0xBF58476D1CE4E5B9
    step = _BLOCK if flat.is_cpu else _BLOCK * _AT_ONCE  # on a CPU what stays in its caches
    return torch.cat([(_filled(part, _BLOCK).unflatten(0, (-1, _BLOCK)) * mixed).sum(1) for part in words.split(step)])


def _filled(flat: Any, size: int) -> Any:
    """Padded with zeros at the end to a multiple of ``size``."""
    import torch

    rest = -len(flat) % size
    return torch.nn.functional.pad(flat, (0, rest)) if rest else flat


def _tensors(hf: Any) -> Iterator[tuple[str, Any]]:
    """All parameters and buffers of a model, by name: quicker than its ``state_dict``, which copies."""
    for prefix, module in hf.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{name}", tensor


def weights_in(attrs: Mapping[str, Any]) -> str:
    """The weight digest in the provenance of a result; "" if it has none."""
    record = attrs.get("provenance")
    try:
        record = json.loads(record) if isinstance(record, str) else record
        return str(record["model"]["weights"] or "")  # type: ignore[index]
    except (ValueError, TypeError, KeyError):  # no provenance, or one without a model
        return ""


def made_elsewhere(what: str, name: str, weights: str, model: Any, allow_other_model: bool = False) -> str:
    """The other model that something was made on, in words; "" if it is this one, or if that is not known.

    Args:
        what: what was made ("a ranking").
        name, weights: of the model it was made on.
        model: the model it is used on.
        allow_other_model: do not refuse it.

    Raises:
        ExperimentError: it was made on other weights.
    """
    own = weight_digest(model, by_bytes=not weights.endswith(SUMS)) if weights else None
    if own is None or own == weights:
        return ""
    other = f"{name or 'an unnamed model'} (weights {weights[:8]})"
    if not allow_other_model:
        raise ExperimentError(
            f"{what} of {other} for {model.name} (weights {own[:8]})",
            "one made on this model: another training run, step or precision has other heads",
            "make it on this model, or pass allow_other_model=True, which the result records",
        )
    return f"{what} of {other}"


def inner_model(model: Any) -> Any:
    """The Hugging Face model inside a wrapper, or the model itself."""
    # Not `unwrap()`: it takes the wrapper off, and a record must not change what it records.
    for name in ("hf_model", "hf", "_hf_model", "_hf"):
        if (inner := getattr(model, name, None)) is not None and hasattr(inner, "state_dict"):
            return inner
    return model
