"""A cache as other programs read it.

    cache ─ samples.py ─▶ Sample, one document after another ─ formats/NAME.py ─▶ files of another program

Belongs here: formats, one file each in formats/, and the export that feeds them (api). Does not: reading a cache
(`fastkd.cache`), and trained students, which training itself writes in transformers' format.
"""
