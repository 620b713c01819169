"""What the results of a study say: the numbers of ``summary.json``, and sentences computed from them.

Takes saved results and returns numbers and sentences, whichever way the results fall. It needs no model, measures
nothing and draws nothing; ``mech.views`` displays what it says.
"""
