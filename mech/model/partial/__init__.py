"""Running on from the middle of a model: what makes sweeps over hundreds of heads cost a few forwards.

``cached_run`` keeps what a forward passed from layer to layer; ``continuation`` runs a batch of variants of it on from
a layer, rows that cannot have changed left out; ``beginning`` lets whole runs begin at a later layer. Takes inputs and
what is changed, gives logits or streams that equal those of whole forwards. It does not know why something is changed:
see ``mech.experiments.patching``.
"""
