"""Every technique against its slow, obvious version.   python -m pytest -q test_all.py

Tests that want a real pretrained Llama read its folder from LLAMA_DIR and are skipped without it; those marked slow want SLOW=1.
"""
import ast
import base64
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import socket
import signal
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import attention_triton
import cepe
import eval_tasks
import evict
import footprint
import meco
import model as model_file
import prulong
import train
import vlorp
from attention_triton import attention, key_blocks, query_blocks
from model import Batch, KVCache, Llama, LlamaConfig, cross_entropy, generate, load_model, load_tokenizer, rope_frequencies, save_model


torch.set_num_threads(1)  # some tests' processes run beside the others: threads that wait for each other would wait long

SLOW = "SLOW" in os.environ
slow = pytest.mark.skipif(not SLOW, reason="takes minutes: SLOW=1 python -m pytest test_all.py")


def close(a, b, tol):
    """Largest difference at most tol, and the same places infinite."""
    a, b = a.double(), b.double()
    assert a.shape == b.shape, f"{tuple(a.shape)} != {tuple(b.shape)}"
    assert torch.equal(a.isinf(), b.isinf()), "infinite in different places"
    diff = (a - b)[~a.isinf()].abs().max().item() if a.numel() and not a.isinf().all() else 0.0
    assert diff <= tol, f"max difference {diff:.3e} > {tol:.1e}"


# --- attention ------------------------------------------------------------------------------------------------------

def slow_attention(q, k, v, cu_q, cu_k, causal=True, window=None, sink=0, scale=None):
    """The definition, one query head of one sequence at a time, with an explicit mask in float64."""
    q, k, v = q.double(), k.double(), v.double()
    n_rep, out, lse = q.shape[1] // k.shape[1], torch.zeros_like(q), q.new_full((q.shape[1], q.shape[0]), -torch.inf)
    windows = window.tolist() if torch.is_tensor(window) else [window or 0] * k.shape[1]
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        nq, nk = cu_q[b + 1] - cu_q[b], cu_k[b + 1] - cu_k[b]
        p, j = torch.arange(nq, device=q.device)[:, None] + nk - nq, torch.arange(nk, device=q.device)[None]
        for h in range(q.shape[1]):
            w = windows[h // n_rep] if windows[h // n_rep] > 0 else nk + nq
            seen = ((j <= p) & ((p - j < w) | (j < sink))) if causal else torch.ones(nq, nk, dtype=torch.bool, device=q.device)
            s = q[rows, h] @ k[keys, h // n_rep].T * (q.shape[2] ** -0.5 if scale is None else scale)
            lse[h, rows] = s.masked_fill(~seen, -torch.inf).logsumexp(1)
            some = seen.any(1)
            prob = s[some].masked_fill(~seen[some], -torch.inf).softmax(1)
            out[rows, h] = torch.zeros_like(out[rows, h]).index_put((some.nonzero()[:, 0],), prob @ v[keys, h // n_rep])
    return out, lse


def bounds(lengths):
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def check_attention(rng, dtype, tol, lengths_q, lengths_k, n_kv_head, n_rep, head_dim, **options):
    cu_q, cu_k = bounds(lengths_q), bounds(lengths_k)
    q, k, v, g = (torch.randn(n, h, head_dim, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
                  for n, h in ((cu_q[-1], n_kv_head * n_rep), (cu_k[-1], n_kv_head), (cu_k[-1], n_kv_head),
                               (cu_q[-1], n_kv_head * n_rep)))
    want, want_lse = slow_attention(q, k, v, cu_q, cu_k, **options)
    out, lse = attention(q, k, v, torch.tensor(cu_q, dtype=torch.int32), torch.tensor(cu_k, dtype=torch.int32),
                         return_lse=True, **options)
    assert out.dtype == dtype
    close(out, want, tol), close(lse, want_lse, tol)
    wants = torch.autograd.grad(want, (q, k, v), g.double(), allow_unused=True)
    for got, right, x in zip(torch.autograd.grad(out, (q, k, v), g), wants, (q, k, v)):
        close(got, right, 10 * tol * max(1.0, right.abs().max().item() if right.numel() else 1.0))


def test_attention_random_shapes():
    """GQA groups, uneven documents, more queries than keys and fewer, empty sequences, windows per head, sinks."""
    rng = torch.Generator().manual_seed(0)
    pick = lambda lo, hi: int(torch.randint(lo, hi + 1, (1,), generator=rng))
    for trial in range(300):
        n_kv_head, n_rep, docs = pick(1, 3), pick(1, 4), pick(1, 4)
        lengths_q = [pick(0, 40)] * docs if trial % 3 == 0 else [pick(0, 40) for _ in range(docs)]
        lengths_k = list(lengths_q) if trial % 2 else [max(0, n + pick(-6, 60)) for n in lengths_q]
        causal = trial % 5 != 0
        window = [None, pick(1, 12), torch.tensor([pick(0, 9) for _ in range(n_kv_head)])][trial % 3] if causal else None
        check_attention(rng, torch.float64, 1e-11, lengths_q, lengths_k, n_kv_head, n_rep, (4, 16, 32)[trial % 3],
                        causal=causal, window=window, sink=pick(0, 10) * causal, scale=(None, 0.3)[trial % 2])


def test_attention_refuses_a_second_derivative():
    q, k, v = (torch.randn(9, h, 8, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    for window in (0, 3):
        first, = torch.autograd.grad(attention(q, k, v, [0, 9], [0, 9], window=window).sum(), q, one, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):  # it would be wrong in silence
            first.sum().backward()


def test_attention_low_precision():
    rng = torch.Generator().manual_seed(1)
    for dtype, tol in ((torch.float32, 2e-6), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)):
        for window in (None, 16):
            check_attention(rng, dtype, tol, [70, 33], [90, 33], 2, 3, 32, window=window, sink=4)


def test_attention_pieces_cover_each_visible_pair_once():
    """The geometry alone, on every small shape: what makes the cost of a streaming head linear must not be approximate."""
    for nq in range(0, 8):
        for nk in range(0, 10):
            for window in range(0, 6):
                for sink in range(0, 5):
                    count = torch.zeros(nq, nk, dtype=torch.int)
                    for p in attention_triton.pieces(nq, nk, True, window, sink):
                        for r in range(p.repeat):
                            tile = torch.ones(p.nq, p.nk, dtype=torch.int)
                            tile = tile.tril() if p.triangle else tile
                            rows, keys = p.q0 + r * p.stride, p.k0 + r * p.stride
                            count[rows:rows + p.nq, keys:keys + p.nk] += tile.flip(0, 1) if p.flip else tile
                    i, j = torch.arange(nq)[:, None] + nk - nq, torch.arange(nk)[None]
                    seen = (j <= i) & ((i - j < (window or 99)) | (j < sink))
                    assert torch.equal(count, seen.int()), (nq, nk, window, sink)


def test_attention_work_of_streaming_heads_grows_linearly():
    area = lambda n: sum(p.nq * p.nk * p.repeat for p in attention_triton.pieces(n, n, True, 32, 4))
    assert area(4096) - area(2048) == 2 * (area(2048) - area(1024)) == 2048 * (32 + 31 * 31 / 32 + 4)


def test_attention_without_a_fused_kernel_agrees():
    """The plain formulas, for devices without a fused kernel, on a part of longer rows."""
    rng = torch.Generator().manual_seed(2)
    q, k, v, g = (torch.randn(2, h, n, 8, generator=rng) for h, n in ((6, 7), (2, 5), (2, 5), (6, 7)))
    for triangle in (False, True):
        out, lse = attention_triton.dense(q, k, v, triangle, 0.5)
        got, got_lse = attention_triton.plain(q, k, v, triangle, 0.5)
        close(got, out, 1e-6), close(got_lse, lse, 1e-6)
        part = (g, q, k, v, out * 0.7, lse + 0.5, triangle, 0.5)  # as if the rows saw more keys elsewhere
        for a, b in zip(attention_triton.plain_backward(*part), attention_triton.dense_backward(*part)):
            close(a, b, 5e-6)


def test_attention_refuses_what_does_not_fit():
    q, k = torch.randn(4, 4, 8), torch.randn(4, 2, 8)
    for bad, words in ((dict(window=3, causal=False), "causal"), (dict(sink=-1), "sink"), (dict(impl="flash"), "impl"),
                       (dict(window=torch.tensor([1, 2, 3])), "3 entries"), (dict(q=q[:, :3]), "share"),
                       (dict(k=k[:3]), "want q"), (dict(cu_q=[0, 3]), "cu_q"), (dict(cu_k=[0, 2, 4]), "sequences"),
                       (dict(q=q.double()), "dtype")):
        args = dict(q=q, k=k, v=k, cu_q=[0, 4], cu_k=[0, 4]) | bad
        with pytest.raises(ValueError, match=words):
            attention(**args)


# --- attention: the Triton kernels --------------------------------------------------------------------------------------
# Triton either interprets or compiles, for the whole life of a process: both happen in processes of their own (see the end).

INTERPRETED = ["modes", "random_shapes", "work", "poison", "low_precision", "strided_views", "decoding", "columns"]
COMPILED = ["other_builds", "half", "float32", "bad_block"]


def kernel_case(rng, lengths_q, lengths_k, n_kv_head=2, n_rep=2, head_dim=16, dtype=torch.float32, tol=2e-5, device="cpu", **options):
    """The kernels against the definition in float64, and the same again for PyTorch: out, lse, dQ, dK, dV."""
    cu_q, cu_k = bounds(lengths_q), bounds(lengths_k)
    q, k, v, g = (torch.randn(n, h, head_dim, generator=rng).to(device, dtype).requires_grad_()
                  for n, h in ((cu_q[-1], n_kv_head * n_rep), (cu_k[-1], n_kv_head), (cu_k[-1], n_kv_head), (cu_q[-1], n_kv_head * n_rep)))
    want, want_lse = slow_attention(q, k, v, cu_q, cu_k, **options)
    wants = torch.autograd.grad(want, (q, k, v), g.double(), allow_unused=True)
    for impl in ("triton", "torch"):
        out, lse = attention(q, k, v, cu_q, cu_k, return_lse=True, impl=impl, **options)
        assert out.dtype == dtype and lse.dtype == torch.float32
        close(out, want, tol), close(lse, want_lse, tol)
        for got, right in zip(torch.autograd.grad(out, (q, k, v), g), wants):
            close(got, right, 5 * tol * max(1.0, right.abs().max().item() if right.numel() else 1.0))


def kernel_modes(device="cpu"):
    """Each mode of the rule; under the interpreter a block is 32 rows by 16 keys, in dK, dV 16 rows by 32 keys."""
    rng = torch.Generator().manual_seed(0)
    case = functools.partial(kernel_case, rng, device=device)
    case([70], [70], n_rep=1)  # not a multiple of any block
    case([64], [64], 1, 3, window=7)  # window smaller than a block
    case([90], [90], 1, 4, window=37, sink=5)  # neither aligned
    case([90], [90], window=16, sink=16)  # both aligned
    case([80], [80], window=10, sink=50)  # the sink reaches past the first windows
    case([70], [100], window=torch.tensor([0, 20]), sink=18)  # chunked prefill, a full head beside a streaming one
    case([50], [30])  # more queries than keys: rows that see nothing
    case([50], [30], window=9, sink=3)
    case([33, 1, 1, 20], [33, 1, 1, 20], 1, 3, window=11, sink=2)  # packed, documents of one token
    case([0, 20, 5], [7, 20, 0], 1, 2)  # no queries, no keys
    case([40, 3], [1, 50], causal=False)  # cross-attention, also over one key
    case([20, 20, 20], [50, 9, 31], 1, 3)  # ragged caches: each KV head is a sequence of its own
    case([40], [70], 1, 2, head_dim=20, scale=0.3)  # padded to 32


def interpreted_modes():
    kernel_modes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_on_the_gpu():
    kernel_modes("cuda")
    interpreted_low_precision("cuda")
    interpreted_decoding("cuda")
    interpreted_columns("cuda")


def interpreted_random_shapes():
    rng = torch.Generator().manual_seed(1)
    pick = lambda lo, hi: int(torch.randint(lo, hi + 1, (1,), generator=rng))
    for trial in range(1000 if SLOW else 12):
        n_kv_head, causal = pick(1, 2), trial % 4 != 3
        lengths_q = [pick(0, 70) for _ in range(pick(1, 3))]
        lengths_k = list(lengths_q) if trial % 2 else [max(0, n + pick(-10, 60)) for n in lengths_q]
        window = [None, pick(1, 50), torch.tensor([pick(0, 40) for _ in range(n_kv_head)])][trial % 3] if causal else None
        kernel_case(rng, lengths_q, lengths_k, n_kv_head, pick(1, 3), (16, 32, 64)[trial % 3], causal=causal, window=window,
                    sink=pick(0, 40) * causal)


def interpreted_low_precision(device="cpu"):
    rng = torch.Generator().manual_seed(2)
    kernel_case(rng, [60], [90], dtype=torch.float16, tol=4e-3, device=device, window=20, sink=3)
    kernel_case(rng, [60], [90], dtype=torch.bfloat16, tol=4e-2, head_dim=128, n_rep=1, device=device)


def interpreted_strided_views():
    """q, k, v as columns of one product, k and v as a cache's slab, an expanded gradient: no copy is needed to be right."""
    rng = torch.Generator().manual_seed(3)
    both = torch.randn(50, 6, 3, 16, generator=rng)
    q, (k, v) = both[:, :4, 0].requires_grad_(), torch.randn(2, 2, 64, 16, generator=rng)[:, :, :50].transpose(1, 2)
    k, v = k.requires_grad_(), v.requires_grad_()
    cu = [0, 50]
    got = attention(q, k, v, cu, cu, window=20, sink=4, impl="triton")
    want, _ = slow_attention(q, k, v, cu, cu, window=20, sink=4)
    close(got, want, 1e-5)
    for a, b in zip(torch.autograd.grad(got.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v))):
        close(a, b, 1e-4)


def interpreted_poison():
    """Not a number in memory behind the ends, and in other documents: the results do not change in a bit."""
    rng = torch.Generator().manual_seed(4)
    cu_q, cu_k, options = [0, 37, 45, 80], [0, 50, 58, 95], dict(window=torch.tensor([0, 13]), sink=5, impl="triton")
    clean = [torch.randn(n, h, 16, generator=rng) for n, h in ((80, 4), (95, 2), (95, 2), (80, 4))]

    def run(poisoned):
        tensors = []
        for x, cu in zip(clean, (cu_q, cu_k, cu_k, cu_q)):
            room = torch.full((len(x) + 100, x.shape[1] + 1, 24), torch.nan)[:len(x), :x.shape[1], :16]
            room.copy_(x)
            if poisoned:
                room[cu[1]:cu[2]] = torch.nan
            tensors.append(room.requires_grad_())
        q, k, v, g = tensors
        out, lse = attention(q, k, v, cu_q, cu_k, return_lse=True, **options)
        return [cu_q] * 2 + [cu_q, cu_k, cu_k], [out, lse.T, *torch.autograd.grad(out, (q, k, v), g.detach())]
    for cu, a, b in zip(*run(False), run(True)[1]):
        others = torch.cat((torch.arange(cu[1]), torch.arange(cu[2], cu[3])))
        assert torch.equal(a[others], b[others]) and b[others].isfinite().all()


def interpreted_decoding(device="cpu"):
    """One query per sequence, over caches of different lengths, split among programs; beyond the ends only NaN."""
    rng = torch.Generator().manual_seed(5)
    for n_kv_head, n_rep, lengths in ((1, 3, [700, 1, 40]), (2, 1, [33]), (1, 20, [50, 0])):
        cu_k = bounds(lengths)
        q = torch.randn(len(lengths), n_kv_head * n_rep, 16, generator=rng).to(device)
        k, v = (torch.full((cu_k[-1] + 64, n_kv_head, 16), torch.nan, device=device)[:cu_k[-1]].copy_(torch.randn(cu_k[-1], n_kv_head, 16, generator=rng))
                for _ in "kv")
        got = attention(q, k, v, bounds([1] * len(lengths)), cu_k, return_lse=True, impl="triton")
        for a, b in zip(got, slow_attention(q, k, v, bounds([1] * len(lengths)), cu_k)):
            close(a, b, 1e-5)
    many = torch.zeros(2 ** 16, 2, 16, device=device)
    with pytest.raises(ValueError, match="65536 sequences"):
        attention(many, many, many, [*range(2 ** 16 + 1)], [*range(2 ** 16 + 1)], impl="triton")
    none = [torch.zeros(0, 2, 16, device=device)] * 3
    assert attention(*none, [0], [0], impl="triton").shape == (0, 2, 16)
    assert all(attention_triton.as_kernels_want(x) is x for x in (k, k.transpose(0, 1), k.new_ones(3, 1, 64), k.new_ones(3, 1, 128)))  # no copy
    close(attention_triton.decode(q[0], k[:50].transpose(0, 1), v[:50].transpose(0, 1), impl="triton"), got[0][0], 1e-6)


def interpreted_columns(device="cpu"):
    """A cache whose entries have gaps, and a row later than all of them."""
    rng = torch.Generator().manual_seed(6)
    for n_rows, n, n_rep in ((5, 40, 3), (33, 70, 1), (1, 17, 2)):
        q, k = torch.randn(n_rows, 2, n_rep, 16, generator=rng).to(device), torch.randn(2, n, 16, generator=rng).to(device)
        pos = torch.stack([torch.randperm(n + 20, generator=rng)[:n].sort()[0] for _ in range(2)], 1).to(device).T  # strided
        q_pos = torch.arange(n + 20 - n_rows, n + 20, device=device)
        got = attention_triton.column_sums(q, q_pos, k, pos, n, impl="triton")
        weights = torch.einsum("rhgd,hnd->hgrn", q.double(), k.double()) / 4
        want = weights.masked_fill(pos[:, None, None] > q_pos[:, None], -torch.inf).softmax(-1).sum(2)
        close(got, want, 1e-5), close(attention_triton.column_sums(q, q_pos, k, pos, n_rows), want, 1e-5)


def interpreted_work():
    """Products counted: what blocks with a visible pair cost and not one more; backward 3.5 times forward."""
    from triton.runtime.interpreter import InterpreterBuilder
    done, dot = [0], InterpreterBuilder.create_dot

    def counting(self, a, b, *rest):
        done[0] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)
    with mock.patch.object(InterpreterBuilder, "create_dot", counting):
        count_products(done)


def count_products(done):
    rng, costs = torch.Generator().manual_seed(7), []
    for nq, nk, window, sink in ((128, 128, 0, 0), (256, 256, 0, 0), (128, 128, 32, 8), (256, 256, 32, 8), (384, 384, 32, 8), (50, 90, 20, 3)):
        q, k, v = (torch.randn(n, h, 16, generator=rng).requires_grad_() for n, h in ((nq, 2), (nk, 1), (nk, 1)))
        done[0] = 0
        out = attention(q, k, v, [0, nq], [0, nk], window=window, sink=sink, impl="triton")
        forward, done[0] = done[0], 0
        out.sum().backward()
        i, j = torch.arange(nq)[:, None] + nk - nq, torch.arange(nk)[None]
        seen = torch.nn.functional.pad((j <= i) & ((i - j < (window or 999)) | (j < sink)), (0, -nk % 32, 0, -nq % 32))
        blocks = lambda rows, keys: seen.unflatten(1, (-1, keys)).unflatten(0, (-1, rows)).any(3).any(1).sum().item() * rows * keys
        assert forward == 2 * 2 * 2 * 16 * blocks(32, 16)
        assert done[0] == 2 * 2 * 16 * (3 * blocks(32, 16) + 4 * blocks(16, 32))
        costs.append((forward, done[0] / forward))
    assert [ratio for _, ratio in costs[:2]] == [3.5, 3.5]
    assert costs[4][0] - costs[3][0] == costs[3][0] - costs[2][0]  # a streaming head: so much more for so many more tokens


def test_kernels_visit_what_is_visible():
    """The kernels' block arithmetic on every small shape: a block is visited iff some row sees some key of it, once; and
    goes without a mask only if all of its rows see all of its keys."""
    blocks = [(key_blocks, 3, 2), (query_blocks, 2, 3)]
    for nq, nk, causal in itertools.product(range(1, 9), range(1, 11), (True, False)):
        for window, sink in itertools.product(range(0, 6), range(0, 6)) if causal else [(0, 0)]:
            i, j = torch.arange(nq)[:, None] + nk - nq, torch.arange(nk)[None]
            seen = (j <= i) & ((i - j < (window or 99)) | (j < sink)) if causal else torch.ones(nq, nk, dtype=torch.bool)
            for function, own, other in blocks:
                own_seen = seen if function is key_blocks else seen.T
                for start in range(0, len(own_seen), own):
                    stop = min(start + own, len(own_seen))
                    *counts, lo, free0, free1 = function.fn(start, stop, nq, nk, window or 2 ** 30, sink, other, causal, window > 0)
                    n_sink, n_left, n_right = counts if len(counts) == 3 else (0, *counts)
                    masked = [*range(0, n_sink * other, other), *range(lo, lo + n_left * other, other), *range(free1, free1 + n_right * other, other)]
                    free = list(range(free0, free1, other))
                    rows = own_seen[start:stop]
                    want = [b for b in range(0, rows.shape[1], other) if rows[:, b:b + other].any()]
                    assert sorted(masked + free) == want, (nq, nk, window, sink, start)
                    assert all(b + other <= rows.shape[1] and rows[:, b:b + other].all() for b in free)


PAIRS = [attention_triton.forward_kernel, attention_triton.dq_kernel, attention_triton.dkv_kernel]
OTHERS = [attention_triton.decode_kernel, attention_triton.row_lse_kernel, attention_triton.column_kernel]


def no_spills(arch, made):
    assert made.stack == 0 and made.registers <= 255 and made.shared <= {80: 163, 90: 227}[arch] * 1024 and made.resident >= 1
    assert made.loops and not any(loop["LDL"] + loop["STL"] for loop in made.loops)


def compiled_half():
    """The blocks of 16-bit training on both cards: no spills, tensor cores, asynchronous copies, one exp2 a score."""
    most = {(90, 64): (299, 267, 415), (90, 128): (364, 293, 350), (80, 64): (380, 195, 319), (80, 128): (306, 387, 538)}  # instructions
    for (arch, head_dim), budgets in most.items():
        for kernel, budget in zip(PAIRS, budgets):
            made = attention_triton.compile_ahead(kernel, arch, head_dim=head_dim)
            sizes, options = attention_triton.build_of(kernel.__name__, arch, "bfloat16", head_dim)
            no_spills(arch, made)
            free, masked = made.loops
            assert free["FSEL"] == 0 < masked["FSEL"] and free["FFMA"] > 0 and free.total() <= 1.05 * budget, (kernel, arch, head_dim)
            assert free["MUFU.EX2"] * 32 * options["num_warps"] <= 1.13 * sizes["BM"] * sizes["BN"]  # more: rows computed twice
            if arch == 90:
                assert "wgmma.mma_async" in made.ptx and all(loop["HGMMA"] and not loop["HMMA"] for loop in made.loops)
            else:
                assert "mma.sync" in made.ptx and all(loop["HMMA"] and loop["LDGSTS"] and loop["LDSM"] for loop in made.loops)


def compiled_float32():
    for arch, head_dim in ((80, 128), (90, 64)):
        for kernel in PAIRS:
            no_spills(arch, attention_triton.compile_ahead(kernel, arch, "float32", head_dim))


def compiled_other_builds():
    """Decoding and column sums; full heads and cross-attention; small heads."""
    for arch in (80, 90):
        assert attention_triton.compile_ahead(attention_triton.combine_kernel, arch).stack == 0
        for kernel in OTHERS:
            no_spills(arch, attention_triton.compile_ahead(kernel, arch, "float16", 128))
        for kernel in PAIRS:
            for causal in (True, False):
                no_spills(arch, attention_triton.compile_ahead(kernel, arch, head_dim=128, causal=causal, stream=False))
            no_spills(arch, attention_triton.compile_ahead(kernel, arch, head_dim=32))


def compiled_bad_block():
    """The gate can fail: half the warps for the same block spill."""
    made = attention_triton.compile_ahead(attention_triton.forward_kernel, 90, tile=(128, 64, 4, 2))
    with pytest.raises(AssertionError):
        no_spills(90, made)


def test_kernels_where_none_can_run():
    """impl="triton" without a GPU or without Triton warns once and computes; TRITON_INTERPRET set late is an error."""
    q = torch.randn(5, 2, 16)
    with pytest.warns(UserWarning, match="no GPU"):
        got = attention(q, q, q, [0, 5], [0, 5], impl="triton")
    assert torch.equal(got, attention(q, q, q, [0, 5], [0, 5]))
    with pytest.raises(ValueError, match="float64"):
        attention(q.double(), q.double(), q.double(), [0, 5], [0, 5], impl="triton")
    with pytest.raises(ValueError, match="heads of 130"):
        attention(*[torch.randn(5, 2, 130)] * 3, [0, 5], [0, 5], impl="triton")
    start = "import os, sys, torch; q = torch.randn(5, 2, 16); call = lambda: attention(q, q, q, [0, 5], [0, 5], impl='triton'); "
    late = "import triton; os.environ['TRITON_INTERPRET'] = '1'; from attention_triton import attention; call()"
    later = "from attention_triton import attention; os.environ['TRITON_INTERPRET'] = '1'; call()"
    without = "sys.modules['triton'] = None; from attention_triton import attention; print(len(call()), len(call()))"
    run = lambda code: subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(__file__)),
                                      env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"})
    for code in (late, later):
        assert "RuntimeError: TRITON_INTERPRET was changed after triton had been imported" in run(code).stderr
    done = run(without)
    assert done.stdout == "5 5\n" and done.stderr.count("UserWarning: Triton is not installed") == 1


# --- model ----------------------------------------------------------------------------------------------------------

def small(seed=0, **changes):
    """A small random Llama in float64."""
    config = LlamaConfig(**dict(vocab_size=61, n_layer=3, n_head=6, n_kv_head=2, n_embd=24, n_ff=40, head_dim=8) | changes)
    return Llama(config).double().init_weights(seed)


def slow_llama(model, tokens, visible=None):
    """The definition in float64, a query head at a time: complex RoPE, explicit mask. visible (n_layer, n_kv_head, N, N)."""
    c, p, n = model.config, {k: v.double() for k, v in model.named_parameters()}, len(tokens)
    turn = torch.polar(torch.ones(n, c.head_dim // 2, dtype=torch.double),
                       torch.outer(torch.arange(n), rope_frequencies(c).double()))
    rope = lambda x: torch.cat([*(torch.view_as_real(torch.complex(*x.chunk(2, -1)) * turn).unbind(-1))], -1)
    norm = lambda x, w: w * x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt()
    x = p["model.embed_tokens.weight"][tokens]
    for i in range(c.n_layer):
        w = lambda name: p[f"model.layers.{i}.{name}.weight"]
        y, heads = norm(x, w("input_layernorm")), []
        for h in range(c.n_head):
            g = h // (c.n_head // c.n_kv_head)
            part = lambda name, j: y @ w(f"self_attn.{name}")[j * c.head_dim:(j + 1) * c.head_dim].T
            q, k, v = rope(part("q_proj", h)), rope(part("k_proj", g)), part("v_proj", g)
            see = torch.ones(n, n, dtype=torch.bool).tril() if visible is None else visible[i, g]
            heads.append((q @ k.T / c.head_dim ** 0.5).masked_fill(~see, -torch.inf).softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ w("self_attn.o_proj").T
        y = norm(x, w("post_attention_layernorm"))
        gate, up = y @ w("mlp.gate_proj").T, y @ w("mlp.up_proj").T
        x = x + (gate * torch.sigmoid(gate) * up) @ w("mlp.down_proj").T
    return norm(x, p["model.norm.weight"]) @ p.get("lm_head.weight", p["model.embed_tokens.weight"]).T


SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}


@pytest.mark.parametrize("changes", [{}, dict(n_kv_head=6), dict(n_kv_head=1, tie_embeddings=True), dict(head_dim=6),
                                     dict(rope_scaling=SCALING), dict(rope_scaling={"rope_type": "linear", "factor": 4.0})])
def test_llama_equals_its_definition(changes):
    model = small(**changes)
    tokens = torch.randint(61, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(model(tokens), slow_llama(model, tokens), 1e-6)  # angles are float32, as in the reference implementation


def test_llama3_rope_scaling_follows_the_published_code():
    config = small(head_dim=64, rope_base=5e5, rope_scaling=SCALING | {"original_max_position_embeddings": 8192}).config
    for i, got in enumerate(rope_frequencies(config).tolist()):
        freq = 5e5 ** (-2 * i / 64)
        length = 2 * math.pi / freq
        if length > 8192 / 1.0:
            want = freq / 8.0
        elif length < 8192 / 4.0:
            want = freq
        else:
            smooth = (8192 / length - 1.0) / (4.0 - 1.0)
            want = (1 - smooth) * freq / 8.0 + smooth * freq
        assert abs(got - want) <= 2e-6 * want


def test_cross_entropy_value_and_gradients(monkeypatch):
    """Against torch's, over several blocks of rows and of words, with ignored targets (one block wholly so) and with weights."""
    monkeypatch.setattr(model_file.CrossEntropy, "BLOCK", 1600)  # 48 rows, 25 words at a time
    rng = torch.Generator().manual_seed(0)
    n = 2 * 1024 + 300
    hidden, head = (torch.randn(s, 16, generator=rng, dtype=torch.float64, requires_grad=True) for s in (n, 33))
    targets = torch.randint(33, (n,), generator=rng)
    targets[torch.rand(n, generator=rng) < 0.2] = -100
    targets[1024:2048] = -100
    weights = torch.rand(n, generator=rng, dtype=torch.float64)
    for w in (None, weights):
        each = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="none")
        used = (targets != -100).double() * (1 if w is None else w)
        want, got = (each * used).sum() / used.sum(), cross_entropy(hidden, head, targets, w)
        close(got, want, 1e-12)
        for a, b in zip(torch.autograd.grad(3 * got, (hidden, head)), torch.autograd.grad(3 * want, (hidden, head))):
            close(a, b, 1e-12)
    with pytest.raises(ValueError, match="no target"):
        cross_entropy(hidden, head, torch.full((n,), -100))
    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    first, = torch.autograd.grad(cross_entropy(hidden, head, targets), hidden, one, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # a second derivative would be wrong in silence
        first.sum().backward()


def test_loaded_weights_that_lie_together_change_nothing(tmp_path):
    """A loaded model takes one product for q, k, v and for gate, up where there is no gradient: the same logits as with gradients,
    in one row as in many, under autocast too, and after its weights were moved or replaced."""
    save_model(small().float(), tmp_path)
    model, tokens = load_model(tmp_path), torch.arange(30) % 20
    block = model.model.layers[0]
    with_gradient = model(tokens).detach()
    for rows in (30, 1):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                want = model(tokens[:rows]).float().detach()
                with torch.no_grad():
                    assert model_file.stacked(block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj).shape[0] == \
                        (model.config.n_head + 2 * model.config.n_kv_head) * model.config.head_dim
                    close(model(tokens[:rows]).float(), want, 0.1 if autocast else 1e-5)
    with torch.no_grad():
        block.mlp.up_proj.weight.mul_(2)
        changed = model(tokens)
        assert not torch.allclose(changed, with_gradient, atol=1e-4)
        block.mlp.up_proj.weight = torch.nn.Parameter(block.mlp.up_proj.weight / 2)
        assert model_file.stacked(block.mlp.gate_proj, block.mlp.up_proj) is None
        close(model(tokens), with_gradient, 1e-5)


def test_rows_a_block_at_a_time_change_nothing(monkeypatch):
    model, tokens = small(), torch.arange(30) % 20
    weights = [*model.parameters()]
    want, want_grads = model(tokens).detach(), torch.autograd.grad(model.loss(tokens[:-1], tokens[1:]), weights)
    monkeypatch.setattr(model_file.RMSNorm, "ROWS", 7)
    monkeypatch.setattr(model_file.MLP, "ROWS", 8)
    with torch.no_grad():
        close(model(tokens), want, 1e-12)
        close(model(tokens[:1]), want[:1], 1e-12)
    for got, right in zip(torch.autograd.grad(model.loss(tokens[:-1], tokens[1:]), weights), want_grads):
        close(got, right, 1e-12)


def test_packed_documents_equal_separate_ones():
    """Without resetting RoPE positions, in full and in streaming mode (a sink per document); no label across documents."""
    model, rng = small(), torch.Generator().manual_seed(0)
    docs = [torch.randint(61, (n,), generator=rng) for n in (17, 1, 30)]
    batch = train.collate(docs)
    assert [int(t) for t in batch.targets[batch.cu_seqlens[1:].long() - 1]] == [-100] * 3
    heads = torch.rand(3, 2, generator=rng) < 0.5
    with torch.no_grad():
        for attend in (model_file.causal, lambda cu: prulong.by_mask(heads, cu, 3, 5)):
            packed = model(batch.tokens, attend(batch.cu_seqlens))
            close(packed, torch.cat([model(d, attend([0, len(d)])) for d in docs]), 1e-6)
        close(model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens),
              torch.nn.functional.cross_entropy(model(batch.tokens, model_file.causal(batch.cu_seqlens)), batch.targets), 1e-6)


def test_checkpointing_changes_no_gradient():
    model = small()
    tokens = torch.randint(61, (33,), generator=torch.Generator().manual_seed(0))
    z = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    grads = []
    for model.checkpointing in (False, True):
        loss = model.loss(tokens[:-1], tokens[1:], prulong.gated(z, [0, 20, 32], 2, 5))
        grads.append(torch.autograd.grad(loss, [z, *model.parameters()]))
    for a, b in zip(*grads):
        close(a, b, 1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 7, 20, None])
def test_greedy_with_cache_equals_without(chunk):
    model = small()
    prompt = torch.randint(61, (20,), generator=torch.Generator().manual_seed(0))
    want = prompt.tolist()
    with torch.no_grad():
        for _ in range(12):
            want.append(int(model(torch.tensor(want))[-1].argmax()))
    cache = KVCache(model)
    assert generate(model, prompt, 12, cache, chunk) == want[20:]
    assert cache.footprint() == 1 and cache.peak() == 1 and cache.seen == 31  # the last new token is not fed back
    assert cache.positions(1, 1).tolist() == list(range(31))
    entries = 31 * 3 * 2
    assert entries * 2 * 8 * 8 <= cache.nbytes() <= 1.02 * entries * 2 * 8 * 8
    assert generate(model, prompt, 12, chunk=chunk, stop_ids=(want[24], 999)) == want[20:want.index(want[24], 20)]


def test_cache_that_drops_entries_equals_the_masked_model():
    """A cache that keeps random entries, another number for each head: logits equal the dense model's under the mask of
    what was visible, positions and log say what was held."""
    model, rng = small(), torch.Generator().manual_seed(0)
    tokens = torch.randint(61, (40,), generator=rng)
    visible = torch.zeros(3, 2, 40, 40, dtype=torch.bool)

    class Forgetful(KVCache):
        def evict(self, layer, q, k, v):
            kept = [torch.rand(len(self.positions(layer, h)), generator=rng).lt(0.6).nonzero()[:, 0] for h in range(2)]
            self.keep(layer, [k[:4] for k in kept] if self.seen > 25 else kept)  # equal numbers: one slab again

    cache, logits, start = Forgetful(model), [], 0
    for n in (9, 1, 1, 13, 6, 1, 9):
        before = [[cache.positions(i, h) for h in range(2)] for i in range(3)]
        with torch.no_grad():
            logits.append(model(tokens[start:start + n], cache.attend, cache.next_positions(n)))
        for i in range(3):
            for h in range(2):
                visible[i, h, start:start + n, before[i][h]] = True
                visible[i, h, start:start + n, start:start + n] = torch.ones(n, n, dtype=torch.bool).tril()
                assert set(cache.positions(i, h).tolist()) <= {*before[i][h].tolist(), *range(start, start + n)}
                assert cache.log[-1][1][i, h] == len(before[i][h])
        start += n
    close(torch.cat(logits), slow_llama(model, tokens, visible), 1e-6)
    assert cache.footprint() == Fraction(int(visible.sum()), 3 * 2 * 40 * 41 // 2)


def test_sampling():
    rng = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = torch.tensor([model_file.pick(logits, 1.0, 0.7, rng) for _ in range(4000)]).bincount(minlength=4) / 4000
    close(drawn, torch.tensor([0.625, 0.375, 0, 0]), 0.03)  # .5 < .7 keeps the second, which crosses
    assert model_file.pick(logits, 1.0, 1e-9, rng) == model_file.pick(logits, 0.0, 1.0) == 0


# --- loading and saving -----------------------------------------------------------------------------------------------

HF = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40,
      "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6,
      "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu"}


def test_config_spellings():
    assert LlamaConfig.from_hf(HF) == small().config == LlamaConfig.from_hf(small().config.to_hf())
    assert LlamaConfig.from_hf(HF | {"head_dim": None}).head_dim == 4
    older = LlamaConfig.from_hf(HF | {"rope_theta": 5e5, "rope_scaling": SCALING})
    newer = LlamaConfig.from_hf({k: v for k, v in HF.items() if k != "rope_theta"} | {"rope_parameters": SCALING | {"rope_theta": 5e5}})
    assert older == newer and older.rope_scaling["factor"] == 8.0
    assert LlamaConfig.from_hf(HF | {"rope_scaling": {"type": "default"}}).rope_scaling is None
    for change, words in (({"architectures": ["MistralForCausalLM"]}, "architecture"), ({"attention_bias": True}, "attention_bias"),
                          ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"), ({"hidden_act": "gelu"}, "hidden_act"),
                          ({"num_key_value_heads": 4}, "evenly"), ({"vocab_size": None}, "vocab_size"),
                          ({"hidden_size": "24"}, "hidden_size"), ({"num_hidden_layers": -1}, "num_hidden_layers"),
                          ({"quantization_config": {"bits": 4}}, "quantization"),
                          ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor")):
        with pytest.raises(ValueError, match=words):
            LlamaConfig.from_hf(HF | change)


def test_any_config_json_loads_or_names_the_field():
    """Every field replaced by values of every kind: a config or a ValueError, at once."""
    odd = [None, True, "x", "", -1, 0, 2.5, 10 ** 30, 1e300, math.nan, math.inf, [], [1], {}, {"a": 1}, {"rope_type": ["x"]},
           {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4, "original_max_position_embeddings": 9},
           {"rope_theta": [1]}, {"rope_theta": -5}]
    for field in [*HF, "rope_scaling", "rope_parameters", "attention_bias", "bos_token_id", "eos_token_id", "max_position_embeddings"]:
        for value in odd:
            try:
                assert isinstance(LlamaConfig.from_hf(HF | {field: value}), LlamaConfig)
            except ValueError:
                pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", [5_000_000_000, 4000])
def test_save_and_load(tmp_path, dtype, shard):
    model = small(tie_embeddings=shard == 4000).to(dtype)
    save_model(small(), tmp_path)  # an earlier save of another size must not shine through
    save_model(model, tmp_path, max_shard_bytes=shard)
    files = {p.name for p in tmp_path.glob("*.safetensors")}
    index = tmp_path / "model.safetensors.index.json"
    assert files == ({*json.loads(index.read_text())["weight_map"].values()} if shard == 4000 else {"model.safetensors"})
    assert len(files) > 1 or shard > 4000
    again = load_model(tmp_path, dtype=dtype)
    assert again.config == model.config
    for (name, a), (name_, b) in zip(model.named_parameters(), again.named_parameters()):
        assert name == name_ and torch.equal(a, b) and b.dtype == dtype
    assert not list(tmp_path.glob("*.part"))


def test_loading_names_what_is_wrong(tmp_path):
    model, file = small(), tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_model(tmp_path / "nowhere")
    save_model(model, tmp_path)
    good, tensors = file.read_bytes(), dict(model.named_parameters())

    def broken(change, words, kind=ValueError):
        file.write_bytes(good)
        change()
        with pytest.raises(kind, match=words):
            load_model(tmp_path)

    rewrite = lambda **new: save_file({k: v for k, v in ({**tensors, **{k.replace("__", "."): v for k, v in new.items()}}).items()
                                       if v is not None}, file)
    broken(lambda: file.write_bytes(good[:len(good) // 2]), "whole safetensors")
    broken(lambda: file.write_bytes(b"\xff" * 8 + good[8:]), "whole safetensors")
    broken(lambda: file.write_bytes(b""), "whole safetensors")
    broken(lambda: rewrite(model__norm__weight=None), "missing, such as model.norm.weight")
    broken(lambda: rewrite(model__extra__weight=torch.ones(2)), "unexpected tensor model.extra.weight")
    broken(lambda: rewrite(model__norm__weight=torch.ones(25)), r"model.norm.weight has shape \(25,\), want \(24,\)")
    broken(lambda: rewrite(model__norm__weight=torch.ones(24, dtype=torch.int8)), "int8")
    broken(file.unlink, "neither", FileNotFoundError)
    index = tmp_path / "model.safetensors.index.json"
    broken(lambda: (file.unlink(), index.write_text('{"weight_map": {"a": "../../secret.safetensors"}}')), "must name files of this folder")
    broken(lambda: (file.unlink(), index.write_text('{"weight_map": {"a": "gone.safetensors"}}')), "gone", FileNotFoundError)
    config = tmp_path / "config.json"
    broken(lambda: config.write_text(json.dumps({k: v for k, v in HF.items() if k != "hidden_size"})), "config.json: field 'hidden_size' is missing")
    broken(lambda: config.write_text('{"vocab_size": 61,'), "config.json: not valid JSON")
    broken(lambda: config.write_text("[]"), "JSON object")


def test_tokens_outside_the_vocabulary():
    for bad in ([3, 61], [-1, 3]):
        with pytest.raises(ValueError, match="outside the vocabulary of 61"):
            generate(small(), bad, 1)
    with pytest.raises(ValueError, match="no tokens"):
        generate(small(), [], 1)


# --- tokenizer --------------------------------------------------------------------------------------------------------

def made_tokenizer(folder, digits=True, seed=0):
    """A byte-level BPE tokenizer.json learned on a little text: ids in random order, a few special tokens among them."""
    text = " the cat sat on the mat. 1 2 33 444 don't we'll  and\n\n  then\tsome   more 12345 théâtre" * 3
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in letters} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letters)}
    words = [[letters[b] for b in w.encode()] for w in text.replace(" ", "\0 ").split("\0")]
    merges = []
    for _ in range(60):
        pairs = {}
        for w in words:
            for pair in zip(w, w[1:]):
                pairs[pair] = pairs.get(pair, 0) + 1
        if not pairs:
            break
        best = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(best)
        words = [slow_merge(w, [best]) for w in words]
    tokens = ["<|im_start|>", "<|im_end|>", *letters.values(), *("".join(m) for m in merges)]
    ids = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed)).tolist()
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps({
        "added_tokens": [{"id": ids[i], "content": tokens[i]} for i in (0, 1)], "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]} if digits else level,
        "model": {"type": "BPE", "vocab": dict(zip(tokens, ids)), "merges": [" ".join(m) for m in merges]}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}))
    return letters, merges, dict(zip(tokens, ids))


def slow_merge(symbols, merges):
    """BPE by its definition: the earliest rule that applies anywhere, everywhere it applies, left to right."""
    symbols = list(symbols)
    while True:
        at = [merges.index(p) for p in zip(symbols, symbols[1:]) if p in merges]
        if not at:
            return symbols
        rule, out = merges[min(at)], []
        while symbols:
            out.append(symbols[0] + symbols[1] if tuple(symbols[:2]) == rule else symbols[0])
            symbols = symbols[len(rule) if tuple(symbols[:2]) == rule else 1:]
        symbols = out


@pytest.mark.parametrize("digits", [True, False])
def test_tokenizer_json_equals_bpe_by_its_definition(tmp_path, digits):
    """Digits are cut out first, the GPT-2 pattern then sees what lies between; here with Python's re on ASCII letters."""
    letters, merges, ids = made_tokenizer(tmp_path, digits)
    tokenizer = load_tokenizer(tmp_path)
    pattern = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z\u00e0-\u00ff]+| ?[0-9]+| ?[^\sA-Za-z0-9\u00e0-\u00ff]+|\s+(?!\S)|\s+")
    random = np.random.default_rng(0)
    alphabet = list("the catson m.12345'dlwer\n\t  ") + ["é", "â", "'ll", "the", "  ", "\n\n"]
    for _ in range(300):
        text = "".join(random.choice(alphabet, int(random.integers(0, 30))))
        parts = re.split("([0-9])", text) if digits else [text]
        want = [ids[s] for part in parts for piece in pattern.findall(part) for s in slow_merge([letters[b] for b in piece.encode()], merges)]
        assert tokenizer.encode(text) == want, repr(text)
        assert tokenizer.decode(want) == text
    assert tokenizer.encode("a<|im_end|>b")[1] == tokenizer.eos_ids[0] == ids["<|im_end|>"]
    assert tokenizer.bos_id == ids["<|im_start|>"] and not tokenizer.add_bos
    assert tokenizer.chat([{"role": "user", "content": "hi"}]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode([99999]) == "\ufffd"


def test_llama3_tokenizer_model(tmp_path):
    tokens = [bytes([b]) for b in range(256)] + [b"he", b"ll", b"hell", b"hello", b" w"]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(base64.b64encode(t) + f" {i}\n".encode() for i, t in enumerate(tokens)))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hello w1234") == [259, 260, *b"1234"] and tokenizer.decode([259, 260]) == "hello w"
    assert len(tokenizer.special) == 256 and tokenizer.special["<|eot_id|>"] == len(tokens) + 9
    text = tokenizer.chat([{"role": "system", "content": " be brief "}, {"role": "user", "content": "hello"}])
    assert text == ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
                    "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert tokenizer.encode(text)[:2] == [len(tokens), len(tokens) + 6]
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00")
    with pytest.raises(ValueError, match="SentencePiece"):
        load_tokenizer(tmp_path)


