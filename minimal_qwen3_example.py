"""Expert parallelism in 40 lines: to read, to paste into a notebook, to run as python minimal_qwen3_example.py

Takes the small model that ships with the project; any Mixture-of-Experts model that mlx-lm
knows goes in its place, for example mlx-community/Qwen3-Coder-30B-A3B-Instruct-4bit.
"""

from expert_parallel.command.output import without_options

if __name__ == "__main__":
    without_options(__doc__)
import mlx.core as mx
from mlx_lm import generate, load

from expert_parallel import balancedness, place_experts, record_routing, shard_model
from expert_parallel.checkpoint.finding import SHIPPED
from expert_parallel.layers import moe_shape

# 1. mlx-lm loads the model as ever, and we note what it answers.
model, tokenizer = load(str(SHIPPED))
model.set_dtype(mx.float32)  # faster on a CPU; leave it out on a GPU
prompt = tokenizer.encode("class Parser:\n    def parse(self, text):\n        if not text:")
logits = model(mx.array([prompt]))

# 2. Eight devices, 16 of the 128 experts on each; only the experts move, the router stays.
num_layers, num_experts = moe_shape(model)
placement = place_experts([[0] * num_experts] * num_layers, num_devices=8, strategy="contiguous")
model = shard_model(model, placement)
print(f"device 3 holds experts {placement.experts_on(layer=0, device=3)} of layer 0")

# 3. Same numbers, bit for bit.
assert mx.array_equal(model(mx.array([prompt])), logits), "expert parallelism must not change the answer"

# 4. Generate, and record where every token went.
with record_routing(model) as trace:
    print(generate(model, tokenizer, prompt, max_tokens=40))

# 5. How even was the load? 1 is even, 1/8 means that one device did all the work.
loads = placement.device_loads(trace.loads())  # [layers, devices]
print(f"{len(trace)} tokens recorded, slots per device in layer 0: {loads[0].astype(int).tolist()}")
print(f"balancedness {balancedness(loads):.2f} (measured on this text)")
