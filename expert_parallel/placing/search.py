"""Search: the fullest device as little loaded as a few starts and swaps can make it. Numpy only.

Dimensions: L layers, E experts, D devices, R redundant copies, S = E + R slots of a layer, C slots of a device.
Layers are searched side by side: every step is one numpy operation over [L, ...].

    copies    one more for the expert with the largest load per copy, R times (DeepSeek, EPLB)
    start     longest first, each to the emptiest device that has room and does not hold it
    swaps     a slot of the fullest device for one of another, the best of all, while that helps
    again     where that is not yet even: other copies and other orders, the best one counts

Two copies of an expert never share a device, which helps nobody (EPLB's issue 22); where EPLB does so it makes one
copy fewer and can be less full: loads 10, 9, 1 on 2 devices with 1 copy are 10 | 9 1, and 10 0.5 | 9 0.5 at best.
"""

from __future__ import annotations

import numpy as np

from .copies import count_copies, crowding, device_loads, exchange_copies, replicate

EVEN = 1e-3  # a fullest device so near to the lower bound is left as it is
CHOICES = 64  # of copies that are judged for a layer at least
STARTS = 3_000_000  # layers x slots x devices of all that are packed
SMALL = 600  # experts x devices of a layer whose copies are exchanged too


def spread(loads, num_devices: int, redundant: int = 0) -> np.ndarray:
    """bool [L, D, E]: E + R slots of each layer, counts that differ by at most one, no device with two of an expert."""
    loads = np.asarray(loads, dtype=np.float64)
    held = swap_search(loads, longest_first(loads, replicate(loads, redundant, num_devices), num_devices))
    fullest = device_loads(loads, held).max(axis=1)
    bound = _attainable(loads, num_devices, redundant)
    layers = np.flatnonzero(fullest > bound * (1 + EVEN))
    if len(layers):
        tried, reached = _other_starts(loads[layers], num_devices, redundant)
        better = reached < fullest[layers]
        held[layers[better]] = tried[better]
    return held


def _attainable(loads, num_devices, redundant):
    """[L]; as `copies.lower_bound`, and without copies the hottest expert has at best the coldest for company."""
    copies = count_copies(replicate(loads, redundant, num_devices), loads.shape[1])
    largest = (loads / copies).max(axis=1)
    if not redundant:
        company = loads.shape[1] // num_devices - 1
        largest = largest + np.sort(loads, axis=1)[:, :company].sum(axis=1)
    return np.maximum(loads.sum(axis=1) / num_devices, largest)


