"""A rank that does nothing but meet the others: python rank_at_work.py TIMEOUT STEPS RANK CHANGE

In step 5 rank RANK carries out CHANGE, Python in which `noted()` leaves a file and `watch` is its watch's pid. From
then on a step has TIMEOUT seconds; until then MEETING, as on a busy machine one rank starts long before another.
"""

import atexit  # noqa: F401, for CHANGE
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mlx.core as mx  # noqa: E402

from expert_parallel.command.output import exit_of, exit_on_user_error  # noqa: E402
from expert_parallel.ranks.group import start_group  # noqa: E402
from expert_parallel.ranks.launch import launched  # noqa: E402
from expert_parallel.ranks.watchdog import Watchdog, failing_together  # noqa: E402


def noted():
    Path(os.environ["NOTE"]).touch()


timeout, steps, rank, change = float(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
meeting = float(os.environ.get("MEETING", 60))
name = f"rank {launched()[0]}: "
watchdog = Watchdog(f"{name}error: ")
watch = watchdog._process.pid
with exit_on_user_error(name), failing_together(name, watchdog, exit_of):
    group = start_group(meeting, watchdog)
    for step in range(steps):
        seconds = timeout if step >= 5 else meeting
        watchdog.limit(seconds, f"no answer from the other ranks within {seconds:g} s (--timeout)")
        mx.eval(mx.distributed.all_sum(mx.ones(8), group=group))
        if step == 5 and rank == launched()[0]:
            exec(change)
        time.sleep(0.01)
    print("done", flush=True)
