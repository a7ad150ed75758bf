"""One attention function for everything: packed documents, chunked prefill, decoding, cross-attention, streaming heads.

A query at position p sees the key at position j iff  j <= p  and  ( p - j < window  or  j < sink ).
Queries are the *last* positions of their sequence (bottom-right alignment), so one rule serves training (as many queries
as keys), chunked prefill (fewer queries than keys) and decoding (one query).

Off CUDA this is PyTorch, and never a mask: the visible region is cut into rectangles and triangles, each of which a fused
kernel computes without looking at a hidden score; the parts of a row are merged by their log-sum-exp. The cost of a
streaming head is therefore O(N * (sink + window)), forward and backward.

    python attention_triton.py            # cost of streaming heads against full ones on this machine
"""
import functools
import math
import time
from typing import NamedTuple

import torch

flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # fused, and unlike SDPA it returns the LSE
flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(q, k, v, cu_q, cu_k, *, causal=True, window=None, sink=0, scale=None, return_lse=False, impl="auto"):
    """Attention inside each packed sequence; grouped-query heads share K and V, which are never repeated.

    q (Nq, H, D); k, v (Nk, H_kv, D), H a multiple of H_kv; query heads g*G .. g*G+G-1 read KV head g, G = H / H_kv.
    cu_q, cu_k (B + 1,) integers: sequence b owns rows cu_q[b]:cu_q[b+1] of q and cu_k[b]:cu_k[b+1] of k, v.
    causal aligns the last query with the last key. A row without a visible key gives 0, and LSE -inf.
    window [keys, the query's own included]: None or <= 0 means all; an int tensor (H_kv,) gives each KV head its own.
    sink [keys]: the first keys of each *sequence* stay visible however far back. window and sink need causal.
    scale multiplies the scores, 1 / sqrt(D) by default.
    Returns out (Nq, H, D) in q's dtype; with return_lse also the natural log-sum-exp (H, Nq), at least float32, which
    carries no gradient. out is differentiable in q, k and v.
    Raises ValueError where shapes, bounds, devices or options do not fit.
    Source: FlashAttention-2's varlen convention, arXiv:2307.08691; sink + window is StreamingLLM, arXiv:2309.17453, 3.2
    (keys keep their positions here).
    """
    cu_q, cu_k, windows = check(q, k, v, cu_q, cu_k, causal, window, sink, impl)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if len(set(windows)) == 1:
        out, lse = ragged(q, k, v, cu_q, cu_k, causal, windows[0], sink, scale)
        return (out, lse) if return_lse else out
    n_rep = q.shape[1] // k.shape[1]
    out, lse = [None] * k.shape[1], [None] * k.shape[1]
    for w in sorted(set(windows)):  # KV heads of one window run together
        heads = [h for h, other in enumerate(windows) if other == w]
        q_w = q.unflatten(1, (-1, n_rep))[:, heads].flatten(1, 2)  # (Nq, len(heads) * G, D)
        o, s = ragged(q_w, k[:, heads], v[:, heads], cu_q, cu_k, causal, w, sink, scale)
        for i, h in enumerate(heads):
            out[h], lse[h] = o[:, i * n_rep:(i + 1) * n_rep], s[i * n_rep:(i + 1) * n_rep]
    out = torch.cat(out, dim=1)  # (Nq, H, D)
    return (out, torch.cat(lse)) if return_lse else out


def decode(q, k, v):
    """One query per head over all entries of its KV head, in a cache's layout: q (H, D), k, v (H_kv, n, D) -> (H, D).

    What `attention` computes for one row, without a gradient and without its preparations, which would take longer than
    the work itself. The query heads of a KV head are rows over the same keys: K and V are read once."""
    out, _ = dense(q.unflatten(0, (len(k), -1)).unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), False, q.shape[-1] ** -0.5)
    return out.view(q.shape)


