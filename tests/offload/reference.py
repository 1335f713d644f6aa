"""Caches again, by lists and plain loops: no code is shared with the package."""


def distinct(step):
    return sorted({int(expert) for expert in step})


def lru_hits(steps, room):
    """Hits of each step of a least-recently-used cache, for steps that want at most `room`."""
    recent, hits = [], []  # the one used longest ago first
    for step in map(distinct, steps):
        hits.append(sum(expert in recent for expert in step))
        recent = [expert for expert in recent if expert not in step]
        recent = recent[max(0, len(recent) + len(step) - room) :] + step
    return hits


def counting_hits(steps, room, halved=None):
    """As above, the least used goes, counts halving every so many steps; equals: used longest ago, then lowest."""
    here, count, last, hits = set(), {}, {}, []
    for now, step in enumerate(map(distinct, steps)):
        hits.append(sum(expert in here for expert in step))
        if halved:
            count = {expert: uses * 0.5 ** (1 / halved) for expert, uses in count.items()}
        for expert in step:
            count[expert], last[expert] = count.get(expert, 0) + 1, now
        come = [expert for expert in step if expert not in here]
        others = sorted(here - set(step), key=lambda expert: (count[expert], last[expert], expert))
        here = set(others[max(0, len(others) + len(here & set(step)) + len(come) - room) :]) | set(step)
    return hits


def fewest_misses(steps, room):
    """The least misses that any choice of who goes can have, by trying all of them."""
    from itertools import combinations

    states = {frozenset(): 0}
    for step in map(frozenset, steps):
        after = {}
        for here, misses in states.items():
            misses += len(step - here)
            others = here - step
            for stay in range(max(0, min(len(others), room - len(step))) + 1):
                for kept in combinations(sorted(others), stay):
                    state = step | frozenset(kept)
                    after[state] = min(after.get(state, misses), misses)
        states = after
    return min(states.values())
