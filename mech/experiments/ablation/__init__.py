"""What is lost without a set of heads, or with their output scaled; and whether the heads of one task serve another.

Takes a model, held-out samples, a ranking and a reference; gives accuracy and logit difference, sample by sample, for
every band and method, beside random heads. It does not know how a hook replaces an output (``mech.interventions``) nor
how sure a difference is (``statistics``).
"""
