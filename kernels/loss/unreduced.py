"""A loss whose gradients DistributedDataParallel will not average is refused.

It averages them only where its own forward has run. A loss of `model.module(...)`, or of
`unwrap(model).base_model(...)`, has right gradients on each process, which are never exchanged: nothing fails, and the
processes' weights drift apart.
"""

import gc
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..errors import KDError

_NODES = 4096  # of a graph that are looked at for a parameter
_LOSSES = 64  # after one forward, at most


class _Wrapper:
    """The DistributedDataParallel that a parameter belongs to, and the losses since its last forward."""

    def __init__(self, wrapper: DistributedDataParallel) -> None:
        self._wrapper = weakref.ref(wrapper)
        self._losses = 0 if getattr(wrapper, "_lazy_init_ran", True) else _LOSSES
        wrapper.register_forward_hook(self._has_run)

    def _has_run(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._losses = 0

    def refuses(self) -> bool:
        """Whether a loss that is computed now has gradients that will not be averaged, for all that can be seen."""
        wrapper = self._wrapper()
        if wrapper is None or not wrapper.require_backward_grad_sync or getattr(wrapper, "_use_python_reducer", False):
            return False
        self._losses += 1
        return self._losses > _LOSSES and dist.get_world_size(wrapper.process_group) > 1


_known: "dict[int, _Parameter]" = {}
"""By the id of the parameter, as long as it lives."""


class _Parameter:
    """A parameter that losses were computed of: how many, and its wrapper, once there is one."""

    def __init__(self, parameter: Tensor) -> None:
        known, key = _known, id(parameter)
        self.parameter = weakref.ref(parameter, lambda _: known.pop(key, None))
        self.wrapper: _Wrapper | None = None
        self._losses = 0

    def find(self) -> _Wrapper | None:
        self._losses += 1
        # it may be wrapped later. Going through all objects takes a moment, so it is done more and more rarely
        if self.wrapper is None and self._losses & (self._losses - 1) == 0:
            parameter = self.parameter()
            for wrapper in _wrappers():
                if any(one is parameter for one in wrapper.parameters()):
                    self.wrapper = _Wrapper(wrapper)
        return self.wrapper


def _wrappers() -> list[DistributedDataParallel]:
    """Every one that lives. An object refers to its class, and what refers to one is found without Python code for each
    object of the program."""
    classes: list[Any] = [DistributedDataParallel]
    for kind in classes:
        classes += [new for new in kind.__subclasses__() if new not in classes]
    return [one for one in gc.get_referrers(*classes) if type(one) in classes]


def check_reduced(name: str, x: Tensor, weight: Tensor | None = None) -> None:
    """Raise KDError for a loss of x (hidden states or logits; weight: of the LM head) whose gradients will not be
    averaged over processes, though the module that they are of is wrapped to do so.

    It is seen where the forward of the wrapper has never run, or not before many losses. Not within `no_sync`.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if DistributedDataParallel._active_ddp_module is not None:
        return
    parameter = None if weight is None else _leaf_of(weight)
    if parameter is None and (parameter := _leaf_of(x)) is None:
        return
    if (known := _known.get(id(parameter))) is None:
        known = _known[id(parameter)] = _Parameter(parameter)
    if (wrapper := known.find()) is not None and wrapper.refuses():
        raise KDError(
            f"{name}: got those of a module within DistributedDataParallel whose own forward has not run; expected the "
            "loss inside of it, or of its outputs: else gradients are not averaged over processes. Wrap a module whose "
            "forward is the loss (fastkd.distill_module, or fastkd.integrations.hf.attach), and call the wrapper."
        )


def _leaf_of(x: Tensor) -> Tensor | None:
    """A tensor that a gradient of x is accumulated in, if any."""
    if not x.requires_grad:
        return None
    if x.is_leaf:
        return x
    nodes, seen = [x.grad_fn], set[Any]()
    while nodes and len(seen) < _NODES:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            return leaf
        nodes += [following for following, _ in node.next_functions]
    return None
