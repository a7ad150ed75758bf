"""Long-context tasks and their scores. The embedded one needs no download: a stream of facts and queries in filler.

Fact stream: Markov filler that two previous tokens predict; single-token facts F[key, value] in the first half; queries
Q[key] that are answered by A[value]. The filler needs local attention, the answers need the fact however far back it is:
a model small enough to train in a minute has heads of both kinds.

    python eval_tasks.py            # trains the tiny model if need be and shows its recall by distance
"""
import json
import os
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from model import Batch, Llama, LlamaConfig, causal, cross_entropy, flag, load_model, parse, run, save_model

# --- fact stream ----------------------------------------------------------------------------------------------------

BOS, FILLER, FACT, QUERY, ANSWER = 0, 1, 17, 145, 161  # first token of each kind
N_FILLER, N_KEY, N_VALUE = 16, 16, 8
VOCAB = ANSWER + N_VALUE  # 169


@dataclass(frozen=True)
class Facts:
    """A batch of fact streams. far(window, sink) marks the queries whose fact neither window nor sink shows."""
    batch: Batch
    query: torch.Tensor  # (n,) index of each query token in batch.tokens
    fact: torch.Tensor  # (n,) index of the fact it asks for
    start: torch.Tensor  # (n,) index of the sequence's first token

    def far(self, window, sink):
        return (self.query - self.fact >= window) & (self.fact - self.start >= sink)


def filler_tables():
    """Three successors of each filler token after one and after two tokens: two (N_FILLER, 3) tables, the same always."""
    rng = np.random.default_rng(0)
    return [np.stack([rng.choice(N_FILLER, 3, replace=False) for _ in range(N_FILLER)]) for _ in range(2)]


