"""What sparse inference is worth: accuracy, speed and memory for several ways to choose the dense heads, at one budget.

Takes a model, held-out samples and ways to choose heads; returns a dataset of settings that includes the dense model.
The inference itself is in the parent folder; this one measures it, and can be stopped and resumed.
"""
