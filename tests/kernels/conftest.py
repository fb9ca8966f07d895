"""Triton's interpreter without the work that it repeats: kernels compute the same, in half the time."""

import inspect
import os
from functools import cache
from typing import Any


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


if os.environ.get("TRITON_INTERPRET") == "1":
    try:
        from triton.runtime import interpreter
    except ImportError:
        pass
    else:
        needed = ("_LangPatchScope", "_patch_lang", "_patch_attr", "_patch_builtin", "_get_np_dtype")
        if all(hasattr(interpreter, name) for name in needed):  # not in older versions
            _patch_once(interpreter)
