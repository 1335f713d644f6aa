"""Expert parallelism for MLX-LM's Mixture-of-Experts models: what scripts and notebooks share."""

from importlib import import_module

__version__ = "0.1.0"

# Looked up when they are asked for: a script's --help needs neither mlx-lm nor a search for placements.
_WHERE = {
    "Placement": "placement",
    "RoutingTrace": "trace",
    "ShardedExperts": "experts",
    "balancedness": "balance",
    "load_sharded": "checkpoint.loading",
    "place_experts": "placing.strategies",
    "rebalance_experts": "placing.eplb",
    "record_routing": "trace",
    "shard_model": "experts",
}
__all__ = [*_WHERE]


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_WHERE])
