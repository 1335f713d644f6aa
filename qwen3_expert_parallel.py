"""Run a Mixture-of-Experts model with its experts spread over devices, and report what that does.

    python qwen3_expert_parallel.py                       8 simulated devices
    python qwen3_expert_parallel.py --prompt "def main():" --devices 4
    python qwen3_expert_parallel.py --prompt text.txt --trace run.npz
        keep where the tokens of this run went, and place experts by it:
    python qwen3_expert_parallel.py --placement balanced --placement-trace run.npz
    python qwen3_expert_parallel.py --max-tokens 400 --rebalance-every 64
        move experts between devices while it answers
    mpirun -np 2 python qwen3_expert_parallel.py
        2 real ranks, half of the experts on each; the same over sockets:
    mlx.launch -n 2 --backend ring --python "$(which python)" -- $PWD/qwen3_expert_parallel.py

Every figure says whether it is measured, simulated or modelled.
"""

import os
from contextlib import nullcontext

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from expert_parallel import output, report
from expert_parallel.checkpoint import build_lazily, resolve_model, tokenizer_of
from expert_parallel.default_model import SHIPPED, default_model
from expert_parallel.live_rebalancing import LiveRebalancing, measured_costs
from expert_parallel.loading import activation_dtype, expert_reader, load_sharded
from expert_parallel.measuring import count_collectives, time_parts
from expert_parallel.memory import model_bytes
from expert_parallel.moe import moe_layers
from expert_parallel.options import (
    check_files,
    check_numbers,
    make_placement,
    parser_of,
    read_prompt,
    read_standard_input,
)
from expert_parallel.ranks import agree, checkpoint_mark, follow_rank_0, gather_objects, start_group
from expert_parallel.rebalancing import Rebalancer
from expert_parallel.routing import record_routing
from expert_parallel.run_figures import (
    balance_figures,
    communication_figures,
    memory_figures,
    parity_figures,
    rank_figures,
    rebalancing_figures,
    routing_figures,
)
from expert_parallel.watchdog import NoWatchdog, Watchdog, failing_together

# What ranks may have in places of their own; what is in the files is compared.
OWN_OPTIONS = ("model", "prompt", "standard_input", "placement", "placement_trace", "verify", "quiet")
OWN_OPTIONS += ("json", "trace", "plots", "save_placement")
TIMED_TOKENS = 4  # extra ones, for where the time goes


def generate(model, tokenizer, ids, args, group, watchdog, out, after_token=lambda: None):
    """Stream the answer; (token ids, text, last response, prompt cache)."""
    mx.random.seed(args.seed)
    sampler = make_sampler(temp=args.temp, top_p=args.top_p if args.top_p < 1 else 0.0)
    if group is not None and group.size() > 1:
        sample_here = sampler

        def sampler(logprobs):
            return follow_rank_0(group, sample_here(logprobs))

    cache = make_prompt_cache(model)
    tokens, text, last = [], "", None
    silence = f"no answer from the other ranks within {args.timeout:g} s (--timeout)"
    watchdog.limit(args.timeout, silence)
    # mlx-lm's own stream would run on while the next collective starts elsewhere: one stream keeps them in order.
    options = {"sampler": sampler, "prompt_cache": cache, "stream": mx.default_stream(mx.default_device())}
    for last in stream_generate(model, tokenizer, ids, args.max_tokens, **options):
        watchdog.limit(args.timeout, silence)
        if out:
            print(last.text, end="", flush=True)
        text += last.text
        if last.finish_reason != "stop":
            tokens.append(last.token)
        after_token()
    watchdog.limit(None)
    if out:
        print(flush=True)
    return tokens, text, last, cache


def prepare(args, group):
    """Everything that can go wrong before ranks meet: files, model, prompt, placement."""
    if group.rank() == 0:  # which alone writes
        check_files(args)
    folder, note = (resolve_model(args.model), None) if args.model is not None else default_model()
    notes = [note] if note else []
    lazy = build_lazily(folder)  # shapes and bytes, no weights yet
    model, config, dtype = lazy.model, lazy.config, activation_dtype(args.dtype)
    if dtype is not None:
        model.set_dtype(dtype)
    tokenizer = tokenizer_of(folder, config)
    context = config.get("max_position_embeddings")
    ids, prompt = read_prompt(args, tokenizer, context)
    if context and len(ids) + args.max_tokens > context:
        asked, args.max_tokens = args.max_tokens, context - len(ids)
        notes.append(
            f"--max-tokens {asked} is cut to {args.max_tokens}: the prompt has {len(ids)} tokens, the context {context}"
        )
    devices = group.size() if group.size() > 1 else args.devices
    if group.size() > 1 and args.devices not in (None, group.size()):
        raise ValueError(f"--devices {args.devices}, but there are {group.size()} ranks: each rank is a device")
    placement = make_placement(args, model, devices)
    read = expert_reader(folder, args.dtype) if args.rebalance_every else None
    return folder, notes, model, tokenizer, config, ids, prompt, placement, read


