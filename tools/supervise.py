"""Start the ranks of qwen3_expert_parallel.py, and start them anew from their
journal when one dies or hangs, until the answer is complete.

    python tools/supervise.py --ranks 3 --journal run.jsonl -- --max-tokens 400
    python tools/supervise.py --ranks 2 --backend mpi --journal run.jsonl \\
        -- --model MODEL --prompt text.txt --expert-memory 4GB
    python tools/supervise.py --hosts 10.0.0.1,10.0.0.2 --journal run.jsonl \\
        -- --model MODEL
        over machines: this one first, the others by ssh without a password

Behind -- stand the options of qwen3_expert_parallel.py. The report comes to
standard output once, when it is complete; what happens on the way to standard
error. The same command again goes on from the journal.

Exit status: that of the run. Wrong input (2), a full disk for example, is not
tried again; 3 where it is given up; 130 after Control-C.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from expert_parallel.command import output
from expert_parallel.failure.supervise import Plan, supervise

OWN = ("--journal", "--resume", "--timeout")  # said here, not behind the --


def setup_arg_parser():
    parser = output.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # fmt: off
    add("--journal", type=Path, metavar="FILE", required=True,
        help="where the run is kept, on this machine, where rank 0 is; a run that it holds already goes on")
    add("--ranks", type=int, metavar="N", help="how many, all on this machine (default: 2)")
    add("--backend", choices=("ring", "mpi"), default="ring", help="between them (default: ring)")
    add("--hosts", metavar="A,B,...",
        help="a rank on each of these addresses, this machine's own first, over the ring; the project under the same"
        " path on each. One that does not answer ssh within 10 s after a loss is left out from then on. Tested with a"
        " stand-in for ssh that runs the ranks on one machine, not over a network")
    add("--restarts", type=int, default=10, metavar="N", help="start anew so many times at most (default: 10)")
    add("--silent", type=float, default=30, metavar="SECONDS",
        help="end a rank that has stood still for so long: give more than the model takes to load, or to read the"
        " prompt. One that dies is noticed at once. Nothing waits longer than twice this and 10 s (default: 30)")
    add("--fewer", action="store_true",
        help="each restart on one rank fewer, down to one process, as if its machine were lost: --placement is made"
        " anew for so many; with --expert-memory they need no more room than before")
    add("--standby", action="store_true",
        help="from the first token on keep the ranks of the next start waiting, with all imported: a restart takes two"
        " seconds less, and each of them about 150 MB; not with --hosts")
    add("options", nargs="*", metavar="-- OPTIONS", help="of qwen3_expert_parallel.py")
    # fmt: on
    return parser


def plan_of(args) -> Plan:
    """What is asked for; ValueError where that cannot be."""
    hosts = tuple(filter(None, args.hosts.split(","))) if args.hosts else ()
    if hosts and (args.backend == "mpi" or args.ranks not in (None, len(hosts))):
        raise ValueError(f"--hosts is one rank on each of {len(hosts)} machines, over the ring: leave out the rest")
    ranks = len(hosts) or (2 if args.ranks is None else args.ranks)
    for name, value, low, high in (("ranks", ranks, 1, 1024), ("restarts", args.restarts, 0, 10**6),
                                   ("silent", args.silent, 1, 10**6)):  # fmt: skip
        if not low <= value <= high:
            raise ValueError(f"--{name} must be between {low} and {high}, got {value}")
    if hosts and args.standby:
        raise ValueError("--standby is for ranks on one machine: leave it out with --hosts")
    for word in args.options:
        if word.split("=")[0] in OWN:
            raise ValueError(f"{word} behind --: --journal and --silent before it say that")
    if ("--prompt", "-") in pairwise(args.options) or "--prompt=-" in args.options:
        raise ValueError("--prompt -: standard input cannot be read again after a restart; give a file")
    how = {"restarts": args.restarts, "silent": args.silent, "fewer": args.fewer, "standby": args.standby}
    return Plan(args.options, args.journal, ranks, args.backend, hosts, **how)


def main():
    args = setup_arg_parser().parse_args()
    with output.exit_on_user_error():
        status = supervise(plan_of(args), lambda line: output.warn(f"supervise: {line}"), sys.stdout.buffer)
    sys.exit(status)


if __name__ == "__main__":
    main()
