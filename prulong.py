"""PruLong: learn which KV heads need the full cache. DuoAttention, the baseline, beside it.

Each KV head gets a gate z in [0, 1]: z = 1 attends to everything, z = 0 only to the sink (a document's first tokens) and
the window (its last ones), so its cache never grows. Gates are hard-concrete random variables (mostly exactly 0 or 1,
yet differentiable); a Lagrangian drives their mean to the wanted sparsity while the plain language-modelling loss decides
which heads stay full. DuoAttention instead regresses z directly, on synthetic passkeys, against the full model's states.

Papers: PruLong, "Cache Me If You Can", arXiv:2506.17121; gates: Louizos et al., arXiv:1712.01312; DuoAttention,
arXiv:2410.10819.

    python train.py --method prulong                                # learn on the embedded stream
    python train.py --method prulong --model DIR --data SRC         # learn on a real Llama and real text
    python prulong.py                                               # the gates and the Lagrangian alone, on a toy
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from attention_triton import attention
from model import Batch, causal, flag, parse, replacing, warmup_cosine

# --- configuration --------------------------------------------------------------------------------------------------

# official: the released training script (1000 steps on 16 x 64K tokens each, 256 gates). tiny: the same objective for
# runs of about 100 steps and few gates: gates drawn per document divide the gradient's variance by the number of documents,
# the closed-form sparsity has a gradient everywhere, and an initial value of 2 leaves gates undecided enough to learn.
PRESETS = {
    "official": dict(mask_lr=1.0, mask_init=4.0, per_document=False, sampled_sparsity=True),
    "tiny": dict(mask_lr=0.3, mask_init=2.0, per_document=True, sampled_sparsity=False),
}


@dataclass
class Config:
    target_sparsity: float = flag(0.75, "share of KV heads to stream at the end", low=0, high=1)
    start_sparsity: float = flag(0.0, "target at the first step", low=0, high=1)
    sparsity_warmup: float = flag(0.8, "share of the steps over which the target rises", low=0, high=1)
    sink: int = flag(4, "first tokens of a document that a streaming head keeps (official: 128)", low=0)
    window: int = flag(32, "last tokens it keeps, the query's own included (official: 1024)", low=1)
    preset: str = flag("tiny", "defaults of the next four: official (long runs) or tiny (about 100 steps)", choices=tuple(PRESETS))
    mask_lr: float | None = flag(None, "learning rate of gates and multipliers", low=0)
    mask_init: float | None = flag(None, "first value of the gate logits")
    per_document: bool | None = flag(None, "draw gates for each document of a batch instead of once a step")
    sampled_sparsity: bool | None = flag(None, "constrain the drawn gates' mean instead of their expected number")
    mask_weight_decay: float = flag(0.1, "of gates and multipliers; bounds both by about 1 / decay", low=0)
    train: str = flag("masks", "what learns; weights needs --heads", choices=("masks", "masks+weights", "weights"))
    heads: str | None = flag(None, "mask file (TSV) to start from, or to freeze with --train weights")

    def __post_init__(self):
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.train == "weights" and self.heads is None:
            raise ValueError("--train weights fine-tunes under frozen masks: --heads is needed")


@dataclass
class DuoConfig:
    target_sparsity: float = flag(0.75, "share of KV heads to stream when the gates are ranked", low=0, high=1)
    sink: int = flag(4, "first tokens of a document that a streaming head keeps (official: 128)", low=0)
    window: int = flag(32, "last tokens it keeps, the query's own included (official: 256)", low=1)
    mask_lr: float = flag(0.02, "learning rate of the gates", low=0)
    reg: float = flag(0.05, "weight of the mean gate in the loss", low=0)
    needles: int = flag(10, "passkeys in a sample of text", low=1, high=10)
    words: int = flag(32, "words in a passkey of text", low=1, high=1000)
    teacher_branch: bool = flag(False, "full branch from the teacher's states, as the official code, not the student's own")


# --- gates ----------------------------------------------------------------------------------------------------------

# Hard-concrete constants of arXiv:1712.01312: s is stretched from (0, 1) to (GAMMA, ZETA) and clipped back
GAMMA, ZETA, TEMPERATURE = -0.1, 1.1, 2 / 3
SHIFT = TEMPERATURE * math.log(-GAMMA / ZETA)  # -1.5986


def draw_gates(log_alpha, u):
    """z in [0, 1], with atoms at 0 and 1: clip(GAMMA + (ZETA - GAMMA) * sigmoid((logit(u) + log_alpha) / T), 0, 1).

    log_alpha (..., n_layer, n_kv_head) float32, u in (0, 1) of the same or a wider shape."""
    s = ((u.log() - torch.log1p(-u) + log_alpha) / TEMPERATURE).sigmoid()
    return (GAMMA + (ZETA - GAMMA) * s).clamp(0, 1)


def probability_open(log_alpha):
    """P(z > 0) = sigmoid(log_alpha + 1.5986)."""
    return torch.sigmoid(log_alpha - SHIFT)


def target_at(step, steps, config) -> float:
    """The sparsity target: linear from start to end over the first `sparsity_warmup` of the steps, constant after."""
    warmup = math.ceil(config.sparsity_warmup * steps)
    done = min(1.0, step / warmup) if warmup else 1.0
    return config.start_sparsity + (config.target_sparsity - config.start_sparsity) * done


class Gates(nn.Module):
    """log_alpha (n_layer, n_kv_head) and the multipliers of the constraint sparsity = target; float32 whatever the model."""

    def __init__(self, n_layer, n_kv_head, init, rng):
        super().__init__()
        self.log_alpha = nn.Parameter(init + 0.01 * torch.randn(n_layer, n_kv_head, generator=rng))
        self.multipliers = nn.Parameter(torch.zeros(2))

    def penalty(self, sparsity, target):
        """lambda1 (s - t) + lambda2 (s - t)^2: descended by the gates, *ascended* by the multipliers."""
        gap = sparsity - target
        return self.multipliers[0] * gap + self.multipliers[1] * gap ** 2

    def param_groups(self, lr, weight_decay):
        return [dict(params=[self.log_alpha], lr=lr, weight_decay=weight_decay),
                dict(params=[self.multipliers], lr=lr, weight_decay=weight_decay, maximize=True)]


# --- attention with gates -------------------------------------------------------------------------------------------

def gated(z, cu_seqlens, sink, window, full=None):
    """`attend` that mixes z * full + (1 - z) * streaming in every head, both from the same q, k, v.

    z (n_layer, n_kv_head), or (n_doc, n_layer, n_kv_head) for gates of each packed document. The sink is each document's
    own. full(layer, q, k, v) may stand in for the full branch. Differs from the official kernel, which rounds sink and
    window up to blocks of 128 tokens: exact here."""
    full = full or causal(cu_seqlens)
    cu_seqlens, lengths = torch.as_tensor(cu_seqlens).tolist(), torch.as_tensor(cu_seqlens).diff().to(z.device)

    def attend(layer, q, k, v):
        everything = full(layer, q, k, v)  # (N, n_head, D)
        streaming = attention(q, k, v, cu_seqlens, cu_seqlens, window=window, sink=sink)
        gate = z[..., layer, :].repeat_interleave(q.shape[1] // k.shape[1], -1)  # (n_head,) or (n_doc, n_head)
        gate = gate if gate.dim() == 1 else gate.repeat_interleave(lengths, 0, output_size=len(q))  # (N, n_head)
        return streaming + gate.to(q.dtype)[..., None] * (everything - streaming)
    return attend


def own_heads(model, per_head):
    """Of something (..., n_kv_head) what this process attends with: all, if no others share the sequence."""
    return per_head if model.sequence is None else model.sequence.heads(per_head)


def by_mask(mask, cu_seqlens, sink, window):
    """`attend` of a learned mask (n_layer, n_kv_head), True = full: each head runs once, in its own mode."""
    windows, cu_seqlens = torch.where(mask.cpu(), 0, window), torch.as_tensor(cu_seqlens).tolist()
    return lambda layer, q, k, v: attention(q, k, v, cu_seqlens, cu_seqlens, window=windows[layer], sink=sink)


# --- the methods: what train.py asks of them: param_groups, lr_scale, batch, loss, scores, mask -------------------------

class Noisy(NamedTuple):
    """A Batch with the noise that its gates are drawn from: u (n_layer, n_kv_head), or (n_doc, n_layer, n_kv_head) by document."""
    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    weights: torch.Tensor | None
    u: torch.Tensor

    def documents(self, first, last):
        """Its documents first .. last - 1."""
        return Noisy(*Batch.documents(self, first, last), self.u if self.u.dim() == 2 else self.u[first:last])


class PruLong(nn.Module):
    """Language modelling under gates. Holds the gates; `model`'s weights stay where they are, frozen unless trained."""

    def __init__(self, model, config: Config, seed: int):
        super().__init__()
        c, self.config = model.config, config
        rng = torch.Generator().manual_seed(seed)
        self.gates = Gates(c.n_layer, c.n_kv_head, config.mask_init, rng)
        if config.heads is not None:
            mask = load_heads(config.heads)
            if mask.shape != (c.n_layer, c.n_kv_head):
                raise ValueError(f"{config.heads}: {tuple(mask.shape)} heads, the model has {(c.n_layer, c.n_kv_head)}")
            self.gates.log_alpha.data = torch.where(mask, 10.0, -10.0)  # decided: P(z = 0) is 1e-5 or 0.9998
        self.to(model.head.device).gates.requires_grad_(config.train != "weights")
        model.requires_grad_(config.train != "masks")

    def param_groups(self):
        return [] if self.config.train == "weights" else \
            self.gates.param_groups(self.config.mask_lr, self.config.mask_weight_decay)

    def lr_scale(self, step, steps, warmup, min_lr):
        return warmup_cosine(step, steps, warmup, min_lr)

    def batch(self, data, rng, step, steps):
        return self.with_noise(data.batch(rng)._replace(weights=None), rng)  # weights are for base models: every target counts here

    def with_noise(self, batch: Batch, rng) -> Noisy:
        shape = (len(batch.cu_seqlens) - 1,) * self.config.per_document + tuple(self.gates.log_alpha.shape)
        return Noisy(*batch, torch.from_numpy(rng.uniform(1e-6, 1 - 1e-6, shape)).float())

    def loss(self, model, batch: Noisy, step, steps):
        """LM loss + the Lagrangian's penalty."""
        c, log_alpha = self.config, self.gates.log_alpha
        if c.train == "weights":
            attend = by_mask(own_heads(model, log_alpha) > 0, batch.cu_seqlens, c.sink, c.window)
            return model.loss(batch.tokens, batch.targets, attend), {}
        z = draw_gates(log_alpha, batch.u)  # float32 and outside any checkpointed layer: recomputation must see the same gates
        lm = model.loss(batch.tokens, batch.targets, gated(own_heads(model, z), batch.cu_seqlens, c.sink, c.window))
        sparsity = 1 - (z if c.sampled_sparsity else probability_open(log_alpha)).mean()
        target = target_at(step, steps, c)
        l1, l2 = self.gates.multipliers.tolist()
        return lm + self.gates.penalty(sparsity, target), {
            "lm_loss": lm.item(), "sparsity": sparsity.item(), "target": target, "lambda1": l1, "lambda2": l2,
            "closed": (log_alpha < 0).float().mean().item()}

    def scores(self):
        """What heads are ranked by, (n_layer, n_kv_head) in 0..1: sigmoid(log_alpha)."""
        return self.gates.log_alpha.detach().cpu().double().sigmoid()

    def mask(self):
        """The heads that keep the full cache: the 1 - target_sparsity of all that score highest, or the frozen ones."""
        return self.scores() > 0.5 if self.config.train == "weights" else discretise(self.scores(), self.config.target_sparsity)


