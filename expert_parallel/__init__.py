"""Expert parallelism for MLX-LM's Mixture-of-Experts models: what scripts and notebooks share."""

from .balance import balancedness
from .loading import load_sharded
from .moe import ExpertShard, shard_model
from .placement import Placement, place_experts
from .routing import RoutingTrace, record_routing

__all__ = [
    "ExpertShard",
    "Placement",
    "RoutingTrace",
    "balancedness",
    "load_sharded",
    "place_experts",
    "record_routing",
    "shard_model",
]
