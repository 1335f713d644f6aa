"""mlx-lm's own server, chat, generate and benchmark, with the experts spread over devices or ranks.

    python -m expert_parallel server --model DIR --devices 8 --port 8080
    mpirun -np 2 python -m expert_parallel chat --model DIR

Their flags, their output and their behaviour are mlx-lm's; replaced is what they load a model by. On ranks every one
has a share of the experts, and rank 0's sampled tokens are everybody's.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from contextlib import ExitStack, nullcontext
from functools import lru_cache
from importlib import import_module

from . import limits, options, output, server_ends, server_requests
from .entry import as_rank

# What each tool is hooked into by: names of its module.
TOOLS = {
    "server": ("load", "sharded_load", "make_sampler", "stream_generate", "scan_cache_dir", "APIHandler",
               "ResponseGenerator", "main"),
    "chat": ("load", "sharded_load", "make_sampler", "stream_generate", "ChatUI", "main"),
    "generate": ("load", "make_sampler", "stream_generate", "load_prompt_cache", "main"),
    "benchmark": ("load", "sharded_load", "main"),
}  # fmt: skip
OURS = ("--devices", "--placement", "--placement-trace", "--redundant-experts", "--expert-memory", "--cache-policy",
        "--prefetch", "--cold-bits", "--cold-share", "--combine", "--attention", "--dtype", "--streams", "--timeout",
        "--rebalance-every", "--rebalance-threshold", "--rebalance-horizon")  # fmt: skip
OWN = ("placement", "placement_trace", "report_every")  # ranks may have them in places of their own


def main(tool: str, line: list[str]) -> None:
    """Run mlx-lm's tool with what stands behind its name on the command line."""
    parser = options.parser_of(
        f"usage: expert-parallel {tool} [options]\n\nof this project, before mlx-lm's own:", OURS
    )
    parser.add_argument("--report-every", type=int, default=1024, metavar="TOKENS",
                        help="server: a line on balance after so many tokens, 0 for none (default: 1024); these and"
                        " those of GET /metrics are counted every 16 forward passes")  # fmt: skip
    parser.add_argument("--rebalance-pause", type=float, metavar="SECONDS",
                        help="with --rebalance-every: a move that would hold the model up for longer is carried out in"
                        " steps between tokens, each of so long as the costs measured at the start foretell (default:"
                        " at once)")  # fmt: skip
    mine, theirs = parser.parse_known_args(line)
    if {"-h", "--help"} & {*theirs}:
        with output.exit_on_user_error():
            print(parser.format_help(), flush=True)
    whole = argparse.Namespace(**{**vars(options.parser_of("").parse_args([])), **vars(mine)})
    as_rank(lambda watchdog, tell: run(tool, whole, theirs, watchdog), show=False)


