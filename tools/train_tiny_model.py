r"""Train models/tiny-qwen3-moe: a small Qwen3-MoE with the routing of Qwen3-Coder-30B.

    pip install -r tools/requirements.txt
    tools/gather_texts.sh texts
    python tools/train_tiny_model.py texts --out first --steps 3000
    python tools/train_tiny_model.py texts --out second --steps 4000 --continue-from first \
        --learning-rate 1.5e-3 --seed 1
    python tools/train_tiny_model.py texts --out models/tiny-qwen3-moe --steps 4000 --continue-from second \
        --learning-rate 1.5e-3 --seed 2

128 experts, top-8, normalised weights; hidden 256, 4 layers, expert width 64, vocabulary 4096. These three
rounds made the shipped model, each going on from the 4-bit weights of the one before: 22.5 M tokens, about
three hours. PyTorch takes a core or two at 1,700 to 2,500 tokens a second; where other programs run,
OMP_NUM_THREADS=1 is the faster. Every domain is a folder of texts; one file in 30 is held out whole, and
perplexity is reported on those alone.
"""

import argparse
import hashlib
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

# Share of the training tokens that comes from each domain.
MIX = {"python": 0.50, "tests": 0.16, "docs": 0.09, "prose": 0.07, "go": 0.10, "json": 0.08}
MIX_OF_LATER_ROUNDS = {"python": 0.64, "tests": 0.07, "docs": 0.09, "prose": 0.07, "go": 0.08, "json": 0.05}
END = "<|endoftext|>"
# It knows no roles: it goes on from what was said, where each but an answer begins a line.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first and message['role'] != 'assistant' %}{{ '\\n' }}{% endif %}{{ message['content'] }}"
    "{% endfor %}"
)
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "router_aux_loss_coef": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def read_domain(folder):
    """Texts of a folder as (training, held out); which is which hangs on the file's name alone."""
    train, held_out = [], []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        (held_out if number % 30 == 0 else train).append(path.read_text(encoding="utf-8"))
    return train, held_out


def train_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer, texts, rng=None):
    """One stream of token ids with END before every text; shuffled by file where rng is given."""
    order = rng.permutation(len(texts)) if rng is not None else range(len(texts))
    rows = tokenizer.encode_batch([texts[i] for i in order])
    return np.concatenate([np.array([0, *row.ids], dtype=np.int64) for row in rows])


@torch.no_grad()
def perplexity(model, stream, window, most=60_000):
    """Perplexity of a token stream in windows that share one token; at most `most` tokens."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, min(len(stream), most) - 1, window):
        ids = torch.from_numpy(stream[start : start + window + 1])[None]
        logits = model(input_ids=ids[:, :-1], output_router_logits=False).logits
        total += torch.nn.functional.cross_entropy(logits[0].float(), ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    model.train()
    return math.exp(total / count)


class Batches:
    """Rows of window + 1 tokens; each row's domain is drawn by MIX, its text follows on from the last."""

    def __init__(self, streams, window, rng, mix):
        self.streams, self.window, self.rng = streams, window, rng
        self.names = [name for name in mix if name in streams]
        share = np.array([mix[name] for name in self.names])
        self.share = share / share.sum()
        self.at = dict.fromkeys(self.names, 0)

    def draw(self, rows):
        batch = np.empty((rows, self.window + 1), dtype=np.int64)
        for row in range(rows):
            name = self.names[self.rng.choice(len(self.names), p=self.share)]
            stream, at = self.streams[name], self.at[name]
            if at + self.window + 1 > len(stream):
                at = int(self.rng.integers(self.window))  # other window borders in the next pass
            batch[row] = stream[at : at + self.window + 1]
            self.at[name] = at + self.window
        return torch.from_numpy(batch)