def check(q, k, v, cu_q, cu_k, causal, window, sink, impl):
    """Refuse what does not fit; returns cu_q, cu_k and the window of each KV head (0 = all) as lists of ints."""
    if impl not in ("auto", "torch"):
        raise ValueError(f"impl must be 'auto' or 'torch', got {impl!r}")
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"want q (Nq, H, D) and k, v (Nk, H_kv, D), got {[tuple(x.shape) for x in (q, k, v)]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} KV heads evenly")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(f"q, k, v differ in dtype or device: {[(x.dtype, str(x.device)) for x in (q, k, v)]}")
    cu_q, cu_k = (c.tolist() if torch.is_tensor(c) else list(c) for c in (cu_q, cu_k))
    for name, cu, n in (("cu_q", cu_q, q.shape[0]), ("cu_k", cu_k, k.shape[0])):
        if len(cu) < 1 or cu[0] != 0 or cu[-1] != n or any(a > b for a, b in zip(cu, cu[1:])):
            raise ValueError(f"{name} must rise from 0 to {n}, got {cu if len(cu) < 9 else cu[:8] + ['...']}")
    if len(cu_q) != len(cu_k):
        raise ValueError(f"cu_q has {len(cu_q) - 1} sequences, cu_k {len(cu_k) - 1}")
    windows = window.tolist() if torch.is_tensor(window) else window
    windows = windows if isinstance(windows, list) else [windows or 0] * k.shape[1]
    if len(windows) != k.shape[1]:
        raise ValueError(f"window has {len(windows)} entries for {k.shape[1]} KV heads")
    windows = [max(int(w), 0) for w in windows]
    if sink < 0:
        raise ValueError(f"sink must be >= 0, got {sink}")
    if not causal and (any(windows) or sink):
        raise ValueError("window and sink need causal=True")
    return cu_q, cu_k, windows


def ragged(q, k, v, cu_q, cu_k, causal, window, sink, scale):
    """One window for all heads. Sequences of equal lengths run as one batch. Returns out (Nq, H, D), lse (H, Nq)."""
    lengths = [(cu_q[b + 1] - cu_q[b], cu_k[b + 1] - cu_k[b]) for b in range(len(cu_q) - 1)]
    if len(set(lengths)) == 1:  # also the case of one sequence: no copy
        by_sequence = zip((q, k, v), (lengths[0][0], lengths[0][1], lengths[0][1]))
        q_s, k_s, v_s = (x.unflatten(0, (len(lengths), n)) for x, n in by_sequence)  # (B, n, heads, D)
        out, lse = batched(q_s, k_s, v_s, causal, window, sink, scale)
        return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)  # (Nq, H, D), (H, Nq)
    out, lse = [None] * len(lengths), [None] * len(lengths)
    for pair in set(lengths):
        same = [b for b, other in enumerate(lengths) if other == pair]
        q_s = torch.stack([q[cu_q[b]:cu_q[b + 1]] for b in same])  # (B, nq, H, D)
        k_s, v_s = (torch.stack([x[cu_k[b]:cu_k[b + 1]] for b in same]) for x in (k, v))  # (B, nk, H_kv, D)
        for b, o, s in zip(same, *batched(q_s, k_s, v_s, causal, window, sink, scale)):
            out[b], lse[b] = o, s
    if not out:
        return torch.zeros_like(q), q.new_zeros(q.shape[1], 0)
    return torch.cat(out), torch.cat(lse, dim=1)


def batched(q, k, v, causal, window, sink, scale):
    """q (B, nq, H, D), k, v (B, nk, H_kv, D) of equal lengths. Returns out like q, lse (B, H, nq)."""
    (nq, n_head), (nk, n_kv_head) = q.shape[1:3], k.shape[1:3]
    if nq == 1 and n_head > n_kv_head and (not causal or window == 0 or nk <= window + sink):
        # decoding: the G query heads of a KV head become G rows over the same keys, so K and V are read once
        rows = q.unflatten(2, (n_kv_head, -1)).squeeze(1).transpose(1, 2)  # (B, G, H_kv, D)
        out, lse = Merged.apply(rows, k, v, pieces(rows.shape[1], nk, False, 0, 0), scale)
        return out.transpose(1, 2).flatten(1, 2).unsqueeze(1), lse.flatten(1).unsqueeze(-1)
    return Merged.apply(q, k, v, pieces(nq, nk, causal, window, sink), scale)


