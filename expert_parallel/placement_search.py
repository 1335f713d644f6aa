"""Placement search: how many copies of which expert go to which device. Numpy only.

Dimensions: L layers, E experts, D devices, R redundant copies, S = E + R slots of a layer, C slots of
a device. All layers are searched side by side: every step below is one numpy operation over [L, ...].

    copies    one more for the expert with the largest load per copy, R times (DeepSeek EPLB)
    start     longest first, each to the device that stays quickest and has room
    search    swap a slot of the slowest device with one of another while that helps
    again     from starts with other copies and in other orders; the best few are searched by swaps and by
              exchanges of copies; the best one counts

The fullest device is never fuller than in EPLB's own packing, save where EPLB puts two copies of an expert on
one device and thereby makes one copy fewer of it. E + R slots without such a pair can be fuller: loads
10, 9, 1 on 2 devices with 1 copy are 10 | 9 1 with both halves of the 10 together, and 10 0.5 | 9 0.5 at best.
Tried against a proof by exhaustion on hundreds of small tables: what is fuller is the optimum there.
"""

from __future__ import annotations

import numpy as np

from .copies import count_copies, crowding, device_times, move_copies, replicate

START_BUDGET = 7_000_000  # of all starts together: layers x slots x devices
CHOICES = 64  # of copies that are judged for a layer
COPY_BUDGET = 3_000_000  # exchanged copies looked at per step, times devices, over all layers and starts
ROUNDS = 3
SWAP_BUDGET = 700_000  # pairs of slots looked at per step of the search, over all layers and starts
GOOD_ENOUGH = 2.5e-9  # x L D E: gap to what no placement goes below with which a layer is left alone


def spread(loads, num_devices: int, redundant: int = 0, device_capacity=None, device_speed=None, effort=1.0):
    """bool [L, D, E]: slots spread so that the slowest device of each layer is as quick as can be found.

    loads            [L, E]
    redundant        R; E + R slots are given out, no two copies of an expert to one device
    device_capacity  [D]; most experts of a layer on each device. None: counts differ by at most one
    device_speed     [D]; a device's time is its load over its speed. None: all alike
    effort           share of the usual time spent on layers that do not come out even at once
    """
    loads = np.asarray(loads, dtype=np.float64)
    num_experts = loads.shape[1]
    speed = np.ones(num_devices) if device_speed is None else np.asarray(device_speed, dtype=np.float64)
    capacity = None if device_capacity is None else np.minimum(device_capacity, num_experts).astype(int)
    held = _longest_first(loads, replicate(loads, redundant, num_devices), 1, capacity, speed)
    held = _swap_search(loads, held, capacity, speed)
    time = device_times(loads, held, speed).max(axis=1)
    # Layers that are not yet as good as can be: many more starts, and the best few of them searched.
    enough = (1 + GOOD_ENOUGH * held.size) * _attainable(loads, redundant, capacity, speed)
    layers = np.flatnonzero(time > enough)
    if not len(layers):
        return held
    tried, times = _other_starts(loads[layers], redundant, capacity, speed, effort)
    better = times < time[layers]
    held[layers[better]], time[layers[better]] = tried[better], times[better]
    return held


