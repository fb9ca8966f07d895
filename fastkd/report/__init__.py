"""A report: runs set side by side on one page of HTML that asks nothing of any server.

    run folders ─ runs.py ─▶ Run ─ sections.py ─▶ Page (page.py) ─ html.py, plots.py ─▶ text

What comes from files is text to the end, and becomes markup nowhere but in `html.py`, which escapes all of it.
"""
