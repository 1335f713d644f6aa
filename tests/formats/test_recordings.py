"""Recordings of other programs: whatever the format, the same routing comes out; what is none is refused by name."""

import base64
import csv
import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from conftest import ROOT, SHIPPED

from expert_parallel import RoutingTrace
from expert_parallel.formats.content import content_of
from expert_parallel.formats.traces import from_arrays, notes_of, read_loads, read_trace

CASES = ROOT.parent / "shared" / "cases" / "17-recording-imports"
REAL = ROOT.parent / "shared" / "traces" / "qwen3-30b-a3b.route.csv"


def choices(num_tokens, num_layers, top_k, num_experts=16, seed=0):
    scores = np.random.default_rng(seed).random((num_tokens, num_layers, num_experts))
    return scores.argsort(axis=2)[..., :top_k].astype(np.uint16)


CHOSEN = choices(9, 2, 3)
COUNTS = [[int((CHOSEN[:, l] == e).sum()) for e in range(16)] for l in range(2)]
SLOTS = [(t, l, s, int(CHOSEN[t, l, s])) for t in range(9) for l in range(2) for s in range(3)]


def as_base64(experts):
    file = io.BytesIO()
    np.save(file, experts)
    return base64.b64encode(file.getvalue()).decode()


def as_lines(*records):
    return "\n".join(map(json.dumps, records)) + "\n"


def as_csv(head, rows):
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([head.split(","), *rows])
    return file.getvalue()


def routes(skip=None):
    chosen = [(t, l, CHOSEN[t, l].tolist()) for t in range(9) for l in range(2) if (t, l) != skip]
    meta = {"type": "meta", "model_id": "x/y", "layers_logged": [0, 1], "top_k": 3}
    return as_lines(
        meta, *({"type": "route", "req_id": "r", "token_idx": t, "layer": l, "topk_ids": ids} for t, l, ids in chosen)
    )


TOKENS = {
    "vllm http.json": json.dumps({"choices": [{"text": "x", "routed_experts": as_base64(CHOSEN)}]}),
    "vllm.jsonl": routes(),
    "batch.jsonl": as_lines(
        *({"layer": l, "batch_id": 0, "origin_rows": [0] * 9, "topk_experts": CHOSEN[:, l].tolist()} for l in (0, 1))
    ),
    "phone.csv": "# route_trace v1\n# arch=qwen3moe n_layer=2 n_expert=16 n_expert_used=3\n"
    + as_csv("turn,phase,step,layer,slot,expert,weight", [(0, int(t > 3), t, l, s, e, 0.3) for t, l, s, e in SLOTS]),
}
LOADS = {
    "llama.csv": as_csv("layer,expert", [(l, e) for _, l, _, e in SLOTS]),
    "llama.jsonl": as_lines(*({"layer": l, "expert": e} for _, l, _, e in SLOTS)),
    "sglang.jsonl": as_lines(*({"layer_id": l, "expert_id": e} for _, l, _, e in SLOTS)),
    "sglang.csv": as_csv("layer_id,expert_id,count", [(3 + l, e, COUNTS[l][e]) for l in (0, 1) for e in range(16)]),
    "sglang.json": json.dumps({"logical_count": [COUNTS, np.zeros((2, 16), int).tolist()]}),
    "table.json": json.dumps(COUNTS),
    "dense.json": json.dumps([[0] * 16, *COUNTS]),
}


@pytest.mark.parametrize("name", TOKENS)
def test_decisions_of_other_programs(name, tmp_path):
    (tmp_path / name).write_text(TOKENS[name])
    trace = read_trace(tmp_path / name, 16)
    assert np.array_equal(trace.experts, CHOSEN)
    assert trace.num_experts == 16
    assert read_loads(tmp_path / name, 16).tolist() == COUNTS
    assert (
        read_loads(tmp_path / name, 20 if "phone" not in name and "http" not in name else 16)[:, :16].tolist() == COUNTS
    )
    assert trace.prefill.tolist() == [name == "phone.csv" and t <= 3 for t in range(9)]
    guessed = read_trace(tmp_path / name)
    assert guessed.num_experts == 16
    assert guessed.metadata.get("num_experts_guessed", False) == (name != "phone.csv")  # which says it


