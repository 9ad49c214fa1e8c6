"""The decode step through the kernels of `ops`: three a GPT-NeoX layer, five a Llama-like one.

On a CPU the same calls run the kernels' twins. What a policy needs beyond logits happens on the device too, in plain
PyTorch functions that only such policies pay for; nothing asks the host, so that a whole step fits into a CUDA graph.
"""

import torch

from sinkstream.cache import ModelSpec
from sinkstream.engine import plain
from sinkstream.engine.geometry import Geometry
from sinkstream.engine.packing import NEOX, LlamaLayer, NeoxLayer, Norm, PackedWeights
from sinkstream.engine.state import StreamState
from sinkstream.kernels import (
    Prefetch,
    Workspace,
    attention_beside,
    attention_decode,
    begin_step,
    linear_residual,
    norm_linear,
)
from sinkstream.kernels.attention_decode import split_qkv
from sinkstream.kernels.config import MAX_SHARED, MAX_SPLITS, count_programs, default_attention
from sinkstream.kernels.likeliest import Tiles
from sinkstream.kernels.plans import LLAMA_OPS, NEOX_OPS, OpPlan, Sizes, StepPlan, measured_plan
from sinkstream.kernels.runtime import HALF_DTYPES, has_dependent_launch, multiprocessors, shared_bytes, triton
from sinkstream.policies import EvictionPolicy

MAX_GROUP = 16  # query heads of one key-value head


def default_plan(weights: PackedWeights, state: StreamState) -> dict[str, OpPlan]:
    """The measured plan on a GPU with programmatic dependent launch, and elsewhere what the ops do by themselves."""
    neox, device, spec = weights.family == NEOX, state.device, state.spec
    if not has_dependent_launch(device):
        return {op: OpPlan() for op in (*(NEOX_OPS if neox else LLAMA_OPS), "head")}
    g, config = state.geometry, spec.decoder.config
    sizes = Sizes(
        config.hidden_size, config.intermediate_size, spec.query_heads, spec.kv_heads, spec.head_dim, g.ring,
        g.pinned_slots, shared_bytes(device), multiprocessors(device),
    )  # fmt: skip
    return measured_plan(neox, sizes)


