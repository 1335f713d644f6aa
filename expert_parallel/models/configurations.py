"""Configurations of models: by bundled name, folder, file or hub id; weights are not needed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import hf_hub_download

from ..checkpoint.finding import CODER, SHIPPED, read_config, resolve_model
from ..files import nearest

BUNDLED = Path(__file__).resolve().parent / "configs"


@dataclass(frozen=True)
class Configuration:
    """A model's configuration and where it came from.

    published  what its makers say of its size, with the source (bundled models only)
    file       the config.json, if it is in one;  folder  the checkpoint's, if it has one
    """

    name: str
    config: dict
    published: dict = field(default_factory=dict)
    file: Path | None = None
    folder: Path | None = None

    @property
    def bundled(self) -> bool:
        return bool(self.published)

    @property
    def has_weights(self) -> bool:
        return self.folder is not None and any(self.folder.glob("model*.safetensors"))


def bundled_names() -> list[str]:
    """Names of the models whose configurations come with this package."""
    return sorted(path.stem for path in BUNDLED.glob("*.json"))


def hub_id(name: str) -> str:
    """Where the weights of a bundled configuration are, or of the shipped model; any other name as it is.

    ValueError for one that is nearly right.
    """
    name, known = str(name), {SHIPPED.name: str(SHIPPED), "qwen3-coder-30b": CODER}
    if Path(name).exists() or "/" in name:
        return name
    if name.lower() in known:
        return known[name.lower()]
    if name.lower() in bundled_names():
        return load_configuration(name).published["repository"]
    if like := nearest(name, [*bundled_names(), *known]):
        raise ValueError(f"model {name} does not exist{like}")
    return name


def load_configuration(name: str) -> Configuration:
    """By bundled name, folder, path of a config.json, or hub id (its config.json alone is fetched).

    Raises ValueError or OSError in one line that says what is wrong and what would help.
    """
    path = Path(SHIPPED if name == SHIPPED.name and not Path(name).exists() else name).expanduser()
    if name and path.is_file():
        return Configuration(path.resolve().parent.name or path.stem, read_config(path), file=path)
    if name.lower() in bundled_names() and not path.exists():
        file = BUNDLED / f"{name.lower()}.json"
        document = json.loads(file.read_text())
        published = {"repository": document["repository"], **document["published"]}
        return Configuration(name.lower(), document["config"], published, file)
    try:
        folder = resolve_model(path if name and path.exists() else name, lambda repo: _fetched(repo).parent)
    except FileNotFoundError as error:
        like = nearest(name, bundled_names())
        raise ValueError(f"{error}{like}; bundled configurations: {', '.join(bundled_names())}") from None
    config = read_config(folder / "config.json")
    quantised = folder / "hf_quant_config.json"  # NVIDIA's ModelOpt writes its quantisation beside it
    if "quantization_config" not in config and quantised.is_file():
        config["quantization_config"] = json.loads(quantised.read_text())
    local = path.is_dir()  # of a hub id, only some of the weights may be in the cache
    file = folder / "config.json"
    return Configuration(path.resolve().name if local else name, config, {}, file, folder if local else None)


def _fetched(repo: str) -> Path:
    return Path(hf_hub_download(repo, "config.json"))
