"""`fastkd.mutual`: students that learn from each other, at the same time, from the same batches.

RUN/  run.json  metrics.jsonl (NAME/hard, NAME/soft, ...)  checkpoints/  students/NAME/ (the trained models)
      evaluation-NAME.json  evaluation-ensemble.json  control/NAME/ (the run of the same student on labels alone)
      evaluations-NAME.json  evaluations-ensemble.json  (lists, of a mixture of caches)
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch

from ..data.examples import as_examples
from ..errors import TrainError
from ..evaluate.measures import distinct
from ..kernels import KDError, TopKConfig
from ..settings import MutualSettings, TrainSettings
from ..settings_changes import MutualTrainChanges, changed, check_names
from ..utils.atomic import write_json, writing
from ..utils.distributed import ALONE, Processes, joined_processes
from ..utils.numbers import measure_text
from ..utils.output_guard import check_folder
from ..utils.progress import is_shown, naming, notes_only
from ..utils.signals import DONE, WORK_REMAINS, Stop
from ..utils.similar import did_you_mean
from ..utils.text import format_table
from ..utils.words import KINDS
from .api import identity_of, outlined, run_trainer, train_one
from .arms import CONTROL
from .batch import with_batch
from .begun import begun_with, continued
from .cards import write_peer_cards
from .checkpoint import steps_of
from .exchange import TEACHER, Exchange, Learns, everyone
from .held_out import EVALUATION, HeldOut
from .inputs import Inputs, inputs_of
from .live_inputs import check_arguments, is_inside, load_inputs
from .peers import Peers, PeerView, check_vocabularies
from .result import RUN, TrainReport, about_evaluation, describe_student, stopped_text
from .settings_check import check_begun, check_best, check_settings
from .student import LoadedStudent, Student, check_source, make_student
from .trainer import Evaluate, Trainer
from .unused import check_mutual
from .verdict import Verdict, judge
from .watch import PeersWatch, Watch, check_watch

if TYPE_CHECKING:
    from ..evaluate.api import Evaluation

DEFAULTS, ONLINE = TrainSettings(), MutualSettings()
ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class PeerReport:
    """One of the students. evaluation: its last measures. control: the report of the same student on labels alone.
    verdict: the comparison with it, if both were evaluated by window."""

    evaluation: Mapping[str, float] = field(default_factory=dict)
    control: TrainReport | None = None
    verdict: Verdict | None = None

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"evaluation": dict(self.evaluation)}
        if self.control is not None:
            found["control"] = self.control.to_json()
        if self.verdict is not None:
            found["verdict"] = self.verdict.to_json()
        return found


@dataclass(frozen=True)
class MutualReport:
    """What `fastkd.mutual` returns.

    run: the report of the training of all.
    students: the report of each, by name.
    ensemble: the last measures of the mean of all students' probabilities.
    """

    run: TrainReport
    students: Mapping[str, PeerReport]
    ensemble: Mapping[str, float] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all steps are made, including those of the controls."""
        return self.run.complete and all(one.control is None or one.control.complete for one in self.students.values())

    @property
    def status(self) -> int:
        return DONE if self.complete else WORK_REMAINS

    def to_json(self) -> dict[str, Any]:
        students = {name: one.to_json() for name, one in self.students.items()}
        return self.run.to_json() | {"complete": self.complete, "students": students, "ensemble": dict(self.ensemble)}

    @property
    def text(self) -> str:
        """For the command line."""
        if not self.complete:
            runs = [*(one.control for one in self.students.values() if one.control is not None), self.run]
            part = next(run for run in runs if not run.complete)
            return stopped_text(part)
        run = self.run
        if run.stopped_worse is not None:
            return (
                f"{run.out}: stopped after step {run.step} of {run.steps}, as no student is served: "
                f"{run.stopped_worse.sentence()}\nstudents: {run.student}"
            )
        speed = f"{run.positions / run.seconds:,.0f} {KINDS[run.kind].positions}/s, " if run.seconds else ""
        lines = [f"{run.out}: {run.steps} steps ({speed}{run.waiting:.1%} of the time waiting for data)"]
        lines += [f"note: {note}" for note in run.notes]
        columns: dict[str, Mapping[str, float]] = {}
        for name, one in self.students.items():
            columns[name] = one.evaluation
            if one.control is not None:
                columns[f"{name} alone"] = one.control.evaluation
        if any(columns.values()):
            columns[ENSEMBLE] = self.ensemble
            names = [name for name in distinct(columns.values()) if all(name in column for column in columns.values())]
            rows = [[name, *(measure_text(column[name]) for column in columns.values())] for name in names]
            lines += format_table([["held out", *columns], *rows])
            lines += about_evaluation(run, names)
        for name, one in self.students.items():
            if one.verdict is not None:
                first, *more = one.verdict.lines
                lines += [f"{name} {first}", *more]
        return "\n".join([*lines, f"students: {run.student}"])


