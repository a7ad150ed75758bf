"""MeCo: metadata conditioning, then cooldown. Each document is preceded by where it comes from; the last tenth of training goes without.

Metadata phase:  BOS  "URL: en.wikipedia.org\\n\\n"  document  EOS        loss on the document and EOS only
Cooldown phase:  BOS  document  EOS                                     the same schedule and optimizer state go on; other documents
At inference a host in front (`prompt`) steers the model; without one it works because of the cooldown.

Paper: "Metadata Conditioning Accelerates Language Model Pre-training", arXiv:2501.01956. Its gain is downstream accuracy at equal
perplexity (1.6B: validation perplexity 13.3 against 13.2, average accuracy 56.7 against 55.7): loss without metadata is not
where MeCo wins, in the paper or here.

    python meco.py                                       # site tables: standard, MeCo, mixed; what steers and what it costs
    python meco.py --tables_per_site 2                   # the same with URLs that tell only half
    python meco.py --model DIR --prompt TEXT --prefix_host HOST        # conditional inference
    python train.py --method meco --model DIR --data FILE.jsonl        # lines {"text", "url"}
"""
import contextlib
import hashlib
import math
import multiprocessing
import os
import re
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import DTYPES, Batch, Llama, LlamaConfig, causal, collate, dealt, flag, generate, load_model, load_tokenizer, parse, run, summed, warmup_cosine

KINDS = ("host", "full", "suffix", "hash", "topk", "topic")
MODES = ("meco", "standard", "url", "mix")


@dataclass
class Config:
    mode: str = flag("meco", "meco: metadata, then cooldown; standard: none ever; url: always; mix: both kinds of sequences throughout",
                     choices=MODES)
    cooldown: float = flag(0.1, "share of the steps (mix: of the sequences) without metadata", low=0, high=1)
    metadata: str = flag("host", "what stands in front: host, full URL, suffix (com), hash of the host, topk (rare hosts are unknown), "
                                 "topic (a field of the data)", choices=KINDS)
    top_share: float = flag(0.02, "topk: share of the hosts that keep their name", low=0, high=1)
    first_tokens: int = flag(16, "the report also has the loss of so many first document tokens", low=1)


# --- document format ----------------------------------------------------------------------------------------------------

def bare(url) -> str:
    """A URL without its scheme."""
    return re.sub(r"^[a-z][a-z0-9+.-]*://", "", url.strip(), flags=re.IGNORECASE)


def host(url) -> str:
    """The host of a URL, in lower case: no scheme, user, port, path or query; a sub-domain, www. too, stays."""
    return re.split("[/?#]", bare(url))[0].rpartition("@")[2].partition(":")[0].lower()


def host_of(url) -> str:
    """`host`, which must not be empty."""
    if not host(url):
        raise ValueError(f"{url!r} has no host")
    return host(url)


def describe(row, kind, top=()):
    """Metadata of a document {"url"} or {"topic"}: its name in the template and its text. top: the hosts that `topk` names."""
    if kind == "topic":
        return "Topic", row["topic"]
    url, name = row["url"], host(row["url"])
    return "URL", {"host": name, "full": bare(url), "suffix": name.rpartition(".")[2],
                   "hash": hashlib.sha256(name.encode()).hexdigest()[:12], "topk": name if name in top else "unknown"}[kind]


def top_hosts(urls, share) -> set:
    """The most frequent hosts, `share` of all hosts; ties go to the alphabet."""
    counts = Counter(host(url) for url in urls)
    return set(sorted(counts, key=lambda h: (-counts[h], h))[:math.ceil(share * len(counts))])


def join(bos, metadata, document, eos):
    """Token ids of one document and which of them are learned: the document and its EOS. Joined as ids, so that no token spans a border."""
    ids = [*bos, *metadata, *document, *eos]
    n_given = len(bos) + len(metadata)
    return torch.tensor(ids, dtype=torch.long), torch.arange(len(ids)) >= n_given


def encode(tokenizer, text, metadata=None, name="URL"):
    """(ids, loss_mask), both (n,), of a document: BOS, "NAME: metadata" and an empty line if there is metadata, text, EOS (arXiv:2501.01956, 2)."""
    given = [] if metadata is None else tokenizer.encode(f"{name}: {metadata}\n\n")
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return join(bos, given, tokenizer.encode(text), list(tokenizer.eos_ids)[:1])


def prompt(tokenizer, text, host=None):
    """Token ids of a prompt, conditioned on a host (or the host of a URL), which may be invented."""
    ids, _ = encode(tokenizer, text, None if host is None else host_of(host))
    return ids[:len(ids) - len(list(tokenizer.eos_ids)[:1])].tolist()


