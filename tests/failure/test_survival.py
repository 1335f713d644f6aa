"""Losses of devices: counted set by set, copies against the least that any choice needs, and the way back."""

from itertools import combinations, product
from math import comb

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from expert_parallel import Placement, place_experts
from expert_parallel.failure.survival import arrivals, gone, living, protected, repair, survivors, without


def random_held(seed, num_layers, num_devices, num_experts, most_copies):
    """Every expert on 1 to `most_copies` devices, none of which is idle."""
    random = np.random.default_rng(seed)
    held = np.zeros((num_layers, num_devices, num_experts), bool)
    for l, e in np.ndindex(num_layers, num_experts):
        copies = random.integers(1, min(most_copies, num_devices) + 1)
        held[l, random.choice(num_devices, copies, replace=False), e] = True
    for l, d in np.argwhere(~held.any(axis=2)):
        held[l, d, random.integers(num_experts)] = True
    return held


HELD = st.builds(
    random_held, st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(1, 4)
)


def holders_of(held):
    """{(layer, expert): set of devices}, slot by slot."""
    found = {(l, e): set() for l, e in product(range(held.shape[0]), range(held.shape[2]))}
    for l, d, e in product(*map(range, held.shape)):
        if held[l, d, e]:
            found[l, e].add(d)
    return found


def gone_by_hand(held, lost):
    return {key for key, holders in holders_of(held).items() if holders <= set(lost)}


def least_full(counts, amount, open_to):
    """The spread that is left where `amount` slots go one by one to the emptiest of the devices that are open."""
    counts = {d: counts[d] for d in open_to}
    for _ in range(amount):
        counts[min(counts, key=counts.get)] += 1
    return sorted(counts.values())


@given(HELD, st.sets(st.integers(0, 5)))
def test_an_expert_is_gone_with_all_of_its_holders(held, lost):
    lost = [d for d in lost if d < held.shape[1]]
    left = without(held, lost)
    assert not left[:, lost].any() and left.sum() == held.sum() - held[:, lost].sum()
    assert {tuple(place) for place in np.argwhere(gone(held, lost))} == gone_by_hand(held, lost)
    assert np.array_equal(gone(left), gone(held, lost))
    assert np.flatnonzero(living(left)).tolist() == [d for d in range(held.shape[1]) if d not in lost]


@pytest.mark.parametrize("device", [-1, 8])
def test_a_device_that_is_not_there_cannot_be_lost(device):
    held = place_experts(np.ones((1, 8)), 8).held
    for ask in (without, gone, repair):
        with pytest.raises(ValueError, match=f"^device {device} cannot be lost: there are 0 to 7$"):
            ask(held, [0, device])


@settings(max_examples=60)
@given(HELD, st.integers(0, 5))
def test_every_set_of_losses_counted_by_hand(held, already):
    """Also where a device is lost already: then of those that live."""
    if already < held.shape[1] - 1:
        held = without(held, [already])
    alive = [d for d in range(held.shape[1]) if held[:, d].any()]
    found = survivors(held, 3)
    assert [each.lost for each in found] == list(range(1, min(3, len(alive)) + 1))
    for each in found:
        sets = list(combinations(alive, each.lost))
        lost = [gone_by_hand(held, some) for some in sets]
        assert each.sets == len(sets) == comb(len(alive), each.lost)
        assert each.unhurt == pytest.approx(sum(not some for some in lost) / len(sets))
        hurt = [len({l for l, _ in some}) for some in lost]
        assert each.layers_unhurt == pytest.approx(1 - sum(hurt) / len(sets) / len(held))
        assert each.gone_mean == pytest.approx(sum(map(len, lost)) / len(sets))
        assert each.gone_worst == max(map(len, lost)) == len(gone_by_hand(held, each.worst))
        holders = [len(some) for some in holders_of(held).values()]
        one_by_one = [comb(each.lost, c) / comb(len(alive), c) for c in holders]
        assert each.gone_mean == pytest.approx(sum(one_by_one))  # where they lie does not count
        assert each.if_at_random == pytest.approx(np.prod([1 - p for p in one_by_one]))


def test_holders_at_random_survive_as_often_as_is_said():
    random, survived = np.random.default_rng(0), []
    for _ in range(400):
        held = np.zeros((1, 8, 16), bool)
        for e in range(16):
            held[0, random.choice(8, 2, replace=False), e] = True
        found = survivors(held)[1]
        survived.append(found.unhurt)
    assert np.mean(survived) == pytest.approx(found.if_at_random, abs=0.02) and 0.5 < found.if_at_random < 0.6


