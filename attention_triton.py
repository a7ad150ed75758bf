"""One attention function for everything: packed documents, chunked prefill, decoding, cross-attention, streaming heads.

A query at position p sees the key at position j iff  j <= p  and  ( p - j < window  or  j < sink ).
Queries are the *last* positions of their sequence (bottom-right alignment), so one rule serves training (as many queries
as keys), chunked prefill (fewer queries than keys) and decoding (one query).

Every computation is here twice, side by side. On CUDA tensors Triton kernels run: a program owns a tile of rows, visits only
blocks with something to see, and masks only those at an edge. Elsewhere PyTorch runs: the visible region is cut into
rectangles and triangles, each of which, on the CPU, a fused kernel computes without looking at a hidden score (other devices take the
plain formula and hold a piece's scores); the parts of a row are merged by their log-sum-exp. Either way a streaming head costs
O(N * (sink + window)), forward and backward.

    python attention_triton.py            # on a GPU: correctness and speed; without one: PyTorch's cost of streaming
                                          # heads on this machine, and what the compiler makes of the kernels
    TRITON_INTERPRET=1 python ...         # set before Python starts: attention(..., impl="triton") runs on CPU tensors, slowly
"""
from __future__ import annotations

import argparse
import collections
import functools
import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
except ImportError:  # no build for this platform (macOS): PyTorch computes everything
    triton = None

flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # fused, and unlike SDPA it returns the LSE
flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def jit(function):
    """triton.jit. These arguments vary from call to call: no build of its own for each that is 1 or a multiple of 16."""
    return triton.jit(function, do_not_specialize=("n_rows", "n_rep", "sink", "chunk", "n", "n_splits", "pos_head")) if triton else function


def attention(q, k, v, cu_q, cu_k, *, causal=True, window=None, sink=0, scale=None, return_lse=False, impl="auto"):
    """Attention inside each packed sequence; grouped-query heads share K and V, which are never repeated.

    q (Nq, H, D); k, v (Nk, H_kv, D), H a multiple of H_kv; query heads g*G .. g*G+G-1 read KV head g, G = H / H_kv.
    cu_q, cu_k (B + 1,) integers: sequence b owns rows cu_q[b]:cu_q[b+1] of q and cu_k[b]:cu_k[b+1] of k, v.
    causal aligns the last query with the last key. A row without a visible key gives 0, and LSE -inf.
    window [keys, the query's own included]: None or <= 0 means all; an int tensor (H_kv,) gives each KV head its own.
    sink [keys]: the first keys of each *sequence* stay visible however far back. window and sink need causal.
    scale > 0 multiplies the scores, 1 / sqrt(D) by default.
    impl: "auto" takes the Triton kernels for CUDA tensors they can compute (see `unfit`) and PyTorch otherwise; "torch" is
    PyTorch always; "triton" insists, also on CPU tensors if Triton interprets. Where no kernel can run, without Triton or
    without a GPU, a warning says so once and PyTorch computes.
    Returns out (Nq, H, D) in q's dtype; with return_lse also the natural log-sum-exp (H, Nq), at least float32, which
    carries no gradient. out is differentiable in q, k and v.
    Raises ValueError where shapes, bounds, devices or options do not fit, RuntimeError if TRITON_INTERPRET was set too late.
    Source: FlashAttention-2's varlen convention, arXiv:2307.08691; sink + window is StreamingLLM, arXiv:2309.17453, 3.2
    (keys keep their positions here).
    """
    cu_q, cu_k, windows = check(q, k, v, cu_q, cu_k, causal, window, sink, scale, impl)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if use_kernels(impl, q):
        out, lse = fused(q, k, v, cu_q, cu_k, causal, windows, sink, scale)
        return (out, lse) if return_lse else out
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


def check(q, k, v, cu_q, cu_k, causal, window, sink, scale, impl):
    """Refuse what does not fit; returns cu_q, cu_k and the window of each KV head (0 = all) as lists of ints."""
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl must be auto, torch or triton, got {impl!r}")
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
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be > 0, got {scale}")
    if not causal and (any(windows) or sink):
        raise ValueError("window and sink need causal=True")
    return cu_q, cu_k, windows


def use_kernels(impl, q) -> bool:
    """True for the Triton kernels, False for PyTorch. A warning, once, where kernels are wanted but cannot run."""
    if impl == "torch" or impl == "auto" and (not q.is_cuda or unfit(q)):
        return False
    if unfit(q):
        raise ValueError(f"impl 'triton': {unfit(q)}")
    if triton is None:
        warnings.warn("Triton is not installed: attention runs on plain PyTorch")
        return False
    wanted, is_interpreted = os.environ.get("TRITON_INTERPRET") == "1", interpreted()
    if wanted != is_interpreted:
        raise RuntimeError("TRITON_INTERPRET was changed after triton had been imported (torch.optim.AdamW imports it too): "
                           "set it before Python starts")
    if not q.is_cuda and not is_interpreted:
        warnings.warn("no GPU under these tensors, and TRITON_INTERPRET is not 1: attention runs on plain PyTorch")
        return False
    return True


