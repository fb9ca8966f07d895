"""The groups of options in help texts and config files, and other spellings of options.

An option that is in no group here is refused by a test. The order here is that of the help: what is used most comes
first.
"""

from collections.abc import Iterable

MAIN = ""  # what a command is about: shown first, and at the top of a config file

# of options by their fields' names, in all commands that have them
GROUPS: dict[str, tuple[str, ...]] = {
    MAIN: (
        "teacher", "student", "cache", "data", "out", "shell", "place", "generations", "caches", "folders", "runs",
        "suites", "to", "at_most", "drop_every", "features", "columns", "state_dtype", "init", "sample", "classes",
        "deep", "examples", "positions", "drop", "control", "stop_if_worse", "auto", "seeds", "ensemble", "at_once",
        "seconds", "price_per_hour", "weights", "cache_weights", "png", "fetch", "task", "scale", "write_cache",
        "train_teacher", "list", "full", "rounds", "peers", "check", "against", "use", "page", "markdown", "dry_run",
        "json",
    ),
    "optimization": (
        "steps", "epochs", "rate", "batch_tokens", "batch_size", "batch_windows", "rate_schedule", "warmup",
        "rate_floor", "decay", "weight_decay", "clip", "adam_betas", "adam_eps", "micro_tokens", "layout", "seed",
        "precision", "compile", "activation_checkpointing",
    ),
    "loss": (
        "alpha", "temperature", "divergence", "treatment", "beta", "skew", "alpha_end", "alpha_schedule",
        "temperature_end", "temperature_schedule",
    ),
    "layers": (
        "match", "match_projector", "match_init", "match_rate", "exits", "exit_weight", "exit_alpha",
    ),
    "model": (
        "dtype", "attention", "device", "tokenizer", "allow_other_tokenizer", "revision", "trust_remote_code",
        "lora_rank", "lora_alpha", "lora_targets", "lora_dropout", "lora_merge", "quantize", "quantize_after", "cut",
    ),
    "live teacher": (
        "teacher_options", "teacher_dtype", "teacher_attention", "teacher_revision", "teacher_batch_tokens",
        "teacher_k", "teacher_draws", "every", "one_each",
    ),
    "rollouts": (
        "rollouts", "rollout_tokens", "rollout_temperature", "rollout_every", "rollout_prompt", "rollout_eos",
        "rollout_batch", "rollout_generator", "rollout_scoring",
    ),
    "targets": ("k", "draws", "draw_temperature", "mass", "temperatures", "codec"),
    "features": ("feature_step", "feature_kl", "feature_positions", "feature_block"),
    "data": (
        "column", "text_documents", "template", "loss_on", "context", "packing", "on_long", "overlap", "held_out",
        "shard_positions", "data_seed", "max_positions", "skip", "shards_open", "allow_partial", "window",
        "train_windows", "shard_windows",
    ),
    "evaluation": ("evaluate_every", "evaluate_positions", "best", "log"),
    "checkpoints": (
        "checkpoint_minutes", "checkpoint_every", "keep", "export", "export_teacher", "export_exit",
    ),
    "distributed": (
        "workers", "threads", "rank", "world_size", "parallel", "teacher_parallel", "timeout_minutes", "ray",
        "gpus_per_worker", "cpus_per_worker", "asha",
    ),
    "sharing": ("push", "push_private", "card_teacher"),
}  # fmt: skip

# where a name means something else than in most commands, by command
_ELSEWHERE: dict[tuple[str, str], str] = {
    ("capture", "batch_tokens"): "model",
    ("plan", "batch_tokens"): "model",
    ("capture", "seed"): "targets",
    ("plan", "seed"): "targets",
    ("capture", "features"): "features",
    ("plan", "features"): "features",
    ("capture", "tokenizer"): "data",
    ("plan", "tokenizer"): "data",
    ("plan", "workers"): MAIN,
    ("match", "match"): MAIN,
    ("student", "quantize"): MAIN,
    ("export", "quantize"): MAIN,
    ("student", "seed"): "model",
    ("match", "seed"): "model",
    ("bench", "runs"): MAIN,
    ("mix-targets", "k"): MAIN,
    ("mix-targets", "draws"): MAIN,
    ("inspect", "tokenizer"): MAIN,
    ("doctor", "place"): MAIN,
    ("capture", "teacher_options"): "model",
    ("plan", "teacher_options"): "model",
    ("verify", "teacher_options"): "model",
    ("export-cache", "teacher_options"): "model",
}  # fmt: skip

# the option of a field, where it is not the field's name, and its other spellings
SPELLINGS: dict[str, tuple[str, ...]] = {
    "rate": ("learning-rate", "rate", "lr"),
    "rate_schedule": ("learning-rate-schedule", "rate-schedule", "lr-schedule"),
    "rate_floor": ("learning-rate-floor", "rate-floor", "lr-floor"),
    "match_rate": ("match-learning-rate", "match-rate", "match-lr"),
}

# `fastkd --help`: the commands by what they are for
COMMAND_GROUPS: dict[str, tuple[str, ...]] = {
    "Make a cache": ("capture", "plan", "mix-targets", "seal"),
    "Train": ("train", "sweep", "mutual", "generations", "student", "match"),
    "Look": ("report", "inspect", "features"),
    "Deploy and export": ("export", "deploy-report", "export-cache"),
    "Check": ("verify", "doctor", "bench", "demo"),
    "Shell": ("completion",),
}


def group_of(command: str, name: str) -> str | None:
    """The group of an option of a command; None if it is in none."""
    if (found := _ELSEWHERE.get((command, name))) is not None:
        return found
    return next((group for group, names in GROUPS.items() if name in names), None)


def grouped(command: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Names of a command's fields by group, as the help shows them; what is in no group is in the main one."""
    found: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in names:
        found[group_of(command, name) or MAIN].append(name)
    for group, members in found.items():
        known = GROUPS[group]
        members.sort(key=lambda name: known.index(name) if name in known else len(known))
    return found


def spellings(name: str) -> tuple[str, ...]:
    """The options of a field, without dashes in front: first the one of the help."""
    return SPELLINGS.get(name, (name.replace("_", "-"),))
