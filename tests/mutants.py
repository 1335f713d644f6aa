"""Which faults would the tests let through? Plants faults all over the package, one at a time, and runs the tests.

    python tests/mutants.py                            200 faults over all rooms; an hour or two on two cores
    python tests/mutants.py --only report --count 40   of one room
    python tests/mutants.py --list                     only say what would be planted
    python tests/mutants.py --again before.txt         what a former run, whose output this is, calls unnoticed

Each fault is a small change of the syntax tree (see `faults_of`), chosen with a seed and spread evenly over the
files, in a copy of the tree; against it run the test files of its room, quick ones first, until one fails. Printed is
what passed unnoticed. Exit status 1 where that is more than one in twenty, accepted ones aside.
"""

import argparse
import ast
import copy
import importlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "expert_parallel"
LIMIT = 900  # seconds for the tests of a room
IMPORTED = (
    "mlx_lm.generate",
    "mlx_lm.models.qwen3_moe",
    "transformers",
    "rich.console",
    "scipy.optimize",
    "hypothesis",
)
WITNESSES = ["tests/report/test_witnesses_of_the_document.py", "tests/report/test_witnesses_of_the_print.py"]

# Room: its test files, quick ones first; a room that is not named here has those of its own folder. "core" is what
# lies in the package's own folder, "scripts" what lies beside it.
TESTS = {
    "core": [
        "tests/test_*.py",
        "tests/command/test_output.py",
        "tests/checkpoint/test_loading.py",
        "tests/models/test_every*.py",
        "tests/report/test_compare.py",
        *WITNESSES,
    ],
    "report": [
        "tests/report/test_table.py",
        "tests/report/test_*report.py",
        *WITNESSES,
        "tests/report/test_*.py",
        "tests/offload/test_disk_report.py",
        "tests/command/test_answering.py",
    ],
    "command": [
        "tests/command/test_o*.py",
        "tests/command/test_answering.py",
        "tests/command/test_scripts*.py",
        "tests/report/test_model_analysis.py",
        "tests/study/test_workbench.py",
        *WITNESSES,
        "tests/command/test_*.py",
    ],
    "failure": ["tests/failure/test_[jl]*.py", "tests/report/test_[fs]*_report.py", "tests/failure/test_*.py"],
    "ranks": ["tests/ranks/test_*.py", "tests/failure/test_supervise.py"],
    "models": ["tests/models/test_[acflm]*.py", "tests/report/test_model*.py"],
    "formats": ["tests/formats/test_*.py", "tests/test_placement.py"],
    "projection": [
        "tests/projection/test_*.py",
        "tests/report/test_projection_report.py",
        "tests/report/test_model*.py",
    ],
    "moving": ["tests/moving/test_*.py", *WITNESSES],
    "placing": ["tests/placing/test_*.py", "tests/test_placement.py", "tests/test_balance.py"],
    "checkpoint": [
        "tests/checkpoint/test_*.py",
        "tests/models/test_checkpoint_check.py",
        "tests/offload/test_store.py",
        "tests/test_public_reports.py",
        "tests/command/test_scripts.py",
    ],
    "scripts": [
        "tests/command/test_scripts_parsers.py",
        *WITNESSES,
        "tests/command/test_scripts.py",
        "tests/report/test_*.py",
        "tests/study/test_*.py",
        "tests/ranks/test_ranks.py",
        "tests/ranks/test_rank_failures.py",
    ],
}

