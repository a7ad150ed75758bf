"""Every technique against its slow, obvious version.   python -m pytest -q test_all.py

Tests of a real Llama read its folder from LLAMA_DIR and are skipped without it; SLOW=1 runs more.
"""
import ast
import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import types
import warnings
import xml.etree.ElementTree
import zlib
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import attention_triton
import cepe
import eval_tasks
import evict
import footprint
import hamiltonian
import meco
import model as model_file
import prulong
import ptp
import train
import vlorp
from attention_triton import attention, decode, key_blocks, query_blocks
from eval_tasks import TINY, tiny_start
from model import (KVCache, Llama, LlamaConfig, Method, Tokenizer, byte_tokenizer, causal,
                   collate, cross_entropy, generate, load_model, load_tokenizer, rope, rotate,
                   rope_frequencies, save_model)

torch.set_num_threads(1)  # some tests' processes run beside the others
SLOW = "SLOW" in os.environ
HERE = os.path.dirname(os.path.abspath(__file__))


def python(*args, cwd=HERE, **env):
    """Run Python in a process of its own."""
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=cwd,
                          env=os.environ | env)


def kernels_interpreted():
    return python("-c", "import test_all as t; t.check_kernels('cpu'); t.check_interpreted()",
                  TRITON_INTERPRET="1")


def prulong_from_nothing():
    with tempfile.TemporaryDirectory() as folder:
        done = python(os.path.join(HERE, "train.py"), "--method", "prulong", "--n_random", "4",
                      cwd=folder, OMP_NUM_THREADS="1")
        return table_of(done.stdout, folder)


def table_of(stdout, folder="."):
    """The table of a run of train.py: its last line names the log, whose last line has it."""
    last = json.loads(stdout.splitlines()[-1])
    with open(os.path.join(folder, last["log"])) as log:
        table = json.loads(log.readlines()[-1])["rows"]
    assert last["rows"] == {name: table[name] for name in last["rows"]}
    return table


LONG = {"test_kernels_interpreted": kernels_interpreted,
        "test_prulong_beats_random_masks": prulong_from_nothing}


@pytest.fixture(scope="session", autouse=True)
def beside(request):
    """Two runs of most of a minute, one after the other, while the other tests run; the last two
    tests of this file look at what came of them."""
    asked = {item.originalname for item in request.session.items}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield {name: pool.submit(run) for name, run in LONG.items() if name in asked}


def close(a, b, tol):
    """Largest difference at most tol, and the same places infinite."""
    a, b = a.double(), b.double()
    assert a.shape == b.shape, f"{tuple(a.shape)} != {tuple(b.shape)}"
    assert torch.equal(a.isinf(), b.isinf()), "infinite in different places"
    finite = (a - b)[~a.isinf()].abs()
    diff = finite.max().item() if finite.numel() else 0.0
    assert diff <= tol, f"max difference {diff:.3e} > {tol:.1e}"


# --- attention -----------------------------------------------------------------------------------

def visible(nq, nk, causal=True, window=0, sink=0):
    """The rule: (nq, nk), True where a query sees a key."""
    if not causal:
        return torch.ones(nq, nk, dtype=torch.bool)
    p, j = torch.arange(nq)[:, None] + nk - nq, torch.arange(nk)
    near = p - j < (window or nq + nk)
    return (j <= p) & (near | (j < sink))


