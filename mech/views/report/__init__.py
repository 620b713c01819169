"""The report of a study: one offline page made from a study folder, without a model.

Takes the saved results and the summary, writes ``report.html``. The numbers are those of ``summary.json``.
"""