def _other_starts(loads, redundant, capacity, speed, effort):
    """(held bool [L, D, E], time [L]): the best from many starts with other copies and in other orders."""
    num_layers, num_experts = loads.shape
    num_devices, num_slots = len(speed), num_experts + redundant
    starts = int(np.clip(effort * START_BUDGET // (num_layers * num_slots * num_devices), 4, 1000))
    longest = -(-num_slots // num_devices) if capacity is None else capacity.max()
    few = int(np.clip(effort * SWAP_BUDGET // (num_layers * num_devices * longest**2), 1, starts))
    choices = max(starts, CHOICES) if redundant else starts  # of copies: cheap to judge
    rows = np.arange(num_layers)[:, None]
    many = np.repeat(loads, choices, axis=0)
    noise = np.random.default_rng(0).normal(1, 0.2, many.shape).clip(0.3, 1.7)
    noise **= np.arange(len(many))[:, None] % 4  # none for every fourth
    target = np.linspace(1.1, 0.5, choices) * loads.sum(axis=1, keepdims=True) / speed.sum()
    slots = replicate(many * noise, redundant, num_devices, target.ravel())
    floor = crowding(many, slots, num_devices).reshape(num_layers, choices)
    floor = np.round(floor / floor.min(axis=1, keepdims=True), 2)
    chosen = (rows * choices + np.argsort(floor, axis=1, kind="stable")[:, :starts]).ravel()
    many, slots, noise = many[chosen], slots[chosen], noise[chosen]
    tried = _longest_first(many, slots, noise, capacity, speed)
    times = device_times(many, tried, speed).max(axis=1).reshape(num_layers, starts)
    chosen = np.lexsort((times, np.sort(floor, axis=1)[:, :starts]), axis=1)[:, :few]
    chosen = (rows * starts + chosen).ravel()
    many = many[chosen]
    tried = _swap_search(many, tried[chosen], capacity, speed)
    times = device_times(many, tried, speed).max(axis=1).reshape(num_layers, few)
    if redundant:
        # Of the best, as many as the effort allows are searched further: other copies and swaps in turn.
        some = int(effort * COPY_BUDGET // (num_layers * num_devices**2 * longest * num_experts))
        chosen = (rows * few + np.argsort(times, axis=1)[:, :some]).ravel()
        for _ in range(ROUNDS if len(chosen) else 0):
            tried[chosen] = move_copies(many[chosen], tried[chosen], speed)
            tried[chosen] = _swap_search(many[chosen], tried[chosen], capacity, speed)
        times = device_times(many, tried, speed).max(axis=1).reshape(num_layers, few)
    tried = tried.reshape(num_layers, few, num_devices, num_experts)
    best = times.argmin(axis=1)
    return tried[rows[:, 0], best], times[rows[:, 0], best]


def _attainable(loads, redundant, capacity, speed):
    """[L]; a time that no placement goes below."""
    copies = count_copies(replicate(loads, redundant, len(speed)), loads.shape[1])
    largest = (loads / copies).max(axis=1) / speed.max()
    bound = np.maximum(loads.sum(axis=1) / speed.sum(), largest)
    if redundant == 0 and capacity is None:
        # The hottest expert has company: as many more as a device holds, at best the coldest.
        company = loads.shape[1] // len(speed) - 1
        bound = np.maximum(bound, largest + np.sort(loads, axis=1)[:, :company].sum(axis=1) / speed.max())
    return bound


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
    packings = [spread(groups, num_nodes), _longest_first(groups, every, 1, None, np.ones(num_nodes))]
    tried = np.stack([_spread_nodes(loads, num_devices, redundant, np.repeat(p, size, axis=2)) for p in packings])
    times = np.stack([device_times(loads, held).max(axis=1) for held in tried])
    return tried[times.argmin(axis=0), np.arange(num_layers)]


def _spread_nodes(loads, num_devices, redundant, experts_of):
    """bool [L, D, E], each node's experts, `experts_of` bool [L, nodes, E], inside it."""
    num_nodes = experts_of.shape[1]
    apart = np.repeat(experts_of, num_devices // num_nodes, axis=1)
    ids, local_loads, _ = node_problems(loads, apart, num_nodes)
    local = spread(local_loads, num_devices // num_nodes, redundant // num_nodes)
    return join_nodes(ids, local, apart.shape)


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
    local_loads = loads[np.arange(num_layers)[:, None, None], ids].reshape(num_layers * num_nodes, -1)
    local = np.take_along_axis(held.reshape(num_layers, num_nodes, -1, num_experts), ids[:, :, None], axis=3)
    return ids, local_loads, local.reshape(num_layers * num_nodes, num_devices // num_nodes, -1)


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
    return (
        num_groups % num_nodes == 0
        and num_experts % num_groups == 0
        and num_devices % num_nodes == 0
        and redundant % num_nodes == 0
    )


def _longest_first(loads, slots, noise, capacity, speed):
    """bool [L, D, E] for the experts of slots [L, S]; `noise` [L, E] disturbs the order: other starts.

    Without noise, and where it would put no two copies together, the same as EPLB down to ties.
    """
    num_layers, num_experts = loads.shape
    num_devices, num_slots = len(speed), slots.shape[1]
    rows = np.arange(num_layers)
    share = loads / count_copies(slots, num_experts)
    order = np.take_along_axis(-share * noise, slots, axis=1).argsort(axis=1, kind="stable")
    order = np.take_along_axis(slots, order, axis=1)
    least, extra = divmod(num_slots, num_devices)
    held = np.zeros((num_layers, num_devices, num_experts), dtype=bool)
    load = np.zeros((num_layers, num_devices))
    count = np.zeros((num_layers, num_devices), dtype=np.int64)
    for slot, expert in enumerate(order.T):
        if capacity is None:
            longer = (count > least).sum(axis=1, keepdims=True)
            room = (count < least) | ((count == least) & (longer < extra))
        else:
            room = count < capacity
            empty = count == 0
            must = empty.sum(axis=1, keepdims=True) >= num_slots - slot  # every device is to get one
            room &= empty | ~must
        free = room & ~held[rows, :, expert]
        weight = share[rows, expert]
        device = np.where(free, (load + weight[:, None]) / speed, np.inf).argmin(axis=1)
        stuck = np.flatnonzero(~free.any(axis=1))
        if len(stuck):
            # Only devices that hold this expert have room: such a slot takes another one's copy.
            device[stuck] = room[stuck].argmax(axis=1)
            others = np.where(held[stuck, device[stuck]], -1, share[stuck])
            expert = expert.copy()
            expert[stuck] = others.argmax(axis=1)
            weight = share[rows, expert]
        held[rows, device, expert] = True
        load[rows, device] += weight
        count[rows, device] += 1
    return held


def _slots(held, capacity):
    """int [L, D, C]: expert of each slot; E is a slot left empty, E + 1 one that does not exist."""
    num_layers, num_devices, num_experts = held.shape
    count = held.sum(axis=2)
    longest = int(count.max()) if capacity is None else int(capacity.max())
    ids = np.argsort(~held, axis=2, kind="stable")[..., :longest]
    if longest > num_experts:
        raise AssertionError("a device cannot hold more than all experts")
    ids = np.where(np.arange(longest) < count[..., None], ids, num_experts)
    if capacity is not None:
        ids = np.where(np.arange(longest) < capacity[:, None], ids, num_experts + 1)
    return ids


def swap_search(loads, held, device_speed=None, most_swaps: int | None = None) -> np.ndarray:
    """`held` bool [L, D, E] after at most so many swaps per layer, the best first; counts and copies stay."""
    speed = np.ones(held.shape[1]) if device_speed is None else np.asarray(device_speed, dtype=np.float64)
    return _swap_search(np.asarray(loads, dtype=np.float64), held, None, speed, most_swaps)


def _swap_search(loads, held, capacity, speed, most_swaps=None):
    """Swaps between the slowest device and another one, the best of all each time, until none helps."""
    if len(held) > 64:  # what is looked at in a step should fit a processor's cache
        rows = [slice(start, start + 64) for start in range(0, len(held), 64)]
        return np.concatenate([_swap_search(loads[r], held[r], capacity, speed, most_swaps) for r in rows])
    num_layers, num_devices, num_experts = held.shape
    empty, nowhere = num_experts, num_experts + 1
    slots = _slots(held, capacity)
    longest = slots.shape[2]
    shares = np.zeros((num_layers, num_experts + 2))
    shares[:, :num_experts] = loads / held.sum(axis=1)
    holds = np.zeros((num_layers, num_devices, num_experts + 2), dtype=bool)
    holds[..., :num_experts] = held
    if capacity is None:  # counts may differ by one: an empty slot at most per device
        holds[..., empty] = (slots == empty).any(axis=2)
    weight = np.take_along_axis(shares[:, None], slots, axis=2)  # [L, D, C]
    load = weight.sum(axis=2)
    active = np.arange(num_layers)
    owner = np.repeat(np.arange(num_devices), longest)  # [D C]
    uneven = (speed != speed[0]).any()
    swaps = 0
    while len(active) and swaps != most_swaps:
        swaps += 1
        time = load[active] / speed
        full = time.argmax(axis=1)
        now = time.max(axis=1)
        mine = slots[active, full]  # [n, C]
        theirs = slots[active].reshape(len(active), -1)  # [n, D C]
        give = weight[active, full]
        take = weight[active].reshape(len(active), -1)
        # What each swap comes to, [n, C, D C], in float32: it only picks the swap.
        small = [a.astype(np.float32) for a in (give, take, load[active, full], load[active][:, owner])]
        gain = small[0][:, :, None] - small[1][:, None, :]  # what the slowest device gets rid of
        after = small[3][:, None, :] + gain
        np.subtract(small[2][:, None, None], gain, out=gain)
        if uneven:
            gain /= speed[full].astype(np.float32)[:, None, None]
            after /= speed[owner].astype(np.float32)
        np.maximum(after, gain, out=after)
        # No device may get what it holds, or a slot that is none.
        there = holds[active[:, None], :, mine]  # [n, C, D]
        barred = np.repeat(there, longest, axis=2)
        barred |= (holds[active[:, None], full[:, None], theirs] | (theirs == nowhere))[:, None, :]
        barred |= (mine == nowhere)[:, :, None]
        if capacity is not None:  # a device keeps at least one expert
            last = (mine < empty).sum(axis=1) == 1
            barred |= (last[:, None] & (theirs == empty))[:, None, :]
        after[barred] = np.inf
        after = after.reshape(len(active), -1)
        best = after.argmin(axis=1)
        rows = np.arange(len(active))
        possible = np.isfinite(after[rows, best])
        a, b = np.divmod(best, len(owner))
        moved = give[rows, a] - take[rows, b]
        quicker = (load[active, full] - moved) / speed[full]
        slower = (load[active, owner[b]] + moved) / speed[owner[b]]
        helps = possible & (np.maximum(quicker, slower) < now * (1 - 1e-9))
        active, full, best = active[helps], full[helps], best[helps]
        a, b = np.divmod(best, len(owner))
        other, c = owner[b], b % longest
        one, two = slots[active, full, a], slots[active, other, c]
        delta = weight[active, full, a] - weight[active, other, c]
        slots[active, full, a], slots[active, other, c] = two, one
        weight[active, full, a] -= delta
        weight[active, other, c] += delta
        load[active, full] -= delta
        load[active, other] += delta
        holds[active, full, one] = holds[active, other, two] = False
        holds[active, full, two] = holds[active, other, one] = True
        if capacity is not None:
            holds[..., empty:] = False
    return holds[..., :num_experts].copy()
