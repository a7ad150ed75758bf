"""Llama in plain PyTorch: network, techniques' protocol, KV cache, generation, tokenizer, files.

Tokens are packed (N,): there is no batch axis. The network asks one thing of the outside, a
function `attend(layer, q, k, v) -> out`. Causal attention over packed documents, a KV cache and a
technique that learns which heads need their cache are each just another `attend`.

    python model.py --model DIR --prompt "Why is the sky blue?"     # DIR in the Hugging Face layout
    python model.py --model DIR --prompt TEXT --policy snapkv --budget 256
"""
import argparse
import base64
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import heapq
import json
import math
import os
import re
import resource
import sys
import time
import types
import typing
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from attention_triton import attention, decode

# --- configuration -------------------------------------------------------------------------------

SUPPORTED = {  # fields of config.json beside shapes, and the values that this file computes
    "hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,),
    "quantization_config": (), "tie_word_embeddings": (False, True)}
FAMILIES = {  # model_type: the hub's class, and what it has beside a Llama
    "llama": ("LlamaForCausalLM", {}), "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {"qkv_bias": True}),
    "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True})}
ROPE_TYPES = {  # and what each must say
    "default": (), "linear": ("factor",), "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor")}


@dataclass(frozen=True)
class LlamaConfig:
    """Shapes and constants of a Llama. max_seq_len [tokens] is not enforced."""
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    n_ff: int
    head_dim: int
    max_seq_len: int = 2048
    rope_base: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "llama3", "linear" or "yarn", ...}
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False  # q, k and v have one (Qwen2)
    qk_norm: bool = False  # heads of q and k are normed before RoPE (Qwen3)
    window: int = 0  # every layer's sliding window [tokens], 0: none (Mistral 7B v0.1)
    bos_id: int | None = None
    eos_ids: tuple = ()

    @staticmethod
    def from_hf(hf: dict):
        """The config of a hub's config.json. Raises ValueError naming what is unsupported."""
        kind = hf.get("model_type") or "llama"
        if kind not in FAMILIES:
            raise ValueError(f"unsupported model_type {kind!r}: {', '.join(FAMILIES)}")
        architecture, extras = FAMILIES[kind]
        if architecture not in (hf.get("architectures") or [architecture]):
            raise ValueError(f"unsupported architectures {hf['architectures']}")
        for name, values in SUPPORTED.items():
            if hf.get(name) not in (None, *values):
                raise ValueError(f"unsupported {name} = {hf[name]!r}")
        n_embd, n_head = int(hf["hidden_size"]), int(hf["num_attention_heads"])
        n_kv_head = int(hf.get("num_key_value_heads") or n_head)
        head_dim = int(hf.get("head_dim") or n_embd // n_head)
        n_layer, n_ff, vocab_size = (int(hf[name]) for name in (
            "num_hidden_layers", "intermediate_size", "vocab_size"))
        sizes = n_head, n_kv_head, head_dim, n_embd, n_ff, vocab_size
        if not (0 < n_layer < 2 ** 12 and all(0 < size < 2 ** 24 for size in sizes)):
            raise ValueError(f"unsupported sizes {sizes} or {n_layer} layers")
        if n_head % n_kv_head or head_dim % 2:
            raise ValueError(f"unsupported: {n_head} heads of {head_dim}, {n_kv_head} KV heads")
        rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}  # older, newer spelling
        eos = hf.get("eos_token_id")
        if not isinstance(eos, list):
            eos = [] if eos is None else [eos]
        return LlamaConfig(
            vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head,
            n_embd=n_embd, n_ff=n_ff, head_dim=head_dim,
            max_seq_len=int(hf.get("max_position_embeddings") or 2048),
            rope_base=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
            rope_scaling=rope_scaling(rope, hf), norm_eps=float(hf.get("rms_norm_eps") or 1e-6),
            tie_embeddings=bool(hf.get("tie_word_embeddings")), bos_id=hf.get("bos_token_id"),
            eos_ids=tuple(eos), window=sliding_window(hf, kind, n_layer), **extras)

    def to_hf(self) -> dict:
        """config.json as the hub spells it; from_hf reads back an equal config."""
        eos, kind = list(self.eos_ids) or None, "mistral" if self.window else "llama"
        kind = "qwen2" if self.qkv_bias else "qwen3" if self.qk_norm else kind
        return {
            "architectures": [FAMILIES[kind][0]], "model_type": kind, "hidden_act": "silu",
            "sliding_window": self.window or None, "use_sliding_window": self.window > 0,
            "max_window_layers": 0 if self.window else self.n_layer,
            "vocab_size": self.vocab_size, "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head, "num_key_value_heads": self.n_kv_head,
            "hidden_size": self.n_embd, "intermediate_size": self.n_ff, "head_dim": self.head_dim,
            "max_position_embeddings": self.max_seq_len, "rope_theta": self.rope_base,
            "rope_scaling": self.rope_scaling, "rms_norm_eps": self.norm_eps,
            "attention_bias": False, "mlp_bias": False,
            "tie_word_embeddings": self.tie_embeddings, "bos_token_id": self.bos_id,
            "eos_token_id": eos[0] if eos and len(eos) == 1 else eos}


def sliding_window(hf, kind, n_layer) -> int:
    """The window of all layers, 0 for none. Raises ValueError where layers differ."""
    layers = hf.get("layer_types")
    if kind == "llama" or kind != "mistral" and not hf.get("use_sliding_window"):
        return 0
    if layers is None and kind != "mistral":  # the layers above slide
        first = int(hf.get("max_window_layers", 28))
        layers = [f"{'full' if i < first else 'sliding'}_attention" for i in range(n_layer)]
    if layers and set(layers) == {"full_attention"}:
        return 0
    if layers and set(layers) != {"sliding_attention"}:
        raise ValueError(f"unsupported: layers of {', '.join(sorted(set(layers)))}")
    return int(hf.get("sliding_window", 4096) or 0)  # the hub's default


def rope_scaling(rope, hf):
    """The part of rope_scaling or rope_parameters that changes frequencies, or None."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"unsupported rope_scaling {rope}: types are {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return None
    scaling = {"rope_type": kind} | {name: float(rope[name]) for name in ROPE_TYPES[kind]}
    if kind == "yarn":
        optional = "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"
        scaling |= {name: float(rope[name]) for name in optional if rope.get(name)}
        scaling["truncate"] = bool(rope.get("truncate", True))
    if kind in ("llama3", "yarn"):
        name, least = "original_max_position_embeddings", hf.get("max_position_embeddings", 2048)
        scaling[name] = float(hf.get(name) or rope.get(name) or least)
    return scaling


# --- network: parameter names are the hub's ------------------------------------------------------

def rope_frequencies(config, device=None):
    """Angle per position of each pair of head dimensions, (head_dim / 2,) float32 [radians/token].

    llama3 stretches wave lengths beyond the original context by `factor`, keeps the short ones and
    blends in between (Llama 3.1's model code); yarn blends by the pair's number instead
    (arXiv:2309.00071); linear stretches all (arXiv:2306.15595).
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    freq = config.rope_base ** (-exponent / config.head_dim)
    s = config.rope_scaling
    if s is None:
        return freq
    if s["rope_type"] == "linear":
        return freq / s["factor"]
    original = s["original_max_position_embeddings"]
    if s["rope_type"] == "yarn":
        def pair(turns):  # the pair that turns so often in the original context
            wave = original / (turns * 2 * math.pi)
            return config.head_dim * math.log(wave) / (2 * math.log(config.rope_base))
        low, high = pair(s.get("beta_fast", 32)), pair(s.get("beta_slow", 1))
        if s["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, config.head_dim - 1)
        stretch = ((exponent / 2 - low) / (max(high - low, 0.001))).clamp(0, 1)
        return (1 - stretch) * freq + stretch * freq / s["factor"]
    turns = original * freq / (2 * math.pi)  # in the original context
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * freq / s["factor"]


def logit_scale(config) -> float:
    """What YaRN multiplies logits by: its factor for q and for k."""
    s = config.rope_scaling
    if s is None or s["rope_type"] != "yarn":
        return 1.0

    def factor(weight):
        return 0.1 * weight * math.log(max(s["factor"], 1)) + 1
    ratio = factor(1)
    if "mscale" in s and "mscale_all_dim" in s:
        ratio = factor(s["mscale"]) / factor(s["mscale_all_dim"])
    return s.get("attention_factor", ratio) ** 2


def rope(config, positions, dtype):
    """cos, sin (N, 1, D) of positions (N,), for `rotate`: sin has the sign of the swapped half."""
    frequencies = rope_frequencies(config, positions.device)
    angles = positions[:, None, None].float() * frequencies  # (N, 1, D / 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """RoPE as the hub lays heads out: a pair is (x[i], x[i + D/2]). x (N, heads, D)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RMSNorm(nn.RMSNorm):
    """arXiv:1910.07467. The weight comes last, after rounding, as in the hub's Llama; on a CPU this
    also takes a quarter of the time in bfloat16."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, None, self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        c, self.head_dim, self.scale = config, config.head_dim, logit_scale(config)
        self.q_proj = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.qk_norm = c.qk_norm

    def forward(self, x, layer, attend, cos, sin):
        q = self.q_proj(x).unflatten(1, (-1, self.head_dim))  # (N, n_head, D)
        k = self.k_proj(x).unflatten(1, (-1, self.head_dim))  # (N, n_kv_head, D)
        v = self.v_proj(x).unflatten(1, (-1, self.head_dim))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)  # autocast makes q narrower than x
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.scale != 1:
            q = q * self.scale
        out = attend(layer, q, k, v)  # (N, n_head, D)
        return self.o_proj(out.flatten(1))  # (N, n_embd)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.down_proj = nn.Linear(config.n_ff, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # SwiGLU, 2002.05202


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, layer, attend, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), layer, attend, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything of a Llama but its output matrix. `checkpointing` recomputes each layer in the
    backward pass."""

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)

    def forward(self, tokens, attend, positions):
        """States after the final norm, (N, n_embd), of ids (N,) or vectors (N, n_embd)."""
        x = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)  # (N, n_embd)
        cos, sin = rope(self.config, positions.to(x.device), x.dtype)  # (N, 1, D)
        for layer, block in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, layer, attend, cos, sin, use_reentrant=False)
            else:
                x = block(x, layer, attend, cos, sin)
        return self.norm(x)


