"""CEPE: a small encoder reads the context in parallel chunks; the decoder looks at what it wrote.

    tokens 0 .. m      -> chunks -> encoder (bidirectional, positions from 0 in each) -> (m, d_enc)
    tokens m .. m + n  -> decoder; in every layer
        x <- x + SelfAttn(x),    x <- x + CrossAttn(x, states),    x <- x + MLP(x)
The decoder is frozen; the encoder and the cross-attention (its own norm, no positions, not causal)
are trained. Chunks are a set: their order does not matter, and there may be more of them than in
training. Context costs d_enc numbers a token instead of keys and values in every layer.

CEPED distils instead of needing instructions: 1 CE + 2 KL(frozen decoder that reads all || CEPE).

Paper: "Long-Context Language Modeling with Parallel Context Encoding", arXiv:2402.16617, and its
released code.

    python train.py --method cepe                              # embedded: entity stream
    python train.py --method ceped --model DIR --data SRC --context 2048 --seq_len 4096
    python cepe.py --model out/cepe --context FILE --prompt TEXT
"""
import itertools
import math
import os
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from attention_triton import attention
from model import (DTYPES, Block, Llama, LlamaConfig, Method, RMSNorm, Trunk, assign, causal,
                   checked_config, collate, cross_entropy, flag, generate, init_matrices,
                   join, load_model, load_tokenizer, parse, read_json, read_weights, run,
                   save_model, warmup_cosine, weight_files, write_json)

# --- the model -----------------------------------------------------------------------------------

class CrossAttention(nn.Module):
    """Queries from the decoder's states, keys and values from the encoder's."""

    def __init__(self, config, d_enc):
        super().__init__()
        c, self.head_dim = config, config.head_dim
        self.layernorm = RMSNorm(c.n_embd, c.norm_eps)
        self.q_proj = nn.Linear(c.n_embd, c.n_head * c.head_dim, bias=False)
        self.k_proj = nn.Linear(d_enc, c.n_kv_head * c.head_dim, bias=False)
        self.v_proj = nn.Linear(d_enc, c.n_kv_head * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)

    def keys_values(self, states):
        """k, v (M, n_kv_head, D) of encoder states (M, d_enc)."""
        return [p(states).unflatten(1, (-1, self.head_dim)) for p in (self.k_proj, self.v_proj)]

    def forward(self, x, keys, values, cu_x, cu_states):
        """x (N, n_embd) -> (N, n_embd): each document of x reads its own context whole."""
        q = self.q_proj(self.layernorm(x)).unflatten(1, (-1, self.head_dim))  # (N, n_head, D)
        out = attention(q, keys, values, cu_x, cu_states, causal=False)
        return self.o_proj(out.flatten(1))


class Context(NamedTuple):
    """What a decoder reads: states (M, d_enc), of which document b of the main text owns
    cu[b]:cu[b+1]. keys_values: per layer, if they were projected once for all; they take as much
    room as full attention's cache, projecting anew takes time."""
    states: torch.Tensor
    cu: list
    keys_values: list | None = None


class ReadingAttend:
    """An `attend` that carries a context to the cross-attention of every layer."""

    def __init__(self, attend, context, cu_x):
        self.attend, self.context, self.cu_x = attend, context, cu_x

    def __call__(self, layer, q, k, v):
        return self.attend(layer, q, k, v)


class CrossBlock(Block):
    """A Llama layer with cross-attention between its two halves."""

    def __init__(self, config, d_enc):
        super().__init__(config)
        self.cross_attn = CrossAttention(config, d_enc)

    def forward(self, x, layer, attend, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), layer, attend, cos, sin)
        if isinstance(attend, ReadingAttend):
            context, cross = attend.context, self.cross_attn
            ready = context.keys_values
            keys, values = ready[layer] if ready else cross.keys_values(context.states)
            x = x + cross(x, keys, values, attend.cu_x, context.cu)
        return x + self.mlp(self.post_attention_layernorm(x))


