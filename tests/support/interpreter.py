"""Triton's interpreter for the tests: two faults mended, and what it does in vain left out.

With numpy 2.4 an interpreted loop takes no bound that was computed in the kernel, since numpy turns no one-element
array into an int any more. Triton 3.9 splats the outcome of a comparison of two scalars as int32 and then refuses it as
a mask.

What is left out changes no result: replacing the functions of `triton.language` again at each call of a device
function, building the table of dtypes at each look-up and the same block type at each operation, and the check of
integer overflow, whose outcome is thrown away without ``debug``.
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
    _share_block_types()
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


def _share_block_types() -> None:
    """One object for all block types of equal element types and of one shape of integers."""
    from triton.language import core

    made: dict[tuple, core.block_type] = {}
    init = core.block_type.__init__

    def new(cls, element_ty, shape):
        sizes = tuple(getattr(size, "value", size) for size in shape)
        if not all(type(size) is int for size in sizes):
            return object.__new__(cls)
        key = (element_ty.name, getattr(element_ty, "address_space", None), sizes)
        if key not in made:
            made[key] = object.__new__(cls)
        return made[key]

    def init_once(self, element_ty, shape):
        if not hasattr(self, "numel"):
            init(self, element_ty, shape)

    core.block_type.__new__, core.block_type.__init__ = new, init_once
