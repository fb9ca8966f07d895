"""Triton's interpreter without the work that it repeats, in half the time; and its compiler without a GPU."""

import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest


def _patch_once(interpreter: Any) -> None:
    """Patch `triton.language` once per launch.

    The interpreter replaces the compiler's functions at every launch and at every call of a device function within
    it, and looks through all names for that each time. The replacements of the launch are enough.
    """
    language, patch_language, scope_type = interpreter.tl, interpreter._patch_lang, interpreter._LangPatchScope
    numpy_type, numpy_types = interpreter._get_np_dtype, {}
    patched: set[Any] = set()  # modules that the running launch has patched

    class Scope(scope_type):
        def restore(self) -> None:
            patched.clear()
            super().restore()

    @cache
    def modules_of(function: Any) -> frozenset[Any]:
        return frozenset(m for m in function.__globals__.values() if m is language or m is language.core)

    def patch_language_once(function: Any) -> Any:
        modules = modules_of(function)
        if modules and modules <= patched:
            return None  # the call of a device function: nobody reads what this returns
        scope = patch_language(function)
        patched.update(modules)
        return scope

    @cache
    def builtin_names(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if language.core.is_builtin(member)]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in builtin_names(package):
            member = getattr(package, name)
            if language.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    def numpy_type_once(triton_type: Any) -> Any:
        name = triton_type.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(triton_type)
        return numpy_types[name]

    interpreter._LangPatchScope = Scope
    interpreter._patch_lang = patch_language_once
    interpreter._patch_builtin = patch_builtin
    interpreter._get_np_dtype = numpy_type_once


def _make_types_once(interpreter: Any) -> None:
    """Keep what the interpreter makes anew at every operation: the type and shape of a tensor, and constants.

    Neither is ever changed. Operands that have the wanted type are not looked at again.
    """
    core, semantic = interpreter.tl.core, interpreter.interpreter_semantic
    kind, block_type = type(semantic), core.block_type
    make_block, constant, broadcast, cast = (
        block_type.__init__, kind.scalar_constant, kind.broadcast_impl_value, kind.cast,
    )  # fmt: skip
    shapes: dict[Any, Any] = {}
    blocks: dict[Any, Any] = {}
    constants: dict[Any, Any] = {}

    def make_tensor(self: Any, handle: Any, of: Any) -> None:
        self.handle, self.type, self.dtype = handle, of, of.scalar
        shape = tuple(of.shape) if of.is_block() else ()
        if shape not in shapes:
            shapes[shape] = core.constexpr(math.prod(shape)), core.tuple([core.constexpr(size) for size in shape])
        self.numel, self.shape = shapes[shape]

    def block_once(cls: Any, element: Any, shape: Any) -> Any:
        key = (str(element), *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            blocks[key] = object.__new__(cls)
            make_block(blocks[key], element, shape)
        return blocks[key]

    def constant_once(self: Any, value: Any, dtype: Any) -> Any:
        key = (repr(value), type(value), getattr(dtype, "name", None))  # repr: −0.0 is not 0.0, and NaN is NaN
        if key not in constants:
            constants[key] = constant(self, value, dtype)
        return constants[key]

    def patch_attribute(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member) if core.is_builtin(member) else member

        def call(*args: Any, **options: Any) -> Any:
            return function(*args, **options | {"_semantic": semantic})

        scope.set_attr(owner, name, call)

    core.tensor.__init__ = make_tensor
    block_type.__new__, block_type.__init__ = block_once, lambda self, element, shape: None
    kind.scalar_constant, interpreter._patch_attr = constant_once, patch_attribute
    kind.broadcast_impl_value = lambda self, x, y: (x, y) if x.type is y.type else broadcast(self, x, y)
    kind.cast = lambda self, x, to, *rest, **options: x if x.type.scalar is to else cast(self, x, to, *rest, **options)


def _round_fma_once(interpreter: Any) -> None:
    """x y + z rounded once, as the hardware does it; the interpreter rounds the product too."""

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype("float64") * y.data.astype("float64") + z.data.astype("float64")
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


if os.environ.get("TRITON_INTERPRET") == "1":
    try:
        from triton.runtime import interpreter
    except ImportError:
        pass
    else:
        needed = ("_LangPatchScope", "_patch_lang", "_patch_attr", "_patch_builtin", "_get_np_dtype")
        if all(hasattr(interpreter, name) for name in needed):  # not in older versions
            _make_types_once(interpreter)
            _patch_once(interpreter)
        _round_fma_once(interpreter)


@pytest.fixture
def compiled_kernels(pytestconfig: pytest.Config, tmp_path: Path) -> Callable[[str], str]:
    """Run code that compiles kernels in a process that does not interpret them; return what it prints.

    Triton keeps what it compiled under a hash of the source, the options and its own version. It is kept in pytest's
    cache: a kernel that has not changed since the last run is not compiled again.
    """
    kept = getattr(pytestconfig, "cache", None)
    folder = tmp_path if kept is None else kept.mkdir("triton")

    def run(code: str) -> str:
        # what is compiled is not debugged: without the numbers of lines
        changes = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder), "TRITON_DISABLE_LINE_INFO": "1"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=540, env=os.environ | changes)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