class CEPE(Llama):
    """A Llama with cross-attention in its last_n layers and an encoder; only these are trained.

    Parameter names are the released checkpoints': model.layers.I.cross_attn.*, encoder.*."""

    def __init__(self, config: LlamaConfig, encoder_config: LlamaConfig, last_n=None):
        super().__init__(config)
        self.encoder_config, self.last_n = encoder_config, last_n or config.n_layer
        if self.last_n not in range(1, config.n_layer + 1):
            raise ValueError(f"cross-attention in {self.last_n} of {config.n_layer} layers")
        self.encoder = Trunk(encoder_config)
        for layer in range(config.n_layer - self.last_n, config.n_layer):
            self.model.layers[layer] = CrossBlock(config, encoder_config.n_embd)

    def freeze(self):
        """Only encoder.* and cross_attn.* take gradients."""
        for name, p in self.named_parameters():
            p.requires_grad_(name.startswith("encoder.") or ".cross_attn." in name)
        return self

    def cross_layers(self):
        return [block for block in self.model.layers if isinstance(block, CrossBlock)]

    def encode(self, tokens, cu_chunks):
        """Encoder states (M, d_enc) of chunks packed end to end: tokens (M,), bounds cu_chunks."""
        cu = [int(x) for x in cu_chunks]
        positions = torch.cat([torch.arange(b - a) for a, b in zip(cu, cu[1:])])
        attend = lambda layer, q, k, v: attention(q, k, v, cu, cu, causal=False)
        self.encoder.checkpointing = self.model.checkpointing
        return self.encoder(tokens, attend, positions)

    def context(self, tokens, cu_chunks, cu=None, cache_kv=False):
        """The Context of one main document, or of several with bounds cu; None without tokens.
        cache_kv: project keys and values now, once."""
        cu = [0, len(tokens)] if cu is None else [int(x) for x in cu]
        if len(tokens) == 0:
            return None
        states, pairs = self.encode(tokens, cu_chunks), None
        if cache_kv:
            crossed = [isinstance(block, CrossBlock) for block in self.model.layers]
            pairs = [block.cross_attn.keys_values(states) if there else None
                     for block, there in zip(self.model.layers, crossed)]
        return Context(states, cu, pairs)

    def hidden(self, tokens, attend=None, positions=None, context=None, cu_seqlens=None):
        """As Llama's; with a context, the documents of cu_seqlens (one by default) read it."""
        if context is not None:
            n = len(tokens)
            cu = [0, n] if cu_seqlens is None else torch.as_tensor(cu_seqlens).tolist()
            attend = ReadingAttend(attend or causal([0, n]), context, cu)
        return super().hidden(tokens, attend, positions)


class WithContext:
    """A CEPE with its context at hand, for model.generate: WithContext(cepe, cepe.context(...))."""

    def __init__(self, model: CEPE, context: Context):
        self.model, self.context, self.config, self.head = model, context, model.config, model.head

    def hidden(self, tokens, attend=None, positions=None):
        return self.model.hidden(tokens, attend, positions, context=self.context)


@torch.no_grad()
def reading(model: CEPE, chunks, cache_kv=False) -> WithContext:
    """A CEPE that has read chunks, each a list of token ids."""
    tokens = torch.tensor([token for chunk in chunks for token in chunk], device=model.head.device)
    bounds = [0, *itertools.accumulate(map(len, chunks))]
    return WithContext(model, model.context(tokens, bounds, cache_kv=cache_kv))


def footprint(model: CEPE, cache, n_context, cache_kv=False):
    """(KV footprint, peak) of a decoder's cache beside a context of n_context tokens, as shares of
    what full attention over all of them holds, in numbers: Fractions.

    A context token is d_enc numbers, with cache_kv a key and a value in every layer that
    cross-attends, held from the step that reads it to the end. The encoder's own keys and values
    live for one layer and are not counted."""
    config, tri = model.config, lambda n: n * (n + 1) // 2
    entry = 2 * config.n_kv_head * config.head_dim  # of one layer
    held = len(model.cross_layers()) * entry if cache_kv else model.encoder_config.n_embd
    size = Fraction(held, config.n_layer * entry)
    n_main = sum(n for n, _ in cache.log())
    n = n_context + n_main
    cells = size * (tri(n_context) + n_context * n_main) + cache.footprint() * tri(n_main)
    peak = size * n_context + cache.peak() * n_main
    return cells / tri(n), peak / n


