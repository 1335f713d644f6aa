"""Options of the main script, without a model: the ends of their ranges, and what becomes of a prompt."""

import logging

import numpy as np
import pytest

from expert_parallel import RoutingTrace, place_experts
from expert_parallel.command.limits import check_numbers, check_study
from expert_parallel.command.options import cache_options, check_placement, in_effect, make_placement, parser_of
from expert_parallel.command.output import write_json
from expert_parallel.command.prompts import read_prompt, titled
from expert_parallel_poc import SCENARIOS, setup_arg_parser

LIMITS = {  # the least and the most that is allowed, and what is just beyond
    "--max-tokens": (1, 10**12, 0, 10**12 + 1),
    "--redundant-experts": (0, 10**12, -1, 10**12 + 1),
    "--temp": (0, 1e6, -0.1, 1.1e6),
    "--top-p": (1e-6, 1, 0, 1.01),
    "--top-k": (0, 10**12, -1, 10**12 + 1),
    "--min-p": (0, 1, -0.01, 1.01),
    "--seed": (0, 2**64 - 1, -1, 2**64),
    "--timeout": (0.1, 1e9, 0.09, 1.1e9),
    "--devices": (1, 10**12, 0, 10**12 + 1),
    "--rebalance-every": (1, 10**12, 0, 10**12 + 1),
    "--rebalance-horizon": (1, 10**12, 0, 10**12 + 1),
    "--rebalance-threshold": (1e-9, 1, 0, 1.01),
}


def arguments(*line):
    return parser_of("").parse_args([*map(str, line)])


@pytest.mark.parametrize("option", LIMITS)
def test_the_ends_of_a_range_are_in_it(option):
    more = [] if option == "--rebalance-every" or not option.startswith("--rebalance") else ["--rebalance-every", 8]
    least, most, *beyond = LIMITS[option]
    for value in (least, most):
        check_numbers(arguments(option, value, *more))
    for value in beyond:
        with pytest.raises(ValueError, match=f"^{option} must be "):
            check_numbers(arguments(f"{option}={value}", *more))


@pytest.mark.parametrize("option", ["--rebalance-horizon", "--rebalance-threshold"])
def test_how_to_rebalance_is_of_no_use_without_when(option):
    with pytest.raises(ValueError, match=f"{option} is of no use without --rebalance-every"):
        check_numbers(arguments(option, 1))


def test_a_format_is_of_no_use_without_a_file():
    with pytest.raises(ValueError, match="--placement-format needs --save-placement"):
        check_placement(arguments("--placement-format", "vllm"))
    check_placement(arguments("--placement-format", "vllm", "--save-placement", "p.json"))


def test_keys_and_values_take_the_bits_that_mlx_packs_but_five():
    for bits in range(1, 18):
        if bits in (2, 3, 4, 6, 8):
            assert arguments("--kv-bits", bits).kv_bits == bits
        else:
            with pytest.raises(SystemExit):
                arguments("--kv-bits", bits)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--max-tokens", 0, "at least 1"), ("--max-tokens", 10**13, "between 1 and 1000000000000"),
     ("--min-p", -1.0, "between 0 and 1"), ("--trials", 1001, "between 0 and 1000"), ("--trials", -1, "between 0 and")],
)  # fmt: skip
def test_a_limit_is_named_as_far_as_it_matters(option, value, words):
    with pytest.raises(ValueError, match=f"^{option} must be {words}.*, got {value}$"):
        check_numbers(arguments(f"{option}={value}"))
    check_numbers(arguments("--trials", 1000))


def study(*line):
    args = setup_arg_parser().parse_args([*map(str, line)])
    return check_study(args, SCENARIOS), args


