"""Beginning or continuing a cache: its plan and spec, the bases and specs of its features, and writers of all of it."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from ..cache import CacheSpec, CacheWriter, FeatureWriter, create_cache, create_feature
from ..cache.features.objects import read_block
from ..cache.stores import Store
from ..data.documents import Documents
from ..data.examples import Examples
from ..teachers.tensor_parallel import ParallelGroup, led
from .claims import Claims
from .feature_places import Place
from .features.prepare import Feature, prepare_features
from .prepare import write_window_plan
from .teacher_pass import TeacherPass
from .window_plan import WindowPlan


class Begun(NamedTuple):
    """A cache that can be written to. features: prepared. targets: the writer of its shards, None unless this process
    leads its group. writers: that of each feature, likewise."""

    features: list[Feature]
    targets: CacheWriter | None
    writers: dict[str, FeatureWriter]


def begin_cache(
    teacher_pass: TeacherPass,
    data: Documents | Examples,
    plan: WindowPlan,
    spec: CacheSpec,
    places: Sequence[Place],
    store: Store,
    claims: Claims,
    stack: ExitStack,
    *,
    group: ParallelGroup,
    threads: int = 1,
    say: Callable[[str], None],
) -> Begun:
    """Begin a cache, or continue one, whose features were checked. stack: ends the writers. threads: of the writer of
    targets. say: called with a line when this worker waits for another. All processes of the group call it."""
    opened: list[CacheWriter] = []
    writers: dict[str, FeatureWriter] = {}

    def begin() -> None:
        # before the spec: if two workers start with different settings, the plan names the differences
        write_window_plan(store, plan)
        opened.append(stack.enter_context(create_cache(store, spec, threads=threads, queue=1)))

    def open_features() -> None:
        for feature in features:
            made = create_feature(store, feature.spec, feature.basis, read_block(store, feature.spec), queue=1)
            writers[feature.name] = stack.enter_context(made)

    led(group, begin)
    features = prepare_features(teacher_pass, data, plan, spec, places, store, claims, group, say)
    led(group, open_features)
    return Begun(features, opened[0] if opened else None, writers)
