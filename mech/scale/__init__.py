"""Beyond one machine: measurements cut into blocks of samples, and a folder that any number of workers fill.

    with mech.on_folder("blocks"):                          # here; join in with `mech work blocks` from anywhere
        ram = mech.retrieval_attention_mass(model, samples)
    with mech.on_ray("auto", folder="s3://bucket/blocks"):   # actors of a Ray cluster, each with its own model
        effects = mech.ablation(model, samples, ranking, reference=find)

The folder is the protocol. A measurement over samples is a ``Job`` (weights, processor, versions, function, options,
seed); a ``Block`` is a job on some of its batches, and its hash names the part file that its numbers land in, whole and
with a checksum. Any process with the model may compute it: the numbers do not depend on which one does, in which order,
or how often it failed. Parts are joined by sample; statistics are computed from the joined values.

It takes functions marked by ``per_sample``, or by ``in_one_piece`` where they cannot be cut, and returns the dataset
that the function returns by itself. It knows nothing about what is measured.
"""

from mech.scale.measures import in_one_piece, per_sample
from mech.scale.models import model_here, open_model, split_revision
from mech.scale.run import BlocksFailed, on_folder, rest_goes_on, stream
from mech.scale.status import status

__all__ = [
    "BlocksFailed",
    "in_one_piece",
    "model_here",
    "on_folder",
    "open_model",
    "per_sample",
    "rest_goes_on",
    "split_revision",
    "status",
    "stream",
]
