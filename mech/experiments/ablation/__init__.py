"""What is lost without a set of heads or with their output scaled; and whether the heads of one task serve another.

Takes a model, held-out samples, a ranking and a reference, and returns accuracy and logit difference, sample by sample,
for every band and method, with random heads for comparison. Replacing an output with a hook is the job of
``mech.interventions``; how certain a difference is, of ``statistics``.
"""
