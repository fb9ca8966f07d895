"""Reports: runs side by side on one HTML page that loads nothing from the network.

    run folders ─ runs.py ─▶ Comparison ─ sections/ ─▶ Page (page.py) ─ render.py, plots.py, templates/ ─▶ HTML

Belongs here: reading what runs left, and showing it. Does not: measuring (`evaluate`), ranking (`sweep`).
"""
