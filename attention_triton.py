"""One attention function for everything: packed documents, chunked prefill, streaming heads.

A query at position p sees the key at position j iff  j <= p  and  ( p - j < window  or  j < sink ).
Queries are the *last* positions of their sequence (bottom-right alignment), so one rule serves
training (as many queries as keys) and chunked prefill (fewer queries than keys).

`attention` is that rule, with gradients. `decode` is its last row over a KV cache in flat buffers.
CUDA tensors take the Triton kernels below: a program owns a tile of rows, visits only the blocks
in which it sees a key, and masks only those at an edge. Other devices take PyTorch's own attention,
a band of rows at a time. Either way a streaming head costs O(N (sink + window)), both directions.

Source: FlashAttention-2, arXiv:2307.08691; sink and window: StreamingLLM, arXiv:2309.17453.

    python attention_triton.py          # on a GPU: errors against float64, TFLOP/s, GB/s
    TRITON_INTERPRET=1 python ...       # attention(..., impl="triton") then runs on a CPU, slowly
"""
from __future__ import annotations  # tl.constexpr must not be looked up where Triton is missing

import functools
import itertools

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no build for this platform (macOS): PyTorch computes everything
    triton = None


def attention(q, k, v, cu_q, cu_k, *, causal=True, window=None, sink=0, scale=None, impl="auto"):
    """Attention inside each packed sequence. Query heads share K and V, which are never repeated.

    q (Nq, H, D); k, v (Nk, H_kv, D). Query heads g*G .. g*G + G-1 read KV head g, G = H / H_kv.
    cu_q, cu_k (B + 1,) integers: sequence b owns rows cu_q[b]:cu_q[b+1] of q; cu_k bounds k, v.
    causal: the last query is aligned with the last key. A row without a visible key gives 0.
    window [keys, the query's own included]: None or 0 is all; a tensor (H_kv,) is one per KV head.
    sink [keys]: the first keys of each sequence stay visible. window and sink need causal.
    scale > 0 multiplies the scores, by default 1 / sqrt(D).
    impl: "auto" takes the kernels for CUDA tensors that they can compute, "torch" never; "triton"
    insists, also on CPU tensors if Triton interprets.
    Returns (Nq, H, D) in q's dtype, differentiable in q, k and v; softmax in float32 at least.
    Raises ValueError where shapes, bounds, devices or options do not fit.
    """
    cu_q, cu_k, windows = check(q, k, v, cu_q, cu_k, causal, window, sink)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if use_kernels(impl, q):
        parts = map(as_kernels_expect, (q, k, v))
        return Fused.apply(*parts, cu_q, cu_k, causal, windows, sink, scale).to(q.dtype)
    return torch_attention(q, k, v, cu_q, cu_k, causal, windows, sink, scale)


def decode(q, k, v, start, length, *, scale=None, impl="auto"):
    """One query a sequence over a KV cache in flat buffers; no gradient.

    q (B, H, D); k, v (slots, D). KV head h of sequence b owns `length[b, h]` slots from
    `start[b, h]` on, tensors (B, H_kv) on q's device; stretches do not overlap, and slots between
    them hold finite numbers. Returns (B, H, D).
    impl as in `attention`. The kernels read no table on the host and choose the number of splits
    from the shapes alone, so that a CUDA graph may capture the call.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if use_kernels(impl, q):
        k, v, start, length = (x.contiguous() for x in (k, v, start, length))  # they are: no copy
        return fused_decode(*map(as_kernels_expect, (q, k, v)), start, length, scale).to(q.dtype)
    return torch_decode(q, k, v, start, length, scale)


def check(q, k, v, cu_q, cu_k, causal, window, sink):
    """Refuse what does not fit. Returns cu_q, cu_k and each KV head's window (0 = all) as lists."""
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"expected q (Nq, H, D) and k, v (Nk, H_kv, D), got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} KV heads evenly")
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(f"q, k, v differ in dtype or device: {q.dtype}, {k.dtype}, {v.dtype}")
    cu_q, cu_k = as_list(cu_q), as_list(cu_k)
    for name, cu, n in (("cu_q", cu_q, len(q)), ("cu_k", cu_k, len(k))):
        rising = all(a <= b for a, b in zip(cu, cu[1:]))
        if cu[0] != 0 or cu[-1] != n or not rising:
            raise ValueError(f"{name} must rise from 0 to {n}, got {cu[:8]}")
    if len(cu_q) != len(cu_k):
        raise ValueError(f"cu_q has {len(cu_q) - 1} sequences, cu_k {len(cu_k) - 1}")
    windows = as_list(window) if torch.is_tensor(window) else [window or 0] * k.shape[1]
    if len(windows) != k.shape[1] or min(windows) < 0 or sink < 0:
        heads = k.shape[1]
        raise ValueError(f"expected sink and {heads} windows >= 0, got {sink}, {windows}")
    if not causal and (any(windows) or sink):
        raise ValueError("window and sink need causal=True")
    return cu_q, cu_k, windows


