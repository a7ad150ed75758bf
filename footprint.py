"""KV footprint: how much cache a method needs over time, and how little it can live with.

Time runs along the query rows. A step of T rows over K retained entries holds T(T+1)/2 + T K cells
of the (row, key) square; the footprint is the cells held, as a share of full causal attention's
N(N+1)/2. Skipping reads saves nothing here: only entries that are gone count as gone. The critical
footprint is the smallest at which a method keeps 90 % of the full cache's score.

Paper: "Cache Me If You Can", arXiv:2506.17121, section 2.1 and appendix A.

    python footprint.py                                            # tiny model, every policy
    python footprint.py --model DIR --tasks niah_s --lengths 2048 --heads out/prulong/heads.tsv

The sweep writes one JSON line per point into --out_dir; --resume does not run them again.
"""
import contextlib
import functools
import html
import inspect
import itertools
import json
import os
import time
from dataclasses import dataclass
from fractions import Fraction

import torch
from tqdm import tqdm

import prulong
import train
from cepe import is_cepe, load_cepe
from eval_tasks import (answer, build, by, code_fingerprint, for_encoder, held, open_results,
                        score, tiny_model, tokenizer_for)
from evict import RULES, load_scorer, make_cache
from model import (DTYPES, append_line, fingerprint, flag, join, load_heads, load_model,
                   load_pattern, parse, run, write_svg)

# --- closed forms --------------------------------------------------------------------------------
# n prompt tokens in chunks of `chunk`, then m tokens one by one; N = n + m. All return (footprint,
# peak) as Fractions: peak is the largest T + K of a step, as a share of N.

def tri(x):
    """Cells of a causal triangle of x rows."""
    return x * (x + 1) // 2


def share(cells, peak, n):
    if n == 0:
        raise ValueError("no tokens: n + m is 0")
    return Fraction(cells) / tri(n), Fraction(peak) / n


def full(n, m):
    """Full attention, however it is chunked."""
    return share(tri(n + m), n + m, n + m)


def postfill(n, m, budget):
    """The whole prompt is read, then cut down to `budget`; decoding adds to that."""
    budget = min(budget, n)
    return share(tri(n) + m * budget + tri(m), max(n, budget + m), n + m)


