"""Kill runs at random moments, and see that each ends with the whole answer.

    python benchmarks/chaos.py --kills 100 --seed 0 --json chaos.json

Each run is tools/supervise.py with 2 or 3 ranks over the ring or MPI; it is
hit one to four times: SIGKILL of a rank or of the process that watches it,
SIGSTOP of a rank (a hang), or a full disk under the journal (a limit on the
size of rank 0's files, Linux), after which the same command is given again.
Half of the moments are uniform over the run, as long as it takes where nothing
happens; half are while it answers, at a random token, so that collectives and
moves of experts are hit too. A third of the runs go on with one rank fewer
after each loss. After each run: is the answer that it printed, that in its JSON
and that in the journal the one of a run that nothing ended; is any process
left; how long was it from the hit to the next token that was not known before?
Linux only.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from expert_parallel.checkpoint.finding import SHIPPED
from expert_parallel.command import output
from expert_parallel.failure.supervise import past_of
from expert_parallel.ranks.launch import ROOT
from expert_parallel.report.table import environment, of_rows

TOKENS = 60
POLL = 0.02  # seconds
SILENT = 6.0  # seconds at least, of supervise; on a busy machine twice a run that nothing happens to
OPTIONS = {
    "plain": (),
    "rebalancing": ("--rebalance-every", "8", "--rebalance-horizon", "100000"),
    "sampled": ("--temp", "0.8", "--seed", "5"),
    "copies": ("--placement", "replicated", "--redundant-experts", "16", "--placement-trace", "{trace}"),
    "on disk": ("--expert-memory", "25%"),
}
KILLED, UNWATCHED, HUNG, FULL = "SIGKILL of a rank", "SIGKILL of its watch", "SIGSTOP of a rank", "full disk"
FAULTS = (KILLED, KILLED, UNWATCHED, HUNG, FULL)  # as often as they stand here
PHASES = ("starting", "loading", "answering", "reporting")
MARK = "CHAOS_RUN"  # in the environment of all that a run starts: what still has it in the end was left behind


@dataclass
class Hit:
    """What was done to a run, and when; seconds from then to the next new token, of the last phase to the report."""

    fault: str
    phase: str
    tokens: int
    at: float
    starts: int  # before it
    seconds: float | None = None


def line_of(options: str, folder: Path) -> list[str]:
    chosen = [word.format(trace=folder / "trace.npz") for word in OPTIONS[options]]
    return ["--model", str(SHIPPED), "--max-tokens", str(TOKENS), "--no-verify", "--trials", "0", "--quiet", *chosen]


def uninterrupted(folder: Path) -> dict[str, dict]:
    """Of each set of options the answer of one process: {"text", "tokens"}."""
    found = {}
    for options in OPTIONS:
        line = [sys.executable, str(ROOT / "qwen3_expert_parallel.py"), *line_of(options, folder)]
        line += ["--json", str(folder / "one.json")]
        line += ["--trace", str(folder / "trace.npz")] if options == "plain" else []
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        found[options] = json.loads((folder / "one.json").read_text())["generation"]
    return found


def processes_of(mark: str) -> list[tuple[int, list[str], str]]:
    """(pid, command line, rank) of all that a run has started and that is not gone."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended, or is no process
            pairs = (entry / "environ").read_text("utf-8", "replace").split("\0")
            names = dict(pair.partition("=")[::2] for pair in pairs)
            if names.get(MARK) == mark and (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                words = (entry / "cmdline").read_text("utf-8", "replace").split("\0")
                rank = names.get("OMPI_COMM_WORLD_RANK", names.get("MLX_RANK", "0"))
                found.append((int(entry.name), words, rank))
    return found


class Run:
    """One run, which is hit some times, to its end."""

    def __init__(self, chance: random.Random, folder: Path, answers: dict, seconds: dict):
        self.chance, self.mark = chance, uuid.uuid4().hex
        self.options = chance.choice([*OPTIONS])
        self.backend, self.ranks = chance.choice([*seconds]), chance.choice([2, 3])
        self.fewer, self.standby = chance.random() < 1 / 3, chance.random() < 1 / 2
        self.answer, self.seconds = answers[self.options], seconds[self.backend]
        self.silent = max(SILENT, 2 * max(seconds.values()))
        self.limit = 2 * self.silent + 10 + 3 * self.silent  # until a hit is noticed at the latest, and for the restart
        self.journal, self.folder = folder / f"{self.mark}.jsonl", folder
        self.hits, self.problems, self.starts = [], [], 0

    def start(self) -> subprocess.Popen:
        self.starts += 1
        line = [
            sys.executable,
            str(ROOT / "tools" / "supervise.py"),
            "--backend",
            self.backend,
            "--silent",
            f"{self.silent:.1f}",
        ]
        line += [
            "--ranks",
            str(self.ranks),
            *["--fewer"] * self.fewer,
            *["--standby"] * self.standby,
            "--journal",
            str(self.journal),
        ]
        line += ["--", *line_of(self.options, self.folder), "--json", str(self.journal.with_suffix(".json"))]
        with self.journal.with_suffix(".out").open("wb") as out, self.journal.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(line, env={**os.environ, MARK: self.mark}, stdin=-3, stdout=out, stderr=log)

    def started(self) -> int:
        """How often so far, by the supervisor's own words."""
        return self.starts + self.journal.with_suffix(".log").read_text("utf-8", "replace").count(": restart ")

    def moment(self, tokens: int) -> tuple[float, int]:
        """(seconds from the last start or hit, tokens) that a hit waits for."""
        if self.chance.random() < 0.5 or tokens >= TOKENS:
            return self.chance.uniform(0, self.seconds), 0
        return self.chance.uniform(0, 0.02), self.chance.randint(tokens + 1, TOKENS)

    def carry_out(self, faults: list[str]) -> None:
        process, since, past = self.start(), time.monotonic(), past_of(self.journal)
        faults, (wait, token), open_hits, size = list(faults), self.moment(0), [], -1
        while not self.problems:
            now = time.monotonic()
            if self.journal.exists() and self.journal.stat().st_size != size:
                size, past = self.journal.stat().st_size, past_of(self.journal)
            for hit in [hit for hit in open_hits if len(past.tokens) > hit.tokens]:
                if self.started() == hit.starts:  # a token that was on its way
                    hit.tokens = len(past.tokens)
                else:
                    hit.seconds = now - hit.at
                    open_hits.remove(hit)
            # 1. The next hit, where it is time for it and there is somebody.
            if faults and now - since >= wait and len(past.tokens) >= token and self.strike(faults[0], past, open_hits):
                faults.pop(0)
                since, (wait, token) = time.monotonic(), self.moment(len(past.tokens))
            # 2. The end, or that of a part: somebody makes room on the disk and gives the same command again.
            status = process.poll()
            if status == 2 and any(hit.fault == FULL for hit in self.hits) and self.starts <= len(self.hits):
                for hit in [hit for hit in self.hits if hit.fault == FULL][-1:]:
                    hit.at, hit.seconds, hit.tokens = now, None, len(past_of(self.journal).tokens)
                    hit.starts = self.started()
                    open_hits[:] = [*(other for other in open_hits if other is not hit), hit]
                process = self.start()
            elif status is not None:
                for hit in open_hits:
                    hit.seconds = time.monotonic() - hit.at
                return self.judge(status)
            if now - max([since, *(hit.at for hit in open_hits)]) > self.limit + wait:
                self.problems.append(f"nothing for {self.limit:.0f} s after {len(past.tokens)} tokens")
                process.terminate()
                process.wait()
            time.sleep(POLL)
        return None

    def strike(self, fault: str, past, open_hits: list) -> bool:
        """Whether there was somebody to be hit."""
        what = "watch.py" if fault == UNWATCHED else "qwen3_expert_parallel.py"
        # Nor a launcher, nor a rank on standby, which is at work when its folder has a file "go".
        victims = [
            (pid, rank)
            for pid, words, rank in processes_of(self.mark)
            if what in " ".join(words[:4])
            or fault != UNWATCHED
            and "standby.py" in " ".join(words[1:2])
            and Path(words[2], "go").exists()
        ]
        victims = [(pid, rank) for pid, rank in victims if fault != FULL or rank == "0" and past.header]
        if not victims:
            return False
        pid, _ = self.chance.choice(sorted(victims))
        try:
            if fault == FULL:
                room = self.journal.stat().st_size + self.chance.randrange(60)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            else:
                os.kill(pid, signal.SIGSTOP if fault == HUNG else signal.SIGKILL)
        except ProcessLookupError:
            return False
        began, answered, ended = past.header is not None, len(past.tokens), past.end is not None
        phase = PHASES[3 if ended else 2 if answered else 1 if began else 0]
        self.hits.append(Hit(fault, phase, answered, time.monotonic(), self.started()))
        open_hits.append(self.hits[-1])
        return True

    def judge(self, status: int) -> None:
        """What is not as it should be, into `problems`."""
        if status != 0:
            self.problems.append(f"exit status {status}")
            return
        report = json.loads(self.journal.with_suffix(".json").read_text())["generation"]
        past, printed = past_of(self.journal), self.journal.with_suffix(".out").read_text().strip()
        if (report["tokens"], report["text"]) != (self.answer["tokens"], self.answer["text"]):
            self.problems.append("another answer in the report")
        if past.tokens != self.answer["tokens"] or past.end is None:
            self.problems.append("another answer in the journal")
        if printed != self.answer["text"].strip():
            self.problems.append("another answer was printed")
        if left := processes_of(self.mark):
            self.problems.append(f"left behind: {left}")
        if slow := [hit for hit in self.hits if hit.seconds > self.limit]:
            self.problems.append(f"longer than {self.limit:.0f} s: {slow}")

    def words(self) -> str:
        hits = "; ".join(
            f"{hit.fault}, {hit.phase} ({hit.tokens} tokens): {hit.seconds or 0:.2f} s" for hit in self.hits
        )
        about = f"{self.options}, {self.ranks} ranks, {self.backend}{', fewer' * self.fewer}"
        about += ", standby" * self.standby
        return f"{about}: {hits or 'not hit'}{''.join(f'  WRONG: {problem}' for problem in self.problems)}"


def row(name: str, hits: list[Hit]) -> tuple:
    seconds = [hit.seconds for hit in hits if hit.seconds is not None]
    count = Counter(hit.phase for hit in hits)
    times = (f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}") if seconds else ("-", "-")
    return (name, str(len(hits)), *(str(count[phase]) for phase in PHASES), *times)


def main():
    parser = output.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of what is done, to which run, when (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures")
    args = parser.parse_args()
    about = "{device}, {device_name}, {cores} cores, {system}, mlx {mlx}, mlx-lm {mlx_lm}".format(**environment())
    print(f"{about}; load average before {os.getloadavg()[0]:.1f}", flush=True)
    chance, runs = random.Random(args.seed), []
    with output.exit_on_user_error(), tempfile.TemporaryDirectory() as folder:
        # 1. What is expected, and how long a run takes that nothing happens to.
        answers, seconds = uninterrupted(Path(folder)), {}
        for backend in ("ring", "mpi") if shutil.which("mpirun") else ("ring",):
            run, began = Run(random.Random(0), Path(folder), answers, {backend: 30}), time.monotonic()
            run.carry_out([])
            seconds[backend] = time.monotonic() - began
            print(f"nothing happens: {run.words()}, {seconds[backend]:.2f} s", flush=True)
        # 2. Runs that are hit.
        while (count := sum(len(run.hits) for run in runs)) < args.kills:
            runs.append(Run(chance, Path(folder), answers, seconds))
            faults = [chance.choice(FAULTS) for _ in range(min(chance.choice([1, 2, 3, 4]), args.kills - count))]
            runs[-1].carry_out(faults)
            print(f"{count + len(runs[-1].hits):4} {runs[-1].words()}", flush=True)
            if runs[-1].problems:
                print(runs[-1].journal.with_suffix(".log").read_text(), flush=True)
    # 3. What it came to.
    hits, wrong = [hit for run in runs for hit in run.hits], [run for run in runs if run.problems]
    rows = [row(fault, [hit for hit in hits if hit.fault == fault]) for fault in dict.fromkeys(FAULTS)]
    rows += [row(phase, [hit for hit in hits if hit.phase == phase]) for phase in PHASES]
    rows += [row("all but hangs", [hit for hit in hits if hit.fault != HUNG]), row("all", hits)]
    ready = [
        hit for run in runs for hit in run.hits if run.standby and hit.fault == KILLED and hit.phase == "answering"
    ]
    rows.append(row("rank killed answering, --standby", ready))
    silent = runs[0].silent
    title = f"Seconds from the hit to the next new token (measured; a hang is noticed after {silent:.1f} s)"
    print(of_rows(title, "hit", "hits", *PHASES, "median", "worst", rows=rows))
    good = len(runs) - len(wrong)
    print(f"load average after {os.getloadavg()[1]:.1f}, over 5 minutes")
    print(f"{good} of {len(runs)} runs, hit {len(hits)} times, ended with the whole answer, and nothing left behind")
    if args.json:
        asked = ("options", "backend", "ranks", "fewer", "standby", "problems")
        each = [{name: getattr(run, name) for name in asked} | {"hits": [*map(asdict, run.hits)]} for run in runs]
        figures = {"source": "measured", "silent": silent, "uninterrupted_seconds": seconds, "runs": each}
        output.write_json(args.json, figures | {"environment": environment()})
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