def slow_attention(q, k, v, cu_q, cu_k, causal=True, window=None, sink=0, scale=None):
    """The definition in float64: every pair of one query head of one sequence at a time."""
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[2] ** -0.5 if scale is None else scale
    out, n_rep = torch.zeros_like(q), q.shape[1] // k.shape[1]
    windows = window.tolist() if torch.is_tensor(window) else [window] * k.shape[1]
    for b, h in itertools.product(range(len(cu_q) - 1), range(q.shape[1])):
        rows, keys = slice(*cu_q[b:b + 2]), slice(*cu_k[b:b + 2])
        s = q[rows, h] @ k[keys, h // n_rep].T * scale
        seen = visible(*s.shape, causal, windows[h // n_rep], sink).to(s.device)
        weights = s.masked_fill(~seen, -1e300).softmax(1) * seen  # 0 in a row that sees nothing
        out[rows, h] = weights @ v[keys, h // n_rep]
    return out


def check(lengths_q, lengths_k, n_kv_head=2, n_rep=2, head_dim=16, *, impl, dtype=torch.float32,
          tol=2e-5, device="cpu", lay_out=lambda x: x, **options):
    """attention of random q, k, v, and its gradients, must be the definition's."""
    cu_q, cu_k = [0, *itertools.accumulate(lengths_q)], [0, *itertools.accumulate(lengths_k)]
    like_q, like_k = (cu_q[-1], n_kv_head * n_rep), (cu_k[-1], n_kv_head)
    tensors = [torch.randn(*n, head_dim) for n in (like_q, like_k, like_k, like_q)]
    *inputs, grad = (lay_out(x.to(device, dtype)).requires_grad_() for x in tensors)
    results = []
    for function in (slow_attention, functools.partial(attention, impl=impl)):
        out = function(*inputs, cu_q, cu_k, **options)
        grads = torch.autograd.grad(out, inputs, grad.to(out.dtype), materialize_grads=True)
        results.append((out, *grads))
    for want, got in zip(*results):
        assert got.dtype == dtype
        largest = want.abs().amax().item() if want.numel() else 0
        close(got, want, tol * max(1, largest))


def check_random_shapes(seed, n_trial, longest, head_dims, **how):
    """Groups of query heads, uneven documents, more queries than keys and fewer, empty sequences,
    windows per head, sinks."""
    rng, _ = random.Random(seed), torch.manual_seed(seed)
    for trial in range(n_trial):
        n_doc, n_kv_head = rng.randint(1, 4), rng.randint(1, 3)
        lengths_q = [rng.randint(0, longest) for _ in range(n_doc)]
        lengths_k = [max(0, n + rng.randint(-6, 60)) for n in lengths_q]
        if rng.random() < 0.5:
            lengths_k = lengths_q
        if rng.random() < 0.5:  # sequences of one shape
            lengths_q, lengths_k = lengths_q[:1] * n_doc, lengths_k[:1] * n_doc
        options = dict(causal=trial % 5 != 0, scale=rng.choice((None, 0.3)))
        if options["causal"]:
            per_head = torch.randint(10, (n_kv_head,))
            options["window"] = rng.choice((None, rng.randint(1, longest // 2), per_head))
            options["sink"] = rng.randint(0, longest // 2)
        shape = n_kv_head, rng.randint(1, 4), rng.choice(head_dims)
        check(lengths_q, lengths_k, *shape, **how, **options)


DTYPES = pytest.mark.parametrize("dtype, tol", [
    (torch.float64, 1e-11), (torch.float32, 1e-5),
    (torch.bfloat16, 5e-2), (torch.half, 5e-3)])


@DTYPES
def test_attention_random_shapes(dtype, tol):
    n_trial = 300 if dtype == torch.float64 else 40
    check_random_shapes(0, n_trial, 40, (4, 16, 32), impl="torch", dtype=dtype, tol=tol)


def layouts(x):
    """x (N, H, D) with its axes in every order in memory, with gaps of NaN between its rows, heads
    or numbers, and expanded from its first row, head or number."""
    made = []
    for order in itertools.permutations(range(3)):
        back = [order.index(axis) for axis in range(3)]
        made.append(x.permute(order).contiguous().permute(back))
    for axis in range(3):
        pair = torch.stack((x, torch.full_like(x, torch.nan)), axis + 1)
        made.append(pair.select(axis + 1, 0))
        made.append(x.narrow(axis, 0, 1).expand(x.shape))
    return made


@DTYPES
def test_attention_of_any_strides(dtype, tol, n_trial=150, impl="torch", device="cpu"):
    """q, k, v and the gradient of the result may lie in memory in any way."""
    rng, _ = random.Random(1), torch.manual_seed(1)
    how = dict(dtype=dtype, tol=2 * tol, impl=impl, device=device)
    for _ in range(n_trial):
        lengths = rng.choice(([40], [20, 20], [13, 27]))
        window, sink = rng.choice((None, 8, 1)), rng.choice((0, 2))
        how["lay_out"] = lambda x: rng.choice(layouts(x))
        check(lengths, lengths, window=window, sink=sink, **how)


def test_attention_refuses_a_second_derivative(impl="torch"):
    """It would be wrong in silence."""
    q, one = torch.randn(9, 2, 16, requires_grad=True), torch.ones((), requires_grad=True)
    for window in (0, 3):
        out = attention(q, q, q, [0, 9], [0, 9], window=window, impl=impl)
        first, = torch.autograd.grad(out.sum(), q, one, create_graph=True)
        with pytest.raises(RuntimeError, match="not implemented|once_differentiable"):
            first.sum().backward()


def test_attention_of_streaming_heads_costs_linearly():
    """Twice the tokens, twice the pairs that PyTorch computes: two windows and the sink a row."""
    sdpa, pairs = F.scaled_dot_product_attention, []

    def counting(q, k, *rest, **options):
        pairs[-1] += q.shape[2] * k.shape[2]
        return sdpa(q, k, *rest, **options)
    with mock.patch.object(F, "scaled_dot_product_attention", counting):
        for n in (1024, 2048, 4096):
            pairs.append(0)
            x = torch.zeros(n, 1, 4)
            attention(x, x, x, [0, n], [0, n], window=64, sink=4)
    assert pairs[2] - pairs[1] == 2 * (pairs[1] - pairs[0])
    assert pairs[2] <= 4096 * (2 * 64 + 4)


def test_attention_refuses_what_does_not_fit():
    q, cu = torch.randn(4, 4, 8), [0, 4]
    k = q[:, :2]
    for words, bad in (
            ("causal", dict(window=3, causal=False)),
            ("sink", dict(sink=-1)),
            ("windows", dict(window=-1)),
            ("2 windows", dict(window=torch.tensor([1, 2, 3]))),
            ("impl", dict(impl="flash")),
            ("share", dict(q=q[:, :3])),
            ("expected q", dict(k=k[:3])),
            ("dtype", dict(q=q.double())),
            ("cu_q", dict(cu_q=[0, 3])),
            ("cu_k", dict(cu_k=[0, 3, 1, 4])),
            ("sequences", dict(cu_k=[0, 2, 4]))):
        with pytest.raises(ValueError, match=words):
            attention(**dict(q=q, k=k, v=k, cu_q=cu, cu_k=cu) | bad)


def random_cache(rng, batch, n_kv_head, longest, head_dim=16):
    """K, V (slots, head_dim) where stretches lie in any order, filled from none to all; elsewhere
    NaN. Returns k, v, start, length, none of them contiguous."""
    owners = list(itertools.product(range(batch), range(n_kv_head)))
    rooms = [rng.randint(0, longest)] * len(owners)
    if rng.random() < 0.5:
        rooms = [rng.randint(0, longest) for _ in owners]
        rng.shuffle(owners)
    filled = rng.choice(((1,), (0.4,), (0, 0.3, 0.8, 1)))
    entries = torch.full((sum(rooms) + 5, 2 * head_dim), torch.nan)
    tables, end = torch.zeros(batch, n_kv_head, 2, dtype=torch.long), 0
    for owner, room in zip(owners, rooms):
        n = round(rng.choice(filled) * room)
        tables[owner] = torch.tensor((end, n))
        entries[end:end + n] = torch.randn(n, 2 * head_dim)
        end += room
    return *entries.split(head_dim, 1), *tables.unbind(-1)


@DTYPES
def test_decode(dtype, tol, n_trial=100, longest=60, impl="torch", device="cpu"):
    """One query per sequence over stretches of flat buffers; beyond their ends only large numbers,
    for the kernels NaN."""
    rng, _ = random.Random(2), torch.manual_seed(2)
    for _ in range(n_trial):
        batch, n_kv_head = rng.randint(1, 4), rng.randint(1, 3)
        n_rep = rng.choice((1, 3, 20))
        cache = random_cache(rng, batch, n_kv_head, longest)
        k, v, start, length = (x.to(device) for x in cache)
        if impl == "torch":
            k, v = k.nan_to_num(1e3), v.nan_to_num(1e3)
        k, v = k.to(dtype), v.to(dtype)
        q = torch.randn(batch, n_kv_head * n_rep, 16).to(device, dtype)
        q, scale = rng.choice(layouts(q)), rng.choice((None, 0.3, 20))
        got = decode(q, k, v, start, length, scale=scale, impl=impl)
        assert got.dtype == dtype
        for b, h in itertools.product(range(batch), range(n_kv_head)):
            first, n = int(start[b, h]), int(length[b, h])
            keys, values = k[first:first + n, None], v[first:first + n, None]
            heads = slice(h * n_rep, (h + 1) * n_rep)
            row = q[b:b + 1, heads]
            want = slow_attention(row, keys, values, [0, 1], [0, n], scale=scale)
            close(got[b:b + 1, heads], want, 5 * tol)


def test_decode_is_the_last_row_of_attention(impl="torch", device="cpu"):
    start = torch.tensor([[0, 200]], device=device)
    qkv = torch.randn(200, 10, 16, device=device)
    q, k, v = qkv.split((6, 2, 2), 1)
    flat_k, flat_v = (x.transpose(0, 1).flatten(0, 1) for x in (k, v))
    got = decode(q[-1:], flat_k, flat_v, start, torch.full_like(start, 200), impl=impl)
    for rows in (q, q[-1:]):
        want = attention(rows, k, v, [0, len(rows)], [0, 200], impl=impl)
        close(got, want[-1:], 1e-6)


# --- attention: the Triton kernels ---------------------------------------------------------------
# Triton either interprets or compiles, for the whole life of a process. This one compiles.

needs_triton = pytest.mark.skipif(
    attention_triton.triton is None or attention_triton.interpreted(),
    reason="Triton is not here, or interprets where it is expected to compile")
KERNELS = [attention_triton.forward_kernel, attention_triton.dq_kernel, attention_triton.dkv_kernel]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_on_the_gpu():
    check_kernels("cuda")


def check_kernels(device):
    """Each mode of the rule. Interpreted, a block is 32 rows by 16 keys, in dK, dV 16 by 32."""
    how = dict(impl="triton", device=device)
    case = functools.partial(check, **how)
    case([70], [70], n_rep=1)  # not a multiple of any block
    case([64], [64], 1, 3, window=7)  # window smaller than a block
    case([90], [90], 1, 4, window=37, sink=5)  # neither aligned
    case([90], [90], window=16, sink=16)  # both aligned
    case([80], [80], window=10, sink=50)  # the sink reaches past the first windows
    per_head = torch.tensor([0, 20])  # a full head beside a streaming one
    case([70], [100], window=per_head, sink=18)  # chunked prefill
    case([50], [30])  # more queries than keys: rows that see nothing
    case([50], [30], window=9, sink=3)
    case([33, 1, 1], [33, 1, 1], 1, 3, window=11, sink=2)  # documents of one token
    case([0, 20, 5], [7, 20, 0], 1, 2)  # no queries, no keys
    case([40, 3], [1, 50], causal=False)  # cross-attention, also over one key
    case([20, 20, 20], [50, 9, 31], 1, 3)  # ragged caches
    case([60], [90], dtype=torch.half, tol=4e-3, window=20, sink=3)
    case([60], [90], 2, 1, 128, dtype=torch.bfloat16, tol=4e-2)
    test_attention_of_any_strides(torch.float32, 1e-5, 12, **how)
    test_attention_refuses_a_second_derivative("triton")
    test_decode(torch.float32, 1e-5, 20, 100, **how)
    test_decode(torch.half, 5e-3, 3, **how)
    test_decode(torch.bfloat16, 5e-2, 3, **how)
    test_decode_is_the_last_row_of_attention(**how)


def check_interpreted():
    """What only Triton's interpreter can show."""
    check_random_shapes(1, 1000 if SLOW else 12, 70, (16, 32, 64), impl="triton")
    check_poison()
    check_work()
    many, cu = torch.zeros(2 ** 16, 2, 16), range(2 ** 16 + 1)
    run = functools.partial(attention, impl="triton")
    with pytest.raises(ValueError, match="65536 sequences"):
        run(many, many, many, cu, cu)
    none = many[:0]
    assert run(none, none, none, [0], [0]).shape == none.shape
    for kind in ("torch.float64", "heads of 130"):
        x = none.double() if kind == "torch.float64" else torch.zeros(0, 2, 130)
        with pytest.raises(ValueError, match=f"no kernel for {kind}"):
            run(x, x, x, [0, 0], [0, 0])
    for x in (many, many.transpose(0, 1), many[::2]):  # not copied
        assert attention_triton.as_kernels_expect(x) is x


def check_poison():
    """NaN in memory behind the ends and in another document must not change a bit."""
    cu_q, cu_k = [0, 37, 45, 80], [0, 50, 58, 95]
    bounds, results = (cu_q, cu_k, cu_k, cu_q), []  # of q, k, v and the gradient
    heads = 4, 2, 2, 4
    clean = [torch.randn(cu[-1], h, 16) for cu, h in zip(bounds, heads)]
    for middle in (1, torch.nan):
        tensors = []
        for x, cu in zip(clean, bounds):
            padded = F.pad(x, (0, 8, 0, 1, 0, 100), value=torch.nan)
            padded[cu[1]:cu[2]] *= middle
            tensors.append(padded[:len(x), :-1, :16].requires_grad_())
        *inputs, grad = tensors
        options = dict(window=torch.tensor([0, 13]), sink=5, impl="triton")
        out = attention(*inputs, cu_q, cu_k, **options)
        results.append([out, *torch.autograd.grad(out, inputs, grad.detach())])
    for cu, a, b in zip((cu_q, cu_q, cu_k, cu_k), *results):
        for document in (slice(*cu[:2]), slice(*cu[2:])):
            assert torch.equal(a[document], b[document]) and b[document].isfinite().all()


def check_work():
    """Products: those of blocks with a visible pair and no more. Backward costs 3.5 forwards."""
    from triton.runtime.interpreter import InterpreterBuilder
    done, dot = [], InterpreterBuilder.create_dot

    def counting(self, a, b, *rest):
        done.append(2 * a.data.size * b.data.shape[1])
        return dot(self, a, b, *rest)
    cases = [(n, n, 32, 8) for n in (128, 256, 384)]  # streaming
    cases += [(n, n, 0, 0) for n in (128, 256)]
    forwards = []
    for nq, nk, window, sink in (*cases, (50, 90, 20, 3)):
        q, k = torch.randn(nq, 2, 16, requires_grad=True), torch.randn(nk, 1, 16)
        options = dict(window=window, sink=sink, impl="triton")
        with mock.patch.object(InterpreterBuilder, "create_dot", counting):
            out = attention(q, k, k, [0, nq], [0, nk], **options)
            forward = sum(done)
            out.sum().backward()
        backward = sum(done) - forward
        seen = visible(nq, nk, True, window, sink)[None].float()
        by_rows = int(F.max_pool2d(seen, (32, 16), ceil_mode=True).sum())  # blocks
        by_keys = int(F.max_pool2d(seen, (16, 32), ceil_mode=True).sum())
        product = 2 * 2 * 16 * (32 * 16)  # of a block, for two query heads
        assert forward == 2 * product * by_rows
        assert backward == product * (3 * by_rows + 4 * by_keys)
        assert window or backward == 3.5 * forward
        forwards.append(forward)
        done.clear()
    first, second, third, *_ = forwards
    assert third - second == second - first  # a streaming head: linear


@needs_triton
def test_kernels_visit_what_is_visible():
    """On every small shape: a block is visited, once, iff some row sees some key of it; and goes
    without a mask only if all of its rows see all of its keys."""
    lengths, six = (range(1, 9), range(1, 11)), range(6)
    for nq, nk, causal, window, sink in itertools.product(*lengths, (True, False), six, six):
        if causal or window == sink == 0:
            seen = visible(nq, nk, causal, window, sink)
            rule, kind = (nq, nk, window or 2 ** 30, sink), (causal, window > 0)
            check_blocks(key_blocks.fn, seen, 3, 2, rule, kind)
            check_blocks(query_blocks.fn, seen.T, 2, 3, rule, kind)


def check_blocks(function, seen, size, block, rule, kind):
    """`seen` (rows, others): tiles of `size` rows visit blocks of `block` others."""
    for start in range(0, len(seen), size):
        tile = seen[start:start + size]
        counts = function(start, start + len(tile), *rule, block, *kind)
        *counts, lo, free0, free1 = counts
        firsts = [0, lo, free1][-len(counts):]
        masked = [first + i * block for first, n in zip(firsts, counts) for i in range(n)]
        free = list(range(free0, free1, block))
        parts = dict(zip(range(0, len(tile.T), block), tile.split(block, 1)))
        want = [first for first, part in parts.items() if part.any()]
        assert sorted(masked + free) == want, (rule, kind, start)
        full = tile.new_ones(len(tile), block)
        assert all(torch.equal(parts[first], full) for first in free)


def compiled(kernel, arch, dtype=torch.bfloat16, head_dim=128, tile=None, **modes):
    """Compile for sm_<arch> as a launch would: no spills, and it fits in shared memory. Returns a
    Counter of instructions for each innermost loop with matrix products."""
    triton, name = attention_triton.triton, kernel.__name__
    constants, options = dict(D=head_dim), {}
    if name in attention_triton.TILES:
        constants, options = attention_triton.build_of(name, arch, dtype, head_dim)
    if tile:
        constants["BM"], constants["BN"], options["num_warps"], options["num_stages"] = tile
    types, multiples = {}, {}
    for i, p in enumerate(kernel.params):
        types[p.name] = argument_type(p, dtype)
        if types[p.name] not in ("constexpr", "fp32") and not p.do_not_specialize:
            multiples[i,] = [["tt.divisibility", 16]]  # as found at launch: else loads are scalar
    source = triton.compiler.ASTSource(kernel, types, constants | modes, multiples)
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    made = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert not re.search(r"\b(LDL|STL)\b", code), f"{name} spills"
    assert made.metadata.shared <= {80: 163, 90: 227}[arch] * 1024
    return inner_loops(code)


def argument_type(p, dtype):
    """Triton's name for the type of a kernel's parameter: pointers begin with a capital."""
    types = dict.fromkeys(("Lse", "Delta", "Part", "PartLse"), "*fp32")
    types |= dict(CuQ="*i32", CuK="*i32", Window="*i32", Start="*i64", Length="*i64", scale="fp32")
    if p.is_constexpr or p.name in types:
        return types.get(p.name, "constexpr")
    if p.name[0].isupper():
        return "*fp32" if dtype == torch.float32 else "*bf16"
    return "i32"


def inner_loops(code):
    """In nvdisasm's listing a loop ends in a branch back to its label."""
    names, labels, loops = [], {}, []
    for line in code.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif op := re.match(r"\s*/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.EX2)?)", line):
            names.append(op[1])
            target = re.search(r"L_x_\d+|$", line)[0]
            if op[1] == "BRA" and target in labels:
                first = labels[target]
                if all(start < first for start, _ in loops):  # it holds no other loop
                    loops.append((first, len(names)))
    counts = [collections.Counter(names[first:end]) for first, end in loops]
    return [loop for loop in counts if loop["HGMMA"] + loop["HMMA"]]


BUDGETS = {  # instructions in the loop without a mask: forward, dq, dkv
    (90, 64): (299, 267, 415), (90, 128): (364, 293, 350),
    (80, 64): (380, 195, 319), (80, 128): (306, 387, 538)}


@needs_triton
@pytest.mark.parametrize("arch, head_dim", BUDGETS)
def test_kernels_compile_well(arch, head_dim):
    """bfloat16: tensor cores, asynchronous copies, one exp2 a score, few instructions."""
    for kernel, budget in zip(KERNELS, BUDGETS[arch, head_dim]):
        free, masked = compiled(kernel, arch, head_dim=head_dim, CAUSAL=True, STREAM=True)
        assert free["FSEL"] == 0 < masked["FSEL"] and free["FFMA"] > 0
        assert free.total() <= 1.05 * budget, kernel
        what = kernel.__name__, arch, torch.bfloat16, head_dim
        build, options = attention_triton.build_of(*what)
        exps = free["MUFU.EX2"] * 32 * options["num_warps"]
        assert exps <= 1.13 * build["BM"] * build["BN"]  # more: rows computed twice
        for loop in (free, masked):
            if arch == 90:
                assert loop["HGMMA"] and not loop["HMMA"]
            else:
                assert loop["HMMA"] and loop["LDGSTS"] and loop["LDSM"]


@needs_triton
@pytest.mark.parametrize("arch", (80, 90))
def test_other_kernels_do_not_spill(arch):
    """Decoding; full heads and cross-attention; small heads; float32."""
    compiled(attention_triton.combine_kernel, arch, SPLITS=64)
    assert compiled(attention_triton.decode_kernel, arch)
    for kernel in KERNELS:
        for causal in (True, False):
            assert compiled(kernel, arch, CAUSAL=causal, STREAM=False)
        streaming = functools.partial(compiled, kernel, arch, CAUSAL=True, STREAM=True)
        assert streaming(head_dim=32)
        assert streaming(torch.float32, {80: 128, 90: 64}[arch])


@needs_triton
def test_a_bad_block_spills():
    """Half the warps for the same block."""
    with pytest.raises(AssertionError, match="forward_kernel spills"):
        compiled(KERNELS[0], 90, tile=(128, 64, 4, 2), CAUSAL=True, STREAM=True)


@needs_triton
def test_kernels_where_none_can_run():
    """impl="triton" is refused with the reason; "auto" computes without Triton."""
    q, cu = torch.randn(5, 2, 16), [0, 5]
    table = torch.zeros(5, 2)
    with pytest.raises(ValueError, match="no GPU"):
        attention(q, q, q, cu, cu, impl="triton")
    with pytest.raises(ValueError, match="no GPU"):
        decode(q, q[0], q[0], table, table, impl="triton")
    code = """if True:
        import sys, torch
        sys.modules["triton"] = None
        from attention_triton import attention
        q = torch.ones(5, 2, 16)
        assert torch.equal(attention(q, q, q, [0, 5], [0, 5]), q)
        attention(q, q, q, [0, 5], [0, 5], impl="triton")
    """
    assert "ValueError: impl 'triton': Triton is not installed" in python("-c", code).stderr


# --- model ---------------------------------------------------------------------------------------

def small(seed=0, **changes):
    """A small random Llama in float64."""
    shape = dict(vocab_size=61, n_layer=3, n_head=6, n_kv_head=2, n_embd=24, n_ff=40, head_dim=8)
    return Llama(LlamaConfig(**shape | changes)).double().init_weights(seed)


def random_tokens(n, seed=0, vocab_size=61):
    return torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(seed))


def slow_llama(model, tokens, visible=None, shift=None):
    """The definition in float64, a query head at a time: complex RoPE, explicit mask.

    visible (n_layer, n_kv_head, N, N) says which key a row sees. shift (N, N): by how many tokens a
    row sees a key nearer than it is (StreamingLLM's sink)."""
    c, n = model.config, len(tokens)
    p = {name: x.double() for name, x in model.named_parameters()}
    angles = rope_frequencies(c).double()
    shift = torch.zeros(n, n) if shift is None else shift

    def turned(x, positions):  # x (..., D) at positions (...)
        turn = torch.polar(torch.ones(()).double(), positions[..., None].double() * angles)
        pairs = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat((pairs.real, pairs.imag), -1)

    def norm(x, weight):
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt()
    x = p["model.embed_tokens.weight"][tokens]
    for i in range(c.n_layer):
        w = {k.split(f"layers.{i}.")[1]: v for k, v in p.items() if f"layers.{i}." in k}
        y, heads = norm(x, w["input_layernorm.weight"]), []
        for h in range(c.n_head):
            g = h // (c.n_head // c.n_kv_head)
            rows = slice(h * c.head_dim, (h + 1) * c.head_dim)
            keys = slice(g * c.head_dim, (g + 1) * c.head_dim)
            q, k, v = (y @ w[f"self_attn.{name}_proj.weight"][part].T
                       for name, part in (("q", rows), ("k", keys), ("v", keys)))
            if c.qkv_bias:
                q, k, v = (x + w[f"self_attn.{name}_proj.bias"][part] for x, name, part in
                           ((q, "q", rows), (k, "k", keys), (v, "v", keys)))
            if c.qk_norm:
                q = norm(q, w["self_attn.q_norm.weight"])
                k = norm(k, w["self_attn.k_norm.weight"])
            q = turned(q, torch.arange(n))
            k = turned(k.expand(n, n, -1), torch.arange(n) + shift)  # (row, key, D)
            scores = torch.einsum("rd,rkd->rk", q, k) / c.head_dim ** 0.5
            if (c.rope_scaling or {}).get("rope_type") == "yarn":  # its factor in q and in k
                scores *= (0.1 * math.log(c.rope_scaling["factor"]) + 1) ** 2
            near = torch.ones(n, n).triu(1 - (c.window or n)).bool()
            see = near & near.new_ones(n, n).tril() if visible is None else visible[i, g]
            heads.append(scores.masked_fill(~see, -torch.inf).softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ w["self_attn.o_proj.weight"].T
        y = norm(x, w["post_attention_layernorm.weight"])
        gate, up = (y @ w[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ w["mlp.down_proj.weight"].T
    head = p.get("lm_head.weight", p["model.embed_tokens.weight"])
    return norm(x, p["model.norm.weight"]) @ head.T


SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32.0,
        "truncate": True}
SHAPES = [{}, dict(n_kv_head=6), dict(n_kv_head=1, tie_embeddings=True), dict(head_dim=6),
          dict(rope_scaling=SCALING), dict(rope_scaling={"rope_type": "linear", "factor": 4.0}),
          dict(rope_scaling=YARN), dict(qkv_bias=True), dict(qk_norm=True), dict(window=7)]


def family(**changes):
    """A small model whose vectors, too, are random: biases and norms."""
    model, rng = small(**changes), torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn(p.shape, generator=rng)
    return model


@pytest.mark.parametrize("changes", SHAPES)
def test_llama_equals_its_definition(changes, tmp_path):
    """Also Qwen2's, Qwen3's and Mistral's layers, and YaRN. Ids and the vectors of their embeddings
    give the same; what is saved is read back; greedy texts are those without a cache."""
    model, tokens = family(**changes), random_tokens(40)
    save_model(model, tmp_path)
    assert load_model(tmp_path, dtype=None).config == model.config
    texts = [generate(model, tokens[:30], 8, chunk=chunk) for chunk in (None, 1, 9)]
    with torch.no_grad():
        whole = torch.cat((tokens[:30], torch.tensor(texts[0])))
        best = model(whole).argmax(-1)[29:-1].tolist()
    assert texts == [best] * 3
    with torch.no_grad():
        want = slow_llama(model, tokens)  # angles are float32, as in the reference implementation
        close(model(tokens), want, 1e-6)
        close(model(model.model.embed_tokens(tokens)), want, 1e-6)


def test_llama3_rope_scaling_follows_the_published_code():
    scaling = SCALING | {"original_max_position_embeddings": 8192}
    config = small(head_dim=64, rope_base=5e5, rope_scaling=scaling).config
    for i, got in enumerate(rope_frequencies(config).tolist()):
        freq = 5e5 ** (-2 * i / 64)
        length = 2 * math.pi / freq
        smooth = (8192 / length - 1.0) / (4.0 - 1.0)
        want = (1 - smooth) * freq / 8.0 + smooth * freq
        if length > 8192 / 1.0:
            want = freq / 8.0
        if length < 8192 / 4.0:
            want = freq
        assert abs(got - want) <= 2e-6 * want


def test_rope_given_twice_is_read_as_the_hub_reads_it():
    """Frequencies 1, 32 and 63 of heads of 128 as transformers 5.2 computes them."""
    hf = HF | {"head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 5e5}
    length = "original_max_position_embeddings"
    llama3 = {name: value for name, value in SCALING.items() if name != length}
    plain, linear = {"rope_type": "default", "rope_theta": 5e5}, {"type": "linear", "factor": 4.0}
    for change, want in (({"rope_parameters": plain, "rope_scaling": llama3 | {length: 8192}},
                          [0.8146172165870667, 0.0005248460220173001, 3.068925877869333e-07]),
                         ({"rope_parameters": plain, "rope_scaling": linear, "rope_theta": None},
                          [0.21649108827114105, 0.0024999999441206455, 2.8869548259535804e-05]),
                         ({"rope_scaling": llama3}, [0.8146172165870667, 0.001414213445968926,
                                                     3.068925877869333e-07]),
                         ({"rope_scaling": llama3 | {length: 4096}, length: 8192},
                          [0.8146172165870667, 0.0005248460220173001, 3.068925877869333e-07])):
        got = rope_frequencies(LlamaConfig.from_hf(hf | change))[[1, 32, 63]]
        assert torch.allclose(got, torch.tensor(want), rtol=1e-6), change


def test_yarn_as_the_hub_computes_it():
    """Frequencies 1, 20 and 63 of heads of 128 and the logits' factor, as in transformers 5.2."""
    hf = HF | {"head_dim": 128, "max_position_embeddings": 32768, "rope_theta": 1e6}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = LlamaConfig.from_hf(hf | {"rope_scaling": yarn})
    got = rope_frequencies(config)[[1, 20, 63]]
    want = [0.8058422207832336, 0.01333521492779255, 3.102344408034696e-07]
    assert torch.allclose(got, torch.tensor(want), rtol=1e-5)
    assert model_file.logit_scale(config) == pytest.approx((0.1 * math.log(4) + 1) ** 2)
    again = LlamaConfig.from_hf(hf | {"rope_scaling": yarn | {"attention_factor": 1.5}})
    assert model_file.logit_scale(again) == 2.25 and again == LlamaConfig.from_hf(again.to_hf())


def test_a_sliding_window_bounds_the_cache_and_rules_out_other_attention(tmp_path, monkeypatch):
    """Bytes stop growing; a policy and a technique are refused where the text is longer."""
    model, tokens, sizes = small(window=8), random_tokens(60), []
    for n in (4, 8, 20, 60):
        cache = KVCache(model, chunk=16)
        generate(model, tokens[:n], 1, cache)
        assert len(cache.positions(1, 0)) == min(n, 7)
        sizes.append(cache.nbytes())
    assert sizes[1:] == [sizes[1]] * 3
    for n, fits in ((5, True), (20, False)):
        cache = evict.make_cache(model, "snapkv", budget=2, obs_window=1)
        refused = pytest.raises(ValueError, match="sliding window")
        with contextlib.nullcontext() if fits else refused:
            generate(model, tokens[:n], 3, cache)
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(TINY, window=64)
    save_model(Llama(config).init_weights(0), "m")
    line = "--model m --data facts --steps 1 --eval_seqs 1 --n_random 1".split()
    for methods in (["prulong"], ["lm", "--beside", "prulong"]):
        with pytest.raises(ValueError, match="sliding window of 64"):
            train.main(["--method", *methods, *line[:-2]])
    train.main(["--method", "prulong", *line, "--seq_len", "64", "--window", "8"])


def test_linear_rope_scaling_divides_every_frequency():
    linear = small(rope_scaling={"rope_type": "linear", "factor": 4.0}).config
    assert torch.equal(rope_frequencies(linear) * 4, rope_frequencies(small().config))


def test_cross_entropy_value_and_gradients(monkeypatch):
    """Against torch's, over several blocks, with ignored targets and weights; without a target the
    loss and its gradients are 0. A second derivative is refused: it would be wrong in silence."""
    monkeypatch.setattr(model_file.CrossEntropy, "BLOCK", 1600)  # 48 rows at a time
    rng, n = torch.Generator().manual_seed(0), 348
    hidden, head = (torch.randn(s, 16, generator=rng).double().requires_grad_() for s in (n, 33))
    targets = torch.randint(33, (n,), generator=rng)
    targets[torch.rand(n, generator=rng) < 0.2] = -100
    weights = torch.rand(n, generator=rng).double()
    for w in (None, weights):
        each = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="none")
        used = (targets != -100).double() * (1 if w is None else w)
        want, got = (each * used).sum() / used.sum(), cross_entropy(hidden, head, targets, w)
        close(got, want, 1e-12)
        grads = [torch.autograd.grad(3 * loss, (hidden, head)) for loss in (got, want)]
        for a, b in zip(*grads):
            close(a, b, 1e-12)
    none = cross_entropy(hidden, head, torch.full((n,), -100))
    assert none == 0 and not any(g.any() for g in torch.autograd.grad(none, (hidden, head)))
    one = torch.ones((), dtype=torch.double, requires_grad=True)
    loss = cross_entropy(hidden, head, targets)
    first, = torch.autograd.grad(loss, hidden, one, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_norm_rounds_as_the_hubs():
    """In bfloat16: the formula in float32, rounded, and only then times the weight."""
    x, norm = torch.randn(50, 48).bfloat16() * 3, model_file.RMSNorm(48, 1e-5).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.rand(48))
        y = x.float()
        y = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        assert torch.equal(norm(x), y.bfloat16() * norm.weight)


def test_packed_documents_equal_separate_ones():
    """Without resetting RoPE positions, full and streaming; no target crosses documents."""
    model, rng = small(), torch.Generator().manual_seed(0)
    docs = [torch.randint(61, (n,), generator=rng) for n in (17, 1, 30)]
    batch = collate(docs)
    assert [int(t) for t in batch.targets[batch.cu_seqlens[1:].long() - 1]] == [-100] * 3
    heads = torch.rand(3, 2, generator=rng) < 0.5
    with torch.no_grad():
        for attend in (causal, lambda cu: prulong.by_mask(heads, cu, 3, 5)):
            alone = torch.cat([model(doc, attend([0, len(doc)])) for doc in docs])
            close(model(batch.tokens, attend(batch.cu_seqlens)), alone, 1e-6)
        logits = model(batch.tokens, causal(batch.cu_seqlens))
        want = torch.nn.functional.cross_entropy(logits, batch.targets)
        close(model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens), want, 1e-6)


def test_checkpointing_changes_no_gradient():
    model, tokens = small(), random_tokens(33)
    z = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    grads = []
    for model.model.checkpointing in (False, True):
        loss = model.loss(tokens[:-1], tokens[1:], prulong.gated(z, [0, 20, 32], 2, 5))
        grads.append(torch.autograd.grad(loss, [z, *model.parameters()]))
    for a, b in zip(*grads):
        close(a, b, 1e-12)


# --- generation ----------------------------------------------------------------------------------

@pytest.mark.parametrize("policy", ["full", "streaming", "snapkv", "h2o"])
def test_a_cache_goes_on_outside_generate(policy):
    """What `generate` laid out, `prefill` may write to and read on from, as in one pass."""
    settings = dict(streaming=dict(sink=1, window=6), snapkv=dict(keep=0.5, obs_window=2),
                    h2o=dict(budget=8))
    model, tokens, states = small(), random_tokens(24), []
    for inside in (True, False):
        cache = evict.make_cache(model, policy, **settings.get(policy, {}))
        if inside:
            generate(model, tokens[:16], 0, cache)
        else:
            with torch.no_grad():
                cache.prefill(model, tokens[:16])
        with torch.no_grad():
            states.append(cache.prefill(model, tokens[16:]))
    assert torch.equal(*states)


@pytest.mark.parametrize("chunk", [1, 3, 7, 20, None])
def test_greedy_with_cache_equals_without(chunk):
    model, prompt = small(), random_tokens(20)
    want = prompt.tolist()
    with torch.no_grad():
        for _ in range(12):
            want.append(int(model(torch.tensor(want))[-1].argmax()))
    cache = KVCache(model)
    assert generate(model, prompt, 12, cache, chunk) == want[20:]
    assert cache.footprint() == 1 and cache.peak() == 1
    assert int(cache.seen) == 31 and int(cache.pending) == want[-1]  # the last is not fed yet
    assert cache.positions(1, 1).tolist() == list(range(31))
    assert 0 <= cache.nbytes() - 31 * 3 * 2 * 2 * 8 * 8 <= 16 * 3 * 2 * 2 * 8 * 8  # a step of room
    stopped = generate(model, prompt, 12, chunk=chunk, stop_ids=(want[24], 999))
    assert stopped == want[20:want.index(want[24], 20)]
    until = generate(model, prompt, 12, chunk=chunk, until=lambda row, ids: len(ids) == 3)
    assert until == want[20:23]


def policies():
    """Settings that exercise each policy on a model of 3 layers and 2 KV heads."""
    heads = torch.tensor([[True, False], [False, False], [True, True]])
    torch.manual_seed(0)
    scorer = evict.LocretScorer(small().config, 8).double()
    yield "full", {}
    yield "streaming", dict(sink=2, window=6)
    yield "streaming", dict(sink=2, budget=9)
    yield "heads", dict(heads=heads, sink=3, window=5)
    yield "heads", dict(heads=heads, sink=3, window=5, full="snapkv", keep=0.5, obs_window=4)
    for policy in ("snapkv", "pyramidkv", "knorm", "random"):
        recent = dict(recent=2) if policy == "random" else dict(obs_window=5)
        yield policy, dict(budget=8, **recent)
        yield policy, dict(keep=0.4, sink=2, **recent)
        yield policy, dict(budget=8, decode_every=3, decode_budget=10, **recent)
    for policy in ("h2o", "tova"):
        yield policy, dict(budget=9)
        yield policy, dict(keep=0.5, decode_every=4, sink=1)
        yield policy, dict(budget=9, patch=True, obs_window=5)
    yield "locret", dict(budget=9, scorer=scorer, obs_window=5)
    yield "snapkv", dict(budget=7, patch=True, obs_window=5, pool="max", kernel=3)
    yield "pyramidkv", dict(keep=0.3, patch=True, obs_window=5)


class Recording(KVCache):
    """Notes what each row could see, from the positions held when it ran: a mask (n_layer,
    n_kv_head, N, N) by sequence, which its log stands for."""

    def note(self, layer, b, seen, n):
        mask = self.masks[id(self.logs[b])]
        for h in range(self.config.n_kv_head):
            rows = slice(seen, seen + n)
            mask[layer, h, rows, self.positions(layer, h, b)] = True
            mask[layer, h, rows, rows] |= torch.ones(n, n).tril().bool()

    def attend_chunk(self, layer, q, k, v):
        self.note(layer, 0, self.now["seen"], self.now["n_new"])
        return super().attend_chunk(layer, q, k, v)

    def attend(self, layer, q, k, v):
        for b, seen in enumerate(self.seen.tolist()):
            self.note(layer, b, seen, 1)
        return super().attend(layer, q, k, v)


def recording(cache, n):
    cache.__class__ = Recording
    shape = cache.config.n_layer, cache.config.n_kv_head, n, n
    cache.masks = {id(log): torch.zeros(shape, dtype=torch.bool) for log in cache.logs}
    return cache


def fed(model, cache, texts, n_prompt, chunk):
    """Feed texts (B, N), the first n_prompt tokens as prompts: states (B, N - n_prompt + 1, C)."""
    n_new, live = texts.shape[1] - n_prompt, torch.ones(len(texts), dtype=torch.bool)
    with torch.no_grad():
        cache.reserve([n_prompt] * len(texts), n_new + 1, chunk)
        first = [cache.prefill(model, text[:n_prompt], chunk, b) for b, text in enumerate(texts)]
        states = [torch.stack(first)]
        for i in range(n_new):
            states.append(cache.step(model, texts[:, n_prompt + i], live))
    return torch.stack(states, 1)


@pytest.mark.parametrize("chunk", [1, 7, 16, None])
def test_every_policy_equals_the_masked_model(chunk):
    """The oracle for all of them: what was visible, replayed as a mask on the dense model. The
    footprint is that mask's area. Streaming counts the distance to its sink in entries."""
    model, texts = small(), random_tokens(100).view(2, 50)
    for policy, settings in policies():
        cache = recording(evict.make_cache(model, policy, batch=2, **settings), 50)
        logits = fed(model, cache, texts, 40, chunk) @ model.head.T
        for b, text in enumerate(texts):
            mask, shift = cache.masks[id(cache.logs[b])], None
            if policy == "streaming":
                shift = streaming_shift(cache, chunk or 40)
            want = slow_llama(model, text, mask, shift)[39:]
            close(logits[b], want, 3e-6)
            area = Fraction(int(mask.sum()), 6 * 50 * 51 // 2)
            assert cache.footprint(b) == area, (policy, settings)
            assert int(cache.seen[b]) == 50 and sum(t for t, _ in cache.log(b)) == 50
            for layer, h in itertools.product(range(3), range(2)):
                positions = cache.positions(layer, h, b).tolist()
                assert positions == sorted(set(positions)) and len(positions) <= 50


def streaming_shift(cache, chunk, n=50, n_prompt=40):
    """(N, N): a row sees the sink nearer by the tokens dropped before its chunk or step began."""
    rule, _ = cache.groups[0][0]
    steps = [*range(0, n_prompt, chunk), *range(n_prompt, n)]
    shift = torch.zeros(n, n)
    for a, b in zip(steps, [*steps[1:], n]):
        shift[a:b, :rule.sink] = max(0, a - (rule.sink + rule.window - 1))
    return shift


@pytest.mark.parametrize("chunk", [None, 8])
def test_rows_of_a_cache_equal_caches_of_their_own(chunk):
    """Prompts of any lengths, answers that stop: texts, entries, footprints; a second turn; forks;
    a cache that was used before."""
    model = small()
    prompts = [random_tokens(n, n) for n in (20, 7, 33, 90)]
    for policy, settings in policies():
        if policy == "random":  # draws from one generator
            continue
        make = functools.partial(evict.make_cache, model, policy, chunk=chunk, **settings)
        caches, many = [make() for _ in prompts], make(batch=4)
        for turn in range(2):
            alone = [generate(model, p, 12, c, stop_ids=(3,)) for p, c in zip(prompts, caches)]
            assert generate(model, prompts, 12, many, stop_ids=(3,)) == alone, (policy, turn)
            for b, cache in enumerate(caches):
                assert many.footprint(b) == cache.footprint() and many.peak(b) == cache.peak()
                assert torch.equal(many.positions(1, 1, b), cache.positions(1, 1)), policy
        forks = caches[0].fork(2)
        want = generate(model, prompts[1], 5, caches[0])
        assert generate(model, [prompts[1], prompts[1]], 5, forks) == [want, want], policy
        many.reset()
        again = [generate(model, p, 12, make(), stop_ids=(3,)) for p in prompts]
        assert generate(model, prompts, 12, many, stop_ids=(3,)) == again, policy


def test_a_second_turn_continues_the_text():
    """The last answer's unfed token comes first; a stop id is never fed."""
    model, first, second = small(), random_tokens(20), random_tokens(9, 1)
    cache = KVCache(model)
    said = generate(model, first, 6, cache)
    whole = torch.cat((first, torch.tensor(said), second))
    assert generate(model, second, 5, cache) == generate(model, whole, 5)
    cache = KVCache(model)
    assert generate(model, first, 6, cache, stop_ids=(said[3],)) == said[:3]
    whole = torch.cat((first, torch.tensor(said[:3]), second))
    assert generate(model, second, 5, cache) == generate(model, whole, 5)


def test_sampling():
    """The nucleus keeps the token that crosses it; a row's draws depend on its own seed alone."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, -1)
    rngs = [torch.Generator().manual_seed(i) for i in range(4000)]
    drawn = model_file.pick(logits, 1.0, 0.7, rngs).bincount(minlength=4) / 4000
    close(drawn, torch.tensor([0.625, 0.375, 0, 0]), 0.03)
    assert model_file.pick(logits[:1], 1.0, 1e-9, rngs) == model_file.pick(logits[:1], 0, 1, rngs)
    model, prompts = small(), [random_tokens(9), random_tokens(9, 1)]
    both = generate(model, prompts, 8, temperature=1.0, seed=5)
    assert both[1] == generate(model, prompts[1], 8, temperature=1.0, seed=6)
    model.head.data[7] = math.nan  # a diverged run: one line, not the place of the NaN
    for temperature in (0, 1.0):
        with pytest.raises(ValueError, match="not finite"):
            generate(model, prompts, 8, temperature=temperature)


def test_tokens_outside_the_vocabulary():
    for bad, words in (([3, 61], "outside the vocabulary of 61"), ([-1, 3], "outside"),
                       ([], "no tokens")):
        with pytest.raises(ValueError, match=words):
            generate(small(), bad, 1)
    with pytest.raises(ValueError, match="no tokens"):
        generate(small(), torch.zeros(0), 1)
    with pytest.raises(ValueError, match="2 prompts for a cache of 1"):
        generate(small(), [[1], [2]], 1, KVCache(small()))


# --- loading and saving --------------------------------------------------------------------------

HF = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 61,
      "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
      "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
      "tie_word_embeddings": False, "hidden_act": "silu"}


def test_config_spellings():
    assert LlamaConfig.from_hf(HF) == small().config
    assert LlamaConfig.from_hf(small().config.to_hf()) == small().config
    assert LlamaConfig.from_hf(HF | {"head_dim": None}).head_dim == 4
    older = LlamaConfig.from_hf(HF | {"rope_theta": 5e5, "rope_scaling": SCALING})
    newer = HF | {"rope_parameters": SCALING | {"rope_theta": 5e5}}
    assert LlamaConfig.from_hf(newer) == older and older.rope_scaling["factor"] == 8.0
    assert LlamaConfig.from_hf(HF | {"rope_scaling": {"type": "default"}}).rope_scaling is None
    sliding = {"model_type": "qwen2", "architectures": None, "use_sliding_window": True,
               "sliding_window": 9, "max_window_layers": 1}
    assert LlamaConfig.from_hf(HF | sliding | {"max_window_layers": 0}).window == 9
    assert LlamaConfig.from_hf(HF | sliding | {"max_window_layers": 3}).window == 0
    for change, words in (
            (sliding, "layers of full_attention, sliding_attention"),
            ({"architectures": ["MistralForCausalLM"]}, "architecture"),
            ({"model_type": "gemma"}, "gemma"),
            ({"attention_bias": True}, "attention_bias"), ({"hidden_act": "gelu"}, "hidden_act"),
            ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
            ({"num_key_value_heads": 4}, "4 KV heads"), ({"head_dim": 7}, "heads of 7"),
            ({"quantization_config": {"bits": 4}}, "quantization")):
        with pytest.raises(ValueError, match=words):
            LlamaConfig.from_hf(HF | change)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", [5_000_000_000, 4000])
def test_save_and_load(tmp_path, dtype, shard):
    model = small(tie_embeddings=shard == 4000).to(dtype)
    save_model(small(), tmp_path)  # an earlier save of another size must not shine through
    paths = save_model(model, tmp_path, max_shard_bytes=shard)
    files = {p.name for p in tmp_path.glob("*.safetensors")}
    if shard == 4000:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert files == {*index["weight_map"].values()} and len(files) > 1
    assert {os.path.basename(path) for path in paths} == files | {"config.json"}
    again = load_model(tmp_path, dtype=dtype)
    assert again.config == model.config
    for (name, a), (name_, b) in zip(model.named_parameters(), again.named_parameters()):
        assert name == name_ and torch.equal(a, b) and b.dtype == dtype
    assert not list(tmp_path.glob("*.part"))
    before = model_file.fingerprint(tmp_path)
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    save_model(model, tmp_path, max_shard_bytes=shard)
    assert model_file.fingerprint(tmp_path) != before


def test_a_smaller_save_leaves_nothing_of_a_larger_one(tmp_path):
    save_model(small(), tmp_path, max_shard_bytes=4000)
    save_model(small(), tmp_path)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert list(model_file.weight_files(tmp_path)) == [str(tmp_path / "model.safetensors")]


def test_loading_names_what_is_wrong(tmp_path):
    model, file, config = small(), tmp_path / "model.safetensors", tmp_path / "config.json"
    with pytest.raises(OSError, match="nowhere"):
        load_model(tmp_path / "nowhere")
    save_model(model, tmp_path)
    good, about = file.read_bytes(), config.read_text()
    tensors = dict(model.named_parameters())
    norm, tied = "model.norm.weight", json.dumps(HF | {"tie_word_embeddings": True})
    cases = [  # tensors that change, config.json, what the error says
        ({norm: None}, about, "Missing.*model.norm.weight"),
        ({"model.extra": torch.ones(2)}, about, "Unexpected.*model.extra"),
        ({norm: torch.ones(25)}, about, "size mismatch for model.norm.weight"),
        ({}, tied, "ties embeddings, but lm_head.weight differs"),
        ({}, '{"vocab_size": 61,', "config.json: not valid JSON"), ({}, "[]", "config.json"),
        ({}, json.dumps({k: v for k, v in HF.items() if k != "hidden_size"}), "'hidden_size'")]
    for change, text, words in cases:
        changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        save_file(changed, file)
        config.write_text(text)
        with pytest.raises(ValueError, match=words):
            load_model(tmp_path)
    config.write_text(about)
    for data in (good[:len(good) // 2], b"\xff" * 8 + good[8:], b""):
        file.write_bytes(data)
        with pytest.raises((SafetensorError, OSError)):
            load_model(tmp_path)
    file.unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        load_model(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    assert model_file.weight_files(tmp_path) == {str(tmp_path / "secret.safetensors"): ["a"]}


def test_the_index_says_which_shard_has_a_tensor(tmp_path):
    """A stale copy in another shard, or a tensor that no one asks for, changes nothing."""
    model = small()
    files = save_model(model, tmp_path, max_shard_bytes=4000)[1:]
    first, last = (dict(load_file(file)) for file in (files[0], files[-1]))
    stale = {name: x + 1 for name, x in first.items()} | {"extra": torch.ones(3)}
    save_file(last | stale, files[-1])
    for (name, a), b in zip(model.named_parameters(),
                            load_model(tmp_path, dtype=None).parameters()):
        assert torch.equal(a, b), name


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    """Writing fails after some bytes: the error is passed on, the old file stands."""
    save_model(small(), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(tensors, path, metadata=None):
        open(path, "wb").write(b"half")
        raise SafetensorError("No space left on device (os error 28)")
    monkeypatch.setattr(model_file, "save_file", full)
    with pytest.raises(SafetensorError, match="No space left"):
        save_model(small(seed=1), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# --- tokenizer -----------------------------------------------------------------------------------

def made_tokenizer(folder, digits=True, seed=0):
    """A byte-level BPE tokenizer.json learned on a little text: ids in random order, a few special
    tokens among them. Returns its letters for bytes, its merges and its ids."""
    text = 3 * (" the cat sat on the mat. 1 2 33 444 don't we'll  and\n\n  then\tsome   more 12345 "
                "théâtre")
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    letters = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
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
    split = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if digits:
        one_by_one = {"type": "Digits", "individual_digits": True}
        split = {"type": "Sequence", "pretokenizers": [one_by_one, split]}
    model = {"type": "BPE", "vocab": dict(zip(tokens, ids)), "merges": [*map(" ".join, merges)]}
    added = [{"id": ids[i], "content": tokens[i]} for i in (0, 1)]
    (folder / "tokenizer.json").write_text(json.dumps(
        {"added_tokens": added, "normalizer": None, "pre_tokenizer": split, "model": model}))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"},
         "chat_template": model_file.CHAT_FORMATS["chatml"]}))
    return letters, merges, dict(zip(tokens, ids))


def slow_merge(symbols, merges):
    """BPE by its definition: the earliest rule that applies anywhere, everywhere it applies, from
    left to right."""
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
    """Digits are cut out first, the GPT-2 pattern then sees what lies between; here with Python's
    re on ASCII letters."""
    letters, merges, ids = made_tokenizer(tmp_path, digits)
    tokenizer = load_tokenizer(tmp_path)
    pattern = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z\u00e0-\u00ff]+| ?[0-9]+"
                         r"| ?[^\sA-Za-z0-9\u00e0-\u00ff]+|\s+(?!\S)|\s+")
    random = np.random.default_rng(0)
    alphabet = list("the catson m.12345'dlwer\n\t  ") + ["é", "â", "'ll", "the", "  ", "\n\n"]
    for _ in range(300):
        text = "".join(random.choice(alphabet, int(random.integers(0, 30))))
        parts = re.split("([0-9])", text) if digits else [text]
        want = [ids[s] for part in parts for piece in pattern.findall(part)
                for s in slow_merge([letters[b] for b in piece.encode()], merges)]
        assert tokenizer.encode(text) == want, repr(text)
        assert tokenizer.decode(want) == text
    assert tokenizer.encode("a<|im_end|>b")[1] == tokenizer.eos_ids[0] == ids["<|im_end|>"]
    assert tokenizer.bos_id == ids["<|im_start|>"] and not tokenizer.add_bos
    mark = tokenizer.special["<|im_end|>"]  # scored text has no marks, but added words
    tokenizer.marks = {mark}
    assert tokenizer.decode([ids["a"], mark], marks=False) == "a"
    assert (tokenizer.chat([{"role": "user", "content": "hi"}])
            == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode([99999]) == "\ufffd"


@pytest.mark.parametrize("kind", ["never", "first", "always", "normalizer"])
def test_character_bpe_by_its_definition(tmp_path, kind):
    """Llama 2's and Mistral's: a space is a letter, what has no token falls back to bytes; where a
    text begins with a space, by the pre_tokenizer's three schemes or by the normalizer."""
    learned = "the\u2581cat\u2581\u2581sat\u2581on\u2581the\u2581mat\u2581th\u00e9\u00e2tre"
    merges, words = [], [list("\u2581" + word) for word in learned.split("\u2581") * 2]
    for _ in range(25):
        pairs = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)) if pairs else ("t", "s"))
        words = [slow_merge(word, merges[-1:]) for word in words]
    merges = list(dict.fromkeys([*merges, ("\u2581", "\u2581")]))
    tokens = [f"<0x{b:02X}>" for b in range(256)] + sorted({*learned, *map("".join, merges)})
    special, vocab = {"</s>": 0}, {token: i + 1 for i, token in enumerate(tokens)}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    spec = {"added_tokens": [{"id": 0, "content": "</s>", "special": True}],
            "model": {"type": "BPE", "byte_fallback": True, "vocab": special | vocab,
                      "merges": [" ".join(m) for m in merges]},
            "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": kind, "split": False}}
    if kind == "normalizer":
        prepend = {"type": "Prepend", "prepend": "\u2581"}
        spec |= {"normalizer": {"type": "Sequence", "normalizers": [prepend, replace]},
                 "pre_tokenizer": None, "decoder": {"type": "Sequence", "decoders": [
                     {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer, rng = load_tokenizer(tmp_path), random.Random(0)
    assert not tokenizer.bpe.cut.fullmatch("a\u2581b")  # cut before spaces: no token crosses one
    parts = ["the", "cat", " ", "  ", "t", "h\u00e9", "\u4e2d", "</s>", "x"]
    for _ in range(300):
        text = "".join(rng.choices(parts, k=9))
        want = []
        for i, part in enumerate(re.split("(</s>)", text)):
            if i % 2:
                want.append(0)
                continue
            part = part.replace(" ", "\u2581")
            begins = kind in ("always", "normalizer") or kind == "first" and i == 0
            if part and begins and (kind == "normalizer" or not part.startswith("\u2581")):
                part = "\u2581" + part
            letters = [[c] if c in vocab else [f"<0x{b:02X}>" for b in c.encode()] for c in part]
            want += [vocab[s] for s in slow_merge(itertools.chain(*letters), merges)]
        assert tokenizer.encode(text) == want, text
        if kind == "never":
            assert tokenizer.decode(want) == text
    assert tokenizer.decode(tokenizer.encode("cat x")).strip() == "cat x"
    on = tokenizer.encode("cat", begins=False)
    assert tokenizer.decode([0, *on]) == "</s>cat"
    for change in ({"normalizer": {"type": "NFC"}}, {"pre_tokenizer": {"type": "Digits"}},
                   {"model": spec["model"] | {"vocab": {"a": 1}}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec | change))
        with pytest.raises(ValueError, match="tokenizer.json"):
            load_tokenizer(tmp_path)


def test_llama3_tokenizer_model(tmp_path):
    tokens = [bytes([b]) for b in range(256)] + [b"he", b"ll", b"hell", b"hello", b" w"]
    lines = [base64.b64encode(t) + f" {i}\n".encode() for i, t in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    assert load_tokenizer(tmp_path).template is None
    tokenizer = load_tokenizer(tmp_path, "llama3")
    assert tokenizer.encode("hello w1234") == [259, 260, *b"1234"]
    assert tokenizer.decode([259, 260]) == "hello w"
    assert len(tokenizer.special) == 256 and tokenizer.special["<|eot_id|>"] == len(tokens) + 9
    text = tokenizer.chat([{"role": "system", "content": " be brief "},
                           {"role": "user", "content": "hello"}])
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert tokenizer.encode(text)[:2] == [len(tokens), len(tokens) + 6]
    assert tokenizer.eos_ids == (len(tokens) + 9,)
    with pytest.raises(ValueError, match="special tokens of --chat chatml"):
        load_tokenizer(tmp_path, "chatml")
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00")
    with pytest.raises(ValueError, match="tokenizer.model"):
        load_tokenizer(tmp_path)


# Templates after those of known families, what transformers 5.2 writes for ASKED with each (with
# date_string="26 Jul 2024"), and the special token behind an answer
ASKED = [{"role": "user", "content": " hi "}]
CHATML_TURNS = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
                "{{ '<|im_end|>' + '\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TEMPLATES = {
    "Hermes: BOS, then ChatML": (
        "{{ bos_token }}" + CHATML_TURNS,
        "<s><|im_start|>user\n hi <|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "SmolLM2, Qwen2: a system turn by default": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nIt\\'s you.<|im_end|>\n' }}"
        "{% endif %}" + CHATML_TURNS,
        "<|im_start|>system\nIt's you.<|im_end|>\n<|im_start|>user\n hi <|im_end|>\n"
        "<|im_start|>assistant\n", "<|im_end|>"),
    "Llama 3.2: the date, trimmed turns": (
        "{{- bos_token }}\n{%- if not date_string is defined %}\n"
        "    {%- if strftime_now is defined %}\n"
        "        {%- set date_string = strftime_now('%d %b %Y') %}\n    {%- else %}\n"
        "        {%- set date_string = '26 Jul 2024' %}\n    {%- endif %}\n{%- endif %}\n"
        "{{- 'system: Today Date: ' + date_string + '\n\n' }}\n{%- for m in messages %}\n"
        "    {{- m['role'] + ':' + m['content'] | trim + eos_token }}\n{%- endfor %}",
        "<s>system: Today Date: 26 Jul 2024\n\nuser:hi</s>", "</s>"),
    "Tulu: no special words but EOS": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "<|user|>\n hi \n<|assistant|>\n", "</s>"),
    "loop controls and JSON": (
        "{% for m in messages %}\n{% if m.role == 'system' %}{% continue %}{% endif %}\n"
        "{{ m | tojson }}\n{% endfor %}", '{"role": "user", "content": " hi "}\n', None)}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_written_by_the_folders_template(name, tmp_path):
    """Equal to the hub's; the end of an answer is a stop id, whatever else the files name."""
    template, want, end = TEMPLATES[name]
    special = {"<s>": 256, "</s>": 257, "<|im_start|>": 258, "<|im_end|>": 259}
    vocab, names = {bytes([b]): b for b in range(256)}, {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = model_file.Tokenizer(model_file.ByteBPE(vocab, [], "(?s:.)"), special, 256, (257,),
                                     False, template, names)
    assert tokenizer.chat(ASKED) == want and tokenizer.end_of_turn == end
    assert tokenizer.eos_ids == ((257, 259) if end == "<|im_end|>" else (257,))
    answered = [*ASKED, {"role": "assistant", "content": "ok"}]
    if end is None:
        with pytest.raises(ValueError, match="cannot be trained on"):
            train.encode_chat(answered, tokenizer)
    else:
        tokens, targets = train.encode_chat([*answered, *answered], tokenizer)
        assert tokenizer.decode(targets[targets != -100]).count("ok" + end) == 2
        whole = tokenizer.chat([*answered, *answered], answering=False)
        assert whole.startswith(tokenizer.decode(tokens))


def test_templates_that_refuse_or_reach_out():
    letters = byte_tokenizer().bpe
    for template, words in (
            ("{{ raise_exception('users first') }}", "users first"), ("{% if %}", "chat template"),
            ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"), ("{{ 1 + 'a' }}", "int")):
        with pytest.raises(ValueError, match=words):
            model_file.Tokenizer(letters, template=template).chat(ASKED)
    with pytest.raises(ValueError, match="--chat chatml"):
        model_file.Tokenizer(letters).chat(ASKED)


def test_chat_templates_and_odd_tokenizers(tmp_path):
    letters, merges, ids = made_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"unk_token": {"content": "<|im_start|>"}}')
    (tmp_path / "chat_template.jinja").write_text("{{ unk_token }} now")
    assert load_tokenizer(tmp_path).chat(ASKED) == "<|im_start|> now"
    assert load_tokenizer(tmp_path, "none").template is None
    assert load_tokenizer(tmp_path, "chatml").chat(ASKED).endswith("<|im_start|>assistant\n")
    (tmp_path / "chat_template.jinja").unlink()
    named = [{"name": "rag", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path).chat(ASKED) == "b"
    good = json.loads((tmp_path / "tokenizer.json").read_text())
    split = lambda pattern: {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "use_regex": False}]}}
    for change in ({"normalizer": {"type": "NFC"}}, split(5), split("(")):
        (tmp_path / "tokenizer.json").write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match="tokenizer.json"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(good | split("a+")))
    tokenizer = load_tokenizer(tmp_path)  # what the pattern leaves out is not lost
    assert tokenizer.decode(tokenizer.encode("xaay")) == "xaay"
    added = [{"id": 901, "content": "aa"}, {"id": 902, "content": "aaa"},
             {"id": 903, "content": "ab"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(good | {"added_tokens": added}))
    tokenizer = load_tokenizer(tmp_path)  # as the hub: the first place, there the longest
    want = [902, 901, ids["b"], 903, 902, 902, ids["a"]]
    assert tokenizer.encode("aaaaabab" + "aaaaaaa") == want
    with pytest.raises(ValueError, match="[Rr]egex"):
        tokenizer.encode(" " * 10 ** 6)


def test_byte_tokenizer_and_broken_files(tmp_path):
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 10]
    assert tokenizer.decode([0xC3, 0xA9]) == "é" and tokenizer.bos_id == 256
    (tmp_path / "config.json").write_text('{"vocab_size": 256}')
    assert load_tokenizer(tmp_path).bos_id is None
    odd = {"model": {"type": "BPE", "vocab": {}, "merges": []},
           "pre_tokenizer": {"type": "Metaspace"}}
    for text, words in (('{"model": {"type": "WordPiece"}}', "BPE over bytes"), ("{", "JSON"),
                        ("{}", "tokenizer.json"), (json.dumps(odd), "Metaspace")):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            load_tokenizer(tmp_path)


# --- PruLong and DuoAttention --------------------------------------------------------------------

def config_of(method, **changes):
    """A method's flags with the defaults that train.py fills in."""
    args = train.Config(method="x", data="text", model="m")
    config = method.Config(**changes)
    return train.fill(config, method.defaults(args, config))


def test_hard_concrete_gates():
    """Monte Carlo against the closed forms; the gradient lives only where 0 < z < 1."""
    rng = torch.Generator().manual_seed(0)
    for value, zero, mean in ((-4.0, 0.917, 0.024), (0.0, 0.168, 0.504), (4.0, 0.0037, 0.977)):
        log_alpha = torch.full((200_000,), value, requires_grad=True)
        u = torch.rand(200_000, generator=rng).clamp(1e-6, 1 - 1e-6)
        z = prulong.draw_gates(log_alpha, u)
        assert 0 <= z.min() and z.max() <= 1
        assert abs((z == 0).float().mean() - zero) < 0.005 and abs(z.mean() - mean) < 0.005
        is_open = prulong.probability_open(torch.tensor(value))
        assert abs((z > 0).float().mean() - is_open) < 0.005
        one = torch.sigmoid(torch.tensor(value - 1.5986))
        assert abs((z == 1).float().mean() - one) < 0.005
        grad, = torch.autograd.grad(z.sum(), log_alpha)
        assert torch.equal(grad != 0, (z > 0) & (z < 1))


def test_gates_at_their_ends():
    """z = 1 is the plain model, z = 0 the streaming one, any z is plain when the window sees all; a
    hard mask equals the same gates mixed; gates per document touch their document only."""
    rng = torch.Generator().manual_seed(0)
    for n_head, n_kv_head in ((3, 3), (4, 2), (6, 2)):
        model, cu, shape = small(n_head=n_head, n_kv_head=n_kv_head), [0, 26, 40], (3, n_kv_head)
        tokens = torch.randint(61, (40,), generator=rng)
        run = functools.partial(model, tokens)
        mask, none = torch.rand(shape, generator=rng) < 0.5, torch.zeros(shape)
        with torch.no_grad():
            plain = run(causal(cu))
            close(run(prulong.gated(torch.ones(shape), cu, 2, 5)), plain, 1e-12)
            any_z = torch.rand(shape, generator=rng)
            close(run(prulong.gated(any_z, cu, 2, 26)), plain, 1e-12)
            hard = run(prulong.by_mask(mask, cu, 2, 5))
            close(run(prulong.gated(mask.double(), cu, 2, 5)), hard, 1e-12)
            streaming = run(prulong.by_mask(none > 0, cu, 2, 5))
            close(run(prulong.gated(none, cu, 2, 5)), streaming, 1e-12)
            each = run(prulong.gated(torch.stack((mask, ~mask)).double(), cu, 2, 5))
            close(each[:26], hard[:26], 1e-12)
            close(each[26:], run(prulong.by_mask(~mask, cu, 2, 5))[26:], 1e-12)


def test_a_gate_moves_exactly_its_query_heads():
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(30, h, 8, generator=rng) for h in (6, 2, 2))
    z = torch.full((1, 2), 0.5)
    before = prulong.gated(z, [0, 30], 1, 4)(0, q, k, v)
    z[0, 1] = 0.7
    moved = (prulong.gated(z, [0, 30], 1, 4)(0, q, k, v) - before).abs().amax((0, 2)) > 0
    assert moved.tolist() == [False] * 3 + [True] * 3


def test_streaming_is_what_a_trimmed_cache_sees():
    """Token by token with a cache that keeps sink + window - 1 entries in streaming heads: the
    logits of the mask at full length, and the footprint that the report computes."""
    model, sink, window, tokens = small(), 3, 6, random_tokens(40)
    mask = torch.tensor([[True, False], [False, False], [False, True]])
    cache = evict.make_cache(model, "heads", heads=mask, sink=sink, window=window, chunk=1)
    states = fed(model, cache, tokens[None], 20, 1)[0]
    want = model(tokens, prulong.by_mask(mask, [0, 40], sink, window))[19:]
    close(states @ model.head.T, want, 1e-12)
    held = [len(cache.positions(i, h)) for i in range(3) for h in range(2)]
    assert held == [40, 8, 8, 8, 8, 40]
    assert cache.positions(0, 1).tolist() == [0, 1, 2, *range(35, 40)]
    footprint = prulong.streaming_footprint(mask, 40, sink, window)
    assert abs(footprint - float(cache.footprint())) < 1e-12


def test_lagrangian():
    """Descended by the gates, ascended by the multipliers: of 12 heads with known benefits the best
    three survive at the target."""
    model = small(n_layer=3, n_head=4, n_kv_head=4)
    config = config_of(prulong.PruLong, mask_lr=0.1, mask_weight_decay=0.01)
    method = prulong.PruLong(model, config, 0)
    args = train.Config(lr=1.0, weight_decay=0.0)
    optimizer = method.optimizer(method.param_groups(model, args), args)
    method.penalty(torch.tensor(-0.3)).backward()
    close(method.multipliers.grad, torch.tensor([-0.3, 0.09]), 1e-6)
    optimizer.step()
    assert method.multipliers[0] < 0 < method.multipliers[1]
    benefit, rng = torch.tensor([3.0, 2.0, 1.0] + [0.02] * 9).view(3, 4), torch.Generator()
    for step in range(400):
        u = torch.rand(8, 3, 4, generator=rng).clamp(1e-6, 1 - 1e-6)
        z = prulong.draw_gates(method.log_alpha, u).mean(0)
        gap = 1 - prulong.probability_open(method.log_alpha).mean() - method.target(step, 400)
        optimizer.zero_grad()
        (method.penalty(gap) - (benefit * z).sum()).backward()
        optimizer.step()
    assert method.mask().flatten().nonzero()[:, 0].tolist() == [0, 1, 2]
    assert abs(1 - prulong.probability_open(method.log_alpha).mean() - 0.75) < 0.08


def test_target_schedule_and_presets():
    config = config_of(prulong.PruLong, target_sparsity=0.7, start_sparsity=0.1)
    method = prulong.PruLong(small(), config)
    at = [method.target(step, 50) for step in range(50)]
    assert at[0] == 0.1 and abs(at[20] - 0.4) < 1e-12 and at[40:] == [0.7] * 10 and at == sorted(at)
    official = config_of(prulong.PruLong, preset="official", mask_lr=0.5)
    assert (official.mask_lr, official.mask_init, official.per_document) == (0.5, 4.0, False)
    assert official.sampled_sparsity and official.mask_weight_decay == 0.1


def test_discretise_and_mask_files(tmp_path):
    scores = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    mask = model_file.discretise(scores, 0.7)
    assert mask.sum() == 76 and scores[mask].min() >= scores[~mask].max()  # int(256 * .3)
    ties = model_file.discretise(torch.zeros(9, 10), 0.9)
    assert ties.flatten().nonzero()[:, 0].tolist() == list(range(9))
    assert model_file.discretise(scores, 0).all() and not model_file.discretise(scores, 1).any()
    path = tmp_path / "masks.tsv"
    prulong.save_heads(path, mask)
    first = path.read_text().splitlines()[0].split("\t")
    assert first == [f"{float(x):.1f}" for x in mask[0]]
    assert torch.equal(prulong.load_heads(path), mask)
    assert torch.equal(prulong.load_heads(path, 0.7), mask)
    with pytest.raises(ValueError, match="finished mask"):
        prulong.load_heads(path, 0.3)
    duo = scores.double().clamp(-0.2, 1)
    np.savetxt(path, duo.numpy(), delimiter="\t")  # DuoAttention's files: a little outside [0, 1]
    assert torch.equal(prulong.load_heads(path), duo > 0.5)
    half = prulong.load_heads(path, 0.5)
    assert half.sum() == 128 and duo[half].min() >= duo[~half].clamp(0, 1).max()
    for text in ("1.0\t0.0\n1.0\n", "1.0\tx\n", "1.0\tnan\n", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match="masks.tsv"), warnings.catch_warnings(action="ignore"):
            prulong.load_heads(path)


def test_duo_loss():
    """Open gates cost only the price, as does a head whose streaming branch sees all; gates stay in
    [0, 1]."""
    model, batch = small(), collate([random_tokens(20)])
    cases = itertools.product((False, True), ((19, True), (5, False)))
    for teacher_branch, (window, only_price) in cases:
        config = prulong.Duo.Config(sink=1, window=window, teacher_branch=teacher_branch)
        duo = prulong.Duo(model, config, 0)
        duo.a.data += 0.3
        loss, metrics = duo.loss(model, batch, 0, 1)
        assert metrics["distance"] == 0 and abs(loss.item() - 0.05) < 1e-7 and duo.a.max() == 1
        duo.a.data -= 0.25
        grad, = torch.autograd.grad(duo.loss(model, batch, 0, 1)[0], duo.a)
        price = torch.full((3, 2), 0.05 / 6)
        assert torch.allclose(grad, price, atol=1e-9) == only_price


def test_passkeys():
    """Every question's answer was told in the text before; targets are the whole tail."""
    tokenizer, rng = model_file.byte_tokenizer(), np.random.default_rng(0)
    haystack = np.frombuffer(b"x" * 4000, dtype=np.uint8)
    tokens, targets = prulong.passkeys(tokenizer, haystack, 3000, rng, needles=3, words=4)
    text = tokenizer.decode(tokens.tolist())
    assert len(tokens) == len(targets) == 3000
    body, tail = text[:text.index("\nBased")], text[text.index("\nBased"):]
    for ordinal in ("first", "second", "third"):
        asked = f"{ordinal} passkey to the vault\\?\nPasskey: ([a-z ]+)"
        key = re.search(asked, tail)[1]
        assert len(key.split()) == 4 and f"{ordinal} passkey to the vault: {key}\n" in body
    assert tokenizer.decode(targets[targets != -100].tolist()) == tail and targets[-1] == -100
    with pytest.raises(ValueError, match="need --seq_len"):
        prulong.passkeys(tokenizer, haystack, 500, rng, needles=10)


def test_weights_learn_under_frozen_masks(tmp_path):
    path, mask, model = tmp_path / "heads.tsv", torch.eye(3, 2) > 0, small()
    prulong.save_heads(path, mask)
    config = config_of(prulong.PruLong, train="weights", heads=str(path), sink=1, window=4)
    method, batch = prulong.PruLong(model, config), collate([torch.arange(20)])
    loss, _ = method.loss(model, batch, 0, 1)
    attend = prulong.by_mask(mask, batch.cu_seqlens, 1, 4)
    close(loss, model.loss(batch.tokens, batch.targets, attend), 1e-12)
    loss.backward()
    assert method.log_alpha.grad is None and model.model.norm.weight.grad is not None
    groups = method.param_groups(model, train.Config(lr=1.0, weight_decay=0.1))
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    save_model(model, tmp_path / "out", max_shard_bytes=4000)  # its config.json must stay
    assert super(prulong.PruLong, method).save(model, tmp_path / "out")[-1].endswith("pattern.json")
    assert model_file.load_pattern(tmp_path / "out/heads.tsv") == {"sink": 1, "window": 4}
    assert load_model(tmp_path / "out").config == model.config
    with pytest.raises(ValueError, match="--heads"):
        prulong.PruLong(model, config_of(prulong.PruLong, train="weights"))
    with pytest.raises(ValueError, match="not a mask of the model"):
        prulong.PruLong(small(n_layer=2), config)


def test_gate_gradients_by_finite_differences():
    model, batch = small(), collate([torch.arange(1, 19), torch.arange(19, 31)])
    data = mock.Mock(seed=5, batch=lambda i: batch)
    for per_document, sampled in itertools.product((False, True), (False, True)):
        config = config_of(prulong.PruLong, sink=1, window=4, per_document=per_document,
                           sampled_sparsity=sampled, mask_init=0.3)
        method = prulong.PruLong(model, config, 0).double()
        method.multipliers.data = torch.tensor([0.7, 1.3]).double()
        noisy = method.batch(data, 5, 3, 10)
        grad, = torch.autograd.grad(method.loss(model, noisy, 3, 10)[0], method.log_alpha)
        for i in range(6):
            ends = []
            for h in (1e-5, -1e-5):
                with torch.no_grad():
                    method.log_alpha.view(-1)[i] += h
                    ends.append(method.loss(model, noisy, 3, 10)[0])
                    method.log_alpha.view(-1)[i] -= h
            assert abs((ends[0] - ends[1]) / 2e-5 - grad.view(-1)[i]) < 1e-4


def test_the_map_of_heads(tmp_path):
    """A cell for each head of each mask, full ones darker."""
    prulong.draw_map(tmp_path / "a.svg", {"<a>": torch.eye(3, 2) > 0, "b": torch.rand(3, 2)})
    picture = xml.etree.ElementTree.parse(tmp_path / "a.svg")
    cells = picture.findall(".//{http://www.w3.org/2000/svg}rect")[1:]
    shades = [int(re.search(r"\d+", cell.get("fill"))[0]) for cell in cells]
    assert len(cells) == 12
    assert [shade < 128 for shade in shades[:6]] == [True, False, False, True, False, False]
    texts = [e.text for e in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"<a>", "b", "0", "2"} <= set(texts)


# --- fact stream, data ---------------------------------------------------------------------------

@pytest.mark.parametrize("queries_last", [False, True])
def test_fact_stream(queries_last):
    """Every query's answer was told before it; filler follows its tables; facts and queries, pure
    chance, weigh nothing."""
    facts = eval_tasks.fact_stream(np.random.default_rng(0), 4, 128, 10, 12, queries_last)
    tokens, targets = facts.batch.tokens.tolist(), facts.batch.targets.tolist()
    assert len(facts.query) == 48
    for query, fact in zip(facts.query.tolist(), facts.fact.tolist()):
        start = query // 128 * 128
        key, value = tokens[query] - eval_tasks.QUERY, tokens[query + 1] - eval_tasks.ANSWER
        assert start < fact < query < start + 128 and tokens[start] == eval_tasks.BOS
        assert targets[query] == tokens[query + 1]
        assert tokens[fact] - eval_tasks.FACT == key * eval_tasks.N_VALUE + value
        assert not queries_last or query >= start + 128 - 24
    tables = eval_tasks.filler_tables()
    filler = [t for t in tokens[:128] if eval_tasks.FILLER <= t < eval_tasks.FACT]
    for a, b, c in zip(filler, filler[1:], filler[2:]):
        assert c - 1 in tables[0][b - 1] or c - 1 in tables[1][a - 1]
    weights, targets = facts.batch.weights, facts.batch.targets
    chance = (targets >= eval_tasks.FACT) & (targets < eval_tasks.ANSWER)
    assert not weights[chance].any() and (weights[targets >= eval_tasks.ANSWER] == 1).all()
    with pytest.raises(ValueError, match="do not fit"):
        eval_tasks.fact_stream(np.random.default_rng(0), 1, 20, 10, 12)


def answering(seed):
    """An untrained tiny model that always names some answer: right about once in 8."""
    model = Llama(dataclasses.replace(eval_tasks.TINY, tie_embeddings=False)).init_weights(seed)
    with torch.no_grad():
        model.lm_head.weight[:eval_tasks.ANSWER] = 0
    return model


def test_facts_as_data():
    """Batch i is a function of (seed, i); passkeys ask at the end; recall counts by hand."""
    data = eval_tasks.FactData(128, 3, seed=4, n_eval=2)
    assert torch.equal(data.batch(7).tokens, data.batch(7).tokens)
    assert not torch.equal(data.batch(7).tokens, data.batch(8).tokens)
    passkeys = data.passkeys(0, 5)
    assert (passkeys.targets >= eval_tasks.ANSWER).sum() == 15
    assert (passkeys.targets != -100).view(3, 128)[:, :-11].sum() == 0
    model = answering(0)
    facts = eval_tasks.fact_stream(np.random.default_rng((4, 2 ** 31)), 2,
                                   *eval_tasks.CURRICULUM[-1][:3])
    best = model(facts.batch.tokens, causal(facts.batch.cu_seqlens)).argmax(1)
    right = (best[facts.query] == facts.batch.tokens[facts.query + 1]).float()
    far = facts.query - facts.fact >= 40
    assert 0 < right[far].mean() != right.mean() > 0
    assert data.scores(model)["recall"] == pytest.approx(right.mean().item())
    far_recall = data.scores(model, beyond=40)["far recall"]
    assert far_recall == pytest.approx(right[far].mean().item())


def text_data(seq_len=16, n_seq=3, held=2):
    rng = np.random.default_rng(0)
    docs = [100 * i + np.arange(int(rng.integers(1, 40))) for i in range(30)]
    sources = {"a": (3.0, docs[:20]), "b": (1.0, docs[20:])}
    return docs, train.TextData(sources, None, seq_len, n_seq, held, seed=0)


def test_packs_cover_the_data_once_and_keep_documents_apart():
    docs, data = text_data()
    for source, part in ((0, docs[:20]), (1, docs[20:])):
        n = len(data.tokens[source]) // 16
        pieces = [piece for i in range(n) for piece in data.pack(source, i)]
        assert all(len(p) > 1 and (np.diff(p) == 1).all() for p in pieces)  # within documents
        seen = np.sort(np.concatenate(pieces))
        assert len(np.unique(seen)) == len(seen) and set(seen) <= set(np.concatenate(part))
        assert n * 16 - len(seen) <= 2 * n  # single tokens, at either end of a pack
    batch = data.batch(5)
    assert torch.equal(batch.tokens, data.batch(5).tokens)
    ends = set((batch.cu_seqlens[1:] - 1).tolist())
    for i, (token, target) in enumerate(zip(batch.tokens.tolist(), batch.targets.tolist())):
        assert target == (-100 if i in ends else token + 1)


def test_epochs_are_shuffled_and_sources_keep_their_share():
    """Each epoch of a source meets every pack once, in another order; of every 1000 sequences each
    source gives its share."""
    order = train.Packs([(3.0, 7), (1.0, 40)], seed=2)
    picked = [order.pick(j) for j in range(2000)]
    for start in (0, 1000):
        assert sum(source == 0 for source, _ in picked[start:start + 1000]) == 750
    for source, n in ((0, 7), (1, 40)):
        mine = [index for s, index in picked if s == source]
        epochs = [mine[a:a + n] for a in range(0, len(mine) - n, n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs) and epochs[0] != epochs[1]


def test_reading_text(tmp_path, capsys):
    for name, data in {"test/x.txt": b"two", ".hidden/x.txt": b"three", "c.bin": b"\xff\xfe\0",
                       "a.jsonl": b'{"text": "one", "url": "u"}\n{"text": "more"}\n'}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    read = lambda spec: [row["text"] for row in train.Rows(str(spec))]
    assert read(tmp_path) == ["one", "more", "two"]
    bad, tokenizer = tmp_path / "bad.jsonl", model_file.byte_tokenizer()
    own = lambda spec: train.own_data(filled(data=str(spec), seq_len=8), tokenizer,
                                      train.Rows(str(spec)))
    for line in ("{", "[]", '{"text": 5}', '{"txt": 1}'):
        bad.write_text('{"text": "x"}\n' * 6 + line + "\n")
        with pytest.raises(ValueError, match="line 7"):
            own(bad)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no documents"):
        own(tmp_path / "empty")
    with pytest.raises(ValueError, match="too few"):
        own(tmp_path / "test")
    for spec in ("a=0:x", "a=y:x", "a=1", "a=1:x,b"):
        with pytest.raises(ValueError):
            train.Rows(spec)
    with pytest.raises(OSError, match="nowhere"):
        own("a=1:nowhere")
    bad.write_bytes(b'\xef\xbb\xbf{"text": "x\xe2\x80\xa8y"}\r\n\n  \n{"text": "z"}\n\n')
    assert read(bad) == ["x\u2028y", "z"]  # BOM, CRLF, blank lines, a line separator within text
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path / "bom.txt") == ["hello"]
    bad.write_bytes(b'{"text": "x"}\n{"text": "caf\xe9"}\n')
    for path, words in ((bad, "bad.jsonl, line 2"), (tmp_path / "c.bin", "c.bin: not UTF-8")):
        with pytest.raises(ValueError, match=words):
            own(path)
    assert read(tmp_path) == ["one", "more", "x", "hello", "two"]  # what can be read
    told = capsys.readouterr().err.splitlines()[-1]
    assert "2 files passed over" in told and "bad.jsonl, line 2" in told
    (tmp_path / "spaces.txt").write_text("a" + " " * 10 ** 6)
    made_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="spaces.txt: .*egex"):
        train.own_data(filled(data="x"), load_tokenizer(tmp_path),
                       train.Rows(str(tmp_path / "spaces.txt")))


def write_mds(folder, columns, samples):
    """An MDS folder by its definition, of two shards. columns: {name: (encoding, fixed size or
    None)}; samples: lists of bytes in their order."""
    shards, half = [], len(samples) // 2
    for k, part in enumerate((samples[:half], samples[half:])):
        open_ = [i for i, (_, size) in enumerate(columns.values()) if size is None]
        sizes = lambda values: np.array([len(values[i]) for i in open_], "<u4").tobytes()
        bodies = [sizes(values) + b"".join(values) for values in part]
        header = json.dumps(list(columns)).encode()
        start = 4 * (len(part) + 2) + len(header)
        ends = start + np.cumsum([0, *map(len, bodies)])
        data = np.array([len(part), *ends], "<u4").tobytes() + header + b"".join(bodies)
        (folder / f"shard.{k}.mds").write_bytes(data)
        shards.append({"raw_data": {"basename": f"shard.{k}.mds", "bytes": len(data)},
                       "samples": len(part), "column_names": list(columns),
                       "column_encodings": [kind for kind, _ in columns.values()],
                       "column_sizes": [size for _, size in columns.values()]})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))


def test_mds_folders(tmp_path):
    """Columns of every kind; packs of ids taken apart, as they are or for another tokenizer; a mask
    says what is learned; what is broken or compressed is named."""
    array = lambda x: bytes([33, 1 << 2, len(x)]) + np.array(x, "<i4").tobytes()  # int32, 1 axis
    spans = lambda x: bytes([32, 2 << 2, len(x), 2]) + np.array(x, "<u4").tobytes()
    texts = [f"document {i} is here" for i in range(20)]
    samples = []
    for a, b in zip(texts[::2], texts[1::2]):
        ids, cut = list((a + b).encode()), len(a)
        mask = bytes([8, 1 << 2, len(ids)]) + bytes(i >= 3 for i in range(len(ids)))  # uint8
        samples.append([array(ids), spans([[0, cut], [cut, len(ids)]]), mask, b"u",
                        np.array([7], "<i8").tobytes(), np.array([1, 2], "<u2").tobytes()])
    columns = {"input_ids": ("ndarray", None), "indices": ("ndarray", None),
               "mask": ("ndarray", None), "url": ("str", None), "n": ("int", 8),
               "pair": ("ndarray:uint16:2", 4)}
    write_mds(tmp_path, columns, samples)
    rows, tokenizer = list(train.read_mds(str(tmp_path))), byte_tokenizer()
    assert len(rows) == 10 and rows[7]["url"] == "u" and rows[7]["n"] == 7
    assert rows[7]["pair"].tolist() == [1, 2] and "shard.1.mds, sample 2" in rows[7]["where"]
    source = train.Rows(str(tmp_path), tokenizer)
    assert [row["text"] for row in source] == texts
    docs = train.read_text(source, tokenizer)["data"][1]
    first = docs[0].tolist()
    assert first[0] == 256 and first[-1] == 257 and first[1:4] == [~c for c in b"doc"]
    batch = train.learned_pack(docs[:2])
    assert tokenizer.decode(batch.tokens[1:len(first) - 1]) == texts[0]
    want = list(texts[0].encode())[3:] + [257]
    assert batch.targets[:len(first)].tolist() == [-100] * 3 + want + [-100]
    long = train.read_text(source, tokenizer, "data=21")["data"][1]
    assert [len(doc) for doc in long] == [len(doc) for doc in docs if len(doc) >= 21]
    with pytest.raises(ValueError, match="NAME=N of data"):
        train.read_text(source, tokenizer, "books=5")
    with pytest.raises(ValueError, match="--data_tokenizer"):
        next(iter(train.Rows(str(tmp_path))))
    (tmp_path / "m").mkdir()
    made_tokenizer(tmp_path / "m")
    other = load_tokenizer(tmp_path / "m")
    with pytest.raises(ValueError, match="mask of tokens needs"):
        train.read_text(source, other)
    plain = {name: kind for name, kind in columns.items() if name != "mask"}
    write_mds(tmp_path, plain, [[x for i, x in enumerate(s) if i != 2] for s in samples])
    found = train.read_text(source, other)["data"][1]
    assert found[3].tolist() == other.document(texts[3]) + list(other.eos_ids[:1])
    shard = tmp_path / "shard.1.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="shard.1.mds has .* bytes, its index says"):
        list(train.read_mds(str(tmp_path)))
    shard.rename(tmp_path / "shard.1.mds.zstd")
    with pytest.raises(ValueError, match="zstd -d"):
        list(train.read_mds(str(tmp_path)))
    write_rows(tmp_path / "ids.jsonl", [{"input_ids": [97, 98], "indices": [[0, 2], [2, 2]]}])
    two = train.read_text(train.Rows(str(tmp_path / "ids.jsonl"), tokenizer), tokenizer)["data"][1]
    assert [doc.tolist() for doc in two] == [[256, 97, 98, 257], [256, 257]]
    (tmp_path / "a.json").write_text('{"data": []}')
    with pytest.raises(ValueError, match="a.json: expected a list of objects"):
        list(train.read_path(str(tmp_path / "a.json")))
    (tmp_path / "index.json").write_text('{"shards": [{}]}')
    for path, words in ((tmp_path, "not an MDS index"), ("x.parquet", "parquet")):
        with pytest.raises(ValueError, match=words):
            list(train.read_path(str(path)))


def filled(**flags):
    """train.py's flags of a run without command line."""
    args = train.Config(**flags)
    known = train.plain(args) | dict(checkpointing=False)
    return train.fill(args, known)


def test_documents_begin_and_end(tmp_path):
    """BOS where the tokenizer has one, EOS behind every document."""
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": "c"}\n')
    rows = train.Rows(str(tmp_path / "a.jsonl"))
    (weight, docs), = train.read_text(rows, model_file.byte_tokenizer()).values()
    assert [doc.tolist() for doc in docs] == [[256, 97, 98, 257], [256, 99, 257]]


CHAT = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "so"}, {"role": "assistant", "content": "no 3"}]