def unfit(q) -> str:
    """Why the kernels cannot compute q's dtype or head size; empty if they can."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {q.dtype}: float32, float16 or bfloat16"
    return "" if q.shape[-1] <= 128 else f"no kernel for heads of {q.shape[-1]}: at most 128"


def interpreted() -> bool:
    """True if Triton interprets: decided when triton and this file were imported. Raises RuntimeError if between the two."""
    ours, theirs = (isinstance(f, InterpretedFunction) for f in (load_rows, tl.sum))
    if ours != theirs:
        raise RuntimeError("TRITON_INTERPRET was changed after triton had been imported: set it before Python starts")
    return ours


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
        return out.transpose(1, 2).flatten(1, 2).unsqueeze(1), lse.flatten(1).unsqueeze(-1)  # (B, 1, H, D), (B, H, 1)
    return Merged.apply(q, k, v, pieces(nq, nk, causal, window, sink), scale)


# --- geometry for PyTorch: the visible region as rectangles and triangles --------------------------------------------

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


# --- geometry for the kernels: which blocks a tile visits ---------------------------------------------------------------
# Ints in, ints out: as plain Python (`key_blocks.fn`) they also count the work.

@jit
def key_blocks(m0, m1, nq, nk, window, sink, BN: tl.constexpr, CAUSAL: tl.constexpr, STREAM: tl.constexpr):
    """Blocks of BN keys that rows m0 .. m1 of nq visit: those of which some row sees some key, and no other.

    [free0, free1) is seen whole by every row. Masked are, in this order, n_sink blocks from key 0, n_left from lo to free0
    (where the window of some row begins) and n_right from free1 (diagonal and tail)."""
    off = nk - nq  # position of row 0
    lo, free0, free1, end, n_sink = 0, 0, nk // BN * BN, nk, 0
    if CAUSAL:
        end = max(m1 + off, 0)  # one past the last row's own key; never below 0: // must not meet a negative
        free1 = max(m0 + off + 1, 0) // BN * BN
    if STREAM:
        lo = max(m0 + off + 1 - window, 0) // BN * BN
        free0 = (max(m1 + off - window, 0) + BN - 1) // BN * BN
        free1 = max(free1, free0)
        n_sink = min((min(sink, end) + BN - 1) // BN, lo // BN)
    return n_sink, (free0 - lo) // BN, (max(end - free1, 0) + BN - 1) // BN, lo, free0, free1


@jit
def query_blocks(n0, n1, nq, nk, window, sink, BM: tl.constexpr, CAUSAL: tl.constexpr, STREAM: tl.constexpr):
    """Blocks of BM rows that see keys n0 .. n1: [free0, free1) sees them all; masked are n_left from lo, n_right from free1."""
    off = nk - nq
    lo, free0, free1, end = 0, 0, nq // BM * BM, nq
    if CAUSAL:
        lo = max(n0 - off, 0) // BM * BM
        free0 = (max(n1 - 1 - off, 0) + BM - 1) // BM * BM
    if STREAM:
        if n0 >= sink:  # the last key leaves the last window
            end = min(max(n1 - 1 - off + window, 0), nq)
        if n1 > sink:  # the first key that is no sink leaves the first window
            free1 = min(max(max(n0, sink) - off + window, 0), nq) // BM * BM
    free0 = min(free0, (end + BM - 1) // BM * BM)
    free1 = max(free1, free0)
    return max(free0 - lo, 0) // BM, (max(end - free1, 0) + BM - 1) // BM, lo, free0, free1


@jit
def masked_start(t, n_sink, n_left, lo, free1, BLOCK: tl.constexpr):
    """Where the t-th masked block begins."""
    start = tl.where(t < n_sink + n_left, lo + (t - n_sink) * BLOCK, free1 + (t - n_sink - n_left) * BLOCK)
    return tl.where(t < n_sink, t * BLOCK, start)


@jit
def visible(i, j, nq, nk, window, sink, CAUSAL: tl.constexpr, STREAM: tl.constexpr):
    """Does row i see key j? In a streaming tile causality and window are one comparison: as an unsigned number, a negative
    distance is larger than any window; keys of the sink have a window without end."""
    if not CAUSAL:
        return (i < nq) & (j < nk)
    position = i + (nk - nq)
    if STREAM:
        return tl.cast(position - j, tl.uint32) < tl.cast(tl.where(j < sink, 1 << 30, window), tl.uint32)
    return j <= position


# --- forward --------------------------------------------------------------------------------------------------------

def dense(q, k, v, triangle, scale):
    """softmax(scale q k^T) v over all keys, or over keys j <= i. q (B, H, nq, D), k, v (B, H_kv, nk, D).

    Returns out (B, H, nq, D) and lse (B, H, nq). Every row must see a key."""
    if q.is_cpu:
        return flash_cpu(q, k, v, 0.0, triangle, scale=scale)
    return plain(q, k, v, triangle, scale)


def plain(q, k, v, triangle, scale):
    """`dense` by its formula: for devices without the fused kernel."""
    with torch.autocast(q.device.type, enabled=False):  # float32 at least, whatever is around
        p, lse = probabilities(q, k, triangle, scale)
        return (p @ v.to(p.dtype).unsqueeze(2)).flatten(1, 2).to(q.dtype), lse.flatten(1, 2)  # (B, H, nq, D), (B, H, nq)


def probabilities(q, k, triangle, scale, lse=None):
    """exp(scores - lse) (B, H_kv, G, nq, nk), at least float32, and lse (B, H_kv, G, nq), the scores' own if none is given."""
    n_rep, wide = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    s = (q.to(wide).unflatten(1, (-1, n_rep)) @ k.to(wide).unsqueeze(2).mT) * scale  # (B, H_kv, G, nq, nk)
    if triangle:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -math.inf)
    lse = s.logsumexp(-1) if lse is None else lse.unflatten(1, (-1, n_rep))
    return (s - lse.unsqueeze(-1)).exp(), lse


@jit
def offset(start, stride):
    """Elements before row, or head, `start`, in 64 bits; offsets inside a tile fit 32."""
    return tl.cast(start, tl.int64) * stride


@jit
def span(Cu, seq):
    """First row and number of rows of a sequence."""
    first = tl.load(Cu + seq)
    return first, tl.load(Cu + seq + 1) - first


