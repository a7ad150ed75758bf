"""KV eviction that frees real memory, after the prompt or already while it is read in chunks.

Post-fill eviction reads the whole prompt and then drops entries: memory peaks at the prompt. Chunked eviction drops after
every chunk, in each layer before the next one runs, and the next chunk meets only the survivors. Most rules judge a chunk by
its last queries, which know nothing of the question at the prompt's end; *patching* appends the prompt's last tokens to
each chunk, lets them judge it, and drops them again.

Paper: "Cache Me If You Can", arXiv:2506.17121, sections 2 and 3. Rules: StreamingLLM 2309.17453, SnapKV 2404.14469,
PyramidKV 2406.02069, H2O 2306.14048, TOVA 2401.06104, key norms 2406.11430, DuoAttention 2410.10819, Locret 2410.01805.

    cache = make_cache(model, "snapkv", keep=0.25, chunk=4096, patch=True)
    generate(model, tokens, 100, cache=cache)

    python evict.py                       # what each policy holds of a 2048-token prompt
    python evict.py --model DIR --policy snapkv --keep 0.25 --length 8192 --chunk 512       # one policy, with peak memory
"""
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import nn

from attention_triton import attention, column_sums
from model import DTYPES, KVCache, Llama, LlamaConfig, flag, generate, load_model, parse, peak_memory, rope, rotate, run, save_plot

# --- which entries a rule prefers -------------------------------------------------------------------------------------
# Each takes what the cache knows of some KV heads of one layer and returns scores (heads, n), higher = keep:
# q (R, heads, G, D) the last R queries, q_pos (R,); k (heads, n, D) the entries, pos (heads, n).

def window_scores(q, q_pos, k, pos, n_scored, pool="avg", kernel=5, reduce="mean"):
    """SnapKV: attention that the last queries pay to each of the first n_scored entries, smoothed along the sequence.

    avg pooling counts the zeros beyond the edges, as the released code does: the first and last tokens score lower.
    reduce joins the query heads of a KV head after pooling: mean (the same ranking as their sum) or max."""
    weights = column_sums(q, q_pos, k, pos, len(q))[..., :n_scored]  # (heads, G, n_scored)
    if n_scored:
        smooth = F.avg_pool1d if pool == "avg" else F.max_pool1d
        weights = smooth(weights, kernel, stride=1, padding=kernel // 2)
    return weights.mean(1) if reduce == "mean" else weights.amax(1)  # (heads, n_scored)


def heavy_hitter_scores(q, q_pos, k, pos):
    """H2O: attention that each entry receives from *all* queries of the step; (heads, n)."""
    return column_sums(q, q_pos, k, pos, len(q)).sum(1)


def last_query_scores(q, q_pos, k, pos):
    """TOVA: the last query's attention, averaged over all heads: one ranking for the whole layer."""
    return column_sums(q[-1:], q_pos[-1:], k, pos, 1).mean((0, 1)).expand(k.shape[:2])


def norm_scores(k):
    """Keys k (heads, n, D) of small norm draw much attention: the smallest are kept."""
    return -k.float().norm(dim=-1)


def select(scores, budget, first=0, last=0):
    """Indices (heads, min(budget, n)), ascending, of the entries to keep of scores (heads, n).

    The first `first` and last `last` entries come before all others; if not even they fit, the last ones win. Equal scores:
    the earlier entry."""
    n = scores.shape[1]
    budget = min(budget, n)
    last = min(last, budget)
    first = min(first, budget - last)
    scores = scores.clone()
    scores[:, :first] = math.inf
    scores[:, n - last:] = math.inf
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :budget].sort(dim=1).values


def pyramid_budgets(cap, window, n_layer, n, beta=20, exact=False):
    """PyramidKV's budgets by layer for a mean of `cap` of n tokens: the first layer keeps most, the last least.

    cap and the result count the window. As released: everything if n < cap, uniform if n < 2 (cap - window), and a step
    rounded down, which makes the total overshoot a little; `exact` spreads the remainder so that the sum is n_layer * cap."""
    k = cap - window
    if n < cap:
        return [n] * n_layer
    if k <= 0 or n_layer == 1 or n < 2 * k:
        return [cap] * n_layer
    low = Fraction(k, beta) if exact else k // beta
    high = 2 * k - low
    if high >= n - window:
        low, high = 2 * k - (n - window), n - window
    if not exact:
        step = (high - low) // (n_layer - 1)
        return [high - layer * step + window for layer in range(n_layer)]
    ideal = [high - layer * (high - low) / Fraction(n_layer - 1) for layer in range(n_layer)]
    budgets = [math.floor(x) for x in ideal]
    by_remainder = sorted(range(n_layer), key=lambda layer: (budgets[layer] - ideal[layer], layer))
    for layer in by_remainder[:k * n_layer - sum(budgets)]:
        budgets[layer] += 1
    return [b + window for b in budgets]


