"""Triton's interpreter for the tests: two faults mended, and what it does in vain left out.

With numpy 2.4 an interpreted loop takes no bound that was computed in the kernel, since numpy turns no one-element
array into an int any more. Triton 3.9 splats the outcome of a comparison of two scalars as int32 and then refuses it as
a mask.

What is left out changes no result: replacing the functions of `triton.language` again at each call of a device
function, building the table of dtypes at each look-up, and the check of integer overflow, whose outcome is thrown away
without ``debug``.
"""

import dataclasses

import numpy as np


def mend_interpreter() -> None:
    """Mend the interpreter of this process; call it once, before a kernel runs."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
    builder = interpreter.InterpreterBuilder
    for name, place in {"create_masked_load": 1, "create_masked_store": 2}.items():
        setattr(builder, name, _with_mask_of_bools(getattr(builder, name), place))
    _patch_once_a_launch(interpreter)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _with_mask_of_bools(method, place: int):
    def masked(self, *args, **kwargs):
        mask = args[place]
        if mask.data.dtype != np.bool_:
            mask.data = mask.data != 0
        return method(self, *args, **kwargs)

    return masked


def _patch_once_a_launch(interpreter) -> None:
    """A device function finds `triton.language` as the kernel that calls it, or one of the same module, has left it."""
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: dict[int, object] = {}  # the names of a module -> its scope, while a kernel runs

    def patch(fn):
        names = id(fn.__globals__)
        if names not in patched:
            patched[names] = patch_lang(fn)
        return patched[names]

    def launched(self, *args, **kwargs):
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang = patch
    interpreter.GridExecutor.__call__ = launched


def _remembered(get_np_dtype):
    found: dict[str, np.dtype] = {}

    def remembered(dtype):
        name = dtype.scalar.name
        if name not in found:
            found[name] = get_np_dtype(dtype)
        return found[name]

    return remembered
