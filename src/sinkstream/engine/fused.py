"""The decode step through the ops of `kernels`: three a GPT-NeoX layer, five a Llama-like one.

On a CPU the same calls run the kernels' twins. The attention kernel itself keeps what a policy observes of queries and
attention; plain PyTorch functions compute what it observes of tokens, only under policies that need it. No part of a
step synchronises with the host, so that a CUDA graph can hold a whole step.
"""

from typing import Any, cast

import torch

from sinkstream.cache import ModelSpec
from sinkstream.engine import plain
from sinkstream.engine.geometry import Geometry
from sinkstream.engine.packing import NEOX, NeoxLayer, Norm, PackedWeights
from sinkstream.engine.persistent import pack_layers, persistent_plan
from sinkstream.engine.span import StreamSpan
from sinkstream.kernels import (
    Prefetch,
    Workspace,
    attention_decode,
    attention_linear,
    begin_step,
    linear_residual,
    norm_linear,
)
from sinkstream.kernels.config import MAX_SPLITS, MAX_STREAMS, LinearConfig, count_programs, default_attention
from sinkstream.kernels.likeliest import Tiles
from sinkstream.kernels.norm_linear_pair import norm_linear_pair
from sinkstream.kernels.observed import Observed, accumulate
from sinkstream.kernels.persistent_layers import persistent_layers
from sinkstream.kernels.plans import (
    LAYERS,
    LLAMA_OPS,
    NEOX_OPS,
    LaunchPlan,
    OpLaunch,
    PersistentKind,
    Sizes,
    measured_plan,
    several_plan,
)
from sinkstream.kernels.runtime import HALF_DTYPES, has_dependent_launch, multiprocessors, shared_bytes, triton

MAX_GROUP = 16  # query heads of one key-value head


def most_visible(state: StreamSpan) -> int | None:
    """For `attention_decode`: where slots are often empty, because streams differ or sinks are reserved; else None."""
    observed = state.queries is not None or state.scores is not None
    return None if observed or (state.streams == 1 and not state.geometry.reserved) else state.geometry.most_visible


def plan_sizes(state: StreamSpan) -> Sizes:
    """What a plan is fitted to: sizes of the model and its cache, and of the device."""
    g, spec, device = state.geometry, state.spec, state.device
    config: Any = spec.decoder.config
    return Sizes(
        config.hidden_size, config.intermediate_size, spec.query_heads, spec.kv_heads, spec.head_dim, g.ring,
        g.pinned_slots, shared_bytes(device), multiprocessors(device),
    )  # fmt: skip


def default_plan(weights: PackedWeights, state: StreamSpan) -> dict[str, OpLaunch]:
    """The measured plan on a GPU with programmatic dependent launch, and elsewhere the defaults of the ops."""
    neox = weights.family == NEOX
    if not has_dependent_launch(state.device):
        return {op: OpLaunch() for op in (*(NEOX_OPS if neox else LLAMA_OPS), "head")}
    sizes = plan_sizes(state)
    if state.streams > 1:
        return several_plan(neox, sizes, state.streams)
    return measured_plan(neox, sizes) | persistent_plan(weights, state)


