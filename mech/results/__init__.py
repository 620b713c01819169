"""Results as labelled arrays with a record of what made them: the kinds, the record, and the folder they live in.

Arrays and attributes become checked ``xarray`` datasets (``schema``), files written whole or not at all (``store``) and
a study folder that is only added to (``study``). Files of earlier versions are read with the names of this one
(``older``). Nothing here knows how a number was measured.
"""

from mech.results.provenance import provenance
from mech.results.schema import (
    ShownHead,
    ablation_dataset,
    check,
    heads_text,
    map_facts,
    maps_dataset,
    ram_dataset,
    with_top_apart,
)
from mech.results.store import load, save, write_json
from mech.results.study import Study

__all__ = [
    "ShownHead",
    "Study",
    "ablation_dataset",
    "check",
    "heads_text",
    "load",
    "map_facts",
    "maps_dataset",
    "provenance",
    "ram_dataset",
    "save",
    "with_top_apart",
    "write_json",
]
