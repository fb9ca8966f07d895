"""Inner states of a network, recorded by forward hooks: those that enter its layers, and the outputs of its modules.

with Taps(model, ["20", "-1"]) as taps:
    model(tokens)
states = taps.values["20"]  # [B, L, D]

Nothing is asked of the model but its modules: its `output_hidden_states` would keep the states of every layer.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TeacherError
from ..utils.distributed import is_dtensor

STATE, OUTPUT = "state", "output"
_NUMBER = re.compile(r"[+-]?\d+")
_AT = ":at"


@dataclass(frozen=True, eq=False)
class Tap:
    """A place in a network whose tensors are recorded.

    name: as it was given. feature: its name in a cache: a layer's number from 0 ("-1" for what enters the final norm),
    or the name of a module, with ":at" for its attention-transfer map. layer, layers: the number of the layer that the
    state enters (that of layers, if it enters the final norm), and the number of layers; None for a module.
    module: the one that is hooked, path: its name. before: whether its input is recorded, not its output.
    """

    name: str
    feature: str
    module: nn.Module
    path: str
    layer: int | None = None
    layers: int | None = None
    before: bool = False

    @property
    def kind(self) -> str:
        """`STATE` for a state that enters a layer or the final norm, `OUTPUT` for a module's output."""
        return OUTPUT if self.layer is None else STATE

    @property
    def squared(self) -> bool:
        """Whether it is an attention-transfer map: the mean over channels of a map's squares."""
        return self.feature.endswith(_AT)

    def of(self, given: Any) -> Tensor:
        """The tensor among a module's arguments or in its return value: the first one there. TypeError if none is."""
        if isinstance(given, Mapping):
            given = tuple(given.values())
        value = next((v for v in given if isinstance(v, Tensor)), None) if isinstance(given, (tuple, list)) else given
        if not isinstance(value, Tensor):
            what = "takes" if self.before else "returns"
            raise TypeError(f"{self.name}: module {self.path} {what} {type(given).__name__}; expected a tensor.")
        if is_dtensor(value):
            value = value.full_tensor()
        # a copy, as what follows may change the tensor in place (nn.ReLU(inplace=True))
        return value.square().mean(1) if self.squared else value.clone()


