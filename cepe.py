"""CEPE: a small encoder reads the context in parallel chunks, and the decoder looks at what it wrote by cross-attention.

    tokens 0 .. m        -> chunks -> encoder (bidirectional, positions from 0 in each chunk) -> states (m, d_enc)
    tokens m .. m + n    -> decoder; in every layer   x <- x + SelfAttn(x),  x <- x + CrossAttn(x, states),  x <- x + MLP(x)
The decoder is frozen; the encoder and the cross-attention (its own norm, no positions, not causal) are trained. Chunks are a set:
their order does not matter, and there may be more of them than in training. Context costs d_enc numbers a token instead of keys and
values in every layer.

CEPED distils instead of needing instruction data: 1 CE + 2 KL(frozen decoder that sees context and text || CEPE).

Paper: "Long-Context Language Modeling with Parallel Context Encoding", arXiv:2402.16617, and its released code.

    python cepe.py                                       # entity stream: perplexity against chunks, cost beside full attention
    python train.py --method cepe --model DIR --data SRC --context 2048 --seq_len 4096
    python train.py --method ceped --model DIR --data SRC ...
    python train.py --method cepe --data facts           # exact recall: the embedded tiny model, facts in the encoder
"""
import contextlib
import math
import os
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from attention_triton import attention
from model import (Batch, KVCache, Linear, Llama, LlamaConfig, RMSNorm, Trunk, causal, cross_entropy, dealt, flag, generate, lay_together, number, parse,
                   read_json, read_tensors, run, save_model, save_plot, summed, warmup_cosine, weight_files, write_json)


@dataclass
class Config:
    context: int | None = flag(None, "tokens of each sequence that go to the encoder, the rest is the decoder's (default: half of --seq_len; "
                                     "entity stream 64, facts 192)", low=1)
    chunk_size: int | None = flag(None, "tokens that the encoder reads at once (default: 256; entity stream 16, facts 32)", low=1)
    enc_layers: int | None = flag(None, "layers of a fresh encoder (default: 6; entity stream 2, facts 1; official: 24)", low=1, high=200)
    enc_width: int | None = flag(None, "width of a fresh encoder, at most the decoder's (default: 256; entity stream 48; official: 1024)",
                                 low=8, high=16384)
    enc_init: str | None = flag(None, "of the encoder: fresh (embeddings are columns of the decoder's), or decoder: its first layers, at its "
                                      "width (default: fresh; facts decoder)", choices=("fresh", "decoder"))
    decoder_steps: int = flag(1000, "entity stream: that train its decoder first", low=1)
    init: str | None = flag(None, "of the cross-attention's output: copy of the self-attention's, or zero: the first step changes nothing (default: copy; "
                                  "entity stream zero)", choices=("copy", "zero"))
    last_n: int | None = flag(None, "layers with cross-attention, counted from the top (default: all)", low=1)
    mlm: float | None = flag(None, "share of the steps that first train the encoder to fill in masked tokens (default: 0.2; embedded streams 0)",
                             low=0, high=1)
    mlm_rate: float = flag(0.3, "share of the tokens masked", low=0.01, high=0.99)
    duplicate: float | None = flag(None, "share of the steps in which encoder and decoder then read the same tokens (default: 0.2; entity "
                                         "stream 0.05, facts 0)", low=0, high=1)
    mask_chunks: float = flag(0.0, "share of the chunks that are cut short or (a tenth of them) left out, but never all of a document's "
                                   "(official, random encoder: 0.3)", low=0, high=1)
    kl: float = flag(2.0, "ceped: weight of the distillation, beside 1 of cross-entropy", low=0)
    top_k: int = flag(0, "ceped: distil the teacher's k likeliest tokens and the rest as one; 0: the whole vocabulary (official, stored: 50)", low=0)
    chunks_at_once: int = flag(64, "in the encoder; only memory depends on it", low=1)


# --- the model ----------------------------------------------------------------------------------------------------------

