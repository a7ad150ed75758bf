"""Llama in plain PyTorch: configuration, network, KV cache, generation, tokenizer, loading and saving.

Everything works on packed tokens (N,) without a batch axis. The network asks one thing of the outside: a function
`attend(layer, q, k, v) -> out`. Causal attention over packed documents, a KV cache and a technique that learns which
heads need their cache are all just different `attend`s.

    python model.py --model DIR --prompt "Why is the sky blue?"       # DIR in the Hugging Face layout
"""
import argparse
import atexit
import base64
import binascii
import contextlib
import dataclasses
import datetime
import html
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

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from attention_triton import attention, decode

# --- configuration --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LlamaConfig:
    """Shapes and constants of a Llama. max_seq_len [tokens] is carried along for config.json: nothing here enforces it."""
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    n_ff: int
    head_dim: int
    max_seq_len: int = 2048
    rope_base: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "llama3" or "linear", "factor": ...}; None = plain RoPE
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple = ()

    @staticmethod
    def from_hf(hf: dict):
        """The config of a hub's config.json. Raises ValueError naming the field that is missing, wrong or unsupported."""
        kinds = hf.get("architectures") or ["LlamaForCausalLM"]
        if hf.get("model_type", "llama") != "llama" or not isinstance(kinds, list) or "LlamaForCausalLM" not in kinds:
            raise ValueError(f"unsupported architecture {kinds} (model_type {hf.get('model_type')!r}): only LlamaForCausalLM is")
        for name, plain in (("attention_bias", (False, None)), ("mlp_bias", (False, None)), ("quantization_config", (None,)),
                            ("hidden_act", ("silu", "swish", None)), ("tie_word_embeddings", (False, True, None))):
            if not any(hf.get(name) is value for value in plain) and hf.get(name) not in [x for x in plain if isinstance(x, str)]:
                raise ValueError(f"unsupported {name} = {hf[name]!r}")
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # newer and older spelling
        if not isinstance(rope, dict):
            raise ValueError(f"rope_scaling must be an object, got {rope!r}")
        n_embd, n_head = number(hf, "hidden_size"), number(hf, "num_attention_heads")
        n_kv_head = number(hf, "num_key_value_heads", n_head)
        if n_head % n_kv_head or (hf.get("head_dim") is None and n_embd % n_head):
            raise ValueError(f"{n_head} query heads fit neither {n_kv_head} KV heads nor width {n_embd} evenly")
        head_dim = number(hf, "head_dim", n_embd // n_head)
        if head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {head_dim}")
        vocab_size, eos = number(hf, "vocab_size"), hf.get("eos_token_id")
        eos = eos if isinstance(eos, list) else [eos] * (eos is not None)
        for i in [*eos, hf.get("bos_token_id")]:
            if i is not None and (type(i) is not int or not 0 <= i < vocab_size):
                raise ValueError(f"bos_token_id and eos_token_id must be ids below {vocab_size}, got {i!r}")
        return LlamaConfig(
            vocab_size=vocab_size, n_layer=number(hf, "num_hidden_layers", most=10_000), n_head=n_head, n_kv_head=n_kv_head,
            n_embd=n_embd, n_ff=number(hf, "intermediate_size"), head_dim=head_dim,
            max_seq_len=number(hf, "max_position_embeddings", 2048, most=2 ** 40), norm_eps=number(hf, "rms_norm_eps", 1e-6, float),
            rope_base=number(rope if rope.get("rope_theta") else hf, "rope_theta", 10000.0, float), rope_scaling=check_rope(rope),
            tie_embeddings=bool(hf.get("tie_word_embeddings")), bos_id=hf.get("bos_token_id"), eos_ids=tuple(eos))

    def to_hf(self) -> dict:
        """config.json as the hub spells it; from_hf reads back an equal config."""
        eos = self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "vocab_size": self.vocab_size, "num_hidden_layers": self.n_layer, "num_attention_heads": self.n_head,
                "num_key_value_heads": self.n_kv_head, "hidden_size": self.n_embd, "intermediate_size": self.n_ff,
                "head_dim": self.head_dim, "max_position_embeddings": self.max_seq_len, "rope_theta": self.rope_base,
                "rope_scaling": self.rope_scaling, "rms_norm_eps": self.norm_eps, "attention_bias": False,
                "mlp_bias": False, "tie_word_embeddings": self.tie_embeddings, "bos_token_id": self.bos_id,
                "eos_token_id": eos}


def number(values: dict, name, default=None, kind=int, most=2 ** 24):
    """A positive number from a JSON object: an int up to `most`, or a float. Raises ValueError naming the field."""
    value = default if values.get(name) is None else values[name]
    if value is None:
        raise ValueError(f"field {name!r} is missing")
    if type(value) not in (int, kind) or not 0 < value <= (most if kind is int else 1e30):
        raise ValueError(f"field {name!r} must be a positive {kind.__name__} of sensible size, got {str(value)[:40]!r}")
    return kind(value)


def check_rope(rope: dict):
    """The scaling part of rope_scaling or rope_parameters, or None if it changes nothing."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    needs = {"default": (), "linear": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if not isinstance(kind, str) or kind not in needs or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"unsupported rope_scaling {rope}: supported types are {', '.join(needs)}")
    scaling = {"rope_type": kind, **{name: number(rope, name, kind=float) for name in needs[kind]}}
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError("rope_scaling: low_freq_factor must be below high_freq_factor")
    return scaling if needs[kind] else None


# --- network: parameter names are the hub's -------------------------------------------------------------------------

def rope_frequencies(config, device=None):
    """Angle per position of each pair of head dimensions, (head_dim / 2,) float32 [radians / token].

    Type llama3 stretches wave lengths beyond the original context by `factor`, keeps the short ones and blends in
    between (Llama 3.1's model code); linear stretches all (arXiv:2306.15595)."""
    freq = config.rope_base ** (-torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim)
    s = config.rope_scaling
    if s is None:
        return freq
    if s["rope_type"] == "linear":
        return freq / s["factor"]
    turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)  # full turns within the original context
    keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return keep * freq + (1 - keep) * freq / s["factor"]


def rope(config, positions, dtype):
    """cos, sin (N, 1, D) of positions (N,), for `rotate`; the sign of rotate's swapped half is already in sin."""
    angles = positions[:, None, None].float() * rope_frequencies(config, positions.device)  # (N, 1, D / 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """RoPE as the hub lays heads out: a pair is (x[i], x[i + D/2]). x (N, ..., D)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def linear(x, weight):
    """x W^T. One row, as in decoding, takes the matrix-vector kernel: 0.75x the time of the product on a CPU in bfloat16. Not where
    gradients are wanted: autocast does not know it."""
    return torch.mv(weight, x[0]).unsqueeze(0) if x.shape[0] == 1 and not torch.is_grad_enabled() else F.linear(x, weight)


def stacked(*layers):
    """The matrices of layers that read the same input as one (all rows, n_in), no copy; None unless load_model laid them
    behind each other. Only without gradients; a token's products in SmolLM2 take 0.87x the time of separate ones (bfloat16)."""
    if torch.is_grad_enabled():
        return None
    first, rows, n_in = layers[0].weight, 0, layers[0].in_features
    for layer in layers:  # each so far into memory that begins where the first one does (tensors of a mapped file each begin their own)
        w, start = layer.weight, rows * n_in
        if w.storage_offset() != start or w.data_ptr() != first.data_ptr() + start * first.itemsize:
            return None
        rows += layer.out_features
    return first.as_strided((rows, n_in), (n_in, 1))


