"""All scripts by one name: expert-parallel, or python -m expert_parallel.

    run      a model with its experts spread over devices      qwen3_expert_parallel.py
    study    what skewed routing costs, which placement helps  expert_parallel_poc.py
    analyze  what is in a model, what it needs                 model_analysis.py
    compare  two runs side by side, from what --json saved of them

mlx-lm's own tools, with experts spread over devices or ranks:

    server  chat  generate  benchmark

Each explains itself with --help.
"""

import sys
from importlib import import_module
from pathlib import Path

SCRIPTS = {"run": "qwen3_expert_parallel", "study": "expert_parallel_poc", "analyze": "model_analysis"}
MLX_LM = ("server", "chat", "generate", "benchmark")


def main():
    name, *rest = sys.argv[1:] or ["--help"]
    sys.argv = [f"expert-parallel {name}", *rest]
    if name in SCRIPTS:
        import_module(SCRIPTS[name]).main()
    elif name == "compare":
        compare()
    elif name in MLX_LM:
        from expert_parallel.command import mlx_lm_tools

        mlx_lm_tools.main(name, rest)
    elif name in ("-h", "--help"):
        print(__doc__, end="")
    else:
        known = ", ".join((*SCRIPTS, "compare", *MLX_LM))
        print(f"error: unknown command {name!r}: choose {known}", file=sys.stderr)
        sys.exit(2)


def compare():
    from expert_parallel.command import options, output

    parser = output.Parser(
        description="Two runs side by side: what was asked, and every figure with the ratio of b to a."
    )
    parser.add_argument("a", type=Path, help="what --json saved")
    parser.add_argument("b", type=Path, help="the same of another run of the same script")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the comparison; - for standard output")
    parser.add_argument("--html", type=Path, metavar="FILE", help="save a page of it")
    args = parser.parse_args()
    with output.exit_on_user_error(), output.progress_line() as tell:
        tell("comparing")
        from expert_parallel.report import page, table
        from expert_parallel.report.compare import compare, read_report

        output.check_outputs({"--json": args.json, "--html": args.html}, {"a": args.a, "b": args.b})
        names = (args.a.stem, args.b.stem) if args.a.stem != args.b.stem else ("a", "b")
        tables = compare(read_report(args.a), read_report(args.b), names, (*options.OUTPUTS, "plots"))
        document = table.sections(tables, options=vars(args), environment=table.environment())
        tell()
        console = output.console(output.to_standard_output(args.json))
        for part in tables:
            console.print(part)
            console.print()
        if args.json:
            output.write_json(args.json, document)
        if args.html:
            page.save_page(args.html, f"{names[0]} and {names[1]}", tables, {}, document)


if __name__ == "__main__":
    main()