def pack(docs, seq_len):
    """Documents (ids, loss_mask) in sequences of exactly seq_len tokens, each of which begins with a document; what does not fit of
    its last one is dropped, as is a last sequence that stays short. Yields lists of (ids, loss_mask)."""
    row, room = [], seq_len
    for ids, mask in docs:
        row.append((ids[:room], mask[:room]))
        room -= len(row[-1][0])
        if room == 0:
            yield row
            row, room = [], seq_len


def as_batch(rows) -> Batch:
    """Packed sequences as a Batch: a target is learned where its own position says so, and never across documents."""
    docs = [doc for row in rows for doc in row]
    targets = [torch.cat((torch.where(mask, ids, -100)[1:], ids.new_full((1,), -100))) for ids, mask in docs]
    return collate([ids for ids, _ in docs], targets)


# --- the method: what train.py asks of it ---------------------------------------------------------------------------------

def conditioned(step, steps, cooldown) -> bool:
    """Is this step in the metadata phase?"""
    return step < round((1 - cooldown) * steps)


class MeCo:
    """Language modelling on sequences with and without metadata; data answers batch(rng, n_conditioned)."""

    def __init__(self, model, settings: Config, seed: int):
        self.settings = settings

    def param_groups(self):
        return []

    def lr_scale(self, step, steps, warmup, min_lr):
        return warmup_cosine(step, steps, warmup, min_lr)  # one schedule: the cooldown does not warm up again

    def batch(self, data, rng, step, steps):
        s = self.settings
        if s.mode == "mix":
            return data.batch(rng, rng.binomial(data.n_seq, 1 - s.cooldown))
        with_metadata = s.mode == "url" or s.mode == "meco" and conditioned(step, steps, s.cooldown)
        return data.batch(rng, data.n_seq if with_metadata else 0)

    def loss(self, model, batch, step, steps):
        if not (batch.targets != -100).any():  # metadata longer than a sequence: nothing to learn, and no 0 / 0
            hidden = model.hidden(batch.tokens, causal(batch.cu_seqlens))
            return (hidden.sum() + model.head.sum()) * 0, {}  # every weight gets its 0: processes average gradients
        return model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens), {}


class UrlData:
    """Documents with metadata, packed. The metadata phase and the cooldown have documents of their own, so that the cooldown repeats none.

    rows: {"text", "url"} or {"text", "topic"}. Raises ValueError if there is too little for one sequence of either kind."""

    def __init__(self, rows, tokenizer, settings: Config, seq_len, n_seq, n_held_out, seed):
        self.seq_len, self.n_seq, self.tokenizer, rng = seq_len, n_seq, tokenizer, np.random.default_rng(seed)
        rows = [rows[i] for i in rng.permutation(len(rows))]
        held, rows = rows[:n_held_out], rows[n_held_out:]
        if not rows:
            raise ValueError(f"{len(held)} documents are too few to hold out {n_held_out} and train on the rest")
        self.top = top_hosts([row["url"] for row in rows], settings.top_share) if settings.metadata == "topk" else ()
        share = {"url": 1.0, "standard": 0.0}.get(settings.mode, 1 - settings.cooldown)  # of the documents, shown with metadata
        cut = round(share * len(rows))
        with_metadata = [self.encode(row, settings.metadata) for row in rows[:cut]]
        self.packs = {True: list(pack(with_metadata, seq_len)), False: list(pack([self.encode(row) for row in rows[cut:]], seq_len))}
        for kind, pool in ((True, rows[:cut]), (False, rows[cut:])):
            if pool and not self.packs[kind]:
                raise ValueError(f"{len(pool)} documents {'with' if kind else 'without'} metadata do not fill one sequence of {seq_len} tokens")
        needed = {kind for kind, part in ((True, share), (False, 1 - share)) if part > 0 or settings.mode == "mix"}
        if not all(self.packs[kind] for kind in needed):
            raise ValueError(f"{len(rows)} documents do not fill one sequence of {seq_len} tokens with metadata and one without")
        others = {describe(row, settings.metadata, self.top) for row in rows}
        if len(others) < 2:
            raise ValueError("all documents have the same metadata: nothing to condition on")
        if not all(row["text"] for row in held + rows):
            raise ValueError("a document has no text")
        if not all(any(mask.any() for _, mask in row) for packs in self.packs.values() for row in packs):
            raise ValueError(f"metadata fills whole sequences of {seq_len} tokens: nothing is left to learn")
        self.exams = []
        for row in held:  # the same document tokens in all three conditions
            own = describe(row, settings.metadata, self.top)
            wrong = sorted(others - {own})
            conditions = {"none": (None, None), "right": own, "wrong": wrong[rng.integers(len(wrong))]}
            self.exams.append({name: exam(*encode(tokenizer, row["text"], text, label), seq_len) for name, (label, text) in conditions.items()})
        self.vocab_size = 1 + max(int(ids.max()) for packs in self.packs.values() for row in packs for ids, _ in row)

    def encode(self, row, kind=None):
        name, text = describe(row, kind, self.top) if kind else (None, None)
        return encode(self.tokenizer, row["text"], text, name)

    def batch(self, rng, n_conditioned):
        kinds = [True] * n_conditioned + [False] * (self.n_seq - n_conditioned)
        return as_batch([self.packs[kind][rng.integers(len(self.packs[kind]))] for kind in kinds])