class Llama(nn.Module):
    """A Llama decoder on packed tokens.

    Where several processes share a sequence (train.py), `share` wraps `attend` and `kv_heads` are
    the heads that this process computes; a technique indexes what it has per head with it."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.share, self.kv_heads = config, None, slice(None)
        self.model = Trunk(config)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def init_weights(self, seed: int):
        """Fresh weights: every matrix N(0, 1 / fan_in), embeddings N(0, 1 / n_embd), norms 1."""
        init_matrices(self, seed)
        return self

    @property
    def head(self):
        """The output matrix (V, n_embd): its own, or the embeddings'."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def causal(self, cu_seqlens):
        """The `attend` of the plain model: causal, within its sliding window if it has one."""
        return causal(cu_seqlens, self.config.window)

    def hidden(self, tokens, attend=None, positions=None):
        """States after the final norm, (N, n_embd). Arguments as in forward."""
        n = len(tokens)
        attend = attend or self.causal([0, n])
        if positions is None:
            positions = torch.arange(n, device=tokens.device)
        if self.share is not None:
            attend, positions = self.share.attend(attend), self.share.positions()
        return self.model(tokens, attend, positions)

    def forward(self, tokens, attend=None, positions=None):
        """Logits (N, V) of packed tokens: ids (N,), or vectors (N, n_embd) in their place.

        attend(layer, q, k, v) -> out like q: q (N, n_head, D), k, v (N, n_kv_head, D), RoPE
        applied; causal by default. positions (N,) feed RoPE, 0 .. N-1 by default: packed documents
        need no reset, RoPE is relative."""
        return F.linear(self.hidden(tokens, attend, positions), self.head)

    def loss(self, tokens, targets, attend=None, cu_seqlens=None, weights=None):
        """Mean cross-entropy [nats / target] over targets != -100; full logits never exist.

        tokens, targets (N,); cu_seqlens (n_doc + 1,): attention stays inside each document
        (without it: one document; an `attend` of yours sees to that itself); weights (N,) make the
        mean a weighted one. 0 if nothing is to be predicted."""
        if attend is None and cu_seqlens is not None:
            attend = self.causal(cu_seqlens)
        return cross_entropy(self.hidden(tokens, attend), self.head, targets, weights)


def init_matrices(module, seed):
    """Every matrix of a module N(0, 1 / fan_in), every bias 0."""
    rng = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5, generator=rng)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


def causal(cu_seqlens, window=0):
    """The plain `attend`: causal attention inside each packed document, perhaps in a window."""
    cu = torch.as_tensor(cu_seqlens).tolist()  # once: a layer that asks a GPU for them waits for it
    return lambda layer, q, k, v: attention(q, k, v, cu, cu, window=window)


# --- loss ----------------------------------------------------------------------------------------

def cross_entropy(hidden, head, targets, weights=None):
    """Mean cross-entropy [nats] of hidden (N, n_embd) through head (V, n_embd) over targets (N,)
    != -100, weighted by weights (N,). Without a target it is 0 and its gradients are 0."""
    rows = targets != -100
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weights = torch.ones_like(targets, dtype=dtype) if weights is None else weights.to(dtype)
    if not rows.all():
        hidden, targets, weights = hidden[rows], targets[rows], weights[rows]
    return CrossEntropy.apply(hidden, head, targets, weights / weights.sum().clamp(min=1e-30))


class CrossEntropy(torch.autograd.Function):
    """sum_i w_i * nll_i, a block of rows at a time. The gradient is formed while a block's logits
    are at hand: they are computed once, and no more of them ever exists."""

    BLOCK = 2 ** 25  # logits at a time: 128 MB

    @staticmethod
    def forward(ctx, hidden, head, targets, weights):
        need_hidden, need_head = ctx.needs_input_grad[:2]
        loss = weights.new_zeros(())
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_head = torch.zeros_like(head, dtype=loss.dtype) if need_head else None
        n_rows = max(1, CrossEntropy.BLOCK // len(head))
        for start in range(0, len(targets), n_rows):
            rows = slice(start, start + n_rows)
            logits = F.linear(hidden[rows], head).to(loss.dtype)  # (n_rows, V)
            top, at_target = logits.amax(1, keepdim=True), logits.gather(1, targets[rows, None])
            p = logits.sub_(top).exp_()  # softmax, once divided by its sum
            total = p.sum(1, keepdim=True)
            loss += (weights[rows] * (total.log() + top - at_target)[:, 0]).sum()
            if not (need_hidden or need_head):
                continue
            d = p.mul_(weights[rows, None] / total)
            d.scatter_add_(1, targets[rows, None], -weights[rows, None])
            d = d.to(hidden.dtype)
            if need_hidden:
                d_hidden[rows] = d @ head
            if need_head:
                d_head += d.mT @ hidden[rows]
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(head.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        d_hidden, d_head = (None if d is None else d * grad.to(d.dtype) for d in ctx.saved_tensors)
        return d_hidden, d_head, None, None


# --- a technique, as train.py sees it ------------------------------------------------------------

class Batch(typing.NamedTuple):
    """Packed documents to learn from: tokens (N,), targets (N,) with -100 for none, cu_seqlens
    (n_doc + 1,), weights (N,) of the targets or None."""
    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    weights: torch.Tensor | None = None


def collate(docs, targets=None) -> Batch:
    """Documents, each token ids (n,), packed end to end. targets: one (n,) for each; by default the
    next token, and none for a document's last: nothing is predicted across documents."""
    docs = [torch.as_tensor(doc).long() for doc in docs]
    if targets is None:
        targets = [torch.cat((doc[1:], doc.new_full((1,), -100))) for doc in docs]
    cu_seqlens = torch.tensor([0, *(len(doc) for doc in docs)]).cumsum(0).int()
    return Batch(torch.cat(docs), torch.cat(list(targets)), cu_seqlens)


def to_device(batch, device):
    """A Batch, or another NamedTuple of tensors, on a device."""
    return type(batch)(*(x if x is None else x.to(device) for x in batch))


def shuffled(j, n, *key) -> int:
    """Which of n items comes at place j, in epochs that are each shuffled anew by key."""
    epoch, at = divmod(j, n)
    return int(permutation(n, *key, epoch)[at])


@functools.lru_cache(16)
def permutation(n, *key):
    return np.random.default_rng(key).permutation(n)


class Method(nn.Module):
    """What train.py asks of a technique. The answers here are plain language modelling.

    A technique overrides what it does differently and says nothing else; train.py never asks which
    one it has. Its own parameters are those of this module. It never stores the model.
    """

    shard = True  # several processes share the weights; False: each has all of them
    own_attention = False  # it replaces the model's: no sliding window shorter than --seq_len

    @dataclass
    class Config:
        """Flags that the technique adds to train.py's."""

    def __init__(self, model, config, seed=0):
        super().__init__()
        self.config, self.window = config, model.config.window

    @classmethod
    def defaults(cls, args, config) -> dict:
        """{flag: value} for flags of train.py, or its own, that the user left open (None)."""
        return {}

    @classmethod
    def frozen(cls, config) -> bool:
        """Are the weights left as they are? Then they load in --dtype."""
        return False

    @classmethod
    def load(cls, args, config):
        """The model to start from; None for train.py's own: --model, or the tiny one."""

    @classmethod
    def data(cls, args, config, tokenizer, rows):
        """The data; None for train.py's own. rows: dicts of --data, read as they are asked for."""

    def param_groups(self, model, args) -> list:
        """Groups for the optimizer: matrices decay, norms do not."""
        weights = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in weights if p.dim() > 1]
        vectors = [p for p in weights if p.dim() < 2]
        groups = [dict(params=matrices, lr=args.lr, weight_decay=args.weight_decay),
                  dict(params=vectors, lr=args.lr, weight_decay=0.0)]
        return [group for group in groups if group["params"]]

    def optimizer(self, groups, args):
        return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=args.device.startswith("cuda"))

    def update(self, optimizer, max_norm) -> float:
        """Clip the gradients and step, unless they are not finite. Returns their norm."""
        norm = gradient_norm([p for group in optimizer.param_groups for p in group["params"]])
        if math.isfinite(norm):
            for group in optimizer.param_groups:
                most = max_norm or math.inf
                nn.utils.clip_grads_with_norm_(group["params"], most, torch.tensor(norm))
            optimizer.step()
        return norm

    def lr_scale(self, step, steps, args) -> float:
        return warmup_cosine(step, steps, args.warmup, args.min_lr)

    def batch(self, data, i, step, steps):
        """Micro-batch i of the run, a pure function of (data.seed, i)."""
        return data.batch(i)

    def weight(self, batch) -> float:
        """The share that a micro-batch has in the step's mean: its targets, by their weights."""
        used = batch.targets != -100
        return float(used.sum() if batch.weights is None else batch.weights[used].sum())

    def attend(self, cu_seqlens):
        """How the model attends, in training and in the report."""
        return causal(cu_seqlens, self.window)

    def loss(self, model, batch, step, steps):
        """(loss to descend, {name: number} for the log)."""
        attend = self.attend(batch.cu_seqlens)
        return model.loss(batch.tokens, batch.targets, attend, weights=batch.weights), {}

    def before(self, model, data) -> dict:
        """Scores of the untouched model, {column: number}."""
        return data.scores(model)

    def evaluate(self, model, data) -> dict:
        """Scores during and after training."""
        return data.scores(model, self.attend)

    def rows(self, model, data, before, runs, out_dir):
        """Yield the report, (row's name, {column: number}), all rows with the columns of the first.
        runs: {name: (method, its model)}."""
        yield "before", before
        for name, (method, m) in runs.items():
            yield name, method.evaluate(m, data)

    def save(self, model, out_dir) -> list:
        """Write what was learned; returns the paths."""
        return save_model(model, out_dir)


