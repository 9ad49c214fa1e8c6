"""Names of dtypes and devices, as users type them, turned into torch objects."""

import torch

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def resolve_device(name: str | None = None) -> torch.device:
    """Return the device called `name`; without a name, the GPU if there is one, else the CPU.

    Parameters
    ----------
    name : str, optional
        "cpu", "cuda" or "cuda:N".

    Raises
    ------
    ValueError
        For a name that is not accepted, and for a GPU that this machine does not have.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}; accepted: cpu, cuda, cuda:N")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"device {name!r} is not there: this machine has {gpus} CUDA devices; accepted: cpu, cuda:N")
    return device


def resolve_dtype(name: str | None, device: str | torch.device) -> torch.dtype:
    """Return the dtype called `name`; without a name, float16 on a GPU and float32 on the CPU.

    Parameters
    ----------
    name : str, optional
        "float16", "bfloat16" or "float32".
    device : str or torch.device
        Where the model will run.

    Raises
    ------
    ValueError
        For any other name.
    """
    if name is None:
        return torch.float16 if torch.device(device).type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; accepted: {', '.join(DTYPES)}")
    return DTYPES[name]


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError unless this is a dtype that holds weights."""
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={dtype!r} is not accepted; accepted: a torch.dtype, as in torch.float16")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype {dtype} cannot hold weights; accepted: {', '.join(DTYPES)}")
