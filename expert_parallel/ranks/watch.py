"""The process beside a rank that ends it when nothing else can: python -I -S watch.py NAME RANK_PID HOST

A collective whose peer is gone can block inside the library, where no Python signal handler of the rank runs. So this
process, which imports nothing but the standard library, ends the rank, with one line on standard error

    when the time that the rank allowed for its present step is over, or it has been stopped (SIGSTOP) for as long,
    when another rank's process is gone: these processes hold connections to that of rank 0,
    when the launcher ends the run.

It stays until the rank's process is gone, even after "bye": an MPI rank still waits for others in its last moments.

Standard input, from the rank, whose end is the rank's:
    token T                  what others say to be believed; not on a command line, which every user can read
    limit SECONDS MESSAGE    end the rank with MESSAGE unless told otherwise in time; 0 stops the clock
    join HOST PORT T         hold a connection to the process beside rank 0
    hush                     answered with "ok": from now on the rank says its own last line
    bye                      all is well: others may go
Standard output: the port on HOST where others join, 0 where HOST is "", as nobody joins this rank.
"""

import asyncio
import contextlib
import hmac
import os
import select
import signal
import socket
import sys

PATIENCE = 5  # seconds for a stranger to say the token, and for a join
STRANGERS = 32  # at a time; one more sends the oldest away
WORDS = 2  # seconds for a rank that says its last line itself
LOOK = 1  # seconds between looks at the state of a rank that has no time limit
TROUBLES = (OSError, EOFError, asyncio.TimeoutError)


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal (not by a debugger)."""
    if os.path.isdir("/proc/self"):  # noqa: PTH112, pathlib takes longer to import than this takes to run
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] == "T"
        return False
    return os.popen(f"ps -o state= -p {pid}").read().startswith("T")


class Watch:
    def __init__(self, name: str, rank_pid: int):
        self.name, self.rank_pid, self.pending = name, rank_pid, b""
        self.token = os.urandom(16)  # until the rank has told one
        self.clock, self.seconds = None, 300.0  # the time limit that runs; the last that was set
        self.stopped = 0.0  # seconds
        self.hushed = self.leaving = False
        self.strangers, self.peers = [], []  # writers of connections
        self.joining = None

    async def run(self, host: str) -> None:
        loop = asyncio.get_running_loop()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ended = "stopped by the launcher: another rank failed or the run was ended"
        loop.add_signal_handler(signal.SIGTERM, self.end, ended)
        loop.add_reader(0, self.hear_rank)
        port = 0
        if host:
            try:
                server = socket.create_server((host, 0))
            except OSError:  # no address of this machine: MLX says so when it meets the others
                server = socket.create_server(("127.0.0.1", 0))
            port = server.getsockname()[1]
            await asyncio.start_server(self.welcome, sock=server, backlog=STRANGERS)
        print(port, flush=True)
        while True:
            await asyncio.sleep(LOOK)
            self.stopped = self.stopped + LOOK if self.clock is None and is_stopped(self.rank_pid) else 0.0
            if self.stopped > self.seconds:
                self.end(f"its process was stopped by a signal for {self.seconds:g} s (--timeout)")

    def hear_rank(self) -> None:
        data = os.read(0, 1 << 16)
        if not data:  # the rank is gone; its peers learn it from the closed connections, unless it said bye
            os._exit(0)
        *lines, self.pending = (self.pending + data).split(b"\n")
        for line in lines:
            command, _, rest = line.decode().partition(" ")
            if command == "token":
                self.token = rest.encode()
            elif command == "limit":
                self.limit(*rest.split(" ", 1))
            elif command == "join":
                self.joining = asyncio.ensure_future(self.join(*rest.split()))
            elif command == "hush":
                self.hushed = True
                print("ok", flush=True)
            elif command == "bye":
                self.limit("0", "")
                self.leaving = True
                for peer in self.peers:
                    peer.write(b"bye")

    def limit(self, seconds: str, message: str) -> None:
        if self.clock:
            self.clock.cancel()
        self.seconds = float(seconds) or self.seconds
        self.clock = asyncio.get_running_loop().call_later(self.seconds, self.end, message) if float(seconds) else None

    async def welcome(self, reader, writer) -> None:
        """Who says the token in time is a peer; all others are sent away, and hold nobody up."""
        if len(self.strangers) >= STRANGERS:
            self.strangers.pop(0).close()
        self.strangers.append(writer)
        try:
            said = await asyncio.wait_for(reader.readexactly(len(self.token)), PATIENCE)
            if hmac.compare_digest(said, self.token) and writer in self.strangers:
                self.strangers.remove(writer)
                writer.write(b"ok")
                await self.follow(reader, writer)
        except TROUBLES:
            pass
        finally:
            if writer in self.strangers:
                self.strangers.remove(writer)
            writer.close()

    async def join(self, host: str, port: str, token: str) -> None:
        """Several tries, as strangers can crowd one out; where a firewall is between, the time limit is left."""
        for _ in range(PATIENCE):
            with contextlib.suppress(*TROUBLES):
                reader, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), PATIENCE)
                writer.write(token.encode())
                if await asyncio.wait_for(reader.readexactly(2), PATIENCE) == b"ok":
                    await self.follow(reader, writer)
                    return
            await asyncio.sleep(1)

    async def follow(self, reader, writer) -> None:
        """Until the other rank says bye, or its process is gone."""
        self.peers.append(writer)
        if self.leaving:
            writer.write(b"bye")
        word = b""
        with contextlib.suppress(OSError):
            word = await reader.read(3)
        self.peers.remove(writer)
        if not word and not self.leaving:
            self.end("lost another rank: its process was ended or crashed")

    def end(self, why: str) -> None:
        """One line, then the rank's end: in its own way first, by force where it cannot hear.

        A rank that has said "hush" is about to say its line and to go; ended in between it would leave none at all.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one line is enough
        if not self.hushed:
            with contextlib.suppress(OSError):
                if select.select([], [2], [], 1)[1]:  # perhaps nobody reads it
                    os.write(2, f"\n{self.name}{why}\n".encode())
        waits = [(0, WORDS)] if self.hushed else []  # signal 0 does nothing
        for how, seconds in (*waits, (signal.SIGQUIT, 0), (signal.SIGCONT, 2), (signal.SIGKILL, 0)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.rank_pid, how)
            while select.select([0], [], [], seconds)[0]:
                if not os.read(0, 1 << 16):  # the rank is gone
                    os._exit(0)
        os._exit(0)


if __name__ == "__main__":
    asyncio.run(Watch(sys.argv[1], int(sys.argv[2])).run(sys.argv[3]))