# --- geometry: the visible region as rectangles and triangles -------------------------------------------------------

class Piece(NamedTuple):
    """Rows q0 : q0+nq against keys k0 : k0+nk: all of it, or (triangle) row i sees keys j <= i, both counted from the
    piece's corner; `flip` turns rows and keys round first. The piece recurs `repeat` times, `stride` rows and keys on."""
    q0: int
    nq: int
    k0: int
    nk: int
    triangle: bool = False
    flip: bool = False
    repeat: int = 1
    stride: int = 1


def below(q0, nq, k0, nk, d):
    """Row q0+i sees keys k0 .. k0+i+d: at most one rectangle of d keys and one triangle beside it."""
    if d < 0:
        q0, nq, d = q0 - d, nq + d, 0
    d, rest = min(d, nk), min(nk - d, nq)
    parts = [Piece(q0, nq, k0, d)] * (nq > 0 and d > 0)
    return parts + [Piece(q0, nq, k0 + d, rest, triangle=True)] * (rest > 0)


def above(q0, nq, k0, nk, skip):
    """Row q0+i sees the keys k0+t of t > i - skip: `below`, seen from the far corner."""
    parts = below(0, nq, 0, nk, skip + nk - nq - 1)
    return [p._replace(q0=q0 + nq - p.q0 - p.nq, k0=k0 + nk - p.k0 - p.nk, flip=p.triangle) for p in parts]


@functools.lru_cache(maxsize=4096)
def pieces(nq, nk, causal, window, sink):
    """The region that nq queries see of nk keys, each visible pair in exactly one piece; window 0 means all.

    A band is cut into chunks of `window` rows. A chunk sees the lower triangle of its own keys and the strictly upper
    triangle of the keys of the chunk before; the sink adds the keys j < sink that have left a row's window.
    """
    if not causal:
        return (Piece(0, nq, 0, nk),) if nq and nk else ()
    off = nk - nq  # position of the first query
    if window == 0 or nk <= window + sink:
        return tuple(below(0, nq, 0, nk, off))
    q0, off = max(-off, 0), max(off, 0)  # rows before the first key see nothing
    whole, rest = divmod(nq - q0, window)
    parts = []
    if whole:
        parts.append(Piece(q0, window, off, window, triangle=True, repeat=whole, stride=window))
    if rest:
        parts.append(Piece(q0 + whole * window, rest, off + whole * window, rest, triangle=True))
    first = 0 if off >= window else 1  # from this chunk on, a whole chunk of keys lies before
    if whole > first and window > 1:
        parts.append(Piece(q0 + first * window, window - 1, off + (first - 1) * window + 1, window - 1, triangle=True,
                           flip=True, repeat=whole - first, stride=window))
    for c in {0, whole} if first else {whole}:  # the chunks left over: the first, the short last one, or both in one
        rows, before = (window if c < whole else rest), min(off + c * window, window)
        if rows and before:
            parts += above(q0 + c * window, rows, off + c * window - before, before, window - before)
    parts += below(q0, nq - q0, 0, sink, off - window)
    return tuple(parts)


# --- computing a piece, merging pieces ------------------------------------------------------------------------------

def take(x, start, n, p):
    """The rows of a piece: x (B, N, ...) -> a view (B, repeat, n, ...), also for writing."""
    span = x.narrow(1, start, (p.repeat - 1) * p.stride + n)
    return span.unfold(1, n, p.stride if p.repeat > 1 else 1).movedim(-1, 2)