STUDIED = {  # the least and the most that is allowed, and what is just beyond
    "--experts": (8, 1 << 16, 0, (1 << 16) + 1),
    "--top-k": (1, 128, 0, 129),
    "--hidden": (1, 1 << 16, 0, (1 << 16) + 1),
    "--expert-width": (1, 1 << 16, 0, (1 << 16) + 1),
    "--tokens": (1024, 1 << 30, 1023, (1 << 30) + 1),
    "--seed": (0, 2**63 - 1, -1, 2**63),
    "--bandwidth": (1e-6, 1e9, 0, -1),
    "--latency": (0, 1e9, -1, "inf"),
}


@pytest.mark.parametrize("option", STUDIED)
def test_the_ends_of_a_studys_ranges(option):
    least, most, *beyond = STUDIED[option]
    for value in (least, most):
        study(option, value)
    for value in beyond:
        with pytest.raises(ValueError, match=f"{option} "):
            study(f"{option}={value}")


def test_what_a_study_takes_where_nothing_is_said():
    names, args = study()
    assert (names, args.tokens, args.top_k) == ([*SCENARIOS], 8192, 8)
    names, args = study("--scenarios", " hot, skewed", "--experts", 200, "--top-k", 200, "--tokens", 2000)
    assert (names, args.tokens, args.top_k) == (["hot", "skewed"], 2000, 200)
    names, args = study("--trace", "t.npz")
    assert (names, args.tokens, args.top_k) == ([], 8192, None)  # a trace has its own
    for line, words in (
        (("--top-k", 9, "--experts", 8), "--top-k 9: there are 8 experts"),
        (("--experts", 7), "--top-k 8: there are 7 experts"),
        (("--trace", "t", "--top-k", 4), "does not go with --trace"),
        (("--trace", "t", "--tokens", 2000), "add --scenarios LIST"),
        (("--test-trace", "t"), "--test-trace needs --trace"),
        (("--scenarios", "hot,hto"), "unknown scenario 'hto', did you mean hot"),
    ):
        with pytest.raises(ValueError, match=words):
            study(*line)


@pytest.mark.parametrize(
    ("line", "experts", "ranks", "devices"),
    [((), 16, 1, 8), ((), 4, 1, 4), (("--devices", 3), 16, 1, 3), ((), 16, 2, 2), (("--devices", 2), 16, 2, 2),
     (("--devices", 3), 16, 2, None)],
)  # fmt: skip
def test_how_many_devices_there_are(line, experts, ranks, devices):
    args = arguments("--placement", "round-robin", *line)
    if devices is None:
        with pytest.raises(ValueError, match="--devices 3, but there are 2 ranks"):
            make_placement(args, (2, experts), ranks=ranks)
        return
    placement = make_placement(args, (2, experts), ranks=ranks)
    assert (placement.held.shape, placement.strategy) == ((2, devices, experts), "round-robin")


@pytest.mark.parametrize("placement", ["contiguous", "round-robin", "balanced", "replicated", "affinity", "file"])
def test_one_copy_of_each_whatever_the_placement(placement, tmp_path):
    """What the strategy places stays, each expert that has one holder gets another; a file may have some already."""
    experts = np.random.default_rng(0).random((300, 2, 16)).argsort(axis=2)[..., :4]
    RoutingTrace(experts, 16).save(tmp_path / "t.npz")
    line = ["--placement", placement, "--devices", 4, "--redundant-experts", "each"]
    line += ["--placement-trace", tmp_path / "t.npz"] if placement in ("balanced", "replicated", "affinity") else []
    loads = np.stack([np.bincount(experts[:, l].ravel(), minlength=16) for l in range(2)])
    if placement == "file":
        plain = place_experts(loads, 4, "replicated", 3)
        plain.save(tmp_path / "p.json")
        line[1] = tmp_path / "p.json"
    else:
        plain = place_experts(loads, 4, placement, coactivation=experts)
    args = arguments(*line)
    check_numbers(args)
    found = make_placement(args, (2, 16))
    assert (found.strategy, found.num_devices) == (plain.strategy, 4)
    assert not (plain.held & ~found.held).any() and np.array_equal(found.copies, np.maximum(plain.copies, 2))
    if placement == "balanced":  # what to expect of it elsewhere is said of the whole, copies included
        device_loads = found.device_loads(loads)
        even = (device_loads.mean(axis=1) / device_loads.max(axis=1)).mean()
        assert found.metadata["balancedness_fitted"] == pytest.approx(even, abs=1e-4)


