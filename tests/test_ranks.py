"""Real ranks, over MPI and over sockets: the same tokens as stock mlx-lm, and clear ends."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SHIPPED, launch, launch_command, run_script

SCRIPT = "qwen3_expert_parallel.py"
RUN = (SCRIPT, "--model", SHIPPED, "--max-tokens", 6, "--prompt", "import os\n", "--verify")


def figures_of(backend, ranks, tmp_path, *arguments):
    results = launch(backend, ranks, *RUN, "--json", tmp_path / "o.json", *arguments, tmp_path=tmp_path)
    assert all(status == 0 for status, _, _ in results), results
    return json.loads((tmp_path / "o.json").read_text()), results


def assert_parity(figures):
    assert figures["parity"]["tokens_equal"] is True
    assert figures["parity"]["max_abs_logit_difference"] < 1e-4


@pytest.mark.parametrize("backend", ["mpi", "ring"])
@pytest.mark.parametrize("combine", ["reduce", "gather"])
def test_two_ranks_say_what_stock_says(backend, combine, tmp_path):
    figures, results = figures_of(backend, 2, tmp_path, "--combine", combine)
    assert_parity(figures)
    counted = figures["communication"]["counted"]
    assert counted["payload_bytes_per_token"] == pytest.approx(figures["communication"]["bytes_per_token"], rel=0.15)
    held = [rank["expert_bytes"] for rank in figures["ranks"]]
    assert held[0] == held[1] == figures["memory"]["full_model_expert_bytes"] // 2
    assert len([out for _, out, _ in results if "Parity" in out]) == 1


def test_attention_sharded_too(tmp_path):
    figures, _ = figures_of("mpi", 2, tmp_path, "--attention", "sharded")
    assert_parity(figures)
    assert figures["ranks"][0]["rest_bytes"] < figures["memory"]["full_model_bytes"] * 0.09


@pytest.mark.parametrize("ranks", [3, 5])
def test_experts_that_do_not_divide(ranks, tmp_path):
    figures, _ = figures_of("mpi", ranks, tmp_path, "--placement", "round-robin")
    assert_parity(figures)


def test_a_placement_with_copies_by_hand(tmp_path):
    (tmp_path / "p.json").write_text('{"every_layer": ["0-79", "48-127"]}')
    figures, _ = figures_of("mpi", 2, tmp_path, "--placement", tmp_path / "p.json")
    assert_parity(figures)
    slots = [sum(rank["slots_computed_per_layer"]) for rank in figures["ranks"]]
    assert abs(slots[0] - slots[1]) < 0.2 * sum(slots)


def test_sampling_gives_every_rank_the_same_tokens(tmp_path):
    figures, _ = figures_of("ring", 2, tmp_path, "--temp", 1, "--seed", 3)
    assert figures["parity"]["tokens_equal"] is True


def test_heads_that_do_not_divide_are_refused_with_the_numbers(tmp_path):
    results = launch("mpi", 3, *RUN, "--attention", "sharded", tmp_path=tmp_path)
    assert results[0][0] != 0
    assert "4 heads" in results[0][2]
    assert "Traceback" not in results[0][2]


def test_more_ranks_or_devices_than_fit(tmp_path):
    results = launch("ring", 2, *RUN, "--devices", 3, tmp_path=tmp_path)
    assert [status for status, _, _ in results] == [2, 2]
    assert all("--devices 3" in err and "Traceback" not in err for _, _, err in results)


def start_ring(tmp_path, per_rank_arguments):
    commands = launch_command("ring", len(per_rank_arguments), tmp_path=tmp_path)
    return [
        subprocess.Popen(
            [*command, *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for (command, environment), arguments in zip(commands, per_rank_arguments, strict=True)
    ]


def test_ranks_with_other_placements_stop_instead_of_summing(tmp_path):
    placements = ("contiguous", "round-robin")
    ranks = start_ring(tmp_path, [(*RUN, "--placement", p) for p in placements])
    for rank in ranks:
        out, err = rank.communicate(timeout=60)
        assert rank.returncode == 2, err
        assert "rank 1 has other" in err
        assert "placement" in err


def test_a_missing_peer_ends_by_the_time_limit(tmp_path):
    command, environment = launch_command("ring", 2, *RUN, "--timeout", 3, tmp_path=tmp_path)[0]
    begin = time.time()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, stdin=-3)
    assert done.returncode != 0
    assert "did not start within 3 s" in done.stderr
    assert time.time() - begin < 40


@pytest.mark.parametrize("backend", ["ring"])
def test_a_killed_rank_ends_the_others_with_a_line(backend, tmp_path):
    endless = (*RUN[:3], "--max-tokens", 480, "--prompt", "import os\n", "--no-verify")
    ranks = start_ring(tmp_path, [endless, endless])
    seen = ""
    while "answer" not in seen:
        seen = ranks[0].stdout.readline()
        assert seen, ranks[0].stderr.read()
    time.sleep(1)
    os.kill(ranks[1].pid, signal.SIGKILL)
    begin = time.time()
    out, err = ranks[0].communicate(timeout=30)
    assert time.time() - begin < 15
    assert ranks[0].returncode != 0
    assert "rank 0: error: lost another rank" in err
    assert out


def test_one_process_is_the_same_code_path():
    assert run_script(*RUN, "--devices", 2).returncode == 0


def test_standard_input_reaches_every_rank():
    """mpirun hands it to rank 0 alone."""
    command = ["mpirun", "--oversubscribe", "-np", "2", sys.executable, SCRIPT, "--model", str(SHIPPED)]
    command += ["--prompt", "-", "--max-tokens", "4", "--quiet", "--no-verify"]
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, input="import os\n", capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
