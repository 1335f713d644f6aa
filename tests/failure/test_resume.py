"""A run that is killed and goes on: the whole answer is that of a run that nothing ended, here and on fewer ranks."""

import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SHIPPED, launch, of_a_user, random_model, save_model

import qwen3_expert_parallel
from expert_parallel.command.options import parser_of
from expert_parallel.failure import resume
from expert_parallel.failure.journal import Journal, read_past

SCRIPT = "qwen3_expert_parallel.py"
TOKENS = 12
RUN = ("--model", SHIPPED, "--max-tokens", TOKENS, "--devices", 3, "--no-verify", "--trials", 0, "--quiet")
SEEDED = ("--temp", 1, "--top-p", 0.95, "--seed", 7)


@pytest.fixture
def here(run_here):
    return functools.partial(run_here, SCRIPT)


@pytest.fixture(scope="module")
def uninterrupted(run_here, tmp_path_factory):
    """Options, journal, report and folder of a run that nothing ended."""

    @functools.cache
    def run(*options):
        folder = tmp_path_factory.mktemp("whole")
        done = run_here(
            SCRIPT, *RUN, *options, "--journal", folder / "run.jsonl", "--json", folder / "run.json",
            "--prompt", "import os\n", "--trace", folder / "run.npz",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return options, (folder / "run.jsonl").read_bytes(), json.loads((folder / "run.json").read_text()), folder

    return run


@pytest.fixture(params=[(), SEEDED, ("--rebalance-every", 4, "--rebalance-horizon", 100000)],
                ids=["greedy", "seeded", "rebalanced"])  # fmt: skip
def whole(request, uninterrupted):
    return uninterrupted(*request.param)


@pytest.fixture
def seeded(uninterrupted):
    return uninterrupted(*SEEDED)


def after(data: bytes, lines: int, more: int = 0) -> bytes:
    """So many lines of a journal, and some bytes of the next."""
    parts = data.splitlines(keepends=True)
    return b"".join(parts[:lines]) + b"".join(parts[lines:])[:more]


def refused(result, *words):
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr, result.stderr


def test_the_journal_is_the_answer(whole):
    _, data, report, _ = whole
    past = read_past(data)
    assert past.tokens == report["generation"]["tokens"] and len(past.tokens) == TOKENS and past.end == "length"
    assert past.header["prompt"]["text"] == "import os\n"
    assert report["journal"].pop("file").endswith("run.jsonl")
    expected = {"source": "measured", "tokens_replayed": 0, "tokens_new": TOKENS, "differing": 0, "seconds_replay": 0}
    assert report["journal"] == expected


@pytest.mark.parametrize(("lines", "more"), [(1, 0), (2, 20), (6, 0), (TOKENS + 1, 3), (TOKENS + 2, 0)])
def test_a_run_goes_on_where_it_was_cut(whole, lines, more, here, tmp_path):
    """Text, tokens, routing and moves are those of the run that nothing ended; --resume alone says what to do."""
    import numpy as np

    options, data, report, folder = whole
    path = tmp_path / "run.jsonl"
    path.write_bytes(after(data, lines, more))
    where = () if not options or options == SEEDED else options  # what decides the answer is in the journal
    done = here("--resume", path, "--devices", 3, "--no-verify", "--trials", 0, "--json", tmp_path / "run.json",
                "--trace", tmp_path / "run.npz", "--quiet", *where)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert path.read_bytes() == data
    again = json.loads((tmp_path / "run.json").read_text())
    for key in ("text", "tokens", "prompt_tokens"):
        assert again["generation"][key] == report["generation"][key], key
    assert done.stdout.strip() == report["generation"]["text"].strip()
    figures, replayed = again["journal"], min(lines - 1, TOKENS)
    assert (figures["tokens_replayed"], figures["tokens_new"]) == (replayed, TOKENS - replayed)
    assert figures["differing"] == 0 and (figures["seconds_replay"] > 0) == (replayed > 0)
    one, two = (np.load(where / "run.npz") for where in (folder, tmp_path))
    assert (one["experts"] == two["experts"]).all() and (one["prefill"] == two["prefill"]).all()
    if report["rebalancing"] is not None:
        looks = [[look["after_tokens"] for look in found["rebalancing"]["looks"]] for found in (report, again)]
        assert looks[0] == looks[1] and len(looks[0]) > 1


def test_nothing_begun_begins_with_the_options_of_the_command_line(seeded, here, tmp_path):
    options, data, report, _ = seeded
    path = tmp_path / "run.jsonl"
    for cut in (b"", data[:100]):
        path.write_bytes(cut)
        line = [word for word in RUN if word != "--quiet"]
        done = here("--resume", path, *line, *options, "--prompt", "import os\n")
        assert f"{path} was not begun: a new run".replace(" ", "") in "".join(done.stdout.split())
        assert read_past(path.read_bytes()).tokens == report["generation"]["tokens"]


def test_an_answer_that_ends_by_itself(here, tmp_path):
    """The end token is in the journal: a run that was killed before the last line must not sample it anew."""
    model = random_model(vocab_size=4096)
    folder = save_model(model, tmp_path / "model", vocab_size=4096)
    line = ("--model", folder, "--max-tokens", 6, "--devices", 2, "--no-verify", "--trials", 0, "--quiet")
    first = here(*line, "--prompt", "a b", "--journal", tmp_path / "a.jsonl")
    third = read_past((tmp_path / "a.jsonl").read_bytes()).tokens[2]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": third}))
    done = here(*line, "--prompt", "a b", "--journal", tmp_path / "b.jsonl", "--json", tmp_path / "b.json")
    assert done.returncode == first.returncode == 0, done.stderr
    data = (tmp_path / "b.jsonl").read_bytes()
    past, report = read_past(data), json.loads((tmp_path / "b.json").read_text())
    assert past.end == "stop" and past.tokens[-1] == third and past.tokens[:-1] == report["generation"]["tokens"]
    for lines in range(1, len(past.tokens) + 3):
        (tmp_path / "b.jsonl").write_bytes(after(data, lines))
        assert here("--resume", tmp_path / "b.jsonl", *line[4:]).stdout == done.stdout
        assert (tmp_path / "b.jsonl").read_bytes() == data


def test_tokens_that_would_be_chosen_otherwise_are_counted_and_said(seeded, here, tmp_path):
    """The journal's tokens stand, whatever the model says now."""
    _, data, report, _ = seeded
    past = read_past(data)
    journal = Journal(tmp_path / "run.jsonl", resume=False)
    del past.header["journal"]
    journal.begin(past.header)
    others = [past.tokens[0], (past.tokens[1] + 1) % 4096, *past.tokens[2:5]]
    for token in others:
        journal.add(token)
    journal.close()
    done = here("--resume", tmp_path / "run.jsonl", "--devices", 3, "--no-verify", "--trials", 0, "--quiet", "--json",
                tmp_path / "run.json")  # fmt: skip
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["generation"]["tokens"][:5] == others and len(found["generation"]["tokens"]) == TOKENS
    differing = found["journal"]["differing"]
    assert 1 <= differing <= 4
    assert done.stderr == f"{differing} of 5 tokens of {tmp_path}/run.jsonl would have been chosen otherwise here\n"


REFUSED = {
    ("--temp", 0.5): "--temp 0.5: {path} has {temp}; leave --temp out to go on",
    ("--max-tokens", 13): "--max-tokens 13: {path} has 12; leave",
    ("--kv-bits", 8): "--kv-bits 8: {path} has None; leave",
    ("--ignore-chat-template",): "--ignore-chat-template True: {path} has False; leave",
    ("--prompt", "another"): "--prompt is not that of the journal",
    ("--journal", "other.jsonl"): "--resume FILE writes on in FILE: leave --journal out",
    ("--json", "{path}"): "--json and --resume both name {path}: give each a file of its own",
}


@pytest.mark.parametrize("line", REFUSED, ids=lambda line: line[0])
def test_other_options_are_refused_by_name(seeded, line, here, tmp_path):
    _, data, _, _ = seeded
    path = tmp_path / "run.jsonl"
    path.write_bytes(after(data, 5, 7))
    result = here("--resume", path, *(str(word).format(path=path) for word in line), "--quiet")
    refused(result, REFUSED[line].format(path=path, temp=1.0))
    assert path.read_bytes() == after(data, 5, 7)


def test_control_c_says_how_to_go_on(here, tmp_path, monkeypatch):
    """And of an answer that is complete, what is done with it."""
    add, path = Journal.add, tmp_path / "run.jsonl"

    def interrupted(journal, token):
        add(journal, token)
        if len(journal.past.tokens) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", interrupted)
        stopped = here("--journal", path, "--prompt", "import os\n", *RUN)
    assert (stopped.returncode, stopped.stderr) == (130, f"\nstopped; --resume {path} goes on\n")
    assert len(read_past(path.read_bytes()).tokens) == 5
    loud = [word for word in RUN if word != "--quiet"]
    for said in ("is resumed after 5 tokens", f"is complete: its {TOKENS} tokens go through the model again, for the"):
        assert f"{path} {said}".replace(" ", "") in "".join(here("--resume", path, *loud).stdout.split())


def test_options_that_are_given_again_are_no_others(seeded, here, tmp_path):
    options, data, _, _ = seeded
    path = tmp_path / "run.jsonl"
    path.write_bytes(after(data, 5))
    assert here("--resume", path, *RUN, *options, "--prompt", "import os\n").returncode == 0
    assert path.read_bytes() == data


def test_a_loss_that_changes_the_answer_goes_on_with_the_same_devices(uninterrupted, here, tmp_path):
    options, data, _, _ = uninterrupted("--fail-device", "1@4", "--on-failure", "drop")
    path, line = tmp_path / "run.jsonl", ("--no-verify", "--trials", 0, "--quiet")
    for again in ((), ("--devices", 3, *options)):  # without a word of them three are lost from, not eight
        path.write_bytes(after(data, 7))
        assert here("--resume", path, *line, *again).returncode == 0
        assert path.read_bytes() == data
    path.write_bytes(after(data, 7))
    refused(here("--resume", path, *line, "--devices", 4), "--devices 4: ", "has 3; leave --devices out")
    refused(here("--resume", path, *line, "--fail-device", 2), "--fail-device ['2']: ", "has ['1@4']; leave")
    refused(here("--resume", path, *line, "--placement", "round-robin"), "with other the model's placement (")
    assert path.read_bytes() == after(data, 7)


def changed(path, data, **places):
    """A journal with another header."""
    past = read_past(data)
    del past.header["journal"]
    for place, value in places.items():
        kind, key = place.split("__")
        past.header[kind][key] = value
    journal = Journal(path, resume=False)
    journal.begin(past.header)
    for token in past.tokens[:3]:
        journal.add(token)
    journal.close()
    return path.read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions__mlx": "0.1.0"}, "is of another run, with other mlx (0.1.0 there, 0."),
        ({"versions__mlx-lm": "0.1.0"}, "other mlx-lm (0.1.0 there, 0."),
        ({"versions__expert-parallel": "0"}, "other expert-parallel (0 there, 0.1.0 here)"),
        ({"model__dtype": "mlx.core.bfloat16"}, "the model's dtype (mlx.core.bfloat16 there, mlx.core.float32 here)"),
        ({"model__config": "0" * 32, "model__weights": "1" * 32}, "the model's weights (11111111 there, "),
    ],
)
def test_another_model_and_other_versions_are_refused_by_name(seeded, change, words, here, tmp_path):
    path = tmp_path / "run.jsonl"
    data = changed(path, seeded[1], **change)
    refused(here("--resume", path, "--quiet"), words)
    assert path.read_bytes() == data