def gradient_norm(params) -> float:
    """Norm of all gradients together; sharded ones and others are added up apart."""
    grads = [p.grad for p in params if p.grad is not None]
    sharded = [g for g in grads if hasattr(g, "full_tensor")]
    others = [g for g in grads if not hasattr(g, "full_tensor")]
    norms = [nn.utils.get_total_norm(kind) for kind in (sharded, others) if kind]
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return math.hypot(*(norm.item() for norm in norms))


def warmup_cosine(step, steps, warmup, floor) -> float:
    """Scale of a learning rate: linear over the first share `warmup` of the steps, then a cosine
    down to `floor`."""
    first = math.ceil(warmup * steps)
    if step < first:
        return (step + 1) / first
    done = (step - first) / max(1, steps - first)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


# --- several processes: torchrun starts them -----------------------------------------------------

def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def join(device):
    """Connect the processes that torchrun started, if it did. Only rank 0 prints. Raises ValueError
    for a device that cannot be used here."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {device}: {str(e).splitlines()[0]}") from None
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or distributed.is_initialized():
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    distributed.init_process_group(backend, timeout=datetime.timedelta(days=7))
    if rank():
        sys.stdout = open(os.devnull, "w")


def all_reduce(values) -> list:
    """Sums of numbers over all processes."""
    total = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        distributed.all_reduce(total)
    return total.tolist()


def barrier():
    if world_size() > 1:
        distributed.barrier()


# --- KV cache ------------------------------------------------------------------------------------
# A layer's K and V are flat buffers (slots, D). KV head h of sequence b owns `room` slots from
# `start` on. `count` says how many entries it was given: entry n lies in slot n of its stretch, and
# behind the last slot it goes on as a ring, after the `sink`. So a token costs a write, whatever
# the policy. start, room, count, sink are tables (n_layer, B, n_kv_head).

class Everything:
    """What a KV head stores: all that the model can see. The rules of evict.py say what differs."""
    sink = 0  # entries that a ring never overwrites
    sliding = 0  # the model's own window: queries of a chunk see no further
    shift = False  # count the distance to the sink in entries, not in tokens (StreamingLLM)
    every_token = False  # judge after every decoded token, not only after a chunk
    n_queries = 0  # last queries that must be remembered while decoding
    ring = False  # room is how much it holds at most: it may not be larger than needed

    def __init__(self, sliding=0):
        self.sliding, self.ring = sliding, sliding > 0

    def room(self, layer, held, seen, chunks, new) -> int:
        """Slots for `held` entries of `seen` tokens, a prompt in `chunks`, `new` decoded tokens."""
        return self.sliding or held + sum(chunks) + new

    def keep(self, step):
        """Indices (heads, kept) into step.keys of what to store, ascending; None: what is new."""


@dataclass
class Step:
    """What a rule may look at when a group of KV heads has attended to T new tokens.

    n counts stored and new entries, the new ones last, and behind them n_patch that are dropped."""
    layer: int
    n_layer: int
    heads: object  # which KV heads these are, an index
    q: torch.Tensor  # (T, heads, G, D)
    k: torch.Tensor  # (T, heads, D)
    v: torch.Tensor
    positions: torch.Tensor  # (T,) of the new tokens
    keys: torch.Tensor  # (heads, n, D)
    values: torch.Tensor
    key_positions: torch.Tensor  # (heads, n)
    note: torch.Tensor  # (heads, n) float32: what the rule remembers of an entry, 0 at first
    n_new: int  # T without the patch
    n_patch: int
    first: int  # the first candidate: the first new entry; a rule may set it to 0
    seen: int  # tokens read before this step
    final: bool  # is this the prompt's last chunk?
    decoding: bool
    rng: torch.Generator


class KVCache:
    """K and V of `batch` sequences, each entry with its true position; K is stored after RoPE.

    rules[layer][head]: what the head stores; heads that share a rule object are a group with equal
    lengths. By default everything. chunk [tokens]: prefill so many at a time. patch [tokens]: the
    prompt's last ones follow every chunk, for the rules to judge it by, and are dropped."""

    def __init__(self, model, rules=None, batch=1, chunk=None, patch=0, seed=0):
        c, zeros = model.config, model.head.new_zeros
        self.config, self.chunk, self.patch, self.seed = c, chunk, patch, seed
        self.rules = rules or [[Everything(c.window)] * c.n_kv_head] * c.n_layer
        self.groups = [group_heads(layer) for layer in self.rules]
        self.rng = torch.Generator().manual_seed(seed)
        tables = zeros(4, c.n_layer, batch, c.n_kv_head, dtype=torch.long)
        sinks = torch.tensor([[rule.sink for rule in layer] for layer in self.rules])
        tables[3] = sinks[:, None]
        true_sinks = zeros(*tables.shape[1:], int(sinks.max()), c.head_dim)
        self.bind(tables, zeros(4, batch, dtype=torch.long), true_sinks)
        self.pending.fill_(-1)
        self.logs, self.queries = [[] for _ in range(batch)], [{} for _ in range(batch)]
        empty = zeros(0, c.head_dim)
        self.buffers = [[empty, empty, empty[:, 0].long(), empty[:, 0].float()]] * c.n_layer

    def bind(self, tables, rows, true_sinks):
        """rows (4, B). seen: tokens read. decoded: steps not in the log yet. pending: an answer's
        last token, not yet fed, or -1. shifted: tokens by which the sink's keys are turned."""
        self.tables, self.rows, self.true_sinks = tables, rows, true_sinks
        self.start, self.room, self.count, self.sink = tables
        self.seen, self.decoded, self.pending, self.shifted = rows

    def row(self, b):
        """Sequence b as a cache of its own, in the same memory."""
        one, at = copy.copy(self), slice(b, b + 1)
        one.bind(self.tables[:, :, at], self.rows[:, at], self.true_sinks[:, at])
        one.logs, one.queries = self.logs[at], self.queries[at]
        return one

    def fork(self, batch):
        """A cache of `batch` sequences, each a copy of the first."""
        many, one, log = copy.copy(self), self.row(0), self.log(0)
        tables, rows = one.tables.repeat_interleave(batch, 2), one.rows.repeat_interleave(batch, 1)
        many.bind(tables, rows, one.true_sinks.repeat_interleave(batch, 1))
        many.logs = [list(log) for _ in range(batch)]
        many.queries = [dict(self.queries[0]) for _ in range(batch)]
        many.lay_out(many.room, one)
        return many

    def reset(self):
        """Forget everything; the memory stays."""
        self.count.zero_()
        self.rows.zero_()
        self.pending.fill_(-1)
        self.logs, self.queries = [[] for _ in self.logs], [{} for _ in self.logs]
        self.rng.manual_seed(self.seed)

    def reserve(self, lengths, max_new_tokens, chunk=None):
        """Rooms for prompts of `lengths` [tokens] and their answers; entries move if they must."""
        room, held, seen = self.room.tolist(), self.visible().tolist(), self.seen.tolist()
        step = 16 if len(self.logs) == 1 else 128  # rows of about equal length get equal rooms
        for b, n in enumerate(lengths):
            self.check_window(seen[b] + n + max_new_tokens)
            self.log(b)  # before rooms change
            size = chunk or self.chunk or max(n, 1)
            chunks = [min(size, n - start) for start in range(0, n, size)]
            for layer, rules in enumerate(self.rules):
                for h, rule in enumerate(rules):
                    need = rule.room(layer, held[layer][b][h], seen[b], chunks, max_new_tokens)
                    need = need if rule.ring else -(-need // step) * step
                    room[layer][b][h] = max(need, room[layer][b][h])
        room = self.room.new_tensor(room)
        if not torch.equal(room, self.room):
            self.lay_out(room, self)

    def check_window(self, n):
        """Refuse rules of another attention for n tokens of a model whose window is shorter."""
        if n > self.config.window > 0 and not all(rule.sliding for rule in self.rules[0]):
            raise ValueError(f"the model's sliding window of {self.config.window} tokens is "
                             f"shorter than the text ({n}): only policy full")

    def lay_out(self, room, old):
        """Stretches of these rooms, those of a group side by side, with the entries of `old`,
        whose only row may stand for all."""
        n, start = torch.minimum(old.count, old.room), torch.zeros_like(room)
        moves = torch.stack((old.start, n)).expand(2, *room.shape).tolist()
        self.buffers = list(old.buffers)
        for layer, groups in enumerate(self.groups):
            copies, end = [], 0
            owners = [(b, h) for _, heads in groups for b in range(room.shape[1]) for h in heads]
            for b, h in owners:
                copies.append((moves[0][layer][b][h], end, moves[1][layer][b][h]))
                start[layer, b, h] = end
                end += int(room[layer, b, h])
            self.buffers[layer] = [moved(x, end, copies) for x in old.buffers[layer]]
        self.start.copy_(start)
        self.room.copy_(room)

    def visible(self):
        """Entries that the next query sees, (n_layer, B, n_kv_head): a ring's oldest is not one."""
        return torch.minimum(self.count, self.room - 1).clamp(min=0)

    def stored(self, layer, heads):
        """Slots (heads, n) of what row 0's next query sees of a group, oldest first."""
        start, room, count, sink = self.tables[:, layer, 0, heads, None]  # (heads, 1) each
        first, last = int(sink[0]), int(count[0])
        oldest = max(first, last + 1 - int(room[0] - sink[0]))
        n = torch.arange(max(oldest, last), device=start.device)
        n = torch.cat((n[:min(first, last)], n[oldest:last]))
        return start + slot(n, room, sink)

    def positions(self, layer, head, b=0):
        """Positions of the entries that a KV head holds, ascending, int64."""
        slots = self.row(b).stored(layer, [head])[0]
        return self.buffers[layer][2][slots].sort().values

    def nbytes(self) -> int:
        """Bytes of K and V, rooms counted."""
        return sum(k.nbytes + v.nbytes for k, v, *_ in self.buffers)

    # --- reading a prompt, a chunk at a time ---

    def prefill(self, model, tokens, chunk=None, b=0, decoding=False, every=False):
        """Read tokens (N,) into sequence b. Returns the last one's state (n_embd,), or the states
        of every token of the last chunk."""
        if not decoding:
            self.reserve([len(tokens) if i == b else 0 for i in range(b + 1)], 1, chunk)
        row = self.row(b)
        parts = tokens.split(chunk or self.chunk or len(tokens))
        for i, part in enumerate(parts):
            final = i == len(parts) - 1
            tail = tokens[:0] if final or not self.patch else tokens[-self.patch:]
            seen = int(row.seen)
            positions = torch.arange(seen, seen + len(part) + len(tail), device=part.device)
            row.now = dict(n_new=len(part), n_patch=len(tail), final=final, decoding=decoding,
                           seen=seen, positions=positions)
            self.logs[b].append((len(part), int(row.visible().sum())))
            row.shift_sinks()
            hidden = model.hidden(torch.cat((part, tail)), row.attend_chunk, positions)
            row.seen += len(part)
        return hidden[:len(part)] if every else hidden[len(part) - 1]

    def attend_chunk(self, layer, q, k, v):
        """The `attend` of a chunk: queries see what is stored and, causally, what is new; then
        rules choose what of it to store."""
        q = q.unflatten(1, (k.shape[1], -1))  # (T, n_kv_head, G, D)
        out, groups = torch.empty_like(q), self.groups[layer]
        self.turn_sinks(layer)
        for rule, heads in groups:
            heads = heads if len(groups) > 1 else slice(None)
            step = self.look(layer, heads, q, k, v)
            rows, keys, values = step.q.flatten(1, 2), step.keys, step.values
            bounds = [0, len(rows)], [0, keys.shape[1]]
            keys, values = keys.transpose(0, 1), values.transpose(0, 1)
            o = attention(rows, keys, values, *bounds, window=rule.sliding)
            if len(groups) == 1:
                out = o.view(q.shape)
            else:
                out[:, heads] = o.view(step.q.shape)
            if rule.n_queries:
                step.q = self.remember(layer, rule.n_queries, step)
            self.store(layer, heads, step, rule.keep(step))
        return out.flatten(1, 2)

    def look(self, layer, heads, q, k, v):
        """The Step of a group: its entries in the cache with the new ones behind them."""
        slots = self.stored(layer, heads)  # (heads, n_old)
        old_k, old_v, old_positions, old_note = (x[slots] for x in self.buffers[layer])
        q, k, v = q[:, heads], k[:, heads], v[:, heads]
        positions = self.now["positions"].expand(len(slots), -1)
        return Step(
            layer=layer, n_layer=self.config.n_layer, heads=heads, q=q, k=k, v=v,
            rng=self.rng, first=slots.shape[1],
            keys=behind(old_k, k.transpose(0, 1)), values=behind(old_v, v.transpose(0, 1)),
            key_positions=behind(old_positions, positions),
            note=F.pad(old_note, (0, len(q))), **self.now)

    def remember(self, layer, n_queries, step):
        """The last queries of a group of row 0, this step's included; its patch is none of them."""
        memory, key = self.queries[0], (layer, str(step.heads))
        q = step.q[:step.n_new]
        if step.seen:
            q = torch.cat((memory[key], q))
        memory[key] = q[-n_queries:]
        return memory[key] if step.decoding else step.q

    def store(self, layer, heads, step, kept):
        """Entries `kept` of a step follow the first step.first ones; None: the new ones, all."""
        start, room, count, sink = self.tables[:, layer, 0, heads, None]  # (heads, 1) each
        entries = step.keys, step.values, step.key_positions, step.note
        if kept is None:
            n_old = step.keys.shape[1] - step.n_new - step.n_patch
            entries = [x[:, n_old:n_old + step.n_new] for x in entries]
            first = count  # (heads, 1)
        else:
            head = torch.arange(len(kept), device=kept.device)[:, None]
            entries, first = [x[head, kept] for x in entries], torch.full_like(count, step.first)
            assert step.first + kept.shape[1] < int(room[0]), "a rule keeps more than its room"
        end = first + entries[0].shape[1]
        n = first + torch.arange(entries[0].shape[1], device=count.device)  # (heads, entries)
        ring = room - sink
        if n.shape[1] > int(ring[0]):  # only the last ones survive in a ring
            last = ((n >= end - ring) | (n < sink))[0]
            n, entries = n[:, last], [x[:, last] for x in entries]
        slots = start + slot(n, room, sink)
        for buffer, x in zip(self.buffers[layer], entries):
            buffer[slots] = x.to(buffer.dtype)
        self.count[layer, 0, heads] = end[:, 0]

    # --- decoding: a token of every sequence ---

    def step(self, model, tokens, live):
        """Feed tokens (B,). Returns states (B, n_embd). A row that is not live stands still."""
        if any(rule.every_token for groups in self.groups for rule, _ in groups):
            return self.step_by_row(model, tokens, live)
        self.shift_sinks()
        self.slots = (self.start + slot(self.count, self.room, self.sink)).flatten(1)
        self.length = torch.minimum(self.count + 1, self.room)
        self.new_positions = self.seen.repeat_interleave(self.config.n_kv_head)
        hidden = model.hidden(tokens, self.attend, self.seen)
        self.count += live[:, None]
        self.seen += live
        self.decoded += live
        return hidden

    def attend(self, layer, q, k, v):
        """The `attend` of a decoding step: q (B, n_head, D), k, v (B, n_kv_head, D)."""
        self.turn_sinks(layer)
        keys, values, positions, _ = self.buffers[layer]
        keys.index_copy_(0, self.slots[layer], k.flatten(0, 1))
        values.index_copy_(0, self.slots[layer], v.flatten(0, 1))
        positions.index_copy_(0, self.slots[layer], self.new_positions)
        return decode(q, keys, values, self.start[layer], self.length[layer])

    def step_by_row(self, model, tokens, live):
        """For rules that judge after every token: to them it is a chunk."""
        hidden = model.head.new_zeros(len(tokens), self.config.n_embd)
        for b in live.nonzero().flatten().tolist():
            hidden[b] = self.prefill(model, tokens[b:b + 1], b=b, decoding=True)
        return hidden

    # --- StreamingLLM's positions: the sink's keys move on by the number of tokens dropped ---

    def shift_sinks(self):
        """Once a chunk or step: by how much each row's sink is to be turned."""
        rule, _ = self.groups[0][0]
        if rule.shift:
            self.untouched = (self.shifted == 0)[:, None, None, None]
            dropped = self.seen - (rule.sink + rule.window - 1)
            self.shifted.copy_(dropped.clamp(min=0))
            cos, sin = rope(self.config, self.shifted, self.true_sinks.dtype)  # (B, 1, D)
            self.turned_by = cos[:, None], sin[:, None]

    def turn_sinks(self, layer):
        if self.groups[layer][0][0].shift:
            keys, true = self.buffers[layer][0], self.true_sinks[layer]  # (B, n_kv_head, sink, D)
            slots = self.start[layer, ..., None] + torch.arange(true.shape[2], device=keys.device)
            true.copy_(torch.where(self.untouched, keys[slots], true))
            keys[slots] = rotate(true, *self.turned_by)

    # --- what it cost ---

    def log(self, b=0) -> list:
        """Steps (T, K) of a sequence: T new tokens met K entries, summed over layers and heads."""
        n, most = int(self.decoded[b]), self.room[:, b] - 1
        first = self.count[:, b] - n
        for i in range(n):  # decoded since the last look; each added an entry to every head
            self.logs[b].append((1, int(torch.minimum(first + i, most).sum())))
        self.decoded[b] = 0
        return self.logs[b]

    def footprint(self, b=0) -> Fraction:
        """KV footprint: T rows over K retained entries cost T(T + 1) / 2 + T K cells, as a share of
        full causal attention's. Source: arXiv:2506.17121, section 2.1; mean over layers, heads."""
        n_heads = self.config.n_layer * self.config.n_kv_head
        n = sum(t for t, _ in self.log(b))
        cells = sum(t * (t + 1) // 2 + Fraction(t * held, n_heads) for t, held in self.log(b))
        return Fraction(cells) / (n * (n + 1) // 2)

    def peak(self, b=0) -> Fraction:
        """Most entries held in one step, as a share of all tokens."""
        n_heads = self.config.n_layer * self.config.n_kv_head
        most = max(t + Fraction(held, n_heads) for t, held in self.log(b))
        return most / sum(t for t, _ in self.log(b))


def group_heads(rules):
    """[(rule, its KV heads)] of a layer."""
    return [(rule, [h for h, other in enumerate(rules) if other is rule])
            for rule in dict.fromkeys(rules)]


def slot(n, room, sink):
    """Of entry n. The next entry's slot is never seen: it holds a ring's oldest entry, or none."""
    ring = sink + (n - sink) % (room - sink).clamp(min=1)
    return torch.where(n < room, n, ring)


def behind(old, new):
    """Entries (heads, n, ...) with new ones behind them."""
    return torch.cat((old, new), 1) if old.shape[1] else new


@torch.inference_mode(False)  # a buffer made inside it could not be written to outside
def moved(old, size, moves):
    """A buffer of `size` slots, with n entries of the old one moved from slot a to b: (a, b, n)."""
    new = old.new_zeros(size, *old.shape[1:])
    for a, b, n in moves:
        new[b:b + n] = old[a:a + n]
    return new


# --- generation ----------------------------------------------------------------------------------

def generate(model, tokens, max_new_tokens, cache=None, chunk=None, temperature=0.0, top_p=1.0,
             stop_ids=(), seed=None, until=None):
    """New token ids, at most max_new_tokens, after a prompt; a stop id ends them and is left out.

    tokens: (N,) for one prompt, which gives a list of ids; a list of such for several, which gives
    a list of lists: each prompt is prefilled by itself, then all decode together.
    cache: a KVCache to use and continue; the last answer's unfed token precedes the next prompt.
    chunk [tokens]: prefill so many at a time, by default the cache's own or all at once.
    temperature 0 is greedy; top_p keeps the likeliest tokens that hold this probability. Rows draw
    from generators of their own, by seed + row. until(row, ids) true ends a row early.
    Raises ValueError: no tokens, a token outside the vocabulary, another number of rows, logits
    that are not finite."""
    several = not torch.is_tensor(tokens) and hasattr(next(iter(tokens), None), "__len__")
    answers = [] if several else [[]]
    for answers in stream(model, tokens if several else [tokens], max_new_tokens, cache, chunk,
                          temperature, top_p, stop_ids, seed, until):
        pass
    return answers if several else answers[0]


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, cache=None, chunk=None, temperature=0.0, top_p=1.0,
           stop_ids=(), seed=None, until=None):
    """Yield the answers so far, a list of ids per prompt, after every step; see generate."""
    device, n = model.head.device, len(prompts)
    cache = cache or KVCache(model, batch=n)
    if len(cache.logs) != n:
        raise ValueError(f"{n} prompts for a cache of {len(cache.logs)} sequences")
    prompts = [torch.as_tensor(prompt, device=device).long() for prompt in prompts]
    for prompt in prompts:
        check_tokens(prompt, model.config.vocab_size)
    waiting = cache.pending[:, None]
    prompts = [torch.cat((w[w >= 0], prompt)) for w, prompt in zip(waiting, prompts)]
    cache.reserve([len(prompt) for prompt in prompts], max_new_tokens, chunk)
    hidden = [cache.prefill(model, prompt, chunk, b) for b, prompt in enumerate(prompts)]
    hidden, answers = torch.stack(hidden), [[] for _ in prompts]
    rngs = [torch.Generator(device).manual_seed((seed or 0) + b) for b in range(n)]
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    live = torch.ones(n, dtype=torch.bool, device=device)
    cache.pending.fill_(-1)
    for i in range(max_new_tokens):
        if i:
            cache.pending.masked_fill_(live, -1)
            hidden = cache.step(model, token, live)
        token = pick(F.linear(hidden, model.head).float(), temperature, top_p, rngs)  # (B,)
        live = live & ~torch.isin(token, stops)
        cache.pending.copy_(torch.where(live, token, cache.pending))
        for b, new in enumerate(torch.where(live, token, -1).tolist()):  # the one host read
            if new == -2:
                raise ValueError("the model's logits are not finite")
            answers[b] += [new] if new >= 0 else []
            if new >= 0 and until is not None and until(b, answers[b]):
                live[b] = False
        yield answers
        if not live.any():
            return


def beyond_training(config, n) -> str:
    """A line for a prompt of n tokens that is longer than any the model was trained on, else ''."""
    if n <= config.max_seq_len:
        return ""
    return f"the prompt has {n} tokens; the model was made for {config.max_seq_len}\n"


def check_tokens(tokens, vocab_size):
    """Refuse an empty prompt and tokens that the embeddings do not have."""
    if len(tokens) == 0:
        raise ValueError("the prompt has no tokens")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        bad = int(tokens.max()) if int(tokens.min()) >= 0 else int(tokens.min())
        raise ValueError(f"token {bad} is outside the vocabulary of {vocab_size}")


def pick(logits, temperature, top_p, rngs):
    """A token of each row of logits (B, V): the best at temperature 0, else drawn by its generator
    from the smallest set that holds top_p; -2 where logits are not finite."""
    best, token = logits.max(-1)
    wrong = ~best.isfinite()  # one NaN in a row is its maximum
    if temperature == 0:
        return token.masked_fill(wrong, -2)
    p = ((logits - best[:, None]).double() / temperature).softmax(-1).nan_to_num()
    p, order = p.sort(descending=True)
    before = p.cumsum(-1) - p  # the token that crosses top_p stays
    p = p.masked_fill(before >= top_p, 0)
    p[:, 0] = p[:, 0].clamp(min=1e-30)
    drawn = [torch.multinomial(row, 1, generator=rng) for row, rng in zip(p, rngs)]
    return order.gather(1, torch.stack(drawn))[:, 0].masked_fill(wrong, -2)


# --- loading and saving: the Hugging Face layout -------------------------------------------------

def read_json(path):
    """The value in a JSON file. Raises ValueError naming a file that is not valid JSON."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from None


def load_config(path) -> LlamaConfig:
    """The LlamaConfig of the folder `path`."""
    name = os.path.join(path, "config.json")
    return checked_config(read_json(name), name)


def checked_config(hf, name) -> LlamaConfig:
    """from_hf, whose complaints then name the file."""
    try:
        return LlamaConfig.from_hf(hf)
    except KeyError as e:
        raise ValueError(f"{name}: field {e} is missing") from None
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as e:
        raise ValueError(f"{name}: {e}") from None


def load_model(path, device="cpu", dtype=torch.float32) -> Llama:
    """The Llama in folder `path`: config.json and model.safetensors, or its shards.

    Tensors are memory-mapped and copied only to be converted. Raises ValueError or OSError naming
    what is missing, extra, misshapen, truncated or unsupported."""
    with torch.device("meta"):
        model = Llama(load_config(path))
    tensors = read_weights(path, device, dtype)
    head = tensors.get("lm_head.weight")
    if model.lm_head is None and head is not None:
        if not torch.equal(head, tensors["model.embed_tokens.weight"]):
            raise ValueError(f"{path}: config.json ties embeddings, but lm_head.weight differs")
        del tensors["lm_head.weight"]
    return assign(model, tensors, path)


def assign(model, tensors, path):
    """Put tensors in the place of a model's parameters: all of them, and no others."""
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as e:
        raise ValueError(f"{path}: {' '.join(str(e).split())[:300]}") from None
    return model


def weight_files(path) -> dict:
    """The safetensors files of a model folder, and the tensors that its index wants of each: None,
    which is all, where there is no index."""
    single = os.path.join(path, "model.safetensors")
    index = single + ".index.json"
    if os.path.exists(single) or not os.path.exists(index):
        return {single: None}
    try:
        files = {}
        for name, shard in sorted(read_json(index)["weight_map"].items()):  # in this folder
            files.setdefault(os.path.join(path, os.path.basename(shard)), []).append(name)
        return files
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: expected a weight_map from tensors to files") from None


def read_weights(path, device="cpu", dtype=None) -> dict:
    """All weights of a model folder by name."""
    tensors = {}
    for file, names in weight_files(path).items():
        with safe_open(file, framework="pt") as f:
            for name in names or f.keys():
                if not name.endswith("rotary_emb.inv_freq"):  # old checkpoints; follows from config
                    tensors[name] = f.get_tensor(name).to(device, dtype)
    return tensors


def save_model(model, path, max_shard_bytes=5_000_000_000) -> list:
    """Write config.json and model.safetensors (or shards and their index) into folder `path`, in
    the model's dtype. Each file appears under its name only when it is whole. Returns the paths."""
    os.makedirs(path, exist_ok=True)
    shards, size = [{}], 0
    for name, p in model.named_parameters():
        if shards[-1] and size + p.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = p.detach().contiguous()
        size += p.nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        n = len(shards)
        names = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    for file, tensors in zip(names, shards):
        write_tensors(os.path.join(path, file), tensors)
    single = os.path.join(path, "model.safetensors")
    index = single + ".index.json"
    if len(shards) > 1:
        where = {name: file for file, tensors in zip(names, shards) for name in tensors}
        total = sum(p.nbytes for p in model.parameters())
        write_json(index, {"metadata": {"total_size": total}, "weight_map": where})
    with contextlib.suppress(FileNotFoundError):  # left by a model of another size
        os.remove(single if len(shards) > 1 else index)
    config = os.path.join(path, "config.json")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    write_json(config, model.config.to_hf() | {"torch_dtype": dtype})
    return [config, *(os.path.join(path, file) for file in names)]


def fingerprint(path, weights=True) -> str:
    """Of a model folder: its config and tokenizer, of weights the headers and 16 megabytes spread
    over each file."""
    digest = hashlib.sha256()
    for name in ("config.json", *TOKENIZER_FILES):
        with contextlib.suppress(FileNotFoundError), open(os.path.join(path, name), "rb") as f:
            digest.update(f.read())
    for file in weight_files(path) if weights else ():
        with open(file, "rb") as f:
            head = int.from_bytes(f.read(8), "little")
            digest.update(f.read(head))
            size = os.path.getsize(file)
            for i in range(16):
                f.seek(8 + head + i * (size - 8 - head) // 16)
                digest.update(f.read(2 ** 20))
    return digest.hexdigest()[:16]


def write_tensors(path, tensors: dict, metadata=None):
    """A safetensors file, whole or not at all."""
    with replacing(path) as part:
        save_file(tensors, part, metadata={"format": "pt"} | (metadata or {}))


def write_json(path, value):
    """A JSON file (strict: no NaN), whole or not at all."""
    with replacing(path) as part, open(part, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2, allow_nan=False)
        f.write("\n")


def write_svg(path, width, height, elements):
    """An SVG of these elements on white, whole or not at all."""
    with replacing(path) as part, open(part, "w", encoding="utf-8") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" '
                'fill="white"/>\n' + "\n".join(elements) + "\n</svg>\n")


def append_line(path, value):
    """Add a line of strict JSON to a file, whole or not at all."""
    line = (json.dumps(value, allow_nan=False) + "\n").encode()
    with open(path, "ab", buffering=0) as f:
        size = os.fstat(f.fileno()).st_size
        try:
            if f.write(line) != len(line):
                raise OSError(f"no room for the next line of {path}")
        except OSError:
            f.truncate(size)
            raise


@contextlib.contextmanager
def replacing(path):
    """A name to write to, which becomes `path` if all goes well and vanishes if not."""
    part = f"{path}.part"
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise


# --- masks of KV heads: which of them keep the full cache ----------------------------------------

def discretise(scores, sparsity):
    """The int(n * (1 - sparsity)) heads of highest score, over all layers: bool like scores.

    Equal scores: the earlier head. Ranking log_alpha gives the official rule's heads up to the
    trained sparsity; below it the official code fills up at random, because it has already set
    the pruned heads equal."""
    n_full = int(scores.numel() * (1 - sparsity) + 1e-9)  # 90 * (1 - 0.9) is 9, floats say 8.999...
    order = scores.flatten().double().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:n_full].cpu()] = True
    return mask.view(scores.shape)


