"""Run a Mixture-of-Experts model with its experts spread over devices, and
report what that does.

    python qwen3_expert_parallel.py                       8 simulated devices
    python qwen3_expert_parallel.py --prompt text.txt --devices 4 --trace r.npz
        keep where the tokens of this run went, and place experts by it:
    python qwen3_expert_parallel.py --placement balanced --placement-trace r.npz
    python qwen3_expert_parallel.py --prompts lines.txt
        answer each line of a file, all of them together
    python qwen3_expert_parallel.py --max-tokens 400 --rebalance-every 64
        move experts between devices while it answers
    python qwen3_expert_parallel.py --fail-device 3@16 --on-failure reroute
        lose device 3 after 16 tokens
    python qwen3_expert_parallel.py --journal run.jsonl
        keep it, so that it can go on after it was killed: --resume run.jsonl
    mpirun -np 2 python qwen3_expert_parallel.py
        2 real ranks, half of the experts on each; the same over sockets:
    mlx.launch -n 2 --backend ring --python $(which python) \\
        -- $PWD/qwen3_expert_parallel.py

Every figure says whether it is measured, simulated or modelled.
"""

from contextlib import nullcontext

from expert_parallel.command import limits, options, output, prompts
from expert_parallel.command.answering import generate, logits_of, sequences
from expert_parallel.command.entry import as_rank

# What ranks may have in places of their own; what is in the files is compared.
OWN_OPTIONS = (
    "model", "adapter_path", "prompt", "prompts", "placement", "placement_trace", "verify", "trials", "quiet", "full",
)  # fmt: skip
OWN_OPTIONS += (*options.OUTPUTS, "plots", "journal", "resume")
TIMED_TOKENS = 4  # extra ones, for where the time goes


