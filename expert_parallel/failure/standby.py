"""A rank that has imported all it needs, and waits until it is wanted: python standby.py FOLDER PID ARGUMENTS

It goes on as qwen3_expert_parallel.py with these ARGUMENTS as soon as there is a file FOLDER/go, and ends where process
PID, which would make it, has ended.
"""

import os
import sys
import time
from importlib import import_module
from pathlib import Path

POLL = 0.02  # seconds
HEAVY = ("mlx_lm", "expert_parallel.checkpoint.loading", "expert_parallel.report.run", "expert_parallel.report.disk")
HEAVY += ("expert_parallel.report.measuring", "expert_parallel.moving.live", "expert_parallel.ranks.watchdog")


def main():
    folder, pid, *arguments = sys.argv[1:]
    for name in HEAVY:
        import_module(name)
    script = import_module("qwen3_expert_parallel")
    while not Path(folder, "go").exists():
        os.kill(int(pid), 0)  # ProcessLookupError: nobody will ever want it
        time.sleep(POLL)
    sys.argv = ["qwen3_expert_parallel.py", *arguments]
    script.main()


if __name__ == "__main__":
    try:
        main()
    except ProcessLookupError:
        sys.exit(3)