class Duo(nn.Module):
    """DuoAttention: gates a in [0, 1] regress the full model's last states on passkeys, with an L1 price on a."""

    def __init__(self, model, config: DuoConfig, seed: int):
        super().__init__()
        self.config = config
        self.a = nn.Parameter(torch.ones(model.config.n_layer, model.config.n_kv_head, device=model.head.device))
        model.requires_grad_(False)

    def param_groups(self):
        return [dict(params=[self.a], lr=self.config.mask_lr, weight_decay=0.0, betas=(0.9, 0.999))]

    def lr_scale(self, step, steps, warmup, min_lr):
        """Up over the first fifth of the steps, down over the last, never below a tenth."""
        return max(0.1, min(1.0, 5 * (step + 1) / steps, 5 * (steps - step) / steps))

    def batch(self, data, rng, step, steps):
        return data.passkeys(rng, self.config.needles, self.config.words)

    def loss(self, model, batch: Batch, step, steps):
        """Mean squared difference of the last states, with and without gates, where a target is predicted + reg * mean |a|.
        (The released code takes the states at the target tokens themselves, one further on.)"""
        c, full = self.config, causal(batch.cu_seqlens)
        with torch.no_grad():
            self.a.clamp_(0, 1)
            seen = []  # the teacher's attention outputs, layer by layer
            def teacher(layer, q, k, v):
                out = full(layer, q, k, v)
                seen.append(out)
                return out
            want = model.hidden(batch.tokens, teacher if c.teacher_branch else full)
        branch = (lambda layer, q, k, v: seen[layer]) if c.teacher_branch else full
        got = model.hidden(batch.tokens, gated(own_heads(model, self.a), batch.cu_seqlens, c.sink, c.window, branch))
        rows, parts = batch.targets != -100, 1
        total = rows.sum() * want.shape[1]
        if model.sequence is not None:  # as in Llama.loss: the mean over the processes is the distance
            rows, parts = rows[model.sequence.stretch(len(rows))], model.sequence.size
        distance = (want[rows].float() - got[rows].float()).pow(2).sum() * parts / total
        return distance + c.reg * self.a.abs().mean(), {"distance": distance.item(), "open": self.a.mean().item()}

    def scores(self):
        return self.a.detach().cpu().clamp(0, 1)

    def mask(self):
        return discretise(self.scores(), self.config.target_sparsity)


