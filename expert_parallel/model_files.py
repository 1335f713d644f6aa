"""Model files: from a path or hub id to a folder that is whole, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

CODER = "mlx-community/Qwen3-Coder-30B-A3B-Instruct-4bit"
SHIPPED = Path(__file__).resolve().parent.parent / "models" / "tiny-qwen3-moe"


def default_model() -> tuple[Path, str]:
    """Qwen3-Coder-30B if it is already in the local hub cache, else the shipped model; and one line saying which."""
    cached = find_cached(CODER)
    if cached is not None:
        return cached, f"Taking {CODER},\nfound in the local hub cache. The small one: --model {SHIPPED.name}"
    return SHIPPED, f"Taking {SHIPPED.name}, shipped with this project. The real one, 17.2 GB:\n--model {CODER}"


def find_cached(repo: str) -> Path | None:
    """Folder of a hub model that is completely in the local cache; asks no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, local_files_only=True))
        check_files(folder)
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError, OSError):
        return None
    return folder


def resolve_model(name: str) -> Path:
    """The folder of a model given as a path, as the shipped model's name, or as a hub id (then downloaded).

    Raises ValueError in one line: no such folder, hub not reachable, files missing or damaged.
    """
    if name == SHIPPED.name and not Path(name).exists():
        name = str(SHIPPED)
    folder = Path(name).expanduser()
    if not folder.exists():
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise ValueError(f"model {name}: no such folder, and not a hub id such as {CODER}")
        folder = _download(name)
    if not folder.is_dir():
        raise ValueError(f"model {name} is a file; give the folder that holds config.json")
    check_files(folder)
    return folder


def _download(repo: str) -> Path:
    from mlx_lm.utils import hf_repo_to_path

    cached = find_cached(repo)
    if cached is not None:
        return cached
    try:
        return Path(hf_repo_to_path(repo))
    except Exception:  # requests, httpx and the hub each raise their own
        pass
    try:
        from mlx_lm.utils import _download as download

        return Path(download(repo))
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"model {repo}: not a local folder, not in the hub cache, and it could not be downloaded ({reason})"
        ) from None


def read_config(folder: Path) -> dict:
    """config.json of a model folder. ValueError if it is not there or not an object."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"model {folder}: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path} names no model_type")
    return config


def check_files(folder: Path) -> None:
    """ValueError naming the file unless config and every safetensors file are there and of their full length."""
    read_config(folder)
    files = {path.name for path in folder.glob("model*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is not a weight index: {error}") from None
        missing = sorted(named - files)
        if missing:
            raise ValueError(f"model {folder}: {missing[0]} is missing ({len(missing)} of {len(named)} weight files)")
    if not files:
        raise ValueError(f"model {folder}: it has no model*.safetensors")
    for name in sorted(files):
        _check_length(folder / name)


def _check_length(path: Path) -> None:
    length = path.stat().st_size
    with path.open("rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        if length < 8 or header_length > length - 8:
            raise ValueError(f"{path} is truncated: {length} bytes, its header alone needs {8 + header_length}")
        try:
            header = json.loads(file.read(header_length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is not a safetensors file: its header is damaged") from None
    expected = 8 + header_length + max(ends, default=0)
    if length != expected:
        state = "truncated" if length < expected else "too long"
        raise ValueError(f"{path} is {state}: {length} bytes instead of {expected}; download it again")


def load_whole(folder: Path, lazy: bool = True):
    """(model, tokenizer, config) by mlx-lm. ValueError in one line for what mlx-lm does not know or cannot read."""
    from mlx_lm.utils import load

    try:
        return load(str(folder), lazy=lazy, return_config=True)
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model {folder}: mlx-lm cannot load it: {type(error).__name__}: {reason}") from None
