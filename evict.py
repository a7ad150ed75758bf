"""KV eviction that frees real memory, after the prompt or already while it is read in chunks.

Post-fill eviction reads the whole prompt and then drops entries: memory peaks at the prompt.
Chunked eviction drops after every chunk, in each layer before the next one runs, and the next chunk
meets only the survivors. Most rules judge a chunk by its last queries, which know nothing of the
question at the prompt's end; *patching* appends the prompt's last tokens to each chunk, lets them
judge it, and drops them again.

Paper: "Cache Me If You Can", arXiv:2506.17121, sections 2 and 3. Rules: StreamingLLM 2309.17453,
SnapKV 2404.14469, PyramidKV 2406.02069, H2O 2306.14048, TOVA 2401.06104, key norms 2406.11430,
DuoAttention 2410.10819, Locret 2410.01805.

    cache = make_cache(model, "snapkv", keep=0.25, chunk=4096, patch=True)
    generate(model, tokens, 100, cache=cache)

    python evict.py                                          # what each policy holds of a prompt
    python model.py --model DIR --prompt TEXT --policy snapkv --budget 256
    python train.py --method locret                          # learns Locret's scorer
"""
import math
import os
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from attention_triton import attention
from model import (Everything, KVCache, Llama, LlamaConfig, Method, assign, flag, generate,
                   load_heads, load_pattern, parse, rope, rotate, run, write_tensors)

# --- rules ---------------------------------------------------------------------------------------
# A rule says what a KV head stores. `takes` names the settings that it reads, `sweep` the settings
# for keeping a share of a prompt. Most give every candidate a score: higher is kept.

class Full(Everything):
    """Everything."""
    takes = ()

    def __init__(self, settings):
        self.settings = settings

    @staticmethod
    def sweep(share, length):
        """Settings that keep a share of a prompt of `length` tokens; None: there is nothing to."""

    def spread(self, config):
        """The rule of each layer and KV head."""
        return [[Everything(config.window)] * config.n_kv_head] * config.n_layer


class Ring(Full):
    """The sink and a window; entries have their true positions."""
    takes = ("sink", "window")
    ring = True

    def __init__(self, settings):
        self.settings = settings
        self.sink = 128 if settings.sink is None else settings.sink
        self.window = settings.window or 1024

    def spread(self, config):
        return [[self] * config.n_kv_head] * config.n_layer

    def room(self, layer, held, seen, chunks, new):
        return self.sink + self.window


class Streaming(Ring):
    """The same for every head, positions counted inside the cache, as StreamingLLM has it."""
    takes = ("sink", "window", "budget")
    shift = True

    def __init__(self, settings):
        super().__init__(settings)
        if settings.budget is not None:  # entries held after a step: sink + window - 1
            self.window = settings.budget - self.sink + 1
        if self.window < 1:
            raise ValueError(f"a budget of {settings.budget} has no room for a sink of {self.sink}")

    @staticmethod
    def sweep(share, length):
        return dict(budget=round(share * length))


class Heads(Full):
    """A mask, as PruLong learns it: streaming heads hold a ring, the others what `full` says."""
    takes = ("heads", "sink", "window", "full", "budget", "keep", "obs_window", "patch", "recent",
             "pool", "kernel")

    def spread(self, config):
        mask = self.settings.heads
        shape = config.n_layer, config.n_kv_head
        if mask is None or tuple(mask.shape) != shape:
            found = None if mask is None else tuple(mask.shape)
            raise ValueError(f"policy heads needs a mask of {shape} heads, not {found}")
        ring, full = Ring(self.settings), RULES[self.settings.full](self.settings)
        return [[full if x else ring for x in layer] for layer in mask.tolist()]


