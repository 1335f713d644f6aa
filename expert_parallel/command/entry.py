"""Entry: a script's work as the process or rank that it was started as, and how that ends when something is wrong."""

from __future__ import annotations

from ..ranks.launch import end_with_supervisor, launched
from .output import exit_of, exit_on_user_error, progress_line


def as_rank(run, show: bool) -> None:
    """run(watchdog, tell), by itself or as one of several ranks, which then end together.

    show  whether a process by itself tells what is under way, see `progress_line`; ranks do not
    """
    end_with_supervisor()
    with exit_on_user_error():
        rank, *_ = launched()
    name = f"rank {rank}: " if rank else ""
    with exit_on_user_error(name):
        from ..ranks.watchdog import NoWatchdog, Watchdog, failing_together

        if rank is None:
            with progress_line(show) as tell:
                run(NoWatchdog(), tell)
            return
        watchdog = Watchdog(f"{name}error: ")
        with failing_together(name, watchdog, exit_of):
            run(watchdog, lambda what=None: None)