def operand(x, start, n, p):
    """The rows of a piece as a kernel wants them: x (B, N, H, D) -> (B * repeat, H, n, D)."""
    x = take(x, start, n, p).flatten(0, 1).transpose(1, 2)
    return x.flip(2) if p.flip else x


def dense(q, k, v, triangle, scale):
    """softmax(scale q k^T) v over all keys, or over keys j <= i. q (B, H, nq, D), k, v (B, H_kv, nk, D).

    Returns out (B, H, nq, D) and lse (B, H, nq). Every row must see a key."""
    if q.is_cpu:
        return flash_cpu(q, k, v, 0.0, triangle, scale=scale)
    return plain(q, k, v, triangle, scale)


def dense_backward(grad, q, k, v, out, lse, triangle, scale):
    """Gradients of `dense` when (q, k) is a *part* of rows whose whole softmax gave out and lse.

    P = exp(scale q k^T - lse) is then the part's share of the true probabilities, and
    dV = P^T dO,  dS = P * (dO V^T - rowsum(dO * O)),  dQ = scale dS K,  dK = scale dS^T Q   (FlashAttention-2, 3.1).
    """
    if q.is_cpu:  # in float32 always: the kernel's bfloat16 backward takes 1x to 3x the time (3x: 32 pieces of 128 rows)
        wide = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (grad, q, k, v, out))
        return flash_cpu_backward(*wide, lse, 0.0, triangle, scale=scale)
    return plain_backward(grad, q, k, v, out, lse, triangle, scale)


def plain(q, k, v, triangle, scale):
    """`dense` by its formula: for devices without the fused kernel."""
    p, lse = probabilities(q, k, triangle, scale)
    return (p @ v.to(p.dtype).unsqueeze(2)).flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def plain_backward(grad, q, k, v, out, lse, triangle, scale):
    """`dense_backward` by its formula."""
    p, _ = probabilities(q, k, triangle, scale, lse)
    n_rep = q.shape[1] // k.shape[1]
    grad_f, out_f, q_f = (x.to(p.dtype).unflatten(1, (-1, n_rep)) for x in (grad, out, q))  # (B, H_kv, G, nq, D)
    k_f, v_f = k.to(p.dtype).unsqueeze(2), v.to(p.dtype).unsqueeze(2)  # (B, H_kv, 1, nk, D)
    d_s = p * (grad_f @ v_f.mT - (grad_f * out_f).sum(-1, keepdim=True)) * scale  # (B, H_kv, G, nq, nk)
    return (d_s @ k_f).flatten(1, 2), (d_s.mT @ q_f).sum(2), (p.mT @ grad_f).sum(2)


def probabilities(q, k, triangle, scale, lse=None):
    """exp(scores - lse) (B, H_kv, G, nq, nk), at least float32, and lse (B, H_kv, G, nq), the scores' own if none is given."""
    n_rep, wide = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    s = (q.to(wide).unflatten(1, (-1, n_rep)) @ k.to(wide).unsqueeze(2).mT) * scale  # (B, H_kv, G, nq, nk)
    if triangle:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -math.inf)
    lse = s.logsumexp(-1) if lse is None else lse.unflatten(1, (-1, n_rep))
    return (s - lse.unsqueeze(-1)).exp(), lse


def covers(parts, q, k):
    """True if one piece is all there is: nothing to merge."""
    return len(parts) == 1 and parts[0].nq == q.shape[1] and parts[0].nk == k.shape[1]


