"""KV footprint: how much cache a method needs over time, and how little it can live with.

Time runs along the query rows. A step of T rows over K retained entries holds T(T+1)/2 + T*K cells of the (row, key) square; the
footprint is the cells held, as a share of full causal attention's N(N+1)/2. Skipping reads saves nothing here: only entries that are
gone count as gone. The critical footprint is the smallest at which a method keeps 90 % of the full cache's score.

Paper: "Cache Me If You Can", arXiv:2506.17121, section 2.1 and appendix A.

    python footprint.py                                            # tiny model, fact stream, every policy
    python footprint.py --model DIR --tasks facts --lengths 2048   # another model

The sweep writes one JSON line per point into --out_dir; with --resume finished points are not run again.
"""
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from tqdm import tqdm

from eval_tasks import TASKS, answer, build, fact_stream, read_results, score, tiny_model, tokenizer_for
from evict import make_cache, train_locret
from model import DTYPES, append_line, check_device, flag, load_model, parse, run, save_plot
from prulong import load_heads

# --- closed forms -----------------------------------------------------------------------------------------------------
# n prompt tokens in chunks of `chunk`, then m tokens one by one; N = n + m. All return (footprint, peak) as Fractions: peak is
# the largest T + K of a step, as a share of N. Raises ValueError for counts below 0, chunk below 1, or no tokens at all.


def tri(x):
    """Cells of a causal triangle of x rows."""
    return x * (x + 1) // 2


def check(**counts):
    """Refuse counts that cannot be, by name; chunk is at least 1, the others at least 0."""
    for name, value in counts.items():
        if value < (name == "chunk") or value != int(value):
            raise ValueError(f"{name} must be a whole number >= {int(name == 'chunk')}, got {value}")
    if counts["n"] + counts["m"] == 0:
        raise ValueError("no tokens: n + m is 0")


def share(cells, peak, n):
    return Fraction(cells) / tri(n), Fraction(peak) / n


def full(n, m):
    """Full attention, however it is chunked."""
    check(n=n, m=m)
    return Fraction(1), Fraction(1)


def postfill(n, m, budget):
    """The whole prompt is read, then cut down to `budget`; decoding adds to that."""
    check(n=n, m=m, budget=budget)
    budget = min(budget, n)
    return share(tri(n) + m * budget + tri(m), max(n, budget + m), n + m)


