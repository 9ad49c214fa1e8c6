"""The engine: decode at the speed of memory, in static buffers, under any eviction policy."""

from sinkstream.engine.batch import StreamBatch
from sinkstream.engine.engine import Engine
from sinkstream.engine.generation import Generation
from sinkstream.engine.packing import PackedWeights, pack
from sinkstream.engine.sampling import Sampler
from sinkstream.engine.state import StreamState
from sinkstream.engine.steps import STEPS, GraphedStep, StepFunction

__all__ = [
    "STEPS",
    "Engine",
    "Generation",
    "GraphedStep",
    "PackedWeights",
    "Sampler",
    "StepFunction",
    "StreamBatch",
    "StreamState",
    "pack",
]
