"""Before the first shard: each feature's basis, step and block, found by one worker and written once for all."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ...cache import (
    Basis,
    CacheError,
    CacheSpec,
    FeatureSpec,
    create_feature,
    open_cache,
    read_basis,
    read_feature_spec,
    share_basis,
)
from ...cache.spec import differences
from ...cache.stores import Store
from ...data.documents import Documents
from ...data.examples import Examples
from ...errors import DataError
from ...kernels.features.basis import LearntBasis
from ...models.attention import read_attention, to_bytes
from ...settings import CaptureSettings
from ...teachers.protocol import Teacher
from ...teachers.tensor_parallel import ParallelGroup, led
from ..claims import Claims, wait_for
from ..feature_places import Place, network_of
from ..feature_settings import ALL, STEP, positions_text, step_of
from ..teacher_pass import TeacherPass
from ..window_plan import WindowPlan
from .sample import sample_states
from .step import find_step, found_in

_CLAIM = "features"


@dataclass(frozen=True, eq=False)
class Feature:
    """A feature that is captured: where it is, and how it is coded."""

    place: Place
    spec: FeatureSpec
    basis: Basis
    on_device: LearntBasis

    @property
    def name(self) -> str:
        return self.spec.name


def basis_on(basis: Basis, device: torch.device) -> LearntBasis:
    """A basis as tensors on a device."""
    mean, columns = (torch.from_numpy(array).to(device) for array in (basis.mean, basis.basis))
    return LearntBasis(mean, columns, basis.scale)


def check_sizes(places: Sequence[Place], plan: WindowPlan) -> None:
    """DataError if the values of a shard of the plan would be more than an object holds."""
    most = int(np.diff(plan.shard_rows).max())
    for place in places:
        limit = feature_spec(place, "0" * 64, "0" * 64).most_positions
        if most > limit:
            raise DataError(
                f"shard_positions: got shards of up to {most:,} positions; expected at most {limit:,} for feature "
                f"{place.name}, whose values have {'x'.join(map(str, place.shape))} numbers. Capture a new cache with "
                f"--shard-positions {limit}."
            )


def check_existing(store: Store, base: CacheSpec, places: Sequence[Place], settings: CaptureSettings) -> None:
    """CacheError if the store has one of these features with other settings, naming what differs."""
    for place in places:
        if (there := read_feature_spec(store, place.name)) is not None:
            _check_same(store, there, place, base, settings)


def feature_spec(place: Place, base: str, basis: str, **changes: Any) -> FeatureSpec:
    """The spec of a feature at a place. base, basis: hashes. Raises CacheError for a feature that no cache can hold."""
    state = place.kind == "state"
    name = str(place.dtype).removeprefix("torch.")
    values: dict[str, Any] = {
        "base": base,
        "name": place.name,
        "kind": place.kind,
        "layer": place.tap.layer if state else None,
        "layers": place.tap.layers if state else None,
        "shape": place.shape,
        "step": STEP,
        "positions": ALL,
        "seed": 0,
        "dtype": "float32" if name == "float64" else name,
        "basis": basis,
    }
    return FeatureSpec(**values | changes)


def prepare_features(
    teacher_pass: TeacherPass,
    data: Documents | Examples,
    plan: WindowPlan,
    base: CacheSpec,
    places: Sequence[Place],
    store: Store,
    claims: Claims,
    group: ParallelGroup,
    say: Callable[[str], None] = lambda text: None,
) -> list[Feature]:
    """The features of a capture: as the store has them, or else found, by one worker, and written there.

    All processes of the worker call it. say: called with a line for a person.
    Raises as `TeacherPass.run`, `find_step` and `attention_block`; CacheError for a feature of other settings.
    """
    if not places:
        return []

    def missing() -> tuple[float, list[str]]:
        """Seconds for which another worker may prepare them; if none, the names of those to prepare."""
        names = [place.name for place in places if read_feature_spec(store, place.name) is None]
        return (claims.take(_CLAIM) if names else 0.0), names

    names = wait_for(
        lambda: led(group, missing), lambda: say("waiting for another worker, which prepares the features")
    )
    try:
        if names:
            new = [place for place in places if place.name in names]
            _find(teacher_pass, data, plan, base, new, store, claims, group, say)
    finally:
        if group.leader:
            claims.drop(_CLAIM)

    def read() -> list[tuple[FeatureSpec, Basis]]:
        check_existing(store, base, places, teacher_pass.settings)
        cache = open_cache(store)
        try:
            return [((feature := cache.features[place.name]).spec, feature.basis) for place in places]
        except KeyError as error:
            raise CacheError(f"{store.describe()}: feature {error.args[0]} was dropped meanwhile.") from error

    device = teacher_pass.teacher.device
    found = zip(places, led(group, read), strict=True)
    return [Feature(place, spec, basis, basis_on(basis, device)) for place, (spec, basis) in found]


def _find(
    teacher_pass: TeacherPass,
    data: Documents | Examples,
    plan: WindowPlan,
    base: CacheSpec,
    places: Sequence[Place],
    store: Store,
    claims: Claims,
    group: ParallelGroup,
    say: Callable[[str], None],
) -> None:
    """Find and write the basis, step and block of some features, and at the end the spec of each."""
    settings, teacher = teacher_pass.settings, teacher_pass.teacher
    positions = positions_text(settings)
    # before the teacher runs for long: a layer may have none
    blocks = {place.name: _block(teacher, place, plan) if has_block(place, settings) else None for place in places}
    there = led(group, lambda: [place.name for place in places if read_basis(store, place.name) is not None])
    keep = replace(teacher_pass, on_batch=lambda positions, seconds: claims.keep() if group.leader else None)
    if new := [place for place in places if place.name not in there]:
        say(f"features: learning the basis of {', '.join(p.name for p in new)} from the first positions")
        states = sample_states(keep, data, plan, new, positions)

        def write() -> None:
            for place, vectors in zip(new, states, strict=True):
                claims.keep()
                share_basis(store, place.name, Basis.learn(vectors))

        led(group, write)
    for place in places:
        # as the store has it: another worker may have been faster
        basis = led(group, partial(_written_basis, store, place))
        step, notes = step_of(settings), ""
        if settings.feature_kl is not None:

            def share(kl: float) -> float:
                if group.leader:
                    claims.keep()
                return group.share(kl)

            on_device = basis_on(basis, teacher.device)
            search = find_step(teacher, data, plan, place, on_device, positions, settings.feature_kl, share)
            say(search.text(place.name))
            step, notes = search.step, search.to_notes()
        make = partial(_create, store, base, place, basis, blocks[place.name], settings, step=step, notes=notes)
        led(group, make)


def _create(
    store: Store,
    base: CacheSpec,
    place: Place,
    basis: Basis,
    block: bytes | None,
    settings: CaptureSettings,
    **found: Any,
) -> None:
    """Write the spec of a feature, unless there is one: on other hardware, another worker may have found another step,
    and its spec is the one that counts."""
    digest = None if block is None else hashlib.sha256(block).hexdigest()
    spec = feature_spec(
        place,
        base.hash,
        basis.sha256,
        positions=positions_text(settings),
        seed=settings.seed,
        block=digest,
        **found,
    )
    try:
        create_feature(store, spec, basis, block).close()
    except CacheError:
        if read_feature_spec(store, place.name) is None:
            raise


def has_block(place: Place, settings: CaptureSettings) -> bool:
    """Whether the layer's own weights are stored beside a feature."""
    return settings.feature_block and place.kind == "state" and place.tap.before