def as_list(x):
    return x.tolist() if torch.is_tensor(x) else list(x)


def use_kernels(impl, q) -> bool:
    """True for the Triton kernels, False for PyTorch."""
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl must be auto, torch or triton, got {impl!r}")
    if impl == "torch" or (impl == "auto" and not q.is_cuda):
        return False
    reason = why_not(q)
    if reason and impl == "triton":
        raise ValueError(f"impl 'triton': {reason}")
    return not reason


def why_not(q) -> str:
    """Why the kernels cannot compute q; empty if they can."""
    if triton is None:
        return "Triton is not installed"
    if not q.is_cuda and not interpreted():
        return "no GPU under these tensors, and TRITON_INTERPRET=1 was not set before the start"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {q.dtype}: float32, float16 or bfloat16"
    return "" if q.shape[-1] in (16, 32, 64, 128) else f"no kernel for heads of {q.shape[-1]}"


# --- PyTorch -------------------------------------------------------------------------------------

def torch_attention(q, k, v, cu_q, cu_k, causal, windows, sink, scale):
    """KV heads of one window together, sequences of one shape as one batch."""
    shapes = [(b - a, d - c) for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:])]
    if len(set(shapes)) == 1 and len(set(windows)) == 1:  # nothing to sort: views
        q, k, v = (x.unflatten(0, (len(shapes), -1)).transpose(1, 2) for x in (q, k, v))
        out = one_shape(q, k, v, causal, windows[0], sink, scale)  # (B, H, nq, D)
        return out.transpose(1, 2).flatten(0, 1)  # (Nq, H, D)
    out, n_rep = q.clone().zero_(), q.shape[1] // k.shape[1]  # differentiable where nothing is seen
    for window, (nq, nk) in itertools.product(set(windows), set(shapes)):
        kv_heads = [h for h, w in enumerate(windows) if w == window]
        heads = [h * n_rep + r for h in kv_heads for r in range(n_rep)]
        same = [b for b, shape in enumerate(shapes) if shape == (nq, nk)]
        rows = [i for b in same for i in range(cu_q[b], cu_q[b + 1])]
        keys = [j for b in same for j in range(cu_k[b], cu_k[b + 1])]
        if not rows or not keys:
            continue
        rows, keys = torch.tensor([rows]).T, torch.tensor([keys]).T  # (n, 1), beside heads (h,)
        parts = q[rows, heads], k[keys, kv_heads], v[keys, kv_heads]
        parts = (x.unflatten(0, (len(same), -1)).transpose(1, 2) for x in parts)
        o = one_shape(*parts, causal, window, sink, scale)  # (B, heads, nq, D)
        out[rows, torch.tensor(heads)] = o.transpose(1, 2).flatten(0, 1)
    return out


def one_shape(q, k, v, causal, window, sink, scale):
    """q (B, H, nq, D), k, v (B, H_kv, nk, D): a band of rows meets the sink and its windows."""
    sdpa = functools.partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=True)
    nq, nk = q.shape[2], k.shape[2]
    if nq == 0 or nk == 0:
        return q.clone().zero_()
    # else PyTorch leaves its fused kernel: several times slower, K and V repeated
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if nq == 1 and not window:  # the query heads of a KV head are rows of one product
        rows = q.reshape(len(q), k.shape[1], -1, q.shape[3])  # (B, H_kv, G, D)
        return F.scaled_dot_product_attention(rows, k, v, scale=scale).reshape(q.shape)
    if not causal or (nq == nk and (not window or nk <= window)):
        return sdpa(q, k, v, is_causal=causal)
    off = nk - nq  # position of row 0
    blind = max(0, -off)  # rows before the first key see nothing
    band = min(max(window or 1024, 64), 1024)  # rows at a time: the mask stays small
    parts = [torch.zeros_like(q[:, :, :blind])]
    for start in range(blind, nq, band):
        end = min(start + band, nq)
        p = torch.arange(start, end, device=q.device)[:, None] + off  # positions of the rows
        last = end + off  # one past the last key that the band sees
        first = max(0, start + off - window + 1) if window else 0
        j = torch.arange(first, last, device=q.device)
        keys, values = k[:, :, first:last], v[:, :, first:last]
        front = min(sink, first)
        if front:
            j = torch.cat((torch.arange(front, device=q.device), j))
            keys = torch.cat((k[:, :, :front], keys), 2)
            values = torch.cat((v[:, :, :front], values), 2)
        near = (p - j < window) | (j < sink) if window else True
        parts.append(sdpa(q[:, :, start:end], keys, values, attn_mask=(j <= p) & near))
    return torch.cat(parts, 2)


