"""What the results of a study say: the numbers of ``summary.json``, and sentences computed from them.

Takes saved results, gives numbers and sentences, whichever way they fall. It needs no model, measures nothing, and
knows of no page: ``mech.views`` shows what it says.
"""
