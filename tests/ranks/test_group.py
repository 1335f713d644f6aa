"""Groups of ranks: launches that fall apart, and what ranks must agree on."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import types

import mlx.core as mx
import pytest
from checkpoints import Rank
from conftest import run_script

from expert_parallel.ranks import group as groups
from expert_parallel.ranks.group import RanksDisagree, agree, all_or_none, checkpoint_mark
from expert_parallel.ranks.launch import check_hostfile, host_of_rank_0, launched, run_ranks
from expert_parallel.ranks.watchdog import Watchdog

SCRIPT = "qwen3_expert_parallel.py"
RANK = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_RANK", "PMI_SIZE")
RANK += ("MLX_RANK", "MLX_WORLD_SIZE", "MLX_HOSTFILE", "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR", "NCCL_HOST_IP")
RANK += ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def environment(monkeypatch):
    """No launcher's but the one that the test gives."""
    for name in RANK:
        monkeypatch.delenv(name, raising=False)
    return lambda **names: [monkeypatch.setenv(name, str(value)) for name, value in names.items()]


def hostfile(tmp_path, hosts):
    path = tmp_path / "hosts.json"
    path.write_text(hosts if isinstance(hosts, str) else json.dumps(hosts))
    return path


# --- launches -----------------------------------------------------------------------------------------------

STARTED = {
    "Open MPI": ({"OMPI_COMM_WORLD_RANK": 3, "OMPI_COMM_WORLD_SIZE": 4}, ("3", 4)),
    "MLX_RANK alone": ({"MLX_RANK": 1}, ("1", 2)),
    "JACCL": ({"MLX_RANK": 0, "MLX_IBV_DEVICES": "f.json", "MLX_JACCL_COORDINATOR": "127.0.0.1:5201"}, ("0", 2)),
    "NCCL": ({"MLX_RANK": 1, "MLX_WORLD_SIZE": 3, "NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": 5300}, ("1", 3)),
    "MPICH": ({"PMI_SIZE": 2, "PMI_RANK": 1}, ("1", 2)),
    "Slurm": ({"SLURM_NTASKS": 2, "SLURM_PROCID": 1}, ("1", 2)),
    "srun, task 0": ({"SLURM_NTASKS": 2, "SLURM_PROCID": 0, "SLURM_STEP_NUM_TASKS": 2}, ("0", 2)),
    "mpirun in a job of 4 machines": (
        {"OMPI_COMM_WORLD_RANK": 1, "OMPI_COMM_WORLD_SIZE": 2, "SLURM_PROCID": 3, "SLURM_STEP_NUM_TASKS": 4},
        ("1", 2),
    ),
    "by itself": ({}, (None, 1)),
    "salloc": ({"SLURM_NTASKS": 4}, (None, 1)),
    "sbatch": ({"SLURM_NTASKS": 4, "SLURM_PROCID": 0}, (None, 1)),
    "a shell in a job": ({"SLURM_NTASKS": 4, "SLURM_PROCID": 0, "SLURM_STEP_NUM_TASKS": 1}, (None, 1)),
    "srun -n1": ({"SLURM_NTASKS": 1, "SLURM_PROCID": 0, "SLURM_STEP_NUM_TASKS": 1, "PMI_SIZE": 1}, (None, 1)),
    "mpirun -np 1": ({"OMPI_COMM_WORLD_RANK": 0, "OMPI_COMM_WORLD_SIZE": 1}, (None, 1)),
}


@pytest.mark.parametrize(("names", "expected"), STARTED.values(), ids=STARTED)
def test_how_many_were_started(environment, names, expected):
    environment(**names)
    assert launched()[:2] == expected


@pytest.mark.parametrize("variable", ["MLX_HOSTFILE", "MLX_IBV_DEVICES"])
def test_the_number_of_ranks_of_mlx_launch_is_in_its_file(environment, tmp_path, variable):
    environment(MLX_RANK=2, **{variable: hostfile(tmp_path, [["a:1"], ["b:1"], ["c:1"]])})
    assert launched() == ("2", 3, "MLX_RANK")


