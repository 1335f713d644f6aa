"""Does `affinity` keep its promise on text that it was not fitted on? Fan-out and fullest device, fit and test apart.

    python benchmarks/affinity_on_other_text.py
    python benchmarks/affinity_on_other_text.py --fit python --test prose

The shipped model reads held-out text; placements are fitted on its first half and judged on the second, or
on another domain. Loads and devices per token are counted (measured), nothing is modelled.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx.core as mx
import numpy as np
from mlx_lm import load

from expert_parallel import balancedness, place_experts, record_routing
from expert_parallel.balance import fan_out
from expert_parallel.checkpoint.finding import SHIPPED
from expert_parallel.command import output
from expert_parallel.report import table
from expert_parallel.serving import devices_of_trace

WINDOW, DOMAINS = 512, ("docs", "go", "json", "prose", "python")


def trace_of(model, tokenizer, domain, tokens):
    """Routing of the first tokens of a domain's held-out files, in windows of 512."""
    ids = tokenizer.encode((SHIPPED / "held-out" / f"{domain}.txt").read_text(encoding="utf-8"), verbose=False)[:tokens]
    with record_routing(model, max_tokens=tokens) as trace:
        for start in range(0, len(ids), WINDOW):
            mx.eval(model(mx.array([ids[start : start + WINDOW]])))
    return trace


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1536, help="for the fit, and as many for the test")
    parser.add_argument("--fit", default="python", choices=DOMAINS, help="domain that placements are fitted on")
    parser.add_argument("--test", choices=DOMAINS, help="domain to judge them on (default: more of the same)")
    parser.add_argument("--bounds", type=float, nargs="+", default=[0, 0.01, 0.02, 0.05, 0.1])
    args = parser.parse_args()

    model, tokenizer = load(str(SHIPPED))
    model.set_dtype(mx.float32)
    if args.test:
        fit, test = (trace_of(model, tokenizer, domain, args.tokens) for domain in (args.fit, args.test))
    else:
        whole = trace_of(model, tokenizer, args.fit, 2 * args.tokens)
        fit, test = whole[: args.tokens], whole[args.tokens :]

    balanced = place_experts(fit.loads(), args.devices, "balanced")
    placements = {"balanced": balanced}
    for bound in args.bounds:
        placements[f"affinity, {bound:.0%}"] = place_experts(
            fit.loads(), args.devices, "affinity", coactivation=fit.experts, balance_bound=bound
        )
    rows = []
    for name, placement in placements.items():
        cells = [name]
        for part in (fit, test):
            loads, level = placement.device_loads(part.loads()), balanced.device_loads(part.loads())
            worst = (loads.max(axis=1) / level.max(axis=1)).max()
            fan = np.mean(fan_out(devices_of_trace(part.experts, placement.held)))
            cells += [f"{fan:.2f}", f"{balancedness(loads):.3f}", f"{worst:.3f}"]
        rows.append(cells)
    columns = ("placement, bound", "fan-out", "balancedness", "fullest", "fan-out", "balancedness", "fullest")
    judged = f"judged on {len(test)} of {args.test or 'the same'} (right)"
    where = f"fitted on {len(fit)} tokens of {args.fit} (left), {judged}"
    console = output.console()
    console.print(table.of_rows(f"Affinity {where}, measured, {args.devices} devices", *columns, rows=rows))
    console.print("fullest: a device's highest load over that of `balanced`, in the worst layer")


if __name__ == "__main__":
    with output.exit_on_user_error():
        main()