def mutual(
    students: Sequence[Any] | Mapping[str, Any],
    cache: Any = None,
    out: str | Path | None = None,
    settings: TrainSettings = DEFAULTS,
    online: MutualSettings = ONLINE,
    *,
    data: Any = None,
    teacher: Any = None,
    learns: Learns | None = None,
    control: bool = False,
    stop_if_worse: bool = False,
    evaluate: Evaluate | None = None,
    stop: Stop | None = None,
    progress: str = "none",
    **changes: Unpack[MutualTrainChanges],
) -> MutualReport:
    """Train students at the same time, each from the labels and from the others' targets. Called again with the same
    arguments, it resumes.

    students: two or more, as of `fastkd.train`; by name, or named by their folders. One that is given twice begins with
        other new weights.
    cache, data, teacher: as of `fastkd.train`: data alone, or with a teacher, which is not trained; or a cache. The
        students learn from its targets as well.
    out: the run's folder, which all processes share.
    settings, online, changes: `TrainSettings`, `MutualSettings`, and other values of their fields.
    learns: for each student, by name, whose targets it learns from: names of students, and "teacher"; a student without
        any learns from labels alone. Default: from all others, and the teacher. So a teacher that is trained too is
        learns={"big": (), "small": ("big",)}.
    control: afterwards train each student on hard labels alone (alpha=1), in the same order, into out/control/NAME.
    stop_if_worse: train the controls first, and end the training of the students at an evaluation after which each that
        learns from others is worse than its control, as of `fastkd.train`.
    evaluate, stop, progress: as of `fastkd.train`; evaluate is called with each student, and with their ensemble.

    Returns the report; its `status` is 75 if work remains. Raises the errors of `fastkd.train`.
    """
    if out is None:
        raise TypeError("mutual() got no folder for the run (out)")
    ours = {f.name for f in fields(MutualSettings)}
    check_names("mutual", changes, [*ours, *(f.name for f in fields(TrainSettings))])
    settings = changed("mutual", settings, {name: value for name, value in changes.items() if name not in ours})
    online = changed("mutual", online, {name: value for name, value in changes.items() if name in ours})
    sources = dict(students) if isinstance(students, Mapping) else named(students)
    has_teacher = cache is not None or teacher is not None
    learns = everyone(list(sources), *([TEACHER] if has_teacher else [])) if learns is None else learns
    check(sources, learns, settings, online, has_teacher=has_teacher)
    if is_inside(teacher):
        raise TrainError(
            f"teacher: got {teacher!r} for students that learn from each other; expected a folder, a name or "
            "module:factory of a model that is not made of a student. For stale copies of the students use every."
        )
    out, stop = Path(out), stop or Stop()
    check_folder(out, "run")
    check_settings(settings, None)
    if evaluate is None:
        check_best(settings)
    begun = begun_with([out, *(out / CONTROL / name for name in sources)])
    online = continued(online, begun)
    alone = replace(settings, alpha=1.0, alpha_end=None)
    check_arguments(cache, teacher, data, None, alone, None)
    check_mutual(online, cached=cache is not None, teacher=teacher is not None)
    cached = None if cache is None else inputs_of(cache, data)
    if cached is not None and any(TEACHER in given for given in learns.values()):
        check_settings(settings, cached.spec)
    with (
        writing(out),
        joined_processes(settings.device, timeout_minutes=settings.timeout_minutes) as processes,
        ExitStack() as stack,
    ):
        check_begun(out, settings, identity_of(cached, settings, online, as_examples(data)))
        for one in sources.values():
            check_source(one, settings)
        inputs: Inputs = cached or load_inputs(
            teacher, data, settings, online, processes=processes, progress=is_shown(progress) and processes.first
        )
        stack.callback(inputs.close)
        if (size := inputs.size(settings)) is not None:
            settings, alone = with_batch(settings, size, begun), with_batch(alone, size, begun)
        devices = [processes.device] if processes.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        job = _Job(sources, inputs, learns, settings, online, processes)
        looked: Watch | None = None
        watch: PeersWatch | None = None
        if stop_if_worse:
            by_window = evaluate is None and settings.evaluate_every != 0 and not inputs.nothing_held_out()
            check_watch(control=control, by_window=by_window, measure=settings.best)
            if not any(learns.values()):
                raise TrainError("stop_if_worse: got no student that learns from another; expected at least one.")
            looked = Watch({}, inputs.weights, settings.best)
            watch = PeersWatch(
                {name: replace(looked, arms={f"{CONTROL}/{name}": out / CONTROL / name})
                 for name, given in learns.items() if given},
                list(sources),
            )  # fmt: skip

        def train_controls() -> "dict[str, tuple[TrainReport, list[Evaluation]]]":
            """One after the other, until one is not complete. Divided over all processes, whatever the students are."""
            done = {}
            for name in sources:
                if processes.first:
                    text = f"now {name} on hard labels alone: {out / CONTROL / name}"
                    notes_only(progress).event("note", text=text)
                given = (job.make(name), out / CONTROL / name, alone, None, inputs.control)
                with naming(f"control of {name}"):
                    done[name] = train_one(*given, processes, evaluate, stop, progress, watch=looked)
                if not done[name][0].complete:
                    break
            return done

        controls = train_controls() if stop_if_worse else {}
        if all(arm.complete for arm, _ in controls.values()):
            report, each = job.train(out, evaluate, stop, progress, watch=watch)
        else:  # the students wait where they are
            steps = next(iter(controls.values()))[0].steps
            report, each = TrainReport(str(out), max(steps_of(out), default=0), steps, 0, {}, {}, {}), None
        if control and report.complete and not controls:
            controls = train_controls()
        found = {name: PeerReport(each.measures.get(name, {}) if each else {}) for name in sources}
        for name, (arm, theirs) in controls.items():
            mine = each.by_name.get(name, []) if each and report.stopped_worse is None else []
            judged = judge(CONTROL, mine, theirs, inputs.weights, settings.best)
            found[name] = replace(found[name], control=arm, verdict=judged)
        whole = MutualReport(report, found, each.measures.get(ENSEMBLE, {}) if each else {})
        if processes.first and (out / RUN).exists():
            document = json.loads((out / RUN).read_text())
            write_json(out / RUN, document | {"students": job.about, "report": whole.to_json()})
            if whole.complete:
                write_peer_cards(out, text=inputs.data is None)
        return whole


