"""PruLong: learn which KV heads need the full cache. DuoAttention, the baseline, below it.

Each KV head has a gate z in [0, 1]. z = 1 attends to everything. z = 0 attends only to the sink (a
document's first tokens) and the window (its last ones), so that its cache never grows. Gates are
hard-concrete random variables: mostly exactly 0 or 1, and yet differentiable,
    z = clip(-0.1 + 1.2 sigmoid((logit(u) + log_alpha) / T), 0, 1),    u uniform, T = 2/3.
The language modelling loss decides which heads stay full; a Lagrangian drives their number:
    min over gates, max over l1, l2:   LM loss + l1 (s - t) + l2 (s - t)^2,
with s the expected share of closed gates and t its target, which rises during training.

DuoAttention regresses z directly on passkeys hidden in a text: the last states with gates must be
those of the full model, and an L1 price closes gates.

Papers: PruLong, "Cache Me If You Can", arXiv:2506.17121; hard-concrete gates, arXiv:1712.01312;
DuoAttention, arXiv:2410.10819.

    python train.py --method prulong                             # embedded: no data, about a minute
    python train.py --method prulong --model DIR --data SRC      # a real Llama, real text
    python model.py --model DIR --prompt TEXT --heads out/prulong/heads.tsv       # decode with it
"""
import html
import math
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from attention_triton import attention
from model import (Method, causal, collate, discretise, flag, load_heads, save_heads, write_json,
                   write_svg)

# official: the released training script, 1000 steps of 16 x 64K tokens. tiny: runs of about 100
# small steps. Gates drawn per document are less noisy, the expected sparsity has a gradient
# everywhere, and a lower first value leaves gates undecided enough to learn.
PRESETS = {
    "official": dict(mask_lr=1.0, mask_init=4.0, per_document=False, sampled_sparsity=True),
    "tiny": dict(mask_lr=0.3, mask_init=2.0, per_document=True, sampled_sparsity=False),
}


# --- gates ---------------------------------------------------------------------------------------

GAMMA, ZETA, TEMPERATURE = -0.1, 1.1, 2 / 3  # s in (0, 1) is stretched to (GAMMA, ZETA), clipped


def draw_gates(log_alpha, u):
    """z in [0, 1], with atoms at 0 and 1, from uniform u; shapes (..., n_layer, n_kv_head)."""
    s = torch.sigmoid((u.logit() + log_alpha) / TEMPERATURE)
    return (GAMMA + (ZETA - GAMMA) * s).clamp(0, 1)