class Rule(Full):
    """Keeps the best of each chunk, judged once; decoding adds, or evicts every decode_every."""
    takes = ("budget", "keep", "sink", "recent", "decode_every", "decode_budget")
    total = False  # judge everything that is held, after every step

    def __init__(self, settings):
        self.settings = settings
        if (settings.budget is None) == (settings.keep is None):
            raise ValueError(f"policy {settings.policy} needs either a budget or keep")
        if settings.decode_every and not self.total and self.decode_budget() is None:
            raise ValueError("decode_every with keep needs decode_budget")
        self.every = settings.decode_every
        self.every_token = self.total or bool(self.every)

    def spread(self, config):
        return [[self] * config.n_kv_head] * config.n_layer

    @staticmethod
    def sweep(share, length):
        return dict(keep=share)

    def score(self, step):
        """(heads, n) of the candidates: entries step.first .. of step.keys, without the patch."""
        raise NotImplementedError

    def keep(self, step):
        due = not step.decoding or (self.every and (step.seen + 1) % self.every == 0)
        if not due and not self.total:
            return None
        if self.total or step.decoding:
            step.first = 0
        end = step.keys.shape[1] - step.n_patch
        scores = self.score(step)
        if not due:
            return torch.arange(end, device=scores.device).expand(len(scores), -1)
        positions = step.key_positions[0, step.first:end]
        n_sink = int((positions < (self.settings.sink or 0)).sum())
        budget = self.budget(step, end - step.first)
        recent = self.recent(step, budget)
        if step.final and not step.decoding:
            recent = max(recent, 1)  # a prompt's last token always stays
        return step.first + select(scores, budget, n_sink, recent)

    def budget(self, step, n) -> int:
        """Entries to keep of n candidates."""
        if step.decoding and self.decode_budget() is not None:
            return self.decode_budget()
        return self.share(step.seen + step.n_new if self.total else n)

    def decode_budget(self):
        s = self.settings
        return s.budget if s.decode_budget is None else s.decode_budget

    def share(self, n) -> int:
        keep = self.settings.keep
        if keep is None:
            return self.settings.budget
        # 0.29 * 100 is 29 although floats say 28.999...; a small share of a small chunk is one
        return max(math.ceil(keep), math.floor(keep * n + 1e-9))

    def recent(self, step, budget) -> int:
        """Last candidates that come before all others."""
        if self.settings.recent is not None:
            return self.settings.recent
        return 0 if step.n_patch else self.settings.obs_window

    def room(self, layer, held, seen, chunks, new):
        return held + sum(min(n, self.share(n)) for n in chunks) + new