def save_heads(path, mask):
    """Write a mask, or scores, (n_layer, n_kv_head) as the official TSV: row = layer, column = KV
    head, 1.0 = full cache."""
    form = "%.9g" if mask.is_floating_point() else "%.1f"
    with replacing(path) as part:
        np.savetxt(part, mask.cpu().double().numpy(), delimiter="\t", fmt=form)


def load_heads(path, sparsity=None):
    """bool (n_layer, n_kv_head), True = full cache, from PruLong's masks.tsv or DuoAttention's
    full_attention_heads.tsv.

    Without a sparsity a head is full where its value is above 0.5. With one, heads are ranked by
    value, clipped to [0, 1]; equal ones: the earlier head (the official loaders break ties by
    unseeded noise). Raises ValueError for a file that is not a table of finite numbers, or a
    sparsity that a file of zeros and ones cannot give."""
    try:
        values = torch.from_numpy(np.loadtxt(path, delimiter="\t", ndmin=2))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    if values.numel() == 0 or not values.isfinite().all():
        raise ValueError(f"{path}: expected a table of finite numbers")
    values = values.clamp(0, 1)
    if sparsity is None:
        return values > 0.5
    mask = discretise(values, sparsity)
    finished = bool(((values == 0) | (values == 1)).all())
    if finished and not torch.equal(mask, values == 1):
        has = 1 - values.mean().item()
        raise ValueError(f"{path}: a finished mask of sparsity {has:.4g}, not {sparsity:g}; other "
                         "sparsities come from scores")
    return mask


