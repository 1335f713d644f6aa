"""The pictures of the README: of its first command, and a projection. Needs half a minute.

    python tools/make_pictures.py

Writes docs/*.png.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
# The prompt is the shipped model's own, so that the pictures change with the model alone, not with a file of the code.
COMMANDS = (
    ("qwen3_expert_parallel.py", "--model", "models/tiny-qwen3-moe", "--devices", "8", "--trials", "0"),
    ("model_analysis.py",),
)
KEPT = ("expert_loads", "device_loads", "memory", "speed")


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    docs = ROOT / "docs"
    docs.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder:
        for command in COMMANDS:
            whole = [sys.executable, *command, "--quiet", "--plots", folder]
            subprocess.run(whole, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for name in KEPT:
            picture = Path(folder, f"{name}.png").read_bytes()
            (docs / f"{name}.png").write_bytes(picture)
            print(f"docs/{name}.png, {len(picture)} bytes")


if __name__ == "__main__":
    main()