class SnapKV(Rule):
    """What the chunk's last queries attend to, smoothed, and these tokens themselves."""
    takes = Rule.takes + ("obs_window", "patch", "pool", "kernel")

    def __init__(self, settings):
        super().__init__(settings)
        self.n_queries = settings.obs_window if settings.decode_every else 0

    def score(self, step):
        s, n = self.settings, step.keys.shape[1] - step.first
        n_rows = step.n_patch or min(s.obs_window, len(step.q))
        paid = attention_paid(step, n_rows, step.first)[..., :n - n_rows]
        if paid.shape[2]:
            smooth = F.avg_pool1d if s.pool == "avg" else F.max_pool1d
            paid = smooth(paid, s.kernel, stride=1, padding=s.kernel // 2)
        return F.pad(paid.mean(1), (0, 0 if step.n_patch else n_rows))


class PyramidKV(SnapKV):
    """SnapKV with budgets that fall from the first layer to the last."""

    def budget(self, step, n):
        cap = super().budget(step, n)
        if step.decoding:
            return cap
        w = step.n_patch  # the released schedule counts the patch in and out again
        window = w or self.settings.obs_window
        return pyramid_budget(step.layer, step.n_layer, cap + w, window, n + w) - w

    def room(self, layer, held, seen, chunks, new):
        most = sum(min(n, 2 * self.share(n)) for n in chunks)
        return held + most + new


class KeyNorm(Rule):
    """Keys of small norm draw much attention: the smallest are kept."""
    takes = Rule.takes + ("obs_window",)

    def score(self, step):
        end = step.keys.shape[1] - step.n_patch
        return -step.keys[:, step.first:end].float().norm(dim=-1)


class Random(Rule):
    """A baseline."""

    def score(self, step):
        n = step.keys.shape[1] - step.n_patch - step.first
        return torch.rand(len(step.keys), n, generator=step.rng).to(step.keys.device)

    def recent(self, step, budget):
        return self.settings.recent or 0


class TotalRule(Rule):
    """A budget in all, chosen anew after every chunk and every decoded token."""
    total = True

    def __init__(self, settings):
        super().__init__(settings)
        self.every = settings.decode_every or 1

    @staticmethod
    def sweep(share, length):
        return dict(budget=max(1, round(share * length)))

    def room(self, layer, held, seen, chunks, new):
        n = held + sum(chunks) + new
        kept = max(self.share(n - held + seen), self.decode_budget() or 0)
        return min(n, kept) + min(new, self.every or new) + 1


class H2O(TotalRule):
    """Half of the budget the latest, half what has received most attention of all queries."""
    takes = Rule.takes + ("patch",)

    def score(self, step):
        step.note += attention_paid(step, len(step.q), 0).sum(1)
        return step.note[:, :step.keys.shape[1] - step.n_patch]

    def recent(self, step, budget):
        return budget // 2 if self.settings.recent is None else self.settings.recent


class TOVA(TotalRule):
    """What the last query attends to, on average over all heads: one ranking for the layer."""
    takes = Rule.takes + ("patch",)

    def score(self, step):
        paid = attention_paid(step, 1, 0).mean((0, 1))[:step.keys.shape[1] - step.n_patch]
        return paid.expand(len(step.keys), -1)

    def recent(self, step, budget):
        return self.settings.recent or 0


class Locret(TotalRule):
    """A trained scorer judges each token once and for all by its own q, k, v."""
    takes = Rule.takes + ("obs_window", "scorer")

    def __init__(self, settings):
        super().__init__(settings)
        if settings.scorer is None or settings.policy != "locret":
            raise ValueError("policy locret needs a trained scorer, for all heads of a layer")
        self.every = settings.decode_every

    def score(self, step):
        start = step.keys.shape[1] - len(step.q)
        q = unrotate(step.q, step.positions, self.settings.scorer.config)
        k = unrotate(step.k, step.positions, self.settings.scorer.config)
        step.note[:, start:] = self.settings.scorer(step.layer, q, k, step.v).T.float()
        return step.note[:, :step.keys.shape[1] - step.n_patch]

    def recent(self, step, budget):
        """Its "stabilizers" (released: 2500), until the prompt has been read."""
        if self.settings.recent is not None:
            return self.settings.recent
        return 0 if step.final and not step.decoding else self.settings.obs_window


RULES = {"full": Full, "streaming": Streaming, "snapkv": SnapKV, "pyramidkv": PyramidKV,
         "h2o": H2O, "tova": TOVA, "knorm": KeyNorm, "random": Random, "heads": Heads,
         "locret": Locret}


@torch.no_grad()
def attention_paid(step, n_rows, first):
    """softmax(q k^T / sqrt(D)) over entries from `first` on, summed over the step's last n_rows
    queries: float32 (heads, G, n). A query sees entries at positions up to its own."""
    q = step.q[-n_rows:].float() * step.q.shape[-1] ** -0.5  # (R, heads, G, D)
    last = int(step.positions[-1])
    rows = torch.arange(last + 1 - n_rows, last + 1, device=q.device)
    keys, total = step.keys[:, first:].float().mT, 0  # (heads, D, n)
    positions = step.key_positions[:, None, None, first:]
    for part, own in zip(q.split(64), rows.split(64)):  # a block at a time: scores stay small
        flat = part.permute(1, 2, 0, 3).flatten(1, 2)  # (heads, G * R, D)
        scores = (flat @ keys).unflatten(1, (q.shape[2], -1))  # (heads, G, R, n)
        scores = scores.masked_fill_(positions > own[:, None], -math.inf)
        total = total + torch.softmax(scores, -1, out=scores).sum(2)
    return total


def select(scores, budget, first=0, last=0):
    """Indices (heads, min(budget, n)), ascending, of the entries to keep of scores (heads, n).

    The first `first` and last `last` entries come before all others; if not even they fit, the
    last ones win. Equal scores: the earlier entry."""
    n = scores.shape[1]
    budget = min(budget, n)
    last = min(last, budget)
    scores = scores.clone()
    scores[:, :min(first, budget - last)] = math.inf
    scores[:, n - last:] = math.inf
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :budget].sort(dim=1).values


