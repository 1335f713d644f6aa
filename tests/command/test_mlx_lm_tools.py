"""mlx-lm's own tools with spread experts: the same answers as without, by clients that nobody here made."""

import contextlib
import importlib
import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import Rank
from conftest import ROOT, SHIPPED, launch, launch_command, of_a_user, random_model
from mlx_lm import batch_generate, load, stream_generate
from mlx_lm.utils import save_model

from expert_parallel import __main__ as names
from expert_parallel import place_experts, shard_model
from expert_parallel.command import mlx_lm_tools
from expert_parallel.ranks.launch import free_ports

PROMPTS = ["class Parser:\n", "def add(a, b):\n    return", "import os\n\n\ndef", "for i in range(", "x = {", "if not"]
TOKENS = 12


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory):
    """The shipped model as a checkpoint in float32: stock then computes on the CPU in what we take there."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    for file in SHIPPED.glob("*.json"):
        if "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    model, _ = load(str(SHIPPED))
    model.set_dtype(mx.float32)
    save_model(folder, model)
    return folder


@pytest.fixture(scope="module")
def expected(in_float32):
    """{prompt: stock's text}."""
    model, tokenizer = load(str(in_float32))
    answers = {}
    for prompt in PROMPTS:
        parts = stream_generate(model, tokenizer, prompt, max_tokens=TOKENS)
        answers[prompt] = "".join(part.text for part in parts)
    return answers


def tool(name, *line, stdin=""):
    """(printed, on standard error) of a tool in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["expert-parallel", name, *map(str, line)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        with contextlib.suppress(SystemExit):
            names.main()
    return out.getvalue(), err.getvalue()


# --- in one process ---------------------------------------------------------------------------------------------


def test_generate_says_what_mlx_lm_says(in_float32, expected):
    before = importlib.import_module("mlx_lm.generate").load
    asked = ("--model", in_float32, "--max-tokens", TOKENS, "--devices", 4, "--redundant-experts", "each")
    for prompt in PROMPTS[:2]:
        out, err = tool("generate", *asked, "--prompt", prompt)
        assert out.split("=" * 10)[1] == f"\n{expected[prompt]}\n" and not err
    out, _ = tool("generate", *asked, "--prompt", "-", "--expert-memory", "30%", stdin=PROMPTS[2])
    assert expected[PROMPTS[2]] in out
    assert importlib.import_module("mlx_lm.generate").load is before and sys.argv[0] != "expert-parallel generate"


def test_what_is_asked_reaches_the_experts(in_float32, monkeypatch):
    from expert_parallel.checkpoint import loading

    seen, original = [], loading.load_sharded
    monkeypatch.setattr(loading, "load_sharded", lambda *a, **how: seen.append(how) or original(*a, **how))
    line = ("--model", in_float32, "--max-tokens", 2, "--prompt", "x", "--devices", 3, "--placement", "round-robin")
    tool("generate", *line, "--expert-memory", "50%", "--cache-policy", "lru", "--dtype", "keep", "--combine", "gather")
    (how,) = seen
    assert how["placement"] == place_experts(np.ones((4, 128)), 3, "round-robin")
    names = ("expert_memory", "cache_policy", "prefetch", "dtype", "combine", "attention")
    assert [how[name] for name in names] == ["50%", "lru", "none", "keep", "gather", "replicated"]


def test_benchmark_and_a_batch_of_it(in_float32):
    for batch in (1, 3):
        line = ("--model", in_float32, "-p", 8, "-g", 4, "-n", 1, "-b", batch)
        out, _ = tool("benchmark", *line, "--devices", 2)
        assert re.search(r"Averages: prompt_tps=[\d.]+, generation_tps=[\d.]+", out) and f"batch_size={batch}" in out


def test_chat_reads_what_is_written(in_float32, expected, tmp_path):
    """By the shipped model's template; another base model may have none, which is said."""
    line = ("--max-tokens", TOKENS, "--devices", 2)
    out, err = tool("chat", "--model", in_float32, *line, stdin=f"{PROMPTS[3]}\nq\n")
    assert expected[PROMPTS[3]] in out and "bye" in out and not err
    base = tmp_path / "base"
    base.mkdir()
    for file in in_float32.iterdir():
        (base / file.name).symlink_to(file)
    about = json.loads((in_float32 / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").unlink()
    (base / "tokenizer_config.json").write_text(json.dumps({**about, "chat_template": None}))
    _, err = tool("chat", "--model", base, *line, stdin="x\n")
    assert err == f"error: {base} has no chat template, which chat needs: take generate, or server's completions\n"


def test_the_shipped_template_adds_no_word_and_is_the_recipe_s():
    """A text alone stays as it is, token by token; of more each begins a line, but an answer."""
    _, tokenizer = load(str(SHIPPED), lazy=True)
    assert json.dumps(tokenizer.chat_template)[1:-1] in recipe_s_template()
    for text in (*PROMPTS, "\n  x\n"):
        said = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(said, add_generation_prompt=True)
        assert list(ids) == tokenizer.encode(text)
    said = [{"role": role, "content": text} for role, text in (("system", "# x"), ("user", "a = "), ("assistant", "1"))]
    text = tokenizer.apply_chat_template([*said, {"role": "user", "content": "b"}], tokenize=False)
    assert text == "# x\na = 1\nb"


def recipe_s_template():
    source = (ROOT / "tools" / "train_tiny_model.py").read_text().partition("CHAT_TEMPLATE = (")[2].partition("\n)")[0]
    return "".join(line.strip()[1:-1] for line in source.splitlines())


def test_without_a_model_the_shipped_one_is_taken_and_named():
    out, err = tool("generate", "--prompt", "class A:", "--max-tokens", 2, "--devices", 2)
    assert "Taking tiny-qwen3-moe" in err and "2 tokens" in out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("--pipeline",), "--pipeline splits layers"),
        (("--devices", 0), "--devices must be at least 1"),
        (("--devices", 500), "500 devices: needs 1 to 128"),
        (("--cache-policy", "lru"), "--cache-policy is of no use without --expert-memory"),
        (("--rebalance-pause", 0.1), "--rebalance-pause is of no use without --rebalance-every"),
        (
            ("--rebalance-pause", 0, "--rebalance-every", 8),
            "--rebalance-pause must be between 1e-06 and 1000000.0, got",
        ),
        (("--quantize-activations",), "not possible with spread experts: quantize_activations"),
    ],
)
def test_what_is_refused_in_a_line(line, words):
    out, err = tool("benchmark", "--model", SHIPPED, *line)
    assert words in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("name", sorted(mlx_lm_tools.TOOLS))
