"""Renders training runs as one HTML page: `page.render_page`, called by scripts/report.py.

`run_reader` reads the workdirs, `statistics` computes the numbers, `line_charts` and
`mistake_images` draw, and `page` assembles the page.
"""