def pyramid_budget(layer, n_layer, cap, window, n, beta=20) -> int:
    """PyramidKV's budget of a layer for a mean of `cap` of n tokens, both with the window. As
    released: everything if n < cap, uniform if n < 2 (cap - window), and a step rounded down."""
    k = cap - window
    if n < cap:
        return n
    if k <= 0 or n_layer == 1 or n < 2 * k:
        return cap
    low = k // beta
    high = 2 * k - low
    if high >= n - window:
        low, high = 2 * k - (n - window), n - window
    return high - layer * ((high - low) // (n_layer - 1)) + window


# --- a cache for a policy ------------------------------------------------------------------------

@dataclass
class Flags:
    policy: str = flag("full", "which entries to keep", choices=RULES)
    budget: int | None = flag(None, "entries kept per KV head: of each chunk (snapkv pyramidkv "
                                    "knorm random) or in all (h2o tova locret streaming)", least=0)
    keep: float | None = flag(None, "instead of budget: share of a chunk, or of all", least=0)
    chunk: int | None = flag(None, "prefill so many tokens at a time (default: all)", least=1)
    sink: int | None = flag(None, "first tokens always kept (default: 0, streaming 128, heads as "
                                  "learned)", least=0)
    window: int | None = flag(None, "streaming, heads: last tokens seen, the query's own included "
                                    "(default: 1024, heads as learned)", least=1)
    obs_window: int = flag(64, "last queries that judge a chunk [tokens]", least=1)
    recent: int | None = flag(None, "last entries kept before all others (default: obs_window for "
                                    "snapkv pyramidkv knorm locret, half of h2o's budget)", least=0)
    patch: bool = flag(False, "let the prompt's last obs_window tokens judge every chunk")
    pool: str = flag("avg", "smoothing of snapkv's scores", choices=("avg", "max"))
    kernel: int = flag(5, "its width [tokens], odd", least=1)
    decode_every: int | None = flag(None, "evict again every so many new tokens (default: 1 for "
                                          "h2o tova, else never)", least=1)
    decode_budget: int | None = flag(None, "entries left by that (default: budget)", least=0)
    heads: str | None = flag(None, "mask of the heads that stay full (TSV); sets --policy heads")
    sparsity: float | None = flag(None, "rank that file's scores to this share of streaming heads")
    full: str = flag("full", "heads: rule of the heads that stay full", choices=RULES)
    scorer: str | None = flag(None, "locret: scorer.safetensors of train.py --method locret")

    def __post_init__(self):
        if self.heads is not None and self.policy == "full":
            self.policy = "heads"
        if isinstance(self.heads, str):
            learned = load_pattern(self.heads)
            self.sink = learned.get("sink") if self.sink is None else self.sink
            self.window = learned.get("window") if self.window is None else self.window

    def cache(self, model, seed=0, batch=1):
        """The cache of these flags; reads the files that they name."""
        settings = asdict(self)
        sparsity = settings.pop("sparsity")
        if self.heads is not None:
            settings["heads"] = load_heads(self.heads, sparsity)
        if self.scorer is not None:
            settings["scorer"] = load_scorer(self.scorer, model)
        return make_cache(model, batch=batch, seed=seed, **settings)


def make_cache(model, policy="full", batch=1, seed=0, **settings) -> KVCache:
    """A KVCache for `batch` sequences that evicts by `policy`, a name in RULES.

    settings are Flags' fields, but heads is a bool (n_layer, n_kv_head), True = full cache, and
    scorer a LocretScorer. Raises ValueError for settings that exclude each other, that the policy
    does not read, or that miss what it needs."""
    if policy not in RULES:
        raise ValueError(f"unknown policy {policy!r}: one of {', '.join(RULES)}")
    settings = Flags(policy=policy, **settings)
    read = ("policy", "chunk", "obs_window", *RULES[policy].takes)
    for f in fields(Flags):
        value = getattr(settings, f.name)
        changed = value is not None if f.default is None else value != f.default
        if changed and f.name not in read:
            raise ValueError(f"policy {policy} does not read {f.name}")
    if settings.keep is not None and not 0 <= settings.keep <= 1 or settings.kernel % 2 == 0:
        raise ValueError("keep must be in 0..1 and kernel odd")
    rules = RULES[policy](settings).spread(model.config)
    patch = settings.obs_window if settings.patch else 0
    return KVCache(model, rules, batch, settings.chunk, patch, seed)


def advice(policy, footprint) -> str:
    """A line for a run under a policy that spared next to nothing, else ''."""
    if policy == "full" or footprint < 0.9:
        return ""
    return (f"policy {policy} spared next to nothing over the whole run (footprint "
            f"{footprint:.3f}): prompts within its budget or window, scores of heads without "
            "--sparsity, or prompts read whole, without --chunk, and dropped only then")


# --- Locret: a trained scorer --------------------------------------------------------------------

def unrotate(x, positions, config):
    """x (T, ..., D) at positions (T,) as it was before RoPE."""
    cos, sin = rope(config, positions, x.dtype)  # (T, 1, D)
    shape = len(x), *[1] * (x.dim() - 2), x.shape[-1]
    return rotate(x, cos.view(shape), -sin.view(shape))


class LocretScorer(nn.Module):
    """Per layer a perceptron from a token's q, k, v (before RoPE) to a score per KV head: causal,
    hence given once and for all. Source: arXiv:2410.01805 and its released code."""

    def __init__(self, config, hidden=1024):
        super().__init__()
        self.config = config
        width = (config.n_head + 2 * config.n_kv_head) * config.head_dim
        self.layers = nn.ModuleList()
        for _ in range(config.n_layer):
            first = nn.Linear(width, hidden, bias=False)
            last = nn.Linear(hidden, config.n_kv_head, bias=False)
            self.layers.append(nn.Sequential(first, nn.SiLU(), last))

    def forward(self, layer, q, k, v):
        """q (T, n_kv_head, G, D), k, v (T, n_kv_head, D) -> (T, n_kv_head)."""
        x = torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), 1)  # (T, width)
        return self.layers[layer](x.to(self.layers[layer][0].weight.dtype))