def load_pattern(path) -> dict:
    """sink and window [tokens] that were learned with a mask file, from DuoAttention's config.json
    beside it (pattern.json where that is the model's); {} without one."""
    for name in ("pattern.json", "config.json"):
        file = os.path.join(os.path.dirname(path), name)
        about = read_json(file) if os.path.exists(file) else {}
        if "sink_size" in about and "recent_size" in about:
            return {"sink": int(about["sink_size"]), "window": int(about["recent_size"])}
    return {}


# --- tokenizer -----------------------------------------------------------------------------------

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# Llama 3.1's names for the ids from 128000 on; the rest is reserved_special_token_N, N from 0
LLAMA3_SPECIAL = (
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
    "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id",
    "eom_id", "eot_id", "python_tag", *(f"reserved_special_token_{i}" for i in range(3, 248)))
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
    "special_tokens_map.json", "generation_config.json")


class ByteBPE:
    """BPE over bytes, on tiktoken (GPT-2, Llama 3, Qwen, SmolLM2). vocab: token bytes -> id.
    merges: token bytes in the order in which BPE builds them. split: the regular expression that
    cuts text."""
    each = strip = False

    def __init__(self, vocab, merges, split):
        import tiktoken
        single = [bytes([b]) for b in range(256)]
        tokens = list(dict.fromkeys([*single, *merges]))  # a token's rank: its place in merging
        self.bytes, self.ids = {i: t for t, i in vocab.items()}, [vocab.get(t, -1) for t in tokens]
        self.encoding = tiktoken.Encoding(
            "from file", pat_str=split + r"|(?s:.)",  # (?s:.): drop nothing
            mergeable_ranks={t: r for r, t in enumerate(tokens)}, special_tokens={})

    def encode(self, text, begins) -> list:
        """Raises ValueError for a million letters of white space in a row (tiktoken's limit)."""
        ids = [self.ids[rank] for rank in self.encoding.encode(text)]
        return [i for i in ids if i >= 0]