def test_a_flag_that_nobody_knows_is_named_in_a_line(name):
    out, err = tool(name, "--model", SHIPPED, "--nonsense", 3)
    assert err == "error: unrecognized arguments: --nonsense 3 (--help explains)\n" and not out
    out, err = tool(name, "--nonsense", 3)  # before anything is said of the model that it would take
    assert err == "error: unrecognized arguments: --nonsense 3 (--help explains)\n" and not out


@pytest.mark.parametrize("content", [None, b"nothing", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_prompt_cache_that_cannot_be_read_is_named_in_a_line(content, tmp_path):
    path = tmp_path / "c.safetensors"
    if content:
        path.write_bytes(content)
    _, err = tool("generate", "--model", SHIPPED, "--prompt", "x", "--prompt-cache-file", path)
    assert err.startswith(f"error: --prompt-cache-file {path} cannot be read: ") and err.count("\n") == 1
    assert err.endswith("; make one with mlx_lm.cache_prompt, or leave the option out\n")


def test_ranks_hand_on_no_token_in_which_not_all_had_a_part(monkeypatch):
    """MLX's ring lets a sum pass for done when a peer is gone: alone, and in a batch that others join and leave."""
    module, lost = importlib.import_module("mlx_lm.generate"), []

    def all_sum(values, group=None):  # of two ranks, the other of which sends zeros and its voice
        other = mx.concatenate([mx.zeros(len(values) - 1, mx.int32), values[-1:]])
        return values if lost else values + other

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    more, of_batches = mlx_lm_tools.following(module, Rank(0, 2))
    monkeypatch.setattr(module.GenerationBatch, "next", of_batches["next"])
    model, tokenizer = random_model(), load(str(SHIPPED), lazy=True)[1]
    sampler = more["make_sampler"](temp=0)
    assert sampler is more["make_sampler"](temp=0)  # so that a batch is sampled at once
    for _ in range(2):  # what one leaves behind is no harm to the next
        stream = more["stream_generate"](model, tokenizer, [5, 6, 7], max_tokens=9, sampler=sampler)
        expected = [part.token for part in stream_generate(model, tokenizer, [5, 6, 7], max_tokens=4)]
        assert [next(stream).token for _ in range(4)] == expected
        stream.close()
    batch = module.BatchGenerator(model, sampler=sampler, prefill_batch_size=2)
    batch.insert([[5, 6, 7], [8]], [20, 2])
    assert [len(batch.next_generated()) for _ in range(4)] == [1, 2, 1, 1]
    batch.insert([[5, 6, 7]], [20], samplers=[more["make_sampler"](temp=0.5)])
    assert [len(batch.next_generated()) for _ in range(4)][-1] == 2
    # One pass is under way and whole; what is sampled from now on is not.
    lost.append(True)
    assert len(batch.next_generated()) == 2
    with pytest.raises(RuntimeError, match="the connection to a peer was lost"):
        batch.next_generated()
    lost.clear()
    more, _ = mlx_lm_tools.following(module, Rank(0, 2))
    stream = more["stream_generate"](model, tokenizer, [5, 6], max_tokens=9, sampler=more["make_sampler"](temp=0))
    next(stream)
    lost.append(True)
    next(stream)
    with pytest.raises(RuntimeError, match="the connection to a peer was lost"):
        next(stream)


def test_a_tool_that_moved_is_named(monkeypatch):
    monkeypatch.delattr("mlx_lm.benchmark.sharded_load")
    assert "mlx_lm.benchmark has no sharded_load any more" in tool("benchmark", "--model", SHIPPED)[1]


def test_help_is_both():
    out, _ = tool("benchmark", "--help")
    assert "--placement STRATEGY_OR_FILE" in out and "--generation-tokens" in out and "--fail-device" not in out


def test_a_draft_model_stays_whole(in_float32, expected):
    """mlx-lm drafts with it; it may have no experts at all."""
    line = ("--model", in_float32, "--max-tokens", TOKENS, "--devices", 2, "--draft-model", in_float32)
    out, _ = tool("generate", *line, "--prompt", PROMPTS[0])
    assert expected[PROMPTS[0]] in out


# --- many sequences at once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [False, True])
def test_logits_of_a_batch_are_those_of_stock_with_the_same_batch(copies, monkeypatch):
    """Sequences of other lengths that leave at other times; to the bit."""
    from expert_parallel.failure.survival import protected

    module = importlib.import_module("mlx_lm.generate")
    placement = place_experts(np.ones((3, 16)), 4)

    class Plain:
        """As much of a tokenizer as a batch needs."""

        eos_token_ids, has_thinking = {3}, False
        decode = staticmethod(str)

    def run(model):
        seen = []

        def sampler(logprobs):
            seen.append(np.array(logprobs))
            return mx.argmax(logprobs, axis=-1)

        monkeypatch.setattr(module, "greedy_sampler", sampler)
        answer = batch_generate(model, Plain(), [[5, 6, 7], [40], [8, 9, 1, 2, 60], [33, 3]], max_tokens=[9, 4, 7, 5])
        return answer.texts, seen

    texts, logits = run(random_model())
    ours, seen = run(shard_model(random_model(), protected(placement) if copies else placement))
    assert ours == texts and len(seen) == len(logits) > 8
    assert all(np.array_equal(a, b) for a, b in zip(seen, logits, strict=True))
    assert {len(row) for row in logits} >= {1, 4}  # all of them at first, one in the end


# --- a server ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(backend, folder, tmp_path, *more):
    """(address, processes) of a server with the experts on two devices or two ranks."""
    (port,) = free_ports(1)
    line = ("-m", "expert_parallel", "server", "--model", folder, "--port", port, "--report-every", 64, *more)
    if backend == "one":
        started = [([sys.executable, *map(str, line), "--devices", "2"], of_a_user())]
    else:
        started = launch_command(backend, 2, *line, tmp_path=tmp_path)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((tmp_path / f"err{n}").open("w")) for n in range(len(started))]
        processes = [
            subprocess.Popen(command, cwd=ROOT, env=environment, stderr=err, stdout=err, stdin=subprocess.DEVNULL)
            for (command, environment), err in zip(started, files, strict=True)
        ]
        try:
            address, end = f"http://127.0.0.1:{port}", time.monotonic() + 90
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{address}/health").close()
                    break
                assert all(process.poll() is None for process in processes) and time.monotonic() < end
                time.sleep(0.1)
            yield address, processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


BAD = ({"logit_bias": {"5": None}}, {"logit_bias": {"five": 1}}, {"logit_bias": 5}, {"seed": -1}, {"seed": 10**30})


def check_server(backend, folder, tmp_path, expected):
    openai = pytest.importorskip("openai")
    with serving(backend, folder, tmp_path) as (address, processes):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60, max_retries=0)
        asked = {"model": "default_model", "max_tokens": TOKENS, "temperature": 0}

        def complete(prompt, stream):
            if not stream:
                return client.completions.create(prompt=prompt, **asked).choices[0].text
            return "".join(
                part.choices[0].text for part in client.completions.create(prompt=prompt, stream=True, **asked)
            )

        # 1. All at once, streamed or not: stock's answers.
        found, threads = {}, []
        for n, prompt in enumerate(PROMPTS):
            ask = lambda prompt=prompt, n=n: found.update({prompt: complete(prompt, n % 2 == 1)})  # noqa: E731
            threads.append(threading.Thread(target=ask))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == expected
        # 2. Who hangs up, asks nonsense or too much, or for another model does no harm.
        body = json.dumps({"prompt": "class", "stream": True, "max_tokens": 400}).encode()
        rude = socket.create_connection(address.removeprefix("http://").split(":"))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        rude.sendall(head.encode() + body)
        rude.recv(200)
        rude.close()
        bad = [b"{", b"[]", b"\xff", b'{"prompt": 3}', b'{"prompt": "x", "max_tokens": "many"}']
        bad += [json.dumps({"prompt": "x", **each}).encode() for each in BAD]
        for body in bad:
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{address}/v1/completions", data=body, timeout=20)
            assert 400 <= refused.value.code < 500 and refused.value.read(), body
            assert refused.value.headers["Access-Control-Allow-Origin"] == "*"
        with pytest.raises(openai.APIStatusError):
            client.completions.create(prompt="x", **{**asked, "model": str(tmp_path / "nothing")})
        client.completions.create(prompt="x " * 700, **{**asked, "max_tokens": 1})  # longer than its context
        # 3. Answers go on; a chat, too.
        assert complete(PROMPTS[0], False) == expected[PROMPTS[0]]
        messages = [{"role": "user", "content": PROMPTS[1]}]
        answer = client.chat.completions.create(messages=messages, **asked).choices[0].message.content
        assert answer == expected[PROMPTS[1]]
        # 4. What the devices did.
        with urllib.request.urlopen(f"{address}/metrics") as page:
            text = page.read().decode()
            assert page.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        slots = re.findall(r'expert_parallel_device_slots_total{device="(\d)"} ([\d.]+)', text)
        tokens = int(re.search(r"tokens_total (\d+)", text)[1])
        assert [device for device, _ in slots] == ["0", "1"]
        assert sum(float(count) for _, count in slots) == tokens * 4 * 8 > 0
        assert all(process.poll() is None for process in processes)
        # It listens on this machine alone.
        port, other = int(address.rpartition(":")[2]), socket.gethostbyname(socket.gethostname())
        if other != "127.0.0.1":
            with pytest.raises(OSError), socket.create_connection((other, port), 1):
                pass
    assert re.search(r"\d+ tokens: balancedness 0\.\d\d, load by device \d+% \d+%", (tmp_path / "err0").read_text())


