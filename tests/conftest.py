"""Shared by all tests: the shipped model, tiny models of any configuration, real ranks."""

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import types
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import settings
from mlx.utils import tree_flatten, tree_map_with_path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test reaches out

settings.register_profile("any machine", deadline=None)  # the first example imports and compiles
settings.load_profile("any machine")

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "models" / "tiny-qwen3-moe"
WITHOUT_TORCH = ROOT / "tests" / "without_torch"

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def random_model(seed=0, quantize=False, **changes):
    """A Qwen3-MoE of mlx-lm with random weights, float32; every projection strong enough to matter."""
    import mlx.nn as nn
    from mlx_lm.models.qwen3_moe import Model, ModelArgs

    mx.random.seed(seed)
    model = Model(ModelArgs.from_dict({**CONFIG, **changes}))
    model.update(
        tree_map_with_path(lambda _, a: mx.random.normal(a.shape) * (0.3 if a.ndim > 1 else 1.0), model.parameters())
    )
    if quantize:
        nn.quantize(model, group_size=32, bits=4)
    model.eval()
    mx.eval(model.parameters())
    return model


def save_model(model, folder, **changes):
    """Write a random model as a checkpoint with the shipped tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, folder)
    return folder


def of_a_user(**names):
    """Environment of a process as after `pip install -r requirements.txt`, so without torch.

    torch is here for the oracles, and where it is transformers imports it: more than half of a script's start.
    """
    path = os.pathsep.join(filter(None, (str(WITHOUT_TORCH), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "COLUMNS": "80", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **names}


def run_script(*arguments, timeout=240, stdin="", **environment):
    """A script of the project as a user runs it."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=of_a_user(**environment),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="session")
def run_here():
    """A script as a user runs it, but inside this process, which saves its start; a traceback fails the test."""

    def run(script, *arguments):
        status, out, err = 0, io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", [script, *map(str, arguments)])
            patch.setenv("COLUMNS", "80")
            patch.chdir(ROOT)
            try:
                importlib.import_module(script.removesuffix(".py")).main()
            except SystemExit as end:
                status = end.code
        return types.SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())

    return run


def launch_command(backend, ranks, *arguments, tmp_path=None):
    """(command, environment) pairs that start the ranks; one for MPI, one per rank for the ring."""
    base = of_a_user()
    command = [sys.executable, *map(str, arguments)]
    if backend == "mpi":
        base |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        base |= {"OMPI_MCA_mpi_yield_when_idle": "1"}  # others than the ranks want the cores, too: half of the CPU time
        return [(["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), *command], base)]
    from expert_parallel.ranks.launch import free_ports

    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    return [(command, {**base, "MLX_RANK": str(r), "MLX_HOSTFILE": str(hostfile)}) for r in range(ranks)]


def launch(backend, ranks, *arguments, tmp_path, timeout=120):
    """Run the ranks to their end; [(exit status, standard output, standard error)] per process started."""
    if backend == "mpi" and not shutil.which("mpirun"):
        pytest.skip("no mpirun on this machine: install Open MPI to run the MPI tests")
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, environment in launch_command(backend, ranks, *arguments, tmp_path=tmp_path)
    ]
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            results.append((process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return results


@pytest.fixture(autouse=True)
def stand_ins_agree(monkeypatch):
    """What tests hand over in place of a group of ranks agrees with this process (device/trials.py)."""
    all_max = mx.distributed.all_max
    real = lambda group: group is None or isinstance(group, mx.distributed.Group)  # noqa: E731
    monkeypatch.setattr(mx.distributed, "all_max", lambda x, group=None: all_max(x, group=group) if real(group) else x)


@pytest.fixture(scope="session")
def shipped():
    return SHIPPED


@pytest.fixture(scope="session")
def held_out_traces():
    """(fit, test): routing of the shipped model over held-out Python, one part of the file and the next."""
    from mlx_lm import load

    from expert_parallel import record_routing

    model, tokenizer = load(str(SHIPPED))
    model.set_dtype(mx.float32)
    ids = tokenizer.encode((SHIPPED / "held-out" / "python.txt").read_text(), verbose=False)
    traces = []
    for start in (0, 768):
        with record_routing(model, "tiny-qwen3-moe") as trace:
            for window in range(start, start + 768, 384):
                mx.eval(model(mx.array([ids[window : window + 384]])))
        traces.append(trace)
    return traces