def torch_decode(q, k, v, start, length, scale):
    """The query heads of a KV head are rows over its keys; neighbours of one size are one view."""
    start, length = start.flatten().tolist(), length.flatten().tolist()
    rows = q.reshape(1, len(start), -1, q.shape[-1])  # (1, B * H_kv, G, D)
    out = torch.zeros_like(rows)
    for size, heads in neighbours(start, length, len(k)):
        stretch = slice(start[heads[0]], start[heads[0]] + len(heads) * size)
        lengths = [length[h] for h in heads]
        n, mask = max(lengths), None
        if n == 0:
            continue
        if min(lengths) < n:  # fewer calls are worth more than the scores that a mask hides
            ends = torch.tensor(lengths, device=q.device)[None, :, None, None]
            mask = torch.arange(n, device=q.device) < ends  # (1, heads, 1, n)
        keys, values = (x[stretch].view(1, len(heads), size, -1)[:, :, :n] for x in (k, v))
        if heads == list(range(heads[0], heads[-1] + 1)):
            heads = slice(heads[0], heads[-1] + 1)  # a view
        part = rows[:, heads]
        out[:, heads] = F.scaled_dot_product_attention(part, keys, values, mask, scale=scale)
    return out.view(q.shape)


def neighbours(start, length, n_slots):
    """Stretches in the order of the buffer, those of one size together: (slots, heads)."""
    order = sorted(range(len(start)), key=lambda i: (start[i], length[i]))  # empty ones first
    ends = [start[i] for i in order[1:]] + [n_slots]
    size = {i: end - start[i] for i, end in zip(order, ends)}
    return ((key, list(group)) for key, group in itertools.groupby(order, key=size.get))


# --- geometry for the kernels: which blocks a tile visits ----------------------------------------
# Ints in, ints out: as plain Python (`key_blocks.fn`) they also count the work.

def jit(function):
    """triton.jit. These arguments vary from call to call: no build for each that is 1 or 16 n."""
    varying = ("n_rows", "n_rep", "sink")
    return triton.jit(function, do_not_specialize=varying) if triton else function


