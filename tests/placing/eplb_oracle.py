"""The Expert Parallelism Load Balancer of DeepSeek, as its description has it: an oracle, not for use.

    groups to nodes    by load, largest first, each to the lightest node with room
    copies in a node   again and again of the expert with the largest load per copy
    copies to GPUs     as groups to nodes; nothing keeps two copies of an expert apart
If the groups do not divide over the nodes, all is one node with one group.
Source: https://github.com/deepseek-ai/EPLB, README; ties go to the first.
"""

import numpy as np


def rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus):
    """(phy2log [L, replicas], logcnt [L, E])"""
    weight = np.asarray(weight, dtype=np.float64)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    pairs = [_one_layer(row, num_replicas, num_groups, num_nodes, num_gpus) for row in weight]
    return np.array([phy2log for phy2log, _ in pairs]), np.array([logcnt for _, logcnt in pairs])


def _one_layer(weight, num_replicas, num_groups, num_nodes, num_gpus):
    size = len(weight) // num_groups
    experts_of_group = np.arange(len(weight)).reshape(num_groups, size)
    phy2log, logcnt = [], np.zeros(len(weight), dtype=int)
    for groups in _pack(weight.reshape(num_groups, size).sum(axis=1), num_nodes):
        experts = experts_of_group[groups].ravel()
        copies, count = _replicate(weight[experts], num_replicas // num_nodes)
        logcnt[experts] = count
        share = (weight[experts] / count)[copies]
        for slots in _pack(share, num_gpus // num_nodes):
            phy2log += experts[copies[slots]].tolist()
    return phy2log, logcnt


def _replicate(weight, num_copies):
    """(expert of each copy, copies of each expert)"""
    copies, count = list(range(len(weight))), np.ones(len(weight), dtype=int)
    while len(copies) < num_copies:
        expert = int((weight / count).argmax())
        copies.append(expert)
        count[expert] += 1
    return np.array(copies), count


def _pack(weight, num_packs):
    """Items of each pack in the order in which they came, as many in each."""
    room = len(weight) // num_packs
    if room == 1:
        return [[item] for item in range(num_packs)]
    packs, load = [[] for _ in range(num_packs)], np.zeros(num_packs)
    for item in np.argsort(-weight, kind="stable"):
        pack = min((p for p in range(num_packs) if len(packs[p]) < room), key=lambda p: load[p])
        packs[pack].append(item)
        load[pack] += weight[item]
    return packs
