"""What heads attend to, read from ordinary forwards: a few query rows, sets of tokens, groups, or maps over a picture.

Takes a model and inputs or samples, and returns attention after the softmax, exact and in the layer's own mask, without
ever building a head's ``S x S`` matrix. Scores (``scores``) and figures are made from it. What counts as evidence, and
whether a head matters, is decided elsewhere.
"""
