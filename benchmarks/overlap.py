"""When does it pay to hide collectives under computation? Two real ranks over a link that is slowed on purpose.

    python benchmarks/overlap.py                                             shipped model
    python tools/make_checkpoint.py --out checkpoints/coder-4 --layers 4     1.8 GB, full width
    python benchmarks/overlap.py --model checkpoints/coder-4 --tokens 64 --rounds 3

A prompt fills the cache, as generation does, whole (W) and in two halves (H, ranks/overlap.py), by turns in every
round; the ratio W / H of each round is above 1 where halves pay. Links are those of slow_link.py, milliseconds one
way : MB/s.

    measured   shortest times, for other programs only add to them; of the ratios the median, lowest and highest
    modelled   from the prompt over the first link and from all-sums of its size and of half of it, measured by
               themselves over each link: W = computing + sums, H as in projection/step.py

MLX's ring waits by asking its sockets again and again, which takes a core: where ranks have no core besides the one
that computes, hidden waits cost what they save. --waits last gives its threads the lowest priority (Linux), which is
the nearest that two cores come to machines that have cores to spare; other programs then come first, too.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx.core as mx
from slow_link import slow_ring
from turns import answer, answer_to, read_turn, write

from expert_parallel import load_sharded
from expert_parallel.checkpoint.finding import SHIPPED
from expert_parallel.command import output
from expert_parallel.models.architecture import describe
from expert_parallel.models.configurations import load_configuration
from expert_parallel.projection.constants import random_tokens, seconds_of_prompt
from expert_parallel.projection.hardware import LINKS, MACHINES
from expert_parallel.projection.link_probe import all_sum_seconds
from expert_parallel.projection.step import estimate, seconds_in_halves
from expert_parallel.ranks.overlap import overlap_collectives
from expert_parallel.report import table

LINKS_TRIED = [(0.0, float("inf")), (1.0, 125.0), (5.0, 125.0), (20.0, 125.0)]
NEVER = 1 << 30  # tokens
ELSEWHERE = (("m4-max", "thunderbolt-jaccl"), ("m4-max", "ethernet-10g"), ("h100", "infiniband-ndr"))
PROMPTS = (64, 128, 256, 512, 1024, 2048)


# --- a rank, which waits for its turns -----------------------------------------------------------------------------


def worker(args):
    before = threads()
    group = mx.distributed.init()
    if args.waits == "last":
        for thread in threads() - before:
            os.setpriority(os.PRIO_PROCESS, int(thread), 19)
    model, _ = load_sharded(args.model, group=group)
    overlap, number = overlap_collectives(model, NEVER), 1
    hidden = describe(load_configuration(args.model)).demand.hidden
    answer(args, group, 0, {"hidden": hidden, "layers": len(model.layers)})
    while (turn := read_turn(args.folder, number, args.parent)) is not None:
        mx.eval(mx.distributed.all_sum(mx.ones(1), group=group))
        if "payload" in turn:
            found = all_sum_seconds(turn["payload"], group, repeats=3)
        else:
            overlap.tokens = 2 if turn["halves"] else NEVER
            found = seconds_of_prompt(model, random_tokens(model, turn["tokens"]), rounds=1)
        answer(args, group, number, found)
        number += 1


def threads() -> set[str]:
    """Of this process, by their numbers; none where the system does not say."""
    return set(os.listdir("/proc/self/task")) if Path("/proc/self/task").exists() else set()  # noqa: PTH208


# --- the one who asks ----------------------------------------------------------------------------------------------


class Ranks:
    """Two ranks over a ring whose link can be changed between turns."""

    def __init__(self, args, folder: Path):
        self.folder, self.timeout, self.turns = folder, args.timeout, -1
        same = ("--worker", "ring", "--folder", folder, "--parent", os.getpid())
        same += ("--model", args.model, "--waits", args.waits)
        ranks, self.lines = slow_ring(2, [sys.executable, __file__, *map(str, same)], folder)
        log = folder / "ring.log"
        with log.open("w") as out:
            self.processes = [(subprocess.Popen(c, env=env, stdout=out, stderr=out), log) for c, env in ranks]
        self.about = self.answer()

    def over(self, link: tuple[float, float]) -> None:
        for line in self.lines:
            line.latency, line.bandwidth = link[0] / 1e3, link[1] * 1e6

    def ask(self, **turn):
        write(self.folder / f"turn-{self.turns + 1}.json", {"backend": "ring", **turn})
        return self.answer()

    def answer(self):
        self.turns += 1
        return answer_to(self.folder, "ring", self.turns, self.timeout, self.processes)

    def stop(self):
        for process, _ in self.processes:
            process.kill()
            process.wait()


def measure(ranks: Ranks, args) -> tuple[dict, dict]:
    """({(link, T, halves): seconds by round}, {(link, T): seconds of an all-sum}), T of a half's sums too."""
    hidden, cases = ranks.about["hidden"], [(link, T) for link in args.links for T in args.tokens]
    ranks.over(args.links[0])
    for T in args.tokens:  # what is built at the first time
        ranks.ask(tokens=T, halves=True)
    seconds = {(*case, halves): [] for case in cases for halves in (False, True)}
    sums = {}
    for link in args.links:
        ranks.over(link)
        for size in sorted({n for T in args.tokens for n in (T, T - T // 2)}):
            sums[link, size] = ranks.ask(payload=4 * hidden * size)
    for n in range(args.rounds):
        for link, T in cases:
            ranks.over(link)
            for halves in ((False, True), (True, False))[n % 2]:
                seconds[link, T, halves].append(ranks.ask(tokens=T, halves=halves))
    return seconds, sums


def modelled(seconds: dict, sums: dict, first, layers: int) -> dict:
    """{(link, T): W / H}; the last layer of a prompt sums nothing, and computes keys and values alone."""
    found = {}
    for link, T, _ in seconds:
        computing = min(seconds[first, T, False]) - (layers - 1) * sums[first, T]
        whole = computing + (layers - 1) * sums[link, T]
        halves = seconds_in_halves(computing / (layers - 1) / 2, sums[link, T - T // 2], layers - 1)
        found[link, T] = whole / halves
    return found


def elsewhere() -> list:
    """[(machines and link, T, W / H)] of two machines that are not here with Qwen3-Coder-30B."""
    demand, rows = describe(load_configuration("qwen3-coder-30b")).demand, []
    for machine, link in ELSEWHERE:
        for T in PROMPTS:
            whole, half = (
                estimate(demand, MACHINES[machine], 2, LINKS[link][0], tokens=tokens) for tokens in (T, T // 2)
            )
            sums, layers = half.latency + half.transfer, demand.num_moe_layers
            halves = seconds_in_halves((half.seconds - sums) / layers, sums / layers, layers)
            rows.append((f"2 {machine}, {link}", T, whole.seconds / halves))
    return rows


def run(args):
    console = output.console()
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(args, Path(folder))
        try:
            seconds, sums = measure(ranks, args)
        finally:
            ranks.stop()
    expected, rows, figures = modelled(seconds, sums, args.links[0], ranks.about["layers"]), [], []
    for link in args.links:
        for T in args.tokens:
            whole, halves = seconds[link, T, False], seconds[link, T, True]
            ratios = sorted(w / h for w, h in zip(whole, halves, strict=True))
            middle = statistics.median(ratios)
            cells = [
                f"{1e3 * each:.0f}" for each in (sums[link, T], statistics.median(whole), statistics.median(halves))
            ]
            spread = f"{middle:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
            rows.append((f"{link[0]:g} ms", f"{link[1]:g}", f"{T}", *cells, spread, f"{expected[link, T]:.2f}"))
            figures.append({"latency_ms": link[0], "megabytes_per_second": link[1], "tokens": T, "ratios": ratios,
                            "all_sum_seconds": sums[link, T], "whole_seconds": whole, "halves_seconds": halves,
                            "ratio_modelled": expected[link, T]})  # fmt: skip
    name = Path(args.model).name
    title = f"A prompt whole / in two halves, {name} on 2 ranks, {args.rounds} rounds, waits {args.waits}"
    title += " (measured over a link slowed on purpose)"
    names = ("one way", "MB/s", "tokens", "sum ms", "whole ms", "halves ms", "ratio", "modelled")
    console.print(table.of_rows(title, *names, rows=rows))
    far = elsewhere()
    kinds = dict.fromkeys(row[0] for row in far)
    rows = [(kind, *(f"{ratio:.2f}" for which, _, ratio in far if which == kind)) for kind in kinds]
    title = "A prompt whole / in two halves, Qwen3-Coder-30B (modelled), tokens"
    console.print(table.of_rows(title, "machines", *map(str, PROMPTS), rows=rows))
    if args.json:
        about = {"environment": table.environment(), "model": name, "waits": args.waits, "measured": figures}
        about["elsewhere_modelled"] = [dict(zip(("machines", "tokens", "ratio"), row, strict=True)) for row in far]
        output.write_json(args.json, about)


def link_of(text: str) -> tuple[float, float]:
    latency, _, bandwidth = text.partition(":")
    return float(latency), float(bandwidth or "inf")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(SHIPPED), help="checkpoint folder (default: the shipped model)")
    parser.add_argument("--links", type=link_of, nargs="+", metavar="MS:MB/S", default=LINKS_TRIED,
                        help="others are modelled from the first (default: 0 1:125 5:125 20:125)")  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[64, 256, 512], help="of prompts (default: 64 256 512)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--waits", choices=("polling", "last"), default="polling", help="see above (default: polling)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one turn, or for loading")
    parser.add_argument("--json", type=Path)
    for hidden in ("--worker", "--folder", "--parent"):
        parser.add_argument(hidden, help=argparse.SUPPRESS, type=Path if hidden == "--folder" else str)
    args = parser.parse_args()
    with output.exit_on_user_error():
        worker(args) if args.worker else run(args)


if __name__ == "__main__":
    main()