def test_chat_templates_and_odd_tokenizers(tmp_path):
    made_tokenizer(tmp_path)
    for template, system in (("{{ '<|im_start|>system\\nnever lie<|im_end|>\\n' }}", "never lie"), ("<|im_start|>system\nnow<|im_end|>", "now"),
                             ("'<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>'", None)):
        (tmp_path / "chat_template.jinja").write_text(template)
        assert load_tokenizer(tmp_path).system == system
    good = json.loads((tmp_path / "tokenizer.json").read_text())
    split = lambda pattern: {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, {"type": "ByteLevel", "use_regex": False}]}}
    for change in ({"added_tokens": [{"id": "5", "content": "x"}]}, {"added_tokens": [{"id": 5, "content": ""}]},
                   {"added_tokens": [{"id": 5, "content": 5}]},
                   {"added_tokens": [{"id": 5, "content": "aa"}, {"id": 6, "content": "aaa"}]}, split(5), split("(")):
        (tmp_path / "tokenizer.json").write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match="tokenizer.json"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(good | split("a+")))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("xaay")) == "xaay"  # what the pattern leaves out is not lost


def test_byte_tokenizer_and_broken_files(tmp_path):
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 10] and tokenizer.decode([0xC3, 0xA9]) == "é" and tokenizer.bos_id == 256
    (tmp_path / "config.json").write_text('{"vocab_size": 256}')
    assert load_tokenizer(tmp_path).bos_id is None
    for text, words in (('{"model": {"type": "WordPiece"}}', "byte-level BPE"), ("{}", "unexpected content"), ("{", "JSON"),
                        ('{"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": {"type": "Metaspace"}}', "Metaspace")):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            load_tokenizer(tmp_path)


# --- PruLong and DuoAttention -------------------------------------------------------------------------------------------

def test_hard_concrete_gates():
    """Monte Carlo against the closed forms and the official code's table; the gradient lives only where 0 < z < 1."""
    rng = torch.Generator().manual_seed(0)
    for value, zero, mean in ((-4.0, 0.917, 0.024), (0.0, 0.168, 0.504), (4.0, 0.0037, 0.977)):
        log_alpha = torch.full((200_000,), value, requires_grad=True)
        z = prulong.draw_gates(log_alpha, torch.rand(200_000, generator=rng).clamp(1e-6, 1 - 1e-6))
        assert 0 <= z.min() and z.max() <= 1
        assert abs((z == 0).float().mean() - zero) < 0.005 and abs(z.mean() - mean) < 0.005
        assert abs((z > 0).float().mean() - prulong.probability_open(torch.tensor(value))) < 0.005
        assert abs((z == 1).float().mean() - torch.sigmoid(torch.tensor(value - 1.5986))) < 0.005
        grad, = torch.autograd.grad(z.sum(), log_alpha)
        assert torch.equal(grad != 0, (z > 0) & (z < 1))


def test_gates_at_their_ends():
    """z = 1 is the plain model, z = 0 the streaming one, any z is plain when the window sees all; a hard mask that runs
    each head once equals the same gates mixed; gates per document touch their document only. GQA groups 1, 2, 3."""
    rng = torch.Generator().manual_seed(0)
    for n_head, n_kv_head in ((3, 3), (4, 2), (6, 2)):
        model = small(n_head=n_head, n_kv_head=n_kv_head)
        cu, shape = [0, 26, 40], (3, n_kv_head)
        tokens = torch.randint(61, (40,), generator=rng)
        run = lambda attend: model(tokens, attend)
        with torch.no_grad():
            plain = run(model_file.causal(cu))
            close(run(prulong.gated(torch.ones(shape), cu, 2, 5)), plain, 1e-12)
            close(run(prulong.gated(torch.rand(shape, generator=rng), cu, 2, 26)), plain, 1e-12)
            mask = torch.rand(shape, generator=rng) < 0.5
            close(run(prulong.gated(mask.double(), cu, 2, 5)), run(prulong.by_mask(mask, cu, 2, 5)), 1e-12)
            close(run(prulong.gated(torch.zeros(shape), cu, 2, 5)), run(prulong.by_mask(torch.zeros(shape) > 0, cu, 2, 5)), 1e-12)
            each = torch.stack((mask, ~mask)).double()
            got = run(prulong.gated(each, cu, 2, 5))
            close(got[:26], run(prulong.by_mask(mask, cu, 2, 5))[:26], 1e-12)
            close(got[26:], run(prulong.by_mask(~mask, cu, 2, 5))[26:], 1e-12)


def test_a_gate_moves_exactly_its_query_heads():
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(30, h, 8, generator=rng) for h in (6, 2, 2))
    z = torch.full((1, 2), 0.5)
    before = prulong.gated(z, [0, 30], 1, 4)(0, q, k, v)
    z[0, 1] = 0.7
    moved = (prulong.gated(z, [0, 30], 1, 4)(0, q, k, v) - before).abs().amax((0, 2)) > 0
    assert moved.tolist() == [False] * 3 + [True] * 3


def test_streaming_is_what_a_trimmed_cache_sees():
    """Token by token with a cache that keeps sink + window - 1 entries in streaming heads: equal to `split` at full length."""
    model, sink, window = small(), 3, 6
    mask = torch.tensor([[True, False], [False, False], [False, True]])
    tokens = torch.randint(61, (40,), generator=torch.Generator().manual_seed(0))

    class Trimmed(KVCache):
        def evict(self, layer, q, k, v):
            held = [self.positions(layer, h) for h in range(2)]
            next_ = self.seen + 1
            self.keep(layer, [(torch.ones_like(p, dtype=torch.bool) if full else (p < sink) | (p > next_ - window)).nonzero()[:, 0]
                              for p, full in zip(held, mask[layer])])

    cache = Trimmed(model)
    with torch.no_grad():
        steps = [model(t[None], cache.attend, cache.next_positions(1)) for t in tokens]
        close(torch.cat(steps), model(tokens, prulong.by_mask(mask, [0, 40], sink, window)), 1e-12)
    assert [len(cache.positions(i, h)) for i in range(3) for h in range(2)] == [40, 8, 8, 8, 8, 40]
    assert abs(train.streaming_footprint(mask, 40, sink, window) - float(cache.footprint())) < 1e-12


