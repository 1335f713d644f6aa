"""Two reports side by side: every figure by hand, and of two real runs by plain loops."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, SHIPPED
from printed import columns_of, facts_of

from expert_parallel.__main__ import main
from expert_parallel.report.compare import compare, read_report
from expert_parallel.report.table import sections


def report(**changes):
    whole = {
        "options": {"placement": "contiguous", "devices": 8}, "environment": {"mlx": "1"},
        "generation": {"source": "measured", "tokens_per_second": 100.0, "tokens": [1, 2, 3], "text": "abc"},
        "balance": {"source": "measured", "balancedness_layers": 0.5, "loads": [[1, 2], [3, 4]],
                    "fan_out_modelled": 2.0, "phases": {"decode": {"source": "simulated", "x": 1}}},
        "looks": [{"moved": 1}, {"moved": 2}],
    }  # fmt: skip
    for section, fields in changes.items():
        whole[section] = {**whole[section], **fields} if isinstance(fields, dict) else fields
    return whole


def rows(a, b, key):
    return {row.pop("name"): row for row in sections(compare(a, b))[key]}


def test_every_figure_that_differs_with_its_ratio():
    changed = report(
        options={"placement": "balanced"},
        generation={"tokens_per_second": 150.0, "tokens": [1, 2, 9], "text": "abd"},
        balance={
            "loads": [[1, 2], [3, 6]],
            "fan_out_modelled": 3.0,
            "phases": {"decode": {"source": "simulated", "x": 4}},
        },
        looks=[{"moved": 1}, {"moved": 3}],
    )
    assert rows(report(), changed, "asked") == {
        "options.placement": {"a": "contiguous", "b": "balanced", "ratio": None, "source": ""}
    }
    assert rows(report(), changed, "figures") == {
        "balance.balancedness_layers": {"a": 0.5, "b": 0.5, "ratio": 1.0, "source": "measured"},
        "generation.tokens_per_second": {"a": 100.0, "b": 150.0, "ratio": 1.5, "source": "measured"},
    }
    assert rows(report(), changed, "others") == {
        "generation.tokens.most": {"a": 3, "b": 9, "ratio": 3.0, "source": "measured"},
        "generation.tokens.sum": {"a": 6, "b": 12, "ratio": 2.0, "source": "measured"},
        "generation.text": {"a": "abc", "b": "abd", "ratio": None, "source": "measured"},
        "balance.loads.#1.most": {"a": 4, "b": 6, "ratio": 1.5, "source": "measured"},
        "balance.loads.#1.sum": {"a": 7, "b": 9, "ratio": pytest.approx(9 / 7), "source": "measured"},
        "balance.fan_out_modelled": {"a": 2.0, "b": 3.0, "ratio": 1.5, "source": "modelled"},
        "balance.phases.decode.x": {"a": 1, "b": 4, "ratio": 4.0, "source": "simulated"},
        "looks.#1.moved": {"a": 2, "b": 3, "ratio": 1.5, "source": ""},
    }
    text = "\n".join(map(str, compare(report(), changed, ("one", "two"))))
    assert facts_of(text, "Compared") == {"report of": "qwen3_expert_parallel.py"}
    assert columns_of(text, "Figures", 2) == {
        "figure": ("balancedness", "tokens/s"), "one": ("0.5", "100"), "two": ("0.5", "150"),
        "two / one": ("1x", "1.5x"), "known as": ("measured", "measured"),
    }  # fmt: skip


def test_nothing_differs_a_figure_is_missing_or_nought():
    same = compare(report(), report())
    assert facts_of(str(same[0]), "Compared")["options"] == "the same, and hardware and versions"
    assert [table.title for table in same] == ["Compared", "Figures"]
    longer = report(generation={"tokens": [1, 2, 3, 0], "more": 7}, balance={"phases": {"decode": {"x": True}}})
    found = rows(report(), longer, "others")
    assert found["generation.tokens.length"] == {"a": 3, "b": 4, "ratio": pytest.approx(4 / 3), "source": "measured"}
    assert found["generation.more"] == {"a": None, "b": 7, "ratio": None, "source": "measured"}
    nought = rows(report(generation={"more": 0}), longer, "others")["generation.more"]
    assert nought["ratio"] is None
    assert rows(longer, report(generation={"more": 3.5, "tokens": ["a"]}), "others")["generation.more"]["ratio"] == 0.5
    # A figure that only one of them has, and lists that are not all numbers, which are compared whole.
    parity = {"parity": {"source": "measured", "tokens_equal": True}}
    one_sided = {"a": None, "b": True, "ratio": None, "source": "measured"}
    assert rows(report(), report() | parity, "figures")["parity.tokens_equal"] == one_sided
    assert rows(report() | parity, report(), "figures")["parity.tokens_equal"] == one_sided | {"a": True, "b": None}
    mixed = rows(report() | {"list": [1, 2]}, report() | {"list": [1, None, "x"]}, "others")
    assert {name: row["b"] for name, row in mixed.items()} == {
        **dict.fromkeys(("list.length", "list.most", "list.sum")),
        "list": [1, None, "x"],
    }
    nothing = compare(report(), report(options={"new": None}, balance={"newer": None}))
    assert [table.title for table in nothing] == ["Compared", "Figures"]  # not there, and null: neither says anything
    worded = str(compare(report(), report(options={"fail_device": ["3@16", "4"], "streams": True}, looks=[]))[1])
    assert "3@16 4" in worded and " yes" in worded and "[" not in worded
    deep = {"results": {"skewed": {"a_name_so_long_that_a_line_is": {"not_enough_for_all_of_its_path_in_one": 2.0}}}}
    text = str(compare(report(), report() | deep)[-1])
    assert all(f"{word} " in text or f"{word}\n" in text for word in ("skewed", *deep["results"]["skewed"]))
    long = str(compare(report(), report(generation={"text": "y" * 25}))[-1])
    assert f"{'y' * 21}..." in long and "y" * 22 not in long
    assert "y" * 24 in str(compare(report(), report(generation={"text": "y" * 24}))[-1])


def test_rows_are_matched_by_their_name_not_by_their_place():
    """--devices 2 4 beside --devices 4 8 once set 2 devices beside 4, and 4 beside 8, without a word."""
    a = report(looks=[{"devices": 2, "x": 1.0}, {"devices": 4, "x": 2.0}])
    b = report(looks=[{"devices": 4, "x": 3.0}, {"devices": 8, "x": 9.0}])
    found = rows(a, b, "others")
    assert found["looks.4.x"] == {"a": 2.0, "b": 3.0, "ratio": 1.5, "source": ""}
    assert (found["looks.2.x"]["b"], found["looks.8.x"]["a"]) == (None, None) and "looks.4.devices" not in found
    assert next(iter(found)) == "looks.4.x"  # first what both have
    for key, names in (("remedy", ("hot", "cold")), ("layer", (3, 1)), ("name", ("x", "y"))):
        one, other = ([{key: name, "x": name} for name in order] for order in (names, names[::-1]))
        assert [table.title for table in compare(report(looks=one), report(looks=other))] == ["Compared", "Figures"]


def test_rows_without_a_name_are_compared_only_where_there_are_as_many():
    two, three = ([{"moved": n} for n in range(1, count + 1)] for count in (2, 3))
    expected = {"looks.#length": {"a": 2, "b": 3, "ratio": 1.5, "source": "not comparable"}}
    assert rows(report(looks=two), report(looks=three), "others") == expected
    twice = [{"layer": 1, "x": 1}, {"layer": 1, "x": 2}]  # names nothing
    assert list(rows(report(looks=twice), report(looks=[*twice[:1], {"layer": 1, "x": 3}]), "others")) == ["looks.#1.x"]


def test_options_where_to_write_are_not_compared_and_lists_of_options_whole():
    outputs = ("trace", "json")
    one, other = (report(options={"trace": name, "json": name, "prompt": [name]}) for name in "xy")
    found = sections(compare(one, other, outputs=outputs))["asked"]
    assert [(row["name"], row["a"], row["b"]) for row in found] == [("options.prompt", ["x"], ["y"])]
    one, other = ({"options": {"trace": name, "json": name}, "results": 1} for name in "xy")
    assert [row["name"] for row in sections(compare(one, other, outputs=outputs))["asked"]] == ["options.trace"]  # read


def test_what_is_no_report_and_what_is_of_another_kind(tmp_path):
    path = tmp_path / "a.json"
    for text, why in (("{", "is no JSON"), ("[1]", "is no report"), ("{}", "is no report"), ("\xff", "is no report"),
                      ('{"generation": {}}', "is no report"), ('{"options": {}}', "is no report")):  # fmt: skip
        path.write_text(json.dumps(text) if text == "\xff" else text)
        with pytest.raises(ValueError, match=f"a.json {why}"):
            read_report(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="a.json is no JSON"):
        read_report(path)
    path.write_text(json.dumps(report()))
    assert read_report(path) == report()
    analysis = {"options": {}, "architecture": {}}
    with pytest.raises(
        ValueError, match=r"one is of qwen3_expert_parallel.py, two of model_analysis.py: only reports of"
    ):
        compare(report(), analysis, ("one", "two"))
    assert compare(analysis, analysis)[0].figures[0].value == "model_analysis.py"
    assert (
        compare({"results": 1, "options": {}}, {"results": 2, "options": {}})[-1].to_json()["others"][0]["ratio"] == 2
    )


def scalars(value, path=()):
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from scalars(inner, (*path, key))
    if not isinstance(value, dict | list) and path[-1] != "source":
        yield ".".join(path), value


def test_two_real_runs(run_here, tmp_path, monkeypatch, capsys):
    files = [tmp_path / "contiguous.json", tmp_path / "dealt.json"]
    for file, placement in zip(files, ("contiguous", "round-robin"), strict=True):
        done = run_here("qwen3_expert_parallel.py", "--model", SHIPPED, "--max-tokens", 4, "--json", file,
                        "--placement", placement, "--trials", 0, "--quiet")  # fmt: skip
        assert done.returncode == 0, done.stderr
    arguments = ["compare", *files, "--json", tmp_path / "c.json", "--html", tmp_path / "c.html"]
    monkeypatch.setattr(sys, "argv", ["expert-parallel", *map(str, arguments)])
    main()
    text, found = capsys.readouterr().out, json.loads((tmp_path / "c.json").read_text())
    a, b = (dict(scalars(json.loads(file.read_text()))) for file in files)
    listed = {row["name"]: row for key in ("asked", "figures", "others") for row in found[key]}
    assert {name for name in {**a, **b} if a.get(name) != b.get(name)} - listed.keys() == {"options.json"}
    assert all((row["a"], row["b"]) == (a[name], b[name]) for name, row in listed.items() if name in a and name in b)
    assert listed["options.placement"]["b"] == "round-robin" and listed["parity.tokens_equal"]["b"] is True
    assert "contiguous" in text and "dealt / contiguous" in text and max(map(len, text.splitlines())) <= 80
    page = (tmp_path / "c.html").read_text()
    assert "<td>balancedness</td>" in page and "<h1>contiguous and dealt</h1>" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare", "absent.json", "absent.json"), "absent.json"),
        (("compare", str(ROOT / "README.md"), str(ROOT / "README.md")), "README.md is no JSON"),
        (
            ("compare", str(SHIPPED / "config.json"), "x", "--json", str(SHIPPED / "config.json")),
            "would be written over a",
        ),
        (
            ("nothing",),
            "unknown command 'nothing': choose run, study, analyze, compare, server",
        ),
    ],
)
def test_refusals_are_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["expert-parallel", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    out, error = capsys.readouterr()
    assert (end.value.code, out, error.count("\n")) == (2, "", 1) and message in error


def test_one_name_for_all_scripts(monkeypatch, capsys):
    for name, words in (
        ("run", "--placement"),
        ("study", "--scenarios"),
        ("analyze", "--hardware"),
        ("compare", "ratio of"),
    ):
        monkeypatch.setattr(sys, "argv", ["expert-parallel", name, "--help"])
        with pytest.raises(SystemExit) as end:
            main()
        help_text = capsys.readouterr().out
        assert not end.value.code and words in help_text and f"usage: expert-parallel {name} " in help_text
    done = subprocess.run(
        [sys.executable, "-m", "expert_parallel"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(f"\n    {name} " in done.stdout for name in ("run", "study", "analyze", "compare"))
    assert done.stdout.endswith("--help.\n") and not done.stdout.endswith("\n\n")
