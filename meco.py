"""MeCo: metadata conditioning, then cooldown. Each document is preceded by where it comes from; the
last tenth of training goes without.

Metadata phase:  BOS  "URL: en.wikipedia.org\\n\\n"  document  EOS     loss on the document and EOS
Cooldown phase:  BOS  document  EOS                   the same schedule and optimizer state go on
At inference a host in front (`prompt`) steers the model; without one it works as any other.

Paper: "Metadata Conditioning Accelerates Language Model Pre-training", arXiv:2501.01956. Its gain
is downstream accuracy at equal perplexity (1.6B: perplexity 13.3 against 13.2, average accuracy
56.7 against 55.7): loss without metadata is not where MeCo wins, in the paper or here.

    python train.py --method meco --beside meco:mode=standard          # embedded: site tables
    python train.py --method meco --model DIR --from_scratch --data FILE.jsonl     # {"text", "url"}
    python meco.py --model DIR --prompt TEXT --prefix_host HOST        # conditional inference
"""
import hashlib
import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from model import (DTYPES, Batch, Llama, LlamaConfig, Method, causal, collate, flag, generate,
                   load_model, load_tokenizer, parse, run, shuffled)

# --- document format -----------------------------------------------------------------------------

KINDS = ("host", "full", "suffix", "hash", "topk", "topic")


def bare(url) -> str:
    """A URL without its scheme."""
    return re.sub(r"^[a-z][a-z0-9+.-]*://", "", url.strip(), flags=re.IGNORECASE)


def host(url) -> str:
    """The host of a URL, in lower case: no scheme, user, port, path or query. Sub-domains stay."""
    netloc = re.split("[/?#]", bare(url))[0].rpartition("@")[2]
    return re.sub(r":\d*$", "", netloc).lower()  # colons inside [...] are an IPv6 address


def describe(row, kind, top=()):
    """Metadata of a document {"url"} or {"topic"}: its name in the template and its text. top: the
    hosts that `topk` names."""
    if kind == "topic":
        return "Topic", row["topic"]
    name = host(row["url"])
    if kind == "full":
        return "URL", bare(row["url"])
    if kind == "suffix":
        return "URL", name.rpartition(".")[2]
    if kind == "hash":
        return "URL", hashlib.sha256(name.encode()).hexdigest()[:12]
    return "URL", name if kind == "host" or name in top else "unknown"


def top_hosts(urls, share) -> set:
    """The most frequent hosts, `share` of all hosts; ties go to the alphabet."""
    counts = Counter(host(url) for url in urls)
    best = sorted(counts, key=lambda name: (-counts[name], name))
    return set(best[:math.ceil(share * len(best))])


def join(bos, metadata, document, eos):
    """Token ids of a document and which of them are learned: the document and its EOS. Joined as
    ids, so that no token spans a border."""
    ids = [*bos, *metadata, *document, *eos]
    n_given = len(bos) + len(metadata)
    return torch.tensor(ids, dtype=torch.long), torch.arange(len(ids)) >= n_given


def encode(tokenizer, text, metadata=None, name="URL"):
    """(ids, loss_mask), both (n,), of a document: BOS, "NAME: metadata" and an empty line if there
    is metadata, text, EOS. Source: arXiv:2501.01956, section 2."""
    given = [] if metadata is None else tokenizer.encode(f"{name}: {metadata}\n\n")
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return join(bos, given, tokenizer.encode(text), list(tokenizer.eos_ids)[:1])


def prompt(tokenizer, text, host=None):
    """Token ids of a prompt, conditioned on a host or the host of a URL, which may be invented."""
    name = None if host is None else describe({"url": host}, "host")[1]
    if name == "":
        raise ValueError(f"{host!r} has no host")
    ids, _ = encode(tokenizer, text, name)
    return ids[:len(ids) - len(list(tokenizer.eos_ids)[:1])].tolist()


def pack(docs, seq_len):
    """Documents (ids, loss_mask) in sequences of exactly seq_len tokens, each of which begins with
    a document; what does not fit of its last one is dropped, as is a last short sequence."""
    row, room = [], seq_len
    for ids, mask in docs:
        row.append((ids[:room], mask[:room]))
        room -= len(row[-1][0])
        if room == 0:
            yield row
            row, room = [], seq_len