def fact_stream(rng, n_seq, length, n_fact, n_query, queries_last=False) -> Facts:
    """n_seq sequences of `length` tokens: n_fact facts with distinct keys in the first half, n_query queries after the
    first fact about facts already told (queries_last: all of them at the end, like a passkey test's questions).

    Raises ValueError if that does not fit."""
    n_filler = length - 1 - n_fact - 2 * n_query
    slots = n_fact + n_query + n_filler
    if n_filler < 0 or not 0 < n_fact <= min(N_KEY, slots // 2) or slots - slots // 2 < n_query:
        raise ValueError(f"{n_fact} facts and {n_query} queries do not fit into {length} tokens")
    tables = filler_tables()
    tokens = np.zeros((n_seq, length), dtype=np.int64)
    query, fact = [], []
    for s in range(n_seq):
        kind = np.zeros(slots, dtype=np.int64)  # 0 filler, 1 fact, 2 query
        kind[rng.choice(slots // 2, n_fact, replace=False)] = 1
        free = np.flatnonzero(kind == 0)
        free = free[free > np.flatnonzero(kind)[0]]
        kind[free[len(free) - n_query:] if queries_last else rng.choice(free, n_query, replace=False)] = 2
        keys, values, told = rng.permutation(N_KEY)[:n_fact], rng.integers(N_VALUE, size=n_fact), []
        at, a, b = 1, rng.integers(N_FILLER), rng.integers(N_FILLER)  # a, b: the last two filler tokens
        for choice, table, pick in zip(kind, rng.integers(2, size=slots), rng.integers(3, size=slots)):
            if choice == 0:
                a, b = b, tables[table][a if table else b, pick]
                tokens[s, at] = FILLER + b
            elif choice == 1:
                i = len(told)
                tokens[s, at] = FACT + keys[i] * N_VALUE + values[i]
                told.append(s * length + at)
            else:
                i = rng.integers(len(told))
                tokens[s, at:at + 2] = QUERY + keys[i], ANSWER + values[i]
                query.append(s * length + at)
                fact.append(told[i])
                at += 1
            at += 1
    targets = np.concatenate((tokens[:, 1:], np.full((n_seq, 1), -100)), axis=1)
    weights = np.where(targets >= ANSWER, 1.0, np.where(targets < FACT, 0.3, 0.0))  # facts and queries are pure chance
    tensor = lambda x: torch.from_numpy(np.asarray(x).reshape(-1))
    batch = Batch(tensor(tokens), tensor(targets), torch.arange(n_seq + 1, dtype=torch.int32) * length, tensor(weights).float())
    query, fact = tensor(np.array(query)), tensor(np.array(fact))
    return Facts(batch, query, fact, query // length * length)


@torch.no_grad()
def recall(model, facts: Facts, attend=None, which=None) -> float:
    """Share of queries (those marked in `which`, all by default) whose likeliest next token is the right answer."""
    rows = facts.query if which is None else facts.query[which]
    hidden = model.hidden(facts.batch.tokens, attend or causal(facts.batch.cu_seqlens))[rows]
    return ((hidden @ model.head.T).argmax(1) == facts.batch.targets[rows]).float().mean().item()


# --- tasks: build(task, n, length, seed, tokenizer) -> examples; score(task, prediction, example) -> floats ---------------

@dataclass(frozen=True)
class Example:
    """A prompt (token ids), how much to generate, and what the answer should be."""
    task: str
    prompt: list
    answer: object
    max_new_tokens: int


def build_facts(n, length, seed, tokenizer=None):
    """Fact streams of `length` tokens that end in a query; the answer is the next token. For the tiny model (token ids)."""
    if tokenizer is not None:
        raise ValueError("task facts is made of token ids for the tiny model: it has no text for a tokenizer")
    fits = [row for row in CURRICULUM if row[0] <= length]
    if not fits:
        raise ValueError(f"task facts needs a length of at least {CURRICULUM[0][0]} tokens, got {length}")
    tokens = fact_stream(np.random.default_rng([seed, length]), n, length + 1, fits[-1][1], 1, queries_last=True).batch.tokens
    return [Example("facts", row[:-1], row[-1:], 1) for row in tokens.view(n, -1).tolist()]


TASKS = {"facts": build_facts}


def build(task, n, length, seed, tokenizer=None) -> list[Example]:
    """n examples of a task whose prompts are `length` tokens long. Raises ValueError for an unknown task or what cannot fit."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: one of {', '.join(TASKS)}")
    return TASKS[task](n, length, seed, tokenizer)


def score(task, prediction, example) -> dict:
    """Scores of a prediction, higher is better; "score" is the task's main one, in 0..1."""
    return {"score": float(prediction == example.answer)}


# --- tiny model -----------------------------------------------------------------------------------------------------

TINY = LlamaConfig(vocab_size=VOCAB, n_layer=3, n_head=8, n_kv_head=4, n_embd=64, n_ff=128, head_dim=16,
                   max_seq_len=2048, rope_base=1e6, tie_embeddings=True, bos_id=BOS)
# length, facts, queries, sequences per step, recall (moving average) that ends the stage: longer ones then take few steps
CURRICULUM = ((64, 8, 16, 32, 0.97), (128, 10, 24, 16, 0.97), (256, 12, 32, 8, 0.97), (512, 12, 48, 6, 0.985))


def tiny_model(seed=0, path=None, max_steps=1200, log=print) -> Llama:
    """The tiny Llama that knows the fact stream up to 512 tokens: read from folder `path`, or trained (about a CPU
    minute) and kept there. Raises ValueError if the stages are not through after max_steps steps or path holds another model."""
    if path and os.path.exists(os.path.join(path, "config.json")):  # written last
        model = load_model(path)
        if model.config != TINY:
            raise ValueError(f"{path} holds another model than the tiny one: remove it or work elsewhere")
        return model
    model = Llama(TINY).init_weights(seed)
    with torch.no_grad():
        rng = torch.Generator().manual_seed(seed)
        model.model.embed_tokens.weight += 0.5 * torch.randn(TINY.n_embd, generator=rng) * TINY.n_embd ** -0.5
        for p in model.model.layers.parameters():  # small projections: the lookup settles in few heads (at full size the
            if p.dim() == 2:                       # best 3 of 12 heads recall .93 to .96 of far facts, at a quarter .98 to 1)
                p *= 0.25
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01)
    step, bar = 0, tqdm(desc="tiny model", unit="step", disable=None, leave=False)
    for stage, (length, n_fact, n_query, n_seq, goal) in enumerate(CURRICULUM):
        average, first = 0.0, step
        while average < goal:
            if step == max_steps:
                raise ValueError(f"the tiny model (seed {seed}) is at recall {average:.2f} of length {length} after {step} steps")
            facts = fact_stream(np.random.default_rng([seed, step]), n_seq, length, n_fact, n_query)
            batch = facts.batch
            hidden = model.hidden(batch.tokens, causal(batch.cu_seqlens))
            loss = cross_entropy(hidden, model.head, batch.targets, batch.weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = 4e-3 * min(1, (step + 1) / 30) * (0.5 if stage else 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                right = (hidden[facts.query] @ model.head.T).argmax(1) == batch.targets[facts.query]
            average += 0.1 * (right.float().mean().item() - average)
            step += 1
            bar.update()
            bar.set_postfix(length=length, loss=f"{loss.item():.3f}", recall=f"{average:.3f}")
        log(f"tiny model, seed {seed}: recall {average:.3f} at length {length} after {step - first} steps")
    bar.close()
    if path:
        save_model(model, path)
    return model


# --- command line -------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    seed: int = flag(0, "of the tiny model's weights and data", low=0, high=2 ** 31)
    n: int = flag(64, "sequences to score", low=1, high=10 ** 6)


def main():
    config, = parse([Config], description="Recall of the tiny model on the fact stream, by distance of the fact.")
    model = tiny_model(config.seed, f"out/tiny-seed{config.seed}")
    print("| tokens | facts | queries | recall | facts up to 32 back | 33 to 128 | beyond |\n|---|---|---|---|---|---|---|")
    rows = []
    for length, n_fact, n_query, *_ in CURRICULUM:
        facts = fact_stream(np.random.default_rng([config.seed, 2 ** 31]), config.n, length, n_fact, n_query)
        back = facts.query - facts.fact
        bands = [None, back <= 32, (back > 32) & (back <= 128), back > 128]
        rows.append([None if band is not None and not band.any() else recall(model, facts, which=band) for band in bands])
        print(f"| {length} | {n_fact} | {n_query} | " + " | ".join("-" if x is None else f"{x:.3f}" for x in rows[-1]) + " |")
    print(json.dumps({"seed": config.seed, "n": config.n, "recall": {row[0]: scores[0] for row, scores in zip(CURRICULUM, rows)}}))


if __name__ == "__main__":
    run(main)