def run(tool: str, args, theirs: list[str], watchdog) -> None:
    limits.check_numbers(args)
    limits.check_limits(args, {"report_every": (0, options.MOST), "rebalance_pause": (1e-6, 1e6)})
    if args.rebalance_pause is not None and args.rebalance_every is None:
        raise ValueError("--rebalance-pause is of no use without --rebalance-every TOKENS")
    if "--pipeline" in theirs:
        raise ValueError(
            f"--pipeline splits layers over ranks, this splits experts: leave it out, or use mlx_lm {tool}"
        )
    from mlx_lm.generate import GenerationBatch

    from ..ranks.group import all_or_none, gather_objects, start_group
    from ..trace import replaced

    module, theirs = import_module(f"mlx_lm.{tool}"), list(theirs)
    if missing := [name for name in TOOLS[tool] if not hasattr(module, name)]:
        raise ValueError(f"mlx_lm.{tool} has no {missing[0]} any more: this needs another version of mlx-lm")
    group = start_group(args.timeout, watchdog)
    watchdog.limit(args.timeout, f"not all ranks had loaded within {args.timeout:g} s (--timeout)")
    with all_or_none(group) as same:
        same |= {"tool": tool, "its options": theirs}
        same |= {limits.option(name): value for name, value in vars(args).items() if name not in OWN}
    first, note, names = group.rank() == 0, "", {flag.partition("=")[0] for flag in theirs}
    if "--model" not in names and not {"-h", "--help"} & names:
        from ..checkpoint.finding import default_model

        path, note = default_model()
        theirs += ["--model", str(path)]
    with ExitStack() as stack:
        loader = Loader(tool, args, theirs, group, watchdog, stack, note if first else "")
        replacing = {name: loader for name in ("load", "sharded_load") if name in TOOLS[tool]}
        if group.size() > 1 and "make_sampler" in TOOLS[tool]:
            more, of_batches = following(module, group)
            replacing |= more
            stack.enter_context(replaced(GenerationBatch, of_batches))
        if tool == "chat" and group.size() > 1:
            replacing["ChatUI"] = shared_prompts(module.ChatUI, group)
        if tool == "server":
            handled = server_requests.handling(module.APIHandler, loader.metrics)
            stack.enter_context(replaced(module.APIHandler, handled))
            generator = server_requests.tried_first(module, module.ResponseGenerator, loader.width_of)
            if group.size() > 1:
                of_generator, of_stream = server_requests.leaving_together(module, group)
                generator = of_generator(generator)
                replacing["stream_generate"] = of_stream(replacing["stream_generate"])
            generator = server_ends.ending_whole(generator, watchdog.name, watchdog, group)
            replacing |= {"ResponseGenerator": generator, "scan_cache_dir": server_ends.scanning(module.scan_cache_dir)}
        if tool == "generate":
            replacing["load_prompt_cache"] = of_a_file(module.load_prompt_cache)
        stack.enter_context(replaced(argparse.ArgumentParser, {"error": output.Parser.error}))  # in a line
        stack.enter_context(replaced(module, replacing))
        stack.enter_context(replaced(sys, {"argv": [f"expert-parallel {tool}", *theirs]}))
        if tool == "generate" and group.size() > 1:
            if any(flag == "-" for flag in theirs):  # a launcher passes its standard input to rank 0 alone
                sys.stdin = io.StringIO(gather_objects(group, sys.stdin.read() if first else None)[0])
            if not first:
                stack.enter_context(replaced(sys, {"stdout": open(os.devnull, "w")}))  # noqa: PTH123, SIM115, all say the same
        with server_ends.whole(watchdog.name, watchdog, group) if tool == "server" else nullcontext():
            module.main()
        if tool == "server" and group.size() == 1:
            # Its thread still takes MLX's state down, and would meet a Python that is gone: an abort.
            sys.stdout.flush()
            os._exit(0)


class Loader:
    """Stands for mlx-lm's `load` and `sharded_load` in one of its tools.

    note  for the user, printed when the tool has found nothing wrong with its options and loads
    """

    def __init__(self, tool, args, theirs, group, watchdog, stack, note=""):
        self.note = note
        self.tool, self.args, self.group, self.watchdog, self.stack = tool, args, group, watchdog, stack
        drafts = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        drafts.add_argument("--draft-model")
        self.draft, self.monitor, self._watching = drafts.parse_known_args(theirs)[0].draft_model, None, ExitStack()
        stack.push(self._watching)

    def __call__(
        self, path_or_hf_repo, pipeline_group=None, tensor_group=None, return_config=False, *, tokenizer_config=None,
        model_config=None, adapter_path=None, trust_remote_code=False, **more,
    ):  # fmt: skip
        """(model, tokenizer) or, with `return_config`, (model, tokenizer, config)."""
        from mlx_lm.utils import load

        from ..checkpoint import finding, loading
        from ..checkpoint.opened import Checkpoint
        from ..models.configurations import hub_id
        from ..ranks.group import all_or_none, checkpoint_mark

        if more or any((model_config or {}).values()):
            raise ValueError(f"not possible with spread experts: {', '.join({**(model_config or {}), **more})}")
        if self.draft is not None and str(path_or_hf_repo) == self.draft:  # a small model, whole as it is
            return load(path_or_hf_repo, return_config=return_config, tokenizer_config=tokenizer_config)
        self._watching.close()
        if self.note:
            print(self.note, file=sys.stderr)
            self.note = ""
        with all_or_none(self.group) as same:
            folder = finding.resolve_model(hub_id(str(path_or_hf_repo)))
            checkpoint = Checkpoint(folder, adapter_path, trust_remote_code)
            numbers = [layer.number for layer in checkpoint.layers]
            on_disk = options.cache_options(self.args, checkpoint.shape[1])
            trace, ranks = on_disk["cache_trace"], self.group.size()
            placement = options.make_placement(self.args, checkpoint.shape, numbers, ranks, trace)
            same |= {"placement": placement.held.tobytes(), "config": checkpoint.config}
            if self.group.size() > 1:
                same["weights"] = checkpoint_mark(checkpoint.folder)
        first, dtype = self.group.rank() == 0, loading.activation_dtype(self.args.dtype)
        with all_or_none(self.group), output.progress_bar("reading", first) as progress:
            model, tokenizer = loading.load_sharded(
                checkpoint, placement=placement, group=self.group, dtype=self.args.dtype, combine=self.args.combine,
                attention=self.args.attention, streams=self.args.streams, progress=progress,
                tokenizer_config=tokenizer_config, **on_disk,
            )  # fmt: skip
        if self.tool == "chat" and not tokenizer.has_chat_template:
            raise ValueError(f"{folder} has no chat template, which chat needs: take generate, or server's completions")
        self._watch(model, placement, checkpoint, dtype)
        self.watchdog.limit(None)  # from here on one waits for people; who is lost is noticed all the same
        self._config = checkpoint.config
        return (model, tokenizer, checkpoint.config) if return_config else (model, tokenizer)

    def width_of(self, tokenizer) -> int:
        """Logits of the model that was loaded last."""
        sizes = [config.get("vocab_size") for config in (self._config, self._config.get("text_config") or {})]
        return next((size for size in sizes if isinstance(size, int)), len(tokenizer.vocab))

    def metrics(self) -> str:
        """Of the model that was loaded last, in Prometheus' text format."""
        return self.monitor.metrics() if self.monitor else ""

    def _watch(self, model, placement, checkpoint, dtype) -> None:
        if self.tool != "server" and not self.args.rebalance_every:
            return
        import logging

        from ..moving.live import start_rebalancing
        from ..moving.monitor import Monitor

        live = None
        if self.args.rebalance_every:
            live = start_rebalancing(self.args, model, placement, checkpoint, dtype, self.group)
        every, tell = self.args.report_every or float("inf"), logging.info if self.group.rank() == 0 else print_nothing
        self.monitor = Monitor(model, placement, self.group, live, every, tell)
        self._watching.enter_context(self.monitor)


