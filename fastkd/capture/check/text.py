"""The report of `check.py` as text for 80 columns. Imports nothing heavy."""

from typing import TYPE_CHECKING

from ...utils.text import labelled, printable, without_credentials

if TYPE_CHECKING:
    from .check import TeacherCheck
    from .compare import Difference

_LABELS = {"head": "head", "outside": "not among the best", "drawn": "drawn", "tail": "tails"}
_MOST_PROBLEMS = 12


def check_text(report: "TeacherCheck") -> str:
    """What a check of a cache against its teacher found, for a person."""
    same = {True: "the one that the spec names", False: "NOT the one that the spec names", None: "the spec names none"}
    how = "in the batches it was captured in" if report.as_recorded else "sequence by sequence (no record of batches)"
    sample = f"{report.positions:,} positions, {report.batches:,} batches, {len(report.shards):,} of "
    sample += f"{report.shards_there:,} shards; seed {report.seed}"
    lines = [
        f"fastkd teacher check  {report.cache}",
        *labelled("  teacher", f"{without_credentials(report.teacher)}: {same[report.fingerprint]}"),
        *labelled("  sample", sample),
        *labelled("  run", how),
        *labelled("  captured on", "; ".join(report.captured_on)),
        *labelled("  checked on", report.checked_on),
        "",
        f"{'Nats':<22}{'compared':>11}{'largest':>11}{'the codec':>11}{'over it':>10}{'by up to':>11}",
        *(_row(_LABELS[kind], difference) for kind, difference in report.differences.items()),
        "",
        *labelled("  outcomes", f"{report.outcomes:,} rows differ" if report.outcomes else "equal in every row"),
    ]
    if report.drawn_again is not None:
        lines += labelled("  draws", f"{report.drawn_again:.2%} of the rows are drawn again, id by id")
    elif "drawn" in report.differences:
        lines += labelled("  draws", f"not drawn again: {report.not_drawn}")
    if report.kl is not None:
        kl = f"KL(teacher || cache) {report.kl:.3g} on average, {report.kl_largest:.3g} at most"
        lines += labelled("  divergence", kl)
    return "\n".join(printable(line) for line in [*lines, "", *_verdict(report)])


def _row(label: str, d: "Difference") -> str:
    if not d.compared:
        return f"  {label:<20}{'none':>11}"
    over = f"{d.over / d.compared:.2%}" if d.over else "none"
    beyond = f"{d.excess:.2g}" if d.over else ""
    return f"  {label:<20}{d.compared:>11,}{d.largest:>11.4f}{d.bound:>11.4f}{over:>10}{beyond:>11}".rstrip()


def _verdict(report: "TeacherCheck") -> list[str]:
    if report.ok and not report.excess:
        return ["ok: what this teacher says, to within the codec's error"]
    if report.ok:
        return [
            f"ok, within the tolerance: up to {report.excess:.2g} nats beyond the codec's error, where",
            f"{report.tolerance:.2g} are tolerated. Other hardware, or another torch, rounds otherwise.",
        ]
    lines = []
    for problem in report.problems[:_MOST_PROBLEMS]:
        lines += labelled("problem", without_credentials(problem))
    if (more := len(report.problems) - _MOST_PROBLEMS) > 0:
        lines += labelled("", f"and {more:,} more")
    step = "Give the teacher that the cache was captured from."
    if report.fingerprint is not False:
        step = "Delete the shards that are named, and capture again with the same settings; or, where all of them are"
        step += " bad, look at what changed since: data, device, torch."
    return [*lines, *labelled("next", step)]