def as_batch(rows) -> Batch:
    """Packed sequences as a Batch: a target is learned where its own position says so."""
    docs = [doc for row in rows for doc in row]
    targets = []
    for ids, mask in docs:
        learned = torch.where(mask, ids, -100)
        targets.append(torch.cat((learned[1:], ids.new_full((1,), -100))))
    return collate([ids for ids, _ in docs], targets)


# --- the method ----------------------------------------------------------------------------------

class MeCo(Method):
    """Language modelling on sequences with and without metadata."""

    @dataclass
    class Config:
        mode: str = flag("meco", "meco: metadata, then cooldown; standard: none; url: always; mix: "
                                 "both throughout", choices=("meco", "standard", "url", "mix"))
        cooldown: float = flag(0.1, "share of the steps (mix: sequences) without metadata", least=0)
        metadata: str = flag("host", "host, full URL, suffix (com), hash of the host, topk (rare "
                                     "hosts are unknown), topic (a field)", choices=KINDS)
        top_share: float = flag(0.02, "topk: share of the hosts that keep their name", least=0)
        first_tokens: int = flag(16, "the report also has the loss of so many tokens", least=1)

    @classmethod
    def defaults(cls, args, config):
        paper = dict(weight_decay=0.033, warmup=0.05)
        if args.model is None and args.data in (None, "sites"):
            return SiteData.defaults | paper
        return paper

    @classmethod
    def load(cls, args, config):
        return small_model(args.seed) if args.data == "sites" else None

    @classmethod
    def data(cls, args, config, tokenizer, rows):
        if args.data == "sites":
            return SiteData(args.batch, args.seq_len, args.eval_seqs, args.seed)
        return UrlData(rows, tokenizer, config, args)

    def batch(self, data, i, step, steps):
        """The metadata phase, then the cooldown: one schedule, which does not warm up again. All
        modes read the same documents; the mode says which have their metadata."""
        c, n = self.config, 0
        cooldown = step >= round((1 - c.cooldown) * steps)
        if c.mode == "mix":
            n = np.random.default_rng((data.seed, i, 1)).binomial(data.n_seq, 1 - c.cooldown)
        elif c.mode == "url" or c.mode == "meco" and not cooldown:
            n = data.n_seq
        return data.batch(i, n, cooldown)

    def evaluate(self, model, data):
        return conditioned_losses(model, data.exams, self.config.first_tokens)

    def before(self, model, data):
        return self.evaluate(model, data) | data.steering(model)

    def rows(self, model, data, before, runs, out_dir):
        """Losses with no, the right and the wrong metadata, on the same document tokens; on site
        tables also how well a model obeys a host."""
        yield "before", before
        for name, (_, m) in runs.items():
            yield name, self.evaluate(m, data) | data.steering(m)


@torch.no_grad()
def conditioned_losses(model, exams, first) -> dict:
    """Loss [nats / token] with no, the right and the wrong metadata, of all scored tokens and of
    the `first` ones of each document, if one has more. exams: of each document {condition: (ids,
    mask of the tokens to score)}; the scored ones are the same."""
    sums, longest = {name: np.zeros(4) for name in exams[0]}, 0
    for document in exams:
        n_scored = min(int(mask.sum()) for _, mask in document.values())
        longest = max(longest, n_scored)
        for name, (ids, mask) in document.items():  # some score a token more: the last are common
            at = mask.nonzero()[-n_scored:, 0].to(model.head.device)
            ids = ids.to(model.head.device)
            logits = F.linear(model.hidden(ids)[at - 1], model.head).float()  # (n_scored, V)
            nll = F.cross_entropy(logits, ids[at], reduction="none")
            early = nll[:first]
            sums[name] += [nll.sum().item(), len(nll), early.sum().item(), len(early)]
    losses = {name: total / n for name, (total, n, _, _) in sums.items()}
    early = {f"{name}, first {first}": total / n for name, (_, _, total, n) in sums.items()}
    return losses | early if longest > first else losses


# --- pages with URLs -----------------------------------------------------------------------------