# Faults that no test can notice, or need not: (file, function or part of its line, fault, reason).
ACCEPTED = [
    ("expert_parallel/moving/plan.py", "", "2 -> 3", "most swaps that are tried: tuning"),
    ("expert_parallel/moving/plan.py", "", "4 -> 5", "most swaps that are tried: tuning"),
    ("expert_parallel/moving/plan.py", "", "8 -> 9", "most swaps that are tried: tuning"),
    ("expert_parallel/moving/live.py", "", "16 -> 17", "how often loads are read from the device: tuning"),
    ("expert_parallel/moving/live.py", "", "5 -> 6", "times that a cost is measured: tuning"),
    (
        "expert_parallel/moving/live.py",
        "self._calls += 1",
        "self._calls += 1 -> self._calls -= 1",
        "counted down it comes round as often",
    ),
    ("expert_parallel/failure/losses.py", "_Living.ranked", "1 -> 2", "behind all others by any amount"),
    ("expert_parallel/failure/losses.py", "making_up.call", "1 -> 2", "what is scaled is nothing there"),
    (
        "expert_parallel/failure/losses.py",
        "weights_of.units",
        "mx.eye(indices.shape[-1], x.shape[-1], dtype=x.dtype) -> mx.eye(indices.shape[-1], x.shape[-1])",
        "a wider type is as right: weights are read as float32",
    ),
    ("expert_parallel/checkpoint/rows.py", "WORTH_THREADS", "1 -> 2", "bytes from which on threads read: tuning"),
    ("expert_parallel/ranks/hybrid.py", "kind(n, n, 1", "1 -> 2", "experts of a stand-in, which nobody asks"),
    ("expert_parallel/placing/affinity.py", "", "24 -> 25", "sweeps of a search: tuning"),
    ("expert_parallel/placing/affinity.py", "pairs = pairs / ", "pairs.mean -> pairs.max", "in any unit"),
    ("expert_parallel/placing/affinity.py", "coactivation", "100000 -> 100001", "a default that bounds time: tuning"),
    ("expert_parallel/placing/search.py", "", "100000 -> 100001", "tries of a search: tuning"),
    ("expert_parallel/placing/search.py", "", "32 -> 33", "tries of a search: tuning"),
    ("expert_parallel/placing/search.py", "", "16 -> 17", "targets of a search: tuning"),
    ("expert_parallel/report/measuring.py", "value_bytes", "4 -> 5", "until experts have answered once"),
    ("expert_parallel/report/checks.py", "forward", "20 -> 21", "characters a token that are tokenised: enough"),
    ("expert_parallel/router/capacity.py", "Capacity.__post_init__", "1 -> 2", "calls that only refuse options"),
    ("expert_parallel/router/choice.py", "by_logits", "16 -> 17", "random tokens of a trial"),
    ("expert_parallel/router/choice.py", "by_logits", "1 -> 2", "random tokens of a trial"),
    ("expert_parallel/router/choice.py", "_Trial.__init__", "0 -> 1", "a seed: any will do"),
    ("expert_parallel/study/learning.py", "stability", "0 -> 1", "a seed: any will do"),
    ("expert_parallel/study/chance.py", "SLOTS = 4_000_000", "4000000 -> 4000001", "random numbers at most: tuning"),
    ("expert_parallel/study/phases.py", "SmallLayer.__init__", "0 -> 1", "a seed: any will do"),
    ("expert_parallel/command/server_requests.py", "anew = mx.random.randint(0", "0 -> 1", "a seed: any will do"),
    ("expert_parallel/command/server_requests.py", "anew = mx.random.randint(0", "1 -> 2", "a seed: any will do"),
    ("expert_parallel/device/masked.py", "(1, 4, 8, 16, 32, 64)", "1 -> 2", "tokens of a step that is timed: some"),
    ("expert_parallel/trace.py", "_Notes", "64 -> 65", "how often notes are collected: tuning"),
    (
        "expert_parallel/trace.py",
        "_Notes.taker.take",
        "len(self.passes) >= self.EVERY -> len(self.passes) > self.EVERY",
        "how often notes are collected: tuning",
    ),
    (
        "expert_parallel/checkpoint/opened.py",
        "mx.zeros((1, 1)",
        "1 -> 2",
        "one token or two, one sequence or two: never computed",
    ),
    ("expert_parallel/ranks/watch.py", "for how, seconds in", "0 -> 1", "seconds of patience"),
    ("expert_parallel/ranks/watch.py", "asyncio.sleep(1)", "1 -> 2", "seconds of patience"),
    ("expert_parallel/ranks/watch.py", "for how, seconds in", "2 -> 3", "seconds of patience"),
    ("expert_parallel/ranks/watch.py", "PATIENCE = 5", "5 -> 6", "seconds of patience"),
    ("expert_parallel/ranks/watch.py", "LOOK = 1", "1 -> 2", "seconds of patience"),
    ("expert_parallel/device/products.py", "DENSE = 2**19", "2 -> 3", "numbers that are dense at a time: tuning"),
    ("expert_parallel/device/products.py", "DENSE = 2**19", "19 -> 20", "numbers that are dense at a time: tuning"),
    ("expert_parallel/device/trials.py", "SHAPES = ", "1 -> 2", "pieces or tokens of a trial: some"),
    ("expert_parallel/device/trials.py", "SHAPES = ", "8 -> 9", "pieces of a trial: some"),
    ("expert_parallel/device/trials.py", "first_rows(module, 8", "8 -> 9", "pieces of a trial: some"),
    ("expert_parallel/device/trials.py", "SHAPES = ", "2 -> 3", "tokens of a trial: some"),
    ("expert_parallel/device/trials.py", "SHAPES = ", "3 -> 4", "tokens of a trial: some"),
    ("expert_parallel/device/trials.py", "SHAPES = ", "17 -> 18", "tokens of a trial: some"),
    ("expert_parallel/device/trials.py", "SHAPES = ", "67 -> 68", "tokens of a trial: some"),
    ("expert_parallel/device/trials.py", "(1, 3, 17)", "1 -> 2", "tokens of a trial: some"),
    ("expert_parallel/device/trials.py", "(1, 3, 17)", "3 -> 4", "tokens of a trial: some"),
    ("expert_parallel/device/trials.py", "(1, 3, 17)", "17 -> 18", "tokens of a trial: some"),
    ("expert_parallel/device/trials.py", "array[:1, at]", "1 -> 2", "experts of a trial, whose first is asked"),
    ("expert_parallel/device/masked.py", "k, dtype = min(8", "8 -> 9", "experts of a token of a trial"),
    ("expert_parallel/device/lanes.py", "_others[n - 1]", "1 -> 2", "the streams in another order"),
    ("expert_parallel/checkpoint/tensors.py", "posix_fadvise", "0 -> 1", "bytes that a hint is for, by pages"),
    (
        "expert_parallel/offload/prefetch.py",
        "mx.zeros((1, 1",
        "1 -> 2",
        "one token or two, one sequence or two: a trial",
    ),
    ("expert_parallel/trials.py", "k = min(count, 8)", "min -> max", "experts of a token of a trial"),
    ("expert_parallel/trials.py", "k = min(count, 8)", "8 -> 9", "experts of a token of a trial"),
    ("expert_parallel/trials.py", "random.key(0)", "0 -> 1", "a seed: any will do"),
    ("expert_parallel/trials.py", "default_rng(0)", "0 -> 1", "a seed: any will do"),
    (
        "expert_parallel/placing/search.py",
        "spread",
        "fullest > EVEN * mean -> fullest >= EVEN * mean",
        "a bound that is met exactly",
    ),
    ("expert_parallel/ranks/group.py", "np.linspace", "0 -> 1", "the first byte says how long a header is"),
    (
        "expert_parallel/formats/warm_up.py",
        "warm_up_rows",
        "tokens * elsewhere ** length < BY_CHANCE -> tokens * elsewhere ** length <= BY_CHANCE",
        "a chance that is met exactly",
    ),
    ("expert_parallel/formats/traces.py", "max(num_experts or 0", "0 -> 1", "the larger of this and 1 at least"),
    (
        "expert_parallel/formats/warm_up.py",
        "warm_up_rows",
        "row += codes[l][trace.experts[:, l]].sum(axis=1) -> row -= codes[l][trace.experts[:, l]].sum(axis=1)",
        "the negative tells rows apart as well",
    ),
    (
        "expert_parallel/ranks/hybrid.py",
        "ShardedHead.__call__",
        "y.shape[-1] < self._share -> y.shape[-1] <= self._share",
        "filled up by nothing",
    ),
    ("expert_parallel/balance.py", "routing_entropy", "0 -> 1", "0 log 0 and 1 log 1 are the same"),
    ("minimal_qwen3_example.py", "place_experts([[0]", "0 -> 1", "contiguous asks for the shape of loads alone"),
    (
        "minimal_qwen3_example.py",
        "place_experts([[0]",
        "place_experts([[0] * num_experts] * num_layers, num_devices=8, strategy='contiguous')"
        " -> place_experts([[0] * num_experts] * num_layers, num_devices=8)",
        "the default, said for who reads it",
    ),
    ("qwen3_expert_parallel.py", '"quantized_kv_start": 0', "0 -> 1", "a cache has a token when it is looked at"),
    ("qwen3_expert_parallel.py", "run", "console.rule(style='dim') -> console.rule()", "looks"),
    (
        "qwen3_expert_parallel.py",
        "run",
        "mx.isnan(last.logprobs).any -> mx.isnan(last.logprobs).all",
        "where one logit is no number no log-probability is one",
    ),
    ("qwen3_expert_parallel.py", "any(gather_objects", "any -> all", "what is no number is summed into every rank"),
    ("expert_parallel_poc.py", "random.key(args.seed + 1)", "args.seed + 1 -> args.seed - 1", "a seed: any other"),
    ("expert_parallel_poc.py", "random.key(args.seed + 1)", "1 -> 2", "a seed: any other"),
    ("expert_parallel_poc.py", "trace[0].num_experts", "0 -> 1", "the halves are of one shape"),
]

COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq}
COMPARISONS |= {ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
NAMES = {"max": "min", "argmax": "argmin", "maximum": "minimum", "any": "all", "ceil": "floor", "sum": "max"}
NAMES |= {"min": "max", "argmin": "argmax", "minimum": "maximum", "all": "any", "floor": "ceil", "mean": "max"}
LABELS = {"measured": "modelled", "modelled": "simulated", "simulated": "measured"}
UNSAID = ("strict", "frozen")  # arguments that notice mistakes of a caller, and nobody makes one here
TEXTS = (ast.JoinedStr, ast.List, ast.Tuple, ast.ListComp)  # that + puts together


@dataclass(frozen=True)
class Fault:
    """change: old -> new source; text: of the whole file with the fault."""

    room: str
    file: str
    line: int = 0
    function: str = ""
    kind: str = ""
    change: str = ""
    text: str = ""

    def __str__(self):
        return f"{self.file}:{self.line} {self.function}: {self.kind}: {self.change}"


# --- faults ---------------------------------------------------------------------------------------------------------


def faults_of(node):
    """(kind, changed copy) for every small fault that a node of the tree can have."""

    def changed(**fields):
        new = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.Compare(ops=[operation]) if type(operation) in COMPARISONS:
            yield "comparison", changed(ops=[COMPARISONS[type(operation)]()])
        case ast.BinOp(left, operation, right) if type(operation) in ARITHMETIC:
            if not any(isinstance(getattr(side, "value", side), (str, *TEXTS)) for side in (left, right)):
                yield "arithmetic", changed(op=ARITHMETIC[type(operation)]())
                if isinstance(operation, ast.Sub | ast.Div):
                    yield "order of operands", changed(left=right, right=left)
        case ast.AugAssign(op=ast.Add() | ast.Sub() as operation) if not isinstance(node.value, TEXTS):
            yield "arithmetic", changed(op=ARITHMETIC[type(operation)]())
        case ast.BoolOp(op=operation):
            yield "and, or", changed(op=ast.Or() if isinstance(operation, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "not or minus dropped", copy.deepcopy(operand)
        case ast.IfExp(body=body, orelse=otherwise):
            yield "branches swapped", changed(body=otherwise, orelse=body)
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
            yield "function", changed(id=NAMES[name])
        case ast.Attribute(attr=name, ctx=ast.Load()) if name in NAMES:
            yield "function", changed(attr=NAMES[name])
        case ast.Constant(value=bool(value)):
            yield "true, false", changed(value=not value)
        case ast.Constant(value=int(value)):
            yield "off by one", changed(value=value + 1)
        case ast.Constant(value=str(value)):
            for word in filter(value.__contains__, LABELS):
                yield "label", changed(value=value.replace(word, LABELS[word]))
        case ast.Call(keywords=[*_, ast.keyword(arg=str()) as last]) if last.arg not in ("help", *UNSAID):
            yield "argument dropped", changed(keywords=node.keywords[:-1])


def sites(tree):
    """(node, place, key, statement, function) of every node but texts of errors and of --help, docstrings, annotations.

    place[key] is the node.
    """

    def walk(node, statement, function):
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "type_comment"):
                continue
            for number, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.Assert):
                    continue
                docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                if docstring or isinstance(child, ast.keyword) and child.arg in ("help", "description", *UNSAID):
                    continue
                if getattr(getattr(node, "func", None), "attr", "") == "reshape" and isinstance(child, ast.UnaryOp):
                    continue  # numpy takes -2 for -1
                here = child if isinstance(child, ast.stmt) else statement
                named = isinstance(child, ast.FunctionDef | ast.ClassDef)
                inside = f"{function}.{child.name}".lstrip(".") if named else function
                yield child, *((vars(node), field) if number is None else (value, number)), here, inside
                yield from walk(child, here, inside)

    yield from walk(tree, None, "")


def plant(room, path):
    """Every Fault of a file."""
    source = path.read_text(encoding="utf-8")
    lines, found = source.splitlines(keepends=True), []
    for node, place, key, statement, function in sites(ast.parse(source)):
        for kind, new in faults_of(node):
            place[key] = new
            first = min(each.lineno for each in (statement, *getattr(statement, "decorator_list", [])))
            try:
                whole = ast.unparse(new if node is statement else statement)
                planted = [f"{' ' * statement.col_offset}{line}\n" for line in whole.splitlines()]
                text = "".join([*lines[: first - 1], *planted, *lines[statement.end_lineno :]])
                ast.parse(text)
            except (SyntaxError, ValueError):  # several statements on a line; an f-string that cannot be written so
                continue
            finally:
                place[key] = node
            change = " -> ".join(" ".join(ast.unparse(each).split())[:90] for each in (node, new))
            found.append(Fault(room, str(path.relative_to(ROOT)), node.lineno, function, kind, change, text))
    return found


def choose(only, count, seed):
    """So many faults: a file after the other gives one, of a kind that it gave least of."""
    names = {PACKAGE: "core", ROOT.name: "scripts"}
    files = [*sorted((ROOT / PACKAGE).rglob("*.py")), *sorted(ROOT.glob("*_*.py"))]
    files = [(names.get(path.parent.name, path.parent.name), path) for path in files if path.name != "__init__.py"]
    waiting = []
    for room, path in files:
        faults, given, nth = plant(room, path) if not only or room in only else [], Counter(), {}
        random.Random(f"{seed} {path.name}").shuffle(faults)
        for fault in faults:
            nth[fault] = given[fault.kind]
            given[fault.kind] += 1
        waiting.append(sorted(faults, key=nth.get))  # the first of each kind, then the second of each
    rounds = range(max(map(len, waiting), default=0))
    return [faults[n] for n in rounds for faults in waiting if n < len(faults)][:count]


def again(output, only):
    """The faults that a former run's output calls unnoticed, as far as the code that they change is still there."""
    number = re.compile(r":\d+ ")  # of a line, which moves
    lines = output.read_text(encoding="utf-8").splitlines()
    unnoticed = {line.removeprefix("unnoticed").strip() for line in lines if line.startswith("unnoticed")}
    wanted = {number.sub(" ", fault, count=1) for fault in unnoticed}
    return [fault for fault in choose(only, None, 0) if number.sub(" ", str(fault), count=1) in wanted]


# --- runs -----------------------------------------------------------------------------------------------------------


def tests_of(fault):
    """The test files of its room, each once: those first that are named after its file, then in the table's order."""
    patterns = [each for room in fault.room.split() for each in TESTS.get(room, [f"tests/{room}/test_*.py"])]
    files = dict.fromkeys(str(p.relative_to(ROOT)) for pattern in patterns for p in sorted(ROOT.glob(pattern)))
    return sorted(files, key=lambda path: Path(fault.file).stem not in Path(path).stem)


def started(tree, fault):
    """(process that tests a copy with the fault in it, when it is to have ended).

    Forked from this one, which has imported what is slow to import: mlx-lm takes longer than most tests.
    """
    if fault.text:
        (tree / fault.file).write_text(fault.text, encoding="utf-8")
    if pid := os.fork():
        return pid, time.monotonic() + (LIMIT if fault.text else 4 * LIMIT)
    status = 1
    try:
        os.setsid()
        os.chdir(tree)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3 if fault.text else 1):  # which fails without a fault is to be read
            os.dup2(nothing, number)
        sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "tests"]
        sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"  # a stale one hides the next fault
        status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests_of(fault)])
    finally:
        os._exit(int(status))


