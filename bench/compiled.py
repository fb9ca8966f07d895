"""The Triton kernels that a call launches, compiled for GPUs that need not be there.

A call on meta tensors runs the package's own Python code, which chooses sizes, warps and registers; its launches are
recorded instead of executed. So what is compiled is what a GPU would run, and nothing about it is repeated here.
"""

import contextlib
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastkd.bench.cases import GRID
from fastkd.errors import BenchError
from fastkd.kernels import SparseTargets, TopKConfig, kd_loss, linear_kd_loss, topk_targets

# One thread at a time compiles the same kernel; the others find it in triton's cache.
_compiling: defaultdict[str, Lock] = defaultdict(Lock)
ROWS = 8  # of the calls whose launches are recorded
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.bool: "i1",
}


def target(arch: int | str) -> Any:
    """The compiler's target: 90 for sm_90, "gfx942" for an AMD GPU."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)


@dataclass(frozen=True)
class Launch:
    """A recorded launch. values: the kernel's arguments by name. options: num_warps and the like. programs: how many
    run."""

    kernel: Any
    values: Mapping[str, Any]
    options: Mapping[str, Any]
    programs: int

    @property
    def name(self) -> str:
        """The kernel's name in the source."""
        return str(self.kernel.__name__)

    @property
    def programs_a_row(self) -> float:
        """How many run for a row of logits."""
        return self.programs / ROWS

    @property
    def bytes_a_row(self) -> list[float]:
        """Bytes of the tensors that it takes, the largest last; one that it reads and writes has two names."""
        return sorted(x.numel() * x.element_size() / ROWS for x in self.values.values() if isinstance(x, Tensor))

    def compile(self, arch: int | str) -> Any:
        """Triton's compiled kernel, from its cache if it is there. Raises KeyError for an option that this back end
        has not, as a launch does."""
        import triton
        from triton.compiler import ASTSource, make_backend

        signature, constants, divisible = {}, {}, {}
        for number, name in enumerate(self.kernel.arg_names):
            value = self.values[name]
            kind = "constexpr" if self.kernel.params[number].is_constexpr else _type_of(value)
            if kind == "constexpr":
                constants[(number,)] = value
            elif (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0 and kind != "fp32":
                divisible[(number,)] = [["tt.divisibility", 16]]  # a launch sees that, and so does the compiler
            signature[name] = kind
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=divisible)
        known = make_backend(target(arch)).parse_options({}).__dict__
        if unknown := sorted(set(self.options) - set(known)):
            raise KeyError(f"{self.name}: {', '.join(unknown)}: no option of the back end for {arch}")
        with _compiling[f"{source.hash()} {arch} {self.options}"]:
            return triton.compile(source, target=target(arch), options=dict(self.options))


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if value is None or (isinstance(value, int) and value == 1):  # what Triton makes a constant of
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


_TESTS: dict[str, Callable[[float, float], bool]] = {
    "oeq": lambda x, y: x == y,
    "une": lambda x, y: x != y,
    "olt": lambda x, y: x < y,
    "ole": lambda x, y: x <= y,
    "ogt": lambda x, y: x > y,
    "oge": lambda x, y: x >= y,
}


def at_temperature(launch: Launch, arch: int, built: Any, temperature: float) -> Any:
    """The loss's kernel compiled again with all comparisons of `T` with a constant decided.

    Special temperatures are branches taken at run time. Only the one that this temperature takes is left; the number
    itself stays unknown to the compiler. Raises BenchError if there is no such comparison.
    """
    import triton

    text = built.asm["ttir"]
    constants = {m[1]: float(m[2]) for m in re.finditer(r"(%\w+) = arith.constant (-?[\d.]+e[-+]\d+) : f32", text)}

    def decide(found: re.Match[str]) -> str:
        result, test, constant = found.groups()
        if test not in _TESTS or constant not in constants:
            return found[0]
        return f"{result} = arith.constant {str(_TESTS[test](temperature, constants[constant])).lower()}"

    decided = re.sub(r"(%\w+) = arith\.cmpf (\w+), %T(?:_\d+)?, (%\w+) : f32", decide, text)
    if decided == text:
        raise BenchError(
            f"{launch.name}: its TTIR has no comparison of a scalar named T with a number. (With "
            "TRITON_DISABLE_LINE_INFO=1 it has no names.)"
        )
    with tempfile.TemporaryDirectory() as folder, _compiling[f"{decided} {arch} {launch.options}"]:
        path = Path(folder) / f"{launch.name}.ttir"
        path.write_text(decided)
        return triton.compile(str(path), target=target(arch), options=dict(launch.options))