# --- passkeys: DuoAttention's only training data ----------------------------------------------------------------------

WORDS = ("alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo "
         "sierra tango uniform victor whiskey xray yankee zulu").split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()


TOLD = "\nRemember this sequence of words, it's the {} passkey to the vault: {}\n"
ASKED = "\nBased on the content of the book, what is the {} passkey to the vault?\nPasskey: {}"


def passkeys_room(tokenizer, needles, words) -> int:
    """Tokens that the longest passkeys, questions and answers take; a sample must be longer by the text between them."""
    longest = " ".join([max(WORDS, key=lambda w: len(tokenizer.encode(" " + w)))] * words)
    return needles + sum(len(tokenizer.encode(form.format(n, longest))) for form in (TOLD, ASKED) for n in ORDINALS[:needles])


def passkeys(tokenizer, haystack, length, rng, needles, words=32):
    """tokens, targets (length,) of one sample: `needles` passkeys of random words at random depths of a text, then a
    question and answer for each. Targets are -100 on the text and the whole tail of questions and answers otherwise.

    haystack: at least `length` token ids. Raises ValueError if the passkeys leave no room for text.
    Source: DuoAttention, arXiv:2410.10819, section 2.3, and its released data code (10 needles of 32 words)."""
    keys = [" ".join(rng.choice(WORDS, words)) for _ in range(needles)]
    told = [tokenizer.encode(TOLD.format(n, key)) for n, key in zip(ORDINALS, keys)]
    tail = [i for n, key in zip(ORDINALS, keys) for i in tokenizer.encode(ASKED.format(n, key))]
    room = length - len(tail) - sum(map(len, told))
    if room < needles:
        raise ValueError(f"{needles} passkeys of {words} words need {length - room + needles} tokens: --seq_len {length} is too short")
    depths = np.sort(rng.choice(np.linspace(0.05, 0.95, 1000), needles, replace=False))
    tokens, at = [], 0
    for depth, ids in zip(depths, told):
        tokens += [*haystack[at:int(depth * room)], *ids]
        at = int(depth * room)
    tokens = torch.tensor([*tokens, *haystack[at:room], *tail])
    targets = torch.full_like(tokens, -100)
    targets[-len(tail) - 1:-1] = tokens[-len(tail):]
    return tokens, targets