class Merged(torch.autograd.Function):
    """Attention over the union of disjoint pieces: o = sum_i o_i exp(lse_i - lse), lse = logsumexp_i lse_i.

    q (B, nq, H, D), k, v (B, nk, H_kv, D) -> out like q, lse (B, H, nq). Backward needs no part's own softmax: each
    piece is differentiated with the rows' final out and lse, and the pieces' gradients add up."""

    @staticmethod
    def forward(ctx, q, k, v, parts, scale):
        ctx.parts, ctx.scale = parts, scale
        if covers(parts, q, k):
            out, lse = dense(*(x.transpose(1, 2) for x in (q, k, v)), parts[0].triangle, scale)
            out = out.transpose(1, 2)  # (B, nq, H, D)
        else:
            out, lse = Merged.merge(q, k, v, parts, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def merge(q, k, v, parts, scale):
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full(q.shape[:3], -math.inf, dtype=wide, device=q.device)  # (B, nq, H)
        for p in parts:
            o, s = dense(operand(q, p.q0, p.nq, p), operand(k, p.k0, p.nk, p), operand(v, p.k0, p.nk, p), p.triangle, scale)
            o, s = (x.flip(2) if p.flip else x for x in (o, s))
            rows, norm = take(out, p.q0, p.nq, p), take(lse, p.q0, p.nq, p)
            o, s = o.transpose(1, 2).view_as(rows), s.transpose(1, 2).view_as(norm).to(wide)
            total = torch.logaddexp(norm, s)
            rows.mul_((norm - total).exp_().unsqueeze(-1)).addcmul_(o, (s - total).exp_().unsqueeze(-1))
            norm.copy_(total)
        return out.to(q.dtype), lse.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad, _):
        q, k, v, out, lse = ctx.saved_tensors
        if covers(ctx.parts, q, k):
            grads = dense_backward(*(x.transpose(1, 2) for x in (grad, q, k, v, out)), lse, ctx.parts[0].triangle, ctx.scale)
            return *(g.transpose(1, 2).to(q.dtype) for g in grads), None, None
        wide = torch.promote_types(q.dtype, torch.float32)
        d_q, d_k, d_v = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
        for p in ctx.parts:
            grad_p, q_p, out_p = (operand(x, p.q0, p.nq, p) for x in (grad, q, out))
            k_p, v_p = operand(k, p.k0, p.nk, p), operand(v, p.k0, p.nk, p)
            lse_p = operand(lse.transpose(1, 2).unsqueeze(-1), p.q0, p.nq, p).squeeze(-1)
            grads = dense_backward(grad_p, q_p, k_p, v_p, out_p, lse_p, p.triangle, ctx.scale)
            for total, g, start, n in zip((d_q, d_k, d_v), grads, (p.q0, p.k0, p.k0), (p.nq, p.nk, p.nk)):
                rows = take(total, start, n, p)
                rows += (g.flip(2) if p.flip else g).transpose(1, 2).view_as(rows)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None


# --- demo -----------------------------------------------------------------------------------------------------------

def main():
    """Forward and backward of one layer, all heads full against all heads streaming, in turn."""
    n_head, n_kv_head, head_dim, sink, window = 9, 3, 64, 16, 256
    print(f"forward + backward on {torch.get_num_threads()} CPU threads, float32, {n_head} query heads over {n_kv_head} "
          f"KV heads of {head_dim}; streaming: sink {sink} + window {window}; best of 3\n")
    print("| tokens | full, s | streaming, s | ratio | visible pairs, ratio |\n|---|---|---|---|---|")
    for n in (1024, 2048, 4096, 8192):
        q, k, v = (torch.randn(n, h, head_dim, requires_grad=True) for h in (n_head, n_kv_head, n_kv_head))
        best = {0: math.inf, window: math.inf}
        for w in (0, window) * 3:
            start = time.perf_counter()
            attention(q, k, v, [0, n], [0, n], window=w, sink=sink * (w > 0)).sum().backward()
            best[w] = min(best[w], time.perf_counter() - start)
        seen = sum(min(p + 1, window) + min(sink, max(p + 1 - window, 0)) for p in range(n))
        print(f"| {n} | {best[0]:.3f} | {best[window]:.3f} | {best[window] / best[0]:.2f} | {2 * seen / n / (n + 1):.2f} |")


if __name__ == "__main__":
    main()
