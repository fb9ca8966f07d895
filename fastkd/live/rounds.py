"""Rounds of rollouts on disk: what a student said, by prompts, and the teacher's targets for it.

    RUN/rollouts/  rollouts.json  round-00000.parquet  round-00000/  round-00001.parquet ...

round-00000.parquet has the tokens, a row for each rollout; it is created whole, once, before anything is trained on it.
round-00000/ is its cache, as `fastkd capture --data round-00000.parquet` writes it; every rollout is one sequence.
rollouts.json has the settings that the rounds were made with.
"""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..cache.errors import CacheError, NotFound
from ..cache.reader import Cache, open_cache
from ..cache.spec import CODECS, CacheSpec
from ..data.columns import LOSS_MASK, TEXT_SETTINGS
from ..errors import StreamError
from ..settings import CaptureSettings
from ..utils.atomic import PART, read_sealed, write_json

FOLDER, SETTINGS = "rollouts", "rollouts.json"
_VERSION = 1
_ROUND = "fastkd.rollouts"  # key of a file's metadata: the round's number, and what it was made with, as JSON
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rollouts:
    """The rollouts of a round, in the order of the steps: n of them.

    tokens: int64, of each: prompt and continuation. prompts `[n]`: tokens of each prompt. ended `[n]`: whether the
    student ended it, with an end-of-sequence token. source, shard, sequence `[n]`: where the prompt is from: the number
    of the cache (or other origin), its shard, and the number of the sequence in it. step `[n]`: the optimizer step that
    trains on it, from 0.
    """

    tokens: Sequence[Ints]
    prompts: Ints
    ended: NDArray[np.bool_]
    source: Ints
    shard: Ints
    sequence: Ints
    step: Ints

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Ints:
        """Tokens of each, `[n]`."""
        return np.array([len(tokens) for tokens in self.tokens], np.int64)

    def of_step(self, step: int) -> Ints:
        """The numbers of the rollouts of a step."""
        return np.flatnonzero(self.step == step)

    def loss_mask(self, number: int) -> NDArray[np.bool_]:
        """The positions of a rollout that count: those that predict a token of the continuation."""
        at = np.arange(len(self.tokens[number]))
        mask: NDArray[np.bool_] = (at >= self.prompts[number] - 1) & (at < len(at) - 1)
        return mask


class Rounds:
    """The rounds of a run. folder: RUN/rollouts. settings: what every round is made with, and run: what else the
    student's weights follow from, as JSON."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        self.folder, self._settings, self._run = folder, json.loads(json.dumps(settings)), json.loads(json.dumps(run))

    def tokens(self, number: int) -> Path:
        return self.folder / f"round-{number:05d}.parquet"

    def cache(self, number: int) -> Path:
        return self.folder / f"round-{number:05d}"

    def begin(self, student: str) -> None:
        """Before the first step of a run: note what its rounds are made with. student: a hash of its weights. Raises
        StreamError, naming the differences, if there are rounds of another run."""
        path, ours = (
            self.folder / SETTINGS,
            {"version": _VERSION, "student": student, **self._settings, "run": self._run},
        )
        try:
            theirs = read_sealed(path)
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, ours)
            return
        except ValueError as error:
            raise StreamError(f"{path}: cannot be read ({error}). Delete {self.folder}, and train again.") from error
        theirs = {name: value for name, value in theirs.items() if name != "sha256"}
        ours, theirs = ({**one, **one.get("run", {})} for one in (ours, theirs))
        names = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
        if names := [name for name in names if name != "run"]:
            listed = "; ".join(f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in names)
            raise StreamError(
                f"{self.folder}: it has rollouts of another run ({listed}). Delete it, or train into another folder."
            )

    def read(self, number: int) -> Rollouts | None:
        """The tokens of a round; None if they are not committed. Raises StreamError if they cannot be read."""
        path = self.tokens(number)
        try:
            table = pq.read_table(path)
            stated = json.loads((table.schema.metadata or {})[_ROUND.encode()])
            if stated != (ours := {"version": _VERSION, "round": number, **self._settings}):
                names = [name for name in sorted(ours.keys() | stated.keys()) if ours.get(name) != stated.get(name)]
                listed = "; ".join(f"{name}: {stated.get(name)!r} there, {ours.get(name)!r} here" for name in names)
                raise StreamError(f"{path}: it is a round of another run ({listed}). Train into another folder.")
            columns = {name: table.column(name).combine_chunks() for name in _SCHEMA.names}
            flat = columns["tokens"].flatten().to_numpy().astype(np.int64)
            cuts: Any = np.cumsum(np.diff(columns["tokens"].offsets.to_numpy())) if table.num_rows else []
            plain = {name: columns[name].to_numpy(zero_copy_only=False) for name in ("ended", *_NUMBERS)}
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise StreamError(f"{path}: cannot be read as a round of rollouts ({error}). Restore it.") from error
        tokens = np.split(flat, cuts)[: table.num_rows]
        return Rollouts(tokens, **{name.replace("prompt", "prompts"): column for name, column in plain.items()})

    def commit(self, number: int, made: Rollouts, text_settings: Mapping[str, str]) -> None:
        """Write the tokens of a round, unless they are there. text_settings: what is known of the ids' tokenizer."""
        path = self.tokens(number)
        stated = {"version": _VERSION, "round": number, **self._settings}
        metadata = {_ROUND: json.dumps(stated), LOSS_MASK: "loss_mask"}
        metadata |= {TEXT_SETTINGS: json.dumps(dict(text_settings))} if text_settings else {}
        columns = {
            "tokens": list(made.tokens), "loss_mask": [made.loss_mask(i) for i in range(len(made))],
            "prompt": made.prompts, "ended": made.ended, "source": made.source, "shard": made.shard,
            "sequence": made.sequence, "step": made.step, "round": np.full(len(made), number),
        }  # fmt: skip
        arrays = [pa.array(columns[field.name], field.type) for field in _SCHEMA]
        temporary = path.with_name(f".{path.name}.{os.getpid()}{PART}")
        try:
            pq.write_table(pa.Table.from_arrays(arrays, schema=_SCHEMA.with_metadata(metadata)), temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)  # fails where a rename would replace
            except FileExistsError:
                return
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        finally:
            temporary.unlink(missing_ok=True)

    def scored(self, number: int) -> Cache | None:
        """The cache of a round's targets; None if it is not complete."""
        try:
            cache = open_cache(self.cache(number))
        except CacheError as error:
            if isinstance(error, NotFound) or isinstance(error.__cause__, NotFound):  # of a capture that has just begun
                return None
            raise
        return cache if cache.sealed else None


