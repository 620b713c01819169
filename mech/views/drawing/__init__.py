"""What every view is drawn with: pages, charts, tables, graphs, pictures, and figures for papers.

Takes numbers, text and pictures, gives safe HTML that works offline (text of users is escaped), or a file of a figure.
It does not know any result: the views above do.
"""
