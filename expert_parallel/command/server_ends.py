"""Ends of mlx-lm's server: what ends one of its threads ends the process, and other ranks', with one line at most.

mlx-lm loads a model and generates in a thread. Where that fails its server goes on listening and answers nobody; a
port that is taken leaves the thread behind, which nothing ends; ranks would wait for a thread that is gone.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

from . import output


@contextmanager
def whole(name: str, watchdog, group):
    """Around a server's work in any thread: an error, or Control-C, ends this process at once."""
    from ..ranks.watchdog import failing_together

    ranks = group.size() > 1
    try:
        with failing_together(name, watchdog, output.exit_of) if ranks else nullcontext():
            yield
    except SystemExit as end:
        told = isinstance(end.code, int) and end.code > 128  # by SIGTERM, which must not wait for mlx-lm's thread
        if not ranks and not told:  # of the command line, before there is a thread
            raise
        _leave(end.code)
    except BaseException as error:  # what ranks leave by is above
        known = output.exit_of(error)
        if known is None:
            raise
        status, line = known
        print(line, file=sys.stderr, flush=True)
        _leave(status)


def _leave(status) -> None:
    sys.stdout.flush()
    os._exit(status if isinstance(status, int) else 0 if status is None else 1)


def scanning(scan_cache_dir):
    """huggingface_hub's function that finds no models where there is no cache: /v1/models then has the one served."""
    from huggingface_hub.errors import CacheNotFound

    def scan():
        try:
            return scan_cache_dir()
        except CacheNotFound:
            return SimpleNamespace(repos=())

    return scan


def ending_whole(generator, name: str, watchdog, group):
    """mlx-lm's ResponseGenerator whose thread does not end alone."""

    class Ending(generator):
        def _generate(self):
            with whole(name, watchdog, group):
                super()._generate()

        def stop_and_join(self):
            if group.size() > 1:  # by Control-C; the thread waits for ranks that may have gone
                raise KeyboardInterrupt
            super().stop_and_join()

    return Ending
