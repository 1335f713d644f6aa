"""Does a server over ranks hold for 1,000 requests? Every answer checked, memory watched, experts moved meanwhile.

    python benchmarks/serving.py                          2 ranks over the ring, looking every 256 tokens
    python benchmarks/serving.py --rebalance-every 0      the same, and no expert moves

`python -m expert_parallel server` serves a float32 copy of the shipped model, in which stock mlx-lm computes on the
CPU what is computed here. Clients send prompts of 5 to 300 tokens, of which short ones are the most frequent, and want
1 to 40 tokens; a third is streamed, one in 20 hangs up half-way. Each answer has to be what stock mlx-lm says to that
prompt alone; where it is not, how near the two best tokens of stock were at the first other one (in logits) says
whether a batch has rounded another way.
"""

import argparse
import contextlib
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mlx.core as mx
import numpy as np
from mlx_lm import load, stream_generate
from mlx_lm.utils import save_model

from expert_parallel.checkpoint.finding import SHIPPED
from expert_parallel.command import output
from expert_parallel.ranks.launch import free_ports, rank_commands
from expert_parallel.report import table

LONGEST, PROMPTS, NEAR = 40, 100, 1e-3  # tokens of an answer, different prompts, and what counts as a tie of logits


@dataclass
class Answer:
    """What stock says: its tokens, and by how much each was ahead of the second best (in logits)."""

    tokenizer: object
    tokens: list[int] = field(default_factory=list)
    ahead: list[float] = field(default_factory=list)

    def text(self, count: int) -> str:
        """Of an answer that ends after so many tokens."""
        detokenizer = self.tokenizer.detokenizer
        for token in self.tokens[:count]:
            detokenizer.add_token(token)
        detokenizer.finalize()
        return detokenizer.text


def float32_copy(folder: Path) -> Path:
    for file in Path(SHIPPED).glob("*.json"):
        if "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    model, _ = load(str(SHIPPED))
    model.set_dtype(mx.float32)
    save_model(folder, model)
    return folder


def expected_answers(folder: Path, rng) -> dict[str, Answer]:
    """{prompt: stock's answer} for windows of the held-out texts, 5 to 300 tokens long."""
    model, tokenizer = load(str(folder))
    texts = [tokenizer.encode(path.read_text()) for path in sorted((Path(SHIPPED) / "held-out").glob("*.txt"))]
    answers = {}
    for n in range(PROMPTS):
        ids, length = texts[n % len(texts)], int(np.exp(rng.uniform(np.log(5), np.log(300))))
        at = int(rng.integers(len(ids) - length))
        prompt, answer = tokenizer.decode(ids[at : at + length]), Answer(tokenizer)
        for part in stream_generate(model, tokenizer, prompt, max_tokens=LONGEST):
            best = np.sort(np.array(part.logprobs))[-2:]
            if part.finish_reason != "stop":
                answer.tokens.append(part.token)
            answer.ahead.append(float(best[1] - best[0]))
        answers[prompt] = answer
    return answers


def judged(answer: Answer, wanted: int, text: str, whole: bool) -> str | float:
    """Right, or by how much stock's token was ahead where the first other one stands; part of an answer may be cut."""
    right = answer.text(wanted)
    if text == right or (not whole and right.startswith(text)):
        return "right"
    longest = next(n for n in range(wanted, -1, -1) if text.startswith(answer.text(n)))
    return answer.ahead[min(longest, len(answer.ahead) - 1)]


