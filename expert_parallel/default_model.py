"""The default model: the real one if it is here already, else the small one that ships with the project."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import find_cached

CODER = "mlx-community/Qwen3-Coder-30B-A3B-Instruct-4bit"
SHIPPED = Path(__file__).resolve().parent.parent / "models" / "tiny-qwen3-moe"


def default_model() -> tuple[Path, str]:
    """Qwen3-Coder-30B if it is whole in the local hub cache, else the shipped model; and a note saying which.

    Nothing is downloaded.
    """
    cached = find_cached(CODER)
    if cached is not None:
        return cached, f"Taking {CODER},\nfound in the local hub cache. The small one: --model {SHIPPED}"
    return SHIPPED, f"Taking {SHIPPED.name}, shipped with this project. The real one, 17.2 GB:\n--model {CODER}"
