"""Where configurations come from, by hand: files, folders, bundled names, the hub; and what they are called."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import CONFIG, SHIPPED

from expert_parallel.checkpoint.finding import CODER
from expert_parallel.models import configurations
from expert_parallel.models.configurations import Configuration, bundled_names, hub_id, load_configuration


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model's folder that is called so, and where one stands."""
    (tmp_path / "small-model").mkdir()
    (tmp_path / "small-model" / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "small-model"


def test_a_file_is_called_like_its_folder_and_has_no_weights(folder):
    found = load_configuration(str(folder / "config.json"))
    assert found == Configuration("small-model", CONFIG, file=folder / "config.json")
    assert not found.bundled and not found.has_weights


def test_a_folder_has_weights_where_some_lie_in_it(folder):
    found = load_configuration("small-model")
    assert (found.name, found.config, found.published) == ("small-model", CONFIG, {})
    assert found.folder == Path("small-model") and found.file == Path("small-model/config.json")
    assert not found.has_weights
    (folder / "adapters.safetensors").touch()
    assert not found.has_weights
    (folder / "model-00001-of-00002.safetensors").touch()
    assert found.has_weights


def test_a_quantisation_that_lies_beside_is_taken_where_there_is_none(folder):
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    beside = {"quantization": {"quant_algo": "FP8"}}
    assert load_configuration(str(folder)).config == {**CONFIG, "quantization_config": beside}
    own = {**CONFIG, "quantization_config": {"bits": 4}}
    (folder / "config.json").write_text(json.dumps(own))
    assert load_configuration(str(folder)).config == own


def test_bundled_names_unless_something_here_is_called_so(folder):
    found = load_configuration("Mixtral-8x7B")
    assert found.bundled and found.name == "mixtral-8x7b" and found.folder is None and not found.has_weights
    assert found.published["repository"] == hub_id("mixtral-8x7b") and found.published["total"] > 46e9
    shutil.copytree(folder, "Mixtral-8x7B")
    assert load_configuration("Mixtral-8x7B").config == CONFIG
    assert load_configuration(SHIPPED.name).folder == SHIPPED
    shutil.copytree(folder, SHIPPED.name)
    assert load_configuration(SHIPPED.name).folder == Path(SHIPPED.name)


def test_of_the_hub_the_configuration_alone_is_fetched(folder, monkeypatch):
    asked = []

    def resolve(name, download):
        return download(name)

    monkeypatch.setattr(configurations, "resolve_model", resolve)
    monkeypatch.setattr(
        configurations, "hf_hub_download", lambda *names: asked.append(names) or str(folder / "config.json")
    )
    found = load_configuration("nobody/nothing")
    assert asked == [("nobody/nothing", "config.json")]
    assert (found.name, found.config, found.folder) == ("nobody/nothing", CONFIG, None)


def test_names_that_scripts_take(folder):
    assert hub_id("small-model") == "small-model" and hub_id("nobody/nothing") == "nobody/nothing"
    assert hub_id("Qwen3-Coder-30B") == CODER and hub_id(SHIPPED.name.upper()) == str(SHIPPED)
    assert hub_id("abacus") == "abacus"  # like nothing that is known
    with pytest.raises(ValueError, match="model mixtral-8x7 does not exist, did you mean mixtral-8x7b"):
        hub_id("mixtral-8x7")
    for name in ("mixtral-8x7", "abacus"):
        with pytest.raises(ValueError, match=f"bundled configurations: {', '.join(bundled_names())}") as error:
            load_configuration(name)
        assert ("did you mean" in str(error.value)) == (name != "abacus")
    with pytest.raises(ValueError, match="the model's name is empty"):
        load_configuration("")