def test_a_server_of_two_ranks(in_float32, tmp_path, expected):
    check_server("ring", in_float32, tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["one", "mpi"])
def test_servers_of_other_kinds(backend, in_float32, tmp_path, expected):
    if backend == "mpi" and not os.access("/usr/bin/mpirun", os.X_OK):
        pytest.skip("no mpirun on this machine")
    check_server(backend, in_float32, tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ring", "mpi"])
def test_generate_over_ranks_prints_once(backend, in_float32, tmp_path, expected):
    line = ("-m", "expert_parallel", "generate", "--model", in_float32, "--max-tokens", TOKENS, "--prompt", PROMPTS[1])
    results = launch(backend, 2, *line, tmp_path=tmp_path)
    assert [status for status, _, _ in results] == [0] * len(results), results
    printed = "".join(out for _, out, _ in results)
    assert printed.count(expected[PROMPTS[1]]) == 1 and printed.count("Generation:") == 1


@pytest.mark.slow
def test_chat_at_a_terminal(in_float32, expected):
    """As a person types it; Control-D at the end."""
    master, slave = pty.openpty()
    line = ("-m", "expert_parallel", "chat", "--model", in_float32, "--max-tokens", TOKENS, "--devices", 2)
    chat = subprocess.Popen(
        [sys.executable, *map(str, line)],
        cwd=ROOT,
        env=of_a_user(TERM="xterm"),
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    seen = b""

    def until(words):
        nonlocal seen
        while words not in seen:
            seen += os.read(master, 4096)

    try:
        until(b"\xe2\x80\xba")
        os.write(master, f"{PROMPTS[3]}\n".encode())
        until(b"12 tokens")
        assert expected[PROMPTS[3]].strip().split("\n")[0].encode() in seen
        os.write(master, b"q\n")
        until(b"bye")
        assert chat.wait(20) == 0
    finally:
        chat.kill()
        os.close(master)


def test_a_server_names_its_model_and_ends_by_control_c(in_float32, tmp_path, monkeypatch):
    """Also where no model was ever downloaded: mlx-lm alone answers with a traceback there."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nothing"))
    with serving("one", in_float32, tmp_path) as (address, (process,)):
        with urllib.request.urlopen(f"{address}/v1/models") as page:
            assert [model["id"] for model in json.load(page)["data"]] == [str(in_float32)]
        urllib.request.urlopen(f"{address}/v1/completions", data=b'{"prompt": "x", "max_tokens": 1}').close()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)
    assert "Traceback" not in (tmp_path / "err0").read_text()


def test_every_tool_is_known_by_its_name():
    assert set(mlx_lm_tools.TOOLS) == set(names.MLX_LM)
    for name, hooks in mlx_lm_tools.TOOLS.items():
        module = importlib.import_module(f"mlx_lm.{name}")
        assert all(hasattr(module, hook) for hook in hooks)