# --- masks ----------------------------------------------------------------------------------------------------------

def discretise(scores, sparsity):
    """The int(n * (1 - sparsity)) heads of highest score, over all layers: bool like scores (n_layer, n_kv_head).

    Ties go to the earlier head. Ranking raw log_alpha gives the official rule's heads up to the trained sparsity; below
    it the official code fills up at random, because it has already set the pruned heads equal."""
    n_full = int(scores.numel() * (1 - sparsity) + 1e-9)  # 1e-9: 90 * (1 - 0.9) is 9 although floats say 8.999...
    order = scores.flatten().double().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:n_full].cpu()] = True
    return mask.view(scores.shape)


def save_heads(path, mask):
    """Write a mask, or scores, (n_layer, n_kv_head) as the official TSV: row = layer, column = KV head, 1.0 = full cache."""
    mask = torch.as_tensor(mask).cpu()
    with replacing(path) as part:
        np.savetxt(part, mask.double().numpy(), delimiter="\t", fmt="%.9g" if mask.is_floating_point() else "%.1f")


def load_heads(path, sparsity=None):
    """bool (n_layer, n_kv_head) from PruLong's masks.tsv or DuoAttention's full_attention_heads.tsv, True = full cache.

    Without a sparsity a head is full where its value is above 0.5. With one, the heads are ranked by value, clipped to [0, 1];
    exact ties go to the earlier head (the official loaders break them by unseeded noise). Raises ValueError naming the line that is
    not a row of numbers, or a sparsity that a file of zeros and ones cannot give."""
    rows = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                row = [float(x) for x in line.split("\t")]
            except ValueError:
                raise ValueError(f"{path}, line {number}: want tab-separated numbers, got {line.strip()[:60]!r}") from None
            if not all(map(math.isfinite, row)) or (rows and len(row) != len(rows[0])):
                raise ValueError(f"{path}, line {number}: want {len(rows[0]) if rows else 'some'} finite numbers")
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows")
    values = torch.tensor(rows, dtype=torch.float64).clamp(0, 1)
    if sparsity is None:
        return values > 0.5
    mask = discretise(values, sparsity)
    if bool(((values == 0) | (values == 1)).all()) and not torch.equal(mask, values == 1):
        raise ValueError(f"{path}: holds a finished mask of sparsity {1 - values.mean().item():.4g}, not {sparsity:g}")
    return mask


