"""Finding models: a folder, a hub id, the hub's cache; and what stands in a config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from mlx_lm.utils import _download, _get_classes, hf_repo_to_path

from .tensors import checkpoint_tensors, index_problem

classes_of = _get_classes  # of a config; this and `_download` are all that is taken of mlx-lm's private names
CODER = "mlx-community/Qwen3-Coder-30B-A3B-Instruct-4bit"
# Beside the package, or in it where that was installed; other packages may have a folder "models" beside theirs.
_BESIDE, _INSTALLED = (Path(__file__).resolve().parents[n] / name for n, name in ((2, "models"), (1, "shipped")))
SHIPPED = next(filter(Path.is_dir, (place / "tiny-qwen3-moe" for place in (_INSTALLED, _BESIDE))), _BESIDE)


def default_model() -> tuple[Path, str]:
    """Qwen3-Coder-30B if it is whole in the local hub cache, else the shipped model; and a note saying which."""
    if (cached := find_cached(CODER)) is not None:
        return cached, f"Taking {CODER},\nfound in the local hub cache. The small one: --model {SHIPPED}"
    return SHIPPED, f"Taking {SHIPPED.name}, shipped with this project. The real one, 17.2 GB:\n--model {CODER}"


def is_shipped(folder: Path) -> bool:
    """Whether a folder has the shipped model or one like it, small enough for all that is measured besides."""
    return read_config(folder / "config.json") == read_config(SHIPPED / "config.json")


def find_cached(repo: str) -> Path | None:
    """Folder of a hub model that is in the local cache, whole; None otherwise. Never uses the network."""
    try:
        folder = hf_repo_to_path(repo)
        problem = index_problem(folder, checkpoint_tensors(folder))
    except (OSError, ValueError):  # not there, only in part, or no hub id
        return None
    return folder if problem is None and (folder / "config.json").exists() else None


def resolve_model(path_or_repo, download=_download) -> Path:
    """Folder of a model: a local one, one from the hub cache, or what `download(repo)` fetches.

    Raises FileNotFoundError, ValueError or OSError with one line that names what is wrong.
    """
    repo, folder = str(path_or_repo), Path(path_or_repo).expanduser()
    if not repo:
        raise ValueError("the model's name is empty: give a folder or a hub id such as owner/name")
    if not folder.exists():
        # "models/typo" looks like a hub id, but whoever has a folder "models" here meant that one.
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repo) or folder.parent.is_dir():
            raise FileNotFoundError(f"model {repo} does not exist: no such folder (a hub id looks like owner/name)")
        folder = find_cached(repo) or _from_hub(repo, download)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the model's folder")
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: it is no model folder")
    return folder


def _from_hub(repo, download) -> Path:
    try:
        HfApi().model_info(repo, timeout=10)  # a dead network shows here, in seconds
        return Path(download(repo))
    except GatedRepoError:
        raise ValueError(f"the hub gives {repo} only after its terms were accepted there (hf auth login)") from None
    except RepositoryNotFoundError:
        raise ValueError(f"model {repo} does not exist: no such folder, and the hub has no such model") from None
    except Exception as error:  # the hub's client and its HTTP library raise dozens of kinds
        raise OSError(
            f"model {repo} is no folder and not in the hub cache, and the hub cannot be reached: {in_a_line(error)}"
        ) from None


def in_a_line(error: BaseException, most: int = 200) -> str:
    """Kind and text of an error on one line, cut where it is long."""
    return cut(" ".join(f"{type(error).__name__}: {error}".split()), most)


def cut(text: str, most: int) -> str:
    """The text, or its beginning and an ellipsis, in at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def context_of(config: dict) -> int | None:
    """Tokens that a model can look at, where its configuration says so: at its top, or of its text part."""
    parts = (config, config.get("text_config") or {})
    return next((part["max_position_embeddings"] for part in parts if part.get("max_position_embeddings")), None)


def read_config(path) -> dict:
    """A config.json as a dictionary that names its model_type. ValueError naming the file if it is not that."""
    try:
        config = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {in_a_line(error)}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path} is no model's configuration: it names no model_type")
    return config
