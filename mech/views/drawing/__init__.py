"""What every view is drawn with: pages, charts, tables, graphs, pictures, and figures for papers.

Takes numbers, text and pictures; returns safe HTML that works offline (users' text is escaped), or a figure file. It
knows nothing about results: the views in the parent folder do.
"""