# --- demo ---------------------------------------------------------------------------------------------------------------

def toy(steps, seed, target=0.75):
    """The Lagrangian alone: 12 heads of which each has a known benefit, 3, 2, 1, then almost none. Returns log_alpha (3, 4)
    and the multipliers after `steps` of minimising -benefit * z + penalty."""
    rng = torch.Generator().manual_seed(seed)
    benefit = torch.tensor([3.0, 2.0, 1.0] + [0.02] * 9).view(3, 4)
    gates = Gates(3, 4, PRESETS["tiny"]["mask_init"], rng)
    optimizer = torch.optim.AdamW(gates.param_groups(0.1, 0.01), betas=(0.9, 0.95))
    for step in range(steps):
        z = draw_gates(gates.log_alpha, torch.rand(8, 3, 4, generator=rng).clamp(1e-6, 1 - 1e-6)).mean(0)
        sparsity = 1 - probability_open(gates.log_alpha).mean()
        loss = -(benefit * z).sum() + gates.penalty(sparsity, target * min(1.0, step / (0.8 * steps)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gates.log_alpha.detach(), gates.multipliers.tolist()


def main():
    parse([], description="Hard-concrete gates and the Lagrangian on twelve toy heads. train.py --method prulong learns a Llama's.")
    print("Hard-concrete gates: z is exactly 0 or 1 most of the time (200,000 draws each)\n")
    print("| log_alpha | P(z = 0) | P(0 < z < 1) | P(z = 1) | mean z |\n|---|---|---|---|---|")
    rng = torch.Generator().manual_seed(0)
    for value in (-4.0, -2.0, 0.0, 2.0, 4.0):
        z = draw_gates(torch.tensor(value), torch.rand(200_000, generator=rng).clamp(1e-6, 1 - 1e-6))
        zero, one = (z == 0).float().mean(), (z == 1).float().mean()
        print(f"| {value:g} | {zero:.3f} | {1 - zero - one:.3f} | {one:.3f} | {z.mean():.3f} |")
    print("\nLagrangian on 12 toy heads, target sparsity 0.75, heads 0, 1, 2 worth keeping\n")
    print("| steps | expected sparsity | lambda1 | lambda2 | heads kept |\n|---|---|---|---|---|")
    for steps in (25, 100, 400):
        log_alpha, (l1, l2) = toy(steps, seed=0)
        kept = discretise(log_alpha, 0.75).flatten().nonzero()[:, 0].tolist()
        print(f"| {steps} | {1 - probability_open(log_alpha).mean():.3f} | {l1:.2f} | {l2:.2f} | {kept} |")


if __name__ == "__main__":
    main()
