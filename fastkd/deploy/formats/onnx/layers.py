"""A decoder whose layers are alike, exported from its first three: tracing and translating takes most of the time of an
export, and gives the same nodes for each layer.

The nodes of the third layer are compared with those of the second: the same operations, of which each reads what its
counterpart reads, or the like of its own layer, or of the layer before. The other layers are then copies of the third,
with their own parameters, keys and values.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

TRACED = 3
_SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: the modules that it is in, as text


class LayersDiffer(Exception):
    """The traced layers have different nodes."""


class Layers(NamedTuple):
    """The layers of a decoder, and their place: an attribute of owner, whose name in the model is name."""

    owner: nn.Module
    attribute: str
    name: str
    modules: nn.ModuleList


def alike_layers(model: nn.Module, count: int) -> Layers | None:
    """The one list of count modules that differ in the values of their parameters and in their index alone. None if
    there is none, if they share parameters, or if they are so few that nothing would be gained."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if count <= TRACED or len(lists) != 1 or _said_to_differ(getattr(model, "config", None), count):
        return None
    name, modules = lists[0]
    if _share(modules) or not all(_alike(modules[0], other) for other in modules[1:]):
        return None
    owner, _, attribute = name.rpartition(".")
    return Layers(model.get_submodule(owner), attribute, name, modules)


@contextmanager
def first_layers(layers: Layers) -> Iterator[None]:
    """Within it, the model has its first `TRACED` layers alone."""
    setattr(layers.owner, layers.attribute, layers.modules[:TRACED])
    try:
        yield
    finally:
        setattr(layers.owner, layers.attribute, layers.modules)


def repeat_layers(graph: Any, layers: Layers, prefix: str) -> None:
    """Add the layers that were not traced to an `onnx_ir.Graph` (in place), with their inputs past_key_values.N.* and
    outputs present.N.*. prefix: what the names of parameters in the graph begin with. Raises LayersDiffer, with nothing
    changed, if the nodes of the traced layers are not alike."""
    copies = _Copies(graph, f"{prefix}{layers.name}.")
    for index in range(TRACED, len(layers.modules)):
        module = layers.modules[index]
        copies.add(index, dict([*module.named_parameters(), *module.named_buffers()]))
    copies.end()


