"""Path patching and circuits: not whether a head matters, but through which paths.

Takes two runs, senders, receivers and what is frozen, and returns the effect along each path. ``circuits`` follows an
answer from the logits back to the picture. Effects are exact; for estimates see ``attribution``.
"""