def run(args, watchdog):
    # 1. Ranks meet; each prepares; all agree or all stop.
    check_numbers(args)
    group = start_group(args.timeout, watchdog)
    ranks, first = group.size(), group.rank() == 0
    console = output.console(args.quiet or not first)
    # A launcher passes its standard input to rank 0 alone.
    if args.prompt == "-":
        watchdog.limit(args.timeout, f"no end of standard input within {args.timeout:g} s (--timeout); give a file")
    args.standard_input = gather_objects(group, read_standard_input() if first and args.prompt == "-" else None)[0]
    error, prepared = None, None
    try:
        prepared = prepare(args, group)
    except (ValueError, OSError) as problem:
        if ranks == 1:
            raise
        error = str(problem)
    versions = report.environment()
    facts = {"mlx": versions["mlx"], "mlx-lm": versions["mlx_lm"]}
    facts |= {f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in OWN_OPTIONS}
    if prepared:
        folder, notes, model, tokenizer, config, ids, prompt, placement, read = prepared
        if args.verify is None:
            args.verify = folder.resolve() == SHIPPED.resolve()
        facts |= {"placement": placement.held.tobytes(), "prompt": ids, "config": config, "verify": args.verify}
        facts["weights"] = checkpoint_mark(folder) if ranks > 1 else ""
    watchdog.limit(args.timeout, f"not all ranks had loaded within {args.timeout:g} s (--timeout)")
    agree(group, facts, error)
    for note in notes:
        console.print(note)

    # 2. Every device reads its experts; nothing else of mlx-lm's model changes.
    whole = model_bytes(model)
    layer_numbers = [layer.number for layer in moe_layers(model)]
    try:
        with output.progress_bar("reading", first and not args.quiet) as progress:
            model, tokenizer, reading = load_sharded(
                folder, placement=placement, group=group, dtype=args.dtype, combine=args.combine,
                attention=args.attention, streams=args.streams, progress=progress, return_report=True,
            )  # fmt: skip
    except (ValueError, OSError) as problem:
        if ranks == 1:
            raise
        error = str(problem)
    agree(group, {}, error)
    name = str(args.model or folder.name)
    console.print()
    console.print(report.what_runs_where(name, config, model, placement, ranks, reading, versions))

    # 3. The answer, with every routing decision recorded.
    console.rule("answer", style="dim", align="left")
    if first and not args.quiet:
        print(prompt if not tokenizer.has_chat_template else "", end="", flush=True)
    live = start_rebalancing(args, model, placement, read, group) if read else None
    with (
        record_routing(model, name=name, prompt_tokens=len(ids)) as trace,
        count_collectives() as counted,
        live or nullcontext(),
    ):
        after_token = {"after_token": live.after_token} if live else {}
        tokens, text, last, cache = generate(model, tokenizer, ids, args, group, watchdog, first, **after_token)
    changes = live.changes if live else [(0, placement)]
    placement = changes[-1][1]
    console.rule(style="dim")

    # 4. Where the time goes, on extra tokens; and the same run by stock mlx-lm.
    watchdog.limit(args.timeout, f"no answer from the other ranks within {args.timeout:g} s (--timeout)")
    with time_parts(TIMED_TOKENS, group) as seconds:
        for _ in range(TIMED_TOKENS):
            mx.eval(model(mx.array([tokens[-1:] or ids[-1:]]), cache=cache))
    per_rank = gather_objects(group, rank_figures(model, seconds))
    watchdog.limit(None)
    parity = None
    if args.verify:
        parity = parity_figures(model, ids, tokens, args, group, lambda: stock_run(folder, ids, args))

    # 5. The figures, once for programs and once for people.
    if first:
        figures = {
            "model": {"name": name, "config": config, "environment": versions},
            "placement": {"strategy": placement.strategy, "devices": placement.num_devices, "ranks": ranks,
                          "experts_per_device": placement.held.sum(axis=2).tolist()},
            "generation": {"source": "measured", "prompt_tokens": len(ids), "text": text, "tokens": tokens,
                           "prompt_tokens_per_second": last.prompt_tps, "tokens_per_second": last.generation_tps},
            "parity": parity,
            "routing": routing_figures(trace),
            "balance": balance_figures(trace, changes[0][1], later=changes[1:]),
            "rebalancing": rebalancing_figures(live, trace) if live else None,
            "memory": memory_figures(whole, placement, cache, per_rank, ranks),
            "communication": communication_figures(model, trace, args.combine, seconds.value_bytes, counted, ranks),
            "ranks": per_rank if ranks > 1 else None,
            "time": {"source": "measured with a stop after each part", **vars(seconds)},
        }  # fmt: skip
        try:
            write_files(args, figures, trace, placement)
        finally:  # a disk that is full takes no file; the report is still there to read
            for part in report.all_tables(figures, layer_numbers):
                console.print()
                console.print(part)


def start_rebalancing(args, model, placement, read, group):
    """Costs measured here, then a watcher of this run."""
    every = args.rebalance_every
    costs = measured_costs(model, read, group)
    rebalancer = Rebalancer(
        placement, costs, every, args.rebalance_threshold, half_life=every, horizon_tokens=args.rebalance_horizon
    )
    return LiveRebalancing(model, rebalancer, read, group)


def stock_run(folder, ids, args):
    """The same answer by stock mlx-lm: (token ids, tokens per second, model)."""
    model, tokenizer = load(str(folder), lazy=True)
    dtype = activation_dtype(args.dtype)
    if dtype is not None:
        model.set_dtype(dtype)
    tokens, _, last, _ = generate(model, tokenizer, ids, args, None, NoWatchdog(), out=False)
    return tokens, last.generation_tps, model


def write_files(args, figures, trace, placement):
    if args.trace:
        trace.save(args.trace)
    if args.save_placement:
        placement.save(args.save_placement)
    if args.json:
        output.write_json(args.json, figures)
    if args.plots:
        from expert_parallel.plots import plot_loads

        loads = trace.loads()
        plot_loads(args.plots, loads, placement.device_loads(loads), figures["model"]["name"])


def main():
    args = parser_of(__doc__).parse_args()
    rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("MLX_RANK")
    name = f"rank {rank}: " if rank else ""
    with output.exit_on_user_error(name):
        if rank is None:
            run(args, NoWatchdog())
            return
        watchdog = Watchdog(f"{name}error: ")
        with failing_together(name, watchdog):
            run(args, watchdog)


if __name__ == "__main__":
    main()
