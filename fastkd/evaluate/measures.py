"""`MEASURES`: every measure on held-out data, with its unit, which way is better, and where it is printed."""

import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..utils.words import TEXT, Words

_KLS = ("kl_bucket", "kl_sampled")
_ABBREVIATIONS = (*_KLS, "ece")
LOG, DEMO, CLASSIFIER_DEMO, SWEEP, REPORT = "log", "demo", "classifier demo", "sweep", "report"


@dataclass(frozen=True)
class Measure:
    """A measure.

    name: its key in evaluations, logs and JSON. label: in headings; short: in columns.
    unit: as shown. "%": stored as a share, and multiplied by `scale` to be shown.
    better: "lower", "higher", or None for what is neither. about: what it is, in one sentence.
    printed: where; the training's log, the demos' tables, a sweep's table, the report. decimals: in tables of text.
    """

    name: str
    label: str
    short: str
    unit: str
    better: str | None
    about: str
    printed: tuple[str, ...]
    decimals: int = 3

    @property
    def scale(self) -> float:
        """A stored value times this has the unit."""
        return 100.0 if self.unit == "%" else 1.0


_EVERYWHERE = (LOG, DEMO, CLASSIFIER_DEMO, SWEEP, REPORT)
_OF_STUDENT = (
    Measure(
        "cross_entropy", "cross-entropy", "cross-entropy", "nats", "lower",
        "The mean negative log-probability of the label.", _EVERYWHERE,
    ),
    Measure(
        "kl_bucket", "KL from teacher, bucket", "KL from teacher", "nats", "lower",
        "KL(teacher ‖ student) at T = 1 with all tokens outside the teacher's top-k entries as one outcome: "
        "a lower bound.", _EVERYWHERE, 4,
    ),
    Measure(
        "kl_sampled", "KL from teacher, sampled", "KL, sampled", "nats", "lower",
        "The same KL with the tail represented by the draws in the cache: an estimate, unbiased if they were drawn at "
        "T = 1.", (LOG, SWEEP, REPORT), 4,
    ),
    Measure(
        "agreement", "top-1 agreement with the teacher", "top-1 agreement", "%", "higher",
        "Positions at which the student's best token is the teacher's, or one of several best ones of equal value.",
        _EVERYWHERE, 1,
    ),
    Measure(
        "student_agreement", "top-1 agreement with the unquantised student", "agreement with student", "%", "higher",
        "Positions at which the best token of an exported student is that of the student in PyTorch.", (), 1,
    ),
    Measure(
        "accuracy", "accuracy on labels", "accuracy", "%", "higher",
        "Positions at which the best token is the label.", (LOG, CLASSIFIER_DEMO, SWEEP, REPORT), 1,
    ),
    Measure(
        "ece", "calibration error", "ECE", "%", "lower",
        "Expected calibration error, 15 equal bins of confidence (Guo et al. 2017); small samples raise it.",
        (LOG, CLASSIFIER_DEMO, SWEEP, REPORT), 1,
    ),
    Measure(
        "perplexity", "perplexity", "perplexity", "e^nats", "lower", "exp of the cross-entropy.", (LOG, REPORT),
    ),
)  # fmt: skip
# of a teacher, the cache knows the top-k entries and the draws alone: some measures are bounds
_OF_TEACHER = (
    Measure(
        "label_known", "labels among the entries", "labels known", "%", None,
        "Labels that are among the cached entries.", (REPORT,), 1,
    ),
    Measure(
        "cross_entropy_at_least", "cross-entropy, at least", "cross-entropy", "nats", "lower",
        "Exact if the label is a cached entry; else its probability is at most that of the last top-k entry and of the "
        "tail.", (DEMO, CLASSIFIER_DEMO, REPORT),
    ),
    Measure(
        "entropy_at_least", "entropy, at least", "entropy", "nats", None,
        "Entropy with all tokens outside the top-k entries as one outcome.", (REPORT,),
    ),
    Measure(
        "entropy_at_most", "entropy, at most", "entropy", "nats", None,
        "Entropy with the tail's mass spread evenly over its tokens.", (REPORT,),
    ),
    Measure(
        "entropy_sampled", "entropy, sampled", "entropy", "nats", None,
        "Entropy with the tail represented by its draws: an estimate.", (REPORT,),
    ),
    Measure(
        "tail_mass", "tail mass", "tail mass", "%", None,
        "Probability outside the top-k entries.", (REPORT,), 1,
    ),
)  # fmt: skip

MEASURES = {measure.name: measure for measure in _OF_STUDENT + _OF_TEACHER}
"""By name. Of a teacher there are also accuracy and ece, of its best token; equal ones share."""


def printed_in(place: str, *, teacher: bool = False) -> list[Measure]:
    """The measures of a student (or of a teacher alone) that a place prints, in order."""
    return [measure for measure in (_OF_TEACHER if teacher else _OF_STUDENT) if place in measure.printed]


def distinct(columns: Iterable[Mapping[str, float]]) -> list[str]:
    """The measures of several columns, in order. The second KL is left out where it is the first: if targets hold every
    outcome, there is no tail that draws would represent."""
    given = list(columns)
    names = list(dict.fromkeys(name for column in given for name in column))
    same = [
        math.isclose(one[_KLS[0]], one[_KLS[1]], rel_tol=1e-6, abs_tol=1e-9) for one in given if set(_KLS) <= set(one)
    ]
    return [name for name in names if name != _KLS[1] or not same or not all(same)]


def about(measure: Measure, words: Words = TEXT, *, exact: bool = False) -> str:
    """What a measure is, for a kind of data. exact: targets hold every outcome."""
    if measure.name == _KLS[0] and exact:
        return "KL(teacher ‖ student) at T = 1, exact: the teacher's targets hold every outcome."
    if words.kind == "text":
        return measure.about
    changes = {"all tokens": "all classes", "its tokens": "its classes", "token": "class", "Positions": "Examples"}
    text = measure.about
    for word, instead in changes.items():
        text = text.replace(word, instead)
    return text


def explained(names: Iterable[str], words: Words = TEXT) -> list[str]:
    """What the abbreviations among the names of a table are, as lines below it for 80 columns."""
    lines: list[str] = []
    for name in names:
        if name in _ABBREVIATIONS:
            lines += textwrap.wrap(f"{name}: {about(MEASURES[name], words)}", 80, subsequent_indent="  ")
    return lines


def sign_of(name: str) -> int:
    """1 if lower values of a measure are better, also of one that is not in the table; −1 if higher ones are."""
    return -1 if name in MEASURES and MEASURES[name].better == "higher" else 1