def test_another_model_of_the_same_shape_is_refused(seeded, here, tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "other")
    with (tmp_path / "other" / "model.safetensors").open("r+b") as file:
        file.seek(-4096, 2)
        file.write(bytes(4096))
    path = tmp_path / "run.jsonl"
    path.write_bytes(after(seeded[1], 4))
    refused(here("--resume", path, "--model", tmp_path / "other", "--quiet"), "with other the model's weights (")
    shutil.copytree(SHIPPED, tmp_path / "copy")  # moved, and the same
    line = ("--devices", 3, "--no-verify", "--trials", 0, "--quiet")
    assert here("--resume", path, "--model", tmp_path / "copy", *line, *seeded[0]).returncode == 0
    assert path.read_bytes() == seeded[1]


def test_where_a_journal_cannot_be(here, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "p.txt").write_text("import os\n")
    line = ("--model", SHIPPED, "--max-tokens", 2, "--quiet")
    refused(here(*line, "--journal", tmp_path / "nowhere" / "a"), "cannot write", "nowhere does not exist")
    refused(here(*line, "--journal", tmp_path / "folder"), "cannot write", "is a folder")
    refused(here(*line, "--journal", "/dev/null"), "cannot write /dev/null: a journal needs a file")
    refused(here(*line, "--journal", SHIPPED / "run.jsonl"), "would be written over the model")
    refused(here(*line, "--prompt", tmp_path / "p.txt", "--journal", tmp_path / "p.txt"), "over the prompt")
    refused(here(*line, "--journal", "/proc/run.jsonl"), "cannot write /proc/run.jsonl")  # read-only, even to root
    refused(here(*line, "--resume", tmp_path / "none"), "cannot resume", "--journal FILE begins one")
    refused(here(*line, "--resume", SHIPPED / "config.json"), "is no journal of this project")
    (tmp_path / "note").write_text("a line that has no end")
    refused(here(*line, "--resume", tmp_path / "note"), "is no journal of this project")
    assert (tmp_path / "note").read_text() == "a line that has no end"
    os.mkfifo(tmp_path / "pipe")  # would be waited for without end
    refused(here(*line, "--resume", tmp_path / "pipe"), "cannot resume", "it is no file")
    refused(here(*line, "--resume", "/dev/null"), "cannot resume /dev/null: it is no file")
    refused(here(*line, "--resume", tmp_path / "folder"), "cannot resume", "it is a folder")
    assert not (SHIPPED / "run.jsonl").exists() and (tmp_path / "p.txt").read_text() == "import os\n"


