"""A check of a cache against its teacher, as text for 80 columns. Imports nothing heavy."""

from typing import TYPE_CHECKING

from ...utils.text import format_table, labelled, printable, without_credentials

if TYPE_CHECKING:
    from .check import TeacherCheck

_KINDS = {"top_k": "top-k entries", "draws": "draws", "tail": "tails"}
_SAME = {True: "the one in the spec", False: "NOT the one in the spec", None: "the spec names none"}
_MAX_PROBLEMS = 12


def check_text(report: "TeacherCheck") -> str:
    """The check, for a person."""
    batches = "as in the capture" if report.recorded_batches else "one sequence each (the capture's are not recorded)"
    sample = f"{report.positions:,} positions in {report.batches:,} batches of {len(report.shards):,} of "
    sample += f"{report.cache_shards:,} shards; seed {report.seed}"
    lines = [
        f"fastkd teacher check  {report.cache}",
        *labelled("  teacher", f"{without_credentials(report.teacher)}: {_SAME[report.fingerprint]}"),
        *labelled("  sample", sample),
        *labelled("  batches", batches),
        *labelled("  captured on", "; ".join(report.captured_on)),
        *labelled("  checked on", report.checked_on),
        "",
    ]
    rows = [["Nats", "compared", "largest", "bound there", "over bound", "by up to"]]
    for kind, d in report.differences.items():
        row = [f"  {_KINDS[kind]}", f"{d.compared:,}"]
        if d.compared:
            row += [f"{d.largest:.4f}", f"{d.bound:.4f}", f"{d.over / d.compared:.2%}", f"{d.excess:.2g}"]
        rows.append(row)
    lines += [*format_table(rows), ""]
    lines += labelled("  outcomes", f"{report.outcomes:,} rows differ" if report.outcomes else "equal in all rows")
    if report.same_top_k is not None:
        lines += labelled("  top-k", f"the same ids in {report.same_top_k:.2%} of the rows")
    if report.same_draws is not None:
        lines += labelled("  draws", f"the same ids in {report.same_draws:.2%} of the rows")
    elif "draws" in report.differences:
        lines += labelled("  draws", f"not repeated: {report.draws_unknown}")
    if report.kl is not None:
        lines += labelled("  divergence", f"KL(teacher || cache) {report.kl:.3g} on average")
    return "\n".join(printable(line) for line in [*lines, "", *_verdict(report)])


def _verdict(report: "TeacherCheck") -> list[str]:
    if report.ok and not report.excess:
        return ["ok: the cache matches the teacher to within the codec's error"]
    if report.ok:
        return [
            f"ok, within the tolerance: up to {report.excess:.2g} nats beyond the codec's error; tolerance",
            f"{report.tolerance:.2g}. Other hardware or another torch version rounds differently.",
        ]
    lines = []
    for problem in report.problems[:_MAX_PROBLEMS]:
        lines += labelled("problem", without_credentials(problem))
    if (more := len(report.problems) - _MAX_PROBLEMS) > 0:
        lines += labelled("", f"and {more:,} more")
    step = "Use the teacher that the cache was captured from."
    if report.fingerprint is not False:
        step = "Delete the shards named above and capture again with the same settings. If all shards are affected, "
        step += "check what changed since the capture: data, device, torch."
    return [*lines, *labelled("next", step)]
