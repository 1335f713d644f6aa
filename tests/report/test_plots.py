"""Pictures are matplotlib's Figures that show the figures; a notebook's own backend is left alone."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from matplotlib.patheffects import withStroke

from expert_parallel import RoutingTrace, place_experts
from expert_parallel.command.options import ANALYSIS_PICTURES, PICTURES
from expert_parallel.report import plots
from expert_parallel.report.plots import load_map, save_plots


def test_each_layer_is_held_against_its_own_mean_on_one_scale():
    loads = np.array([[1, 3], [100, 300], [0, 0]])
    axes, bar = load_map(loads, "device", "a $model_").axes
    (image,) = axes.images
    assert image.get_array().tolist() == [[0.5, 1.5], [0.5, 1.5], [0, 0]]
    assert image.get_clim() == (0, 2) and image.get_cmap().name == "cividis" and bar.get_ylabel() == "1 is even"
    assert not axes.title.get_parse_math()  # a model's name is no formula
    assert axes.get_xlabel() == "device" and "a $model_ (measured)" in axes.get_title()
    assert "(simulated)" in load_map(loads, "expert", source="simulated").axes[0].get_title()
    assert load_map(loads, "expert").axes[0].images[0].get_clim() == (0, 4)


def test_experts_stand_in_the_order_of_devices_with_lines_between():
    """Layer 0: device 0 has experts 1 and 3, device 1 the others; layer 1: device 0 has all but expert 0."""
    held = np.array([[[0, 1, 0, 1], [1, 0, 1, 0]], [[0, 1, 1, 1], [1, 0, 0, 0]]], bool)
    axes = load_map([[1, 2, 3, 4], [4, 3, 2, 1]], "expert", held=held).axes[0]
    assert axes.images[0].get_array().tolist() == [[0.8, 1.6, 0.4, 1.2], [1.2, 0.8, 0.4, 1.6]]
    lines = [segment.tolist() for collection in axes.collections for segment in collection.get_segments()]
    assert lines == [[[1.5, -0.5], [1.5, 0.5]], [[2.5, 0.5], [2.5, 1.5]]]
    assert axes.get_xlabel() == "expert, in the order of devices"


def test_a_map_grows_with_its_layers_and_fills_its_picture():
    """A row of 128 experts drawn as squares would be a line; 48 layers in the picture of four could not be told."""
    few, four, many = (load_map(np.ones((layers, 128)), "expert") for layers in (1, 4, 48))
    assert few.get_figheight() == four.get_figheight() >= 2
    assert many.get_figheight() - four.get_figheight() >= 0.2 * 44  # inches
    assert many.get_figwidth() == four.get_figwidth()
    assert {figure.axes[0].get_aspect() for figure in (few, four, many)} == {"auto"}


def test_boundaries_are_outlined_for_they_cross_bright_cells():
    """White on the yellow of a hot expert was not to be seen, least of all in grey."""
    held = np.array([[[1, 1, 0, 0], [0, 0, 1, 1]]], bool)
    (lines,) = load_map([[1, 1, 9, 9]], "expert", held=held).axes[0].collections
    assert lines.get_color().tolist() == [[1, 1, 1, 1]]
    assert [type(effect) for effect in lines.get_path_effects()] == [withStroke]


def test_pairs_over_chance():
    """Top-2 of 4, 4 tokens; layer 0: 0 and 1 always together, 2 and 3 too; layer 1: each with 0 but for the last."""
    experts = np.array([[[0, 1], [0, 1]], [[1, 0], [0, 2]], [[2, 3], [0, 3]], [[3, 2], [1, 2]]])
    axes, bar = plots.pairs_map(experts, 4, "m").axes
    found, expected, counts = np.zeros((4, 4)), np.zeros((4, 4)), [[2, 2, 2, 2], [3, 2, 2, 1]]
    for layer in (0, 1):
        tokens = [set(token) for token in experts[:, layer].tolist()]
        for a in range(4):
            for b in range(4):
                often = [sum(one in token for token in tokens) for one in (a, b)]
                together = sum({a, b} <= token for token in tokens) if a != b else 0
                # Of all pairs of different experts, weighed so; 4 tokens chose a pair each, counted both ways.
                all_of_them = sum(counts[layer][c] * counts[layer][d] for c in range(4) for d in range(4) if c != d)
                found[a, b] += together
                expected[a, b] += often[0] * often[1] * 8 / all_of_them
    shown, others = axes.images[0].get_array(), ~np.eye(4, dtype=bool)
    assert shown.mask.tolist() == np.eye(4, dtype=bool).tolist()  # an expert with itself is no pair that never is
    assert shown.data[others] == pytest.approx((found / expected)[others])
    assert shown[0, 1] == pytest.approx(3 / (2 * 2 * 8 / 48 + 3 * 2 * 8 / 46))
    assert axes.images[0].get_clim() == (0, 4) and "1 is chance" in bar.get_ylabel()
    assert "(measured)" in axes.get_title()


def test_what_was_never_chosen_is_neither_liked_nor_shunned():
    """Independent choices of half of the experts in each layer: a layer that cannot have a pair once counted as 0."""
    random = np.random.default_rng(0)
    choices = [random.random((20_000, 8)).argsort(axis=1)[:, :4] + first for first in (0, 4)]
    shown = plots.pairs_map(np.stack(choices, axis=1), 16).axes[0].images[0].get_array()
    for a in range(16):
        for b in range(16):
            possible = a != b and any(first <= min(a, b) and max(a, b) < first + 8 for first in (0, 4))
            assert shown.mask[a, b] != possible, (a, b)
    assert np.abs(shown.compressed() - 1).max() < 0.05


def test_independent_choices_are_at_chance():
    random = np.random.default_rng(0)
    experts = random.random((20_000, 1, 16)).argsort(axis=2)[..., :4]
    over = plots.pairs_map(experts, 16).axes[0].images[0].get_array()
    assert over[~np.eye(16, dtype=bool)].mean() == pytest.approx(1, abs=0.01)


def bars(axes):
    """{label: [(left, bottom, height)]}"""
    return {
        group.get_label(): [(bar.get_x() + bar.get_width() / 2, bar.get_y(), bar.get_height()) for bar in group]
        for group in axes.containers
    }


def test_memory_in_bars_against_the_whole_model():
    memory = {"experts_per_device_bytes": [2e6, 3e6], "rest_per_device_bytes": [1e6, 1e6], "kv_cache_bytes": 5e5,
              "full_model_bytes": 6e6, "source": "measured"}  # fmt: skip
    axes = plots.memory_bars(memory, "m").axes[0]
    assert bars(axes) == {
        "experts": [(0, 0, 2), (1, 0, 3)],
        "the rest": [(0, 2, 1), (1, 3, 1)],
        "key-value cache": [(0, 3, 0.5), (1, 4, 0.5)],
    }
    assert axes.get_ylabel() == "MB" and axes.lines[0].get_ydata() == [6, 6]
    assert axes.lines[0].get_label() == "the whole model"
    lost = plots.memory_bars({**memory, "experts_per_device_bytes": [2e6, 0], "rest_per_device_bytes": [1e6, 0]})
    assert [parts[1][2] for parts in bars(lost.axes[0]).values()] == [0, 0, 0]  # nor has it a cache
    small = plots.memory_bars({**memory, "full_model_bytes": 6e3})
    large = plots.memory_bars({**memory, "full_model_bytes": 17e9})
    assert [figure.axes[0].get_ylabel() for figure in (small, large)] == ["kB", "GB"]
    assert large.axes[0].lines[0].get_ydata() == [17, 17]
    assert plots.memory_bars({**memory, "full_model_bytes": 999}).axes[0].get_ylabel() == "B"


def test_time_in_bars_of_each_rank():
    one = {"tokens": 4, "total": 0.1, "experts": 0.04, "collectives": 0.02, "waiting": 0.0}
    other = {"tokens": 4, "total": 0.1, "experts": 0.02, "collectives": 0.02, "waiting": 0.04}
    axes = plots.time_bars([one, other]).axes[0]
    found = bars(axes)
    assert list(found) == ["experts", "all else", "collectives", "waiting"] and axes.get_ylabel() == "ms"
    heights = {label: pytest.approx([bar[2] for bar in of]) for label, of in found.items()}
    assert heights == {"experts": [10, 5], "all else": [10, 5], "collectives": [5, 5], "waiting": [0, 10]}
    assert list(bars(plots.time_bars([{**one, "collectives": 0.0}]).axes[0])) == ["experts", "all else"]


def test_projected_speed_over_devices():
    rows = [
        {"devices": 1, "fits": True, "tokens_per_second": 100, "tokens_per_second_if_even": 101},
        {"devices": 2, "fits": True, "tokens_per_second": 90, "tokens_per_second_if_even": 95,
         "hybrid_tokens_per_second": 80},
        {"devices": 4, "fits": False, "tokens_per_second": 7, "tokens_per_second_if_even": 8},
    ]  # fmt: skip
    projection = {"devices": rows, "bound_tokens_per_second": 150, "link": "a link", "context": 7, "routing": "uniform"}
    figures = plots.of_analysis({"projection": projection}, "m")
    assert tuple(figures) == ANALYSIS_PICTURES
    axes = figures["speed"].axes[0]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines == {
        "expert parallel": ([1, 2], [100, 90]),
        "were its load even": ([1, 2], [101, 95]),
        "attention sharded, too": ([2], [80]),
        "were experts free": ([0, 1], [150, 150]),
    }
    assert axes.get_title() == "Decoding one sequence\nm, a link, 7 tokens, uniform routing (modelled)"
    assert axes.get_ylim()[0] == 0 and (axes.get_xlabel(), axes.get_ylabel()) == ("devices", "tokens/s")
    assert plots.of_analysis({"projection": {**projection, "devices": rows[2:]}}) == {}  # no empty picture


def test_the_pictures_of_a_run_are_those_that_its_options_name():
    trace = RoutingTrace(np.arange(24).reshape(6, 2, 2) % 8, 8)
    placement, seconds = place_experts(np.ones((2, 8)), 2), {"tokens": 1, "total": 1, "experts": 1, "collectives": 0}
    document = {
        "model": {"name": "m"}, "placement": {"devices": 2, "strategy": "contiguous"}, "ranks": None, "cache": None,
        "failures": None,
        "balance": {"device_loads": [[4, 8], [6, 6]]}, "time": {**seconds, "waiting": 0},
        "memory": {"experts_per_device_bytes": [1, 2], "rest_per_device_bytes": [1, 1], "kv_cache_bytes": 0,
                   "full_model_bytes": 5, "source": "measured"},
    }  # fmt: skip
    figures = plots.of_run(document, trace, placement)
    assert tuple(figures) == PICTURES
    assert all("m, 6 tokens, top-2 of 8" in figure.axes[0].get_title() for figure in figures.values())
    relative = [[load / 6 for load in row] for row in document["balance"]["device_loads"]]
    assert figures["device_loads"].axes[0].images[0].get_array().tolist() == [pytest.approx(row) for row in relative]
    counts = [[sum(e in token for token in trace.experts[:, l].tolist()) for e in range(8)] for l in range(2)]
    expected = [[count * 8 / sum(row) for count in row] for row in counts]
    assert figures["expert_loads"].axes[0].images[0].get_array().tolist() == expected
    top_1 = RoutingTrace(trace.experts[..., :1], 8)
    assert tuple(plots.of_run(document, top_1, placement)) == PICTURES[:-1]  # it has no pairs
    ranks = [{"seconds": {**document["time"], "experts": share}} for share in (0.25, 0.5)]
    loss = {"devices": [1], "after_tokens": 16}
    lossy = plots.of_run({**document, "failures": {"losses": [loss]}}, trace, placement)
    assert "2 devices, contiguous, lost: device 1 after 16 tokens" in lossy["device_loads"].axes[0].get_title()
    several = plots.of_run({**document, "ranks": ranks}, trace, placement)["time"]
    assert [bar[2] for bar in bars(several.axes[0])["experts"]] == [250, 500]


def test_pictures_are_written_whole_into_a_folder(tmp_path):
    figures = {"device_loads": load_map(np.ones((2, 4)), "device", "$x_"), "b": load_map(np.ones((1, 1)), "expert")}
    paths = save_plots(tmp_path / "new" / "folder", figures)
    assert [path.name for path in paths] == ["device_loads.png", "b.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_notebook_shows_it_without_a_backend():
    figure = load_map(np.ones((2, 4)), "device")
    assert figure._repr_png_().startswith(b"\x89PNG") and "matplotlib.pyplot" not in sys.modules


def test_no_backend_is_chosen_and_pyplot_is_not_imported():
    code = "import sys; from expert_parallel.report.plots import load_map; load_map([[1, 2]], 'expert');"
    code += "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_hit_rates_are_lines_over_the_share_in_memory():
    rows = [
        {"chance": 0.25, "lru": 0.5, "lfu": 0.6, "aging": 0.62, "belady": 0.7},
        {"chance": 0.5, "lru": 0.8, "lfu": 0.7, "aging": 0.82, "belady": 0.9},
    ]
    axes = plots.hit_lines(rows, "m").axes[0]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines == {
        "lru": ([25, 50], [0.5, 0.8]),
        "lfu": ([25, 50], [0.6, 0.7]),
        "aging": ([25, 50], [0.62, 0.82]),
        "Belady, the bound": ([25, 50], [0.7, 0.9]),
        "kept at random": ([0, 100], [0, 1]),
    }
    assert axes.get_title() == "Hit rate of a cache of experts for each layer\nm (simulated)"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("experts in memory, %", "hits / experts wanted")
    assert axes.get_xlim() == (0, 100) and axes.get_ylim() == (0, 1)


@pytest.mark.parametrize(("over", "places"), [("lost", (1, 2, 4)), ("balancedness", (0.7, 0.8, 0.95))])
def test_quality_is_a_line_for_each_way_with_the_worst_above(over, places):
    rows = [
        {"way": way, over: x, "perplexity": 20.0 + n, "worst": 30.0 + n} for way in "ab" for n, x in enumerate(places)
    ]
    rows = [*rows[::-1], {"way": "c", over: places[0], "perplexity": 25.0}]
    figure = plots.quality_lines(rows, over, 19.5, "a model")
    axes = figure.axes[0]
    lines = {each.get_label(): each for each in axes.containers}
    assert set(lines) == {"a", "b", "c"} and axes.lines[0].get_ydata() == [19.5, 19.5]
    for way in "ab":
        line, caps, (bars,) = lines[way]
        assert [tuple(line.get_xdata()), tuple(line.get_ydata())] == [places, (20, 21, 22)]
        assert [segment.tolist() for segment in bars.get_segments()] == [
            [[x, 20.0 + n], [x, 30.0 + n]] for n, x in enumerate(places)
        ]
    looks = {(lines[way][0].get_color(), lines[way][0].get_marker(), lines[way][0].get_linestyle()) for way in "abc"}
    assert len(looks) == len({marker for _, marker, _ in looks}) == 3  # told apart without colour
    assert axes.get_title().endswith("\na model (measured)") and axes.get_ylabel() == "perplexity, lower is better"
    assert axes.get_xlabel() == {"lost": "devices lost", "balancedness": "balancedness, 1 is even"}[over]
    assert (
        axes.get_ylim()[0] < 19.5 and axes.get_ylim()[1] > 32 and "20" in [t.get_text() for t in axes.get_yticklabels()]
    )


def test_growth_has_a_panel_for_what_grows_and_the_work_dotted():
    sizes, one = np.array([2, 4, 8]), np.array([3.0, 6.0, 24.0])
    found = [("save", "tokens", sizes, one, sizes * 5), ("read", "tokens", sizes, 2 * one, sizes)]
    found.append(("read", "layers", sizes, one, sizes))
    figure = plots.growth_lines(found, ["devices", "tokens", "layers", "copies"], ["save", "read"])
    assert [len(axes.lines) for axes in figure.axes] == [0, 4, 2, 0]
    time, work, other, _ = figure.axes[1].lines
    assert time.get_xdata().tolist() == [1, 2, 4] and time.get_ydata().tolist() == [1, 2, 8]
    assert work.get_linestyle() == ":" and work.get_xdata().tolist() == work.get_ydata().tolist() == [1, 2, 4]
    assert time.get_marker() != other.get_marker() and time.get_color() == work.get_color() != other.get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["save", "read"]
    assert figure.axes[1].get_xlabel() == "tokens over the fewest"