def test_how_many_copies():
    assert [arguments("--redundant-experts", n).redundant_experts for n in ("0", "16", "each")] == [0, 16, "each"]
    with pytest.raises(ValueError, match="^1 device: a copy that outlives it needs another one"):
        make_placement(arguments("--devices", 1, "--redundant-experts", "each"), (2, 16))
    with pytest.raises(ValueError, match="^5 redundant experts: only the strategy replicated makes copies"):
        make_placement(arguments("--redundant-experts", 5), (2, 16))


def test_copies_are_a_number_or_each(capsys):
    with pytest.raises(SystemExit):
        arguments("--redundant-experts", "all")
    said = capsys.readouterr().err
    assert said.startswith("error: argument --redundant-experts: 'all' is neither a number of copies nor each")
    assert said.count("\n") == 1


class Tokenizer:
    """A letter is a token; a template puts roles before them, and says what it was given."""

    def __init__(self, template):
        self.has_chat_template = template

    def encode(self, text, verbose=True):
        assert not verbose  # a warning of transformers in the middle of an answer
        return [ord(letter) for letter in text]

    def apply_chat_template(self, messages, add_generation_prompt=False, **more):
        said = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return self.encode(said + "".join(map(str, more.items())) + "<assistant>" * add_generation_prompt, False)


@pytest.mark.parametrize(
    ("template", "line", "expected"),
    [
        (False, [], "hi"),
        (True, [], "<user>hi<assistant>"),
        (True, ["--system-prompt", "Be short."], "<system>Be short.<user>hi<assistant>"),
        (True, ["--chat-template-config", '{"deep": false}'], "<user>hi('deep', False)<assistant>"),
        (True, ["--ignore-chat-template"], "hi"),
    ],
)
def test_a_prompt_becomes_what_the_model_reads(template, line, expected):
    prompt = read_prompt(arguments("--prompt", "hi", *line), Tokenizer(template), None)
    assert "".join(map(chr, prompt.ids)) == expected
    assert (prompt.text, prompt.max_tokens, prompt.note) == ("hi", 64, "")


def test_a_template_s_text_that_is_too_long_is_reported_once():
    """By the error alone: transformers would say it, too, and of a template's text takes no `verbose`."""
    tokenizer, logger, heard = Tokenizer(True), logging.getLogger("transformers.of_a_test"), []
    plain, before = tokenizer.encode, logger.isEnabledFor(logging.WARNING)
    tokenizer.encode = lambda *text: heard.append(logger.isEnabledFor(logging.WARNING)) or plain(*text)
    with pytest.raises(ValueError, match="the model's context is 10"):
        read_prompt(arguments("--prompt", "hi"), tokenizer, 10)
    assert heard == [False] and logger.isEnabledFor(logging.WARNING) == before


@pytest.mark.parametrize("line", [("--system-prompt", "Be short."), ("--chat-template-config", "{}")])
def test_what_a_template_alone_can_take_is_refused_without_one(line):
    for args, template in ((arguments(*line), False), (arguments(*line, "--ignore-chat-template"), True)):
        with pytest.raises(ValueError, match="are for a chat template, and there is none"):
            read_prompt(args, Tokenizer(template), None)


@pytest.mark.parametrize("template", [False, True])
def test_a_prompt_of_ones_own_fits_the_kind_of_model(template):
    text = read_prompt(arguments(), Tokenizer(template), None).text
    assert text.startswith("Write a Python function" if template else "class Parser")
    assert read_prompt(arguments("--ignore-chat-template"), Tokenizer(template), None).text.startswith("class Parser")