class CrossAttention(nn.Module):
    """Queries from the decoder's states, keys and values from the encoder's (d_enc numbers a token); grouped-query heads as the decoder's."""

    def __init__(self, config, d_enc):
        super().__init__()
        self.head_dim = config.head_dim
        self.layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.q_proj = Linear(config.n_embd, config.n_head * config.head_dim)
        self.k_proj = Linear(d_enc, config.n_kv_head * config.head_dim)
        self.v_proj = Linear(d_enc, config.n_kv_head * config.head_dim)
        self.o_proj = Linear(config.n_head * config.head_dim, config.n_embd)

    def keys_values(self, states):
        """k, v (M, n_kv_head, D) of encoder states (M, d_enc)."""
        return [p(states).unflatten(1, (-1, self.head_dim)) for p in (self.k_proj, self.v_proj)]

    def forward(self, x, keys, values, cu_x, cu_states):
        """x (N, n_embd) -> (N, n_embd): each document of x reads its own context whole; without any, it gets 0."""
        q = self.q_proj(self.layernorm(x)).unflatten(1, (-1, self.head_dim))  # (N, n_head, D)
        return self.o_proj(attention(q, keys, values, cu_x, cu_states, causal=False).flatten(1))


class Context(NamedTuple):
    """What a decoder reads: states (M, d_enc), and cu (B + 1,): document b of the main text owns states cu[b]:cu[b+1]. keys_values: per
    layer, if they were projected once for all; they take as much room as full attention's cache, projecting anew takes time."""
    states: torch.Tensor
    cu: list
    keys_values: list | None = None

    def nbytes(self) -> int:
        return self.states.nbytes if self.keys_values is None else sum(x.nbytes for pair in self.keys_values if pair for x in pair)


class CEPE(Llama):
    """A Llama with cross-attention in its last_n layers and an encoder. Only these two are trained.

    Parameter names are the released checkpoints': model.layers.I.cross_attn.*, encoder.*, the rest as in any Llama."""

    def __init__(self, config: LlamaConfig, encoder_config: LlamaConfig, last_n=None):
        super().__init__(config)
        self.encoder_config, self.last_n = encoder_config, config.n_layer if last_n is None else last_n
        if not 0 < self.last_n <= config.n_layer:
            raise ValueError(f"cross-attention in the last {self.last_n} of {config.n_layer} layers")
        self.encoder = Trunk(encoder_config)
        for block in self.model.layers[config.n_layer - self.last_n:]:
            block.cross_attn = CrossAttention(config, encoder_config.n_embd)

    def freeze(self):
        """Only encoder.* and cross_attn.* take gradients."""
        for name, p in self.named_parameters():
            p.requires_grad_(name.startswith("encoder.") or ".cross_attn." in name)
        return self

    def encode(self, tokens, cu_chunks, chunks_at_once=64):
        """Encoder states (M, d_enc) of chunks packed end to end: tokens (M,), bounds cu_chunks (n_chunk + 1,)."""
        states, bounds = [], [int(x) for x in cu_chunks]
        for first in range(0, len(bounds) - 1, chunks_at_once):
            cu = bounds[first:first + chunks_at_once + 1]
            own = [x - cu[0] for x in cu]
            attend = lambda layer, q, k, v: attention(q, k, v, own, own, causal=False)
            positions = torch.cat([torch.arange(b - a) for a, b in zip(cu, cu[1:])])
            states.append(self.encoder(self.encoder_config, tokens[cu[0]:cu[-1]], attend, positions, checkpointing=self.checkpointing))
        return torch.cat(states) if states else tokens.new_zeros(0, self.encoder_config.n_embd, dtype=self.head.dtype)

    def context(self, tokens, cu_chunks, cu=None, chunks_at_once=64, cache_kv=False) -> Context:
        """Encode chunks for one main document, or for several with bounds cu. cache_kv: project keys and values now, once."""
        states = self.encode(tokens, cu_chunks, chunks_at_once)
        pairs = [block.cross_attn.keys_values(states) if hasattr(block, "cross_attn") else None for block in self.model.layers] if cache_kv else None
        return Context(states, [0, len(states)] if cu is None else [int(x) for x in cu], pairs)

    def hidden(self, tokens, attend=None, positions=None, read=None, context: Context | None = None, cu_seqlens=None):
        """As Llama's; with a context, the documents of cu_seqlens (one by default) read it."""
        if context is not None and len(context.states):
            read = self.reader(context, [0, len(tokens)] if cu_seqlens is None else cu_seqlens)
        return super().hidden(tokens, attend, positions, read)

    def reader(self, context, cu_seqlens):
        cu_seqlens = torch.as_tensor(cu_seqlens).tolist()

        def read(layer, x):
            block = self.model.layers[layer]
            if not hasattr(block, "cross_attn"):
                return torch.zeros_like(x)
            keys, values = context.keys_values[layer] if context.keys_values else block.cross_attn.keys_values(context.states)
            return block.cross_attn(x, keys, values, cu_seqlens, context.cu)
        return read