def run(args, watchdog, tell=lambda what=None: None):
    limits.check_numbers(args)
    tell("starting" if args.prompt != "-" else None)  # someone may be typing
    import mlx.core as mx
    from mlx_lm import load

    from expert_parallel.checkpoint import finding, loading
    from expert_parallel.checkpoint.opened import Checkpoint
    from expert_parallel.failure import resume
    from expert_parallel.failure.losses import start_losses
    from expert_parallel.failure.planned import check_losses
    from expert_parallel.models.configurations import hub_id
    from expert_parallel.models.forward import first_not_a_number
    from expert_parallel.models.memory import model_bytes
    from expert_parallel.moving.live import start_rebalancing
    from expert_parallel.ranks.group import all_or_none, checkpoint_mark, gather_objects, start_group
    from expert_parallel.ranks.overlap import overlap_collectives
    from expert_parallel.report import batch, cost, disk, failure, run, saving, table
    from expert_parallel.report.measuring import count_collectives, time_parts
    from expert_parallel.report.verdict import verdict
    from expert_parallel.trace import record_routing

    def waiting_for(what):
        watchdog.limit(args.timeout, f"{what} within {args.timeout:g} s (--timeout)")

    # 1. Shapes, prompt and placement: everything that can go wrong before a weight is read, on any rank.
    group = start_group(args.timeout, watchdog)
    ranks, first = group.size(), group.rank() == 0
    if args.overlap and ranks == 1:
        raise ValueError(f"--overlap {args.overlap}: one process sends nothing; start several ranks, or leave it out")
    console = output.console(args.quiet or not first or output.to_standard_output(args.json))
    versions = table.environment()
    waiting_for("no end of standard input" if args.prompt == "-" else "not all ranks had loaded")
    kept = resume.keep(args, group)
    typed = prompts.read_standard_input() if first and args.prompt == "-" and not kept.begun else None
    typed = gather_objects(group, typed)[0]  # a launcher passes its standard input to rank 0 alone
    waiting_for("not all ranks had loaded")
    with all_or_none(group) as same:
        args = options.resumed(args, kept.past.header)
        folder, note = (args.model, "") if args.model is not None else finding.default_model()
        folder = finding.resolve_model(hub_id(folder))
        if first:  # which alone writes
            limits.check_files(args, folder)
        checkpoint = Checkpoint(folder, args.adapter_path, args.trust_remote_code)
        tokenizer, config = checkpoint.tokenizer(), checkpoint.config
        read = prompts.read_prompts if args.prompts else prompts.read_prompt
        prompt = read(args, tokenizer, finding.context_of(config), typed, kept.prompt)
        numbers = [layer.number for layer in checkpoint.layers]
        tell(f"placing experts, {args.placement}")
        on_disk = options.cache_options(args, checkpoint.shape[1])
        placement = options.make_placement(args, checkpoint.shape, numbers, ranks, on_disk["cache_trace"])
        if args.fail_device:
            check_losses(args, placement.held, prompt.max_tokens, ranks)
        shipped = finding.is_shipped(checkpoint.folder)
        verify = shipped if args.verify is None else args.verify
        trials = 3 * shipped if args.trials is None else args.trials
        same |= {"mlx": versions["mlx"], "mlx-lm": versions["mlx_lm"], "config": config}
        same |= {"verify": verify, "trials": trials}
        same |= {limits.option(name): value for name, value in vars(args).items() if name not in OWN_OPTIONS}
        same |= {
            "placement": placement.held.tobytes(),
            "prompt": prompt.each_ids(),
            "trace": repr(on_disk["cache_trace"]),
        }
        if ranks > 1:
            same["weights"] = checkpoint_mark(checkpoint.folder)
            same["adapter"] = checkpoint_mark(args.adapter_path, "adapters*") if args.adapter_path else ""
    tell()
    for line in filter(None, (note, prompt.note, *placement.metadata.get("notes", ()), *kept.notes())):
        console.print(line)

    # 2. Every device reads its experts; nothing else of mlx-lm's model changes.
    dtype = loading.activation_dtype(args.dtype)
    if dtype is not None:
        checkpoint.model.set_dtype(dtype)  # lazily, as everything here still is
    whole = model_bytes(checkpoint.model)
    with all_or_none(group), output.progress_bar("reading", first and not args.quiet) as progress:
        if first and kept.path:
            header = resume.header_of(args, checkpoint, prompt, dtype, versions, placement, on_disk["cache_trace"])
            kept.begin(header)
        model, tokenizer, reading = loading.load_sharded(
            checkpoint, placement=placement, group=group, dtype=args.dtype, combine=args.combine,
            attention=args.attention, streams=args.streams, progress=progress, return_report=True, **on_disk,
        )  # fmt: skip
    if args.overlap:
        overlap_collectives(model, args.overlap)
    name = str(args.model or checkpoint.folder.name)
    where = run.what_runs_where(name, model, prompt, placement, ranks, reading, versions, args.expert_memory)
    console.print()
    console.print(where)

    # 3. The answer, with every routing decision recorded.
    shown = first and not output.to_standard_output(args.json)
    console.rule("answer", style="dim", align="left")
    live = start_rebalancing(args, model, placement, checkpoint, dtype, group) if args.rebalance_every else None
    losses = start_losses(args, model, checkpoint, dtype, len(prompt.ids)) if args.fail_device else None
    heard = lambda: waiting_for("no answer from the other ranks")  # noqa: E731
    heard()
    tell(f"reading the prompt, {len(prompt.ids)} tokens")
    with (
        record_routing(model, name=name, prompt_tokens=None if prompt.several else len(prompt.ids)) as trace,
        count_collectives() as counted,
        live or nullcontext(),
        kept,
    ):
        after_token = lambda token: (kept.after_token(token), live and live.after_token())  # noqa: E731
        answering = lambda: (heard(), tell())  # noqa: E731
        chosen = (lambda token: losses.between_passes(kept.chosen(token))) if losses else kept.chosen
        answer = generate(model, tokenizer, prompt, args, group, answering, shown, chosen, after_token)
    tokens, text, last, cache = answer
    kept.end(last.finish_reason)
    if first and kept.differing:
        output.warn(kept.unlike())
    changes = live.changes if live else [(0, placement)]
    placement, cached, rows = changes[-1][1], disk.counts(model), sequences(prompt, tokens, last)
    held = losses.changes if losses else [(before, each.held) for before, each in changes]
    lost = failure.lost(losses, trace, numbers, whole, reading) if losses else []
    console.rule(style="dim")

    # 4. Where the time goes, on extra tokens; and the same run by stock mlx-lm, on rank 0 alone.
    heard()
    tell("timing its parts")
    with time_parts(TIMED_TOKENS * len(rows), group) as seconds:
        for _ in range(TIMED_TOKENS):
            mx.eval(model(mx.array([row[-1:] for row in rows]), cache=cache))
    per_rank = gather_objects(group, cost.rank_figures(model, seconds) | {"cache": cached})
    broken = any(gather_objects(group, mx.isnan(last.logprobs).any().item()))
    broken = run.not_a_number(first_not_a_number(model, rows)) if broken else None
    parity, stock = None, None
    ours, theirs = [last], []  # mlx-lm's last response of each run
    if verify:
        heard()
        tell("comparing with stock mlx-lm")
        mx.eval(logits := logits_of(model, rows))
    watchdog.limit(None)  # from here on the others wait for rank 0, which works alone
    if verify:
        if first:
            adapter = str(args.adapter_path) if args.adapter_path else None
            stock, _ = load(str(checkpoint.folder), adapter_path=adapter, lazy=True)
            stock.set_dtype(dtype) if dtype is not None else None
            expected, _, answer, _ = generate(stock, tokenizer, prompt, args, None, lambda: None)
            parity = run.parity(logits, tokens, logits_of(stock, rows), expected)
            theirs.append(answer)
        gather_objects(group, None)  # nobody leaves while rank 0 still compares
    for n in range(trials):  # in turns: whatever else the machine does meets both
        heard()
        tell(f"timing run {n + 1} of {trials}")
        ours.append(generate(model, tokenizer, prompt, args, group, heard)[2])
        watchdog.limit(None)
        if stock:
            theirs.append(generate(stock, tokenizer, prompt, args, None, lambda: None)[2])
        gather_objects(group, None)

    # 5. One report: for programs, and for people.
    if not first:
        return
    tables = [table for table in (broken, parity) if table]
    tables += [*run.routing(trace, numbers), *run.balance(trace, held, numbers, changes[0][1], model)]
    tables += batch.of_run(prompt, last, theirs, trace, placement, model) if prompt.several else []
    tables += [run.rebalancing(live.figures(), changes, trace, model)] if live else []
    tables += [*lost, *([failure.journal(kept.figures())] if kept.path else ())]
    tables += cost.memory(whole, placement, sum(entry.nbytes for entry in cache), per_rank)
    if any(caches := [device for rank in per_rank for device in rank.pop("cache") or ()]):
        took = last.prompt_tokens / max(last.prompt_tps, 1e-9) + last.generation_tokens / last.generation_tps
        tables += disk.of_run(trace, placement.held, caches, numbers, took, ranks > 1)
    tables += [cost.communication(model, trace, seconds.value_bytes, counted, ranks)]
    tables += [cost.ranks_table(per_rank)] if ranks > 1 else []
    tables += cost.speed(text, tokens, len(prompt.ids), ours, theirs, seconds)
    try:
        about = {"name": name, "config": config, "environment": versions}
        asked = options.in_effect(args, devices=placement.num_devices, verify=verify, trials=trials)
        document = saving.document_of([where, *tables], about, asked)
        tables.insert(0, verdict(document))
        saving.write_files(args, [*tables, where], document, trace, placement, numbers, tell)
        if args.json:
            output.write_json(args.json, document)
    finally:  # a disk that is full takes no file; the report is still there to read
        tell()
        for part in table.on_a_screen(tables, args.full):
            console.print()
            console.print(part)


def main():
    args = options.parser_of(__doc__).parse_args()
    as_rank(lambda watchdog, tell: run(args, watchdog, tell), show=not args.quiet)


if __name__ == "__main__":
    main()
