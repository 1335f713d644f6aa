"""Checkpoints: find one, check it, build its model without reading a weight.

What mlx-lm's expert arrays [E, ...] are made of says how single rows of them can be read:

    mlx's layout           one tensor [E, ...] for all experts          read rows of it
    Hugging Face's layout  one tensor per expert, stacked by mlx-lm     read the tensors of these experts
    anything else          split, scaled or converted on the way        no single rows
"""

from __future__ import annotations

import io
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from mlx_lm.utils import _download, _get_classes, hf_repo_to_path, load_model, load_tokenizer

from . import config_check
from .moe import moe_layers, switch_linears
from .tensor_files import StoredTensor, checkpoint_tensors

# --- finding and checking -------------------------------------------------------------------------


def find_cached(repo: str) -> Path | None:
    """Folder of a hub model that is in the local cache, whole; None otherwise. Never uses the network."""
    try:
        folder = hf_repo_to_path(repo)
        checkpoint_tensors(folder)
    except (OSError, ValueError):  # not there, only in part, or no hub id
        return None
    return folder if (folder / "config.json").exists() else None


def resolve_model(path_or_repo) -> Path:
    """Folder of a model: a local one, one from the hub cache, or downloaded with mlx-lm's progress bar.

    Raises FileNotFoundError or ValueError with one line that names what is wrong.
    """
    folder = Path(path_or_repo).expanduser()
    if not str(path_or_repo):
        raise ValueError("the model's name is empty: give a folder or a hub id such as owner/name")
    if not folder.exists():
        folder = _from_hub(str(path_or_repo))
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the model's folder")
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} has no config.json: it is no model folder")
    return folder


def _from_hub(repo):
    # "models/typo" looks like a hub id, but whoever has a folder "models" here meant that one.
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repo) or Path(repo).parent.is_dir():
        raise FileNotFoundError(f"model {repo} does not exist: no such folder (a hub id looks like owner/name)")
    cached = find_cached(repo)
    if cached:
        return cached
    try:
        HfApi().model_info(repo, timeout=10)  # a dead network shows here, in seconds
        return _download(repo)
    except GatedRepoError:
        raise ValueError(f"the hub gives {repo} only after its terms were accepted there (hf auth login)") from None
    except RepositoryNotFoundError:
        raise ValueError(f"model {repo} does not exist: no such folder, and the hub has no such model") from None
    except Exception as error:  # the hub's client and its HTTP library raise dozens of kinds
        raise OSError(
            f"model {repo} is no folder and not in the local hub cache, and the hub cannot be reached: {_line(error)}"
        ) from None


def _line(error) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def read_config(folder: Path) -> dict:
    """config.json of a model folder. ValueError if it cannot be read or names no model_type."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"model {folder}: it has no config.json")
    return config_check.read_config(path)


# --- the model, with nothing read ----------------------------------------------------------------


@dataclass
class LazyModel:
    """What mlx-lm made of a folder, and where the rows of its experts lie.

    sources  by MoE layer: {(projection, parameter): its tensors}, one [E, ...] or E of them;
             None for a layer in any other layout
    """

    model: nn.Module
    config: dict
    sources: list[dict[tuple[str, str], list[StoredTensor]] | None]


def build_lazily(folder: Path) -> LazyModel:
    """The model of a folder after all checks; no weight is read. ValueError or FileNotFoundError in one line."""
    config = read_config(folder)
    try:
        config_check.checked_classes(config)
        if config.get("quantization"):
            config_check.check_quantization(config["quantization"])
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    tensors = checkpoint_tensors(folder)
    arrays = {}

    def classes(config):
        model_class, args_class = _get_classes(config)

        def make(args):
            model = model_class(args)
            sanitize = getattr(model, "sanitize", dict)

            def sanitize_and_note(weights):
                arrays.update(weights)
                return sanitize(weights)

            model.sanitize = sanitize_and_note
            return model

        return make, args_class

    try:
        model, config = load_model(folder, lazy=True, get_model_classes=classes)
    except Exception as error:  # whatever a strange config makes an architecture stumble over
        raise ValueError(f"mlx-lm cannot build the model in {folder}: {_line(error)}") from error
    del model.sanitize  # the instance's; the class has its own
    return LazyModel(model, config, _sources(model, arrays, tensors))


# A projection's name in mlx-lm, and the names it goes by in files with a tensor per expert.
IN_FILES = {
    "gate_proj": ("gate_proj", "w1"),
    "up_proj": ("up_proj", "w3"),
    "down_proj": ("down_proj", "w2"),
    "fc1": ("fc1", "up_proj"),
    "fc2": ("fc2", "down_proj"),
}


def _sources(model, arrays, tensors):
    """See LazyModel. `arrays`: the lazy arrays as mlx-lm got them from the files, by name."""
    name_of = {id(array): name for name, array in arrays.items()}
    per_expert = defaultdict(dict)  # (layer, projection, parameter) -> {expert: name}
    for name in arrays:
        match = re.fullmatch(r".*?\.(\d+)\..*?\.(\d+)\.(\w+)\.(\w+)", name)
        if match:
            layer, expert, projection, parameter = match.groups()
            per_expert[int(layer), projection, parameter][int(expert)] = name

    def source(layer, projection, parameter, array):
        if id(array) in name_of:
            found = [name_of[id(array)]]
        else:
            count = array.shape[0]
            groups = (per_expert.get((layer.number, name, parameter), {}) for name in IN_FILES.get(projection, ()))
            found = next((list(dict(sorted(g.items())).values()) for g in groups if sorted(g) == [*range(count)]), [])
            if not found or not _is_stack(array, [arrays[name] for name in found]):
                return None
        stored = [tensors[name] for name in found]
        same_bytes = sum(t.nbytes for t in stored) == array.nbytes  # float64 is narrowed while it is loaded
        return stored if same_bytes else None

    result = []
    for layer in moe_layers(model):
        found = {
            (projection, parameter): source(layer, projection, parameter, array)
            for projection, linear in switch_linears(layer.experts)
            for parameter, array in linear.parameters().items()
        }
        result.append(found if all(found.values()) else None)
    return result


def _is_stack(array, parts) -> bool:
    """Whether a lazy array is these parts stacked, and nothing was done to their values on the way."""
    if any(part.shape != array.shape[1:] or part.dtype != array.dtype for part in parts):
        return False
    graph = io.StringIO()
    mx.export_to_dot(graph, array, **{f"part{n}": part for n, part in enumerate(parts)})
    steps = Counter(re.findall(r'label ="(\w+)"', graph.getvalue()))
    named = set(re.findall(r'"(part\d+)"', graph.getvalue()))
    return steps.pop("Load", 0) == len(parts) == len(named) and set(steps) <= {"ExpandDims", "Concatenate"}


def tokenizer_of(folder: Path, config: dict, extra: dict | None = None):
    """mlx-lm's tokenizer of a folder, or ValueError in one line."""
    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken", "*.py")
    if not any(any(folder.glob(pattern)) for pattern in known):  # transformers would make up an empty one
        raise FileNotFoundError(f"{folder} has no tokenizer: neither tokenizer.json nor another kind")
    try:
        return load_tokenizer(folder, extra, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # transformers raises OSError, ValueError, TypeError, ... for a missing file
        raise ValueError(f"{folder} has no tokenizer that can be read: {_line(error)}") from error