class Reading:
    """A CEPE with its context at hand, for model.generate: Reading(cepe, cepe.context(...))."""

    def __init__(self, model: CEPE, context: Context):
        self.model, self.context, self.config, self.head = model, context, model.config, model.head

    def hidden(self, tokens, attend=None, positions=None):
        return self.model.hidden(tokens, attend, positions, context=self.context)


def split_chunks(n, size):
    """Bounds of n tokens in chunks of `size`; the last may be shorter."""
    return [*range(0, n, size), n] if n else [0]


def extend(llama: Llama, encoder_config: LlamaConfig, init="copy", last_n=None, seed=0, enc_init="fresh") -> CEPE:
    """A CEPE around a copy of a Llama's weights, frozen, with a fresh encoder whose embeddings begin as the first d_enc columns of theirs.
    enc_init decoder: its layers too begin as the decoder's first ones (see first_layers).

    Cross-attention starts from the same layer's self-attention: q as it is, k and v by their first d_enc columns, the norm from the
    MLP's, o as it is (init copy) or 0. Raises ValueError if the encoder is wider than the decoder."""
    if encoder_config.n_embd > llama.config.n_embd:
        raise ValueError(f"the encoder's width {encoder_config.n_embd} is above the decoder's {llama.config.n_embd}")
    model = CEPE(llama.config, encoder_config, last_n).to(llama.head.device, llama.head.dtype)
    model.model.load_state_dict(llama.model.state_dict(), strict=False)
    if llama.lm_head is not None:
        model.lm_head.load_state_dict(llama.lm_head.state_dict())
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * p.shape[1] ** -0.5 if p.dim() == 2 else torch.ones(p.shape))
        if enc_init == "decoder":
            for mine, own in zip(model.encoder.layers, llama.model.layers):
                mine.load_state_dict(own.state_dict())
        rows = min(encoder_config.vocab_size, llama.config.vocab_size)
        model.encoder.embed_tokens.weight[:rows] = llama.model.embed_tokens.weight[:rows, :encoder_config.n_embd]
        for block in model.model.layers[llama.config.n_layer - model.last_n:]:
            cross, own = block.cross_attn, block.self_attn
            cross.layernorm.weight.copy_(block.post_attention_layernorm.weight)
            cross.q_proj.weight.copy_(own.q_proj.weight)
            for mine, theirs in ((cross.k_proj, own.k_proj), (cross.v_proj, own.v_proj)):
                mine.weight.copy_(theirs.weight[:, :encoder_config.n_embd])
            cross.o_proj.weight.copy_(own.o_proj.weight) if init == "copy" else cross.o_proj.weight.zero_()
    return model.freeze()


def first_layers(config: LlamaConfig, n_layer) -> LlamaConfig:
    """The shape of an encoder that begins as a decoder's first n_layer layers, with a row of embeddings more, for masked tokens."""
    return replace(config, n_layer=n_layer, vocab_size=config.vocab_size + 1, tie_embeddings=True)


# --- checkpoints: the released layout -------------------------------------------------------------------------------------

def save_cepe(model: CEPE, path):
    """A Hugging Face folder: the decoder's keys as any Llama's, encoder.* and cross_attn.* as released, encoder_config in config.json."""
    save_model(model, path)
    config = os.path.join(path, "config.json")
    extra = {"encoder_config": model.encoder_config.to_hf(), "encoder_hidden_size": model.encoder_config.n_embd,
             "num_cross_attn_layers": model.last_n, "num_cross_attn_hidden_states": 1, "do_cross_attention": True}
    write_json(config, read_json(config) | extra)


