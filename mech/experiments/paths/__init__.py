"""Path patching and circuits: not whether a head matters, but through what.

Takes two runs, senders, receivers and what is frozen, gives the effect that travels along each path; ``circuits``
follows an answer from the logits back to the picture. Effects are exact, not estimates: those are ``attribution``'s.
"""