class Linear(nn.Linear):
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self):
        if not self.weight.is_meta:  # drawing on the meta device would import for a second
            super().reset_parameters()

    def forward(self, x):
        return linear(x, self.weight)


class Embedding(nn.Embedding):
    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.RMSNorm):
    ROWS = 512  # at a time without gradients: the float32 copy stays in the cache (0.7x the time at 2048 x 576, 0.4x at 8192)

    def forward(self, x):
        if torch.is_grad_enabled() or 1 < x.shape[0] <= self.ROWS or not x.is_cpu:
            return super().forward(x)
        wide_dtype = torch.promote_types(x.dtype, torch.float32)
        if x.shape[0] == 1:  # by a plain number: 4 operations instead of 11, 0.95x the time of a whole token
            norm = torch.linalg.vector_norm(x, dtype=wide_dtype).item()
            return (x * (norm * norm / x.shape[1] + self.eps) ** -0.5).mul_(self.weight)
        out = torch.empty_like(x)
        for part, out_part in zip(x.split(self.ROWS), out.split(self.ROWS)):
            wide = part.to(wide_dtype, copy=True)
            mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[1])
            out_part.copy_(wide.mul_(mean_square.add_(self.eps).rsqrt_()))
        return out.mul_(self.weight)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.q_proj = Linear(config.n_embd, config.n_head * config.head_dim)
        self.k_proj = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.v_proj = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.o_proj = Linear(config.n_head * config.head_dim, config.n_embd)

    def forward(self, x, layer, attend, cos, sin):
        n_head, n_kv_head, weight = self.n_head, self.n_kv_head, stacked(self.q_proj, self.k_proj, self.v_proj)
        if weight is None:
            q, k, v = (p(x).unflatten(1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))  # (N, heads, D)
            cos, sin = cos.to(q.dtype), sin.to(q.dtype)  # autocast makes q narrower than x
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        else:
            qkv = linear(x, weight).view(len(x), n_head + 2 * n_kv_head, self.head_dim)  # (N, heads, D)
            qk, v = rotate(qkv[:, :-n_kv_head], cos.to(qkv.dtype), sin.to(qkv.dtype)), qkv[:, -n_kv_head:]
            q, k = qk[:, :n_head], qk[:, n_head:]
        return self.o_proj(attend(layer, q, k, v).flatten(1))  # (N, n_head, D) -> (N, n_embd)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.n_ff)
        self.up_proj = Linear(config.n_embd, config.n_ff)
        self.down_proj = Linear(config.n_ff, config.n_embd)

    ROWS = 2048  # at a time: buffers much above 8 MB go back to the system when freed and come zeroed anew, page by page

    def forward(self, x):
        if x.shape[0] > self.ROWS:
            return torch.cat([self(part) for part in x.split(self.ROWS)])
        weight = stacked(self.gate_proj, self.up_proj)
        if weight is None:
            return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))
        gate, up = linear(x, weight).chunk(2, 1)  # (N, n_ff)
        return self.down_proj(F.silu(gate).mul_(up))


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up in one buffer, keeping for the backward pass its two inputs only (arXiv:2002.05202)."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, layer, attend, cos, sin, read=None):
        x = x + self.self_attn(self.input_layernorm(x), layer, attend, cos, sin)
        if read is not None:
            x = x + read(layer, x)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything of a Llama but its output matrix."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)

    def forward(self, config, tokens, attend, positions, read=None, checkpointing=False):
        """States after the final norm, (N, n_embd)."""
        check_tokens(tokens, config.vocab_size)
        x = self.embed_tokens(tokens)  # (N, n_embd)
        cos, sin = rope(config, positions.to(tokens.device), x.dtype)  # (N, 1, D)
        for layer, block in enumerate(self.layers):
            if checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, layer, attend, cos, sin, read, use_reentrant=False)
            else:
                x = block(x, layer, attend, cos, sin, read)
        return self.norm(x)


class Llama(nn.Module):
    """A Llama decoder on packed tokens. `checkpointing = True` recomputes each layer in the backward pass; with `sequence`, a
    SequenceParallel, several processes share every document."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.checkpointing, self.sequence = False, None
        self.model = Trunk(config)
        self.lm_head = None if config.tie_embeddings else Linear(config.n_embd, config.vocab_size)

    def init_weights(self, seed: int):
        """Fresh weights: every matrix N(0, 1 / fan_in), embeddings N(0, 1 / n_embd), norms 1."""
        rng = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5, generator=rng)
        return self

    @property
    def head(self):
        """The output matrix (V, n_embd): its own, or the embeddings'."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, tokens, attend=None, positions=None, read=None):
        """States after the final norm, (N, n_embd). Arguments as in forward; read(layer, x) (N, n_embd), if given, is added to the
        states x between a layer's attention and its MLP. With `sequence` the states are those of this process's stretch."""
        attend = attend or causal([0, tokens.numel()])
        positions = torch.arange(tokens.numel(), device=tokens.device) if positions is None else positions
        if self.sequence is not None:
            mine = self.sequence.stretch(len(tokens))
            attend, tokens, positions = self.sequence.attend(attend, len(tokens)), tokens[mine], positions[mine]
        return self.model(self.config, tokens, attend, positions, read, self.checkpointing)

    def forward(self, tokens, attend=None, positions=None):
        """Logits (N, V) of packed tokens (N,).

        attend(layer, q, k, v) -> out like q: q (N, n_head, D), k, v (N, n_kv_head, D), RoPE applied; default: causal.
        positions (N,) feed RoPE, 0 .. N-1 by default; packed documents need no reset, RoPE is relative.
        Raises ValueError for a token outside the vocabulary."""
        return F.linear(self.hidden(tokens, attend, positions), self.head)

    def loss(self, tokens, targets, attend=None, cu_seqlens=None, weights=None):
        """Mean cross-entropy [nats / target] over targets != -100; full logits never exist.

        tokens, targets (N,); cu_seqlens (n_doc + 1,): attention stays inside each document (without it: one document;
        an own `attend` sees to that itself); weights (N,) make the mean a weighted one. With `sequence` every process gets its
        stretch's part of the sum, times their number: the mean over the processes is the loss.
        Raises ValueError if nothing is left to predict."""
        if attend is None and cu_seqlens is not None:
            attend = causal(cu_seqlens)
        hidden = self.hidden(tokens, attend)
        if self.sequence is None:
            return cross_entropy(hidden, self.head, targets, weights)
        mine, weights = self.sequence.stretch(len(tokens)), torch.ones_like(targets, dtype=torch.float32) if weights is None else weights
        total = weights[targets != -100].sum() / self.sequence.size
        return cross_entropy(hidden, self.head, targets[mine], weights[mine], total)


def check_tokens(tokens, vocab_size):
    if tokens.numel() and (tokens.min() < 0 or tokens.max() >= vocab_size):
        bad = int(tokens.max() if tokens.max() >= vocab_size else tokens.min())
        raise ValueError(f"token {bad} is outside the vocabulary of {vocab_size}")


def causal(cu_seqlens):
    """The plain `attend`: causal attention inside each packed document."""
    cu_seqlens = torch.as_tensor(cu_seqlens).tolist()  # once: a layer that asks a GPU for them waits for it
    return lambda layer, q, k, v: attention(q, k, v, cu_seqlens, cu_seqlens)