def load_cepe(path, device="cpu", dtype=torch.float32) -> CEPE:
    """The CEPE in folder `path`, frozen but for its new parts. Every tensor must be there, and no other.

    Raises ValueError naming what is missing, unexpected or misshapen; a folder with only .bin files is refused: they are pickles."""
    present = os.listdir(path) if os.path.isdir(path) else []
    if any(f.endswith(".bin") for f in present) and not any(f.endswith((".safetensors", ".safetensors.index.json")) for f in present):
        raise ValueError(f"{path}: only .bin weights, which would have to be unpickled. Convert once, where you trust the file: python -c "
                         "\"import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in torch.load('pytorch_model.bin', "
                         "weights_only=True).items()}, 'model.safetensors')\"")
    hf = read_json(os.path.join(path, "config.json"))
    if not isinstance(hf.get("encoder_config"), dict):
        raise ValueError(f"{path}/config.json: no encoder_config")
    llama, tensors = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, {}  # whatever their own classes were called
    try:
        config, encoder_config = LlamaConfig.from_hf(hf | llama), LlamaConfig.from_hf(hf["encoder_config"] | llama)
        last_n = number(hf, "num_cross_attn_layers", config.n_layer)
        for name, only in (("num_cross_attn_hidden_states", 1), ("do_cross_attention", True)):
            if hf.get(name, only) not in (only, None):
                raise ValueError(f"unsupported {name} = {hf[name]!r}, want {only!r}")
        if last_n > config.n_layer:
            raise ValueError(f"num_cross_attn_layers is {last_n}, of {config.n_layer} layers")
    except ValueError as e:
        raise ValueError(f"{path}/config.json: {e}") from None
    files = weight_files(path)
    if rows := max(map(embedding_rows, files), default=0):  # released encoders have one row more, of [MASK]: the file says how many
        encoder_config = replace(encoder_config, vocab_size=rows)
    with torch.device("meta"):
        model = CEPE(config, encoder_config, last_n)
    want = dict(model.named_parameters())
    for file in files:
        tensors |= read_tensors(file, want, device, dtype)
    if missing := sorted(want.keys() - tensors.keys()):
        raise ValueError(f"{path}: {len(missing)} tensors are missing, such as {missing[0]}")
    lay_together(tensors, "model", model.config.n_layer)
    lay_together(tensors, "encoder", encoder_config.n_layer)
    model.load_state_dict({name: nn.Parameter(tensors[name]) for name in want}, assign=True)
    return model.freeze()


def embedding_rows(file):
    """Rows of encoder.embed_tokens.weight in a safetensors file, 0 if it is not there."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(file, framework="pt") as f:
            shape = f.get_slice("encoder.embed_tokens.weight").get_shape()
            return shape[0] if len(shape) == 2 else 0
    except SafetensorError:
        return 0


# --- losses ---------------------------------------------------------------------------------------------------------------

class Example(NamedTuple):
    """A Batch of main text with its context: chunks packed end to end (cu_chunks), cu_context bounds them by document."""
    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    context: torch.Tensor
    cu_chunks: torch.Tensor
    cu_context: torch.Tensor
    weights: torch.Tensor | None = None

    def documents(self, first, last):
        """Its documents first .. last - 1 with their contexts."""
        main, (start, end) = Batch.documents(self, first, last), self.cu_context[[first, last]].tolist()
        cu_chunks = self.cu_chunks[(self.cu_chunks >= start) & (self.cu_chunks <= end)] - start
        targets = main.targets if len(self.tokens) else self.targets[start:end]  # masked tokens of the context
        return Example(main.tokens, targets, main.cu_seqlens, self.context[start:end], cu_chunks, self.cu_context[first:last + 1] - start, main.weights)


def example(documents, chunk_size, keep=None) -> Example:
    """documents: (context tokens, main tokens) each. keep(n) -> how many of a chunk's n tokens stay."""
    context, cu_chunks, cu_context = [], [0], [0]
    for before, _ in documents:
        bounds = split_chunks(len(before), chunk_size)
        for a, b in zip(bounds, bounds[1:]):
            n = b - a if keep is None else keep(b - a)
            if n == 0 and b == len(before) and cu_chunks[-1] == cu_context[-1]:
                n = 1  # without any context there would be nothing for a frozen decoder to learn
            if n:
                context.append(before[a:a + n])
                cu_chunks.append(cu_chunks[-1] + n)
        cu_context.append(cu_chunks[-1])
    mains = [torch.as_tensor(main).long() for _, main in documents]
    targets = torch.cat([torch.cat((main[1:], main.new_full((1,), -100))) for main in mains])
    context = torch.cat([torch.as_tensor(c).long() for c in context] or [mains[0].new_zeros(0)])
    return Example(torch.cat(mains), targets, torch.tensor([0, *map(len, mains)]).cumsum(0), context, torch.tensor(cu_chunks),
                   torch.tensor(cu_context))