class UrlData:
    """Documents with metadata, packed; in shuffled epochs. The metadata phase and the cooldown have
    documents of their own, so that the cooldown repeats none. rows: {"text", "url"} or "topic"."""

    def __init__(self, rows, tokenizer, config, args):
        self.seq_len, self.n_seq, self.seed = args.seq_len, args.batch, args.seed
        self.tokenizer, self.kind = tokenizer, config.metadata
        rng, rows = np.random.default_rng(args.seed), checked_pages(rows, config.metadata)
        rows = [rows[i] for i in rng.permutation(len(rows))]
        held, rows = rows[:args.eval_seqs], rows[args.eval_seqs:]
        urls = [row["url"] for row in rows] if config.metadata == "topk" else ()
        self.top = top_hosts(urls, config.top_share)
        share = 1 - config.cooldown
        cut = round(share * len(rows))
        self.packs = {}  # (cooldown, with metadata) -> sequences
        for cooldown, part, docs in ((False, share, rows[:cut]), (True, 1 - share, rows[cut:])):
            for with_metadata in (False, True):
                packs = self.packs[cooldown, with_metadata] = self.packed(docs, with_metadata)
                if part > 0 and not packs:
                    raise ValueError(f"{len(docs)} documents do not fill a sequence of "
                                     f"{args.seq_len} tokens")
        others = sorted({describe(row, self.kind, self.top) for row in rows})
        if len(others) < 2:
            raise ValueError("all documents have the same metadata: nothing to condition on")
        self.exams = [self.exam(row, others, rng) for row in held]
        packs = [doc for packs in self.packs.values() for row in packs for doc in row]
        self.vocab_size = 1 + max(int(ids.max()) for ids, _ in packs)

    def packed(self, rows, with_metadata):
        """Packed documents; a sequence in which metadata leaves nothing to learn is left out."""
        docs = [self.encode(row, with_metadata) for row in rows]
        packs = pack(docs, self.seq_len)
        return [row for row in packs if any(mask[1:].any() for _, mask in row)]

    def encode(self, row, with_metadata):
        name, text = describe(row, self.kind, self.top) if with_metadata else (None, None)
        return encode(self.tokenizer, row["text"], text, name)

    def exam(self, row, others, rng):
        """The same document tokens after no, the right and a wrong metadata."""
        right = describe(row, self.kind, self.top)
        wrong = [other for other in others if other != right]
        labels = {"none": (None, None), "right": right, "wrong": wrong[rng.integers(len(wrong))]}
        exam = {}
        for name, (label, text) in labels.items():
            ids, mask = encode(self.tokenizer, row["text"], text, label)
            end = int((~mask).sum()) + self.seq_len
            mask[0] = False  # a token that nothing precedes is not scored
            exam[name] = ids[:end], mask[:end]
        return exam

    def batch(self, i, n_conditioned=0, cooldown=False):
        rows = []
        for s in range(self.n_seq):
            packs = self.packs[cooldown, s < n_conditioned]
            rows.append(packs[shuffled(i * self.n_seq + s, len(packs), self.seed, int(cooldown))])
        return as_batch(rows)

    def steering(self, model):
        return {}


def checked_pages(rows, kind) -> list:
    """Rows that have a text and what the metadata is made of."""
    field, rows = "topic" if kind == "topic" else "url", list(rows)
    for row in rows:
        where = row.get("where", str(row)[:60])
        if not all(row.get(name) and isinstance(row[name], str) for name in ("text", field)):
            raise ValueError(f'{where}: expected a "text" and a "{field}"')
        if field == "url" and not host(row["url"]):
            raise ValueError(f"{where}: the url has no host")
    return rows


# --- site tables: data on which metadata means something -----------------------------------------

BOS, EOS, URL, SEP, N = 0, 1, 2, 3, 8  # N sites, tables, keys and values
SITE, KEY, VALUE, VOCAB = 4, 4 + N, 4 + 2 * N, 4 + 3 * N  # first token of each kind


