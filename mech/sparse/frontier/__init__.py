"""What sparse inference is worth: accuracy, speed and memory for several ways to choose the dense heads, at one budget.

Takes a model, held-out samples and ways to choose heads, gives a dataset of settings beside the dense model. The
inference itself is in the folder above; this one measures it, and can be stopped and resumed.
"""