_NUMBERS = ("prompt", "source", "shard", "sequence", "step")
_SCHEMA = pa.schema(
    [
        ("tokens", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        *((name, pa.int64()) for name in (*_NUMBERS, "round")),
        ("ended", pa.bool_()),
    ]
)


def scoring_settings(spec: CacheSpec, number: int, longest: int, batch_tokens: int) -> CaptureSettings:
    """How the rollouts of a round are captured: with targets as those of a cache of this spec, each rollout a sequence,
    none held out. longest: tokens of a rollout. The draws of each round are others."""
    codec: Any = spec.codec
    return CaptureSettings(
        k=spec.k, draws=spec.draws, draw_temperature=spec.draw_temperature, mass=spec.mass,
        temperatures=spec.temperatures, codec=codec, context=longest, packing="keep", on_long="error",
        held_out=0.0, batch_tokens=batch_tokens, seed=(spec.provenance.draw_seed or 0) + 1 + number,
    )  # fmt: skip


def scoring_command(settings: CaptureSettings, tokens: Path, cache: Path, teacher: str = "") -> str:
    """The command that captures a round. teacher: its name; "" leaves it open."""
    names = (
        "k", "draws", "draw_temperature", "mass", "temperatures", "codec", "context", "packing", "on_long", "held_out",
        "batch_tokens", "seed",
    )  # fmt: skip
    words = ["fastkd", "capture", "--teacher", teacher or "TEACHER", "--data", str(tokens), "--out", str(cache)]
    for name in names:
        value: Any = getattr(settings, name)
        if name == "codec":  # None for one without a name
            value = next((known for known, codec in CODECS.items() if value in (known, codec)), None)
        if value is not None:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name.replace('_', '-')}", *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    return shlex.join(words)


def rounds_in(folder: Any) -> list[tuple[Path, float]] | None:
    """The complete rounds in a folder RUN/rollouts as a mixture of caches in which every position counts the same; None
    for anything else. Raises StreamError if there is none that is complete."""
    if not isinstance(folder, (str, Path)) or not (Path(folder) / SETTINGS).is_file():
        return None
    found = []
    for path in sorted(Path(folder).glob("round-*")):
        if path.is_dir():
            try:
                cache = open_cache(path)
            except CacheError:
                continue
            if cache.sealed:
                found.append((path, float(cache.manifest.column("positions").to_numpy().sum())))
    if not found:
        raise StreamError(f"{folder}: got rollouts without targets; expected at least one round that is scored.")
    return found


def text_settings_of(spec: CacheSpec) -> dict[str, str]:
    """What a cache of this spec knows of the tokenizer of its ids; see `Documents.text_settings`."""
    source = spec.provenance
    found = {name: one.fingerprint for name in ("tokenizer", "template") if (one := getattr(source, name))}
    plain = {name: value for name in ("loss_on", "text_documents") if (value := getattr(source, name))}
    return {**found, **plain} if "tokenizer" in found else {}
