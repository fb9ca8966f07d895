"""Attention and relation losses: against the oracle, in blocks, in segments, of other heads, and their memory."""

from typing import Any

import pytest
import torch
from loss_cases import Allocations, close, draw, layer, leaves_of, value_and_gradients

from fastkd.kernels import KDError, find_feature_loss
from fastkd.kernels.features.attention import QueriesKeysValues, attention_maps
from fastkd.kernels.features.segments import Segments

NAMES = ("attention", "relation")
ROWS = 30
SEGMENTS = Segments((0, 1, 8, 10, 27, 30))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("segments", "block"), [(None, None), (None, 64), (SEGMENTS, None), (SEGMENTS, 64), (SEGMENTS, 1000)]
)
def test_against_the_oracle(name: str, causal: bool, segments: Segments | None, block: int | None) -> None:
    found, student, teacher = find_feature_loss(name), layer(1, ROWS, 4, 2, 6), layer(5, ROWS, 4, 4, 6)
    for num_items in (None, 77):
        ours = value_and_gradients(
            found.loss, student, teacher, num_items, segments=segments, causal=causal, block=block
        )
        oracle = value_and_gradients(found.oracle, student, teacher, num_items, segments=segments, causal=causal)
        close(ours, oracle, 1e-10)
        assert all(float(x.abs().max()) > 1e-4 for x in ours[:3])


@pytest.mark.parametrize(
    ("student", "teacher"), [((4, 2), (8, 2)), ((8, 4), (4, 1)), ((3, 1), (4, 4)), ((6, 3), (9, 3))]
)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_other_numbers_of_heads(student: tuple[int, int], teacher: tuple[int, int], softcap: float | None) -> None:
    found = find_feature_loss("attention")
    ours = layer(1, ROWS, *student, 6, softcap=softcap, scale=0.5)
    theirs = layer(5, ROWS, *teacher, 10, softcap=3.0)
    options = {"segments": SEGMENTS}
    close(
        value_and_gradients(found.loss, ours, theirs, block=64, **options),
        value_and_gradients(found.oracle, ours, theirs, **options),
        1e-10,
    )


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_differences(name: str) -> None:
    found, teacher = find_feature_loss(name), layer(5, 6, 4, 2, 4)
    tensors = [x.clone().requires_grad_() for x in layer(1, 6, 2, 1, 4)[:3]]

    def function(*qkv: torch.Tensor) -> torch.Tensor:
        return found.loss(QueriesKeysValues(*qkv, softcap=2.0), teacher, segments=Segments((0, 2, 6)))

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up_to_the_whole(name: str) -> None:
    found, student, teacher = find_feature_loss(name), layer(1, ROWS, 4, 2, 6), layer(5, ROWS, 4, 4, 6)
    whole = found.loss(student, teacher, 77, segments=Segments((0, 11, 30)))
    parts = []
    for rows in (slice(0, 11), slice(11, 30), slice(30, 30)):
        some = [
            x._replace(**{n: getattr(x, n)[rows] for n in ("queries", "keys", "values")}) for x in (student, teacher)
        ]
        parts.append(found.loss(*some, 77))
    assert float(parts[2]) == 0
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_are_a_loss_of_zero_with_a_graph(name: str) -> None:
    student, leaves = leaves_of(layer(1, 0, 4, 2, 6))
    loss = find_feature_loss(name).loss(student, layer(5, 0, 4, 4, 6), 5)
    loss.backward()
    assert float(loss.detach()) == 0
    assert leaves[0].grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_other_segments_change_nothing(name: str) -> None:
    """Whatever is in the other segments, a segment's gradient is the same; and they have none from it."""
    found, teacher = find_feature_loss(name), layer(5, ROWS, 4, 4, 6)
    gradients = []
    for seed in (1, 2):
        student = layer(seed, ROWS, 4, 2, 6)
        for x, same in zip(student[:3], layer(1, ROWS, 4, 2, 6)[:3], strict=True):
            x[10:27] = same[10:27]
        gradients.append(value_and_gradients(found.loss, student, teacher, 30, segments=SEGMENTS, block=100)[1:])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one[10:27], other[10:27])
    assert not torch.allclose(gradients[0][0][:8], gradients[1][0][:8])