class CharacterBPE:
    """BPE over characters, and bytes for those that have no token, as SentencePiece has it (Llama
    2, Mistral 7B, TinyLlama). vocab: token -> id, a space is \u2581. merges: pairs of tokens, in
    their order. prefix: whether a text begins with a space: "" (no), "once" (if it has none yet) or
    "always"; each: also behind an added token. strip: the first space of a decoded text goes."""

    def __init__(self, vocab, merges, prefix="", each=False, strip=False):
        self.vocab, self.prefix, self.each, self.strip = vocab, prefix, each, strip
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        of_bytes = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}
        if not of_bytes.keys() <= vocab.keys():
            raise ValueError("a BPE over characters must have a token for each byte")
        plain = {i: token.replace("\u2581", " ").encode() for token, i in vocab.items()}
        self.bytes = plain | {vocab[token]: b for token, b in of_bytes.items()}
        inside = any(re.search("[^\u2581]\u2581", token) for token in vocab)
        self.cut = re.compile("(?s:.+)" if inside else "\u2581+[^\u2581]*|[^\u2581]+")
        self.word = functools.lru_cache(2 ** 17)(self.merge)

    def encode(self, text, begins) -> list:
        text = text.replace(" ", "\u2581")
        has_one = text.startswith("\u2581")
        if text and begins and (self.prefix == "always" or self.prefix == "once" and not has_one):
            text = "\u2581" + text
        return [i for word in self.cut.findall(text) for i in self.word(word)]

    def merge(self, word) -> list:
        """The ids of a stretch: the pair of lowest rank again and again, the first of equals."""
        symbols = []
        for c in word:
            as_bytes = [f"<0x{b:02X}>" for b in c.encode(errors="replace")]
            symbols += [c] if c in self.vocab else as_bytes
        n = len(symbols)
        left, right = list(range(-1, n - 1)), list(range(1, n + 1))
        ranks = [self.ranks.get(pair) for pair in zip(symbols, symbols[1:])]
        heap = [(rank, i) for i, rank in enumerate(ranks) if rank is not None]
        heapq.heapify(heap)
        while heap:
            rank, a = heapq.heappop(heap)
            b = right[a]
            if b == n or self.ranks.get((symbols[a], symbols[b])) != rank:
                continue  # one of the two has been merged meanwhile
            symbols[a], symbols[b] = symbols[a] + symbols[b], None
            right[a] = right[b]
            if right[b] < n:
                left[right[b]] = a
            for i, j in ((left[a], a), (a, right[a])):
                pair = (symbols[i], symbols[j]) if 0 <= i and j < n else None
                if pair in self.ranks:
                    heapq.heappush(heap, (self.ranks[pair], i))
        return [self.vocab[symbol] for symbol in symbols if symbol is not None]