# --- settings ---------------------------------------------------------------------------------------------------------

CHUNK_RULES = ("snapkv", "pyramidkv", "knorm", "random")  # judge each step's tokens once; survivors stay, decoding adds
TOTAL_RULES = ("h2o", "tova", "locret")  # choose anew among everything held, after every step
POLICIES = ("full", "streaming", "heads", *CHUNK_RULES, *TOTAL_RULES)
ATTENTION_RULES = ("snapkv", "pyramidkv", "h2o", "tova")  # judge by queries: what patching can help


@dataclass(frozen=True)
class Eviction:
    """What make_cache takes. Raises ValueError for settings that exclude each other or mean nothing to the policy."""
    policy: str = flag("full", "which entries to keep", choices=POLICIES)
    budget: int | None = flag(None, "entries kept per KV head: of each chunk (snapkv pyramidkv knorm random) or in all (h2o tova "
                                    "locret streaming) [tokens]", low=0)
    keep: float | None = flag(None, "instead of budget: share kept of each chunk, or of all tokens so far", low=0, high=1)
    chunk: int | None = flag(None, "prefill so many tokens at a time; by default all at once", low=1)
    sink: int | None = flag(None, "first tokens always kept (default: 128 for streaming and heads, 0 for the others)", low=0)
    window: int | None = flag(None, "streaming, heads: last tokens seen, the query's own included (default: 1024)", low=1)
    obs_window: int = flag(64, "last queries that judge a chunk [tokens]", low=1)
    recent: int | None = flag(None, "last entries kept before all others (default: obs_window for snapkv pyramidkv knorm locret, "
                                    "half the budget for h2o, 0 for tova random)", low=0)
    patch: bool = flag(False, "let the prompt's last obs_window tokens judge every chunk")
    patch_pos: str = flag("chunk", "positions of those tokens: right after the chunk (as released) or their true ones",
                          choices=("chunk", "true"))
    pool: str = flag("avg", "smoothing of window scores; SnapKV's LongBench runs: max with kernel 7", choices=("avg", "max"))
    kernel: int = flag(5, "its width [tokens], odd", low=1)
    reduce: str = flag("mean", "joins the query heads of a KV head", choices=("mean", "max"))
    norm: str = flag("chunk", "keys that share the window's softmax: the chunk's (as released) or all", choices=("chunk", "all"))
    exact: bool = flag(False, "pyramidkv: layer budgets that sum up exactly instead of the released rounding")
    decode_every: int | None = flag(None, "evict again every so many new tokens (default: 1 for h2o tova, else never)", low=1)
    decode_budget: int | None = flag(None, "entries left by that (default: budget) [tokens]", low=0)
    seed: int = flag(0, "of policy random", low=0)

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value) if getattr(self, name) is None else None
        by_position = self.policy in ("streaming", "heads")
        if self.policy in ("full", "heads") and (self.budget, self.keep) != (None, None):
            raise ValueError(f"policy {self.policy} takes neither budget nor keep")
        if self.policy in CHUNK_RULES + TOTAL_RULES and (self.budget is None) == (self.keep is None):
            raise ValueError(f"policy {self.policy} needs either budget or keep, got {self.budget} and {self.keep}")
        if self.policy == "streaming" and self.keep is not None:
            raise ValueError("policy streaming takes sink and window, or a budget, not keep")
        if self.policy == "streaming" and self.budget is not None and self.window is not None:
            raise ValueError("policy streaming takes a window or a budget, not both")
        put("sink", 128 if by_position else 0)
        if self.policy == "streaming" and self.budget is not None and self.budget < self.sink:
            raise ValueError(f"policy streaming: a budget of {self.budget} has no room for the sink of {self.sink}")
        if self.policy == "streaming" and self.budget is not None:  # entries held after a step: sink + window - 1
            put("window", self.budget - self.sink + 1)
        put("window", 1024)
        for f in fields(self):  # the same bounds as on the command line
            value, low, high, choices = getattr(self, f.name), f.metadata["low"], f.metadata["high"], f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")
            if value is not None and low is not None and not low <= value <= (math.inf if high is None else high):
                raise ValueError(f"{f.name} must be >= {low}{'' if high is None else f' and <= {high}'}, got {value}")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        if self.patch and self.policy not in ATTENTION_RULES:
            raise ValueError(f"policy {self.policy} does not look at queries: patch means nothing to it")
        if self.policy in ("h2o", "tova"):
            put("decode_every", 1)
        if self.decode_every and (by_position or self.policy == "full"):
            raise ValueError(f"policy {self.policy} takes no decode_every")
        if self.decode_every and self.policy in CHUNK_RULES:
            put("decode_budget", self.budget)
            if self.decode_budget is None:
                raise ValueError("decode_every with keep needs decode_budget")