class Taps:
    """Records the tensors at some taps in every forward of a model, from `attach` (or `with`) until `detach`.

    model: the network; taps: names (see `resolve`), or `Tap`s of it. values: by the name of the tap, the tensors of the
    last forward: `[B, L, D]` for text, `[B, C, H, W]` (":at": `[B, H, W]`) for maps. They carry gradients where these
    are enabled. The recomputation of an activation checkpoint records nothing. With compiled layers, attach before the
    first forward.
    """

    def __init__(self, model: nn.Module, taps: Iterable["str | Tap"], error: type[Exception] = TeacherError) -> None:
        given = list(taps)
        found = iter(resolve(model, [tap for tap in given if isinstance(tap, str)], error))
        self.taps = [next(found) if isinstance(tap, str) else tap for tap in given]
        self.values: dict[str, Tensor] = {}
        self.recording = True
        """Set to False, for a forward whose states nobody reads."""
        self._handles: list[Any] = []

    def attach(self) -> "Taps":
        """Register the hooks, if they are not."""
        if not self._handles:
            self._handles = [self._hook(tap) for tap in self.taps]
        return self

    def detach(self) -> None:
        """Remove the hooks. The values stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self) -> dict[str, Tensor]:
        """The values, which are then forgotten here. RuntimeError if one was not recorded since the last call."""
        values, self.values = dict(self.values), {}
        if missing := [tap for tap in self.taps if tap.name not in values]:
            raise RuntimeError(f"{missing[0].name}: module {missing[0].path} was not called in the forward.")
        return values

    def __enter__(self) -> "Taps":
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _hook(self, tap: Tap) -> Any:
        def record(value: Any) -> None:
            if self.recording and not recomputing():
                self.values[tap.name] = tap.of(value)

        def before(module: nn.Module, arguments: Any, keywords: Any) -> None:
            record(arguments or keywords)

        def after(module: nn.Module, arguments: Any, result: Any) -> None:
            record(result)

        if tap.before:
            return tap.module.register_forward_pre_hook(before, with_kwargs=True)
        return tap.module.register_forward_hook(after)


@contextmanager
def replaced(tap: Tap, value: Tensor, skipped: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Context manager: a forward of the model continues from another tensor at a tap.

    skipped: modules before it, each of which returns its first argument instead of being run.
    """

    def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if arguments:
            return (value, *arguments[1:]), keywords
        return arguments, {**keywords, next(name for name, v in keywords.items() if isinstance(v, Tensor)): value}

    def after(module: nn.Module, arguments: Any, result: Any) -> Any:
        return (value, *result[1:]) if isinstance(result, tuple) else value

    def unchanged(*arguments: Any, **keywords: Any) -> Any:
        return (arguments or tuple(keywords.values()))[0]

    if tap.before:
        handle: Any = tap.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = tap.module.register_forward_hook(after)
    own = [module.__dict__.get("forward") for module in skipped]
    try:
        for module in skipped:
            module.forward = unchanged
        yield
    finally:
        handle.remove()
        for module, forward in zip(skipped, own, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:  # as of activation checkpointing
                module.forward = forward


def resolve(model: nn.Module, names: Iterable[str], error: type[Exception] = TeacherError) -> list[Tap]:
    """The places in a network that names stand for.

    "20" or "state:20": the state that enters layer 20, counted from 0. "-1": what enters the final norm, that is, what
    the last layer returns; "-2": what enters the last layer, and so on. "module:NAME" or NAME: the output of a module
    (`dict(model.named_modules())`). NAME:at: the mean over channels of the squares of a module's map (attention
    transfer, Zagoruyko & Komodakis 2017).
    Raises `error` for a layer or a module that is not there.
    """
    layers = layers_of(model)
    modules = {name.replace("_checkpoint_wrapped_module.", ""): module for name, module in model.named_modules()}
    paths = {id(module): name for name, module in modules.items()}
    return [_resolve(str(name), model, layers, modules, paths, error) for name in names]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a network: the modules of the longest nn.ModuleList of a single class that is not inside another
    such list (as the experts of a layer are); none if there is no such list."""
    found: list[list[nn.Module]] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            layers = list(module)
            if len({type(layer) for layer in layers}) == 1:
                found.append(layers)
                inside.update(id(inner) for inner in module.modules())
    return max(found, key=len, default=[])


def layer_number(name: str, layers: int) -> int | None:
    """The number of the layer that a name stands for, from 0 to `layers` (the final norm); None if it is out of range.

    name: an integer; −1 is the final norm, −2 the last layer.
    """
    number = int(name)
    number = layers + 1 + number if number < 0 else number
    return number if 0 <= number <= layers else None


def is_layer(name: str) -> bool:
    """Whether a name stands for a layer by its number, not for a module."""
    return _NUMBER.fullmatch(name.removeprefix("state:")) is not None


def _resolve(
    name: str,
    model: nn.Module,
    layers: list[nn.Module],
    modules: Mapping[str, nn.Module],
    paths: Mapping[int, str],
    error: type[Exception],
) -> Tap:
    if is_layer(name):
        if not layers:
            raise error(
                f"{name}: {type(model).__name__} has no list of layers (an nn.ModuleList of one class) to number. Name "
                "a module instead, as in named_modules()."
            )
        if len({id(layer) for layer in layers}) < len(layers):
            raise error(
                f"{name}: {type(model).__name__} has a layer that is several of its {len(layers)}, so that states are "
                "not told apart by its modules. Leave it out."
            )
        number = layer_number(name.removeprefix("state:"), len(layers))
        if number is None:
            raise error(
                f"{name}: got a layer that {type(model).__name__} lacks; expected 0 to {len(layers) - 1}, or -1 for "
                "what enters the final norm."
            )
        final = number == len(layers)
        module = layers[-1] if final else layers[number]
        feature = "-1" if final else str(number)
        return Tap(name, feature, module, paths[id(module)], number, len(layers), before=not final)
    path = name.removeprefix("module:")
    feature = path
    if path not in modules:
        path = path.removesuffix(_AT)
    if path not in modules or not path:
        near = [p for p in modules if p and (p.endswith(f".{path}") or p.startswith(f"{path}."))]
        shown = (near or [p for p in modules if p])[:4]
        raise error(
            f"{name}: {type(model).__name__} has no module {path!r}; expected a layer's number or a name of "
            f"named_modules(), such as {', '.join(shown)}."
        )
    return Tap(name, feature, modules[path], path)


def recomputing() -> bool:
    """Whether a backward is running on this thread, in which an activation checkpoint calls modules again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