def _written_basis(store: Store, place: Place) -> Basis:
    basis = read_basis(store, place.name)
    if basis is None or basis.width != place.width:
        raise CacheError(
            f"{store.describe()}: the basis of feature {place.name} is of vectors of another width, or gone. Drop the "
            f"feature (`fastkd features CACHE --drop {place.name}`), and run this again."
        )
    return basis


def _block(teacher: Teacher, place: Place, plan: WindowPlan) -> bytes:
    """The weights of the layer that a state enters, by which attention is recomputed; proven on a probe."""
    assert place.tap.layer is not None
    with torch.no_grad():
        attention = read_attention(network_of(teacher), place.tap.layer, context=plan.settings.context)
        return to_bytes(attention.block())


def _check_same(store: Store, there: FeatureSpec, place: Place, base: CacheSpec, settings: CaptureSettings) -> None:
    """CacheError unless the feature in the store is the one that the settings ask for."""
    search = found_in(there.notes)
    step = step_of(settings)
    different = []
    if settings.feature_kl is not None:
        step = there.step
        if search is None or search.feature_kl != settings.feature_kl:
            different.append(f"feature_kl: {search and search.feature_kl} and {settings.feature_kl}")
    if has_block(place, settings) and there.block is None:
        different.append("feature_block: False and True")
    ours = feature_spec(
        place,
        base.hash,
        there.basis,
        step=step,
        positions=positions_text(settings),
        seed=settings.seed,
        block=there.block,
        level=there.level,
    )
    named = {"step": "feature_step", "positions": "feature_positions"}
    for text in differences(there, ours):
        name, _, values = text.partition(": ")
        different.append(f"{named.get(name, name)}: {values}")
    if different:
        raise CacheError(
            f"{store.describe()}: its feature {place.name} was captured with other settings (there, and now: "
            f"{'; '.join(different)}). Use those settings, or drop that feature first (`fastkd features CACHE --drop "
            f"{place.name}`)."
        )