SEVERAL = {  # two requests, batches or turns that number their tokens anew: of five, and of four
    "vllm.jsonl": as_lines(
        *(
            {"req_id": "ab"[t > 4], "token_idx": t % 5, "layer": l, "topk_ids": CHOSEN[t, l].tolist()}
            for t in range(9)
            for l in range(2)
        )
    ),
    "batch.jsonl": as_lines(
        *(
            {"layer": l, "batch_id": batch, "topk_experts": CHOSEN[tokens, l].tolist()}
            for batch, tokens in enumerate((slice(5), slice(5, 9)))
            for l in range(2)
        )
    ),
    "phone.csv": "# route_trace v1\n# n_expert=16\n"
    + as_csv("turn,phase,step,layer,slot,expert", [(int(t > 4), 1, t % 5, l, s, e) for t, l, s, e in SLOTS]),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_tokens_of_several_requests_stay_apart(name, tmp_path):
    (tmp_path / name).write_text(SEVERAL[name])
    assert np.array_equal(read_trace(tmp_path / name, 16).experts, CHOSEN)


@pytest.mark.parametrize("name", LOADS)
def test_counts_of_other_programs(name, tmp_path):
    (tmp_path / name).write_text(LOADS[name])
    assert read_loads(tmp_path / name, 16).tolist() == COUNTS
    with pytest.raises(ValueError, match="counts and no tokens"):
        read_trace(tmp_path / name)


def test_tokens_that_a_layer_has_not_are_dropped_and_counted(tmp_path):
    (tmp_path / "cut.jsonl").write_text(routes(skip=(4, 1)))
    trace = read_trace(tmp_path / "cut.jsonl", 16)
    assert np.array_equal(trace.experts, np.delete(CHOSEN, 4, axis=0))
    assert (trace.metadata["incomplete_rows"], trace.metadata["layers"]) == (1, [0, 1])
    loads = read_loads(tmp_path / "cut.jsonl", 16)  # which need no whole tokens
    assert loads[0].tolist() == COUNTS[0] and loads.sum() == 9 * 6 - 3


def test_slots_that_were_left_blank_are_no_experts(tmp_path):
    """-1 once counted as the last expert of the table."""
    (tmp_path / "pairs.csv").write_text("layer,expert\n0,3\n0,-1\n1,2\n")
    assert read_loads(tmp_path / "pairs.csv", 4).tolist() == [[0, 0, 0, 1], [0, 0, 1, 0]]
    ids = {0: [1, 2], 1: [3, -1]}
    lines = [{"type": "route", "req_id": "r", "token_idx": 0, "layer": l, "topk_ids": e} for l, e in ids.items()]
    (tmp_path / "blank.jsonl").write_text(as_lines(*lines))
    assert read_loads(tmp_path / "blank.jsonl", 4).tolist() == [[0, 1, 1, 0], [0, 0, 0, 1]]


def test_the_number_of_experts_that_a_file_says_counts(tmp_path):
    (tmp_path / "phone.csv").write_text(TOKENS["phone.csv"])
    for read in (read_loads, read_trace):
        with pytest.raises(ValueError, match="phone.csv: it is of 16 experts, not 32"):
            read(tmp_path / "phone.csv", 32)


def test_sglang_tensors_are_read_without_torch(tmp_path):
    torch = pytest.importorskip("torch")
    of_layers = torch.tensor(CHOSEN.astype(np.int64)).transpose(0, 1)  # no contiguous memory
    torch.save([{"forward_pass_id": 0, "topk_ids_of_layer": of_layers, "rank": 0}], tmp_path / "tokens.pt")
    assert np.array_equal(read_trace(tmp_path / "tokens.pt", 16).experts, CHOSEN)
    torch.save({"logical_count": torch.tensor(COUNTS)[None], "rank": 0}, tmp_path / "counts.pt")
    assert read_loads(tmp_path / "counts.pt").tolist() == COUNTS
    torch.save({"logical_count": torch.nn.Linear(2, 2)}, tmp_path / "module.pt")
    with pytest.raises(ValueError, match="module.pt: it holds torch.nn"):
        read_loads(tmp_path / "module.pt")


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w") as archive:
        archive.writestr("bomb/data.pkl", pickle.dumps({"logical_count": Bomb()}))
    with pytest.raises(ValueError, match="bomb.pt: it holds builtins.print, which is no tensor"):
        read_loads(tmp_path / "bomb.pt")
    bombs = np.array([Bomb()])
    np.save(tmp_path / "bomb.npy", bombs)
    np.savez(tmp_path / "bomb.npz", bombs)
    np.savez(tmp_path / "own.npz", about=bombs, experts=bombs)
    (tmp_path / "bomb.json").write_text(json.dumps({"routed_experts": as_base64(bombs)}))
    for name in ("bomb.npy", "bomb.npz", "own.npz", "bomb.json"):
        with pytest.raises(ValueError, match="Object arrays cannot be loaded|no routing trace"):
            read_loads(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def test_a_tensor_that_reaches_beyond_its_storage(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"logical_count": torch.zeros((2, 4), dtype=torch.int64)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[: 16 if "/data/" in name else None])
    with pytest.raises(ValueError, match=r"tensor of \[2, 4\] is larger than what is stored"):
        read_loads(tmp_path / "b.pt")


REBUILT = """ctorch._utils
_rebuild_tensor_v2
((S'storage'
ctorch
LongStorage
S'0'
S'cpu'
I8
tQI{}
(I{}
t(I{}
ttR."""


@pytest.mark.parametrize(
    ("offset", "size", "stride", "refused"),
    [(0, 8, 1, False), (1, 4, 2, False), (2, 4, 2, True), (0, 9, 1, True), (-1, 4, 1, True), (0, 4, -1, True),
     (7, 1, 9, False), (8, 0, 1, False), (0, -1, 1, True)],
)  # fmt: skip
def test_a_tensor_may_reach_what_is_stored_and_no_more(offset, size, stride, refused, tmp_path):
    """As torch.save has it, written by hand: the numbers 0 to 7, and a view of them; -1 would be what lies before."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", REBUILT.format(offset, size, stride))
        archive.writestr("a/data/0", np.arange(8).tobytes())
    if refused:
        with pytest.raises(ValueError, match=rf"a tensor of \[{size}\] is larger than what is stored"):
            content_of(tmp_path / "a.pt")
    else:
        assert content_of(tmp_path / "a.pt").tolist() == [offset + stride * n for n in range(size)]


def test_lines_of_a_word_are_no_table(tmp_path):
    """A table has commas: a text of single words is YAML's, where it is a text, and then no trace."""
    (tmp_path / "a.txt").write_text("expert\nthree\n")
    assert content_of(tmp_path / "a.txt") == "expert three"
    (tmp_path / "a.csv").write_text("layer,expert\n0,3\n")
    assert content_of(tmp_path / "a.csv")[0]["expert"] in (3, "3")


def test_vllm_arrays_of_two_requests():
    one, two = choices(5, 2, 3, seed=1), choices(4, 2, 3, seed=2)
    assert np.array_equal(from_arrays([one, two], num_experts=16).experts, np.concatenate([one, two]))


def test_layers_that_were_left_blank():
    experts = choices(6, 3, 2)
    experts[:, 0] = 0  # a dense layer in a buffer for all layers
    trace = from_arrays([experts], num_experts=16)
    assert np.array_equal(trace.experts, experts[:, 1:])
    assert trace.metadata["blank_layers"] == [0]
    with pytest.raises(ValueError, match="nothing was recorded"):
        from_arrays([np.zeros((4, 2, 2), dtype=int)])


def test_layers_and_tokens_that_are_not_blank_stay():
    """A layer that knows but two experts is none that was left blank, nor is one of a single choice; a -1 is."""
    two = np.array([[[0, 1], [4, 5]], [[1, 0], [5, -1]], [[0, 1], [6, 7]]])
    trace = from_arrays([two], num_experts=8)
    assert np.array_equal(trace.experts, two[[0, 2]]) and trace.metadata == {"blank_rows": 1}
    assert from_arrays([two[::2]], num_experts=8).metadata == {}
    assert len(from_arrays([np.zeros((4, 2, 1), dtype=int)], num_experts=8)) == 4
    assert len(from_arrays([np.zeros((0, 2, 2), dtype=int)], num_experts=8)) == 0
    guessed = from_arrays([np.zeros((4, 2, 1), dtype=int)])
    assert (guessed.num_experts, guessed.metadata) == (1, {"num_experts_guessed": True})


def test_a_token_with_more_experts_is_no_whole_one(tmp_path):
    """Six experts in one layer, three in every other: what most have is k."""
    more = {"type": "route", "req_id": "r", "token_idx": 4, "layer": 1, "topk_ids": [0, 1, 2, 3, 4, 5]}
    (tmp_path / "more.jsonl").write_text(routes(skip=(4, 1)) + as_lines(more))
    trace = read_trace(tmp_path / "more.jsonl", 16)
    assert np.array_equal(trace.experts, np.delete(CHOSEN, 4, axis=0)) and trace.metadata["incomplete_rows"] == 1


def test_arrays_in_files(tmp_path):
    np.save(tmp_path / "one.npy", CHOSEN)
    np.savez(tmp_path / "several.npz", a=CHOSEN[:4], b=CHOSEN[4:])
    RoutingTrace(CHOSEN, 16, model="m").save(tmp_path / "own.npz")
    for name in ("one.npy", "several.npz", "own.npz"):
        assert np.array_equal(read_trace(tmp_path / name, 16).experts, CHOSEN)


NO_TRACE = {
    "flat.npy": (np.arange(4), r"counts \[layers, experts\], got \[4\]"),
    "real.npy": (np.zeros((2, 2, 2)), "expected integers"),
    "broken.npz": (b"PK\x03\x04 not really", "cannot read"),
    "absent.npz": (None, "cannot read"),
    "empty.csv": (b"", "no routing trace that this project knows"),
    "prose.txt": (b"Once, there was\na cat\n", "no routing trace that this project knows"),
    "words.txt": (b"neither: [of\n these", "neither numpy, torch, JSON, YAML nor CSV"),
    "other.json": (b'{"a": 1}', "no routing trace that this project knows"),
    "blank.csv": (b"layer,expert\n0,-1\n1,-1\n", "no routing decisions"),
    "meta.jsonl": (b'{"type": "meta"}\n{"type": "meta"}\n', "no routing decisions"),
    "cut.jsonl": (b'{"type": "route", "req_id"', "cannot read"),
    "negative.json": (b"[[1, -2], [3, 4]]", "layer 0: expert 1 has load -2"),
    "letters.csv": (b"layer,expert\n0,a\n", "line 2: expert is 'a', no whole number"),
    "half.csv": (b"layer,expert\n0,0.5\n", "line 2: expert is '0.5', no whole number"),
    "cut.csv": (b"# by hand\nlayer_id,expert_id,count\n\n0,0,5\n0,1\n", "line 5 is cut off: it has 2 of 3 columns"),
    "gap.csv": (b"layer_id,expert_id,count\n0,0,\n", "line 2: count is '', no number"),
    "minus.csv": (b"layer_id,expert_id,count\n0,0,5\n0,1,-5\n", "layer 0: expert 1 has load -5"),
    "late.jsonl": (b'{"type": "meta"}\n\n{"type": "route", "req_id"', "line 3, column 27: Expecting ':'"),
    "lacking.jsonl": (b'{"type": "route", "topk_ids": [1], "layer": 0}\n' * 2, "it lacks 'token_idx'"),
    "numbers.json": (b"[1, 2]", "no routing trace that this project knows"),
    "nothing.npy": (np.zeros((0, 4, 2), int), "it has no tokens"),
    "none.npy": (np.zeros((5, 4, 0), int), "it has no tokens"),
}


@pytest.mark.parametrize("name", NO_TRACE)
def test_files_that_are_no_trace(name, tmp_path):
    content, message = NO_TRACE[name]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        np.save(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        read_loads(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("parts", [1e-3, 1.0, 1e6])
def test_averages_and_shares_are_loads_as_they_are(parts, tmp_path):
    """Cut to integers they placed experts by nothing, or left a layer without any load."""
    loads = np.random.default_rng(0).random((2, 16)) * parts
    np.save(tmp_path / "share.npy", loads)
    rows = [(l, e, loads[l, e]) for l in range(2) for e in range(16)]
    (tmp_path / "share.csv").write_text(as_csv("layer_id,expert_id,count", rows))
    for name in ("share.npy", "share.csv"):
        assert np.array_equal(read_loads(tmp_path / name, 16), loads)
    whole = as_csv("layer_id,expert_id,count", [(0, 0, "5.0"), (0, 1, "3")])
    (tmp_path / "whole.csv").write_text(whole)
    assert read_loads(tmp_path / "whole.csv").tolist() == [[5, 3]]


@pytest.mark.parametrize("name", ["vllm.jsonl", "batch.jsonl", "phone.csv"])
@pytest.mark.parametrize("how", ["each line twice", "one after the other"])
def test_what_two_ranks_logged_counts_once(name, how, tmp_path):
    """It doubled k: top-3 was read as top-6."""
    lines = TOKENS[name].splitlines()
    body = [line for line in lines if not line.startswith(("#", "turn"))]
    twice = [line for line in body for _ in range(2)] if how == "each line twice" else body * 2
    (tmp_path / name).write_text("\n".join([*lines[: len(lines) - len(body)], *twice]))
    trace = read_trace(tmp_path / name, 16)
    assert np.array_equal(trace.experts, CHOSEN) and trace.metadata["repeated_slots"] == CHOSEN.size
    assert notes_of(trace, "x") == [f"x: left out {CHOSEN.size} choices that are there twice"]
    assert read_loads(tmp_path / name, 16).tolist() == COUNTS


def test_two_requests_under_one_name_are_refused(tmp_path):
    other = {"type": "route", "req_id": "r", "token_idx": 4, "layer": 1, "topk_ids": [15, 15, 15]}
    (tmp_path / "two.jsonl").write_text(routes() + as_lines(other))
    for read in (read_trace, read_loads):
        with pytest.raises(ValueError, match=r"token \('r', 4\) has in layer 1 experts \d+ and 15 in one place"):
            read(tmp_path / "two.jsonl", 16)


def test_a_byte_order_mark_is_no_letter(tmp_path):
    for name, text in {**TOKENS, **LOADS}.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read_loads(tmp_path / name, 16).tolist() == COUNTS


def test_numbers_that_do_not_fit(tmp_path):
    RoutingTrace(choices(3, 1, 2), 16).save(tmp_path / "own.npz")
    with pytest.raises(ValueError, match="of 16 experts, not 128"):
        read_trace(tmp_path / "own.npz", 128)
    with pytest.raises(ValueError, match="arrays of different models"):
        from_arrays([choices(3, 1, 2), choices(3, 2, 2)])
    with pytest.raises(ValueError, match="expert 15 does not exist|does not exist"):
        from_arrays([choices(50, 1, 2)], num_experts=8)


def test_counts_place_experts_in_the_main_script(run_here, tmp_path):
    """And a phone's trace of the right shape; affinity wants tokens."""
    counts = np.ones((4, 128), dtype=int)
    counts[:, :16] = 50
    (tmp_path / "counts.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    options = ("--model", SHIPPED, "--max-tokens", 2, "--no-verify", "--quiet", "--devices", 4)
    by_counts = ("--placement-trace", tmp_path / "counts.json", "--save-placement", tmp_path / "p.json")
    done = run_here("qwen3_expert_parallel.py", *options, "--placement", "balanced", *by_counts)
    assert done.returncode == 0, done.stderr
    placed = json.loads((tmp_path / "p.json").read_text())
    assert placed["strategy"] == "balanced" and placed["num_devices"] == 4
    done = run_here("qwen3_expert_parallel.py", *options, "--placement", "affinity", *by_counts)
    assert done.returncode == 2 and "counts and no tokens" in done.stderr


@pytest.mark.skipif(not REAL.exists(), reason="the trace does not lie beside the project")
def test_a_real_trace_of_a_phone():
    """Contiguous devices balance over all its rows as was found elsewhere: 0.900, 0.760, 0.599 over 2, 4, 8."""
    from expert_parallel import balancedness, place_experts

    loads = read_loads(REAL)
    assert (loads.shape, loads.sum()) == ((48, 128), 44_766)
    for devices, expected in ((2, 0.900), (4, 0.760), (8, 0.599)):
        placement = place_experts(np.ones((48, 128)), devices)
        assert balancedness(placement.device_loads(loads)) == pytest.approx(expected, abs=0.0005)
    trace = read_trace(REAL)
    assert trace.experts.shape == (129, 48, 6) and trace.num_experts == 128
    assert trace.metadata["incomplete_rows"] == 27  # of 28 tokens of the prompt the last layer has but the last
    decoded = trace.phase("decode")
    assert len(decoded) == 128
    fit, test = decoded[:64].loads(), decoded[64:].loads()
    for copies, least in ((0, 0.728), (32, 0.772)):
        placement = place_experts(fit, 8, "replicated" if copies else "balanced", copies)
        assert balancedness(placement.device_loads(test)) >= least


@pytest.mark.skipif(not CASES.exists(), reason="the cases do not lie beside the project")
def test_the_cases():
    same = np.load(CASES / "vllm.npy")
    for name in ("vllm.npy", "http.json", "sgl_pertoken.pt", "vllm_dense_minus_one.npy"):
        assert np.array_equal(read_trace(CASES / name, 16).experts, same), name
    assert np.array_equal(read_trace(CASES / "moe_routes.jsonl", 16).experts, same[:133])
    assert len(read_trace(CASES / "batch.jsonl", 16)) == 400
    for name in ("sgl_count.pt", "sgl_count.json", "sglang_rank0.csv", "llama_moe_trace.csv"):
        assert read_loads(CASES / name, 16).shape == (3, 16), name