def chunked(n, m, chunk, budget, extra=0):
    """Each chunk is cut down to `budget` entries, judged once; decoding adds to them.

    extra [tokens] on top per chunk: 64 gives the x axis of the paper's plots, which count the
    window of each chunk besides."""
    q, r = divmod(n, chunk)
    kept, rest = min(budget + extra, chunk), min(budget + extra, r)
    past = kept * (chunk * q * (q - 1) // 2 + q * r) + (q * kept + rest) * m
    whole, last = (q - 1) * kept + chunk if q else 0, q * kept + r if r else 0
    peak = max(whole, last, q * kept + rest + m)
    return share(q * tri(chunk) + tri(r) + past + tri(m), peak, n + m)


def streaming(n, m, chunk, sink, window):
    """sink + window past entries are kept after every step. window is the paper's W: past tokens
    *beside* the query (a cache whose window counts the query keeps one less)."""
    return heads(n, m, chunk, sink, window, Fraction(1))


def heads(n, m, chunk, sink, window, sparsity):
    """Streaming in a share `sparsity` of the heads (float or Fraction), full cache in the rest."""
    sparsity = Fraction(str(sparsity)) if isinstance(sparsity, float) else Fraction(sparsity)
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be in 0..1, got {sparsity}")
    kept, total = sink + window, n + m
    q, r = divmod(n, chunk)
    whole = min(q, -(-kept // chunk))  # chunks that still meet all that came before
    low = min(max(kept - n, 0), m)  # decoding steps that do
    past = chunk * (chunk * whole * (whole - 1) // 2 + (q - whole) * kept)
    past += r * min(q * chunk, kept)
    decoding = m + low * n + low * (low - 1) // 2 + (m - low) * kept
    cells = q * tri(chunk) + tri(r) + past + decoding
    # both kinds of heads hold most in the last whole chunk, the remainder or the last step
    steps = [(chunk, (q - 1) * chunk)] * (q > 0) + [(r, q * chunk)] * (r > 0)
    steps += [(1, total - 1)] * (m > 0)
    peaks = [t + sparsity * min(before, kept) + (1 - sparsity) * before for t, before in steps]
    return share(sparsity * cells + (1 - sparsity) * tri(total), max(peaks, default=0), total)


def rolling(n, m, chunk, budget, decode_evicts=True):
    """At most `budget` entries after every step, chosen anew (H2O, TOVA; Locret does not evict
    while decoding)."""
    q, r = divmod(n, chunk)
    steps, held = [chunk] * q + [r] * (r > 0), 0
    cells = peak = 0
    for i, t in enumerate(steps + [1] * m):
        cells, peak = cells + tri(t) + t * held, max(peak, t + held)
        evicts = decode_evicts or i < len(steps)
        held = min(held + t, budget) if evicts else held + t
    return share(cells, peak, n + m)


def critical(points, full_score, keep=0.9):
    """The smallest footprint at which the score, joined by straight lines between points
    (footprint, score), reaches keep * full_score. Returns (bound, footprint): "=" an interpolated
    one, "<" even the lowest point passes, ">" none does.

    A curve may dip and recover: the smallest footprint counts, not the first crossing from above
    (the paper's Table 2). Raises ValueError without points."""
    points, goal = sorted(points), keep * full_score
    if not points:
        raise ValueError("critical: no points")
    if points[0][1] >= goal:
        return "<", points[0][0]
    for (f0, s0), (f1, s1) in itertools.pairwise(points):
        if s1 >= goal:
            return "=", f0 + (goal - s0) * (f1 - f0) / (s1 - s0)
    return ">", points[-1][0]


# --- sweep: score against footprint --------------------------------------------------------------

@dataclass
class Config:
    model: str | None = flag(None, "folder of a Llama (default: the tiny model of the fact stream)")
    tasks: str = flag("facts", "comma-separated")
    lengths: str = flag("512", "of the prompts, comma-separated [tokens]")
    examples: int = flag(40, "of each task and length", least=1)
    curves: str | None = flag(None, "policies, POLICY+patch lets the prompt's end judge chunks "
                                    "(default: all, snapkv+patch, pyramidkv+patch; of a CEPE: "
                                    "cepe, and cepe+kv with projected keys and values)")
    shares: str = flag("0.05,0.1,0.2,0.3,0.5,0.7,0.9", "of the prompt (or of a chunk) to keep")
    chunk: int = flag(64, "prefill chunk [tokens]", least=1)
    obs_window: int = flag(8, "last queries that judge a chunk; a patch (paper: 64)", least=1)
    sink: int = flag(4, "first tokens that streaming heads keep (paper: 128)", least=0)
    window: int = flag(32, "last tokens that a mask's streaming heads see (paper: 1024)", least=1)
    heads: str | None = flag(None, "mask files, comma-separated (default: learned, tiny model)")
    scorer: str | None = flag(None, "scorer file for locret (default: learned, tiny model)")
    threshold: float = flag(0.9, "share of the full score that counts as kept", least=0)
    out_dir: str = flag("out/footprint", "where results.jsonl and the figures go")
    seed: int = flag(0, "of examples, tiny model and policy random", least=0)
    device: str = flag("cpu", "torch device")
    dtype: str = flag("float32", "of weights and cache", choices=tuple(DTYPES))
    resume: bool = flag(False, "keep the finished points in --out_dir and run the rest")
    overwrite: bool = flag(False, "drop them")


def learn(config, method, name, *flags):
    """A file that a method of train.py learns on the tiny model; kept for the next sweep."""
    words = [word.strip("-") for word in flags]
    code = code_fingerprint(train.__file__, prulong.__file__)[:8]  # other code learns anew
    name_of_run = "-".join([method, *words, f"seed{config.seed}", code])
    out = os.path.join(config.out_dir, name_of_run)
    path = os.path.join(out, name)
    if not os.path.exists(path):
        argv = ["--method", method, *flags, "--seed", str(config.seed), "--out_dir", out]
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            train.main([*argv, "--overwrite", "--device", config.device])
    return path


def masks(config) -> list:
    """(mask, its sink and window) from --heads, or learned on the tiny model at four sparsities."""
    paths = config.heads.split(",") if config.heads else []
    for sparsity in () if paths or config.model else ("0.25", "0.5", "0.75", "0.9"):
        flags = ["--target_sparsity", sparsity, "--sink", str(config.sink)]
        flags += ["--window", str(config.window), "--n_random", "1"]
        paths.append(learn(config, "prulong", "heads.tsv", *flags))
    return [(load_heads(path), load_pattern(path)) for path in paths]


PATCHED = ("snapkv+patch", "pyramidkv+patch")
# a CEPE's encoder reads all but a share of the context; whether keys and values are projected once
PARALLEL = {"cepe": False, "cepe+kv": True}


def points(config, model, length):
    """(curve, settings for make_cache) of every point of the sweep; what cannot run is said."""
    yield "full", dict(policy="full")
    shares = [float(x) for x in config.shares.split(",")]
    is_parallel = is_cepe(config.model)
    curves = config.curves or ",".join(PARALLEL if is_parallel else [*RULES, *PATCHED])
    for curve in dict.fromkeys(curves.split(",")):
        if curve in PARALLEL:
            if not is_parallel:
                raise ValueError(f"curve {curve} needs --model with a CEPE")
            for near in shares:
                yield curve, dict(policy="full", near=near, cache_kv=PARALLEL[curve])
            continue
        policy, _, patch = curve.partition("+")
        rule, settings = RULES[policy], dict(policy=policy)
        if "obs_window" in rule.takes:
            settings["obs_window"] = config.obs_window
        if patch:
            settings["patch"] = True
        if "heads" in rule.takes:
            found = masks(config)
            if not found:
                print(f"left out: {curve}, which needs --heads")
            sizes = dict(sink=config.sink, window=config.window)
            for mask, learned in found:  # with the sink and window that it was learned with
                yield curve, settings | sizes | learned | dict(heads=mask)
            continue
        if "scorer" in rule.takes:
            path = config.scorer
            if path is None and config.model is None:
                path = learn(config, "locret", "scorer.safetensors")
            if path is None:
                print(f"left out: {curve}, which needs --scorer")
                continue
            settings["scorer"] = load_scorer(path, model)
        if "window" in rule.takes:
            settings["sink"] = config.sink
        for kept in shares:
            budget = rule.sweep(kept, length)
            if budget is not None and budget.get("budget", config.sink + 1) > config.sink:
                yield curve, settings | budget


def run_point(model, tokenizer, examples, settings, config) -> dict:
    """Mean score, footprint and peak of one policy over examples."""
    start, rows, settings = time.perf_counter(), [], dict(settings)
    near, cache_kv = settings.pop("near", None), settings.pop("cache_kv", False)
    for example in examples:
        if near is not None:
            example = for_encoder(example, tokenizer, share=near)
        cache = make_cache(model, chunk=config.chunk, seed=config.seed, **settings)
        text, = answer(model, tokenizer, [example], cache, cache_kv=cache_kv)
        value = score(example.task, text, example)["score"]
        rows.append((value, *map(float, held(model, cache, 0, example, cache_kv))))
    means = [sum(column) / len(rows) for column in zip(*rows)]
    names = "score", "footprint", "peak"
    return dict(zip(names, means)) | {"seconds": round(time.perf_counter() - start, 3)}


def plain(value):
    """A setting as JSON: a mask as zeros and ones, a scorer by a sum of its weights."""
    if torch.is_tensor(value):
        return "".join(str(int(x)) for x in value.flatten())
    if isinstance(value, torch.nn.Module):
        return sum(p.double().abs().sum().item() for p in value.parameters())
    return value


# --- what came out -------------------------------------------------------------------------------

def table(results, threshold):
    """Print the critical footprint of each curve, per task and length. results: one sweep's."""
    print("\n| task | tokens | method | critical footprint | footprint -> score |")
    print("|---|---|---|---|---|")
    found = {}
    for (task, length), group in by(results, "task", "length"):
        whole = next(r["score"] for r in group if r["curve"] == "full")
        for (curve,), rows in by(group, "curve"):
            xy = sorted((r["footprint"], r["score"]) for r in rows)
            bound, value = critical(xy, whole, threshold)
            found[f"{task} {length} {curve}"] = [bound, round(value, 4)]
            shown = ", ".join(f"{f:.2f} -> {s:.2f}" for f, s in xy)
            print(f"| {task} | {length} | {curve} | {bound.strip('=')}{value:.3f} | {shown} |")
    return found


COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f",
           "#b2182b", "#542788", "#8c6d31", "#01665e")


def plot(path, curves, title, goal):
    """An SVG of curves {name: [(footprint, score)]}, both in 0..1; a dashed line at the goal."""
    left, top, width, height = 60, 40, 480, 340
    x = lambda value: left + width * value
    y = lambda value: top + height * (1 - value / 1.05)
    out = [f'<text x="{left}" y="22" font-size="14">{html.escape(title)}</text>',
           f'<text x="{x(0.5)}" y="{top + height + 36}" text-anchor="middle">KV footprint</text>',
           f'<text transform="translate(16 {y(0.5)}) rotate(-90)">score</text>']
    known = list(dict.fromkeys([*RULES, *PATCHED, *curves]))  # a method has one colour everywhere
    for i in range(6):
        a = i / 5
        out += [f'<path d="M{x(a)} {y(0)}V{top}M{left} {y(a)}H{x(1)}" stroke="#e5e5e5"/>',
                f'<text x="{x(a)}" y="{y(0) + 16}" text-anchor="middle">{a:g}</text>',
                f'<text x="{left - 8}" y="{y(a) + 4}" text-anchor="end">{a:g}</text>']
    out.append(f'<path d="M{left} {y(goal)}H{x(1)}" stroke="#555" stroke-dasharray="5 4"/>')
    for i, (name, points) in enumerate(curves.items()):
        colour, points = COLOURS[known.index(name) % len(COLOURS)], sorted(points)
        line = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
        out.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        out += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.6" fill="{colour}"/>'
                for a, b in points]
        at = top + 16 * i
        out += [f'<path d="M{x(1) + 14} {at}h18" stroke="{colour}" stroke-width="3"/>',
                f'<text x="{x(1) + 38}" y="{at + 4}">{html.escape(name)}</text>']
    write_svg(path, 720, 430, out)
    print(f"saved {path}")


def main():
    config, = parse([Config], description="Score against KV footprint of every eviction policy.")
    join(config.device)
    path = os.path.join(config.out_dir, "results.jsonl")
    tasks = list(dict.fromkeys(config.tasks.split(",")))
    lengths = list(dict.fromkeys(int(n) for n in config.lengths.split(",")))
    folder, tokenizer = config.model, None
    if folder is None:
        folder = os.path.join("out", f"tiny-seed{config.seed}")
        model = tiny_model(config.seed, folder).to(config.device, DTYPES[config.dtype])
    else:
        load_folder = load_cepe if is_cepe(folder) else load_model
        model = load_folder(folder, config.device, DTYPES[config.dtype])
        tokenizer = tokenizer_for(tasks, model, folder)
    rules = sorted({inspect.getsourcefile(rule) for rule in RULES.values()})
    about = {"weights": fingerprint(folder), "code": code_fingerprint(*rules),
             "n": config.examples, "seed": config.seed, "chunk": config.chunk,
             "dtype": config.dtype, "device": config.device}
    sweeps = {length: list(points(config, model, length)) for length in lengths}
    jobs = [(task, length, *point) for task in tasks for length in lengths
            for point in sweeps[length]]
    prompts = functools.cache(
        lambda task, length: build(task, config.examples, length, config.seed, tokenizer))
    for task, length in itertools.product(tasks, lengths):
        prompts(task, length)
    done = open_results(path, config)  # now that nothing is missing
    results, reused = [], 0
    for task, length, curve, settings in tqdm(jobs, "points", unit="point", disable=None):
        known = {name: plain(value) for name, value in settings.items()}
        key = json.dumps({**about, "task": task, "length": length, **known}, sort_keys=True)
        reused += key in done
        if key not in done:
            point = run_point(model, tokenizer, prompts(task, length), settings, config)
            done[key] = {"key": key, "task": task, "length": length, "curve": curve, **point}
            append_line(path, done[key])
            tqdm.write(f"{task} {length} {curve}: footprint {point['footprint']:.3f}, "
                       f"score {point['score']:.3f}")
        results.append(done[key] | {"curve": curve})
    found = table(results, config.threshold)
    print(f"\n{reused} of {len(jobs)} results reused; all are in {path}")
    for (task, length), group in by(results, "task", "length"):
        curves = {curve: [(r["footprint"], r["score"]) for r in rows]
                  for (curve,), rows in by(group, "curve")}
        goal = config.threshold * curves["full"][0][1]
        title = f"{task}, {length} tokens, n = {config.examples}"
        plot(os.path.join(config.out_dir, f"footprint-{task}-{length}.svg"), curves, title, goal)
    print(json.dumps({"critical": found, "threshold": config.threshold}))


if __name__ == "__main__":
    run(main)
