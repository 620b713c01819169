"""Results as labelled arrays with a record of what made them: the kinds, the record, and the folder they live in."""

from mech.results.provenance import provenance
from mech.results.schema import ablation_dataset, check, look_facts, looks_dataset, ram_dataset
from mech.results.store import load, save, write_json
from mech.results.study import Study

__all__ = [
    "Study",
    "ablation_dataset",
    "check",
    "load",
    "look_facts",
    "looks_dataset",
    "provenance",
    "ram_dataset",
    "save",
    "write_json",
]
