"""Completions of held-out prefixes by teacher, student and control. Used by the demo."""

from collections.abc import Sequence

from ..page import Example, Examples, Paragraph, Section

NOTE = (
    "Prefixes from held-out text. Bars: each model's five most likely next tokens and their probabilities; below them "
    "its greedy completion."
)


def completions_section(examples: Sequence[Example]) -> Section:
    """Each prefix with each model's most likely next tokens and completion."""
    return Section("Completions", [Paragraph(NOTE), Examples(examples)])