def print_nothing(line: str) -> None:
    pass


def of_a_file(load_prompt_cache):
    """mlx-lm's `load_prompt_cache` that says in a line what is wrong with the file."""
    from ..checkpoint.finding import in_a_line

    def load(path, **how):
        try:
            return load_prompt_cache(path, **how)
        except Exception as error:  # of MLX, json and the caches' own classes
            why = f"{in_a_line(error)}; make one with mlx_lm.cache_prompt, or leave the option out"
            raise ValueError(f"--prompt-cache-file {path} cannot be read: {why}") from None

    return load


def following(module, group) -> tuple[dict, dict]:
    """What stands in a tool and in mlx-lm's batches so that rank 0's tokens are every rank's, and proven to be.

    Before a token is handed on it is checked that all ranks had a part in it, see `Agreed`.
    """
    from mlx_lm.generate import GenerationBatch

    from ..ranks.group import Agreed

    agreed, make_sampler, stream, step = (
        Agreed(group),
        module.make_sampler,
        module.stream_generate,
        GenerationBatch.next,
    )

    @lru_cache(64)  # greedy samplers are one and the same, by which mlx-lm knows that a batch can be sampled at once
    def followed(sampler):
        def following(logprobs):
            return agreed(sampler(logprobs))

        following.alone = sampler  # for who tries it on one rank
        return following

    def stream_generate(*args, **how):
        for response in stream(*args, **how):
            agreed.check(agreed.unchecked - 1)  # of the newest, the next pass, tokens are not known
            yield response

    def next_of_batch(this):
        known = agreed.unchecked  # those that are sampled in this step are not
        responses = step(this)
        agreed.check(known)
        return responses

    samplers = {"make_sampler": lambda *args, **how: followed(make_sampler(*args, **how))}
    return {**samplers, "stream_generate": stream_generate}, {"next": next_of_batch}


def shared_prompts(chat_ui, group):
    """mlx-lm's ChatUI whose prompts rank 0 reads for all: a launcher passes its standard input to it alone."""
    from ..ranks.group import gather_objects

    class Shared(chat_ui):
        def prompt(self):
            line = None
            if group.rank() == 0:
                try:
                    line = super().prompt()
                except EOFError:
                    line = "q"
            return gather_objects(group, line)[0]

    return Shared