def load_scorer(path, model) -> LocretScorer:
    """The scorer in a safetensors file, for this Llama and on its device. Raises ValueError for
    another Llama's."""
    tensors = load_file(path, str(model.head.device))
    hidden = len(tensors.get("layers.0.0.weight", ()))
    with torch.device("meta"):
        scorer = LocretScorer(model.config, hidden)
    return assign(scorer, tensors, path).requires_grad_(False)


class LocretTraining(Method):
    """Learns the scorer: it regresses, for each token of a context, the largest logit that any
    query of the answer gives it. The answer is a document's last tokens."""

    own_attention = True

    @dataclass
    class Config:
        hidden: int = flag(1024, "units of the scorer", least=1)
        scorer_lr: float = flag(5e-4, "its peak learning rate", least=0)
        n_answer: int = flag(64, "last tokens of a document, whose queries judge the rest", least=1)

    def __init__(self, model, config, seed=0):
        super().__init__(model, config)
        model.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.scorer = LocretScorer(model.config, config.hidden).to(model.head.device)

    @classmethod
    def defaults(cls, args, config):
        return dict(from_scratch=False, seq_len=256, clip=0.5)

    @classmethod
    def frozen(cls, config):
        return True

    def param_groups(self, model, args):
        return [dict(params=list(self.scorer.parameters()), lr=self.config.scorer_lr)]

    def loss(self, model, batch, step, steps):
        cu = batch.cu_seqlens.tolist()
        docs = [batch.tokens[a:b] for a, b in zip(cu, cu[1:]) if b - a > self.config.n_answer]
        if not docs:
            raise ValueError(f"no document is longer than --n_answer {self.config.n_answer}")
        losses = [locret_loss(model, self.scorer, doc, self.config.n_answer) for doc in docs]
        return torch.stack(losses).mean(), {}

    def before(self, model, data):
        return {}

    def rows(self, model, data, before, runs, out_dir):
        """The loss of each run's scorer on one batch far behind those of training."""
        batch = data.batch(10 ** 9)
        batch = batch._replace(tokens=batch.tokens.to(model.head.device))
        for name, (method, m) in runs.items():
            with torch.no_grad():
                loss, _ = method.loss(m, batch, 0, 1)
            yield name, {"loss": loss.item()}

    def save(self, model, out_dir):
        path = os.path.join(out_dir, "scorer.safetensors")
        write_tensors(path, {k: v.contiguous() for k, v in self.scorer.state_dict().items()})
        return [path]


