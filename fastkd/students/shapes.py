"""Which shapes of a student are worth trying for a budget. Pure: of sizes alone.

Layers are removed whole; the widths that a shape may have less of are the MLP's, key-value heads (with their query
heads), and hidden channels, each reduced no further than the budget demands. Widths are multiples of 32 where that
leaves enough of them, so that kernels, and groups of int4, fit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import lcm

from ..models.axes import AXES, ModelAxes, Shape

WIDTHS = (("mlp",), ("groups", "mlp"), ("hidden", "groups", "mlp"))
"""What may be reduced together, by about the same share."""
_COUPLED = (("mlp",), ("hidden", "mlp"))
_DEPTHS = (0.0, 1 / 3, 2 / 3, 1.0)  # of the layers that are removed if nothing else is
_STEPS = 4  # sizes at least between nothing and everything


@dataclass(frozen=True)
class Grid:
    """The values that each size of a shape may have, ascending; the last is the teacher's."""

    layers: Sequence[int]
    hidden: Sequence[int]
    groups: Sequence[int]
    mlp: Sequence[int]

    @property
    def smallest(self) -> Shape:
        return Shape(self.layers[0], self.hidden[0], self.groups[0], self.mlp[0])


def grid_of(axes: ModelAxes, group: int | None = None) -> Grid:
    """The values that the sizes of copies may have. group: inputs that share a scale, if weights are to be quantised
    in groups: all widths are then multiples of it, as the teacher's are."""
    whole = axes.shape
    heads = whole.groups * axes.query_heads
    # a width that the largest number of heads divides, for families whose configs demand it
    anything = axes.allows(replace(whole, hidden=whole.hidden - 1))
    hidden = multiples(whole.hidden, 1 if anything else heads, group)
    if axes.coupled:
        hidden = [n * axes.head_width for n in range(1, whole.groups + 1)]
    block = axes.head_width * axes.query_heads
    groups = [n for n in range(1, whole.groups + 1) if group is None or n * block % group == 0]
    return Grid(range(1, whole.layers + 1), hidden, groups, multiples(whole.mlp, 1, group))


def multiples(size: int, of: int = 1, group: int | None = None) -> list[int]:
    """Multiples of 32 and of `of` up to a size, and the size; of 16, 8, 4, ... if 32 allows too few. group: they have
    to be multiples of it."""
    step = 32
    while step > 1 and lcm(step, of, group or 1) * _STEPS > size:
        step //= 2
    step = lcm(step, of, group or 1)
    return sorted({*range(step, size, step), size})


def candidates(axes: ModelAxes, grid: Grid, fits: Callable[[Shape], bool]) -> list[Shape]:
    """Shapes that fit: with some numbers of layers, from all to as few as fit alone, the largest of each of `WIDTHS`.

    There is one whenever the smallest shape of the grid fits.
    """
    whole = axes.shape
    fewest = next((n for n in reversed(grid.layers) if fits(replace(whole, layers=n))), 1)
    found: list[Shape | None] = []
    for share in _DEPTHS:
        shape = replace(whole, layers=whole.layers - round(share * (whole.layers - fewest)))
        widths = _COUPLED if axes.coupled else WIDTHS
        found += [shape] if fits(shape) else [narrowed(axes, grid, shape, names, fits) for names in widths]
    return list(dict.fromkeys(shape for shape in found if shape is not None))


def narrowed(
    axes: ModelAxes, grid: Grid, shape: Shape, names: Sequence[str], fits: Callable[[Shape], bool]
) -> Shape | None:
    """The largest shape that fits if only these sizes are reduced, by about the same share of each; None if none does.
    What is left of the budget goes to the last of them."""

    def made(**sizes: int) -> Shape:
        one = replace(shape, **sizes)
        return replace(one, groups=one.hidden // axes.head_width) if axes.coupled else one

    values: dict[str, Sequence[int]] = {name: getattr(grid, name) for name in names}
    shares = {n / values[name][-1] for name in names for n in values[name] if n <= getattr(shape, name)}
    for share in sorted(shares, reverse=True):
        sizes = {name: at_most(values[name], share * values[name][-1]) for name in names}
        if fits(one := made(**sizes)) and axes.allows(one):
            last = names[-1]
            more = (made(**sizes | {last: n}) for n in values[last] if sizes[last] < n <= getattr(shape, last))
            return max((w for w in more if fits(w) and axes.allows(w)), key=lambda w: getattr(w, last), default=one)
    return None


def scaled(axes: ModelAxes, grid: Grid, fits: Callable[[Shape], bool]) -> Shape | None:
    """The largest shape that fits with about the same share of all of the teacher's sizes: for new weights."""
    return narrowed(
        axes, grid, axes.shape, tuple(name for name in AXES if not (axes.coupled and name == "groups")), fits
    )


def at_most(values: Sequence[int], limit: float) -> int:
    """The largest value up to a limit, or else the smallest."""
    return max((n for n in values if n <= limit + 1e-9), default=values[0])
