"""The command line: a frozen dataclass for each command, and what it prints.

Belongs here: commands, flags, help and exit statuses.
Does not: work; a command calls one function of another room.
"""