class _Copies:
    """at: what the names of a layer's parameters and modules begin with, before its index."""

    def __init__(self, graph: Any, at: str) -> None:
        self._graph = graph
        self._named = re.compile(f"({re.escape(at)}|past_key_values\\.|present\\.)(\\d+)(\\..*)", re.DOTALL)
        self._layer_of = self._layers_of(re.compile(re.escape(at) + r"(\d+)'"))
        second, self._nodes = ([n for n in graph if self._layer_of.get(n) == index] for index in (1, 2))
        pairs = list(zip(second, self._nodes, strict=False))
        self._third = {a: b for old, new in pairs for a, b in zip(old.outputs, new.outputs, strict=False)}
        if len(second) != len(self._nodes) or not all(self._alike(old, new) for old, new in pairs):
            raise LayersDiffer
        if any(self._read_outside(node) for node, layer in self._layer_of.items() if layer + 1 < TRACED):
            raise LayersDiffer
        self._latest = {value: value for node in self._nodes for value in node.outputs}
        self._after = self._nodes[-1]
        self._copied: set[Any] = set()

    def _layers_of(self, scope: re.Pattern[str]) -> dict[Any, int]:
        """The layer of each node that is in one, or makes of its keys or values what it alone reads."""
        found = {n: int(m[1]) for n in self._graph if (m := scope.search(n.metadata_props.get(_SCOPES, "")))}
        for node in self._graph:
            read = {self._split(value) for value in node.inputs} - {None}
            layers = {found.get(user) for value in node.outputs for user, _ in value.uses()}
            layers |= {one[1] for one in read if one}
            layer = layers.pop() if len(read) == len(layers) == 1 else None
            if node not in found and layer is not None:
                found[node] = layer
        return found

    def _split(self, value: Any) -> tuple[str, int, str] | None:
        """The name of a layer's parameter, keys, or values, before its index, that, and after it."""
        match = None if value is None else self._named.fullmatch(value.name)
        return match and (match[1], int(match[2]), match[3])

    def _read_outside(self, node: Any) -> bool:
        """Whether what a node gives is read outside of the layers, as where a model returns the mean of all states."""
        return any(user not in self._layer_of for value in node.outputs for user, _ in value.uses())

    def _alike(self, old: Any, new: Any) -> bool:
        """Whether a node of the third layer is one of the second's, a layer later."""
        return (
            (old.op_type, old.domain, len(old.inputs), len(old.outputs))
            == (new.op_type, new.domain, len(new.inputs), len(new.outputs))
            and _attributes(old) == _attributes(new)
            and all(self._follows(*both) for both in zip(old.inputs, new.inputs, strict=True))
        )

    def _follows(self, old: Any, new: Any) -> bool:
        if old in self._third:  # of the second layer itself
            return new is self._third[old]
        if new in self._third:  # of the layer before
            return self._layer_of.get(old.producer()) == 0
        if (name := self._split(old)) is not None and name[1] == 1:
            return self._split(new) == (name[0], 2, name[2])
        return old is new

    def add(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        import onnx_ir as ir

        made: dict[Any, Any] = {}
        for node in self._nodes:
            inputs = [made[v] if v in made else self._input(v, index, tensors) for v in node.inputs]
            outputs = [ir.Value(name=self._name(v, index), shape=v.shape, type=v.type) for v in node.outputs]
            copy = ir.Node(
                node.domain, node.op_type, inputs, node.attributes.values(), overload=node.overload, outputs=outputs,
                version=node.version, name=f"{node.name}.{index}",
            )  # fmt: skip
            self._graph.insert_after(self._after, copy)
            self._after = copy
            self._copied.add(copy)
            made |= dict(zip(node.outputs, outputs, strict=True))
        ends = [value for value in self._graph.outputs if (name := self._split(value)) and name[1] == 2]
        self._graph.outputs.extend(made[value] for value in ends)
        self._latest = made

    def _name(self, value: Any, index: int) -> str:
        name = self._split(value)
        return f"{value.name}.{index}" if name is None else f"{name[0]}{index}{name[2]}"

    def _input(self, value: Any, index: int, tensors: Mapping[str, Tensor]) -> Any:
        """What a copy reads in the place of a value that is not the third layer's own."""
        import onnx_ir as ir

        if value in self._third:
            return self._latest[self._third[value]]
        if value is None or (name := self._split(value)) is None or name[1] != 2:
            return value
        known = self._graph.initializers.get(new := self._name(value, index))
        if known is None:
            known = next((given for given in self._graph.inputs if given.name == new), None)
        if known is None:
            known = ir.Value(name=new, shape=value.shape, type=value.type)
            if value.is_graph_input():
                self._graph.inputs.append(known)
            else:
                known.const_value = ir.tensor_adapters.TorchTensor(tensors[name[2][1:]], name=new)
                self._graph.register_initializer(known)
        return known

    def end(self) -> None:
        """What reads the third layer's values, and is in no layer, reads the last one's."""
        for value in [value for node in self._nodes for value in node.outputs]:
            for user, position in list(value.uses()):
                if user not in self._layer_of and user not in self._copied:
                    user.replace_input_with(position, self._latest[value])


def _said_to_differ(config: Any, count: int) -> bool:
    """Whether a configuration has a value for each layer, and not the same for all, as `layer_types`: the model, and
    not the layers, may act by it."""
    values = vars(config).values() if hasattr(config, "__dict__") else ()
    lists = [value for value in values if isinstance(value, (list, tuple)) and len(value) == count]
    return any(one != value[0] for value in lists for one in value)


def _share(modules: nn.ModuleList) -> bool:
    """Whether two of the layers are one, or have a parameter in common: what is traced then depends on which."""
    found = [{id(parameter) for parameter in module.parameters()} for module in modules]
    return len(set().union(*found)) < sum(map(len, found))


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules differ in the values of their parameters and in layer_idx alone."""
    ones, others = dict(one.named_modules()), dict(other.named_modules())
    return ones.keys() == others.keys() and all(_same(module, others[name]) for name, module in ones.items())


def _same(one: nn.Module, other: nn.Module) -> bool:
    if type(one) is not type(other):
        return False
    inner = {"_parameters", "_buffers", "_modules", "layer_idx"}
    mine, its = ({k: v for k, v in vars(module).items() if k not in inner} for module in (one, other))
    shapes, its_shapes = (
        {name: None if p is None else (p.shape, p.dtype) for name, p in module._parameters.items()}
        for module in (one, other)
    )
    buffers = zip(one._buffers.items(), other._buffers.items(), strict=False)
    return (
        mine.keys() == its.keys()
        and all(value is its[name] or _equal(value, its[name]) for name, value in mine.items())
        and shapes == its_shapes
        and len(one._buffers) == len(other._buffers)
        and all(a == b and (x is y or _equal(x, y)) for (a, x), (b, y) in buffers)
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)
    if isinstance(one, partial) and isinstance(other, partial):
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    plain = (bool, int, float, str, tuple, list, dict, set, type(None))
    try:
        return type(one) is type(other) and isinstance(one, plain) and bool(one == other)
    except (RuntimeError, ValueError):  # tensors or arrays in a list are not compared
        return False


def _attributes(node: Any) -> dict[str, Any]:
    """The values of a node's attributes, comparable."""
    return {
        name: (a.type, a.value.tobytes(), tuple(a.value.shape)) if hasattr(a.value, "tobytes") else (a.type, a.value)
        for name, a in node.attributes.items()
    }