def make_cache(model, policy="full", *, heads=None, scorer=None, **settings):
    """A KVCache for one sequence that evicts by `policy`. settings are Eviction's fields.

    heads: bool (n_layer, n_kv_head), True = full cache, for policy heads. scorer: a LocretScorer, for policy locret.
    Raises ValueError as Eviction does, or if heads or scorer are missing, unwanted or of another shape."""
    shape = (model.config.n_layer, model.config.n_kv_head)
    if (heads is not None) != (policy == "heads") or heads is not None and tuple(heads.shape) != shape:
        raise ValueError(f"policy heads, and no other, needs a mask of {shape} heads, got "
                         f"{None if heads is None else tuple(heads.shape)} for policy {policy}")
    if (scorer is not None) != (policy == "locret"):
        raise ValueError("policy locret, and no other, needs a trained scorer")
    return EvictingCache(model, Eviction(policy, **settings), heads, scorer)


# --- the cache that evicts --------------------------------------------------------------------------------------------

class EvictingCache(KVCache):
    """A KVCache that drops entries of a layer right after that layer has attended."""

    def __init__(self, model, settings: Eviction, heads=None, scorer=None):
        super().__init__(model, settings.chunk)
        self.settings, self.scorer = settings, scorer
        self.full = torch.zeros_like(self.held, dtype=torch.bool) if heads is None else heads.bool().cpu()
        self.decoding, self.n_decoded = True, 0
        self.n_patch, self.final = 0, True  # of the step at hand: patch tokens at its end; is it the prompt's last?
        self.notes = {}  # layer -> a float per entry of each KV head: attention summed so far (h2o), the scorer's word (locret)
        self.queries = {}  # layer -> the last obs_window queries, to judge by while decoding
        self.rng = torch.Generator().manual_seed(settings.seed)

    def prefill(self, model, tokens, chunk=None):
        """Chunk by chunk. With patching, every chunk but the last is followed by the prompt's last obs_window tokens, which
        judge it and leave no trace; the last chunk ends in them anyway."""
        parts, self.decoding = tokens.split(chunk or self.chunk or len(tokens)), False
        start = self.seen
        for i, part in enumerate(parts):
            self.final = i == len(parts) - 1
            tail = tokens[-self.settings.obs_window:] if self.settings.patch and not self.final else tokens[:0]
            self.n_patch = len(tail)
            positions = self.next_positions(len(part) + len(tail))
            if self.settings.patch_pos == "true":
                positions[len(part):] = start + torch.arange(len(tokens) - len(tail), len(tokens))
            hidden = model.hidden(torch.cat((part, tail)), self.attend, positions.to(part.device))
        self.decoding, self.n_patch = True, 0
        return hidden[-1]

    def end_step(self, n_new):
        super().end_step(n_new - self.n_patch)
        self.n_decoded += self.decoding * n_new

    def evict(self, layer, q, k, v):
        """What this layer keeps: k, v (T, n_kv_head, D) are the step's own entries, already part of what is held."""
        if self.settings.policy in ("streaming", "heads"):
            self.evict_by_position(layer, len(k))
        elif self.settings.policy != "full":
            self.evict_by_score(layer, q.unflatten(1, (k.shape[1], -1)), k, v)  # q (T, n_kv_head, G, D)

    def evict_by_position(self, layer, n_new):
        """Streaming heads keep the sink and what the next query's window shows; full heads keep all."""
        if self.full[layer].all():
            return
        kept = []
        for h, full in enumerate(self.full[layer].tolist()):
            pos = self.positions(layer, h)
            seen = (pos < self.settings.sink) | (pos > self.seen + n_new - self.settings.window)
            kept.append((seen | full).nonzero()[:, 0])
        self.keep(layer, kept)

    def evict_by_score(self, layer, q, k, v):
        """q (T, n_kv_head, G, D). Candidates are this step's tokens, or all that is held; a patch always goes."""
        s, n_new = self.settings, len(k)
        if s.decode_every:
            self.queries[layer] = torch.cat((self.queries.get(layer, q[:0]), q[:n_new - self.n_patch]))[-s.obs_window:]
        due = not self.decoding or s.decode_every and (self.n_decoded + 1) % s.decode_every == 0
        if not due and s.policy in CHUNK_RULES:
            return
        kept = [None] * k.shape[1]
        for slab in self.slabs[layer]:
            first = 0 if self.decoding or s.policy in TOTAL_RULES else slab.n - n_new
            n = slab.n - self.n_patch - first  # candidates
            scores = self.scores(layer, slab, q, k, v, first, n)  # (heads, n)
            index = torch.arange(n).expand(len(slab.heads), n)
            if due:
                budget = self.budget_at(layer, n, self.seen + n_new - self.n_patch)
                n_sink = int((slab.pos[0, first:first + n] < s.sink).sum())
                index = select(scores, budget, n_sink, self.recent_at(budget)).cpu()
            for i, h in enumerate(slab.heads):
                kept[h] = torch.cat((torch.arange(first), first + index[i]))
                if layer in self.notes:
                    self.notes[layer][h] = self.notes[layer][h][kept[h]]
        if any(len(kept[h]) < slab.n for slab in self.slabs[layer] for h in slab.heads):
            self.keep(layer, kept)

    def budget_at(self, layer, n, so_far) -> int:
        """Entries to keep of n candidates in this layer, when the sequence has so_far tokens with this step's."""
        s = self.settings
        if self.decoding and s.decode_budget is not None:
            return s.decode_budget
        if s.keep is not None:
            # 1e-9: 0.29 * 100 is 29 although floats say 28.999...
            cap = math.floor(s.keep * (n if s.policy in CHUNK_RULES else so_far) + 1e-9)
        else:
            cap = s.budget
        if s.policy != "pyramidkv" or self.decoding:
            return cap
        w = self.n_patch  # the released schedule counts the patch in and out again
        return pyramid_budgets(cap + w, w or s.obs_window, self.config.n_layer, n + w, exact=s.exact)[layer] - w

    def recent_at(self, budget) -> int:
        """Last candidates that are kept before all others."""
        s = self.settings
        if s.recent is not None:
            return s.recent
        if s.policy == "h2o":
            return budget // 2
        if s.policy == "locret":
            return 0 if self.final and not self.decoding else s.obs_window  # its "stabilizers" (released: 2500), until the prompt is read
        return 0 if s.policy in ("tova", "random") or self.n_patch else s.obs_window

    def scores(self, layer, slab, q, k, v, first, n):
        """The policy's scores (heads, n) of a slab's entries first : first + n."""
        s, heads = self.settings, slab.heads
        keys, pos = slab.k[:, :slab.n], slab.pos[:, :slab.n]
        if s.policy == "knorm":
            return norm_scores(keys[:, first:first + n])
        if s.policy == "random":
            return torch.rand(len(heads), n, generator=self.rng).to(k.device)
        if s.policy == "locret":
            said = self.scorer(layer, unrotate(q, self.config, self.seen), unrotate(k[:, :, None], self.config, self.seen)[:, :, 0], v)
            return self.note(layer, heads, said.T[heads].float(), add=False)
        end = self.seen + len(q)
        if s.policy == "snapkv" or s.policy == "pyramidkv":
            if self.decoding:
                q = self.queries[layer]
            n_rows = self.n_patch or min(s.obs_window, len(q))
            start = first if s.norm == "chunk" else 0  # keys from here on share the softmax
            n_scored = max(0, n + first - start - (0 if self.n_patch else n_rows))  # the window itself is not scored
            scores = window_scores(q[-n_rows:, heads], torch.arange(end - n_rows, end, device=q.device), keys[:, start:],
                                   pos[:, start:], n_scored, s.pool, s.kernel, s.reduce)
            return F.pad(scores, (0, first + n - start - n_scored))[:, first - start:]
        q_pos = torch.arange(end - len(q), end, device=q.device)
        if s.policy == "tova":
            return last_query_scores(q[:, heads], q_pos, keys, pos)[:, :n]
        return self.note(layer, heads, heavy_hitter_scores(q[:, heads], q_pos, keys, pos)[:, :n], add=True)

    def note(self, layer, heads, fresh, add):
        """Notes on all that these heads hold, (heads, n), with fresh ones added to the old or put behind them."""
        notes = self.notes.setdefault(layer, [fresh.new_zeros(0) for _ in range(self.config.n_kv_head)])
        for h, new in zip(heads, fresh):
            notes[h] = new + F.pad(notes[h], (0, len(new) - len(notes[h]))) if add else torch.cat((notes[h], new))
        return torch.stack([notes[h] for h in heads])


