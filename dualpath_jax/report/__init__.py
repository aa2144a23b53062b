"""A training run as one page: read (runs.py), counted (figures.py), drawn (charts.py, mistakes.py).

Public: `page.render_page`, which scripts/report.py calls.
"""