class Tokenizer:
    """A BPE and what the hub puts around one.

    special: added tokens -> ids, found in text too, the longest first, as the hub does; words:
    those of them that are words, not marks. add_bos: whether documents start with bos_id.
    template: the chat format, in Jinja; names: what it calls the special tokens ("eos_token" ->
    "</s>")."""

    def __init__(self, bpe, special=None, bos_id=None, eos_ids=(), add_bos=False, template=None,
                 names=None, words=()):
        self.bpe, self.special, self.bos_id = bpe, special or {}, bos_id
        self.marks = {i for token, i in self.special.items() if token not in words}
        self.template, self.names = template, names or {}
        self.add_bos = add_bos and bos_id is not None
        self.bytes = bpe.bytes | {i: s.encode() for s, i in self.special.items()}
        if not all(type(i) is int and i >= 0 for i in [*self.bytes, *eos_ids]):
            raise ValueError("a token id is not a whole number >= 0")
        longest_first = sorted(self.special, key=len, reverse=True)
        self.cut = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self.end_of_turn = self.find_end_of_turn() if template else None
        ends = [*eos_ids, self.special.get(self.end_of_turn)]
        self.eos_ids = tuple(dict.fromkeys(i for i in ends if i is not None))

    def encode(self, text: str, begins=True) -> list[int]:
        """Token ids of text, without a leading BOS. A byte that the vocabulary lacks has none.
        begins False: text goes on what was encoded before; some tokenizers begin with a space."""
        out = []
        for i, part in enumerate(self.cut.split(text)):
            if i % 2:
                out.append(self.special[part])
            else:
                out += self.bpe.encode(part, self.bpe.each if i else begins)
        return out

    def document(self, text: str) -> list[int]:
        """Token ids of text that begins a document: after BOS, if this model has one there."""
        return [self.bos_id] * self.add_bos + self.encode(text)

    def decode(self, ids, marks=True) -> str:
        """The text of token ids, with or without marks such as <|im_end|>; broken UTF-8 and ids
        without a token become U+FFFD."""
        ids = [int(i) for i in ids if marks or int(i) not in self.marks]
        parts = [self.bytes.get(i, b"\xff") for i in ids]
        text = b"".join(parts).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.bpe.strip else text

    def chat(self, messages: list[dict], answering=True) -> str:
        """The text of messages [{"role", "content"}] in this model's chat format, with the head of
        the assistant's next turn if answering. A template that asks for the date is told
        26 Jul 2024, Llama 3's own default, so that a prompt is the same tomorrow.

        Raises ValueError where there is no template, or it refuses the messages."""
        if not self.template:
            raise ValueError("this tokenizer has no chat format: --chat chatml or --chat llama3")
        return render(self.template, messages=messages, add_generation_prompt=answering,
                      tools=None, documents=None, **self.names)

    def find_end_of_turn(self):
        """The special token that the chat format writes behind an answer, or None; a format that
        cannot be written says so when it is asked for."""
        asked, answer = {"role": "user", "content": "Well?"}, "That is my whole answer."
        try:
            text = self.chat([asked, {"role": "assistant", "content": answer}], answering=False)
        except ValueError:
            return None
        return next(iter(self.cut.findall(text.partition(answer)[2])), None)


def render(template, **values) -> str:
    """A chat template filled in as the hub does. It is a program: the sandbox keeps it from the
    machine. Raises ValueError where it does not run."""
    from jinja2 import TemplateError  # comes with torch, which requires it
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(words):
        raise TemplateError(words)
    values |= {"raise_exception": refuse, "strftime_now": datetime.date(2024, 7, 26).strftime}
    jinja = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    jinja.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    try:
        return jinja.from_string(template).render(values)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as e:
        raise ValueError(f"chat template: {e}") from None


CHAT_FORMATS = {  # for a folder without a template
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
              "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}"
              "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
              "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
              "{% endif %}"}
CHAT_CHOICES = ("own", "none", *CHAT_FORMATS)  # of --chat; own: the folder's


def load_tokenizer(path, chat=None) -> Tokenizer:
    """The tokenizer of folder `path`: tokenizer.json (BPE over bytes or characters), else Llama-3's
    tokenizer.model, else raw bytes. chat: one of CHAT_CHOICES, by default the folder's own format.
    Raises ValueError naming the file that is unsupported."""
    def optional(name):
        file = os.path.join(path, name)
        return read_json(file) if os.path.exists(file) else {}
    settings, config = optional("tokenizer_config.json"), optional("config.json")
    name = os.path.join(path, "tokenizer.json")
    read = parse_tokenizer_json
    if not os.path.exists(name):
        name, read = os.path.join(path, "tokenizer.model"), parse_tokenizer_model
    if not os.path.exists(name):
        if chat in CHAT_FORMATS:
            raise ValueError(f"{path}: bytes have no special tokens for --chat {chat}")
        return byte_tokenizer(config.get("vocab_size", 258))
    try:
        parts = read(name)
        special, bos_token = parts["special"], parts.pop("bos_token")
        names = {"bos_token": bos_token} | optional("special_tokens_map.json") | settings
        names = {k: text_of(v) for k, v in names.items() if k.endswith("_token") and v is not None}
        bos = special.get(names.get("bos_token"))
        eos = optional("generation_config.json").get("eos_token_id", config.get("eos_token_id"))
        eos = eos if isinstance(eos, list) else [eos]
        eos = [*eos, special.get(names.get("eos_token"))]
        template = CHAT_FORMATS.get(chat) or chat_template(path, settings)
        tokenizer = Tokenizer(
            **parts, bos_id=config.get("bos_token_id") if bos is None else bos,
            eos_ids=[i for i in eos if i is not None],
            template=None if chat == "none" else template, names=names)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as e:
        raise ValueError(f"{name}: unsupported ({type(e).__name__}: {e})") from None
    if chat in CHAT_FORMATS and tokenizer.end_of_turn is None:
        raise ValueError(f"{name}: its vocabulary lacks the special tokens of --chat {chat}")
    return tokenizer


def text_of(token):
    """The hub writes a token as a string or an object."""
    return token.get("content") if isinstance(token, dict) else token


def chat_template(path, settings):
    """The chat template of a model folder, or None."""
    template, newer = settings.get("chat_template"), os.path.join(path, "chat_template.jinja")
    if os.path.exists(newer):
        with open(newer, encoding="utf-8") as f:
            return f.read()
    if isinstance(template, list):  # several by name
        return {t["name"]: t["template"] for t in template}.get("default")
    return template


def byte_tokenizer(vocab_size=258) -> Tokenizer:
    """Raw bytes as tokens; BOS 256 and EOS 257 where the vocabulary has room."""
    if vocab_size < 256:
        raise ValueError(f"no tokenizer, and a vocabulary of {vocab_size} has no room for bytes")
    special = {s: i for s, i in (("<|bos|>", 256), ("<|eos|>", 257)) if i < vocab_size}
    vocab = {bytes([b]): b for b in range(256)}
    bos, eos = special.get("<|bos|>"), special.get("<|eos|>")
    eos_ids = [] if eos is None else [eos]
    return Tokenizer(ByteBPE(vocab, [], r"(?s:.{1,32})"), special, bos, eos_ids, add_bos=True)


def parse_tokenizer_json(path) -> dict:
    """The BPE of a tokenizer.json, its added tokens and what begins a document."""
    spec = read_json(path)
    model, added = spec["model"], spec.get("added_tokens", [])
    if model.get("type") != "BPE" or model.get("end_of_word_suffix"):
        raise ValueError("only BPE over bytes or characters is supported")
    for t in added:
        if t.get("lstrip") or t.get("rstrip") or t.get("single_word"):
            raise ValueError(f"added token {t['content']!r} strips spaces or needs word bounds")
        if t.get("normalized") and spec.get("normalizer"):
            raise ValueError(f"added token {t['content']!r} is found in normalized text")
    special = {t["content"]: t["id"] for t in added}
    bpe = (character_bpe if model.get("byte_fallback") else byte_bpe)(spec, special)
    bos_token = None  # what the hub's tokenizer puts before a text
    post = spec.get("post_processor") or {}
    for p in post.get("processors", [post]):
        if p.get("type") == "TemplateProcessing" and "SpecialToken" in p["single"][0]:
            bos_token = p["single"][0]["SpecialToken"]["id"]
    words = {t["content"] for t in added if not t.get("special")}
    return dict(bpe=bpe, special=special, words=words, add_bos=bos_token is not None,
                bos_token=bos_token)