def test_lagrangian():
    """Descended by the gates, ascended by the multipliers: on a toy with known benefits the best heads survive at the target."""
    gates = prulong.Gates(2, 3, 2.0, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(gates.param_groups(0.1, 0.0))
    sparsity, target = torch.tensor(0.2), 0.5
    gates.penalty(sparsity, target).backward()
    close(gates.multipliers.grad, torch.tensor([-0.3, 0.09]), 1e-6)
    optimizer.step()
    assert gates.multipliers[0] < 0 < gates.multipliers[1]

    log_alpha, multipliers = prulong.toy(steps=400, seed=0)
    assert prulong.discretise(log_alpha, 0.75).flatten().nonzero()[:, 0].tolist() == [0, 1, 2]
    assert abs(1 - prulong.probability_open(log_alpha).mean() - 0.75) < 0.08


def test_target_schedule():
    config = prulong.Config(target_sparsity=0.7, start_sparsity=0.1)
    at = [prulong.target_at(step, 50, config) for step in range(50)]
    assert at[0] == 0.1 and abs(at[20] - 0.4) < 1e-12 and at[40:] == [0.7] * 10 and at == sorted(at)


def test_discretise_and_mask_files(tmp_path):
    rng = torch.Generator().manual_seed(0)
    scores = torch.randn(32, 8, generator=rng)
    mask = prulong.discretise(scores, 0.7)
    assert mask.sum() == 76 and scores[mask].min() >= scores[~mask].max()  # int(256 * .3)
    assert prulong.discretise(torch.zeros(9, 10), 0.9).flatten().nonzero()[:, 0].tolist() == list(range(9))
    assert prulong.discretise(scores, 0).all() and not prulong.discretise(scores, 1).any()
    path = tmp_path / "masks.tsv"
    prulong.save_heads(path, mask)
    assert path.read_text().splitlines()[0].split("\t") == [f"{float(x):.1f}" for x in mask[0]]
    assert torch.equal(prulong.load_heads(path), mask) and torch.equal(prulong.load_heads(path, 0.7), mask)
    with pytest.raises(ValueError, match="finished mask"):
        prulong.load_heads(path, 0.3)
    duo = scores.double().clamp(-0.2, 1)
    np.savetxt(path, duo.numpy(), delimiter="\t")  # DuoAttention's files: %.18e, values a little outside [0, 1]
    assert torch.equal(prulong.load_heads(path), duo > 0.5)
    half = prulong.load_heads(path, 0.5)
    assert half.sum() == 128 and duo[half].min() >= duo[~half].clamp(0, 1).max()
    for text, line in (("1.0\t0.0\n1.0\n", "line 2"), ("1.0\tx\n", "line 1"), ("1.0\tnan\n", "line 1"), ("", "no rows")):
        path.write_text(text)
        with pytest.raises(ValueError, match=line):
            prulong.load_heads(path)


def test_duo_loss():
    """Open gates cost nothing but the price; a head whose streaming branch sees all feels only the price; gates stay in [0, 1]."""
    model = small()
    tokens = torch.randint(61, (20,), generator=torch.Generator().manual_seed(0))
    batch = train.collate([tokens])
    for teacher_branch in (False, True):
        for window, only_price in ((19, True), (5, False)):
            duo = prulong.Duo(model, prulong.DuoConfig(sink=1, window=window, teacher_branch=teacher_branch), 0)
            duo.a.data += 0.3
            loss, metrics = duo.loss(model, batch, 0, 1)
            assert metrics["distance"] == 0 and abs(loss.item() - 0.05) < 1e-7 and duo.a.max() == 1
            duo.a.data -= 0.25
            grad, = torch.autograd.grad(duo.loss(model, batch, 0, 1)[0], duo.a)
            assert torch.allclose(grad, torch.full((3, 2), 0.05 / 6), atol=1e-9) == only_price


def test_passkeys():
    rng = np.random.default_rng(0)
    tokenizer = model_file.byte_tokenizer()
    haystack = np.frombuffer(b"x" * 4000, dtype=np.uint8)
    tokens, targets = prulong.passkeys(tokenizer, haystack, 3000, rng, needles=3, words=4)
    text = tokenizer.decode(tokens.tolist())
    assert len(tokens) == len(targets) == 3000
    body, tail = text[:text.index("\nBased")], text[text.index("\nBased"):]
    for ordinal in ("first", "second", "third"):
        key = re.search(f"{ordinal} passkey to the vault\\?\nPasskey: ([a-z ]+)", tail)[1]
        assert len(key.split()) == 4 and f"{ordinal} passkey to the vault: {key}\n" in body
    assert tokenizer.decode(targets[targets != -100].tolist()) == tail and targets[-1] == -100
    with pytest.raises(ValueError, match="too short"):
        prulong.passkeys(tokenizer, haystack, 500, rng, needles=10)


def test_weights_learn_under_frozen_masks(tmp_path):
    prulong.save_heads(tmp_path / "heads.tsv", torch.eye(3, 2) > 0)
    model = small()
    method = prulong.PruLong(model, prulong.Config(train="weights", heads=str(tmp_path / "heads.tsv"), sink=1, window=4), 0)
    batch = train.collate([torch.arange(20)])
    loss, _ = method.loss(model, batch, 0, 1)
    close(loss, model.loss(batch.tokens, batch.targets, prulong.by_mask(torch.eye(3, 2) > 0, batch.cu_seqlens, 1, 4)), 1e-12)
    loss.backward()
    assert method.gates.log_alpha.grad is None and not method.param_groups() and model.model.norm.weight.grad is not None
    with pytest.raises(ValueError, match="--heads"):
        prulong.Config(train="weights")
    with pytest.raises(ValueError, match="the model has"):
        prulong.PruLong(small(n_layer=2), prulong.Config(heads=str(tmp_path / "heads.tsv")), 0)


# --- fact stream, data, training --------------------------------------------------------------------------------------

@pytest.mark.parametrize("queries_last", [False, True])
def test_fact_stream(queries_last):
    facts = eval_tasks.fact_stream(np.random.default_rng(0), 4, 128, 10, 12, queries_last)
    tokens, targets = facts.batch.tokens.tolist(), facts.batch.targets.tolist()
    assert len(facts.query) == 48
    for query, fact, start in zip(facts.query.tolist(), facts.fact.tolist(), facts.start.tolist()):
        key, value = tokens[query] - eval_tasks.QUERY, tokens[query + 1] - eval_tasks.ANSWER
        assert start < fact < query < start + 128 and tokens[start] == eval_tasks.BOS and targets[query] == tokens[query + 1]
        assert tokens[fact] - eval_tasks.FACT == key * eval_tasks.N_VALUE + value
        assert not queries_last or query >= start + 128 - 24
    tables = eval_tasks.filler_tables()
    filler = [t for t in tokens[:128] if eval_tasks.FILLER <= t < eval_tasks.FACT]
    for a, b, c in zip(filler, filler[1:], filler[2:]):
        assert c - 1 in tables[0][b - 1] or c - 1 in tables[1][a - 1]
    far = facts.far(20, 2)
    assert far.tolist() == [q - f >= 20 and f - s >= 2 for q, f, s in zip(*(x.tolist() for x in (facts.query, facts.fact, facts.start)))]
    with pytest.raises(ValueError, match="do not fit"):
        eval_tasks.fact_stream(np.random.default_rng(0), 1, 20, 10, 12)


def test_topics_are_told_once_and_asked_for_later():
    """Without topic, cues and words a stream is the fact stream; what is far is counted by hand."""
    plain = eval_tasks.fact_stream(np.random.default_rng(4), 6, 200, 10, 24)
    facts, cues = eval_tasks.with_topic(np.random.default_rng(5), plain, 7)
    tokens, topics = facts.batch.tokens.view(6, 215), set()
    kept = (tokens < eval_tasks.TOPIC)
    assert torch.equal(tokens[kept], plain.batch.tokens) and torch.equal(facts.batch.tokens[facts.query], plain.batch.tokens[plain.query])
    assert torch.equal(facts.batch.tokens[facts.fact], plain.batch.tokens[plain.fact]) and facts.batch is cues.batch
    assert torch.equal(facts.batch.targets[facts.query], plain.batch.targets[plain.query])
    for s, row in enumerate(tokens.tolist()):
        (told,) = [i for i, x in enumerate(row) if eval_tasks.TOPIC <= x < eval_tasks.CUE]
        asked = [i for i, x in enumerate(row) if x == eval_tasks.CUE]
        assert 8 < told <= 50 and len(asked) == 7 and told < asked[0]
        assert [row[i + 1] - eval_tasks.WORD for i in asked] == [row[told] - eval_tasks.TOPIC] * 7
        mine = slice(7 * s, 7 * s + 7)
        assert cues.query[mine].tolist() == [215 * s + i for i in asked]
        assert cues.fact[mine].tolist() == [215 * s + i for i in (told, *(i + 1 for i in asked[:-1]))]
        topics.add(row[told])
    assert len(topics) > 1
    weights, targets = facts.batch.weights, facts.batch.targets
    assert ((weights == 1) == (targets >= eval_tasks.WORD) | (targets >= eval_tasks.ANSWER) & (targets < eval_tasks.TOPIC)).all()
    assert not weights[(targets == eval_tasks.CUE) | (targets >= eval_tasks.TOPIC) & (targets < eval_tasks.CUE)].any()
    passkeys = train.FactData(128, 2, topics=True).passkeys(np.random.default_rng(0), 10, 32)
    assert (passkeys.targets >= eval_tasks.ANSWER).sum() == 20 and passkeys.targets.max() < eval_tasks.TOPIC
    assert (passkeys.tokens == eval_tasks.CUE).sum() == 4


class Near(train.LM):
    """A method from elsewhere: every layer sees 4 tokens."""

    def attend(self, cu_seqlens):
        cu_seqlens = cu_seqlens.tolist()
        return lambda layer, q, k, v: attention(q, k, v, cu_seqlens, cu_seqlens, window=4)


def test_main_takes_methods_from_elsewhere(tmp_path, monkeypatch, capsys):
    """Its attention is used in training and in the score."""
    monkeypatch.chdir(tmp_path)
    model = eval_tasks.tiny_start(0)
    save_model(model, "out/tiny-seed0")
    train.main("--method near --data facts --seq_len 64 --batch 2 --steps 2 --lr 0 --eval_seqs 2".split(), train.METHODS | {"near": (Near, None)})
    rows = [json.loads(line) for line in open("out/near/log.jsonl")]
    batch = train.FactData(64, 2).batch(np.random.default_rng([0, 0, 0]))
    slow = lambda cu: lambda layer, q, k, v: slow_attention(q, k, v, cu.tolist(), cu.tolist(), window=4)[0].to(q.dtype)
    near = model.loss(batch.tokens, batch.targets, slow(batch.cu_seqlens), weights=batch.weights)
    assert rows[1]["loss"] == pytest.approx(near.item(), abs=1e-6) and rows[1]["loss"] != pytest.approx(
        model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, weights=batch.weights).item(), abs=1e-6)
    facts = eval_tasks.fact_stream(np.random.default_rng([0, 2 ** 31]), 2, *eval_tasks.CURRICULUM[-1][:3])
    want = eval_tasks.recall(model, facts, slow(facts.batch.cu_seqlens))
    assert rows[-1]["before"] == rows[-1]["after"] == pytest.approx(want) and rows[-1]["score"] == "recall"
    with pytest.raises(ValueError, match="'near' is none of lm, "):
        train.main(["--method", "near"])


def test_two_skills_are_scored_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(eval_tasks.tiny_start(0, eval_tasks.TOPICAL), tmp_path / "out" / "topics-seed0")
    train.main("--method prulong --data topics --steps 2 --eval_seqs 2 --n_random 2".split())
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["heads"] for row in out["rows"]] == ["full cache", "prulong", "duo", "random, mean of 2"]
    assert all(set(row["score"]) == {"far recall of facts", "far recall of topics"} for row in out["rows"]) and len(out["random"]) == 2
    length, n_fact, n_query = eval_tasks.CURRICULUM[-1][:3]
    rng = np.random.default_rng([0, 2 ** 31])
    skills = eval_tasks.with_topic(rng, eval_tasks.fact_stream(rng, 2, length - 17, n_fact, n_query), 8)
    best = eval_tasks.tiny_start(0, eval_tasks.TOPICAL)(skills[0].batch.tokens.view(2, length)[0]).argmax(1), \
        eval_tasks.tiny_start(0, eval_tasks.TOPICAL)(skills[0].batch.tokens.view(2, length)[1]).argmax(1)
    for name, skill in zip(("facts", "topics"), skills):
        far = skill.query[(skill.query - skill.fact >= 32) & (skill.fact % length >= 4)]
        want = (torch.cat(best)[far] == skill.batch.tokens[far + 1]).float().mean().item()
        assert out["rows"][0]["score"][f"far recall of {name}"] == pytest.approx(want)
    save_model(Llama(eval_tasks.TINY), tmp_path / "m")
    for flags, words in (("--method lm", "--data topics"), ("--method prulong --model m", "token 185 of the data is outside")):
        with pytest.raises(ValueError, match=words):
            train.main(f"--data topics --out_dir x {flags}".split())


def text_data(seq_len=16, n_seq=3, held=2):
    rng = np.random.default_rng(0)
    docs = [100 * i + np.arange(int(rng.integers(1, 40))) for i in range(30)]
    return docs, train.TextData({"a": (3.0, docs[:20]), "b": (1.0, docs[20:])}, None, seq_len, n_seq, held, seed=0)


def test_packs_cover_the_data_once_and_keep_documents_apart():
    docs, data = text_data()
    for source, part in ((0, docs[:20]), (1, docs[20:])):
        tokens, _, n_train = data.packs[source]
        n_held = len(tokens) // 16 - n_train
        pieces = [p for i in range(n_train + n_held) for p in data.pack(source, i)]
        assert all(len(p) and (np.diff(p) == 1).all() for p in pieces)  # never across documents: 100 * i + consecutive
        seen = np.sort(np.concatenate(pieces))
        assert len(np.unique(seen)) == len(seen) and set(seen) <= set(np.concatenate(part))
        assert len(tokens) // 16 * 16 - len(seen) <= 2 * (n_train + n_held)  # a span of one token, at either end of a pack
    batch = data.batch(np.random.default_rng([0, 5]))
    assert torch.equal(batch.tokens, data.batch(np.random.default_rng([0, 5])).tokens) and len(batch.tokens) == 48
    ends = set((batch.cu_seqlens[1:] - 1).tolist())
    for i, (token, target) in enumerate(zip(batch.tokens.tolist(), batch.targets.tolist())):
        assert target == (-100 if i in ends else token + 1)
    shares = [int(data.draw(np.random.default_rng(i))[0][0] >= 2000) for i in range(800)]
    assert abs(np.mean(shares) - 0.25) < 0.05


def test_reading_text(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x.txt").write_text("two")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("three")
    (tmp_path / "a.jsonl").write_text('{"text": "one", "url": "u"}\n{"text": "more"}\n')
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x00")
    assert list(train.read_documents(str(tmp_path))) == ["one", "more", "two"]
    bad = tmp_path / "bad.jsonl"
    for line in ("{", "[]", '{"txt": 1}', '{"text": 5}'):
        bad.write_text('{"text": "x"}\n' * 6 + line + "\n")
        with pytest.raises(ValueError, match="line 7"):
            list(train.read_documents(str(bad)))
    tokenizer, load = model_file.byte_tokenizer(), lambda spec: train.load_text(spec, tokenizer, 8, 1, 1, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text"):
        load(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="too few"):
        load(str(tmp_path / "test"))
    for spec in ("a=0:x", "a=y:x", "a=1", "a=1:x,b"):
        with pytest.raises(ValueError, match="name=weight:PATH"):
            load(spec)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load("a=1:nowhere")
    (tmp_path / "long.txt").write_text("0123456789" * 20)
    assert load(f"a=0.6:{tmp_path / 'long.txt'},b=0.4:{tmp_path / 'long.txt'}").shares == [0.6, 0.4]


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    """Targets weigh the same however unevenly they fall on micro-batches."""
    docs = [torch.arange(5), torch.arange(9, 25), torch.arange(3), torch.arange(40, 47)]  # three for one micro-batch, one for the other
    first = []
    for n_micro in (1, 2):
        model, config = small(), train.Config(steps=1, grad_accum=n_micro, lr=1e-2, **DEFAULTS)
        lm = train.LM(model, config, 0)
        turn = iter([docs] if n_micro == 1 else [docs[:3], docs[3:]])
        lm.batch = lambda data, rng, step, steps: train.collate(next(turn))
        out = tmp_path / str(n_micro)
        out.mkdir()
        train.fit(lm, model, [train.Stage(0, config.steps, None, None)], config, str(out), {"method": "lm"}, contextlib.nullcontext)
        first.append(json.loads((out / "log.jsonl").read_text().splitlines()[0]))
    for key in ("loss", "grad_norm"):
        assert abs(first[0][key] - first[1][key]) < 1e-6 * first[0][key], (key, first)  # angles are float32


def test_learning_rates_decay_and_clipping(tmp_path):
    """The schedules by their definitions; matrices decay and norms do not; the gradient that is applied has norm <= clip."""
    at = lambda step: model_file.warmup_cosine(step, 100, 0.1, 0.2)
    assert [at(i) for i in (0, 4, 9)] == [0.1, 0.5, 1.0] and at(10) == 1.0 and abs(at(55) - 0.6) < 1e-12 and 0.2 < at(99) < 0.201
    duo = prulong.Duo(small(), prulong.DuoConfig(), 0)
    assert [round(duo.lr_scale(i, 50, None, None), 6) for i in (0, 4, 9, 25, 40, 45, 49)] == [0.1, 0.5, 1, 1, 1, 0.5, 0.1]
    model, config = small(), train.Config(steps=1, lr=0.5, clip=1e-9, **(DEFAULTS | {"warmup": 0.0}))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lm = train.LM(model, config, 0)
    lm.batch = lambda data, rng, step, steps: train.collate([torch.arange(30)])
    train.fit(lm, model, [train.Stage(0, config.steps, None, None)], config, str(tmp_path), {"method": "lm"}, contextlib.nullcontext)
    for name, p in model.named_parameters():  # gradients below Adam's eps: what moves a weight is its decay alone
        close(p, before[name] * (1 - 0.5 * 0.1 * (p.dim() > 1)), 0.06)
        assert (p.dim() > 1) == bool((p.abs().mean() < 0.97 * before[name].abs().mean()))


def test_gate_gradients_by_finite_differences():
    model, tokens = small(), torch.arange(1, 31)
    batch = train.collate([tokens[:18], tokens[18:]])
    for per_document in (False, True):
        for sampled in (False, True):
            config = prulong.Config(sink=1, window=4, per_document=per_document, sampled_sparsity=sampled, mask_init=0.3)
            method = prulong.PruLong(model, config, 0)
            method.gates.double()
            with torch.no_grad():
                method.gates.multipliers.copy_(torch.tensor([0.7, 1.3]))
            noisy = method.with_noise(batch, np.random.default_rng(5))
            value = lambda: method.loss(model, noisy, 3, 10)[0]
            grad, = torch.autograd.grad(value(), method.gates.log_alpha)
            for i in range(6):
                ends = []
                for h in (1e-5, -1e-5):
                    with torch.no_grad():
                        method.gates.log_alpha.view(-1)[i] += h
                        ends.append(value())
                        method.gates.log_alpha.view(-1)[i] -= h
                assert abs((ends[0] - ends[1]) / 2e-5 - grad.view(-1)[i]) < 1e-4, (per_document, sampled, i)


def test_official_preset():
    config = prulong.Config(preset="official")
    assert (config.mask_lr, config.mask_init, config.per_document, config.sampled_sparsity, config.mask_weight_decay) == (1.0, 4.0, False, True, 0.1)
    assert prulong.Config(preset="official", mask_lr=0.5).mask_lr == 0.5


def test_one_token_documents_predict_nothing():
    data = train.TextData({"a": (1.0, [np.zeros(1, int)] * 500 + [np.arange(1, 30)] * 8)}, None, 16, 1, 1, 0)
    for i in range(data.packs[0][2]):
        batch = train.collate(data.pack(0, i))
        assert batch.cu_seqlens.diff().min() >= 2 and (batch.targets != -100).any()


def test_weighted_targets_share_a_step_by_weight():
    batches = [train.FactData(64, n).batch(np.random.default_rng(n)) for n in (1, 3)]
    whole = Batch(*(torch.cat(x) for x in zip(*(b[:2] for b in batches))), torch.arange(5, dtype=torch.int32) * 64,
                  torch.cat([b.weights for b in batches]))
    model = Llama(eval_tasks.TINY).init_weights(0)
    loss = lambda b: model.loss(b.tokens, b.targets, cu_seqlens=b.cu_seqlens, weights=b.weights)
    with torch.no_grad():
        close(sum(s * loss(b) for s, b in zip(train.target_shares(batches), batches)), loss(whole), 1e-5)


DEFAULTS = dict(warmup=0.1, min_lr=0.1, weight_decay=0.1)
ARGS = ["--method", "lm", "--data", "facts", "--seq_len", "64", "--batch", "2", "--save_every", "3", "--eval_seqs", "1"]


server = multiprocessing.get_context("forkserver")  # has imported all there is and forks a script from there, in no time
server.set_forkserver_preload(["test_all"])


def run_script(args, cwd, env):
    """What `python ARGS` does, in a process of its own; its output goes to files of the folder."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(cwd, f"{name}{env.get('RANK', '')}.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(cwd)
    os.environ.update(env)
    torch.set_num_threads(1)  # as fast for such models, and two scripts at once do not wait for each other
    sys.argv = [str(arg) for arg in args]
    runpy.run_path(sys.argv[0], run_name="__main__")


def start(*args, cwd, **env):
    child = server.Process(target=run_script, args=(args, str(cwd), env))
    child.start()
    return child


def ended(child, cwd, timeout=120):
    """What a script that `start` started came to."""
    child.join(timeout)
    if child.exitcode is None:
        child.kill()
        raise TimeoutError(open(os.path.join(cwd, "stderr.txt")).read()[-3000:])
    texts = [open(os.path.join(cwd, name), encoding="utf-8").read() for name in ("stdout.txt", "stderr.txt")]
    return subprocess.CompletedProcess(child, child.exitcode, *texts)


def script(*args, cwd):
    return ended(start(*args, cwd=cwd), cwd)


@pytest.mark.parametrize("method", ["lm", "prulong", "vlorp", "stages", "cepe"])
def test_killed_run_resumes_in_the_same_bits(tmp_path, method):
    code = os.path.abspath(train.__file__)
    args = [*ARGS, "--method", method, "--steps", "12"]
    if method == "stages":  # killed in the second stage, whose RoPE base is the first's
        args = [*ARGS, "--method", "lm", "--stages", "64:3:1e5,128:9"]
        i = args.index("--seq_len")
        args = args[:i] + args[i + 2:]
    if method == "cepe":  # the encoder's head never has a gradient, cross-attention has none in the first phase
        args = ["--method", "cepe", "--decoder_steps", "5", "--steps", "12", "--save_every", "2", "--eval_seqs", "2"]
    if method == "prulong":  # weights too, so that everything a checkpoint can hold is there
        save_model(Llama(eval_tasks.TINY).init_weights(0), tmp_path / "tiny")
        args += ["--train", "masks+weights", "--model", str(tmp_path / "tiny"), "--lr", "1e-3"]
    (tmp_path / "beside").mkdir()
    whole = start(code, *args, "--out_dir", "../whole", cwd=tmp_path / "beside")
    child = start(code, *args, "--out_dir", "killed", cwd=tmp_path)
    log = tmp_path / "killed" / "log.jsonl"
    while child.is_alive() and not (log.exists() and '"step": 4' in log.read_text()):
        time.sleep(0.005)
    child.kill()
    child.join()
    lines = [json.loads(x) for x in log.read_text().splitlines() if x.endswith("}")]
    assert not any(x["event"] == "end" for x in lines), "killed too late to show anything"
    other = script(code, *args, "--out_dir", "killed", "--resume", "--lr", "5e-3", cwd=tmp_path)
    assert other.returncode == 2 and "--lr was" in other.stderr
    again, whole = script(code, *args, "--out_dir", "killed", "--resume", cwd=tmp_path), ended(whole, tmp_path / "beside")
    assert again.returncode == 0 and whole.returncode == 0, again.stderr + whole.stderr
    a, b = (train.read_tensor_file(tmp_path / d / "checkpoint.safetensors") for d in ("whole", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    steps = [x["step"] for x in map(json.loads, log.read_text().splitlines()) if x["event"] == "step"]
    assert steps == list(range(12))
    outcome = [json.loads(x.stdout.splitlines()[-1]) for x in (whole, again)]
    assert {k: v for k, v in outcome[0].items() if k not in ("cpu_seconds", "rows")} == \
        {k: v for k, v in outcome[1].items() if k not in ("cpu_seconds", "rows")}
    saved, expected = ((cepe.load_cepe if method == "cepe" else load_model)(tmp_path / name) for name in ("killed", "whole"))
    assert all(torch.equal(p, q) and torch.equal(p, a.get(f"model.{name}", p)) for (name, p), q in zip(saved.named_parameters(), expected.parameters()))
    assert saved.config == expected.config


KILLED = {
    "train": ["train.py", *ARGS, "--steps", "16", "--save_every", "1"],
    "eval": ["eval_tasks.py", "--model", "model", "--tasks", "niah_s,icl", "--lengths", "420,600", "--n", "3", "--policy", "full,streaming",
             "--budget", "64",
             "--sink", "4", "--max_new_tokens", "4", "--dtype", "float32", "--out", "out/results.jsonl"],
    "footprint": ["footprint.py", "--n", "2", "--lengths", "64,128", "--curves", "streaming,snapkv", "--shares", "0.1,0.5,0.9", "--chunk", "16",
                  "--out_dir", "out"]}


@pytest.mark.parametrize("name", KILLED)
def test_kills_at_any_moment_lose_and_double_nothing(tmp_path, name):
    """SIGKILL after random times, at checkpoint writing too (it is most of what this run does), until enough have hit; then the
    run is left to end. 4 kills of each script, 40 in the slow test."""
    save_model(Llama(eval_tasks.TINY).init_weights(0), tmp_path / "out" / "tiny-seed0")
    save_model(small(vocab_size=258, eos_ids=(257,)).float(), tmp_path / "model")
    here, out, rng = os.path.dirname(os.path.abspath(__file__)), tmp_path / "out", random.Random(name)
    out, args = (tmp_path / "run", [*KILLED[name][1:], "--out_dir", "run"]) if name == "train" else (out, KILLED[name][1:])
    code, file = os.path.join(here, KILLED[name][0]), out / ("log.jsonl" if name == "train" else "results.jsonl")
    go = lambda: start(code, *args, *["--resume"] * (name != "eval" and file.exists()), cwd=tmp_path)

    def finished():
        lines = [json.loads(line) for line in open(file)]
        if name == "train":
            assert [x["step"] for x in lines if x["event"] == "step"] == list(range(16)) and not list(out.glob("*.part"))
            return train.read_tensor_file(out / "checkpoint.safetensors") | train.read_tensor_file(out / "model.safetensors")
        assert len({line["key"] for line in lines}) == len(lines)
        return {line["key"]: {k: v for k, v in line.items() if k != "seconds"} for line in lines}
    begun = time.monotonic()
    assert ended(go(), tmp_path).returncode == 0
    whole, took, kills = finished(), time.monotonic() - begun, 0
    shutil.rmtree(out) if name == "train" else file.unlink()
    while kills < (40 if SLOW else 4):
        child = go()
        child.join(rng.uniform(0, took / 2))
        if child.exitcode is None:
            child.kill()
            child.join()
            kills += 1
        else:
            assert child.exitcode == 0, open(tmp_path / "stderr.txt").read()
            if finished().keys() == whole.keys():  # done before it was hit often enough: from the start again
                shutil.rmtree(out) if name == "train" else file.unlink()
    assert ended(go(), tmp_path).returncode == 0, open(tmp_path / "stderr.txt").read()
    again = finished()
    assert again.keys() == whole.keys() and all(torch.equal(again[k], whole[k]) if name == "train" else again[k] == whole[k] for k in whole)


def test_interrupted_run_saves_and_leaves_with_130(tmp_path):
    """Ctrl-C in the middle: the step at hand is saved whatever --save_every says, and --resume ends in the bits of a whole run."""
    code, args = os.path.abspath(train.__file__), [*ARGS, "--steps", "40", "--save_every", "100"]
    (tmp_path / "beside").mkdir()
    whole = start(code, *args, "--out_dir", "../whole", cwd=tmp_path / "beside")
    child, log = start(code, *args, "--out_dir", "cut", cwd=tmp_path), tmp_path / "cut" / "log.jsonl"
    while child.is_alive() and not (log.exists() and '"step": 3' in log.read_text()):
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGINT)
    done = ended(child, tmp_path)
    steps = [x["step"] for x in map(json.loads, open(log)) if x["event"] == "step"]
    assert done.returncode == 130 and done.stderr.count("\n") == 1 and f"stopped after step {steps[-1]}" in done.stderr
    assert 3 <= steps[-1] < 39 and train.read_checkpoint(tmp_path / "cut" / "checkpoint.safetensors")["step"] == steps[-1] + 1
    assert script(code, *args, "--out_dir", "cut", "--resume", cwd=tmp_path).returncode == 0
    assert ended(whole, tmp_path / "beside").returncode == 0
    a, b = (train.read_tensor_file(tmp_path / d / "checkpoint.safetensors") for d in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(tmp_path):
    """A limit on the size of files stands for the full disk: below it the log goes on, above it the checkpoint cannot be written."""
    code, args = os.path.abspath(train.__file__), [*ARGS, "--save_every", "2", "--out_dir", "a"]
    assert script(code, *args, "--steps", "12", cwd=tmp_path).returncode == 0
    before = (tmp_path / "a" / "checkpoint.safetensors").read_bytes()
    size = len(before)
    limited = f"import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2},) * 2); " \
              f"sys.argv[1:] = {[*args, '--steps', '12', '--resume']!r}; runpy.run_path({code!r}, run_name='__main__')"
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    saved = dict(train.read_checkpoint(tmp_path / "a" / "checkpoint.safetensors"), step=10)  # as if two steps were left
    train.write_tensors(tmp_path / "a" / "checkpoint.safetensors", train.read_tensor_file(tmp_path / "a" / "checkpoint.safetensors"),
                        {"about": json.dumps(saved)})
    before = (tmp_path / "a" / "checkpoint.safetensors").read_bytes()
    (tmp_path / "limited.py").write_text(limited)
    done = script(tmp_path / "limited.py", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "checkpoint.safetensors" in done.stderr, done.stderr
    assert (tmp_path / "a" / "checkpoint.safetensors").read_bytes() == before and not list((tmp_path / "a").glob("*.part"))
    os.remove(tmp_path / "b" / "checkpoint.safetensors")
    (tmp_path / "b" / "checkpoint.safetensors").mkdir()  # a place that cannot be written, whoever one is
    done = script(code, *[x if x != "a" else "b" for x in args], "--steps", "12", "--overwrite", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


# --- several processes ----------------------------------------------------------------------------------------------------

TOGETHER = {
    "lm": "--method lm --data facts --seq_len 64 --batch 4 --grad_accum 2",
    "sft": "--method sft --model chat --data chats.jsonl --seq_len 200 --grad_accum 4 --lr 1e-3",
    "prulong": "--method prulong --train masks+weights --model tiny --data facts --seq_len 64 --batch 4 --lr 1e-3 --window 16 --n_random 1",
    "duo": "--method duo --model tiny --data facts --seq_len 64 --batch 4 --window 16 --needles 3 --n_random 1",
    "meco": "--method meco --batch 4",
    "cepe": "--method cepe --decoder_steps 2 --batch 4 --lr 1e-3 --mlm 0.3 --duplicate 0.3 --mask_chunks 0.5",
    "ceped": "--method ceped --decoder_steps 2 --batch 3 --lr 1e-3",
    "vlorp": "--method vlorp --data facts --seq_len 64 --batch 4 --granularity 4",
    "svd": "--method vlorp --data facts --seq_len 64 --batch 4 --rank 2 --granularity 1 --basis svd",
    "stages": "--method lm --data facts --stages 64:12,128:8 --batch 4"}
SIZES = {name: (1, 2, 4) if SLOW or name in ("lm", "prulong", "cepe", "stages") else (1, 2) for name in TOGETHER}  # four take a while on two cores


def train_together(rank, size, port, cwd, resume):
    """All runs of TOGETHER in one of `size` processes; then lm again, which gets Ctrl-C in its tenth step, and the rest of what another
    number of processes left so."""
    os.chdir(cwd)
    torch.set_num_threads(1)
    if size > 1:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sequence = lambda name: ["--seq_parallel", "2"] if size == 4 and "cepe" not in name else []
    go = lambda name, out, *more: train.main([*TOGETHER[name].split(), *(["--steps", "20"] if name != "stages" else []), "--eval_seqs", "2",
                                              "--out_dir", out, *sequence(name), *more])
    for name in TOGETHER:
        if size in SIZES[name] and not resume:
            go(name, f"{name}-{size}")
    if resume:
        go("lm", f"half-{resume}", "--resume")
        return
    batch, sent = train.LM.batch, []
    def interrupting(self, data, rng, step, steps):
        if step == 9 and rank == 0 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return batch(self, data, rng, step, steps)
    train.LM.batch = interrupting
    try:
        go("lm", f"half-{size}")
    except KeyboardInterrupt:
        train.LM.batch = batch
        for name in TOGETHER if size == 1 else ():
            go(name, f"{name}-again", "--deterministic")
        sys.exit(130)


def test_a_part_without_targets_moves_nothing():
    """A process may get metadata alone, or a context without a masked token: loss 0, and a gradient of 0 for every weight."""
    model = Llama(dataclasses.replace(eval_tasks.TINY, tie_embeddings=False)).init_weights(0)
    batch = Batch(torch.arange(5), torch.full((5,), -100), torch.tensor([0, 5]))
    loss, _ = meco.MeCo(model, meco.Config(), 0).loss(model, batch, 0, 1)
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())
    model = cepe.extend(cepe.small_decoder(cepe.Entities(), 1, 0), LlamaConfig(129, 1, 2, 2, 48, 144, 24, tie_embeddings=True))
    method = cepe.Expand(model, cepe.Config(context=64, chunk_size=16, mlm=0.5, duplicate=0.0), 0)
    batch = method.batch(cepe.Entities(), np.random.default_rng(0), 0, 4)
    loss, _ = method.loss(model, batch._replace(targets=torch.full_like(batch.targets, -100)), 0, 4)
    loss.backward()
    assert loss == 0 and not any(p.grad.any() for p in model.encoder.parameters())


def test_autocast_reaches_single_rows():
    """A stretch of a sequence may be one token long."""
    layer, x = model_file.Linear(64, 32), torch.randn(1, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


def test_several_processes_are_checked_before_anything_is_lost(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text("precious")
    monkeypatch.setattr(train, "processes", lambda: model_file.Processes(0, 8))
    with pytest.raises(ValueError, match="does not divide the model's 4 KV heads"):
        train.main(["--method", "lm", "--data", "facts", "--seq_parallel", "8", "--overwrite", "--out_dir", str(tmp_path)])
    assert (tmp_path / "log.jsonl").read_text() == "precious"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="want --device cuda"):
        model_file.join_processes("cuda:0")


def launch(target, size, *args):
    """Exit codes of `size` processes that find each other, running target(rank, size, port, *args)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = [server.Process(target=target, args=(rank, size, port, *args)) for rank in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
        child.kill()
    return [child.exitcode for child in children]


@pytest.mark.parametrize("name", ["lm", "prulong", "duo", "meco", "cepe", "ceped"])
def test_bfloat16_products_stay_close(name):
    """Autocast changes a step's loss by less than 1e-3 of it (DuoAttention's, a distance near 0: 2 %) and the gradient by less than
    3 % of its norm."""
    model, data = eval_tasks.tiny_start(0), train.FactData(128, 8)
    if name == "lm":
        method = train.LM(model, None, 0)
    elif name == "prulong":
        method = prulong.PruLong(model, prulong.Config(window=16, train="masks+weights"), 0)
    elif name == "duo":
        method = prulong.Duo(model, prulong.DuoConfig(window=16, needles=3, reg=0.0), 0)
        method.a.data.fill_(0.5)
    elif name == "meco":
        model, data = meco.small_model(0), meco.SiteData()
        method = meco.MeCo(model, meco.Config(), 0)
    else:
        data, encoder = cepe.Entities(), LlamaConfig(129, 2, 2, 2, 48, 144, 24, tie_embeddings=True)
        model = cepe.extend(cepe.small_decoder(data, 20, 0), encoder, "copy")
        method = cepe.Expand(model, cepe.Config(context=64, chunk_size=16, mlm=0.0, duplicate=0.0), 0, name == "ceped")
    own = method.parameters() if isinstance(method, torch.nn.Module) else ()
    parameters = [p for p in [*model.parameters(), *own] if p.requires_grad]
    for seed in range(3):
        batch, losses, gradients = method.batch(data, np.random.default_rng(seed), 5, 10), [], []
        for low in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                losses.append(method.loss(model, batch, 5, 10)[0])
            found = torch.autograd.grad(losses[-1], parameters, allow_unused=True)
            gradients.append(torch.cat([g.flatten().float() for g in found if g is not None]))
        assert 0 < (losses[0] - losses[1]).abs() < (0.02 if name == "duo" else 1e-3) * losses[0], losses
        assert 0 < (gradients[0] - gradients[1]).norm() < 0.03 * gradients[0].norm()


def evaluate_together(rank, size, port, cwd):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    run_script([os.path.abspath(eval_tasks.__file__), *KILLED["eval"][1:-1], f"out-{size}.jsonl"], cwd, {"RANK": str(rank)})


def test_several_processes_evaluate_as_one(tmp_path):
    """Each example is run once; the first process prints the table of all."""
    save_model(small(vocab_size=258, eos_ids=(257,)).float(), tmp_path / "model")
    rows = []
    for size in (1, 2):
        assert launch(evaluate_together, size, str(tmp_path)) == [0] * size
        lines = [json.loads(line) for line in open(tmp_path / f"out-{size}.jsonl")]
        rows.append({line["key"]: {k: v for k, v in line.items() if k != "seconds"} for line in lines})
        assert len(rows[-1]) == len(lines) == 24
        tables = [[line for line in open(tmp_path / f"stdout{rank}.txt") if not line.startswith("{")] for rank in range(size)]
        assert tables[0] and not any(tables[1:])
    assert rows[0] == rows[1]


def test_torchrun_prints_once_and_refuses_what_does_not_divide(tmp_path):
    code = os.path.abspath(train.__file__)
    run = lambda *args: subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", code, *ARGS, "--steps", "2", *args],
                                       cwd=tmp_path, text=True, capture_output=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    done = run("--out_dir", "a")
    assert done.returncode == 0 and done.stdout.count('"method": "lm"') == 1, done.stderr[-2000:]
    refused = script(code, *ARGS, "--out_dir", "b", "--seq_parallel", "3", cwd=tmp_path)
    assert refused.returncode == 2 and "--seq_parallel 3 does not divide the number of processes, 1" in refused.stderr and not (tmp_path / "b").exists()


def test_batches_are_divided_by_whole_documents():
    rng = np.random.default_rng(0)
    for trial in range(200):
        docs = [torch.from_numpy(rng.integers(9, size=rng.integers(1, 30))) for _ in range(rng.integers(1, 9))]
        n, batch = int(rng.integers(1, 6)), train.collate(docs)
        parts = model_file.divide(batch, n)
        assert len(parts) == n and any(part is not None for part in parts)
        kept = [part for part in parts if part is not None]
        assert torch.equal(torch.cat([part.tokens for part in kept]), batch.tokens)
        assert torch.equal(torch.cat([part.targets for part in kept]), batch.targets)
        assert torch.equal(torch.cat([part.cu_seqlens.diff() for part in kept]), batch.cu_seqlens.diff()) and all(part.cu_seqlens[0] == 0 for part in kept)
        pairs = [(doc.numpy(), doc.numpy()[:3]) for doc in docs]
        example = cepe.example(pairs, 4)
        kept = [part for part in model_file.divide(example, n) if part is not None]
        assert torch.equal(torch.cat([part.context for part in kept]), example.context)
        assert torch.equal(torch.cat([part.cu_chunks.diff() for part in kept]), example.cu_chunks.diff())
        assert torch.equal(torch.cat([part.cu_context.diff() for part in kept]), example.cu_context.diff())


def test_conversations_train_the_assistants_words_only(tmp_path, monkeypatch, capsys):
    """Targets by hand, packs of whole conversations, both file formats, a run, and what a wrong line is told."""
    (tmp_path / "m").mkdir()
    made_tokenizer(tmp_path / "m")
    tokenizer = load_tokenizer(tmp_path / "m")
    save_model(Llama(dataclasses.replace(eval_tasks.TINY, vocab_size=400)).init_weights(0), tmp_path / "m")
    chat = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "so"},
            {"role": "assistant", "content": "no 3"}]
    tokens, targets = train.encode_chat(chat, tokenizer)
    assert tokenizer.decode(tokens) == tokenizer.chat(chat[:3]) + "no 3<|im_end|>"
    assert tokens.tolist() == tokenizer.encode(tokenizer.chat(chat[:3]) + "no 3<|im_end|>")
    assert tokenizer.decode(targets[targets != -100]) == "ok<|im_end|>no 3<|im_end|>"
    assert all(targets[i] in (-100, tokens[i + 1]) for i in range(len(tokens) - 1)) and targets[-1] == -100
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"messages": chat} if i % 2 else {"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}"}) for i in range(12)]
    open("c.jsonl", "w").write("\n".join(lines))
    data = train.ChatData(train.read_chats("c.jsonl", tokenizer, 200), tokenizer, 200, 2, 4, 0)
    batch = data.batch(np.random.default_rng(0))
    assert len(data.held_out) == 4 and len(batch.cu_seqlens) > 3 and len(batch.tokens) <= 400
    for method in (["sft"], ["vlorp", "--chat", "--granularity", "8"]):
        args = ["--method", *method, "--model", "m", "--data", "c.jsonl", "--seq_len", "200", "--steps", "8", "--eval_seqs", "4", "--lr", "0.01"]
        train.main(args)
        outcome = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert outcome["after"] < outcome["before"]
    for line, words in (("{}", "line 13"), ('{"messages": []}', "no turn"), ('{"messages": [{"role": "assistant"}]}', "line 13"),
                        ('{"question": "a", "answer": 5}', "line 13"),
                        (json.dumps({"question": "a" * 999, "answer": "b"}), "more than --seq_len 200")):
        open("d.jsonl", "w").write("\n".join([*lines, line]))
        with pytest.raises(ValueError, match=words):
            train.main([*args[:args.index("c.jsonl")], "d.jsonl", *args[args.index("c.jsonl") + 1:], "--out_dir", "x"])
    with pytest.raises(ValueError, match="conversations want"):
        train.main(["--method", "sft", "--model", "m"])


