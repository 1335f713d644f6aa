"""What pictures look like, as it was settled on: sizes, colours and hatches that tell parts apart, ticks, legends."""

import struct

import numpy as np
import pytest
from matplotlib.colors import to_hex

from expert_parallel.report.plots import load_map, memory_bars, pairs_map, speed_lines, time_bars


def memory_of(devices):
    return memory_bars({
        "experts_per_device_bytes": [2e6] * devices, "rest_per_device_bytes": [1e6] * devices, "kv_cache_bytes": 5e5,
        "full_model_bytes": 6e6, "source": "measured",
    })  # fmt: skip


def legend_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()], legend._ncols


@pytest.mark.parametrize(
    ("figure", "width", "height"),
    [
        (lambda: load_map(np.ones((1, 8)), "expert"), 9, 2.8),  # at least four rows
        (lambda: load_map(np.ones((4, 8)), "expert"), 9, 2.8),
        (lambda: load_map(np.ones((48, 8)), "expert"), 9, 13.8),
        (lambda: pairs_map(np.array([[[0, 1]], [[1, 2]]]), 4), 7, 6.3),
        (lambda: memory_of(2), 9, 3.8),
    ],
)
def test_sizes_in_inches(figure, width, height):
    figure = figure()
    assert (figure.get_figwidth(), figure.get_figheight()) == pytest.approx((width, height))
    assert figure.get_layout_engine() is not None  # nothing is cut off


def test_a_png_has_110_points_an_inch():
    assert struct.unpack(">II", load_map(np.ones((4, 8)), "expert")._repr_png_()[16:24]) == (990, 308)


@pytest.mark.parametrize(
    ("figure", "ticks"),
    [
        (lambda: load_map(np.ones((2, 8)), "expert"), [0, 1, 2, 3, 4]),
        (lambda: load_map(np.ones((2, 8)), "device"), [0, 1, 2]),
        (lambda: pairs_map(np.array([[[0, 1]], [[1, 2]]]), 4), [0, 1, 2, 3, 4]),
    ],
)
def test_colour_bars_go_on_above_their_end(figure, ticks):
    axes, bar = figure().axes
    assert bar.get_yticks().tolist() == ticks and axes.images[0].colorbar.extend == "max"
    assert axes.images[0].get_interpolation() == "nearest" and axes.title.get_wrap()


def test_lines_between_devices_are_white_on_black():
    held = np.array([[[1, 1, 0, 0], [0, 0, 1, 1]]], bool)
    (lines,) = load_map([[1, 1, 9, 9]], "expert", held=held).axes[0].collections
    (effect,) = lines.get_path_effects()
    assert lines.get_linewidth().tolist() == [1] and effect._gc == {"linewidth": 2, "foreground": "black"}


def test_parts_of_a_bar_differ_in_more_than_colour():
    seconds = {"tokens": 1, "total": 4.0, "experts": 1.0, "collectives": 1.0, "waiting": 1.0}
    figure = time_bars([seconds])
    looks = [(to_hex(group[0].get_facecolor()), group[0].get_hatch()) for group in figure.axes[0].containers]
    assert looks == [("#00224e", ""), ("#a59c74", "//"), ("#fee838", ".."), ("#00224e", "//")]
    assert {to_hex(group[0].get_edgecolor()) for group in figure.axes[0].containers} == {"#ffffff"}
    assert legend_of(figure) == (["experts", "all else", "collectives", "waiting"], 4)


@pytest.mark.parametrize(
    ("devices", "right", "ticks"), [(1, 3.5, 1), (4, 3.5, 4), (8, 7.5, 8), (32, 31.5, 32), (33, 32.5, 17)]
)
def test_bars_keep_their_width_and_at_most_32_have_a_number(devices, right, ticks):
    axes = memory_of(devices).axes[0]
    assert axes.get_xlim() == (-0.5, right)
    assert (
        axes.get_xticks().tolist() == list(range(0, devices, 1 if devices <= 32 else 2))
        and len(axes.get_xticks()) == ticks
    )


def test_lines_differ_in_style_too():
    rows = [{"devices": count, "fits": True, "tokens_per_second": 3, "tokens_per_second_if_even": 4,
             "hybrid_tokens_per_second": 5} for count in (1, 2, 8)]  # fmt: skip
    projection = {"devices": rows, "bound_tokens_per_second": 9, "link": "l", "context": 1, "routing": "uniform"}
    figure = speed_lines(projection)
    axes = figure.axes[0]
    looks = [(to_hex(line.get_color()), line.get_linestyle(), line.get_marker()) for line in axes.lines]
    assert looks == [("#00224e", "-", "o"), ("#7d7c78", "--", "s"), ("#a59c74", ":", "^"), ("#000000", "-.", "None")]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "8"]
    assert axes.get_xscale() == "log" and axes.xaxis.get_transform().base == 2
    assert legend_of(figure)[1] == 4 and len(legend_of(figure)[0]) == 4
    (whole,) = memory_of(2).axes[0].lines
    assert (to_hex(whole.get_color()), whole.get_linestyle()) == ("#000000", "--")
    assert legend_of(memory_of(2)) == (["the whole model", "experts", "the rest", "key-value cache"], 4)