def states_of(model, batch, chunks_at_once=64):
    """Decoder states (N, n_embd) of a batch that reads its context."""
    context = model.context(batch.context, batch.cu_chunks.tolist(), batch.cu_context.tolist(), chunks_at_once)
    return model.hidden(batch.tokens, causal(batch.cu_seqlens), context=context, cu_seqlens=batch.cu_seqlens)


def kl_loss(student, teacher, head, top_k=0, rows=1024):
    """Mean over rows of KL(teacher || student) [nats], from states (N, n_embd) of both through head (V, n_embd); a block of rows at a time.

    top_k > 0: of the teacher's k likeliest tokens, and all others as one, each share smoothed by 1e-6 as released."""
    def block(s, t):
        log_s, log_t = (F.linear(x, head).to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in (s, t))
        return top_k_kl(log_s, log_t, top_k) if top_k else F.kl_div(log_s, log_t, reduction="sum", log_target=True)
    parts = [checkpoint(block, s, t, use_reentrant=False) for s, t in zip(student.split(rows), teacher.split(rows))]
    return torch.stack(parts).sum() / len(student)


def top_k_kl(log_s, log_t, k, smooth=1e-6):
    """Sum over rows of the coarse KL: log-probabilities (N, V) of student and teacher, k likeliest of the teacher and the rest."""
    top, index = log_t.topk(k, -1)
    coarse = []
    for p in (top.exp(), log_s.gather(-1, index).exp()):  # (N, k)
        p = torch.cat((p, (1 - p.sum(-1, keepdim=True)).clamp_min(0)), -1)  # (N, k + 1)
        coarse.append((p + smooth) / (1 + smooth * (k + 1)))
    p_t, p_s = coarse
    return (p_t * (p_t.log() - p_s.log())).sum()


class MaskedLM(nn.Module):
    """The encoder's head while it learns to fill in: dense, SiLU, norm, the embeddings as output. It is dropped afterwards."""

    def __init__(self, width, vocab_size, eps):
        super().__init__()
        self.dense, self.norm, self.bias = nn.Linear(width, width), RMSNorm(width, eps), nn.Parameter(torch.zeros(vocab_size))

    def forward(self, states, embeddings):
        return F.linear(self.norm(F.silu(self.dense(states)).to(self.bias.dtype)), embeddings, self.bias)


# --- the method: what train.py asks of it ---------------------------------------------------------------------------------