def ask(address: str, prompt: str, wanted: int, how: str) -> str:
    """The answer's text; "hang up" leaves half-way."""
    body = {"prompt": prompt, "max_tokens": wanted, "temperature": 0, "stream": how != "whole"}
    with urllib.request.urlopen(f"{address}/v1/completions", data=json.dumps(body).encode(), timeout=120) as page:
        if how == "whole":
            return json.load(page)["choices"][0]["text"]
        text, parts, ended = "", 0, False
        for line in page:
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                text, parts, ended = text + (choice["text"] or ""), parts + 1, bool(choice["finish_reason"])
            if how == "hang up" and parts >= max(1, wanted // 2):
                return text
        if not ended:
            raise OSError("a stream ended before its answer")
        return text


def resident(pid: int) -> float:
    """MB."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024 / 1e6


def metric(text: str, name: str) -> float:
    line = next((line for line in text.splitlines() if line.startswith(f"expert_parallel_{name} ")), "x 0")
    return float(line.split()[1])


@contextlib.contextmanager
def serving(args, model: Path, folder: Path):
    """(address, process ids of the ranks) of a server; ended by Control-C."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "expert_parallel", "server", "--model", str(model), "--port", str(port)]
    if args.expert_memory:
        command += ["--expert-memory", args.expert_memory]
    elif args.rebalance_every:
        command += ["--rebalance-every", str(args.rebalance_every), "--rebalance-horizon", "100000"]
    log = (folder / "server.log").open("w")
    options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
    lines = rank_commands("ring", 2, command, folder)
    processes = [subprocess.Popen(line, env=environment, **options) for line, environment in lines]
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health").close()
                break
            if time.monotonic() > end or any(process.poll() is not None for process in processes):
                raise ValueError(f"the server did not start: {Path(log.name).read_text().strip()[-300:]}")
            time.sleep(0.2)
        yield address, [process.pid for process in processes]
    finally:
        processes[0].send_signal(signal.SIGINT)
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def run(args):
    rng, console = np.random.default_rng(args.seed), output.console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "model").mkdir()
        model = float32_copy(folder / "model")
        answers = expected_answers(model, rng)
        todo, verdicts, seconds, tokens, failed, rows = queue.Queue(), [], [], [0], [], []
        prompts, kinds = list(answers), ["whole"] * 13 + ["streamed"] * 6 + ["hang up"]
        for n in range(args.requests):
            todo.put((prompts[rng.integers(PROMPTS)], int(rng.integers(1, LONGEST + 1)), kinds[n % len(kinds)]))

        def client(address):
            while True:
                try:
                    prompt, wanted, how = todo.get_nowait()
                except queue.Empty:
                    return
                began = time.monotonic()
                try:
                    text = ask(address, prompt, wanted, how)
                except Exception as error:  # whatever it is, a request was lost
                    failed.append(f"{type(error).__name__}: {error}")
                    continue
                seconds.append(time.monotonic() - began)
                tokens[0] += wanted if how != "hang up" else 0
                verdicts.append(judged(answers[prompt], wanted, text, how != "hang up"))

        with serving(args, model, folder) as (address, pids):
            threads = [threading.Thread(target=client, args=(address,)) for _ in range(args.clients)]
            began, number = time.monotonic(), 0
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) or len(verdicts) + len(failed) >= number + 100:
                if len(verdicts) + len(failed) >= number + 100:
                    number += 100
                    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as page:
                        text = page.read().decode()
                    moves, pause = (metric(text, name) for name in ("moves_total", "longest_pause_seconds"))
                    row = {"requests": number, "resident_mb": [resident(pid) for pid in pids], "moves": int(moves)}
                    rows.append({**row, "longest_pause_seconds": pause, "balancedness": metric(text, "balancedness")})
                time.sleep(0.05)
            took = time.monotonic() - began

    cells = [(f"{row['requests']}", *(f"{mb:.1f}" for mb in row["resident_mb"]), f"{row['moves']}",
              f"{1e3 * row['longest_pause_seconds']:.0f}", f"{row['balancedness']:.2f}") for row in rows]  # fmt: skip
    memory, every = args.expert_memory, args.rebalance_every
    what = f"--expert-memory {memory}" if memory else f"--rebalance-every {every}"
    title = f"A server of 2 ranks (measured; resident MB, longest pause in ms; {what})"
    names = ("requests", "rank 0", "rank 1", "moves", "pause", "balancedness")
    console.print(table.of_rows(title, *names, rows=cells))
    other = [ahead for ahead in verdicts if ahead != "right"]
    near = [ahead for ahead in other if ahead < NEAR]
    console.print(f"{args.requests} requests: {len(verdicts)} answered, {len(failed)} failed {failed[:2] or ''}")
    worst = [f"{ahead:.1e}" for ahead in sorted(other)][-3:] or ""
    said = f"{verdicts.count('right')} as stock says, {len(near)} other by a near tie (two best within {NEAR:g})"
    console.print(f"{said}, {len(other) - len(near)} wrong {worst}")
    half, most = np.percentile(seconds, [50, 99])
    speed = f"{took:.0f} s, {tokens[0] / took:.0f} tokens/s wanted by {args.clients} clients"
    console.print(f"{speed}; seconds of a request: median {half:.2f}, 99% below {most:.2f}")
    if args.json:
        figures = {"environment": table.environment(), "rows": rows, "requests": args.requests, "seconds": took}
        figures |= {"answered": len(verdicts), "failed": failed, "right": verdicts.count("right"), "other": other}
        output.write_json(args.json, figures | {"seconds_of_a_request": {"median": half, "percentile_99": most}})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rebalance-every", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--expert-memory", metavar="SIZE", help="read the others from disk; no expert moves, then")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    with output.exit_on_user_error():
        run(parser.parse_args())


if __name__ == "__main__":
    main()