def chunked(n, m, chunk, budget, extra=0):
    """Each chunk is cut down to `budget` entries, which are never judged again; decoding adds to them.

    extra [tokens] on top per chunk: 64 gives the x axis of the paper's plots, which count the window of each chunk besides."""
    check(n=n, m=m, chunk=chunk, budget=budget, extra=extra)
    q, r = divmod(n, chunk)
    kept, rest = min(budget + extra, chunk), min(budget + extra, r)
    cells = q * tri(chunk) + tri(r) + kept * (chunk * q * (q - 1) // 2 + q * r) + (q * kept + rest) * m + tri(m)
    peak = max((q - 1) * kept + chunk if q else 0, q * kept + r if r else 0, q * kept + rest + m)
    return share(cells, peak, n + m)


def streaming(n, m, chunk, sink, window):
    """sink + window past entries are kept after every step. window is the paper's W: past tokens *beside* the query itself
    (a cache whose window counts the query keeps one less)."""
    return mixed(n, m, chunk, sink, window, Fraction(1))


def heads(n, m, chunk, sink, window, sparsity):
    """Streaming in a share `sparsity` of the heads (float or Fraction), full cache in the others."""
    return mixed(n, m, chunk, sink, window, Fraction(str(sparsity)) if isinstance(sparsity, float) else Fraction(sparsity))


def mixed(n, m, chunk, sink, window, sparsity):
    """`streaming` and `heads`: when a share `sparsity` of the heads streams."""
    check(n=n, m=m, chunk=chunk, sink=sink, window=window)
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be in 0..1, got {sparsity}")
    kept, total = sink + window, n + m
    q, r = divmod(n, chunk)
    whole = min(q, -(-kept // chunk))  # chunks that still meet all that came before
    low = min(max(kept - n, 0), m)  # decoding steps that do
    cells = q * tri(chunk) + tri(r) + chunk * (chunk * whole * (whole - 1) // 2 + (q - whole) * kept) + r * min(q * chunk, kept)
    cells += m + low * n + low * (low - 1) // 2 + (m - low) * kept
    # both kinds of heads hold most in their last whole chunk, their remainder, or their last decoding step
    steps = [(chunk, (q - 1) * chunk)] * (q > 0) + [(r, q * chunk)] * (r > 0) + [(1, total - 1)] * (m > 0)
    peak = max(t + sparsity * min(past, kept) + (1 - sparsity) * past for t, past in steps)
    return share(sparsity * cells + (1 - sparsity) * tri(total), peak, total)


def rolling(n, m, chunk, budget, decode_evicts=True):
    """At most `budget` entries after every step, chosen anew (H2O, TOVA; without decode_evicts Locret)."""
    check(n=n, m=m, chunk=chunk, budget=budget)
    q, r = divmod(n, chunk)
    steps, held = [chunk] * q + [r] * (r > 0), 0
    cells = peak = 0
    for i, t in enumerate(steps + [1] * m):
        cells, peak = cells + tri(t) + t * held, max(peak, t + held)
        held = min(held + t, budget) if decode_evicts or i < len(steps) else held + t
    return share(cells, peak, n + m)


def bytes_per_token(config, itemsize):
    """Bytes of K and V that one token takes in all layers. Llama-3.1-8B in bfloat16: 131,072."""
    return 2 * config.n_layer * config.n_kv_head * config.head_dim * itemsize


def critical(points, full_score, keep=0.9):
    """The smallest footprint at which the score, joined by straight lines between points (footprint, score), reaches
    keep * full_score. Returns (bound, footprint): "=" an interpolated one, "<" even the lowest point passes, ">" none does.

    A curve may dip below and recover: the smallest footprint counts, not the first crossing from above (the paper's Table 2)."""
    points = sorted(points)
    if not points:
        raise ValueError("critical: no points")
    goal = keep * full_score
    if points[0][1] >= goal:
        return "<", points[0][0]
    for (f0, s0), (f1, s1) in itertools.pairwise(points):
        if s1 >= goal:
            return "=", f0 + (goal - s0) * (f1 - f0) / (s1 - s0)
    return ">", points[-1][0]


# --- sweep: score against footprint -------------------------------------------------------------------------------------

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
CURVES = {  # name -> policy and its other settings
    "streaming": ("streaming", {}), "heads": ("heads", {}), "snapkv": ("snapkv", {}),
    "snapkv patched": ("snapkv", {"patch": True}), "pyramidkv": ("pyramidkv", {}), "pyramidkv patched": ("pyramidkv", {"patch": True}),
    "h2o": ("h2o", {}), "tova": ("tova", {}), "knorm": ("knorm", {}), "random": ("random", {}), "locret": ("locret", {}),
}


@dataclass
class Config:
    model: str | None = flag(None, "folder of a Llama; by default the tiny model of the fact stream")
    tasks: str = flag("facts", "tasks, comma-separated")
    lengths: str = flag("512", "prompt lengths, comma-separated [tokens]")
    n: int = flag(40, "examples per task and length", low=1, high=10 ** 6)
    curves: str = flag(",".join(CURVES), "methods to sweep, comma-separated")
    shares: str = flag(",".join(map(str, SHARES)), "shares of the prompt (or of a chunk) to keep, comma-separated")
    chunk: int = flag(64, "prefill chunk [tokens]", low=1)
    obs_window: int = flag(8, "last queries that judge a chunk, and tokens of a patch (paper: 64)", low=1)
    sink: int = flag(4, "first tokens that streaming heads keep (paper: 128)", low=0)
    window: int = flag(32, "last tokens that the streaming heads of `heads` see, the query's own included (paper: 1024)", low=1)
    heads: str | None = flag(None, "mask files (TSV) for `heads`, comma-separated; by default learned on the tiny model")
    threshold: float = flag(0.9, "share of the full score that counts as kept", low=0, high=1)
    out_dir: str = flag("out/footprint", "where results.jsonl and footprint.svg go")
    seed: int = flag(0, "of examples, tiny model and random policy", low=0, high=2 ** 31)
    device: str = flag("cpu", "torch device")
    dtype: str = flag("float32", "of weights and cache", choices=tuple(DTYPES))
    resume: bool = flag(False, "keep the finished points in --out_dir and run the rest")
    overwrite: bool = flag(False, "drop them")


def numbers(text, kind, name, low, high):
    """The comma-separated numbers of a flag, each within low .. high."""
    try:
        values = [kind(x) for x in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name}: want comma-separated numbers, got {text!r}") from None
    for value in values:
        if not low <= value <= high:
            raise ValueError(f"--{name}: {value} is not in {low}..{high}")
    return values


def learned_masks(config):
    """Masks (share of heads that keep all, bool mask) from --heads, or learned on the tiny model, one run of train.py per sparsity."""
    paths = config.heads.split(",") if config.heads else []
    for sparsity in () if paths or config.model else (0.25, 0.5, 0.75, 0.9):
        out = os.path.join(config.out_dir, f"heads-{sparsity:g}-seed{config.seed}-sink{config.sink}-window{config.window}")
        if not os.path.exists(os.path.join(out, "heads.tsv")):
            script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")
            command = [sys.executable, script, "--method", "prulong", "--no-baseline", "--overwrite", "--seed", str(config.seed), "--out_dir", out,
                       "--target_sparsity", str(sparsity), "--sink", str(config.sink), "--window", str(config.window)]
            learned = subprocess.run(command, stdout=subprocess.DEVNULL)
            if learned.returncode:  # train.py has said why
                raise ValueError(f"learning the masks for sparsity {sparsity:g} failed")
        paths.append(os.path.join(out, "heads.tsv"))
    masks = [load_heads(path) for path in paths]
    return [(round(mask.float().mean().item(), 4), mask) for mask in masks]


def tokens_of(share, length) -> int:
    """A share of a prompt in tokens, at least one."""
    return max(1, round(share * length))


def points(config, length, shares, masks):
    """Every point of the sweep: (curve, knob, policy, settings for make_cache, mask)."""
    yield "full", 1.0, "full", {}, None
    for curve in config.curves.split(","):
        policy, settings = CURVES[curve]
        if policy == "heads":
            for kept, mask in masks:
                yield curve, kept, policy, dict(sink=config.sink, window=config.window), mask
            continue
        for x in shares:
            n = tokens_of(x, length)
            if policy == "streaming":
                if n > config.sink:
                    yield curve, x, policy, dict(sink=config.sink, budget=n), None
            elif policy in ("h2o", "tova", "locret"):
                yield curve, x, policy, dict(budget=n, obs_window=config.obs_window), None
            else:
                yield curve, x, policy, dict(keep=x, obs_window=config.obs_window, **settings), None


def run_point(model, tokenizer, examples, policy, settings, mask, scorer, chunk, seed):
    """Mean score, footprint and peak of one policy over examples."""
    rows = []
    for example in examples:
        cache = make_cache(model, policy, chunk=chunk, heads=mask, scorer=scorer if policy == "locret" else None, seed=seed, **settings)
        prediction = answer(model, tokenizer, example, cache, example.max_new_tokens)
        rows.append((score(example.task, prediction, example)["score"], float(cache.footprint()), float(cache.peak())))
    return [sum(column) / len(rows) for column in zip(*rows)]


def facts_scorer(model, seed):
    """A Locret scorer for the tiny model: 150 streams whose last 64 tokens are queries and answers."""
    samples = []
    for i in range(150):
        batch = fact_stream(np.random.default_rng([seed, i, 7]), 1, 256, 12, 32, queries_last=True).batch
        samples.append((batch.tokens, 64))
    return train_locret(model, samples, hidden=64, lr=3e-3, seed=seed)[0]


# --- what came out ------------------------------------------------------------------------------------------------------

def table(results, threshold):
    """Markdown: critical footprint of each curve, per task and length. results: the points of one sweep."""
    lines = ["| task | tokens | method | critical KV footprint | its points: footprint -> score |", "|---|---|---|---|---|"]
    found = {}
    for task, length in sorted({(r["task"], r["length"]) for r in results}):
        here = [r for r in results if (r["task"], r["length"]) == (task, length)]
        whole = next(r["score"] for r in here if r["curve"] == "full")
        lines.append(f"| {task} | {length} | full cache | 1 | 1.00 -> {whole:.3f} |")
        for curve in dict.fromkeys(r["curve"] for r in here if r["curve"] != "full"):
            xy = sorted((r["footprint"], r["score"]) for r in here if r["curve"] == curve)
            bound, value = critical(xy, whole, threshold)
            found[f"{task} {length} {curve}"] = [bound, round(value, 4)]
            lines.append(f"| {task} | {length} | {curve} | {bound.replace('=', '')}{value:.3f} | "
                         + ", ".join(f"{f:.2f} -> {s:.2f}" for f, s in xy) + " |")
    return "\n".join(lines), found


def main():
    config, = parse([Config], description="Score against KV footprint, and the critical footprint, of every eviction policy.")
    tasks, lengths = config.tasks.split(","), numbers(config.lengths, int, "lengths", 1, 10 ** 7)
    for name, given, known in (("tasks", tasks, TASKS), ("curves", config.curves.split(","), CURVES)):
        if unknown := [x for x in given if x not in known]:
            raise ValueError(f"--{name}: unknown {unknown[0]!r}: one of {', '.join(known)}")
    if "pseudo_to_code" in [TASKS[task].scorer for task in tasks]:
        raise ValueError("--tasks: code tasks run what the model wrote: eval_tasks.py --allow_code_exec does that")
    shares = numbers(config.shares, float, "shares", 0, 1)
    check_device(config.device)
    path = os.path.join(config.out_dir, "results.jsonl")
    if os.path.exists(path) and not (config.resume or config.overwrite):
        raise ValueError(f"{path} is there already: add --resume or --overwrite, or name another --out_dir")
    if config.model:
        model = load_model(config.model, config.device, DTYPES[config.dtype])
        tokenizer = tokenizer_for(tasks, model, config.model)
    else:
        model, tokenizer = tiny_model(config.seed, f"out/tiny-seed{config.seed}").to(config.device, DTYPES[config.dtype]), None
    wanted = config.curves.split(",")
    os.makedirs(config.out_dir, exist_ok=True)
    if config.overwrite and os.path.exists(path):
        os.remove(path)
    masks = learned_masks(config) if "heads" in wanted else []
    scorer = facts_scorer(model, config.seed) if "locret" in wanted and tokenizer is None else None
    if left_out := ["locret"] * ("locret" in wanted and scorer is None) + ["heads"] * ("heads" in wanted and not masks):
        print(f"left out: {', '.join(left_out)} (locret needs a scorer trained for the model, heads a --heads file)")
        config.curves = ",".join(c for c in wanted if c not in left_out)
    if "streaming" in wanted and (short := [f"{x:g} of {n}" for n in lengths for x in shares if tokens_of(x, n) <= config.sink]):
        print(f"left out: streaming with a share of {', '.join(short)} (no more than its --sink of {config.sink})")
    about = {"model": config.model or "tiny", "n": config.n, "seed": config.seed, "chunk": config.chunk, "dtype": config.dtype}
    done = read_results(path)
    results, jobs = [], [(task, length, *point) for task in tasks for length in lengths for point in points(config, length, shares, masks)]
    examples = {(task, length): build(task, config.n, length, config.seed, tokenizer) for task in tasks for length in lengths}
    for task, length, curve, knob, policy, settings, mask in tqdm(jobs, desc="points", unit="point", disable=None):
        key = json.dumps(about | {"task": task, "length": length, "curve": curve, "knob": knob, "settings": settings,
                       "mask": None if mask is None else "".join(str(int(x)) for x in mask.flatten())}, sort_keys=True)
        if key not in done:
            start = time.perf_counter()
            value, held, peak = run_point(model, tokenizer, examples[task, length], policy, settings, mask, scorer, config.chunk, config.seed)
            done[key] = {"key": key, "task": task, "length": length, "curve": curve, "score": value, "footprint": held, "peak": peak,
                         "seconds": round(time.perf_counter() - start, 3)}
            append_line(path, done[key])
        results.append(done[key])
    text, found = table(results, config.threshold)
    print(f"\n{text}\n")
    for task, length in examples:
        here = [r for r in results if (r["task"], r["length"]) == (task, length)]
        curves = {c: [(r["footprint"], r["score"]) for r in here if r["curve"] == c] for c in dict.fromkeys(r["curve"] for r in here) if c != "full"}
        whole = next(r["score"] for r in here if r["curve"] == "full")
        picture = os.path.join(config.out_dir, f"footprint-{task}-{length}.svg")
        title = f"{task}, {length} tokens, {os.path.basename(os.path.normpath(about['model']))}, n = {config.n}"
        mark = {f"{config.threshold:.0%} of the full cache": config.threshold * whole}
        save_plot(picture, curves, title, "KV footprint", "score", 1.0, whole, mark)
    print(json.dumps({"critical": found, "threshold": config.threshold, **about}, allow_nan=False))


if __name__ == "__main__":
    run(main)