def _other_starts(loads, num_devices, redundant):
    """(held bool [L, D, E], fullest device's load [L]): the best from starts with other copies and in other orders."""
    num_layers, num_experts = loads.shape
    starts = int(np.clip(STARTS // (num_layers * (num_experts + redundant) * num_devices), 2, 600))
    choices, rows = max(starts, CHOICES), np.arange(num_layers)[:, None]
    # 1. Choices of copies, for fewer and fewer experts, disturbed by no, some and much noise: those that crowd least.
    many = np.repeat(loads, choices, axis=0)
    noise = np.random.default_rng(0).normal(1, 0.2, many.shape).clip(0.3, 1.7)
    noise **= np.arange(len(many))[:, None] % 4
    target = np.linspace(1.1, 0.5, choices) * loads.sum(axis=1, keepdims=True) / num_devices
    slots = replicate(many * noise, redundant, num_devices, target.ravel())
    crowded = crowding(many, slots, num_devices).reshape(num_layers, choices)
    some = (rows * choices + crowded.argsort(axis=1, kind="stable")[:, :starts]).ravel()
    many, slots, noise = many[some], slots[some], noise[some]
    # 2. Each packed and swapped; of small tables the best few by exchanges of copies too.
    held = swap_search(many, longest_first(many, slots, num_devices, noise))
    if redundant and num_experts * num_devices <= SMALL:
        best = device_loads(many, held).max(axis=1).reshape(num_layers, starts).argsort(axis=1)[:, :16]
        some = (rows * starts + best).ravel()
        for _ in range(2):
            held[some] = swap_search(many[some], exchange_copies(many[some], held[some]))
    reached = device_loads(many, held).max(axis=1).reshape(num_layers, starts)
    best, rows = reached.argmin(axis=1), rows[:, 0]
    return held.reshape(num_layers, starts, num_devices, num_experts)[rows, best], reached[rows, best]


def longest_first(loads, slots, num_devices: int, noise=1.0) -> np.ndarray:
    """bool [L, D, E] for the experts of slots [L, S]; `noise` [L, E] disturbs the order: other starts.

    Without noise, and where it would put no two copies together, the same as EPLB down to ties.
    """
    num_layers, num_experts = loads.shape
    num_slots, rows = slots.shape[1], np.arange(num_layers)
    share = loads / count_copies(slots, num_experts)
    order = np.take_along_axis(-share * noise, slots, axis=1).argsort(axis=1, kind="stable")
    order = np.take_along_axis(slots, order, axis=1)
    least, extra = divmod(num_slots, num_devices)
    held = np.zeros((num_layers, num_devices, num_experts), dtype=bool)
    load, count = np.zeros((num_layers, num_devices)), np.zeros((num_layers, num_devices), dtype=np.int64)
    for expert in order.T:
        longer = (count > least).sum(axis=1, keepdims=True)
        room = (count < least) | ((count == least) & (longer < extra))
        free = room & ~held[rows, :, expert]
        device = np.where(free, load, np.inf).argmin(axis=1)
        stuck = np.flatnonzero(~free.any(axis=1))
        if len(stuck):  # only devices that hold this expert have room: such a slot takes another one's copy
            device[stuck] = room[stuck].argmax(axis=1)
            others = np.where(held[stuck, device[stuck]], -1, share[stuck])
            expert = expert.copy()
            expert[stuck] = others.argmax(axis=1)
        held[rows, device, expert] = True
        load[rows, device] += share[rows, expert]
        count[rows, device] += 1
    return held


def swap_search(loads, held, most_swaps: int | None = None) -> np.ndarray:
    """`held` bool [L, D, E] after at most so many swaps per layer, the best first; counts and copies stay."""
    if len(held) > 64:  # what is looked at in a step should fit a processor's cache
        parts = [slice(start, start + 64) for start in range(0, len(held), 64)]
        return np.concatenate([swap_search(loads[part], held[part], most_swaps) for part in parts])
    num_layers, num_devices, num_experts = held.shape
    counts = held.sum(axis=2)
    longest = int(counts.max())
    # Expert of each slot [L, D, C]; E is the slot that a device has fewer than the others.
    slots = np.argsort(~held, axis=2, kind="stable")[..., :longest]
    slots = np.where(np.arange(longest) < counts[..., None], slots, num_experts)
    shares = np.concatenate([loads / held.sum(axis=1), np.zeros((num_layers, 1))], axis=1)
    holds = np.concatenate([held, (slots == num_experts).any(axis=2)[..., None]], axis=2)
    weight = np.take_along_axis(shares[:, None], slots, axis=2)
    load = weight.sum(axis=2)
    enough = load.mean(axis=1) * (1 + EVEN / 4)
    owner = np.repeat(np.arange(num_devices), longest)  # [D C]
    active, swaps = np.arange(num_layers), 0
    while swaps != most_swaps:
        active = active[load[active].max(axis=1) > enough[active]]
        if not len(active):
            break
        swaps += 1
        full = load[active].argmax(axis=1)
        mine, theirs = slots[active, full], slots[active].reshape(len(active), -1)  # [n, C], [n, D C]
        # 1. What each swap comes to, [n, C, D C]: the larger of the two devices' loads; float32, for it only picks.
        give, take = weight[active, full].astype(np.float32), weight[active].reshape(len(active), -1).astype(np.float32)
        gain = give[:, :, None] - take[:, None, :]
        after = load[active][:, owner].astype(np.float32)[:, None, :] + gain
        np.maximum(after, load[active, full].astype(np.float32)[:, None, None] - gain, out=after)
        # 2. No device may get what it holds.
        after[np.repeat(holds[active[:, None], :, mine], longest, axis=2)] = np.inf
        after[np.broadcast_to(holds[active[:, None], full[:, None], theirs][:, None, :], after.shape)] = np.inf
        # 3. The best one, where it helps.
        best = after.reshape(len(active), -1).argmin(axis=1)
        a, b = np.divmod(best, len(owner))
        rows = np.arange(len(active))
        other, c = owner[b], b % longest
        delta = weight[active, full, a] - weight[active, other, c]
        reached = np.maximum(load[active, full] - delta, load[active, other] + delta)
        helps = np.isfinite(after[rows, a, b]) & (reached < load[active, full] * (1 - 1e-9))
        active, full, a, other, c, delta = (values[helps] for values in (active, full, a, other, c, delta))
        one, two = slots[active, full, a], slots[active, other, c]
        slots[active, full, a], slots[active, other, c] = two, one
        weight[active, full, a] -= delta
        weight[active, other, c] += delta
        load[active, full] -= delta
        load[active, other] += delta
        holds[active, full, one] = holds[active, other, two] = False
        holds[active, full, two] = holds[active, other, one] = True
    return holds[..., :num_experts].copy()


# --- nodes ------------------------------------------------------------------------------------------------


def spread_in_nodes(loads, num_devices: int, redundant: int, num_nodes: int, num_groups: int) -> np.ndarray:
    """As `spread`, each group of experts with all copies inside one node (EPLB, hierarchical).

    Groups go to nodes, as many to each; then each node is a problem of its own. The counts must divide:
    see `divides_into_nodes`.
    """
    num_layers, num_experts = loads.shape
    size = num_experts // num_groups
    groups = loads.reshape(num_layers, num_groups, size).sum(axis=2)
    every = np.broadcast_to(np.arange(num_groups), groups.shape)
    # Even nodes are not always the best start for even devices: EPLB's own packing is tried too.
    tried = []
    for packed in (spread(groups, num_nodes), longest_first(groups, every, num_nodes)):
        apart = np.repeat(np.repeat(packed, size, axis=2), num_devices // num_nodes, axis=1)
        ids, of_nodes, _ = node_problems(loads, apart, num_nodes)
        tried.append(join_nodes(ids, spread(of_nodes, num_devices // num_nodes, redundant // num_nodes), apart.shape))
    fullest = np.stack([device_loads(loads, held).max(axis=1) for held in tried])
    return np.stack(tried)[fullest.argmin(axis=0), np.arange(num_layers)]


def node_problems(loads, held, num_nodes):
    """(ids [L, nodes, E / nodes], loads [L nodes, E / nodes], held [L nodes, D / nodes, E / nodes]).

    Each node, with the experts that its devices hold, as a layer of its own; every node has as many.
    Raises ValueError where that is not so, as in a placement file changed by hand.
    """
    num_layers, num_devices, num_experts = held.shape
    of_node = None if num_devices % num_nodes else held.reshape(num_layers, num_nodes, -1, num_experts).any(axis=2)
    if of_node is None or (of_node.sum(axis=1) > 1).any() or (of_node.sum(axis=2) != num_experts / num_nodes).any():
        raise ValueError(f"a placement with num_nodes {num_nodes} has as many experts in each, and none in two")
    ids = np.argsort(~of_node, axis=2, kind="stable")[..., : num_experts // num_nodes]
    of_nodes = loads[np.arange(num_layers)[:, None, None], ids].reshape(num_layers * num_nodes, -1)
    local = np.take_along_axis(held.reshape(num_layers, num_nodes, -1, num_experts), ids[:, :, None], axis=3)
    return ids, of_nodes, local.reshape(num_layers * num_nodes, num_devices // num_nodes, -1)


def join_nodes(ids, local, shape) -> np.ndarray:
    """bool [L, D, E] again, from what `node_problems` took apart."""
    num_layers, num_devices, num_experts = shape
    num_nodes = ids.shape[1]
    local = local.reshape(num_layers, num_nodes, num_devices // num_nodes, -1)
    held = np.zeros((num_layers, num_nodes, num_devices // num_nodes, num_experts), dtype=bool)
    np.put_along_axis(held, np.broadcast_to(ids[:, :, None], local.shape), local, axis=3)
    return held.reshape(shape)


def divides_into_nodes(num_experts, num_devices, redundant, num_nodes, num_groups) -> bool:
    """Whether groups fill nodes, experts groups, and devices and copies nodes without remainder."""
    return not any((num_groups % num_nodes, num_experts % num_groups, num_devices % num_nodes, redundant % num_nodes))