# --- Locret: a trained scorer -------------------------------------------------------------------------------------------

def unrotate(x, config, start):
    """x (T, n_kv_head, G, D) at positions start, start + 1, ... before RoPE was applied."""
    cos, sin = rope(config, torch.arange(start, start + len(x), device=x.device), x.dtype)
    return rotate(x, cos[:, None], -sin[:, None])


class LocretScorer(nn.Module):
    """Per layer a two-layer perceptron from a token's own q, k, v (before RoPE) to a score per KV head; causal, hence given
    once and for all. Source: Locret, arXiv:2410.01805, and its released code (1024 hidden units, no biases)."""

    def __init__(self, config, hidden=1024):
        super().__init__()
        width = (config.n_head + 2 * config.n_kv_head) * config.head_dim
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden, bias=False), nn.SiLU(), nn.Linear(hidden, config.n_kv_head, bias=False))
            for _ in range(config.n_layer))

    def forward(self, layer, q, k, v):
        """q (T, n_kv_head, G, D), k, v (T, n_kv_head, D) -> (T, n_kv_head)."""
        x = torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), 1)  # (T, width)
        return self.layers[layer](x.to(self.layers[layer][0].weight.dtype))


def locret_loss(model, scorer, tokens, n_answer):
    """How far the scorer is from the largest logit that any of the last n_answer of tokens (N,) gives each earlier one: smooth L1,
    plus 0.0025 times the squared difference of neighbours' scores; mean over layers. The model stays frozen."""
    seen = []

    def watch(layer, q, k, v):
        seen.append((q, k, v))
        return attention(q, k, v, [0, len(q)], [0, len(q)])
    with torch.no_grad():
        model.hidden(tokens, watch)
    n, total = len(tokens) - n_answer, 0.0
    for layer, (q, k, v) in enumerate(seen):
        q = q.unflatten(1, (k.shape[1], -1))  # (N, n_kv_head, G, D)
        logits = torch.einsum("rhgd,nhd->rhgn", q[n:].float(), k[:n].float()) * q.shape[-1] ** -0.5
        target = logits.amax((0, 2)).T  # (n, n_kv_head)
        got = scorer(layer, unrotate(q, model.config, 0)[:n], unrotate(k[:, :, None], model.config, 0)[:n, :, 0], v[:n]).float()
        total = total + F.smooth_l1_loss(got, target) + 0.0025 * (got[1:] - got[:-1]).pow(2).mean()
    return total / len(seen)


