"""The commands: one frozen dataclass each. Docstrings are the help texts. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..bench.settings import BenchSettings
from ..kernels.divergences import DivergenceName
from ..kernels.treatment import TreatmentName
from ..settings import (
    CaptureSettings,
    DataSettings,
    DemoSettings,
    DeploySettings,
    ExportSettings,
    LiveSettings,
    ModelSettings,
    MutualSettings,
    RolloutSettings,
    ShareSettings,
    StudentSettings,
    TeacherSettings,
    TrainSettings,
)

Place = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CACHE")]


@dataclass(frozen=True)
class Inspect:
    """Show the contents and size of a cache."""

    cache: Place
    """Cache: a folder, a .zip of one, or a URL (s3://, gs://, az://; http(s):// for a sealed cache)."""
    sample: int = 0
    """Also print this many positions, from all over the cache: what comes before, the next token, and the teacher's
    most likely ones with their probabilities."""
    tokenizer: str | None = None
    """With --sample: tokenizer of the cache, a folder or a Hub name, to show text instead of token ids."""
    classes: str | None = None
    """With --sample, for a classifier: names of the classes, a text file with one a line, or a module:factory that
    returns them or a data set that has them (class_names, or classes)."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True, kw_only=True)
class Verify(ModelSettings):
    """Check a cache for damage, or compare it with its teacher.

    The bytes of every shard are compared with their hashes. With --teacher, the teacher is run on a random sample of
    the cache's batches and its outputs are compared with the stored targets.
    """

    cache: Place
    """Cache: a folder, a .zip of one, or a URL (s3://, gs://, az://; http(s):// for a sealed cache)."""
    deep: bool = False
    """Also decode every array and compare its contents with their hash."""
    teacher: str | None = None
    """Teacher to compare with, as in `fastkd capture`, with the same dtype and attention."""
    examples: str | None = None
    """module:factory that returns the examples, for a cache of examples."""
    positions: int = 4096
    """Minimum number of positions to compare with the teacher."""
    sample: int | None = None
    """Seed of the sample compared with the teacher. Default: random."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Seal:
    """Write the manifests of a finished cache and its features.

    A capture does this itself when it completes. A sealed cache opens with two requests and accepts no more shards.
    Features can still be added; those that lack shards stay unsealed.
    """

    cache: Place
    """Cache: a folder or a URL (s3://, gs://, az://)."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Features:
    """List the hidden states and maps in a cache, or drop some.

    Prints layer, shape, step, positions, shards, bytes per position, and the KL divergence measured at capture.
    """

    cache: Place
    """Cache: a folder, a .zip of one, or a URL (s3://, gs://, az://)."""
    drop: tuple[str, ...] = ()
    """Names of features to delete. The targets, and other features, are not touched."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True, kw_only=True)
class Capture(CaptureSettings, DataSettings, TeacherSettings):
    """Run a teacher over a dataset and fill a cache.

    Running the same command again resumes.
    Exit status 0: the cache is complete. 75: work remains (after SIGTERM, or with a full disk): requeue it.
    """

    out: str
    """Output cache: a folder or a URL (s3://, gs://, az://)."""
    rank: int | None = None
    """Rank of this worker, from 0. Default: taken from the variables of torchrun or SLURM, else 0."""
    world_size: int | None = None
    """Number of workers. Each takes its share, then shards that others have not finished."""
    teacher_parallel: int = 1
    """Tensor-parallel ranks per worker, for a teacher larger than one device."""
    threads: int = 1
    """Number of threads that encode and write shards."""
    ray: bool = False
    """Capture on a Ray cluster: the one at RAY_ADDRESS, or the one that runs on this machine."""
    workers: int | None = None
    """With --ray: number of workers. Default: as many as the cluster has room for."""
    gpus_per_worker: float | None = None
    """With --ray: GPUs of a worker. Default: one if the cluster has any."""
    cpus_per_worker: float = 1.0
    """With --ray: CPUs of a worker."""
    dry_run: bool = False
    """Write nothing, and print what `fastkd plan` prints with these options."""
    json: bool = False
    """Print events as JSON lines instead of a progress bar; the last one is the report."""


@dataclass(frozen=True, kw_only=True)
class Plan(CaptureSettings, DataSettings, TeacherSettings):
    """Estimate time, size and cost of a capture.

    Prints positions, shards, bytes, requests, hours and cost, and the size for other values of k. Runs a sample of the
    capture; nothing is written.
    """

    seconds: float = 20.0
    """Approximate seconds to run the sample, warm-up included. At least one batch is run."""
    workers: int | None = None
    """Number of machines like this one that share the work. Default: 1."""
    price_per_hour: float | None = None
    """Price of one machine per hour."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True, kw_only=True)
class _Training(TrainSettings):
    student: str
    """Student model: a folder or Hub name of a causal model or of an adapter, a folder with a config.json and no
    weights (randomly initialized), or module:factory (a function of yours that takes no arguments and returns a torch
    module)."""
    json: bool = False
    """Print events as JSON lines instead of a progress bar; the last one is the report."""


@dataclass(frozen=True, kw_only=True)
class Train(ShareSettings, RolloutSettings, LiveSettings, _Training):
    """Train a student from a cache, or beside its teacher.

    With --cache, targets are read from a cache. With --data and --teacher there is no cache: the teacher runs on each
    micro-batch, and targets are made on the device; with --write-cache they are also committed as a cache on the way,
    for later trainings. With --data and --alpha 1, training is on labels alone. With --rollouts, the student continues
    a part of the sequences itself, and the teacher scores what it says.
    Running the same command again resumes from the last checkpoint; under torchrun, on all processes.
    Exit status 0: training is complete. 1: it is, and only the upload of --push failed. 75: work remains (after
    SIGTERM, with a checkpoint written): requeue it.
    """

    cache: tuple[str, ...] = ()
    """Cache: a folder, a .zip of one, or a URL (s3://, gs://, az://; http(s):// for a sealed cache). Several caches of
    one tokenizer are mixed: repeat the option, or list them."""
    cache_weights: tuple[float, ...] = ()
    """With several caches: the share of the positions from each. Default: each sequence once an epoch."""
    teacher: str | None = None
    """Teacher model, with --data instead of --cache, or with --rollouts, as in `fastkd capture`: a folder, a GGUF file,
    a name on the Hugging Face Hub, or module:factory. ema:0.999: the student's own average over the steps, with this
    decay."""
    data: tuple[str, ...] = ()
    """Without a cache, the dataset, as in `fastkd capture`: files, folders or glob patterns, or module:factory. With a
    cache of examples: module:factory that returns the labelled examples."""
    write_cache: str | None = None
    """With --teacher: a cache (folder or URL) to write the targets to, and to read them from when they are there."""
    train_teacher: bool = False
    """With --teacher: train it at the same time, from the labels. Both are written to students/ in the run's folder."""
    out: Path
    """Output folder of the run: run.json, metrics.jsonl, checkpoints, and the trained student."""
    control: bool = False
    """Also train a control: the same student on hard labels alone, in the same order, for comparison. The report then
    says whether distillation helped, by measure and by slice of positions."""
    stop_if_worse: bool = False
    """With --control: train the control first, and end the student's training at an evaluation (from the third on) at
    which it is worse by the measure of --best, beyond an interval of 95% for all evaluations together. It is then
    complete, with what it has come to exported; the same command without this option continues it."""
    dry_run: bool = False
    """Write nothing, and print what the training will take: steps, evaluations, memory, hours, what is compared, and
    files. The student is made, and the first micro-batches are run for some 20 seconds."""


@dataclass(frozen=True, kw_only=True)
class Mutual(MutualSettings, TrainSettings):
    """Train students that learn from each other.

    The students, of any architectures with one vocabulary, learn from the labels and from each other's outputs on the
    same batches. With --cache or --teacher they learn from that teacher as well. With --every, from copies of each
    other that are updated every N steps.
    Running the same command again resumes from the last checkpoint; under torchrun, on all processes.
    Exit status 0: training is complete. 75: work remains (after SIGTERM, with a checkpoint written): requeue it.
    """

    student: tuple[str, ...]
    """Student models, as in `fastkd train`: repeat the option, or list them. One that has no weights and is given twice
    begins with other random ones."""
    cache: tuple[str, ...] = ()
    """Cache: a folder, a .zip of one, or a URL (s3://, gs://, az://; http(s):// for a sealed cache). Several caches of
    one tokenizer are mixed: repeat the option, or list them."""
    cache_weights: tuple[float, ...] = ()
    """With several caches: the share of the positions from each. Default: each sequence once an epoch."""
    teacher: str | None = None
    """With --data: a teacher to learn from as well, which is not trained, as in `fastkd train`."""
    data: tuple[str, ...] = ()
    """Without a cache, the dataset, as in `fastkd capture`: files, folders or glob patterns, or module:factory. With a
    cache of examples: module:factory that returns the labelled examples."""
    out: Path
    """Output folder of the run: run.json, metrics.jsonl, checkpoints, and students/NAME."""
    control: bool = False
    """Also train each student alone on hard labels, in the same order, for comparison."""
    stop_if_worse: bool = False
    """With --control: train the controls first, and end the students' training at an evaluation (from the third on) at
    which each that learns from others is worse than its control, as in `fastkd train`."""
    json: bool = False
    """Print events as JSON lines instead of a progress bar; the last one is the report."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """Compare the layers of a student with cached features.

    Runs the student on a slice of the cache's inputs, and prints linear CKA between its layers and the cached features,
    and the option --match of `fastkd train` for the highest ones. With --teacher and --init, also writes a copy of the
    student whose layers are those of the teacher that they are matched with, as far as they fit.
    """

    student: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STUDENT")]
    """Student model, as in `fastkd train`: a folder or Hub name of a causal model, a folder with a config.json and no
    weights (randomly initialized), or module:factory."""
    cache: Place
    """Cache with features: a folder, a .zip of one, or a URL (s3://, gs://, az://; http(s):// for a sealed cache)."""
    features: tuple[str, ...] = ()
    """Features to compare with. Default: all that the cache has."""
    positions: int = 4096
    """Number of positions to compare, of each feature."""
    data: str | None = None
    """module:factory that returns the labelled examples, for a cache of examples."""
    teacher: str | None = None
    """With --init: the cache's teacher, a folder or Hub name of a causal model, or module:factory."""
    init: Path | None = None
    """Output folder of the initialized student. Layers are copied, embeddings and LM head copied or fitted."""
    match: tuple[str, ...] = ("auto",)
    """With --init: entries as of `fastkd train --match`, between which layers are spread evenly. auto: the original
    layers of a pruned copy, otherwise uniformly."""
    seed: int = 0
    """Seed of new weights, and of the slice."""
    device: str | None = None
    """Device: cpu, cuda, cuda:1, ... Default: a GPU if there is one."""
    allow_partial: bool = False
    """Allow a cache with missing shards."""
    allow_other_tokenizer: bool = False
    """Allow a student whose tokenizer differs from the cache's."""
    trust_remote_code: bool = False
    """Allow running Python code that comes with a model."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True, kw_only=True)
class Student(StudentSettings):
    """Make a student from its teacher, of a given size.

    With --cache: a copy of the teacher without what matters least by its answers in the cache. Layers, MLP units,
    key-value heads and hidden channels are removed; some shapes that fit are compared by their KL divergence from the
    teacher, untrained, and the best one is written. Without --cache: a config of this size, for new weights.
    With --drop-every N, a copy without one layer in N.
    """

    teacher: str
    """Teacher model: a folder, a GGUF file, or a name on the Hugging Face Hub."""
    cache: str | None = None
    """Cache of this teacher: a folder, a .zip of one, or a URL (s3://, gs://, az://; http(s):// for a sealed cache)."""
    out: Path
    """Output folder of the student, for `fastkd train --student`."""
    json: bool = False
    """Print events as JSON lines instead of a progress bar; the last one is the report."""


@dataclass(frozen=True, kw_only=True)
class Sweep(_Training):
    """Train a student with several settings, and rank them.

    The arms are the grid of the given values of alpha, temperature, divergence, treatment and rate; all other settings
    are shared. Running the same command again resumes.
    Exit status 0: all arms are trained. 75: work remains (after SIGTERM, with checkpoints written): requeue it.
    """

    cache: tuple[str, ...]
    """Cache: a folder, a .zip of one, or a URL (s3://, gs://, az://; http(s):// for a sealed cache). Several caches of
    one tokenizer are mixed: repeat the option, or list them."""
    cache_weights: tuple[float, ...] = ()
    """With several caches: the share of the positions from each. Default: each sequence once an epoch."""
    data: str | None = None
    """module:factory that returns the labelled examples, for a cache of examples."""
    out: Path
    """Output folder of the sweep: sweep.json, sweep.png, and a run folder for each arm and seed."""
    alpha: tuple[float, ...] = ()  # type: ignore[assignment]
    """Weights of the hard loss: 0 trains on the teacher alone, 1 on the labels alone."""
    temperature: tuple[float, ...] = ()  # type: ignore[assignment]
    """Temperatures of the soft loss. They must be ones that the cache supports."""
    divergence: tuple[DivergenceName, ...] = ()  # type: ignore[assignment]
    """Divergences between teacher and student distributions."""
    treatment: tuple[TreatmentName, ...] = ()  # type: ignore[assignment]
    """Treatments of the teacher's probability mass outside the stored entries."""
    rate: tuple[float, ...] = ()  # type: ignore[assignment]
    """Peak learning rates."""
    auto: bool = False
    """Choose alpha, temperature and divergence by successive halving on the held-out split, with one seed, at the cost
    of three to four full runs, and up to one more for the default settings: of 16 arms (or the grid of the values
    given), the better half of each rung continues, up to half of the run with at least one arm of each temperature and
    hard labels alone. The default settings are among the arms, and trained to the end for comparison. Writes
    chosen.json, with a command to train with, and auto.png."""
    seeds: int = 2
    """Number of trainings per arm, with seeds from --seed on, used to judge differences between arms. Not with
    --auto."""
    stop_if_worse: bool = False
    """Train hard labels alone (alpha 1, among the arms) first with each seed, and end the training of another arm with
    this seed at an evaluation (from the third on) at which it is worse than they are with the same rate, as in `fastkd
    train`. Not with --auto."""
    at_once: int | None = None
    """Deprecated, without effect: arms are trained one after another."""
    ray: bool = False
    """Train the arms as trials of Ray Tune, as many at once as fit: on the cluster at RAY_ADDRESS, or the one that runs
    on this machine. Not with --auto."""
    asha: bool = False
    """With --ray: stop trainings early that are behind the others after as many evaluations (ASHA)."""
    gpus_per_worker: float | None = None
    """With --ray: GPUs of a training. Default: one if the cluster has any."""
    cpus_per_worker: float = 1.0
    """With --ray: CPUs of a training."""


@dataclass(frozen=True, kw_only=True)
class Generations(LiveSettings, _Training):
    """Train a student, then a new one from it, and so on.

    Born-again networks: a student is trained from a cache of the teacher, then captured in turn, and a new student is
    trained from that cache. From two generations on, one more student is trained from the mean of all caches.
    Each generation starts from --student as it is: with its weights, or with new ones by the seed, --seed + g - 1 for
    generation g. Running the same command again resumes.
    Exit status 0: all students are trained. 75: work remains (after SIGTERM, or with a full disk): requeue it.
    """

    generations: Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="N")]
    """Number of generations."""
    teacher: str
    """Teacher of the first generation, as in `fastkd capture`."""
    data: tuple[str, ...]
    """Dataset, as in `fastkd capture`: files, folders or glob patterns; or module:factory, of labelled examples too."""
    out: Path
    """Output folder: generations.json, generations.png, and a cache and a run for each generation."""
    control: bool = False
    """Also train the student of the first generation on hard labels alone, for comparison."""
    ensemble: bool = True
    """Train a student from the mean of all generations' caches."""


@dataclass(frozen=True, kw_only=True)
class ExportCache(ModelSettings):
    """Write a cache in another program's format.

    parquet: tokens and targets as columns, for datasets, pandas and people.
    safetensors-features, specforge: tokens and hidden states, to train draft heads in speculators (vLLM; needs at least
    one layer and -1) or in SpecForge (EAGLE-3; needs three layers, -1, and the teacher, whose final norm it applies).
    Running the same command again resumes. Exit status 75: work remains (after SIGTERM, or with a full disk).
    """

    cache: Place
    """Cache: a folder, a .zip of one, or a URL (s3://, gs://, az://; http(s):// for a sealed cache)."""
    to: str
    """Format: parquet, safetensors-features or specforge."""
    out: Path
    """Output folder."""
    columns: str | None = None
    """With --to parquet: fastkd (sequence, input_ids, labels, top_ids, top_logprobs, tail, draws) or axolotl
    (input_ids, attention_mask, labels, target_token_ids, target_logprobs, target_mask). Default: fastkd."""
    features: tuple[str, ...] = ()
    """Numbers of layers whose input is written, in order, such as 2,15,27. -1, the input of the final norm, is always
    the last. Default: all hidden states in the cache."""
    state_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Data type of the states on disk."""
    teacher: str | None = None
    """Teacher of the cache, as in `fastkd capture`, for formats that need its final norm."""
    json: bool = False
    """Print events as JSON lines instead of a progress bar; the last one is the report."""


StudentPlace = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STUDENT")]


@dataclass(frozen=True, kw_only=True)
class Export(ExportSettings):
    """Write a trained student as files of another runtime.

    With --cache, the exported files are evaluated on the held-out split, in their own runtime: KL to the teacher,
    agreement and cross-entropy, paired with the student in PyTorch.
    Exit status 1: it could not be exported, or costs more than --at-most.
    """

    student: StudentPlace
    """Student: the folder student/ of a run, or trained:module:factory@RUN/student for a module of yours whose run does
    not know what made it."""
    to: str
    """Format: a module of fastkd.deploy.formats, such as onnx, executorch, gguf or safetensors."""
    out: Path
    """Output folder. It must not exist, and is there whole or not at all."""
    cache: str | None = None
    """Cache that the student was trained from: a folder, a .zip of one, or a URL. Formats choose scales of activations
    by its training split."""
    data: str | None = None
    """module:factory that returns the labelled examples, for a classifier."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True, kw_only=True)
class DeployReport(DeploySettings):
    """Compare exports of a student on one page.

    Size, latency, peak memory and quality against the teacher, side by side with the student in PyTorch.
    Exit status 1: a problem was found, or an export costs more than --at-most.
    """

    student: StudentPlace
    """Student, as in `fastkd export`."""
    folders: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="FOLDER [FOLDER ...]", help_behavior_hint="(required)"),
    ]
    """Folders that `fastkd export` wrote."""
    out: Path | None = None
    """Output page. Default: deploy-report.html beside the first folder."""
    cache: str | None = None
    """Cache to evaluate all of them on: a folder, a .zip of one, or a URL. Default: what `fastkd export` has
    evaluated is shown."""
    data: str | None = None
    """module:factory that returns the labelled examples, for a classifier."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True, kw_only=True)
class MixTargets:
    """Write the mean of several teachers' caches.

    The caches must have the same rows: one data set, vocabulary and window plan. Exact for tokens among the top-k
    entries of all caches; tails and other tokens are estimated where they are unknown.
    Running the same command again resumes. Exit status 75: work remains (after SIGTERM, or with a full disk).
    """

    caches: Annotated[
        tuple[str, ...], tyro.conf.Positional,
        tyro.conf.arg(metavar="CACHE CACHE [CACHE ...]", help_behavior_hint="(required)"),
    ]  # fmt: skip
    """Complete caches: folders, .zips of one, or URLs."""
    out: str
    """Output cache: a folder or a URL (s3://, gs://, az://)."""
    weights: tuple[float, ...] = ()
    """Weights of the caches. Default: all equal."""
    k: int | None = None
    """Maximum number of top-k entries per target. Default: the union of all caches' entries."""
    draws: int | None = None
    """Number of entries sampled from the tail per target. 0 leaves less noise in the top-k entries, for training at
    high temperatures. Default: as many as the cache with the most; 0 if a cache has none."""
    threads: int = 1
    """Number of threads that encode and write shards."""
    json: bool = False
    """Print events as JSON lines instead of a progress bar; the last one is the report."""


@dataclass(frozen=True)
class Report:
    """Compare runs and sweeps on one HTML page.

    Of runs: curves, a table of the students, and the settings that differ. Of sweeps: the arms ranked, as means over
    their seeds, each against the best and against hard labels alone.
    """

    runs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")
    ]
    """Folders that `fastkd train`, `mutual` or `sweep` wrote."""
    out: Path | None = None
    """Output page. Default: report.html in the first folder."""
    png: bool = False
    """Also write each plot as a PNG beside the page."""
    fetch: bool = False
    """Also open caches at URLs that the runs name. By default only caches in folders are opened."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Bench(BenchSettings):
    """Run benchmarks against limits and peers.

    Without a suite, all run except sass, which runs only if it is named.
    Exit status 1: a suite failed, or with --check a figure got worse.
    """


@dataclass(frozen=True)
class Demo(DemoSettings):
    """Run the whole pipeline on real input.

    The students are copies of the teacher with layers removed, trained from the cache, beside a hard-label control.
    Running the same command again resumes.
    Exit status 0: complete. 75: work remains (after SIGTERM or an interruption).
    """

    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Doctor:
    """Check the installation and the machine.

    Prints versions, extras, cores and their load, memory and disk, the GPU and its compiler, and compares the fused
    loss with the reference on the device.
    Exit status 1: a problem was found.
    """

    place: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[CACHE]")] = None
    """Also check a place for caches: a folder, or a URL (s3://, gs://, az://), where a probe of a few bytes is left:
    whether it can be reached, and refuses to create an object twice."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True)
class Completion:
    """Print a shell completion script.

    bash: mkdir -p ~/.local/share/bash-completion/completions, and
    fastkd completion bash > ~/.local/share/bash-completion/completions/fastkd

    zsh: fastkd completion zsh > _fastkd, in a folder of $fpath
    """

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional, tyro.conf.arg(metavar="SHELL")]
    """Shell: bash, zsh or fish."""
    json: Annotated[bool, tyro.conf.Suppress] = False


COMMANDS: dict[str, type] = {
    "capture": Capture,
    "plan": Plan,
    "inspect": Inspect,
    "verify": Verify,
    "seal": Seal,
    "features": Features,
    "match": Match,
    "student": Student,
    "train": Train,
    "mutual": Mutual,
    "sweep": Sweep,
    "generations": Generations,
    "mix-targets": MixTargets,
    "export-cache": ExportCache,
    "export": Export,
    "deploy-report": DeployReport,
    "report": Report,
    "bench": Bench,
    "demo": Demo,
    "doctor": Doctor,
    "completion": Completion,
}
