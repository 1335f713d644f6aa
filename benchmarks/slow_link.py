"""A slow link on one machine: real bytes between real ranks, delayed on purpose. No root, nothing to install.

    python benchmarks/slow_link.py --latency 5 --bandwidth 125 -- qwen3_expert_parallel.py --overlap 64
        2 ranks over MLX's ring, whose messages take 5 ms one way at 125 MB/s (1 Gbit/s)

Each rank of a ring listens for its left neighbour and connects to its right one. Every rank gets a hostfile of its own,
in which its right neighbour's address is that of a proxy here. What two ranks send each other in one direction shares
one line, over however many connections, as over one cable: a chunk enters when the one before it is through, takes its
size over the bandwidth, and arrives a latency later. The proxy itself costs some CPU time and about a tenth of a
millisecond for each message, also where it is to delay nothing.
"""

import argparse
import contextlib
import json
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from expert_parallel.ranks.launch import rank_commands

CHUNK = 1 << 16  # bytes


class Line:
    """One direction between two ranks; `latency` in seconds and `bandwidth` in B/s may change while it is in use."""

    def __init__(self, latency: float = 0.0, bandwidth: float = float("inf")):
        self.latency, self.bandwidth = latency, bandwidth
        self._free, self._lock = 0.0, threading.Lock()

    def due(self, size: int) -> float:
        """When so many bytes that enter now are at the other end, on time.monotonic's clock."""
        with self._lock:
            self._free = max(time.monotonic(), self._free) + size / self.bandwidth
            return self._free + self.latency

    def carry(self, source: socket.socket, target: socket.socket) -> None:
        """All that comes out of one socket into another, until an end closes; two threads, so that chunks follow."""
        under_way = queue.Queue(256)

        def deliver():
            with contextlib.suppress(OSError):
                while (item := under_way.get())[0]:
                    time.sleep(max(item[1] - time.monotonic(), 0))
                    target.sendall(item[0])
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)
            while under_way.get_nowait() if not under_way.empty() else None:
                pass  # a reader that waits for room may end

        def read():
            data = b"."
            while data:
                try:
                    data = source.recv(CHUNK)
                except OSError:
                    data = b""
                under_way.put((data, self.due(len(data))))

        for work in (deliver, read):
            threading.Thread(target=work, daemon=True).start()


def proxy(target: tuple[str, int], there: Line, back: Line) -> tuple[str, int]:
    """The address of a proxy for `target`: what comes in goes over the line `there`, answers over `back`."""
    server = socket.create_server(("127.0.0.1", 0))

    def join(near):
        while True:  # who is behind it may not listen yet
            with contextlib.suppress(ConnectionRefusedError):
                far = socket.create_connection(target)
                break
            time.sleep(0.05)
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        there.carry(near, far)
        back.carry(far, near)

    def serve():
        while True:
            threading.Thread(target=join, args=server.accept()[:1], daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return server.getsockname()


def slow_ring(num_ranks: int, command: list[str], folder: Path) -> tuple[list[tuple[list[str], dict]], list[Line]]:
    """(command, environment) of every rank to start, as `rank_commands` gives them, and the lines between them."""
    ranks = rank_commands("ring", num_ranks, command, folder)
    hosts = json.loads((folder / "hosts.json").read_text())
    lines = {(r, (r + way) % num_ranks): Line() for r in range(num_ranks) for way in (1, -1)}
    for r, (_, environment) in enumerate(ranks):
        right = (r + 1) % num_ranks
        host, port = hosts[right][0].rsplit(":", 1)
        near, far = proxy((host, int(port)), lines[r, right], lines[right, r])
        seen = [*hosts[:right], [f"{near}:{far}"], *hosts[right + 1 :]]
        own = folder / f"hosts-{r}.json"
        own.write_text(json.dumps(seen))
        environment["MLX_HOSTFILE"] = str(own)
    return ranks, list(lines.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--latency", type=float, default=1.0, help="ms, one way (default: 1)")
    parser.add_argument("--bandwidth", type=float, default=125.0, help="MB/s (default: 125, 1 Gbit/s)")
    parser.add_argument("script", nargs="+", help="and its options, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ranks, lines = slow_ring(args.ranks, [sys.executable, *args.script], Path(folder))
        for line in lines:
            line.latency, line.bandwidth = args.latency / 1e3, args.bandwidth * 1e6
        processes = [subprocess.Popen(command, env=environment) for command, environment in ranks]
        try:
            sys.exit(max(process.wait() for process in processes))
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    main()