def test_mirrored_devices_and_spread_copies():
    """Pairs that mirror each other lose much and seldom, spread copies little and nearly always; as much on average."""
    half = place_experts(np.ones((2, 128)), 4).held
    mirrored = survivors(np.concatenate([half, half], axis=1))
    spread = survivors(protected(place_experts(np.ones((2, 128)), 8)).held)
    assert mirrored[0].unhurt == spread[0].unhurt == 1
    assert (mirrored[1].unhurt, mirrored[1].gone_worst) == (24 / 28, 64)
    assert spread[1].unhurt == 0 and spread[1].gone_worst <= 12
    assert mirrored[1].gone_mean == pytest.approx(spread[1].gone_mean) == pytest.approx(2 * 128 / 28)


def test_as_many_sets_as_are_counted_and_no_more(monkeypatch):
    monkeypatch.setattr("expert_parallel.failure.survival.MOST_CELLS", 16)
    for devices, most in ((4, 2), (5, 1)):
        held = place_experts(np.ones((1, 8)), devices).held
        assert len(survivors(held, most)) == most
    with pytest.raises(ValueError, match="^2 losses of 5 devices are 10 sets"):
        survivors(held, 2)


def test_many_devices_and_too_many():
    held = protected(place_experts(np.ones((48, 512)), 128)).held
    assert [each.sets for each in survivors(held, 2)] == [128, 8128]
    with pytest.raises(ValueError, match="^4 losses of 128 devices are 10,668,000 sets: ask for fewer$"):
        survivors(held[:1], 4)


# --- copies -----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(HELD, st.integers(0, 2**32), st.booleans())
def test_one_copy_of_each_that_has_none(held, seed, by_load):
    assume(held.shape[1] > 1)
    loads = np.random.default_rng(seed).integers(0, 50, (held.shape[0], held.shape[2])) if by_load else None
    before = Placement(held, "some", {"about": 1})
    after = protected(before, loads)
    assert (after.strategy, after.metadata) == ("some", {"about": 1})
    assert not (held & ~after.held).any()
    assert np.array_equal(after.copies, np.maximum(before.copies, 2))  # one more, for those alone
    assert survivors(after.held, 1)[0].unhurt == 1
    assert np.array_equal(after.held, protected(before, loads).held)
    for l in range(len(held)):
        even_slots_as_far_as_can_be(held[l], after.held[l])


def even_slots_as_far_as_can_be(held, after):
    """Slots of a layer [D, E] against all ways to give each single expert a second device, by counts alone."""
    singles = [set(np.flatnonzero(held[:, e])) for e in range(held.shape[1]) if held[:, e].sum() == 1]
    reached = {tuple(held.sum(axis=1))}
    for home in singles:
        steps = np.eye(len(held), dtype=int)
        reached = {tuple(np.add(counts, steps[d])) for counts in reached for d in range(len(held)) if d not in home}
    best = min(sum(count * count for count in counts) for counts in reached)  # the most even: none fuller than needed
    assert tuple(after.sum(axis=1)) in reached and (after.sum(axis=1) ** 2).sum() == best


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(2, 3), st.integers(1, 3))
def test_no_fewer_copies_would_do(seed, num_devices, num_experts):
    """All sets of further slots of tiny placements, by brute force."""
    held = random_held(seed, 1, num_devices, num_experts, 2)
    added = int(protected(Placement(held)).held.sum() - held.sum())
    free = np.argwhere(~held[0])
    for fewer in range(added):
        for some in combinations(free, fewer):
            tried = held.copy()
            for d, e in some:
                tried[0, d, e] = True
            assert any(gone_by_hand(tried, [d]) for d in range(num_devices))


@pytest.mark.parametrize(("devices", "experts"), [(2, 2), (2, 7), (3, 8), (8, 128), (7, 128), (16, 16), (5, 60)])
def test_even_devices_stay_even(devices, experts):
    """Twice as many slots, differing by one at most; over all layers also the sums."""
    loads = np.random.default_rng(devices).integers(1, 100, (devices, experts))
    slots = protected(place_experts(loads, devices, "balanced"), loads).held.sum(axis=2)
    assert (slots.sum(axis=1) == 2 * experts).all() and np.ptp(slots, axis=1).max() <= 1


def after_worst_loss(held, loads):
    """Balancedness of the survivors after the loss that leaves them least even, mean over layers; by plain loops."""
    found = []
    for layer, load in zip(held, loads, strict=True):
        worst = 1
        for lost in range(len(layer)):
            of_device = dict.fromkeys(set(range(len(layer))) - {lost}, 0.0)
            for e in range(len(load)):
                holders = [d for d in of_device if layer[d, e]]
                for d in holders:
                    of_device[d] += load[e] / len(holders)
            worst = min(worst, sum(of_device.values()) / len(of_device) / max(of_device.values()))
        found.append(worst)
    return np.mean(found)