def byte_bpe(spec, special) -> ByteBPE:
    """Of a tokenizer.json. GPT-2 writes bytes as letters: these stand for themselves, the others
    for 256, 257, ..."""
    if spec.get("normalizer"):
        raise ValueError("only byte-level BPE without a normalizer is supported")
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in letters]
    byte = {chr(b): b for b in letters} | {chr(256 + i): b for i, b in enumerate(rest)}

    def raw(token):
        return bytes(byte[c] for c in token)
    model = spec["model"]
    vocab = {raw(t): i for t, i in model["vocab"].items() if t not in special}
    merges = [m.replace(" ", "") if isinstance(m, str) else "".join(m) for m in model["merges"]]
    return ByteBPE(vocab, [raw(m) for m in merges], split_pattern(spec.get("pre_tokenizer") or {}))


def character_bpe(spec, special) -> CharacterBPE:
    """Of a tokenizer.json. Spaces become \u2581 by its normalizer, which may also prepend one, or
    by its pre_tokenizer."""
    model, cut = spec["model"], spec.get("pre_tokenizer") or {}
    normalizer, decoder = spec.get("normalizer") or {}, spec.get("decoder") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    what = [(s.get("type"), s.get("prepend") or s.get("content")) for s in steps]
    prepend, replace = ("Prepend", "\u2581"), ("Replace", "\u2581")
    if cut.get("type") == "Metaspace" and not cut.get("split", True) and not what:
        scheme = cut.get("prepend_scheme", "always")
        prefix, each = "" if scheme == "never" else "once", scheme == "always"
    elif not cut and what in ([replace], [prepend, replace]):
        prefix, each = ("always", True) if len(what) == 2 else ("", False)
    else:
        raise ValueError(f"normalizer {what} with pre_tokenizer {cut.get('type')}")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    strip = any(step.get("type") == "Strip" for step in decoder.get("decoders", ()))
    strip |= decoder.get("type") == "Metaspace" and prefix != ""
    return CharacterBPE(model["vocab"], merges, prefix, each, strip)


def split_pattern(spec) -> str:
    """The regular expression that cuts text as a tokenizer.json's pre_tokenizer does."""
    steps = spec.get("pretokenizers", [spec])
    kinds = [s.get("type") for s in steps]
    last, regex = steps[-1], steps[-1].get("use_regex", True)
    if kinds[-1] != "ByteLevel" or last.get("add_prefix_space"):
        raise ValueError(f"pre_tokenizer {kinds}: expected ByteLevel last, without a prefix space")
    if kinds == ["ByteLevel"] and regex:
        return GPT2_SPLIT
    if kinds == ["Digits", "ByteLevel"] and regex:
        # digits are cut out first: the GPT-2 pattern sees white space before a digit as an end
        digits = r"\p{N}" if steps[0].get("individual_digits") else r"\p{N}+"
        rest = GPT2_SPLIT.replace(r"| ?\p{N}+", "")
        return digits + "|" + rest.replace(r"|\s+(?!\S)", r"|\s+(?=\p{N})|\s+(?!\S)")
    if kinds == ["Split", "ByteLevel"] and not regex:
        if steps[0]["behavior"] == "Isolated" and not steps[0].get("invert"):
            return steps[0]["pattern"]["Regex"]
    raise ValueError(f"pre_tokenizer {kinds}")


def parse_tokenizer_model(path) -> dict:
    """Llama-3's tokenizer.model: lines of `base64 rank`, 256 special tokens after them."""
    vocab = {}
    with open(path, "rb") as f:
        for line in f.read().splitlines():
            token, rank = line.split()
            vocab[base64.b64decode(token, validate=True)] = int(rank)
    special = {f"<|{name}|>": len(vocab) + i for i, name in enumerate(LLAMA3_SPECIAL)}
    merges = sorted((t for t in vocab if len(t) > 1), key=vocab.get)
    return dict(bpe=ByteBPE(vocab, merges, LLAMA3_SPLIT), special=special, add_bos=True,
                bos_token="<|begin_of_text|>")


# --- command line: a dataclass field is a flag ---------------------------------------------------

def flag(default, help, least=None, choices=None, free=False, bare=None):
    """A dataclass field that is also a command-line flag. least: its lowest value; free: it may
    change when a run is resumed; bare: its value when it is given without one."""
    metadata = dict(help=help, least=least, choices=choices, free=free, bare=bare)
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def parse(configs, argv=None, description="", known_only=False):
    """One instance of each dataclass of flags, filled from the command line. What none of them
    knows (unless known_only), or a value that is not allowed, ends in one line and exit 2."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=functools.partial(argparse.HelpFormatter, width=100))
    for config in configs:
        hints = typing.get_type_hints(config)
        for f in dataclasses.fields(config):
            kinds = [t for t in typing.get_args(hints[f.name]) if t is not types.NoneType]
            options = argument(f, kinds[0] if kinds else hints[f.name])
            parser.add_argument(f"--{f.name}", default=f.default, **options)
    read = parser.parse_known_args if known_only else parser.parse_args
    values = vars(read(argv)[0] if known_only else read(argv))
    for f in (f for config in configs for f in dataclasses.fields(config)):
        value, least = values[f.name], f.metadata["least"]
        if least is not None and value is not None and not least <= value < math.inf:
            parser.error(f"--{f.name} must be at least {least} and finite, got {value}")
    return [config(**{f.name: values[f.name] for f in dataclasses.fields(config)})
            for config in configs]


def argument(f, kind) -> dict:
    """argparse's options of a dataclass field."""
    help = f.metadata["help"].replace("%", "%%")
    if f.default is not None:
        help += f" (default: {f.default})"
    if kind is bool:
        return dict(help=help, action=argparse.BooleanOptionalAction)
    if kind is list:
        return dict(help=help, action="append", metavar="S")
    if f.metadata["choices"]:
        once = dict(nargs="?", const=f.metadata["bare"]) if f.metadata["bare"] else {}
        return dict(help=help, type=kind, choices=f.metadata["choices"], **once)
    return dict(help=help, type=kind, metavar={int: "N", float: "X"}.get(kind, "S"))


def run(main):
    """Run a script's main(); what the user can mend ends in one line on stderr and exit 2."""
    script = os.path.basename(sys.argv[0])
    sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal can write every letter
    try:
        main()
    except (ValueError, OSError, SafetensorError) as e:
        print(f"{script}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def peak_memory(device="cpu") -> int:
    """Most bytes so far: allocated on a GPU, else resident in this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Config:
    model: str | None = flag(None, "folder with config.json and safetensors")
    prompt: str | None = flag(None, "text to answer or continue; - reads it from standard input")
    max_new_tokens: int = flag(256, "longest answer [tokens]", least=1)
    chat: str | None = flag(None, "the prompt's format (default: the folder's own, if it has one)",
                            choices=CHAT_CHOICES, bare="own")
    temperature: float = flag(0.0, "0 = greedy", least=0)
    top_p: float = flag(1.0, "draw from the likeliest tokens that hold this probability", least=0)
    seed: int = flag(0, "of the drawing and of policy random", least=0)
    device: str = flag("cpu", "torch device")
    dtype: str = flag("bfloat16", "of weights and cache", choices=tuple(DTYPES))


def main():
    import evict  # the one technique that this file's command offers
    config, policy = parse([Config, evict.Flags], description="Answer a prompt with a Llama.")
    if config.model is None or config.prompt is None:
        raise ValueError("--model and --prompt are needed")
    join(config.device)
    model = load_model(config.model, config.device, DTYPES[config.dtype])
    tokenizer = load_tokenizer(config.model, config.chat)
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    tokens = tokenizer.document(prompt)
    if tokenizer.template or config.chat not in (None, "none"):
        message = {"role": "user", "content": prompt}
        tokens = tokenizer.encode(tokenizer.chat([message]))
    print(beyond_training(model.config, len(tokens)), end="", file=sys.stderr)
    cache = policy.cache(model, config.seed)
    shown, times = "", [time.perf_counter()]
    for (answer,) in stream(model, [tokens], config.max_new_tokens, cache, None,
                            config.temperature, config.top_p, tokenizer.eos_ids, config.seed):
        times.append(time.perf_counter())
        text = tokenizer.decode(answer)
        if not text.endswith("\ufffd"):  # half a character waits for its other half
            print(text[len(shown):], end="", flush=True)
            shown = text
    n = len(tokens) + len(answer)
    full = 2 * model.config.n_layer * model.config.n_kv_head * model.config.head_dim * n
    full *= DTYPES[config.dtype].itemsize
    reading = len(tokens) / (times[1] - times[0])
    writing = (len(times) - 2) / max(times[-1] - times[1], 1e-9)
    print(f"\n\nprompt: {len(tokens)} tokens at {reading:.1f} tokens/s; answer: {len(answer)} at "
          f"{writing:.1f} tokens/s\nKV cache ({policy.policy}): {cache.nbytes() / 1e6:.2f} MB now, "
          f"with room for some tokens more; all entries are {full / 1e6:.2f} MB, of which it held "
          f"at most {float(cache.peak()):.0%}")
    said = evict.advice(policy.policy, float(cache.footprint()))
    if said:
        print(said, file=sys.stderr)


if __name__ == "__main__":
    import model  # evict.py imports this file: let every class exist once
    model.run(model.main)
