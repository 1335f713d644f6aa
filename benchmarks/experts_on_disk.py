"""Experts on disk: hit rates, foretelling, reading, memory, and what the simulation takes.

    python benchmarks/experts_on_disk.py                          on the shipped model and its held-out text
    python benchmarks/experts_on_disk.py --model CHECKPOINT       reads, waiting and memory, on a folder that is larger
    python benchmarks/experts_on_disk.py --simulation             a million tokens of 48 layers, for each policy

CHECKPOINT: such as python tools/make_checkpoint.py --out CHECKPOINT --layers 4 makes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from expert_parallel import RoutingTrace, load_sharded, record_routing  # noqa: E402
from expert_parallel.checkpoint import rows  # noqa: E402
from expert_parallel.checkpoint.opened import Checkpoint  # noqa: E402
from expert_parallel.layers import moe_layers  # noqa: E402
from expert_parallel.offload import POLICIES  # noqa: E402
from expert_parallel.offload.policies import hottest  # noqa: E402
from expert_parallel.offload.prefetch import Foreteller, followers, likeliest  # noqa: E402
from expert_parallel.offload.replay import replay  # noqa: E402
from expert_parallel.report.table import environment, size  # noqa: E402

SHIPPED = ROOT / "models" / "tiny-qwen3-moe"
RESIDENT = (0.1, 0.25, 0.4, 0.6)
TOKENS = 2000  # of each held-out text; the first half is fitted on, the second judges
SLOW = 0.002  # seconds that a slowed read of one expert waits
ROUNDS = 3


def rate(found):
    return 100 * found[0].sum() / found[1].sum()


def recorded(text: str) -> RoutingTrace:
    """Where the shipped model sends the tokens of a text, each as a step of its own, as in decoding."""
    model, tokenizer = load_sharded(SHIPPED, num_devices=1)
    ids = tokenizer.encode(text, verbose=False)[:TOKENS]
    with record_routing(model) as trace:
        for start in range(0, len(ids), 500):
            mx.eval(model(mx.array([ids[start : start + 500]])))
    return RoutingTrace(trace.experts, trace.num_experts)


def hit_rates(texts):
    print("Hit rate in %, a cache for each of 4 layers of 128 experts, top-8, one device (simulated), judged on the")
    print(
        f"second {TOKENS // 2} tokens of each held-out text; pinned: by its first; belady: the bound; at random: share"
    )
    for name, text in texts.items():
        trace = recorded(text)
        fit, test = trace[: len(trace) // 2], trace[len(trace) // 2 :]
        print(f"\n{name:<12}" + "".join(f"{policy:>10}" for policy in (*POLICIES, "belady", "at random")))
        for share in RESIDENT:
            places = int(share * 128)
            pinned = hottest(fit.loads(), places, 8)
            ways = [replay(test, places, p, pinned if p == "pinned" else None) for p in (*POLICIES, "belady")]
            figures = [*map(rate, ways), 100 * places / 128]
            print(f"{places:>4} of 128 " + "".join(f"{figure:>10.1f}" for figure in figures), flush=True)


def foretelling(texts):
    print("\nFrom layer to layer, of the experts that tokens wanted those foretold, in % (measured; by chance 6.2)")
    print(f"\n{'':<12}{'next-layer':>12}{'learned':>12}   learned: from the other texts")
    traces = {name: recorded(text)[: TOKENS // 2] for name, text in texts.items()}
    for name, text in texts.items():
        model, tokenizer = load_sharded(SHIPPED, num_devices=1, expert_memory="50%", prefetch="next-layer")
        cache = make_prompt_cache(model)
        for token in tokenizer.encode(text, verbose=False)[:300]:
            mx.eval(model(mx.array([[token]]), cache=cache))
        tellers = [module for module in model.modules() if isinstance(module, Foreteller)]
        asked = 100 * sum(t.right for t in tellers) / sum(t.wanted for t in tellers)
        others = RoutingTrace(np.concatenate([traces[o].experts for o in traces if o != name]), 128)
        test, right = traces[name].experts.astype(np.int64), 0
        for l, follow in enumerate(followers(others)):
            right += (likeliest(follow, test[:, l])[:, :, None] == test[:, l + 1, None]).any(axis=1).sum()
        learned = 100 * right / (test[:, 1:].size)
        print(f"{name:<12}{asked:>12.1f}{learned:>12.1f}", flush=True)


def reading(folder):
    """Random experts by more and fewer threads, from a disk that has to be asked."""
    checkpoint = Checkpoint(folder)
    L, E = checkpoint.shape
    random = np.random.default_rng(0)
    print("\nReading 8 random experts of a layer at a time, the system's cache emptied before (measured, GB/s)")
    speeds = {threads: [] for threads in (1, 2, 4, 8)}
    for _ in range(ROUNDS):
        for threads, found in speeds.items():
            forget(folder)
            rows.THREADS = threads
            sources = [checkpoint.rows(l).opened(files) for files in [rows.OpenFiles()] for l in range(L)]
            pool = {name: np.zeros((8, *a.shape[1:]), a.dtype) for name, a in numpy_pool(sources[0]).items()}
            began, read = time.perf_counter(), 0
            for source in sources:
                read += source.into(np.sort(random.choice(E, 8, replace=False)), np.arange(8), pool)
            found.append(read / (time.perf_counter() - began) / 1e9)
    for threads, found in speeds.items():
        print(
            f"{threads:>3} threads {statistics.median(found):>8.2f} ({min(found):.2f} to {max(found):.2f})", flush=True
        )
    rows.THREADS = 4


def numpy_pool(source):
    return {
        name: np.zeros(a.shape, np.uint16 if a.dtype.size == 2 else np.uint32) for name, a in source.empty(8).items()
    }


def forget(folder):
    """Ask the system to keep nothing of these files in memory; only Linux does."""
    for path in Path(folder).glob("*.safetensors"):
        number = os.open(path, os.O_RDONLY)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def waiting(folder, memory="25%", tokens=10):
    """Seconds a token with and without reading ahead, from the disk as it is and from one that waits."""
    print(
        f"\nMilliseconds a token, {memory} of the experts in memory, {tokens} random tokens, medians of {ROUNDS} rounds"
    )
    print("in turn (measured; the slowed disk is simulated: each expert waits 2 ms more)")
    learn = load_sharded(folder, num_devices=1)[0]
    random = np.random.default_rng(1)
    vocabulary = learn.args.vocab_size if hasattr(learn, "args") else 1000
    fit, test = random.integers(0, vocabulary, (2, 400))
    with record_routing(learn) as trace:
        mx.eval(learn(mx.array([fit.tolist()])))
    del learn
    into = rows.StoredRows.into

    def slowed(self, ids, *others):
        time.sleep(SLOW * len(ids))
        return into(self, ids, *others)

    for name, way in (("the disk as it is", into), ("slowed", slowed)):
        rows.StoredRows.into = way
        times = {how: [] for how in ("none", "next-layer", "learned")}
        models = {
            how: load_sharded(folder, num_devices=1, expert_memory=memory, prefetch=how, cache_trace=trace)[0]
            for how in times
        }
        for turn in range(ROUNDS):
            for how, model in models.items():
                forget(folder)
                cache = make_prompt_cache(model)
                began = time.perf_counter()
                for token in test[turn * tokens : (turn + 1) * tokens].tolist():
                    mx.eval(model(mx.array([[token]]), cache=cache))
                times[how].append(1e3 * (time.perf_counter() - began) / tokens)
        for how, found in times.items():
            tellers = [module for module in models[how].modules() if isinstance(module, Foreteller)]
            wanted = sum(teller.wanted for teller in tellers)
            recall = f"recall {sum(teller.right for teller in tellers) / wanted:.2f}" if wanted else ""
            stores = [store for layer in moe_layers(models[how]) for store in layer.experts.stores]
            ahead, useful = (sum(getattr(s.reads, key) for s in stores) for key in ("experts_ahead", "useful"))
            used = f", {useful} of {ahead} read ahead were wanted" if ahead else ""
            figures = f"{statistics.median(found):>8.1f} ({min(found):.1f} to {max(found):.1f})"
            print(f"{name:<18} {how:<11}{figures} {recall}{used}", flush=True)
        del models
    rows.StoredRows.into = into


def memory(folder, budget="25%"):
    """Peak of a fresh process that loads and generates, beside what it was allowed."""
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1])\n"
        "import mlx.core as mx\nfrom mlx_lm.generate import generate_step\n"
        "from expert_parallel import load_sharded\nfrom expert_parallel.models.memory import array_bytes\n"
        "from expert_parallel.models.memory import live_expert_bytes\n"
        "from expert_parallel.report.measuring import resident_bytes\n"
        "before = resident_bytes()['now']\n"
        "model, _ = load_sharded(sys.argv[2], num_devices=1, expert_memory=sys.argv[3])\n"
        "loaded = resident_bytes()['peak']\n"
        "steps = generate_step(mx.arange(40), model)\n"
        "[next(steps) for _ in range(8)]\n"
        "experts = int(live_expert_bytes(model).sum())\n"
        "print(json.dumps({'before': before, 'loaded': loaded, 'peak': resident_bytes()['peak'],\n"
        "  'experts': experts, 'rest': array_bytes(model) - experts}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT, folder, budget], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    allowed = found["experts"] + found["rest"] + 300_000_000
    print(f"\nMemory of a process with {budget} of the experts, 40 tokens read and 8 generated (measured)")
    for what, value in {
        "experts in memory": found["experts"],
        "all else of the model": found["rest"],
        "these and 300 MB": allowed,
        "peak while it loaded": found["loaded"],
        "peak": found["peak"],
        "of it Python and libraries before": found["before"],
    }.items():
        print(f"{what:<36}{size(value):>12}")
    print("within these and 300 MB" if found["peak"] < allowed else "MORE than these and 300 MB")


def simulation():
    random = np.random.default_rng(0)
    one = np.argsort(-(random.gumbel(size=(250_000, 128)) + 2 * random.normal(size=128)), axis=1)[:, :8]
    trace = RoutingTrace(np.repeat(np.tile(one, (4, 1))[:, None].astype(np.uint16), 48, axis=1), 128)
    replay(trace[:10], 32, "lru"), replay(trace[:10], 32, "belady")  # compiled
    print(f"\nReplaying {len(trace):,} tokens of 48 layers, top-8 of 128, 32 in memory (measured)")
    for policy in ("lru", "lfu", "aging", "belady"):
        began = time.perf_counter()
        found = replay(trace, 32, policy)
        print(f"{policy:<8}{time.perf_counter() - began:>7.1f} s, hits {rate(found):.1f}%", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--simulation", action="store_true")
    args = parser.parse_args()
    print("{device}, {device_name}, {cores} cores, mlx {mlx}".format(**environment()))
    if args.simulation:
        simulation()
    elif args.model:
        memory(args.model)
        reading(args.model)
        waiting(args.model)
    else:
        texts = {path.stem: path.read_text() for path in sorted((SHIPPED / "held-out").iterdir())}
        hit_rates(texts)
        foretelling(texts)


if __name__ == "__main__":
    main()
