"""Activation patching: which head, layer, position or region carries what differs between two runs.

Takes clean and corrupted inputs and a metric, gives the effect of every cell. ``plan`` checks what is asked for,
``sweeps`` runs it as one growing batch (and as its literal twin), ``candidates`` estimates which cells are worth it. It
does not know through what a head acts: that is ``paths``.
"""
