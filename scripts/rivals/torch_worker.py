"""What the two rivals on torch share: the model of a job, the loss of its predictions, its memory."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from worker import process_peak


def load(job: dict[str, Any]) -> Any:
    """The job's model in eval mode, from the folder of its weights."""
    torch.manual_seed(job["seed"])
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    options = {"dtype": getattr(torch, job["dtype"]), "attn_implementation": "sdpa"}
    return AutoModelForCausalLM.from_pretrained(job["folder"], **options).to(job["device"]).eval()


def ids_of(job: dict[str, Any]) -> torch.Tensor:
    """Token ids (1, tokens) on the job's device."""
    return torch.tensor([job["ids"]], device=job["device"])


def mean_nll(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean loss, in nats, with which logits (1, tokens, vocab) predict the ids (1, tokens) after their own."""
    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item()


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def memory(device: str) -> dict[str, Any]:
    """Peak memory and what was counted."""
    if device.startswith("cuda"):
        return {"peak_memory_mb": torch.cuda.max_memory_allocated() / 2**20, "peak_memory_kind": "cuda_allocated"}
    return process_peak()
