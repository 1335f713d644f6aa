"""Pictures are matplotlib's Figures; a notebook's own backend is left alone."""

import subprocess
import sys

import numpy as np
from conftest import ROOT

from expert_parallel.report.plots import load_map, save_plots


def test_each_layer_is_held_against_its_own_mean():
    loads = np.array([[1, 3], [100, 300], [0, 0]])
    axes, bar = load_map(loads, "device", "a $model_").axes
    assert axes.images[0].get_array().tolist() == [[0.5, 1.5], [0.5, 1.5], [0, 0]]
    assert not axes.title.get_parse_math()  # a model's name is no formula
    assert axes.get_xlabel() == "device" and "a $model_ (measured)" in axes.get_title()
    assert "(simulated)" in load_map(loads, "expert", source="simulated").axes[0].get_title()


def test_a_map_grows_with_its_layers_and_fills_its_picture():
    """A row of 128 experts drawn as squares would be a line; 48 layers in the picture of four could not be told."""
    few, four, many = (load_map(np.ones((layers, 128)), "expert") for layers in (1, 4, 48))
    assert few.get_figheight() == four.get_figheight() >= 2
    assert many.get_figheight() - four.get_figheight() >= 0.2 * 44  # inches
    assert many.get_figwidth() == four.get_figwidth()
    assert {figure.axes[0].get_aspect() for figure in (few, four, many)} == {"auto"}


def test_pictures_are_written_whole_into_a_folder(tmp_path):
    figures = {"device_loads": load_map(np.ones((2, 4)), "device", "$x_"), "b": load_map(np.ones((1, 1)), "expert")}
    paths = save_plots(tmp_path / "new" / "folder", figures)
    assert [path.name for path in paths] == ["device_loads.png", "b.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_no_backend_is_chosen_and_pyplot_is_not_imported():
    code = "import sys; from expert_parallel.report.plots import load_map; load_map([[1, 2]], 'expert');"
    code += "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