@pytest.mark.parametrize(("strategy", "exponent"), [("contiguous", 0.6), ("balanced", 0.6), ("balanced", 1.2)])
def test_survivors_are_more_even_than_with_a_neighbours_copies(strategy, exponent):
    """The neighbour takes all of a lost device; copies that are spread come near to what the hottest expert lets be."""
    random = np.random.default_rng(0)
    loads = np.stack([random.permutation(1e4 / np.arange(1, 129) ** exponent) for _ in range(4)])
    placement = place_experts(loads, 8, strategy)
    neighbours = placement.held | np.roll(placement.held, 1, axis=1)
    spread, naive = (after_worst_loss(held, loads) for held in (protected(placement, loads).held, neighbours))
    hottest = np.minimum(1, loads.sum(axis=1) / 7 / loads.max(axis=1)).mean()  # alone on a device, after a loss
    assert naive + 0.02 < spread < hottest and spread > 0.8 * hottest
    before, after = (each.device_loads(loads).max(axis=1) for each in (placement, protected(placement, loads)))
    assert (after <= 1.1 * before).all()  # while nothing is lost, nobody has much more than without copies


def test_copies_stay_in_nodes_of_several_devices():
    loads = np.random.default_rng(1).integers(1, 100, (3, 16))
    in_nodes = place_experts(loads, 4, "balanced", num_nodes=2, num_groups=2)
    after = protected(in_nodes, loads)
    assert after.metadata["num_nodes"] == 2 and survivors(after.held, 1)[0].unhurt == 1
    assert not (after.held[:, :2].any(axis=1) & after.held[:, 2:].any(axis=1)).any()
    alone = protected(
        place_experts(loads, 2, "balanced", num_nodes=2, num_groups=2), loads
    )  # a device is a node: copies must leave
    assert "num_nodes" not in alone.metadata and alone.held.all()


def dealt_by_hand(held, wanted, loads, alive):
    """One layer at a time, one expert after the other, with lists: what dealing.py does to all layers at once."""
    held, given = held.tolist(), 0
    for l, layer in enumerate(held):
        devices, experts = range(len(layer)), range(len(layer[0]))
        holders = [{d for d in devices if layer[d][e]} for e in experts]
        todo = sorted((e for e in experts if wanted[l][e]), key=lambda e: -loads[l][e])
        # 1. Rooms: one slot after the other to the emptiest; of equals to the one whose turn it is.
        most = {d: sum(d not in holders[e] for e in todo) for d in devices if alive[d]}
        slots, rooms = {d: sum(layer[d]) for d in most}, dict.fromkeys(most, 0)
        in_turn = list(most)[given % len(most) :] + list(most)[: given % len(most)]
        for _ in todo:
            d = min((d for d in in_turn if rooms[d] < most[d]), key=lambda d: slots[d] + rooms[d])
            rooms[d] += 1
        given += len(todo)
        # 2. Experts: to where the worst that any one loss could leave of the device is least.
        final = [max(1, len(holders[e]) + bool(wanted[l][e])) for e in experts]
        for n, e in enumerate(todo):
            rest = todo[n:]
            open_to = [d for d in rooms if rooms[d] and d not in holders[e]]
            must = [d for d in open_to if rooms[d] == sum(d not in holders[other] for other in rest)]
            found = []
            for d in must or open_to:
                mine = [o for o in experts if o != e and d in holders[o]]
                load = sum(loads[l][o] / final[o] for o in mine) + loads[l][e] / final[e]
                extra = [
                    sum(loads[l][o] / final[o] / (len(holders[o]) - 1) for o in mine if lost in holders[o])
                    + (loads[l][e] / final[e] if lost in holders[e] else 0)
                    for lost in devices
                    if lost != d
                ]
                found.append((load + max(extra, default=0), d))
            _, d = min(found)
            holders[e] = holders[e] | {d}
            layer[d][e] = True
            rooms[d] -= 1
    return np.array(held)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(2, 5), st.integers(5, 14), st.integers(1, 5))
def test_copies_are_dealt_as_by_hand(seed, num_devices, num_experts, most_copies):
    held = random_held(seed, 6, num_devices, num_experts, most_copies)
    loads = np.random.default_rng(seed).lognormal(sigma=1.5, size=(6, num_experts))
    alive, singles = [True] * num_devices, held.sum(axis=1) == 1
    assert np.array_equal(protected(Placement(held), loads).held, dealt_by_hand(held, singles, loads, alive))
    left = without(held, [seed % num_devices])
    alive = left.any(axis=(0, 2))
    expected = dealt_by_hand(left, ~left.any(axis=1), loads, alive)
    assert np.array_equal(repair(held, [seed % num_devices], loads), expected)


