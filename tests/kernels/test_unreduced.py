"""What is known of parameters, of which losses are computed in several processes. See also tests/integrations."""

import pytest
import torch

from fastkd.kernels.loss import unreduced


def test_what_is_known_of_a_parameter_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop may make new leaves at every step, as of logits."""
    monkeypatch.setattr(unreduced.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(unreduced.dist, "get_world_size", lambda: 2)
    before = set(unreduced._known)
    kept = torch.zeros(2, 3, requires_grad=True)
    for _ in range(3):
        leaf = torch.zeros(2, 3, requires_grad=True)
        unreduced.check_reduced("logits", leaf)
        unreduced.check_reduced("hidden states", 2 * kept)
        assert set(unreduced._known) == before | {id(kept), id(leaf)}
        del leaf
        assert set(unreduced._known) == before | {id(kept)}


def test_wrappers_of_every_class_are_found() -> None:
    class Own(torch.nn.parallel.DistributedDataParallel):
        pass

    class Further(Own):
        pass

    living = [kind.__new__(kind) for kind in (torch.nn.parallel.DistributedDataParallel, Own, Further)]
    assert {id(one) for one in living} <= {id(one) for one in unreduced._wrappers()}