class _Enough(Exception):
    pass


def recorded(run: Callable[[], Any], arch: int | str, *, last: str = "") -> list[Launch]:
    """The launches of a call on meta tensors, as on this GPU. last: the kernel to stop behind."""
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def keep(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False))
        values |= {name: value for name, value in named.items() if name in kernel.arg_names}
        values = {name: getattr(value, "value", value) for name, value in values.items()}
        options = {name: value for name, value in named.items() if name not in kernel.arg_names}
        grid = grid(values) if callable(grid) else grid
        found.append(Launch(kernel, values, options, int(torch.Size(grid).numel())))
        if kernel.__name__ == last:
            raise _Enough

    with _pretended(arch), mock.patch.object(JITFunction, "run", keep), contextlib.suppress(_Enough):
        run()
    return found


def _address(tensor: Tensor) -> int:
    """An address for a tensor that has none: another one for each storage, and aligned as an allocation is."""
    return tensor.untyped_storage()._cdata * 512 + tensor.storage_offset() * tensor.element_size()


@contextlib.contextmanager
def _pretended(arch: int | str) -> Iterator[None]:
    """The launches of `fastkd.kernels` take meta tensors for tensors on this GPU."""
    import triton

    from fastkd.kernels.loss import ops
    from fastkd.kernels.loss import triton_impl as loss
    from fastkd.kernels.topk import triton_impl as topk

    if loss.INTERPRETED:
        raise BenchError("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled.")
    driver = mock.Mock(get_current_target=lambda: target(arch), get_current_device=lambda: 0)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (loss, "INTERPRETED", True),
            (topk, "INTERPRETED", True),
            # the operators would run what they have for meta tensors, which launches nothing
            (torch.ops.fastkd, "kd_loss", ops._kd_loss),
            (torch.ops.fastkd, "kd_loss_", ops._kd_loss_inplace),
            (torch.ops.fastkd, "linear_kd_loss", ops._linear),
            (torch.Tensor, "data_ptr", _address),
            (triton.runtime.driver, "_active", driver),
            (torch.version, "hip", None if isinstance(arch, int) else "6.0"),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def meta(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad)


def loss_launch(
    vocab: int,
    dtype: torch.dtype,
    arch: int | str,
    *,
    divergence: str = "forward_kl",
    treatment: str = "bucket",
    softcap: float | None = None,
    entries: int = 64,
    train: bool = True,
) -> Launch:
    """The launch of the loss's kernel, in place. With a softcap: of the loss fused with the LM head, which alone has
    one. sampled: 16 of the entries are draws."""
    draws = 16 if treatment == "sampled" else 0
    targets = SparseTargets(
        ids=meta(ROWS, entries, dtype=torch.int32),
        logprobs=meta(ROWS, entries),
        draws=meta(ROWS, entries, dtype=torch.int32) if draws else None,
        tail=meta(ROWS, len(GRID)),
        outcomes=meta(ROWS, dtype=torch.int32),
        vocab_size=vocab,
        temperatures=GRID,
    )
    labels = meta(ROWS, dtype=torch.int64)
    settings: Any = {"divergence": divergence, "treatment": treatment, "temperature": 2.0, "impl": "triton"}

    def run() -> None:
        if softcap is None:
            logits = meta(ROWS, vocab, dtype=dtype, requires_grad=train)
            kd_loss(logits, targets, labels, inplace=True, **settings)
        else:
            hidden, weight = (meta(n, 64, dtype=dtype, requires_grad=train) for n in (ROWS, vocab))
            linear_kd_loss(hidden, weight, targets, labels, softcap=softcap, **settings)

    return recorded(run, arch, last="loss_kernel")[-1]


def topk_launches(
    vocab: int, dtype: torch.dtype, arch: int | str, *, softcap: float | None = None, config: TopKConfig
) -> list[Launch]:
    """The launches of `topk_targets`."""
    return recorded(
        lambda: topk_targets(meta(ROWS, vocab, dtype=dtype), config=config, softcap=softcap, impl="triton"), arch
    )