def small_model(seed):
    """A Llama of 0.06M parameters for site tables."""
    config = LlamaConfig(VOCAB, n_layer=2, n_head=4, n_kv_head=4, n_embd=48, n_ff=128, head_dim=12,
                         tie_embeddings=True)
    return Llama(config).init_weights(seed)


class SiteData:
    """N sites with a private table key -> value each. A document is n_pair (key, value) pairs of
    its site's table. Without metadata the table must be inferred from the first pairs.

    tables_per_site 2: site s uses tables s and s + 1, so that a URL leaves two."""
    defaults = dict(data="sites", seq_len=64, batch=16, steps=300, lr=3e-3, eval_seqs=64)
    vocab_size, tokenizer = VOCAB, None

    def __init__(self, n_seq=16, seq_len=64, n_held_out=64, seed=0, n_pair=6, tables_per_site=1):
        self.n_pair, self.tables_per_site = n_pair, tables_per_site
        self.n_seq, self.seq_len, self.seed = n_seq, seq_len, seed
        rng = np.random.default_rng([seed, 2 ** 31])
        self.tables = rng.integers(N, size=(N, N))  # (table, key) -> value
        self.exams = []
        for i in range(n_held_out):
            site, pairs = i % N, self.pairs(rng, i % N)
            wrong = (site + 1 + rng.integers(N - 1)) % N
            exam = {}
            for name, s in (("none", None), ("right", site), ("wrong", wrong)):
                ids, _ = self.document(pairs, s)
                exam[name] = ids, ids >= VALUE  # only values can be predicted
            self.exams.append(exam)

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

    def batch(self, i, n_conditioned=0, cooldown=False):
        rng = np.random.default_rng((self.seed, i))
        rows = range(self.n_seq)
        return as_batch([next(pack(self.draw(rng, s < n_conditioned), self.seq_len)) for s in rows])

    def steering(self, model):
        """Share of sampled pairs that obey the site's tables, begun with its URL or nothing."""
        return {f"obeys, {name}": self.obeyed(model, with_url)
                for name, with_url in (("with URL", True), ("without", False))}

    @torch.no_grad()
    def obeyed(self, model, with_url, per_site=8) -> float:
        rng = torch.Generator().manual_seed(self.seed)
        sites = [site for site in range(N) for _ in range(per_site)]
        docs = [[BOS, URL, SITE + site, SEP] if with_url else [BOS] for site in sites]
        for _ in range(2 * self.n_pair):
            cu = torch.arange(len(docs) + 1) * len(docs[0])
            tokens = torch.tensor(docs, device=model.head.device).flatten()
            hidden = model.hidden(tokens, causal(cu))[cu[1:] - 1]
            p = F.linear(hidden, model.head).float().softmax(-1).cpu()
            drawn = torch.multinomial(p, 1, generator=rng)[:, 0].tolist()
            docs = [doc + [token] for doc, token in zip(docs, drawn)]
        right = 0
        for site, doc in zip(sites, docs):
            body = doc[-2 * self.n_pair:]
            tables = [self.tables[(site + t) % N] for t in range(self.tables_per_site)]
            for key, value in zip(body[::2], body[1::2]):
                if KEY <= key < VALUE:
                    right += any(VALUE + table[key - KEY] == value for table in tables)
        return right / (len(docs) * self.n_pair)


# --- conditional inference -----------------------------------------------------------------------

@dataclass
class Flags:
    model: str | None = flag(None, "folder of a Llama trained with MeCo")
    prompt: str | None = flag(None, "text to continue")
    prefix_host: str | None = flag(None, "host to condition on; it may be invented")
    max_new_tokens: int = flag(64, "longest continuation [tokens]", least=1)


def main():
    config, = parse([Flags], description="Continue a text as if it came from a host.")
    if config.model is None or config.prompt is None:
        raise ValueError("--model and --prompt are needed; train.py --method meco trains")
    model = load_model(config.model, dtype=DTYPES["bfloat16"])
    tokenizer = load_tokenizer(config.model)
    ids = prompt(tokenizer, config.prompt, config.prefix_host)
    new = generate(model, ids, config.max_new_tokens, stop_ids=tokenizer.eos_ids)
    print(tokenizer.decode(new, marks=False))


if __name__ == "__main__":
    run(main)