@dataclass(eq=False)
class _Job:
    """The training of the students."""

    sources: Mapping[str, Any]
    inputs: Inputs
    learns: Learns
    settings: TrainSettings
    online: MutualSettings
    processes: Processes
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name, parameters and bytes of each student."""

    def __post_init__(self) -> None:
        processes, online, settings = self.processes, self.online, self.settings
        if online.one_each and processes.world_size != len(self.sources):
            raise TrainError(
                f"one_each: got {processes.world_size} processes for {len(self.sources)} students; expected one for "
                "each (torchrun --nproc-per-node)."
            )
        self.exchange = Exchange(
            {name: self.learns[name] for name in self.sources}, topk_of(settings, online), every=online.every,
            processes=processes if online.one_each else ALONE,
        )  # fmt: skip

    def make(self, name: str) -> LoadedStudent:
        """A student as it is before the training. The n-th of the same source has new weights by the seed plus n."""
        earlier = list(self.sources).index(name)
        same = sum(_same(source, self.sources[name]) for source in list(self.sources.values())[:earlier])
        settings = replace(self.settings, seed=self.settings.seed + same)
        return make_student(self.sources[name], self.inputs.spec, settings, self.inputs.data)

    def peers(self) -> Peers:
        exchange = self.exchange
        everywhere = bool(exchange.every)  # copies of those that other processes train are here as well
        made = {name: self.make(name) for name in (exchange.names if everywhere else exchange.own)}
        known = {
            name: (one.student.vocab_size, one.student.max_positions, one.tokenizer and one.tokenizer.identity)
            for name, one in made.items()
        }
        students = {name: one.student for name, one in made.items()}
        about = {name: describe_student(one, one.parameters_and_bytes) for name, one in students.items()}
        for part in self.processes.gather(about):
            self.about |= {name: one | {"name": name} for name, one in part.items()}
        every = {name: one for part in self.processes.gather(known) for name, one in part.items()}
        check_vocabularies({name: size for name, (size, _, _) in every.items()})
        identities = {name: identity for name, (_, _, identity) in every.items() if identity}
        if len(set(identities.values())) > 1 and not self.settings.allow_other_tokenizer:
            listed = ", ".join(f"{name} (sha256 {identity[:12]}…)" for name, identity in identities.items())
            raise TrainError(
                f"students: got the tokenizers {listed}; expected one, as they learn from each other's tokens. Use "
                "--allow-other-tokenizer if all give the same ids."
            )
        if exchange.every:
            exchange.copy({name: one.student for name, one in made.items()})
        peers = Peers({name: made[name] for name in exchange.own}, exchange)
        limits = [most for _, most, _ in every.values() if most is not None]
        peers.max_positions = min(limits, default=None)
        peers.notes += same_weights(peers.students)
        return peers

    def train(
        self, out: Path, evaluate: Evaluate | None, stop: Stop, progress: str, *, watch: PeersWatch | None = None
    ) -> "tuple[TrainReport, EvaluateEach | None]":
        """Train, or resume. Returns the report, and the evaluation, with its last results. watch: see `Trainer`."""
        processes, settings, inputs = self.processes, self.settings, self.inputs
        peers = self.peers()
        tokenizers = (made.tokenizer for made in peers.parts.values())
        made = LoadedStudent(peers, next((one for one in tokenizers if one is not None), None))
        teacher = any(TEACHER in given for given in self.learns.values())
        # of the students alone, no answers are read, and none have to fit
        read = settings if teacher else replace(settings, alpha=1.0, alpha_end=None)
        inputs.meet(made, read, None)
        size, begun = inputs.size(settings), begun_with([out])
        settings, read = with_batch(settings, size, begun), with_batch(read, size, begun)
        # with one student each, every process reads whole batches
        sharing = replace(processes, rank=0, world_size=1, group=None) if self.online.one_each else processes
        one = evaluate or inputs.evaluator(settings, sharing)
        each = None if one is None else EvaluateEach(one, processes, list(self.sources) if watch else [])
        source = inputs.open(read, sharing)
        trainer = Trainer(made, source, processes, settings, out, evaluate=each, watch=watch, progress=progress)
        evaluations: dict[str, list[Evaluation]] = {}
        if each is not None and each.by_window:
            evaluations = {evaluation_file(name): each.by_name[name] for name in (*self.sources, ENSEMBLE)}
        outline = outlined(inputs, settings, len(source), by_window=evaluate is None)
        return run_trainer(trainer, out, inputs, processes, stop, evaluations, outline), each


class EvaluateEach:
    """Evaluates each student of `Peers`, and their ensemble.

    of: evaluates one. processes: where each has one student, these. by_name: the last evaluations by window, one for
    each cache; measures: the means. watched: students whose evaluations by window are kept at each step, one after the
    other.
    Returns NAME/MEASURE for each student, ensemble/MEASURE, and MEASURE, the mean over students.
    """

    def __init__(self, of: Evaluate, processes: Processes, watched: Sequence[str] = ()) -> None:
        self.of, self._processes, self._watched = of, processes, watched
        self.by_name: dict[str, list[Evaluation]] = defaultdict(list)
        self.measures: dict[str, dict[str, float]] = {}

    def __call__(self, peers: Student) -> dict[str, float]:
        assert isinstance(peers, Peers)
        mine = {name: self._one(PeerView(peers, name)) for name in peers.students}
        if peers.alone:
            mine = {name: one for part in self._processes.gather(mine) for name, one in part.items()}
        mine[ENSEMBLE] = self._one(peers)
        self.measures = {name: measures for name, (measures, _) in mine.items()}
        for name, (_, evaluations) in mine.items():
            self.by_name[name][:] = evaluations
        found = {f"{name}/{key}": value for name, one in self.measures.items() for key, value in one.items()}
        students = [one for name, one in self.measures.items() if name != ENSEMBLE]
        shared = [key for key in students[0] if all(key in one for one in students)]
        return {key: sum(one[key] for one in students) / len(students) for key in shared} | found

    @property
    def evaluations(self) -> "list[Evaluation]":
        """The last ones by window of the students that are watched."""
        return [one for name in self._watched for one in self.by_name[name]]

    @property
    def by_window(self) -> bool:
        """Whether evaluations by window are kept."""
        return isinstance(self.of, HeldOut)

    def _one(self, student: Any) -> "tuple[dict[str, float], list[Evaluation]]":
        measures = dict(self.of(student))
        return measures, list(getattr(self.of, "evaluations", ()))


def named(students: Sequence[Any]) -> dict[str, Any]:
    """Students by the names of their folders, factories or types; the second of a name is NAME-2."""
    found: dict[str, Any] = {}
    for source in students:
        if isinstance(source, (str, Path)):
            name = Path(source).name.rpartition(":")[2]
        else:
            name = getattr(source, "__name__", None) or type(source).__name__
        # a module's name has no dots, and is no method of a dictionary of modules
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in name) or "student"
        name += "_" * (name in (TEACHER, ENSEMBLE) or hasattr(torch.nn.ModuleDict, name))
        number = 1
        while (unique := name if number == 1 else f"{name}-{number}") in found:
            number += 1
        found[unique] = source
    return found


def evaluation_file(name: str) -> str:
    """The file of the last evaluation of a student, or of the ensemble, by window."""
    return EVALUATION.replace(".", f"-{name}.")


def topk_of(settings: TrainSettings, online: MutualSettings) -> TopKConfig:
    """What a target of a student keeps: the tail's mass at the temperatures that the training uses."""
    first, end = settings.temperature, settings.temperature_end
    grid = {1.0, first} if end is None else {1.0, 1.5, 2.0, 4.0, first, end}
    try:
        return TopKConfig(k=online.k, draws=online.draws, temperatures=tuple(sorted(grid)), seed=settings.seed)
    except KDError as error:
        raise TrainError(str(error)) from error