FULL = """
import resource, sys
from expert_parallel.failure import resume
size, begin = int(sys.argv.pop(1)), resume.Kept.begin
def begin_and_fill_the_disk(self, header):
    begin(self, header)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
resume.Kept.begin = begin_and_fill_the_disk
import qwen3_expert_parallel
qwen3_expert_parallel.main()
"""


def test_a_full_disk_on_the_way_keeps_what_was_said(seeded, tmp_path):
    """In a process of its own, whose files have a limit from the time on when its journal has begun."""
    options, data, _, _ = seeded
    path, size = tmp_path / "run.jsonl", len(after(data, 6, 11))
    path.write_bytes(after(data, 3))
    line = [sys.executable, "-c", FULL, size, "--resume", path, *RUN, *options]
    done = subprocess.run([*map(str, line)], cwd=ROOT, env=of_a_user(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: cannot write {path}: File too large; its 5 tokens are safe")
    assert path.read_bytes() == data[:size]


def test_three_ranks_then_two_then_one(here, tmp_path):
    """The journal goes through all of them; standard output has the whole answer each time."""
    path = tmp_path / "run.jsonl"
    line = ("--no-verify", "--trials", 0, "--quiet")
    options = ("--model", SHIPPED, "--max-tokens", TOKENS, "--temp", 0.8, "--seed", 3)
    alone = here(*options, *line, "--journal", tmp_path / "alone.jsonl")
    first = launch("mpi", 3, SCRIPT, *options, *line, "--journal", path, tmp_path=tmp_path)
    assert first[0][0] == 0, first
    data = path.read_bytes()
    path.write_bytes(after(data, 5, 3))
    second = launch("ring", 2, SCRIPT, "--resume", path, *line, tmp_path=tmp_path)
    assert [status for status, _, _ in second] == [0, 0], second
    assert path.read_bytes() == data
    path.write_bytes(after(data, 8))
    third = here("--resume", path, *line)
    assert path.read_bytes() == data
    assert third.stdout == first[0][1] == second[0][1] == alone.stdout
    assert read_past(data).tokens == read_past((tmp_path / "alone.jsonl").read_bytes()).tokens


def test_ranks_refuse_together(seeded, tmp_path):
    """Rank 0 alone has the file; all say why they stop."""
    path = tmp_path / "run.jsonl"
    path.write_bytes(seeded[1].replace(b'"n": 3', b'"n": 4'))
    results = launch("ring", 2, SCRIPT, "--resume", path, *RUN[:4], "--quiet", tmp_path=tmp_path)
    assert [status for status, _, _ in results] == [2, 2], results
    assert "is damaged in line 5" in results[0][2]
    assert "rank 0 stopped: " in results[1][2] and "is damaged in line 5" in results[1][2]


def test_every_option_is_known_to_decide_the_answer_or_not():
    """A new one has to be put on one of the two sides."""
    elsewhere = {
        "prompt",
        "prompts",
        "overlap",
        "trust_remote_code",
        "devices",
        "placement",
        "redundant_experts",
        "rebalance_every",
    }
    elsewhere |= {"rebalance_threshold", "rebalance_horizon", "expert_memory", "cache_policy", "prefetch", "combine"}
    elsewhere |= {"attention", "streams", "verify", "trials", "timeout", "trace", "save_placement", "placement_format"}
    elsewhere |= {"plots", "html", "json", "full", "quiet", "journal", "resume"}
    assert {*vars(parser_of("").parse_args([]))} == elsewhere | {*resume.DECIDING, *resume.PLACES}
    assert qwen3_expert_parallel.OWN_OPTIONS[-2:] == ("journal", "resume")
