"""Where local ranks listen."""

import json
import random
import socket

import pytest

from expert_parallel.ranks.launch import free_ports, rank_commands


@pytest.fixture
def tried(monkeypatch):
    """Ports in the order in which they are tried: the first is taken; the others are as drawn."""
    tried, draw = [], random.SystemRandom.sample

    def sample(self, ports, count):
        assert len(set(drawn := draw(self, ports, count))) == count > 2
        tried.extend(drawn)
        taken.bind(("127.0.0.1", tried[0]))
        taken.listen()
        return drawn

    monkeypatch.setattr(random.SystemRandom, "sample", sample)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield tried


def test_ports_that_nobody_has_and_no_outgoing_connection_takes(tried, tmp_path):
    """Linux gives those from 32768 on to outgoing connections: one lasts from the choice until a rank listens."""
    commands = rank_commands("ring", 3, ["x"], tmp_path)
    hosts = [host for (host,) in json.loads((tmp_path / "hosts.json").read_text())]
    ports = [int(host.removeprefix("127.0.0.1:")) for host in hosts]
    assert len(set(ports)) == 3 and tried[0] not in ports and set(ports) < set(tried)
    assert all(1024 <= port < 32768 for port in ports)
    assert [environment["MLX_RANK"] for _, environment in commands] == ["0", "1", "2"]
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()  # they are free again


def test_a_machine_that_lets_nobody_listen(monkeypatch):
    def refused(address):
        raise PermissionError

    monkeypatch.setattr(socket, "create_server", refused)
    with pytest.raises(ValueError, match="^of ports 20000 to 32767 not even 2 could be listened at$"):
        free_ports(2)