@jit
def key_blocks(m0, m1, nq, nk, window, sink, BN: tl.constexpr, CAUSAL: tl.constexpr,
               STREAM: tl.constexpr):
    """Blocks of BN keys that rows m0 .. m1 of nq visit: those of which some row sees some key.

        keys:   0 .. sink  | not visited | left .. free0 | free0 .. free1      | free1 .. end
                masked                     masked          every row sees all    masked

    Returns n_sink, n_left, n_right (the numbers of masked blocks), left, free0, free1."""
    off = nk - nq  # position of row 0
    left, free0, free1, end, n_sink = 0, 0, nk // BN * BN, nk, 0
    if CAUSAL:
        end = max(m1 + off, 0)  # one past the last row's key; // must not meet a negative number
        free1 = max(m0 + off + 1, 0) // BN * BN
    if STREAM:
        left = max(m0 + off + 1 - window, 0) // BN * BN
        free0 = (max(m1 + off - window, 0) + BN - 1) // BN * BN
        free1 = max(free1, free0)
        n_sink = min((min(sink, end) + BN - 1) // BN, left // BN)
    return n_sink, (free0 - left) // BN, (max(end - free1, 0) + BN - 1) // BN, left, free0, free1


@jit
def query_blocks(n0, n1, nq, nk, window, sink, BM: tl.constexpr, CAUSAL: tl.constexpr,
                 STREAM: tl.constexpr):
    """Blocks of BM rows that see keys n0 .. n1: [free0, free1) sees all of them; masked are
    n_left blocks from left and n_right from free1."""
    off = nk - nq
    left, free0, free1, end = 0, 0, nq // BM * BM, nq
    if CAUSAL:
        left = max(n0 - off, 0) // BM * BM
        free0 = (max(n1 - 1 - off, 0) + BM - 1) // BM * BM
    if STREAM:
        if n0 >= sink:  # the last key leaves the last window
            end = min(max(n1 - 1 - off + window, 0), nq)
        if n1 > sink:  # the first key that is no sink leaves the first window
            free1 = min(max(max(n0, sink) - off + window, 0), nq) // BM * BM
    free0 = min(free0, (end + BM - 1) // BM * BM)
    free1 = max(free1, free0)
    return max(free0 - left, 0) // BM, (max(end - free1, 0) + BM - 1) // BM, left, free0, free1


@jit
def masked_start(t, n_sink, n_left, left, free1, BLOCK: tl.constexpr):
    """Where the t-th masked block begins."""
    from_left, from_right = t - n_sink, t - n_sink - n_left
    start = tl.where(from_right < 0, left + from_left * BLOCK, free1 + from_right * BLOCK)
    return tl.where(from_left < 0, t * BLOCK, start)


@jit
def visible(i, j, nq, nk, window, sink, CAUSAL: tl.constexpr, STREAM: tl.constexpr):
    """Does row i see key j? A sink's window has no end."""
    if not CAUSAL:
        return (i < nq) & (j < nk)
    position = i + (nk - nq)
    if STREAM:
        reach = tl.where(j < sink, 1 << 30, window)
        # 0 <= position - j < reach in one comparison: as unsigned, a negative number is huge
        return tl.cast(position - j, tl.uint32) < tl.cast(reach, tl.uint32)
    return j <= position


# --- forward -------------------------------------------------------------------------------------

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
    """Rows start .. start + BLOCK of a matrix (n, D). MASKED: rows from n on are 0, not read."""
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
    """x log2(e): exp(x y) is exp2(to_base2(x) y), which the hardware has."""
    return x * 1.4426950408889634


@jit
def forward_block(acc, m, l, q, K, V, k_row, v_row, start, i, nq, nk, window, sink, qk_scale,
                  D: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, STREAM: tl.constexpr,
                  PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Rows i meet keys start .. start + BN: the online softmax's running sum (BM, D), maximum and
    norm (BM,), in base 2. s * qk_scale - m is one fused multiply-add a score."""
    k = load_rows(K, k_row, start, nk, D, BN, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BM, BN)
    if MASKED:
        j = start + tl.arange(0, BN)
        seen = visible(i[:, None], j[None, :], nq, nk, window, sink, CAUSAL, STREAM)
        s = tl.where(seen, s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
    p = tl.exp2(s * qk_scale - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    v = load_rows(V, v_row, start, nk, D, BN, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, m_new, l * shrink + tl.sum(p, 1)


@jit
def forward_kernel(Q, K, V, Out, Lse, CuQ, CuK, Window, sink, scale,
                   q_row, q_head, k_row, k_head, v_row, v_head, n_rows, n_rep,
                   D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
                   STREAM: tl.constexpr, PRECISION: tl.constexpr):
    """One program: BM rows of one query head of one sequence. The longest rows start first.

    Out (Nq, H, D), Lse (H, n_rows = Nq), contiguous. *_row, *_head are strides in elements.
    Window (H_kv,), 2^30 for a full head."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, seq = tl.program_id(1), tl.program_id(2)
    q0, nq = span(CuQ, seq)
    k0, nk = span(CuK, seq)
    m0 = tile * BM
    if m0 >= nq:
        return
    window = tl.load(Window + head // n_rep) if STREAM else 0
    Q += offset(q0, q_row) + offset(head, q_head)
    K += offset(k0, k_row) + offset(head // n_rep, k_head)
    V += offset(k0, v_row) + offset(head // n_rep, v_head)
    q = load_rows(Q, q_row, m0, nq, D, BM, True)
    i = m0 + tl.arange(0, BM)
    m = tl.full([BM], -1e30, tl.float32)  # not -inf: a blind row needs no guard against inf - inf
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    n_sink, n_left, n_right, left, free0, free1 = key_blocks(
        m0, min(m0 + BM, nq), nq, nk, window, sink, BN, CAUSAL, STREAM)
    for start in range(free0, free1, BN):
        acc, m, l = forward_block(
            acc, m, l, q, K, V, k_row, v_row, start, i, nq, nk, window, sink, to_base2(scale),
            D, BN, CAUSAL, STREAM, PRECISION, False)
    for t in range(n_sink + n_left + n_right):
        start = masked_start(t, n_sink, n_left, left, free1, BN)
        acc, m, l = forward_block(
            acc, m, l, q, K, V, k_row, v_row, start, i, nq, nk, window, sink, to_base2(scale),
            D, BN, CAUSAL, STREAM, PRECISION, True)
    some = l > 0
    l = tl.where(some, l, 1)
    out_row = tl.num_programs(1) * D
    out = acc * (1 / l)[:, None]
    store_rows(Out + offset(q0, out_row) + head * D, out_row, m0, nq, out, D, BM)
    lse = tl.where(some, (m + tl.log2(l)) * 0.6931471805599453, -float("inf"))  # ln(2)
    tl.store(Lse + offset(head, n_rows) + q0 + i, lse, mask=i < nq)


# --- backward ------------------------------------------------------------------------------------
# With P = exp(scale q k^T - lse) and delta = rowsum(dO * O)   (FlashAttention-2, 3.1):
# dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale dS K,  dK = scale dS^T Q.

@jit
def dq_block(dq, q, grad, lse, delta, K, V, k_row, v_row, start, i, nq, nk, window, sink, qk_scale,
             D: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, STREAM: tl.constexpr,
             PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Rows i meet keys start .. start + BN: dS K is added to dq (BM, D). lse (BM,) in base 2."""
    k = load_rows(K, k_row, start, nk, D, BN, MASKED)
    v = load_rows(V, v_row, start, nk, D, BN, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BM, BN)
    p = tl.exp2(s * qk_scale - lse[:, None])
    if MASKED:
        j = start + tl.arange(0, BN)
        seen = visible(i[:, None], j[None, :], nq, nk, window, sink, CAUSAL, STREAM)
        p = tl.where(seen, p, 0)  # also a blind row's, exp2(s + inf)
    ds = p * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@jit
def dq_kernel(Q, K, V, Out, Lse, Grad, Delta, DQ, CuQ, CuK, Window, sink, scale,
              q_row, q_head, k_row, k_head, v_row, v_head, n_rows, n_rep,
              D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
              STREAM: tl.constexpr, PRECISION: tl.constexpr):
    """One program: dQ of BM rows of one head, over the same blocks as forward. It also writes
    their Delta (H, n_rows), which dkv_kernel reads. Out, Grad, DQ (Nq, H, D) contiguous."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, seq = tl.program_id(1), tl.program_id(2)
    q0, nq = span(CuQ, seq)
    k0, nk = span(CuK, seq)
    m0 = tile * BM
    if m0 >= nq:
        return
    window = tl.load(Window + head // n_rep) if STREAM else 0
    Q += offset(q0, q_row) + offset(head, q_head)
    K += offset(k0, k_row) + offset(head // n_rep, k_head)
    V += offset(k0, v_row) + offset(head // n_rep, v_head)
    out_row = tl.num_programs(1) * D
    at, stats = offset(q0, out_row) + head * D, offset(head, n_rows) + q0
    i = m0 + tl.arange(0, BM)
    q = load_rows(Q, q_row, m0, nq, D, BM, True)
    grad = load_rows(Grad + at, out_row, m0, nq, D, BM, True)
    out = load_rows(Out + at, out_row, m0, nq, D, BM, True)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(Delta + stats + i, delta, mask=i < nq)
    lse = to_base2(tl.load(Lse + stats + i, mask=i < nq, other=0.0))
    dq = tl.zeros([BM, D], tl.float32)
    n_sink, n_left, n_right, left, free0, free1 = key_blocks(
        m0, min(m0 + BM, nq), nq, nk, window, sink, BN, CAUSAL, STREAM)
    for start in range(free0, free1, BN):
        dq = dq_block(
            dq, q, grad, lse, delta, K, V, k_row, v_row, start, i, nq, nk, window, sink,
            to_base2(scale), D, BN, CAUSAL, STREAM, PRECISION, False)
    for t in range(n_sink + n_left + n_right):
        start = masked_start(t, n_sink, n_left, left, free1, BN)
        dq = dq_block(
            dq, q, grad, lse, delta, K, V, k_row, v_row, start, i, nq, nk, window, sink,
            to_base2(scale), D, BN, CAUSAL, STREAM, PRECISION, True)
    store_rows(DQ + at, out_row, m0, nq, dq * scale, D, BM)


@jit
def dkv_block(dk, dv, k, v, Q, Grad, Lse, Delta, q_row, out_row, start, j, nq, nk, window, sink,
              qk_scale, D: tl.constexpr, BM: tl.constexpr, CAUSAL: tl.constexpr,
              STREAM: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """Keys j meet rows start .. start + BM: adds to dk, dv (BN, D). P^T and dS^T (BN, BM) are
    operands of the next products as they lie in registers."""
    i = start + tl.arange(0, BM)
    q = load_rows(Q, q_row, start, nq, D, BM, MASKED)
    grad = load_rows(Grad, out_row, start, nq, D, BM, MASKED)
    if MASKED:
        lse = tl.load(Lse + i, mask=i < nq, other=0.0)
        delta = tl.load(Delta + i, mask=i < nq, other=0.0)
    else:
        lse, delta = tl.load(Lse + i), tl.load(Delta + i)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BN, BM)
    p = tl.exp2(s * qk_scale - to_base2(lse)[None, :])
    if MASKED:
        seen = visible(i[None, :], j[:, None], nq, nk, window, sink, CAUSAL, STREAM)
        p = tl.where(seen, p, 0)
    dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@jit
def dkv_kernel(Q, K, V, Lse, Grad, Delta, DK, DV, CuQ, CuK, Window, sink, scale,
               q_row, q_head, k_row, k_head, v_row, v_head, n_rows, n_rep,
               D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
               STREAM: tl.constexpr, PRECISION: tl.constexpr):
    """One program: dK, dV of BN keys of one KV head, summed over its query heads: no atomics.

    Query heads and row blocks are one flat loop: nested loops spill. DK, DV contiguous."""
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
    n_left, n_right, left, free0, free1 = query_blocks(
        n0, min(n0 + BN, nk), nq, nk, window, sink, BM, CAUSAL, STREAM)
    n_free = (free1 - free0) // BM
    for t in range(n_free * n_rep):
        g = t // n_free
        start, row = free0 + (t - g * n_free) * BM, stats + offset(g, n_rows)
        dk, dv = dkv_block(
            dk, dv, k, v, Q + offset(g, q_head), Grad + g * D, Lse + row, Delta + row, q_row,
            out_row, start, j, nq, nk, window, sink, to_base2(scale),
            D, BM, CAUSAL, STREAM, PRECISION, False)
    n_masked = n_left + n_right
    for t in range(n_masked * n_rep):
        g = t // n_masked
        start = masked_start(t - g * n_masked, 0, n_left, left, free1, BM)
        row = stats + offset(g, n_rows)
        dk, dv = dkv_block(
            dk, dv, k, v, Q + offset(g, q_head), Grad + g * D, Lse + row, Delta + row, q_row,
            out_row, start, j, nq, nk, window, sink, to_base2(scale),
            D, BM, CAUSAL, STREAM, PRECISION, True)
    at = offset(k0, dk_row) + kv_head * D
    store_rows(DK + at, dk_row, n0, nk, dk * scale, D, BN)
    store_rows(DV + at, dk_row, n0, nk, dv, D, BN)


class Fused(torch.autograd.Function):
    """The kernels behind `attention`: q (Nq, H, D), k, v (Nk, H_kv, D) -> out like q."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, causal, windows, sink, scale):
        windows = [min(w or 2 ** 30, 2 ** 30) for w in windows]
        ctx.longest = longest(cu_q), longest(cu_k)
        ctx.options = causal, any(w < 2 ** 30 for w in windows), sink, scale
        tables = [int32_on(tuple(x), q.device) for x in (cu_q, cu_k, windows)]
        out = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        Fused.launch(ctx, forward_kernel, (q, k, v, out, lse), q, k, v, tables)
        ctx.save_for_backward(q, k, v, out, lse, *tables)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse, *tables = ctx.saved_tensors
        grad, delta = grad.contiguous(), torch.empty_like(lse)
        d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
        for_q = q, k, v, out, lse, grad, delta, d_q
        Fused.launch(ctx, dq_kernel, for_q, q, k, v, tables)
        for_kv = q, k, v, lse, grad, delta, d_k, d_v
        Fused.launch(ctx, dkv_kernel, for_kv, q, k, v, tables)
        return d_q, d_k, d_v, None, None, None, None, None, None

    @staticmethod
    def launch(ctx, kernel, tensors, q, k, v, tables):
        """One program per tile of rows (of keys: dkv_kernel), head and sequence."""
        (longest_q, longest_k), (causal, stream, sink, scale) = ctx.longest, ctx.options
        build, options = build_for(kernel, q)
        tiles, heads = triton.cdiv(longest_q, build["BM"]), q.shape[1]
        if kernel is dkv_kernel:
            tiles, heads = triton.cdiv(longest_k, build["BN"]), k.shape[1]
        n_seq = len(tables[0]) - 1
        if n_seq > 65535:
            raise ValueError(f"{n_seq} sequences are more than one launch takes: 65535")
        if not (tiles and n_seq):
            return
        with torch.cuda.device_of(q):
            kernel[(tiles, heads, n_seq)](
                *tensors, *tables, sink, scale, *strides(q, k, v), len(q), q.shape[1] // k.shape[1],
                CAUSAL=causal, STREAM=stream, **build, **options)


def longest(cu):
    return max((b - a for a, b in zip(cu, cu[1:])), default=0)


def strides(*tensors):
    """Elements from one row to the next and from one head to the next, of each (rows, heads, D)."""
    return [s for x in tensors for s in x.stride()[:2]]


@functools.lru_cache(maxsize=64)
def int32_on(values, device):
    """Bounds and windows on the device: all layers of a step ask for the same ones."""
    values = torch.tensor(values, dtype=torch.int32)
    if device.type != "cuda":
        return values
    return values.pin_memory().to(device, non_blocking=True)  # pinned: the copy does not wait


def as_kernels_expect(x):
    """x (..., D) with neighbours side by side; float32 for the interpreter instead of bfloat16,
    which it computes wrongly."""
    x = x.float() if x.dtype == torch.bfloat16 and interpreted() else x
    return x if x.stride(-1) == 1 else x.contiguous()


# --- decoding ------------------------------------------------------------------------------------

@jit
def decode_kernel(Q, K, V, Part, PartLse, Start, Length, scale, q_row, q_head, n_rep,
                  D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr):
    """One program: the query heads of one KV head, as rows, over one split of its entries.

    K, V (slots, D). Part (splits, B, H, D), PartLse (splits, B, H) float32, base 2; an empty
    split gives 0 and -inf."""
    split, kv_head, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    stretch = seq * tl.num_programs(1) + kv_head
    start, n = tl.load(Start + stretch), tl.load(Length + stretch)
    size = tl.cdiv(tl.cdiv(n, tl.num_programs(0)), BN) * BN
    end = min((split + 1) * size, n)
    K += offset(start, D)
    V += offset(start, D)
    Q += offset(seq, q_row) + offset(kv_head * n_rep, q_head)
    q = load_rows(Q, q_head, 0, n_rep, D, BM, True)
    i = tl.arange(0, BM)
    m = tl.full([BM], -1e30, tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for first in range(split * size, end, BN):
        acc, m, l = forward_block(
            acc, m, l, q, K, V, D, D, first, i, nq=n_rep, nk=end, window=0, sink=0,
            qk_scale=to_base2(scale), D=D, BN=BN, CAUSAL=False, STREAM=False, PRECISION=PRECISION,
            MASKED=True)
    some = l > 0
    l = tl.where(some, l, 1)
    row = ((split * tl.num_programs(2) + seq) * tl.num_programs(1) + kv_head) * n_rep
    store_rows(Part + offset(row, D), D, 0, n_rep, acc * (1 / l)[:, None], D, BM)
    lse = tl.where(some, m + tl.log2(l), -float("inf"))
    tl.store(PartLse + row + i, lse, mask=i < n_rep)


@jit
def combine_kernel(Part, PartLse, Out, n_splits, n_rows, D: tl.constexpr, SPLITS: tl.constexpr):
    """One program: merges the splits of one row by their log-sum-exp. Out (n_rows, D)."""
    row, split = tl.program_id(0), tl.arange(0, SPLITS)
    real = split < n_splits
    lse = tl.load(PartLse + split * n_rows + row, mask=real, other=-float("inf"))
    share = tl.exp2(lse - tl.maximum(tl.max(lse, 0), -1e30))
    part = load_rows(Part + offset(row, D), n_rows * D, 0, n_splits, D, SPLITS, True)
    total = tl.sum(share, 0)
    out = tl.sum(part * share[:, None], 0) / tl.where(total > 0, total, 1)
    tl.store(Out + offset(row, D) + tl.arange(0, D), out.to(Out.dtype.element_ty))


def fused_decode(q, k, v, start, length, scale):
    """`decode` by the kernels. The keys are split so that every multiprocessor has two programs."""
    (n_seq, n_head, D), n_kv_head = q.shape, start.shape[1]
    n_sm = 4
    if q.is_cuda:
        n_sm = torch.cuda.get_device_properties(q.device).multi_processor_count
    n_splits = max(1, min(2 * n_sm // (n_seq * n_kv_head), 64))  # more would spill in combine
    part = q.new_empty(n_splits, n_seq, n_head, D, dtype=torch.float32)
    part_lse, out = part.new_empty(n_splits, n_seq, n_head), q.new_empty(n_seq, n_head, D)
    build, options = build_for(decode_kernel, q)
    build["BM"] = max(16, triton.next_power_of_2(n_head // n_kv_head))
    n_rows, splits = n_seq * n_head, triton.next_power_of_2(n_splits)
    with torch.cuda.device_of(q):
        decode_kernel[(n_splits, n_kv_head, n_seq)](
            q, k, v, part, part_lse, start, length, scale, *strides(q), n_head // n_kv_head,
            **build, **options)
        combine_kernel[(n_rows,)](part, part_lse, out, n_splits, n_rows, D=D, SPLITS=splits)
    return out


# --- tiles ---------------------------------------------------------------------------------------
# (BM, BN, warps, pipeline stages). A table instead of tuning on the spot: every row compiles
# without spills. 8 warps need BM = 128 on sm_90: with 64 rows both warp groups would compute the
# same ones. float32 products run as three tf32 ones.

TILES = {
    "forward_kernel": {
        (90, 64): (128, 64, 8, 2), (90, 128): (128, 64, 8, 2),
        (80, 64): (64, 64, 4, 3), (80, 128): (128, 32, 8, 2),
        "other": (64, 64, 4, 2), "float32": (16, 32, 4, 2), "interpreter": (32, 16, 4, 1)},
    "dq_kernel": {
        (90, 64): (64, 64, 4, 2), (90, 128): (128, 64, 8, 1),
        (80, 64): (64, 32, 4, 2), (80, 128): (64, 32, 4, 2),
        "other": (64, 64, 4, 2), "float32": (16, 32, 4, 2), "interpreter": (32, 16, 4, 1)},
    "dkv_kernel": {
        (90, 64): (64, 128, 8, 2), (90, 128): (32, 128, 8, 2),
        (80, 64): (32, 64, 4, 2), (80, 128): (64, 64, 8, 2),
        "other": (64, 64, 4, 2), "float32": (16, 16, 8, 2), "interpreter": (16, 32, 4, 1)},
    "decode_kernel": {
        "other": (16, 64, 4, 2), "float32": (16, 32, 4, 2), "interpreter": (16, 32, 4, 1)},
}


def build_for(kernel, q):
    """What a launch for q (..., D) fixes: the kernel's compile-time arguments and options."""
    arch = "interpreter"
    if not interpreted():  # Blackwell (10) takes Hopper's tiles
        arch = 90 if torch.cuda.get_device_capability(q.device)[0] in (9, 10) else 80
    return build_of(kernel.__name__, arch, q.dtype, q.shape[-1])


def build_of(name, arch, dtype, head_dim):
    """`build_for` by name; arch is 80, 90 or "interpreter"."""
    kind = arch
    if arch != "interpreter":
        kind = "float32" if dtype == torch.float32 else (arch, head_dim)
    bm, bn, warps, stages = TILES[name].get(kind, TILES[name]["other"])
    precision = "tf32x3" if dtype == torch.float32 else "ieee"
    build = dict(D=head_dim, BM=bm, BN=bn, PRECISION=precision)
    return build, dict(num_warps=warps, num_stages=stages)


def interpreted() -> bool:
    """True if Triton interprets, which TRITON_INTERPRET decides when this file is imported."""
    return triton is not None and not isinstance(forward_kernel, triton.JITFunction)


# --- what it does here ---------------------------------------------------------------------------

def main():
    """Errors against float64 and speed of one Llama-3-8B layer, on a GPU."""
    if triton is None or not torch.cuda.is_available():
        print("attention_triton.py measures its kernels on a GPU, and there is none here")
        return
    def draw(n, heads, dtype=torch.bfloat16):
        return torch.randn(n, heads, 128, device="cuda", dtype=dtype, requires_grad=True)
    ms, cu = triton.testing.do_bench, [0, 1000]
    for window in (0, 200):
        q, k, v = draw(1000, 32), draw(1000, 8), draw(1000, 8)
        want = attention(q.double(), k.double(), v.double(), cu, cu, window=window, sink=9)
        error = (attention(q, k, v, cu, cu, window=window, sink=9) - want).abs().max()
        print(f"window {window}: error {error:.1e}")
    print("| tokens | full, TFLOP/s | + backward | streaming, ms | + backward | decode, GB/s |")
    print("|---|---|---|---|---|---|")
    for n in (8192, 32768, 131072):
        q, k, v = draw(n, 32), draw(n, 8), draw(n, 8)
        times = []
        for stream in (dict(), dict(window=1024, sink=128)):
            run = functools.partial(attention, q, k, v, [0, n], [0, n], **stream)
            times += [ms(lambda: run().detach()), ms(lambda: run().sum().backward())]
        start = torch.arange(8, device="cuda")[None] * n
        flat = [x.detach().transpose(0, 1).reshape(-1, 128) for x in (k, v)]
        one = ms(lambda: decode(q[:1].detach(), *flat, start, torch.full_like(start, n)))
        flop, size = 2 * n * n * 32 * 128, 4 * n * 8 * 128
        print(f"| {n} | {flop / times[0] / 1e9:.0f} | {3.5 * flop / times[1] / 1e9:.0f} | "
              f"{times[2]:.2f} | {times[3]:.2f} | {size / one / 1e6:.0f} |")


if __name__ == "__main__":
    main()
