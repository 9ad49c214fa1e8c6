"""Two faults of Triton's interpreter, mended for the tests: kernels that compile must be interpreted too.

With numpy 2.4 an interpreted loop takes no bound that was computed in the kernel, since numpy turns no one-element
array into an int any more. Triton 3.9 splats the outcome of a comparison of two scalars as int32 and then refuses it as
a mask.
"""

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


def _with_mask_of_bools(method, place: int):
    def masked(self, *args, **kwargs):
        mask = args[place]
        if mask.data.dtype != np.bool_:
            mask.data = mask.data != 0
        return method(self, *args, **kwargs)

    return masked