def exam(ids, mask, n_document):
    """The first n_document tokens of a document, whatever stands in front of them; a token that nothing precedes is not scored."""
    end = int((~mask).sum()) + n_document
    return ids[:end], torch.cat((mask[:1] & False, mask[1:end]))


@torch.no_grad()
def conditioned_losses(model, exams, first=16, autocast=contextlib.nullcontext):
    """Loss [nats / token] with no, the right and the wrong metadata, and the same of the `first` scored tokens of each document:
    {condition: (all, first)}. exams: of each document, {condition: (ids, mask of the tokens to score)}; the scored ones are the same."""
    sums = {name: np.zeros(4) for name in exams[0]}
    for document in dealt(exams):
        n_scored = min(int(mask.sum()) for _, mask in document.values())
        for name, (ids, mask) in document.items():
            at = mask.nonzero()[-n_scored:, 0].to(model.head.device)
            ids = ids.to(model.head.device)
            with autocast():
                logits = F.linear(model.hidden(ids)[at - 1], model.head)  # (n_scored, V)
            nll = F.cross_entropy(logits.float(), ids[at], reduction="none")
            sums[name] += [nll.sum().item(), len(nll), nll[:first].sum().item(), len(nll[:first])]
    totals = {name: summed(values.tolist()) for name, values in sums.items()}
    return {name: (total / n, total_first / n_first) for name, (total, n, total_first, n_first) in totals.items()}


# --- site tables: data on which metadata means something ----------------------------------------------------------------------

BOS, EOS, URL, SEP, N = 0, 1, 2, 3, 8  # N sites, tables, keys and values
SITE, KEY, VALUE, VOCAB = 4, 4 + N, 4 + 2 * N, 4 + 3 * N  # first token of each kind


class SiteData:
    """N sites, N private tables key -> value; a document is n_pair (key, value) pairs of one table of its site.

    Without metadata the table must be inferred from the first pairs; only values can be predicted. tables_per_site 2: site s uses
    tables s and s + 1, so a URL leaves two."""

    vocab_size = VOCAB

    def __init__(self, n_pair=6, tables_per_site=1, n_seq=16, seq_len=64, n_held_out=64, seed=0):
        self.n_pair, self.tables_per_site, self.n_seq, self.seq_len = n_pair, tables_per_site, n_seq, seq_len
        rng = np.random.default_rng([seed, 1])
        self.tables = rng.integers(N, size=(N, N))  # (table, key) -> value
        self.exams = []
        for i in range(n_held_out):
            site, pairs = i % N, self.pairs(rng, i % N)
            wrong = (site + 1 + rng.integers(N - 1)) % N
            documents = {name: self.document(pairs, s)[0] for name, s in (("none", None), ("right", site), ("wrong", wrong))}
            self.exams.append({name: (ids, ids >= VALUE) for name, ids in documents.items()})

    def pairs(self, rng, site):
        table = self.tables[(site + rng.integers(self.tables_per_site)) % N]
        keys = rng.integers(N, size=self.n_pair)
        return np.stack((KEY + keys, VALUE + table[keys]), 1).flatten().tolist()

    def document(self, pairs, site=None):
        return join([BOS], [] if site is None else [URL, SITE + site, SEP], pairs, [EOS])

    def draw(self, rng, with_metadata):
        while True:
            site = int(rng.integers(N))
            yield self.document(self.pairs(rng, site), site if with_metadata else None)

    def batch(self, rng, n_conditioned):
        return as_batch([next(pack(self.draw(rng, i < n_conditioned), self.seq_len)) for i in range(self.n_seq)])

    @torch.no_grad()
    def steering(self, model, with_url, rng, per_site=8):
        """Share of sampled pairs that obey (one of) the site's tables: per_site documents a site, begun with its URL or with nothing."""
        sites = [site for site in range(N) for _ in range(per_site)]
        docs = [[BOS, URL, SITE + site, SEP] if with_url else [BOS] for site in sites]
        for _ in range(2 * self.n_pair):
            cu_seqlens = torch.arange(len(docs) + 1, dtype=torch.int32) * len(docs[0])
            hidden = model.hidden(torch.tensor(docs).flatten(), causal(cu_seqlens))[cu_seqlens[1:].long() - 1]
            drawn = torch.multinomial(F.linear(hidden, model.head).softmax(-1), 1, generator=rng)[:, 0].tolist()
            docs = [doc + [token] for doc, token in zip(docs, drawn)]
        obeyed = []
        for site, doc in zip(sites, docs):
            body, tables = doc[-2 * self.n_pair:], [self.tables[(site + t) % N] for t in range(self.tables_per_site)]
            for key, value in zip(body[::2], body[1::2]):
                obeyed.append(KEY <= key < VALUE and any(VALUE + table[key - KEY] == value for table in tables))
        return sum(obeyed) / len(obeyed)