def check(
    sources: Mapping[str, Any], learns: Learns, settings: TrainSettings, online: MutualSettings, *, has_teacher: bool
) -> None:
    """Raise TrainError for what is not possible, before anything is loaded."""
    if not sources:
        raise TrainError("students: got none; expected two or more.")
    if set(learns) != set(sources):
        raise TrainError(f"learns: got {', '.join(learns)}; expected the students {', '.join(sources)}.")
    for name, given in learns.items():
        known = [*(other for other in sources if other != name), *([TEACHER] if has_teacher else [])]
        if unknown := [one for one in given if one not in known]:
            hint = did_you_mean(unknown[0], known)
            raise TrainError(
                f"learns: got {unknown[0]!r} for {name}; expected some of {', '.join(known) or 'nobody'}.{hint}"
            )
    if settings.exits:
        raise TrainError(f"exits: got {settings.exits} for students that learn from each other; expected none.")
    if settings.quantize != "none":
        raise TrainError(
            f"quantize: got {settings.quantize!r} for students that learn from each other; expected none. Train one "
            "of them with it afterwards."
        )
    if settings.match:
        raise TrainError(
            f"match: got {settings.match[0]!r} for students that learn from each other; expected none: they have no "
            "cached features of each other. Train one student with it."
        )
    if isinstance(online.every, bool) or online.every < 0:
        raise TrainError(f"every: got {online.every!r}; expected a number of steps, or 0 for targets of each step.")