def locret_loss(model, scorer, tokens, n_answer):
    """Smooth L1 between the scorer and the largest logit that any of the last n_answer of tokens
    (N,) gives each earlier one, plus 0.0025 times the squared difference of neighbours' scores;
    mean over layers. The model stays frozen."""
    seen = []

    def watch(layer, q, k, v):
        seen.append((q.unflatten(1, (k.shape[1], -1)), k, v))
        return attention(q, k, v, [0, len(q)], [0, len(q)])
    with torch.no_grad():
        model.hidden(tokens, watch)
    n, total = len(tokens) - n_answer, 0.0
    positions = torch.arange(n, device=tokens.device)
    for layer, (q, k, v) in enumerate(seen):  # q (N, n_kv_head, G, D)
        logits = torch.einsum("rhgd,nhd->rhgn", q[n:].float(), k[:n].float()) * q.shape[-1] ** -0.5
        target = logits.amax((0, 2)).T  # (n, n_kv_head)
        q, k = (unrotate(x[:n], positions, model.config) for x in (q, k))
        got = scorer(layer, q, k, v[:n]).float()
        total = total + F.smooth_l1_loss(got, target) + 0.0025 * got.diff(dim=0).pow(2).mean()
    return total / len(seen)


def main():
    """What each policy holds of 2048 tokens, on a small random Llama."""
    parse([], description="What every eviction policy holds of a prompt.")
    config = LlamaConfig(256, n_layer=4, n_head=8, n_kv_head=4, n_embd=128, n_ff=256, head_dim=16)
    model = Llama(config).init_weights(0)
    tokens = torch.randint(256, (2048,), generator=torch.Generator().manual_seed(0))
    extra = {"streaming": dict(sink=4), "locret": dict(scorer=LocretScorer(config, 64)),
             "heads": dict(heads=torch.arange(16).view(4, 4) % 4 == 0, sink=4, window=253)}
    print("| policy | entries per head | KV MB | footprint | peak |\n|---|---|---|---|---|")
    for policy, rule in RULES.items():
        settings = (rule.sweep(0.125, 2048) or {}) | extra.get(policy, {})
        cache = make_cache(model, policy, chunk=256, **settings)
        generate(model, tokens, 16, cache)
        print(f"| {policy} | {cache.visible().double().mean():.0f} | {cache.nbytes() / 1e6:.2f} | "
              f"{float(cache.footprint()):.3f} | {float(cache.peak()):.3f} |", flush=True)


if __name__ == "__main__":
    run(main)