class FusedDecode:
    """One decode step of the streams of a span, with every buffer allocated once.

    Parameters
    ----------
    weights : PackedWeights
    state : StreamSpan
    plan : mapping of OpLaunch, optional
        By op name (`NEOX_OPS` or `LLAMA_OPS`, and "head"); default: `default_plan`. With "layers" one persistent kernel
        takes the place of the ops of all layers.

    Attributes
    ----------
    ops : tuple of str
        Names of the ops of a layer, in order.
    persistent : PersistentLayers or None
        What the persistent kernel reads, under a plan with one.
    """

    def __init__(self, weights: PackedWeights, state: StreamSpan, plan: LaunchPlan | None = None):
        self.weights, self.state, self.spec = weights, state, state.spec
        self.neox = weights.family == NEOX
        self.ops = NEOX_OPS if self.neox else LLAMA_OPS
        self.paired = self.neox and 1 < state.streams <= MAX_STREAMS  # qkv and up-projection in one product
        self.use(default_plan(weights, state) if plan is None else plan)
        self.most_visible = most_visible(state)
        spec, config = self.spec, cast(Any, self.spec.decoder.config)
        self.qkv_rows = (spec.query_heads + 2 * spec.kv_heads) * spec.head_dim
        self.inv_freq = spec.rope.inv_freq.to(state.device)
        with torch.inference_mode(False):
            self.hidden, self.other = (self._buffer(weights.embedding.shape[1]) for _ in range(2))
            self.first = self._buffer(self.qkv_rows)
            self.context = self._buffer(spec.query_heads * spec.head_dim)
            self.middle = self._buffer(config.intermediate_size)
            self.tiles = Tiles(state.streams, state.logits.shape[1], state.device)
            self.rope = torch.zeros(state.streams, 2, 2, len(self.inv_freq), device=state.device)
            self.workspace = Workspace(state.streams, spec.query_heads, spec.kv_heads, spec.head_dim, state.device)
        self._notes = bool(state.channels.keys() - {"accumulated"})
        self._observed = [self._observed_of(i) for i in range(len(weights.layers))]

    def use(self, plan: LaunchPlan) -> None:
        """Take another plan for all launches from now on; a captured graph keeps the plan of its capture."""
        self.plan = plan
        layers = plan[LAYERS].config if LAYERS in plan else None
        self.persistent = pack_layers(self.weights, self.state, layers) if isinstance(layers, PersistentKind) else None
        first_op = plan["qkv"]  # a late one has ended its wait when `attention_up` starts, whose rows need not wait
        self.rows_wait = not (first_op.pdl and isinstance(first_op.config, LinearConfig) and first_op.config.late)

    def _buffer(self, width: int) -> torch.Tensor:
        """Room for ``(streams, width)``, dtype of the model."""
        return torch.zeros(self.state.streams, width, dtype=self.spec.dtype, device=self.state.device)

    def __call__(self) -> None:
        """Append ``state.tokens``; the next-token logits are in ``state.logits`` afterwards."""
        state, weights = self.state, self.weights
        begin_step(
            state.tokens, state.logits, state.plan, state.cursor, weights.embedding, self.inv_freq,
            factor=weights.rope_factor, tiles=self.tiles, draws=state.draws, scalars=state.scalars, hidden=self.hidden,
            rope=self.rope,
        )  # fmt: skip
        self._row = plain.Row(state, weights.rope_factor)
        self._note_token()
        self.run_layers()
        self.run("head", len(weights.layers))
        self._accumulate()
        state.end_row()

    def run_layers(self) -> None:
        """Launch the ops of all layers, or the persistent kernel."""
        if self.persistent is not None:
            found = persistent_layers(
                self.hidden, self.other, self.persistent, self.state.scalars, self.rope,
                prefetch=Prefetch.of_rows(self.weights.head, self.plan[LAYERS].prefetch),
            )  # fmt: skip
            if found is self.other:
                self.hidden, self.other = self.other, self.hidden
            return
        for i in range(len(self.weights.layers)):
            for op in self.ops:
                self.run(op, i)

    def _note_token(self) -> None:
        """Fill the channels of the token, under policies that have some."""
        if self._notes:
            plain.note_token(self.state, self._row)

    def _accumulate(self) -> None:
        """Add up the attention that slots were given, under policies that read it."""
        state = self.state
        if state.scores is not None and state.score_sums is not None:
            accumulate(state.scores, state.score_sums, state.scalars, state.channels["accumulated"])

    def run(self, op: str, layer: int) -> None:
        """Launch one op of one layer; its inputs are the outputs of the previous op. "head" ignores the layer."""
        getattr(self, f"_{op}")(layer)

    # ---- the ops ----

    def _qkv(self, i: int) -> None:
        layer = self.weights.layers[i]
        if self.paired:
            first, second = layer.attention_norm, layer.mlp_norm
            norm_linear_pair(
                self.hidden, layer.weight_in, norms=((first.weight, first.bias), (second.weight, second.bias)),
                eps=first.eps, bias=layer.bias_in, out=self.first, second_out=self.middle,
                **self._how("qkv", early=i > 0),
            )  # fmt: skip
            return
        if isinstance(layer, NeoxLayer):
            weight, bias = layer.weight_in[: self.qkv_rows], layer.bias_in[: self.qkv_rows]
        else:
            weight, bias = layer.weight_qkv, layer.bias_qkv
        self._norm_linear(
            "qkv", layer.attention_norm, weight, bias=bias, out=self.first, early=i > 0, prefetch=self._slots("qkv", i)
        )

    def _attention_up(self, i: int) -> None:
        layer, up = self.weights.layers[i], slice(self.qkv_rows, None)
        if self.paired:
            attention_decode(
                self.first, self.state.keys[i], self.state.values[i], self.state.scalars, self.rope,
                query_heads=self.spec.query_heads, pinned_slots=self.state.geometry.pinned_slots, order="per-head",
                most_visible=self.most_visible, observed=self._observed[i], out=self.context, workspace=self.workspace,
                prefetch=Prefetch.of_rows(layer.weight_out, self.plan["attention_up"].prefetch),
                **self._how("attention_up"),
            )  # fmt: skip
            return
        attention_linear(
            self.first, self.state.keys[i], self.state.values[i], self.state.scalars, self.rope, self.hidden,
            layer.weight_in[up], query_heads=self.spec.query_heads, pinned_slots=self.state.geometry.pinned_slots,
            order="per-head", norm_weight=layer.mlp_norm.weight, norm_bias=layer.mlp_norm.bias, eps=layer.mlp_norm.eps,
            bias=layer.bias_in[up], most_visible=self.most_visible, observed=self._observed[i], out=self.context,
            linear_out=self.middle, workspace=self.workspace, wait=self.rows_wait,
            prefetch=Prefetch.of_rows(layer.weight_out, self.plan["attention_up"].prefetch),
            **self._how("attention_up"),
        )  # fmt: skip

    def _out(self, i: int) -> None:
        layer = self.weights.layers[i]
        self._linear_residual(
            "out", self.context, layer.weight_out, f=self.middle, bias=layer.bias_out,
            prefetch=self._next_layer("out", i),
        )  # fmt: skip

    def _attention(self, i: int) -> None:
        """The memory is idle while attention waits: attention prefetches the first rows of `gate_up`, two ops later."""
        state, spec, layer = self.state, self.spec, self.weights.layers[i]
        q_norm, k_norm = layer.q_norm, layer.k_norm
        norms: dict[str, Any] = (
            {}
            if q_norm is None or k_norm is None
            else {"q_norm": q_norm.weight, "k_norm": k_norm.weight, "eps": q_norm.eps}
        )
        attention_decode(
            self.first, state.keys[i], state.values[i], state.scalars, self.rope, query_heads=spec.query_heads,
            pinned_slots=state.geometry.pinned_slots, order="blocks", most_visible=self.most_visible,
            observed=self._observed[i], out=self.context, workspace=self.workspace,
            prefetch=self._gate_up_rows("attention", i), **norms, **self._how("attention"),
        )  # fmt: skip

    def _o(self, i: int) -> None:
        layer = self.weights.layers[i]
        self._linear_residual(
            "o", self.context, layer.weight_o, bias=layer.bias_o, prefetch=self._gate_up_rows("o", i),
        )  # fmt: skip

    def _gate_up(self, i: int) -> None:
        layer = self.weights.layers[i]
        self._norm_linear(
            "gate_up", layer.mlp_norm, layer.weight_gate_up, bias=layer.bias_gate_up, activation="swiglu",
            out=self.middle, prefetch=Prefetch.of_rows(layer.weight_down, self.plan["gate_up"].prefetch),
        )  # fmt: skip

    def _down(self, i: int) -> None:
        layer = self.weights.layers[i]
        prefetch = self._next_layer("down", i)
        self._linear_residual("down", self.middle, layer.weight_down, bias=layer.bias_down, prefetch=prefetch)

    def _head(self, i: int) -> None:
        self._norm_linear("head", self.weights.final_norm, self.weights.head, out=self.state.logits)

    def _norm_linear(self, op: str, norm: Norm, weight: torch.Tensor, *, early: bool = True, **more: Any) -> None:
        """A norm and the product with some rows of a weight."""
        kind = "rms" if norm.bias is None else "layer"
        norm_linear(
            self.hidden, weight, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps, norm=kind, **more,
            **self._how(op, early=early),
        )  # fmt: skip

    def _linear_residual(self, op: str, a: torch.Tensor, weight: torch.Tensor, **more: Any) -> None:
        """The residual stream alternates between two buffers: no kernel writes cache lines that it is reading."""
        linear_residual(a, weight, residual=self.hidden, out=self.other, **more, **self._how(op))
        self.hidden, self.other = self.other, self.hidden

    def _observed_of(self, i: int) -> Observed:
        """What attention keeps of one layer, under policies whose scorer reads it."""
        layers = (self.state.queries, self.state.scores, self.state.score_sums)
        return Observed(*(None if part is None else part[i] for part in layers))

    # ---- how they are launched ----

    def _how(self, op: str, *, early: bool = True) -> dict:
        """Options of one launch; `early`: whether it may start before the previous kernel has ended.

        The first op of layer 0 may not: attention, one kernel later, reads the scalars before its wait. Nor may an op
        after one of PyTorch's, whose last piece of work need not be a kernel. More than `MAX_STREAMS` streams take
        PyTorch's ops, so that none of their launches is early.
        """
        plan = self.plan[op]
        return {"config": plan.config, "pdl": plan.pdl and early and self.state.streams <= MAX_STREAMS}

    def _slots(self, op: str, i: int) -> Prefetch:
        """What attention reads first."""
        return Prefetch.of_slots(self.state.keys[i], self.state.values[i], self.plan[op].prefetch)

    def _gate_up_rows(self, op: str, i: int) -> Prefetch:
        """What the gated op reads first."""
        weight = self.weights.layers[i].weight_gate_up
        return Prefetch.of_rows(weight, self.plan[op].prefetch, len(weight) // 2)

    def _next_layer(self, op: str, i: int) -> Prefetch:
        """What the first op after layer i reads first."""
        size, layers = self.plan[op].prefetch, self.weights.layers
        if i + 1 == len(layers):
            return Prefetch.of_rows(self.weights.head, size)
        following = layers[i + 1]
        return Prefetch.of_rows(following.weight_in if self.neox else following.weight_qkv, size)


def check_kernels(spec: ModelSpec, geometry: Geometry, device: torch.device) -> None:
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
    ring, pinned = geometry.ring, geometry.pinned_slots
    splits = default_attention(group, spec.head_dim, ring, pinned).splits
    if sum(count_programs(splits, ring, pinned)[1:]) > MAX_SPLITS:
        raise ValueError(
            f"{pinned} pinned slots beside a ring of {ring}; accepted by the kernels: at most about"
            f" {MAX_SPLITS} times the ring; {_INSTEAD}"
        )


_INSTEAD = "or backend='graph' or 'ring', which serve it"


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
