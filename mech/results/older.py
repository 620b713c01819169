"""Results written by earlier versions, read with the names of this version."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

# Labels in datasets and keys in JSON files: name in an earlier version -> name now.
LABELS = {
    "looks and matters": "attending and causal",
    "looks, does not matter": "attending, not causal",
    "matters, does not look": "causal, not attending",
}
SETTINGS = {"n_looks": "n_maps"}
FILES = {"maps.nc": "looks.nc"}  # name now -> name in an earlier version


def renewed(dataset: xr.Dataset) -> xr.Dataset:
    """A dataset of an earlier version as this one would have written it; any other unchanged."""
    if dataset.attrs.get("kind") == "looks" and "look" in dataset.dims:
        facts = dataset.attrs.pop("looks")
        dataset = dataset.rename(look="example").assign_attrs(kind="maps", facts=facts)
    if "quadrant" in dataset and np.isin(dataset["quadrant"].values, list(LABELS)).any():
        labels = dataset["quadrant"]
        words = np.array([LABELS.get(str(word), str(word)) for word in labels.values.ravel()])
        dataset["quadrant"] = labels.copy(data=words.reshape(labels.shape))
    return dataset


def renewed_record(value: Any) -> Any:
    """The same for the content of a JSON file."""
    if isinstance(value, Mapping):
        names = LABELS | SETTINGS
        return {names.get(name, name): renewed_record(part) for name, part in value.items()}
    return [renewed_record(part) for part in value] if isinstance(value, list) else value


def older_file(path: Any) -> Any:
    """``path``, or the file that an earlier version wrote in its place under another name."""
    older = path.with_name(FILES.get(path.name, path.name))
    return older if older.exists() and not path.exists() else path