@pytest.mark.parametrize(
    ("hosts", "rank", "words"),
    [
        (None, 0, "hosts.json cannot be read: .*No such file"),
        ("", 0, "hosts.json cannot be read: "),
        ([{"ssh": "a", "ips": ["10.0.0.1"]}], 0, "hosts.json should be like .* mlx.launch --hostfile"),
        ({"hosts": []}, 0, "should be like"),
        ([["10.0.0.1"], []], 0, "should be like"),
        ([["10.0.0.1:5000"]], 1, "is for ranks 0 to 0, MLX_RANK is 1"),
        ([["10.0.0.1:5000"]], "", "MLX_RANK is not set"),
        ([["10.0.0.1:5000"]], 0, "has one entry, a ring has two or more: unset MLX_HOSTFILE to run alone"),
    ],
)
def test_hostfiles_are_checked_and_named(environment, tmp_path, hosts, rank, words):
    path = tmp_path / "hosts.json" if hosts is None else hostfile(tmp_path, hosts)
    environment(MLX_HOSTFILE=path, MLX_RANK=rank)
    with pytest.raises(ValueError, match=f"MLX_HOSTFILE .*{words}"):
        check_hostfile()


@pytest.mark.parametrize(
    "hosts", [5, "a:1", ["a:1", "b:1"], [[], ["b:1"]], [["a:1"], []], [["a:1"], ["b"]], {"a:1": 1}]
)
def test_what_is_no_list_of_addresses_of_each_rank(hosts, environment, tmp_path):
    (tmp_path / "hosts.json").write_text(json.dumps(hosts))
    environment(MLX_HOSTFILE=tmp_path / "hosts.json", MLX_RANK=0)
    with pytest.raises(ValueError, match="should be like"):
        check_hostfile()


def test_where_rank_0_listens(environment, tmp_path):
    """Not on every interface where that can be helped."""
    assert host_of_rank_0() == "127.0.0.1"
    environment(OMPI_COMM_WORLD_SIZE=4, OMPI_COMM_WORLD_LOCAL_SIZE=2)
    assert host_of_rank_0() == "0.0.0.0"  # mpirun does not tell its machines
    environment(OMPI_COMM_WORLD_LOCAL_SIZE=4)
    assert host_of_rank_0() == "127.0.0.1"
    environment(MLX_JACCL_COORDINATOR="10.0.0.1:5201")
    assert host_of_rank_0() == "10.0.0.1"
    environment(MLX_RANK=1, MLX_HOSTFILE=hostfile(tmp_path, [["10.0.0.7:5000"], ["10.0.0.8:5000"]]))
    assert host_of_rank_0() == "10.0.0.7"
    environment(MLX_HOSTFILE=hostfile(tmp_path, [["10.0.0.7:5000"], ["10.0.0.7:5001"]]))
    assert host_of_rank_0() == "127.0.0.1"


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ({"MLX_RANK": "1"}, r"rank 1: error: started as one of 2 processes \(MLX_RANK\), but MLX joined 1: .*"),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": "/none.json"}, r"rank 0: error: MLX_HOSTFILE /none.json cannot be read: .*"),
        ({"SLURM_STEP_NUM_TASKS": "2(x2)"}, r"error: SLURM_STEP_NUM_TASKS is '2\(x2\)', which is no number of .*"),
        ({"OMPI_COMM_WORLD_SIZE": "abc"}, r"error: OMPI_COMM_WORLD_SIZE is 'abc', which is no number of processes: .*"),
    ],
)
def test_a_rank_without_others_stops_in_one_line_before_anything_is_read(names, line):
    """Each ran the whole model by itself, with status 0."""
    done = run_script(SCRIPT, "--model", "/no/such/model", "--quiet", **names)
    assert done.returncode == 2
    assert re.fullmatch(rf"\s*{line}\n", done.stderr), done.stderr


# --- agreeing -----------------------------------------------------------------------------------------------


def ranks(monkeypatch, *others):
    """A group whose other ranks, after this one, gather what is given."""
    monkeypatch.setattr(groups, "gather_objects", lambda group, value: [value, *others])
    return types.SimpleNamespace(size=lambda: 1 + len(others), rank=lambda: 0)


def marks(**facts):
    return {"marks": facts, "error": None}


def test_ranks_that_have_the_same_go_on(monkeypatch):
    with all_or_none(ranks(monkeypatch, marks(seed="3"))) as same:
        same["seed"] = 3


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (marks(seed="4"), r"rank 1 has other seed \(4, not 3\) than rank 0; all ranks stop"),
        (marks(), r"rank 1 has other seed \(None, not 3\) than rank 0; all ranks stop"),
        (marks(seed="3", more="1"), r"rank 1 has other more \(1, not None\) than rank 0; all ranks stop"),
        ({"marks": {}, "error": "no such model"}, "rank 1 stopped: no such model"),
    ],
)
def test_ranks_that_differ_stop(monkeypatch, other, line):
    with pytest.raises(RanksDisagree, match=f"^{line}$"), all_or_none(ranks(monkeypatch, other)) as same:
        same["seed"] = 3