def split_chunks(n, size):
    """Bounds of n tokens in chunks of `size`; the last may be shorter."""
    return [*range(0, n, size), n] if n else [0]


@torch.no_grad()
def extend(llama, encoder_config, init="copy", last_n=None, seed=0, enc_init="fresh") -> CEPE:
    """A CEPE around a copy of a Llama's weights, frozen. The encoder is fresh and its embeddings
    begin as the first d_enc columns of the Llama's; enc_init decoder: its layers as the first ones.

    Cross-attention starts from its layer's self-attention: q as it is, k and v by their first
    d_enc columns, the norm from the MLP's, o as it is (init copy) or 0: the first step changes
    nothing. Raises ValueError if the encoder is wider than the decoder."""
    d_enc = encoder_config.n_embd
    if d_enc > llama.config.n_embd:
        raise ValueError(f"the encoder's width {d_enc} is above the decoder's")
    model = CEPE(llama.config, encoder_config, last_n).to(llama.head.device, llama.head.dtype)
    model.load_state_dict(llama.state_dict(), strict=False)
    init_matrices(model.encoder, seed)
    if enc_init == "decoder":
        for mine, theirs in zip(model.encoder.layers, llama.model.layers):
            mine.load_state_dict(theirs.state_dict())
    rows = min(encoder_config.vocab_size, llama.config.vocab_size)
    embeddings = llama.model.embed_tokens.weight
    model.encoder.embed_tokens.weight[:rows] = embeddings[:rows, :d_enc]
    for block in model.cross_layers():
        cross, own = block.cross_attn, block.self_attn
        cross.layernorm.weight.copy_(block.post_attention_layernorm.weight)
        cross.q_proj.weight.copy_(own.q_proj.weight)
        cross.k_proj.weight.copy_(own.k_proj.weight[:, :d_enc])
        cross.v_proj.weight.copy_(own.v_proj.weight[:, :d_enc])
        cross.o_proj.weight.copy_(own.o_proj.weight if init == "copy" else torch.zeros(()))
    return model.freeze()


# --- checkpoints: the released layout ------------------------------------------------------------

def save_cepe(model: CEPE, path) -> list:
    """A Hugging Face folder: the decoder's keys as any Llama's, encoder.* and cross_attn.* as
    released, encoder_config in config.json. Returns the paths."""
    paths = save_model(model, path)
    extra = {"encoder_config": model.encoder_config.to_hf(),
             "encoder_hidden_size": model.encoder_config.n_embd, "do_cross_attention": True,
             "num_cross_attn_layers": model.last_n, "num_cross_attn_hidden_states": 1}
    config = os.path.join(path, "config.json")
    write_json(config, read_json(config) | extra)
    return paths


def is_cepe(path) -> bool:
    """Whether folder `path` holds a CEPE, and not a plain Llama; no folder (None) holds none."""
    config = path and read_json(os.path.join(path, "config.json"))
    return isinstance(config, dict) and "encoder_config" in config