@jit
def load_rows(base, stride, start, n, D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows start .. start + BLOCK of a matrix (n, D), (BLOCK, D). MASKED: rows from n on are 0 and are not read."""
    rows = tl.arange(0, BLOCK)
    at = base + offset(start, stride) + rows[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        return tl.load(at, mask=(start + rows < n)[:, None], other=0.0)
    return tl.load(at)


@jit
def store_rows(base, stride, start, n, x, D: tl.constexpr, BLOCK: tl.constexpr):
    """x (BLOCK, D) becomes rows start .. of a matrix (n, D), as far as it has them."""
    rows = tl.arange(0, BLOCK)
    at = base + offset(start, stride) + rows[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=(start + rows < n)[:, None])


@jit
def to_base2(x):
    """x log2(e): turns a natural logarithm into base 2, and exp(x y) into exp2(to_base2(x) y), which the hardware has."""
    return x * 1.4426950408889634


@jit
def forward_block(acc, m, l, q, K, V, k_row, v_row, start, i, nq, nk, window, sink, qk_scale, D: tl.constexpr,
                  BN: tl.constexpr, CAUSAL: tl.constexpr, STREAM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Rows i meet keys start .. start + BN: the online softmax's running sum (BM, D), maximum and norm (BM,), in base 2.

    qk_scale = scale * log2(e) is applied as s * qk_scale - m: one fused multiply-add a score."""
    k = load_rows(K, k_row, start, nk, D, BN, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BM, BN)
    if MASKED:
        j = start + tl.arange(0, BN)
        s = tl.where(visible(i[:, None], j[None, :], nq, nk, window, sink, CAUSAL, STREAM), s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
    p = tl.exp2(s * qk_scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    v = load_rows(V, v_row, start, nk, D, BN, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, m_new, l * shrink + tl.sum(p, 1)


@jit
def forward_kernel(Q, K, V, Out, Lse, CuQ, CuK, Window, sink, scale, q_row, q_head, k_row, k_head, v_row, v_head, n_rows,
                   n_rep, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, STREAM: tl.constexpr,
                   PRECISION: tl.constexpr):
    """One program: BM rows of one query head of one sequence. Out (Nq, H, D), Lse (H, n_rows = Nq), both contiguous.

    *_row, *_head are strides in elements; Window (H_kv,), 2^30 for a full head. The longest rows start first."""
    tile, head, seq = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q0, nq = span(CuQ, seq)
    k0, nk = span(CuK, seq)
    m0 = tile * BM
    if m0 >= nq:
        return
    window = tl.load(Window + head // n_rep) if STREAM else 0
    K += offset(k0, k_row) + offset(head // n_rep, k_head)
    V += offset(k0, v_row) + offset(head // n_rep, v_head)
    q = load_rows(Q + offset(q0, q_row) + offset(head, q_head), q_row, m0, nq, D, BM, True)
    i = m0 + tl.arange(0, BM)
    m = tl.full([BM], -1e30, tl.float32)  # not -inf: rows that see nothing of a block then need no guard against inf - inf
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    n_sink, n_left, n_right, lo, free0, free1 = key_blocks(m0, min(m0 + BM, nq), nq, nk, window, sink, BN, CAUSAL, STREAM)
    for start in range(free0, free1, BN):
        acc, m, l = forward_block(acc, m, l, q, K, V, k_row, v_row, start, i, nq, nk, window, sink, to_base2(scale), D, BN,
                                  CAUSAL, STREAM, PRECISION, False)
    for t in range(n_sink + n_left + n_right):
        start = masked_start(t, n_sink, n_left, lo, free1, BN)
        acc, m, l = forward_block(acc, m, l, q, K, V, k_row, v_row, start, i, nq, nk, window, sink, to_base2(scale), D, BN,
                                  CAUSAL, STREAM, PRECISION, True)
    some = l > 0
    l = tl.where(some, l, 1)
    out_row = tl.num_programs(1) * D
    store_rows(Out + offset(q0, out_row) + head * D, out_row, m0, nq, acc * (1 / l)[:, None], D, BM)
    lse = tl.where(some, (m + tl.log2(l)) * 0.6931471805599453, -float("inf"))  # ln(2)
    tl.store(Lse + offset(head, n_rows) + q0 + i, lse, mask=i < nq)


# --- backward -------------------------------------------------------------------------------------------------------
# With P = exp(scale q k^T - lse) and delta = rowsum(dO * O):
# dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q   (FlashAttention-2, 3.1).

def dense_backward(grad, q, k, v, out, lse, triangle, scale):
    """Gradients of `dense` when (q, k) is a *part* of rows whose whole softmax gave out and lse.

    P is then the part's share of the true probabilities; everything else stays as it is."""
    if q.is_cpu:  # bfloat16's kernel takes 0.8x the time of float32's from 1024 rows on, but 1.4x at 256 and 4x at 64
        wide = torch.promote_types(q.dtype, torch.float32) if q.shape[2] < 512 else q.dtype
        return flash_cpu_backward(*(x.to(wide) for x in (grad, q, k, v, out)), lse, 0.0, triangle, scale=scale)
    return plain_backward(grad, q, k, v, out, lse, triangle, scale)


def plain_backward(grad, q, k, v, out, lse, triangle, scale):
    """`dense_backward` by its formula."""
    p, _ = probabilities(q, k, triangle, scale, lse)
    n_rep = q.shape[1] // k.shape[1]
    grad_f, out_f, q_f = (x.to(p.dtype).unflatten(1, (-1, n_rep)) for x in (grad, out, q))  # (B, H_kv, G, nq, D)
    k_f, v_f = k.to(p.dtype).unsqueeze(2), v.to(p.dtype).unsqueeze(2)  # (B, H_kv, 1, nk, D)
    d_s = p * (grad_f @ v_f.mT - (grad_f * out_f).sum(-1, keepdim=True)) * scale  # (B, H_kv, G, nq, nk)
    return (d_s @ k_f).flatten(1, 2), (d_s.mT @ q_f).sum(2), (p.mT @ grad_f).sum(2)  # (B, H, nq, D), twice (B, H_kv, nk, D)


@jit
def dq_block(dq, q, grad, lse, delta, K, V, k_row, v_row, start, i, nq, nk, window, sink, qk_scale, D: tl.constexpr,
             BN: tl.constexpr, CAUSAL: tl.constexpr, STREAM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Rows i meet keys start .. start + BN: dS K is added to dq (BM, D). lse (BM,) in base 2."""
    k = load_rows(K, k_row, start, nk, D, BN, MASKED)
    v = load_rows(V, v_row, start, nk, D, BN, MASKED)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * qk_scale - lse[:, None])  # (BM, BN)
    if MASKED:
        j = start + tl.arange(0, BN)
        p = tl.where(visible(i[:, None], j[None, :], nq, nk, window, sink, CAUSAL, STREAM), p, 0)
    ds = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@jit
def dq_kernel(Q, K, V, Out, Lse, Grad, Delta, DQ, CuQ, CuK, Window, sink, scale, q_row, q_head, k_row, k_head, v_row, v_head,
              n_rows, n_rep, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, STREAM: tl.constexpr,
              PRECISION: tl.constexpr):
    """One program: dQ of BM rows of one head, over the same blocks as forward. Also writes their Delta (H, n_rows), for
    which O and dO are here anyway; dkv_kernel reads it. Out, Grad, DQ (Nq, H, D) contiguous."""
    tile, head, seq = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q0, nq = span(CuQ, seq)
    k0, nk = span(CuK, seq)
    m0 = tile * BM
    if m0 >= nq:
        return
    window = tl.load(Window + head // n_rep) if STREAM else 0
    K += offset(k0, k_row) + offset(head // n_rep, k_head)
    V += offset(k0, v_row) + offset(head // n_rep, v_head)
    out_row = tl.num_programs(1) * D
    at, stats = offset(q0, out_row) + head * D, offset(head, n_rows) + q0
    i = m0 + tl.arange(0, BM)
    q = load_rows(Q + offset(q0, q_row) + offset(head, q_head), q_row, m0, nq, D, BM, True)
    grad = load_rows(Grad + at, out_row, m0, nq, D, BM, True)
    out = load_rows(Out + at, out_row, m0, nq, D, BM, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(Delta + stats + i, delta, mask=i < nq)
    lse = to_base2(tl.load(Lse + stats + i, mask=i < nq, other=0.0))
    lse = tl.where(lse == -float("inf"), 0, lse)  # a row that sees nothing: all its p are masked
    dq = tl.zeros([BM, D], tl.float32)
    n_sink, n_left, n_right, lo, free0, free1 = key_blocks(m0, min(m0 + BM, nq), nq, nk, window, sink, BN, CAUSAL, STREAM)
    for start in range(free0, free1, BN):
        dq = dq_block(dq, q, grad, lse, delta, K, V, k_row, v_row, start, i, nq, nk, window, sink, to_base2(scale), D, BN,
                      CAUSAL, STREAM, PRECISION, False)
    for t in range(n_sink + n_left + n_right):
        start = masked_start(t, n_sink, n_left, lo, free1, BN)
        dq = dq_block(dq, q, grad, lse, delta, K, V, k_row, v_row, start, i, nq, nk, window, sink, to_base2(scale), D, BN,
                      CAUSAL, STREAM, PRECISION, True)
    store_rows(DQ + at, out_row, m0, nq, dq * scale, D, BM)


@jit
def dkv_block(dk, dv, k, v, Q, Grad, Lse, Delta, q_row, out_row, start, j, nq, nk, window, sink, qk_scale, D: tl.constexpr,
              BM: tl.constexpr, CAUSAL: tl.constexpr, STREAM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Keys j meet rows start .. start + BM: adds to dk, dv (BN, D). All of it transposed, P^T and dS^T (BN, BM), so that
    they are operands of the next products as they lie in registers."""
    i = start + tl.arange(0, BM)
    q = load_rows(Q, q_row, start, nq, D, BM, MASKED)
    grad = load_rows(Grad, out_row, start, nq, D, BM, MASKED)
    if MASKED:
        lse, delta = tl.load(Lse + i, mask=i < nq, other=0.0), tl.load(Delta + i, mask=i < nq, other=0.0)
        lse = tl.where(lse == -float("inf"), 0, lse)
    else:
        lse, delta = tl.load(Lse + i), tl.load(Delta + i)
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * qk_scale - to_base2(lse)[None, :])
    if MASKED:
        p = tl.where(visible(i[None, :], j[:, None], nq, nk, window, sink, CAUSAL, STREAM), p, 0)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@jit
def dkv_kernel(Q, K, V, Lse, Grad, Delta, DK, DV, CuQ, CuK, Window, sink, scale, q_row, q_head, k_row, k_head, v_row, v_head,
               n_rows, n_rep, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
               STREAM: tl.constexpr, PRECISION: tl.constexpr):
    """One program: dK, dV of BN keys of one KV head, summed over its query heads here: no atomics, no repeated gradient.

    Query heads and row blocks are one flat loop: nested loops spill. DK, DV (Nk, H_kv, D) contiguous."""
    tile, kv_head, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q0, nq = span(CuQ, seq)
    k0, nk = span(CuK, seq)
    n0 = tile * BN
    if n0 >= nk:
        return
    window = tl.load(Window + kv_head) if STREAM else 0
    out_row, dk_row = tl.num_programs(1) * n_rep * D, tl.num_programs(1) * D
    Q += offset(q0, q_row) + offset(kv_head * n_rep, q_head)
    Grad += offset(q0, out_row) + kv_head * n_rep * D
    stats = offset(kv_head * n_rep, n_rows) + q0
    k = load_rows(K + offset(k0, k_row) + offset(kv_head, k_head), k_row, n0, nk, D, BN, True)
    v = load_rows(V + offset(k0, v_row) + offset(kv_head, v_head), v_row, n0, nk, D, BN, True)
    j = n0 + tl.arange(0, BN)
    dk = tl.zeros([BN, D], tl.float32)
    dv = tl.zeros([BN, D], tl.float32)
    n_left, n_right, lo, free0, free1 = query_blocks(n0, min(n0 + BN, nk), nq, nk, window, sink, BM, CAUSAL, STREAM)
    n_free = (free1 - free0) // BM
    for t in range(n_free * n_rep):
        g = t // n_free
        start, own = free0 + (t - g * n_free) * BM, stats + offset(g, n_rows)
        dk, dv = dkv_block(dk, dv, k, v, Q + offset(g, q_head), Grad + g * D, Lse + own, Delta + own, q_row, out_row, start, j, nq, nk,
                           window, sink, to_base2(scale), D, BM, CAUSAL, STREAM, PRECISION, False)
    n_masked = n_left + n_right
    for t in range(n_masked * n_rep):
        g = t // n_masked
        start, own = masked_start(t - g * n_masked, 0, n_left, lo, free1, BM), stats + offset(g, n_rows)
        dk, dv = dkv_block(dk, dv, k, v, Q + offset(g, q_head), Grad + g * D, Lse + own, Delta + own, q_row, out_row, start, j, nq, nk,
                           window, sink, to_base2(scale), D, BM, CAUSAL, STREAM, PRECISION, True)
    at = offset(k0, dk_row) + kv_head * D
    store_rows(DK + at, dk_row, n0, nk, dk * scale, D, BN)
    store_rows(DV + at, dk_row, n0, nk, dv, D, BN)


# --- all pieces, all tiles: the two autograd functions --------------------------------------------------------------

def take(x, start, n, p):
    """The rows of a piece: x (B, N, ...) -> a view (B, repeat, n, ...), also for writing."""
    rows = x.narrow(1, start, (p.repeat - 1) * p.stride + n)
    return rows.unfold(1, n, p.stride if p.repeat > 1 else 1).movedim(-1, 2)


def operand(x, start, n, p):
    """The rows of a piece as a kernel wants them: x (B, N, H, D) -> (B * repeat, H, n, D)."""
    x = take(x, start, n, p).flatten(0, 1).transpose(1, 2)
    return x.flip(2) if p.flip else x


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
            rows, norm = take(out, p.q0, p.nq, p), take(lse, p.q0, p.nq, p)  # (B, repeat, nq, H, D), (B, repeat, nq, H)
            o, s = o.transpose(1, 2).view_as(rows), s.transpose(1, 2).view_as(norm).to(wide)
            total = torch.logaddexp(norm, s)
            rows.mul_((norm - total).exp_().unsqueeze(-1)).addcmul_(o, (s - total).exp_().unsqueeze(-1))
            norm.copy_(total)
        return out.to(q.dtype), lse.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
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
            lse_p = operand(lse.transpose(1, 2).unsqueeze(-1), p.q0, p.nq, p).squeeze(-1)  # (B * repeat, H, nq)
            grads = dense_backward(grad_p, q_p, k_p, v_p, out_p, lse_p, p.triangle, ctx.scale)
            for total, g, start, n in zip((d_q, d_k, d_v), grads, (p.q0, p.k0, p.k0), (p.nq, p.nk, p.nk)):
                rows = take(total, start, n, p)
                rows += (g.flip(2) if p.flip else g).transpose(1, 2).view_as(rows)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None


class Fused(torch.autograd.Function):
    """The kernels behind `attention`: q (Nq, H, D), k, v (Nk, H_kv, D) -> out like q, lse (H, Nq)."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, causal, windows, sink, scale):
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        ctx.cu_q, ctx.cu_k, ctx.causal, ctx.windows, ctx.sink, ctx.scale = cu_q, cu_k, causal, windows, sink, scale
        Fused.launch(ctx, forward_kernel, (q, k, v, out, lse), q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        q, k, v, out, lse = ctx.saved_tensors
        grad, delta = grad.contiguous(), torch.empty_like(lse)
        d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
        Fused.launch(ctx, dq_kernel, (q, k, v, out, lse, grad, delta, d_q), q, k, v)
        Fused.launch(ctx, dkv_kernel, (q, k, v, lse, grad, delta, d_k, d_v), q, k, v)
        return d_q, d_k, d_v, None, None, None, None, None, None

    @staticmethod
    def launch(ctx, kernel, tensors, q, k, v):
        """One program per tile of rows (of keys: dkv_kernel), head and sequence."""
        build, options = build_for(kernel, q)
        cu, heads, size = (ctx.cu_k, k.shape[1], build["BN"]) if kernel is dkv_kernel else (ctx.cu_q, q.shape[1], build["BM"])
        longest = max((b - a for a, b in zip(cu, cu[1:])), default=0)
        windows = [min(w or 2 ** 30, 2 ** 30) for w in ctx.windows]
        cu_q, cu_k, windows = (int32_on(tuple(x), q.device) for x in (ctx.cu_q, ctx.cu_k, windows))
        with torch.cuda.device_of(q):
            kernel[(-(-longest // size), heads, len(cu) - 1)](
                *tensors, cu_q, cu_k, windows, ctx.sink, ctx.scale, *strides(q, k, v), q.shape[0], q.shape[1] // k.shape[1],
                CAUSAL=ctx.causal, STREAM=any(ctx.windows), **build, **options)


def fused(q, k, v, cu_q, cu_k, causal, windows, sink, scale):
    """`attention` by the kernels; one query per sequence, without windows or gradient, by those for decoding."""
    if len(cu_q) > 2 ** 16:
        raise ValueError(f"{len(cu_q) - 1} sequences are more than one launch takes: 65535")
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if len(cu_q) > 1 and cu_q == list(range(len(cu_q))) and not any(windows) and not learns:
        return fused_decode(q, k, v, cu_k, scale)
    dtype, head_dim = q.dtype, q.shape[-1]
    q, k, v = (as_kernels_want(x) for x in (q, k, v))
    out, lse = Fused.apply(q, k, v, cu_q, cu_k, causal, windows, sink, scale)
    return out[..., :head_dim].to(dtype), lse


def as_kernels_want(x):
    """x (..., D) with D padded to 16, 32, 64 or 128, side by side in memory; for the interpreter without bfloat16, which it
    computes wrongly."""
    size = next(d for d in (16, 32, 64, 128) if d >= x.shape[-1])
    x = F.pad(x, (0, size - x.shape[-1])) if size > x.shape[-1] else x  # padding by nothing would copy
    x = x.float() if x.dtype == torch.bfloat16 and interpreted() else x
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.lru_cache(maxsize=64)
def int32_on(values, device):
    """Bounds and windows on the GPU: all layers of a step ask for the same ones. From pinned memory, so that no copy waits."""
    values = torch.tensor(values, dtype=torch.int32)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def strides(*tensors):
    """Elements from one row to the next and from one head to the next, of each (rows, heads, D)."""
    return [s for x in tensors for s in x.stride()[:2]]


# --- decoding -------------------------------------------------------------------------------------------------------

def decode(q, k, v, impl="auto"):
    """One query per head over all entries of its KV head, in a cache's layout: q (H, D), k, v (H_kv, n, D) -> (H, D).

    What `attention` computes for one row, without a gradient and without its preparations, which would take longer than
    the work itself. The query heads of a KV head are rows over the same keys: K and V are read once."""
    if use_kernels(impl, q):
        return fused_decode(q.unsqueeze(0), k.transpose(0, 1), v.transpose(0, 1), [0, k.shape[1]], q.shape[-1] ** -0.5)[0][0]
    rows = q.unflatten(0, (len(k), -1)).unsqueeze(0)  # (1, H_kv, G, D)
    return dense(rows, k.unsqueeze(0), v.unsqueeze(0), False, q.shape[-1] ** -0.5)[0].view(q.shape)


@jit
def decode_kernel(Q, K, V, Part, PartLse, CuK, chunk, scale, q_row, q_head, k_row, k_head, v_row, v_head, n_rep,
                  D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """One program: the query heads of one KV head, as rows, over `chunk` keys of one sequence of any length.

    Part (splits, B, H, D) and PartLse (splits, B, H), base 2, float32; an empty chunk gives 0 and -inf."""
    split, kv_head, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k0, nk = span(CuK, seq)
    end = min((split + 1) * chunk, nk)
    K += offset(k0, k_row) + offset(kv_head, k_head)
    V += offset(k0, v_row) + offset(kv_head, v_head)
    q = load_rows(Q + offset(seq, q_row) + offset(kv_head * n_rep, q_head), q_head, 0, n_rep, D, BM, True)
    i = tl.arange(0, BM)
    m = tl.full([BM], -1e30, tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for start in range(split * chunk, end, BN):
        acc, m, l = forward_block(acc, m, l, q, K, V, k_row, v_row, start, i, n_rep, end, 0, 0, to_base2(scale), D, BN, False,
                                  False, PRECISION, True)
    some = l > 0
    l = tl.where(some, l, 1)
    row = ((split * tl.num_programs(2) + seq) * tl.num_programs(1) + kv_head) * n_rep
    store_rows(Part + offset(row, D), D, 0, n_rep, acc * (1 / l)[:, None], D, BM)
    tl.store(PartLse + row + i, tl.where(some, m + tl.log2(l), -float("inf")), mask=i < n_rep)


@jit
def combine_kernel(Part, PartLse, Out, Lse, n_splits, n_rows, D: tl.constexpr, SPLITS: tl.constexpr):
    """One program: merges the splits of one row by their log-sum-exp. Out (n_rows, D); Lse (n_rows,), natural."""
    row, split = tl.program_id(0), tl.arange(0, SPLITS)
    lse = tl.load(PartLse + split * n_rows + row, mask=split < n_splits, other=-float("inf"))
    m = tl.maximum(tl.max(lse, 0), -1e30)
    share = tl.exp2(lse - m)
    part = load_rows(Part + offset(row, D), n_rows * D, 0, n_splits, D, SPLITS, True)
    total = tl.sum(share, 0)
    some = total > 0
    out = tl.sum(part * share[:, None], 0) / tl.where(some, total, 1)
    tl.store(Out + offset(row, D) + tl.arange(0, D), out.to(Out.dtype.element_ty))
    tl.store(Lse + row, tl.where(some, (m + tl.log2(tl.where(some, total, 1))) * 0.6931471805599453, -float("inf")))


def fused_decode(q, k, v, cu_k, scale):
    """One query per sequence: q (B, H, D), k, v (Nk, H_kv, D) -> out like q, lse (H, B). Splits the keys so that every
    multiprocessor has two programs, of 256 keys or more."""
    dtype, head_dim = q.dtype, q.shape[-1]
    q, k, v = (as_kernels_want(x) for x in (q, k, v))
    (n_seq, n_head, size), n_kv_head = q.shape, k.shape[1]
    longest = max((b - a for a, b in zip(cu_k, cu_k[1:])), default=0)
    n_sm = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    n_splits = max(1, min(2 * n_sm // (n_seq * n_kv_head), longest // 256, 64))  # more than 64 would spill in combine_kernel
    chunk = -(-longest // n_splits)
    part, lse = q.new_empty(n_splits, n_seq, n_head, size, dtype=torch.float32), q.new_empty(n_seq, n_head, dtype=torch.float32)
    part_lse, out = part.new_empty(part.shape[:3]), torch.empty_like(q, memory_format=torch.contiguous_format)
    cu_k = int32_on(tuple(cu_k), q.device)
    build, options = build_for(decode_kernel, q)
    build["BM"] = max(16, triton.next_power_of_2(n_head // n_kv_head))
    with torch.cuda.device_of(q):
        decode_kernel[(n_splits, n_kv_head, n_seq)](q, k, v, part, part_lse, cu_k, chunk, scale, *strides(q, k, v),
                                                    n_head // n_kv_head, **build, **options)
        combine_kernel[(n_seq * n_head,)](part, part_lse, out, lse, n_splits, n_seq * n_head, D=size,
                                          SPLITS=triton.next_power_of_2(n_splits), num_warps=4)
    return out[..., :head_dim].to(dtype), lse.T


# --- column sums ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def column_sums(q, q_pos, k, pos, n_late, impl="auto", rows=64):
    """Attention that each entry of a cache receives from given queries: softmax(q k^T / sqrt(D)) summed over the queries.

    q (R, H_kv, G, D) at positions q_pos (R,); k (H_kv, n, D) at pos (H_kv, n). A query sees the entries at positions up to
    its own, at least one. Of the entries, the last n_late - r at most are later than query r. Returns float32 (H_kv, G, n).
    SnapKV's scores (the last queries, arXiv:2404.14469), H2O's (all, arXiv:2306.14048) and TOVA's (one, arXiv:2401.06104)."""
    if use_kernels(impl, q):
        return fused_column_sums(q, q_pos, k, pos)
    total, wide = 0, k.float().mT  # (H_kv, D, n)
    for start in range(0, len(q), rows):  # a block of rows at a time, 19 MB of scores for 9 heads and 8192 entries: 0.7x the time of 256 rows
        part, late = slice(start, start + rows), slice(max(0, k.shape[1] - max(0, n_late - start)), None)
        scaled = (q[part].float() * q.shape[-1] ** -0.5).permute(1, 2, 0, 3).flatten(1, 2)  # (H_kv, G * rows, D)
        s = (scaled @ wide).unflatten(1, (q.shape[2], -1))  # (H_kv, G, rows, n)
        s[..., late].masked_fill_(pos[:, None, None, late] > q_pos[part, None], -math.inf)
        total = total + torch.softmax(s, -1, out=s).sum(2)
    return total


@jit
def row_lse_kernel(Q, K, QPos, Pos, PartLse, chunk, n, scale, q_row, q_head, k_row, k_head, pos_head, n_rows, n_rep,
                   D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """One program: log-sum-exp of BM rows' scores over `chunk` entries, into PartLse (splits, H, n_rows), natural."""
    split, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = tile * BM + tl.arange(0, BM)
    q = load_rows(Q + offset(head, q_head), q_row, tile * BM, n_rows, D, BM, True)
    q_pos = tl.load(QPos + i, mask=i < n_rows, other=-1)
    m = tl.full([BM], -1e30, tl.float32)
    l = tl.zeros([BM], tl.float32)
    for start in range(split * chunk, min((split + 1) * chunk, n), BN):
        j = start + tl.arange(0, BN)
        k = load_rows(K + offset(head // n_rep, k_head), k_row, start, n, D, BN, True)
        pos = tl.load(Pos + offset(head // n_rep, pos_head) + j, mask=j < n, other=2 ** 31 - 1)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = tl.where(pos[None, :] <= q_pos[:, None], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * to_base2(scale))
        l = l * tl.exp2(m - m_new) + tl.sum(tl.exp2(s * to_base2(scale) - m_new[:, None]), 1)
        m = m_new
    lse = tl.where(l > 0, (m + tl.log2(tl.where(l > 0, l, 1))) * 0.6931471805599453, -float("inf"))
    tl.store(PartLse + offset(split * tl.num_programs(1) + head, n_rows) + i, lse, mask=i < n_rows)


@jit
def column_kernel(Q, K, QPos, Pos, Lse, Sums, n, scale, q_row, q_head, k_row, k_head, pos_head, n_rows, n_rep,
                  D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """One program: what all rows of one query head pay to its own BN entries; Sums (H, n). No atomics."""
    tile, head = tl.program_id(0), tl.program_id(1)
    j = tile * BN + tl.arange(0, BN)
    k = load_rows(K + offset(head // n_rep, k_head), k_row, tile * BN, n, D, BN, True)
    pos = tl.load(Pos + offset(head // n_rep, pos_head) + j, mask=j < n, other=2 ** 31 - 1)
    total = tl.zeros([BN], tl.float32)
    for start in range(0, n_rows, BM):
        i = start + tl.arange(0, BM)
        q = load_rows(Q + offset(head, q_head), q_row, start, n_rows, D, BM, True)
        q_pos = tl.load(QPos + i, mask=i < n_rows, other=-1)
        lse = to_base2(tl.load(Lse + offset(head, n_rows) + i, mask=i < n_rows, other=0.0))
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * to_base2(scale) - lse[:, None])
        total += tl.sum(tl.where(pos[None, :] <= q_pos[:, None], p, 0), 0)
    tl.store(Sums + offset(head, n) + j, total, mask=j < n)


def fused_column_sums(q, q_pos, k, pos):
    """`column_sums` by two kernels: the rows' norms, split over the entries; then each block of entries sums its columns."""
    scale, (n_rows, n_kv_head, n_rep), n = q.shape[-1] ** -0.5, q.shape[:3], k.shape[1]
    q, k = as_kernels_want(q.flatten(1, 2)), as_kernels_want(k.transpose(0, 1))  # (R, H, D), (n, H_kv, D)
    q_pos, pos = (x.to(q.device, torch.int32) for x in (q_pos, pos))
    pos = pos if pos.stride(-1) == 1 else pos.contiguous()
    n_head, chunk = n_kv_head * n_rep, 4096  # chunk: entries that one program of the first kernel reads
    n_splits = max(1, -(-n // chunk))
    part_lse, sums = (q.new_empty(shape, dtype=torch.float32) for shape in ((n_splits, n_head, n_rows), (n_head, n)))
    shared = (scale, *strides(q, k), pos.stride(0), n_rows, n_rep)
    build, options = build_for(row_lse_kernel, q)
    with torch.cuda.device_of(q):
        row_lse_kernel[(n_splits, n_head, -(-n_rows // build["BM"]))](q, k, q_pos, pos, part_lse, chunk, n, *shared, **build, **options)
        lse = part_lse.logsumexp(0)
        build, options = build_for(column_kernel, q)
        column_kernel[(-(-n // build["BN"]), n_head)](q, k, q_pos, pos, lse, sums, n, *shared, **build, **options)
    return sums.unflatten(0, (n_kv_head, n_rep))


# --- tiles ----------------------------------------------------------------------------------------------------------
# BM x BN, warps, pipeline stages. A table instead of tuning on the spot: each row compiles without spills; `python attention_triton.py`
# prints what the compiler makes of it. 8 warps want BM = 128 on sm_90: with 64 rows both warp groups would compute the same ones.
# float32 products run as three tf32 ones.

TILES = {
    "forward_kernel": {(90, 64): (128, 64, 8, 2), (90, 128): (128, 64, 8, 2), (80, 64): (64, 64, 4, 3), (80, 128): (128, 32, 8, 2),
                       "other": (64, 64, 4, 2), "float32": (16, 32, 4, 2), "interpreter": (32, 16, 4, 1)},
    "dq_kernel": {(90, 64): (64, 64, 4, 2), (90, 128): (128, 64, 8, 1), (80, 64): (64, 32, 4, 2), (80, 128): (64, 32, 4, 2),
                  "other": (64, 64, 4, 2), "float32": (16, 32, 4, 2), "interpreter": (32, 16, 4, 1)},
    "dkv_kernel": {(90, 64): (64, 128, 8, 2), (90, 128): (32, 128, 8, 2), (80, 64): (32, 64, 4, 2), (80, 128): (64, 64, 8, 2),
                   "other": (64, 64, 4, 2), "float32": (16, 16, 8, 2), "interpreter": (16, 32, 4, 1)},
    "decode_kernel": {"other": (16, 64, 4, 2), "float32": (16, 32, 4, 2), "interpreter": (16, 32, 4, 1)},
    "combine_kernel": {"other": (1, 1, 4, 1)},
    "row_lse_kernel": {"other": (64, 64, 4, 2), "float32": (16, 32, 4, 2), "interpreter": (16, 32, 4, 1)},
    "column_kernel": {"other": (64, 64, 4, 2), "float32": (16, 32, 4, 2), "interpreter": (16, 32, 4, 1)},
}


def build_for(kernel, q):
    """What a launch for q (..., D) fixes: the kernel's compile-time arguments, and the compiler's options."""
    if interpreted():
        arch = "interpreter"
    else:
        arch = 90 if torch.cuda.get_device_capability(q.device)[0] in (9, 10) else 80  # Blackwell (10) takes Hopper's tiles
    return build_of(kernel.__name__, arch, str(q.dtype).removeprefix("torch."), q.shape[-1])


def build_of(name, arch, dtype, head_dim):
    """`build_for` by name: arch 80, 90 or "interpreter"; a dtype's name."""
    kind = arch if arch == "interpreter" else dtype if dtype == "float32" else (arch, head_dim)
    bm, bn, warps, stages = TILES[name].get(kind, TILES[name]["other"])
    build = dict(D=head_dim, BM=bm, BN=bn, PRECISION="tf32x3" if dtype == "float32" else "ieee")
    return build, dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True)


# --- what the compiler makes of the kernels, without a GPU ----------------------------------------------------------------

class Build(NamedTuple):
    """A kernel compiled for one architecture. registers [a thread], stack [bytes a thread: spills], shared [bytes a program],
    resident [programs a multiprocessor holds at once], loops: per innermost loop with products, Counter of instructions."""
    registers: int
    stack: int
    shared: int
    resident: int
    loops: list
    ptx: str


class Gpu(NamedTuple):
    """A card's data sheet (SXM modules); a multiprocessor starts 4 warp instructions and 16 exp2 in a cycle."""
    name: str
    flops: float  # bf16 tensor cores, dense [1/s]
    bandwidth: float  # [bytes/s]
    n_sm: int
    clock: float  # boost [Hz]
    shared: int  # [bytes a multiprocessor]


GPUS = {80: Gpu("A100 80GB", 312e12, 2.04e12, 108, 1.41e9, 164 * 1024), 90: Gpu("H100", 989e12, 3.35e12, 132, 1.83e9, 227 * 1024)}


def compile_ahead(kernel, arch, dtype="bfloat16", head_dim=128, tile=None, causal=True, stream=True, splits=64) -> Build:
    """Compile a kernel for sm_<arch> (80, 90) as a launch would. tile (BM, BN, warps, stages), the table's by default; splits: of decoding.

    Raises RuntimeError where Triton interprets: it cannot compile in the same process."""
    if interpreted():
        raise RuntimeError("Triton interprets in this process and cannot compile: unset TRITON_INTERPRET")
    constants, options = build_of(kernel.__name__, arch, dtype, head_dim)
    if tile is not None:
        constants |= dict(BM=tile[0], BN=tile[1])
        options |= dict(num_warps=tile[2], num_stages=tile[3])
    constants |= dict(CAUSAL=causal, STREAM=stream, SPLITS=splits)
    kinds, aligned = {}, {}
    for i, p in enumerate(kernel.params):
        kinds[p.name] = "constexpr" if p.is_constexpr else argument_kind(p.name, dtype)
        if not p.is_constexpr and not p.do_not_specialize and kinds[p.name] != "fp32":
            aligned[(i,)] = [["tt.divisibility", 16]]  # pointers and strides, as found at launch: else loads are scalar
    constants = {name: value for name, value in constants.items() if kinds.get(name) == "constexpr"}
    source = triton.compiler.ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = lambda name, *args: subprocess.run([getattr(triton.knobs.nvidia, name).path, *args, file.name], check=True,
                                                  capture_output=True, text=True).stdout
        usage, code = tool("cuobjdump", "-res-usage"), tool("nvdisasm", "-c")
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    shared, warps = made.metadata.shared, options["num_warps"]
    resident = min(65536 // (32 * warps * -(-registers // 8) * 8), GPUS[arch].shared // (shared + 1024), 64 // warps)
    return Build(registers, stack, shared, resident, inner_loops(code), made.asm["ptx"])


def argument_kind(name, dtype) -> str:
    """The kernels' convention: pointers begin with a capital; statistics are float32, bounds and positions int32."""
    if name[0].isupper():
        kind = ("fp32" if name in ("Lse", "Delta", "Part", "PartLse", "Sums") else
                "i32" if name in ("CuQ", "CuK", "Window", "QPos", "Pos") else
                dict(bfloat16="bf16", float16="fp16", float32="fp32")[dtype])
        return "*" + kind
    return "fp32" if name == "scale" else "i32"


def inner_loops(code) -> list:
    """Innermost loops that hold matrix products, from nvdisasm's listing: a loop ends in a branch back to its label."""
    names, labels, ends = [], {}, []
    for line in code.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif op := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.EX2)?)(.*)", line):
            target = re.search(r"\.(L_x_\d+)", op[2]) if op[1] == "BRA" else None
            if target and target[1] in labels:
                ends.append((labels[target[1]], len(names)))
            names.append(op[1])
    inner = [e for e in ends if not any(o != e and e[0] <= o[0] and o[1] <= e[1] for o in ends)]
    loops = [collections.Counter(names[a:b + 1]) for a, b in inner]
    return [loop for loop in loops if loop["HGMMA"] or loop["HMMA"]]


def visited(n, window, sink, build, by_keys=False):
    """Blocks (free, masked) that one query head visits of a causal sequence of n, by the kernels' own arithmetic."""
    free = masked = 0
    own, other = (build["BN"], build["BM"]) if by_keys else (build["BM"], build["BN"])
    for start in range(0, n, own):
        blocks = (query_blocks if by_keys else key_blocks).fn(start, min(start + own, n), n, n, window or 2 ** 30, sink, other,
                                                              True, bool(window))
        free, masked = free + (blocks[-1] - blocks[-2]) // other, masked + sum(blocks[:-3])
    return free, masked


# --- demo -----------------------------------------------------------------------------------------------------------

N_HEAD, N_KV_HEAD, SINK, WINDOW = 32, 8, 128, 1024  # the layer of the tables below: Llama-3-8B's heads, PruLong's streaming


def compiled_table(n=32768):
    """Markdown rows: every kernel as compiled for bfloat16, and what one layer of n tokens costs at least."""
    print(f"\nCompiled, not run: bfloat16, {N_HEAD} query heads over {N_KV_HEAD} KV heads. Instructions: in the loop without / "
          f"with a mask, per block.\nWork and time: one layer, {n} tokens, all heads full / all streaming (sink {SINK} + window "
          f"{WINDOW}); decode: one token;\nrow_lse, column: 64 queries. The time is a STATIC LOWER BOUND from the data sheet "
          "(products, exp2, instructions issued and bytes\noverlap perfectly), not a measurement.\n")
    print("| kernel | GPU | D | block | warps, stages | registers | spills, B | shared, KB | programs per SM | instructions | "
          "TFLOP | GB | bound, ms |\n|" + "---|" * 13)
    for (arch, gpu), head_dim in itertools.product(GPUS.items(), (64, 128)):
        for kernel in (forward_kernel, dq_kernel, dkv_kernel, decode_kernel, row_lse_kernel, column_kernel):
            made, (constants, options) = compile_ahead(kernel, arch, head_dim=head_dim), build_of(kernel.__name__, arch, "bfloat16", head_dim)
            costs = [bound(kernel, made, gpu, constants, options["num_warps"], n, window) for window in (0, WINDOW)]
            costs = costs if kernel in (forward_kernel, dq_kernel, dkv_kernel) else costs[:1]
            flop, size, ms = (" / ".join(f"{c[i]:.3g}" for c in costs) for i in range(3))
            print(f"| {kernel.__name__.removesuffix('_kernel')} | {gpu.name} | {head_dim} | {constants['BM']} x {constants['BN']} | "
                  f"{options['num_warps']}, {options['num_stages']} | {made.registers} | {made.stack} | {made.shared / 1024:.0f} | "
                  f"{made.resident} | {' / '.join(str(loop.total()) for loop in made.loops)} | {flop} | {size} | {ms} |")


def bound(kernel, made, gpu, constants, warps, n, window):
    """(TFLOP, GB, ms) of one layer at least. A block takes as many cycles as its busiest unit: tensor cores, exp2, issue."""
    name, block, head_dim = kernel.__name__, constants["BM"] * constants["BN"], constants["D"]
    products, tensors_q, tensors_k, heads = {  # matrix products; tensors of q's and k's size read or written once; programs' heads
        "forward_kernel": (2, 2, 2, N_HEAD), "dq_kernel": (3, 4, 2, N_HEAD), "dkv_kernel": (4, 2, 4, N_HEAD),
        "decode_kernel": (2, 0, 2, N_KV_HEAD), "row_lse_kernel": (1, 0, 1, N_HEAD), "column_kernel": (1, 0, 1, N_HEAD)}[name]
    rows = 1 if name == "decode_kernel" else 64
    full = name in ("forward_kernel", "dq_kernel", "dkv_kernel")
    blocks = visited(n, window, SINK, constants, name == "dkv_kernel") if full else (0, -(-rows // constants["BM"]) * n // constants["BN"])
    per_cycle = gpu.flops / gpu.n_sm / gpu.clock
    cycles = [max(2 * products * block * head_dim / per_cycle, loop["MUFU.EX2"] * 32 * warps / 16, loop.total() * warps / 4)
              for loop in (made.loops[0], made.loops[-1])]
    size = 2 * n * head_dim * (tensors_q * N_HEAD + tensors_k * N_KV_HEAD)  # bfloat16
    time = max(sum(b * c for b, c in zip(blocks, cycles)) * heads / gpu.n_sm / gpu.clock, size / gpu.bandwidth)
    return 2 * products * block * head_dim * sum(blocks) * heads / 1e12, size / 1e9, time * 1e3


def gpu_tables():
    """On a GPU: errors against PyTorch in float64 (column sums: float32), then speed beside SDPA and the card's own ceilings."""
    device = torch.device("cuda")
    draw = lambda n, h, d, dtype=torch.bfloat16: torch.randn(n, h, d, device=device, dtype=dtype, requires_grad=True)
    print(f"{torch.cuda.get_device_name()}; largest error against PyTorch in float64 (column sums: float32)\n\n"
          "| case | dtype | out | dQ | dK | dV |\n" + "|---" * 6 + "|")
    cases = {"causal": ([0, 700], [0, 700], {}), "packed": ([0, 1, 300, 777], [0, 1, 300, 777], {}),
             "streaming": ([0, 900], [0, 900], dict(window=torch.tensor([200, 0]), sink=20)),
             "chunked prefill": ([0, 128], [0, 800], dict(window=300, sink=70)), "cross": ([0, 100], [0, 333], dict(causal=False))}
    for (name, (cu_q, cu_k, options)), dtype, d in itertools.product(cases.items(), (torch.float32, torch.bfloat16), (64, 128)):
        q, k, v, g = (draw(n, h, d, dtype) for n, h in ((cu_q[-1], 8), (cu_k[-1], 2), (cu_k[-1], 2), (cu_q[-1], 8)))
        got = attention(q, k, v, cu_q, cu_k, impl="triton", **options)
        want = attention(q.double(), k.double(), v.double(), cu_q, cu_k, impl="torch", **options)
        grads = zip(torch.autograd.grad(got, (q, k, v), g), torch.autograd.grad(want, (q, k, v), g.double()))
        errors = [(a.double() - b.double()).abs().max().item() for a, b in ((got, want), *grads)]
        print(f"| {name}, D {d} | {str(dtype)[6:]} | " + " | ".join(f"{e:.1e}" for e in errors) + " |")
    for dtype, d in itertools.product((torch.float32, torch.bfloat16), (64, 128)):
        q, k, v = (draw(n, h, d, dtype).detach() for n, h in ((40, 8), (3000, 2), (3000, 2)))
        k, v, pos = k.transpose(0, 1), v.transpose(0, 1), torch.arange(3000, device=device).expand(2, -1)
        sums = [column_sums(q.unflatten(1, (2, 4)), pos[0, -40:], k, pos, 40, impl=impl) for impl in ("triton", "torch")]
        one = decode(q[0], k, v, "triton"), decode(q[0].double(), k.double(), v.double(), "torch")
        errors = [(a.double() - b.double()).abs().max().item() for a, b in (one, sums)]
        for name, error in zip(("decode", "column sums"), errors):
            print(f"| {name}, D {d} | {str(dtype)[6:]} | {error:.1e} | | | |")

    ms = lambda f: triton.testing.do_bench(f)
    a, big = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16), torch.empty(2 ** 30, device=device, dtype=torch.uint8)
    print(f"\nceilings: {2 * 8192 ** 3 / ms(lambda: a @ a) / 1e9:.0f} TFLOP/s (product of 8192 x 8192), "
          f"{2 * big.numel() / ms(lambda: big.clone()) / 1e6:.0f} GB/s (copy)\n")
    print("| tokens | full, ms | TFLOP/s | SDPA, ms | streaming, ms | full + backward | SDPA + backward | streaming + backward | "
          "decode, ms | GB/s |\n" + "|---" * 10 + "|")
    for n in (8192, 16384, 32768, 65536, 131072):
        q, k, v = (draw(n, h, 128) for h in (N_HEAD, N_KV_HEAD, N_KV_HEAD))
        full = lambda: attention(q, k, v, [0, n], [0, n])
        streaming = lambda: attention(q, k, v, [0, n], [0, n], window=WINDOW, sink=SINK)
        sdpa = lambda: F.scaled_dot_product_attention(*(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)), is_causal=True, enable_gqa=True)
        times = []
        for f in (full, sdpa, streaming):
            with torch.no_grad():
                forward = ms(f)
            times.append((forward, ms(lambda: torch.autograd.grad(f().sum(), (q, k, v)))))
        one = ms(lambda: decode(q.detach()[0], k.detach().transpose(0, 1), v.detach().transpose(0, 1)))
        flop, size = 2 * n * n * N_HEAD * 128, 4 * n * N_KV_HEAD * 128
        print(f"| {n} | {times[0][0]:.2f} | {flop / times[0][0] / 1e9:.0f} | {times[1][0]:.2f} | {times[2][0]:.2f} | {times[0][1]:.2f} | "
              f"{times[1][1]:.2f} | {times[2][1]:.2f} | {one:.3f} | {size / one / 1e6:.0f} |")


def cpu_table():
    """PyTorch here: forward and backward of one layer, all heads full against all heads streaming, in turn."""
    n_head, n_kv_head, head_dim, sink, window = 9, 3, 64, 16, 256
    print(f"forward + backward on {torch.get_num_threads()} CPU threads, float32, {n_head} query heads over {n_kv_head} "
          f"KV heads of {head_dim}; streaming: sink {sink} + window {window}; best of 2\n")
    print("| tokens | full, s | streaming, s | ratio | visible pairs, ratio |\n|---|---|---|---|---|")
    for n in (1024, 2048, 4096, 8192):
        q, k, v = (torch.randn(n, h, head_dim, requires_grad=True) for h in (n_head, n_kv_head, n_kv_head))
        best = {0: math.inf, window: math.inf}
        for w in (0, window) * 2:
            start = time.perf_counter()
            attention(q, k, v, [0, n], [0, n], window=w, sink=sink * (w > 0)).sum().backward()
            best[w] = min(best[w], time.perf_counter() - start)
        seen = sum(min(p + 1, window) + min(sink, max(p + 1 - window, 0)) for p in range(n))
        print(f"| {n} | {best[0]:.3f} | {best[window]:.3f} | {best[window] / best[0]:.2f} | {2 * seen / n / (n + 1):.2f} |")


def main():
    parser = argparse.ArgumentParser(description="What the kernels do here: speed and errors on a GPU, else the compiler's figures.")
    if unknown := parser.parse_known_args()[1]:
        print(f"attention_triton.py: unknown argument {unknown[0]}", file=sys.stderr)
        sys.exit(2)
    if triton is not None and torch.cuda.is_available():
        gpu_tables()
        return
    cpu_table()
    if triton is None:
        print("\nTriton is not installed: no kernels to compile")
    else:
        print("\nNo GPU: the kernels are compiled here, not run")
        compiled_table()


if __name__ == "__main__":
    main()