def test_conversations_train_the_assistants_words_only(tmp_path, monkeypatch, capsys):
    """Targets by hand, packs of whole conversations, a run that learns, and what a wrong line is
    told."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    made_tokenizer(tmp_path / "m")
    tokenizer = load_tokenizer("m")
    save_model(Llama(dataclasses.replace(eval_tasks.TINY, vocab_size=400)).init_weights(0), "m")
    tokens, targets = train.encode_chat(CHAT, tokenizer)
    whole = tokenizer.chat(CHAT[:3]) + "no 3<|im_end|>"
    assert tokenizer.decode(tokens) == whole and tokens.tolist() == tokenizer.encode(whole)
    assert tokenizer.decode(targets[targets != -100]) == "ok<|im_end|>no 3<|im_end|>"
    learned = targets[:-1] != -100
    assert torch.equal(targets[:-1][learned], tokens[1:][learned]) and targets[-1] == -100
    rows = [{"messages": CHAT} if i % 2 else {"question": f"{i} + 1 = ?", "answer": f"#### {i + 1}"}
            for i in range(12)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    chats = [train.as_messages(row) for row in train.Rows("c.jsonl")]
    data = train.ChatData(chats, tokenizer, 200, 2, 4, 0)
    assert len(data.held_out) == 4 and sum(map(len, data.packs)) == 8
    assert all(sum(len(ids) for ids, _ in pack) <= 200 for pack in data.packs)
    args = "--model m --data c.jsonl --seq_len 200 --steps 8 --eval_seqs 4 --lr 0.01".split()
    for method in (["sft"], ["vlorp", "--granularity", "8"]):
        train.main(["--method", *method, *args])
        rows = table_of(capsys.readouterr().out)
        assert rows[method[0]]["held-out loss"] < rows["before"]["held-out loss"]
    (tmp_path / "m/tokenizer_config.json").unlink()  # a base model: no template
    (tmp_path / "m/generation_config.json").write_text('{"eos_token_id": 5}')
    with pytest.raises(ValueError, match="--chat chatml"):
        train.main(["--method", "sft", *args, "--out_dir", "base"])
    train.main(["--method", "sft", *args, "--out_dir", "base", "--chat", "chatml"])
    capsys.readouterr()
    tuned = load_tokenizer("base")
    assert tuned.chat(CHAT) == tokenizer.chat(CHAT)
    assert tuned.eos_ids == (5, tuned.special["<|im_end|>"])
    long = train.as_messages({"question": "a" * 999, "answer": "b"})  # left out and counted
    fewer = train.ChatData([long, *chats, long], tokenizer, 200, 2, 4, 0)
    assert "2 of 14 conversations are longer than --seq_len 200" in capsys.readouterr().err
    assert len(fewer.held_out) == 4 and sum(map(len, fewer.packs)) == 8
    with pytest.raises(ValueError, match="at most --seq_len 200 tokens: too few"):
        train.ChatData([long] * 20, tokenizer, 200, 2, 4, 0)
    for line, words in (("{}", "line 13"), ('{"messages": []}', "line 13"),
                        ('{"messages": [{"role": "user"}]}', "line 13")):
        (tmp_path / "c.jsonl").write_text("\n".join([*lines, line]))
        with pytest.raises(ValueError, match=words):
            train.main(["--method", "sft", *args, "--out_dir", "x", "--chat", "chatml"])
    assert not os.path.exists("x")


def test_conversation_files_of_other_kinds(tmp_path):
    """GSM8K, CommonsenseQA and LLM-Adapters' rows; what their answers say in the end."""
    stem = {"stem": "What flies?", "choices": [{"label": "A", "text": "stone"},
                                               {"label": "B", "text": "bird"}]}
    rows = [{"question": "How many?", "answer": "2 + 1 = <<2+1=3>>3\n#### 1,203"},
            {"question": stem, "answerKey": "B"},
            {"instruction": "True or false?", "input": "", "output": "the correct answer is true"}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    chats = [train.as_messages(row) for row in train.Rows(str(tmp_path / "x.json"))]
    ends = [eval_tasks.final_answer(chat[-1]["content"]) for chat in chats]
    assert ends == ["1203", "b", "true"]
    assert chats[1][0]["content"] == "What flies?\nA: stone\nB: bird"
    assert eval_tasks.final_answer("so #### $-4.50") == "-9/2"
    assert eval_tasks.final_answer("I do not know, 12") is None
    with pytest.raises(ValueError, match="neither text nor"):
        train.as_messages({"question": {}, "answerKey": "A"})
    problems = [train.as_messages(row) for row in train.Rows("problems")]
    assert len({chat[0]["content"] for chat in problems}) == len(problems) > 3500
    for question, answer in ((chat[0]["content"], chat[1]["content"]) for chat in problems):
        *steps, end = answer.split("\n")
        for step in steps:
            sum_, _, result = step.partition(" = ")
            assert eval(sum_, {}) == int(result)
        numbers = re.findall(r"\d+", steps[0].partition(" = ")[0])
        assert end == f"#### {result}" and all(n in question for n in numbers)


# --- training ------------------------------------------------------------------------------------

class Fixed:
    """Data whose micro-batch i is given."""
    vocab_size, seed, seq_len, n_seq, tokenizer = 61, 0, 16, 1, None

    def __init__(self, *batches):
        self.batches = batches

    def batch(self, i):
        return self.batches[i % len(self.batches)]

    def scores(self, model, attend=causal, beyond=0):
        return {"score": 0.5}


def fitted(tmp_path, model, data, method=Method, **flags):
    """The log's steps of a run of train.fit."""
    args = filled(**{"steps": 1, "lr": 1e-2, **flags})
    tmp_path.mkdir(exist_ok=True)
    method = method(model, method.Config(), 0)
    train.fit(method, model, data, args, str(tmp_path), dict(name="x", flags={}, weights=None))
    rows = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    return [row for row in rows if row["event"] == "step"]


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    """Targets weigh the same however unevenly they fall on micro-batches, as their weights say."""
    docs = [torch.arange(5), torch.arange(9, 25), torch.arange(3), torch.arange(40, 47)]
    for weighted in (False, True):
        batches = [collate(docs), collate(docs[:3]), collate(docs[3:])]
        if weighted:
            batches = [b._replace(weights=b.tokens / 50.0) for b in batches]
        name = f"weighted {weighted}"
        one, = fitted(tmp_path / name, small(), Fixed(batches[0]))
        two, = fitted(tmp_path / f"{name} 2", small(), Fixed(*batches[1:]), grad_accum=2)
        for key in ("loss", "grad_norm"):
            assert abs(one[key] - two[key]) < 1e-6 * one[key]


def test_learning_rates_decay_and_clipping(tmp_path):
    """The schedules by their definitions; matrices decay and norms do not; what is applied has norm
    <= clip."""
    at = lambda step: model_file.warmup_cosine(step, 100, 0.1, 0.2)
    assert [at(i) for i in (0, 4, 9)] == [0.1, 0.5, 1.0] and at(10) == 1.0
    assert abs(at(55) - 0.6) < 1e-12 and 0.2 < at(99) < 0.201
    duo = prulong.Duo(small(), prulong.Duo.Config(), 0)
    scales = [round(duo.lr_scale(i, 50, None), 6) for i in (0, 4, 9, 25, 40, 45, 49)]
    assert scales == [0.1, 0.5, 1, 1, 1, 0.5, 0.1]
    model = small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fitted(tmp_path, model, Fixed(collate([torch.arange(30)])), lr=0.5, clip=1e-9, warmup=0.0)
    for name, p in model.named_parameters():  # gradients below Adam's eps: what moves is the decay
        close(p, before[name] * (1 - 0.5 * 0.1 * (p.dim() > 1)), 0.06)
        assert (p.dim() > 1) == bool((p.abs().mean() < 0.97 * before[name].abs().mean()))


class Breaks(Method):
    """Its loss is not a number in step 3."""

    def loss(self, model, batch, step, steps):
        loss, metrics = super().loss(model, batch, step, steps)
        return loss * (math.nan if step == 3 else 1), metrics


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """Before it is stepped on; the message names the step and the last good checkpoint."""
    model = small()
    with pytest.raises(SystemExit, match="at step 3; the last good checkpoint is step 2"):
        fitted(tmp_path, model, Fixed(collate([torch.arange(30)])), Breaks, steps=6, save_every=2)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert train.read_about(tmp_path / "checkpoint.safetensors")["step"] == 2
    with pytest.raises(ValueError, match="nothing to predict"):
        fitted(tmp_path / "b", model, Fixed(collate([torch.arange(1)])))


def test_bfloat16_products():
    """Under autocast the loss stays float32 and close; a frozen bfloat16 model learns its gates in
    float32."""
    model = Llama(eval_tasks.TINY).init_weights(0)
    data = eval_tasks.FactData(64, 4)
    batch = data.batch(0)._replace(weights=None)
    losses = []
    for low in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            losses.append(model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens))
    assert losses[1].dtype == torch.float32 and 0 < abs(losses[1] - losses[0]) < 0.02
    method = prulong.PruLong(model.bfloat16(), config_of(prulong.PruLong), 0)
    method.loss(model, method.batch(data, 0, 0, 10), 0, 10)[0].backward()
    grad = method.log_alpha.grad
    assert grad.dtype == torch.float32 and grad.abs().sum() > 0


class Near(Method):
    """A method from elsewhere: layer i sees 4 + i tokens."""

    def attend(self, cu_seqlens):
        cu = torch.as_tensor(cu_seqlens).tolist()
        return lambda layer, q, k, v: attention(q, k, v, cu, cu, window=4 + layer)


def test_main_takes_methods_from_elsewhere(tmp_path, monkeypatch, capsys):
    """Its attention is used in training and in the score; it stands beside another method."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "tiny_start", answering)
    flags = "--method near --beside lm --data facts --seq_len 64 --batch 2 --steps 2 --lr 0"
    train.main([*flags.split(), "--eval_seqs", "2", "--eval_every", "1"],
               train.METHODS | {"near": Near})
    rows = [json.loads(line) for line in open("out/near/log.jsonl")]
    model, data = answering(0), eval_tasks.FactData(64, 2, 0, 2)

    def slow(cu):
        cu = torch.as_tensor(cu).tolist()
        return lambda i, q, k, v: slow_attention(q, k, v, cu, cu, window=4 + i).to(q.dtype)
    batch = data.batch(0)
    near, plain = (model.loss(batch.tokens, batch.targets, attend(batch.cu_seqlens),
                              weights=batch.weights).item() for attend in (slow, causal))
    assert rows[1]["loss"] == pytest.approx(near, abs=1e-6)
    assert rows[1]["loss"] != pytest.approx(plain, abs=1e-6)
    table = table_of(capsys.readouterr().out)
    want = data.scores(model, slow)["recall"]
    assert table["near"]["recall"] == pytest.approx(want, abs=1e-4)
    assert table["lm"] == table["before"] and [r["event"] for r in rows].count("eval") == 2
    with pytest.raises(ValueError, match="unknown method 'near': one of lm, "):
        train.main(["--method", "near"])


def test_text_end_to_end(tmp_path, monkeypatch, capsys):
    """A byte-level model on real text: masks by PruLong and Duo, then weights under the learned
    masks. Files agree with the report; what a run reads is never overwritten."""
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(eval_tasks.TINY, vocab_size=258)
    save_model(Llama(config).init_weights(0), "bytes")
    rows = [json.dumps({"text": f"{i} " * 300}) for i in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    common = ("--model bytes --data text.jsonl --steps 3 --eval_seqs 2 --n_random 2 --sink 2 "
              "--window 8 --target_sparsity 0.5").split()

    def go(*args):
        train.main([*args])
        return table_of(capsys.readouterr().out)
    duo = "--method duo --seq_len 700 --needles 2 --words 3".split()
    for args in (["--method", "prulong", "--seq_len", "64"], duo):
        table, out = go(*args, *common), f"out/{args[1]}"
        mask = prulong.load_heads(f"{out}/heads.tsv")
        assert mask.sum() == 6 == table[args[1]]["full heads"] and len(table) == 5
        assert torch.equal(mask, prulong.load_heads(f"{out}/scores.tsv", 0.5))
        assert "held-out loss" in table["full cache"]
        assert not os.path.exists(f"{out}/model.safetensors")
    tuned = ["--method", "prulong", *common, "--seq_len", "64", "--train", "weights", "--lr",
             "1e-3", "--heads", "out/prulong/heads.tsv"]
    go(*tuned, "--out_dir", "out/tuned", "--target_sparsity", "0.9")
    learned = prulong.load_heads("out/prulong/heads.tsv")
    assert torch.equal(prulong.load_heads("out/tuned/heads.tsv"), learned)
    before, after = load_model("bytes"), load_model("out/tuned")
    assert all(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    for out in ("bytes", "out/prulong", "out", "."):
        with pytest.raises(ValueError, match="holds what the run reads"):
            train.main([*tuned, "--overwrite", "--out_dir", out])
    (tmp_path / "broken.tsv").write_text("x")
    with pytest.raises(ValueError, match="broken.tsv"):
        train.main([*tuned, "--overwrite", "--out_dir", "out/tuned", "--heads", "broken.tsv"])
    assert torch.equal(prulong.load_heads("out/tuned/heads.tsv"), learned)  # still there
    short = ["--method", "duo", *common, "--seq_len", "700", "--out_dir", "none"]
    with pytest.raises(ValueError, match="10 passkeys of 32 words need --seq_len"):
        train.main(short)


def test_stages_are_two_runs(tmp_path, monkeypatch, capsys):
    """The second goes on with the first's weights and optimizer, at a new RoPE base and length."""
    monkeypatch.chdir(tmp_path)
    common = "--method lm --batch 2 --steps 4 --eval_seqs 2 --data facts".split()
    train.main([*common, "--seq_len", "64", "--out_dir", "a"])
    train.main([*common, "--seq_len", "128", "--out_dir", "b", "--model", "a", "--optimizer", "a",
                "--rope_base", "1e5", "--lr", "1e-3"])
    assert json.load(open("b/config.json"))["rope_theta"] == 1e5
    assert "both apply" not in capsys.readouterr().err
    config = json.load(open("a/config.json")) | {"rope_scaling": SCALING}
    json.dump(config, open("a/config.json", "w"))
    scaled = ["--model", "a", "--rope_base", "1e5"]
    train.build_model(model_file.Method, *train.read_flags([*common, *scaled], train.METHODS))
    assert "llama3) both apply" in capsys.readouterr().err
    steps = [load_file(f"{name}/checkpoint.safetensors")["optimizer.0.step"] for name in "ab"]
    assert steps == [4, 8]
    with pytest.raises(ValueError, match="reads"):
        train.main([*common, "--out_dir", "a", "--overwrite", "--optimizer", "a"])


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(Llama(eval_tasks.TINY).init_weights(0), "out/tiny-seed0")
    args = "--steps 2 --batch 2 --eval_seqs 2 --out_dir run --method".split()
    train.main([*args, "prulong", "--n_random", "1"])
    (tmp_path / "run" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        train.main([*args, "lm"])
    train.main([*args, "lm", "--overwrite"])
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "mine.txt", "log.jsonl", "checkpoint.safetensors", "config.json", "model.safetensors",
        "duo"} and not list((tmp_path / "run" / "duo").iterdir())
    train.main([*args, "lm", "--out_dir", "out", "--overwrite"])  # another's folder: nothing lost
    assert (tmp_path / "out" / "tiny-seed0" / "config.json").exists()


