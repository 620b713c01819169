"""The report of a study: one offline page made from a study folder, without a model.

Takes the saved results and the summary, gives ``report.html``. It computes no number: those are in ``summary.json``.
"""
