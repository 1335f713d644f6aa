"""Placement search: how many copies of which expert go to which device. Numpy only.

Dimensions: L layers, E experts, D devices, R redundant copies, S = E + R slots of a layer, C slots of a device.
All layers are searched side by side: every step below is one numpy operation over [L, ...].

    copies    one more for the expert with the largest load per copy, R times (DeepSeek, EPLB)
    start     longest first, each to the least loaded device with room (EPLB), two copies never to the same one
    search    swap a slot of the fullest device with one of another while that helps
    again     where that does not come out even and there are copies: with copies for other targets

A larger search (600 starts in other orders, exchanges of copies) took four times the time. Over the tables of the
tests its fullest device had 0.01% less on average, 0.4% in one table, 3.6% in one layer; on load that it was not
fitted on it had more.
Two copies of an expert on one device are one copy fewer of it; where EPLB does that it can be less full than
any placement without: loads 10, 9, 1 on 2 devices with 1 copy are 10 | 9 1, and 10 0.5 | 9 0.5 at best.
"""

from __future__ import annotations

import numpy as np

from ..formats.own import experts_of_nodes
from .copies import count_copies, device_loads, replicate

EVEN = 1.005  # fullest over mean device with which a layer is left alone: closer fits noise (held-out load gets worse)
# Largest load per copy, over a mean device's load, above which copies are made; at first as EPLB, wherever they help.
TARGETS = (0.0, *np.linspace(1.1, 0.4, 16))
SLOTS = 100_000  # x devices, that are tried for one target: small tables are tried with disturbed loads too
MOST_TRIES = 32  # per layer and target


def spread(loads, num_devices: int, redundant: int = 0) -> np.ndarray:
    """bool [L, D, E]: expert loads [L, E] and R copies spread so that the fullest device of each layer has little.

    Slot counts of devices differ by at most one, and no device gets two copies of an expert.
    """
    loads = np.asarray(loads, np.float64)
    num_layers, num_experts = loads.shape
    mean, fullest = loads.sum(axis=1) / num_devices, np.full(num_layers, np.inf)
    held = np.zeros((num_layers, num_devices, num_experts), bool)
    random = np.random.default_rng(0)
    for target in TARGETS if redundant else TARGETS[:1]:
        # 1. Layers that are not even yet, each several times where they are small.
        uneven = np.flatnonzero(fullest > EVEN * mean)
        if not len(uneven):
            break
        tries = SLOTS // (len(uneven) * (num_experts + redundant) * num_devices)
        tries = int(np.clip(tries, 1, MOST_TRIES if redundant else 1))
        many = np.repeat(loads[uneven], tries, axis=0)
        # 2. The first try chooses copies by the loads as they are, each further one by more disturbed loads.
        disorder = np.tile(np.linspace(0, 1, tries), len(uneven))[:, None]
        disturbed = many * np.exp(disorder * random.normal(size=many.shape))
        slots = replicate(disturbed, redundant, num_devices, target * np.repeat(mean[uneven], tries))
        tried = swap_search(many, longest_first(many, slots, num_devices))
        # 3. The best of them, where it is better than what was found before.
        after = device_loads(many, tried).max(axis=1).reshape(-1, tries)
        best = after.argmin(axis=1) + np.arange(len(uneven)) * tries
        better = after.min(axis=1) < fullest[uneven]
        held[uneven[better]] = tried[best[better]]
        fullest[uneven[better]] = after.min(axis=1)[better]
    return held


def longest_first(loads, slots, num_devices: int) -> np.ndarray:
    """bool [L, D, E] for the experts of slots [L, S]: the largest load per copy first, to the least loaded device.

    Where it puts no two copies together it is EPLB's packing down to ties.
    """
    num_layers, num_experts = loads.shape
    rows = np.arange(num_layers)
    share = loads / count_copies(slots, num_experts)
    order = np.take_along_axis(-share, slots, axis=1).argsort(axis=1, kind="stable")
    order = np.take_along_axis(slots, order, axis=1)
    least, longer = divmod(slots.shape[1], num_devices)  # so many devices get one slot more
    held = np.zeros((num_layers, num_devices, num_experts), bool)
    load, count = np.zeros(held.shape[:2]), np.zeros(held.shape[:2], np.int64)
    for expert in order.T:
        room = count < least + ((count > least).sum(axis=1, keepdims=True) < longer)
        free = room & ~held[rows, :, expert]
        device = np.where(free, load, np.inf).argmin(axis=1)
        stuck = np.flatnonzero(~free.any(axis=1))
        if len(stuck):  # only devices that hold this expert have room: the slot goes to a copy of another expert
            device[stuck] = room[stuck].argmax(axis=1)
            expert = expert.copy()
            expert[stuck] = np.where(held[stuck, device[stuck]], -1, share[stuck]).argmax(axis=1)
        held[rows, device, expert] = True
        load[rows, device] += share[rows, expert]
        count[rows, device] += 1
    return held


