"""What heads attend to, read off ordinary forwards: a few query rows, sets of tokens, groups, or maps over a picture.

Takes a model and inputs or samples, gives attention after the softmax, exact and in the layer's own mask, without ever
making a head's ``S x S`` matrix. Scores are made of it (``scores``), pictures too. It does not know what is evidence
for what, nor whether a head matters.
"""
