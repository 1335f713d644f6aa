"""Configurations of models: by bundled name, folder, file or hub id; weights are not needed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.opened import SHIPPED, from_hub, read_config

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


def bundled_names() -> list[str]:
    """Names of the models whose configurations come with this package."""
    return sorted(path.stem for path in BUNDLED.glob("*.json"))


def load_configuration(name: str) -> Configuration:
    """By bundled name, folder, path of a config.json, or hub id (its config.json alone is fetched).

    Raises ValueError or OSError in one line that says what is wrong and what would help.
    """
    path = Path(SHIPPED if name == SHIPPED.name and not Path(name).exists() else name).expanduser()
    if not name:
        raise ValueError("the model's name is empty: give a folder, a config.json, a hub id or a bundled name")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model {name}: it has no config.json")
        return _from_file(path.resolve().name, path / "config.json", path)
    if path.is_file():
        return _from_file(path.resolve().parent.name or path.stem, path)
    if name.lower() in bundled_names():
        document = json.loads((BUNDLED / f"{name.lower()}.json").read_text())
        published = {"repository": document["repository"], **document["published"]}
        return Configuration(name.lower(), document["config"], published)
    # "models/typo" looks like a hub id, but whoever has a folder "models" here meant that one.
    if name.count("/") == 1 and not name.startswith((".", "~", "/")) and not path.parent.is_dir():
        return _from_file(name, _fetch_config(name))
    raise ValueError(
        f"model {name}: no such folder or file, not a hub id such as Qwen/Qwen3-30B-A3B, and not one of the"
        f" bundled configurations: {', '.join(bundled_names())}"
    )


def _from_file(name, file, folder=None):
    config = read_config(file)
    quantised = file.with_name("hf_quant_config.json")  # NVIDIA's ModelOpt writes its quantisation beside it
    if folder and "quantization_config" not in config and quantised.is_file():
        config["quantization_config"] = json.loads(quantised.read_text())
    return Configuration(name, config, file=file, folder=folder)


def _fetch_config(repo: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, "config.json", local_files_only=True))
    except LocalEntryNotFoundError:
        return from_hub(repo, lambda repo: hf_hub_download(repo, "config.json"))