def load_cepe(path, device="cpu", dtype=torch.float32) -> CEPE:
    """The CEPE in folder `path`, frozen but for its new parts. Raises ValueError naming what is
    missing, unexpected, misshapen or unsupported; .bin weights are pickles and refused."""
    pickled = os.path.exists(os.path.join(path, "pytorch_model.bin"))
    if pickled and not os.path.exists(next(iter(weight_files(path)))):
        raise ValueError(f"{path}: .bin weights would have to be unpickled: convert them to "
                         "model.safetensors where you trust the file")
    file = os.path.join(path, "config.json")
    hf = read_json(file)
    if not (isinstance(hf, dict) and isinstance(hf.get("encoder_config"), dict)):
        raise ValueError(f"{file}: no encoder_config")
    for name, value in (("num_cross_attn_hidden_states", 1), ("do_cross_attention", True)):
        if hf.get(name, value) != value:
            raise ValueError(f"{file}: unsupported {name} = {hf[name]!r}")
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}  # of a class of theirs
    encoder = checked_config(hf["encoder_config"] | llama, f"{file}, encoder_config")
    tensors = read_weights(path, device, dtype)
    embeddings = tensors.get("encoder.embed_tokens.weight", ())
    encoder = replace(encoder, vocab_size=len(embeddings))  # released: one more than config.json's
    with torch.device("meta"):
        model = CEPE(checked_config(hf | llama, file), encoder, hf.get("num_cross_attn_layers"))
    return assign(model, tensors, path).freeze()


# --- losses --------------------------------------------------------------------------------------

class Example(NamedTuple):
    """A Batch of main text with its context: chunks packed end to end (cu_chunks), which cu_context
    bounds by document."""
    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    context: torch.Tensor
    cu_chunks: torch.Tensor
    cu_context: torch.Tensor
    weights: torch.Tensor | None = None


def example(documents, chunk_size, keep=None) -> Example:
    """documents: (context tokens, main tokens) each. keep(n): how many of a chunk's n tokens stay,
    never none of a whole document."""
    context, cu_chunks, cu_context = [], [0], [0]
    for before, _ in documents:
        bounds = split_chunks(len(before), chunk_size)
        for a, b in zip(bounds, bounds[1:]):
            n = b - a if keep is None else keep(b - a)
            is_last, is_empty = b == len(before), cu_chunks[-1] == cu_context[-1]
            if n == 0 and is_last and is_empty:
                n = 1  # without any context a frozen decoder has nothing to learn
            if n:
                context.append(torch.as_tensor(before[a:a + n]))
                cu_chunks.append(cu_chunks[-1] + n)
        cu_context.append(cu_chunks[-1])
    main = collate([main for _, main in documents])
    context = torch.cat(context).long() if context else main.tokens[:0]
    return Example(*main[:3], context, torch.tensor(cu_chunks), torch.tensor(cu_context))


def states_of(model, batch):
    """Decoder states (N, n_embd) of a batch that reads its context."""
    context = model.context(batch.context, batch.cu_chunks, batch.cu_context)
    attend = causal(batch.cu_seqlens)
    return model.hidden(batch.tokens, attend, context=context, cu_seqlens=batch.cu_seqlens)


def kl_loss(student, teacher, head, rows=1024):
    """Mean over rows of KL(teacher || student) [nats], from states (N, n_embd) of both through head
    (V, n_embd); a block of rows at a time."""
    def block(s, t):
        log_s, log_t = (F.linear(x, head).float().log_softmax(-1) for x in (s, t))
        return F.kl_div(log_s, log_t, reduction="sum", log_target=True)
    blocks = zip(student.split(rows), teacher.split(rows))
    sums = [checkpoint(block, s, t, use_reentrant=False) for s, t in blocks]
    return torch.stack(sums).sum() / len(student)


class MaskedLM(nn.Module):
    """The encoder's head while it learns to fill in masked tokens; dropped afterwards."""

    def __init__(self, width, vocab_size, eps):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), RMSNorm(width, eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, states, embeddings):
        states = self.norm(F.silu(self.dense(states)).to(self.bias.dtype))
        return F.linear(states, embeddings, self.bias)


# --- the method ----------------------------------------------------------------------------------

