"""Write a checkpoint of RANDOM weights: full-size geometry to try loading, memory and speed with.

    python tools/make_checkpoint.py --out checkpoints/coder-random              17.2 GB
    python tools/make_checkpoint.py --out checkpoints/coder-4 --layers 4         1.8 GB
    python tools/make_checkpoint.py --out checkpoints/other --config other/config.json

The layout is that of the published 4-bit models (stacked experts, bf16 scales and biases, router in
8 bits, files of at most 5 GB with an index), so `mlx_lm.load` takes it. What it generates means nothing.
The default is Qwen3-Coder-30B-A3B; any config of an MoE architecture that mlx-lm knows will do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

from mlx_lm.utils import _parse_size
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from anywhere, uninstalled

from expert_parallel.command.output import console, exit_on_user_error  # noqa: E402
from expert_parallel.report.table import Figure, Table, size  # noqa: E402
from tools.random_weights import cut_layers, plan, write_weights  # noqa: E402

# huggingface.co/Qwen/Qwen3-Coder-30B-A3B-Instruct, config.json
QWEN3_CODER_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 5472,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000000,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
}
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.jinja")


def copy_tokenizer(source: Path, target: Path, config: dict) -> None:
    """Copy a tokenizer and take its end token into the config; ValueError if the vocabulary is too small for it."""
    if not (source / "tokenizer.json").exists():
        raise FileNotFoundError(f"{source} has no tokenizer.json; name a tokenizer's folder with --tokenizer")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    vocabulary = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", math.inf)
    if highest >= vocabulary:
        raise ValueError(f"the tokenizer in {source} has ids up to {highest}, the model's vocabulary is {vocabulary}")
    for path in {path for pattern in TOKENIZER_FILES for path in source.glob(pattern)}:
        shutil.copyfile(path, target / path.name)
    settings = source / "tokenizer_config.json"
    end = json.loads(settings.read_text()).get("eos_token") if settings.exists() else None
    end = end.get("content") if isinstance(end, dict) else end
    if end is not None:
        config["eos_token_id"] = tokenizer.token_to_id(end)


@contextlib.contextmanager
def beside(out: Path):
    """A folder that becomes `out` when the block ends well, and is removed otherwise."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--config", type=Path, help="a config.json, or a folder with one (default: Qwen3-Coder-30B)")
    parser.add_argument("--layers", type=int, help="write so many layers instead of all")
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 5, 6, 8))
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-file-size", default="5GB", help="of a weight file, such as 5GB or 500MB (default 5GB)")
    parser.add_argument(
        "--tokenizer", type=Path, default=ROOT / "models" / "tiny-qwen3-moe", help="folder to copy from"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


def main():
    args = setup_arg_parser().parse_args()
    out = console(args.quiet)

    # 1. What is to be written.
    config = QWEN3_CODER_30B
    if args.config:
        file = args.config / "config.json" if args.config.is_dir() else args.config
        try:
            config = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read config {file}: {error}") from None
    if args.layers is not None:
        config = cut_layers(config, args.layers)
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: needs 0 or more")
    try:
        max_file_size = _parse_size(args.max_file_size)
    except (ArithmeticError, KeyError):
        raise ValueError(f"--max-file-size {args.max_file_size}: expected a size such as 5GB or 500MB") from None
    tensors, config = plan(config, args.bits, args.group_size, args.seed)
    config["random_weights"] = {"seed": args.seed, "made_by": "tools/make_checkpoint.py", "trained": False}
    total = sum(tensor.nbytes for tensor in tensors.values())

    # 2. Is there room for it?
    args.out = args.out.absolute()
    if args.out.exists():
        raise ValueError(f"{args.out} exists already: remove it or choose another --out")
    parent = next(folder for folder in args.out.parents if folder.exists())
    free, needed = shutil.disk_usage(parent).free, total + 100_000_000
    if free < needed:
        raise ValueError(f"{args.out} needs {size(needed)}, {parent} has {size(free)} free; --layers N writes less")

    # 3. Write beside, config.json last; rename.
    out.print(f"Writing RANDOM weights, {size(total)}, to {args.out}: what this model generates means nothing.")
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=args.quiet)
    with beside(args.out) as folder, bar:
        copy_tokenizer(args.tokenizer, folder, config)
        task = bar.add_task("", total=total)
        count = len(tensors)
        write_weights(folder, tensors, max_file_size, args.seed, lambda written: bar.advance(task, written))
        (folder / "README.md").write_text(
            f"# Random weights\n\nA {config['model_type']} checkpoint of {size(total)} whose weights are RANDOM"
            f" (seed {args.seed}), made by tools/make_checkpoint.py\nto measure loading, memory and speed."
            " It was never trained; what it generates means nothing.\n"
        )
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    # 4. What there is now.
    files = sorted(args.out.glob("*.safetensors"))
    rows = {"folder": str(args.out), "weights": "random, untrained", "tensors": f"{count:,} in {len(files)} files"}
    rows |= {"bytes": f"{total:,}", "quantisation": f"{args.bits} bits, group {args.group_size}"}
    out.print(Table("Checkpoint", [Figure(None, label, text) for label, text in rows.items()], facts=True))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