def run(faults, jobs):
    """(fault, whether the tests noticed it) as they come, `jobs` at a time, each in a copy of the tree."""
    with tempfile.TemporaryDirectory() as folder:
        free, running, waiting = [Path(folder) / str(job) for job in range(jobs)], {}, list(faults)
        for tree in free:
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        while waiting or running:
            while waiting and free:
                fault, tree = waiting.pop(0), free.pop()
                pid, end = started(tree, fault)
                running[pid] = fault, tree, end
            for pid, (fault, tree, end) in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                late = time.monotonic() > end  # one that hangs is noticed
                if late and not ended:
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                if ended or late:
                    del running[pid]
                    shutil.copy(ROOT / fault.file, tree / fault.file)
                    free.append(tree)
                    yield fault, bool(late or os.waitstatus_to_exitcode(status))
            time.sleep(0.05)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="ROOM", help="core, scripts or a folder of the package")
    parser.add_argument("--count", type=int, default=200, help="faults to plant (default: 200)")
    parser.add_argument("--jobs", type=int, default=1, help="copies to test side by side (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    parser.add_argument("--again", type=Path, metavar="FILE", help="plant what this output calls unnoticed, no others")
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    args = parser.parse_args()
    faults = again(args.again, args.only) if args.again else choose(args.only, args.count, args.seed)
    if args.list or not faults:
        print(*faults, f"{len(faults)} faults", sep="\n")
        return 0
    for name in IMPORTED:
        importlib.import_module(name)
    rooms = list(dict.fromkeys(each.room for each in faults))
    if any(fails for _, fails in run([Fault(" ".join(rooms), faults[0].file)], 1)):  # each file once, for all rooms
        print("without a fault tests fail")
        return 2
    results = []
    for fault, seen in run(faults, args.jobs):
        line = (ROOT / fault.file).read_text().splitlines()[fault.line - 1]
        accepted = any(
            (fault.file, fault.change) == (file, change) and (place == fault.function or place and place in line)
            for file, place, change, _ in ACCEPTED
        )
        results.append((fault.room, "noticed" if seen else "accepted" if accepted else "unnoticed"))
        if not seen:
            print(f"{results[-1][1]:10}{fault}", flush=True)
        print(f"{len(results)} of {len(faults)}", end="\r", file=sys.stderr, flush=True)
    for room in [*rooms, "all"]:
        counts = Counter(result for of_room, result in results if room in (of_room, "all"))
        print(f"{room:12}{counts['noticed']:5d} of{counts.total():5d} noticed, {counts['accepted']} accepted")
    return int(counts["unnoticed"] > 0.05 * counts.total())


if __name__ == "__main__":
    sys.exit(main())
