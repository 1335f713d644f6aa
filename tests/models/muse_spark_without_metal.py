"""mlx-lm's kernels for muse_spark in plain mlx, for machines without Metal: as their docstrings say, to no bit."""

import mlx.core as mx
from mlx.core.fast import rms_norm


def expert_routing(logits, expert_bias, *, top_k, multiplier, score_eps, route_scale):
    scores = mx.sigmoid(logits * multiplier)
    ids = mx.argpartition(-(scores + expert_bias), top_k - 1, axis=-1)[..., :top_k].astype(mx.uint32)
    weights = mx.take_along_axis(scores, ids, axis=-1)
    return ids, weights / (weights.sum(-1, keepdims=True) + score_eps) * route_scale


def norm_add_norm(branch, stream, *, alpha, beta, post_weight, post_eps, next_norm):
    scaled = branch.astype(mx.float32) * (1.0 if post_weight is None else post_weight)
    stream = alpha * stream + beta * rms_norm(scaled, None, post_eps)
    return stream, None if next_norm is None else next_norm(stream).astype(branch.dtype)


def post_expert_norm_combine(h, weights, *, norm_weight, eps):
    return (rms_norm(h * norm_weight, None, eps) * weights[..., None]).sum(-2).astype(h.dtype)


def qk_norm(qkvg, *, n_heads, n_kv_heads, head_dim, eps, query_scale):
    both = qkvg[..., : (n_heads + n_kv_heads) * head_dim]
    both = rms_norm(both.reshape(*qkvg.shape[:-1], -1, head_dim), None, eps)
    return both[..., :n_heads, :] * query_scale, both[..., n_heads:, :]


def qk_norm_rope(qkvg, *, rope_base, offset, head_dim, **others):
    def turned(x):
        x = x.swapaxes(1, 2)
        return mx.fast.rope(x, head_dim, traditional=True, base=rope_base, scale=1.0, offset=offset).swapaxes(1, 2)

    return [turned(x) for x in qk_norm(qkvg, head_dim=head_dim, **others)]


def rms_norm_sigmoid_gate(x, gate, *, eps):
    return rms_norm(x, None, eps).swapaxes(1, 2).reshape(gate.shape) * mx.sigmoid(gate)


def stand_in(module) -> None:
    """For the kernels of mlx_lm.models.muse_spark, where mlx has no Metal."""
    if not mx.metal.is_available():
        kernels = (expert_routing, norm_add_norm, post_expert_norm_combine, qk_norm, qk_norm_rope)
        for kernel in (*kernels, rms_norm_sigmoid_gate):
            setattr(module, kernel.__name__, kernel)