@pytest.mark.parametrize("error", [ValueError("bad"), FileNotFoundError("bad")])
def test_a_mistake_of_one_rank_waits_for_the_end_of_the_block(monkeypatch, error):
    """A rank that left at once would leave the others in their next collective."""
    with pytest.raises(RanksDisagree, match="^bad$"), all_or_none(ranks(monkeypatch, marks())):
        raise error
    with pytest.raises(KeyError), all_or_none(ranks(monkeypatch, marks())):  # our own mistake ends the rank at once
        raise KeyError("bad")


def test_in_a_group_of_one_errors_go_their_way(monkeypatch):
    with pytest.raises(FileNotFoundError), all_or_none(ranks(monkeypatch)):
        raise FileNotFoundError("bad")
    with all_or_none(ranks(monkeypatch)) as same:
        same["seed"] = 3


def test_long_facts_are_compared_by_hash_and_named_by_it(monkeypatch):
    with pytest.raises(RanksDisagree, match=r"other prompt \(\w{8}, not \w{8}\)"):
        agree(ranks(monkeypatch, marks(prompt="0" * 8)), {"prompt": list(range(1000))})


# --- local ranks, for probes and benchmarks -----------------------------------------------------------------


def run_python(code, **how):
    return run_ranks("ring", 2, [sys.executable, "-I", "-S", "-c", code], **how)


def test_local_ranks_answer_together():
    """Also where they take more than the second that each of them has at least."""
    code = "import os, time; time.sleep(1.3); print(os.environ['MLX_RANK'], os.environ['MLX_HOSTFILE'])"
    lines = sorted(run_python(code, timeout=20).splitlines())
    assert [line.split()[0] for line in lines] == ["0", "1"]
    assert len({line.split()[1] for line in lines}) == 1  # where both look for each other


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; print('first\\nlast', file=sys.stderr); sys.exit(3)", "last"),
        ("raise SystemExit(3)", "no message"),
    ],
)
def test_local_ranks_that_fail_say_why(code, reason):
    with pytest.raises(ValueError, match=f"^2 ranks over ring failed: {reason}$"):
        run_python(code)


def test_local_ranks_that_hang_are_ended(monkeypatch):
    started, real = [], subprocess.Popen

    def noting(*command, **how):
        started.append(real(*command, **how))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noting)
    with pytest.raises(ValueError, match="^2 ranks over ring did not end within 0.5 s$"):
        run_python("import time; time.sleep(60)", timeout=0.5)
    assert [process.wait(timeout=5) for process in started] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize("blocks", [64, 1])