def test_conversation_files_of_other_kinds(tmp_path):
    """GSM8K, CommonsenseQA and LLM-Adapters' commonsense rows; what their answers say in the end."""
    multiple = {"question": {"stem": "What flies?", "choices": [{"label": "A", "text": "stone"}, {"label": "B", "text": "bird"}]}, "answerKey": "B"}
    instruction = {"instruction": "True or false: is it?", "input": "", "output": "the correct answer is true", "answer": "true"}
    rows = [{"question": "How many?", "answer": "2 + 1 = <<2+1=3>>3\n#### 1,203"}, multiple, instruction]
    (tmp_path / "m").mkdir()
    made_tokenizer(tmp_path / "m")
    tokenizer = load_tokenizer(tmp_path / "m")
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chats = train.read_chats(str(tmp_path / "x.json"), tokenizer, 500)
    assert chats == train.read_chats(str(tmp_path / "x.jsonl"), tokenizer, 500)
    assert [eval_tasks.final_answer(chat[-1]["content"]) for chat in chats] == ["1203", "b", "true"]
    assert chats[1][0]["content"] == "What flies?\nA: stone\nB: bird" and chats[2][0]["content"] == "True or false: is it?"
    assert eval_tasks.final_answer("so #### $-4.50") == "-9/2" and eval_tasks.final_answer("I do not know, 12") is None
    (tmp_path / "bad.json").write_text(json.dumps([rows[0], {"question": {}, "answerKey": "A"}]))
    with pytest.raises(ValueError, match="bad.json, row 2"):
        train.read_chats(str(tmp_path / "bad.json"), tokenizer, 500)
    problems = train.read_chats("problems", tokenizer, 500)
    assert len({chat[0]["content"] for chat in problems}) == len(problems) > 3500
    for question, answer in ((chat[0]["content"], chat[1]["content"]) for chat in problems):
        *steps, end = answer.split("\n")
        for step in steps:
            sum_, _, result = step.partition(" = ")
            assert eval(sum_, {}) == int(result)
        assert end == f"#### {result}" and all(n in question for n in re.findall(r"\d+", steps[0].partition(" = ")[0]))


def test_stages_grow_the_context(tmp_path, monkeypatch, capsys):
    """Lengths, bases and schedules of each stage; tokens of a step stay; the optimizer goes on; heavy micro-batches come first."""
    monkeypatch.chdir(tmp_path)
    train.main(["--method", "lm", "--stages", "64:4:1e4,128:4:1e5:1e-3", "--batch", "4", "--grad_accum", "2", "--eval_seqs", "2", "--out_dir", "a"])
    outcome = json.loads(capsys.readouterr().out.splitlines()[-1])
    steps = [x for x in map(json.loads, open("a/log.jsonl")) if x["event"] == "step"]
    assert [x["tokens"] for x in steps] == [512] * 8 and all(x["targets"] < 512 for x in steps)
    assert [x["lr"] for x in steps[4:]] == pytest.approx([x["lr"] / 4 for x in steps[:4]])  # 1e-3 for 4e-3, and anew
    assert [row["length"] for row in outcome["stages"]] == [64, 128] and list(outcome["stages"][0]["scores"]) == ["64", "128", "256"]
    assert json.load(open("a/config.json"))["rope_theta"] == 1e5
    assert train.read_tensor_file("a/checkpoint.safetensors")["optimizer.0.step"] == 8
    assert train.parse_stages("64K:5000:8e6:1e-5,512K:2500:1.28e8:5e-6")[1] == (524288, 2500, 1.28e8, 5e-6, None)
    sources = {"text": (1.0, [np.arange(n) for n in (5, 30, 9, 100, 60)])}
    data = train.TextData(sources, None, 16, 2, 1, 0)
    seen = []

    class Watch(train.LM):
        def loss(self, model, batch, step, total):
            seen.append(int(batch.cu_seqlens.diff().square().sum()))
            return super().loss(model, batch, step, total)
    model = Llama(dataclasses.replace(eval_tasks.TINY, vocab_size=100, max_seq_len=8)).init_weights(0)
    config = train.fill_defaults(train.Config(method="lm", steps=3, grad_accum=4, out_dir="b"), None)
    os.makedirs("b")
    train.fit(Watch(model, config, 0), model, [train.Stage(16, 3, None, None, data)], config, "b",
              {"method": "lm", "settings": {}, "dtype": "float32"}, contextlib.nullcontext)
    assert len(set(seen)) > 1 and all(seen[i:i + 4] == sorted(seen[i:i + 4], reverse=True) for i in (0, 4, 8))
    assert model.config.max_seq_len == 16  # what it has been trained to read
    stages, ends = [train.Stage(32, 1, 1e5, None, data), train.Stage(16, 1, None, None, data)], []
    os.makedirs("shrinks")
    for _ in range(2):  # the second time there is nothing left to do but to read the checkpoint
        model = Llama(dataclasses.replace(eval_tasks.TINY, vocab_size=100, max_seq_len=8)).init_weights(0)
        train.fit(train.LM(model, config, 0), model, stages, dataclasses.replace(config, steps=2), "shrinks",
                  {"method": "lm", "settings": {}, "dtype": "float32"}, contextlib.nullcontext)
        ends.append((model.config.max_seq_len, model.config.rope_base))
    assert ends == [(32, 1e5)] * 2
    for bad in ("64", "64:0", "64:1:0", "64:5,x:3", "4:5"):
        with pytest.raises(ValueError, match="--stages"):
            train.main(["--method", "lm", "--stages", bad, "--out_dir", "c"])
    with pytest.raises(ValueError, match="takes the place"):
        train.main(["--method", "lm", "--stages", "64:5", "--steps", "5", "--out_dir", "c"])
    with pytest.raises(ValueError, match="2 parts for 1"):
        train.main(["--method", "lm", "--stages", "64:5", "--data", "facts;facts", "--out_dir", "c"])


def test_text_end_to_end(tmp_path, monkeypatch, capsys):
    """A byte-level model on real text: masks by PruLong and Duo, then weights under the learned masks. Files agree with the
    report; what a run reads is never overwritten."""
    monkeypatch.chdir(tmp_path)
    save_model(Llama(dataclasses.replace(eval_tasks.TINY, vocab_size=258)).init_weights(0), "bytes")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 300}) + "\n" for i in range(40)))
    common = ["--model", "bytes", "--data", "text.jsonl", "--steps", "3", "--eval_seqs", "2", "--n_random", "2", "--sink", "2", "--window", "8",
              "--target_sparsity", "0.5"]
    def go(*args):
        train.main([*args])
        return json.loads(capsys.readouterr().out.splitlines()[-1])
    for method, more in (("prulong", ["--seq_len", "64"]), ("duo", ["--seq_len", "700", "--needles", "2", "--words", "3"])):
        outcome = go("--method", method, *common, *more)
        mask = prulong.load_heads(f"out/{method}/heads.tsv")
        assert mask.sum() == 6 and mask.int().tolist() == outcome["masks"][method]
        assert torch.equal(mask, prulong.load_heads(f"out/{method}/scores.tsv", 0.5))
        assert [row["full"] for row in outcome["rows"]] == [12, 6, 6] and outcome["score"] == "held-out loss"
        assert not os.path.exists(f"out/{method}/model.safetensors")
    sft = ["--method", "prulong", *common, "--seq_len", "64", "--train", "weights", "--lr", "1e-3", "--heads", "out/prulong/heads.tsv"]
    outcome = go(*sft, "--out_dir", "out/sft", "--target_sparsity", "0.9")
    learned = prulong.load_heads("out/prulong/heads.tsv")
    assert outcome["masks"]["prulong"] == learned.int().tolist() and torch.equal(prulong.load_heads("out/sft/heads.tsv"), learned)
    before, after = load_model("bytes"), load_model("out/sft")
    assert all(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    for out in ("bytes", "out/prulong", "out", "."):
        with pytest.raises(ValueError, match="holds what the run reads"):
            train.main([*sft, "--overwrite", "--out_dir", out])
    with pytest.raises(ValueError, match="line 1"):
        (tmp_path / "broken.tsv").write_text("x")
        train.main([*sft, "--overwrite", "--out_dir", "out/sft", "--heads", "broken.tsv"])
    assert load_model("out/sft") is not None and prulong.load_heads("out/sft/heads.tsv") is not None  # still there
    with pytest.raises(ValueError, match="--needles 10 of --words 32 need --seq_len"):
        train.main(["--method", "duo", *common, "--seq_len", "700", "--out_dir", "none"])
    with pytest.raises(ValueError, match="--lr means nothing"):
        train.main(["--method", "prulong", *common, "--seq_len", "64", "--lr", "1", "--out_dir", "none"])
    assert not os.path.exists("none")


def test_bfloat16_products():
    """Under autocast the loss stays float32 and close; a frozen bfloat16 model still learns its gates in float32."""
    model = Llama(eval_tasks.TINY).init_weights(0)
    batch = train.FactData(64, 4).batch(np.random.default_rng(0))._replace(weights=None)
    with torch.no_grad():
        exact = model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(batch.tokens[:9]).dtype == torch.bfloat16
            rough = model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens)
    assert rough.dtype == torch.float32 and 0 < abs(rough - exact) < 0.02
    method = prulong.PruLong(model.bfloat16(), prulong.Config(), 0)
    method.loss(model, method.with_noise(batch, np.random.default_rng(0)), 0, 10)[0].backward()
    assert method.gates.log_alpha.grad.dtype == torch.float32 and method.gates.log_alpha.grad.abs().sum() > 0
    assert train.choose_dtype(train.Config(dtype="auto"), eval_tasks.TINY)[0] == "float32"


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model, config = small(), train.Config(steps=6, save_every=2, lr=1e-3, **DEFAULTS)
    lm = train.LM(model, config, 0)
    lm.batch = lambda data, rng, step, steps: train.collate([torch.arange(30)])
    plain = lm.loss
    lm.loss = lambda model, batch, step, *rest: (plain(model, batch, step, *rest)[0] * (math.nan if step == 3 else 1), {})
    with pytest.raises(train.Diverged, match="step 3; the last good checkpoint is step 2"):
        train.fit(lm, model, [train.Stage(0, config.steps, None, None)], config, str(tmp_path), {"method": "lm", "settings": {}, "dtype": "float32"},
                  contextlib.nullcontext)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert train.read_checkpoint(tmp_path / "checkpoint.safetensors")["step"] == 2


def test_bad_command_lines_end_in_one_line_and_exit_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkdir("empty"), os.mkdir("full"), open("full/x", "w").close()
    cases = [(["--method", "magic"], "magic"), (["--stepz", "3"], "--stepz"), (["--step", "3"], "--step"), (["--steps", "0"], "--steps"),
             (["--steps", "1.5"], "1.5"), (["--method", "prulong", "--window", "0"], "--window"),
             (["--method", "prulong", "--target_sparsity", "1.5"], "--target_sparsity"),
             (["--method", "prulong", "--target_sparsity", "nan"], "--target_sparsity"),
             (["--window", "8"], "--window"), (["--method", "prulong", "--window", "500"], "--window 500"), (["--model", "nowhere"], "nowhere"),
             (["--data", "empty"], "empty"), (["--data", "nowhere"], "nowhere"), (["--resume", "--out_dir", "none"], "no checkpoint"),
             (["--out_dir", "full"], "not empty"), (["--resume", "--overwrite"], "exclude"), (["--device", "foo"], "foo"),
             (["--clip", "inf"], "--clip"), (["--seed", "99999999999"], "--seed"), (["--seq_len", "32"], "--seq_len"),
             (["--method", "prulong", "--data", "empty"], "--model"), (["--method", "prulong", "--train", "weights"], "--heads"),
             (["--n_random", "3"], "--method prulong or duo"), (["--method", "cepe", "--kl", "1"], "--method ceped"),
             (["--method", "meco", "--top_share", "0.1"], "topk"),
             (["--method", "meco", "--mode", "url", "--cooldown", "0.2"], "--mode meco"),
             (["--method", "vlorp", "--scheme", "original", "--at_refresh", "reset"], "--scheme"),
             (["--method", "cepe", "--model", "x", "--data", "stdlib", "--decoder_steps", "5"], "x/config.json"),
             (["--seq_parallel", "2"], "--seq_parallel 2")]
    for args, words in cases:
        monkeypatch.setattr(sys, "argv", ["train.py", *args])
        with pytest.raises(SystemExit) as stop:
            model_file.run(train.main)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and words in err, (args, err)
    assert not os.path.exists("out")


