"""The pictures of the README: a run of the shipped model, and a projection. Needs half a minute.

    python tools/make_pictures.py

Writes docs/*.png.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from expert_parallel.report.plots import save_plots, speed_lines  # noqa: E402

RUN = ("--prompt", "expert_parallel/__init__.py", "--max-tokens", "160", "--devices", "8", "--quiet")
OF_RUN = ("expert_loads", "device_loads", "memory")


def main():
    with TemporaryDirectory() as folder:
        command = [sys.executable, "qwen3_expert_parallel.py", "--model", "models/tiny-qwen3-moe", *RUN]
        subprocess.run([*command, "--plots", folder], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for name in OF_RUN:
            target = ROOT / "docs" / f"{name}.png"
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(Path(folder, f"{name}.png").read_bytes())
    analysis = [sys.executable, "model_analysis.py", "--json", "-"]
    figures = json.loads(subprocess.run(analysis, cwd=ROOT, check=True, capture_output=True).stdout)
    projection = figures["projection"]
    picture = speed_lines(projection, f"{figures['architecture']['name']} on {projection['hardware']}")
    print(*(path.relative_to(ROOT) for path in save_plots(ROOT / "docs", {"speed": picture})))


if __name__ == "__main__":
    main()
