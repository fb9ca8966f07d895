"""mse, cosine, smooth_l1, cka and gram on states: against the oracle in dense space, by count, and what is refused."""

from itertools import pairwise

import pytest
import torch
from loss_cases import Allocations, close, draw, hidden_targets, leaves_of, value_and_gradients
from torch import Tensor

from fastkd.kernels import HiddenTargets, KDError, find_feature_loss
from fastkd.kernels.features.segments import Segments

NAMES = ("mse", "cosine", "smooth_l1", "gram", "cka")
ROWS, WIDTH, OTHER_WIDTH = 40, 12, 7
SUMS = ("mse", "cosine", "smooth_l1", "gram")  # of rows; cka is of a batch


def student_for(name: str, rows: int = ROWS) -> Tensor:
    return draw(rows, WIDTH if find_feature_loss(name).projector else OTHER_WIDTH, seed=9)


@pytest.mark.parametrize("name", NAMES)
def test_code_space_is_dense_space(name: str) -> None:
    """The loss and its gradient from codes are those of the oracle, which rotates the codes back to states."""
    found, student, targets = find_feature_loss(name), student_for(name), hidden_targets()
    assert len(targets.exact_rows) == 2
    for num_items in (None, 100, torch.tensor(100.0)):
        ours = value_and_gradients(found.loss, student, targets, num_items)
        close(ours, value_and_gradients(found.oracle, student, targets, num_items), 1e-9)
        assert ours[1].abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_differences(name: str) -> None:
    student, targets = student_for(name)[:8], hidden_targets()[:8]
    assert torch.autograd.gradcheck(
        lambda s: find_feature_loss(name).loss(s, targets), student.clone().requires_grad_()
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    found, targets = find_feature_loss(name), hidden_targets()
    student = student_for(name).to(dtype)
    ours = value_and_gradients(found.loss, student, targets.map(lambda x: x.float() if x.is_floating_point() else x))
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    oracle = value_and_gradients(found.oracle, student.double(), targets)
    close(ours[:1], oracle[:1], 2e-6)
    close(ours[1:], oracle[1:], 3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", SUMS)
def test_micro_batches_add_up_to_the_whole(name: str) -> None:
    found, student, targets = find_feature_loss(name), student_for(name), hidden_targets()
    bounds = (0, 13, 13, 14, 40)
    options = {"segments": Segments(bounds)} if found.segments else {}
    whole = found.loss(student, targets, 77, **options)
    parts = [found.loss(student[a:b], targets[a:b], 77) for a, b in pairwise(bounds)]
    assert float(parts[1]) == 0
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_are_a_loss_of_zero_with_a_graph(name: str) -> None:
    student, (leaf,) = leaves_of(student_for(name)[:0])
    for num_items in (None, 5, 0, torch.tensor(0)):
        loss = find_feature_loss(name).loss(student, hidden_targets()[:0], num_items)
        assert float(loss.detach()) == 0
        loss.backward()
        assert leaf.grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_targets_shifted_by_one_position_are_noticed(name: str) -> None:
    """A student that is its teacher has no loss; against the targets of the next position it has one."""
    found, targets = find_feature_loss(name), hidden_targets(sinks=())
    student = targets.units(dtype=torch.float64) if found.dense else targets.coordinates(dtype=torch.float64)
    aligned, shifted = (float(found.loss(student[:-1], t)) for t in (targets[:-1], targets[1:]))
    assert abs(aligned) < (1e-4 if name == "cka" else 1e-9)  # whose rows are divided by their rms, which codes change
    assert shifted > 0.02


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_coordinates_serves_as_targets(name: str) -> None:
    found, student, targets = find_feature_loss(name), student_for(name), hidden_targets()
    tensor = targets.units(dtype=torch.float64) if found.dense else targets.coordinates(dtype=torch.float64)
    kept = tensor.clone()
    close(value_and_gradients(found.loss, student, tensor), value_and_gradients(found.loss, student, targets), 1e-12)
    assert torch.equal(tensor, kept)
    close(value_and_gradients(found.oracle, student, tensor), value_and_gradients(found.loss, student, tensor), 1e-9)


@pytest.mark.parametrize("name", ["mse", "cosine", "gram", "cka"])
def test_a_rotation_of_both_changes_nothing(name: str) -> None:
    found, targets = find_feature_loss(name), hidden_targets()
    student, z = student_for(name), targets.coordinates(dtype=torch.float64)
    turn = torch.linalg.qr(draw(WIDTH, WIDTH, seed=3)).Q
    turned = student @ turn if found.projector else student
    torch.testing.assert_close(found.loss(turned, z @ turn), found.loss(student, z))


def test_smooth_l1_takes_its_threshold() -> None:
    found, student, targets = find_feature_loss("smooth_l1"), student_for("smooth_l1"), hidden_targets()
    losses = []
    for beta in (0.1, 1.0, 5.0):
        ours = value_and_gradients(found.loss, student, targets, beta=beta)
        close(ours, value_and_gradients(found.oracle, student, targets, beta=beta), 1e-9)
        losses.append(float(ours[0]))
    assert losses[0] > losses[1] > losses[2]
    with pytest.raises(KDError, match="beta: got 0"):
        found.loss(student, targets, beta=0)


@pytest.mark.parametrize("block", [64, 500, None])
@pytest.mark.parametrize("bounds", [(0, 40), (0, 1, 5, 7, 30, 40)])
def test_gram_in_blocks_stays_in_segments(block: int | None, bounds: tuple[int, ...]) -> None:
    found, student, targets = find_feature_loss("gram"), student_for("gram"), hidden_targets()
    segments = Segments(bounds)
    ours = value_and_gradients(found.loss, student, targets, segments=segments, block=block)
    close(ours, value_and_gradients(found.oracle, student, targets, segments=segments), 1e-9)


def test_gram_needs_no_matrix_of_all_rows() -> None:
    """The cosines of 2,000 rows are 16 MB."""
    rows = 2000
    targets = HiddenTargets.from_states(draw(rows, 8).float())
    leaf = draw(rows, 8, seed=1).float().requires_grad_()
    with Allocations() as made:
        find_feature_loss("gram").loss(leaf, targets, block=2**16).backward()
    assert leaf.grad is not None
    assert made.peak < rows * rows * 4 / 8


def test_a_zero_vector_has_a_finite_gradient() -> None:
    for name in NAMES:
        student = student_for(name)
        student[3] = 0
        assert all(
            bool(x.isfinite().all())
            for x in value_and_gradients(find_feature_loss(name).loss, student, hidden_targets())
        )


def test_evaluation_needs_no_gradient() -> None:
    for name in NAMES:
        student, _ = leaves_of(student_for(name))
        with torch.no_grad():
            assert not find_feature_loss(name).loss(student, hidden_targets()).requires_grad
        assert not find_feature_loss(name).loss(student.detach(), hidden_targets()).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name: str) -> None:
    found, student = find_feature_loss(name), student_for(name).float()
    targets = hidden_targets().map(lambda x: x.float() if x.is_floating_point() else x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = value_and_gradients(found.loss, student, targets)
    for one, other in zip(cast, value_and_gradients(found.loss, student, targets), strict=True):
        assert torch.equal(one, other)


def test_what_does_not_fit_is_named() -> None:
    targets = hidden_targets()
    for name in NAMES:
        found, student = find_feature_loss(name), student_for(name)
        for wrong, says in (
            (student[:-1], "student: got 39 rows for 40"),
            (student[0], r"student: got \(\d+,\) torch.float64; expected a floating-point tensor"),
            (student.long(), "student: got .* torch.int64"),
            (None, "student: got None"),
        ):
            with pytest.raises(KDError, match=says):
                found.loss(wrong, targets)
        with pytest.raises(KDError, match="teacher: got None"):
            found.loss(student, None)
        for items in ("a", -1, float("nan")):
            with pytest.raises(KDError, match=f"num_items: got {items!r}"):
                found.loss(student, targets, items)
        if found.projector:
            with pytest.raises(
                KDError, match="vectors of 7 components, and the teacher's have 12; expected a projector"
            ):
                found.loss(draw(ROWS, OTHER_WIDTH), targets)
    with pytest.raises(KDError, match="segments: got segments of 3 rows; expected `Segments` of 40 rows"):
        find_feature_loss("gram").loss(student_for("gram"), targets, segments=Segments((0, 3)))
    with pytest.raises(KDError, match="segments: got list"):
        find_feature_loss("gram").loss(student_for("gram"), targets, segments=[0, 40])


@pytest.mark.parametrize("name", ["mse", "cosine", "smooth_l1", "cka"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_in_one_graph(name: str) -> None:
    """torch.compile(fullgraph=True) gives eager's numbers."""
    torch._dynamo.reset()
    targets = hidden_targets().map(lambda x: x.float() if x.is_floating_point() else x)
    student = student_for(name).float()

    def step(s: Tensor, t: HiddenTargets) -> Tensor:
        return find_feature_loss(name).loss(s * 2.0, t, 50)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    close(value_and_gradients(compiled, student, targets), value_and_gradients(step, student, targets), 1e-6)
    torch._dynamo.reset()