def test_scripts_answer_help_and_end_broken_input_in_exit_2(tmp_path):
    here = os.path.dirname(os.path.abspath(train.__file__))
    for name in ("train.py", "model.py", "eval_tasks.py", "prulong.py", "attention_triton.py"):
        assert "--" in script(os.path.join(here, name), "--help", cwd=tmp_path).stdout
        odd = script(os.path.join(here, name), "--nonsense", cwd=tmp_path)
        assert odd.returncode == 2 and odd.stderr.count("\n") == 1 and "nonsense" in odd.stderr
    broken = script(os.path.join(here, "model.py"), "--model", str(tmp_path), "--prompt", "x", cwd=tmp_path)
    assert broken.returncode == 2 and broken.stderr.count("\n") == 1 and "config.json" in broken.stderr


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    """Writing fails after some bytes: the error is passed on, the old file stands, no part is left."""
    save_model(small(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    def full(tensors, path, metadata=None):
        open(path, "wb").write(b"half")
        raise SafetensorError("No space left on device (os error 28)")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(small(seed=1), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# --- eviction -----------------------------------------------------------------------------------------------------------

class Recording(evict.EvictingCache):
    """Notes what each row could see, (n_layer, n_kv_head, N, N), from the positions held when it ran."""
    def attend(self, layer, q, k, v):
        if not hasattr(self, "visible"):
            self.visible = torch.zeros(*self.held.shape, 100, 100, dtype=torch.bool)
        rows = slice(self.seen, self.seen + len(k) - self.n_patch)
        for h in range(k.shape[1]):
            self.visible[layer, h, rows, self.positions(layer, h)] = True
            self.visible[layer, h, rows, rows] |= torch.ones(100, 100, dtype=torch.bool).tril()[:rows.stop - rows.start, :rows.stop - rows.start]
        return super().attend(layer, q, k, v)


def policies(rng):
    """Settings that exercise each policy on a 3-layer model with 2 KV heads."""
    heads = torch.tensor([[True, False], [False, False], [True, True]])
    scorer = evict.LocretScorer(small().config, 8).double()
    base = dict(obs_window=5)
    yield "full", {}
    yield "streaming", dict(sink=2, window=6)
    yield "streaming", dict(sink=2, budget=9)
    yield "heads", dict(heads=heads, sink=3, window=5)
    for policy in evict.CHUNK_RULES:
        yield policy, base | dict(budget=8)
        yield policy, base | dict(keep=0.4, sink=2)
        yield policy, base | dict(budget=8, decode_every=3, decode_budget=10)
    for policy in ("h2o", "tova"):
        yield policy, base | dict(budget=9)
        yield policy, base | dict(keep=0.5, decode_every=4)
    yield "locret", base | dict(budget=9, scorer=scorer)
    for policy in evict.ATTENTION_RULES:
        yield policy, base | dict(budget=7, patch=True)
    yield "pyramidkv", base | dict(keep=0.3, patch=True, patch_pos="true", pool="max", kernel=3, reduce="max", norm="all", exact=True)


@pytest.mark.parametrize("chunk", [1, 7, 16, None])
def test_every_policy_equals_the_masked_model(chunk):
    """The oracle for all of them: replay what was visible as a mask on the dense model. Footprint is that mask's area."""
    model, rng = small(), torch.Generator().manual_seed(0)
    tokens = torch.randint(61, (50,), generator=rng)
    n = 40
    for policy, settings in policies(rng):
        extra = {k: settings.pop(k) for k in ("heads", "scorer") if k in settings}
        cache = Recording(model, evict.Eviction(policy, **settings), **extra)
        with torch.no_grad():
            states = [cache.prefill(model, tokens[:n], chunk)]
            states += [model.hidden(t[None], cache.attend, cache.next_positions(1))[0] for t in tokens[n:]]
            visible = cache.visible[:, :, :50, :50]
            close(torch.stack(states) @ model.head.T, slow_llama(model, tokens, visible)[n - 1:], 1e-6)
        assert cache.footprint() == Fraction(int(visible.sum()), 6 * 50 * 51 // 2), (policy, settings)
        assert cache.seen == 50 and sum(t for t, _ in cache.log) == 50
        for layer in range(3):
            for h in range(2):
                pos = cache.positions(layer, h).tolist()
                assert pos == sorted(set(pos)) and all(0 <= p < 50 for p in pos)


def held(cache):
    return [[len(cache.positions(i, h)) for h in range(cache.held.shape[1])] for i in range(cache.held.shape[0])]


@pytest.mark.parametrize("n_head,n_kv_head", [(4, 4), (4, 2), (6, 2), (8, 1)])
def test_enough_budget_is_full_attention(n_head, n_kv_head):
    model = small(n_head=n_head, n_kv_head=n_kv_head)
    prompt = torch.randint(61, (30,), generator=torch.Generator().manual_seed(0))
    want = generate(model, prompt, 8)
    scorer = evict.LocretScorer(model.config, 8).double()
    for policy in evict.POLICIES:
        settings = {"full": {}, "streaming": dict(sink=0, window=99), "heads": dict(heads=torch.ones(3, n_kv_head), window=1),
                    "locret": dict(budget=99, scorer=scorer)}.get(policy, dict(budget=99))
        for chunk in (None, 7):
            for patch in {False, policy in evict.ATTENTION_RULES}:
                cache = evict.make_cache(model, policy, chunk=chunk, obs_window=4, patch=patch, **settings)
                assert generate(model, prompt, 8, cache=cache) == want and cache.footprint() == 1
    shares = evict.make_cache(model, "snapkv", keep=1.0, obs_window=4, chunk=11)
    assert generate(model, prompt, 8, cache=shares) == want


def test_streaming_and_heads_hold_exactly_sink_and_window():
    model, tokens = small(), torch.randint(61, (40,), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False], [False, True], [False, False]])
    cache = evict.make_cache(model, "heads", heads=mask, sink=3, window=6, chunk=1)
    logits = []
    with torch.no_grad():
        for t in tokens:
            logits.append(model(t[None], cache.attend, cache.next_positions(1)))
        close(torch.cat(logits), model(tokens, prulong.by_mask(mask, [0, 40], 3, 6)), 1e-12)  # chunk 1 is the strict window
    assert held(cache) == torch.where(mask, 40, 8).tolist()
    assert cache.positions(0, 1).tolist() == [0, 1, 2, *range(35, 40)]
    cache = evict.make_cache(model, "streaming", sink=2, budget=9, chunk=16)
    generate(model, tokens, 1, cache=cache)
    assert cache.positions(2, 1).tolist() == [0, 1, *range(33, 40)]


def test_chunked_budgets_at_the_edges():
    """Chunks shorter than the window, budget 0, remainder 1, window longer than the prompt: exactly the budget is kept."""
    model, tokens = small(n_layer=1), torch.randint(61, (33,), generator=torch.Generator().manual_seed(0))
    for policy in ("snapkv", "knorm", "random"):
        for chunk in (1, 4, 5, 16, 32, 33, 100):
            for budget in (0, 1, 4, 6, 40):
                for obs_window in (1, 4, 64):
                    for patch in {False, policy == "snapkv"}:
                        cache = evict.make_cache(model, policy, budget=budget, chunk=chunk, obs_window=obs_window, patch=patch)
                        generate(model, tokens, 1, cache=cache)
                        q, r = divmod(33, chunk)
                        assert held(cache) == [[q * min(budget, chunk) + min(budget, r)] * 2]
    cache = evict.make_cache(model, "snapkv", keep=0.29, obs_window=2)
    generate(model, torch.randint(61, (100,)), 1, cache=cache)
    assert held(cache) == [[29] * 2]
    cache = evict.make_cache(model, "snapkv", budget=5, obs_window=9)
    generate(model, tokens, 1, cache=cache)
    assert cache.positions(0, 0).tolist() == list(range(28, 33))  # less budget than window: the last tokens


def test_window_scores_by_definition():
    rng = torch.Generator().manual_seed(0)
    for n_kv, g, w, n, start in ((2, 3, 4, 20, 0), (1, 1, 1, 9, 5), (3, 2, 6, 6, 0)):
        q, k = torch.randn(w, n_kv, g, 8, generator=rng), torch.randn(n_kv, n, 8, generator=rng)
        pos = torch.arange(start, start + n).expand(n_kv, n)
        for pool, reduce in (("avg", "mean"), ("max", "mean"), ("max", "max")):
            got = evict.window_scores(q, torch.arange(start + n - w, start + n), k, pos, n - w, pool, 5, reduce)
            for h in range(n_kv):
                each = []
                for i in range(g):
                    total = torch.zeros(n, dtype=torch.double)
                    for r in range(w):
                        s = (k[h].double() @ q[r, h, i].double()) / 8 ** 0.5
                        total[:n - w + r + 1] += s[:n - w + r + 1].softmax(0)
                    total = total[:n - w].tolist()
                    near = [[total[t] if 0 <= t < n - w else None for t in range(j - 2, j + 3)] for j in range(n - w)]
                    each.append([sum(x or 0 for x in m) / 5 if pool == "avg" else max(x for x in m if x is not None) for m in near])
                each = torch.tensor(each, dtype=torch.double)
                close(got[h], (each.mean(0) if reduce == "mean" else each.amax(0)) if n > w else torch.zeros(0), 1e-6)
    flat = evict.window_scores(torch.zeros(1, 1, 1, 4), torch.tensor([10]), torch.zeros(1, 11, 4), torch.arange(11)[None], 10)
    close(flat[0] * 11, torch.tensor([.6, .8, 1, 1, 1, 1, 1, 1, .8, .6]), 1e-6)  # zeros beyond the edges count


def test_select():
    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        n, budget, first, last = (int(torch.randint(0, 12, (1,), generator=rng)) for _ in range(4))
        scores = torch.randint(0, 4, (3, n), generator=rng).float()
        got = evict.select(scores, budget, min(first, n), last)
        for row, index in zip(scores, got):
            must_last = list(range(n))[n - min(last, budget, n):]
            order = must_last + [i for i in range(min(first, n)) if i not in must_last]
            order += sorted((i for i in range(n) if i not in order), key=lambda i: (-row[i], i))
            assert index.tolist() == sorted(order[:budget])


def test_pyramid_budgets():
    """The spec's vectors: released rounding, its uniform and keep-all branches, and the exact sums."""
    at = lambda n, exact=False: evict.pyramid_budgets(20, 4, 4, n, exact=exact)
    assert at(100) == [36, 26, 16, 6] and at(33) == [33, 25, 17, 9] and at(32) == [32, 24, 16, 8] and at(31) == [20] * 4 and at(19) == [19] * 4
    assert at(100, True) == [35, 25, 15, 5] and at(33, True) == [33, 24, 16, 7]
    big = evict.pyramid_budgets(320, 64, 32, 8192)
    assert big[0] == 564 and big[-1] == 99 and abs(sum(big) / 32 - 331.5) < 0.01
    for cap, window, n_layer, n in ((65, 64, 32, 9000), (10, 20, 5, 100), (50, 8, 1, 400), (50, 8, 7, 300), (0, 4, 3, 10)):
        for exact in (False, True):
            budgets = evict.pyramid_budgets(cap, window, n_layer, n, exact=exact)
            assert budgets == sorted(budgets, reverse=True) and 0 <= budgets[-1] and budgets[0] <= n
            assert not exact or sum(budgets) == cap * n_layer


def test_patching_lets_the_prompts_end_judge_each_chunk():
    """Scores of a patched chunk equal those of [chunk | prompt tail] in a fresh forward; the patch leaves no trace."""
    model, w = small(), 4
    tokens = torch.randint(61, (41,), generator=torch.Generator().manual_seed(3))
    cache = evict.make_cache(model, "snapkv", budget=6, obs_window=w, patch=True, chunk=16)
    generate(model, tokens, 1, cache=cache)
    assert held(cache) == [[18] * 2] * 3 and cache.seen == 41
    seen = {}
    def watch(layer, q, k, v):
        seen[layer] = q, k
        return attention(q, k, v, [0, len(q)], [0, len(q)])
    with torch.no_grad():
        model.hidden(torch.cat((tokens[:16], tokens[-w:])), watch)
    for layer in range(3):
        q, k = seen[layer]
        pos = torch.arange(20).expand(2, 20)
        scores = evict.window_scores(q[-w:].unflatten(1, (2, 3)), torch.arange(16, 20), k.transpose(0, 1), pos, 16)
        for h, index in enumerate(evict.select(scores, 6)):
            assert cache.positions(layer, h)[:6].tolist() == index.tolist()
    once = [evict.make_cache(model, "snapkv", budget=12, obs_window=w, patch=patch) for patch in (False, True)]
    assert generate(model, tokens, 6, cache=once[0]) == generate(model, tokens, 6, cache=once[1])  # one chunk: the same thing


def test_survivors_keep_their_keys_and_positions():
    """What is held equals the un-evicted cache's keys at those positions (first layer); KV heads are stored once."""
    model, tokens = small(), torch.randint(61, (40,), generator=torch.Generator().manual_seed(0))
    full, cache = KVCache(model), evict.make_cache(model, "snapkv", budget=3, chunk=9, obs_window=3)
    generate(model, tokens, 1, cache=full), generate(model, tokens, 1, cache=cache)
    slab, = cache.slabs[0]
    for h in range(2):
        close(slab.k[h, :slab.n], full.slabs[0][0].k[h][cache.positions(0, h)], 1e-12)
    bare = evict.unrotate(full.slabs[0][0].k[:, :40].transpose(0, 1)[:, :, None], model.config, 0)
    with torch.no_grad():
        first = model.model.layers[0]
        close(bare[:, :, 0], first.self_attn.k_proj(first.input_layernorm(model.model.embed_tokens(tokens))).unflatten(1, (2, 8)), 1e-6)
    assert len(cache.slabs[0]) == 1
    entries = sum(map(sum, held(cache)))
    assert entries * 2 * 8 * 8 <= cache.nbytes() <= 1.02 * entries * 2 * 8 * 8


def test_h2o_tova_and_norms_by_definition():
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(7, 2, 3, 8, generator=rng), torch.randn(2, 12, 8, generator=rng)
    q_pos, pos = torch.arange(5, 12), torch.arange(12).expand(2, 12)
    weights = torch.zeros(2, 3, 7, 12)
    for h in range(2):
        for g in range(3):
            for r in range(7):
                weights[h, g, r, :6 + r] = (k[h, :6 + r] @ q[r, h, g] / 8 ** 0.5).softmax(0)
    close(evict.heavy_hitter_scores(q, q_pos, k, pos), weights.sum((1, 2)), 1e-5)
    close(attention_triton.column_sums(q, q_pos, k, pos, len(q), rows=3), weights.sum(2), 1e-5)
    close(evict.last_query_scores(q, q_pos, k, pos), weights[:, :, -1].mean((0, 1)).expand(2, 12), 1e-6)
    model, tokens = small(), torch.randint(61, (40,), generator=rng)
    for policy in ("h2o", "tova"):
        cache = evict.make_cache(model, policy, budget=10, chunk=13)
        generate(model, tokens, 9, cache=cache)
        assert held(cache) == [[10] * 2] * 3  # also after decoding
        same = [torch.equal(cache.positions(i, 0), cache.positions(i, 1)) for i in range(3)]
        assert policy == "h2o" or all(same)
    cache = evict.make_cache(model, "knorm", budget=10, recent=3)
    generate(model, tokens, 1, cache=cache)
    full = KVCache(model)
    generate(model, tokens, 1, cache=full)
    norms = full.slabs[1][0].k[:, :40].norm(dim=-1)
    for h in range(2):
        assert cache.positions(1, h).tolist() == sorted([*norms[h, :37].argsort()[:7].tolist(), 37, 38, 39])


def test_decode_time_eviction_bounds_the_cache():
    model, tokens = small(), torch.randint(61, (20,), generator=torch.Generator().manual_seed(0))
    for policy in evict.CHUNK_RULES:
        cache = evict.make_cache(model, policy, budget=8, decode_every=5, decode_budget=12, obs_window=3)
        generate(model, tokens, 31, cache=cache)  # 30 decode steps
        assert held(cache) == [[12] * 2] * 3 and max(int(k.max()) for _, k in cache.log[6:]) == 16
        assert policy == "random" or cache.positions(1, 1)[-3:].tolist() == [47, 48, 49]  # the recent tail


def test_locret(tmp_path):
    """Scores depend on the token itself, not on what follows; training lowers the loss; the prompt's tail is held until its end."""
    model, rng = small(), torch.Generator().manual_seed(0)
    samples = [(torch.randint(61, (40,), generator=rng), 8)] * 60
    scorer, losses = evict.train_locret(model.float(), samples, hidden=32, lr=3e-3)
    assert losses[-1] < 0.7 * losses[0]
    again, _ = evict.train_locret(model, samples[:3], hidden=32)
    other, _ = evict.train_locret(model, samples[:3], hidden=32)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), other.parameters()))
    tokens = samples[0][0]
    notes = []
    for n in (20, 40):
        cache = evict.make_cache(model, "locret", budget=99, scorer=scorer)
        generate(model, tokens[:n], 1, cache=cache)
        notes.append(cache.notes)
    for layer in range(3):
        for h in range(2):
            close(notes[0][layer][h], notes[1][layer][h][:20], 1e-4)
    cache = evict.make_cache(model, "locret", budget=10, scorer=scorer, chunk=8, obs_window=4)
    generate(model, tokens, 5, cache=cache)
    assert held(cache) == [[14] * 2] * 3  # decoding never evicts


def test_eviction_refuses_what_means_nothing():
    model = small()
    for settings, words in ((dict(policy="magic"), "magic"), (dict(policy="snapkv"), "either budget or keep"),
                            (dict(policy="snapkv", budget=3, keep=0.5), "either"), (dict(policy="snapkv", budget=-1), "budget must be >= 0"),
                            (dict(policy="full", budget=3), "neither"), (dict(policy="streaming", keep=0.5), "not keep"),
                            (dict(policy="streaming", budget=3, sink=8), "no room for the sink"), (dict(policy="knorm", budget=3, patch=True), "patch"),
                            (dict(policy="heads"), "mask"), (dict(policy="heads", heads=torch.ones(2, 2)), "mask"),
                            (dict(policy="locret", budget=3), "scorer"), (dict(policy="snapkv", keep=1.5), "keep must be"),
                            (dict(policy="snapkv", keep=math.nan), "keep must be"),
                            (dict(policy="snapkv", keep=0.5, decode_every=2), "decode_budget"), (dict(policy="snapkv", budget=3, kernel=4), "odd"),
                            (dict(policy="snapkv", budget=3, pool="mid"), "pool"), (dict(policy="full", chunk=0), "chunk")):
        with pytest.raises(ValueError, match=words):
            evict.make_cache(model, **settings)

# --- footprint ----------------------------------------------------------------------------------------------------------

def matrix_footprint(n, m, chunk, keep_after):
    """The definition: a boolean (row, key) matrix of what is not evicted. keep_after(step, held, new, decoding) -> entries kept."""
    held, rows, peak, start = [], torch.zeros(n + m, n + m, dtype=torch.bool), 0, 0
    steps = [min(chunk, n - a) for a in range(0, n, chunk)] + [1] * m
    for i, t in enumerate(steps):
        for r in range(t):
            rows[start + r, held] = True
            rows[start + r, start:start + r + 1] = True
        peak = max(peak, len(held) + t)
        held = keep_after(held, list(range(start, start + t)), i >= len(steps) - m)
        start += t
    return Fraction(int(rows.sum()), (n + m) * (n + m + 1) // 2), Fraction(peak, n + m)


def test_footprint_closed_forms_equal_the_matrix():
    rng = np.random.default_rng(0)
    for _ in range(1200):
        n, m, chunk, sink, window, k = (int(rng.integers(lo, hi)) for lo, hi in ((0, 30), (0, 12), (1, 34), (0, 6), (0, 12), (0, 14)))
        if n + m == 0:
            continue
        stream = lambda held, new, decoding: [x for x in held + new if x < sink or x > (new[-1] - window)]
        assert footprint.streaming(n, m, chunk, sink, window) == matrix_footprint(n, m, chunk, stream)
        assert footprint.full(n, m) == matrix_footprint(n, m, chunk, lambda held, new, decoding: held + new)
        assert footprint.postfill(n, m, k) == matrix_footprint(n, m, max(n, 1), lambda held, new, decoding: held + new if decoding else new[:k])
        assert footprint.chunked(n, m, chunk, k) == matrix_footprint(n, m, chunk, lambda held, new, decoding: held + new if decoding else held + new[:k])
        assert footprint.rolling(n, m, chunk, k) == matrix_footprint(n, m, chunk, lambda held, new, decoding: (held + new)[:k])
        assert footprint.rolling(n, m, chunk, k, False) == matrix_footprint(
            n, m, chunk, lambda held, new, decoding: held + new if decoding else (held + new)[:k])
        s = Fraction(int(rng.integers(0, 9)), 8)
        a, b = footprint.streaming(n, m, chunk, sink, window), footprint.full(n, m)
        got = footprint.heads(n, m, chunk, sink, window, s)
        assert got[0] == s * a[0] + (1 - s) * b[0] and got[1] <= s * a[1] + (1 - s) * b[1]


def test_footprint_worked_examples():
    f = Fraction
    for got, cells, peak in (
            (footprint.full(12, 4), 136, 16), (footprint.streaming(12, 4, 12, 1, 2), 94, 12), (footprint.streaming(12, 4, 4, 1, 2), 70, 7),
            (footprint.streaming(12, 4, 5, 1, 2), 70, 8), (footprint.streaming(12, 4, 1, 1, 2), 58, 4), (footprint.postfill(12, 4, 3), 100, 12),
            (footprint.rolling(12, 4, 12, 6), 106, 12), (footprint.chunked(12, 4, 4, 2), 88, 10), (footprint.chunked(12, 4, 4, 1), 64, 7),
            (footprint.chunked(12, 4, 4, 3), 112, 13), (footprint.chunked(12, 4, 5, 2), 85, 10), (footprint.rolling(12, 4, 4, 3, False), 76, 7),
            (footprint.rolling(12, 4, 4, 3), 70, 7), (footprint.heads(12, 4, 4, 1, 2, f(1, 2)), 103, 10),
            (footprint.heads(12, 4, 4, 1, 2, 0.75), f(173, 2), f(33, 4))):
        assert got == (f(cells) / 136, f(peak) / 16)
    for percent, got in ((99.80, footprint.streaming(100000, 100, 100000, 128, 1024)), (33.73, footprint.streaming(100000, 100, 32768, 128, 1024)),
                         (4.29, footprint.streaming(100000, 100, 2048, 128, 1024)), (53.6, footprint.heads(100000, 100, 32768, 128, 1024, 0.7)),
                         (37.1, footprint.heads(100000, 100, 8192, 128, 1024, 0.7)), (80.25, footprint.postfill(24000, 3000, 0)),
                         (34.5, footprint.chunked(100000, 100, 2048, round(0.3 * 2048), extra=64))):
        assert abs(100 * float(got[0]) - percent) <= 0.051, (percent, float(got[0]))
    official = footprint.heads(100000, 100, 32768, 128, 1024, 0.7)
    assert abs(float(official[0]) - 0.536079) < 1e-6 and abs(float(official[1]) - 0.531820) < 1e-6
    for bad in (lambda: footprint.full(0, 0), lambda: footprint.full(-1, 4), lambda: footprint.chunked(4, 4, 0, 1),
                lambda: footprint.heads(4, 4, 1, 1, 1, 1.5)):
        with pytest.raises(ValueError):
            bad()
    with pytest.raises(ValueError, match="budget must be"):
        footprint.postfill(4, 4, -1)
    config = LlamaConfig(vocab_size=9, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, n_ff=9, head_dim=128)
    assert footprint.bytes_per_token(config, 2) == 131072


def test_critical_footprint():
    xy = [(1, 100), (.8, 95), (.6, 92), (.4, 80), (.2, 20)]
    assert footprint.critical(xy, 100) == footprint.critical(xy[::-1], 100) and abs(footprint.critical(xy, 100)[1] - 17 / 30) < 1e-12
    bound, value = footprint.critical([(93.3, 95), (60, 94.9), (53.3, 92.5), (46.7, 87.7), (40, 50)], 95.2)
    assert bound == "=" and abs(value - 46.341) < 0.001
    assert footprint.critical([(.5, 95), (.9, 99)], 100) == ("<", .5) and footprint.critical([(.5, 5), (.9, 9)], 100) == (">", .9)
    dip = [(.5, 50), (.6, 92), (.7, 80), (.8, 95)]  # recovers below its dip: the smallest footprint counts
    assert abs(footprint.critical(dip, 100)[1] - (.5 + .1 * 40 / 42)) < 1e-12
    exact = footprint.critical([(Fraction(1, 4), 0), (Fraction(3, 4), 100)], 100, Fraction(1, 2))
    assert exact == ("=", Fraction(1, 2))


def test_footprint_of_a_run_equals_its_closed_form():
    """What the cache logged while generating m + 1 tokens (the last is not fed back) against the formulas."""
    model, tokens, n, m = small(), torch.randint(61, (45,), generator=torch.Generator().manual_seed(0)), 45, 9
    mask = torch.tensor([[True, False], [False, False], [False, True]])
    for policy, settings, chunk, want in (
            ("full", {}, 8, footprint.full(n, m)), ("streaming", dict(sink=2, window=7), 8, footprint.streaming(n, m, 8, 2, 6)),
            ("heads", dict(heads=mask, sink=2, window=7), 8, footprint.heads(n, m, 8, 2, 6, Fraction(4, 6))),
            ("snapkv", dict(budget=11, obs_window=4), None, footprint.postfill(n, m, 11)),
            ("snapkv", dict(budget=3, obs_window=4), 8, footprint.chunked(n, m, 8, 3)),
            ("snapkv", dict(budget=3, obs_window=4, patch=True), 8, footprint.chunked(n, m, 8, 3)),
            ("tova", dict(budget=10), 8, footprint.rolling(n, m, 8, 10)),
            ("h2o", dict(budget=10), 8, footprint.rolling(n, m, 8, 10))):
        cache = evict.make_cache(model, policy, chunk=chunk, **settings)
        generate(model, tokens, m + 1, cache=cache)
        assert (cache.footprint(), cache.peak()) == want, policy


def test_footprint_sweep_resumes_and_draws(tmp_path):
    """Three points of a sweep are removed, one line is cut short: only those run again, and the rest stand as they were."""
    save_model(Llama(eval_tasks.TINY).init_weights(0), tmp_path / "out" / "tiny-seed0")
    args = [os.path.abspath(footprint.__file__), "--n", "2", "--lengths", "64", "--curves", "streaming,snapkv patched", "--shares", "0.05,0.1,0.5,0.9",
            "--chunk", "16"]
    first = script(*args, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    path = tmp_path / "out" / "footprint" / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 8 and "left out: streaming with a share of 0.05 of 64 (no more than its --sink of 4)\n" in first.stdout
    path.write_text("".join(lines[:4]) + lines[4][:30])
    refused = script(*args, cwd=tmp_path)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    again = script(*args, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    after = path.read_text().splitlines(keepends=True)
    drop = lambda line: {k: v for k, v in json.loads(line).items() if k != "seconds"}
    assert after[:4] == lines[:4] and [drop(x) for x in after] == [drop(x) for x in lines]
    assert again.stdout == first.stdout and set(json.loads(first.stdout.splitlines()[-1])["critical"]) == {"facts 64 streaming", "facts 64 snapkv patched"}
    picture = xml.etree.ElementTree.parse(tmp_path / "out" / "footprint" / "footprint-facts-64.svg")
    assert len(picture.findall(".//{http://www.w3.org/2000/svg}circle")) == 7
    with pytest.raises(ValueError, match="finite"):
        model_file.plot({"a": [(0.5, math.nan)]}, "", "x", "y")
    picture = xml.etree.ElementTree.fromstring(model_file.plot({"<a>": [(0, 1), (4, 2)], "b": [(2, 0)]}, "a & b", "x", "y", marks={"m": 1.5}))
    texts = [e.text for e in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"<a>", "b", "a & b", "m", "0", "4", "2"} <= set(texts)  # names, and the ends of both axes
    assert model_file.ticks(1.0) == [0, 0.2, 0.4, 0.6, 0.8, 1] and model_file.ticks(16) == [0, 5, 10, 15] and model_file.ticks(1252) == [0, 500, 1000]


@slow
def test_memory_is_drawn_against_budget(tmp_path):
    save_model(Llama(eval_tasks.TINY).init_weights(0), tmp_path / "m")
    args = [os.path.join(os.path.dirname(os.path.abspath(__file__)), "evict.py"), "--model", "m", "--length", "64", "--new", "1", "--chunk", "16",
            "--figure", "memory.svg"]
    done = script(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()[:-1]]
    assert len(rows) == 16 and rows[0]["entries_per_head"] == 64 and all(row["entries_per_head"] < 64 for row in rows[1:])
    assert len(xml.etree.ElementTree.parse(tmp_path / "memory.svg").findall(".//{http://www.w3.org/2000/svg}circle")) == 15
    refused = script(*args, "--kernel", "3", cwd=tmp_path)
    assert refused.returncode == 2 and "--chunk alone" in refused.stderr


# --- a real Llama -----------------------------------------------------------------------------------------------------

needs_llama = pytest.mark.skipif("LLAMA_DIR" not in os.environ, reason="LLAMA_DIR names no folder of a real Llama")


@needs_llama
def test_real_llama_generates_the_same_in_any_chunks():
    model, tokenizer = load_model(os.environ["LLAMA_DIR"]), load_tokenizer(os.environ["LLAMA_DIR"])
    tokens = tokenizer.encode("The three primary colours are red,")
    answers = [generate(model, tokens, 12, chunk=chunk) for chunk in (None, 1, 3)]
    assert answers[0] == answers[1] == answers[2] and " yellow" in tokenizer.decode(answers[0])
    assert tokenizer.decode(tokenizer.encode(open(__file__).read())) == open(__file__).read()


@needs_llama
def test_real_llama_survives_a_round_trip(tmp_path):
    model = load_model(os.environ["LLAMA_DIR"], dtype=torch.bfloat16)
    save_model(model, tmp_path, max_shard_bytes=100_000_000)
    again = load_model(tmp_path, dtype=torch.bfloat16)
    assert again.config == model.config and all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


# --- tasks and scorers ------------------------------------------------------------------------------------------------

ROUTE = "From Sofia, take a bus to Riga.\nFrom Riga, take a train to Cork.\nFrom Cork, take a bus to Turin."
GOOD_TABLE = "name\tprice\nRed Lamp\t$5\nOld Clock\t$45\n"
CASES = [  # scorer, text (prefix and prediction), example, what the released scorers answer
    ("qa", "Answer: an apple", {"answer": ["The Apple!"]}, {"exact_match": 1, "f1": 1, "rougeL_f1": 0.5, "rougeL_recall": 0.5}),
    ("qa", "Answer: yes it is", {"answer": ["yes"]}, {"exact_match": 0, "f1": 0, "substring_exact_match": 1}),
    ("qa", "Paris\nAnswer: Lyon", {"answer": [["Lyon", "Lugdunum"]]}, {"exact_match": 1}),
    ("icl", "label: 3\n\nWhat is next ?\nlabel: 4", {"answer": "3"}, {"exact_match": 1}),
    ("choice", "C", {"answer": ["B", "B. Bob Lee"]}, {"exact_match": 0, "substring_exact_match": 0}),
    ("choice", "the", {"answer": ["A", "A. Ann"]}, {"exact_match": 1, "substring_exact_match": 0}),
    ("choice", "I say B. Bob Lee", {"answer": ["B", "B. Bob Lee"]}, {"exact_match": 1, "substring_exact_match": 1}),
    ("ruler_recall", "they are 4821763 and 99", {"answer": ["4821763", "1234567"]}, {"ruler_recall": 0.5}),
    ("rerank", "Ranking: ID102 > ID107 > [ID: 105] > [111]", {"qrel": [["101", "0"], ["102", "3"], ["103", "1"], ["104", "0"], ["105", "2"],
     ["106", "0"], ["107", "3"], ["108", "0"], ["109", "1"], ["110", "0"], ["111", "2"], ["112", "0"]], "k_values": [1, 5, 10]},
     {"NDCG@1": 1, "NDCG@5": 0.94583, "NDCG@10": 0.90089, "MAP@1": 0.16667, "MAP@10": 0.66667, "Recall@5": 0.66667, "P@5": 0.8, "num_preds": 4}),
    ("ndcg", "", {"scores": {"10": 2.0, "9": 2.0, "8": 1.0}, "qrel": {"10": 3, "9": 0, "8": 1}, "k_values": [1, 5, 10]},
     {"NDCG@1": 0, "NDCG@5": 0.659, "MAP@5": 0.58333, "MRR": 0.5}),
    ("parse_output", "Answer: x\ny", {"prefix_arg": "Answer:"}, {"parsed": "x"}),
    ("normalize_answer", "The  A.B. \"an\" apple\u2019s", {}, {"normalized": "ab apple\u2019s"}),
    ("remove_citations", "word [1][2]. More [3] text | end]", {}, {"text": "word. More text end"}),
    ("alce_asqa", "In 1912, Roald [2] Amundsen\n\nstood.", {"qa_pairs": [{"short_answers": ["1912"]}, {"short_answers": ["Roald Amundsen"]},
     {"short_answers": ["South Pole"]}]}, {"str_em": 200 / 3, "str_hit": 0}),
    ("alce_qampari", "Marazan [1], Ruined City [4].", {"answers": [["Marazan"], ["S. Morris"], ["Ruined City"], ["X"]]},
     {"num_preds": 2, "qampari_prec": 100, "qampari_rec": 50, "qampari_rec_top5": 50}),
    ("html_to_tsv", "```tsv\n" + GOOD_TABLE + "```", {"reference_output": GOOD_TABLE}, {"f1": 1, "extraction_rate": 1}),
    ("html_to_tsv", "```tsv\nname\tprice\nold clock\t45\nX\t1", {"reference_output": GOOD_TABLE}, {"precision": 0.5, "recall": 0.5, "f1": 0.5}),
    ("html_to_tsv", "Here:\n" + GOOD_TABLE, {"reference_output": GOOD_TABLE}, {"f1": 0, "extraction_rate": 0}),
    ("path_traversal", f"<Route>\n{ROUTE}\n</Route>", {"reference_output": ROUTE + "\n"}, {"accuracy": 1, "partial_accuracy": 1}),
    ("path_traversal", f"<Route>{ROUTE.replace('a train', 'the train')}</Route>", {"reference_output": ROUTE}, {"accuracy": 0, "partial_accuracy": 2 / 3}),
    ("path_traversal", ROUTE, {"reference_output": ROUTE}, {"partial_accuracy": 0, "extraction_rate": 0}),
    ("tom_tracking", "- step 0: (INITIAL STATE) {a}\n- Step 1: x", {"reference_output": "T:\n- Step 0: (initial state) {a}\n- Step 1: y"},
     {"accuracy": 0, "partial_accuracy": 0.5, "extraction_rate": 1}),
]
CASES += [("countdown", text, {"item": {"nums": [8, 2, 4, 3], "target": 11}, "reference_output": "# Search Procedure\nI\n |- Pick two numbers (1, 2)\n"
                               "  |- Try 1 + 2 = 3. Evaluate 3 != 4, drop this branch.\n\nNow"}, want) for text, want in (
    ("<Solution>\n8 / 2 = 4\n4 * 3 = 12\n12 - 4 = 8\n</Solution>", {"accuracy": 0, "extraction_rate": 1}),
    ("<Solution>\n8 / 2 = 4\n 4 + 4=8\n8 + 3 = 11\n</Solution>", {"accuracy": 1}),
    ("<Solution>\n8 / 2 = 4\n4 + 4 = 8\n8 + 3 = 11\n8 + 3 = 11\n</Solution>", {"accuracy": 0}),
    ("<Solution>\n8 / 0 = 4\n9**9**9 = 1\n8 + 3 = 11\n</Solution>", {"accuracy": 0}),
    ("# Search Procedure\nI\n |- Pick two numbers (1, 2)\n  |- Try 1 + 2 = 9. drop this branch", {"partial_accuracy": 0.5, "extraction_rate": 0}),
    ("# Search Procedure\nI", {"partial_accuracy": -0.5}), ("# Search Procedure\nJ", {"partial_accuracy": 0}))]


def test_scorers_answer_as_the_released_ones():
    for name, text, example, want in CASES:
        got = eval_tasks.SCORERS[name](text, example)
        for key, value in want.items():
            assert got[key] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-6)), (name, text, key, got)


@pytest.mark.skipif("SCORER_CASES" not in os.environ, reason="wants a JSON file of scorer cases in SCORER_CASES")
def test_scorers_on_a_file_of_cases():
    for case in json.load(open(os.environ["SCORER_CASES"])):
        got = eval_tasks.SCORERS[case["scorer"]](case["prefix"] + (case["prediction"] or ""), case["example"])
        for key, value in (case["expected"] or case["expected_rmodels"]).items():
            assert got[key] == (value if isinstance(value, str) else pytest.approx(value, abs=1e-6)), (case["id"], key)


def test_stemmer_and_rouge():
    """Stems of Porter's own examples and of NLTK's extensions; ROUGE-L against every subsequence."""
    for words, stems in (("caresses ponies ties caress cats feed agreed plastered bled motoring sing conflated troubled sized hopping falling",
                          "caress poni tie caress cat feed agre plaster bled motor sing conflat troubl size hop fall"),
                         ("relational conditional valenci hesitanci digitizer conformabli radicalli happy sky dying news enjoy say ion",
                          "relat condit valenc hesit digit conform radic happi sky die news enjoy say ion"),
                         ("triplicate formative formalize hopeful goodness revival allowance adjustable irritant replacement adoption rate "
                          "probate cease controll roll generalization oscillators analogical archaeology apologies died",
                          "triplic form formal hope good reviv allow adjust irrit replac adopt rate probat ceas control roll gener oscil analog "
                          "archaeolog apolog die")):
        assert [eval_tasks.stem(w) for w in words.split()] == stems.split()
    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = ([str(x) for x in rng.integers(0, 4, rng.integers(1, 8))] for _ in range(2))
        is_sub = lambda s, t: all(x in it for it in [iter(t)] for x in s)
        longest = max(len(s) for r in range(len(a) + 1) for s in itertools.combinations(a, r) if is_sub(s, b))
        f1, recall = eval_tasks.rouge_l(" ".join(b), " ".join(a))
        assert recall == pytest.approx(longest / len(a)) and f1 == pytest.approx(2 * longest / (len(a) + len(b)))


TEXT_TASKS = [name for name in eval_tasks.TASKS if name != "facts"]


def gold_text(name, example):
    kind = eval_tasks.TASKS[name].scorer
    text = example.gold.get("reference_output") or (" ".join(example.answer) if kind == "ruler_recall" else eval_tasks.flat(example.answer)[0])
    return {"path_traversal": f"<Route>{text}</Route>", "html_to_tsv": f"```tsv\n{text}```"}.get(kind, " " + text)


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_built_tasks_have_their_length_and_a_right_answer(name):
    """2 % of the length, the same whatever n is, gold scores 1 and nothing scores 0."""
    tokenizer = model_file.byte_tokenizer()
    length = next(n for n in (4500, 16000, 80000) if tier_fits(name, n, tokenizer))
    examples = eval_tasks.build(name, 2, length, 5, tokenizer)
    assert eval_tasks.build(name, 1, length, 5, tokenizer) == examples[:1] and examples != eval_tasks.build(name, 2, length, 6, tokenizer)
    for example in examples:
        assert 0.98 * length <= len(example.prompt) <= length and tokenizer.decode(example.prompt[1:]).endswith(example.prefix)
        if not name.startswith("code") or shutil.which("g++"):
            assert eval_tasks.score(name, gold_text(name, example), example)["score"] == 1, gold_text(name, example)
            assert eval_tasks.score(name, "", example)["score"] == 0
    with pytest.raises(ValueError, match="at least"):
        eval_tasks.build(name, 1, 10, 0, tokenizer)


def tier_fits(name, length, tokenizer):
    with contextlib.suppress(ValueError):
        return bool(eval_tasks.build(name, 2, length, 5, tokenizer))


def test_built_tasks_are_the_same_everywhere():
    """A fingerprint of all tasks, taken once: another machine or version must give the same prompts."""
    prompts = [eval_tasks.build(name, 1, 6000, 1, model_file.byte_tokenizer())[0].prompt for name in TEXT_TASKS if name[-2:] not in ("2k", "8k")]
    assert hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16] == "da8a7096d19f9b05"