class FusedDecode:
    """One decode step of all streams, with every buffer allocated once.

    Parameters
    ----------
    weights : PackedWeights
    state : StreamState
    plan : mapping of OpPlan, optional
        By op name (`NEOX_OPS` or `LLAMA_OPS`, and "head"); default: `default_plan`.
    """

    def __init__(self, weights: PackedWeights, state: StreamState, plan: StepPlan | None = None):
        self.weights, self.state, self.spec = weights, state, state.spec
        self.plan = default_plan(weights, state) if plan is None else plan
        self.neox, self.observes = weights.family == NEOX, plain.observes(state)
        first_op = self.plan["qkv"]  # while it waits, the kernel after it has not begun, so that rows beside need not
        self.rows_wait = not (first_op.pdl and first_op.config is not None and first_op.config.late)
        spec = self.spec
        self.qkv_rows = (spec.query_heads + 2 * spec.kv_heads) * spec.head_dim
        self.inv_freq = spec.rope.inv_freq.to(state.device)
        with torch.inference_mode(False):
            self.hidden, self.other = (self._buffer(weights.embedding.shape[1]) for _ in range(2))
            self.first = self._buffer(self.qkv_rows)
            self.context = self._buffer(spec.query_heads * spec.head_dim)
            self.middle = self._buffer(spec.decoder.config.intermediate_size)
            self.tiles = Tiles(*state.logits.shape, state.device)
            self.rope = torch.zeros(state.streams, 2, 2, len(self.inv_freq), device=state.device)
            self.workspace = Workspace(state.streams, spec.query_heads, spec.kv_heads, spec.head_dim, state.device)

    def _buffer(self, width: int) -> torch.Tensor:
        """Room for ``(streams, width)``, dtype of the model."""
        return torch.zeros(self.state.streams, width, dtype=self.spec.dtype, device=self.state.device)

    def __call__(self) -> None:
        """Append what ``state.tokens`` says to all streams and leave the next-token logits in ``state.logits``."""
        state, weights = self.state, self.weights
        begin_step(
            state.tokens, state.logits, state.plan, state.cursor, weights.embedding, self.inv_freq,
            factor=weights.rope_factor, tiles=self.tiles, scalars=state.scalars, hidden=self.hidden, rope=self.rope,
        )  # fmt: skip
        row = plain.Row(state, weights.rope_factor)
        plain.note_token(state, row)
        for i, layer in enumerate(weights.layers):
            (self._neox_layer if self.neox else self._llama_layer)(row, i, layer)
        self._norm_linear("head", weights.final_norm, weights.head, out=state.logits)
        state.end_row()

    # ---- the ops of a layer ----

    def _neox_layer(self, row: plain.Row, i: int, layer: NeoxLayer) -> None:
        up = layer.weight_in[self.qkv_rows :]
        self._norm_linear(
            "qkv", layer.attention_norm, layer.weight_in[: self.qkv_rows], bias=layer.bias_in[: self.qkv_rows],
            out=self.first, early=i > 0, prefetch=self._slots("qkv", i),
        )  # fmt: skip
        attention_beside(
            self.first, self.state.keys[i], self.state.values[i], self.state.scalars, self.rope, self.hidden, up,
            query_heads=self.spec.query_heads, pinned_slots=self.state.geometry.pinned_slots, order="per-head",
            norm_weight=layer.mlp_norm.weight, norm_bias=layer.mlp_norm.bias, eps=layer.mlp_norm.eps,
            bias=layer.bias_in[self.qkv_rows :], out=self.context, linear_out=self.middle, workspace=self.workspace,
            wait=self.rows_wait, prefetch=Prefetch.of_rows(layer.weight_out, self.plan["beside"].prefetch),
            **self._how("beside"),
        )  # fmt: skip
        self._observe(row, i)
        linear_residual(
            self.context, layer.weight_out, f=self.middle, bias=layer.bias_out, residual=self.hidden, out=self.other,
            prefetch=self._next_layer("out", i), **self._how("out", early=not self.observes),
        )  # fmt: skip
        self._flip()

    def _llama_layer(self, row: plain.Row, i: int, layer: LlamaLayer) -> None:
        self._norm_linear(
            "qkv", layer.attention_norm, layer.weight_qkv, bias=layer.bias_qkv, out=self.first, early=i > 0,
            prefetch=self._slots("qkv", i),
        )  # fmt: skip
        self._attention(row, i, layer)
        linear_residual(
            self.context, layer.weight_o, bias=layer.bias_o, residual=self.hidden, out=self.other,
            prefetch=self._gate_up("o", layer), **self._how("o", early=not self.observes),
        )  # fmt: skip
        self._flip()
        self._norm_linear(
            "gate_up", layer.mlp_norm, layer.weight_gate_up, bias=layer.bias_gate_up, activation="swiglu",
            out=self.middle, prefetch=Prefetch.of_rows(layer.weight_down, self.plan["gate_up"].prefetch),
        )  # fmt: skip
        linear_residual(
            self.middle, layer.weight_down, bias=layer.bias_down, residual=self.hidden, out=self.other,
            prefetch=self._next_layer("down", i), **self._how("down"),
        )  # fmt: skip
        self._flip()

    def _flip(self) -> None:
        """The residual stream goes on in the other buffer: no kernel writes the lines that it is reading."""
        self.hidden, self.other = self.other, self.hidden

    def _norm_linear(self, op: str, norm: Norm, weight: torch.Tensor, *, early: bool = True, **more) -> None:
        """One row range behind one norm."""
        kind = "rms" if norm.bias is None else "layer"
        norm_linear(
            self.hidden, weight, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps, norm=kind, **more,
            **self._how(op, early=early),
        )  # fmt: skip

    def _attention(self, row: plain.Row, i: int, layer: LlamaLayer) -> None:
        """Attention leaves the memory idle while it waits: it asks for what the op after the next one reads first."""
        state, spec, q_norm, k_norm = self.state, self.spec, layer.q_norm, layer.k_norm
        norms = {} if q_norm is None else {"q_norm": q_norm.weight, "k_norm": k_norm.weight, "eps": q_norm.eps}
        attention_decode(
            self.first, state.keys[i], state.values[i], state.scalars, self.rope, query_heads=spec.query_heads,
            pinned_slots=state.geometry.pinned_slots, order="blocks", out=self.context, workspace=self.workspace,
            prefetch=self._gate_up("attention", layer), **norms, **self._how("attention"),
        )  # fmt: skip
        self._observe(row, i, q_norm)

    def _observe(self, row: plain.Row, i: int, q_norm: Norm | None = None) -> None:
        """What scorers keep of this layer's queries and attention; only policies with such a scorer pay for it."""
        if self.observes:
            spec, order = self.spec, "per-head" if self.neox else "blocks"
            query = split_qkv(self.first, spec.query_heads, spec.kv_heads, spec.head_dim, order)[0]
            plain.observe(self.state, row, i, query if q_norm is None else plain.norm(query, q_norm))

    # ---- how they are launched ----

    def _how(self, op: str, *, early: bool = True) -> dict:
        """Options of one launch; `early`: whether it may start before the kernel before it has ended.

        The first op of layer 0 may not: attention, one kernel later, must find the scalars final. Nor may an op that
        comes after PyTorch's, which need not end in a kernel; those of more than `MAX_SHARED` streams are PyTorch's.
        """
        plan = self.plan[op]
        return {"config": plan.config, "pdl": plan.pdl and early and self.state.streams <= MAX_SHARED}

    def _slots(self, op: str, i: int) -> Prefetch:
        """What attention reads first."""
        return Prefetch.of_slots(self.state.keys[i], self.state.values[i], self.plan[op].prefetch)

    def _gate_up(self, op: str, layer: LlamaLayer) -> Prefetch:
        """What the gated op reads first."""
        return Prefetch.of_rows(layer.weight_gate_up, self.plan[op].prefetch, len(layer.weight_gate_up) // 2)

    def _next_layer(self, op: str, i: int) -> Prefetch:
        """What the first op after layer i reads first."""
        size, layers = self.plan[op].prefetch, self.weights.layers
        if i + 1 == len(layers):
            return Prefetch.of_rows(self.weights.head, size)
        following = layers[i + 1]
        return Prefetch.of_rows(following.weight_in if self.neox else following.weight_qkv, size)


def check_kernels(spec: ModelSpec, policy: EvictionPolicy, device: torch.device) -> None:
    """Refuse, by name, what the kernels do not serve on a CUDA device; on a CPU the twins serve everything.

    Raises
    ------
    ValueError
        Naming what is not served and what is accepted.
    """
    if device.type != "cuda":
        return
    if triton is None:
        raise ValueError(f"the kernels need the triton package, which cannot be imported; {_INSTEAD}")
    if spec.dtype not in HALF_DTYPES:
        raise ValueError(f"weights of dtype {spec.dtype}; accepted by the kernels: {_names(HALF_DTYPES)}; {_INSTEAD}")
    if spec.head_dim % 16:
        raise ValueError(f"head_dim={spec.head_dim}; accepted by the kernels: multiples of 16; {_INSTEAD}")
    group = spec.query_heads // spec.kv_heads
    if group > MAX_GROUP:
        raise ValueError(f"{group} query heads a kv head; accepted by the kernels: at most {MAX_GROUP}; {_INSTEAD}")
    for name in ("hidden_size", "intermediate_size"):
        width = getattr(spec.decoder.config, name)
        if width % 8:
            raise ValueError(f"{name}={width}; accepted by the kernels: multiples of 8; {_INSTEAD}")
    g = Geometry.of(policy, "cache")
    splits = default_attention(group, spec.head_dim, g.ring, g.pinned_slots).splits
    if sum(count_programs(splits, g.ring, g.pinned_slots)[1:]) > MAX_SPLITS:
        raise ValueError(
            f"{g.pinned_slots} pinned slots beside a ring of {g.ring}; accepted by the kernels: at most about"
            f" {MAX_SPLITS} times the ring; {_INSTEAD}"
        )


_INSTEAD = "or backend='graph' or 'ring', which serve it"


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