# --- demo -----------------------------------------------------------------------------------------------------------------

@dataclass
class Demo:
    steps: int = flag(300, "training steps of each run", low=1)
    seeds: int = flag(1, "runs of each kind (README: 5)", low=1, high=100)
    tables_per_site: int = flag(1, "2: a URL leaves two of eight tables", low=1, high=8)
    model: str | None = flag(None, "folder of a Llama: answer --prompt instead")
    prompt: str | None = flag(None, "text to continue")
    prefix_host: str | None = flag(None, "host to condition on; it may be invented")
    max_new_tokens: int = flag(64, "longest continuation [tokens]", low=1)


def small_model(seed):
    """A Llama of 0.06M parameters for site tables."""
    return Llama(LlamaConfig(VOCAB, n_layer=2, n_head=4, n_kv_head=4, n_embd=48, n_ff=128, head_dim=12, tie_embeddings=True)).init_weights(seed)


def train_sites(data, settings, steps, seed):
    """A small Llama on site tables; AdamW and schedule as in the paper (lr 3e-3, betas .9 .95, decay .033, 5 % warm-up, cosine to 10 %)."""
    model = small_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.033)
    method = MeCo(model, settings, seed)
    for step in range(steps):
        batch = method.batch(data, np.random.default_rng([seed, step]), step, steps)
        optimizer.param_groups[0]["lr"] = 3e-3 * method.lr_scale(step, steps, 0.05, 0.1)
        loss, _ = method.loss(model, batch, step, steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def measure_run(run):
    """Losses of values with no, the right and the wrong URL, and steering with and without one, of one run."""
    settings, tables_per_site, steps, seed = run
    data = SiteData(tables_per_site=tables_per_site, seed=seed)
    model, rng = train_sites(data, settings, steps, seed), torch.Generator().manual_seed(seed)
    losses = (loss for loss, _ in conditioned_losses(model, data.exams).values())
    return *losses, data.steering(model, True, rng), data.steering(model, False, rng)


def main():
    config, = parse([Demo], description="MeCo on site tables: what metadata, cooldown and conditional inference do.")
    if (config.model is None) != (config.prompt is None) or config.prefix_host is not None and config.model is None:
        raise ValueError("--model and --prompt belong together, --prefix_host to them")
    if config.model is not None:
        model, tokenizer = load_model(config.model, dtype=DTYPES["bfloat16"]), load_tokenizer(config.model)
        new = generate(model, torch.tensor(prompt(tokenizer, config.prompt, config.prefix_host)), config.max_new_tokens, stop_ids=tokenizer.eos_ids)
        return print(tokenizer.decode(new))
    start = time.perf_counter()
    kinds = {"standard": Config("standard"), "MeCo, cooldown 10 %": Config("meco", 0.1), "MeCo, cooldown 50 %": Config("meco", 0.5),
             "mixed 90 / 10": Config("mix", 0.1)}
    print(f"8 sites, {config.tables_per_site} of 8 tables each; {config.steps} steps of 16 x 64 tokens; seeds 0 to {config.seeds - 1}. Loss of value tokens "
          f"[nats], mean (lowest to highest);\nsteering: sampled pairs that obey the site's tables\n")
    print("| run | no metadata | right URL | wrong URL | steering by URL | without |\n|---|---|---|---|---|---|")
    runs = [(settings, config.tables_per_site, config.steps, seed) for settings in kinds.values() for seed in range(config.seeds)]
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, len(runs)), torch.set_num_threads, (1,)) as pool:  # too small for threads
        done = pool.imap(measure_run, runs)
        for name in kinds:
            rows = [next(done) for _ in tqdm(range(config.seeds), desc=name, unit="run", disable=None, leave=False)]
            cells = [f"{sum(x) / len(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in zip(*rows)]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} seconds. Training on metadata alone ruins use without; the cooldown repairs it, the more the longer, and "
          "costs steering.\nFewer tokens to the same loss without metadata is not what the paper claims, nor what comes out.")


if __name__ == "__main__":
    run(main)