def probability_open(log_alpha):
    """P(z > 0)."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-GAMMA / ZETA))


# --- attention with gates ------------------------------------------------------------------------

def gated(z, cu_seqlens, sink, window, full=None):
    """`attend` that mixes z * full + (1 - z) * streaming, head by head.

    z (n_layer, n_kv_head), or (n_doc, n_layer, n_kv_head) for gates of each packed document, which
    has a sink of its own. full stands in for the full branch (DuoAttention's teacher). The official
    kernel rounds sink and window up to 128 tokens; they are exact here."""
    full = full or causal(cu_seqlens)
    cu = torch.as_tensor(cu_seqlens).tolist()
    lengths = torch.tensor(cu, device=z.device).diff()

    def attend(layer, q, k, v):
        everything = full(layer, q, k, v)  # (N, n_head, D)
        streaming = attention(q, k, v, cu, cu, window=window, sink=sink)
        gate = z[..., layer, :].repeat_interleave(q.shape[1] // k.shape[1], -1)  # (..., n_head)
        if gate.dim() == 2:
            gate = gate.repeat_interleave(lengths, 0, output_size=len(q))  # (N, n_head)
        return streaming + gate.to(q.dtype)[..., None] * (everything - streaming)
    return attend


def by_mask(mask, cu_seqlens, sink, window):
    """`attend` of a mask (n_layer, n_kv_head), True = full: each head runs once, in its mode."""
    windows, cu = torch.where(mask.cpu(), 0, window), torch.as_tensor(cu_seqlens).tolist()
    return lambda layer, q, k, v: attention(q, k, v, cu, cu, window=windows[layer], sink=sink)


# --- learning masks: what PruLong and DuoAttention share -----------------------------------------

@dataclass
class HeadFlags:
    target_sparsity: float = flag(0.75, "share of KV heads to stream at the end", least=0)
    sink: int = flag(4, "first tokens that a streaming head sees (official: 128)", least=0)
    window: int = flag(32, "last tokens that it sees, the query's own included (official: 1024)",
                       least=1)
    n_random: int = flag(8, "random masks to compare with", least=1, free=True)


class Heads(Method):
    """Gives every KV head a score and keeps the full cache for the best ones."""

    own_attention = True

    @classmethod
    def defaults(cls, args, config):
        return dict(min_lr=0.01, from_scratch=False)

    @classmethod
    def frozen(cls, config):
        return True

    def __init__(self, model, config, seed=0):
        super().__init__(model, config)
        if not 0 <= config.target_sparsity <= 1:
            raise ValueError(f"--target_sparsity must be in 0..1, got {config.target_sparsity}")

    def scores(self):
        """What heads are ranked by, (n_layer, n_kv_head) in 0..1."""
        raise NotImplementedError

    def mask(self):
        """The heads that keep the full cache, bool (n_layer, n_kv_head)."""
        return discretise(self.scores(), self.config.target_sparsity)

    def check_length(self, seq_len):
        c = self.config
        if c.sink + c.window >= seq_len:
            raise ValueError(f"--sink + --window = {c.sink + c.window} must be below --seq_len "
                             f"{seq_len}, or a streaming head is a full head")

    def before(self, model, data):
        self.check_length(data.seq_len)
        return {}

    def evaluate(self, model, data):
        return self.score_mask(self.mask(), model, data)

    def score_mask(self, mask, model, data) -> dict:
        c = self.config
        footprint = streaming_footprint(mask, data.seq_len, c.sink, c.window)
        attend = lambda cu: by_mask(mask, cu, c.sink, c.window)
        scores = data.scores(model, attend, beyond=c.window)
        return {"full heads": int(mask.sum()), "KV footprint": footprint} | scores

    def rows(self, model, data, before, runs, out_dir):
        """The full cache, each run's mask, and random ones of the same sparsity."""
        c, rng = self.config, torch.Generator().manual_seed(data.seed)
        masks = {name: method.mask() for name, (method, _) in runs.items()}
        draw_map(os.path.join(out_dir, "heads.svg"), masks)
        full = torch.ones_like(next(iter(masks.values())))
        yield "full cache", self.score_mask(full, model, data)
        for name, mask in masks.items():
            yield name, self.score_mask(mask, runs[name][1], data)
        drawn = [torch.rand(full.shape, generator=rng) for _ in range(c.n_random)]
        sparsity = 1 - self.mask().double().mean().item()  # of --heads, where those were given
        drawn = [discretise(scores, sparsity) for scores in drawn]
        others = [self.score_mask(mask, model, data) for mask in drawn]
        kinds = {"mean": np.mean, "lowest": min, "highest": max}
        for name, pick in kinds.items() if c.n_random > 1 else ():
            values = {key: float(pick([row[key] for row in others])) for key in others[0]}
            yield f"{name} of {c.n_random} random masks", values
        if c.n_random == 1:
            yield "a random mask", others[0]

    def save(self, model, out_dir):
        """The mask, the scores, and sink and window as DuoAttention's config.json has them: under
        that name, unless it is the model's."""
        with_weights = any(name.startswith("model") for name in os.listdir(out_dir))
        names = ("heads.tsv", "scores.tsv", "pattern.json" if with_weights else "config.json")
        heads, scores, pattern = (os.path.join(out_dir, name) for name in names)
        save_heads(heads, self.mask())
        save_heads(scores, self.scores())
        sizes = {"sink_size": self.config.sink, "recent_size": self.config.window}
        write_json(pattern, sizes)
        return [heads, scores, pattern]


def streaming_footprint(mask, n, sink, window) -> float:
    """KV footprint of n tokens, one at a time, where streaming heads keep sink + window - 1."""
    cells = sum(1 + min(t, sink + window - 1) for t in range(n))
    full = mask.double().mean().item()
    return full + (1 - full) * cells / (n * (n + 1) / 2)


# --- PruLong -------------------------------------------------------------------------------------

class Noisy(NamedTuple):
    """A Batch with the noise that its gates are drawn from: u (n_layer, n_kv_head), or
    (n_doc, n_layer, n_kv_head)."""
    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    weights: torch.Tensor | None
    u: torch.Tensor


class PruLong(Heads):
    """Language modelling under gates. The model's weights are frozen unless --train says other."""

    @dataclass
    class Config(HeadFlags):
        start_sparsity: float = flag(0.0, "target at the first step", least=0)
        sparsity_warmup: float = flag(0.8, "share of the steps over which it rises", least=0)
        preset: str = flag("tiny", "where the next four come from", choices=tuple(PRESETS))
        mask_lr: float | None = flag(None, "learning rate of gates and multipliers", least=0)
        mask_init: float | None = flag(None, "first value of the gate logits")
        per_document: bool | None = flag(None, "draw gates for each document, not once a step")
        sampled_sparsity: bool | None = flag(None, "constrain the drawn gates' mean")
        mask_weight_decay: float = flag(0.1, "of gates and multipliers", least=0)
        train: str = flag("masks", "what learns", choices=("masks", "masks+weights", "weights"))
        heads: str | None = flag(None, "mask (TSV) to start from; --train weights keeps it")

    @classmethod
    def defaults(cls, args, config):
        embedded = args.model is None and args.data in (None, "facts")
        beside = ["duo"] if embedded and config.train == "masks" else None
        known = super().defaults(args, config) | PRESETS[config.preset] | dict(beside=beside)
        return known if config.train == "masks" else known | dict(min_lr=None)

    @classmethod
    def frozen(cls, config):
        return config.train == "masks"

    def __init__(self, model, config, seed=0):
        super().__init__(model, config, seed)
        shape = model.config.n_layer, model.config.n_kv_head
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        self.log_alpha = nn.Parameter(config.mask_init + 0.01 * noise)
        self.multipliers = nn.Parameter(torch.zeros(2))
        if config.train == "weights" and config.heads is None:
            raise ValueError("--train weights learns under a mask: it needs --heads FILE")
        if config.heads is not None:
            mask = load_heads(config.heads)
            if mask.shape != shape:
                raise ValueError(f"{config.heads} is not a mask of the model's {shape} heads")
            self.log_alpha.data = torch.where(mask, 10.0, -10.0)  # P(z = 0) is 1e-5 or 0.9998
        self.to(model.head.device).requires_grad_(config.train != "weights")
        model.requires_grad_(config.train != "masks")

    def param_groups(self, model, args):
        c = self.config
        mine = dict(lr=c.mask_lr, weight_decay=c.mask_weight_decay)
        gates = [dict(params=[self.log_alpha], **mine),
                 dict(params=[self.multipliers], maximize=True, **mine)]
        weights = super().param_groups(model, args)
        return weights if c.train == "weights" else gates + weights

    def batch(self, data, i, step, steps):
        batch = data.batch(i)._replace(weights=None)  # every target counts here
        rng = np.random.default_rng((data.seed, i, 1))
        n_draw = (len(batch.cu_seqlens) - 1,) if self.config.per_document else ()
        u = torch.from_numpy(rng.uniform(1e-6, 1 - 1e-6, (*n_draw, *self.log_alpha.shape))).float()
        return Noisy(*batch, u)

    def target(self, step, steps) -> float:
        """The sparsity wanted at a step: linear from start to end, constant after the warm-up."""
        c = self.config
        warmup = math.ceil(c.sparsity_warmup * steps)
        done = min(1.0, step / warmup) if warmup else 1.0
        return c.start_sparsity + (c.target_sparsity - c.start_sparsity) * done

    def loss(self, model, batch, step, steps):
        c, cu = self.config, batch.cu_seqlens
        if c.train == "weights":
            attend = by_mask(self.mask()[:, model.kv_heads], cu, c.sink, c.window)
            return model.loss(batch.tokens, batch.targets, attend), {}
        z = draw_gates(self.log_alpha, batch.u)  # here: a recomputed layer must see the same gates
        attend = gated(z[..., model.kv_heads], cu, c.sink, c.window)
        lm = model.loss(batch.tokens, batch.targets, attend)
        closed = 1 - (z if c.sampled_sparsity else probability_open(self.log_alpha)).mean()
        target = self.target(step, steps)
        penalty = self.penalty(closed - target)
        sure = self.log_alpha.detach().sigmoid()  # a half-open gate counts as half a closed one:
        metrics = {"lm_loss": lm.item(), "sparsity": closed.item(), "target": target,
                   "closed": (sure < 0.5).float().mean().item(),  # so these say how far it is
                   "undecided": ((sure > 0.1) & (sure < 0.9)).float().mean().item()}
        return lm + penalty, metrics

    def penalty(self, gap):
        """l1 gap + l2 gap^2: descended by the gates, ascended by the multipliers."""
        return self.multipliers[0] * gap + self.multipliers[1] * gap ** 2

    def scores(self):
        return self.log_alpha.detach().cpu().double().sigmoid()

    def mask(self):
        return self.scores() > 0.5 if self.config.train == "weights" else super().mask()

    def save(self, model, out_dir):
        weights = [] if self.config.train == "masks" else Method.save(self, model, out_dir)
        return weights + super().save(model, out_dir)


# --- DuoAttention --------------------------------------------------------------------------------

class Duo(Heads):
    """Gates a in [0, 1] regress the full model's last states on passkeys; an L1 price closes them.

    States are compared where a target is predicted; the released code takes those at the target
    tokens, one further on."""

    @dataclass
    class Config(HeadFlags):
        mask_lr: float = flag(0.02, "learning rate of the gates", least=0)
        reg: float = flag(0.05, "weight of the mean gate in the loss", least=0)
        needles: int = flag(10, "passkeys in a sample", least=1)
        words: int = flag(32, "words in a passkey of text", least=1)
        teacher_branch: bool = flag(False, "full branch from the teacher's states, as released")

    def __init__(self, model, config, seed=0):
        super().__init__(model, config, seed)
        shape = model.config.n_layer, model.config.n_kv_head
        self.a = nn.Parameter(torch.ones(shape, device=model.head.device))
        model.requires_grad_(False)

    def param_groups(self, model, args):
        betas = 0.9, 0.999
        return [dict(params=[self.a], lr=self.config.mask_lr, weight_decay=0.0, betas=betas)]

    def lr_scale(self, step, steps, args):
        """Up over the first fifth of the steps, down over the last, never below a tenth."""
        return max(0.1, min(1.0, 5 * (step + 1) / steps, 5 * (steps - step) / steps))

    def batch(self, data, i, step, steps):
        c = self.config
        if hasattr(data, "passkeys"):  # the fact stream has questions of its own
            return data.passkeys(i, c.needles)
        rng = np.random.default_rng((data.seed, i, 1))
        text = data.batch(i).tokens.view(-1)
        samples = []
        for haystack in text.split(data.seq_len)[:data.n_seq]:
            longest = len(haystack)
            lengths = np.linspace(longest / 3, longest, 50)  # officially from 1000 to 32000
            shortest = passkeys_length(data.tokenizer, c.needles, c.words)
            length = max(int(rng.choice(lengths)), min(shortest, longest))
            samples.append(passkeys(data.tokenizer, haystack, length, rng, c.needles, c.words))
        return collate([tokens for tokens, _ in samples], [targets for _, targets in samples])

    def loss(self, model, batch, step, steps):
        c, full, seen = self.config, causal(batch.cu_seqlens), []

        def teacher(layer, q, k, v):
            seen.append(full(layer, q, k, v))
            return seen[-1]
        with torch.no_grad():
            self.a.clamp_(0, 1)
            want = model.hidden(batch.tokens, teacher if c.teacher_branch else full)
        branch = (lambda layer, q, k, v: seen[layer]) if c.teacher_branch else full
        attend = gated(self.a[:, model.kv_heads], batch.cu_seqlens, c.sink, c.window, branch)
        got = model.hidden(batch.tokens, attend)
        rows = batch.targets != -100
        gap = (want[rows].float() - got[rows].float()).pow(2).sum()
        distance = gap / (rows.sum() * want.shape[1]).clamp(min=1)
        price = c.reg * self.a.abs().mean()
        return distance + price, {"distance": distance.item(), "open": self.a.mean().item()}

    def scores(self):
        return self.a.detach().cpu().clamp(0, 1)


# --- passkeys: DuoAttention's only training data -------------------------------------------------

WORDS = ("alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november "
         "oscar papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu").split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
TOLD = "\nRemember this sequence of words, it's the {} passkey to the vault: {}\n"
ASKED = "\nBased on the content of the book, what is the {} passkey to the vault?\nPasskey: {}"


def passkeys_length(tokenizer, needles, words) -> int:
    """Tokens that the longest passkeys, questions and answers take, with a token between them."""
    key = " ".join([max(WORDS, key=lambda word: len(tokenizer.encode(" " + word)))] * words)
    texts = [form.format(n, key) for form in (TOLD, ASKED) for n in ORDINALS[:needles]]
    return 2 * needles + sum(len(tokenizer.encode(text)) for text in texts)


def passkeys(tokenizer, haystack, length, rng, needles, words=32):
    """tokens, targets (length,): `needles` passkeys at random depths of a text, then a question
    and answer for each; targets are the questions and answers.

    haystack: token ids, as many as the sample needs. Raises ValueError if there is no room for
    text. Source: DuoAttention, arXiv:2410.10819, section 2.3, and its data code."""
    if needles > len(ORDINALS):
        raise ValueError(f"--needles is at most {len(ORDINALS)}, got {needles}")
    keys = [" ".join(rng.choice(WORDS, words)) for _ in range(needles)]
    told = [tokenizer.encode(TOLD.format(n, key)) for n, key in zip(ORDINALS, keys)]
    asked = [tokenizer.encode(ASKED.format(n, key)) for n, key in zip(ORDINALS, keys)]
    tail = sum(asked, [])
    room = length - len(tail) - sum(map(len, told))
    if room < needles:
        raise ValueError(f"{needles} passkeys of {words} words need --seq_len "
                         f"{length - room + needles} or more, got {length}")
    depths = np.sort(rng.choice(np.linspace(0.05, 0.95, 1000), needles, replace=False))
    tokens, at = [], 0
    for depth, ids in zip(depths, told):
        tokens += [*haystack[at:int(depth * room)], *ids]
        at = int(depth * room)
    tokens = torch.tensor([*tokens, *haystack[at:room], *tail])
    targets = torch.full_like(tokens, -100)
    targets[-len(tail) - 1:-1] = tokens[-len(tail):]
    return tokens, targets


# --- a picture of masks --------------------------------------------------------------------------

def draw_map(path, masks):
    """An SVG of masks {name: (n_layer, n_kv_head)}, side by side: a row a layer, a column a KV
    head, dark = full cache; scores in between give shades."""
    cell, left, top, out = 16, 40, 40, []
    for name, mask in masks.items():
        out.append(f'<text x="{left}" y="20">{html.escape(name)}</text>')
        for layer, row in enumerate(mask.double().tolist()):
            y = top + cell * layer
            out.append(f'<text x="{left - 6}" y="{y + 12}" text-anchor="end">{layer}</text>')
            for h, value in enumerate(row):
                grey, x = round(235 - 195 * value), left + cell * h
                out.append(f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" '
                           f'fill="rgb({grey},{grey},{grey + 20})"/>')
        left += cell * mask.shape[1] + 80
    height = top + cell * len(mask) + 30
    out.append(f'<text x="40" y="{height - 10}">rows: layers; columns: KV heads; dark: full</text>')
    write_svg(path, max(left, 320), height, out)