def float_weights(folder):
    """Tensors of a 4-bit mlx checkpoint of this model, dequantised, under the names of transformers' model."""
    import mlx.core as mx

    stored = {}
    for path in sorted(folder.glob("model*.safetensors")):
        stored.update(mx.load(str(path)))
    quantization = json.loads((folder / "config.json").read_text())["quantization"]

    def restored(name):
        module, value = name.removesuffix(".weight"), stored[name]
        if f"{module}.scales" in stored:
            layout = {**quantization, **quantization.get(module, {})}
            value = mx.dequantize(
                value, stored[f"{module}.scales"], stored[f"{module}.biases"], layout["group_size"], layout["bits"]
            )
        return torch.from_numpy(np.array(value.astype(mx.float32)))

    weights = {name: restored(name) for name in stored if name.endswith(".weight") and ".switch_mlp." not in name}
    for layer in range(CONFIG["num_hidden_layers"]):
        experts = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            restored(f"model.layers.{layer}.mlp.switch_mlp.{part}.weight")
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        weights |= {experts + "gate_up_proj": torch.cat([gate, up], dim=1), experts + "down_proj": down}
    return weights


def train(model, batches, args, report):
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    begin, mean = time.time(), None
    for step in range(args.steps):
        warm = min(1.0, (step + 1) / 100)
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * warm * cosine
        batch = batches.draw(args.batch)
        out = model(input_ids=batch[:, :-1], output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten())
        (loss + CONFIG["router_aux_loss_coef"] * out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            speed = (step + 1) * args.batch * args.window / (time.time() - begin)
            print(f"step {step + 1}/{args.steps}  loss {mean:.3f}  {speed:.0f} tokens/s", flush=True)
        if (step + 1) % args.evaluate_every == 0 or step + 1 == args.steps:
            report(step + 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="folder made by tools/gather_texts.sh")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished 4-bit model")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--evaluate-every", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--continue-from", type=Path, help="finished 4-bit model of a first round to go on from")
    args = parser.parse_args()

    # 1. Text: whole files held out, a tokenizer that never saw them.
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    domains = {name: read_domain(args.texts / name) for name in MIX if (args.texts / name).is_dir()}
    sample = [text for name in domains for text in domains[name][0][:: 1 + (name == "tests")]]
    first = args.continue_from
    tokenizer = Tokenizer.from_file(str(first / "tokenizer.json")) if first else train_tokenizer(sample)
    streams = {name: encode(tokenizer, texts, rng) for name, (texts, _) in domains.items()}
    held_out = {name: encode(tokenizer, texts) for name, (_, texts) in domains.items() if texts}
    for name, stream in streams.items():
        size = sum(len(text.encode()) for text in domains[name][0])
        print(f"{name}: {len(stream)} tokens, {size / len(stream):.2f} bytes each", flush=True)

    # 2. Model and training.
    config = Qwen3MoeConfig(**{k: v for k, v in CONFIG.items() if k != "architectures"})
    model = Qwen3MoeForCausalLM(config)
    if first:
        model.load_state_dict(float_weights(first))
    model.set_experts_implementation("grouped_mm")

    scores = {}

    def report(step):
        for name, stream in held_out.items():
            scores[name] = perplexity(model, stream, args.window)
        print(f"step {step} perplexity on held-out files:", {k: round(v, 2) for k, v in scores.items()}, flush=True)
        model.save_pretrained(unquantised)
        (unquantised / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")

    unquantised = args.out.with_name(args.out.name + "-unquantised")
    unquantised.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(unquantised / "tokenizer.json"))
    (unquantised / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": END,
             "model_max_length": CONFIG["max_position_embeddings"], "clean_up_tokenization_spaces": False,
             "chat_template": CHAT_TEMPLATE},
            indent=2,
        )
        + "\n"
    )  # fmt: skip
    for name, (_, texts) in domains.items():
        folder = unquantised / "held-out"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.txt").write_text(END.join(texts), encoding="utf-8")
    batches = Batches(streams, args.window, rng, MIX_OF_LATER_ROUNDS if first else MIX)
    train(model, batches, args, report)

    # 3. Quantise as mlx-lm does for the published 4-bit checkpoints.
    from mlx_lm import convert

    shutil.rmtree(args.out, ignore_errors=True)
    convert(str(unquantised), str(args.out), quantize=True, q_bits=4, q_group_size=64, dtype="bfloat16")
    (args.out / "perplexity.json").write_text(json.dumps({"float32": scores}, indent=2) + "\n")


if __name__ == "__main__":
    main()
