"""Turns: processes that are alive at once and idle, but for those that a file in a folder asks.

A worker reads turns and answers them; the one who asks waits for each answer before the next turn.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from expert_parallel.files import written_whole
from expert_parallel.ranks.launch import rank_commands


def read_turn(folder, number, parent):
    """The turn of this number once it is there; None at the end, or when the one who asks is gone."""
    path = folder / f"turn-{number}.json"
    while not path.exists():
        time.sleep(0.005)
        if not Path(f"/proc/{parent}").exists() and Path("/proc").exists():
            return None
    return json.loads(path.read_text())


def answer(args, group, number, value):
    if group.rank() == 0:
        write(args.folder / f"answer-{args.worker}-{number}.json", value)


def write(path, value):
    with written_whole(path) as file:
        json.dump(value, file)


def answer_to(folder, backend, number, timeout, processes):
    """What a backend answers to the turn of this number; ValueError where one of [(process, its log)] ends first."""
    path, end = folder / f"answer-{backend}-{number}.json", time.monotonic() + timeout
    while not path.exists():
        time.sleep(0.01)
        for process, log in processes:
            if process.poll() is not None:
                words = log.read_text().strip().splitlines() or ["no message"]
                raise ValueError(f"a process of {log.stem} ended: {words[-1]}")
        if time.monotonic() > end:
            raise ValueError(f"{backend} did not answer within {timeout:g} s (--timeout)")
    return json.loads(path.read_text())


class Workers:
    """Processes of every backend, started together; `ask` gives one of them its turn.

    script, same  that each of them runs, and the options that all of them get
    """

    def __init__(self, args, variants, script, same):
        self.timeout, self.turns, self.processes = args.timeout, 0, []
        self.stack = contextlib.ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.stack.callback(self.stop)
        self.started = {}
        for backend, names in variants.items():
            command = [
                sys.executable,
                script,
                *map(str, same),
                "--folder",
                str(self.folder),
                "--parent",
                str(os.getpid()),
            ]
            command += ["--worker", backend, "--variants", *names]
            environment = {**os.environ}
            one = [(command, environment)]
            lines = one if backend == "one process" else rank_commands(backend, args.ranks, command, self.folder)
            for line, environment in lines:
                log = (self.folder / f"{backend}-{len(self.processes)}.log").open("w")
                options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
                self.processes.append((subprocess.Popen(line, env=environment, **options), Path(log.name)))
            # One backend after the other: reading a checkpoint is no time to share the disk.
            self.started[backend] = self.wait(backend, 0)
            expected = 1 if backend == "one process" else args.ranks
            if self.started[backend]["ranks"] != expected:
                raise ValueError(f"{expected} ranks over {backend} did not find each other: MLX does not load it")

    def ask(self, backend, variant, work):
        self.turns += 1
        write(self.folder / f"turn-{self.turns}.json", {"backend": backend, "variant": variant, "work": work})
        return self.wait(backend, self.turns)

    def wait(self, backend, number):
        return answer_to(self.folder, backend, number, self.timeout, self.processes)

    def stop(self):
        for process, _ in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stack.close()