def swap_search(loads, held, most_swaps: float = np.inf) -> np.ndarray:
    """`held` bool [L, D, E] after at most so many swaps per layer, the best first; slot counts and copies stay.

    A swap exchanges a slot of the fullest device with one of another and leaves both below what the fullest had.
    Where slot counts differ, a slot can also change places with an empty one.
    """
    num_layers, num_devices, num_experts = held.shape
    longest = int(held.sum(axis=2).max())
    slots = np.argsort(~held, axis=2, kind="stable")[..., :longest]  # [L, D, C]
    slots = np.where(np.take_along_axis(held, slots, axis=2), slots, num_experts)  # expert E: an empty slot
    # Load of each expert's copy and of the empty slot, [L, E + 1]; float32 is exact enough to pick swaps by.
    share = np.pad(loads / held.sum(axis=1), ((0, 0), (0, 1))).astype(np.float32)
    holds = np.concatenate([held, (slots == num_experts).any(axis=2)[..., None]], axis=2)
    active = np.arange(num_layers)  # n layers that swaps may still help
    while len(active) and most_swaps > 0:
        most_swaps -= 1
        rows = np.arange(len(active))
        # 1. What the fullest device gets rid of by each swap, and what its lead over the other leaves of that.
        weight = np.take_along_axis(share[active, None], slots[active], axis=2)  # [n, D, C]
        load = weight.sum(axis=2)
        full = load.argmax(axis=1)
        relief = weight[rows, full][:, :, None] - weight.reshape(len(active), 1, -1)  # [n, C, D C]
        lead = np.repeat(load[rows, full][:, None] - load, longest, axis=1)  # [n, D C]
        gain = np.minimum(relief, lead[:, None] - relief)
        # 2. No device may get what it holds.
        barred = np.repeat(holds[active[:, None], :, slots[active, full]], longest, axis=2)
        barred |= holds[active[:, None], full[:, None], slots[active].reshape(len(active), -1)][:, None]
        gain[barred] = -1
        # 3. The best one, in layers where it helps.
        gain = gain.reshape(len(active), -1)
        best = gain.argmax(axis=1)
        helps = gain[rows, best] > 1e-6 * load[rows, full]
        active, full = active[helps], full[helps]
        one, other, two = np.unravel_index(best[helps], (longest, num_devices, longest))
        gone, come = slots[active, full, one], slots[active, other, two]
        slots[active, full, one], slots[active, other, two] = come, gone
        holds[active, full, gone] = holds[active, other, come] = False
        holds[active, full, come] = holds[active, other, gone] = True
    return holds[..., :num_experts].copy()


def spread_in_nodes(loads, num_devices: int, redundant: int, num_nodes: int, num_groups: int) -> np.ndarray:
    """As `spread`, each group of experts with all copies inside one node (EPLB, hierarchical).

    Groups go to nodes, as many to each; then each node is a problem of its own. All counts must divide.
    """
    groups = loads.reshape(len(loads), num_groups, -1).sum(axis=2)
    nodes = np.repeat(spread(groups, num_nodes), loads.shape[1] // num_groups, axis=2)  # [L, nodes, E]
    per_node = num_devices // num_nodes
    whole = np.repeat(nodes, per_node, axis=1)  # every device of a node with all of its experts
    return within_nodes(loads, whole, num_nodes, lambda of_nodes, _: spread(of_nodes, per_node, redundant // num_nodes))


def within_nodes(loads, held, num_nodes: int, search) -> np.ndarray:
    """`held` bool [L, D, E] after `search(loads, held)` in each node apart, so that no expert leaves its node.

    search  sees every node as a layer of its own: [L nodes, E / nodes] and bool [L nodes, D / nodes, E / nodes]
    Raises ValueError where nodes differ in size or share experts.
    """
    num_layers, num_devices, num_experts = held.shape
    of_node = experts_of_nodes(held, num_nodes)
    ids = np.argsort(~of_node, axis=2, kind="stable")[..., : num_experts // num_nodes]  # [L, nodes, E / nodes]
    of_nodes = np.take_along_axis(loads[:, None], ids, axis=2).reshape(num_layers * num_nodes, -1)
    whole = held.reshape(num_layers, num_nodes, -1, num_experts)
    local = np.take_along_axis(whole, ids[:, :, None], axis=3)  # [L, nodes, D / nodes, E / nodes]
    found = search(of_nodes, local.reshape(len(of_nodes), *local.shape[2:])).reshape(local.shape)
    result = np.zeros_like(whole)
    np.put_along_axis(result, np.broadcast_to(ids[:, :, None], local.shape), found, axis=3)
    return result.reshape(held.shape)
