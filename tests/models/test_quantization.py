"""The description of the quantisation schemes: what is quantised, and to which values."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastkd.models.quantization import (
    NOTE,
    SCHEMES,
    Weights,
    fake_quantize,
    fake_quantize_rows,
    noted_scheme,
    problem_of,
    quantised_weights,
    quantize,
)

INT4, INT8 = SCHEMES["int4"], SCHEMES["int8"]


@pytest.mark.parametrize("how", [Weights(4, 32), Weights(8), Weights(4, 8), Weights(8, 32)])
def test_codes_are_the_nearest_of_the_scale(how: Weights) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    weight[2] = 0  # a group of zeros
    group = how.group or 64
    found, codes = fake_quantize(weight, how), quantize(weight, how)
    assert codes.codes.dtype == torch.int8
    assert codes.scales.shape == (6, 64 // group)
    for o in range(6):
        for g in range(64 // group):  # in obvious lines, in float64
            w = weight[o, g * group : (g + 1) * group].double()
            s = w.abs().max() / (2 ** (how.bits - 1) - 0.5)
            levels = torch.arange(-(2 ** (how.bits - 1)), 2 ** (how.bits - 1)).double() * s
            nearest = levels[(w[:, None] - levels).abs().argmin(1)]
            ours = found[o, g * group : (g + 1) * group].double()
            # at a tie (the maximum, at half a step) either is the nearest
            assert (ours - w).abs() == pytest.approx((nearest - w).abs(), abs=1e-6)
            assert ours.unique().numel() <= 2**how.bits


def test_rows_are_quantised_each_by_its_own_range() -> None:
    inputs = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[None, :, None]
    inputs[0, 0] = 0
    inputs[0, 1] = inputs[0, 1].abs()  # 0 is in the range of values all above it
    step = (inputs.amax(-1).clamp(min=0) - inputs.amin(-1).clamp(max=0)) / 255
    error = (fake_quantize_rows(inputs) - inputs).abs().amax(-1)
    assert (error <= 1.001 * step).all()  # half a step, and half of one for the zero point
    assert torch.equal(fake_quantize_rows(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_convolutions_are_quantised_by_output_channel() -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[1] *= 100
    found = fake_quantize(weight, INT4.ends)
    assert found.shape == weight.shape
    assert (found - weight)[0].abs().max() <= weight[0].abs().max() / 127


class Text(nn.Module):
    """A language model of transformers' shape, tied or not."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(10, 32), nn.LayerNorm(32)
        self.layers = nn.ModuleList([nn.Linear(32, 64), nn.Linear(64, 32)])
        self.lm_head = nn.Linear(32, 10, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_quantised(tied: bool) -> None:
    ends = {"embed.weight": Weights(8)} | ({} if tied else {"lm_head.weight": Weights(8)})
    linear = {"layers.0.weight": Weights(4, 32), "layers.1.weight": Weights(4, 32)}
    assert quantised_weights(Text(tied=tied), INT4) == ends | linear
    assert set(quantised_weights(Text(tied=tied), INT8).values()) == {Weights(8)}
    images = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(32, 10), nn.Embedding(3, 4))
    assert quantised_weights(images, INT4) == {"0.weight": Weights(8), "2.weight": Weights(4, 32)}


def test_what_cannot_be_quantised() -> None:
    assert problem_of(Text(tied=True), INT4) is None
    assert problem_of(nn.Sequential(nn.Linear(48, 10)), INT8) is None
    said = problem_of(nn.Sequential(nn.ReLU(), nn.Linear(48, 10)), INT4)
    assert said == "got int4 for 1, which has 48 inputs; expected a multiple of 32, the group that shares a scale"
    assert "which it lacks" in str(problem_of(nn.LayerNorm(4), INT8))


def test_the_scheme_of_a_trained_student_is_noted(tmp_path: Path) -> None:
    student = tmp_path / "run" / "student"
    student.mkdir(parents=True)
    assert noted_scheme(student) == "none"
    (student.parent / "run.json").write_text(json.dumps({"settings": {"quantize": "int8"}}))
    assert noted_scheme(student) == "int8"
    (student / "config.json").write_text(json.dumps({NOTE: INT4.to_json()}))
    assert noted_scheme(student) == "int4"