def test_a_mark_differs_with_names_sizes_headers_and_bytes(blocks, tmp_path):
    """64 samples of 4,096 bytes: all of a file of that size, and of a shorter one."""
    header, data = b'{"a": 1}', bytes(blocks * 4096 - 100 * (blocks == 1))
    whole = len(header).to_bytes(8, "little") + header + data

    def mark(content=whole, name="model.safetensors", other=b"", files=None):
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / name).write_bytes(content)
        (folder / "other.safetensors").write_bytes(other)  # which is none of the files
        return checkpoint_mark(folder, files) if files else checkpoint_mark(folder)

    marks = {mark(), mark(name="model-1.safetensors"), mark(whole + b"\0"), mark(whole.replace(b"1", b"2"))}
    places = [16, 16 + 4095, 16 + len(data) // 2, len(whole) - 4096, len(whole) - 1]
    marks |= {mark(whole[:at] + b"\1" + whole[at + 1 :]) for at in {*places} if at < len(whole)}
    assert len(marks) == 4 + len({at for at in places if at < len(whole)})
    assert mark() == mark(other=b"x") != mark(files="other*") != mark(other=b"x", files="other*")
    assert mark() == mark() and len(mark()) == 32


def test_large_files_are_marked_by_64_samples_and_no_byte_between(tmp_path):
    """Of 4096 bytes each, even from the header to the end: a checkpoint of any size takes milliseconds."""
    size, header, path = 1_000_000, 1000, tmp_path / "model.safetensors"
    starts = [int(8 + header + n * (size - 4096 - 8 - header) / 63) for n in range(64)]
    data = bytearray(header.to_bytes(8, "little") + bytes(size - 8))

    def mark(at=None):
        changed = bytearray(data)
        if at is not None:
            changed[at] = 1
        path.write_bytes(changed)
        return checkpoint_mark(tmp_path)

    plain = mark()
    for start in (*starts[:2], starts[31], starts[-1]):
        assert mark(start) != plain != mark(start + 4095)
        assert start in (starts[0], starts[-1]) or mark(start - 1) == plain == mark(start + 4096)
    assert mark(starts[-1] - 1) == plain == mark(starts[0] + 4096) and starts[-1] + 4096 == size


def test_where_others_reach_the_watch_of_a_rank(monkeypatch):
    """Where it listens, and where that is everywhere under this machine's name; what it tells its own process."""
    monkeypatch.setattr(socket, "gethostname", lambda: "this-machine")
    told, watchdog = [], object.__new__(Watchdog)
    vars(watchdog).update(_port=5000, _token="secret", _tell=told.append)
    for host, name in (("0.0.0.0", "this-machine"), ("10.0.0.1", "10.0.0.1"), ("", "")):
        watchdog._host = host
        assert watchdog.address() == {"host": name, "port": 5000, "token": "secret"}
    watchdog.join({"host": "10.0.0.1", "port": 0, "token": "x"})  # which nobody can join
    watchdog.join({"host": "10.0.0.1", "port": 5001, "token": "x"})
    watchdog.limit(2.5, "no answer")
    watchdog.limit(None)
    assert told == ["join 10.0.0.1 5001 x", "limit 2.5 no answer", "limit 0 "]


def test_what_ranks_tell_each_other_stays_in_their_group(monkeypatch):
    """And of sampled tokens only rank 0's count."""
    asked, one, other = [], Rank(0, 2), Rank(1, 2)
    gathered = lambda x, group=None: asked.append(group) or mx.concatenate([x, x])  # noqa: E731
    monkeypatch.setattr(mx.distributed, "all_gather", gathered)
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, group=None: asked.append(group) or x)
    assert groups.gather_objects(Rank(0, 1), value := object()) == [value] and not asked
    assert groups.gather_objects(other, {"a": [1, None]}) == [{"a": [1, None]}] * 2
    for rank, told in ((one, [7, 9]), (other, [0, 0])):
        found = groups.follow_rank_0(rank, mx.array([7, 9], mx.uint32))
        assert (found.tolist(), found.dtype) == (told, mx.uint32)
    assert asked == [other, other, one, other]


def test_a_sum_in_which_not_all_had_a_part_is_no_token(monkeypatch):
    """MLX's ring prints "Failing pending tasks" when a peer is gone, and its sums pass for done for some milliseconds:
    with this rank's own part, or with what was in memory, which may be the last sum."""
    sums = []

    def all_sum(values, group=None):  # of two ranks, of which the other is 1 and sends zeros and its voice
        other = mx.array([0, values[1].item()], mx.int32)
        sums.append({"whole": values + other, "own": values, "last": sums[-1] if sums else values}[how])
        return sums[-1]

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    for broken in ("own", "last"):
        agreed, how = groups.Agreed(Rank(0, 2)), "whole"
        for token in (7, 151643):
            found = agreed(mx.array([token], mx.uint32))
            assert found.tolist() == [token] and found.dtype == mx.uint32
        agreed.check()  # tokens are known later than they are asked for
        agreed.check()
        how = broken
        agreed(mx.array([9], mx.uint32))
        with pytest.raises(RuntimeError, match="the connection to a peer was lost"):
            agreed.check()
    how = "whole"
    assert groups.Agreed(Rank(1, 2))(mx.array([7])).tolist() == [0]  # rank 0's alone


def test_facts_that_a_broken_ring_made_up_are_no_wrong_input(monkeypatch):
    """They once ended a rank with "'utf-8' codec can't decode byte 0xe6" and status 2, which no restart mends."""
    monkeypatch.setattr(mx.distributed, "all_gather", lambda values, group: mx.concatenate([values, values * 0 + 230]))
    with pytest.raises(RuntimeError, match="the connection to a peer was lost"):
        groups.gather_objects(Rank(0, 2), "x" * 300)