def cross_entropy(hidden, head, targets, weights=None, total=None):
    """Mean cross-entropy [nats] of hidden (N, n_embd) through head (V, n_embd), over targets (N,) != -100. total: what the weighted
    sum is divided by, the sum of the weights by default."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weights = torch.ones_like(targets, dtype=wide) if weights is None else weights.to(wide)
    rows = targets != -100
    check_tokens(targets[rows], len(head))
    if not rows.all():
        hidden, targets, weights = hidden[rows], targets[rows], weights[rows]
    total = weights.sum() if total is None else total
    if not total > 0:
        raise ValueError("no target to predict: all are -100 or weigh nothing")
    return CrossEntropy.apply(hidden, head, targets, weights / total)


class Batch(typing.NamedTuple):
    """Packed documents to learn from: tokens (N,), targets (N,) with -100 for none, cu_seqlens (n_doc + 1,), and
    weights (N,) of the targets or None."""
    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    weights: torch.Tensor | None = None

    def documents(self, first, last):
        """Its documents first .. last - 1."""
        rows = slice(int(self.cu_seqlens[first]), int(self.cu_seqlens[last]))
        cu_seqlens = self.cu_seqlens[first:last + 1] - self.cu_seqlens[first]
        return Batch(self.tokens[rows], self.targets[rows], cu_seqlens, None if self.weights is None else self.weights[rows])


def divide(batch, n) -> list:
    """A batch in n parts of about equally many tokens, whole documents each; None for a part without any."""
    cu = (batch.cu_seqlens + getattr(batch, "cu_context", 0)).double()  # tokens before each document; CEPE's have contexts besides
    cuts = [int((cu - cu[-1] * i / n).abs().argmin()) for i in range(n)] + [len(cu) - 1]
    return [batch.documents(a, b) if b > a else None for a, b in zip(cuts, cuts[1:])]


def collate(docs, targets=None) -> Batch:
    """Documents, each token ids (n,), packed end to end. targets: one (n,) for each, -100 for none; by default the next token, and
    none for a document's last: nothing is predicted across documents."""
    docs = [torch.as_tensor(doc).long() for doc in docs]
    if targets is None:
        targets = [torch.cat((doc[1:], doc.new_full((1,), -100))) for doc in docs]
    cu_seqlens = torch.tensor([0, *(len(doc) for doc in docs)]).cumsum(0).int()
    return Batch(torch.cat(docs), torch.cat(targets), cu_seqlens)