BAD_FLAGS = [  # what would be silently wrong, and one of each kind that argparse refuses
    ("--method magic", "magic"), ("--stepz 3", "--stepz"), ("--steps 0", "--steps"),
    ("--dtype float16", "float16"), ("--window 8", "--window"), ("--data nowhere", "nowhere"),
    ("--method prulong --target_sparsity 1.5", "--target_sparsity"),
    ("--method prulong --window 500", "must be below --seq_len 128"),
    ("--resume --out_dir none", "no run"), ("--out_dir full", "not empty"),
    ("--resume --overwrite", "exclude"), ("--device foo", "foo"), ("--seq_len 32", "--seq_len"),
    ("--method prulong --train weights", "--heads"), ("--seq_parallel 2", "--seq_parallel 2"),
    ("--model small --data facts", "outside the model's vocabulary of 61"),
    ("--beside magic", "magic"), ("--beside lm:lr", "--lr")]


def test_bad_command_lines_end_in_one_line_and_exit_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkdir("full"), open("full/x", "w").close()
    save_model(small(), "small")
    save_model(Llama(eval_tasks.TINY).init_weights(0), "out/tiny-seed0")
    for args, words in BAD_FLAGS:
        monkeypatch.setattr(sys, "argv", ["train.py", *args.split()])
        with pytest.raises(SystemExit) as stop:
            model_file.run(train.main)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error, (args, error)
        assert error.count("\n") == 1, (args, error)
    assert os.listdir("out") == ["tiny-seed0"]


# --- scripts in processes of their own -----------------------------------------------------------

ARGS = "--method lm --data facts --seq_len 64 --batch 2 --save_every 3 --eval_seqs 1".split()
server = multiprocessing.get_context("forkserver")  # has imported all there is: forks in no time
server.set_forkserver_preload(["test_all"])