def train_locret(model, samples, hidden=1024, lr=5e-4, seed=0):
    """A LocretScorer learned on samples, an iterable of (tokens (N,), n_answer). Returns it and the list of losses.

    AdamW (0.9, 0.95), gradient norm at most 0.5, as released but without its 2000 steps of warm-up (3000 samples of up to 10240
    tokens there)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        scorer = LocretScorer(model.config, hidden).to(model.head.device)
    optimizer, losses = torch.optim.AdamW(scorer.parameters(), lr=lr, betas=(0.9, 0.95)), []
    for tokens, n_answer in samples:
        loss = locret_loss(model, scorer, tokens, n_answer)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(scorer.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return scorer, losses


# --- demo ---------------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    model: str | None = flag(None, "folder of a Llama to run one --policy on; without it a table of all policies on a random one")
    length: int = flag(2048, "prompt of random tokens", low=1, high=10 ** 7)
    new: int = flag(16, "tokens to generate", low=1, high=10 ** 6)
    dtype: str = flag("bfloat16", "of weights and cache", choices=tuple(DTYPES))
    figure: str | None = flag(None, "with --model: SVG file of peak memory against budget, a process for each policy and share kept")


def measure(model, tokens, new, cache) -> dict:
    """Generate, and say what was held and how long it took."""
    start = time.perf_counter()
    generate(model, tokens, new, cache=cache)
    entries = sum(slab.n * len(slab.heads) for slabs in cache.slabs for slab in slabs)
    return {"entries_per_head": round(entries / cache.held.numel(), 1), "kv_bytes": cache.nbytes(),
            "footprint": round(float(cache.footprint()), 4), "peak": round(float(cache.peak()), 4),
            "seconds": round(time.perf_counter() - start, 2)}


def compare_policies(length, new):
    """A Markdown table of all policies on a small random Llama."""
    config = LlamaConfig(vocab_size=256, n_layer=4, n_head=8, n_kv_head=4, n_embd=128, n_ff=256, head_dim=16)
    model = Llama(config).init_weights(0)
    tokens = torch.randint(256, (length,), generator=torch.Generator().manual_seed(0))
    heads = torch.rand(4, 4, generator=torch.Generator().manual_seed(1)) < 0.25
    scorer, _ = train_locret(model, [(tokens[:256], 16)] * 5, hidden=64)
    rows = [("full", {}), ("streaming", dict(sink=4, window=253)), ("heads", dict(heads=heads, sink=4, window=253))]
    rows += [(policy, dict(keep=0.125)) for policy in CHUNK_RULES] + [("snapkv", dict(keep=0.125, patch=True))]
    rows += [(policy, dict(budget=256)) for policy in ("h2o", "tova")] + [("locret", dict(budget=256, scorer=scorer))]
    print(f"A random Llama reads {length} tokens in chunks of 256 and writes {new}: what each policy holds\n")
    print("| policy | settings | entries per head and layer | bytes | KV footprint | peak | seconds |\n|---|---|---|---|---|---|---|")
    for policy, settings in rows:
        shown = ", ".join(f"{k} {v}" for k, v in settings.items() if k not in ("heads", "scorer"))
        values = measure(model, tokens, new, make_cache(model, policy, chunk=256, obs_window=16, **settings))
        print(f"| {policy} | {shown} | " + " | ".join(f"{v:,}" for v in values.values()) + " |")


def draw_memory(config, settings):
    """A figure of peak resident memory against the share of entries kept; every run a process of its own."""
    chunk = settings.chunk or 512

    def peak(policy, *keep):
        run_of = [sys.executable, os.path.abspath(__file__), "--model", config.model, "--length", str(config.length), "--new", str(config.new),
                  "--dtype", config.dtype, "--chunk", str(chunk), "--policy", policy, *keep]
        done = subprocess.run(run_of, stdout=subprocess.PIPE, text=True)
        if done.returncode:  # the run has said why
            raise ValueError(f"policy {policy} {' '.join(keep)}: no figure")
        print(done.stdout, end="", flush=True)
        return json.loads(done.stdout)["peak_resident_bytes"] / 1e6
    full = peak("full")
    curves = {policy: [(keep, peak(policy, "--keep", str(keep))) for keep in (0.05, 0.1, 0.25, 0.5, 0.75)] for policy in ("snapkv", "pyramidkv", "h2o")}
    title = f"{config.length} tokens in chunks of {chunk}, {config.dtype}"
    save_plot(config.figure, curves, title, "share of entries kept", "peak resident memory [MB]", 1.0, full, {"full cache": full})


def main():
    config, settings = parse([Config, Eviction], description="What eviction policies hold of a prompt.")
    if config.model is None:
        if config.figure:
            raise ValueError("--figure needs --model")
        return compare_policies(config.length, config.new)
    if config.figure:
        if settings != Eviction(chunk=settings.chunk):
            raise ValueError("--figure draws some policies at several shares kept: of their flags it takes --chunk alone")
        return draw_memory(config, settings)
    if settings.policy in ("heads", "locret"):
        raise ValueError(f"policy {settings.policy} needs a mask or a scorer: use footprint.py")
    model = load_model(config.model, dtype=DTYPES[config.dtype])
    tokens = torch.randint(min(model.config.vocab_size, 30000), (config.length,), generator=torch.Generator().manual_seed(0))
    values = measure(model, tokens, config.new, EvictingCache(model, settings))
    print(json.dumps({"policy": settings.policy, "length": config.length, **values, "peak_resident_bytes": peak_memory()}))


if __name__ == "__main__":
    run(main)