def test_a_causal_query_sees_no_later_key() -> None:
    found, teacher = find_feature_loss("attention"), layer(5, ROWS, 4, 4, 6)
    student, leaves = leaves_of(layer(1, ROWS, 4, 2, 6))
    some = student._replace(queries=torch.cat([student.queries[:9], student.queries[9:].detach()]))
    found.loss(some, teacher, segments=Segments.one(ROWS)).backward()
    changed = teacher._replace(keys=torch.cat([teacher.keys[:9], draw(21, 4, 6, seed=50)]))
    again, other = leaves_of(layer(1, ROWS, 4, 2, 6))
    found.loss(again, changed, segments=Segments.one(ROWS)).backward()
    torch.testing.assert_close(leaves[0].grad[:9], other[0].grad[:9])


@pytest.mark.parametrize("name", NAMES)
def test_targets_shifted_by_one_position_are_noticed(name: str) -> None:
    found, both = find_feature_loss(name), layer(1, ROWS, 4, 4, 6)
    aligned, shifted = (
        both._replace(**{n: getattr(both, n)[rows] for n in ("queries", "keys", "values")})
        for rows in (slice(0, -1), slice(1, None))
    )
    assert abs(float(found.loss(aligned, aligned))) < 1e-12
    assert float(found.loss(aligned, shifted)) > 0.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    found, teacher = find_feature_loss(name), layer(5, ROWS, 4, 4, 6)
    student = layer(1, ROWS, 4, 2, 6)
    student = student._replace(**{n: getattr(student, n).to(dtype) for n in ("queries", "keys", "values")})
    ours = value_and_gradients(found.loss, student, teacher, segments=SEGMENTS, block=64)
    assert ours[0].dtype == torch.float32
    assert {x.dtype for x in ours[1:]} == {dtype}
    exact = student._replace(**{n: getattr(student, n).double() for n in ("queries", "keys", "values")})
    oracle = value_and_gradients(found.oracle, exact, teacher, segments=SEGMENTS, causal=name == "attention")
    close(ours[:1], oracle[:1], 2e-6)
    close(ours[1:], oracle[1:], 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name: str) -> None:
    found, names = find_feature_loss(name), ("queries", "keys", "values")
    student, teacher = layer(1, ROWS, 4, 2, 6), layer(5, ROWS, 4, 4, 6)
    student, teacher = (x._replace(**{n: getattr(x, n).float() for n in names}) for x in (student, teacher))
    with torch.autocast("cpu", torch.bfloat16):
        cast = value_and_gradients(found.loss, student, teacher)
        maps = attention_maps(teacher, slice(3, 9))
    for one, other in zip(cast, value_and_gradients(found.loss, student, teacher), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(maps, attention_maps(teacher, slice(3, 9)))


def test_relation_heads_are_free() -> None:
    found, student, teacher = find_feature_loss("relation"), layer(1, ROWS, 4, 2, 6), layer(5, ROWS, 6, 3, 8)
    losses = []
    for heads in (1, 2, 4, 12, None):
        options = {"heads": heads, "segments": SEGMENTS}
        ours = value_and_gradients(found.loss, student, teacher, **options)
        close(ours, value_and_gradients(found.oracle, student, teacher, **options), 1e-10)
        losses.append(float(ours[0]))
    assert losses[4] == pytest.approx(float(found.loss(student, teacher, heads=6, segments=SEGMENTS)))
    assert len({round(x, 9) for x in losses}) == 5
    with pytest.raises(
        KDError, match=r"heads: got 5 relation heads for widths \[24, 48, 12, 24, 12, 24\]; .* divisor of 12"
    ):
        found.loss(student, teacher, heads=5)


def test_values_are_compared_where_both_have_them() -> None:
    found, student, teacher = find_feature_loss("relation"), layer(1, ROWS, 4, 2, 6), layer(5, ROWS, 4, 4, 6)
    without = float(found.loss(student, teacher._replace(values=None)))
    values = student._replace(queries=student.values, keys=student.values, values=None)
    only = teacher._replace(queries=teacher.values, keys=teacher.values, values=None)
    assert float(found.loss(student, teacher)) == pytest.approx(
        (2 * without + float(found.loss(values, only, heads=4))) / 3
    )


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_bounded_in_forward_and_backward(name: str) -> None:
    """8 heads of 640 rows: one set of maps is 13 MB, and a step lives in a fraction of it."""
    rows, heads = 640, 8
    student, teacher = (
        {n: x.float() for n, x in zip("qkv", layer(s, rows, heads, 2, 16)[:3], strict=True)} for s in (1, 5)
    )
    saved = 0

    def keep(x: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += x.numel() * x.element_size()
        return x

    leaves = [x.requires_grad_() for x in student.values()]
    with Allocations() as made, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        options: dict[str, Any] = {"block": 2**16}
        loss = find_feature_loss(name).loss(QueriesKeysValues(*leaves), QueriesKeysValues(*teacher.values()), **options)
        loss.backward()
    one_set = heads * rows * rows * 4
    assert leaves[0].grad is not None
    assert made.largest < one_set / 30
    assert made.peak < one_set / 3
    assert saved < one_set / 20


def test_maps_of_some_rows() -> None:
    teacher, segments = layer(5, ROWS, 4, 2, 6, softcap=3.0), SEGMENTS
    whole = attention_maps(teacher, slice(None), segments)
    assert whole.shape == (4, ROWS, ROWS)
    torch.testing.assert_close(whole.sum(-1), torch.ones(4, ROWS, dtype=torch.float64))
    torch.testing.assert_close(attention_maps(teacher, slice(7, 12), segments), whole[:, 7:12])
    number = torch.bucketize(torch.arange(ROWS), torch.tensor(segments.bounds), right=True)
    allowed = (number[:, None] == number) & torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
    assert torch.equal(whole[0] > 0, allowed)
    with pytest.raises(KDError, match="a slice without a step"):
        attention_maps(teacher, slice(0, 5, 2))


def test_what_does_not_fit_is_named() -> None:
    teacher = layer(5, ROWS, 4, 4, 6)
    for name in NAMES:
        found = find_feature_loss(name)
        with pytest.raises(KDError, match=r"segments of 30 rows; expected"):
            found.loss(layer(1, 20, 4, 2, 6), teacher, segments=SEGMENTS)
        with pytest.raises(KDError, match="30 rows of the teacher and segments of 20"):
            found.loss(layer(1, 20, 4, 2, 6), teacher)
    with pytest.raises(KDError, match=r"student: got shapes \(30, 4, 6\), \(30, 3, 6\)"):
        find_feature_loss("attention").loss(QueriesKeysValues(teacher.queries, teacher.keys[:, :3]), teacher)


@pytest.mark.parametrize(
    ("index", "bounds", "expected"),
    [
        (None, [0, 4, 9], (0, 4, 9)),
        (None, torch.tensor([0, 4, 4, 9], dtype=torch.int32), (0, 4, 4, 9)),
        (torch.tensor([0, 1, 5, 6, 11]), range(0, 13, 4), (0, 2, 4, 5)),  # padded rows of 4
        (torch.tensor([1, 2, 8]), [0, 4, 6, 9], (0, 2, 3)),
        (torch.tensor([], dtype=torch.int64), [0, 4, 6, 9], (0,)),
    ],
)
def test_segments_of_a_micro_batch(index: Any, bounds: Any, expected: tuple[int, ...]) -> None:
    assert Segments.of(index, bounds).bounds == expected


def test_segments_that_are_none_are_refused() -> None:
    for index, bounds, says in (
        ([3, 2], [0, 4], "expected positions that ascend within the bounds"),
        ([0, 4], [0, 4], "positions 0 to 4 in bounds 0 to 4"),
        ([0, 1], [1, 4], "positions 0 to 1 in bounds 1 to 4"),
    ):
        with pytest.raises(KDError, match=says):
            Segments.of(torch.tensor(index), bounds)
    for wrong in ((), (1, 4), (0, 4, 3)):
        with pytest.raises(KDError, match="segments: got bounds"):
            Segments(wrong)
    with pytest.raises(KDError, match="expected whole numbers"):
        Segments.of(None, torch.tensor([0.0, 4.0]))


def test_blocks_cover_all_rows_and_their_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    for trial in range(60):
        lengths = torch.randint(0, 90, (int(torch.randint(1, 12, (), generator=generator)),), generator=generator)
        segments = Segments((0, *lengths.cumsum(0).tolist()))
        for causal in (True, False):
            first, last = segments.visible(causal, torch.device("cpu"))
            size = (60, 4000, 10**6)[trial % 3]
            at = 0
            for b in segments.blocks(2, causal, torch.device("cpu"), size):
                assert b.start == at < b.stop
                at = b.stop
                rows = slice(b.start, b.stop)
                assert b.first <= int(first[rows].min())
                assert b.last >= int(last[rows].max())
                exact = bool((first[rows] == b.first).all() & (last[rows] == b.last).all())
                assert b.mask or exact
                assert 2 * (b.stop - b.start) * (b.last - b.first) <= max(size, 2 * 16 * 90)
            assert at == len(segments)
