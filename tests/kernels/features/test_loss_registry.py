"""Feature losses are found by their names, without importing torch, and one that is wrong is named."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastkd.kernels import KDError, find_feature_loss, register_feature_loss
from fastkd.kernels.features import losses

NAMES = ("at", "attention", "cka", "cosine", "gram", "hint", "mse", "relation", "smooth_l1", "sp")


def test_names_are_known_without_torch() -> None:
    code = (
        "import sys; from fastkd.kernels.features.losses import FeatureLossName, feature_loss_names\n"
        "print(*feature_loss_names())\n"
        "assert 'torch' not in sys.modules and FeatureLossName.__args__ == feature_loss_names()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert tuple(done.stdout.split()) == NAMES


def test_each_is_complete() -> None:
    for name in NAMES:
        found = find_feature_loss(name)
        assert found.name == name
        assert found is find_feature_loss(name)
    assert {n for n in NAMES if find_feature_loss(n).projector} == {"mse", "cosine", "smooth_l1", "hint"}
    assert {n for n in NAMES if find_feature_loss(n).segments} == {"attention", "relation", "gram"}
    assert {n for n in NAMES if find_feature_loss(n).dense} == {"smooth_l1"}


def test_one_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_known", dict(losses._known))
    definition = SimpleNamespace(
        INPUTS="states",
        PROJECTOR=True,
        SEGMENTS=False,
        loss=lambda s, t, n=None: (s - t).abs().sum(),
        oracle=lambda *a: 0,
    )
    register_feature_loss("l1", definition)
    assert "l1" in losses.feature_loss_names()
    assert float(find_feature_loss("l1").loss(torch.ones(2, 2), torch.zeros(2, 2))) == 4
    for change, says in (
        ({"INPUTS": "pixels"}, "INPUTS: got 'pixels'; expected one of states, attention, maps"),
        ({"PROJECTOR": "yes"}, "PROJECTOR: got 'yes'; expected True or False"),
        ({"loss": 3}, "loss: got 3; expected a function"),
    ):
        with pytest.raises(KDError, match=f"'l1', whose definition is not complete: {says}"):
            register_feature_loss("l1", SimpleNamespace(**{**vars(definition), **change}))
    del definition.oracle
    with pytest.raises(KDError, match="got no oracle; expected INPUTS, PROJECTOR, SEGMENTS, loss, oracle"):
        register_feature_loss("l1", definition)


def test_an_unknown_name_lists_what_there_is() -> None:
    for wrong in ("l2", None, 3):
        with pytest.raises(KDError, match=f"feature loss: got {wrong!r}; expected one of at, attention, cka"):
            find_feature_loss(wrong)


def test_a_file_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_known", {**losses._known, "broken": None})
    with pytest.raises(
        KDError, match="'broken', whose definition is not complete: importing it raised ModuleNotFoundError"
    ):
        find_feature_loss("broken")
