"""One rank that runs the script many times: python rank_cases.py CASES.json

CASES.json is a list of command lines of qwen3_expert_parallel.py, or of a list of them, one for each rank.
Beside it each rank writes rank-R.json, a list with {"tokens": its own} or {"error": the line} for each.
One launch of the ranks serves all cases.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import mlx.core as mx  # noqa: E402

import qwen3_expert_parallel as script  # noqa: E402
from expert_parallel.ranks.watchdog import Watchdog  # noqa: E402


def main(cases: Path):
    rank = mx.distributed.init().rank()
    watchdog = Watchdog(f"rank {rank}: error: ")
    generate, results = script.generate, []

    def generate_and_note(*arguments, **options):
        answer = generate(*arguments, **options)
        if arguments[4] is not None:  # not stock's
            results[-1]["tokens"] = answer[0]
        return answer

    script.generate = generate_and_note
    for case in json.loads(cases.read_text()):
        results.append({})
        case = case[rank] if isinstance(case[0], list) else case
        try:
            script.run(script.options.parser_of("").parse_args(case), watchdog)
        except ValueError as error:
            results[-1]["error"] = str(error)
    cases.with_name(f"rank-{rank}.json").write_text(json.dumps(results))
    watchdog.close()


main(Path(sys.argv[1]))