def run_script(args, cwd, env):
    """What `python ARGS` does, in a process of its own; its output goes to files of the folder."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        path = os.path.join(cwd, f"{name}{env.get('RANK', '')}.txt")
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(cwd)
    os.environ.update(env)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    sys.argv = [os.path.join(HERE, args[0]), *map(str, args[1:])]
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
        raise TimeoutError((cwd / "stderr.txt").read_text()[-3000:])
    texts = [(cwd / f"{name}.txt").read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(child, child.exitcode, *texts)


def script(*args, cwd):
    return ended(start(*args, cwd=cwd), cwd)


RESUMED = {"lm": ARGS, "prulong": [*ARGS, "--method", "prulong", "--train", "masks+weights", "--lr",
                                   "1e-3"]}


def until_step(log, step, child):
    """Wait until a log has a step, or its run has ended."""
    while child.is_alive() and not (log.exists() and f'"step": {step}' in log.read_text()):
        time.sleep(0.005)


@pytest.mark.parametrize("method", RESUMED)
def test_killed_run_resumes_in_the_same_bits(tmp_path, method):
    """A killed run, resumed, ends with the checkpoint, model, log and table of a whole one; other
    flags are refused."""
    args = ["train.py", *RESUMED[method], "--steps", "12"]
    if method == "prulong":
        save_model(Llama(eval_tasks.TINY).init_weights(0), tmp_path / "out" / "tiny-seed0")
    whole = script(*args, "--out_dir", "whole", cwd=tmp_path)
    child = start(*args, "--out_dir", "killed", cwd=tmp_path)
    log = tmp_path / "killed" / "log.jsonl"
    until_step(log, 4, child)
    child.kill()
    child.join()
    assert '"event": "end"' not in log.read_text(), "killed too late to show anything"
    resume = [*args, "--out_dir", "killed", "--resume"]
    other = script(*resume, "--lr", "5e-3", cwd=tmp_path)
    assert other.returncode == 2 and "lr was" in other.stderr
    again = script(*resume, cwd=tmp_path)
    assert again.returncode == 0 and whole.returncode == 0, again.stderr + whole.stderr
    for name in ("checkpoint.safetensors", "model.safetensors"):
        a, b = (load_file(tmp_path / out / name) for out in ("whole", "killed"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert [row["step"] for row in logged(log, "step")] == list(range(12))
    ends = [logged(tmp_path / out / "log.jsonl", "end")[-1]["rows"] for out in ("whole", "killed")]
    assert ends[0] == ends[1]


def test_ctrl_c_says_where_resume_goes_on(tmp_path):
    args = ["train.py", *ARGS, "--steps", "400", "--out_dir", "cut"]
    log = tmp_path / "cut" / "log.jsonl"
    child = start(*args, cwd=tmp_path)
    until_step(log, 5, child)
    os.kill(child.pid, signal.SIGINT)
    done = ended(child, tmp_path)
    saved = train.read_about(tmp_path / "cut" / "checkpoint.safetensors")["step"]
    assert done.returncode == 130 and f"--resume goes on from step {saved}" in done.stderr
    assert saved >= 3


def test_an_interrupt_just_after_a_checkpoint_names_that_checkpoint(tmp_path, monkeypatch, capsys):
    write = train.save_checkpoint

    def interrupted(*args):
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path, small(), Fixed(collate([torch.arange(30)])), steps=6, save_every=2)
    assert "goes on from step 2" in capsys.readouterr().err


def test_scripts_answer_help_and_end_broken_input_in_exit_2(tmp_path):
    for name in ("train.py", "model.py", "eval_tasks.py", "footprint.py", "evict.py", "meco.py",
                 "cepe.py"):
        done = script(name, "--help", cwd=tmp_path)
        assert done.returncode == 0 and "--" in done.stdout
        odd = script(name, "--nonsense", cwd=tmp_path)
        assert odd.returncode == 2 and odd.stderr.count("\n") == 1 and "nonsense" in odd.stderr
    broken = script("model.py", "--model", tmp_path, "--prompt", "x", cwd=tmp_path)
    assert broken.returncode == 2 and "config.json" in broken.stderr
    assert broken.stderr.count("\n") == 1
    said = script("attention_triton.py", cwd=tmp_path).stdout
    assert torch.cuda.is_available() or said.count("\n") == 1


def test_a_prompt_is_answered_under_a_policy(tmp_path):
    """model.py streams the text, and says tokens a second and the cache's megabytes."""
    save_model(small(vocab_size=258, eos_ids=(257,)).float(), tmp_path / "m")
    prulong.save_heads(tmp_path / "heads.tsv", torch.eye(3, 2) > 0)
    base = ["model.py", "--model", "m", "--prompt", "abc " * 40, "--max_new_tokens", "8"]
    sizes = []
    for more in ([], ["--policy", "snapkv", "--budget", "20"],
                 ["--heads", "heads.tsv", "--sink", "2", "--window", "9"]):
        done = script(*base, "--dtype", "float32", *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        sizes.append(float(re.search(r"\): ([\d.]+) MB", done.stdout)[1]))
        assert "answer: 8 at" in done.stdout
    assert sizes[1] < sizes[0] > sizes[2]


# --- several processes ---------------------------------------------------------------------------

TOGETHER = {  # flags, and whether sequences can be shared
    "prulong": ("--method prulong --train masks+weights --model tiny --data facts --seq_len 64 "
                "--batch 2 --lr 1e-3 --window 16 --n_random 1", True),
    "duo": ("--method duo --model tiny --data facts --seq_len 64 --batch 2 --window 16 --needles 3 "
            "--n_random 1", True),
    "ceped": ("--method ceped --decoder_steps 2 --batch 2 --lr 1e-3 --mlm 0.3 --duplicate 0.3 "
              "--mask_chunks 0.5", False),
    "vlorp": ("--method vlorp --data facts --seq_len 64 --batch 2 --granularity 4", True),
    "ptp": ("--method ptp --data stories.txt --seq_len 16 --batch 2", False),
    "screenshot": ("--method screenshot --data stories.txt --seq_len 16 --batch 2 --reading 0.5",
                   False)}


def connected(rank, size, port, cwd):
    os.chdir(cwd)
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def train_one(rank, size, port, cwd, name, out, *more):
    if size > 1:
        connected(rank, size, port, cwd)
    os.chdir(cwd)
    torch.set_num_threads(1)
    flags = TOGETHER.get(name, ("--method lm --data facts --seq_len 64 --batch 2",))[0]
    train.main([*flags.split(), "--grad_accum", "4", "--steps", "12", "--eval_seqs", "4",
                "--save_every", "6", "--out_dir", out, *more])


def launch(target, size, *args):
    """Exit codes of `size` processes that find each other and run target(rank, size, port, ...)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = [server.Process(target=target, args=(rank, size, port, *args))
                for rank in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
        child.kill()
    return [child.exitcode for child in children]


@pytest.mark.parametrize("name", TOGETHER)
def test_several_processes_train_as_one(tmp_path, name):
    """One, two, and two that share every sequence: losses equal within 1e-5, weights but for
    rounding (Adam makes of the last bit of a gradient near 0 a step of either sign)."""
    save_model(Llama(eval_tasks.TINY).init_weights(0), tmp_path / "tiny")
    (tmp_path / "stories.txt").write_text("A story that goes on. " * 200)
    runs = {"one": (1, []), "two": (2, [])}
    if TOGETHER[name][1]:
        runs["shared"] = 2, ["--seq_parallel", "2"]
    losses, tensors, tables = {}, {}, {}
    for out, (size, more) in runs.items():
        assert launch(train_one, size, str(tmp_path), name, out, *more) == [0] * size
        rows = [json.loads(line) for line in open(tmp_path / out / "log.jsonl")]
        losses[out] = [row["loss"] for row in rows if row["event"] == "step"]
        tables[out] = rows[-1]["rows"]
        tensors[out] = load_file(tmp_path / out / "checkpoint.safetensors")
    assert len(losses["one"]) == 12 and losses["one"][0] != losses["one"][-1]
    for out in list(runs)[1:]:
        assert losses[out] == pytest.approx(losses["one"], abs=1e-5)
        assert tensors[out].keys() == tensors["one"].keys()
        for key, tensor in tensors["one"].items():
            other = tensors[out][key]
            assert other.shape == tensor.shape and other.dtype == tensor.dtype
            if not key.startswith("optimizer"):
                gap = (other - tensor).abs().mean()
                assert gap <= 1e-5 * max(1.0, tensor.abs().mean()), (out, key)
        for file in (tmp_path / "one").glob("model.safetensors"):  # saved as it was learned
            a, b = load_file(file), load_file(tmp_path / out / file.name)
            assert a.keys() == b.keys()
            assert all((a[key] - b[key]).abs().mean() < 1e-5 for key in a)
        assert tables[out] == {row: pytest.approx(v, abs=1e-3) for row, v in tables["one"].items()}


def train_chats(rank, size, port, cwd):
    connected(rank, size, port, cwd)
    train.main("--method sft --model model --data chats.jsonl --seq_len 64 --batch 1 --steps 2 "
               "--grad_accum 2 --eval_every 1 --eval_seqs 2".split())


def test_chats_are_scored_while_processes_share_the_weights(tmp_path):
    """Then by their loss alone; answers are written before and after, by a whole model."""
    (tmp_path / "model").mkdir()
    made_tokenizer(tmp_path / "model")
    vocab_size = len(load_tokenizer(tmp_path / "model").bytes)
    save_model(small(vocab_size=vocab_size), tmp_path / "model")
    rows = [{"question": f"{i} and 1?", "answer": f"#### {i + 1}"} for i in range(40)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert launch(train_chats, 2, str(tmp_path)) == [0, 0]
    *_, done = evals = logged(tmp_path / "out/sft/log.jsonl", "eval")
    assert len(evals) == 2 and "held-out loss" in done and "right answers" not in done
    table = logged(tmp_path / "out/sft/log.jsonl", "end")[-1]["rows"]
    assert all("right answers" in row for row in table.values())


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """Two processes go on from one's checkpoint, one from two's, with the losses of a whole run."""
    assert launch(train_one, 1, str(tmp_path), "lm", "whole") == [0]
    want = [json.loads(line) for line in open(tmp_path / "whole" / "log.jsonl")]
    want = [row["loss"] for row in want if row["event"] == "step"]
    for size, other in ((1, 2), (2, 1)):
        out = f"{size}-{other}"
        broken = launch(stopped, size, str(tmp_path), out)
        assert broken == [7] * size
        assert launch(train_one, other, str(tmp_path), "lm", out, "--resume") == [0] * other
        rows = [json.loads(line) for line in open(tmp_path / out / "log.jsonl")]
        losses = [row["loss"] for row in rows if row["event"] == "step"]
        assert losses == pytest.approx(want, abs=1e-5)


def stopped(rank, size, port, cwd, out):
    """A run that ends in step 8, two steps behind its checkpoint."""
    scale = Method.lr_scale

    def ends(self, step, steps, args):
        if step == 8:
            os._exit(7)
        return scale(self, step, steps, args)
    with mock.patch.object(Method, "lr_scale", ends):
        train_one(rank, size, port, cwd, "lm", out)


def test_processes_that_do_not_divide_are_refused(monkeypatch):
    monkeypatch.setattr(train, "world_size", lambda: 8)
    with pytest.raises(ValueError, match="--seq_parallel 3 does not divide"):
        train.check_processes(filled(seq_parallel=3))
    with pytest.raises(ValueError, match="divisible by 4 processes, as 8 is"):
        train.check_processes(filled(seq_parallel=2, grad_accum=6))


def test_torchrun_prints_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               os.path.join(HERE, "train.py"), *ARGS, "--grad_accum", "2", "--steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count('"method": "lm"') == 1, done.stderr[-2000:]
# --- eviction ------------------------------------------------------------------------------------

def held(cache, b=0):
    return cache.visible()[:, b].tolist()


@pytest.mark.parametrize("n_head,n_kv_head", [(4, 4), (4, 2), (6, 2), (8, 1)])
def test_enough_budget_is_full_attention(n_head, n_kv_head):
    model, prompt = small(n_head=n_head, n_kv_head=n_kv_head), random_tokens(30)
    want = generate(model, prompt, 8)
    scorer = evict.LocretScorer(model.config, 8).double()
    special = {"full": {}, "streaming": dict(sink=0, window=99),
               "locret": dict(budget=99, scorer=scorer),
               "heads": dict(heads=torch.ones(3, n_kv_head), window=1)}
    for policy, rule in evict.RULES.items():
        settings = special.get(policy, dict(budget=99))
        for chunk, patch in itertools.product((None, 7), {False, "patch" in rule.takes}):
            more = dict(patch=True, obs_window=4) if patch and policy != "heads" else {}
            cache = evict.make_cache(model, policy, chunk=chunk, **settings, **more)
            assert generate(model, prompt, 8, cache) == want and cache.footprint() == 1, policy
    shares = evict.make_cache(model, "snapkv", keep=1.0, obs_window=4, chunk=11)
    assert generate(model, prompt, 8, shares) == want


def test_chunked_budgets_at_the_edges():
    """Chunks shorter than the window, budget 0, remainder 1, window longer than the prompt: exactly
    the budget is kept."""
    model, tokens = small(n_layer=1), random_tokens(33)
    cases = itertools.product(("snapkv", "knorm"), (1, 4, 5, 16, 32, 33, 100), (0, 1, 4, 6, 40),
                              (1, 4, 64))
    for policy, chunk, budget, obs_window in cases:
        for patch in {False, policy == "snapkv"}:
            cache = evict.make_cache(model, policy, budget=budget, chunk=chunk,
                                     obs_window=obs_window, patch=patch)
            generate(model, tokens, 1, cache)
            q, r = divmod(33, chunk)
            assert held(cache) == [[q * min(budget, chunk) + min(budget, r)] * 2]
    cache = evict.make_cache(model, "snapkv", keep=0.29, obs_window=2)
    generate(model, random_tokens(100), 1, cache)
    assert held(cache) == [[29] * 2]
    for policy, share, chunk in itertools.product(("snapkv", "pyramidkv", "knorm", "random"),
                                                  (0.04, 0.25), (2, 16, None)):
        cache = evict.make_cache(model, policy, keep=share, chunk=chunk, obs_window=1)
        generate(model, tokens, 1, cache)
        chunks = [min(chunk or 33, 33 - i) for i in range(0, 33, chunk or 33)]
        assert held(cache) == [[sum(max(1, int(share * n)) for n in chunks)] * 2]
        assert cache.positions(0, 1)[-1] == 32, policy  # the prompt's last token
    scorer = evict.LocretScorer(model.config, 8).double()
    for policy in ("h2o", "tova", "random", "locret"):
        more = dict(scorer=scorer) if policy == "locret" else {}
        cache = evict.make_cache(model, policy, budget=1, **more)
        generate(model, tokens, 1, cache)
        assert cache.positions(0, 1).tolist() == [32]
    cache = evict.make_cache(model, "snapkv", budget=5, obs_window=9)
    generate(model, tokens, 1, cache)
    assert cache.positions(0, 0).tolist() == list(range(28, 33))  # less than the window: the last


def made_step(q, keys, first=0, n_patch=0, start=0):
    """A Step of random entries: the last len(q) of keys are new."""
    n = keys.shape[1]
    positions = torch.arange(start, start + n)
    return model_file.Step(
        layer=0, n_layer=1, heads=slice(None), q=q, k=None, v=None, positions=positions[-len(q):],
        keys=keys, values=keys, key_positions=positions.expand(len(keys), -1),
        note=torch.zeros(keys.shape[:2]), n_new=len(q) - n_patch, n_patch=n_patch, first=first,
        seen=n - len(q), final=True, decoding=False, rng=None)


def weights_by_definition(q, keys):
    """(heads, G, R, n): the last R entries' queries, causal."""
    n_rows, n_kv, g, d = q.shape
    n = keys.shape[1]
    out = torch.zeros(n_kv, g, n_rows, n)
    for h, i, r in itertools.product(range(n_kv), range(g), range(n_rows)):
        end = n - n_rows + r + 1
        out[h, i, r, :end] = (keys[h, :end] @ q[r, h, i] / d ** 0.5).softmax(0)
    return out


def test_scores_by_definition():
    """SnapKV's smoothed window attention, H2O's sums over all queries, TOVA's last query, norms."""
    rng = torch.Generator().manual_seed(0)
    for n_kv, g, w, n in ((2, 3, 4, 20), (1, 1, 1, 9), (3, 2, 6, 6), (1, 2, 70, 90)):
        q = torch.randn(n, n_kv, g, 8, generator=rng)
        keys = torch.randn(n_kv, n, 8, generator=rng)
        step, weights = made_step(q, keys, start=5), weights_by_definition(q[-w:], keys)
        for pool in ("avg", "max"):
            rule = evict.SnapKV(evict.Flags("snapkv", budget=1, obs_window=w, pool=pool))
            got, total = rule.score(step)[:, :n - w], weights.sum(2)[..., :n - w]
            for h, j in itertools.product(range(n_kv), range(n - w)):
                near = total[h, :, max(0, j - 2):j + 3]
                want = near.sum(1) / 5 if pool == "avg" else near.amax(1)  # zeros beyond count
                assert abs(got[h, j] - want.mean()) < 1e-5
        every = weights_by_definition(q, keys)
        h2o = evict.H2O(evict.Flags("h2o", budget=1)).score(step)
        close(h2o, every.sum((1, 2)), 1e-4)
        tova = evict.TOVA(evict.Flags("tova", budget=1)).score(step)
        close(tova, every[:, :, -1].mean((0, 1)).expand(n_kv, n), 1e-5)
        norms = evict.KeyNorm(evict.Flags("knorm", budget=1)).score(step)
        close(norms, -keys.norm(dim=-1), 1e-5)


def test_attention_paid_in_a_cache_with_gaps():
    """A query sees no entry later than itself, wherever entries were dropped."""
    rng = torch.Generator().manual_seed(0)
    for n_kv, g, w, n in ((2, 3, 5, 20), (1, 2, 70, 90)):
        q, keys = (torch.randn(*s, generator=rng) for s in ((w, n_kv, g, 8), (n_kv, n, 8)))
        step = made_step(q, keys)
        drawn = [torch.randperm(n + 9, generator=rng)[:n].sort().values for _ in range(n_kv)]
        step.key_positions, step.positions = torch.stack(drawn), torch.arange(n + 9 - w, n + 9)
        got = evict.attention_paid(step, w, 0)
        want = torch.zeros_like(got)
        for h, i, r in itertools.product(range(n_kv), range(g), range(w)):
            seen = drawn[h] <= step.positions[r]
            want[h, i, seen] += (keys[h, seen] @ q[r, h, i] / 8 ** 0.5).softmax(0)
        close(got, want, 1e-5)


def test_select():
    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        n, budget, first, last = torch.randint(0, 12, (4,), generator=rng).tolist()
        scores = torch.randint(0, 4, (3, n), generator=rng).float()
        got, first = evict.select(scores, budget, min(first, n), last), min(first, n)
        for row, index in zip(scores, got):
            order = list(range(n))[n - min(last, budget, n):]
            order += [i for i in range(first) if i not in order]
            rest = [i for i in range(n) if i not in order]
            order += sorted(rest, key=lambda i: (-row[i], i))
            assert index.tolist() == sorted(order[:budget])


def test_pyramid_budgets():
    """The spec's vectors: released rounding, its uniform and keep-all branches."""
    at = lambda n: [evict.pyramid_budget(layer, 4, 20, 4, n) for layer in range(4)]
    assert at(100) == [36, 26, 16, 6] and at(33) == [33, 25, 17, 9] and at(32) == [32, 24, 16, 8]
    assert at(31) == [20] * 4 and at(19) == [19] * 4
    big = [evict.pyramid_budget(layer, 32, 320, 64, 8192) for layer in range(32)]
    assert big[0] == 564 and big[-1] == 99 and abs(sum(big) / 32 - 331.5) < 0.01


def test_patching_lets_the_prompts_end_judge_each_chunk():
    """A patched chunk keeps what [chunk | prompt tail] in a fresh forward pass would; the patch
    leaves no trace; in one chunk it changes nothing."""
    model, tokens, w = small(), random_tokens(41, 3), 4
    settings = dict(budget=6, obs_window=w)
    cache = evict.make_cache(model, "snapkv", patch=True, chunk=16, **settings)
    generate(model, tokens, 1, cache)
    assert held(cache) == [[18] * 2] * 3 and int(cache.seen) == 41
    seen = {}

    def watch(layer, q, k, v):
        seen[layer] = q.unflatten(1, (2, 3)), k.transpose(0, 1)
        return attention(q, k, v, [0, len(q)], [0, len(q)])
    with torch.no_grad():
        model.hidden(torch.cat((tokens[:16], tokens[-w:])), watch)
    rule = evict.SnapKV(evict.Flags("snapkv", **settings))
    for layer, (q, keys) in seen.items():
        scores = rule.score(made_step(q, keys, n_patch=w))
        for h, index in enumerate(evict.select(scores, 6)):
            assert cache.positions(layer, h)[:6].tolist() == index.tolist()
    answers = []
    for patch in (False, True):
        once = evict.make_cache(model, "snapkv", budget=12, obs_window=w, patch=patch)
        answers.append(generate(model, tokens, 6, once))
    assert answers[0] == answers[1]


def test_survivors_keep_their_keys_and_positions():
    """What is held equals the full cache's keys at those positions (first layer); before RoPE it is
    the projection; memory is that of the entries kept."""
    model, tokens = small(), random_tokens(900)
    full, cache = KVCache(model), evict.make_cache(model, "snapkv", budget=3, chunk=9, obs_window=3)
    generate(model, tokens, 1, full), generate(model, tokens, 1, cache)
    for h in range(2):
        slots, all_slots = (c.stored(0, [h])[0] for c in (cache, full))
        everything = full.buffers[0][0][all_slots]
        close(cache.buffers[0][0][slots], everything[cache.positions(0, h)], 1e-12)
        bare = evict.unrotate(everything[:, None], torch.arange(900), model.config)[:, 0]
        block = model.model.layers[0]
        with torch.no_grad():
            x = block.input_layernorm(model.model.embed_tokens(tokens))
            want = block.self_attn.k_proj(x)[:, 8 * h:8 * h + 8]
        close(bare, want, 1e-5)
    entry = 2 * 8 * 8  # bytes of K and V, heads of 8 float64
    spare = cache.nbytes() - int(cache.visible().sum()) * entry
    assert 0 <= spare <= 16 * 3 * 2 * entry  # a step of room in each of 3 x 2 heads


def test_decode_time_eviction_bounds_the_cache():
    model, tokens = small(), random_tokens(20)
    for policy in ("snapkv", "pyramidkv", "knorm", "random"):
        more = {} if policy == "random" else dict(obs_window=3)
        cache = evict.make_cache(model, policy, budget=8, decode_every=5, decode_budget=12, **more)
        generate(model, tokens, 31, cache)  # 30 decoding steps, the last one evicts
        assert held(cache) == [[12] * 2] * 3
        assert max(total for _, total in cache.log()[6:]) == 6 * 16
        assert policy == "random" or cache.positions(1, 1)[-3:].tolist() == [47, 48, 49]


class EveryThird(evict.Rule):
    """A forker's policy."""

    def score(self, step):
        end = step.keys.shape[1] - step.n_patch
        return -(step.key_positions[:, step.first:end] % 3).float()

    def recent(self, step, budget):
        return 0


def test_a_rule_from_elsewhere(tmp_path, monkeypatch, capsys):
    """An entry in RULES is a policy of every command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(evict.RULES, "third", EveryThird)
    model = small(vocab_size=258, eos_ids=(257,)).float()
    save_model(model, "m"), save_model(Llama(eval_tasks.TINY).init_weights(0), "out/tiny-seed0")
    cache = evict.make_cache(model, "third", budget=4, chunk=12)
    generate(model, random_tokens(24), 1, cache)
    assert cache.positions(2, 1).tolist() == [0, 3, 6, 9, 12, 15, 18, 23]  # the last one stays
    for name, argv in (
            ("model", "--model m --prompt abc --policy third --budget 2 --max_new_tokens 2"),
            ("eval_tasks", "--model m --tasks niah_s --lengths 700 --examples 1 --policy third "
                           "--keep 0.5 --max_new_tokens 2 --dtype float32"),
            ("footprint", "--examples 1 --lengths 64 --curves third --shares 0.5")):
        monkeypatch.setattr(sys, "argv", [name, *argv.split()])
        sys.modules["test_all"].__dict__.get(name, model_file).main()
        assert "third" in capsys.readouterr().out


def test_a_prompt_beyond_the_training_length_and_a_poor_terminal(monkeypatch):
    config = small(max_seq_len=8).config
    assert model_file.beyond_training(config, 8) == ""
    assert "9 tokens; the model was made for 8" in model_file.beyond_training(config, 9)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    model_file.run(lambda: print("caf\u00e9"))
    terminal.flush()
    assert terminal.buffer.getvalue() == b"caf\\xe9\n"


def test_a_policy_that_spares_nothing_says_so(tmp_path, monkeypatch, capsys):
    """Scores without a sparsity, a window longer than the prompt, no chunk; not a real budget."""
    model = small(vocab_size=258, eos_ids=(257,)).float()
    save_model(model, tmp_path / "m")
    prulong.save_heads(tmp_path / "scores.tsv", torch.rand(3, 2) / 3 + 0.6)
    for flags, said in ((f"--heads {tmp_path / 'scores.tsv'} --sink 1 --window 4", True),
                        ("--policy full", False), ("--policy streaming --sink 1 --window 99", True),
                        ("--policy snapkv --keep 0.25", True),
                        ("--policy streaming --sink 1 --window 4 --chunk 8", False),
                        ("--policy snapkv --keep 0.25 --chunk 8 --obs_window 2", False)):
        monkeypatch.setattr(sys, "argv", ["model.py", "--model", str(tmp_path / "m"), "--prompt",
                                          "abc" * 20, "--max_new_tokens", "2", "--chat", "none",
                                          *flags.split()])
        model_file.main()
        assert ("spared next to nothing" in capsys.readouterr().err) == said, flags


def test_eviction_refuses_what_means_nothing():
    model = small()
    for settings, words in (
            (dict(policy="magic"), "magic"), (dict(policy="snapkv"), "either a budget or keep"),
            (dict(policy="snapkv", budget=3, keep=0.5), "either"),
            (dict(policy="full", budget=3), "full does not read budget"),
            (dict(policy="streaming", keep=0.5), "does not read keep"),
            (dict(policy="streaming", budget=3, sink=8), "no room for a sink"),
            (dict(policy="knorm", budget=3, patch=True), "does not read patch"),
            (dict(policy="heads"), "mask"), (dict(policy="heads", heads=torch.ones(2, 2)), "mask"),
            (dict(policy="locret", budget=3), "scorer"), (dict(policy="snapkv", keep=1.5), "keep"),
            (dict(policy="snapkv", keep=0.5, decode_every=2), "decode_budget"),
            (dict(policy="snapkv", budget=3, kernel=4), "odd")):
        with pytest.raises(ValueError, match=words):
            evict.make_cache(model, **settings)


# --- footprint -----------------------------------------------------------------------------------

def matrix_footprint(n, m, chunk, keep_after):
    """The definition: a boolean (row, key) matrix of what is not evicted. keep_after(held, new,
    decoding) -> entries kept."""
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
    high = 30, 12, 34, 6, 12, 14
    for _ in range(1200):
        n, m, chunk, sink, window, k = (int(x) for x in rng.integers((0, 0, 1, 0, 0, 0), high))
        if n + m == 0:
            continue
        slow = functools.partial(matrix_footprint, n, m, chunk)

        def near(held, new, decoding):
            return [x for x in held + new if x < sink or x > new[-1] - window]
        assert footprint.streaming(n, m, chunk, sink, window) == slow(near)
        assert footprint.full(n, m) == slow(lambda held, new, decoding: held + new)
        once = lambda held, new, decoding: held + (new if decoding else new[:k])
        assert footprint.chunked(n, m, chunk, k) == slow(once)
        assert footprint.postfill(n, m, k) == matrix_footprint(n, m, max(n, 1), once)
        anew = lambda held, new, decoding: (held + new)[:k]
        assert footprint.rolling(n, m, chunk, k) == slow(anew)
        until = lambda held, new, decoding: held + new if decoding else (held + new)[:k]
        assert footprint.rolling(n, m, chunk, k, False) == slow(until)
        s = Fraction(int(rng.integers(0, 9)), 8)
        a, b = footprint.streaming(n, m, chunk, sink, window), footprint.full(n, m)
        got = footprint.heads(n, m, chunk, sink, window, s)
        assert got[0] == s * a[0] + (1 - s) * b[0] and got[1] <= s * a[1] + (1 - s) * b[1]


def test_footprint_worked_examples():
    """By hand for 12 + 4 tokens; the paper's percentages; the released script's numbers."""
    f, half = footprint, Fraction(1, 2)
    by_hand = [
        (f.full(12, 4), 136, 16), (f.streaming(12, 4, 12, 1, 2), 94, 12),
        (f.streaming(12, 4, 4, 1, 2), 70, 7), (f.streaming(12, 4, 5, 1, 2), 70, 8),
        (f.streaming(12, 4, 1, 1, 2), 58, 4), (f.postfill(12, 4, 3), 100, 12),
        (f.rolling(12, 4, 12, 6), 106, 12), (f.chunked(12, 4, 4, 2), 88, 10),
        (f.chunked(12, 4, 4, 1), 64, 7), (f.chunked(12, 4, 4, 3), 112, 13),
        (f.chunked(12, 4, 5, 2), 85, 10), (f.rolling(12, 4, 4, 3, False), 76, 7),
        (f.rolling(12, 4, 4, 3), 70, 7), (f.heads(12, 4, 4, 1, 2, half), 103, 10),
        (f.heads(12, 4, 4, 1, 2, 0.75), Fraction(173, 2), Fraction(33, 4))]
    for got, cells, peak in by_hand:
        assert got == (Fraction(cells) / 136, Fraction(peak) / 16)
    n, m = 100000, 100
    for percent, got in ((99.80, f.streaming(n, m, n, 128, 1024)),
                         (33.73, f.streaming(n, m, 32768, 128, 1024)),
                         (4.29, f.streaming(n, m, 2048, 128, 1024)),
                         (53.6, f.heads(n, m, 32768, 128, 1024, 0.7)),
                         (37.1, f.heads(n, m, 8192, 128, 1024, 0.7)),
                         (80.25, f.postfill(24000, 3000, 0)),
                         (34.5, f.chunked(n, m, 2048, round(0.3 * 2048), extra=64))):
        assert abs(100 * float(got[0]) - percent) <= 0.051, (percent, float(got[0]))
    cells, peak = f.heads(n, m, 32768, 128, 1024, 0.7)
    assert abs(float(cells) - 0.536079) < 1e-6 and abs(float(peak) - 0.531820) < 1e-6
    for bad in (lambda: f.full(0, 0), lambda: f.heads(4, 4, 1, 1, 1, 1.5)):
        with pytest.raises(ValueError):
            bad()


def test_critical_footprint():
    """Interpolated by hand; a dip that recovers counts at its smallest footprint."""
    critical = footprint.critical
    xy = [(1, 100), (.8, 95), (.6, 92), (.4, 80), (.2, 20)]
    assert critical(xy, 100) == critical(xy[::-1], 100)
    assert abs(critical(xy, 100)[1] - 17 / 30) < 1e-12
    table = [(93.3, 95), (60, 94.9), (53.3, 92.5), (46.7, 87.7), (40, 50)]
    bound, value = critical(table, 95.2)
    assert bound == "=" and abs(value - 46.341) < 0.001
    assert critical([(.5, 95), (.9, 99)], 100) == ("<", .5)
    assert critical([(.5, 5), (.9, 9)], 100) == (">", .9)
    dip = [(.5, 50), (.6, 92), (.7, 80), (.8, 95)]
    assert abs(critical(dip, 100)[1] - (.5 + .1 * 40 / 42)) < 1e-12
    exact = [(Fraction(1, 4), 0), (Fraction(3, 4), 100)]
    assert critical(exact, 100, Fraction(1, 2)) == ("=", Fraction(1, 2))


def test_footprint_of_a_run_equals_its_closed_form():
    """What the cache logged while generating m + 1 tokens (the last is not fed back)."""
    model, tokens, n, m = small(), random_tokens(45), 45, 9
    mask = torch.tensor([[True, False], [False, False], [False, True]])
    ring, score, f = dict(sink=2, window=7), dict(obs_window=4), footprint
    for policy, settings, chunk, want in (
            ("full", {}, 8, f.full(n, m)), ("streaming", ring, 8, f.streaming(n, m, 8, 2, 6)),
            ("heads", dict(heads=mask, **ring), 8, f.heads(n, m, 8, 2, 6, Fraction(4, 6))),
            ("snapkv", dict(budget=11, **score), None, f.postfill(n, m, 11)),
            ("snapkv", dict(budget=3, **score), 8, f.chunked(n, m, 8, 3)),
            ("snapkv", dict(budget=3, patch=True, **score), 8, f.chunked(n, m, 8, 3)),
            ("tova", dict(budget=10), 8, f.rolling(n, m, 8, 10)),
            ("h2o", dict(budget=10), 8, f.rolling(n, m, 8, 10))):
        cache = evict.make_cache(model, policy, chunk=chunk, **settings)
        generate(model, tokens, m + 1, cache)
        assert (cache.footprint(), cache.peak()) == want, policy


def test_footprint_sweep_resumes_and_draws(tmp_path):
    """Lines are removed, one is cut short: only those run again. Masks and scorer are learned."""
    save_model(Llama(eval_tasks.TINY).init_weights(0), tmp_path / "out" / "tiny-seed0")
    args = ["footprint.py", "--examples", "2", "--lengths", "64", "--chunk", "16", "--shares",
            "0.05,0.1,0.5,0.9", "--curves", "streaming,snapkv+patch"]
    first = script(*args, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    path = tmp_path / "out" / "footprint" / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 8 and "0 of 8 results reused" in first.stdout
    path.write_text("".join(lines[:4]) + lines[4][:30])
    refused = script(*args, cwd=tmp_path)
    assert refused.returncode == 2 and "--resume" in refused.stderr
    again = script(*args, "--resume", cwd=tmp_path)
    assert again.returncode == 0 and "4 of 8 results reused" in again.stdout, again.stderr
    rows = [[json.loads(line) for line in text] for text in (lines, path.read_text().splitlines())]
    for row in rows[0] + rows[1]:
        del row["seconds"]
    assert rows[0] == rows[1] and again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    picture = xml.etree.ElementTree.parse(path.parent / "footprint-facts-64.svg")
    assert len(picture.findall(".//{http://www.w3.org/2000/svg}circle")) == 8


# --- a real Llama --------------------------------------------------------------------------------

needs_llama = pytest.mark.skipif("LLAMA_DIR" not in os.environ, reason="LLAMA_DIR is not set")


@needs_llama
def test_real_llama_generates_the_same_in_any_chunks():
    folder = os.environ["LLAMA_DIR"]
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    tokens = tokenizer.encode("The three primary colours are red,")
    answers = [generate(model, tokens, 12, chunk=chunk) for chunk in (None, 1, 3)]
    assert answers[0] == answers[1] == answers[2] and " yellow" in tokenizer.decode(answers[0])
    assert generate(model, [tokens, tokens[:3]], 12)[0] == answers[0]
    source = open(__file__).read()
    assert tokenizer.decode(tokenizer.encode(source)) == source


@needs_llama
def test_real_llama_survives_a_round_trip(tmp_path):
    model = load_model(os.environ["LLAMA_DIR"], dtype=torch.bfloat16)
    save_model(model, tmp_path, max_shard_bytes=100_000_000)
    again = load_model(tmp_path, dtype=torch.bfloat16)
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


# --- tasks and scorers ---------------------------------------------------------------------------

ROUTE = ("From Sofia, take a bus to Riga.\nFrom Riga, take a train to Cork.\n"
         "From Cork, take a bus to Turin.")
GOOD_TABLE = "name\tprice\nRed Lamp\t$5\nOld Clock\t$45\n"
CASES = [  # scorer, text (prefix and prediction), example, what the released scorers answer
    ("qa", "Answer: an apple", {"answer": ["The Apple!"]}, {"exact_match": 1, "f1": 1,
                                                            "rougeL_f1": 0.5,
                                                            "rougeL_recall": 0.5}),
    ("qa", "Answer: yes it is", {"answer": ["yes"]}, {"exact_match": 0, "f1": 0,
                                                      "substring_exact_match": 1}),
    ("qa", "Paris\nAnswer: Lyon", {"answer": [["Lyon", "Lugdunum"]]}, {"exact_match": 1}),
    ("icl", "label: 3\n\nWhat is next ?\nlabel: 4", {"answer": "3"}, {"exact_match": 1}),
    ("choice", "C", {"answer": ["B", "B. Bob Lee"]},
     {"exact_match": 0, "substring_exact_match": 0}),
    ("choice", "the", {"answer": ["A", "A. Ann"]}, {"exact_match": 1, "substring_exact_match": 0}),
    ("choice", "I say B. Bob Lee", {"answer": ["B", "B. Bob Lee"]},
     {"exact_match": 1, "substring_exact_match": 1}),
    ("ruler_recall", "they are 4821763 and 99", {"answer": ["4821763", "1234567"]},
     {"ruler_recall": 0.5}),
    ("rerank", "Ranking: ID102 > ID107 > [ID: 105] > [111]",
     {"qrel": [["101", "0"], ["102", "3"], ["103", "1"], ["104", "0"], ["105", "2"], ["106", "0"],
               ["107", "3"], ["108", "0"], ["109", "1"], ["110", "0"], ["111", "2"], ["112", "0"]],
      "k_values": [1, 5, 10]}, {"NDCG@1": 1, "NDCG@5": 0.94583, "NDCG@10": 0.90089,
                                "MAP@1": 0.16667, "MAP@10": 0.66667, "Recall@5": 0.66667,
                                "P@5": 0.8, "num_preds": 4}),
    ("ndcg", "", {"scores": {"10": 2.0, "9": 2.0, "8": 1.0}, "qrel": {"10": 3, "9": 0, "8": 1},
                  "k_values": [1, 5, 10]}, {"NDCG@1": 0, "NDCG@5": 0.659, "MAP@5": 0.58333,
                                            "MRR": 0.5}),
    ("parse_output", "Answer: x\ny", {"prefix_arg": "Answer:"}, {"parsed": "x"}),
    ("normalize_answer", 'The  A.B. "an" apple\u2019s', {}, {"normalized": "ab apple\u2019s"}),
    ("remove_citations", "word [1][2]. More [3] text | end]", {}, {"text": "word. More text end"}),
    ("alce_asqa", "In 1912, Roald [2] Amundsen\n\nstood.",
     {"qa_pairs": [{"short_answers": ["1912"]}, {"short_answers": ["Roald Amundsen"]},
                   {"short_answers": ["South Pole"]}]}, {"str_em": 200 / 3, "str_hit": 0}),
    ("alce_qampari", "Marazan [1], Ruined City [4].",
     {"answers": [["Marazan"], ["S. Morris"], ["Ruined City"], ["X"]]},
     {"num_preds": 2, "qampari_prec": 100, "qampari_rec": 50, "qampari_rec_top5": 50}),
    ("html_to_tsv", "```tsv\n" + GOOD_TABLE + "```", {"reference_output": GOOD_TABLE},
     {"f1": 1, "extraction_rate": 1}),
    ("html_to_tsv", "```tsv\nname\tprice\nold clock\t45\nX\t1", {"reference_output": GOOD_TABLE},
     {"precision": 0.5, "recall": 0.5, "f1": 0.5}),
    ("html_to_tsv", "Here:\n" + GOOD_TABLE, {"reference_output": GOOD_TABLE},
     {"f1": 0, "extraction_rate": 0}),
    ("path_traversal", f"<Route>\n{ROUTE}\n</Route>", {"reference_output": ROUTE + "\n"},
     {"accuracy": 1, "partial_accuracy": 1}),
    ("path_traversal", f"<Route>{ROUTE.replace('a train', 'the train')}</Route>",
     {"reference_output": ROUTE}, {"accuracy": 0, "partial_accuracy": 2 / 3}),
    ("path_traversal", ROUTE, {"reference_output": ROUTE},
     {"partial_accuracy": 0, "extraction_rate": 0}),
    ("tom_tracking", "- step 0: (INITIAL STATE) {a}\n- Step 1: x",
     {"reference_output": "T:\n- Step 0: (initial state) {a}\n- Step 1: y"},
     {"accuracy": 0, "partial_accuracy": 0.5, "extraction_rate": 1})]
SEARCH = "# Search Procedure\nI\n |- Pick two numbers (1, 2)\n"
COUNTDOWN = {"item": {"nums": [8, 2, 4, 3], "target": 11}, "reference_output":
             SEARCH + "  |- Try 1 + 2 = 3. Evaluate 3 != 4, drop this branch.\n\nNow"}
CASES += [("countdown", text, COUNTDOWN, want) for text, want in (
    ("<Solution>\n8 / 2 = 4\n4 * 3 = 12\n12 - 4 = 8\n</Solution>",
     {"accuracy": 0, "extraction_rate": 1}),
    ("<Solution>\n8 / 2 = 4\n 4 + 4=8\n8 + 3 = 11\n</Solution>", {"accuracy": 1}),
    ("<Solution>\n8 / 2 = 4\n4 + 4 = 8\n8 + 3 = 11\n8 + 3 = 11\n</Solution>", {"accuracy": 0}),
    ("<Solution>\n8 / 0 = 4\n9**9**9 = 1\n8 + 3 = 11\n</Solution>", {"accuracy": 0}),
    (SEARCH + "  |- Try 1 + 2 = 9. drop this branch",
     {"partial_accuracy": 0.5, "extraction_rate": 0}),
    ("# Search Procedure\nI", {"partial_accuracy": -0.5}),
    ("# Search Procedure\nJ", {"partial_accuracy": 0}))]


def test_scorers_answer_as_the_released_ones():
    for name, text, example, want in CASES:
        got = eval_tasks.SCORERS[name](text, example)
        for key, value in want.items():
            value = value if isinstance(value, str) else pytest.approx(value, abs=1e-6)
            assert got[key] == value, (name, text, key, got)


def test_stemmer_and_rouge():
    """Stems of Porter's examples and of NLTK's extensions; ROUGE-L against every subsequence."""
    for words, stems in (
            ("caresses ponies ties caress cats feed agreed plastered bled motoring sing conflated",
             "caress poni tie caress cat feed agre plaster bled motor sing conflat"),
            ("troubled sized hopping falling relational conditional valenci hesitanci digitizer",
             "troubl size hop fall relat condit valenc hesit digit"),
            ("conformabli radicalli happy sky dying news enjoy say ion triplicate formative",
             "conform radic happi sky die news enjoy say ion triplic form"),
            ("formalize hopeful goodness revival allowance adjustable irritant replacement",
             "formal hope good reviv allow adjust irrit replac"),
            ("adoption rate probate cease controll roll generalization oscillators analogical",
             "adopt rate probat ceas control roll gener oscil analog"),
            ("archaeology apologies died", "archaeolog apolog die")):
        assert [eval_tasks.stem(word) for word in words.split()] == stems.split()
    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = ([str(x) for x in rng.integers(0, 4, rng.integers(1, 8))] for _ in range(2))
        is_sub = lambda s, t: all(x in it for it in [iter(t)] for x in s)
        subsets = (s for r in range(len(a) + 1) for s in itertools.combinations(a, r))
        longest = max(len(s) for s in subsets if is_sub(s, b))
        f1, recall = eval_tasks.rouge_l(" ".join(b), " ".join(a))
        assert recall == pytest.approx(longest / len(a))
        assert f1 == pytest.approx(2 * longest / (len(a) + len(b)))


TEXT_TASKS = [name for name in eval_tasks.TASKS if name != "facts"]


def gold_text(name, example):
    kind = eval_tasks.TASKS[name].scorer
    first = eval_tasks.flat(example.answer)
    text = example.gold.get("reference_output") or first[0]
    if kind == "ruler_recall":
        text = " ".join(first)
    return {"path_traversal": f"<Route>{text}</Route>",
            "html_to_tsv": f"```tsv\n{text}```"}.get(kind, " " + text)


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_built_tasks_have_their_length_and_a_right_answer(name):
    """2 % of the length, the same whatever n is, gold scores 1 and nothing scores 0."""
    tokenizer = model_file.byte_tokenizer()
    fitting = ((n, built(name, n, tokenizer)) for n in (4500, 16000, 80000))
    length, examples = next((n, found) for n, found in fitting if found)
    assert eval_tasks.build(name, 1, length, 5, tokenizer) == examples[:1]
    assert eval_tasks.build(name, 2, length, 6, tokenizer) != examples
    for example in examples:
        assert 0.98 * length <= len(example.prompt) <= length
        assert tokenizer.decode(example.prompt[1:]).endswith(example.prefix)
        if not name.startswith("code") or shutil.which("g++"):
            gold = gold_text(name, example)
            assert eval_tasks.score(name, gold, example)["score"] == 1, gold
            assert eval_tasks.score(name, "", example)["score"] == 0
    with pytest.raises(ValueError, match="at least"):
        eval_tasks.build(name, 1, 10, 0, tokenizer)


def built(name, length, tokenizer):
    """Two examples, or None if the length is too short for the task."""
    with contextlib.suppress(ValueError):
        return eval_tasks.build(name, 2, length, 5, tokenizer)


def test_built_tasks_are_the_same_everywhere():
    """A fingerprint of all tasks, taken once: the same prompts on any machine, in any version."""
    prompts = [eval_tasks.build(name, 1, 6000, 1, model_file.byte_tokenizer())[0].prompt
               for name in TEXT_TASKS if name[-2:] not in ("2k", "8k")]
    assert hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16] == "da8a7096d19f9b05"


def test_countdown_search_is_complete():
    """A trace exists exactly where brute force finds a solution (integers below 2000, the larger
    number first), and it is one."""
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
        assert trace is None or eval_tasks.solves(eval_tasks.tagged(trace, "Solution").split("\n"),
                                                  numbers, target)
    assert seen == {True, False}


def test_belief_traces_follow_from_the_story():
    """The story's sentences replayed on their own give every state and belief of the trace."""
    for seed in range(20):
        story, who, what, trace = eval_tasks.tom_story(random.Random(seed), 30)
        at, lies, belief, states = {}, {}, None, []
        for sentence in story:
            step = sentence.startswith("Step")
            text = re.sub(r"^Step \d+: ", "", sentence).rstrip(".")
            if found := re.fullmatch(r"(\w+) is in the (.+)", text) or re.fullmatch(
                r"(\w+) (?:moves to|enters) the (\w+)", text
            ):
                at[found[1]] = found[2]
            elif found := re.fullmatch(r"The (.+) is on the (.+'s .+)", text):
                lies[found[1]] = found[2]
            elif found := re.fullmatch(r"(\w+) leaves the (\w+)", text):
                assert at[found[1]] == found[2]
                at[found[1]] = None
            elif found := re.fullmatch(
                r"(\w+) moves to the (\w+) with the (.+) and puts it on the (.+'s .+)", text
            ):
                assert lies[found[3]].startswith(at[found[1]] + "'s") and found[4].startswith(
                    found[2] + "'s"
                )
                at[found[1]], lies[found[3]] = found[2], found[4]
            else:
                found = re.fullmatch(r"(\w+) moves the (.+) to the (.+'s .+)", text)
                assert (lies[found[2]].startswith(at[found[1]] + "'s")
                        and found[3].startswith(at[found[1]] + "'s") and lies[found[2]] != found[3])
                lies[found[2]] = found[3]
            if step or sentence == story[3]:  # two agents and two objects stand first
                sees = lies[what].split("'s ")[0] == at[who]
                belief = lies[what] if sees else belief
                states.append(f"{{{who} location: {at[who]}; {what} location: {lies[what]}; "
                              f"{who} sees {what}: {sees}; {who}'s belief on {what}: {belief}}}")
        lines = trace.split("\n")
        assert [line[line.index("{"):] for line in lines[1:-1]] == states and len(states) == 31
        assert lines[-1] == f"Final Answer: the {belief}"


def test_travel_problems_have_one_plan():
    """Against every order of the cities."""
    for i in range(4):
        item, trace = eval_tasks.travel_problem(random.Random(i), (1500, 5500))
        days = {c["city"]: c["num_days"] for c in item["constraints"] if c["type"] == "duration"}
        fixed = {c["city"]: c["start_day"] for c in item["constraints"] if c["type"] == "fixed"}
        flights, plans = {tuple(x) for x in item["connected_cities"]}, []
        for order in itertools.permutations(days):
            start = {c: 1 + sum(days[x] - 1 for x in order[:j]) for j, c in enumerate(order)}
            flown = all(pair in flights for pair in zip(order, order[1:]))
            if flown and all(start[c] == day for c, day in fixed.items()):
                plans.append("**".join(order))
        assert plans == [item["ground_truth_cities"]]
        plan = eval_tasks.parse_plan(eval_tasks.tagged(trace, "Plan"))
        assert plan == [(c, days[c]) for c in plans[0].split("**")]


def test_longproc_answers_are_read_as_released():
    """What stands before the first dash or tag, after a finished plan or in another alphabet."""
    lines = eval_tasks.belief_lines("belief on the band-aid:\n  - first\n-\nso\n- the second\n - x")
    assert lines == [["first"], ["second"]]  # a dash within a line begins none
    gold = ("Al's belief on the band-aid:\n- Step 0: None\n- Step 1: hall\n- Step 2: loft\n"
            "Final Answer: loft")
    wrong = gold.replace("Step 1: hall", "Step 1: yard")
    for text, accuracy, credit in ((gold, 1, 1), (wrong, 0, 1 / 3)):  # as released
        got = eval_tasks.score_beliefs(text, {"reference_output": gold})
        assert (got["accuracy"], got["partial_accuracy"]) == (accuracy, credit)
    assert eval_tasks.score_asqa(" | a\n\nb [1].", {})["length"] == 2
    assert eval_tasks.EQUATION.fullmatch("1_0 + 2 = 1_2")
    assert not eval_tasks.EQUATION.fullmatch("\u0661 + 2 = 3")
    assert eval_tasks.search_lines("# Search Procedure\na\n\nb") == ["a", "", "b"]
    plan = ("the plan for 5 European cities for 6 days:\nDay 1-3: A\nDay 3: from A to B\n"
            "Day 3-6: B\nDay 1-2: C\nDay 2: from C to D")
    assert eval_tasks.parse_plan(plan.replace("the plan for 5 ", "")) == eval_tasks.parse_plan(plan)
    assert eval_tasks.parse_plan(plan)[:2] == [("A", 3), ("B", 4)]
    text = "Sure.\n<Solving Procedure>\nFirst line\n\n<Solving Procedure>\nagain"
    lines = eval_tasks.procedure_lines(text)
    assert len(lines) == 2 and not any("sure" in line or "again" in line for line in lines)
    stays = [{"type": "duration", "city": c, "num_days": 2} for c in ("A", "B")]
    for constraints, none in ((stays, "have fixed schedules"), (
            [*stays, *({"type": "fixed", "city": c, "start_day": d, "end_day": d + 1}
                       for c, d in (("A", 1), ("B", 2)))], "needing arrangement")):
        trip = eval_tasks.Trip({"connected_cities": [["A", "B"]], "constraints": constraints})
        assert any(none in line and line.endswith(": None.") for line in trip.requirements())


def test_helmet_rows_are_read_as_released(tmp_path):
    """Few rows are asked in the file's order, RULER needs no example, ALCE's worked examples follow
    the prompt file's form, and a chat turn has no line's end behind it."""
    def put(name, rows):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    rows = [{"text": f"What is {i}?", "coarse_label": i % 2} for i in range(6)]
    put("icl/trec_coarse_test.jsonl", rows[:5]), put("icl/trec_coarse_train.jsonl", rows)
    asked = eval_tasks.load("icl_trec_coarse", str(tmp_path), 500)
    assert [re.search(r"What is \d\?(?=\D*$)", e.user)[0] for e in asked] == [
        row["text"] for row in rows[:5]]
    row = {"context": "C", "query": "7", "num_v": 1, "answer": ["X"]}
    for example, start in (({}, "Memorize"), ({"example": "E"}, "E\n\nMemorize")):
        put("ruler/vt/validation_8192.jsonl", [row | example])
        assert eval_tasks.load("ruler_vt", str(tmp_path))[0].user.startswith(start)
    docs = [{"title": f"T{i}", "text": f"text {i}"} for i in range(6)]
    spec = {"instruction": "Do.", "demo_sep": "###",
            "demo_prompt": "<{instruction}|{question}|{context}|{answer}>",
            "demos": [{"question": q, "answer": "a", "docs": docs} for q in "xy"]}
    put("prompts/asqa_revised.json", [spec])
    put("alce/asqa_eval_gtr_top2000.json", [[{"question": "Q", "docs": docs, "answer": "a",
                                              "qa_pairs": [{"short_answers": ["a"]}]}]])
    example, = eval_tasks.load("alce_asqa", str(tmp_path), chat=False)
    shown = re.match(r"<Do\.\|(.)\|(.*?)\|a>###<Do\.\|(.)\|", example.user, re.DOTALL)
    assert {shown[1], shown[3]} == {"x", "y"} and "text 4" in shown[2] and "text 5" not in shown[2]
    chat = model_file.Tokenizer(byte_tokenizer().bpe,
                                {"<|im_start|>": 256, "<|im_end|>": 257},
                                template=model_file.CHAT_FORMATS["chatml"])
    draft = eval_tasks.Draft("a", ["b"], "c\n", "Answer:", {"answer": "d"})
    for as_chat, end in ((True, "c"), (False, "c\n")):
        assert eval_tasks.to_example("qa", draft, chat, as_chat, 9).user == "ab" + end


def test_official_files_are_read_as_released(tmp_path):
    """Rows, order, worked examples and prompt structure of HELMET and LongProc, and what a wrong
    folder is told."""
    ctx = lambda what, i: [{"title": f"{what} {i} {j}", "text": f"Text {j} about {what} {i}."}
                           for j in range(2)]
    def put(name, rows):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    put("kilt/nq-dev-multikilt_1000_k50_dep6.jsonl",
        [{"question": f"Who wrote book {i}?", "answers": [f"Author {i}"], "ctxs": ctx("book", i)}
         for i in range(2)])
    put("kilt/nq-train-multikilt_1000_k3_dep6.jsonl",
        [{"question": f"Which river is river {i}?", "answers": [f"River {i}"],
          "ctxs": ctx("river", i)} for i in (*range(7), 2)])
    example = eval_tasks.load("helmet:kilt_nq", str(tmp_path))[0]
    river = ("Document (Title: river {0} 0): Text 0 about river {0}.\n\n"
             "Document (Title: river {0} 1): Text 1 about river {0}.\n\n"
             "Question: Which river is river {0}?\nAnswer: River {0}\n\n")
    assert example.user.endswith(
        river.format(6) + river.format(2) + "Document (Title: book 0 0): Text 0 about book 0.\n\n"
        "Document (Title: book 0 1): Text 1 about book 0.\n\nQuestion: Who wrote book 0?")
    assert example.prefix == "Answer:"
    assert eval_tasks.score("helmet:kilt_nq", " author 0", example)["score"] == 1
    n = len(example.prompt)
    cut = eval_tasks.load("kilt_nq", str(tmp_path), length=n + 20 - 9)[0]  # 20 for the answer
    assert cut.n_cut == 9 and len(cut.prompt) == n - 9
    assert cut.user.endswith("Text 1 abou\n\nQuestion: Who wrote book 0?")
    (tmp_path / "path_traversal").mkdir()
    with pytest.raises(FileNotFoundError, match="prompts.yaml.*LongProc"):
        eval_tasks.load("longproc:path_traversal_0.5k", str(tmp_path))
    (tmp_path / "path_traversal" / "prompts.yaml").write_text(
        "USER_PROMPT: |-\n  Map {{x}}:\n  {city_context}\n\n  From {src_city} to {dst_city}.\n")
    paths = [{"context_nl": "C", "question_repr": ["A", "B"], "answer_nl": ROUTE}]
    (tmp_path / "path_traversal" / "path_traversal_0.5k.json").write_text(json.dumps(paths))
    example, = eval_tasks.load("longproc:path_traversal_0.5k", str(tmp_path))
    assert example.user == "Map {x}:\nC\n\nFrom A to B."
    assert example.answer == ROUTE and example.max_new_tokens == 1024
    put("ruler/vt/validation_8192.jsonl",
        [{"context": "C", "query": "q", "num_v": 1, "example": "e", "answer": []}])
    with pytest.raises(ValueError, match="vt/validation_8192.jsonl: not ruler_vt's rows"):
        eval_tasks.load("ruler_vt", str(tmp_path))
    os.remove(tmp_path / "ruler/vt/validation_8192.jsonl")
    put("json_kv/test_k105_dep6.jsonl", [{"context": "JSON"}])
    for name, words in (("json_kv", "not json_kv's rows"), ("narrativeqa", "narrativeqa_test"),
                        ("kilt_xy", "unknown"), ("ruler_vt", "ruler/vt")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            eval_tasks.load(name, str(tmp_path))


def test_rows_that_a_benchmark_ships_are_read(tmp_path):
    """A control character in code, an empty alias among others; the seed draws the questions."""
    folder = tmp_path / "pseudo_to_code"
    folder.mkdir()
    (folder / "prompts.yaml").write_text("USER_PROMPT: |-\n  {pseudocode}\n")
    row = {"pseudocode_lines": ["print \x7f"], "code_lines": ["a"], "problem_id": "1",
           "testcases": [[["1"], ["2"]]]}
    (folder / "pseudo_to_code_2k.json").write_text(json.dumps([row]))
    assert eval_tasks.load("longproc:pseudo_to_code_2k", str(tmp_path))[0].user == "print \x7f"
    (tmp_path / "kilt").mkdir()
    rows = [{"id": f"q{i}", "question": f"Who {i}?", "answers": ["", "Al"], "ctxs": []}
            for i in range(9)]
    for name in ("dev-multikilt_1000_k50", "train-multikilt_1000_k3"):
        lines = "\n".join(map(json.dumps, rows))
        (tmp_path / f"kilt/nq-{name}_dep6.jsonl").write_text(lines)
    load = functools.partial(eval_tasks.load, "kilt_nq", str(tmp_path), 2)
    assert [load(seed=7)[i].user.split()[-1] for i in (0, 1)] == ["2?", "5?"]  # as released
    assert eval_tasks.score("kilt_nq", "x", load()[0])["substring_exact_match"] == 1  # "" is in all


def test_balanced_shots():
    rows = [{"text": str(i), "label": i % 3} for i in range(10)]
    shots = eval_tasks.balanced(rows, "label", 8, 1)
    assert [sorted(r["label"] for r in shots[i:i + 3]) for i in (0, 3)] == [[0, 1, 2]] * 2
    assert len({r["text"] for r in shots}) == 8


def test_bm25_by_definition():
    """Every score by the formula, with a word in most documents (its idf is negative), and ties:
    the later document first."""
    rng = np.random.default_rng(0)
    drawn = [rng.zipf(1.5, rng.integers(1, 30)) for _ in range(50)]
    docs = [" ".join(f"w{x}" for x in words if x < 40) for words in drawn] + ["w1 w2", "w1 w2"]
    index, texts = eval_tasks.BM25(docs), [d.split() for d in docs]
    df = {w: sum(w in t for t in texts) for t in texts for w in t}
    idf = {w: math.log(52 - n + 0.5) - math.log(n + 0.5) for w, n in df.items()}
    floor = 0.25 * sum(idf.values()) / len(idf)
    assert min(idf.values()) < 0
    mean = sum(map(len, texts)) / 52

    def score(word, text):
        tf, weight = text.count(word), idf[word] if idf[word] >= 0 else floor
        return weight * tf * 2.5 / (tf + 1.5 * (0.25 + 0.75 * len(text) / mean))
    for query in ("w1 w2 w2 w7", "w3", "unknown w5"):
        known = [word for word in query.split() if word in idf]
        want = [sum(score(word, text) for word in known) for text in texts]
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
    assert sorted(order) == list(range(23))
    assert [texts[i] for i in order[:5]] == [f"passage {i}" for i in range(22, 17, -1)]
    got = eval_tasks.retrieval_metrics([4, 7, 1, 9, 8, 2], {7, 2})
    assert got == {"recall@5": 0.5, "recall@20": 1, "mrr": 0.5,
                   "ndcg@10": pytest.approx((1 / math.log2(3)
                                             + 1 / math.log2(7)) / (1 + 1 / math.log2(3)))}


@pytest.mark.skipif(not shutil.which("g++"), reason="wants g++")
def test_generated_code_runs_within_limits(tmp_path, monkeypatch):
    """Endless loops, floods of output and memory hogs score 0 in time, and no network is there."""
    tests = {"item": {"testcases": [[["1 2"], ["3"]]]}}
    run_it = lambda body: eval_tasks.score_code(f"```cpp\n{body}\n```", tests)["accuracy"]
    assert run_it("int main() { int a, b; cin >> a >> b; cout << a + b << endl; }") == 1
    start = time.perf_counter()
    for body in ("int main() { for (;;); }", "int main() { for (;;) cout << 3 << endl; }",
                 "int main() { vector<char> v(2u << 30, 1); cout << 3 << endl; }",
                 "int main() { cout << 3; }", "not code", '#include "/dev/zero"\nint main() {}'):
        assert run_it(body) == 0, body
    assert time.perf_counter() - start < 60
    (tmp_path / "g++").write_text("#!/bin/sh\nexit 1\n")  # a compiler that cannot fork, say
    (tmp_path / "g++").chmod(0o755)
    with monkeypatch.context() as broken:
        broken.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(ValueError, match="within the limits"):
            run_it("int main() {}")
    if eval_tasks.has_namespaces():
        here = str(tmp_path)
        run_here = lambda code: eval_tasks.run_limited(
            [sys.executable, "-I", "-c", code], here, "", 5)
        assert run_here("import socket; print(socket.if_nameindex())") == "[(1, 'lo')]\n"
        mark = tmp_path / "mark"  # a daemon that would write after the command's end
        daemon = (f"import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(1.5)\n"
                  f"    open({str(mark)!r}, 'w')")
        assert run_here(daemon) == ""
        time.sleep(2)
        assert not mark.exists()


# --- evaluation ----------------------------------------------------------------------------------

def evaluated(monkeypatch, capsys, *args):
    """stdout and stderr of eval_tasks.py."""
    monkeypatch.setattr(sys, "argv", ["eval_tasks.py", *map(str, args)])
    with contextlib.suppress(SystemExit):
        model_file.run(eval_tasks.main)
    return capsys.readouterr()


EVAL = ("--model model --tasks niah_s,icl --lengths 700 --examples 3 --max_new_tokens 4 "
        "--dtype float32 --out o/x.jsonl").split()


def test_evaluation_resumes_and_names_what_is_wrong(tmp_path, monkeypatch, capsys):
    """A torn run goes on where it stopped and ends with the same rows; batches of prompts give the
    same answers; other weights or another policy reuse nothing."""
    save_model(small(vocab_size=258, eos_ids=(257,)), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    go = functools.partial(evaluated, monkeypatch, capsys)
    rows_of = lambda: [json.loads(line) for line in open("o/x.jsonl")]
    assert "0 of 6 results reused" in go(*EVAL).out
    rows, text = rows_of(), open("o/x.jsonl").read().splitlines(keepends=True)
    assert len(rows) == 6 and all(r["footprint"] == 1 for r in rows)
    assert all(0.98 * 700 <= r["prompt_tokens"] <= 700 and 0 <= r["score"] <= 1 for r in rows)
    open("o/x.jsonl", "w").write("".join(text[:2]) + text[2][:40])
    assert "--resume or --overwrite" in go(*EVAL).err
    assert "2 of 6 results reused" in go(*EVAL, "--resume").out
    for row in rows + (again := rows_of()):
        del row["seconds"]
    assert sorted(r["key"] for r in again) == sorted(r["key"] for r in rows)
    assert {r["key"]: r for r in again} == {r["key"]: r for r in rows}
    assert "0 of 6 results reused" in go(*EVAL, "--resume", "--batch", "3").out
    answers = {(r["task"], r["i"]): r["prediction"] for r in rows}
    assert all(r["prediction"] == answers[r["task"], r["i"]] for r in rows_of()[6:])
    snapkv = ["--policy", "snapkv", "--budget", "64", "--resume"]
    assert "0 of 6 results reused" in go(*EVAL, *snapkv).out
    assert all(r["footprint"] < 1 for r in rows_of()[12:])
    config = open("model/config.json").read()
    open("model/config.json", "w").write(config.replace('"rope_theta": ', '"rope_theta": 1'))
    assert "0 of 6 results reused" in go(*EVAL, "--resume").out
    open("model/config.json", "w").write(config)
    assert "6 of 6 results reused" in go(*EVAL, "--resume").out
    save_model(small(seed=1, vocab_size=258, eos_ids=(257,)), "model")
    assert "0 of 6 results reused" in go(*EVAL, "--resume").out
    examples_of = eval_tasks.examples_of

    def with_other_golds(*args):
        return [dataclasses.replace(e, answer=["other"]) for e in examples_of(*args)]
    with monkeypatch.context() as patch:
        patch.setattr(eval_tasks, "examples_of", with_other_golds)
        assert "0 of 6 results reused" in go(*EVAL, "--resume").out
    for extra, words in (
            ("--tasks magic", "magic"), ("--tasks helmet:narrativeqa", "--data"),
            ("--lengths 20", "at least"), ("--policy x", "--policy"), ("--policy heads", "mask"),
            ("--tasks helmet:kilt_nq --data none", "kilt"), ("--tasks foo:kilt_nq", "foo"),
            ("--keep 0.5", "does not read keep"), ("--examples 0", "--examples"),
            ("--tasks litsearch:bm25 --policy streaming", "no eviction"),
            ("--tasks code_0.5k", "--allow_code_exec"), ("--tasks facts", "token ids")):
        error = go(*EVAL, "--out", "o/y.jsonl", *extra.split()).err
        assert error.count("\n") == 1 and words in error, (extra, error)


def test_litsearch_reports_its_parts_apart(tmp_path, monkeypatch, capsys):
    """Specific queries by recall at 5, broad ones at 20, from citations and by authors."""
    words = "attention graphs speech vision".split() + [f"filler{i}" for i in range(30)]
    papers = [{"corpusid": i, "title": word, "abstract": f"all about {word}"}
              for i, word in enumerate(words)]
    sets = ("inline_acl", "manual_acl", "inline_nonacl", "manual_iclr")
    queries = [{"query": words[i] if i else "nothing known", "corpusids": [i], "specificity": i % 2,
                "query_set": name} for i, name in enumerate(sets)]
    write_rows(tmp_path / "corpus.jsonl", papers), write_rows(tmp_path / "query.jsonl", queries)
    save_model(small(vocab_size=258).float(), tmp_path / "m")
    line = ["--model", tmp_path / "m", "--tasks", "litsearch:bm25", "--data", tmp_path, "--out"]
    said = evaluated(monkeypatch, capsys, *line, tmp_path / "x.jsonl").out
    for part, value, n in (("recall@5, specific, by authors", 1, 2),
                           ("recall@20, broad, from citations", 0.5, 2)):
        assert re.search(rf"{part} \| {value:.3f} \| [.\d]+ \| {n} \|", said), said


def test_summaries_are_written_for_helmets_judges(tmp_path, monkeypatch, capsys):
    """Tasks that need a judge: prompts in the released form, ROUGE, a word in the table, and a file
    that holds what HELMET's scripts look up."""
    told = lambda words: {"text": words}
    story = [{"document": told(f"Story {i}."), "question": told(f"Who is {i}?"),
              "answers": [told(f"Ann {i}"), told("Ann")]} for i in range(3)]
    books = [{"id": i, "context": f"Book {i}.", "answer": [f" Plot {i}.\n"]} for i in range(3)]
    cases = [{"id": f"c{i}", "sources": ["A", "B"], "summary/short": f"Short {i}" if i else None,
              "summary/long": f"Long {i}"} for i in range(3)]
    for name, rows in (("narrativeqa/narrativeqa_test", story),
                       ("narrativeqa/narrativeqa_train", story),
                       ("infbench/longbook_sum_eng", books),
                       ("multi_lexsum/multi_lexsum_val", cases),
                       ("multi_lexsum/multi_lexsum_train", cases)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / f"{name}.jsonl", rows)
    load = lambda name: eval_tasks.load(f"helmet:{name}", str(tmp_path))
    ends = {
        "narrativeqa": r"Question: .*\nAnswer: Ann \d\n\nNow the story to use:\n\nStory (\d)\.\n\n"
                       r"Question: Who is \1\?",
        "infbench_sum_eng": r"(?:\[story text\]\nSummary: Plot \d\.\n\n){2}Now, read the "
                            r"following story:\n\nBook \d\.\n\nNow summarize the book\.\n",
        "multi_lexsum": r"(?:Summary: Short \d\n\n){2}Now, write a summary of the following "
                        r"legal documents\.\nLegal documents:\nA\n\nB\n\n"
                        r"Now please summarize the case\.\n"}
    for name, end in ends.items():
        examples = load(name)
        assert all(re.search(end + r"\Z", e.user, re.DOTALL) for e in examples), examples[0].user
        assert len(examples) == (2 if name == "multi_lexsum" else 3)
    save_model(small(vocab_size=258, eos_ids=(257,)), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    tasks = ",".join(f"helmet:{name}" for name in ends)
    line = ["--model", "model", "--tasks", tasks, "--data", ".", "--helmet_dir", "output/m",
            "--max_new_tokens", "9", "--lengths", "8192", "--dtype", "float32"]
    said = evaluated(monkeypatch, capsys, *line).out
    rows = [json.loads(row) for row in open("out/eval.jsonl")]
    for name in ends:
        assert f"| helmet:{name} (ROUGE; needs a judge) | 8192 |" in said
        path, = pathlib.Path("output/m").glob(f"{name}_*_v1_*.json")  # as its judges look for them
        found, examples = json.loads(path.read_text()), load(name)
        mine = [row for row in rows if row["task"] == f"helmet:{name}"]
        for example, row, item in zip(examples, mine, found["data"]):
            assert item["output"] == example.prefix + row["prediction"]
            assert item["answer"] == example.answer and item["question"] in example.user
            assert name == "narrativeqa" or item["id"] == example.gold["id"]
        key = "rougeL_f1" if name == "narrativeqa" else "rougeLsum_f1"
        mean = 100 * sum(row["metrics"][key] for row in mine) / len(mine)
        assert found["averaged_metrics"][key] == pytest.approx(mean)
        assert mean == pytest.approx(100 * sum(row["score"] for row in mine) / len(mine))
    assert found["data"][0]["summary/long"].startswith("Long")


def put_olmes(folder, requests, metric="acc_per_char"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"task_config": {"primary_metric": metric}}))
    lines = [json.dumps({"doc_id": i, "label": label,
                         "request": {"context": context, "continuation": continuation}})
             for i, label, context, continuation in requests]
    with gzip.open(folder / "requests.jsonl.gz", "wt") as f:
        f.write("\n".join(lines))


def test_olmes_questions_by_log_likelihood(tmp_path, monkeypatch, capsys):
    """Each choice's is that of the whole text in one pass; equal contexts are read once, others
    too where they differ (WinoGrande); the metric is the task's own; results are reused."""
    requests = [(0, 1, "Q: a\nA:", " yes"), (0, 1, "Q: a\nA:", " no, never"),
                (0, 1, "Q: a\nA:", " x"), (10 ** 6, 1, "A:", " yes"), (7, 0, "So Al ", "ran."),
                (7, 0, "So Bo", " ran.")]
    put_olmes(tmp_path / "quiz/val_rc_5shot", requests)
    put_olmes(tmp_path / "quiz/rc_5shot", requests[:1])
    metric, questions = eval_tasks.olmes_questions("olmes:quiz", str(tmp_path), 9)
    assert metric == "acc_per_char" and [len(pairs) for _, pairs in questions] == [3, 2]
    model, tokenizer, read = small(vocab_size=258), byte_tokenizer(), []
    recorded = iter((-24.9378, -66.509, -10.8355, -31.8271, -30.3942))  # transformers, float32
    for _, pairs in questions:
        make = lambda: read.append(KVCache(model)) or read[-1]
        found, _ = eval_tasks.log_likelihoods(model, tokenizer, pairs, make)
        for (context, continuation), (total, n_token, n_char) in zip(pairs, found):
            ids = torch.tensor(tokenizer.document(context + continuation))
            p = model(ids[:-1]).log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            assert n_token == len((context + continuation).encode()) - len(context.rstrip())
            assert total == pytest.approx(p[-n_token:].sum().item(), abs=1e-4)
            assert total == pytest.approx(next(recorded), abs=1e-3)
            assert n_char == len(continuation)
    assert len(read) == 1 + 2
    save_model(small(vocab_size=258, eos_ids=(257,)), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    line = ["--model", "model", "--tasks", "olmes:quiz", "--data", ".", "--dtype", "float32"]
    assert "| olmes:quiz | - | full |" in evaluated(monkeypatch, capsys, *line).out
    assert "2 of 2 results reused" in evaluated(monkeypatch, capsys, *line, "--resume").out
    row = json.loads(open("out/eval.jsonl").readline())
    totals = [total / n_char for total, _, n_char in row["metrics"]["log_likelihoods"]]
    assert row["score"] == (totals.index(max(totals)) == 1)
    put_olmes(tmp_path / "math/rc_5shot", requests, "exact_match")
    put_olmes(tmp_path / "empty/rc_5shot", [])
    put_olmes(tmp_path / "odd/rc_5shot", [(0, 0, "", "x")])
    (tmp_path / "quiz/val_rc_5shot/requests.jsonl.gz").write_bytes(b"no gz")
    for task, words in (("olmes:math", "exact_match"), ("olmes:quiz", "not OLMES's requests"),
                        ("olmes:none", "none"), ("olmes:empty", "no questions"),
                        ("olmes:odd", "an empty part")):
        error = evaluated(monkeypatch, capsys, *line, "--tasks", task, "--out", "y").err
        assert error.count("\n") == 1 and words in error, error


def test_a_comment_changes_no_fingerprint(tmp_path):
    """A docstring or comment leaves the code's fingerprint; a number changes it, also in a function
    that begins with a call."""
    code = tmp_path / "rule.py"
    prints = []
    for text in ('def f():\n    """a"""\n    return 1\n',
                 'def f():\n    """b"""  # c\n    return 1\n',
                 'def f():\n    """a"""\n    return 2\n', "def f():\n    g(1)\n",
                 "def f():\n    g(2)\n"):
        code.write_text(text)
        prints.append(eval_tasks.code_fingerprint(str(code)))
    assert prints[0] == prints[1] and len(set(prints)) == 4


def test_chat_and_length_are_as_asked(tmp_path, monkeypatch):
    """--chat none gives a benchmark's chat task as plain text, a host stands before plain text and
    within the length, LongProc has lengths of its own."""
    special = {"<|im_start|>": 256, "<|im_end|>": 257}
    tokenizer, loads = model_file.Tokenizer(byte_tokenizer().bpe, special), []

    def load(name, path, n, tokenizer, length, chat):
        loads.append((length, chat))
        return []
    monkeypatch.setattr(eval_tasks, "load", load)
    config = lambda **given: eval_tasks.Config(data=str(tmp_path), examples=1, **given)
    for given in ({}, {"chat": "own"}, {"chat": "none"}, {"prefix_host": "a.org"}):
        eval_tasks.examples_of(config(**given), "longproc:countdown_0.5k", 0, tokenizer)
        eval_tasks.examples_of(config(**given), "helmet:icl_banking77", 2000, tokenizer)
    shorter = 2000 - len(meco.prompt(tokenizer, "", "a.org"))  # no BOS, which would be shared
    assert loads == [(None, None), (2000, None), (None, True), (2000, True), (None, False),
                     (2000, False), (None, False), (shorter, False)]
    plain, = eval_tasks.examples_of(config(prefix_host="a.org"), "niah_s", 800, tokenizer)
    assert tokenizer.decode(plain.prompt).startswith("URL: a.org\n\n")
    assert 0.98 * 800 <= len(plain.prompt) <= 800
    lengths = eval_tasks.jobs(config(tasks="niah_s,longproc:x,litsearch:bm25,niah_s",
                                     lengths="5,6,5"))
    assert lengths == [("niah_s", 5), ("niah_s", 6), ("longproc:x", 0), ("litsearch:bm25", 0)]


def evaluate_together(rank, size, port, cwd):
    env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run_script(["eval_tasks.py", *EVAL[:-1], f"out-{size}.jsonl"], cwd, env if size > 1 else {})


def test_several_processes_evaluate_as_one(tmp_path):
    """Each example is run once; rank 0 prints the table of all."""
    save_model(small(vocab_size=258, eos_ids=(257,)).float(), tmp_path / "model")
    rows = []
    for size in (1, 2):
        assert launch(evaluate_together, size, str(tmp_path)) == [0] * size
        lines = [json.loads(line) for line in open(tmp_path / f"out-{size}.jsonl")]
        assert len(lines) == 6
        for line in lines:
            del line["seconds"]
        rows.append({line["key"]: line for line in lines})
    assert rows[0] == rows[1]
    assert "| niah_s |" in (tmp_path / "stdout0.txt").read_text()
    assert not (tmp_path / "stdout1.txt").read_text()


def same(a, b) -> bool:
    """As many tensors, and each pair the same bits."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def token_lists(seed, *lengths):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (n,), generator=rng) for n in lengths]


# --- methods in train.py -------------------------------------------------------------------------

CEPE_ROWS = ["other documents' chunks", "prepended to the decoder"]
WEIGHTS = ["config.json", "model.safetensors"]
RUNS = {  # method: (flags, rows of its table, files that it saves)
    "cepe": ("--decoder_steps 2 --mlm 0.3 --duplicate 0.2 --eval_seqs 1",
             ["best possible", "cepe", *CEPE_ROWS], WEIGHTS),
    "ceped": ("--decoder_steps 2 --mlm 0.2 --duplicate 0.3 --eval_seqs 1",
              ["best possible", "ceped", *CEPE_ROWS], WEIGHTS),
    "meco": ("--cooldown 0.5 --eval_seqs 4", ["before", "meco"], WEIGHTS),
    "vlorp": ("--eval_seqs 1", ["before", "vlorp"], WEIGHTS),
    "ptp": (f"--data {HERE}/README.md --seq_len 32 --batch 2 --eval_seqs 2", ["untrained", "ptp"],
            WEIGHTS),
    "screenshot": ("--batch 4 --eval_seqs 4", ["before, no context", "screenshot",
                                               "screenshot:shown=none"], WEIGHTS),
    "hamiltonian": ("--batch 2 --eval_seqs 4", ["mean of the training set", "hamiltonian",
                                                "hamiltonian:stages=1"], WEIGHTS),
    "locret": ("--hidden 16 --n_answer 16", ["locret"], ["scorer.safetensors"])}


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """An empty folder to work in, where the trained tiny models are random ones."""
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        save_model(tiny_start(seed), f"out/tiny-seed{seed}")


def trained(capsys, line):
    """The table of a run of train.py, from its last line: one JSON object."""
    capsys.readouterr()
    train.main(line.split())
    return table_of(capsys.readouterr().out)


def made(line):
    """(method, model, data) as train.py makes them of a command line."""
    args, config = train.read_flags(["--method", *line.split()], train.METHODS)
    kind, rows = train.METHODS[args.method], train.Rows(args.data)
    tokenizer = None if args.data in train.STREAMS else byte_tokenizer()
    data = kind.data(args, config, tokenizer, rows)
    model = train.build_model(kind, args, config)
    return kind(model, config, args.seed), model, data or train.own_data(args, tokenizer, rows)


def logged(path, event):
    with open(path) as f:
        rows = [json.loads(line) for line in f]
    return [row for row in rows if row["event"] == event]


def write_rows(path, rows):
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def same_files(a, b) -> bool:
    a, b = load_file(a), load_file(b)
    return list(a) == list(b) and same(a.values(), b.values())


@pytest.mark.parametrize("name", RUNS)
def test_methods_train_and_resume_in_the_same_bits(name, workshop, monkeypatch, capsys):
    """A run's rows and files; and one that is killed half way, between the phases of CEPE and MeCo,
    ends where it would have ended."""
    flags, rows, files = RUNS[name]
    line = f"--method {name} --steps 6 --save_every 3 {flags}"
    table = trained(capsys, line)
    assert list(table) == rows
    assert all(math.isfinite(x) for row in table.values() for x in row.values())
    saved = logged(f"out/{name}/log.jsonl", "saved")[0]
    assert saved["paths"] == files
    save = train.save_checkpoint

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train.main([*line.split(), "--out_dir", "cut"])
    assert train.read_about("cut/checkpoint.safetensors")["step"] == 3
    assert trained(capsys, line + " --out_dir cut --resume") == table
    for file in ("checkpoint.safetensors", files[-1]):
        assert same_files(f"out/{name}/{file}", f"cut/{file}")


@pytest.mark.parametrize("variant", ["vlorp:granularity=1,rank=4", "meco:mode=standard"])
def test_variants_stand_in_one_table(variant, workshop, capsys):
    """A variant begins from the same weights, reads as many tokens and has a folder of its own."""
    name, folder = variant.partition(":")[0], "o/" + variant.replace(":", "-")
    line = f"--method {name} --beside {variant} --steps 3 --eval_seqs 2 --out_dir o"
    assert list(trained(capsys, line)) == ["before", name, variant]
    assert not same_files("o/model.safetensors", folder + "/model.safetensors")
    steps = zip(logged("o/log.jsonl", "step"), logged(folder + "/log.jsonl", "step"), strict=True)
    for a, b in steps:
        assert a["tokens"] == b["tokens"]
        same_start = name == "vlorp" and a["step"] == 0  # MeCo's first batch has its URLs
        assert (a["loss"] == b["loss"]) == same_start


@pytest.mark.parametrize("method", ["lm --from_scratch", "ptp", "screenshot --from_scratch"])
def test_a_config_is_enough_to_begin_from(method, workshop, capsys):
    """A folder without weights: shapes for fresh ones."""
    save_model(small(vocab_size=258), "shapes")
    os.remove("shapes/model.safetensors")
    line = (f"--method {method} --model shapes --data {HERE}/README.md --seq_len 32 --steps 1 "
            "--eval_seqs 2 --out_dir o")
    table = trained(capsys, line)
    assert os.path.exists("o/model.safetensors")
    assert trained(capsys, f"{line} --resume") == table


def test_flags_are_read_as_the_user_means_them():
    """What a variant changes must be a flag of its method; checkpointing follows the length that
    was asked for."""
    def read(line, variant=None):
        return train.read_flags(["--method", *line.split()], train.METHODS, variant)
    _, config = read("vlorp --granularity 8", "vlorp:rank=4,at_refresh=reset")
    assert (config.rank, config.at_refresh, config.granularity) == (4, "reset", 8)
    _, config = read("prulong", "prulong:no-per_document")
    assert config.per_document is False
    with pytest.raises(SystemExit):
        read("prulong", "prulong:per_document=False")
    with pytest.raises(ValueError, match="vlorp has no flag --granularty"):
        read("vlorp", "vlorp:granularty=1")
    assert read("lm --model x --seq_len 8192")[0].checkpointing
    assert not read("lm --model x --seq_len 512 --batch 2")[0].checkpointing


@pytest.mark.parametrize("line", [
    "cepe --decoder_steps 1", "ceped --decoder_steps 1 --mlm 0.5", "meco", "meco --mode mix",
    "vlorp", "locret", "ptp", "screenshot", "hamiltonian"])
def test_batches_are_functions_of_seed_and_number(line, workshop):
    """Whatever was asked before; another number or seed gives another batch."""
    method, _, data = made(line)
    again, _, fresh = made(line)
    _, _, other = made(line + " --seed 1")
    def tensors(batch):
        return [x for x in batch if x is not None]
    want = tensors(method.batch(data, 3, 3, 10))
    others = method.batch(data, 7, 7, 10), method.batch(other, 3, 3, 10)
    assert same(tensors(method.batch(data, 3, 3, 10)), want)
    assert same(tensors(again.batch(fresh, 3, 3, 10)), want)
    learned = "targets" if hasattr(others[0], "targets") else "positions"
    first = getattr(method.batch(data, 3, 3, 10), learned)
    assert not any(torch.equal(getattr(batch, learned), first) for batch in others)


def test_a_part_without_targets_moves_nothing():
    """A process may get metadata alone, or a context without a masked token: loss 0, and a
    gradient of 0 for every weight."""
    model = Llama(dataclasses.replace(TINY, tie_embeddings=False)).init_weights(0)
    batch = collate([torch.arange(5)], [torch.full((5,), -100)])
    loss, _ = meco.MeCo(model, meco.MeCo.Config()).loss(model, batch, 0, 1)
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    method, model, data = made("cepe --decoder_steps 1 --mlm 0.5")
    batch = method.batch(data, 0, 0, 4)
    batch = batch._replace(targets=torch.full_like(batch.targets, -100))
    loss, _ = method.loss(model, batch, 0, 4)
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in model.encoder.parameters())
    model.share = object()
    with pytest.raises(ValueError, match="no --seq_parallel"):
        method.loss(model, batch, 0, 4)


@pytest.mark.parametrize("line", [
    "lm --from_scratch", "prulong --window 16 --train masks+weights",
    "duo --window 16 --needles 3 --reg 0", "meco", "cepe --decoder_steps 20 --init copy",
    "ceped --decoder_steps 20 --init copy", "ptp", "screenshot"])
def test_bfloat16_products_stay_close(line, workshop):
    """Autocast changes a step's loss by less than 1e-3 of it (DuoAttention's, a distance near 0:
    2 %) and the gradient by less than 3 % of its norm."""
    method, model, data = made(line)
    most = 1e-3
    if isinstance(method, prulong.Duo):
        method.a.data.fill_(0.5)
        most = 0.02
    everything = [*model.parameters(), *method.parameters()]
    parameters = [p for p in everything if p.requires_grad]
    for i in range(3):
        batch, losses, gradients = method.batch(data, i, 5, 10), [], []
        for low in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                losses.append(method.loss(model, batch, 5, 10)[0])
            found = torch.autograd.grad(losses[-1], parameters, allow_unused=True)
            flat = [g.flatten().float() for g in found if g is not None]
            gradients.append(torch.cat(flat))
        assert 0 < (losses[0] - losses[1]).abs() < most * losses[0], losses
        assert 0 < (gradients[0] - gradients[1]).norm() < 0.03 * gradients[0].norm()


# --- projected gradients -------------------------------------------------------------------------

def made_gradients(shape, steps, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for _ in range(steps)]


def ones(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.ones(shape, dtype=dtype))


def optimize(optimizer, p, gradients):
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        optimizer.zero_grad()
    return p.detach().clone()


class FactoredAdam:
    """Running means of a gradient, and of the row and column sums of a square, as ProjFactor has
    them; by definition."""

    def __init__(self, shape):
        self.t, self.m = 0, 0.0
        self.row, self.column = torch.zeros(shape[0]), torch.zeros(shape[1])

    def take(self, g, square):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.row = 0.999 * self.row + 0.001 * square.sum(1)
        self.column = 0.999 * self.column + 0.001 * square.sum(0)

    def rate(self, lr):
        """Learning rate over sqrt(V) + eps."""
        v = torch.outer(self.row, self.column) / self.row.sum()
        corrected = lr * math.sqrt(1 - 0.999 ** self.t) / (1 - 0.9 ** self.t)
        return corrected / (v.sqrt() + 1e-6)


@pytest.mark.parametrize("basis, off", [("normal", 1), ("rademacher", -1)])
@pytest.mark.parametrize("c, r", [(1, 4), (4, 1), (0.25, 16)])
def test_projection_is_unbiased_with_the_known_error(basis, off, c, r):
    """E Go = G and E|Go - G|^2 = (m / c + 1) / r |G|^2 (normal), (m / c - 1) / r (Rademacher), over
    3000 draws."""
    p, n = ones(24, 32), 3000
    optimizer = vlorp.ProjFactor([p], rank=r, granularity=c, basis=basis, proj_every=1)
    group, (grad,) = optimizer.param_groups[0], made_gradients((24, 32), 1)
    total, error = torch.zeros_like(grad), 0.0
    for step in range(n):
        drawn = optimizer.projection(p, group, step)
        blocks = vlorp.estimate(vlorp.project(grad, drawn, group), drawn, p)
        estimate = torch.cat([rows for _, rows in blocks])
        total += estimate
        error += (estimate - grad).square().sum().item() / n
    want = (24 / c + off) / r * grad.square().sum().item()
    assert error == pytest.approx(want, rel=0.06)
    assert (total / n - grad).norm().item() < 1.2 * math.sqrt(want / n)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_exact_projections_give_the_plain_optimizers(shape):
    """Units of one number and a Rademacher basis lose nothing: then the schemes are Adam, and Adam
    with factored V."""
    gradients, adam = made_gradients(shape, 12), dict(lr=0.01, weight_decay=0.1)
    exact = dict(rank=1, granularity=min(shape), basis="rademacher", proj_every=99)
    p = ones(*shape)
    plain = optimize(torch.optim.AdamW([p], eps=1e-12, **adam), p, gradients)
    for settings in (dict(rank=None), exact | dict(scheme="subspace"),
                     exact | dict(scheme="original", proj_every=5)):
        p = ones(*shape)
        optimizer = vlorp.ProjFactor([p], eps=1e-12, **adam, **settings)
        close(optimize(optimizer, p, gradients), plain, 1e-6)
    w, state = torch.ones(shape), FactoredAdam(shape)
    for g in gradients:
        state.take(g, g * g)
        w = w * (1 - 0.01 * 0.1) - state.rate(0.01) * state.m
    p = ones(*shape)
    close(optimize(vlorp.ProjFactor([p], **adam, **exact), p, gradients), w, 1e-6)


@pytest.mark.parametrize("at_refresh, block", [("keep", 2 ** 17), ("reset", 30)])
@pytest.mark.parametrize("shape, c, r", [
    ((12, 20), 2, 3), ((20, 12), 2, 3),
    ((12, 20), 0.25, 5), ((20, 12), 0.25, 5),
    ((20, 12), 4, 1), ((16, 24), 1, 2)])
def test_projfactor_by_definition(shape, c, r, at_refresh, block, monkeypatch):
    """Shapes and granularities, step by step, with a new basis every three steps that keeps or
    resets the first moment; blocks of any size."""
    monkeypatch.setattr(vlorp, "BLOCK", block)
    p, is_tall = ones(*shape), shape[0] >= shape[1]
    optimizer = vlorp.ProjFactor([p], lr=0.1, rank=r, granularity=c, proj_every=3, seed=7,
                                 at_refresh=at_refresh)
    w, state = torch.ones(shape), FactoredAdam(shape)
    n_units, width = int(max(shape) * c), int(min(shape) / c)
    for t, g in enumerate(made_gradients(shape, 8)):
        basis = optimizer.projection(p, optimizer.param_groups[0], t)
        assert basis.shape == (width, r)

        def back(x):
            return (x @ basis.T if is_tall else basis @ x).reshape(shape)
        if is_tall:
            projected = g.reshape(n_units, width) @ basis
        else:
            projected = basis.T @ g.reshape(width, n_units)
        if t % 3 == 0 and at_refresh == "reset":
            state.m = 0.0
        state.take(projected, back(projected) ** 2)
        w -= state.rate(0.1) * back(state.m)
        close(optimize(optimizer, p, [g]), w, 2e-5)


def test_projected_training_frees_gradients_accumulates_and_counts_bytes():
    """Through a Llama's backward pass: no projected matrix keeps its gradient, two micro-batches
    equal their sum, every matrix has a P of its own."""
    model, twin = (small(n_embd=24, n_ff=32, head_dim=6) for _ in range(2))
    args = types.SimpleNamespace(lr=1e-3, weight_decay=0.1, seed=0)
    method = vlorp.VLoRP(model, vlorp.VLoRP.Config(rank=2, granularity=2, proj_every=2))
    optimizer = method.optimizer(method.param_groups(model, args), args)
    group, rest = optimizer.param_groups
    inside, outside = group["params"], rest["params"]
    assert len(inside) + len(outside) == len([*model.parameters()])
    state = torch.get_rng_state()
    for tokens in token_lists(0, 20, 20):
        model.loss(tokens[:-1], tokens[1:]).backward()
        twin.loss(tokens[:-1], tokens[1:]).backward()
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in inside)
    assert all(p.grad is not None for p in outside)
    for p, q in zip(inside, method.param_groups(twin, args)[0]["params"]):
        want = vlorp.project(q.grad, optimizer.projection(p, group, 0), group)
        close(optimizer.state[p]["sum"], want, 1e-5)
    assert method.update(optimizer, 1.0) > 0
    attn = model.model.layers[0].self_attn
    k, v = (optimizer.projection(x.weight, group, 0) for x in (attn.k_proj, attn.v_proj))
    assert k.shape == v.shape and not torch.equal(k, v)
    projected = sum(max(p.shape) * 4 + sum(p.shape) for p in inside)
    plain = sum(2 * p.numel() for p in outside)
    assert vlorp.state_bytes(optimizer) == 8 * (projected + plain)  # float64


@pytest.mark.parametrize("settings", [
    dict(rank=2, granularity=2),
    dict(rank=3, granularity=1, basis="svd", scheme="subspace")])
def test_projected_state_resumes_in_the_same_bits(settings, tmp_path):
    """Saved in the middle of a window with a micro-batch pending, loaded with weights_only."""
    def fresh():
        p = ones(8, 12)
        return vlorp.ProjFactor([p], lr=0.1, proj_every=4, **settings), p
    gradients = made_gradients((8, 12), 9)
    want = optimize(*fresh(), gradients)
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


def test_projected_state_of_bfloat16_weights_stays_float32():
    p, q = ones(8, 12, dtype=torch.bfloat16), ones(8, 12, dtype=torch.bfloat16)
    optimizer, other = (vlorp.ProjFactor([x], rank=2, granularity=2) for x in (p, q))
    optimize(optimizer, p, [g.bfloat16() for g in made_gradients((8, 12), 2)])
    other.load_state_dict(optimizer.state_dict())
    for name in ("m", "row", "column"):
        assert other.state[q][name].dtype == torch.float32
        assert torch.equal(other.state[q][name], optimizer.state[p][name])


def test_projected_gradients_are_clipped_or_skipped():
    """The norm is the projection's; a step that is not finite changes nothing and is forgotten, as
    is what zero_grad drops; weights without gradient, whose V is 0, stay finite."""
    p, (g,) = ones(8, 12), made_gradients((8, 12), 1)
    optimizer = vlorp.ProjFactor([p], lr=0.1, rank=2, granularity=2, max_norm=0.5,
                                 scheme="subspace", betas=(0.0, 0.0), eps=1e9)
    group, state = optimizer.param_groups[0], optimizer.state[p]
    projected = vlorp.project(g, optimizer.projection(p, group, 0), group)
    before = optimize(optimizer, p, [g])
    close(state["m"], projected * 0.5 / projected.norm(), 1e-5)
    assert optimizer.norm == pytest.approx(projected.norm().item())
    assert torch.equal(optimize(optimizer, p, [torch.full_like(g, math.inf)]), before)
    assert not math.isfinite(optimizer.norm)
    assert state["step"] == 1 and "sum" not in state
    p.grad = g.clone()
    optimizer.take(p)
    optimizer.zero_grad()
    assert "sum" not in state
    g[3] = 0
    p = ones(8, 12)
    optimizer = vlorp.ProjFactor([p], rank=1, granularity=8, basis="rademacher")
    assert optimize(optimizer, p, [0 * g, g]).isfinite().all()


@pytest.mark.parametrize("options, words", [
    (dict(granularity=5), r"\(8, 12\).*granularity 5"), (dict(rank=0), "rank 0"),
    (dict(granularity=0.3), "granularity 3/10"), (dict(at_refresh="drop"), "at_refresh"),
    (dict(basis="svd", rank=9, granularity=1), "singular vectors"),
    (dict(basis="gaussian"), "basis"), (dict(scheme="galore"), "scheme")])
def test_projections_that_mean_nothing_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        vlorp.ProjFactor([{"params": [ones(8, 12)], "granularity": 2, **options}])


def test_projection_on_singular_vectors():
    """The leading directions of the window's first micro-batch: what they keep of it is the best of
    that rank; they stay for the window."""
    p, bases = ones(8, 12), []
    optimizer = vlorp.ProjFactor([p], rank=3, granularity=1, proj_every=3, basis="svd")
    for i, g in enumerate(made_gradients((8, 12), 6)):
        p.grad = g.clone()
        optimizer.take(p)
        basis, projected = optimizer.state[p]["basis"], optimizer.state[p]["sum"]
        bases.append(basis.clone())
        close(basis.T @ basis, torch.eye(3), 1e-5)
        if i % 3 == 0:
            missed = (g - basis @ projected).square().sum()
            close(missed, torch.linalg.svdvals(g)[3:].square().sum(), 1e-4)
        optimizer.step()
    assert torch.equal(bases[0], bases[2]) and torch.equal(bases[3], bases[5])
    assert not torch.equal(bases[2], bases[3])
    low = ones(8, 12)
    optimizer = vlorp.ProjFactor([low], rank=2, granularity=1, basis="svd")
    low.grad = g = torch.outer(torch.arange(8.0), torch.arange(12.0))
    optimizer.take(low)  # of rank 1: the second direction may be any
    close(optimizer.state[low]["basis"] @ optimizer.state[low]["sum"], g, 1e-3)


def test_groups_come_and_optimizers_go():
    """Later groups are checked too; a frozen matrix is let be; an optimizer that is gone takes no
    gradient."""
    matrices = a, b, frozen = [ones(6, 4) for _ in range(3)]
    frozen.requires_grad_(False)
    optimizer = vlorp.ProjFactor([a, frozen], granularity=2, lr=0.1)
    optimizer.add_param_group({"params": [b], "rank": 2, "granularity": 1})
    with pytest.raises(ValueError, match="cannot be projected"):
        optimizer.add_param_group({"params": [ones(7, 5)]})
    before = [p.detach().clone() for p in matrices]
    (a.square().sum() + (b * frozen).sum()).backward()
    optimizer.step()
    kept = [torch.equal(p, q) for p, q in zip(matrices, before)]
    assert kept == [False, False, True]
    del optimizer
    a.square().sum().backward()
    assert torch.equal(a.grad, 2 * a)


def projected_worker(rank, size, port, out):
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=size)
    p = ones(8, 12)
    optimizer = vlorp.ProjFactor([p], lr=0.1, rank=2, granularity=2)
    result = optimize(optimizer, p, made_gradients((8, 12), 4, rank))
    if rank == 0:
        torch.save(result, out)
    torch.distributed.destroy_process_group()


def test_projected_gradients_are_averaged_over_processes(tmp_path):
    """Two processes with a gradient each end where one process with their mean does."""
    out = str(tmp_path / "x.pt")
    assert launch(projected_worker, 2, out) == [0, 0]
    first, second = (made_gradients((8, 12), 4, rank) for rank in (0, 1))
    means = [(a + b) / 2 for a, b in zip(first, second)]
    p = ones(8, 12)
    want = optimize(vlorp.ProjFactor([p], lr=0.1, rank=2, granularity=2), p, means)
    close(torch.load(out, weights_only=True), want, 1e-5)


# --- CEPE ----------------------------------------------------------------------------------------

def small_cepe(init="copy", last_n=None, **changes):
    """In float64: a grouped-query decoder of width 24, an encoder of width 16."""
    decoder = small(**changes)
    encoder = LlamaConfig(decoder.config.vocab_size + 1, n_layer=2, n_head=2, n_kv_head=2,
                          n_embd=16, n_ff=24, head_dim=8, tie_embeddings=True)
    return cepe.extend(decoder, encoder, init, last_n)


def heads(layer, x, read):
    """q of x, k and v of what it reads, in heads of 8."""
    inputs = ((layer.q_proj, x), (layer.k_proj, read), (layer.v_proj, read))
    return [projection(y).unflatten(1, (-1, 8)) for projection, y in inputs]


def slow_read(q, k, v, causal):
    """One sequence reads another, or itself: (N, n_head D)."""
    return slow_attention(q, k, v, [0, len(q)], [0, len(k)], causal).flatten(1)


def slow_self(block, x, config, causal):
    """The self-attention of a layer, with its residual."""
    h, a = block.input_layernorm(x), block.self_attn
    q, k, v = heads(a, h, h)
    turn = rope(config, torch.arange(len(x)), x.dtype)
    q, k = rotate(q, *turn), rotate(k, *turn)
    return x + a.o_proj(slow_read(q, k, v, causal))


def slow_cepe(model, main, chunks):
    """Logits (N, V): every chunk encoded on its own, one softmax over all, layer by layer."""
    states = []
    for chunk in chunks:
        x = model.encoder.embed_tokens(chunk)
        for block in model.encoder.layers:
            x = slow_self(block, x, model.encoder_config, causal=False)
            x = x + block.mlp(block.post_attention_layernorm(x))
        states.append(model.encoder.norm(x))
    x = model.model.embed_tokens(main)
    for block in model.model.layers:
        x = slow_self(block, x, model.config, causal=True)
        if hasattr(block, "cross_attn"):
            c = block.cross_attn
            qkv = heads(c, c.layernorm(x), torch.cat(states))
            x = x + c.o_proj(slow_read(*qkv, causal=False))  # no positions
        x = x + block.mlp(block.post_attention_layernorm(x))
    return model.model.norm(x) @ model.head.T


def read_chunks(model, main, chunks, cache_kv=False):
    tokens = torch.cat([main[:0], *chunks])
    cu_chunks = [0, *itertools.accumulate(map(len, chunks))]
    context = model.context(tokens, cu_chunks, cache_kv=cache_kv)
    return model.hidden(main, context=context) @ model.head.T


@pytest.mark.parametrize("last_n", [None, 1])
def test_cepe_by_definition(last_n):
    """Chunks are a set of token sequences, each document reads its own, and without context the
    decoder is what it was."""
    model = small_cepe(last_n=last_n)
    main, *chunks = token_lists(0, 13, 7, 7, 3, 7)
    got, plain = read_chunks(model, main, chunks), model(main)
    close(got, slow_cepe(model, main, chunks), 2e-6)  # cos and sin are float32
    assert (got - plain).abs().max() > 0.1
    assert same([plain, plain], [small()(main), read_chunks(model, main, [])])
    order = [chunks[i] for i in (2, 0, 3, 1)]
    close(read_chunks(model, main, order), got, 1e-12)  # chunks are a set,
    flipped = [chunk.flip(0) for chunk in chunks]
    assert (read_chunks(model, main, flipped) - got).abs().max() > 1e-3  # their tokens are not
    close(read_chunks(model, main, chunks * 2), got, 1e-12)  # twice the same weighs the same
    close(read_chunks(model, main, chunks, cache_kv=True), got, 1e-12)
    cu = [0, 13, 18, 31]  # three documents, the second without context
    cu_chunks, cu_context = [0, 7, 14, 17, 24], [0, 14, 14, 24]
    context = model.context(torch.cat(chunks), cu_chunks, cu_context)
    tokens = torch.cat((main, main[:5], main))
    hidden = model.hidden(tokens, causal(cu), context=context, cu_seqlens=cu)
    logits = (hidden @ model.head.T).split([13, 5, 13])
    for part, own in zip(logits, (chunks[:2], [], chunks[2:])):
        close(part, read_chunks(model, main[:len(part)], own), 1e-6)


def test_cepe_starts_and_learns_where_it_should():
    """init zero is the decoder bit for bit; gradients reach exactly the new parameters, at first
    only o."""
    model, before = small_cepe("zero"), small().state_dict()
    main, *chunks = token_lists(1, 9, 6, 6, 6)
    assert torch.equal(read_chunks(model, main, chunks), model(main))
    block = model.model.layers[0]
    cross, own = block.cross_attn, block.self_attn
    assert torch.equal(cross.q_proj.weight, own.q_proj.weight)
    assert torch.equal(cross.k_proj.weight, own.k_proj.weight[:, :16])
    assert torch.equal(cross.v_proj.weight, own.v_proj.weight[:, :16])
    assert torch.equal(cross.layernorm.weight, block.post_attention_layernorm.weight)
    new = {name: p for name, p in model.named_parameters() if name not in before}
    assert all(name.startswith("encoder.") or ".cross_attn." in name for name in new)
    optimizer = torch.optim.SGD(new.values(), lr=0.1)
    for step in range(3):
        logits = read_chunks(model, main, chunks)
        torch.nn.functional.cross_entropy(logits[:-1], main[1:]).backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None) == (name in new)
        for name, p in new.items():
            assert p.grad.any() == (step > 0 or "cross_attn.o_proj" in name), (step, name)
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    assert same(before.values(), [after[name] for name in before])
    with pytest.raises(ValueError, match="width 32 is above"):
        cepe.extend(small(), dataclasses.replace(model.encoder_config, n_embd=32))


@pytest.mark.parametrize("cache_kv", [False, True])
def test_cepe_decodes_with_a_cache(cache_kv):
    """A prompt in chunks, then token by token, reads the context as one pass over all does."""
    model, live = small_cepe(), torch.ones(1, dtype=torch.bool)
    main, *chunks = token_lists(2, 12, 6, 6, 6)
    context = model.context(torch.cat(chunks), [0, 6, 12, 18], cache_kv=cache_kv)
    reading, cache = cepe.WithContext(model, context), KVCache(model)
    cache.reserve([5], 7)
    with torch.no_grad():
        hidden = [cache.prefill(reading, main[:5], chunk=2)[None]]
        hidden += [cache.step(reading, token, live) for token in main[5:].split(1)]
    logits = torch.cat(hidden) @ model.head.T
    close(logits, read_chunks(model, main, chunks)[4:], 1e-6)
    new = generate(reading, main, 5, chunk=4)
    whole = torch.cat((main, torch.tensor(new)))
    assert read_chunks(model, whole, chunks)[11:-1].argmax(1).tolist() == new


def test_examples_are_split_for_an_encoder():
    """A part a chunk, in order: 10 documents or 2 demonstrations stay, of running text the end;
    nothing is lost, and a part that is too long takes several chunks."""
    tokenizer, text = byte_tokenizer(), lambda chunks: [tokenizer.decode(c) for c in chunks]
    for name, stay in (("rag", 10), ("docs", 10), ("rerank", 10), ("icl", 2)):
        whole, = eval_tasks.build(name, 1, 6000, 0, tokenizer)
        assert len(whole.parts) > stay and "\n\n".join(whole.parts) in whole.user
        split = eval_tasks.for_encoder(whole, tokenizer, 4096)
        assert text(split.chunks) == whole.parts[stay:]
        rest = whole.user.replace("\n\n" + "\n\n".join(whole.parts[stay:]), "")
        assert tokenizer.decode(split.prompt[1:]) == f"{rest}\n{whole.prefix}"
        pieces = eval_tasks.for_encoder(whole, tokenizer, 50).chunks
        assert max(map(len, pieces)) == 50
        assert "".join(text(pieces)) == "".join(whole.parts[stay:])
        assert eval_tasks.for_encoder(whole, tokenizer, share=1.0) == whole
        assert len(eval_tasks.for_encoder(whole, tokenizer, 4096, share=0.0).chunks) == len(
            whole.parts)
    whole, = eval_tasks.build("niah_s", 1, 3000, 0, tokenizer)
    split = eval_tasks.for_encoder(whole, tokenizer, 256, 1000)
    n_far = len(whole.parts[0]) - 1000
    assert "".join(text(split.chunks)) == whole.parts[0][:n_far]
    assert set(map(len, split.chunks[:-1])) == {256}
    assert len(split.prompt) == len(whole.prompt) - n_far
    draft = eval_tasks.Draft("", ["one", "two", "three"], "", "", {}, " | ")
    cuts = [draft.cut(draft.context[:n]) for n in range(1, len(draft.context) + 1)]
    assert [cut.context for cut in cuts] == [draft.context[:n + 1] for n in range(len(cuts))]
    assert cuts[8].parts == ["one", "two"] and cuts[9].parts == ["one", "two "]


def test_cepe_is_evaluated(tmp_path, monkeypatch, capsys):
    """eval_tasks.py and footprint.py read the context with the encoder; the footprint is what a
    replay of the steps holds, in numbers."""
    model = small_cepe(vocab_size=258, eos_ids=(257,)).float()
    cepe.save_cepe(model, tmp_path / "cepe")
    monkeypatch.chdir(tmp_path)
    line = ("--model cepe --tasks icl,niah_s --lengths 900 --examples 2 --max_new_tokens 4 "
            "--n_near 300 --chunk_size 128 --dtype float32 --policy streaming --sink 2 "
            "--window 20").split()
    assert "| icl | 900 |" in evaluated(monkeypatch, capsys, *line).out
    rows = [json.loads(row) for row in open("out/eval.jsonl")]
    tokenizer = byte_tokenizer()
    for row in rows[::2]:
        example, = eval_tasks.build(row["task"], 1, 900, 0, tokenizer)
        example = eval_tasks.for_encoder(example, tokenizer, 128, 300)
        cache = evict.make_cache(model, "streaming", sink=2, window=20)
        new = generate(cepe.reading(model, example.chunks), example.prompt, 4, cache)
        assert tokenizer.decode(new, marks=False) == row["prediction"]
        n_context, n_all = sum(map(len, example.chunks)), len(example.prompt) + len(new) - 1
        for cache_kv, size in ((False, 16), (True, 2 * 3 * 2 * 8)):
            held, most, n = 0, 0, 0
            for i in range(n_context):
                held += size * (i + 1)
            for steps, past in cache.log():  # (tokens, entries stored before) over 6 heads
                for i in range(steps):
                    held += size * n_context + 16 * (past + 6 * (i + 1))
                most, n = max(most, size * n_context + 16 * (past + 6 * steps)), n + steps
            n += n_context
            assert n == n_context + n_all
            want = held / (96 * n * (n + 1) / 2), most / (96 * n)
            got = [float(x) for x in cepe.footprint(model, cache, n_context, cache_kv)]
            assert got == pytest.approx(want)
            assert cache_kv or got == [row["footprint"], row["peak"]]
    few = evaluated(monkeypatch, capsys, *line, "--n_near", "2000", "--tasks", "niah_s", "--out",
                    "y").err
    assert "nothing is left for the encoder" in few
    for extra, words in (("--batch 2", "one prompt at a time"), ("--tasks olmes:x --data .",
                                                                 "no context")):
        error = evaluated(monkeypatch, capsys, *line, "--out", "z", *extra.split()).err
        assert error.count("\n") == 1 and words in error
    sweep = ["footprint.py", "--model", "cepe", "--tasks", "rag", "--lengths", "4500", "--examples",
             "1", "--shares", "0,0.5,1"]
    monkeypatch.setattr(sys, "argv", sweep)
    model_file.run(footprint.main)
    rows = [json.loads(row) for row in open("out/footprint/results.jsonl")]
    of = lambda curve: [row["footprint"] for row in rows if row["curve"] == curve]
    assert of("full") == [1.0] and of("cepe")[2] == of("cepe+kv")[2] == 1.0
    assert of("cepe")[0] < of("cepe")[1] < 1 and of("cepe")[0] < of("cepe+kv")[0]


def test_cepe_checkpoints_in_the_released_layout(tmp_path):
    """Names and fields as released; a folder comes back whole or is refused by name."""
    model, file = small_cepe(last_n=2).float(), tmp_path / "model.safetensors"
    cepe.save_cepe(model, tmp_path)
    tensors = load_file(file)
    for name in ("encoder.embed_tokens", "encoder.norm", "encoder.layers.1.mlp.down_proj",
                 "encoder.layers.0.input_layernorm", "model.layers.2.cross_attn.layernorm",
                 "model.layers.1.cross_attn.k_proj", "model.norm"):
        assert name + ".weight" in tensors
    assert not any("layers.0.cross_attn" in name for name in tensors)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["encoder_hidden_size"] == 16 and config["num_cross_attn_layers"] == 2
    config["architectures"] = ["LlamaForCausalContextLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    again = cepe.load_cepe(tmp_path)
    assert again.encoder_config == model.encoder_config
    assert same(model.parameters(), again.parameters())
    learned = [p.requires_grad for p in again.parameters()]
    assert learned == [p.requires_grad for p in model.parameters()]
    rows = tensors["encoder.embed_tokens.weight"][:61].clone()
    extra = {"encoder.embed_tokens.weight": rows, "model.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | extra, file)  # the file says how many rows
    assert cepe.load_cepe(tmp_path).encoder.embed_tokens.weight.shape == (61, 16)
    without = {name: t for name, t in tensors.items() if name != "encoder.norm.weight"}
    misshapen = without | {"encoder.norm.weight": torch.ones(3)}
    for broken, words in ((without, "Missing.*encoder.norm"), (misshapen, "size mismatch.*norm"),
                          (tensors | {"x": torch.ones(1)}, 'Unexpected.*"x"')):
        save_file(broken, file)
        with pytest.raises(ValueError, match=words):
            cepe.load_cepe(tmp_path)
    os.remove(file)
    with pytest.raises(ValueError, match="unpickled"):
        cepe.load_cepe(tmp_path)


def test_distillation_loss():
    """KL by definition, with its gradient, in blocks of rows; zero for equal states, finite where
    probabilities vanish."""
    rng = torch.Generator().manual_seed(3)
    head, s, t = (torch.randn(n, 8, generator=rng) for n in (50, 7, 7))
    s.requires_grad_()
    p, q = ((x @ head.T).softmax(-1) for x in (t, s))
    want = (p * (p.log() - q.log())).sum(-1).mean()
    got = cepe.kl_loss(s, t, head, rows=3)
    close(got, want, 1e-5)
    slopes = [torch.autograd.grad(x, s, retain_graph=True)[0] for x in (got, want)]
    close(*slopes, 1e-5)
    assert cepe.kl_loss(t, t, head).abs() < 1e-6
    far = (t * -60).requires_grad_()
    loss = cepe.kl_loss(far, t * 60, head)
    assert loss.isfinite() and torch.autograd.grad(loss, far)[0].isfinite().all()


def small_expand(kind=cepe.Expand, **settings):
    """A method on 32 tokens of context in chunks of 8, and its model and data."""
    model = small_cepe(vocab_size=128).float()
    data = cepe.Entities(n_main=8, n_seq=3, context=32)
    return kind(model, kind.Config(context=32, chunk_size=8, **settings)), model, data


def test_cepe_phases_and_documents():
    """Masked tokens, the same tokens on both sides, then what came before; parts of chunks may be
    left out."""
    method, _, data = small_expand(mlm=0.3, duplicate=0.2)
    assert method.phases(10) == [(0, 3), (3, 5), (5, 10)]
    flat = types.SimpleNamespace(warmup=0, min_lr=0)
    scales = [method.lr_scale(step, 10, flat) for step in (0, 3, 5)]
    assert scales == [1, 1, 1]
    mlm, twice, main = (method.batch(data, 1, step, 10) for step in (0, 3, 5))
    masked = mlm.targets != -100
    assert len(mlm.tokens) == 0 and len(mlm.context) == 120
    assert torch.equal(mlm.targets[masked], mlm.context[masked])
    assert 12 < method.weight(mlm) < 60
    assert torch.equal(twice.context, twice.tokens)
    assert twice.cu_chunks.tolist() == [*range(0, 25, 2)]
    before, after = data.documents(1)[0]
    assert main.context[:32].tolist() == before.tolist()
    assert main.tokens[:8].tolist() == after.tolist()
    assert main.targets[:8].tolist() == [*after[1:].tolist(), -100]
    assert main.cu_chunks.tolist() == [*range(0, 97, 8)]
    assert main.cu_context.tolist() == [0, 32, 64, 96]
    args, config = train.read_flags(["--method", "cepe"], train.METHODS)
    n_main = cepe.Expand.data(args, config, None, None).n_main
    assert (args.seq_len, config.context, n_main) == (80, 64, 16)
    method, _, data = small_expand(mlm=0.0, duplicate=0.0, mask_chunks=0.5)
    batches = [method.batch(data, i, 0, 1) for i in range(30)]
    sizes = torch.cat([batch.cu_chunks.diff() for batch in batches])
    assert sizes.min() == 1 and sizes.max() == 8
    assert 0.4 < (sizes == 8).float().mean() < 0.7


def test_cepe_distils_and_knows_what_context_is_worth():
    """The teacher reads context and text in one pass; without chunks CEPE is its decoder."""
    method, model, data = small_expand(cepe.Distil, mlm=0.0, duplicate=0.0)
    batch = method.batch(data, 1, 0, 1)
    both = torch.cat((batch.context[32:64], batch.tokens[8:16]))
    close(method.teacher(model, batch)[8:16], model.hidden(both)[32:], 1e-5)
    loss, metrics = method.loss(model, batch, 0, 1)
    assert loss.item() == pytest.approx(metrics["ce"] + 2 * metrics["kl"], rel=1e-5)
    documents = data.draw(np.random.default_rng(2), 32, 40)
    best = data.best(documents, (0, 1, 4), 8)
    assert best[0] > best[1] > best[2] > 24
    chats = types.SimpleNamespace(held_out=[collate([torch.arange(20)])])
    with pytest.raises(ValueError, match="text, not conversations"):
        method.before(model, chats)
    rows = cepe.perplexities(model, documents[:3], (0, 2), 8, 256)
    mains = [torch.as_tensor(main) for _, main in documents[:3]]
    losses = [model.loss(main[:-1], main[1:]).item() for main in mains]
    for name in ("CEPE", *CEPE_ROWS):
        assert rows[name][0] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)


def test_an_encoder_can_begin_as_the_decoders_first_layers():
    """Every weight of it is the decoder's, and stays apart from it."""
    decoder, flags = tiny_start(0), cepe.Expand.Config(enc_layers=2, enc_init="decoder")
    model = cepe.extend(decoder, cepe.encoder_for(TINY, flags), enc_init="decoder")
    assert len(model.encoder.layers) == 2 and model.encoder_config.n_embd == TINY.n_embd
    for mine, own in zip(model.encoder.layers, decoder.model.layers):
        assert same(mine.parameters(), own.parameters())
        assert mine.mlp.up_proj.weight.data_ptr() != own.mlp.up_proj.weight.data_ptr()
    embeddings = model.encoder.embed_tokens.weight
    assert torch.equal(embeddings[:-1], decoder.model.embed_tokens.weight)
    for flags, words in ((dict(enc_layers=4, enc_init="decoder"), "the decoder has 3"),
                         (dict(enc_layers=2, enc_width=30), "expected a multiple")):
        with pytest.raises(ValueError, match=words):
            cepe.encoder_for(TINY, cepe.Expand.Config(**flags))


def test_cepe_learns_to_read(workshop, monkeypatch, capsys):
    """On the entity stream right chunks help and wrong ones do not; on text a CEPE folder is
    trained on and answers, and its decoder never changes."""
    rows = trained(capsys, "--method cepe --steps 120 --decoder_steps 60 --eval_seqs 4")
    assert rows["cepe"]["16 chunks"] < rows["cepe"]["0 chunks"] - 1
    assert rows["other documents' chunks"]["16 chunks"] > rows["cepe"]["0 chunks"]
    save_model(Llama(dataclasses.replace(TINY, vocab_size=258)).init_weights(0), "m")
    write_rows("text.jsonl", [{"text": f"{i} " * 300} for i in range(40)])
    line = "--data text.jsonl --seq_len 96 --chunk_size 16 --steps 6 --eval_seqs 2"
    fresh = f"--method cepe --model m {line} --enc_width 32 --enc_layers 1"
    rows = trained(capsys, fresh + " --out_dir b")
    assert list(rows["cepe"]) == ["0 chunks", "1 chunks", "3 chunks"]
    rows = trained(capsys, f"--method ceped --model b {line} --mlm 0 --out_dir c")
    assert all(math.isfinite(x) for row in rows.values() for x in row.values())
    weights, decoder = cepe.load_cepe("c").state_dict(), load_model("m").state_dict()
    assert same(decoder.values(), [weights[name] for name in decoder])
    assert not same_files("b/model.safetensors", "c/model.safetensors")
    command = "cepe.py --model c --context text.jsonl --prompt 1 --max_new_tokens 2"
    monkeypatch.setattr("sys.argv", command.split())
    cepe.main()
    for bad, words in (("--context 95", "fewer than 4"), ("--enc_width 30", "multiple"),
                       ("--enc_width 128", "above")):
        with pytest.raises(ValueError, match=words):
            train.main(f"{fresh} {bad} --out_dir d".split())


# --- MeCo ----------------------------------------------------------------------------------------

def test_hosts_and_metadata():
    wiki = "https://en.wikipedia.org/wiki/Bill_Gates"
    for url, want in (
            (wiki, "en.wikipedia.org"), ("www.theguardian.com/x?y", "www.theguardian.com"),
            ("http://User:pw@Example.COM:8080/a@b", "example.com"), (" http://a.b#c ", "a.b"),
            ("http://[2001:db8::1]:8080/x", "[2001:db8::1]"), ("a.b:", "a.b"),
            ("example.org?q=http://x.y", "example.org")):
        assert meco.host(url) == want
    row = {"url": wiki, "topic": "Technology leader"}
    assert meco.describe(row, "full") == ("URL", "en.wikipedia.org/wiki/Bill_Gates")
    assert meco.describe(row, "suffix") == ("URL", "org")
    assert meco.describe(row, "topic") == ("Topic", "Technology leader")
    digest = hashlib.sha256(b"en.wikipedia.org").hexdigest()  # the same in every process
    assert meco.describe(row, "hash") == ("URL", digest[:12])
    top = meco.top_hosts(["http://a.b/1", "http://a.b/2", "c.d", "e.f"], 0.3)
    assert top == {"a.b"}
    assert meco.describe({"url": "c.d"}, "topk", top) == ("URL", "unknown")
    assert meco.describe({"url": "a.b/9"}, "topk", top) == ("URL", "a.b")


def test_meco_documents_by_hand():
    """BOS m m d d EOS: targets are d, d, EOS and nothing else; metadata and text are tokenised
    apart."""
    tokenizer = byte_tokenizer()
    ids, mask = meco.encode(tokenizer, "ab", "x.y")
    assert ids.tolist() == [256, *b"URL: x.y\n\nab", 257]
    assert mask.tolist() == [False] * 11 + [True] * 3
    _, mask = meco.encode(tokenizer, "ab")
    assert mask.tolist() == [False, True, True, True]
    document = meco.join([0], [7, 7], [8, 9], [1])
    batch = meco.as_batch([[document]])
    assert batch.tokens.tolist() == [0, 7, 7, 8, 9, 1]
    assert batch.targets.tolist() == [-100, -100, 8, 9, 1, -100]
    assert meco.prompt(tokenizer, "ab", "x.y") == ids[:-1].tolist()
    assert meco.prompt(tokenizer, "ab") == [256, *b"ab"]
    with pytest.raises(ValueError, match="has no host"):
        meco.prompt(tokenizer, "ab", "http://")
    vocab = {bytes([i]): i for i in range(256)} | {b"\n\n": 256, b"\n\na": 257}
    merging = Tokenizer(model_file.ByteBPE(vocab, [b"\n\n", b"\n\na"], r"(?s:.{1,32})"))
    assert merging.encode("\n\na") == [257]
    ids, _ = meco.encode(merging, "a", "x")
    assert ids.tolist()[-2:] == [256, ord("a")]


def test_meco_packs_whole_rows_and_leaks_nothing():
    """A document appears once, in order; only a sequence's last one may be cut; none sees
    another."""
    rng, docs = np.random.default_rng(0), []
    for i in range(40):
        metadata, n = [1] * rng.integers(0, 9), rng.integers(1, 30)
        docs.append(meco.join([0], metadata, [2 + i] * n, [1]))
    rows, whole = list(meco.pack(docs, 16)), iter(docs)
    for row in rows:
        assert sum(len(ids) for ids, _ in row) == 16
        for i, (document, want) in enumerate(zip(row, whole), 1):
            n = len(document[0])
            assert same(document, [x[:n] for x in want])
            assert n == len(want[0]) or i == len(row)
    model, row = small(), next(row for row in rows if len(row) > 1)
    batch = meco.as_batch([row])
    first, changed = int(batch.cu_seqlens[1]), batch.tokens.clone()
    changed[first - 1] = 5
    logits, other = (model(t, causal(batch.cu_seqlens)) for t in (batch.tokens, changed))
    assert torch.equal(logits[first:], other[first:])
    assert not torch.equal(logits[:first], other[:first])
    for a, b in itertools.pairwise(batch.cu_seqlens.tolist()):
        close(logits[a:b], model(batch.tokens[a:b]), 1e-6)


def pages(n, n_host=5):
    """Documents that repeat their number, of three digits."""
    return [{"text": f"{i:03d} " * 9, "url": f"https://s{i % n_host}.org/x"} for i in range(n)]


def url_data(rows, n_seq=2, n_exams=10, **settings):
    args = types.SimpleNamespace(seq_len=64, batch=n_seq, eval_seqs=n_exams, seed=0)
    return meco.UrlData(rows, byte_tokenizer(), meco.MeCo.Config(**settings), args)


def text_of(*ids):
    return byte_tokenizer().decode(torch.cat(ids))


def numbers(text):
    return set(re.findall(r"\b\d{3}\b", text))


def test_meco_phases_have_documents_of_their_own():
    """A metadata phase, then a cooldown on other documents, whatever the mode; the exams' documents
    are in neither and have the same scored tokens in all conditions."""
    data = url_data(pages(100), cooldown=0.3)
    found = {False: set(), True: set()}
    for (cooldown, _), packs in data.packs.items():
        for row in packs:
            found[cooldown] |= numbers(text_of(*(ids for ids, _ in row)))
    held = [text_of(exam["none"][0])[7:10] for exam in data.exams]
    assert len(found[False]) > len(found[True]) > 0
    assert not found[False] & found[True] and not (found[False] | found[True]) & set(held)
    for document in data.exams:
        scored = [ids[mask].tolist() for ids, mask in document.values()]
        assert scored[0] == scored[1] == scored[2]
        assert len({text_of(ids) for ids, _ in document.values()}) == 3
    for mode, n_url in (("meco", 7), ("url", 10), ("standard", 0)):
        method = meco.MeCo(small(), meco.MeCo.Config(mode, cooldown=0.3))
        texts = [text_of(method.batch(data, i, i, 10).tokens) for i in range(10)]
        urls = ["URL: s" in text for text in texts]
        assert urls == [True] * n_url + [False] * (10 - n_url)
        for i, text in enumerate(texts):
            assert numbers(text) <= found[i >= 7]
    method = meco.MeCo(small(), meco.MeCo.Config("mix", cooldown=0.3))
    counting = types.SimpleNamespace(n_seq=1000, seed=0, batch=lambda i, n, cooldown: n)
    assert 650 < method.batch(counting, 0, 0, 10) < 750


@pytest.mark.parametrize("mode, n_seq", [("url", 2), ("standard", 3)])
def test_shuffled_epochs_cover_every_pack_once(mode, n_seq):
    data = url_data(pages(60), n_seq, mode=mode, cooldown=0.0)
    packs = data.packs[False, mode == "url"]
    want = sorted(text_of(*(ids for ids, _ in row)) for row in packs)
    method, seen = meco.MeCo(small(), meco.MeCo.Config(mode, cooldown=0.0)), []
    for i in range(len(packs)):
        tokens = method.batch(data, i, i, len(packs)).tokens
        seen += [text_of(part) for part in tokens.split(64)]
    for start in range(0, len(seen), len(packs)):
        assert sorted(seen[start:start + len(packs)]) == want
    assert seen[:len(packs)] not in (want, seen[len(packs):2 * len(packs)])


def test_conditioned_losses_by_hand():
    """The mean over scored tokens, of all and of each document's first ones."""
    model, data = small(vocab_size=258), url_data(pages(40), n_exams=3)
    losses = meco.conditioned_losses(model, data.exams, 5)
    for name in ("none", "right", "wrong"):
        every, early = [], []
        for document in data.exams:
            ids, mask = document[name]
            nll = -model(ids[:-1]).float().log_softmax(-1)
            scored = nll.gather(1, ids[1:, None])[mask[1:], 0].tolist()
            every, early = every + scored, early + scored[:5]
        assert losses[name] == pytest.approx(np.mean(every), rel=1e-5)
        assert losses[name + ", first 5"] == pytest.approx(np.mean(early), rel=1e-5)


def test_meco_trains_on_pages(workshop, monkeypatch, capsys):
    """The loss falls, with and without metadata; the model continues a text of an invented host;
    what cannot be learned from is refused."""
    write_rows("d.jsonl", pages(100))
    line = "--method meco --data d.jsonl --seq_len 64 --steps 20 --eval_seqs 6 --cooldown 0.5"
    rows = trained(capsys, line + " --beside meco:mode=standard")
    assert list(rows["before"])[:3] == ["none", "right", "wrong"]
    for name, column in (("meco", "none"), ("meco", "right"), ("meco:mode=standard", "none")):
        assert rows[name][column] < rows["before"][column]
    command = "meco.py --model out/meco --prompt 1 --prefix_host x.org --max_new_tokens 2"
    monkeypatch.setattr("sys.argv", command.split())
    meco.main()
    for bad, words in (("--data stdlib", 'expected a "text" and a "url"'),
                       ("--metadata topic", "line 1.*topic"), ("--seq_len 100000", "do not fill")):
        with pytest.raises(ValueError, match=words):
            train.main(f"{line} {bad} --out_dir bad".split())
    with pytest.raises(ValueError, match="the same metadata"):
        url_data(pages(60, n_host=1))


def test_site_tables_teach_what_they_should(workshop, capsys):
    """Values follow the document's table; loss with the right URL falls, wrong URLs mislead, and a
    URL steers."""
    data = meco.SiteData(seed=3)
    batch = data.batch(0, 16)
    for a, b in itertools.pairwise(batch.cu_seqlens.tolist()):
        bos, *doc = batch.tokens[a:b].tolist()
        assert bos == meco.BOS
        for key, value in zip(doc[3::2], doc[4::2]):
            if value >= meco.VALUE:
                table = data.tables[doc[1] - meco.SITE]
                assert table[key - meco.KEY] == value - meco.VALUE
    for document in data.exams:
        for ids, mask in document.values():
            assert ids[mask].min() >= meco.VALUE and mask.sum() == 6
    row = trained(capsys, "--method meco --mode url --steps 60")["meco"]
    assert row["right"] < 0.5 < 2 < row["wrong"]
    assert row["obeys, with URL"] > 0.7 > 0.4 > row["obeys, without"]


# --- PTP -----------------------------------------------------------------------------------------

def shape_of(pixels):
    return "\n".join("".join(".#"[x] for x in row) for row in pixels.tolist())


def small_reader(kind=ptp.ScreenshotLM, columns=2, lines=1, **changes):
    """A ScreenshotLM or PTP in float64 whose patches are 12 x 8 pixels a line."""
    screen = ptp.Screen(columns, lines)
    config = small(**changes).config
    more = (2, 1) if kind is ptp.PTP else ()
    return kind(config, screen, *more).double().init_weights(0)


def test_glyphs_are_what_they_should_be():
    font = ptp.own_font()
    assert list(font.cells) == [chr(i) for i in range(32, 127)]
    assert len({cell.tobytes() for cell in font.cells.values()}) == 95
    assert shape_of(font.cell("R")) == (
        "####..\n#...#.\n#...#.\n####..\n#.#...\n#..#..\n#...#.\n......")
    assert shape_of(font.cell("é")) == (
        "#####.\n#...#.\n#...#.\n#...#.\n#...#.\n#...#.\n#####.\n......")
    assert ptp.without_glyph("a é\n\té", font) == {"é": 2}


@pytest.mark.parametrize("columns,lines", [(1, 1), (2, 1), (4, 4), (3, 2)])
def test_a_text_is_cut_into_patches(columns, lines):
    """Character k stands in patch k // (lines columns), piece after piece; the rest is paper."""
    text = "It was: a\nbig one"
    patches, height, width = ptp.render(text, columns=columns, lines=lines)
    font, text = ptp.own_font(), text.replace("\n", "//")
    assert (height, width) == (8 * lines, 6 * columns)
    each = columns * lines
    assert len(patches) == math.ceil(len(text) / each)
    for k, character in enumerate(text.ljust(len(patches) * each)):
        row, column = divmod(k % each, columns)
        cell = patches[k // each].view(height, width)[8 * row:, 6 * column:][:8, :6]
        assert torch.equal(cell, torch.from_numpy(font.cell(character)).float())
    assert len(ptp.render("")[0]) == 0
    picture = ptp.Screen(columns, lines).picture(text)
    assert torch.equal(picture[:-1], patches) and picture[-1].all()
    pixels = ptp.image(patches, (height, width), per_row=3)
    tiles = pixels.view(-1, height + 1, 3, width + 1)[:, :-1, :, :-1].transpose(1, 2)
    assert torch.equal(tiles.reshape(-1, height * width)[:len(patches)], patches)


def test_layouts():
    """words: equal words give equal patches, wherever they stand; proportional: the line is as long
    as the characters' own widths."""
    words = ptp.Screen(2, 1, "words")
    one, both = words.draw(" cat"), words.draw("a big cat cat")
    assert len(both) == 1 + 2 + 2 + 2
    assert (both[-2:] == one).all() and (both[-4:-2] == one).all()
    assert words.draw("").shape == (0, 96)
    text, font = "ill, WIDE", ptp.own_font()
    width = sum(ptp.trimmed(font.cell(c)).shape[1] for c in text)
    assert ptp.trimmed(font.cell("l")).shape[1] == 4 and ptp.trimmed(font.cell(" ")).shape[1] == 3
    assert len(ptp.Screen(2, 1, "proportional").draw(text)) == math.ceil(width / 12)


def psf(version, cells, names):
    """The bytes of a PC screen font."""
    n, height, width = cells.shape
    rows = np.packbits(cells, axis=2).tobytes()
    if version == 1:
        table = b"".join(name.encode("utf-16-le") + b"\xff\xff" for name in names)
        return bytes([0x36, 0x04, 2, height]) + rows + table
    head = struct.pack("<7I", 0, 32, 1, n, len(rows) // n, height, width)
    return b"\x72\xb5\x4a\x86" + head + rows + b"".join(x.encode() + b"\xff" for x in names)


@pytest.mark.parametrize("version,width", [(1, 8), (2, 8), (2, 12)])
def test_screen_fonts_are_read(version, width, tmp_path):
    cells = np.random.default_rng(0).integers(0, 2, (256, 5, width), np.uint8)
    names = [chr(0x3b1 + i) for i in range(256)]
    names[3] = "Aé"  # one picture for two characters
    data = psf(version, cells, names)
    for i, written in enumerate((data, gzip.compress(data))):
        (tmp_path / str(i)).write_bytes(written)
        font = ptp.read_psf(tmp_path / str(i))
        assert font[:2] == (5, width) and len(font.cells) == 257
        assert all((font.cells[c] == cells[i]).all() for i, name in enumerate(names) for c in name)


@pytest.mark.parametrize("data", [
    b"", b"no font", b"\x36\x04\x00\x10short", b"\x1f\x8bno gzip", b"\x72\xb5\x4a\x86short",
    psf(2, np.ones((3, 5, 8), int), "abc")[:-9]])
def test_what_is_no_screen_font_is_refused(data, tmp_path):
    (tmp_path / "font").write_bytes(data)
    with pytest.raises(ValueError, match="not a PSF font"):
        ptp.read_psf(tmp_path / "font")


def test_a_png_holds_its_pixels(tmp_path):
    pixels = torch.rand(5, 7)
    ptp.write_png(tmp_path / "x.png", pixels, scale=2)
    data = (tmp_path / "x.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:24] == b"IHDR" + struct.pack(">2I", 14, 10)
    start = data.index(b"IDAT") + 4
    rows = np.frombuffer(zlib.decompress(data[start:]), np.uint8).reshape(10, 15)
    assert not rows[:, 0].any()
    assert (rows[::2, 1::2] == (255 * (1 - pixels)).byte().numpy()).all()
    assert (rows[1::2, 2::2] == rows[::2, 1::2]).all()


def test_patch_loss():
    """Of standardised patches; brightness and contrast do not matter; paper is finite."""
    x = torch.rand(6, 40, dtype=torch.float64)
    z = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-6).sqrt()
    close(ptp.standardised(x), z, 1e-12)
    close(ptp.standardised(3 * x + 2), z, 1e-4)
    assert ptp.patch_loss(z, x) < 1e-12
    drawn = torch.randn(6, 40)
    close(ptp.patch_loss(drawn, x), (drawn - z).square().mean(), 1e-6)
    paper = torch.ones(2, 40)
    assert ptp.patch_loss(torch.zeros(2, 40), paper) == 0
    assert ptp.patch_loss(drawn[:0], x[:0]) == 0


def test_span_mask_leaves_out_what_it_should():
    """Exactly so many; runs of 1 to 6 where there is room."""
    rng = np.random.default_rng(0)
    for n, share in ((1, 0.0), (1, 1.0), (7, 0.5), (40, 0.9), (60, 1.0), (3, 0.1)):
        assert ptp.span_mask(n, share, rng).sum() == round(share * n)
    lengths = collections.Counter()
    for _ in range(50):
        out = ptp.span_mask(511, 0.1, rng)
        assert out.sum() == 51
        runs = [len(list(run)) for is_out, run in itertools.groupby(out) if is_out]
        lengths.update(runs)
    assert max(lengths) <= 6
    spread = [lengths[i] / lengths.total() for i in range(1, 7)]  # the last span is cut short
    assert np.abs(np.array(spread) - (0.2, 0.2, 0.2, 0.2, 0.1, 0.1)).max() < 0.05


def test_masked_text():
    """A quarter of the tokens, neighbours merged; the labels are not touched."""
    tokenizer, rng = byte_tokenizer(), np.random.default_rng(0)
    ids = tokenizer.encode("abcdefghij" * 1000)
    text = ptp.mask_text(ids, tokenizer, 0.25, rng)
    assert "<mask> <mask>" not in text
    left = len(text.replace(" <mask>", ""))
    assert abs(left / len(ids) - 0.75) < 0.02
    assert ptp.mask_text(ids, tokenizer, 0, rng) == "abcdefghij" * 1000
    assert ptp.mask_text(ids, tokenizer, 1.1, rng) == " <mask>"


# Angles are float32, as a Llama's: what is packed and what stands alone differ by 1e-7.

def slow_attend(causal_):
    """Dense attention over the one sequence there is, a head at a time."""
    def attend(layer, q, k, v):
        out = torch.empty_like(q)
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            scores = q[:, h] @ k[:, g].T / q.shape[2] ** 0.5
            if causal_:
                scores = scores.masked_fill(~torch.ones_like(scores).tril().bool(), -torch.inf)
            out[:, h] = scores.softmax(-1) @ v[:, g]
        return out
    return attend


def slow_page(model, picture, given, text, first=0):
    """A sequence by itself: [first, patches, given, text] as vectors."""
    embed = model.model.embed_tokens
    x = [embed(torch.tensor([first])), model.read(picture), embed(torch.tensor([*given, *text]))]
    return model.hidden(torch.cat(x), slow_attend(True))


def some_pages(model, seed=0, n=4):
    rng, triples = np.random.default_rng(seed), []
    for i in range(n):
        picture = torch.rand(int(rng.integers(1, 6)), model.screen.size, dtype=torch.float64)
        text = rng.integers(61, size=rng.integers(1, 7)).tolist()
        triples.append((picture, [3, 5][:i % 3], text))
    return triples


def test_pages_are_read_like_their_sequences_one_by_one():
    """States, targets, and who predicts what: the last token before the text its first one, and the
    token before a patch the patch."""
    model = small_reader()
    triples = some_pages(model)
    batch = ptp.page(triples, 0)
    states = ptp.states_of(model, batch)
    ends = batch.cu_seqlens.tolist()
    drawn, losses = [], []
    for (picture, given, text), a, b in zip(triples, ends, ends[1:]):
        want = slow_page(model, picture, given, text)
        close(states[a:b], want, 1e-6)
        before = 1 + len(picture) + len(given)
        logits = F.linear(want, model.head).log_softmax(-1)
        losses += [-logits[before - 1 + i, t] for i, t in enumerate(text)]
        drawn += [model.draw(want[i]) for i in range(len(picture))]
    close(cross_entropy(states, model.head, batch.targets), torch.stack(losses).mean(), 1e-6)
    close(model.draw(states[batch.at - 1]), torch.stack(drawn), 1e-6)
    assert (batch.targets != -100).sum() == sum(len(text) for _, _, text in triples)


def test_no_state_knows_what_comes():
    model = small_reader()
    (picture, _, text), = some_pages(model, n=1, seed=3)
    batch = ptp.page([(picture, [], text)], 0)
    states = ptp.states_of(model, batch)
    for i in range(len(picture)):
        changed = picture.clone()
        changed[i] += 1
        other = ptp.states_of(model, ptp.page([(changed, [], text)], 0))
        assert torch.equal(other[:i + 1], states[:i + 1])
        assert ((other - states)[i + 1:].abs().amax(1) > 0).all()
    other = ptp.states_of(model, ptp.page([(picture, [], [t + 1 for t in text])], 0))
    assert torch.equal(other[:len(picture) + 1], states[:len(picture) + 1])


def test_a_page_without_pictures_is_a_llamas():
    model = small_reader()
    batch = ptp.page([(None, [1, 2, 3], [4, 5]), (None, [], [6])], 7)
    assert batch.tokens.tolist() == [7, 1, 2, 3, 4, 5, 7, 6]
    assert batch.targets.tolist() == [-100] * 3 + [4, 5, -100, 6, -100]
    logits = F.linear(ptp.states_of(model, batch), model.head)
    close(logits[:6], slow_llama(model, batch.tokens[:6]), 1e-6)


@pytest.mark.parametrize("lines", [1, 2])
def test_a_read_map_begins_at_least_squares(lines):
    """Weighted ridge regression, a patch at a time; then as spread as the embeddings are."""
    model, tokenizer = small_reader(columns=1, lines=lines, vocab_size=258), byte_tokenizer()
    ptp.start_reading(model, tokenizer)
    rows = []
    for i in range(256):
        for line in range(lines):
            text = " " * line + tokenizer.decode([i])
            embedding = model.model.embed_tokens.weight[i].detach()
            rows += [(torch.from_numpy(patch).double(), embedding, 1 / (i + 10))
                     for patch in model.screen.draw(text)]
    total = sum(w for _, _, w in rows)
    x_mean = sum(w * x for x, _, w in rows) / total
    y_mean = sum(w * y for _, y, w in rows) / total
    xx = sum(w * torch.outer(x - x_mean, x - x_mean) for x, _, w in rows) / total
    xy = sum(w * torch.outer(x - x_mean, y - y_mean) for x, y, w in rows) / total
    best = torch.linalg.inv(xx + 0.01 * xx.trace() / len(xx) * torch.eye(len(xx))) @ xy
    spread = sum(w * (y - y_mean).square().sum() for _, y, w in rows)
    spread /= sum(w * ((x - x_mean) @ best).square().sum() for x, _, w in rows)
    close(model.read.weight, spread.sqrt() * best.T, 1e-3)
    close(model.read(x_mean), y_mean, 1e-4)


def test_what_is_read_aloud_grows():
    """Every token once, behind its own picture: in pieces of 16, at the end in one."""
    method = ptp.Screenshot(small_reader(), ptp.Screenshot.Config(context=40))
    contexts = [list(range(40)), list(range(40, 80))]
    for progress, n in ((0, 16), (0.5, 16), (0.75, 20), (1, 40)):
        pieces = method.to_read([(context, [1]) for context in contexts], progress)
        assert all(a == b for a, b in pieces) and max(len(a) for a, _ in pieces) == n
        assert sum((a for a, _ in pieces), []) == list(range(80))


def test_generation_behind_a_picture():
    """With the cache and chunks as without."""
    model = small_reader()
    picture = torch.rand(9, model.screen.size, dtype=torch.float64)
    prompt, behind = [3, 9, 4], ptp.BehindPicture(model, picture)
    text = []
    for _ in range(6):
        state = slow_page(model, picture, prompt, text)[-1]
        text.append(int((model.head @ state).argmax()))
    tokens = torch.tensor([0] * 10 + prompt)
    for chunk in (None, 1, 4):
        assert generate(behind, tokens, 6, chunk=chunk) == text


def slow_ptp(model, patches, left_out, tokens):
    """(the text's states, drawn patches) of one picture, by dense attention over what is there."""
    enc, painter = model.encoder, model.painter
    positions = torch.tensor([0, *(i + 1 for i in range(len(patches)) if not left_out[i])])
    x = torch.cat((enc.embed_tokens.weight, model.read(patches[~left_out])))
    states = enc(x, slow_attend(False), positions)
    n = len(states)
    x = torch.cat((states, model.model.embed_tokens(tokens)))
    told = Llama.hidden(model, x, slow_attend(True))[n:]
    x = painter.embed_tokens.weight.repeat(len(patches) + 1, 1)
    for state, i in zip(states, positions):
        x[i] = state
    x = painter(x, slow_attend(False), torch.arange(len(x)))
    return told, model.draw(x[1:])


@pytest.mark.parametrize("seed", range(3))
def test_ptp_equals_its_pictures_one_by_one(seed):
    """Pictures of any lengths in one pack, and any patches left out: all, none."""
    model, rng = small_reader(ptp.PTP), np.random.default_rng(seed)
    pictures, outs, texts = [], [], []
    for n, share in ((5, 0.4), (1, 0.0), (8, 1.0), (7, 0.2)):
        pictures.append(torch.rand(n, model.screen.size, dtype=torch.float64))
        outs.append(torch.from_numpy(rng.random(n) < share))
        texts.append(torch.from_numpy(rng.integers(61, size=rng.integers(1, 9))))
    cu = np.cumsum([0, *map(len, pictures)])
    cu_text = np.cumsum([0, *map(len, texts)]).tolist()
    states, places = model.encode(torch.cat(pictures), torch.cat(outs), cu)
    told = model.tell(states, places, torch.cat(texts), cu_text)
    drawn = model.paint(states, places)
    for b, (picture, out, text) in enumerate(zip(pictures, outs, texts)):
        want_told, want_drawn = slow_ptp(model, picture, out, text)
        close(told[cu_text[b]:cu_text[b + 1]], want_told, 1e-6)
        close(drawn[cu[b]:cu[b + 1]], want_drawn, 1e-6)


def test_what_is_left_out_is_not_seen():
    """The batch's text has every label, its picture <mask>; pixels of a patch left out change
    nothing but what is to be painted."""
    model = small_reader(ptp.PTP, vocab_size=258).float()
    method, tokenizer = ptp.Pretraining(model, ptp.Pretraining.Config()), byte_tokenizer()
    texts = [tokenizer.encode("a house, a garden, a boat"), tokenizer.encode("what is it?")]
    batch = method.masked(texts, tokenizer, np.random.default_rng(0))
    assert batch.targets[:len(texts[0])].tolist() == texts[0]
    n_out = [int(out.sum()) for out in batch.left_out.split(np.diff(batch.cu).tolist())]
    assert n_out == [round((n - 1) * 0.1) for n in np.diff(batch.cu)]
    assert not batch.left_out[batch.cu[1:] - 1].any() and batch.patches[batch.cu[1:] - 1].all()
    text, drawn = method.losses(model, batch)
    other = batch.patches.where(~batch.left_out[:, None], torch.rand(()))
    text_too, drawn_too = method.losses(model, batch._replace(patches=other))
    assert text == text_too and drawn != drawn_too


def test_a_reader_overfits():
    """Eight stories whose ends can only be told by those who read their beginnings."""
    data = ptp.Stories(8, seed=1)
    model = ptp.ScreenshotLM(LlamaConfig(data.vocab_size, 2, 4, 4, 64, 128, head_dim=16,
                                         tie_embeddings=True), ptp.Screen(2, 1, "words"))
    method = ptp.Screenshot(model.init_weights(0), ptp.Screenshot.Config(reading=0))
    batch = method.batch(data, 0, 0, 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        loss, parts = method.loss(model, batch, 0, 1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert parts["text"] < 0.1


@pytest.mark.parametrize("kind", [ptp.ScreenshotLM, ptp.PTP])
def test_readers_are_saved_with_how_they_see(kind, tmp_path):
    """Weights, shapes, layout and font; a Llama's folder is refused."""
    cells = np.random.default_rng(0).integers(0, 2, (256, 8, 6), np.uint8)
    (tmp_path / "own.psf").write_bytes(psf(2, cells, [chr(200 + i) for i in range(256)]))
    screen = ptp.Screen(3, 2, "proportional", ptp.read_psf(tmp_path / "own.psf"))
    more = (3, 2) if kind is ptp.PTP else ()
    model = kind(small().config, screen, *more).init_weights(0)
    ptp.save_reader(model, tmp_path / "reader")
    again = ptp.load_reader(tmp_path / "reader")
    assert type(again) is kind and same(again.state_dict().values(), model.state_dict().values())
    assert again.screen[:3] == screen[:3]
    assert torch.equal(again.screen.picture("Ĝó"), screen.picture("Ĝó"))
    save_model(small(), tmp_path / "llama")
    with pytest.raises(ValueError, match="neither a PTP nor a ScreenshotLM"):
        ptp.load_reader(tmp_path / "llama")
    about = json.loads((tmp_path / "reader/config.json").read_text())
    about["ptp" if more else "screenshot"].pop("columns")
    (tmp_path / "reader/config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="unsupported"):
        ptp.load_reader(tmp_path / "reader")


@pytest.mark.parametrize("line,error", [
    ("--seq_len 100", "their own words"), ("--data facts --seq_len 99", "no text to draw"),
    ("--beside lm", "only variants"), ("--eval_seqs 1", "another text's"), ("--rope_base 9", "no"),
    ("--data x --context 62 --seq_len 64", "fewer than 4"), ("--font test_all.py", "not a PSF")])
def test_what_readers_refuse(line, error, workshop):
    for method in ("ptp", "screenshot"):
        with pytest.raises(ValueError, match=error):
            made(f"{method} {line.replace('test_all', HERE + '/test_all')}")


def test_a_trained_reader_goes_on_as_what_it_is(workshop):
    """With the screen that it was trained with, and by its own method."""
    screen = ptp.Screen(3, 1)
    model = ptp.ScreenshotLM(small(vocab_size=258).config, screen).init_weights(0)
    ptp.save_reader(model, "reader")
    text = f"--model reader --data {HERE}/README.md --context 8 --seq_len 16 --columns"
    _, again, _ = made(f"screenshot {text} 3")
    assert same(again.state_dict().values(), model.state_dict().values())
    for line in (f"screenshot {text} 2", f"ptp {text} 3", f"screenshot --from_scratch {text} 3"):
        with pytest.raises(ValueError, match="reader"):
            made(line)


def test_glue_files_are_read(tmp_path):
    """As GLUE ships them: columns by name, quotation marks as they are."""
    rows = ["index\t#1 String\t#2 String\tQuality"]
    rows += [f'{i}\tHe said "yes" {i}\tNo.\t{i % 2}' for i in range(6)]
    path = tmp_path / "dev.tsv"
    path.write_text("\n".join(rows) + "\n")
    texts, labels, names = ptp.read_glue(path)
    assert texts[1] == 'He said "yes" 1\nNo.' and labels == [0, 1] * 3 and names == ["0", "1"]
    for bad in (["a\tb", *rows[1:]], rows[:3], [*rows, "7\tcut"], rows[:1] + rows[1:7:2]):
        path.write_text("\n".join(bad))
        with pytest.raises(ValueError, match="dev.tsv"):
            ptp.read_glue(path)


def test_bag_of_words_and_cross_validation():
    """Naive Bayes by its definition; every text is classified once, by the others."""
    texts = ["good good bad", "good", "bad bad", "bad awful"]
    classify = ptp.bag_of_words(texts, [1, 1, 0, 0])
    p1 = math.log(1 / 2 * (3 + 1) / (4 + 3) * (0 + 1) / (4 + 3))
    p0 = math.log(1 / 2 * (0 + 1) / (4 + 3) * (1 + 1) / (4 + 3))
    assert p1 > p0 and classify(["good awful"]) == [1]
    assert classify(["bad", "awful awful", "unknown good"]) == [0, 0, 1]
    seen = []

    def fit(texts, labels):
        assert labels == [int(text) % 2 for text in texts]
        seen.append(set(texts))
        return lambda others: [0 if text in seen[-1] else int(text) // 4 % 2 for text in others]
    texts = [str(i) for i in range(11)]
    found = ptp.cross_validated(fit, texts, [i % 2 for i in range(11)])
    assert found == sum(i // 4 % 2 == i % 2 for i in range(11)) / 11
    assert [len(x) for x in seen] == [8, 9, 9, 9, 9]


# --- Hamiltonians --------------------------------------------------------------------------------

def turns(n, seed=0):
    return hamiltonian.random_turns(n, np.random.default_rng(seed))


def sphere(degree):
    """(unit vectors, weights) that integrate polynomials up to `degree` over the sphere exactly."""
    z, w = np.polynomial.legendre.leggauss(degree // 2 + 1)
    angle = 2 * np.pi * np.arange(degree + 1) / (degree + 1)
    flat = np.sqrt(1 - z ** 2)[:, None]
    u = np.stack([flat * np.cos(angle), flat * np.sin(angle), z[:, None] + 0 * angle], -1)
    weights = np.repeat(w / 2 / len(angle), len(angle))
    return torch.from_numpy(u.reshape(-1, 3)), torch.from_numpy(weights)


def test_harmonics_are_orthonormal():
    u, w = sphere(8)
    y = torch.cat([hamiltonian.harmonics(l, u) for l in range(5)], 1)  # (.., 25)
    close(y.T @ (w[:, None] * y), torch.eye(25), 1e-12)
    close(hamiltonian.harmonics(1, u), 3 ** 0.5 * u[:, [1, 2, 0]], 1e-12)
    close(hamiltonian.harmonics(2, u)[:, 2], 5 ** 0.5 * (3 * u[:, 2] ** 2 - 1) / 2, 1e-12)


@pytest.mark.parametrize("l", range(5))
def test_wigner_matrices(l):
    """Orthogonal, a homomorphism, and the trace that every book has."""
    one = torch.eye(2 * l + 1)
    for R, S in zip(turns(3), turns(3, seed=1)):
        D = hamiltonian.wigner(l, R)
        close(D @ D.T, one, 1e-10)
        close(hamiltonian.wigner(l, R @ S), D @ hamiltonian.wigner(l, S), 1e-10)
        angle = math.acos((R.trace().item() - 1) / 2)
        want = math.sin((l + 0.5) * angle) / math.sin(angle / 2)
        assert abs(D.trace().item() - want) < 1e-9
        close(hamiltonian.wigner(l, -R), (-1) ** l * D, 1e-10)
    close(hamiltonian.wigner(l, torch.eye(3)), one, 1e-10)


def test_clebsch_gordan_coefficients():
    """Orthonormal, and covariant under turns that were not used to find them."""
    for a, b, c in itertools.product(range(3), repeat=3):
        if not abs(a - b) <= c <= a + b:
            with pytest.raises(ValueError, match="no product"):
                hamiltonian.clebsch_gordan(a, b, c)
            continue
        C = hamiltonian.clebsch_gordan(a, b, c)
        close(torch.einsum("abk,abl->kl", C, C), torch.eye(2 * c + 1), 1e-10)
        for R in turns(2, seed=9):
            A, B, D = (hamiltonian.wigner(l, R) for l in (a, b, c))
            turned = torch.einsum("ai,bj,ijk->abk", A, B, C)
            close(turned, torch.einsum("abk,kc->abc", C, D), 1e-9)
        first = C[C.abs() > 0.99 * C.abs().max()][0]  # the sign must not hang on rounding
        assert first > 0
    for l in range(3):
        close(hamiltonian.clebsch_gordan(0, l, l)[0], torch.eye(2 * l + 1), 1e-10)


WATER = hamiltonian.Orbitals({1: [0], 8: [0, 0, 1]})


def test_orbitals_and_the_parts_of_blocks():
    """Slots hold every species' shells; every block is the sum of its parts, which are
    orthonormal."""
    assert WATER.slots == [0, 0, 1] and WATER.places == [[0], [0, 1, 2, 3, 4]]
    assert hamiltonian.Orbitals({6: [0, 1, 0], 3: [2, 1]}).places == [
        [5, 6, 7, 8, 9, 2, 3, 4], [0, 2, 3, 4, 1]]
    parts, flips = WATER.frames()
    basis = parts.flatten(2).flatten(0, 1)  # (K M, n n)
    basis = basis[basis.norm(dim=1) > 0]
    close(basis @ basis.T, torch.eye(25), 1e-6)
    antisymmetric = parts[flips == 1].sum(1)  # only two p shells have such parts
    assert len(antisymmetric) == 1 and not antisymmetric[:, :2].any()
    close(antisymmetric, -antisymmetric.transpose(1, 2), 1e-6)


def test_tight_binding_data_turn_with_their_cluster():
    """Turns, mirrors, shifts, exchanged atoms; a pair along z mixes s with p_z alone."""
    data, rng = hamiltonian.TightBinding(1, 0), np.random.default_rng(3)
    positions, species = data.cluster(rng), np.array([0, 1, 1, 0, 1])
    h = data.matrix(positions, species)
    assert np.abs(h - h.T).max() < 1e-13
    for R in (*turns(2), -turns(1)[0]):
        D = torch.block_diag(*[data.orbitals.turn(R)] * 5).numpy()
        close(torch.from_numpy(data.matrix(positions @ R.numpy().T + 3, species)),
              torch.from_numpy(D @ h @ D.T), 1e-12)
    order = rng.permutation(5)
    exchanged = data.matrix(positions[order], species[order]).reshape(5, 4, 5, 4)
    assert np.abs(exchanged - h.reshape(5, 4, 5, 4)[order][:, :, order]).max() < 1e-13
    pair = data.matrix(np.array([[0, 0, 0], [0, 0, 2.0]]), np.array([0, 1])).reshape(2, 4, 2, 4)
    block = pair[0, :, 1]
    there = np.zeros((4, 4), bool)
    there[[0, 0, 2, 1, 2, 3], [0, 2, 0, 1, 2, 3]] = True  # ss, s z, z s, pi, sigma, pi
    assert (np.abs(block) > 1e-9).tolist() == there.tolist()
    assert block[1, 1] == block[3, 3] < 0 < block[2, 2] and block[0, 2] == -block[2, 0]


def random_molecules(orbitals=WATER, sizes=(3, 1, 4), seed=0):
    """(positions, species, cu_seqlens), float64."""
    rng, n = np.random.default_rng(seed), sum(sizes)
    positions = torch.from_numpy(rng.uniform(-2, 2, (n, 3)))
    species = torch.from_numpy(rng.integers(len(orbitals.species), size=n))
    return positions, species, torch.tensor([0, *itertools.accumulate(sizes)])


def stages(kind, seed=0, orbitals=WATER):
    """Stage 1, or both: free, strict. All weights random."""
    model = hamiltonian.Covariant(orbitals, channels=4)
    if kind != "first":
        model = hamiltonian.GraphTransformer(model, kind == "strict", n_embd=16, heads=2)
    model.init_weights(seed)
    if kind != "first":
        nn_init = torch.Generator().manual_seed(seed)
        model.pair[2].weight.data.normal_(std=0.1, generator=nn_init)
    first = hamiltonian.first_stage(model)
    levels = torch.block_diag(*(torch.eye(2 * l + 1) * (l + 1) for l in orbitals.slots))
    first.mean += levels * orbitals.exists[:, None]
    return model.double()


@pytest.mark.parametrize("kind", ["first", "strict"])
def test_covariant_by_construction(kind):
    """Turned, mirrored or shifted molecules have turned blocks; exchanged atoms exchanged ones."""
    model, (positions, species, cu) = stages(kind), random_molecules()
    blocks = model(positions, species, cu)
    for R in (*turns(2), -turns(1)[0]):
        D = WATER.turn(R)
        close(model(positions @ R.T + 5, species, cu), D @ blocks @ D.T, 1e-7)
    assert blocks.abs().mean() > 0.05
    order = torch.tensor([2, 0, 1, 3, 7, 5, 6, 4])
    exchanged = model(positions[order], species[order], cu)
    pairs = hamiltonian.Pairs.of(cu)
    place = {(i, j): p for p, (i, j) in enumerate(zip(pairs.i.tolist(), pairs.j.tolist()))}
    there = [place[int(order[i]), int(order[j])] for i, j in place]
    close(exchanged, blocks[there], 1e-10)


@pytest.mark.parametrize("kind", ["first", "strict", "free"])
def test_molecules_of_a_pack_are_apart(kind):
    """Each is as if alone; blocks are hermitian, and 0 where an atom lacks the orbital."""
    model, (positions, species, cu) = stages(kind), random_molecules()
    blocks, ends, found = model(positions, species, cu), cu.tolist(), []
    for a, b in zip(ends, ends[1:]):
        alone = model(positions[a:b], species[a:b], torch.tensor([0, b - a]))
        found.append(alone)
        whole, = hamiltonian.matrices(alone, species[a:b], [0, b - a], WATER)
        assert len(whole) == sum([1, 5][kind] for kind in species[a:b])
        close(whole, whole.T, 1e-12)
        assert (alone != 0).sum() <= whole.numel()
    close(blocks, torch.cat(found), 1e-10)


def test_the_free_stage_learns_covariance_at_best():
    """At its start it is stage 1, bit for bit; then a turn changes what it says."""
    model, (positions, species, cu) = stages("free"), random_molecules()
    R = turns(1)[0]
    D = WATER.turn(R)

    def error():
        return (model(positions @ R.T, species, cu) - D @ model(positions, species, cu) @ D.T).abs()
    assert error().max() > 1e-3
    torch.nn.init.zeros_(model.pair[2].weight)
    assert torch.equal(model(positions, species, cu), model.first(positions, species, cu))
    strict = hamiltonian.GraphTransformer(model.first, True).double().init_weights(1)
    assert torch.equal(strict(positions, species, cu), model.first(positions, species, cu))


def test_distance_in_attention_is_a_bias():
    """Five more columns of q and k, against scores - s |r_i - r_j|^2 written out."""
    rng, cu = torch.Generator().manual_seed(0), [0, 4, 5, 12]
    q, k, v = (torch.randn(12, 2, 16, generator=rng, dtype=torch.float64) for _ in range(3))
    r, sharpness = torch.randn(12, 3, generator=rng).double(), torch.tensor([0.3, 2.0]).double()
    out = hamiltonian.attention_by_distance(q, k, v, r, sharpness, cu)
    for a, b in zip(cu, cu[1:]):
        far = (r[a:b, None] - r[a:b]).square().sum(-1)
        scores = torch.einsum("ihd,jhd->hij", q[a:b], k[a:b]) / 4 - sharpness[:, None, None] * far
        want = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[a:b])
        close(out[a:b], want, 1e-10)


def test_training_keeps_what_is_built_in(workshop, monkeypatch):
    """After training: float32, 1e-4 of the mean |H|; a frozen stage 1 is not touched."""
    for line, stays in (("--strict", True), ("--no-joint", False), ("--stages 1", True)):
        method, model, data = made(f"hamiltonian --batch 4 --eval_seqs 8 {line}")
        first = hamiltonian.first_stage(model)
        start = {name: p.clone() for name, p in first.state_dict().items()}
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for step in range(20):
            method.loss(model, method.batch(data, step, 15, 20), 15, 20)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        found = method.evaluate(model, data)
        assert (found["covariance"] < 1e-4 * 1000 * data.test.blocks.abs().mean()) == stays
        unchanged = same(first.state_dict().values(), start.values())
        assert unchanged == (line == "--no-joint")


def test_energies_are_those_of_h_and_s():
    batch, rng = random_molecules(seed=2), np.random.default_rng(0)
    positions, species, cu = batch
    blocks = stages("first")(positions, species, cu).detach()
    pairs = hamiltonian.Pairs.of(cu)
    overlap = 0.02 * blocks + (pairs.i == pairs.j)[:, None, None] * torch.eye(5)
    both = hamiltonian.Structures(species, cu, positions, blocks, overlap, torch.ones(3))
    found, want = hamiltonian.energies(blocks, both, WATER), []
    for h, s in zip(*(hamiltonian.matrices(x, species, cu, WATER) for x in (blocks, overlap))):
        want += sorted(torch.linalg.eigvals(torch.linalg.solve(s, h)).real.tolist())
    close(torch.cat(found), torch.tensor(want, dtype=torch.float64), 1e-8)


def write_molecules(path, order="xyz", cut=0, shells=None, wrong=False, **tensors):
    """Two waters, and the first one turned, in an order of p orbitals; made by a random stage 1."""
    model, R = stages("first"), turns(1)[0]
    positions = torch.tensor([[0, 0, 0], [0.9, 0.2, 0], [-0.3, 0.9, 0.1]]).double()
    species, cu = torch.tensor([1, 0, 0]), torch.tensor([0, 3])
    all_positions = positions, positions * 1.1, positions @ R.T
    h, s = [], []
    for r in all_positions:
        whole, = hamiltonian.matrices(model(r, species, cu).detach(), species, cu, WATER)
        where = [0, 1, *([4, 2, 3] if (order == "xyz") != wrong else [2, 3, 4]), 5, 6]
        whole = whole[where][:, where]
        i, j = torch.triu_indices(7, 7)
        h.append(whole[i, j])
        s.append((whole * 0.01 + torch.eye(7))[i, j])
    written = {"species": torch.tensor([8, 1, 1] * 3), "positions": torch.cat(all_positions),
               "cu_seqlens": torch.tensor([0, 3, 6, 9]), "n_occupied": torch.tensor([5, 5, 5]),
               "h": torch.cat(h)[cut:], "s": torch.cat(s)[cut:], "rotation": R} | tensors
    about = {"order": order, "shells": json.dumps(shells or {"8": [0, 0, 1], "1": [0]})}
    save_file({k: v.contiguous() for k, v in written.items() if v is not None}, path, about)


def test_files_of_molecules_are_read_and_tested(tmp_path):
    """In either order of orbitals, and only if their blocks turn as they must."""
    path = tmp_path / "x.safetensors"
    found = []
    for order in ("xyz", "yzx"):
        write_molecules(path, order)
        orbitals, molecules = hamiltonian.read_molecules(path)
        assert orbitals.slots == [0, 0, 1] and len(molecules) == 2
        found.append(molecules)
    for one, other in zip(*found):
        assert same(one, other)
    assert molecules[0].tokens.tolist() == [1, 0, 0] and molecules[0].n_occupied.tolist() == [5]
    bad = [dict(wrong=True), dict(cut=1), dict(shells={"8": [0, 1], "1": [0]}), dict(species=None),
           dict(order="zyx"), dict(shells={"8": [0, 0, 1]}), dict(n_occupied=torch.tensor([5])),
           dict(h=torch.full((84,), math.nan))]
    for settings in bad:
        write_molecules(path, **settings)
        with pytest.raises(ValueError, match="x.safetensors"):
            hamiltonian.read_molecules(path)


@pytest.mark.parametrize("kind", ["first", "strict", "free"])
def test_stages_are_saved_and_read(kind, tmp_path):
    model = stages(kind).float()
    hamiltonian.save_stages(model, tmp_path)
    again = hamiltonian.load_stages(tmp_path)
    positions, species, cu = random_molecules()
    assert torch.equal(again(positions.float(), species, cu), model(positions.float(), species, cu))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no model of Hamiltonians"):
        hamiltonian.load_stages(tmp_path)


# --- Locret --------------------------------------------------------------------------------------

def test_locret_learns(tmp_path):
    """The scorer's loss falls, the model is left as it is, the file gives the scorer back."""
    model, config = small().float(), evict.LocretTraining.Config(hidden=32, n_answer=8)
    method, again = (evict.LocretTraining(model, config, seed=1) for _ in range(2))
    assert same(method.parameters(), again.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    tokens, = token_lists(0, 40)
    optimizer, losses = torch.optim.AdamW(method.parameters(), lr=3e-3), []
    for _ in range(60):
        loss, _ = method.loss(model, collate([tokens, tokens[:5]]), 0, 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    path, = method.save(model, tmp_path)
    assert same(evict.load_scorer(path, model).parameters(), method.parameters())
    with pytest.raises(ValueError, match="layers"):
        evict.load_scorer(path, small(n_layer=2))
    with pytest.raises(ValueError, match="no document is longer"):
        method.loss(model, collate([tokens[:8]]), 0, 1)


def test_locret_by_definition():
    """One layer: each token's score comes from its q, k, v before RoPE; the loss compares it with
    the largest logit that a query of the answer gives it, and with its neighbours."""
    model, (tokens,) = small(n_layer=1).float(), token_lists(0, 40)
    config = evict.LocretTraining.Config(hidden=32, n_answer=8)
    method, block = evict.LocretTraining(model, config), model.model.layers[0]
    h = block.input_layernorm(model.model.embed_tokens(tokens))
    q, k, v = heads(block.self_attn, h, h)
    qkv = torch.cat((q, k, v), 1).flatten(1)
    scores = method.scorer.layers[0](qkv)  # (40, 2)
    turn = rope(model.config, torch.arange(40), h.dtype)
    answer, keys = rotate(q, *turn)[32:], rotate(k, *turn)[:32]
    keys = keys.repeat_interleave(3, 1)
    logits = torch.einsum("rhd,nhd->rhn", answer, keys) / 8 ** 0.5
    largest = logits.amax(0).view(2, 3, 32).amax(1).T  # (32, 2)
    want = torch.nn.functional.smooth_l1_loss(scores[:32], largest)
    want += 0.0025 * scores[:32].diff(dim=0).square().mean()
    loss, _ = method.loss(model, collate([tokens]), 0, 1)
    close(loss, want, 1e-6)
    cache = evict.make_cache(model, "locret", budget=99, scorer=method.scorer)
    generate(model, tokens, 1, cache=cache)
    notes = cache.buffers[0][3][cache.stored(0, [0, 1])]
    close(notes, scores.T, 1e-4)


def test_locret_keeps_by_its_scores():
    """A score does not depend on what follows; the prompt's tail is kept until its end, and
    decoding evicts nothing."""
    model, (tokens,) = small().float(), token_lists(0, 40)
    scorer, notes = evict.LocretScorer(model.config, 32), []
    for n in (20, 40):
        cache = evict.make_cache(model, "locret", budget=99, scorer=scorer)
        generate(model, tokens[:n], 1, cache=cache)
        stored = [cache.stored(layer, [0, 1])[:, :20] for layer in range(3)]
        notes.append([buffer[3][slots] for buffer, slots in zip(cache.buffers, stored)])
    for short, long in zip(*notes):
        assert short.all()
        close(short, long, 1e-4)
    cache = evict.make_cache(model, "locret", budget=10, scorer=scorer, chunk=8, obs_window=4)
    for final, tail in ((False, 4), (True, 0)):
        step = types.SimpleNamespace(final=final, decoding=False)
        assert cache.rules[0][0].recent(step, 10) == tail
    generate(model, tokens, 5, cache=cache)  # the fifth is not fed
    for layer, head in itertools.product(range(3), range(2)):
        positions = cache.positions(layer, head).tolist()
        assert len(positions) == 14 and positions[-4:] == [40, 41, 42, 43]


# --- the house -----------------------------------------------------------------------------------

LEVELS = [["attention_triton"], ["model"], ["prulong", "evict", "cepe", "meco", "vlorp", "ptp",
           "hamiltonian"], ["eval_tasks"], ["train"], ["footprint"], ["test_all"]]
INSIDE = {("model", "evict"), ("model", "model")}  # imported inside functions


def test_files_import_only_lower_levels():
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    for name, own in level.items():
        tree = ast.parse(open(os.path.join(HERE, f"{name}.py")).read())
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            for other in names:
                allowed = level.get(other, -1) < own or (name, other) in INSIDE
                assert allowed, f"{name}.py imports {other}"


def test_the_loop_knows_no_technique_by_name():
    names = "prulong|duo|locret|cepe|ceped|meco|vlorp|sft|ptp|hamiltonian"
    pattern = re.compile(rf"(==|!=|\bin)\s*\(?['\"]({names})")
    for file in ("train.py", "model.py", "footprint.py"):
        assert not pattern.search(open(os.path.join(HERE, file)).read()), file


def readme_blocks():
    """name -> code of README's python blocks that begin with `# NAME.py`."""
    text = open(os.path.join(HERE, "README.md")).read()
    blocks = re.findall(r"```python\n# (\w+\.py):.*\n((?:.*\n)*?)```", text)
    return {name: code for name, code in blocks}


def test_readme_examples_run(tmp_path):
    """The technique and the policy of the README, as files of their own."""
    save_model(small(vocab_size=258, eos_ids=(257,)).float(), tmp_path / "m")
    args = {"mine.py": "--method mine --reach 8 --beside lm --steps 2 --eval_seqs 2",
            "third.py": "--model m --tasks niah_s --lengths 700 --examples 1 --policy third "
                        "--keep 0.5 --max_new_tokens 2 --dtype float32"}
    blocks = readme_blocks()
    assert blocks.keys() == args.keys()
    for name, code in blocks.items():
        (tmp_path / name).write_text(code)
        done = script(tmp_path / name, *args[name].split(), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert {"mine.py": "| mine |", "third.py": "| third |"}[name] in done.stdout


@needs_triton
def test_kernels_interpreted(beside):
    done = beside["test_kernels_interpreted"].result()
    assert done.returncode == 0, done.stderr[-3000:]


def test_prulong_beats_random_masks(beside):
    """The claim itself, on the tiny model: 3 of 12 heads recall what 12 do, random ones do not."""
    table = beside["test_prulong_beats_random_masks"].result()
    recall = {name: row["far recall"] for name, row in table.items()}
    assert recall["full cache"] > 0.98 and recall["prulong"] > 0.95 and recall["duo"] > 0.95
    assert recall["mean of 4 random masks"] < 0.6
    assert table["prulong"]["full heads"] == 3