class Expand(Method):
    """Three phases in one run: the encoder fills in masked tokens; encoder and decoder read the
    same tokens; the encoder reads what came before."""

    own_attention = True

    @dataclass
    class Config:
        context: int | None = flag(None, "tokens of each sequence for the encoder, the rest is the "
                                         "decoder's (default: half)", least=1)
        chunk_size: int | None = flag(None, "tokens that the encoder reads at once (default: 256)",
                                      least=1)
        enc_layers: int | None = flag(None, "layers of a fresh encoder (default: 6; official: 24)",
                                      least=1)
        enc_width: int | None = flag(None, "its width (default: 256; official: 1024)", least=8)
        enc_init: str = flag("fresh", "fresh, or the decoder's first layers at its width",
                             choices=("fresh", "decoder"))
        init: str | None = flag(None, "of the cross-attention's output: zero (default: the decoder "
                                      "begins as it was), copy (of self-attention's, as released)",
                                choices=("copy", "zero"))
        last_n: int | None = flag(None, "layers with cross-attention, from the top (default: all)",
                                  least=1)
        mlm: float | None = flag(None, "share of the steps that fill in tokens (default: 0.2)",
                                 least=0)
        mlm_rate: float = flag(0.3, "share of the tokens masked", least=0)
        duplicate: float | None = flag(None, "share of the steps in which encoder and decoder then "
                                             "read the same tokens (default: 0.2)", least=0)
        mask_chunks: float = flag(0.0, "share of the chunks cut short or (a tenth) left out "
                                       "(official, random encoder: 0.3)", least=0)
        kl: float = flag(2.0, "ceped: weight of the distillation beside 1 of CE", least=0)
        decoder_steps: int = flag(1000, "entity stream: that train its decoder first", least=1)

    @classmethod
    def defaults(cls, args, config):
        if args.model is None and args.data in (None, "entities"):
            return Entities.defaults
        half = (args.seq_len or 1024) // 2
        return dict(context=half, chunk_size=256, enc_layers=6, enc_width=256, init="zero", mlm=0.2,
                    duplicate=0.2, lr=3e-4, weight_decay=0.0, warmup=0.04, min_lr=0.0)

    @classmethod
    def load(cls, args, config):
        """A folder that holds a CEPE, or a Llama with a fresh encoder around it."""
        if is_cepe(args.model):
            return load_cepe(args.model, args.device)
        if args.model:
            llama = load_model(args.model, args.device)
        else:
            llama = small_decoder(config.decoder_steps, args.seed).to(args.device)
        encoder = encoder_for(llama.config, config)
        return extend(llama, encoder, config.init, config.last_n, args.seed, config.enc_init)

    @classmethod
    def data(cls, args, config, tokenizer, rows):
        if args.seq_len - config.context < 4:
            raise ValueError(f"--context {config.context} leaves the decoder fewer than 4 of "
                             f"--seq_len {args.seq_len} tokens")
        if args.data == "entities":
            n_main = args.seq_len - config.context
            return Entities(n_main, args.batch, args.seed, config.context, args.eval_seqs)

    def __init__(self, model, config, seed=0):
        super().__init__(model, config)
        encoder = model.encoder_config
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = MaskedLM(encoder.n_embd, encoder.vocab_size, encoder.norm_eps)
        self.head.to(model.head.device)

    def param_groups(self, model, args):
        head = dict(params=list(self.head.parameters()), lr=args.lr, weight_decay=0.0)
        return [head, *super().param_groups(model, args)]

    def phases(self, steps) -> list:
        """(first step, one past the last) of the three phases; the last has at least one step."""
        mlm = min(steps - 1, round(self.config.mlm * steps))
        main = min(steps - 1, mlm + round(self.config.duplicate * steps))
        return [(0, mlm), (mlm, main), (main, steps)]

    def phase(self, step, steps) -> int:
        return next(i for i, (a, b) in enumerate(self.phases(steps)) if a <= step < b)

    def lr_scale(self, step, steps, args):
        """Each phase has a schedule of its own."""
        first, end = self.phases(steps)[self.phase(step, steps)]
        return warmup_cosine(step - first, end - first, args.warmup, args.min_lr)

    def documents(self, data, i) -> list:
        """Pairs (what comes before, main text) of token arrays."""
        if hasattr(data, "documents"):
            return data.documents(i)
        parts = data.batch(i).tokens.tensor_split(data.n_seq)
        return [(part[:self.config.context], part[self.config.context:]) for part in parts]

    def batch(self, data, i, step, steps):
        c, phase = self.config, self.phase(step, steps)
        rng, keep = np.random.default_rng((data.seed, i, 1)), None
        documents, size = self.documents(data, i), c.chunk_size
        if phase == 0:
            documents = [(np.concatenate((before, main)), main[:0]) for before, main in documents]
        elif phase == 1:
            documents, size = [(main, main) for _, main in documents], max(1, size // 4)
        elif c.mask_chunks:
            keep = lambda n: kept_of_chunk(n, c.mask_chunks, rng)
        batch = example(documents, size, keep)
        if phase > 0:
            return batch
        masked = torch.from_numpy(rng.random(len(batch.context)) < c.mlm_rate)
        masked[int(rng.integers(len(masked)))] = True
        return batch._replace(targets=torch.where(masked, batch.context, -100))

    def loss(self, model, batch, step, steps):
        phase = self.phase(step, steps)
        if model.share is not None:
            raise ValueError("CEPE's chunks are parallel already: it takes no --seq_parallel")
        if phase == 0:
            return self.fill_in(model, batch), {"phase": 0}
        states = states_of(model, batch)
        loss = cross_entropy(states, model.head, batch.targets)
        return loss, {"phase": phase}

    def fill_in(self, model, batch):
        """Mean cross-entropy of masked context tokens; the mask is the vocabulary's last row."""
        rows = batch.targets != -100
        tokens = torch.where(rows, model.encoder_config.vocab_size - 1, batch.context)
        states = model.encode(tokens, batch.cu_chunks)[rows]
        logits = self.head(states, model.encoder.embed_tokens.weight).float()
        total = F.cross_entropy(logits, batch.targets[rows], reduction="sum")
        return total / max(1, len(states))

    def before(self, model, data):
        self.held_out(data)  # refuses here, not after the training
        return {}

    def evaluate(self, model, data):
        size, documents = self.config.chunk_size, self.held_out(data)[:16]
        counts = [self.config.context // size]
        return {k: v[0] for k, v in perplexities(model, documents, counts, size, 256).items()}

    def rows(self, model, data, before, runs, out_dir):
        """Perplexity of the main text's last 256 tokens against the number of chunks before it."""
        size, documents = self.config.chunk_size, self.held_out(data)
        most = len(documents[0][0]) // size
        counts = sorted({0, *(most // 2 ** k for k in range(6))})
        table = {}
        if hasattr(data, "best"):
            table["best possible"] = data.best(documents, counts, size)
        for name, (_, m) in runs.items():
            found = perplexities(m, documents, counts, size, 256)
            table |= {row.replace("CEPE", name): values for row, values in found.items()}
        return [(row, {f"{n} chunks": x for n, x in zip(counts, values)})
                for row, values in table.items()]

    def held_out(self, data) -> list:
        if hasattr(data, "held_out_documents"):
            return data.held_out_documents()
        n = self.config.context
        documents = [(b.tokens[:n], b.tokens[n:]) for b in data.held_out]
        if any(int((b.targets == -100).sum()) >= len(b.cu_seqlens) for b in data.held_out):
            raise ValueError("CEPE learns every token: no data with a mask, and no conversations")
        if any(len(main) < 2 for _, main in documents):
            raise ValueError(f"a held-out sequence ends within --context {n}: CEPE reads text, not "
                             "conversations")
        return documents

    def save(self, model, out_dir):
        return save_cepe(model, out_dir)


def kept_of_chunk(n, share, rng) -> int:
    """How many of a chunk's n tokens stay, where a share of the chunks is cut short or left out."""
    if rng.random() >= share:
        return n
    return 0 if rng.random() < 0.1 else int(rng.integers(1, n + 1))


class Distil(Expand):
    """CEPED: in the last phase also the KL to the frozen decoder that reads context and text."""

    def loss(self, model, batch, step, steps):
        if self.phase(step, steps) < 2:
            return super().loss(model, batch, step, steps)
        states = states_of(model, batch)
        loss = cross_entropy(states, model.head, batch.targets)
        kl = kl_loss(states, self.teacher(model, batch), model.head)
        metrics = {"phase": 2, "ce": loss.item(), "kl": kl.item()}
        return loss + self.config.kl * kl, metrics

    @torch.no_grad()
    def teacher(self, model, batch):
        """States of the main text in the decoder alone, behind its context in one causal pass."""
        cu, both = [0], []
        bounds = [x.tolist() for x in (batch.cu_context, batch.cu_seqlens)]
        for a, b, c, d in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:]):
            both += [batch.context[a:b], batch.tokens[c:d]]
            cu.append(cu[-1] + b - a + d - c)
        hidden = model.hidden(torch.cat(both), causal(cu))
        lengths = batch.cu_seqlens.diff().tolist()
        return torch.cat([hidden[end - n:end] for end, n in zip(cu[1:], lengths)])


def encoder_for(config: LlamaConfig, flags) -> LlamaConfig:
    """The shape of an encoder for a decoder; one row of embeddings more, for masked tokens."""
    same = dict(n_layer=flags.enc_layers, vocab_size=config.vocab_size + 1, tie_embeddings=True)
    if flags.enc_init == "decoder":
        if flags.enc_layers > config.n_layer:
            raise ValueError(f"--enc_layers {flags.enc_layers}: the decoder has {config.n_layer}")
        return replace(config, **same)
    width = flags.enc_width
    head_dim = 64 if width >= 128 else width // 2
    if width % head_dim or head_dim % 2:
        raise ValueError(f"--enc_width {width}: expected a multiple of 64, or below 128 of 4")
    n_head = width // head_dim
    return replace(config, **same, n_embd=width, n_ff=4 * width, head_dim=head_dim, n_head=n_head,
                   n_kv_head=n_head)


# --- what context is worth -----------------------------------------------------------------------

@torch.no_grad()
def perplexities(model, documents, counts, chunk_size, last) -> dict:
    """{row: perplexity for each count of chunks} of the last `last` tokens of each main text.

    documents: (before, main); count chunks are the tokens right before the main text. Rows: CEPE;
    with chunks of the next document instead (what any context is worth); the frozen decoder with
    the same tokens in front of its own input."""
    device, rows = model.head.device, {}
    documents = [[torch.as_tensor(x).long().to(device) for x in pair] for pair in documents]
    for name in ("CEPE", "other documents' chunks", "prepended to the decoder"):
        rows[name] = []
        for count in counts:
            total, n = 0.0, 0
            for i, (before, main) in enumerate(documents):
                if name.startswith("other"):
                    before = documents[(i + 1) % len(documents)][0]
                tokens = before[len(before) - count * chunk_size:]
                if name.startswith("prepended"):
                    hidden = model.hidden(torch.cat((tokens, main)))[len(tokens):]
                else:
                    context = model.context(tokens, split_chunks(len(tokens), chunk_size))
                    hidden = model.hidden(main, context=context)
                m = min(last, len(main) - 1)
                nll = cross_entropy(hidden[:-1][-m:], model.head, main[1:][-m:]).item()
                total, n = total + nll * m, n + m
            rows[name].append(math.exp(total / n))
    return rows


# --- entity stream: data on which context is worth a known amount --------------------------------

class Entities:
    """A document draws its tokens from 24 of 128 symbols, each time anew: earlier text tells which
    ones. The best possible loss is known."""
    defaults = dict(data="entities", seq_len=80, batch=32, lr=6e-3, weight_decay=0.0, warmup=0.04,
                    context=64, chunk_size=16, enc_layers=2, enc_width=48, init="zero", mlm=0.0,
                    duplicate=0.05)
    N, OWN, vocab_size, tokenizer = 128, 24, 128, None  # symbols, those of one document

    def __init__(self, n_main=16, n_seq=32, seed=0, context=64, n_eval=16):
        self.n_main, self.n_seq, self.seed = n_main, n_seq, seed
        self.n_context, self.n_eval, self.seq_len = context, n_eval, context + n_main

    def draw(self, rng, context, n_seq) -> list:
        own = rng.random((n_seq, self.N)).argsort(1)[:, :self.OWN]
        chosen = rng.integers(self.OWN, size=(n_seq, context + self.n_main))
        tokens = np.take_along_axis(own, chosen, 1)
        return [(row[:context], row[context:]) for row in tokens]

    def documents(self, i):
        return self.draw(np.random.default_rng((self.seed, i)), self.n_context, self.n_seq)

    def held_out_documents(self):
        """Four times as much context as in training."""
        rng = np.random.default_rng((self.seed, 2 ** 31))
        return self.draw(rng, 4 * self.n_context, 16 * self.n_eval)

    def best(self, documents, counts, chunk_size) -> list:
        """Perplexity of the Bayes-optimal reader of `count` chunks and the main text so far: 1 /
        OWN for a symbol seen before; the others share what is left of the probability."""
        out = []
        for count in counts:
            nll = []
            for before, main in documents:
                seen = set(before[len(before) - count * chunk_size:]) | {main[0]}
                for token in main[1:]:
                    left = max(self.OWN - len(seen), 1)
                    unseen = math.log(self.OWN * (self.N - len(seen)) / left)
                    nll.append(math.log(self.OWN) if token in seen else unseen)
                    seen.add(token)
            out.append(math.exp(sum(nll) / len(nll)))
        return out


def small_decoder(steps, seed) -> Llama:
    """A Llama of 0.1M parameters that knows windows of 16 tokens of the entity stream."""
    config = LlamaConfig(Entities.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=64,
                         n_ff=192, head_dim=32, tie_embeddings=True)
    model, data = Llama(config).init_weights(seed), Entities()
    betas = 0.9, 0.98
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=betas, weight_decay=0.0)
    for step in tqdm(range(steps), "decoder", unit="step", disable=None, leave=False):
        mains = [main for _, main in data.draw(np.random.default_rng([seed, 0, step]), 0, 64)]
        batch = collate(mains)
        optimizer.param_groups[0]["lr"] = 5e-3 * warmup_cosine(step, steps, 0.04, 0.02)
        model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


# --- answer with a context -----------------------------------------------------------------------

@dataclass
class Flags:
    model: str | None = flag(None, "folder of a CEPE, as train.py --method cepe writes it")
    context: str | None = flag(None, "text file that the encoder reads")
    prompt: str | None = flag(None, "text that the decoder continues")
    chunk_size: int = flag(256, "tokens that the encoder reads at once", least=1)
    max_new_tokens: int = flag(128, "longest answer [tokens]", least=1)
    device: str = flag("cpu", "torch device")
    dtype: str = flag("bfloat16", "of weights and cache", choices=tuple(DTYPES))


@torch.no_grad()
def main():
    config, = parse([Flags], description="Continue a prompt with a file as context.")
    if not (config.model and config.context and config.prompt):
        raise ValueError("--model, --context, --prompt are needed; train.py --method cepe trains")
    join(config.device)
    model = load_cepe(config.model, config.device, DTYPES[config.dtype])
    tokenizer = load_tokenizer(config.model)
    with open(config.context, encoding="utf-8") as f:
        ids = tokenizer.encode(f.read())
    chunks = [ids[i:i + config.chunk_size] for i in range(0, len(ids), config.chunk_size)]
    prompt = tokenizer.document(config.prompt)
    new = generate(reading(model, chunks, cache_kv=True), prompt, config.max_new_tokens,
                   stop_ids=tokenizer.eos_ids)
    print(tokenizer.decode(new, marks=False))


if __name__ == "__main__":
    run(main)