def test_devices_are_even_over_all_layers_too():
    """13 experts on 5 devices: of 26 slots one device has 6, another one from layer to layer."""
    slots = protected(place_experts(np.ones((10, 13)), 5, "round-robin")).held.sum(axis=2)
    assert np.ptp(slots, axis=1).max() == 1
    lost = repair(np.repeat(np.eye(8, dtype=bool)[None], 14, axis=0), [3]).sum(axis=(0, 2))
    assert np.delete(lost, 3).tolist() == [16] * 7  # 14 experts of as many layers on 7 devices


def test_losses_are_one_and_two_where_nothing_is_said():
    assert [each.lost for each in survivors(np.ones((1, 3, 2), bool))] == [1, 2]


def test_what_cannot_be_protected():
    with pytest.raises(ValueError, match="^1 device: a copy that outlives it needs another one, take at least 2"):
        protected(place_experts(np.ones((1, 4)), 1))
    with pytest.raises(ValueError, match=r"^loads are \[1, 5\], the placement is for \[1, 4\] \[layers, experts\]$"):
        protected(place_experts(np.ones((1, 4)), 2), np.ones((1, 5)))


# --- the way back ------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(HELD, st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True), st.integers(0, 2**32))
def test_what_is_gone_comes_back_on_the_survivors(held, losses, seed):
    losses = [d for d in losses if d < held.shape[1]]
    loads = np.random.default_rng(seed).integers(0, 50, (held.shape[0], held.shape[2]))
    now = held
    for n, lost in enumerate(losses):  # one after the other
        alive = sorted(set(range(held.shape[1])) - set(losses[: n + 1]))
        if not alive:
            with pytest.raises(ValueError, match=f"^all {held.shape[1]} devices are lost: none is left"):
                repair(now, [lost], loads)
            return
        missing, left = gone_by_hand(now, [lost]), without(now, [lost])
        after = repair(now, [lost], loads)
        assert np.array_equal(after, repair(now, losses[: n + 1], loads))  # earlier ones may be named again
        assert not (left & ~after).any() and after.any(axis=1).all()
        assert {(l, e) for l, _, e in np.argwhere(after & ~left)} == missing and (after & ~left).sum() == len(missing)
        assert np.flatnonzero(living(after)).tolist() == alive
        for l in range(len(held)):
            wanted = sum(layer == l for layer, _ in missing)
            assert sorted(after[l, alive].sum(axis=1)) == least_full(left[l].sum(axis=1), wanted, alive)
        read = arrivals(left, after, 10, 5)
        assert read.experts.tolist() == [int((after & ~left)[:, d].sum()) for d in range(held.shape[1])]
        assert read.bytes == 10 * len(missing)
        assert (read.side_by_side, read.in_turn) == (2 * max(read.experts), 2 * len(missing))
        now = after


def test_what_comes_back_is_level():
    """16 experts of a lost device on 7 others: by load, and no device reads more than another by more than one."""
    loads = np.random.default_rng(0).lognormal(size=(48, 128))
    held = place_experts(loads, 8, "balanced").held
    after, alike = repair(held, [3], loads), repair(held, [3])
    evenness = []
    for each in (after, alike):
        slots = each.sum(axis=2)
        assert (slots[:, 3] == 0).all() and np.ptp(np.delete(slots, 3, axis=1), axis=1).max() <= 1
        assert np.ptp(np.delete(arrivals(held, each, 1, 1).experts, 3)) <= 1  # over all layers
        load = np.delete(np.matmul(each, loads[..., None])[..., 0], 3, axis=1)
        evenness.append((load.mean(axis=1) / load.max(axis=1)).mean())
    coldest = np.delete(np.matmul(without(held, [3]), loads[..., None])[..., 0], 3, axis=1).min(axis=1)
    fullest = np.maximum(
        loads.sum(axis=1) / 7, coldest + (loads * held[:, 3]).max(axis=1)
    )  # the hottest goes somewhere
    bound = (loads.sum(axis=1) / 7 / fullest).mean()
    assert bound - 0.02 < evenness[0] <= bound and evenness[1] < bound - 0.04


def test_a_protected_placement_needs_nothing_after_one_loss():
    held = protected(place_experts(np.ones((2, 16)), 4)).held
    for lost in range(4):
        assert np.array_equal(repair(held, [lost]), without(held, [lost]))