def test_countdown_search_is_complete():
    """A trace exists exactly where brute force finds a solution (integers below 2000, larger number first), and it is one."""
    def solvable(numbers, target):
        if len(numbers) == 1:
            return numbers[0] == target
        for i, j in itertools.combinations(range(len(numbers)), 2):
            rest = [x for k, x in enumerate(numbers) if k not in (i, j)]
            a, b = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
            results = {a + b, a - b, a * b} | ({a // b} if b and a % b == 0 else set())
            if any(c < 2000 and solvable([c, *rest], target) for c in results):
                return True
        return False
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(12):
        numbers, target = rng.integers(1, 50, 4).tolist(), int(rng.integers(10, 51))
        trace = eval_tasks.countdown_trace(numbers, target)
        seen.add(trace is not None)
        assert (trace is not None) == solvable(numbers, target)
        assert trace is None or eval_tasks.solves(eval_tasks.tagged(trace, "Solution").split("\n"), numbers, target)
    assert seen == {True, False}


def test_belief_traces_follow_from_the_story():
    """The story's sentences replayed on their own give every state and belief of the trace."""
    for seed in range(20):
        story, who, what, trace = eval_tasks.tom_story(random.Random(seed), 30)
        at, lies, belief, states = {}, {}, None, []
        for sentence in story:
            step = sentence.startswith("Step")
            text = re.sub(r"^Step \d+: ", "", sentence).rstrip(".")
            if found := re.fullmatch(r"(\w+) is in the (.+)", text) or re.fullmatch(r"(\w+) (?:moves to|enters) the (\w+)", text):
                at[found[1]] = found[2]
            elif found := re.fullmatch(r"The (.+) is on the (.+'s .+)", text):
                lies[found[1]] = found[2]
            elif found := re.fullmatch(r"(\w+) leaves the (\w+)", text):
                assert at[found[1]] == found[2]
                at[found[1]] = None
            elif found := re.fullmatch(r"(\w+) moves to the (\w+) with the (.+) and puts it on the (.+'s .+)", text):
                assert lies[found[3]].startswith(at[found[1]] + "'s") and found[4].startswith(found[2] + "'s")
                at[found[1]], lies[found[3]] = found[2], found[4]
            else:
                found = re.fullmatch(r"(\w+) moves the (.+) to the (.+'s .+)", text)
                assert lies[found[2]].startswith(at[found[1]] + "'s") and found[3].startswith(at[found[1]] + "'s") and lies[found[2]] != found[3]
                lies[found[2]] = found[3]
            if step or sentence == story[3]:  # two agents and two objects stand first
                sees = lies[what].split("'s ")[0] == at[who]
                belief = lies[what] if sees else belief
                states.append(f"{{{who} location: {at[who]}; {what} location: {lies[what]}; {who} sees {what}: {sees}; "
                              f"{who}'s belief on {what}: {belief}}}")
        lines = trace.split("\n")
        assert [line[line.index("{"):] for line in lines[1:-1]] == states and len(states) == 31 and lines[-1] == f"Final Answer: the {belief}"


def test_travel_problems_have_one_plan():
    """Against every order of the cities."""
    for i in range(4):
        item, trace = eval_tasks.travel_problem(random.Random(i), (1500, 5500))
        days = {c["city"]: c["num_days"] for c in item["constraints"] if c["type"] == "duration"}
        fixed = {c["city"]: c["start_day"] for c in item["constraints"] if c["type"] == "fixed"}
        flights, plans = {tuple(x) for x in item["connected_cities"]}, []
        for order in itertools.permutations(days):
            start = {c: 1 + sum(days[x] - 1 for x in order[:j]) for j, c in enumerate(order)}
            if all(pair in flights for pair in zip(order, order[1:])) and all(start[c] == day for c, day in fixed.items()):
                plans.append("**".join(order))
        assert plans == [item["ground_truth_cities"]]
        assert eval_tasks.parse_plan(eval_tasks.tagged(trace, "Plan")) == [(c, days[c]) for c in plans[0].split("**")]


def test_official_files_are_read_as_released(tmp_path):
    """Rows, order, worked examples and prompt structure of HELMET and LongProc, and what a wrong folder is told."""
    ctx = lambda what, i: [{"title": f"{what} {i} {j}", "text": f"Text {j} about {what} {i}."} for j in range(2)]
    put = lambda name, rows: ((tmp_path / name).parent.mkdir(exist_ok=True, parents=True),
                              (tmp_path / name).write_text("\n".join(map(json.dumps, rows))))
    put("kilt/nq-dev-multikilt_1000_k50_dep6.jsonl", [{"question": f"Who wrote book {i}?", "answers": [f"Author {i}"],
                                                       "ctxs": ctx("book", i)} for i in range(2)])
    put("kilt/nq-train-multikilt_1000_k3_dep6.jsonl", [{"question": f"Which river is river {i}?", "answers": [f"River {i}"],
                                                        "ctxs": ctx("river", i)} for i in (*range(7), 2)])
    example = eval_tasks.load("helmet:kilt_nq", str(tmp_path))[0]
    river = "Document (Title: river {0} 0): Text 0 about river {0}.\n\nDocument (Title: river {0} 1): Text 1 about river {0}.\n\n" \
            "Question: Which river is river {0}?\nAnswer: River {0}\n\n"
    assert example.user.endswith(river.format(6) + river.format(2) + "Document (Title: book 0 0): Text 0 about book 0.\n\n"
                                 "Document (Title: book 0 1): Text 1 about book 0.\n\nQuestion: Who wrote book 0?")
    assert example.prefix == "Answer:" and eval_tasks.score("helmet:kilt_nq", " author 0", example)["score"] == 1
    cut = eval_tasks.load("kilt_nq", str(tmp_path), length=len(example.prompt) + 20 - 9)[0]  # 20 tokens are for the answer
    assert cut.n_cut == 9 and len(cut.prompt) == len(example.prompt) - 9 and cut.user.endswith("Text 1 abou\n\nQuestion: Who wrote book 0?")
    (tmp_path / "path_traversal").mkdir()
    with pytest.raises(FileNotFoundError, match="prompts.yaml.*LongProc"):
        eval_tasks.load("longproc:path_traversal_0.5k", str(tmp_path))
    (tmp_path / "path_traversal" / "prompts.yaml").write_text("USER_PROMPT: |-\n  Map {{x}}:\n  {city_context}\n\n  From {src_city} to {dst_city}.\n")
    paths = [{"context_nl": "C", "question_repr": ["A", "B"], "answer_nl": ROUTE}]
    (tmp_path / "path_traversal" / "path_traversal_0.5k.json").write_text(json.dumps(paths))
    example, = eval_tasks.load("longproc:path_traversal_0.5k", str(tmp_path))
    assert example.user == "Map {x}:\nC\n\nFrom A to B." and example.answer == ROUTE and example.max_new_tokens == 1024
    put("ruler/vt/validation_8192.jsonl", [{"context": "C", "query": "q", "num_v": 1, "example": "e", "answer": []}])
    with pytest.raises(ValueError, match="vt/validation_8192.jsonl: not ruler_vt's rows"):
        eval_tasks.load("ruler_vt", str(tmp_path))
    os.remove(tmp_path / "ruler/vt/validation_8192.jsonl")
    put("json_kv/test_k105_dep6.jsonl", [{"context": "JSON"}])
    for name, words in (("json_kv", "not json_kv's rows"), ("narrativeqa", "needs a judge"), ("kilt_xy", "unknown"), ("ruler_vt", "ruler/vt")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            eval_tasks.load(name, str(tmp_path))


def test_balanced_shots():
    rows = [{"text": str(i), "label": i % 3} for i in range(10)]
    shots = eval_tasks.balanced(rows, "label", 8, 1)
    assert [sorted(r["label"] for r in shots[i:i + 3]) for i in (0, 3)] == [[0, 1, 2]] * 2 and len({r["text"] for r in shots}) == 8


def test_bm25_by_definition():
    """Every score by the formula, with a word in most documents (its idf is negative), and ties: the later document first."""
    rng = np.random.default_rng(0)
    docs = [" ".join(f"w{int(x)}" for x in rng.zipf(1.5, rng.integers(1, 30)) if x < 40) for _ in range(50)] + ["w1 w2", "w1 w2"]
    index, texts = eval_tasks.BM25(docs), [d.split() for d in docs]
    df = {w: sum(w in t for t in texts) for t in texts for w in t}
    idf = {w: math.log(52 - n + 0.5) - math.log(n + 0.5) for w, n in df.items()}
    floor = 0.25 * sum(idf.values()) / len(idf)
    assert min(idf.values()) < 0
    mean = sum(map(len, texts)) / 52
    for query in ("w1 w2 w2 w7", "w3", "unknown w5"):
        want = [sum((idf[w] if idf[w] >= 0 else floor) * t.count(w) * 2.5 / (t.count(w) + 1.5 * (0.25 + 0.75 * len(t) / mean))
                    for w in query.split() if w in idf) for t in texts]
        close(torch.tensor(index.scores(query)), torch.tensor(want, dtype=torch.float64), 1e-9)
        order = sorted(range(52), key=lambda i: (index.scores(query)[i], i), reverse=True)
        for k in (1, 5, 52, 99):
            assert [i for i, _ in index.top(query, k)] == order[:k]


def test_listwise_reranking_and_metrics():
    assert eval_tasks.parse_order("[3] > [1] > [3] > [9]", 4) == [2, 0, 1, 3]
    texts = [f"passage {i}" for i in np.random.default_rng(0).permutation(23)]
    def ask(prompt):  # a perfect judge: the larger the number in a passage, the better
        found = re.findall(r"\[(\d+)\] passage (\d+)", prompt)
        return " > ".join(f"[{i}]" for i, _ in sorted(found, key=lambda x: -int(x[1])))
    order = eval_tasks.listwise(ask, "q", texts)
    assert sorted(order) == list(range(23)) and [texts[i] for i in order[:5]] == [f"passage {i}" for i in range(22, 17, -1)]
    got = eval_tasks.retrieval_metrics([4, 7, 1, 9, 8, 2], {7, 2})
    assert got == {"recall@5": 0.5, "recall@20": 1, "mrr": 0.5,
                   "ndcg@10": pytest.approx((1 / math.log2(3) + 1 / math.log2(7)) / (1 + 1 / math.log2(3)))}


@pytest.mark.skipif(not shutil.which("g++"), reason="wants g++")
def test_generated_code_runs_within_limits(tmp_path):
    """Endless loops, floods of output and memory hogs score 0 in time; no file is left and no network is there."""
    run_it = lambda body: eval_tasks.score_code(f"```cpp\n{body}\n```", {"item": {"testcases": [[["1 2"], ["3"]]]}})["accuracy"]
    assert run_it("int main() { int a, b; cin >> a >> b; cout << a + b << endl; }") == 1
    start = time.perf_counter()
    for body in ("int main() { for (;;); }", "int main() { for (;;) cout << 3 << endl; }", "int main() { vector<char> v(2u << 30, 1); cout << 3 << endl; }",
                 "int main() { cout << 3; }", "not code", "#include \"/dev/zero\"\nint main() {}"):
        assert run_it(body) == 0, body
    assert time.perf_counter() - start < 60
    if eval_tasks.has_namespaces():
        nets = eval_tasks.run_limited([sys.executable, "-I", "-c", "import socket; print(socket.if_nameindex())"], str(tmp_path), "", 5)
        assert nets == "[(1, 'lo')]\n"
        mark = tmp_path / "mark"  # a daemon that would write after the command's end
        daemon = f"import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(1.5); open({str(mark)!r}, 'w')"
        assert eval_tasks.run_limited([sys.executable, "-I", "-c", daemon], str(tmp_path), "", 5) == ""
        time.sleep(2)
        assert not mark.exists()


def test_chat_length_and_gold_are_as_asked(tmp_path, monkeypatch, capsys):
    """--no-chat gives a benchmark's chat task as plain text, a host comes before plain text and within the length, LongProc runs once whatever
    --lengths says, another gold is another example, and the fact stream wants the tiny model."""
    special = {"<|im_start|>": 256, "<|im_end|>": 257}
    tokenizer = model_file.Tokenizer({bytes([b]): b for b in range(256)}, [], r"(?s:.{1,32})", special)
    config = lambda **given: eval_tasks.Config(**{"data": str(tmp_path), "n": 1, **given})
    loads = []
    monkeypatch.setattr(eval_tasks, "load", lambda name, path, n, tokenizer, length, chat: loads.append((length, chat)) or [])
    for given in ({}, {"chat": True}, {"chat": False}, {"prefix_host": "a.org"}):
        list(eval_tasks.examples_of(config(**given), "longproc:countdown_0.5k", 0, ["full"], tokenizer))
        list(eval_tasks.examples_of(config(**given), "helmet:icl_banking77", 2000, ["full"], tokenizer))
    header = len(meco.prompt(tokenizer, "", "a.org"))
    assert loads == [(None, None), (2000, None), (None, True), (2000, True), (None, False), (2000, False), (None, False), (2000 - header, False)]
    (_, _, plain), = eval_tasks.examples_of(config(prefix_host="a.org"), "niah_s", 800, ["full"], tokenizer)
    assert tokenizer.decode(plain.prompt).startswith("URL: a.org\n\n") and 0.98 * 800 <= len(plain.prompt) <= 800
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    save_model(small(vocab_size=258, eos_ids=(257,)), "model")
    save_model(Llama(eval_tasks.TINY).init_weights(0), "tiny")

    def go(*args):
        monkeypatch.setattr(sys, "argv", ["eval_tasks.py", "--n", "1", "--max_new_tokens", "2", "--dtype", "float32", "--out", "x.jsonl", *args])
        with contextlib.suppress(SystemExit):
            model_file.run(eval_tasks.main)
        return capsys.readouterr()
    examples = lambda gold: [eval_tasks.Example("longproc:countdown_0.5k", [1, 2], "", 2, gold=gold)]
    for runs, gold in ((1, {"answer": "a"}), (1, {"answer": "a"}), (2, {"answer": "b"})):
        monkeypatch.setattr(eval_tasks, "load", lambda *_, **__: examples(gold))
        monkeypatch.setattr(eval_tasks, "score", lambda *_: {"score": 0.0})
        said = go("--model", "model", "--tasks", "longproc:countdown_0.5k", "--data", ".", "--lengths", "64,1024")
        assert len(open("x.jsonl").readlines()) == runs and "| longproc:countdown_0.5k | - | full |" in said.out, said.err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert "made of token ids" in go("--model", "model", "--tasks", "facts", "--lengths", "64").err
    assert json.loads(go("--model", "tiny", "--tasks", "facts", "--lengths", "64", "--out", "y.jsonl").out.splitlines()[-1])["results"]


def test_evaluation_resumes_and_names_what_is_wrong(tmp_path, monkeypatch, capsys):
    """A run whose last line was torn goes on where it stopped and ends with the same rows; nothing is run twice."""
    save_model(small(vocab_size=258, eos_ids=(257,)), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    args = ["eval_tasks.py", "--model", "model", "--tasks", "niah_s,icl", "--lengths", "1500", "--n", "2", "--policy", "full,snapkv,streaming",
            "--budget", "64", "--sink", "4", "--max_new_tokens", "4", "--dtype", "float32", "--out", "o/x.jsonl"]
    def go(argv):
        monkeypatch.setattr(sys, "argv", argv)
        with contextlib.suppress(SystemExit):
            model_file.run(eval_tasks.main)
        return capsys.readouterr()
    said = go(args).out
    rows = [json.loads(line) for line in open("o/x.jsonl")]
    assert len(rows) == 12 and len(json.loads(said.splitlines()[-1])["results"]) == 6
    assert all(0.98 * 1500 <= r["prompt_tokens"] <= 1500 and 0 <= r["score"] <= 1 and r["seconds"] > 0 for r in rows)
    assert all((r["footprint"] == 1) == (r["policy"] == "full") for r in rows)
    text = open("o/x.jsonl").read().splitlines(keepends=True)
    open("o/x.jsonl", "w").write("".join(text[:5]) + text[5][:40])
    go(args)
    again = [json.loads(line) for line in open("o/x.jsonl")]
    drop = lambda r: {k: v for k, v in r.items() if k != "seconds"}
    assert [drop(r) for r in again] == [drop(r) for r in rows]
    for extra, words in ((["--tasks", "magic"], "magic"), (["--tasks", "helmet:narrativeqa"], "needs a judge"), (["--lengths", "0"], "--lengths"),
                         (["--lengths", "20"], "at least"), (["--policy", "x"], "--policy"), (["--policy", "heads"], "--heads"),
                         (["--tasks", "helmet:kilt_nq", "--data", "none"], "kilt"), (["--tasks", "icl,icl"], "twice"), (["--tasks", "foo:kilt_nq"], "foo"),
                         (["--policy", "full", "--keep", "0.5"], "--budget means nothing"), (["--sparsity", "0.5"], "--sparsity"),
                         (["--tasks", "litsearch:bm25"], "no eviction"), (["--lengths", "99999999"], "--lengths"), (["--out", "model"], "--out"),
                         (["--n", "0"], "--n"), (["--policy", "snapkv", "--budget", "-1"], "--budget")):
        err = go([*args, *extra]).err
        assert err.count("\n") == 1 and words in err, (extra, err)
    for other in ('{"a": 1}\n', "precious text without a line's end"):
        open("o/x.jsonl", "w").write(other)
        assert "not results" in go(args).err and open("o/x.jsonl").read() == other
    assert "--tasks wants --model" in go(["eval_tasks.py", "--tasks", "litsearch:bm25"]).err
    err = go([*args[:4], "code_0.5k", *args[5:6], "4000", "--out", "o/y.jsonl"]).err
    assert "skipped" in err and "--allow_code_exec" in err


# --- projected gradients ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("basis, off", [("normal", 1), ("rademacher", -1)])
@pytest.mark.parametrize("c, r", [(1, 4), (4, 1), (0.25, 16)])
def test_projection_is_unbiased_with_the_known_error(basis, off, c, r):
    """E Go = G and E|Go - G|^2 = (m / c + 1) / r |G|^2 (normal), (m / c - 1) / r (Rademacher), over 3000 draws."""
    p = torch.nn.Parameter(torch.zeros(24, 32))
    optimizer, n = vlorp.ProjFactor([p], rank=r, granularity=c, basis=basis, proj_every=1), 3000
    group, grad = optimizer.param_groups[0], torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    total, error = torch.zeros_like(grad), 0.0
    for step in range(n):
        basis_ = optimizer.projection(p, group, step)
        estimate = torch.cat([rows for _, rows in vlorp.estimate(vlorp.project(grad, basis_, group), basis_, p)])
        total += estimate
        error += (estimate - grad).square().sum().item() / n
    want = (24 / c + off) / r * grad.square().sum().item()
    assert error == pytest.approx(want, rel=0.06)
    assert (total / n - grad).norm().item() < 1.2 * math.sqrt(want / n)


def made_gradients(shape, steps, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for _ in range(steps)]


def optimize(optimizer, p, gradients):
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        optimizer.zero_grad()
    return p.detach().clone()


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_exact_projections_give_the_plain_optimizers(shape):
    """Units of one number and a Rademacher basis lose nothing: then the schemes are Adam, and Adam with factored V."""
    gradients, whole = made_gradients(shape, 12), dict(rank=1, granularity=min(shape), basis="rademacher", lr=0.01, weight_decay=0.1, proj_every=5)
    plain = optimize(torch.optim.AdamW([p := torch.nn.Parameter(torch.ones(shape))], lr=0.01, eps=1e-12, weight_decay=0.1), p, gradients)
    close(optimize(vlorp.ProjFactor([p := torch.nn.Parameter(torch.ones(shape))], scheme="original", eps=1e-12, **whole), p, gradients), plain, 1e-6)
    close(optimize(vlorp.ProjFactor([p := torch.nn.Parameter(torch.ones(shape))], rank=None, lr=0.01, eps=1e-12, weight_decay=0.1), p, gradients),
          plain, 1e-6)
    subspace = vlorp.ProjFactor([p := torch.nn.Parameter(torch.ones(shape))], scheme="subspace", eps=1e-12, **(whole | {"proj_every": 99}))
    close(optimize(subspace, p, gradients), plain, 1e-6)
    w, m, row, column = torch.ones(shape), torch.zeros(shape), torch.zeros(shape[0]), torch.zeros(shape[1])
    for t, g in enumerate(gradients, 1):
        m, row, column = 0.9 * m + 0.1 * g, 0.999 * row + 0.001 * (g * g).sum(1), 0.999 * column + 0.001 * (g * g).sum(0)
        v = torch.outer(row, column) / row.sum()
        w = w * (1 - 0.01 * 0.1) - 0.01 * math.sqrt(1 - 0.999 ** t) / (1 - 0.9 ** t) * m / (v.sqrt() + 1e-6)
    close(optimize(vlorp.ProjFactor([p := torch.nn.Parameter(torch.ones(shape))], **(whole | {"proj_every": 99})), p, gradients), w, 1e-6)


@pytest.mark.parametrize("shape, c, r", [((12, 20), 2, 3), ((20, 12), 2, 3), ((12, 20), 0.25, 5), ((20, 12), 0.25, 5), ((20, 12), 4, 1), ((16, 24), 1, 2)])
def test_projfactor_by_definition(shape, c, r, monkeypatch):
    """Random shapes and granularities, step by step, with a refreshed basis that keeps or resets the first moment; blocks of any size."""
    for at_refresh, block in (("keep", 2 ** 17), ("reset", 30)):
        monkeypatch.setattr(vlorp, "BLOCK", block)
        p = torch.nn.Parameter(torch.zeros(shape))
        optimizer = vlorp.ProjFactor([p], lr=0.1, rank=r, granularity=c, proj_every=3, seed=7, at_refresh=at_refresh)
        w, row, column, group = torch.zeros(shape), torch.zeros(shape[0]), torch.zeros(shape[1]), optimizer.param_groups[0]
        n_units, width = int(max(shape) * c), int(min(shape) / c)
        for t, g in enumerate(made_gradients(shape, 8), 1):
            basis = optimizer.projection(p, group, t - 1)
            assert basis.shape == (width, r)
            if shape[0] >= shape[1]:
                small = g.reshape(n_units, width) @ basis
                back = lambda x: (x @ basis.T).reshape(shape)
            else:
                small = basis.T @ g.reshape(width, n_units)
                back = lambda x: (basis @ x).reshape(shape)
            if t == 1 or (t - 1) % 3 == 0 and at_refresh == "reset":
                m = torch.zeros_like(small)
            m = 0.9 * m + 0.1 * small
            row, column = 0.999 * row + 0.001 * (back(small) ** 2).sum(1), 0.999 * column + 0.001 * (back(small) ** 2).sum(0)
            w -= 0.1 * math.sqrt(1 - 0.999 ** t) / (1 - 0.9 ** t) * back(m) / ((torch.outer(row, column) / row.sum()).sqrt() + 1e-6)
            close(optimize(optimizer, p, [g]), w, 2e-5)


def test_projected_training_frees_gradients_accumulates_and_counts_bytes():
    """Through a Llama's backward pass: no target keeps its gradient, two micro-batches equal their sum, a P is the window's."""
    model = small(n_embd=24, n_ff=32, head_dim=6)
    groups = vlorp.param_groups(model)
    tokens, rng_state = torch.randint(model.config.vocab_size, (2, 20)), torch.get_rng_state()
    optimizer = vlorp.ProjFactor(groups, rank=2, granularity=2, proj_every=2)
    for row in tokens:
        model.loss(row[:-1], row[1:]).backward()
    assert torch.equal(rng_state, torch.get_rng_state())
    assert all(p.grad is None for p in groups[0]["params"]) and all(p.grad is not None for p in groups[1]["params"])
    twin = small(n_embd=24, n_ff=32, head_dim=6)
    (twin.loss(tokens[0, :-1], tokens[0, 1:]) + twin.loss(tokens[1, :-1], tokens[1, 1:])).backward()
    for p, q in zip(groups[0]["params"], vlorp.param_groups(twin)[0]["params"]):
        group = optimizer.param_groups[0]
        close(optimizer.state[p]["sum"], vlorp.project(q.grad, optimizer.projection(p, group, 0), group), 1e-5)
    optimizer.step()
    k, v = (p for name, p in model.named_parameters() if name.startswith("model.layers.0.self_attn.") and name[-13] in "kv")
    assert k.shape == v.shape and not torch.equal(*(optimizer.projection(p, optimizer.param_groups[0], 0) for p in (k, v)))
    projected = sum(p.itemsize * (max(p.shape) * 4 + sum(p.shape)) for p in groups[0]["params"])
    assert vlorp.state_bytes(optimizer) == projected + sum(2 * p.nbytes for p in groups[1]["params"])


def test_projected_state_resumes_in_the_same_bits(tmp_path):
    """Saved in the middle of a window with a micro-batch pending, loaded with weights_only, float32 state kept for bfloat16 weights."""
    gradients = made_gradients((8, 12), 9)
    def fresh(dtype=torch.float32):
        p = torch.nn.Parameter(torch.ones(8, 12, dtype=dtype))
        return vlorp.ProjFactor([p], lr=0.1, rank=2, granularity=2, proj_every=4), p
    optimizer, p = fresh()
    want = optimize(optimizer, p, gradients)
    optimizer, p = fresh()
    optimize(optimizer, p, gradients[:5])
    p.grad = gradients[5].clone()
    optimizer.take(p)
    torch.save({"p": p.detach(), "o": optimizer.state_dict()}, tmp_path / "x.pt")
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    optimizer, p = fresh()
    p.data.copy_(saved["p"])
    optimizer.load_state_dict(saved["o"])
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(optimize(optimizer, p, gradients[6:]), want)
    optimizer, p = fresh(torch.bfloat16)
    optimize(optimizer, p, [g.bfloat16() for g in gradients[:2]])
    other, q = fresh(torch.bfloat16)
    other.load_state_dict(optimizer.state_dict())
    assert all(other.state[q][k].dtype == torch.float32 and torch.equal(other.state[q][k], optimizer.state[p][k]) for k in ("m", "row", "column"))


def test_projected_gradients_clip_skip_and_refuse():
    optimizer = vlorp.ProjFactor([p := torch.nn.Parameter(torch.ones(8, 12))], lr=0.1, rank=2, granularity=2, max_norm=0.5, scheme="subspace",
                                 betas=(0.0, 0.0), eps=1e9)
    g = made_gradients((8, 12), 1)[0]
    small = vlorp.project(g, optimizer.projection(p, optimizer.param_groups[0], 0), optimizer.param_groups[0])
    optimize(optimizer, p, [g])
    close(optimizer.state[p]["m"], small * 0.5 / small.norm(), 1e-5)
    before = p.detach().clone()
    optimize(optimizer, p, [torch.full((8, 12), math.inf)])
    assert optimizer.skipped == 1 and torch.equal(p, before) and "sum" not in optimizer.state[p]
    zero_row = made_gradients((8, 12), 1)[0]
    zero_row[3] = 0
    assert optimize(vlorp.ProjFactor([p := torch.nn.Parameter(torch.ones(8, 12))], rank=1, granularity=8, basis="rademacher"), p,
                    [zero_row]).isfinite().all()
    for options, words in ((dict(granularity=5), r"\(8, 12\).*granularity 5"), (dict(rank=0), "rank 0"), (dict(basis="dct"), "basis"),
                           (dict(basis="svd", rank=9, granularity=1), "singular vectors"), (dict(lr=-1), "lr"),
                           (dict(granularity=0.3), "granularity 3/10")):
        with pytest.raises(ValueError, match=words):
            vlorp.ProjFactor([torch.nn.Parameter(torch.ones(8, 12))], **options)


def test_projection_on_singular_vectors(tmp_path):
    """The leading directions of the window's first micro-batch: what they keep of it is the best of that rank; kept for the window, saved."""
    gradients = made_gradients((8, 12), 6)
    p = torch.nn.Parameter(torch.ones(8, 12))
    make = lambda p: vlorp.ProjFactor([p], lr=0.1, rank=3, granularity=1, proj_every=3, basis="svd", scheme="subspace")
    optimizer, bases = make(p), []
    for i, g in enumerate(gradients):
        p.grad = g.clone()
        optimizer.take(p)
        bases.append(optimizer.state[p]["basis"].clone())
        if i % 3 == 0:
            kept = bases[-1] @ optimizer.state[p]["sum"]
            close((g - kept).norm() ** 2, torch.linalg.svdvals(g)[3:].square().sum(), 1e-4)
        close(bases[-1].T @ bases[-1], torch.eye(3), 1e-5)
        if i == 3:  # in the middle: the basis is part of the state
            torch.save({"p": p.detach(), "o": optimizer.state_dict()}, tmp_path / "x.pt")
            saved = torch.load(tmp_path / "x.pt", weights_only=True)
            other = torch.nn.Parameter(saved["p"].clone())
            again = make(other)
            again.load_state_dict(saved["o"])
        optimizer.step()
    assert torch.equal(bases[0], bases[2]) and not torch.equal(bases[2], bases[3]) and torch.equal(bases[3], bases[5])
    again.step()
    optimize(again, other, gradients[4:])
    assert torch.equal(other, p)
    assert optimizer.state_like(p, optimizer.param_groups[0]) == {k: tuple(v.shape) for k, v in optimizer.state[p].items() if torch.is_tensor(v)}
    low = torch.nn.Parameter(torch.zeros(8, 12))
    low.grad = torch.outer(torch.arange(8.0), torch.arange(12.0))
    optimizer = vlorp.ProjFactor([low], lr=0.1, rank=2, granularity=1, basis="svd")
    optimizer.take(low)
    close(optimizer.state[low]["basis"] @ optimizer.state[low]["sum"], torch.outer(torch.arange(8.0), torch.arange(12.0)), 1e-3)


def projected_worker(rank, size, port, out):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    p = torch.nn.Parameter(torch.ones(8, 12))
    result = optimize(vlorp.ProjFactor([p], lr=0.1, rank=2, granularity=2), p,
                      [g[rank] for g in zip(made_gradients((8, 12), 4), made_gradients((8, 12), 4, 1))])
    if rank == 0:
        torch.save(result, out)
    torch.distributed.destroy_process_group()


def test_groups_come_and_optimizers_go():
    """Each group's settings are checked, also those added later; a frozen matrix is let be; an optimizer that is gone takes no gradient."""
    matrix = lambda: torch.nn.Parameter(torch.randn(6, 4))
    for wrong, words in ((dict(basis="gaussian"), "basis"), (dict(scheme="galore"), "scheme"), (dict(proj_every=0), "proj_every"), (dict(lr=-1), "lr"),
                         (dict(granularity=3), "cannot be projected")):
        with pytest.raises(ValueError, match=words):
            vlorp.ProjFactor([{"params": [matrix()], **wrong}], granularity=2)
    a, b, frozen = matrix(), matrix(), matrix().requires_grad_(False)
    optimizer = vlorp.ProjFactor([a, frozen], granularity=2, lr=0.1)
    optimizer.add_param_group({"params": [b], "rank": 2, "granularity": 1})
    with pytest.raises(ValueError, match="cannot be projected"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.randn(7, 5))]})
    before = [p.detach().clone() for p in (a, b, frozen)]
    (a.square().sum() + (b * frozen).sum()).backward()
    optimizer.step()
    assert [torch.equal(p, q) for p, q in zip((a, b, frozen), before)] == [False, False, True]
    del optimizer
    a.square().sum().backward()
    assert torch.equal(a.grad, 2 * a)


def test_projected_gradients_are_averaged_over_processes(tmp_path):
    """Two processes with a gradient each end where one process with their mean does."""
    assert launch(projected_worker, 2, str(tmp_path / "x.pt")) == [0, 0]
    p = torch.nn.Parameter(torch.ones(8, 12))
    both = [(a + b) / 2 for a, b in zip(made_gradients((8, 12), 4), made_gradients((8, 12), 4, 1))]
    close(torch.load(tmp_path / "x.pt", weights_only=True), optimize(vlorp.ProjFactor([p], lr=0.1, rank=2, granularity=2), p, both), 1e-5)


# --- bad input --------------------------------------------------------------------------------------------------------------

ODD = [None, True, -1, 0, 1, 7, 2 ** 70, 10 ** 12, 1e308, -0.5, float("nan"), "", "x", "a\0b", "\ud800", "é" * 9, [], {}, [[]], [None], {"a": 1}, "../../x"]


def warped(rng, value):
    """A JSON value in which one thing, somewhere, is another, gone or twice there."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        value = copy.copy(value)
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.15:
            del value[key]
        elif kind < 0.25 and isinstance(value, list):
            value.append(value[key])
        elif kind < 0.3 and isinstance(value, dict):
            value[rng.choice(["x", key + "x", ""])] = value[key]
        else:
            value[key] = warped(rng, value[key])
        return value
    return rng.choice(ODD)


def warped_bytes(rng, data):
    """Bytes that are cut, doubled, or have others among them."""
    data, at = bytearray(data), rng.randrange(len(data) + 1)
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        data[at:at] = rng.choice([b"\0", b"\xff\xfe", b"[" * 5000, b"{" * 5000, b"9" * 5000, b"\n", b'"'])
    elif kind == 2:
        data[at:at] = data[at:at + rng.randrange(99)]
    else:
        for _ in range(rng.choice([1, 1, 9])):
            at = rng.randrange(len(data) or 1)
            data[at:at + 1] = bytes([rng.randrange(256)])
    return bytes(data)


def warped_json(rng, value):
    return json.dumps(warped(rng, value)).encode() if rng.random() < 0.7 else warped_bytes(rng, json.dumps(value).encode())


def warped_lines(rng, rows):
    lines = [json.dumps(row).encode() for row in rows]
    at = rng.randrange(len(rows))
    lines[at] = warped_json(rng, rows[at])
    return b"\n".join(lines)


def warped_safetensors(rng, data):
    """A file whose header says something else: shapes and offsets without end, other dtypes, missing names; or with other bytes."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        return warped_bytes(rng, data[:8 + size]) + data[8 + size:]
    header = json.dumps(warped(rng, json.loads(data[8:8 + size]))).encode()
    length = len(header) if rng.random() < 0.9 else rng.choice([0, 2 ** 63, 10 ** 12, len(header) - 1])
    return length.to_bytes(8, "little") + header + data[8 + size:]


def warped_flags(rng, configs, folders):
    """Some flags of dataclasses with values that are possible, at an edge, or impossible."""
    words = ["", "x", "nowhere", ",", "=:", "a=1:nowhere", "facts", "problems", "sites", "full", "snapkv", "64:1", "0", "-1", "7", "1e9", "1e400",
             "nan", "9" * 30, *folders]
    argv = []
    for field in rng.sample([f for config in configs for f in dataclasses.fields(config)], 4):
        values = list(field.metadata["choices"] or ()) + words
        argv += [f"--{field.name}", rng.choice(values)] if "bool" not in str(field.type) else [rng.choice([f"--{field.name}", f"--no-{field.name}"])]
    return argv


class Reached(Exception):
    """All checks of flags are through."""


def fuzz(seed, n, cwd):
    """n cases, of every kind equally many: each works, or ends as `run` turns into one line and exit 2, soon and without writing.
    Runs in a process of its own, which may not take more than 16 GB of address space."""
    resource.setrlimit(resource.RLIMIT_AS, (2 ** 34, 2 ** 34))
    os.chdir(cwd)
    torch.set_num_threads(1)
    llama = Llama(dataclasses.replace(eval_tasks.TINY, vocab_size=400)).init_weights(0)
    save_model(llama, "m"), cepe.save_cepe(small_cepe().float(), "c"), prulong.save_heads("heads.tsv", torch.rand(3, 4))
    made_tokenizer(cwd / "m")
    tokenizer = load_tokenizer("m")
    good = {name: open(name, "rb").read() for name in ("m/config.json", "m/model.safetensors", "m/tokenizer.json", "c/config.json",
                                                       "c/model.safetensors", "heads.tsv")}
    chats = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "so"}]}, {"question": "1 + 1?", "answer": "#### 2"},
             {"instruction": "a", "input": "", "output": "b"}, {"question": {"stem": "a", "choices": [{"label": "A", "text": "b"}]}, "answerKey": "A"}]
    texts = [{"text": "one two", "url": "http://a.org/x"}, {"text": "three", "url": "b.com"}]
    ctx = [{"title": "t", "text": "x"}]
    tasks = {"kilt_nq": ("kilt/nq-dev-multikilt_1000_k50_dep6.jsonl", [{"question": f"q{i}", "answers": ["a"], "ctxs": ctx} for i in range(3)]),
             "json_kv": ("json_kv/test_k105_dep6.jsonl", [{"context": '{"a": "b"}', "question": "a", "answer": "b",
                                                           "demos": [{"key": "a", "value": "b"}] * 2, "num_kvs": 1, "k": 1}] * 2),
             "ruler_vt": ("ruler/vt/validation_8192.jsonl", [{"context": "C", "query": "q", "num_v": 1, "example": "e", "answer": ["A"]}] * 2)}
    os.makedirs("kilt"), os.makedirs("ruler/vt"), os.makedirs("json_kv"), os.makedirs("lit")
    for name in ("kilt/nq-train-multikilt_1000_k3_dep6.jsonl",):
        open(name, "w").write("\n".join(json.dumps({"question": f"d{i}", "answers": ["a"], "ctxs": ctx}) for i in range(9)))
    lit = {"corpus": [{"corpusid": i, "title": f"t{i}", "abstract": "a"} for i in range(3)],
           "query": [{"query": "t", "corpusids": [1], "specificity": 0, "query_set": "x"}]}
    method = train.LM(llama, None, 0)
    config = train.fill_defaults(train.Config(method="lm"), None)
    optimizer = train.make_optimizer(method, llama, config)
    llama.loss(torch.arange(9), torch.arange(9)).backward()
    optimizer.step()
    train.save_checkpoint("good.safetensors", llama, method, optimizer, {"step": 3, "settings": {}, "dtype": "float32", "cpu_seconds": 1.0})
    checkpoint = open("good.safetensors", "rb").read()
    result = {"key": "k", "task": "t", "score": 0.5}

    def restored(name, data, call):
        open(name, "wb").write(data)
        try:
            call()
        finally:
            open(name, "wb").write(good.get(name, b""))

    def tokenize():
        t = load_tokenizer("m")
        t.decode(t.encode("Hello 12 the <|im_end|> é")), t.has_chat and t.chat([{"role": "user", "content": "x"}])

    def chat_file(rng):
        name = rng.choice(["x.json", "x.jsonl"])
        restored(name, warped_json(rng, chats) if name == "x.json" else warped_lines(rng, chats), lambda: train.read_chats(name, tokenizer, 200))

    def task_file(rng):
        name = rng.choice(sorted(tasks))
        path, rows = tasks[name]
        restored(path, warped_lines(rng, rows), lambda: eval_tasks.load(name, ".", n=3, tokenizer=tokenizer))

    def search_files(rng):
        broken = rng.choice(sorted(lit))
        for name, rows in lit.items():
            open(f"lit/{name}.jsonl", "wb").write(warped_lines(rng, rows) if name == broken else b"\n".join(json.dumps(row).encode() for row in rows))
        eval_tasks.litsearch_data("lit")

    def flags(rng):
        name = rng.choice(["train", "train", "train", "eval_tasks", "footprint", "model", "evict", "meco", "vlorp", "cepe"])
        folders = ["m", "c", "heads.tsv", "."]
        if name == "train":
            kind = rng.choice([m for m in train.METHODS])
            configs = [c for c in (train.Config, train.METHODS[kind][1]) if c]
            return train.main(["--method", kind, *warped_flags(rng, configs, folders)])
        if name in ("eval_tasks", "footprint", "model"):
            module = {"eval_tasks": eval_tasks, "footprint": footprint, "model": model_file}[name]
            more = ["--model", "m"] if rng.random() < 0.7 else []
            sys.argv = [name, *more, *warped_flags(rng, [module.Config], folders)]
            return module.main()
        config = {"evict": evict.Config, "meco": meco.Demo, "vlorp": vlorp.Demo, "cepe": cepe.Demo}[name]
        model_file.parse([config], warped_flags(rng, [config], folders))

    def reached(*args, **kwargs):
        raise Reached
    for module, name in ((train, "build_model"), (train, "choose_dtype"), (eval_tasks, "load_model"), (footprint, "load_model"),
                         (footprint, "tiny_model"), (eval_tasks, "tiny_table"), (model_file, "load_model")):
        if name != "load_model" or module is not model_file:
            setattr(module, name, reached)
    kinds = {
        "config": lambda rng: restored("m/config.json", warped_json(rng, json.loads(good["m/config.json"])), lambda: load_model("m")),
        "weights": lambda rng: restored("m/model.safetensors", warped_safetensors(rng, good["m/model.safetensors"]), lambda: load_model("m")),
        "tokenizer": lambda rng: restored("m/tokenizer.json", warped_json(rng, json.loads(good["m/tokenizer.json"])), tokenize),
        "cepe": lambda rng: restored("c/config.json", warped_json(rng, json.loads(good["c/config.json"])), lambda: cepe.load_cepe("c")),
        "cepe weights": lambda rng: restored("c/model.safetensors", warped_safetensors(rng, good["c/model.safetensors"]), lambda: cepe.load_cepe("c")),
        "index": lambda rng: (open("i.json", "wb").write(warped_json(rng, {"weight_map": {"a": "model.safetensors"}})), os.makedirs("i", exist_ok=True),
                              os.replace("i.json", "i/model.safetensors.index.json"), model_file.weight_files("i")),
        "heads": lambda rng: restored("heads.tsv", warped_bytes(rng, good["heads.tsv"]), lambda: prulong.load_heads("heads.tsv", rng.choice([None, 0.5]))),
        "texts": lambda rng: restored("t.jsonl", warped_lines(rng, texts),
                                      lambda: (list(train.read_documents("t.jsonl")), list(train.read_lines("t.jsonl", "text", "url")))),
        "chats": chat_file, "tasks": task_file, "search": search_files,
        "checkpoint": lambda rng: restored("k.safetensors", warped_safetensors(rng, checkpoint),
                                           lambda: train.load_checkpoint("k.safetensors", llama, method, optimizer)),
        "results": lambda rng: restored("r.jsonl", warped_lines(rng, [result] * 3) + b"\n", lambda: eval_tasks.read_results("r.jsonl")),
        "flags": flags, "more flags": flags, "yet more flags": flags}
    fine, refused = collections.Counter(), collections.Counter()
    for i in range(n):
        kind = list(kinds)[i % len(kinds)]
        rng, before = random.Random(f"{seed} {i}"), sorted(os.listdir("."))
        signal.alarm(30)  # a case that hangs ends the process
        try:
            kinds[kind](rng)
            fine[kind] += 1
        except (ValueError, OSError, Reached) as e:
            fine[kind] += isinstance(e, Reached)
            refused[kind] += not isinstance(e, Reached)
        except SystemExit as e:
            assert e.code == 2, (kind, i)
            refused[kind] += 1
        except BaseException as e:
            raise AssertionError(f"{kind}, case {i} of seed {seed}") from e
        assert set(os.listdir(".")) - set(before) <= {"x.json", "x.jsonl", "k.safetensors", "t.jsonl", "r.jsonl", "i"}, (kind, i)
    assert all(refused[kind] for kind in kinds) and sum(fine.values()) > n / 50, (fine, refused)


