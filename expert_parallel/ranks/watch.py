"""The process beside a rank that ends it when nothing else can: python watch.py NAME RANK_PID HOST, told by lines.

A collective whose peer is gone can block inside the library, where no Python thread or signal handler of the rank runs.
So this process, which runs by itself, ends the rank, with one line on standard error

    when the time that the rank allowed for its present step is over,
    when another rank's process is gone: these processes hold connections to that of rank 0,
    when the launcher ends the run.

Standard input, from the rank: "token T", "limit SECONDS MESSAGE" (0: none), "join HOST PORT TOKEN", "bye"; its end
means that the rank is gone. Standard output, once: the port on HOST where others join. Who joins says T first; who
does not within some seconds, or says another, is sent away, and holds nobody up.
"""

import contextlib
import hmac
import os
import select
import signal
import socket
import sys
import time

PATIENCE = 5  # seconds for a stranger to say the token
STRANGERS = 256  # at a time
STOPPED = "stopped by the launcher: another rank failed or the run was ended"


class Watch:
    def __init__(self, name: str, rank_pid: int, host: str):
        self.name, self.rank_pid, self.token = name, rank_pid, None
        self.deadline, self.message = None, ""
        self.peers, self.strangers = [], {}  # strangers: socket -> (what it said, until when it may say more)
        self.done, self.pending = False, b""
        self.server = socket.create_server((host, 0), backlog=128)
        print(self.server.getsockname()[1], flush=True)

    def run(self):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: self.end(STOPPED))
        while not self.done:
            now = time.monotonic()
            if self.deadline is not None and now >= self.deadline:
                self.end(self.message)
            for stranger in [s for s, (_, until) in self.strangers.items() if now >= until]:
                self.send_away(stranger)
            times = [until for _, until in self.strangers.values()] + [self.deadline] * (self.deadline is not None)
            wait = max(min(times) - now, 0) if times else None
            for source in select.select([0, self.server, *self.peers, *self.strangers], [], [], wait)[0]:
                self.hear(source)

    def hear(self, source):
        if source == 0:
            self.hear_rank()
        elif source is self.server:
            stranger = source.accept()[0]
            stranger.setblocking(False)
            if len(self.strangers) >= STRANGERS:
                stranger.close()
            else:
                self.strangers[stranger] = (b"", time.monotonic() + PATIENCE)
        elif source in self.strangers:
            said, until = self.strangers[source]
            said += self.read(source)
            if self.token and len(said) >= len(self.token):
                del self.strangers[source]
                known = hmac.compare_digest(said[: len(self.token)], self.token)
                self.peers.append(source) if known else source.close()
            elif said == self.strangers[source][0]:  # closed
                self.send_away(source)
            else:
                self.strangers[source] = (said, until)
        else:
            word = self.read(source)
            self.peers.remove(source)
            if not word and not self.done:
                self.end("lost another rank: its process was ended or crashed")

    def hear_rank(self):
        data = os.read(0, 1 << 16)
        self.done = self.done or not data  # the rank was killed: its peers learn it from the closed connections
        *lines, self.pending = (self.pending + data).split(b"\n")
        for line in lines:
            command, _, rest = line.decode().partition(" ")
            if command == "token":
                self.token = rest.encode()
            elif command == "limit":
                seconds, _, self.message = rest.partition(" ")
                self.deadline = time.monotonic() + float(seconds) if float(seconds) else None
            elif command == "join":
                self.join(*rest.split())
            elif command == "bye":
                self.done = True
                for peer in self.peers:
                    self.say(peer, b"bye")

    def join(self, host, port, token):
        try:
            peer = socket.create_connection((host, int(port)), timeout=5)
        except OSError:
            return  # a firewall between: the time limit is left
        peer.settimeout(None)
        self.say(peer, token.encode())
        self.peers.append(peer)

    def end(self, why):
        """One line, then the rank's end: in its own way first, for a rank that is stopped or deaf by force."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one line is enough
        sys.stderr.write(f"\n{self.name}{why}\n")
        sys.stderr.flush()
        for how, seconds in ((signal.SIGQUIT, 2), (signal.SIGKILL, 0)):
            try:
                os.kill(self.rank_pid, how)
            except ProcessLookupError:
                break
            while select.select([0], [], [], seconds)[0]:
                if not os.read(0, 1 << 16):  # the rank is gone
                    os._exit(0)
        os._exit(0)

    def send_away(self, stranger):
        del self.strangers[stranger]
        stranger.close()

    def read(self, source):
        try:
            return source.recv(256)
        except OSError:
            return b""

    def say(self, peer, word):
        with contextlib.suppress(OSError):
            peer.sendall(word)


if __name__ == "__main__":
    Watch(sys.argv[1], int(sys.argv[2]), sys.argv[3]).run()
