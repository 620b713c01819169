"""Running a model from the middle on, so that sweeps over hundreds of heads cost a few forwards.

``cached_run`` keeps what a forward passes from layer to layer; ``continuation`` continues a batch of variants of it
from a layer, without rows that cannot have changed; ``beginning`` lets whole runs begin at a later layer. From inputs
and changes they compute logits or streams equal to those of whole forwards. This folder does not know why something is
changed: see ``mech.experiments.patching``.
"""
