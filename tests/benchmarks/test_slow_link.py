"""The slow link: bytes as they were, no sooner and not much later than asked for, one line for both connections."""

import importlib
import json
import socket
import threading
import time

import numpy as np
import pytest
from conftest import ROOT


@pytest.fixture
def link(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("slow_link")


def connected(link, there, back):
    """(near end, far end) of a connection through a proxy; the far one listens only after the near one has come."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
    near = socket.create_connection(link.proxy(address, there, back))
    with socket.create_server(address) as listening:
        far, _ = listening.accept()
    near.settimeout(20), far.settimeout(20)
    return near, far


def received(end, size):
    data = b""
    while len(data) < size:
        data += end.recv(1 << 20)
    return data


def test_bytes_go_both_ways_unchanged_and_an_end_that_closes_closes_the_other(link):
    near, far = connected(link, link.Line(0.01, 50e6), link.Line())
    data = np.random.default_rng(0).bytes(3_000_001)
    for one, other in ((near, far), (far, near)):
        threading.Thread(target=one.sendall, args=(data,)).start()
        assert received(other, len(data)) == data
    near.close()
    assert far.recv(1) == b""


def test_a_message_takes_the_latency_and_its_size_over_the_bandwidth(link):
    there, back = link.Line(), link.Line()
    near, far = connected(link, there, back)

    def seconds(size):
        begin = time.monotonic()
        near.sendall(bytes(size))
        received(far, size)
        far.sendall(b".")
        received(near, 1)
        return time.monotonic() - begin

    without = min(seconds(1) for _ in range(5))
    there.latency, back.latency = 0.05, 0.03
    assert 0.08 <= min(seconds(1) for _ in range(5)) < 0.08 + without + 0.02
    there.bandwidth = 10e6
    assert 0.18 <= min(seconds(1_000_000) for _ in range(3)) < 0.18 + without + 0.08


def test_two_connections_share_a_line(link):
    there, back = link.Line(0, 10e6), link.Line()
    pairs = [connected(link, there, back) for _ in range(2)]
    begin = time.monotonic()
    for near, _ in pairs:
        near.sendall(bytes(500_000))
    for _, far in pairs:
        received(far, 500_000)
    assert time.monotonic() - begin >= 0.1


def test_every_rank_sees_its_right_neighbour_through_a_proxy_and_two_ranks_have_two_lines(link, tmp_path):
    for ranks, lines in ((2, 2), (3, 6)):
        started, between = link.slow_ring(ranks, ["true"], tmp_path)
        hosts = json.loads((tmp_path / "hosts.json").read_text())
        assert len(between) == lines
        for r, (_, environment) in enumerate(started):
            with open(environment["MLX_HOSTFILE"]) as file:  # noqa: PTH123
                seen = json.load(file)
            assert [host for host in range(ranks) if seen[host] != hosts[host]] == [(r + 1) % ranks]
