"""Measures of a student on held-out data, from the cache, with no teacher.

Belongs here: a new measure, and how measures are compared and divided over processes.
Does not: training, or pages that show the measures (report).
"""
