"""What every script takes: defaults as --help says them, ends of ranges, and words that stay as they are written."""

import argparse
import re

import pytest

import expert_parallel_poc
import model_analysis
import qwen3_expert_parallel
from expert_parallel.command.options import copies, parser_of

PARSERS = {
    "qwen3_expert_parallel.py": lambda: parser_of(qwen3_expert_parallel.__doc__),
    "expert_parallel_poc.py": expert_parallel_poc.setup_arg_parser,
    "model_analysis.py": model_analysis.setup_arg_parser,
}
OF_NOTHING = (None, argparse.SUPPRESS, False)  # defaults that --help explains by words, if at all
DEFAULTS = {  # by hand, beside what --help says
    "qwen3_expert_parallel.py": {
        "max_tokens": 64, "temp": 0, "top_p": 1, "top_k": 0, "min_p": 0, "seed": 0, "placement": "contiguous",
        "redundant_experts": 0, "combine": "auto", "attention": "replicated", "timeout": 300, "streams": "auto",
    },
    "expert_parallel_poc.py": {
        "devices": 8, "hidden": 256, "expert_width": 96, "bandwidth": 5, "latency": 20, "seed": 0,
    },
    "model_analysis.py": {
        "model": "qwen3-coder-30b", "mode": "affine", "context": 2048, "redundant_experts": 0, "hardware": "m4-max",
        "prompt_tokens": 256,
    },
}  # fmt: skip


@pytest.mark.parametrize("script", PARSERS)
def test_defaults_are_those_that_help_says(script):
    parser = PARSERS[script]()
    found = {action.dest: action.default for action in parser._actions if action.default not in OF_NOTHING}
    numbers = [action for action in parser._actions if action.type in (int, float, copies)]
    found |= {action.dest: 0 for action in numbers if action.default == 0}
    assert found == DEFAULTS[script]
    for action in parser._actions:
        said = re.search(r"\(default: ([\w.-]+)\)", action.help or "")
        if said and action.dest in found:
            assert said[1] == str(found[action.dest]).removesuffix(".0"), action.dest


@pytest.mark.parametrize("script", PARSERS)
def test_the_head_of_a_script_stands_in_its_help_as_it_is_written(script):
    parser = PARSERS[script]()
    for text in filter(None, (parser.description, parser.epilog)):
        assert text.strip() in parser.format_help()
    assert parser.description == __import__(script.removesuffix(".py")).__doc__


def analysis(*line):
    return model_analysis.setup_arg_parser().parse_args([*map(str, line)])


@pytest.mark.parametrize(
    ("option", "least", "below"),
    [("--context", 1, 0), ("--redundant-experts", 0, -1), ("--prompt-tokens", 1, 0), ("--group-size", 1, 0),
     ("--device-memory", 0.5, 0), ("--bandwidth", 0.5, 0), ("--device-memory", 1e6, "inf"),
     ("--bandwidth", 1e6, "inf")],
)  # fmt: skip
def test_the_ends_of_a_range_are_in_it(option, least, below):
    model_analysis.check_arguments(analysis(option, least, "--bits", 4))
    with pytest.raises(ValueError, match=f"^{option} must be "):
        model_analysis.check_arguments(analysis(f"{option}={below}", "--bits", 4))


def test_bits_are_those_that_mlx_packs_and_16_for_none():
    for bits in range(1, 20):
        if bits in (2, 3, 4, 5, 6, 8, 16):
            assert analysis("--bits", bits).bits == bits
        else:
            with pytest.raises(SystemExit):
                analysis("--bits", bits)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--mode", "mxfp4"), "give --bits"),
        (("--group-size", 32), "give --bits"),
        (("--bits", 16, "--group-size", 32), "give --bits"),
        (("--bits", 16, "--mode", "mxfp4"), "give --bits"),
        (("--bits", 4, "--group-size", 32, "--mode", "mxfp4"), None),
        (("--bits", 16), None),
        (("--bits", 8), None),
        (("--prompt", "x"), "needs weights: qwen3-coder-30b is a configuration alone"),
        (("--forward", "--model", "Mixtral-8x7B"), "needs weights"),
        (("--forward", "--model", "a folder"), None),
        (("--prompt", "x", "--model", "a folder"), None),
        (("--link", "string"), "link string is not known"),
        (("--link", "ethernet-10g", "--hardware", "H100"), None),
    ],
)
def test_what_does_not_go_together(line, message):
    if message is None:
        model_analysis.check_arguments(analysis(*line))
        return
    with pytest.raises(ValueError, match=message):
        model_analysis.check_arguments(analysis(*line))
