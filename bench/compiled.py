"""The Triton kernels that a call launches, compiled for GPUs that need not be there.

A call on meta tensors runs the package's own Python code, which chooses sizes, warps and registers; its launches are
recorded instead of executed. So what is compiled is what a GPU would run, and nothing about it is repeated here.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.bool: "i1",
}


def target(arch: int | str) -> GPUTarget:
    """The compiler's target: 90 for sm_90, "gfx942" for an AMD GPU."""
    return GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)


@dataclass(frozen=True)
class Launch:
    """A recorded launch. values: of the kernel's arguments by name. options: num_warps and the like. programs: how many
    run."""

    kernel: Any
    values: Mapping[str, Any]
    options: Mapping[str, Any]
    programs: int

    @property
    def name(self) -> str:
        """The kernel's name in the source."""
        return str(self.kernel.__name__)

    @cached_property
    def source(self) -> ASTSource:
        """What the compiler takes: types, constants, and which arguments are divisible by 16, as a launch sees them."""
        signature, constants, divisible = {}, {}, {}
        for number, name in enumerate(self.kernel.arg_names):
            value = self.values[name]
            kind = "constexpr" if self.kernel.params[number].is_constexpr else _type_of(value)
            if kind == "constexpr":
                constants[(number,)] = value
            elif (isinstance(value, Tensor) and value.data_ptr() % 16 == 0) or (
                isinstance(value, int) and value % 16 == 0
            ):
                divisible[(number,)] = [["tt.divisibility", 16]]
            signature[name] = kind
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=divisible)

    def compile(self, arch: int | str) -> Any:
        """Triton's compiled kernel, from its cache if it is there."""
        return triton.compile(self.source, target=target(arch), options=dict(self.options))


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if value is None or (isinstance(value, int) and value == 1):  # what Triton makes a constant of
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def at_temperature(built: Any, temperature: float, launch: Launch, arch: int | str, name: str = "T") -> Any:
    """The kernel compiled again with every comparison of its number `name` with a constant decided.

    Temperatures are branches taken at run time. Of this kernel, only the one that `temperature` takes is left; the
    number itself stays unknown to the compiler. Raises LookupError if the kernel has no such comparison.
    """
    text = built.asm["ttir"]
    constants = {
        found[1]: float(found[2]) for found in re.finditer(r"(%\w+) = arith.constant (-?[\d.]+e[-+]\d+) : f32", text)
    }
    tests: dict[str, Callable[[float, float], bool]] = {
        "oeq": lambda x, y: x == y,
        "une": lambda x, y: x != y,
        "olt": lambda x, y: x < y,
        "ole": lambda x, y: x <= y,
        "ogt": lambda x, y: x > y,
        "oge": lambda x, y: x >= y,
    }

    def decide(found: re.Match[str]) -> str:
        result, test, constant = found[1], found[2], found[3]
        if test not in tests or constant not in constants:
            return found[0]
        return f"{result} = arith.constant {str(tests[test](temperature, constants[constant])).lower()}"

    pattern = rf"(%\w+) = arith\.cmpf (\w+), %{name}(?:_\d+)?, (%\w+) : f32"
    decided = re.sub(pattern, decide, text)
    if decided == text:
        raise LookupError(f"{launch.name}: no comparison of {name} with a number in its TTIR")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{launch.name}.ttir"
        path.write_text(decided)
        return triton.compile(str(path), target=target(arch), options=dict(launch.options))


class _Enough(Exception):
    pass


def recorded(run: Callable[[], Any], arch: int | str, *, last: str = "") -> list[Launch]:
    """The launches of a call on meta tensors, as for this GPU. last: the kernel to stop behind."""
    found: list[Launch] = []

    def keep(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False))
        values |= {name: value for name, value in named.items() if name in kernel.arg_names}
        options = {name: value for name, value in named.items() if name not in kernel.arg_names}
        values = {name: getattr(value, "value", value) for name, value in values.items()}
        grid = grid(values) if callable(grid) else grid
        found.append(Launch(kernel, values, options, int(torch.Size(grid).numel())))
        if kernel.__name__ == last:
            raise _Enough

    with _pretended(arch), mock.patch.object(JITFunction, "run", keep), contextlib.suppress(_Enough):
        run()
    return found


def _address(tensor: Tensor) -> int:
    """An address for a tensor without one: of its own for every storage, and aligned as an allocation is."""
    return tensor.untyped_storage()._cdata * 512 + tensor.storage_offset() * tensor.element_size()


@contextlib.contextmanager
def _pretended(arch: int | str) -> Iterator[None]:
    """Meta tensors are taken for tensors of this GPU by the launches of `fastkd.kernels`."""
    from fastkd.kernels.loss import ops
    from fastkd.kernels.loss import triton_impl as loss
    from fastkd.kernels.topk import triton_impl as topk

    driver = mock.Mock(get_current_target=lambda: target(arch), get_current_device=lambda: 0)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (loss, "INTERPRETED", True),
            (topk, "INTERPRETED", True),
            # the operators would run their fake implementations, which launch nothing
            (torch.ops.fastkd, "kd_loss", ops._kd_loss),
            (torch.ops.fastkd, "kd_loss_", ops._kd_loss_inplace),
            (torch.ops.fastkd, "linear_kd_loss", ops._linear),
            (torch.Tensor, "data_ptr", _address),
            (triton.runtime.driver, "_active", driver),
            (torch.version, "hip", None if isinstance(arch, int) else "6.0"),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
