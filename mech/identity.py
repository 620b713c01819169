"""Which model a number was made on: a digest of its weights, and the refusal of what another model made.

A head is a place in one training: L3H5 of another model is another thing, even where the two have one shape. What is
carried from one measurement to the next (a ``Ranking``, a ``Reference``) therefore remembers the weights it was made
with, and is refused on others unless that is asked for by name.
"""

import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from mech.errors import ExperimentError

# The digest of a model that has not changed since it was last asked for. Weak: it keeps no model alive.
_digests: "weakref.WeakKeyDictionary[Any, tuple[Any, str]]" = weakref.WeakKeyDictionary()


def weight_digest(model: Any) -> str | None:
    """SHA-256 over the names, shapes, dtypes and bytes of all weights; None when they cannot be read.

    The digest is remembered per model and made anew when a weight was replaced or written in place (through torch;
    writes through ``.data`` or a numpy view are not seen). Weights that lie on no device (``meta``: offloaded to disk)
    cannot be read, and None says so. The digest does not depend on the wrapper or on the device.
    """
    hf = inner_model(model)
    if not hasattr(hf, "state_dict"):
        return None
    marks = tuple((name, w.data_ptr(), 0 if w.is_inference() else w._version) for name, w in _tensors(hf))
    known = _digests.get(hf)
    if known is not None and known[0] == marks:
        return known[1]
    state = {name: weight for name, weight in hf.state_dict().items() if hasattr(weight, "data_ptr")}
    if any(getattr(weight, "is_meta", False) for weight in state.values()):
        return None

    import torch  # only here: results are read without it

    sha = hashlib.sha256()
    for name in sorted(state):
        weight = state[name].detach()
        sha.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        sha.update(weight.reshape(-1).contiguous().view(torch.uint8).cpu().numpy())
    _digests[hf] = (marks, sha.hexdigest())
    return sha.hexdigest()


def _tensors(hf: Any) -> Iterator[tuple[str, Any]]:
    """Everything of a model that a weight can be, by name: quicker than its ``state_dict``, which copies."""
    for prefix, module in hf.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{name}", tensor


def weights_in(attrs: Mapping[str, Any]) -> str:
    """The digest of weights in the provenance of a result; "" where it says none."""
    record = attrs.get("provenance")
    try:
        record = json.loads(record) if isinstance(record, str) else record
        return str(record["model"]["weights"] or "")  # type: ignore[index]
    except (ValueError, TypeError, KeyError):  # no provenance, or that of no model
        return ""


def made_elsewhere(what: str, name: str, weights: str, model: Any, allow_other_model: bool = False) -> str:
    """The other model that something was made on, in words; "" where it is this one, or where that is not known.

    Args:
        what: what it is ("a ranking").
        name, weights: of the model it was made on.
        model: the model it is used on.
        allow_other_model: do not refuse it.

    Raises:
        ExperimentError: it was made on other weights.
    """
    own = weight_digest(model) if weights else None
    if own is None or own == weights:
        return ""
    other = f"{name or 'an unnamed model'} (weights {weights[:8]})"
    if not allow_other_model:
        raise ExperimentError(
            f"{what} of {other} for {model.name} (weights {own[:8]})",
            "one of this model: another training, step or precision has other heads",
            "make it on this model, or pass allow_other_model=True, which the result then says",
        )
    return f"{what} of {other}"


def inner_model(model: Any) -> Any:
    """The Hugging Face model inside a wrapper, or the model itself."""
    # Not `unwrap()`: that gives the model back, and a record must not change what it records.
    for name in ("hf_model", "hf", "_hf_model", "_hf"):
        if (inner := getattr(model, name, None)) is not None and hasattr(inner, "state_dict"):
            return inner
    return model