class CrossEntropy(torch.autograd.Function):
    """sum_i w_i * nll_i, a block of rows at a time. The gradient is formed while a block's logits are at hand: they are
    computed once, and a block's float32 numbers are all that ever exists of them."""

    BLOCK = 2 ** 23  # logits at a time, 32 MB: buffers of that size are recycled, larger ones mapped and zeroed anew

    @staticmethod
    def forward(ctx, hidden, head, targets, weights):
        need_hidden, need_head = ctx.needs_input_grad[:2]
        loss = weights.new_zeros(())
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_head = torch.zeros_like(head, dtype=loss.dtype) if need_head else None
        n_rows = max(1, CrossEntropy.BLOCK // len(head))
        n_words = max(1, CrossEntropy.BLOCK // 4 // head.shape[1])  # of d_head at a time, 8 MB
        for start in range(0, len(targets), n_rows):
            rows = slice(start, start + n_rows)
            logits = F.linear(hidden[rows], head).to(loss.dtype)  # (n_rows, V)
            top, at_target = logits.amax(1, keepdim=True), logits.gather(1, targets[rows, None])
            p = logits.sub_(top).exp_()  # softmax, once divided by its sum
            total = p.sum(1, keepdim=True)
            loss += (weights[rows] * (total.log() + top - at_target)[:, 0]).sum()
            if need_hidden or need_head:
                d = p.mul_(weights[rows, None] / total)
                d.scatter_add_(1, targets[rows, None], -weights[rows, None])
                d = d.to(hidden.dtype)
                if need_hidden:
                    d_hidden[rows] = d @ head
                if need_head:  # a block of words at a time: half the loss's time at 49152 words
                    for part, sums in zip(d.split(n_words, 1), d_head.split(n_words)):
                        sums.addmm_(part.mT, hidden[rows]) if sums.dtype == d.dtype else sums.add_(part.mT @ hidden[rows])
        ctx.save_for_backward(d_hidden, None if d_head is None else d_head.to(head.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *(None if d is None else d * grad.to(d.dtype) for d in ctx.saved_tensors), None, None


def warmup_cosine(step, steps, warmup, floor) -> float:
    """Scale of a learning rate: linear over the first share `warmup` of the steps, then a cosine down to `floor`."""
    first = math.ceil(warmup * steps)
    if step < first:
        return (step + 1) / first
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


# --- several processes: torchrun starts them, torch.distributed connects them ------------------------------------------

class Processes(typing.NamedTuple):
    """The number of this process among `size`."""
    rank: int
    size: int


def processes() -> Processes:
    """This process and its companions: (0, 1) without torchrun."""
    together = distributed.is_available() and distributed.is_initialized()
    return Processes(distributed.get_rank(), distributed.get_world_size()) if together else Processes(0, 1)


def join_processes(device):
    """Connect the processes that torchrun started, if it did; all but the first one's output goes nowhere. Each takes the GPU of its
    own number. Raises ValueError for a device with a number."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or distributed.is_initialized():
        return
    if (kind := device.partition(":")[0]) != device:
        raise ValueError(f"--device {device}: several processes take a GPU each, want --device {kind}")
    if device == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend, patience = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", datetime.timedelta(days=7)
    distributed.init_process_group(backend, timeout=patience)  # some may evaluate for hours while others wait; torchrun notices a death
    atexit.register(distributed.destroy_process_group)
    if processes().rank:
        sys.stdout = open(os.devnull, "w")


def wait_for_all():
    if processes().size > 1:
        distributed.barrier()


def first_alone(work):
    """work(), by the first process before all others: what it leaves on disk they find."""
    if processes().rank:
        wait_for_all()
    result = work()
    if not processes().rank:
        wait_for_all()
    return result


def dealt(items) -> list:
    """Those of a list that this process is to do."""
    rank, size = processes()
    return items[rank::size]


def summed(values) -> list:
    """Sums of numbers over all processes."""
    total = torch.tensor(values, dtype=torch.float64)
    if processes().size > 1:
        distributed.all_reduce(total)
    return total.tolist()


class SequenceParallel:
    """`size` processes share every document: each holds a stretch of the tokens and, in attention, sees all of them with a share of
    the heads. Two exchanges (all-to-all) a layer, of q, k, v and of the outputs.

    Source: DeepSpeed Ulysses, arXiv:2309.14509. Raises ValueError if the KV heads do not divide among the processes."""

    def __init__(self, group, config: LlamaConfig):
        self.group, self.rank, self.size = group, distributed.get_rank(group), distributed.get_world_size(group)
        if config.n_kv_head % self.size:
            raise ValueError(f"{config.n_kv_head} KV heads do not divide among {self.size} processes")

    def lengths(self, n):
        """How many of n tokens each process holds."""
        return [n * (i + 1) // self.size - n * i // self.size for i in range(self.size)]

    def stretch(self, n):
        """The slice of n tokens that this process holds."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def heads(self, per_head):
        """The part for this process's heads of something (..., n_kv_head)."""
        return per_head.chunk(self.size, -1)[self.rank]

    def attend(self, attend, n):
        """`attend` over all n tokens of what comes and goes in stretches."""
        lengths = self.lengths(n)
        own = [lengths[self.rank]] * self.size

        def all_tokens(x):  # (n_own, H, D) -> (n, H / size, D)
            by_head = x.unflatten(1, (self.size, -1)).transpose(0, 1).flatten(0, 1)  # (size * n_own, H / size, D)
            return Exchange.apply(by_head, own, lengths, self.group)

        def all_heads(x):  # (n, H / size, D) -> (n_own, H, D)
            by_head = Exchange.apply(x, lengths, own, self.group).unflatten(0, (self.size, -1))
            return by_head.transpose(0, 1).flatten(1, 2)
        return lambda layer, q, k, v: all_heads(attend(layer, *map(all_tokens, (q, k, v))))


class Exchange(torch.autograd.Function):
    """Send sizes_out[i] rows to process i and get sizes_in[i] from it; gradients go the way back."""

    @staticmethod
    def forward(ctx, x, sizes_out, sizes_in, group):
        ctx.sizes_out, ctx.sizes_in, ctx.group = sizes_out, sizes_in, group
        out = x.new_empty(sum(sizes_in), *x.shape[1:])
        distributed.all_to_all_single(out, x.contiguous(), sizes_in, sizes_out, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return Exchange.apply(grad, ctx.sizes_in, ctx.sizes_out, ctx.group), None, None, None


# --- KV cache -------------------------------------------------------------------------------------------------------

@dataclass
class Slab:
    """The KV heads of one layer that hold equally many entries: k, v (heads, capacity, D), pos (heads, capacity)."""
    heads: list
    k: torch.Tensor
    v: torch.Tensor
    pos: torch.Tensor
    n: int  # entries in use

    def append(self, k, v, pos):
        """k, v (heads, T, D) and their positions (T,) become entries n .. n+T."""
        start, self.n = self.n, self.n + k.shape[1]
        if self.n > self.k.shape[1]:  # one slab at a time, and to 1/64 above need: a second whole cache never exists
            for name in ("k", "v", "pos"):
                old = getattr(self, name)
                new = old.new_empty(old.shape[0], self.n + self.n // 64, *old.shape[2:])
                new[:, :start] = old[:, :start]
                setattr(self, name, new)
        self.k[:, start:self.n] = k
        self.v[:, start:self.n] = v
        self.pos[:, start:self.n] = pos


class KVCache:
    """Keys and values of one sequence: per layer and KV head its own number of entries, each with its true position.

    K is stored after RoPE, KV heads once however many query heads read them. This one keeps everything; evict.py's drops
    entries of a layer as soon as the layer has attended. `log` holds per step (T, K): T new tokens met
    K (n_layer, n_kv_head) entries retained from before."""

    def __init__(self, model, chunk=None):
        self.config, self.chunk = model.config, chunk
        self.slabs = [[] for _ in range(self.config.n_layer)]
        self.seen, self.log = 0, []  # seen [tokens]: the next token's position, whatever was dropped
        self.held = self.count()  # entries when the step at hand began

    def prefill(self, model, tokens, chunk=None):
        """Run the prompt (N,) through the model, `chunk` tokens at a time (the cache's own, or all at once); the last token's state
        (n_embd,)."""
        for part in tokens.split(chunk or self.chunk or len(tokens)):
            hidden = model.hidden(part, self.attend, self.next_positions(len(part)).to(part.device))
        return hidden[-1]

    def attend(self, layer, q, k, v):
        """The `attend` of inference: append this step's k, v (T, n_kv_head, D), let q (T, n_head, D) see all that is held."""
        n_new, n_kv_head = k.shape[:2]
        if layer == 0:
            self.held, self.new = self.count(), torch.arange(self.seen, self.seen + n_new, dtype=torch.int32, device=k.device)
        if not self.slabs[layer]:
            empty = k.new_empty(n_kv_head, 0, k.shape[2])
            pos = torch.empty(n_kv_head, 0, dtype=torch.int32, device=k.device)
            self.slabs[layer] = [Slab(list(range(n_kv_head)), empty, empty, pos, 0)]
        if len(self.slabs[layer]) == 1:
            out = attend_slab(self.slabs[layer][0], q, k, v, self.new)
        else:
            out = torch.empty_like(q)
            for slab in self.slabs[layer]:
                o = attend_slab(slab, *(pick_heads(x, slab.heads, n_kv_head) for x in (q, k, v)), self.new)
                out.unflatten(1, (n_kv_head, -1))[:, slab.heads] = o.unflatten(1, (len(slab.heads), -1))
        self.evict(layer, q, k, v)
        if layer == self.config.n_layer - 1:
            self.end_step(n_new)
        return out

    def evict(self, layer, q, k, v):
        """Called when a layer has attended; may drop entries of that layer by `keep`. Nothing is dropped here."""

    def end_step(self, n_new):
        """Called after the last layer: n_new tokens have become part of the past."""
        self.log.append((n_new, self.held))
        self.seen += n_new

    def count(self):
        """Entries that each KV head holds, (n_layer, n_kv_head)."""
        return torch.tensor([[n for _, n in sorted((h, slab.n) for slab in slabs for h in slab.heads)]
                             or [0] * self.config.n_kv_head for slabs in self.slabs])

    def next_positions(self, n: int):
        """Positions (n,) of the next n tokens, for RoPE."""
        return torch.arange(self.seen, self.seen + n)

    def keep(self, layer: int, kept: list):
        """Drop all entries of a layer but kept[head], indices (n_head_kept,) into that head's entries, ascending."""
        old = {h: (slab, i) for slab in self.slabs[layer] for i, h in enumerate(slab.heads)}
        sizes = {}
        for h, index in enumerate(kept):
            sizes.setdefault(len(index), []).append(h)
        slabs = []
        for n, heads in sizes.items():  # heads that keep equally many share a slab
            gather = lambda name: torch.stack([getattr(old[h][0], name)[old[h][1]][kept[h]] for h in heads])
            slabs.append(Slab(heads, gather("k"), gather("v"), gather("pos"), n))
        self.slabs[layer] = slabs

    def positions(self, layer: int, head: int):
        """Positions of the entries that KV head holds, ascending, int64."""
        for slab in self.slabs[layer]:
            if head in slab.heads:
                return slab.pos[slab.heads.index(head), :slab.n].long()
        return torch.empty(0, dtype=torch.long)

    def nbytes(self) -> int:
        """Bytes allocated for K and V."""
        return sum(x.nbytes for slabs in self.slabs for slab in slabs for x in (slab.k, slab.v))

    def footprint(self) -> Fraction:
        """Cells of (query row, key) held over time, as a share of full causal attention's. Raises ValueError before any step."""
        return footprint(self.log)

    def peak(self) -> Fraction:
        """Most entries held in one step, as a share of all tokens. Raises ValueError before any step."""
        return max(n_new + Fraction(int(held.sum()), held.numel()) for n_new, held in self.log) / sum(t for t, _ in self.log)


def attend_slab(slab, q, k, v, pos):
    """Append k, v (T, heads, D) at positions pos (T,) to a slab and let q (T, n_rep * heads, D) see all that it holds."""
    slab.append(k.transpose(0, 1), v.transpose(0, 1), pos)
    keys, values = slab.k[:, :slab.n], slab.v[:, :slab.n]  # (heads, n, D)
    if len(q) == 1:
        return decode(q[0], keys, values).unsqueeze(0)
    return attention(q, keys.transpose(0, 1), values.transpose(0, 1), [0, len(q)], [0, slab.n])


def pick_heads(x, heads, n_kv_head):
    """The given KV heads, or their query heads, of x (T, n_kv_head or n_head, D)."""
    return x.unflatten(1, (n_kv_head, -1))[:, heads].flatten(1, 2)


def footprint(log) -> Fraction:
    """KV footprint of steps (T, K): T rows over K (n_layer, n_kv_head) retained entries cost T(T+1)/2 + T*K cells.

    Source: "Cache Me If You Can", arXiv:2506.17121, section 2.1; mean over layers and KV heads."""
    n = sum(n_new for n_new, _ in log)
    if n == 0:
        raise ValueError("no step has been logged yet")
    cells = sum(n_new * (n_new + 1) // 2 + n_new * Fraction(int(held.sum()), held.numel()) for n_new, held in log)
    return cells / (n * (n + 1) // 2)


# --- generation -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def stream(model, tokens, cache=None, chunk=None, temperature=0.0, top_p=1.0, generator=None):
    """Yield new token ids without end; see generate."""
    tokens = torch.as_tensor(tokens, device=model.head.device)
    if tokens.numel() == 0:
        raise ValueError("the prompt has no tokens")
    if chunk is not None and chunk < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"want chunk >= 1, temperature >= 0 and 0 < top_p <= 1, got {chunk}, {temperature}, {top_p}")
    cache = KVCache(model) if cache is None else cache
    hidden = cache.prefill(model, tokens, chunk)
    while True:
        logits = torch.mv(model.head, hidden).float()  # (V,)
        yield (token := pick(logits, temperature, top_p, generator))
        part = torch.tensor([token], device=tokens.device)
        hidden = model.hidden(part, cache.attend, cache.next_positions(1).to(part.device))[-1]


def pick(logits, temperature, top_p, generator=None) -> int:
    """One token of logits (V,): the best at temperature 0, else drawn from the smallest set that holds top_p."""
    if temperature == 0:
        return int(logits.argmax())
    p, order = ((logits - logits.max()).double() / temperature).softmax(-1).sort(descending=True)
    p[1:][p.cumsum(-1)[:-1] >= top_p] = 0  # keeps the token that crosses top_p
    return int(order[torch.multinomial(p, 1, generator=generator)])


def generate(model, tokens, max_new_tokens, cache=None, chunk=None, temperature=0.0, top_p=1.0, stop_ids=(), generator=None):
    """New token ids (a list, at most max_new_tokens) after the prompt `tokens` (N,); a stop id ends it and is left out.

    chunk [tokens]: prefill that many at a time; by default the cache's own, or all at once. cache: a KVCache to use and continue.
    temperature 0 is greedy; top_p keeps the most likely tokens that together hold that probability.
    Raises ValueError: no tokens, a token outside the vocabulary, chunk < 1, temperature < 0, top_p outside (0, 1]."""
    out = []
    for _, token in zip(range(max_new_tokens), stream(model, tokens, cache, chunk, temperature, top_p, generator)):
        if token in stop_ids:
            break
        out.append(token)
    return out


# --- loading and saving: the Hugging Face layout --------------------------------------------------------------------

def read_json(path, kind=dict):
    """A JSON object, or a list, from a file. Raises ValueError naming the file if it holds none, FileNotFoundError if there is none."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except (ValueError, RecursionError) as e:  # ValueError: broken UTF-8, broken JSON, numbers of thousands of digits
        raise ValueError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(value, kind):
        raise ValueError(f"{path}: want a JSON {'object' if kind is dict else 'list'}, got {type(value).__name__}")
    return value


def load_config(path) -> LlamaConfig:
    """The LlamaConfig of the folder `path`."""
    if not os.path.isdir(path):
        raise FileNotFoundError(f"no model folder {path}")
    name = os.path.join(path, "config.json")
    hf = read_json(name)
    try:
        return LlamaConfig.from_hf(hf)
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None


def load_model(path, device="cpu", dtype=torch.float32) -> Llama:
    """The Llama in folder `path`: config.json and model.safetensors, or its shards by model.safetensors.index.json.

    Tensors are memory-mapped and copied only to be converted or to lie beside those that read the same input.
    Raises ValueError / FileNotFoundError naming what is missing, extra, misshapen, truncated or unsupported."""
    with torch.device("meta"):
        model = Llama(load_config(path))
    want = dict(model.named_parameters())
    tensors = {}
    for file in weight_files(path):
        tensors |= read_tensors(file, want, device, dtype)
    if missing := sorted(want.keys() - tensors.keys()):
        raise ValueError(f"{path}: {len(missing)} tensors are missing, such as {missing[0]}")
    lay_together(tensors, "model", model.config.n_layer)
    model.load_state_dict({name: nn.Parameter(tensors[name]) for name in want}, assign=True)
    return model


def lay_together(tensors, trunk, n_layer):
    """Put weights that read the same input behind each other in memory, for `stacked`."""
    for layer in range(n_layer):
        for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            names = [f"{trunk}.layers.{layer}.{name}.weight" for name in names]
            rows = torch.cat([tensors[name] for name in names])
            tensors |= zip(names, rows.split([len(tensors[name]) for name in names]))


def weight_files(path):
    """The safetensors files of a model folder; those an index names must lie in the folder itself."""
    single, index = os.path.join(path, "model.safetensors"), os.path.join(path, "model.safetensors.index.json")
    if os.path.exists(single):
        return [single]
    if not os.path.exists(index):
        raise FileNotFoundError(f"{path}: neither model.safetensors nor model.safetensors.index.json")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(
            isinstance(s, str) and s == os.path.basename(s) and s.endswith(".safetensors") for s in shards.values()):
        raise ValueError(f"{index}: weight_map must name files of this folder")
    return [os.path.join(path, s) for s in sorted(set(shards.values()))]


def read_tensors(file, want, device, dtype):
    """Tensors of one safetensors file by name, checked against the parameters `want` before anything is read."""
    from safetensors import SafetensorError, safe_open
    if not os.path.isfile(file):
        raise FileNotFoundError(f"no file {file}")
    tensors = {}
    try:
        with safe_open(file, framework="pt") as f:
            for name in f.keys():
                if name.endswith("rotary_emb.inv_freq"):  # a buffer that old checkpoints carry; it follows from the config
                    continue
                tied = name == "lm_head.weight" and name not in want  # a second copy of tied embeddings
                if name not in want and not tied:
                    raise ValueError(f"{file}: unexpected tensor {name}")
                shape = tuple(want["model.embed_tokens.weight" if tied else name].shape)
                if tuple(f.get_slice(name).get_shape()) != shape:
                    raise ValueError(f"{file}: {name} has shape {tuple(f.get_slice(name).get_shape())}, want {shape}")
                if not tied:
                    tensor = f.get_tensor(name)
                    if not tensor.is_floating_point():
                        raise ValueError(f"{file}: {name} has dtype {tensor.dtype}, want a floating-point one")
                    tensors[name] = tensor.to(device, dtype)
    except SafetensorError as e:
        raise ValueError(f"{file}: not a whole safetensors file ({e})") from None
    return tensors


def save_model(model, path, max_shard_bytes=5_000_000_000):
    """Write config.json and model.safetensors (or shards and their index) into folder `path`, in the model's dtype.

    Each file appears under its name only when it is whole. Raises OSError, leaving no part behind."""
    os.makedirs(path, exist_ok=True)
    shards, size = [{}], 0
    for name, p in model.named_parameters():
        if shards[-1] and size + p.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = p.detach().contiguous()
        size += p.nbytes
    names = ["model.safetensors"] if len(shards) == 1 else \
        [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, tensors in zip(names, shards):
        write_tensors(os.path.join(path, file), tensors)
    single, index = os.path.join(path, "model.safetensors"), os.path.join(path, "model.safetensors.index.json")
    if len(shards) > 1:
        total = sum(p.nbytes for p in model.parameters())
        write_json(index, {"metadata": {"total_size": total},
                           "weight_map": {name: file for file, tensors in zip(names, shards) for name in tensors}})
    with contextlib.suppress(FileNotFoundError):  # what an earlier save of another size left
        os.remove(index if len(shards) == 1 else single)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    write_json(os.path.join(path, "config.json"), model.config.to_hf() | {"torch_dtype": dtype})


def write_tensors(path, tensors: dict, metadata=None):
    """A safetensors file, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    with replacing(path) as part:
        try:
            save_file(tensors, part, metadata={"format": "pt"} | (metadata or {}))
        except SafetensorError as e:
            raise OSError(f"cannot write {path}: {e}") from None


def write_json(path, value):
    """A JSON file (strict: no NaN), whole or not at all."""
    with replacing(path) as part:
        with open(part, "w", encoding="utf-8") as f:
            json.dump(value, f, indent=2, allow_nan=False)
            f.write("\n")


def append_line(path, value):
    """Add a line of strict JSON to a file, whole or not at all; several processes may do so at once."""
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
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise


# --- tokenizer ------------------------------------------------------------------------------------------------------

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# Llama 3.1's names for the ids from 128000 on; the rest up to 128255 are reserved_special_token_N, N counted from 0
LLAMA3_SPECIAL = ("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
                  "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id", "eom_id",
                  "eot_id", "python_tag", *(f"reserved_special_token_{i}" for i in range(3, 248)))


class Tokenizer:
    """Byte-level BPE on tiktoken. `special` maps added tokens to ids; encode finds them in text, as the hub's do.

    vocab: token bytes -> id. merges: token bytes in the order in which BPE builds them (single bytes need no merge).
    bos_id, eos_ids: ids or None / (); add_bos: whether this model's documents start with bos_id; system: the default system
    turn of the folder's chat template. Raises ValueError for ids, tokens or a split pattern that cannot be."""

    def __init__(self, vocab, merges, split, special=None, bos_id=None, eos_ids=(), add_bos=False, system=None):
        import tiktoken
        self.special, self.bos_id, self.eos_ids, self.system = special or {}, bos_id, tuple(eos_ids), system
        self.add_bos = add_bos and bos_id is not None
        self.bytes = {i: t for t, i in vocab.items()} | {i: s.encode() for s, i in self.special.items()}
        for i in [*self.bytes, *self.eos_ids, *[bos_id] * (bos_id is not None)]:
            if type(i) is not int or not 0 <= i < 2 ** 31:
                raise ValueError(f"token ids must be whole numbers >= 0, got {i!r}")
        names = sorted(self.special)
        for a, b in zip(names, names[1:]):
            if not a or b.startswith(a):  # which of the two tiktoken would find in a text is left to chance
                raise ValueError(f"unsupported added tokens: {a!r} is the beginning of {b!r}")
        single = [bytes([b]) for b in range(256)]
        tokens = list(dict.fromkeys([*single, *merges]))  # a token's rank is its place in the order of merging
        self.ids = [vocab.get(t, -1) for t in tokens] + list(self.special.values())
        try:
            self.encoding = tiktoken.Encoding(
                "from file", pat_str=split + r"|(?s:.)", mergeable_ranks={t: r for r, t in enumerate(tokens)},  # (?s:.): drop nothing
                special_tokens={s: len(tokens) + i for i, s in enumerate(self.special)})
            self.encoding.encode(" a1\n", allowed_special="all")
        except BaseException as e:  # a pattern that matches nothing at all panics, which is no Exception
            if isinstance(e, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            raise ValueError(f"the split pattern {split[:60]!r} does not work ({e})") from None

    def encode(self, text: str) -> list[int]:
        """Token ids of text, without a leading BOS. A byte that the vocabulary lacks has none (as with the hub's)."""
        ids = self.ids
        return [ids[r] for r in self.encoding.encode(text, allowed_special="all") if ids[r] >= 0]

    def document(self, text: str) -> list[int]:
        """Token ids of text that begins a document: after BOS, where this model's documents have one."""
        return [self.bos_id] * self.add_bos + self.encode(text)

    def decode(self, ids) -> str:
        """The text of token ids; broken UTF-8 and ids without a token (models pad their vocabulary) become U+FFFD."""
        return b"".join(self.bytes.get(int(i), b"\xff") for i in ids).decode("utf-8", errors="replace")

    @property
    def has_chat(self) -> bool:
        """Whether `chat` knows this tokenizer's format."""
        return bool({"<|im_start|>", "<|start_header_id|>"} & self.special.keys())

    def chat(self, messages: list[dict]) -> str:
        """The prompt for the assistant's next turn after messages [{"role", "content"}], in ChatML or Llama-3 format.

        The folder's own default system turn is used where its ChatML template has one and messages do not begin with
        one. Llama 3.1's date lines in the system turn are left out. Raises ValueError if the tokenizer knows neither format."""
        for m in messages:
            if not isinstance(m, dict) or not isinstance(m.get("role"), str) or not isinstance(m.get("content"), str):
                raise ValueError(f"want messages {{'role': str, 'content': str}}, got {m!r}")
        if "<|im_start|>" in self.special:
            if self.system is not None and (not messages or messages[0]["role"] != "system"):
                messages = [{"role": "system", "content": self.system}, *messages]
            turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
            return "".join(turns) + "<|im_start|>assistant\n"
        if "<|start_header_id|>" in self.special:
            turn = "<|start_header_id|>{role}<|end_header_id|>\n\n"
            turns = [turn.format(role=m["role"]) + m["content"].strip() + "<|eot_id|>" for m in messages]
            return "<|begin_of_text|>" + "".join(turns) + turn.format(role="assistant")
        raise ValueError("this tokenizer has neither ChatML's nor Llama-3's chat tokens")


def load_tokenizer(path) -> Tokenizer:
    """The tokenizer of folder `path`: tokenizer.json (byte-level BPE), else Llama-3's tokenizer.model, else raw bytes.

    Raw bytes are ids 0..255, with 256 for BOS and 257 for EOS where the model's vocabulary has room for them.
    Raises ValueError naming the file and what of it is unsupported."""
    if not os.path.isdir(path):
        raise FileNotFoundError(f"no model folder {path}")
    inside = lambda name: os.path.join(path, name)
    optional = lambda name: read_json(inside(name)) if os.path.exists(inside(name)) else {}
    settings, generation = optional("tokenizer_config.json"), optional("generation_config.json")
    if os.path.exists(inside("tokenizer.json")):
        name, read = inside("tokenizer.json"), lambda f: parse_tokenizer_json(read_json(f))
    elif os.path.exists(inside("tokenizer.model")):
        name, read = inside("tokenizer.model"), parse_tokenizer_model
    else:
        return byte_tokenizer(optional("config.json").get("vocab_size", 258))
    template = settings.get("chat_template")
    if os.path.exists(inside("chat_template.jinja")):  # newer checkpoints keep it apart
        with open(inside("chat_template.jinja"), encoding="utf-8") as f:
            template = f.read()
    text = lambda t: t.get("content") if isinstance(t, dict) else t  # the hub writes tokens as strings or objects
    config = optional("config.json")
    try:
        parts = read(name)
        special, bos_token = parts["special"], parts.pop("bos_token")
        bos = special.get(text(settings.get("bos_token") or bos_token), config.get("bos_token_id"))
        eos = generation.get("eos_token_id", config.get("eos_token_id"))
        eos = [*(eos if isinstance(eos, list) else [eos]), special.get(text(settings.get("eos_token")))]
        return Tokenizer(**parts, bos_id=bos, eos_ids=dict.fromkeys(i for i in eos if i is not None), system=default_system(template))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as e:
        raise ValueError(f"{name}: {e if type(e) is ValueError else f'unexpected content ({e!r})'}") from None


def default_system(template):
    """The system turn that a ChatML template puts first of itself, or None: the literal text between its marks."""
    found = re.search(r"<\|im_start\|>system(?:\\n|\n)([^{}'+]+?)<\|im_end\|>", str(template))
    return found and found[1]


def byte_tokenizer(vocab_size=258) -> Tokenizer:
    """Raw bytes as tokens; BOS 256 and EOS 257 where the vocabulary has room. Raises ValueError if it has none for bytes."""
    if type(vocab_size) is not int or vocab_size < 256:
        raise ValueError(f"no tokenizer, and a vocabulary of {vocab_size!r} has no room for raw bytes")
    special = {s: i for s, i in (("<|bos|>", 256), ("<|eos|>", 257)) if i < vocab_size}
    return Tokenizer({bytes([b]): b for b in range(256)}, [], r"(?s:.{1,32})", special, special.get("<|bos|>"),
                     [special["<|eos|>"]] if "<|eos|>" in special else (), add_bos="<|bos|>" in special)


def parse_tokenizer_json(spec: dict) -> dict:
    """vocab, merges, split pattern and added tokens of a byte-level BPE tokenizer.json, for Tokenizer."""
    model = spec["model"]
    if model.get("type") != "BPE" or spec.get("normalizer") or model.get("byte_fallback") or model.get("end_of_word_suffix"):
        raise ValueError("unsupported tokenizer: only byte-level BPE without a normalizer is")
    odd = [t["content"] for t in spec.get("added_tokens", []) if t.get("lstrip") or t.get("rstrip") or t.get("single_word")]
    if odd:
        raise ValueError(f"unsupported added token {odd[0]!r}: it strips spaces or wants word bounds")
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes: these stand for
    rest = [b for b in range(256) if b not in letters]               # themselves, the others for 256, 257, ...
    byte = {chr(c): b for c, b in zip([*letters, *range(256, 256 + len(rest))], [*letters, *rest])}
    raw = lambda token: bytes(byte[c] for c in token)
    special = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
    if not all(isinstance(s, str) and s for s in special):
        raise ValueError("an added token is not a text")
    vocab = {raw(t): i for t, i in model["vocab"].items() if t not in special}
    merges = [raw("".join(m.split(" ")) if isinstance(m, str) else "".join(m)) for m in model["merges"]]
    post = spec.get("post_processor") or {}
    first = [p["single"][0].get("SpecialToken") for p in post.get("processors", [post]) if p.get("type") == "TemplateProcessing"]
    bos_token = first[0]["id"] if first and first[0] else None  # what the hub's tokenizer puts before a text
    return dict(vocab=vocab, merges=merges, split=split_pattern(spec.get("pre_tokenizer")), special=special,
                add_bos=bos_token is not None, bos_token=bos_token)


def split_pattern(spec) -> str:
    """The regular expression that cuts text as a tokenizer.json's pre_tokenizer does."""
    steps = (spec or {}).get("pretokenizers", [spec or {}])
    kinds = [s.get("type") for s in steps]
    if kinds[-1:] != ["ByteLevel"] or steps[-1].get("add_prefix_space"):
        raise ValueError(f"unsupported pre_tokenizer {kinds}: want ByteLevel last, without a prefix space")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return GPT2_SPLIT
    if kinds == ["Digits", "ByteLevel"] and steps[1].get("use_regex", True):
        # digits are cut out before the GPT-2 pattern sees the text, so white space before a digit stays in one piece
        digits = r"\p{N}" if steps[0].get("individual_digits") else r"\p{N}+"
        return digits + "|" + GPT2_SPLIT.replace(r"| ?\p{N}+", "").replace(r"|\s+(?!\S)", r"|\s+(?=\p{N})|\s+(?!\S)")
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True) \
            and steps[0]["behavior"] == "Isolated" and not steps[0].get("invert"):
        return steps[0]["pattern"]["Regex"]
    raise ValueError(f"unsupported pre_tokenizer {kinds}")


def parse_tokenizer_model(path) -> dict:
    """Llama-3's tokenizer.model: lines of `base64 rank`, 256 special tokens after them."""
    with open(path, "rb") as f:
        lines = f.read().splitlines()
    try:
        vocab = {base64.b64decode(token, validate=True): int(rank) for token, rank in (line.split() for line in lines if line)}
    except (ValueError, binascii.Error):
        raise ValueError("not Llama-3's format (base64 and rank in each line); SentencePiece is not supported") from None
    special = {f"<|{name}|>": len(vocab) + i for i, name in enumerate(LLAMA3_SPECIAL)}
    merges = sorted((t for t in vocab if len(t) > 1), key=vocab.get)
    return dict(vocab=vocab, merges=merges, split=LLAMA3_SPLIT, special=special, add_bos=True, bos_token="<|begin_of_text|>")


# --- figures -----------------------------------------------------------------------------------------------------------

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f", "#b2182b", "#542788", "#8c6d31")


def ticks(most) -> list:
    """Round numbers from 0 to `most`, at most six."""
    power = 10 ** math.floor(math.log10(most / 5))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= most / 5 * (1 - 1e-9))
    return [float(f"{step * i:.6g}") for i in range(int(most / step + 1e-9) + 1)]


def save_plot(path, *args, **settings):
    """Write what `plot` draws, and say so."""
    with replacing(path) as part, open(part, "w", encoding="utf-8") as f:
        f.write(plot(*args, **settings))
    print(f"figure: {path}")


def plot(curves, title, x_label, y_label, x_most=None, y_most=None, marks=None) -> str:
    """Lines from 0 on as SVG text. curves: name -> points (x, y), named at the right; the axes end at x_most and a little above y_most (by
    default the largest of all); marks: name -> y of a dashed line. Raises ValueError for a point that is not finite."""
    title, x_label, y_label = map(html.escape, (title, x_label, y_label))
    width, height, left, top, right, bottom = 780, 440, 60, 40, 190, 50
    points = [point for xy in curves.values() for point in xy]
    if not all(math.isfinite(v) for point in points for v in point):
        raise ValueError("plot: a point is not finite")
    x_most = x_most or max([x for x, _ in points], default=0) or 1.0
    y_most = max([y_most or 0, *(y for _, y in points)]) or 1.0
    x = lambda v: left + v / x_most * (width - left - right)
    y = lambda v: height - bottom - v / (1.05 * y_most) * (height - top - bottom)
    middle, floor = (y(0) + top) / 2, y(0)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="white"/>', f'<text x="{left}" y="20" font-size="14">{title}</text>',
           f'<text x="{x(x_most / 2):.1f}" y="{height - 12}" text-anchor="middle">{x_label}</text>',
           f'<text x="16" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 16 {middle:.1f})">{y_label}</text>']
    for a in ticks(x_most):
        out.append(f'<path d="M{x(a):.1f} {floor:.1f}V{top}" stroke="#e5e5e5"/>')
        out.append(f'<text x="{x(a):.1f}" y="{floor + 18:.1f}" text-anchor="middle">{a:g}</text>')
    for b in ticks(y_most):
        out.append(f'<path d="M{left} {y(b):.1f}H{x(x_most):.1f}" stroke="#e5e5e5"/>')
        out.append(f'<text x="{left - 8}" y="{y(b) + 4:.1f}" text-anchor="end">{b:g}</text>')
    for name, v in (marks or {}).items():
        out.append(f'<path d="M{left} {y(v):.1f}H{x(x_most):.1f}" stroke="#555" stroke-dasharray="5 4"/>')
        out.append(f'<text x="{left + 4}" y="{y(v) - 4:.1f}" fill="#555">{html.escape(name)}</text>')
    ends, at, above = sorted((y(max(xy)[1]), name) for name, xy in curves.items()), {}, top - 15
    for end, name in ends:  # names at least 15 pixels apart, ...
        above = at[name] = max(end, above + 15)
    for i, (_, name) in enumerate(reversed(ends)):  # ... and none below the plot
        at[name] = min(at[name], floor - 15 * i)
    for i, (name, xy) in enumerate(curves.items()):
        xy, colour = sorted(xy), COLOURS[i % len(COLOURS)]
        line = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in xy)
        out.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        out += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.6" fill="{colour}"/>' for a, b in xy]
        out.append(f'<path d="M{x(xy[-1][0]):.1f} {y(xy[-1][1]):.1f}L{x(x_most) + 12:.1f} {at[name]:.1f}" stroke="{colour}" stroke-width="0.6"/>')
        out.append(f'<text x="{x(x_most) + 15:.1f}" y="{at[name] + 4:.1f}" fill="{colour}">{html.escape(name)}</text>')
    return "\n".join([*out, "</svg>", ""])


# --- command line: a dataclass field is a flag ----------------------------------------------------------------------

def flag(default, help, low=None, high=None, choices=None):
    """A dataclass field that is also a command-line flag; help names the unit, low and high bound the value."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def parse(configs, argv=None, description=""):
    """Dataclasses of flags filled from the command line: one instance per class in `configs`.

    What none of them knows, or a value that is not allowed, ends in one line and exit 2."""
    formatter = lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120)
    parser = OneLineParser(description=description, allow_abbrev=False, formatter_class=formatter)
    for config in configs:
        group, hints = parser.add_argument_group(f"{config.__module__} {config.__name__}"), typing.get_type_hints(config)
        for f in dataclasses.fields(config):
            kind = next((t for t in typing.get_args(hints[f.name]) if t is not types.NoneType), hints[f.name])
            options = dict(default=f.default, help=f.metadata["help"].replace("%", "%%")
                           + ("" if f.default is None else f" (default: {f.default})"))
            if kind is bool:
                options |= dict(action=argparse.BooleanOptionalAction)
            elif f.metadata["choices"]:
                options |= dict(choices=f.metadata["choices"])
            else:
                options |= dict(type=kind, metavar={int: "N", float: "X"}.get(kind, "S"))
            group.add_argument(f"--{f.name}", **options)
    values = vars(parser.parse_args(argv))
    for f in (f for config in configs for f in dataclasses.fields(config)):
        value, low, high = values[f.name], f.metadata["low"], f.metadata["high"]
        high = 2 ** 40 if high is None and low is not None else high  # beyond any count or rate; refuses inf and nan
        if value is not None and not ((low is None or value >= low) and (high is None or value <= high)):
            wanted = " and ".join([f">= {low}"] * (low is not None) + [f"<= {high}"] * (high is not None))
            parser.error(f"--{f.name} must be {wanted}, got {value}")
    return [config(**{f.name: values[f.name] for f in dataclasses.fields(config)}) for config in configs]


def run(main):
    """Run a script's main(); what the user can mend ends in one line on stderr and exit 2."""
    try:
        main()
    except MemoryError:
        print(f"{os.path.basename(sys.argv[0])}: not enough memory for these sizes", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as e:
        reason = " ".join(str(e).split()) if isinstance(e, ValueError) or e.errno is None else \
            ": ".join(str(x) for x in (e.filename, e.strerror) if x)
        print(f"{os.path.basename(sys.argv[0])}: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def check_device(name) -> str:
    """A device that torch can use here. Raises ValueError naming it otherwise."""
    try:
        torch.empty(1, device=name).item()
        return name
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"--device {name!r} cannot be used here ({str(e).splitlines()[0]})") from None


def peak_memory() -> int:
    """Most bytes that this process had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def copy_rate(device) -> float:
    """Bytes per second, read and written, of copying 256 MB: what memory gives; the best of 5."""
    source = torch.ones(2 ** 26, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        float(target[-1])  # waits for a GPU
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times[1:])


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Config:
    model: str | None = flag(None, "folder with config.json and safetensors")
    prompt: str | None = flag(None, "text to answer or continue")
    max_new_tokens: int = flag(256, "longest answer [tokens]", low=1)
    chat: bool | None = flag(None, "use the model's chat format; by default if its tokenizer has one")
    temperature: float = flag(0.0, "0 = greedy", low=0)
    top_p: float = flag(1.0, "draw from the likeliest tokens that hold this probability", low=0, high=1)
    chunk: int | None = flag(None, "prefill so many tokens at a time; by default all at once", low=1)
    seed: int = flag(0, "of the drawing", low=0)
    device: str = flag("cpu", "torch device")
    dtype: str = flag("bfloat16", "of weights and cache", choices=tuple(DTYPES))


def main():
    config, = parse([Config], description="Answer a prompt with a Llama checkpoint.")
    if config.model is None or config.prompt is None:
        raise ValueError("--model and --prompt are needed")
    check_device(config.device)
    start = time.perf_counter()
    model, tokenizer = load_model(config.model, config.device, DTYPES[config.dtype]), load_tokenizer(config.model)
    loaded = time.perf_counter() - start
    chat = config.chat
    if chat is None:
        chat = tokenizer.has_chat
    if chat:
        tokens = tokenizer.encode(tokenizer.chat([{"role": "user", "content": config.prompt}]))
    else:
        tokens = tokenizer.document(config.prompt)
    rng = torch.Generator(config.device).manual_seed(config.seed)
    cache, new, shown, times = KVCache(model), [], "", [time.perf_counter()]
    steps = stream(model, tokens, cache, config.chunk, config.temperature, config.top_p, rng)
    for _, token in zip(range(config.max_new_tokens), steps):
        times.append(time.perf_counter())
        if token in tokenizer.eos_ids:
            break
        new.append(token)
        text = tokenizer.decode(new)
        if not text.endswith("\ufffd"):  # half a character waits for its other half
            print(text[len(shown):], end="", flush=True)
            shown = text
    decode = (len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else math.nan
    weights = sum(p.nbytes for p in model.parameters()) - (0 if model.lm_head is None else model.model.embed_tokens.weight.nbytes)
    print(f"\n\n{len(tokens)} prompt tokens at {len(tokens) / (times[1] - times[0]):.1f} tokens/s, {len(new)} new at "
          f"{decode:.1f} tokens/s ({config.dtype} on {config.device}; loaded in {loaded:.2f} s; "
          f"cache {cache.nbytes() / 1e6:.1f} MB)\nevery new token reads {weights / 1e6:.0f} MB of weights: {decode * weights / 1e9:.1f} GB/s, "
          f"where a copy in memory moves {copy_rate(config.device) / 1e9:.1f}")


if __name__ == "__main__":
    run(main)