def check_trained_teacher(teacher: str | None, cache: Any, write_cache: Any, rollouts: float = 0.0) -> None:
    """Raise TrainError unless a training can train this teacher as well."""
    got = ""
    if teacher is None:
        got = "no teacher"
    elif cache is not None or write_cache is not None:
        got = "a cache, whose targets are of a teacher that does not change"
    elif is_inside(teacher):
        got = f"{teacher}, which is made of the student"
    elif rollouts:
        got = "rollouts, which are scored by a teacher that does not change"
    if got:
        raise TrainError(
            f"train_teacher: got {got}; expected a teacher that can be trained (a folder or Hub name of a causal "
            "model, or module:factory), with data."
        )


def same_weights(students: Mapping[str, Student]) -> list[str]:
    """A note for each student that begins with the weights of another: they would stay equal."""
    found, seen = list[str](), list[tuple[str, list[torch.nn.Parameter]]]()
    for name, student in students.items():
        ours = list(student.parameters())
        for other, theirs in seen:
            if len(ours) == len(theirs) and all(map(torch.equal, ours, theirs)):
                found.append(f"{other} and {name} begin with equal weights; without dropout, they stay equal.")
        seen.append((name, ours))
    return found


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, (str, Path)) and isinstance(other, (str, Path)) and str(one) == str(other))
