"""Activation patching: which head, layer, position or region carries the difference between two runs.

Takes clean and corrupted inputs and a metric, and returns the effect of every cell. ``plan`` checks the request,
``sweeps`` runs it as one growing batch (or, literally, cell by cell), and ``candidates`` estimates which cells are
worth patching. Which paths a head acts through is the subject of ``paths``.
"""