def test_an_answer_ends_with_the_context():
    """Ten tokens of prompt: a context of 11 has room for one, of ten for none, of 74 for all that are asked for."""
    for context, room in ((11, 1), (73, 63), (74, 64), (200, 64), (None, 64)):
        prompt = read_prompt(arguments("--prompt", "0123456789"), Tokenizer(False), context)
        assert prompt.max_tokens == room
        assert (f"--max-tokens 64 is cut to {room}: the prompt has 10 tokens" in prompt.note) == (room < 64)
    with pytest.raises(ValueError, match="the prompt has 10 tokens, the model's context is 10"):
        read_prompt(arguments("--prompt", "0123456789"), Tokenizer(False), 10)


def test_a_title_is_a_short_name_before_a_text():
    """What only looks like one is the text's own."""
    texts = ["code=a.py", "x = 1", "an x=1", "abcdefghijkl=b", "abcdefghijklm=c", "alone"]
    assert titled(texts) == {
        "code": "a.py", "text 2": "x = 1", "text 3": "an x=1", "abcdefghijkl": "b", "text 5": "abcdefghijklm=c",
        "text 6": "alone",
    }  # fmt: skip
    with pytest.raises(ValueError, match="two texts are named a"):
        titled(["a=1", "a=2"])


def test_json_is_written_a_line_a_figure_and_what_is_no_number_as_null(tmp_path):
    write_json(tmp_path / "o.json", {"a": [1, float("nan")], "b": {}})
    assert (tmp_path / "o.json").read_text() == '{\n "a": [\n  1,\n  null\n ],\n "b": {}\n}\n'


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("50%", 0.5), ("0", 0), ("100%", 1), ("12.5%", 0.125)])
def test_a_share_may_be_a_percentage(text, value):
    assert arguments("--cold-share", text).cold_share == value


@pytest.mark.parametrize("text", ["half", "%", "5%%"])
def test_what_is_no_share_is_refused_in_one_line(text, capsys):
    with pytest.raises(SystemExit):
        arguments("--cold-share", text)
    assert f"argument --cold-share: '{text}' is no share" in capsys.readouterr().err


def test_options_in_effect_are_those_that_were_not_given_too():
    args = arguments("--expert-memory", "25%", "--cold-bits", 3, "--fail-device", 1)
    before = dict(vars(args))
    found = in_effect(args, devices=8, verify=False)
    defaults = {"cache_policy": "aging", "prefetch": "none", "cold_share": 0.5, "on_failure": "recover"}
    assert found == before | defaults | {"devices": 8, "verify": False} and vars(args) == before
    given = ("--cache-policy", "lru", "--prefetch", "next-layer", "--cold-share", 0, "--on-failure", "drop")
    args = arguments("--expert-memory", "25%", "--cold-bits", 3, "--fail-device", 1, *given)
    assert in_effect(args) == vars(args)
    assert in_effect(arguments()) == vars(arguments())  # of no use, and null


def test_a_trace_that_the_cache_wants_too_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "r.npz"
    RoutingTrace(np.random.default_rng(0).integers(0, 16, (40, 2, 2)), 16).save(path)
    args = arguments("--placement", "balanced", "--placement-trace", path, "--expert-memory", "25%",
                     "--cache-policy", "pinned")  # fmt: skip
    trace = cache_options(args, 16)["cache_trace"]
    alone = make_placement(args, (2, 16))
    monkeypatch.setattr("expert_parallel.formats.traces.read_trace", None)
    assert (make_placement(args, (2, 16), trace=trace).held == alone.held).all()


def test_help_of_a_tool_into_a_full_disk(monkeypatch, capsys):
    from expert_parallel.command import mlx_lm_tools

    with open("/dev/full", "w") as full, monkeypatch.context() as patched:  # noqa: PTH123
        patched.setattr("sys.stdout", full)
        with pytest.raises(SystemExit) as end:
            mlx_lm_tools.main("chat", ["--help"])
    assert end.value.code == 2 and "No space left" in capsys.readouterr().err