def fuzzed(seed, n, cwd):
    for descriptor in (1, 2):
        os.dup2(os.open(os.path.join(cwd, "said.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    fuzz(seed, n, cwd)


def test_bad_input_ends_in_one_line(tmp_path):
    """2000 cases in CI, 50,000 in the slow test."""
    child = server.Process(target=fuzzed, args=(0, 50_000 if SLOW else 2_048, tmp_path))
    child.start()
    child.join(3000)
    assert child.exitcode == 0, open(tmp_path / "said.txt", errors="replace").read()[-3000:]


# --- CEPE -----------------------------------------------------------------------------------------------------------------

def small_cepe(init="copy", last_n=None, **changes):
    """In float64: a grouped-query decoder of width 24, an encoder of width 16."""
    encoder = LlamaConfig(vocab_size=changes.get("vocab_size", 61) + 1, n_layer=2, n_head=2, n_kv_head=2, n_embd=16, n_ff=24, head_dim=8,
                          tie_embeddings=True)
    return cepe.extend(small(**changes), encoder, init, last_n)


def slow_cepe(model, main, chunks):
    """Logits (N, V) by explicit softmax: every chunk encoded on its own, one softmax over all of them, block by block."""
    config, states = model.config, []
    for chunk in chunks:
        x = model.encoder.embed_tokens(chunk)
        cos, sin = model_file.rope(model.encoder_config, torch.arange(len(chunk)), x.dtype)
        for block in model.encoder.layers:
            h, a = block.input_layernorm(x), block.self_attn
            q, k, v = (p(h).unflatten(1, (-1, 8)) for p in (a.q_proj, a.k_proj, a.v_proj))
            q, k = model_file.rotate(q, cos, sin), model_file.rotate(k, cos, sin)
            p = torch.einsum("ihd,jhd->hij", q, k).div(8 ** 0.5).softmax(-1)  # bidirectional
            x = x + a.o_proj(torch.einsum("hij,jhd->ihd", p, v).flatten(1))
            x = x + block.mlp(block.post_attention_layernorm(x))
        states.append(model.encoder.norm(x))
    x, n_rep = model.model.embed_tokens(main), config.n_head // config.n_kv_head
    cos, sin = model_file.rope(config, torch.arange(len(main)), x.dtype)
    for block in model.model.layers:
        h, a = block.input_layernorm(x), block.self_attn
        q, k, v = (p(h).unflatten(1, (-1, config.head_dim)) for p in (a.q_proj, a.k_proj, a.v_proj))
        q, k = model_file.rotate(q, cos, sin), model_file.rotate(k, cos, sin)
        s = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(n_rep, 1)).div(config.head_dim ** 0.5)
        p = s.masked_fill(torch.ones(len(main), len(main), dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        x = x + a.o_proj(torch.einsum("hij,jhd->ihd", p, v.repeat_interleave(n_rep, 1)).flatten(1))
        if hasattr(block, "cross_attn") and states:
            c = block.cross_attn
            q, phi = c.q_proj(c.layernorm(x)).unflatten(1, (-1, config.head_dim)), torch.cat(states)
            k, v = (p(phi).unflatten(1, (-1, config.head_dim)).repeat_interleave(n_rep, 1) for p in (c.k_proj, c.v_proj))
            p = torch.einsum("ihd,jhd->hij", q, k).div(config.head_dim ** 0.5).softmax(-1)  # no positions, not causal
            x = x + c.o_proj(torch.einsum("hij,jhd->ihd", p, v).flatten(1))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return model.model.norm(x) @ model.head.T


def read_chunks(model, main, chunks, **options):
    tokens = torch.cat(chunks) if chunks else main[:0]
    context = model.context(tokens, bounds([len(c) for c in chunks]), **options)
    return model.hidden(main, context=context) @ model.head.T


@pytest.mark.parametrize("last_n", [None, 1])
def test_cepe_by_definition(last_n):
    rng = torch.Generator().manual_seed(0)
    model = small_cepe(last_n=last_n)
    main, chunks = torch.randint(61, (13,), generator=rng), [torch.randint(61, (n,), generator=rng) for n in (7, 7, 3, 7)]
    want = slow_cepe(model, main, chunks)
    got = read_chunks(model, main, chunks)
    close(got, want, 2e-6)  # cos and sin are float32
    plain = model_file.Llama.hidden(model, main) @ model.head.T
    assert (got - plain).abs().max() > 0.1
    close(plain, small()(main), 0)  # the decoder itself is untouched, and without context nothing is read
    assert torch.equal(read_chunks(model, main, []), plain)
    order = read_chunks(model, main, [chunks[i] for i in (2, 0, 3, 1)])
    close(order, got, 1e-12)  # chunks are a set,
    assert (read_chunks(model, main, [c.flip(0) for c in chunks]) - got).abs().max() > 1e-3  # their tokens are not
    close(read_chunks(model, main, chunks * 2), got, 1e-12)  # a weighted mean: twice the same weighs the same
    for size in (1, 2, 3):
        close(read_chunks(model, main, chunks, chunks_at_once=size), got, 1e-12)
    close(read_chunks(model, main, chunks, cache_kv=True), got, 1e-12)
    packed = model.context(torch.cat(chunks), bounds([7, 7, 3, 7]), [0, 14, 14, 24])  # three documents, the second without context
    together = model.hidden(torch.cat((main, main[:5], main)), model_file.causal([0, 13, 18, 31]), context=packed,
                            cu_seqlens=[0, 13, 18, 31]) @ model.head.T
    for rows, part in ((slice(0, 13), chunks[:2]), (slice(13, 18), []), (slice(18, 31), chunks[2:])):
        close(together[rows], read_chunks(model, main[:rows.stop - rows.start], part), 1e-6)


def test_cepe_starts_and_learns_where_it_should():
    """zero-o is the decoder bit for bit; gradient reaches exactly the new parameters, at first only o."""
    rng = torch.Generator().manual_seed(1)
    main, chunks = torch.randint(61, (9,), generator=rng), [torch.randint(61, (6,), generator=rng) for _ in range(3)]
    model, before = small_cepe("zero"), small().state_dict()
    assert torch.equal(read_chunks(model, main, chunks), model_file.Llama.hidden(model, main) @ model.head.T)
    cross = model.model.layers[0].cross_attn
    own = model.model.layers[0].self_attn
    assert torch.equal(cross.k_proj.weight, own.k_proj.weight[:, :16]) and torch.equal(cross.q_proj.weight, own.q_proj.weight)
    assert torch.equal(cross.layernorm.weight, model.model.layers[0].post_attention_layernorm.weight) and cross.k_proj.weight.shape == (16, 16)
    new = {n: p for n, p in model.named_parameters() if n.startswith("encoder.") or ".cross_attn." in n}
    optimizer = torch.optim.SGD(new.values(), lr=0.1)
    for step in range(3):
        loss = torch.nn.functional.cross_entropy(read_chunks(model, main, chunks)[:-1], main[1:])
        loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(new)
        for name, p in new.items():
            assert p.grad.any() == (step > 0 or "o_proj" in name and "cross" in name), (step, name)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n not in new)
    with pytest.raises(ValueError, match="width 32 is above"):
        cepe.extend(small(), dataclasses.replace(model.encoder_config, n_embd=32))


def test_cepe_decodes_with_a_cache():
    rng = torch.Generator().manual_seed(2)
    model = small_cepe()
    main, chunks = torch.randint(61, (12,), generator=rng), [torch.randint(61, (6,), generator=rng) for _ in range(3)]
    want = read_chunks(model, main, chunks)
    for cache_kv in (False, True):
        context = model.context(torch.cat(chunks), [0, 6, 12, 18], cache_kv=cache_kv)
        assert context.nbytes() == 18 * (3 * 2 * 16 if cache_kv else 16) * 8
        reading, cache = cepe.Reading(model, context), KVCache(model)
        hidden = [reading.hidden(part, cache.attend, cache.next_positions(len(part))) for part in (main[:5], *main[5:].split(1))]
        close(torch.cat(hidden) @ model.head.T, want, 1e-6)
        new = generate(cepe.Reading(model, context), main, 5)
        whole = main
        for token in new:
            assert int(read_chunks(model, whole, chunks)[-1].argmax()) == token
            whole = torch.cat((whole, torch.tensor([token])))


def test_cepe_checkpoints_in_the_released_layout(tmp_path):
    model = small_cepe(last_n=2).float()
    cepe.save_cepe(model, tmp_path / "a")
    names = train.read_tensor_file(tmp_path / "a" / "model.safetensors").keys()
    assert {"encoder.embed_tokens.weight", "encoder.norm.weight", "encoder.layers.1.mlp.down_proj.weight", "encoder.layers.0.input_layernorm.weight",
            "model.layers.2.cross_attn.layernorm.weight", "model.layers.1.cross_attn.k_proj.weight", "model.norm.weight"} <= set(names)
    assert not any("layers.0.cross_attn" in name for name in names)
    again = cepe.load_cepe(tmp_path / "a")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True)) and again.encoder_config == model.encoder_config
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalContextLM"]}))
    assert config["encoder_hidden_size"] == 16 and config["num_cross_attn_layers"] == 2
    tensors = train.read_tensor_file(tmp_path / "a" / "model.safetensors")
    short = {k: v for k, v in tensors.items()} | {"encoder.embed_tokens.weight": tensors["encoder.embed_tokens.weight"][:61].clone(),
                                                  "model.rotary_emb.inv_freq": torch.ones(4)}
    save_file(short, tmp_path / "a" / "model.safetensors")  # the file says how many rows the encoder has
    assert cepe.load_cepe(tmp_path / "a").encoder.embed_tokens.weight.shape == (61, 16)
    for change, words in ((lambda t: t.pop("encoder.norm.weight"), "missing, such as encoder.norm"),
                          (lambda t: t.update(x=torch.ones(1)), "unexpected tensor x"),
                          (lambda t: t.update({"encoder.norm.weight": torch.ones(3)}), "shape")):
        broken = dict(tensors)
        change(broken)
        save_file(broken, tmp_path / "a" / "model.safetensors")
        with pytest.raises(ValueError, match=words):
            cepe.load_cepe(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ValueError, match="only .bin weights.*torch.load"):
        cepe.load_cepe(tmp_path / "b")


def test_distillation_losses():
    """KL by definition, zero for equal models; the coarse one is below it and finite where probabilities vanish."""
    rng = torch.Generator().manual_seed(3)
    head, s, t = torch.randn(50, 8, generator=rng), torch.randn(7, 8, generator=rng).requires_grad_(), torch.randn(7, 8, generator=rng)
    p, q = (t @ head.T).softmax(-1), (s @ head.T).softmax(-1)
    want = (p * (p.log() - q.log())).sum(-1).mean()
    close(cepe.kl_loss(s, t, head, rows=3), want, 1e-5)
    grads = [torch.autograd.grad(x, s, retain_graph=True)[0] for x in (cepe.kl_loss(s, t, head, rows=3), want)]
    close(*grads, 1e-5)
    for k in (1, 5, 49):
        coarse = cepe.kl_loss(s, t, head, k)
        assert 0 < coarse <= want + 1e-5
        top = p.topk(k, -1).indices
        groups = torch.stack([torch.cat((row[i], row.sum()[None] - row[i].sum())) for x in (p, q) for row, i in zip(x, top)]).unflatten(0, (2, 7))
        groups = (groups + 1e-6) / (1 + 1e-6 * (k + 1))
        close(coarse, (groups[0] * (groups[0] / groups[1]).log()).sum(-1).mean(), 1e-3)
    assert cepe.kl_loss(t, t, head, 5).abs() < 1e-6 and cepe.kl_loss(t, t, head).abs() < 1e-6
    far = (t * -60).detach().requires_grad_()
    loss = cepe.kl_loss(far, t * 60, head, 5)
    assert loss.isfinite() and torch.autograd.grad(loss, far)[0].isfinite().all()


def test_cepe_phases_and_documents():
    """Masked tokens, the same tokens on both sides, then what came before; parts of chunks left out; the teacher reads both."""
    model, data = small_cepe(vocab_size=128).float(), cepe.Entities(n_main=8, n_seq=3)
    method = cepe.Expand(model, cepe.Config(context=32, chunk_size=8, mlm=0.3, duplicate=0.2), 0)
    assert method.phases(10) == ((0, 3), (3, 5), (5, 10)) and [method.lr_scale(s, 10, 0, 0) for s in (0, 3, 5)] == [1, 1, 1]
    draw = lambda step: method.batch(data, np.random.default_rng(1), step, 10)
    mlm, same, main = draw(0), draw(3), draw(5)
    assert len(mlm.tokens) == 0 and len(mlm.context) == 120 and 0.1 < (mlm.targets != -100).float().mean() < 0.5
    assert torch.equal(same.context, same.tokens) and same.cu_chunks.tolist() == list(range(0, 25, 2)) and same.cu_context.tolist() == [0, 8, 16, 24]
    config = train.fill_defaults(train.Config(method="cepe"), cepe.Config())
    stage, = train.build_stages(config, train.cepe_defaults(config, cepe.Config()), 128)
    assert (config.seq_len, stage.length) == (80, 16)  # what the decoder reads, beside 64 tokens of context
    before, after = data.documents(np.random.default_rng(1), 32)[0]
    assert main.context[:32].tolist() == before.tolist() and main.tokens[:8].tolist() == after.tolist() and main.targets[7] == -100
    assert main.cu_chunks.tolist() == list(range(0, 97, 8)) and main.cu_context.tolist() == [0, 32, 64, 96]
    shorter = cepe.Expand(model, cepe.Config(context=32, chunk_size=8, mlm=0.0, duplicate=0.0, mask_chunks=0.5), 0)
    sizes = torch.cat([shorter.batch(data, np.random.default_rng(s), 0, 1).cu_chunks.diff() for s in range(30)])
    assert sizes.min() == 1 and sizes.max() == 8 and 0.4 < (sizes == 8).float().mean() < 0.7
    distil = cepe.Expand(model, cepe.Config(context=32, chunk_size=8, mlm=0.0, duplicate=0.0), 0, distil=True)
    teacher = distil.teacher(model, main)
    close(teacher[8:16], model_file.Llama.hidden(model, torch.cat((main.context[32:64], main.tokens[8:16])))[32:], 1e-5)
    loss, shown = distil.loss(model, main, 0, 1)
    assert loss.item() == pytest.approx(shown["ce"] + 2 * shown["kl"], rel=1e-5)
    documents = data.documents(np.random.default_rng(2), 32, 40)
    best = data.best(documents, (0, 1, 4), 8)
    assert best[0] > best[1] > best[2] > 24
    rows = cepe.perplexities(model, documents[:3], (0, 2), 8)
    want = sum(model.loss(*(torch.as_tensor(m[a:b]) for a, b in ((0, -1), (1, None)))).item() for _, m in documents[:3]) / 3
    assert rows["CEPE"][0] == rows["prepended to the decoder"][0] == pytest.approx(math.exp(want), rel=1e-5)


def test_cepe_trains_end_to_end(tmp_path, monkeypatch, capsys):
    """On the entity stream right chunks help and wrong ones do not; on text, both methods, saved and loaded again."""
    monkeypatch.chdir(tmp_path)
    train.main(["--method", "cepe", "--steps", "120", "--decoder_steps", "60", "--eval_seqs", "4", "--out_dir", "a"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert rows["CEPE"][-1] < rows["CEPE"][0] - 1 and rows["other documents' chunks"][-1] > rows["CEPE"][0]
    save_model(Llama(dataclasses.replace(eval_tasks.TINY, vocab_size=258)).init_weights(0), "m")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 300}) + "\n" for i in range(40)))
    common = ["--data", "text.jsonl", "--seq_len", "96", "--chunk_size", "16", "--steps", "10", "--eval_seqs", "2"]
    args = [*common, "--enc_width", "32", "--enc_layers", "1"]
    train.main(["--method", "cepe", "--model", "m", *args, "--out_dir", "b"])
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["chunks"] == [0, 1, 3] and all(math.isfinite(x) for row in first["rows"].values() for x in row)
    train.main(["--method", "ceped", "--model", "b", *common, "--top_k", "5", "--mlm", "0", "--out_dir", "c"])  # goes on from a CEPE folder
    model, decoder = cepe.load_cepe("c"), load_model("m")
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in decoder.named_parameters())
    for bad, words in ((["--context", "95"], "fewer than 4"), (["--context", "40"], "multiple of --chunk_size"), (["--enc_width", "30"], "multiple"),
                       (["--enc_width", "128"], "above"), (["--data", "entities"], "entities")):
        with pytest.raises(ValueError, match=words):
            train.main(["--method", "cepe", "--model", "m", *args, *bad, "--out_dir", "d"])