class Expand(nn.Module):
    """Three phases in one run: the encoder fills in masked tokens; encoder and decoder read the same tokens; the encoder reads what came before.

    distil: CEPED, 1 CE + kl KL to the frozen decoder that reads context and text at once."""

    def __init__(self, model: CEPE, settings: Config, seed: int, distil=False):
        super().__init__()
        self.settings, self.distil, vocab = settings, distil, model.encoder_config.vocab_size
        if settings.top_k >= model.config.vocab_size:
            raise ValueError(f"--top_k {settings.top_k} leaves nothing of a vocabulary of {model.config.vocab_size}")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = MaskedLM(model.encoder_config.n_embd, vocab, model.encoder_config.norm_eps)
        self.head.to(model.head.device)

    def param_groups(self):
        return [dict(params=list(self.head.parameters()), weight_decay=0.0)]

    def lr_scale(self, step, steps, warmup, min_lr):
        """Each phase has a schedule of its own."""
        first, length = next((a, b - a) for a, b in self.phases(steps) if a <= step < b)
        return warmup_cosine(step - first, length, warmup, min_lr)

    def phases(self, steps):
        """(first step, one past the last) of the three phases."""
        mlm = round(self.settings.mlm * steps)
        main = min(steps - 1, mlm + round(self.settings.duplicate * steps))
        return (0, min(mlm, main)), (min(mlm, main), main), (main, steps)

    def phase(self, step, steps):
        return next(i for i, (a, b) in enumerate(self.phases(steps)) if a <= step < b)

    def batch(self, data, rng, step, steps):
        s, phase = self.settings, self.phase(step, steps)
        documents = data.documents(rng, s.context)  # (before, main) token arrays
        if phase == 0:
            documents = [(np.concatenate((before, main)), main[:0]) for before, main in documents]
        elif phase == 1:
            documents = [(main, main) for _, main in documents]
        keep = None
        if phase == 2 and s.mask_chunks:
            keep = lambda n: n if rng.random() >= s.mask_chunks else 0 if rng.random() < 0.1 else int(rng.integers(1, n + 1))
        size = s.chunk_size if phase != 1 else max(1, s.chunk_size // 4)  # officially 4 x 64 of 256 tokens
        batch = example(documents, size, keep)
        if phase == 0:  # masked tokens are the targets; the mask itself is the vocabulary's last row
            hidden = torch.from_numpy(rng.random(len(batch.context)) < s.mlm_rate)
            hidden[int(rng.integers(len(hidden)))] = True
            batch = batch._replace(targets=torch.where(hidden, batch.context, -100))
        return batch

    def loss(self, model, batch, step, steps):
        s, phase = self.settings, self.phase(step, steps)
        if phase == 0:
            masked = torch.where(batch.targets != -100, model.encoder_config.vocab_size - 1, batch.context)
            states = model.encode(masked, batch.cu_chunks.tolist(), s.chunks_at_once)[batch.targets != -100]
            logits = self.head(states, model.encoder.embed_tokens.weight)
            return F.cross_entropy(logits.float(), batch.targets[batch.targets != -100], reduction="sum") / max(1, len(states)), {"phase": 0}
        states = states_of(model, batch, s.chunks_at_once)
        loss = cross_entropy(states, model.head, batch.targets)
        if not self.distil or phase == 1:
            return loss, {"phase": phase}
        divergence = kl_loss(states, self.teacher(model, batch), model.head, s.top_k)
        return loss + s.kl * divergence, {"phase": phase, "ce": loss.item(), "kl": divergence.item()}

    @torch.no_grad()
    def teacher(self, model, batch):
        """States of the main text in the frozen decoder, which reads context and text in one causal pass."""
        cu, both = [0], []
        for a, b, c, d in zip(batch.cu_context, batch.cu_context[1:], batch.cu_seqlens, batch.cu_seqlens[1:]):
            both += [batch.context[a:b], batch.tokens[c:d]]
            cu.append(cu[-1] + int(b - a + d - c))
        hidden = Llama.hidden(model, torch.cat(both), causal(cu))
        return torch.cat([hidden[end - n:end] for end, n in zip(cu[1:], batch.cu_seqlens.diff().tolist())])


# --- what context is worth ------------------------------------------------------------------------------------------------

@torch.no_grad()
def perplexities(model, documents, counts, chunk_size, last=None, autocast=contextlib.nullcontext):
    """{row: perplexity for each count of chunks} over the last `last` tokens of each main text (all by default).

    documents: (before, main); count chunks are the count * chunk_size tokens right before the main text. Rows: CEPE; with chunks of the
    next document instead (what any context is worth); the frozen decoder with the same tokens in front of its own input."""
    rows, last = {"CEPE": [], "other documents' chunks": [], "prepended to the decoder": []}, last or 2 ** 30
    for count in counts:
        sums = {name: [0.0, 0] for name in rows}
        for i in dealt(range(len(documents))):
            before, main = documents[i]
            main = torch.as_tensor(np.asarray(main)).long().to(model.head.device)
            context = np.asarray(before)[len(before) - count * chunk_size:]
            other = np.asarray(documents[(i + 1) % len(documents)][0])
            other = other[len(other) - count * chunk_size:]
            n = min(last, len(main) - 1)
            for name, tokens in (("CEPE", context), ("other documents' chunks", other), ("prepended to the decoder", context)):
                tokens = torch.as_tensor(tokens).long().to(model.head.device)
                with autocast():
                    if name == "prepended to the decoder":
                        hidden = Llama.hidden(model, torch.cat((tokens, main)))[len(tokens):]
                    else:
                        hidden = model.hidden(main, context=model.context(tokens, split_chunks(len(tokens), chunk_size)))
                    nll = cross_entropy(hidden[:-1][-n:], model.head, main[1:][-n:]).item()
                sums[name] = [sums[name][0] + nll * n, sums[name][1] + n]
        for name, values in sums.items():
            total, n = summed(values)
            rows[name].append(math.exp(total / n))
    return rows


@torch.no_grad()
def first_answers(model, documents, chunk_size, source):
    """Share of right first answers: main texts alternate keys and values told in the context, and the likeliest token after a key's first
    mention is looked at. source: the own context in chunks, that of others (the next document), prepended to the decoder, or none."""
    right, asked = 0, 0
    for i in dealt(range(len(documents))):
        before, main = documents[(i + 1) % len(documents) if source == "others" else i][0], documents[i][1]
        before, main = (torch.as_tensor(x).to(model.head.device) for x in (before, main))
        if source == "prepended":
            hidden = Llama.hidden(model, torch.cat((before, main)))[len(before):]
        elif source == "none":
            hidden = Llama.hidden(model, main)
        else:
            hidden = model.hidden(main, context=model.context(before, split_chunks(len(before), chunk_size)))
        keys = main[::2].tolist()
        first = torch.tensor([2 * j for j, key in enumerate(keys) if key not in keys[:j]])  # later answers stand in the main text
        right += int((F.linear(hidden[first], model.head).argmax(-1) == main[first + 1]).sum())
        asked += len(first)
    right, asked = summed([right, asked])
    return right / asked


# --- entity stream: data on which context is worth a known amount ---------------------------------------------------------

class Entities:
    """A document draws its tokens from 24 of 128 symbols, each time anew: earlier text tells which ones. The best possible loss is known."""

    N, OWN, vocab_size = 128, 24, 128  # symbols, those of one document

    def __init__(self, n_main=16, n_seq=32):
        self.n_main, self.n_seq = n_main, n_seq

    def documents(self, rng, context, n_seq=None):
        """Pairs of context and main tokens, n_seq of them."""
        n_seq = n_seq or self.n_seq
        own = rng.random((n_seq, self.N)).argsort(1)[:, :self.OWN]
        tokens = np.take_along_axis(own, rng.integers(self.OWN, size=(n_seq, context + self.n_main)), 1)
        return [(row[:context], row[context:]) for row in tokens]

    def best(self, documents, counts, chunk_size):
        """Perplexity of the Bayes-optimal reader of `count` chunks and the main text so far: 1 / OWN for a symbol seen before; what is
        left of the probability is shared by all others."""
        out = []
        for count in counts:
            nll = []
            for before, main in documents:
                seen = set(before[len(before) - count * chunk_size:]) | {main[0]}
                for token in main[1:]:
                    unseen = math.log(self.OWN * (self.N - len(seen)) / max(self.OWN - len(seen), 1))
                    nll.append(math.log(self.OWN) if token in seen else unseen)
                    seen.add(token)
            out.append(math.exp(sum(nll) / len(nll)))
        return out


def small_decoder(data, steps, seed):
    """A Llama of 0.1M parameters that knows windows of n_main tokens of the entity stream."""
    config = LlamaConfig(data.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, n_ff=192, head_dim=32, tie_embeddings=True)
    model = Llama(config).init_weights(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step in tqdm(range(steps), desc="decoder", unit="step", disable=None, leave=False):
        batch = example(data.documents(np.random.default_rng([seed, 0, step]), 0, 64), 16)
        optimizer.param_groups[0]["lr"] = 5e-3 * warmup_cosine(step, steps, 0.04, 0.02)
        model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


# --- demo -----------------------------------------------------------------------------------------------------------------

@dataclass
class Demo:
    decoder_steps: int = flag(200, "that train the decoder (README: 1000)", low=1)
    steps: int = flag(150, "that train encoder and cross-attention (README: 1500)", low=3)
    lr: float = flag(6e-3, "of encoder and cross-attention", low=0)
    duplicate: float = flag(0.05, "share of the steps in which encoder and decoder read the same tokens", low=0, high=1)
    init: str = flag("zero", "of the cross-attention's output", choices=("copy", "zero"))
    enc_layers: int = flag(2, "of the encoder", low=1)
    seed: int = flag(0, "of everything", low=0)
    figure: str | None = flag(None, "SVG file for perplexity against chunks")


def train_small(model, data, settings, config):
    """Train a CEPE's new parts on an embedded stream."""
    method = Expand(model, settings, config.seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in tqdm(range(config.steps), desc="CEPE", unit="step", disable=None, leave=False):
        batch = method.batch(data, np.random.default_rng([config.seed, 1, step]), step, config.steps)
        optimizer.param_groups[0]["lr"] = config.lr * method.lr_scale(step, config.steps, 0.04, 0.02)
        loss, _ = method.loss(model, batch, step, config.steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def entity_table(config):
    """Perplexity of 16 tokens of the entity stream against the number of chunks before them; 4 chunks in training."""
    start, data, counts = time.perf_counter(), Entities(), (0, 1, 2, 4, 8, 16)
    decoder = small_decoder(data, config.decoder_steps, config.seed)
    encoder = LlamaConfig(data.vocab_size + 1, n_layer=config.enc_layers, n_head=2, n_kv_head=2, n_embd=48, n_ff=144, head_dim=24, tie_embeddings=True)
    settings = Config(context=64, chunk_size=16, mlm=0.0, duplicate=config.duplicate)
    model = train_small(extend(decoder, encoder, config.init, seed=config.seed), data, settings, config)
    documents = data.documents(np.random.default_rng([config.seed, 2]), 256, 256)
    rows = {"best possible": data.best(documents, counts, 16)} | perplexities(model, documents, counts, 16)
    print(f"perplexity of 16 tokens (trained with 4 chunks of 16), seed {config.seed}, {time.perf_counter() - start:.0f} seconds\n")
    print("| chunks | " + " | ".join(map(str, counts)) + " |\n|---|" + "---|" * len(counts))
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{x:.1f}" for x in values) + " |")
    if config.figure:
        save_plot(config.figure, {name: list(zip(counts, values)) for name, values in rows.items()},
                  f"entity stream, seed {config.seed}: 16 tokens behind chunks of 16", "chunks", "perplexity")


@torch.no_grad()
def cost_table(lengths=(2048, 8192), window=512, chunk_size=256):
    """Prefill, decoding and memory of random weights: everything in the decoder, against all but the last `window` tokens in the encoder."""
    decoder = Llama(LlamaConfig(512, n_layer=4, n_head=4, n_kv_head=4, n_embd=128, n_ff=384, head_dim=32, tie_embeddings=True)).init_weights(0)
    encoder = LlamaConfig(513, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, n_ff=192, head_dim=32, tie_embeddings=True)
    model = extend(decoder, encoder)
    print("| | tokens | prefill, tokens/s | decoding, ms/token | state kept, MB |\n|---|---|---|---|---|")
    for n in lengths:
        tokens = torch.randint(512, (n,), generator=torch.Generator().manual_seed(0))
        for name, cache_kv in (("full attention", None), ("CEPE, encoder states", False), ("CEPE, projected keys and values", True)):
            best = [math.inf, math.inf]
            for _ in range(3):
                cache, start = KVCache(model), time.perf_counter()
                if cache_kv is None:
                    reading, held, prompt = decoder, 0, tokens
                else:
                    context = model.context(tokens[:-window], split_chunks(n - window, chunk_size), cache_kv=cache_kv)
                    reading, held, prompt = Reading(model, context), context.nbytes(), tokens[-window:]
                generate(reading, prompt, 1, cache=cache)
                filled = time.perf_counter()
                generate(reading, tokens[:1], 16, cache=cache)
                best = [min(best[0], filled - start), min(best[1], (time.perf_counter() - filled) / 16)]
            print(f"| {name} | {n} | {n / best[0]:,.0f} | {best[1] * 1e3:.1f} | {(held + cache.nbytes()) / 1e6:.2f} |")


def main():
    config, = parse([Demo], description="CEPE on the entity stream: what more chunks are worth, and what they cost.")
    entity_table(config)
    print("\nrandom weights, float32: 4 layers of width 128, encoder 2 of 64, the last 512 tokens in the decoder; best of 3\n")
    cost_table()


if __name__ == "__main__":
    run(main)
