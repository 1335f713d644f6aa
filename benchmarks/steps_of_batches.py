"""What a step of many sequences asks for and, by the model of speed, takes: counted and modelled for batches.py.

Dimensions: S sequences, N steps, B sequences a step, L MoE layers, E experts, k chosen, D devices.
"""

import numpy as np
from speed_of_ranks import STOCK, TENSOR

from expert_parallel import place_experts
from expert_parallel.balance import fan_out
from expert_parallel.models.architecture import describe
from expert_parallel.models.configurations import load_configuration
from expert_parallel.projection.hardware import LINKS, MACHINES
from expert_parallel.projection.step import Fullest, estimate, fullest_device
from expert_parallel.report.batch import evenness_of_steps
from expert_parallel.serving import devices_of_trace

ELSEWHERE = "m4-max", ("thunderbolt-jaccl", "ethernet-10g"), "qwen3-coder-30b"


def in_steps(experts, batch: int) -> np.ndarray:
    """A recording [S, N, L, k] as steps of `batch` sequences each, [S / B * N, B, L, k]; B divides S."""
    S, N, *rest = experts.shape
    return experts.reshape(S // batch, batch, N, *rest).swapaxes(1, 2).reshape(-1, batch, *rest)


def count(experts, held, batch: int) -> dict:
    """Means over steps and layers of a recording [S, N, L, k], for experts held [L, D, E] and steps of B sequences.

    wanted        different experts that a step's tokens ask for, of E
    balancedness  mean slots of the devices over the fullest one's (SGLang's, of one step)
    fan_out       devices that answer for one token
    devices       that answer for a step
    """
    steps, (L, D, _) = in_steps(experts, batch), held.shape
    of_token = np.repeat(np.arange(len(steps)), batch)
    device = devices_of_trace(steps.reshape(-1, *steps.shape[2:]), held, of_token)
    wanted = [len(np.unique(step[:, layer])) for step in steps for layer in range(L)]
    even, at_work = evenness_of_steps(device, of_token, D)
    return {
        "wanted": float(np.mean(wanted)),
        "balancedness": even,
        "fan_out": float(fan_out(device).mean()),
        "devices": at_work,
    }


def wanted_by_chance(num_experts: int, top_k: int, batch: int) -> float:
    """Different experts that B tokens ask for where each chooses k of E at random (modelled)."""
    return num_experts * (1 - (1 - top_k / num_experts) ** batch)


def modelled(args, demand, machine, links, experts) -> dict:
    """{(backend, variant, B): seconds of a step} where the variant is one that the model has."""
    held = {devices: place_experts(np.ones(experts.shape[2:3] + (demand.num_experts,)), devices).held
            for devices in (1, 2)}  # fmt: skip
    described, found = describe(load_configuration(args.model)), {}
    whole_head = described.outside["head"].bytes / demand.rest_bytes
    for batch in args.batches:
        tokens = in_steps(experts, batch).reshape(-1, *experts.shape[2:])
        one, two = (fullest_device(tokens, held[devices], batch) for devices in (1, 2))
        about = {"context": args.context, "batch": batch}
        found["one process", STOCK, batch] = estimate(demand, machine, load=one, **about).seconds
        for backend, link in links.items():
            where = (demand, machine, 2, link)
            halves = Fullest(one.experts / 2, one.slots / 2)  # of every expert
            loads = {TENSOR: (halves, (1 + whole_head) / 2), "rest whole": (two, 1.0), "rest split": (two, 0.5)}
            for variant, (load, share) in loads.items():
                found[backend, variant, batch] = estimate(*where, load, rest_share=share, **about).seconds
    return found


def elsewhere(batches, experts, num_experts) -> list[tuple]:
    """(machines, B, tokens/s) of the whole Qwen3-Coder-30B on one and two machines, as uneven as this recording."""
    name, links, model = ELSEWHERE
    demand, rows = describe(load_configuration(model)).demand, []
    for batch in batches:
        tokens = in_steps(experts, batch).reshape(-1, *experts.shape[2:])
        for devices, link in ((1, None), *((2, link) for link in links)):
            held = place_experts(np.ones((experts.shape[2], num_experts)), devices).held
            load = fullest_device(tokens, held, batch)
            every = np.ones(demand.num_moe_layers)
            load = Fullest(load.experts.mean() * every, load.slots.mean() * every)
            step = estimate(demand, MACHINES[name], devices, link and LINKS[link][0], load, batch=batch)
            rows.append((f"{devices} {name}{f', {link}' if link else ''}", batch, step.tokens_per_second))
    return rows