def test_an_encoder_can_begin_as_the_decoders_first_layers(tmp_path, monkeypatch, capsys):
    """Every weight of it is the decoder's, and stays apart from it. What the frozen decoder answers by itself is counted by hand."""
    decoder = eval_tasks.tiny_start(0)
    model = cepe.extend(decoder, cepe.first_layers(decoder.config, 2), enc_init="decoder")
    for mine, own in zip(model.encoder.layers, decoder.model.layers):
        assert all(torch.equal(p, q) and p.data_ptr() != q.data_ptr() for p, q in zip(mine.parameters(), own.parameters()))
    assert torch.equal(model.encoder.embed_tokens.weight[:-1], decoder.model.embed_tokens.weight)
    documents = train.FactData(256, 3).documents(np.random.default_rng(0), 192)
    facts = eval_tasks.fact_stream(np.random.default_rng(0), 3, 256, 12, 32, queries_last=True)
    for i, (before, main) in enumerate(documents):  # all facts before, all queries after
        told = {int(x - eval_tasks.FACT) // 8: int(x - eval_tasks.FACT) % 8 for x in before if eval_tasks.FACT <= x < eval_tasks.QUERY}
        assert len(told) == 12 and all(told[int(k - eval_tasks.QUERY)] == int(v - eval_tasks.ANSWER) for k, v in zip(main[::2], main[1::2]))
        assert len(before) == 192 and len(main) == 64 and (facts.query // 256 == i).sum() == 32
    with pytest.raises(ValueError, match="the last 64 are the queries"):
        train.FactData(256, 3).documents(np.random.default_rng(0), 191)
    monkeypatch.chdir(tmp_path)
    train.main("--method cepe --enc_init decoder --enc_layers 1 --decoder_steps 2 --steps 2 --eval_seqs 2".split())
    assert cepe.load_cepe("out/cepe").encoder_config.n_embd == 64
    save_model(decoder, "out/tiny-seed0")
    capsys.readouterr()
    train.main("--method cepe --data facts --steps 2 --eval_seqs 2 --out_dir facts".split())
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    right = {"none": [], "prepended": []}
    for before, main in train.FactData(256, 8).documents(np.random.default_rng([0, 2 ** 31]), 192):
        for name, front in (("none", []), ("prepended", before.tolist())):
            best = decoder(torch.tensor([*front, *main])).argmax(1)[len(front):].tolist()
            asked = dict(reversed([(int(key), 2 * j) for j, key in enumerate(main[::2])]))  # where each key stands first
            right[name] += [best[j] == main[j + 1] for j in asked.values()]
    assert set(rows) == {"own", "others", "prepended", "none"}
    assert all(rows[name] == pytest.approx(sum(counted) / len(counted)) for name, counted in right.items())
    for flags, words in (("--enc_init decoder --enc_layers 3", "has 2 to begin as"), ("--enc_init decoder --enc_width 32", "means nothing")):
        with pytest.raises(ValueError, match=words):
            train.main(f"--method cepe --decoder_steps 1 --out_dir x {flags}".split())


class Reader:
    """Knows what its context says of a key, and answers 0 otherwise: what first_answers counts can be counted by hand."""

    head = torch.eye(eval_tasks.VOCAB)

    def context(self, tokens, cu_chunks):
        facts = [int(x) - eval_tasks.FACT for x in tokens if eval_tasks.FACT <= x < eval_tasks.QUERY]
        return {x // eval_tasks.N_VALUE: x % eval_tasks.N_VALUE for x in facts}

    def hidden(self, main, context):
        return self.head[torch.tensor([eval_tasks.ANSWER + context.get(int(x) - eval_tasks.QUERY, 0) for x in main])]


def test_first_answers_are_counted_once_a_key():
    documents = train.FactData(256, 8).documents(np.random.default_rng(3), 192)
    assert cepe.first_answers(Reader(), documents, 32, "own") == 1
    right = []
    for i, (_, main) in enumerate(documents):
        told, first = Reader().context(documents[(i + 1) % 8][0], None), dict(reversed(list(zip(main[::2].tolist(), main[1::2].tolist()))))
        right += [told.get(key - eval_tasks.QUERY, 0) == value - eval_tasks.ANSWER for key, value in first.items()]
    assert 0 < sum(right) < len(right) and cepe.first_answers(Reader(), documents, 32, "others") == pytest.approx(sum(right) / len(right))


# --- MeCo -----------------------------------------------------------------------------------------------------------------

def test_hosts_and_metadata():
    for url, want in (("https://en.wikipedia.org/wiki/Bill_Gates", "en.wikipedia.org"), ("www.theguardian.com/x?y", "www.theguardian.com"),
                      ("http://User:pw@Example.COM:8080/a@b", "example.com"), ("example.org?q=http://x.y", "example.org"), (" http://a.b#c ", "a.b")):
        assert meco.host(url) == want
    row = {"url": "https://en.wikipedia.org/wiki/Bill_Gates", "topic": "Technology leader"}
    assert meco.describe(row, "full") == ("URL", "en.wikipedia.org/wiki/Bill_Gates") and meco.describe(row, "suffix") == ("URL", "org")
    assert meco.describe(row, "topic") == ("Topic", "Technology leader")
    assert meco.describe(row, "hash") == ("URL", hashlib.sha256(b"en.wikipedia.org").hexdigest()[:12])  # the same in every process
    top = meco.top_hosts(["http://a.b/1", "http://a.b/2", "c.d", "e.f"], 0.3)
    assert top == {"a.b"} and meco.describe({"url": "c.d"}, "topk", top) == ("URL", "unknown")
    assert meco.describe({"url": "a.b/9"}, "topk", top) == ("URL", "a.b")


def test_meco_documents_by_hand():
    """BOS m m d d EOS: targets are d, d, EOS and nothing else; prefix and text are tokenised apart."""
    tokenizer = model_file.byte_tokenizer()
    ids, mask = meco.encode(tokenizer, "ab", "x.y")
    assert ids.tolist() == [256, *b"URL: x.y\n\n", *b"ab", 257] and mask.tolist() == [False] * 11 + [True] * 3
    batch = meco.as_batch([[meco.join([0], [7, 7], [8, 9], [1])]])
    assert batch.tokens.tolist() == [0, 7, 7, 8, 9, 1] and batch.targets.tolist() == [-100, -100, 8, 9, 1, -100]
    assert meco.encode(tokenizer, "ab")[0].tolist() == [256, *b"ab", 257] and meco.encode(tokenizer, "ab")[1].tolist() == [False, True, True, True]
    assert meco.prompt(tokenizer, "ab", "x.y") == ids[:-1].tolist() and meco.prompt(tokenizer, "ab") == [256, *b"ab"]
    merging = model_file.Tokenizer({bytes([i]): i for i in range(256)} | {b"\n\n": 256, b"\n\na": 257}, [b"\n\n", b"\n\na"], r"(?s:.{1,32})", {}, None)
    assert meco.encode(merging, "a", "x")[0].tolist()[-1] == ord("a")


def test_tasks_behind_a_host():
    tokenizer = model_file.byte_tokenizer()
    example = eval_tasks.build_one("niah_s", 0, 600, 0, tokenizer, False)
    behind = eval_tasks.behind_host(example, tokenizer, "x.y")
    assert behind.prompt == meco.prompt(tokenizer, example.user + "\n" + example.prefix if example.prefix else example.user, "x.y")
    assert behind.answer == example.answer


def test_meco_packs_whole_rows_and_leaks_nothing():
    rng = np.random.default_rng(0)
    docs = [meco.join([0], [1] * int(rng.integers(0, 9)), [2 + i] * int(rng.integers(1, 30)), [1]) for i in range(40)]
    rows = list(meco.pack(docs, 16))
    starts = 0
    for row in rows:
        assert sum(len(ids) for ids, _ in row) == 16 and all(ids[0] == 0 for ids, _ in row)
        for ids, mask in row:  # a document appears once, in order, and only the row's last may be cut
            whole, whole_mask = docs[starts]
            assert torch.equal(ids, whole[:len(ids)]) and torch.equal(mask, whole_mask[:len(ids)])
            starts += 1
        assert all(len(ids) == len(docs[starts - len(row) + k][0]) for k, (ids, _) in enumerate(row[:-1]))
    model, batch = small(), meco.as_batch([next(row for row in rows if len(row) > 1)])
    changed = batch.tokens.clone()
    first = int(batch.cu_seqlens[1])
    changed[first - 1] = 5
    logits, other = (model(t, model_file.causal(batch.cu_seqlens)) for t in (batch.tokens, changed))
    assert len(batch.cu_seqlens) > 2 and torch.equal(logits[first:], other[first:]) and not torch.equal(logits[:first], other[:first])
    for a, b in itertools.pairwise(batch.cu_seqlens.tolist()):
        close(logits[a:b], model(batch.tokens[a:b]), 1e-6)
    empty = meco.as_batch([[meco.join([0], [1] * 30, [3], [])]])._replace(targets=torch.full((32,), -100))
    loss, _ = meco.MeCo(model, meco.Config(), 0).loss(model, empty, 0, 1)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_meco_phases_data_and_report(tmp_path, monkeypatch, capsys):
    """Metadata phase, then cooldown on other documents; the same tokens in all conditions of the report; a kill across the hand-over
    changes no bit (LR and optimizer state go on)."""
    assert [meco.conditioned(step, 20, 0.1) for step in range(20)] == [True] * 18 + [False] * 2
    tokenizer = model_file.byte_tokenizer()
    rows = [{"text": f"{i:03d} " * 9, "url": f"https://s{i % 5}.org/{i}"} for i in range(100)]
    data = meco.UrlData(rows, tokenizer, meco.Config(cooldown=0.3), 64, 2, 10, 0)
    text = {kind: "".join(tokenizer.decode(ids) for row in packs for ids, _ in row) for kind, packs in data.packs.items()}
    numbers = {kind: set(re.findall(r"\b\d{3}\b", t)) for kind, t in text.items()}
    held = {tokenizer.decode(document["none"][0])[7:10] for document in data.exams}
    assert not numbers[True] & numbers[False] and not (numbers[True] | numbers[False]) & held and "URL: s" in text[True] and "URL" not in text[False]
    for document in data.exams:
        scored = [ids[mask].tolist() for ids, mask in document.values()]
        assert scored[0] == scored[1] == scored[2] and len({tuple(ids.tolist()) for ids, _ in document.values()}) == 3
    method = meco.MeCo(None, meco.Config(cooldown=0.3), 0)
    says_url = lambda step: "URL" in tokenizer.decode(method.batch(data, np.random.default_rng(step), step, 10).tokens)
    assert [says_url(step) for step in range(10)] == [True] * 7 + [False] * 3
    monkeypatch.chdir(tmp_path)
    open("d.jsonl", "w").write("\n".join(map(json.dumps, rows)))
    args = ["--method", "meco", "--data", "d.jsonl", "--seq_len", "64", "--steps", "20", "--cooldown", "0.5", "--save_every", "10", "--eval_seqs", "6"]
    train.main([*args, "--out_dir", "whole"])
    outcome = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(outcome["after"]) == ["none", "right", "wrong"] and outcome["after"]["none"][0] < outcome["before"]["none"][0]
    shutil.copytree("whole", "cut")
    saves, saved = iter([0]), train.save_checkpoint

    def stop_after_first(*a):
        saved(*a)
        if next(saves, None) is not None:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_checkpoint", stop_after_first)
    with pytest.raises(KeyboardInterrupt):
        train.main([*args, "--out_dir", "cut", "--overwrite"])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert train.read_checkpoint("cut/checkpoint.safetensors")["step"] == 10
    train.main([*args, "--out_dir", "cut", "--resume"])
    a, b = (train.read_tensor_file(f"{name}/checkpoint.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for bad, words in ((["--data", "stdlib"], "meco wants"), (["--metadata", "topic"], "line 1.*topic"), (["--seq_len", "100000"], "do not fill")):
        with pytest.raises(ValueError, match=words):
            train.main([*args, *bad, "--out_dir", "bad"])


def test_site_tables_teach_what_they_should():
    """Values follow the document's table; loss with the right URL falls, wrong URLs mislead, and a URL steers."""
    data = meco.SiteData(seed=3)
    batch = data.batch(np.random.default_rng(0), 16)
    for a, b in itertools.pairwise(batch.cu_seqlens.tolist()):
        doc = batch.tokens[a:b].tolist()
        site = doc[2] - meco.SITE if b - a > 2 else 0
        pairs = [(k - meco.KEY, v - meco.VALUE) for k, v in zip(doc[4::2], doc[5::2]) if v >= meco.VALUE]
        assert doc[0] == meco.BOS and all(data.tables[site][k] == v for k, v in pairs)
    assert all(ids[mask].min() >= meco.VALUE and mask.sum() == 6 for document in data.exams for ids, mask in document.values())
    model = meco.train_sites(data, meco.Config("url"), 60, 0)
    losses = meco.conditioned_losses(model, data.exams)
    assert losses["right"][0] < 0.5 < 2 < losses["wrong"][0]
    rng = torch.Generator().manual_seed(0)
    assert data.steering(model, True, rng) > 0.7 > 0.4 > data.steering(model, False, rng)


# --- the house --------------------------------------------------------------------------------------------------------

LEVELS = [["attention_triton"], ["model"], ["prulong", "evict", "cepe", "meco", "vlorp"], ["eval_tasks"], ["footprint", "train"], ["test_all"]]


def test_files_import_only_lower_levels():
    here = os.path.dirname(os.path.abspath(__file__))
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    for name, own in level.items():
        path = os.path.join(here, f"{name}.py")
        for node in ast.walk(ast.parse(open(path).read())) if os.path.exists(path) else ():
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            for other in names:
                assert level.get(other, -1) < own, f"{name}.py imports {other}"


# --- work for processes of their own, begun before the first test; its tests come last and find most of it done -------------------------

def train_by(sizes, path):
    """The folder where 1, 2 and 4 processes (these by twos along the sequence) have trained each method of TOGETHER."""
    save_model(Llama(eval_tasks.TINY).init_weights(0), path / "tiny")
    save_model(Llama(dataclasses.replace(eval_tasks.TINY, vocab_size=400)).init_weights(0), path / "chat")
    made_tokenizer(path / "chat")
    (path / "chats.jsonl").write_text("\n".join(json.dumps({"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}"}) for i in range(12)))
    for size in sizes:
        assert launch(train_together, size, str(path), 0) == [130] * size
    return path


def beat_random_masks(tmp_path):
    """The claim itself, on the tiny model: 3 of 12 heads recall what 12 do, random ones do not. About half a minute."""
    model = eval_tasks.tiny_model(0, str(tmp_path / "tiny"), log=lambda line: None)
    again = eval_tasks.tiny_model(0, str(tmp_path / "tiny"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    config, data = train.Config(lr=0.0, **(DEFAULTS | {"min_lr": 0.01})), train.FactData(128, 8)
    method = prulong.PruLong(model, prulong.Config(), 0)
    train.fit(method, model, [train.Stage(0, 100, None, None, data)], config, str(tmp_path), {"method": "prulong"}, contextlib.nullcontext)
    mask = prulong.discretise(method.scores(), 0.75)
    masks = [torch.ones(3, 4, dtype=torch.bool), mask, *train.random_masks((3, 4), 0.75, 8, 0)]
    (full, learned, *random), = train.score_masks(model, data, masks, 4, 32, config, contextlib.nullcontext)[0].values()
    assert full > 0.98 and learned > 0.95 and sum(random) / 8 < 0.6, (full, learned, random)


def run_each(names):
    """Run functions of this file; prints {name: traceback, None where it held}."""
    came = {}
    for name in names:
        try:
            came[name] = globals()[name]()
        except BaseException:  # pytest's own failures are none of Exception
            came[name] = traceback.format_exc()
    print(json.dumps(came))


@pytest.fixture(scope="session", autouse=True)
def apart(request, tmp_path_factory):
    """name -> future of what the selected tests want, two at a time, each process with one thread. Of the kernels: {function: traceback,
    None where it held}."""
    wanted = [item.name for item in request.session.items]
    common = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    common |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    here = os.path.dirname(os.path.abspath(__file__))

    def run(kind, names, **env):
        code = f"import test_all; test_all.run_each({[f'{kind}_{name}' for name in names]})"
        done = subprocess.run([sys.executable, "-c", code], env=common | env, text=True, capture_output=True, cwd=here)
        return json.loads(done.stdout) if done.returncode == 0 else collections.defaultdict(lambda: done.stderr)
    futures = {}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for kind, names, env in (("interpreted", INTERPRETED, {"TRITON_INTERPRET": "1"}), ("compiled", COMPILED, {})):
            names = [name for name in names if f"test_kernels_{kind}[{name}]" in wanted]
            if names:
                futures[kind] = pool.submit(run, kind, names, **env)
        if "test_prulong_beats_random_masks_on_a_trained_model" in wanted:
            child = server.Process(target=beat_random_masks, args=(tmp_path_factory.mktemp("claim"),))
            futures["claim"] = pool.submit(lambda: (child.start(), child.join(), child.exitcode))
        if any(name.startswith(("test_several_processes_train", "test_a_run_")) for name in wanted):
            futures["trained"] = pool.submit(train_by, (1, 2, 4), tmp_path_factory.mktemp("together"))
        yield futures
        pool.shutdown(cancel_futures=True)


def test_prulong_beats_random_masks_on_a_trained_model(apart):
    assert apart["claim"].result()[-1] == 0


@pytest.fixture
def trained_together(apart):
    return apart["trained"].result()


@pytest.mark.parametrize("name", INTERPRETED)
def test_kernels_interpreted(apart, name):
    failed = apart["interpreted"].result()[f"interpreted_{name}"]
    assert failed is None, failed[-3000:]


@pytest.mark.parametrize("name", COMPILED)
def test_kernels_compiled(apart, name):
    failed = apart["compiled"].result()[f"compiled_{name}"]
    assert failed is None, failed[-3000:]


@pytest.mark.parametrize("name", TOGETHER)
def test_several_processes_train_as_one(trained_together, name):
    """The same losses within 1e-5 over 20 steps, the same checkpoint and folder; CEPE's three phases, gates along the sequence."""
    losses, scores, tensors, files = [], [], [], []
    for size in SIZES[name]:
        out = trained_together / f"{name}-{size}"
        log = [json.loads(line) for line in open(out / "log.jsonl")]
        losses.append([row["loss"] for row in log if row["event"] == "step"])
        scores.append([row["scores"] for row in log if row["event"] == "stage"])
        tensors.append(train.read_tensor_file(out / "checkpoint.safetensors"))
        files.append(sorted(os.listdir(out)))
    assert len(losses[0]) == 20 and losses[0][0] != losses[0][-1] and len(scores[0]) == 2 * (name == "stages")
    for i in range(1, len(losses)):
        assert losses[i] == pytest.approx(losses[0], abs=1e-5)
        assert scores[i] == scores[0]
        assert files[i] == files[0] and {k: (v.shape, v.dtype) for k, v in tensors[i].items()} == {k: (v.shape, v.dtype) for k, v in tensors[0].items()}
        for key, tensor in tensors[0].items():
            if not key.startswith("optimizer"):  # Adam makes of the last bit of a gradient near 0 a step of either sign
                assert (tensors[i][key] - tensor).abs().mean() <= 1e-5 * max(1, tensor.abs().mean()), key
    if "model.safetensors" in files[0]:
        whole = [train.read_tensor_file(trained_together / f"{name}-{size}" / "model.safetensors") for size in (1, SIZES[name][-1])]
        assert whole[0].keys() == whole[1].keys() and all(torch.allclose(whole[0][k], whole[1][k], atol=1e-3) for k in whole[0])


@pytest.mark.parametrize("name", TOGETHER)
def test_a_run_comes_out_in_the_same_bits_again(trained_together, name):
    """And no method needs an operation that --deterministic refuses."""
    a, b = (train.read_tensor_file(trained_together / f"{name}-{kind}" / "checkpoint.safetensors") for kind in ("1", "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_goes_on_with_another_number_of_processes(trained_together):
    """Ctrl-C after ten steps saved; one process goes on from four, two from one, four from two, with the losses of a whole run."""
    for size, before in ((1, 4), (2, 1), (4, 2)):
        log = trained_together / f"half-{before}" / "log.jsonl"
        assert [row["step"] for row in map(json.loads, open(log)) if row["event"] == "step"] == list(range(10))
        assert launch(train_together, size, str(trained_together), before) == [0] * size
        losses = [[row["loss"] for row in map(json.loads, open(path)) if row["event"] == "step"] for path in (log, trained_together / "lm-1" / "log.jsonl")]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
