"""A rank that has imported all it needs, and waits until it is wanted: python standby.py FOLDER ARGUMENTS

It goes on as qwen3_expert_parallel.py with these ARGUMENTS as soon as there is a file FOLDER/go, and ends where its
supervisor, which would make it, has ended.
"""

import sys
import time
from importlib import import_module
from pathlib import Path

from expert_parallel.ranks.launch import end_with_supervisor

POLL = 0.02  # seconds
HEAVY = ("mlx_lm", "expert_parallel.checkpoint.loading", "expert_parallel.report.run", "expert_parallel.report.disk")
HEAVY += ("expert_parallel.report.measuring", "expert_parallel.moving.live", "expert_parallel.ranks.watchdog")


def main():
    end_with_supervisor()
    folder, *arguments = sys.argv[1:]
    for name in HEAVY:
        import_module(name)
    script = import_module("qwen3_expert_parallel")
    while not Path(folder, "go").exists():
        time.sleep(POLL)
    sys.argv = ["qwen3_expert_parallel.py", *arguments]
    script.main()


if __name__ == "__main__":
    main()
