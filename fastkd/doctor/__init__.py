"""What an installation and its machine can do, before work is given to them: `fastkd doctor`.

Belongs here: checks, which change nothing but a probe of a few bytes in a store. Does not: checks of data and settings,
which stand where these are used.
"""
