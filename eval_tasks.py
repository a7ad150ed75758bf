"""Long-context tasks and their scores: HELMET, LongProc and LitSearch, built on the spot or read from the benchmarks' files.

build(task, n, length, seed, tokenizer) makes examples of any length without a download; load(task, path) reads what the
benchmarks released; score(task, prediction, example) scores as they do. From top to bottom: text metrics, the scorers, how an
example is fitted to a length, HELMET's kinds of task, LongProc's procedures, the official files, LitSearch, the fact stream
on which the tiny model lives, and the evaluation of a model.

Scores on built tasks are not the benchmarks' scores. Papers: HELMET 2410.02694, LongProc 2501.05414, LitSearch 2407.18940.

    python eval_tasks.py                    # trains the tiny model if need be and shows its recall by distance
    python eval_tasks.py --model DIR --tasks niah_s,icl,rag --lengths 1024,2048 --n 20 --policy full,snapkv --keep 0.25
"""
import ast
import contextlib
import csv
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import meco
from evict import ATTENTION_RULES, POLICIES, make_cache
from model import (DTYPES, Batch, Llama, LlamaConfig, append_line, byte_tokenizer, causal, check_device, cross_entropy, dealt, flag, generate,
                   join_processes, load_model, load_tokenizer, parse, processes, run, save_model, stream, wait_for_all)
from prulong import load_heads

# --- text metrics -----------------------------------------------------------------------------------------------------

def normalize(text) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no articles, single spaces."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def parse_output(text, prefix) -> str:
    """What follows `prefix` (a regular expression, case ignored) on its line, or else the first line."""
    found = re.search(f"(?:{prefix})(.*)(?:\n|$)", text, re.IGNORECASE)
    line = (found[1] if found else text.split("\n")[0]).strip()
    return re.sub(f"^(?:{prefix})", "", line, flags=re.IGNORECASE).strip()


def word_f1(prediction, gold) -> float:
    """F1 of the multisets of normalised words; yes, no and noanswer only match themselves."""
    a, b = normalize(prediction), normalize(gold)
    if a != b and {a, b} & {"yes", "no", "noanswer"}:
        return 0.0
    same = sum((Counter(a.split()) & Counter(b.split())).values())
    return 2 * same / (len(a.split()) + len(b.split())) if same else 0.0


def consonants(word) -> str:
    """The word with c for consonants and v for vowels; y is a vowel after a consonant."""
    kinds = ""
    for i, letter in enumerate(word):
        vowel = letter in "aeiou" or letter == "y" and i > 0 and kinds[-1] == "c"
        kinds += "v" if vowel else "c"
    return kinds


def measure(stem) -> int:
    """Porter's m: how often a vowel is followed by a consonant."""
    return consonants(stem).count("vc")


def ends_cvc(word) -> bool:
    kinds = consonants(word)
    return kinds[-3:] == "cvc" and word[-1] not in "wxy" or kinds == "vc"


IRREGULAR = {"skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news", "innings": "inning",
             "inning": "inning", "outings": "outing", "outing": "outing", "cannings": "canning", "canning": "canning",
             "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed"}
STEP_2 = dict(pair.split(":") for pair in (
    "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble alli:al entli:ent eli:e ousli:ous ization:ize ation:ate ator:ate "
    "alism:al iveness:ive fulness:ful ousness:ous aliti:al iviti:ive biliti:ble fulli:ful").split())
STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
STEP_4 = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize".split()


def stem(word) -> str:
    """Porter's stemmer with NLTK's extensions, which ROUGE's usual implementation uses (Porter 1980)."""
    if word in IRREGULAR or len(word) <= 2:
        return IRREGULAR.get(word, word)
    if word.endswith("ies"):  # step 1a: plurals
        word = word[:-1] if len(word) == 4 else word[:-2]
    elif word.endswith("sses"):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    word = past_and_gerund(word)
    if word.endswith("y") and len(word) > 2 and consonants(word)[-2] == "c":  # step 1c
        word = word[:-1] + "i"
    if word.endswith("alli") and measure(word[:-4]) > 0:  # step 2
        word = word[:-2]
    if word.endswith("logi") and not any(word.endswith(s) for s in STEP_2):
        word = word[:-1] if measure(word[:-3]) > 0 else word
    else:
        word = replace_suffix(word, STEP_2)
    word = replace_suffix(word, STEP_3)
    suffix = next((s for s in STEP_4 if word.endswith(s)), None)
    if suffix and measure(word[:-len(suffix)]) > 1 and (suffix != "ion" or word[-4] in "st"):
        word = word[:-len(suffix)]
    if word.endswith("e") and (measure(word[:-1]) > 1 or measure(word[:-1]) == 1 and not ends_cvc(word[:-1])):  # step 5
        word = word[:-1]
    return word[:-1] if word.endswith("ll") and measure(word[:-1]) > 1 else word


def replace_suffix(word, rules) -> str:
    """The first rule whose suffix fits decides: it is applied if what is left has measure > 0."""
    for suffix, new in rules.items():
        if word.endswith(suffix):
            return word[:-len(suffix)] + new if measure(word[:-len(suffix)]) > 0 else word
    return word


def past_and_gerund(word) -> str:
    """Porter's step 1b: -ied, -eed, -ed, -ing."""
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if measure(word[:-3]) > 0 else word
    rest = next((word[:-len(s)] for s in ("ed", "ing") if word.endswith(s) and "v" in consonants(word[:-len(s)])), None)
    if rest is None:
        return word
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if len(rest) > 1 and rest[-1] == rest[-2] and consonants(rest)[-1] == "c":
        return rest if rest[-1] in "lsz" else rest[:-1]
    return rest + "e" if measure(rest) == 1 and ends_cvc(rest) else rest


def rouge_words(text):
    words = re.sub(r"[^a-z0-9]+", " ", text.lower()).split()
    return [stem(w) if len(w) > 3 else w for w in words]


def common_subsequence(a, b):
    """Indices into a of one longest common subsequence of the lists a and b."""
    table = [[0] * (len(b) + 1)]
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(table[-1][j] + 1 if x == y else max(table[-1][j + 1], row[j]))
        table.append(row)
    i, j, found = len(a), len(b), []
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            found.append(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return found[::-1]


def f_measure(precision, recall) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def rouge_l(prediction, gold, by_line=False):
    """ROUGE-L (F1, recall); by_line takes the union of each gold line's matches with all predicted lines (ROUGE-Lsum).

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", sections 3.1 and 3.2."""
    lines = lambda text: [words for part in (text.split("\n") if by_line else [text]) if (words := rouge_words(part))]
    predicted, golds = lines(prediction), lines(gold)
    n_predicted, n_gold = sum(map(len, predicted)), sum(map(len, golds))
    if not n_predicted or not n_gold:
        return 0.0, 0.0
    left, left_gold = (Counter(w for words in side for w in words) for side in (predicted, golds))
    same = 0
    for words in golds:
        for i in sorted({i for other in predicted for i in common_subsequence(words, other)}):
            if left[words[i]] > 0 and left_gold[words[i]] > 0:  # no word counts more often than either side has it
                left[words[i]] -= 1
                left_gold[words[i]] -= 1
                same += 1
    return f_measure(same / n_predicted, same / n_gold), same / n_gold


# --- HELMET's scorers: text is the answer prefix and the prediction, example holds the gold ----------------------------

def flat(answers):
    """All strings of an answer: a string, a list, or a list of lists of aliases."""
    return [answers] if isinstance(answers, str) else [x for a in answers for x in flat(a)]


def text_metrics(prediction, answers) -> dict:
    """Each metric's best over all gold answers, 0..1."""
    scores = []
    for gold in flat(answers):
        (l_f1, l_recall), (sum_f1, sum_recall) = rouge_l(prediction, gold), rouge_l(prediction, gold, by_line=True)
        scores.append({"exact_match": float(normalize(prediction) == normalize(gold)), "f1": word_f1(prediction, gold),
                       "substring_exact_match": float(normalize(gold) in normalize(prediction)), "rougeL_f1": l_f1,
                       "rougeL_recall": l_recall, "rougeLsum_f1": sum_f1, "rougeLsum_recall": sum_recall})
    return {name: max(s[name] for s in scores) for name in scores[0]}


def best_of_both(text, answers, prefix) -> dict:
    """The better, metric by metric, of the whole text and what follows the prefix."""
    whole, parsed = text_metrics(text, answers), text_metrics(parse_output(text, prefix), answers)
    return {name: max(whole[name], parsed[name]) for name in whole}


def score_choice(text, example) -> dict:
    """Multiple choice: golds are the letter and the whole option."""
    scores = best_of_both(text, example["answer"], "Answer:")
    said = float(example["answer"][1].lower() in text.lower())
    return scores | {"substring_exact_match": said, "exact_match": max(said, scores["exact_match"])}


def score_ruler(text, example) -> dict:
    """RULER: share of the golds that the text contains."""
    golds = flat(example.get("answer", example.get("outputs")))
    return {"ruler_recall": sum(g.lower() in text.lower() for g in golds) / len(golds)}


def parse_ranking(text) -> dict:
    """Ids of the longest `1 > 2 > 3` in a text, best first, each with a falling score."""
    text = re.sub(r"[\[\]:]", "", text).lower().replace("id", "")
    chains = [m[0] for m in re.finditer(r"(\d+)(?:\s*>\s*(\d+))*", text)]
    ids = [x.strip() for x in max(chains, key=len).split(">")] if chains else [text]
    scores = {}
    for i, x in enumerate(ids):
        scores.setdefault(x, len(ids) - i)
    return scores


def ranking_metrics(scores: dict, labels: dict, k_values) -> dict:
    """NDCG, MAP, recall and precision at k and MRR as trec_eval computes them: ties by id, the last first; 5 decimals.

    scores {id: float}, labels {id: relevance}. NDCG's gain is the label, its discount log2(rank + 1)."""
    ranked = [max(0, labels.get(i, 0)) for i in sorted(scores, key=lambda i: (scores[i], i), reverse=True)]
    ideal, n_relevant = sorted((max(0, x) for x in labels.values()), reverse=True), sum(x > 0 for x in labels.values())
    dcg = lambda gains: sum(g / math.log2(i + 2) for i, g in enumerate(gains))
    precision = lambda k: sum(g > 0 for g in ranked[:k]) / k
    out = {}
    for k in k_values:
        out[f"NDCG@{k}"] = dcg(ranked[:k]) / dcg(ideal[:k]) if n_relevant else 0.0
        out[f"MAP@{k}"] = sum(precision(i + 1) for i, g in enumerate(ranked[:k]) if g > 0) / n_relevant if n_relevant else 0.0
        out[f"Recall@{k}"] = precision(k) * k / n_relevant if n_relevant else 0.0
        out[f"P@{k}"] = precision(k)
    out["MRR"] = next((1 / (i + 1) for i, g in enumerate(ranked) if g > 0), 0.0)
    return {name: round(x, 5) for name, x in out.items()}


def score_rerank(text, example) -> dict:
    scores = parse_ranking(text)
    labels = {i: int(label) for i, label in example["qrel"]}
    k_values = example.get("k_values") or [k for k in (1, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= len(labels)]
    return ranking_metrics(scores, labels, k_values) | {"num_preds": len(scores)}


def remove_citations(text) -> str:
    return re.sub(r"\[\d+", "", re.sub(r" \[\d+", "", text)).replace(" |", "").replace("]", "")


def score_asqa(text, example) -> dict:
    """ALCE's ASQA without citations, 0..100: share of the sub-questions one of whose short answers is in the text."""
    text = remove_citations(re.sub("\n+", " ", text.replace("<|im_end|>", "")).strip())
    found = [any(normalize(a) in normalize(text) for a in pair["short_answers"]) for pair in example.get("qa_pairs") or []]
    return {"length": float(len(text.split())), "str_em": 100 * sum(found) / len(found) if found else 0.0,
            "str_hit": 100.0 * (all(found) and bool(found))}


def score_qampari(text, example) -> dict:
    """ALCE's QAMPARI, 0..100: a comma list against gold entities with aliases; top5 asks for five of them at most."""
    shown = score_asqa(text, {})
    text = remove_citations(re.sub("\n+", " ", text.replace("<|im_end|>", "")).strip())
    said = [n for x in text.rstrip().rstrip(".").rstrip(",").split(",") if (n := normalize(x.strip()))]
    golds = [[normalize(alias) for alias in aliases] for aliases in example["answers"]]
    precision = sum(any(x in g for g in golds) for x in said) / len(said) if said else 0.0
    n_hit = sum(any(x in g for x in said) for g in golds)
    recall, top5 = n_hit / len(golds), min(5, n_hit) / min(5, len(golds))
    return shown | {"num_preds": float(len(said)), "qampari_prec": 100 * precision, "qampari_rec": 100 * recall,
                    "qampari_rec_top5": 100 * top5, "qampari_f1": 100 * f_measure(precision, recall),
                    "qampari_f1_top5": 100 * f_measure(precision, top5)}


# --- LongProc's scorers ------------------------------------------------------------------------------------------------

def tagged(text, tag):
    """What stands between the first <tag> and the first </tag>, or None."""
    start, end = text.find(f"<{tag}>"), text.find(f"</{tag}>")
    return None if start < 0 or end < 0 else text[start + len(tag) + 2:end].strip()


def procedure_scores(accuracy, partial, extracted) -> dict:
    return {"accuracy": float(accuracy), "partial_accuracy": float(partial), "extraction_rate": float(extracted)}


def first_difference(predicted, gold):
    """Index of the first pair that differs, or None if no compared pair does."""
    return next((i for i, (a, b) in enumerate(zip(predicted, gold)) if a != b), None)


def read_table(text):
    """Header and rows of a TSV text; rows of another width become N/A, a last one is dropped. None if it is no table."""
    rows = list(csv.reader(text.strip().split("\n"), delimiter="\t"))
    if len(rows) < 2 or len(set(rows[0])) < len(rows[0]):
        return None
    header, rows = rows[0], rows[1:]
    if len(rows[-1]) != len(header):
        rows = rows[:-1]
    rows = [row if len(row) == len(header) else ["N/A"] * len(header) for row in rows]
    return header, [tuple(normalize(cell).replace(" ", "") for cell in row) for row in rows]


def score_table(text, example) -> dict:
    """HTML to TSV: rows found in the gold, and gold rows found, whatever their order."""
    fenced = re.search(r"```tsv(.*)```", text, re.DOTALL) or re.search(r"```tsv(.*)", text, re.DOTALL)
    failed = {"f1": 0.0, "precision": 0.0, "recall": 0.0, "extraction_rate": 0.0}
    try:
        predicted, gold = read_table(fenced[1] if fenced else text), read_table(example["reference_output"])
    except csv.Error:
        return failed
    if not predicted or not predicted[1] or len(predicted[0]) != len(gold[0]):
        return failed
    precision = sum(row in gold[1] for row in predicted[1]) / len(predicted[1])
    recall = sum(row in predicted[1] for row in gold[1]) / len(gold[1])
    return {"f1": f_measure(precision, recall), "precision": precision, "recall": recall, "extraction_rate": 1.0}


def score_path(text, example) -> dict:
    """Path traversal: the route must be the gold one; partial credit up to the first wrong line, that one included."""
    route, gold = tagged(text, "Route"), example["reference_output"].strip()
    if route is None:
        return procedure_scores(0, 0, 0)
    lines, golds = route.split("\n"), gold.split("\n")
    wrong = first_difference(lines, golds)
    partial = (min(len(lines), len(golds)) if wrong is None else wrong + 1) / len(golds)
    return procedure_scores(route == gold, partial, 1)


def belief_lines(text):
    drop = set("a an the on in at step think thinks believe believes is are of location know knows belief".split())
    clean = lambda line: line.lower().replace("\u2019", "").translate(str.maketrans("", "", string.punctuation)).split()
    return [[w for w in clean(line) if w not in drop] for line in text.strip().split("\n") if line.startswith("-")]


def score_beliefs(text, example) -> dict:
    """Theory of mind: the trace, a line a step, must be the gold one."""
    lines, golds = belief_lines(text), belief_lines(example["reference_output"])
    wrong = first_difference(lines, golds)
    partial = (min(len(lines), len(golds)) if wrong is None else wrong) / len(golds)
    return procedure_scores(lines == golds, partial, 1)


def solves(lines, numbers, target) -> bool:
    """Three equations `a op b = c` that use each number once and end at the target; nothing is evaluated as code."""
    left = Counter(numbers)
    if len(lines) != 3:
        return False
    for line in lines:
        found = re.fullmatch(r"\s*(-?(?:0|[1-9]\d{0,8}))\s*([-+*/])\s*(-?(?:0|[1-9]\d{0,8}))\s*=\s*([-+]?\d{1,18})\s*", line, re.ASCII)
        if not found or "-" in (found[1] + found[3]) and found[2] != "+":
            return False
        a, b, c = int(found[1]), int(found[3]), int(found[4])
        exact = b != 0 and a == b * c if found[2] == "/" else c == {"+": a + b, "-": a - b, "*": a * b}[found[2]]
        if not exact:
            return False
        for x in (a, b):
            if not left[x]:
                return False
            left[x] -= 1
        left[c] += 1
    return c == target


def search_lines(text):
    """What follows the last `# Search Procedure` up to an empty line, line by line, or None."""
    return text.split("# Search Procedure")[-1].strip().split("\n\n")[0].split("\n") if "# Search Procedure" in text else None


def same_search_line(line, gold) -> bool:
    if line == gold or "|- Try" not in gold:
        return line == gold
    return line.split("=")[0] == gold.split("=")[0] and ("drop this branch" in line) == ("drop this branch" in gold)


def score_countdown(text, example) -> dict:
    """Countdown: any right solution counts; without one, partial credit follows the gold search line by line: the index of the first
    wrong line, or of the last compared one, over the number of lines (-1 / n if there is none, as released)."""
    item, solution = example["item"], tagged(text, "Solution")
    extracted = solution is not None
    if extracted and solves(solution.split("\n"), item["nums"], item["target"]):
        return procedure_scores(1, 1, 1)
    lines, golds = search_lines(text), search_lines(example["reference_output"])
    if lines is None or lines[0].strip() != golds[0].strip():
        return procedure_scores(0, 0, extracted)
    pairs = list(zip(lines[1:], golds[1:]))
    wrong = next((i for i, pair in enumerate(pairs) if not same_search_line(*pair)), len(pairs) - 1)
    return procedure_scores(0, wrong / (len(golds) - 1), extracted)


def parse_plan(plan):
    """[(city, days)] of a travel plan's lines; the days between two flights are a stay."""
    cities, days, end = [], [1], None
    for line in plan.split("\n"):
        if found := re.search(r"(?<!\d)\d{1,9}-\d{1,9}(?!\d)", line):
            end = int(found[0].split("-")[1])
        if flight := re.match(r".*Day (\d{1,9})(?!\d).*from (\w+) to (\w+)", line):
            cities += [flight[2]] * (not cities) + [flight[3]]
            days.append(int(flight[1]))
    if end is None:
        return []
    days.append(end)
    return list(zip(cities, [b - a + 1 for a, b in zip(days, days[1:])]))


def score_travel(text, example) -> dict:
    """Travel planning: all cities with all stays in order; without that, partial credit along the gold procedure."""
    item, plan = example["item"], tagged(text, "Plan")
    gold = list(zip(item["ground_truth_cities"].split("**"), map(int, item["ground_truth_durations"].split("**"))))
    if plan is not None and parse_plan(plan) == gold:
        return procedure_scores(1, 1, 1)
    lines, golds = procedure_lines(text), procedure_lines(example["reference_output"])
    if not lines:
        return procedure_scores(0, 0, plan is not None)
    wrong = next((i for i, (line, g) in enumerate(zip(lines, golds)) if g not in line), min(len(lines), len(golds)) - 1)
    return procedure_scores(0, wrong / len(golds), plan is not None)


def procedure_lines(text):
    """Normalised lines of a travel procedure and its plan, without the sentence between them."""
    return [n for line in text.replace("Output the plan in the required format:", "").split("\n") if (n := normalize(line))]


CPP_HEADERS = "".join(f"#include <{name}>\n" for name in (
    "cstdio iostream vector algorithm numeric cmath cstring set map queue stack list fstream climits cassert iomanip sstream "
    "bitset").split()) + "using namespace std;\n"
LIMITS = {"RLIMIT_AS": 2 ** 30, "RLIMIT_FSIZE": 2 ** 24, "RLIMIT_NPROC": 256, "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0}  # bytes, counts
ALONE = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]  # no network; all processes die with the first


def run_limited(command, folder, stdin, seconds):
    """Output of a command, or None on a timeout.

    Limits on memory, CPU time, file size, processes and open files, an empty environment, a folder of its own; where the kernel
    lets a user have namespaces also no network and no process that outlives the command (elsewhere its process group is
    killed): damage control for code a model wrote, not a sandbox."""
    limits = "; ".join(f"resource.setrlimit(resource.{name}, ({n}, {n}))" for name, n in (LIMITS | {"RLIMIT_CPU": seconds + 1}).items())
    start = f"import os, resource, sys; {limits}; os.execvp(sys.argv[1], sys.argv[1:])"
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen([*(ALONE if has_namespaces() else []), sys.executable, "-I", "-c", start, *command], cwd=folder,
                                 env={"PATH": os.environ.get("PATH", "")}, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.DEVNULL,
                                 start_new_session=True)
        try:
            child.communicate(stdin.encode(), timeout=seconds)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        out.seek(0)
        return out.read(2 ** 24).decode("utf-8", errors="replace")


@functools.cache
def has_namespaces() -> bool:
    """True if a command can be run alone, as ALONE says."""
    return shutil.which("unshare") is not None and subprocess.run(
        [*ALONE, "true"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def score_code(text, example) -> dict:
    """Pseudo-code to C++: compiled and run on the first ten tests; output must be right to the byte.

    Runs what a model wrote: the command line asks for --allow_code_exec. Raises ValueError where there is no g++."""
    if not shutil.which("g++"):
        raise ValueError("pseudo_to_code needs g++")
    fenced = re.search(r"```(?:cpp|c\+\+)(.*)```", text, re.DOTALL)
    if not fenced:
        return procedure_scores(0, 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "main.cpp"), "w", encoding="utf-8", errors="replace") as f:
            f.write(CPP_HEADERS + fenced[1])
        run_limited(["g++", "-std=c++11", "-O", "main.cpp", "-o", "main"], folder, "", 60)
        right = os.path.exists(os.path.join(folder, "main")) and all(
            run_limited(["./main"], folder, "\n".join(given) + "\n", 3) == "\n".join(wanted) + "\n"
            for given, wanted in example["item"]["testcases"][:10])
    return procedure_scores(right, right, 1)


SCORERS = {
    "qa": lambda text, example: best_of_both(text, example["answer"], "Answer:"),
    "ruler_qa": lambda text, example: best_of_both(text, example["answer"], "Answer:"),
    "json_kv": lambda text, example: best_of_both(text, example["answer"], "corresponding value:"),
    "lexsum_rouge": lambda text, example: best_of_both(text, example["answer"], "Summary:"),
    "icl": lambda text, example: text_metrics(parse_output(text, "label:"), example["answer"]),
    "choice": score_choice, "ruler_recall": score_ruler, "rerank": score_rerank,
    "ndcg": lambda text, example: ranking_metrics(example["scores"], example["qrel"], example["k_values"]),
    "alce_asqa": score_asqa, "alce_qampari": score_qampari,
    "parse_output": lambda text, example: {"parsed": parse_output(text, example["prefix_arg"])},
    "normalize_answer": lambda text, example: {"normalized": normalize(text)},
    "remove_citations": lambda text, example: {"text": remove_citations(text)},
    "html_to_tsv": score_table, "path_traversal": score_path, "tom_tracking": score_beliefs, "countdown": score_countdown,
    "travel_planning": score_travel, "pseudo_to_code": score_code,
}


# --- examples ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Example:
    """A prompt (token ids), how much to generate, and the answer or reference that the scorer compares with.

    Text tasks also hold the prompt's text `user`, the answer `prefix` that ends it (completion mode; empty in a chat) and
    the scorer's `gold`. n_cut counts the context tokens that did not fit into the length asked for."""
    task: str
    prompt: list
    answer: object
    max_new_tokens: int
    user: str = ""
    prefix: str = ""
    gold: dict | None = None
    n_cut: int = 0


class Draft(NamedTuple):
    """A prompt in parts: only the context may be cut. The answer prefix follows in completion mode."""
    before: str
    context: str
    after: str
    prefix: str
    gold: dict  # what the scorer takes; its "answer" or "reference_output" is the right answer


class Task(NamedTuple):
    """make(rng, m) drafts an example with m items of context; main is the metric that is the task's score."""
    make: object
    scorer: str
    main: str
    max_new_tokens: int
    least: int = 1  # items
    stop_newline: bool = False  # where the scorer reads no further


def to_ids(tokenizer, user, prefix, chat):
    """Prompt ids: one user turn, or the text and the answer prefix on a line of its own."""
    if chat:
        return tokenizer.encode(tokenizer.chat([{"role": "user", "content": user}]))
    return tokenizer.document(user + ("\n" + prefix if prefix else ""))


def to_example(task, draft, tokenizer, chat, max_new_tokens, length=None) -> Example:
    """The example of a draft; a context too long for `length` tokens loses its end. ValueError if that is not enough."""
    ids = to_ids(tokenizer, draft.before + draft.context + draft.after, draft.prefix, chat)
    context, n_cut = draft.context, 0
    while length is not None and len(ids) > length:
        tokens = tokenizer.encode(context)
        n_over = len(ids) - length
        if n_over >= len(tokens):
            raise ValueError(f"task {task}: the prompt takes {len(ids) - len(tokens)} tokens without its context, more than {length}")
        context, n_cut = tokenizer.decode(tokens[:len(tokens) - n_over]).rstrip("\ufffd"), n_cut + n_over
        ids = to_ids(tokenizer, draft.before + context + draft.after, draft.prefix, chat)
    answer = draft.gold.get("answer", draft.gold.get("reference_output"))
    return Example(task, ids, answer, max_new_tokens, draft.before + context + draft.after, "" if chat else draft.prefix,
                   draft.gold, n_cut)


LONGEST = 2 ** 21  # tokens of a prompt


def largest(fits, low) -> int:
    """The largest m >= low with fits(m), by doubling and halving; fits(low) must hold."""
    step = 1
    while fits(low + step):
        step *= 2
    high = low + step  # does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def padding(rng, n) -> str:
    """n letters that mean nothing, in a paragraph of their own: a token or two each."""
    return " ".join(rng.choice(string.ascii_lowercase) for _ in range(n)) + "\n\n" if n else ""


def build_one(name, i, length, seed, tokenizer, chat=False) -> Example:
    """Example i of a procedural task whose prompt has `length` tokens: as many items as fit, then padding."""
    task = TASKS[name]
    make = lambda m: task.make(random.Random(f"{name}-{seed}-{i}"), m)  # the same for a given i, whatever n is
    pad = lambda draft, n: draft._replace(before=padding(random.Random(i), n) + draft.before)
    size = lambda draft: len(to_ids(tokenizer, draft.before + draft.context + draft.after, draft.prefix, chat))
    if (need := size(make(task.least))) > length:
        raise ValueError(f"task {name} needs prompts of at least {need} tokens, got {length}")
    draft = make(largest(lambda m: size(make(m)) <= length, task.least))
    draft = pad(draft, largest(lambda n: size(pad(draft, n)) <= length, 0))
    example = to_example(name, draft, tokenizer, chat, task.max_new_tokens)
    needed = 11 * len(tokenizer.encode(example.gold.get("reference_output", ""))) // 10  # small vocabularies take more tokens
    return replace(example, max_new_tokens=max(needed, task.max_new_tokens))


def build(task, n, length, seed, tokenizer=None, chat=False) -> list[Example]:
    """n examples of a procedural task whose prompts are `length` tokens long (within 2 %), the same on every machine.

    tokenizer: the model's; raw bytes by default. chat: in the tokenizer's chat format. Raises ValueError for an unknown task
    or a length that is too short for it or above 2^21."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: one of {', '.join(TASKS)}")
    if not 1 <= length <= LONGEST:
        raise ValueError(f"want a length of 1 to {LONGEST} tokens, got {length}")
    if task == "facts":
        return build_facts(n, length, seed, tokenizer)
    return [build_one(task, i, length, seed, tokenizer or byte_tokenizer(), chat) for i in range(n)]


def task_of(name):
    """The Task of a built task's name, the Official of a benchmark's, with or without "helmet:" or "longproc:" before it."""
    return TASKS.get(name) or OFFICIAL[name.split(":")[-1]]


def score(task, prediction, example) -> dict:
    """All metrics of a prediction (text; ids for task facts), and as "score" the task's main one, in 0..1."""
    if task == "facts":
        return {"score": float(prediction == example.answer)}
    kind = task_of(task)
    metrics = SCORERS[kind.scorer](example.prefix + prediction, example.gold)
    return {"score": metrics[kind.main] / (100 if kind.scorer.startswith("alce") else 1), **metrics}


# --- invented words --------------------------------------------------------------------------------------------------------

NOUNS = ("river lamp garden bridge window castle forest candle market ladder harbor mirror basket meadow anchor pillow violin "
         "kettle tunnel island saddle curtain pepper rocket blanket compass hammer tower valley lantern button carpet feather "
         "marble orchard pocket ribbon shovel statue thread wagon whistle cabin dragon engine").split()
ADJECTIVES = ("amber brave calm dusty eager faint gentle hollow icy jolly keen lively mellow narrow odd pale quiet rapid silent "
              "tall urban vivid warm young zesty bold crisp dim early fresh").split()
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "el", "or")]
RELATIONS = (("was born in", "Where was {} born?"), ("works as a", "What does {} work as?"), ("keeps a", "What does {} keep?"),
             ("collects old", "What does {} collect?"), ("lives beside the", "What does {} live beside?"))
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def names(rng, n):
    """n distinct invented one-word names."""
    found = {}
    while len(found) < n:
        found["".join(rng.choice(SYLLABLES) for _ in range(3)).capitalize()] = None
    return list(found)


def keys(rng, n):
    """n distinct keys such as brave-otter-271."""
    found = {}
    while len(found) < n:
        found[f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}" + (f"-{rng.randrange(1000)}" if n > 500 else "")] = None
    return list(found)


def number7(rng):
    return str(rng.randrange(10 ** 6, 10 ** 7))


def uuid(rng):
    h = f"{rng.getrandbits(128):032x}"
    return "-".join((h[:8], h[8:12], h[12:16], h[16:20], h[20:]))


def sentence(rng):
    """One of many plain sentences that say nothing."""
    return (f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(('stood', 'lay', 'waited', 'was left'))} "
            f"{rng.choice(('near', 'behind', 'under', 'beside'))} a {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}.")


# --- HELMET's kinds of task ---------------------------------------------------------------------------------------------------

def needle(kind, key, value):
    return f"One of the special magic {kind}s for {key} is: {value}."


def ask_needle(kind, key, answers, lines, several=False):
    """RULER's frame around a haystack of lines (arXiv:2404.06654)."""
    what = f"{kind}s for {key}" if several else f"{kind} for {key}"
    return Draft(f"Special magic {kind}s are hidden in the text below. Remember them: you will be asked about them.\n", "\n".join(lines),
                 f"\nWhat {'are all the' if several else 'is the'} special magic {what} mentioned in the provided text?",
                 f"The special magic {what} mentioned in the provided text {'are' if several else 'is'}", {"answer": answers})


def niah_single(rng, m):
    key, value = keys(rng, 1)[0], number7(rng)
    lines = [NOISE] * m
    lines.insert(rng.randrange(m + 1), needle("number", key, value))
    return ask_needle("number", key, [value], lines)


def niah_multikey(rng, m):
    pairs = [(key, number7(rng)) for key in keys(rng, m)]
    key, value = rng.choice(pairs)
    return ask_needle("number", key, [value], [needle("number", *pair) for pair in pairs])


def niah_uuid(rng, m):
    pairs = [(uuid(rng), uuid(rng)) for _ in range(m)]
    key, value = rng.choice(pairs)
    return ask_needle("uuid", key, [value], [needle("uuid", *pair) for pair in pairs])


def niah_multivalue(rng, m):
    key, values = keys(rng, 1)[0], [number7(rng) for _ in range(4)]
    lines = [sentence(rng) for _ in range(m)]
    for value in values:
        lines.insert(rng.randrange(len(lines) + 1), needle("number", key, value))
    return ask_needle("number", key, values, lines, several=True)


def json_kv(rng, m):
    demos, pairs = [[(uuid(rng), uuid(rng)) for _ in range(n)] for n in (2, m)]
    key, value = rng.choice(pairs)
    data = "{" + ",\n ".join(f'"{k}": "{v}"' for k, v in pairs) + "}"
    shown = "".join(f"Key: {k}\nCorresponding value: {v}\n\n" for k, v in demos)
    return Draft("JSON data:\n", data, f"\n\nFind the value that belongs to a key of the JSON object above.\n\n{shown}Key: {key}",
                 "Corresponding value:", {"question": key, "answer": [value]})


def passages(documents):
    return "\n\n".join(f"Document (Title: {title}): {text}" for title, text in documents)


def about(rng, person, facts):
    """A passage: a few facts about a person among sentences that say nothing."""
    told = [f"{person} {RELATIONS[r][0]} {thing}." for r, thing in facts.items()]
    return person, " ".join(x for fact in told for x in (fact, sentence(rng)))


def people_and_facts(rng, m):
    people = names(rng, m)
    return people, [{r: f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for r in rng.sample(range(len(RELATIONS)), 3)} for _ in people]


def rag(rng, m):
    """Passages about m invented people; the question asks for one fact of one of them. Two worked examples come first."""
    people, facts = people_and_facts(rng, m + 4)
    documents = [about(rng, p, f) for p, f in zip(people, facts)]

    def asked(i):
        r = rng.choice(sorted(facts[i]))
        return RELATIONS[r][1].format(people[i]), facts[i][r]
    demos = ""
    for i in (0, 2):
        question, answer = asked(i)
        demos += f"{passages(documents[i:i + 2])}\n\nQuestion: {question}\nAnswer: {answer}\n\n"
    question, answer = asked(4 + rng.randrange(m))
    return Draft(f"Answer the question with the given documents, in a few words and nothing else.\n\n{demos}",
                 passages(documents[4:]), f"\n\nQuestion: {question}", "Answer:", {"question": question, "answer": [answer]})


def rerank(rng, m):
    """Passages that hold 3, 2, 1 or none of a query's three words are to be ranked by that."""
    def ranked(n):
        words = rng.sample(NOUNS, 6)
        ids, labels = rng.sample(range(100, 100 + 20 * n + 20), n), [rng.choice((0, 0, 0, 1, 2, 3)) for _ in range(n)]
        labels[rng.randrange(n)] = 3
        texts = []
        for label in labels:
            used = rng.sample(words[:3], label) + rng.sample(words[3:], 3 - label)
            texts.append(" ".join(f"The {rng.choice(ADJECTIVES)} {word} is described at length." for word in rng.sample(used, 3)))
        body = "\n\n".join(f"[ID: {i}] Document: {text}" for i, text in zip(ids, texts))
        order = sorted(range(n), key=lambda i: -labels[i])
        return body, " ".join(words[:3]), " > ".join(str(ids[i]) for i in order), [[str(i), str(x)] for i, x in zip(ids, labels)]
    demos = ""
    for _ in range(2):
        body, query, ranking, _ = ranked(4)
        demos += f"{body}\n\nQuery: {query}\nRanking: {ranking}\n\n"
    body, query, ranking, qrel = ranked(m)
    return Draft("Rank the documents by how much they have to do with the query, the best first: ID > ID > ID. Write at most "
                 f"ten IDs and nothing else.\n\n{demos}", body, f"\n\nQuery: {query}", "Ranking:",
                 {"answer": ranking, "qrel": qrel, "k_values": [1, 5, 10]})


def icl(rng, m, n_label=12):
    """Texts of n_label invented classes, told apart by their words; the labels are shuffled numbers."""
    words = rng.sample(NOUNS, 3 * n_label)
    labels = rng.sample(range(n_label), n_label)

    def text(c):
        own = rng.choice(words[3 * c:3 * c + 3])
        looks = f"{rng.choice(ADJECTIVES)} {rng.choice(ADJECTIVES)} {own} with a {rng.choice(ADJECTIVES)}"
        return f"{looks} {rng.choice(('edge', 'colour', 'sound', 'smell'))}"
    shots = []
    while len(shots) < m:  # balanced rounds
        shots += rng.sample(range(n_label), n_label)
    shown = "\n\n".join(f"{text(c)}\nlabel: {labels[c]}" for c in shots[:m])
    asked = rng.choice(sorted(set(shots[:m])))
    return Draft('Use the examples to find the label of the last text. Write only "label: {label}" and nothing else.\n\n', shown,
                 f"\n\n{text(asked)}", "label:", {"answer": str(labels[asked])})


def longqa(rng, m):
    """A long tale in chapters; the question asks for a fact that is told of a person once."""
    people, facts = people_and_facts(rng, 6)
    lines = [sentence(rng) for _ in range(m)]
    for person, known in zip(people, facts):
        for r, thing in known.items():
            lines.insert(rng.randrange(len(lines) + 1), f"{person} {RELATIONS[r][0]} {thing}.")
    chapters = [f"Chapter {i // 40 + 1}\n{' '.join(lines[i:i + 40])}" for i in range(0, len(lines), 40)]
    i = rng.randrange(6)
    r = rng.choice(sorted(facts[i]))
    return Draft("Read the story and answer the question in as few words as you can.\n\n", "\n\n".join(chapters),
                 f"\n\nQuestion: {RELATIONS[r][1].format(people[i])}", "Answer:", {"answer": [facts[i][r]]})


def many_documents(rng, m):
    """m short documents, each with a code; the codes of three of them are asked for."""
    codes = [number7(rng) for _ in range(m)]
    body = "\n\n".join(f"Document {i + 1}. {sentence(rng)} Its code is {code}. {sentence(rng)}" for i, code in enumerate(codes))
    asked = sorted(rng.sample(range(m), 3))
    listed = ", ".join(str(i + 1) for i in asked)
    return Draft("Remember the code of every document.\n\n", body, f"\n\nWhat are the codes of documents {listed}?",
                 f"The codes of documents {listed} are", {"answer": [codes[i] for i in asked]})


# --- LongProc's procedures: the model is to write the whole trace -----------------------------------------------------------

# Output tiers. Path: edges of the route; theory of mind: steps; the searches: characters of the trace; table: rows; program: lines
TIERS = {"0.5k": dict(edges=(24, 39), steps=10, search=(600, 1500), rows=20, lines=10, max_new_tokens=1024),
         "2k": dict(edges=(96, 156), steps=40, search=(2500, 5500), rows=70, lines=40, max_new_tokens=3072),
         "8k": dict(edges=(384, 624), steps=150, search=(10000, 20000), rows=280, lines=160, max_new_tokens=10240)}


def path_traversal(rng, m, tier):
    """A route through cities; m more cities lead somewhere else (arXiv:2501.05414; city counts as measured in its 0.5k files)."""
    n_route = rng.randint(*TIERS[tier]["edges"]) + 1
    cities = names(rng, n_route + m)
    route, ways = cities[:n_route], {}
    for a, b in zip(route, route[1:]):
        ways[a] = b
    for city in cities[n_route:]:
        ways[city] = rng.choice([c for c in rng.sample(cities, 2) if c != city])
    by = {city: rng.choice(("bus", "train", "plane", "ferry")) for city in ways}
    lines = [f"{a} is a lively city. You can travel from {a} to {b} by {by[a]}." for a, b in ways.items()]
    rng.shuffle(lines)
    gold = "\n".join(f"From {a}, take a {by[a]} to {b}." for a, b in zip(route, route[1:]))
    return Draft("From each city below you can travel to one other city.\n\n", "\n".join(lines),
                 f"\n\nFind the way from {route[0]} to {route[-1]}. Write every step as a line of its own, like this:\n<Route>\n"
                 "From Xo, take a bus to Yu.\nFrom Yu, take a train to Za.\n</Route>", "", {"reference_output": gold})


def tom_story(rng, n_steps):
    """A story of two agents who move themselves and two objects, and the trace of what one believes of one object."""
    agents, objects = names(rng, 2), [f"{rng.choice(ADJECTIVES)} {noun}" for noun in rng.sample(NOUNS, 2)]
    rooms = rng.sample(("attic", "kitchen", "cellar", "study", "porch", "pantry", "workshop", "bedroom"), 2)
    surfaces = rng.sample(("table", "shelf", "crate", "stool", "drawer", "rug", "chest", "desk"), 2)
    places = [(room, surface) for room in rooms for surface in surfaces]
    at = {a: rng.choice(rooms) for a in agents}
    lies = {o: rng.choice(places) for o in objects}
    who, what = rng.choice(agents), rng.choice(objects)
    say = lambda place: f"{place[0]}'s {place[1]}"
    story = [f"{a} is in the {at[a]}." for a in agents] + [f"The {o} is on the {say(lies[o])}." for o in objects]
    belief, trace, actor = None, [], agents[1]
    for step in range(n_steps + 1):
        before = at[who], lies[what]
        if step:
            other = agents[1 - agents.index(actor)]
            actor = actor if at[other] is not None and rng.random() < 0.12 else other
            story.append(f"Step {step}: {tom_act(rng, actor, at, lies, rooms, places, say)}")
        sees = at[who] == lies[what][0]
        belief = say(lies[what]) if sees else belief
        changed = "initial state" if step == 0 else \
            f"{who} location {'un' * (at[who] == before[0])}changed; {what} location {'un' * (lies[what] == before[1])}changed"
        trace.append(f"- Step {step}: ({changed}) {{{who} location: {at[who]}; {what} location: {say(lies[what])}; "
                     f"{who} sees {what}: {sees}; {who}'s belief on {what}: {belief}}}")
    return story, who, what, "\n".join([f"{who}'s belief on the {what}:", *trace, f"Final Answer: the {belief}"])


def tom_act(rng, actor, at, lies, rooms, places, say) -> str:
    """One action; at and lies change with it."""
    room = at[actor]
    if room is None:
        at[actor] = rng.choice(rooms)
        return f"{actor} enters the {at[actor]}."
    other, here = next(r for r in rooms if r != room), [o for o in lies if lies[o][0] == room]
    kind = rng.randrange(4) if here else 0
    if kind == 0:
        at[actor] = other
        return f"{actor} moves to the {other}."
    if kind == 3:
        at[actor] = None
        return f"{actor} leaves the {room}."
    thing = rng.choice(here)
    target = room if kind == 1 else other
    lies[thing] = rng.choice([p for p in places if p[0] == target and p != lies[thing]])
    at[actor] = target
    return f"{actor} moves the {thing} to the {say(lies[thing])}." if kind == 1 else \
        f"{actor} moves to the {other} with the {thing} and puts it on the {say(lies[thing])}."


def tom_tracking(rng, m, tier):
    story, who, what, trace = tom_story(rng, TIERS[tier]["steps"])
    shown, shown_who, shown_what, shown_trace = tom_story(rng, 3)
    ask = lambda a, o: f"Where does {a} believe the {o} is? Follow every step."
    rest = " ".join(f"In another house, {a} looks after the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}." for a in names(rng, m))
    return Draft("Follow what a person believes about an object, who sees only what is in the same room. An example:\n\n"
                 + "\n".join(shown) + f"\n{ask(shown_who, shown_what)}\n{shown_trace}\n\nNow the story to follow.\n\n", rest,
                 "\n" + "\n".join(story) + f"\n{ask(who, what)}", "", {"reference_output": trace})


def countdown_trace(numbers, target, longest=math.inf):
    """The depth-first search for target from four numbers as text with its solution, or None if there is none or the search
    takes more than `longest` characters."""
    lines, steps = ["# Search Procedure"], []

    def state(left):
        pairs = [(left[i], left[j]) for i in range(len(left)) for j in range(i + 1, len(left))]
        return pairs, f"Options for choosing two numbers: [{', '.join(map(str, pairs))}]."

    def search(left, depth):
        if sum(map(len, lines)) > longest:
            raise OverflowError
        for i in range(len(left)):
            for j in range(i + 1, len(left)):
                rest = left[:i] + left[i + 1:j] + left[j + 1:]
                if rest:
                    lines.append(f"{' ' * depth}|- Pick two numbers ({left[i]}, {left[j]}) (numbers left: {rest}). Try possible operations.")
                a, b = max(left[i], left[j]), min(left[i], left[j])
                for op in "+-*/":
                    if try_operation(a, op, b, rest, depth + bool(rest)):
                        return True
        return False

    def try_operation(a, op, b, rest, depth):
        start = f"{' ' * depth}|- Try {a} {op} {b} = "
        if op == "/" and b == 0:
            lines.append(f"{start[:-3]} (invalid operation). drop this branch.")
            return False
        if op == "/" and a % b:
            lines.append(f"{start}{a / b:.1f}. {a / b:.1f} is a decimal, drop this branch.")
            return False
        c = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[op]
        if c >= 2000:
            lines.append(f"{start}{c}. {c} exceeds the maximum intermediate result, drop this branch.")
            return False
        steps.append(f"{a} {op} {b} = {c}")
        if not rest:
            lines.append(f"{start}{c}. Evaluate {c} {'==' if c == target else '!='} {target}, "
                         f"{'target found!' if c == target else 'drop this branch.'}")
            found = c == target
        else:
            left = [c, *rest]
            more = "just two numbers left." if len(left) == 2 else state(left)[1]
            lines.append(f"{start}{c}. Add {c} to the number set. Current number set: {left}, target: {target}"
                         + (", " if len(left) == 2 else ". ") + more)
            found = search(left, depth + 1)
        if not found:
            steps.pop()
        return found
    lines.append(f"Initial number set: {numbers}, target: {target}. {state(numbers)[1]}")
    try:
        if not search(numbers, 1):
            return None
    except OverflowError:
        return None
    return "\n".join([*lines, "", "Now we have found the target, let's trace back the solution:", f"Final step: {steps[2]}",
                      f"The step before: {steps[1]}", f"The first step: {steps[0]}", "", "Output the solution in the required format:",
                      "<Solution>", *steps, "</Solution>", ""])


def countdown_puzzle(rng, search):
    """Four numbers and a target whose trace has a length within `search` [characters]."""
    while True:
        numbers, target = [rng.randint(1, 49) for _ in range(4)], rng.randint(10, 50)
        trace = countdown_trace(numbers, target, search[1])
        if trace and search[0] <= len(trace) <= search[1]:
            return numbers, target, trace


def countdown(rng, m, tier):
    """m solved puzzles are the context."""
    search = TIERS[tier]["search"]
    numbers, target, trace = countdown_puzzle(rng, search)
    solved = [countdown_puzzle(rng, TIERS["0.5k"]["search"]) for _ in range(m)]
    shown = "\n\n".join(f"Numbers: {n}\nTarget: {t}\n{text}" for n, t, text in solved)
    return Draft("Use four numbers, each once, with +, -, * and / to reach a target. Search depth first, write down the search and end "
                 "with three equations between <Solution> and </Solution>.\n\n", shown, f"\n\nNumbers: {numbers}\nTarget: {target}", "",
                 {"reference_output": trace, "item": {"nums": numbers, "target": target}})


def travel_trace(item):
    """The depth-first search for a travel plan as text and the plan [(city, first day, last day)] it finds, or None."""
    days = {c["city"]: c["num_days"] for c in item["constraints"] if c["type"] == "duration"}
    fixed = {c["city"]: (c["start_day"], c["end_day"]) for c in item["constraints"] if c["type"] == "fixed"}
    flights = {tuple(pair) for pair in item["connected_cities"]}
    when = lambda c: f", Fixed Schedule: Day {fixed[c][0]} - {fixed[c][1]}" if c in fixed else ""
    by_arrival = sorted(fixed, key=lambda c: fixed[c])
    free = [c for c in days if c not in fixed]
    lines = ["<Solving Procedure>", "Read the requirements and identify the cities that have fixed schedules and the cities that need to be "
             "arranged.", *(f"* City: {c}, Duration: {n} days{when(c)}." for c, n in days.items()), "",
             "Cities that have fixed schedules (sorted by their arrival days):", *(f"* City: {c}{when(c)}." for c in by_arrival), "",
             "Cities needing arrangement:", *(f"* City: {c}, Duration: {days[c]} days." for c in free), ""]

    def search(day, plan):
        depth = len(plan)
        head, body = " " * (2 * depth) + "|- " if depth else "", " " * (2 * depth + 1) + "|- "
        lines.append(f"{head}Current day: {day}. Current plan: [{', '.join(c for c, _, _ in plan)}].")
        if depth == len(days):
            lines.append(f"{head}All {depth} cities are arranged. Complete plan is found!")
            return plan
        lines.append(f"{head}Check whether the city with an arrival day of Day {day} - is fixed.")
        visited = [c for c, _, _ in plan]
        options = [c for c in by_arrival if fixed[c][0] == day and c not in visited]
        if options:
            lines.append(f"{head}Yes. The city with an arrival day of Day {day} - is fixed: {options[0]}.")
        else:
            options = [c for c in free if c not in visited]
            lines.append(f"{head}No. Consider possible options from cities needing arrangement: [{', '.join(options)}] and explore "
                         "these options in order.")
        for city in options:
            found = visit(city, day, plan, body)
            if found:
                return found
        lines.append(f"{body}Fail to arrange any option on day {day} in the current arrangement. Drop this branch.")

    def visit(city, day, plan, body):
        last, origin = day + days[city] - 1, plan[-1][0] if plan else None
        lines.append(f"{body}Try arranging to visit {city} from Day {day}. Duration: {days[city]} days. Schedule: Day {day} - {last}.")
        lines.append(f"{body}Check for direct flight from {origin or 'the starting point'} to {city}.")
        if origin and (origin, city) not in flights:
            lines.append(f"{body}No. Drop this branch.")
            return None
        lines.append(f"{body}Yes.")
        coming = next((c for c in by_arrival if fixed[c][0] > day), None)
        shown = f"{coming} (Day {fixed[coming][0]} - {fixed[coming][1]})" if coming else "None"
        lines.append(f"{body}Check whether this arrangement is compatible with the next fixed schedule after Day {day}: {shown}.")
        if coming is None:
            lines.append(f"{body}No following fixed schedules. This arrangement is compatible.")
        else:
            start = fixed[coming][0]
            late = last > start
            lines.append(f"{body}The departure day of {city} is Day {last}. The arrival day of {coming} is Day {start}. Day {last} is "
                         f"{'later than (>)' if late else 'not later than (<=)'} Day {start}. This arrangement is "
                         f"{'incompatible. Drop this branch.' if late else 'compatible.'}")
            if late:
                return None
        lines.append(f"{body}This arrangement is feasible for now. Continue to arrange the rest of the plan.")
        return search(last, [*plan, (city, day, last)])
    plan = search(1, [])
    if plan is None:
        return None
    told = [f"**Day 1-{plan[0][2]}:** Arriving in {plan[0][0]} and visit {plan[0][0]} for {days[plan[0][0]]} days."]
    for (a, _, day), (b, start, end) in zip(plan, plan[1:]):
        told += [f"**Day {day}:** Fly from {a} to {b}.", f"**Day {start}-{end}:** Visit {b} for {days[b]} days."]
    return "\n".join([*lines, "</Solving Procedure>", "", "Output the plan in the required format:", "<Plan>", *told, "</Plan>"]), plan


def count_plans(item, most=2) -> int:
    """How many plans satisfy a travel problem, counted up to `most`."""
    days = {c["city"]: c["num_days"] for c in item["constraints"] if c["type"] == "duration"}
    fixed = {c["city"]: c["start_day"] for c in item["constraints"] if c["type"] == "fixed"}
    flights = {tuple(pair) for pair in item["connected_cities"]}

    def count(day, visited):
        if len(visited) == len(days):
            return 1
        total = 0
        for city in days:
            if city not in visited and fixed.get(city, day) == day and (not visited or (visited[-1], city) in flights) and total < most:
                total += count(day + days[city] - 1, [*visited, city])
        return total
    return count(1, [])


def travel_problem(rng, search):
    """A problem that one plan solves, with a trace of a length within `search` [characters]."""
    while True:
        cities = names(rng, rng.randint(4, 9))
        stays = [rng.randint(2, 7) for _ in cities]
        starts = [1 + sum(stays[:i]) - i for i in range(len(cities))]
        fixed = set(rng.sample(range(len(cities)), rng.randint(1, max(1, len(cities) // 3))))
        constraints = []
        for i in rng.sample(range(len(cities)), len(cities)):
            constraints.append({"type": "duration", "city": cities[i], "num_days": stays[i]})
            if i in fixed:
                constraints.append({"type": "fixed", "city": cities[i], "start_day": starts[i], "end_day": starts[i] + stays[i] - 1})
        flights = {(a, b) for a, b in zip(cities, cities[1:])}
        for _ in range(rng.randint(len(cities), 3 * len(cities))):
            flights.add(tuple(rng.sample(cities, 2)))
        item = {"ground_truth_cities": "**".join(cities), "ground_truth_durations": "**".join(map(str, stays)), "constraints": constraints,
                "connected_cities": rng.sample(sorted(flights), len(flights)), "total_days": sum(stays) - len(cities) + 1}
        trace, _ = travel_trace(item)
        if search[0] <= len(trace) <= search[1] and count_plans(item) == 1:
            return item, trace


def travel_question(item):
    """The problem in words."""
    said = []
    for c in item["constraints"]:
        said.append(f"You stay in {c['city']} for {c['num_days']} days." if c["type"] == "duration" else
                    f"You are in {c['city']} from day {c['start_day']} to day {c['end_day']}.")
    flights = ", ".join(f"from {a} to {b}" for a, b in item["connected_cities"])
    return (f"Plan a trip through {item['ground_truth_cities'].count('**') + 1} cities in {item['total_days']} days. A day of flight counts "
            f"for both cities. {' '.join(said)}\nThe direct flights: {flights}.")


def travel_planning(rng, m, tier):
    """m solved problems are the context."""
    item, trace = travel_problem(rng, TIERS[tier]["search"])
    solved = [travel_problem(rng, (1500, 5500)) for _ in range(m)]
    shown = "\n\n".join(f"{travel_question(i)}\n{text}" for i, text in solved)
    return Draft("Plan trips as in the examples: write the search between <Solving Procedure> and </Solving Procedure>, then the plan "
                 "between <Plan> and </Plan>.\n\n", shown, f"\n\n{travel_question(item)}", "", {"reference_output": trace, "item": item})


def html_to_tsv(rng, m, tier):
    """A page with a table of goods, some of them of the brand asked for; m other sections of text stand around it."""
    brand, *brands = names(rng, 5)
    rows = [(f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}", b, f"${rng.randint(5, 400)}.{rng.randrange(100):02d}", str(rng.randrange(90)))
            for b in [brand] * TIERS[tier]["rows"] + rng.choices(brands, k=TIERS[tier]["rows"] // 2)]
    rng.shuffle(rows)
    cells = lambda row, tag: "".join(f"<{tag}>{cell}</{tag}>" for cell in row)
    head = ("item", "brand", "price", "stock")
    table = "<table>\n<tr>" + cells(head, "th") + "</tr>\n" + "".join(f"<tr>{cells(row, 'td')}</tr>\n" for row in rows) + "</table>"
    parts = [f'<div class="note"><p>{sentence(rng)}</p></div>' for _ in range(m)]
    parts.insert(rng.randrange(m + 1), table)
    gold = "\n".join("\t".join(row) for row in [head, *(row for row in rows if row[1] == brand)]) + "\n"
    return Draft("Extract a table from this page.\n\n", "<html><body>\n" + "\n".join(parts) + "\n</body></html>",
                 f"\n\nList all items of the brand {brand} as tab-separated values with the header {' '.join(head)}, in a block that begins with "
                 "```tsv and ends with ```.", "", {"reference_output": gold})


def program(rng, n_lines):
    """Pseudo-code, C++ and tests of a program that reads two numbers and changes them line by line."""
    pseudo, code, steps = ["read integers a and b", "set c to 0"], ["int main() { long long a, b, c; cin >> a >> b;", "c = 0;"], []
    for _ in range(n_lines):
        kind, x, y, n = rng.randrange(4), rng.choice("abc"), rng.choice("abc"), rng.randint(1, 9)
        pseudo.append((f"set {x} to the remainder of {x} + {n} * {y} divided by 1000, with the sign of the sum", f"subtract {n} from {x}",
                       f"if {x} is greater than {y}, swap {x} and {y}", f"repeat {n} times: increase {x} by 2")[kind])
        code.append((f"{x} = ({x} + {n} * {y}) % 1000;", f"{x} -= {n};", f"if ({x} > {y}) swap({x}, {y});",
                     f"for (int i = 0; i < {n}; i++) {x} += 2;")[kind])
        steps.append((kind, x, y, n))
    tests = []
    for _ in range(5):
        v = {"a": rng.randrange(50), "b": rng.randrange(50), "c": 0}
        given = f"{v['a']} {v['b']}"
        for kind, x, y, n in steps:
            if kind == 0:
                v[x] = int(math.fmod(v[x] + n * v[y], 1000))  # C++'s remainder keeps the sign
            elif kind == 1:
                v[x] -= n
            elif kind == 2 and v[x] > v[y]:
                v[x], v[y] = v[y], v[x]
            elif kind == 3:
                v[x] += 2 * n
        tests.append([[given], [f"{v['a']} {v['b']} {v['c']}"]])
    return pseudo + ["print a, b and c"], code + ['cout << a << " " << b << " " << c << endl; }'], tests


def pseudo_to_code(rng, m, tier):
    """m translated programs are the context."""
    pseudo, lines, tests = program(rng, TIERS[tier]["lines"])
    shown = []
    for _ in range(m):
        p, c, _ = program(rng, 6)
        shown.append("Pseudo-code:\n" + "\n".join(p) + "\nC++:\n```cpp\n" + "\n".join(c) + "\n```")
    return Draft("Translate pseudo-code to C++, line by line, in a block that begins with ```cpp and ends with ```.\n\n", "\n\n".join(shown),
                 "\n\nPseudo-code:\n" + "\n".join(pseudo) + "\nC++:", "",
                 {"reference_output": "```cpp\n" + "\n".join(lines) + "\n```", "item": {"testcases": tests}})


PROCEDURES = {"path": path_traversal, "tom": tom_tracking, "countdown": countdown, "travel": travel_planning, "html": html_to_tsv,
              "code": pseudo_to_code}
RELEASED = {"travel_planning": ("2k", "8k"), "pseudo_to_code": ("0.5k", "2k")}  # tiers of the others: all


def procedure(make, tier):
    """The Task of a LongProc procedure in a tier."""
    return Task(functools.partial(make, tier=tier), make.__name__, "f1" if make is html_to_tsv else "accuracy", TIERS[tier]["max_new_tokens"],
                least=1 if make in (countdown, travel_planning, pseudo_to_code) else 0)


TASKS = {
    "facts": Task(None, None, "score", 1),
    "niah_s": Task(niah_single, "ruler_recall", "ruler_recall", 50),
    "niah_mk2": Task(niah_multikey, "ruler_recall", "ruler_recall", 50),
    "niah_mk3": Task(niah_uuid, "ruler_recall", "ruler_recall", 100),
    "niah_mv": Task(niah_multivalue, "ruler_recall", "ruler_recall", 50),
    "json_kv": Task(json_kv, "json_kv", "substring_exact_match", 100),
    "rag": Task(rag, "qa", "substring_exact_match", 20),
    "rerank": Task(rerank, "rerank", "NDCG@10", 200, least=4, stop_newline=True),
    "icl": Task(icl, "icl", "exact_match", 20, stop_newline=True),
    "longqa": Task(longqa, "qa", "rougeL_f1", 20),
    "docs": Task(many_documents, "ruler_recall", "ruler_recall", 60, least=3),
} | {f"{name}_{tier}": procedure(make, tier) for name, make in PROCEDURES.items() for tier in RELEASED.get(make.__name__, TIERS)}


# --- the benchmarks' own files ---------------------------------------------------------------------------------------------

class Official(NamedTuple):
    """How a benchmark's task is read: read(folder, file, n, seed) -> drafts. file may hold {k}, one of `sizes` for lengths 8K, 16K,
    32K, 64K, 128K; chat is the benchmark's default."""
    read: object
    file: str
    scorer: str
    main: str
    max_new_tokens: int
    chat: bool = False
    sizes: tuple = ("8192", "16384", "32768", "65536", "131072")
    stop_newline: bool = False


def read_rows(path) -> list[dict]:
    """Objects of a .json or .jsonl file. Raises FileNotFoundError / ValueError naming it and where the data comes from."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}: HELMET's data.tar.gz (princeton-nlp/HELMET on the Hugging Face hub), LongProc's data "
                                "folder (princeton-pli/LongProc on GitHub) or your JSON lines of a hub's data set belong there")
    try:
        with open(path, encoding="utf-8") as f:
            rows = [json.loads(line) for line in f if line.strip()] if path.endswith(".jsonl") else json.load(f)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from None
    rows = rows.get("data", rows) if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: want a list of objects")
    return rows


def shuffled(rows, seed):
    """In the order that Hugging Face's Dataset.shuffle(seed) gives."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def digest(text) -> int:
    return int(hashlib.sha256(str(text).encode()).hexdigest(), 16) % 2 ** 31


def pick_questions(rows, key, n):
    """All rows of n questions, drawn as HELMET draws them."""
    keep = random.Random(42).sample(sorted({row[key] for row in rows}), min(n, len({row[key] for row in rows})))
    return [row for row in rows if row[key] in keep]


def pick_demos(rows, key, value, shots):
    """The worked examples of a question: always the same ones, none twice."""
    found = {}
    for row in shuffled(rows, digest(value)):
        found.setdefault(row[key], row)
    return list(found.values())[:shots]


def read_kilt(folder, file, n, seed, demo_file=None, shots=2):
    rows, demo_rows = read_rows(os.path.join(folder, file)), read_rows(os.path.join(folder, demo_file))
    popqa = "popqa" in file
    if popqa:
        rows, demo_rows = ([r for r in x if math.log10(r["s_pop"]) < 3] for x in (rows, demo_rows))
    key = "id" if "id" in rows[0] else "question"
    body = lambda row: passages((c["title"], c["text"]) for c in row["ctxs"])
    for row in pick_questions(rows, key, n):
        candidates = [r for r in demo_rows if r[key] != row[key]] if popqa else demo_rows
        demos = "".join(f"{body(d)}\n\nQuestion: {d['question']}\nAnswer: {d['answers'][0]}\n\n"
                        for d in pick_demos(candidates, key, row[key], shots))
        yield Draft("Answer the question briefly with the help of the given documents, in this format:\nAnswer: [answer]\n\n" + demos,
                    body(row), f"\n\nQuestion: {row['question']}", "Answer:", {"question": row["question"], "answer": row["answers"]})


def read_json_kv(folder, file, n, seed):
    for row in shuffled(read_rows(os.path.join(folder, file)), seed)[:n]:
        demos = "".join(f"Key: {k}\nCorresponding value: {v}\n\n" for k, v in row["demos"][:2])
        after = f"\n\nExtract the value corresponding to the specified key in the JSON object below.\n\n{demos}Key: {row['question']}"
        yield Draft("", row["context"], after, "Corresponding value:", {"question": row["question"], "answer": row["answer"]})


RULER = {  # the text before and after the context, and the answer prefix, with a row's fields
    "niah": ("A special magic {type} is hidden within the following text. Make sure to memorize it. I will quiz you about the {type} "
             "afterwards.\n", "\nWhat is the special magic {type} for {query} mentioned in the provided text?",
             "The special magic {type} for {query} mentioned in the provided text is"),
    "niah_mv": ("Some special magic {type} are hidden within the following text. Make sure to memorize it. I will quiz you about the {type} "
                "afterwards.\n", "\nWhat are all the special magic {type} for {query} mentioned in the provided text?",
                "The special magic {type} for {query} mentioned in the provided text are"),
    "vt": ("{example}\n\nMemorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
           "\nQuestion: Find all variables that are assigned the value {query} in the text above.",
           "Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are assigned the value {query}, they are:"),
    "cwe": ("{example}\nBelow is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
            "appear most often.\n", "\nQuestion: What are the 10 most common words in the above list?",
            "Answer: The top 10 words that appear most often in the list are:"),
    "fwe": ("Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words. ",
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared words in "
            "the above coded text?", "Answer: According to the coded text above, the three most frequently appeared words are:"),
    "qa": ("Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nThe following are "
           "given documents.\n\n", "\n\nAnswer the question based on the given documents. Only give me the answer and do not output any other "
           "words.\n\nQuestion: {question}", "Answer:"),
}


def read_ruler(folder, file, n, seed, kind="niah"):
    for row in shuffled(read_rows(os.path.join(folder, file)), seed)[:n]:
        fields = row | {"type": row.get("type_needle_v", "")}
        before, after, prefix = (part.format_map(fields) for part in RULER[kind])
        yield Draft(before, row["context"], after, prefix, row | {"answer": row.get("answer", row.get("outputs"))})


def read_rerank(folder, file, n, seed, demo_file="msmarco/test_reranking_data_k10_dep3.jsonl"):
    rows, demo_rows = read_rows(os.path.join(folder, file)), read_rows(os.path.join(folder, demo_file))
    rows = pick_questions(rows, "qid", n)
    k_values = [k for k in (1, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= max(10, len(rows[0]["ctxs"]))]
    tested = {row["qid"] for row in rows}
    apart = len(demo_rows) > 2 * len(rows)
    title = lambda c: f" (Title: {c['title']})" if "title" in c else ""
    body = lambda row: "\n\n".join(f"[ID: {c['id']}] Document{title(c)}: {c['text']}" for c in row["ctxs"])
    ranking = lambda row: " > ".join(c["id"] for c in sorted(row["ctxs"], key=lambda c: c["label"], reverse=True))
    for row in rows:
        candidates = [r for r in demo_rows if (r["qid"] not in tested if apart else r["qid"] != row["qid"])]
        demos = "".join(f"{body(d)}\n\nQuery: {d['query']}\nRanking: {ranking(d)}\n\n" for d in pick_demos(candidates, "qid", row["qid"], 2))
        yield Draft("Each document below has an ID. Rank all of them by their relevance to the query, the most relevant first, in this "
                    "format:\nRanking: ID3 > ID1 > ID2\n\n" + demos, body(row), f"\n\nQuery: {row['query']}", "Ranking:",
                    {"qid": row["qid"], "answer": ranking(row), "qrel": [[c["id"], str(c["label"])] for c in row["ctxs"]], "k_values": k_values})


def balanced(rows, label, n, seed):
    """n rows in rounds of one per label, each round shuffled."""
    rng, by_label = random.Random(seed), {}
    for row in rows:
        by_label.setdefault(row[label], []).append(row)
    n_round = math.ceil(n / len(by_label))
    columns = []
    for members in by_label.values():
        picked = rng.sample(range(len(members)), n_round % len(members))
        while len(picked) < n_round:
            picked += rng.sample(range(len(members)), min(len(members), n_round - len(picked)))
        columns.append([members[i] for i in picked])
    out = []
    for i in range(n_round):
        one = [column[i] for column in columns]
        rng.shuffle(one)
        out += one
    return out[:n]


def read_icl(folder, file, n, seed, shots=None, text="text", label="label"):
    train, test = (read_rows(os.path.join(folder, file.format(split=split))) for split in ("train", "test"))
    n_label = 1 + max(row[label] for row in train)
    if not all(type(row[label]) is int and 0 <= row[label] < 10 ** 4 for row in train + test):
        raise ValueError(f"labels must be numbers from 0 to 9999 in field {label!r}")
    for row in balanced(shuffled(test, seed), label, n, seed):
        own = (digest(row[text]) + seed) % 2 ** 31
        numbers = list(range(n_label))
        random.Random(own).shuffle(numbers)
        shown = "\n\n".join(f"{r[text]}\nlabel: {numbers[r[label]]}" for r in balanced(train, label, shots, own))
        yield Draft('Assign a label to the last text with the help of the examples. Write only "label: {label}" and nothing else.\n\n', shown,
                    f"\n\n{row[text]}", "label:", {"answer": str(numbers[row[label]])})


def read_infbench(folder, file, n, seed, kind="qa"):
    """InfiniteBench's rows {id, context, input, answer, options}, cut beforehand to the length wanted."""
    rows = read_rows(os.path.join(folder, file))
    options = lambda row: "\nOptions:\n" + "\n".join(f"{letter}. {o}" for letter, o in zip("ABCD", row["options"])) if kind == "choice" else ""

    def answer(row):
        if kind == "qa":
            return row["answer"]
        letter = "ABCD"[row["options"].index(row["answer"][0])]
        return [letter, f"{letter}. {row['answer'][0]}"]
    for row in shuffled(rows, seed)[:n]:
        others = [r for r in shuffled(rows, seed) if r["id"] != row["id"]][:2]
        demos = "".join(f"[story text]\nQuestion: {d['input']}{options(d)}\nAnswer: {answer(d)[0]}\n\n" for d in others)
        yield Draft("Answer the question about the story as briefly as possible"
                    + (" with a letter" if kind == "choice" else "") + f".\n\nFor example:\n\n{demos}Now, read the following story:\n\n", row["context"],
                    f"\n\nQuestion: {row['input']}{options(row)}\n", "Answer:", {"answer": answer(row)})


def read_alce(folder, file, n, seed, k=None, prompts=None):
    """ALCE: demos of five documents from prompts/*.json, then the first k documents of a question."""
    rows, path = shuffled(read_rows(os.path.join(folder, file)), seed)[:n], os.path.join(folder, prompts)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}: it comes with HELMET's repository, folder prompts")
    with open(path, encoding="utf-8") as f:
        spec = json.load(f)
    rng = random.Random(seed)
    doc = lambda i, d: f"Document [{i + 1}](Title: {d['title']}): {d['text']}"
    body = lambda docs: "\n\n".join(doc(i, d) for i, d in enumerate(docs))
    for row in rows:
        demos = "\n\n\n".join(f"{spec['instruction']}\n\nQuestion: {d['question']}\n\n{body(d['docs'][:5])}\nAnswer: {d['answer']}"
                              for d in rng.sample(spec["demos"], 2))
        yield Draft(f"{demos}\n\n\n{spec['instruction']}\n\nQuestion: {row['question']}\n\n", body(row["docs"][:k]), "\n", "Answer:", row)


def longproc_prompt(folder):
    """The template in a LongProc task's prompts.yaml: one block, indented by two."""
    path = os.path.join(folder, "prompts.yaml")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}: it belongs to LongProc's data folder (princeton-pli/LongProc on GitHub)")
    with open(path, encoding="utf-8") as f:
        lines = f.read().split("\n")
    if lines[0].strip() != "USER_PROMPT: |-":
        raise ValueError(f"{path}: want the one key USER_PROMPT with a block")
    return "\n".join(line[2:] for line in lines[1:]).rstrip("\n")


def read_longproc(folder, file, n, seed):
    """A LongProc task: its own prompt, one user turn, and the reference that its scorer follows."""
    task, tier = os.path.basename(file).removesuffix(".json").rsplit("_", 1)
    here = os.path.join(folder, task)
    template = longproc_prompt(here)
    rows = read_rows(os.path.join(here, "travel_planning_all.json" if task == "travel_planning" else os.path.basename(file)))
    if task == "countdown":
        shown = [f"# Example\nNumbers: {numbers}\nTarget: {target}\n\n{countdown_trace(numbers, target)}"
                 for numbers, target in (([40, 19, 23, 7], 29), ([9, 16, 6, 18], 12))]
        template = template.format(demonstration="\n\n".join(shown), nums="{nums}", target="{target}")
    if task == "travel_planning":
        shown = [f"# Example\n{d['disambig_question_text']}\n\n{travel_trace(d)[0]}"
                 for d in read_rows(os.path.join(here, "travel_planning_icl_examples.json"))]
        template = template.format(demonstration="\n\n".join(shown), problem="{problem}")
        low, high = {"2k": (0, 2048), "8k": (4096, 8192)}[tier]
        rows = [row for row in rows if low <= row["estimated_output_tokens"] < high]
    for row in shuffled(rows, seed)[:n]:
        fields, reference = longproc_fields(task, row, here)
        yield Draft(template.format(**fields), "", "", "", {"reference_output": reference, "item": row})


def longproc_fields(task, row, folder):
    """What fills a task's template, and the reference output."""
    if task == "path_traversal":
        return dict(city_context=row["context_nl"], src_city=row["question_repr"][0], dst_city=row["question_repr"][1]), row["answer_nl"]
    if task == "tom_tracking":
        return dict(story=row["story"], question=row["question"]), row["solution"]
    if task == "countdown":
        if len(row["nums"]) != 4 or not all(type(x) is int and 0 < x < 2000 for x in [*row["nums"], row["target"]]):
            raise ValueError("want four numbers and a target below 2000")
        return dict(nums=row["nums"], target=row["target"]), countdown_trace(row["nums"], row["target"])
    if task == "travel_planning":
        return dict(problem=row["disambig_question_text"]), travel_trace(row)[0]
    if task == "pseudo_to_code":
        return dict(pseudocode="\n".join(row["pseudocode_lines"])), "\n".join(row["code_lines"])
    page = os.path.join(folder, row["html_path"])
    if not os.path.realpath(page).startswith(os.path.realpath(folder) + os.sep):
        raise ValueError(f"html_path {row['html_path']!r} leaves the folder {folder}")
    with open(page, encoding="utf-8") as f:
        return row | {"html_str": f.read()}, row["gt"]


def check_draft(spec, draft):
    """Raises ValueError (or what the scorer raises) for a row that could not be scored once a model has answered it."""
    texts = [draft.context, *(flat(draft.gold["answer"]) if spec.scorer in ("qa", "ruler_qa", "json_kv", "icl", "ruler_recall", "choice") else [])]
    if "reference_output" in draft.gold:
        texts.append(draft.gold["reference_output"])
    if not all(isinstance(x, str) for x in texts) or "" in texts[1:] or len(texts) < 2 and not spec.scorer.startswith(("alce", "rerank")):
        raise ValueError("the context, answer or reference is missing or not text")
    if spec.scorer == "html_to_tsv" and not ((table := read_table(draft.gold["reference_output"])) and table[1]):
        raise ValueError("the reference table has no rows")
    if spec.scorer == "pseudo_to_code":
        tests = draft.gold["item"]["testcases"]
        if not tests or not all(isinstance(line, str) and line.isprintable() for given, wanted in tests for line in [*given, *wanted]):
            raise ValueError("testcases must be pairs of lists of lines")
    else:
        SCORERS[spec.scorer]("", draft.gold)


def official_tasks() -> dict:
    """All tasks of HELMET and LongProc that are scored here, by name."""
    tasks = {
        "json_kv": Official(read_json_kv, "json_kv/test_k{k}_dep6.jsonl", "json_kv", "substring_exact_match", 100,
                            sizes=("105", "220", "440", "900", "1800")),
        "msmarco_rerank_psg": Official(read_rerank, "msmarco/test_reranking_data_k{k}_dep3.jsonl", "rerank", "NDCG@10", 200,
                                       sizes=("50", "130", "285", "600", "1000")),
    }
    for name, file in (("nq", "nq-dev-multikilt_1000_k{k}_dep6"), ("triviaqa", "triviaqa-dev-multikilt_1000_k{k}_dep6"),
                       ("hotpotqa", "hotpotqa-dev-multikilt_1000_k{k}_dep3"), ("popqa_3", "popqa_test_1000_k{k}_dep6")):
        demos = file.replace("-dev-", "-train-").replace("{k}", "3")
        tasks[f"kilt_{name}"] = Official(functools.partial(read_kilt, demo_file=f"kilt/{demos}.jsonl"), f"kilt/{file}.jsonl", "qa",
                                         "substring_exact_match", 20, sizes=("50", "105", "220", "440", "1000"))
    for name, folder, kind, n in (("niah_mk_2", "niah_multikey_2", "niah", 50), ("niah_mk_3", "niah_multikey_3", "niah", 100),
                                  ("niah_mv", "niah_multivalue", "niah_mv", 50), ("vt", "vt", "vt", 50), ("cwe", "cwe", "cwe", 100),
                                  ("fwe", "fwe", "fwe", 50), ("qa_1", "qa_1", "qa", 50), ("qa_2", "qa_2", "qa", 50)):
        scorer, main = ("ruler_qa", "substring_exact_match") if kind == "qa" else ("ruler_recall", "ruler_recall")
        tasks[f"ruler_{name}"] = Official(functools.partial(read_ruler, kind=kind), f"ruler/{folder}/validation_{{k}}.jsonl", scorer, main, n)
    for name, label, shots in (("trec_coarse", "coarse_label", (400, 800, 1600, 3300, 6600)), ("trec_fine", "fine_label", (400, 800, 1600, 3200, 6400)),
                               ("banking77", "label", (360, 720, 1450, 2900, 5900)), ("clinic150", "intent", (440, 880, 1750, 3525, 7050)),
                               ("nlu", "label", (510, 1020, 2040, 4080, 8296))):
        tasks[f"icl_{name}"] = Official(functools.partial(read_icl, label=label), f"icl/{name}_{{split}}.jsonl", "icl", "exact_match", 20,
                                        sizes=shots, stop_newline=True)
    for kind, scorer, main in (("qa", "qa", "rougeL_f1"), ("choice", "choice", "exact_match")):
        tasks[f"infbench_{kind}_eng"] = Official(functools.partial(read_infbench, kind=kind), f"infbench/longbook_{kind}_eng.jsonl", scorer,
                                                 main, 10, chat=True)
    for kind, main in (("asqa", "str_em"), ("qampari", "qampari_rec_top5")):
        tasks[f"alce_{kind}"] = Official(functools.partial(read_alce, prompts=f"prompts/{kind}_revised.json"), f"alce/{kind}_eval_gtr_top2000.json",
                                         f"alce_{kind}", main, 300, chat=True, sizes=(30, 75, 165, 345, 700))
    for task in (make.__name__ for make in PROCEDURES.values()):
        for tier in RELEASED.get(task, TIERS):
            tasks[f"{task}_{tier}"] = Official(read_longproc, f"{task}/{task}_{tier}.json", task, "f1" if task == "html_to_tsv" else "accuracy",
                                               TIERS[tier]["max_new_tokens"], chat=True)
    return tasks


OFFICIAL = official_tasks()
NEEDS_JUDGE = ("narrativeqa", "infbench_sum_eng", "multi_lexsum")  # scored by GPT-4o or a large model upstream


def load(task, path, n=100, seed=42, tokenizer=None, length=None, chat=None) -> list[Example]:
    """Examples of a benchmark's task from its own files, as released: rows, order, worked examples, prompt structure.

    task: a key of OFFICIAL, with or without "helmet:" or "longproc:" before it. path: HELMET's or LongProc's data folder, or one file.
    length [tokens] of prompt and generation: picks HELMET's file for it (8192 if none) and cuts the context's end to fit. chat: None =
    the benchmark's default where the tokenizer has a chat format. Without a tokenizer, prompts are raw bytes' ids.
    Raises ValueError / FileNotFoundError naming what was expected, and for tasks that only a judge can score."""
    name = task.split(":")[-1]
    if name in NEEDS_JUDGE:
        raise ValueError(f"task {task} is not scored here: needs a judge (a large model)")
    if name not in OFFICIAL:
        raise ValueError(f"unknown benchmark task {task!r}: one of {', '.join(OFFICIAL)}")
    spec, tokenizer = OFFICIAL[name], tokenizer or byte_tokenizer()
    step = next((i for i, limit in enumerate((8192, 16384, 32768, 65536)) if (length or 8192) <= limit), 4)
    size, more = spec.sizes[step], {}
    if name.startswith(("icl", "alce")):
        more = {"shots" if name.startswith("icl") else "k": size}
    folder, file = path, spec.file.replace("{k}", str(size))
    if os.path.isfile(path):  # every file lies one folder below the root
        folder = os.path.dirname(os.path.dirname(os.path.abspath(path)))
        file = os.path.relpath(os.path.abspath(path), folder)
    chat = spec.chat and tokenizer.has_chat if chat is None else chat
    try:
        drafts = list(spec.read(folder, file, n, seed, **more))
        for draft in drafts:
            check_draft(spec, draft)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ArithmeticError, UnicodeError) as e:
        if type(e) is ValueError and str(e).startswith(str(folder)):
            raise  # names its file already
        raise ValueError(f"{os.path.join(folder, file)}: not {name}'s rows ({type(e).__name__}: {e})") from None
    if not drafts:
        raise ValueError(f"{os.path.join(folder, file)}: no row for {name}")
    limit = None if length is None else length - spec.max_new_tokens
    return [to_example(task, draft, tokenizer, chat, spec.max_new_tokens, limit if draft.context else None) for draft in drafts]


# --- LitSearch: retrieval (arXiv:2407.18940) ------------------------------------------------------------------------------------

STOP_WORDS = frozenset("a about above after again against all am an and any are as at be because been before being below between both but by "
                       "can did do does doing don down during each few for from further had has have having he her here hers him his how i if in "
                       "into is it its itself just me more most my no nor not now of off on once only or other our out over own s same she so some "
                       "such t than that the their them then there these they this those through to too under until up very was we were what when "
                       "where which while who whom why will with you your".split())


def plain_words(text):
    return re.findall(r"\w+", text.lower())


def search_words(text):
    """Words as LitSearch's BM25 sees them, nearly: no stop words, stemmed (its own tokenizer also keeps punctuation)."""
    return [cached_stem(w) for w in re.findall(r"[a-z0-9]+", text.lower()) if w not in STOP_WORDS]


cached_stem = functools.lru_cache(maxsize=2 ** 18)(stem)


class BM25:
    """Okapi BM25 over texts; scores as rank_bm25's BM25Okapi: score(d) = sum over query words, repeats counted, of
    idf tf (k1 + 1) / (tf + k1 (1 - b + b |d| / mean |d|)), idf = ln(N - df + 0.5) - ln(df + 0.5), where a negative idf
    becomes epsilon times the vocabulary's mean idf."""

    def __init__(self, docs, words=plain_words, k1=1.5, b=0.75, epsilon=0.25):
        self.words, self.n, self.vocab = words, len(docs), {}
        if not docs:
            raise ValueError("BM25 needs at least one document")
        texts = [words(doc) for doc in docs]
        lengths = np.array([len(t) for t in texts])
        if not lengths.any():
            raise ValueError("BM25: the documents have no words")
        number = self.vocab
        terms = np.fromiter((number.setdefault(w, len(number)) for t in texts for w in t), dtype=np.int64, count=lengths.sum())
        pairs, tf = np.unique(terms * self.n + np.repeat(np.arange(self.n), lengths), return_counts=True)  # by term, then document
        term, self.docs = np.divmod(pairs, self.n)
        df = np.bincount(term, minlength=len(number))
        self.start = np.concatenate(([0], np.cumsum(df)))  # postings of term t: start[t] : start[t + 1]
        idf = np.log(self.n - df + 0.5) - np.log(df + 0.5)
        idf = np.where(idf < 0, epsilon * idf.mean(), idf)
        self.weight = idf[term] * tf * (k1 + 1) / (tf + k1 * (1 - b + b * lengths[self.docs] / lengths.mean()))

    def scores(self, query):
        """Scores (n documents,) of a query text."""
        total = np.zeros(self.n)
        for term, n in Counter(self.vocab.get(w) for w in self.words(query)).items():
            if term is not None:
                span = slice(self.start[term], self.start[term + 1])
                total[self.docs[span]] += n * self.weight[span]
        return total

    def top(self, query, k):
        """The best k documents [(index, score)]; of equal scores the later document comes first, as rank_bm25's users sort them."""
        return top_k(self.scores(query), k)


def top_k(scores, k):
    k = min(k, len(scores))
    if k == 0:
        return []
    least = np.partition(scores, len(scores) - k)[len(scores) - k]  # all that could be among the best k
    best = np.flatnonzero(scores >= least)[::-1]
    best = best[np.argsort(-scores[best], kind="stable")][:k]
    return [(int(i), float(scores[i])) for i in best]


@torch.no_grad()
def embed(model, tokenizer, texts, longest=512):
    """Mean of a Llama's last states over each text's first `longest` tokens, normalised: (len(texts), n_embd) float32."""
    out = []
    for text in tqdm(texts, desc="embedding", unit="text", disable=None, leave=False):
        ids = tokenizer.document(text)[:longest] or [0]
        out.append(torch.nn.functional.normalize(model.hidden(torch.tensor(ids, device=model.head.device)).float().mean(0), dim=0))
    return torch.stack(out).cpu().numpy()


def parse_order(reply, n) -> list:
    """Places 0 .. n-1 in the order that a reply such as "[2] > [1]" names them; repeated and impossible numbers are dropped, and
    what is not named follows in its old order."""
    named = dict.fromkeys(int(x) - 1 for x in re.findall(r"\d+", reply) if 0 < len(x) < 10 and 1 <= int(x) <= n)
    return [*named, *(i for i in range(n) if i not in named)]


def listwise(ask, query, texts, window=10, stride=5):
    """Order of texts, best first, by a model that ranks `window` of them at a time, from the end to the front (RankGPT,
    arXiv:2304.09542). ask(prompt) -> reply."""
    order = list(range(len(texts)))
    for end in range(len(order), 0, -stride):
        part = order[max(0, end - window):end]
        listed = "\n".join(f"[{i + 1}] {' '.join(texts[d].split()[:300])}" for i, d in enumerate(part))
        reply = ask(f"Rank the passages by how well they answer the query.\n\n{listed}\n\nQuery: {query}\nAnswer with all numbers, the best "
                    "first, like [2] > [1].")
        order[max(0, end - window):end] = [part[i] for i in parse_order(reply, len(part))]
        if end <= window:
            break
    return order


def retrieval_metrics(ranked, gold, k_values=(5, 20)) -> dict:
    """Recall at k, NDCG@10 (discount log2(rank + 1)) and MRR of ranked ids against a set of gold ids."""
    hits = [x in gold for x in ranked]
    ideal = sum(1 / math.log2(i + 2) for i in range(min(10, len(gold))))
    return {f"recall@{k}": sum(hits[:k]) / len(gold) for k in k_values} | {
        "ndcg@10": sum(h / math.log2(i + 2) for i, h in enumerate(hits[:10])) / ideal,
        "mrr": next((1 / (i + 1) for i, h in enumerate(hits) if h), 0.0)}


def litsearch_data(path=None):
    """LitSearch from a folder: (ids, texts, queries). path has query.jsonl (query, corpusids, specificity, query_set, ...) and
    corpus.jsonl (corpusid, title, abstract), converted once from the hub's parquet (princeton-nlp/LitSearch). Papers of the
    same text count as one, the last. Without a path: the docstrings of Python's standard library; the query is a
    docstring's first sentence, the document the rest."""
    if path is None:
        docs = docstrings()
        queries = [{"query": first, "corpusids": [i], "specificity": 1} for i, (first, _) in enumerate(docs)]
        return list(range(len(docs))), [rest for _, rest in docs], queries
    corpus, queries = (read_rows(os.path.join(path, name)) for name in ("corpus.jsonl", "query.jsonl"))
    try:
        if not all(isinstance(row["title"], str) and isinstance(row["abstract"], str) and type(row["corpusid"]) is int for row in corpus):
            raise ValueError("corpus.jsonl wants title, abstract and a whole number corpusid")
        if not all(isinstance(q["query"], str) and q["corpusids"] and all(type(i) is int for i in q["corpusids"]) for q in queries):
            raise ValueError("query.jsonl wants a query and corpusids")
        by_text = {f"Title: {row['title']}\nAbstract: {row['abstract']}": row["corpusid"] for row in corpus}
        queries = [{"query": q["query"], "corpusids": list(q["corpusids"]), "specificity": q["specificity"]} for q in queries]
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: not LitSearch's rows ({e})") from None
    return list(by_text.values()), list(by_text), queries


def docstrings():
    """(first sentence, rest) of the docstrings in the standard library's modules, in a fixed order."""
    found = {}
    root = sysconfig.get_paths()["stdlib"]
    for name in sorted(x for x in os.listdir(root) if x.endswith(".py")):
        with open(os.path.join(root, name), encoding="utf-8", errors="replace") as f:
            try:
                tree = ast.parse(f.read())
            except (SyntaxError, ValueError):
                continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and (text := ast.get_docstring(node)):
                first, _, rest = text.partition("\n\n")
                if len(rest.split()) >= 10 and len(first.split()) >= 4:
                    found.setdefault(" ".join(rest.split()), " ".join(first.split()))
    return [(first, rest) for rest, first in found.items()]


def search(kind, model, tokenizer, data, chosen, ask):
    """Yield (query index, metrics) of the chosen queries with one retriever: bm25, dense, or rerank (BM25's best 20, ranked by the
    model). data: litsearch_data's; ask(prompt) -> reply."""
    ids, texts, queries = data
    index = None if kind == "dense" else BM25(texts, search_words)
    vectors = embed(model, tokenizer, texts) if kind == "dense" else None
    for i in chosen:
        query = queries[i]
        scores = index.scores(query["query"]) if vectors is None else vectors @ embed(model, tokenizer, [query["query"]])[0]
        ranked = [d for d, _ in top_k(scores, 200)]
        if kind == "rerank":
            head = ranked[:20]
            ranked = [head[j] for j in listwise(ask, query["query"], [texts[d] for d in head])] + ranked[20:]
        yield i, retrieval_metrics([ids[d] for d in ranked], set(query["corpusids"])) | {"specific": float(query["specificity"] == 1)}


# --- word problems: a small instruction set with answers that can be checked ---------------------------------------------

PEOPLE, GOODS = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana"), ("apples", "books", "coins", "eggs", "pens", "shells", "stamps", "toys")


def word_problem(rng):
    """(question, answer) of two steps of arithmetic, the answer worked out and closed as GSM8K's are (arXiv:2110.14168)."""
    (one, two), goods = rng.permutation(PEOPLE)[:2], rng.choice(GOODS)
    (many, more), (few, times) = rng.integers(10, 60, 2), rng.integers(2, 10, 2)
    product = few * times
    question, steps, result = [
        (f"{one} has {many} {goods}. {two} brings {few} {goods} a day for {times} days. How many {goods} does {one} have then?",
         (f"{few} * {times} = {product}", f"{many} + {product} = {many + product}"), many + product),
        (f"{one} fills {times} boxes with {few} {goods} each and has {more} {goods} left over. How many {goods} are there?",
         (f"{times} * {few} = {product}", f"{product} + {more} = {product + more}"), product + more),
        (f"{one} has {many + more} {goods}, gives {more} of them to {two} and finds {few} more. How many {goods} does {one} have now?",
         (f"{many + more} - {more} = {many}", f"{many} + {few} = {many + few}"), many + few),
        (f"{one} has {many} {goods}. {two} has {few} times as many. How many {goods} do they have together?",
         (f"{few} * {many} = {few * many}", f"{few * many} + {many} = {few * many + many}"), few * many + many),
        (f"{one} has {many + product} {goods} and gives {few} to each of {times} friends. How many {goods} are left?",
         (f"{few} * {times} = {product}", f"{many + product} - {product} = {many}"), many)][rng.integers(5)]
    return question, "\n".join((*steps, f"#### {result}"))


def final_answer(text):
    """What an answer says in the end: the number after GSM8K's ####, or what follows "the correct answer is" (the commonsense sets of
    LLM-Adapters, arXiv:2304.01933), in lower case; None if it says neither."""
    if found := re.search(r"####\s*\$?(-?[\d,]{0,40}\.?\d{1,40})", text):
        number = Fraction(found[1].replace(",", ""))
        return str(number.numerator) if number.denominator == 1 else str(number)
    found = re.search(r"the correct answer is\W*(\w+)", text, re.IGNORECASE)
    return found[1].lower() if found else None


# --- fact stream ----------------------------------------------------------------------------------------------------

BOS, FILLER, FACT, QUERY, ANSWER = 0, 1, 17, 145, 161  # first token of each kind
N_FILLER, N_KEY, N_VALUE = 16, 16, 8
VOCAB = ANSWER + N_VALUE  # 169
N_TOPIC = 8
TOPIC, CUE, WORD = VOCAB, VOCAB + N_TOPIC, VOCAB + N_TOPIC + 1  # only in streams with a topic


@dataclass(frozen=True)
class Facts:
    """A batch of fact streams. far(window, sink) marks the queries whose fact neither window nor sink shows. For a second skill of the
    same batch, cues of a topic, read: cue for query, and the last mention of the topic for fact."""
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
    query, fact = torch.tensor(query), torch.tensor(fact)
    return Facts(with_targets(tokens), query, fact, query // length * length)


def with_targets(tokens) -> Batch:
    """A Batch of streams (n_seq, length) whose answers weigh most."""
    n_seq, length = tokens.shape
    targets = np.concatenate((tokens[:, 1:], np.full((n_seq, 1), -100)), axis=1)
    answers = (targets >= ANSWER) & (targets < TOPIC) | (targets >= WORD)
    weights = np.where(answers, 1.0, np.where(targets < FACT, 0.3, 0.0))  # facts, queries, topics and cues are pure chance
    tensor = lambda x: torch.from_numpy(x.reshape(-1))
    return Batch(tensor(tokens), tensor(targets), torch.arange(n_seq + 1, dtype=torch.int32) * length, tensor(weights).float())


def with_topic(rng, facts: Facts, n_cue):
    """The same streams with a second long-range skill: each declares one of 8 topics once, in its first quarter, and n_cue cues at
    random places later ask for that topic's word. 1 + 2 n_cue tokens a sequence more. Returns (the facts, the cues)."""
    tokens = facts.batch.tokens.view(len(facts.batch.cu_seqlens) - 1, -1).numpy()  # (n_seq, n)
    (n_seq, n), rows, moved, cue, said = tokens.shape, [], [], [], []
    for row in tokens:
        free = 1 + np.flatnonzero((row < QUERY) | (row >= ANSWER))[:-1]  # places before any token but a query's answer
        told = rng.choice(free[(free > 8) & (free <= n // 4)])
        asked = np.sort(rng.choice(free[free > told], n_cue, replace=False))
        topic, places = rng.integers(N_TOPIC), np.array([told, *asked.repeat(2)])
        rows.append(np.insert(row, places, [TOPIC + topic, *[CUE, WORD + topic] * n_cue]))
        moved.append(np.arange(n) + places.searchsorted(np.arange(n), "right"))  # where the row's tokens went
        cue.append(asked + 1 + 2 * np.arange(n_cue))
        said.append([told, *(cue[-1][:-1] + 1)])
    length = n + 1 + 2 * n_cue
    starts = length * np.arange(n_seq)[:, None]
    index = lambda x: torch.from_numpy((np.array(x) + starts).reshape(-1))
    batch, new = with_targets(np.array(rows)), index(moved)
    return tuple(Facts(batch, query, fact, query // length * length)
                 for query, fact in ((new[facts.query], new[facts.fact]), (index(cue), index(said))))


def skill_stream(rng, n_seq, length, n_fact, n_query, topics=False, queries_last=False) -> dict:
    """{"facts": Facts} of a fact stream, or with topics also {"topics": Facts} of the same batch, a cue for every 64 tokens."""
    if not topics:
        return {"facts": fact_stream(rng, n_seq, length, n_fact, n_query, queries_last)}
    n_cue = length // 64
    return dict(zip(("facts", "topics"), with_topic(rng, fact_stream(rng, n_seq, length - 1 - 2 * n_cue, n_fact, n_query, queries_last), n_cue)))


@torch.no_grad()
def recall(model, facts: Facts, attend=None, which=None) -> float:
    """Share of queries (those marked in `which`, all by default) whose likeliest next token is the right answer."""
    rows = facts.query if which is None else facts.query[which]
    hidden = model.hidden(facts.batch.tokens.to(model.head.device), attend or causal(facts.batch.cu_seqlens))[rows]
    return ((hidden @ model.head.T).argmax(1).cpu() == facts.batch.targets[rows]).float().mean().item()


def build_facts(n, length, seed, tokenizer=None):
    """Fact streams of `length` tokens that end in a query; the answer is the next token. For the tiny model (token ids)."""
    if tokenizer is not None:
        raise ValueError("task facts is made of token ids for the tiny model: it has no text for a tokenizer")
    fits = [row for row in CURRICULUM if row[0] <= length]
    if not fits:
        raise ValueError(f"task facts needs a length of at least {CURRICULUM[0][0]} tokens, got {length}")
    tokens = fact_stream(np.random.default_rng([seed, length]), n, length + 1, fits[-1][1], 1, queries_last=True).batch.tokens
    return [Example("facts", row[:-1], row[-1:], 1) for row in tokens.view(n, -1).tolist()]


# --- tiny model -----------------------------------------------------------------------------------------------------

TINY = LlamaConfig(vocab_size=VOCAB, n_layer=3, n_head=8, n_kv_head=4, n_embd=64, n_ff=128, head_dim=16,
                   max_seq_len=2048, rope_base=1e6, tie_embeddings=True, bos_id=BOS)
TOPICAL = replace(TINY, vocab_size=WORD + N_TOPIC)  # for streams with a topic
# length, facts, queries, sequences per step, recall (moving average) that ends the stage: longer ones then take few steps
CURRICULUM = ((64, 8, 16, 32, 0.97), (128, 10, 24, 16, 0.97), (256, 12, 32, 8, 0.97), (512, 12, 48, 6, 0.985))


@torch.no_grad()
def tiny_start(seed, config=TINY) -> Llama:
    """The tiny Llama before training."""
    model, rng = Llama(config).init_weights(seed), torch.Generator().manual_seed(seed)
    model.model.embed_tokens.weight += 0.5 * torch.randn(TINY.n_embd, generator=rng) * TINY.n_embd ** -0.5
    for p in model.model.layers.parameters():  # small projections: the lookup settles in few heads (at full size the
        if p.dim() == 2:                       # best 3 of 12 heads recall .93 to .96 of far facts, at a quarter .98 to 1)
            p *= 0.25
    return model


def tiny_model(seed=0, path=None, max_steps=1200, log=print, topics=False) -> Llama:
    """The tiny Llama that knows the fact stream, or the one with topics, up to 512 tokens: read from folder `path`, or trained (about
    a CPU minute) and kept there. Raises ValueError if the stages are not through after max_steps steps or path holds another model."""
    config = TOPICAL if topics else TINY
    if path and os.path.exists(os.path.join(path, "config.json")):  # written last
        model = load_model(path)
        if model.config != config:
            raise ValueError(f"{path} holds another model than the tiny one: remove it or work elsewhere")
        return model
    model = tiny_start(seed, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01)
    step, bar = 0, tqdm(desc="tiny model", unit="step", disable=None, leave=False)
    for stage, (length, n_fact, n_query, n_seq, goal) in enumerate(CURRICULUM):
        average, first = dict.fromkeys(("facts", "topics") if topics else ("facts",), 0.0), step
        while min(average.values()) < goal:
            if step == max_steps:
                raise ValueError(f"the tiny model (seed {seed}) is at recall {min(average.values()):.2f} of length {length} after {step} steps")
            skills = skill_stream(np.random.default_rng([seed, step]), n_seq, length, n_fact, n_query, topics)
            batch = skills["facts"].batch
            hidden = model.hidden(batch.tokens, causal(batch.cu_seqlens))
            loss = cross_entropy(hidden, model.head, batch.targets, batch.weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = 4e-3 * min(1, (step + 1) / 30) * (0.5 if stage else 1.0)
            optimizer.step()
            optimizer.zero_grad()
            for name, skill in skills.items():
                with torch.no_grad():
                    right = (hidden[skill.query] @ model.head.T).argmax(1) == batch.targets[skill.query]
                average[name] += 0.1 * (right.float().mean().item() - average[name])
            step += 1
            bar.update()
            bar.set_postfix(length=length, loss=f"{loss.item():.3f}", recall=f"{min(average.values()):.3f}")
        log(f"tiny model, seed {seed}: recall {min(average.values()):.3f} at length {length} after {step - first} steps")
    bar.close()
    if path:
        save_model(model, path)
    return model


# --- evaluation: one JSON line per example as it is done ---------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    model: str | None = flag(None, "folder of a Llama; without it the tiny model's recall on the fact stream is shown")
    tasks: str = flag("niah_s,niah_mv,icl", "comma-separated: built ones, helmet:NAME or longproc:NAME (with --data), litsearch:bm25, "
                                            "litsearch:dense, litsearch:rerank")
    lengths: str = flag("1024", "of the prompts, comma-separated [tokens]; longproc and litsearch tasks have their own")
    n: int = flag(20, "examples of each task and length", low=1, high=10 ** 5)
    seed: int = flag(0, "of the built examples, and of the tiny model", low=0, high=2 ** 31)
    data: str | None = flag(None, "folder with the benchmark's own files")
    chat: bool | None = flag(None, "use the tokenizer's chat format; by default where it has one and the benchmark does, not for built tasks")
    prefix_host: str | None = flag(None, "put this host before every prompt, for models trained with MeCo (not with --chat)")
    policy: str = flag("full", "comma-separated: full streaming snapkv pyramidkv h2o tova knorm random heads")
    budget: int | None = flag(None, "for the policies that take one: entries kept per KV head [tokens]", low=0)
    keep: float | None = flag(None, "instead of budget: share kept", low=0, high=1)
    chunk: int | None = flag(None, "prefill so many tokens at a time; by default all at once", low=1)
    sink: int | None = flag(None, "first tokens always kept", low=0)
    window: int | None = flag(None, "streaming, heads: last tokens seen", low=1)
    obs_window: int = flag(64, "last queries that judge a chunk [tokens]", low=1)
    patch: bool = flag(False, "let the prompt's last tokens judge every chunk, where the policy looks at queries")
    heads: str | None = flag(None, "for policy heads: TSV file of the heads that keep all")
    sparsity: float | None = flag(None, "share of streaming heads to take from it; by default the file's own zeros", low=0, high=1)
    max_new_tokens: int | None = flag(None, "longest answer; by default the task's [tokens]", low=1)
    out: str = flag("out/eval.jsonl", "results; what is in it already is not run again")
    allow_code_exec: bool = flag(False, "let pseudo_to_code compile and run what the model wrote, within limits")
    device: str = flag("cpu", "torch device")
    dtype: str = flag("bfloat16", "of weights and cache", choices=tuple(DTYPES))


def policy_settings(config, policy) -> dict:
    """What of the command line a policy takes, for make_cache."""
    taken = {"chunk": config.chunk, "sink": config.sink, "obs_window": config.obs_window}
    if policy in ("streaming", "heads"):
        taken["window"] = config.window
    if policy == "streaming":
        taken["budget"] = config.budget if config.window is None else None
    elif policy not in ("full", "heads"):
        taken |= {"budget": config.budget, "keep": config.keep}
    if policy in ATTENTION_RULES:
        taken["patch"] = config.patch
    return {name: value for name, value in taken.items() if value is not None}


def answer(model, tokenizer, example, cache, max_new_tokens):
    """What the model writes: text (for task facts ids), until a stop id, the limit, or a line's end where scorers stop there."""
    spec = task_of(example.task)
    ids = []
    stop = () if tokenizer is None else tokenizer.eos_ids
    for _, token in zip(range(max_new_tokens), stream(model, example.prompt, cache)):
        if token in stop:
            break
        ids.append(token)
        if spec.stop_newline and "\n" in tokenizer.decode(ids).lstrip():
            break
    return ids if tokenizer is None or example.task == "facts" else tokenizer.decode(ids)


def read_results(path) -> dict:
    """Results so far by their "key", the first field; the torn last line that a killed run leaves is cut off. Raises ValueError for
    another kind of file."""
    done, good = {}, 0
    if not os.path.exists(path):
        return done
    with open(path, "rb") as f:
        for line in f:
            torn = not line.endswith(b"\n")
            try:
                if torn and line[:8] == b'{"key": '[:len(line)]:
                    break
                row = json.loads(line)
                done[row["key"]] = row
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{path}: not results of this script (line {len(done) + 1})") from None
            good += len(line)
    if good < os.path.getsize(path):
        os.truncate(path, good)
    return done


def confidence(scores):
    """Half a 95 % interval of the mean, over examples: Wilson's for 0/1 scores, else 1.96 standard errors."""
    n, mean = len(scores), sum(scores) / len(scores)
    if set(scores) <= {0.0, 1.0}:
        return 1.96 / (1 + 1.96 ** 2 / n) * math.sqrt(mean * (1 - mean) / n + 1.96 ** 2 / (4 * n * n))
    return 1.96 * math.sqrt(sum((s - mean) ** 2 for s in scores) / (n - 1) / n) if n > 1 else math.inf


def evaluate(config, model, tokenizer, log):
    """Run what is not in config.out yet, an equal share in each process. Returns all rows asked for, in order."""
    policies = config.policy.split(",")
    settings = {p: policy_settings(config, p) for p in policies}
    heads = load_heads(config.heads, config.sparsity) if config.heads else None
    mask = lambda p: {"heads": heads} if p == "heads" else {}
    for p in policies:
        make_cache(model, p, **settings[p], **mask(p))  # refuses what does not fit before anything runs
    done, keys, (rank, size) = read_results(config.out), [], processes()
    wait_for_all()  # until every process has read what there is
    who = [os.path.realpath(config.model), config.dtype, config.chat, config.max_new_tokens]
    names = config.tasks.split(",")
    for name, length in [(name, int(x)) for name in names for x in ("0" if name.startswith("longproc:") else config.lengths).split(",")]:
        if name.startswith("litsearch:"):
            continue
        if task_of(name).scorer == "pseudo_to_code" and not config.allow_code_exec:
            log(f"{name}: skipped, it runs generated code: --allow_code_exec")
            continue
        examples = examples_of(config, name, length, policies, tokenizer)
        for i, p, example in tqdm(examples, desc=f"{name} {length}", unit="example", disable=rank > 0 or None):
            sha = hashlib.sha256(json.dumps([example.prompt, example.answer, example.gold], default=str).encode()).hexdigest()[:16]
            extra = ["".join(str(int(x)) for x in heads.flatten())] if p == "heads" else []
            key = json.dumps([*who, name, length, p, settings[p], *extra, i, sha], sort_keys=True)
            if key not in done and len(keys) % size == rank:
                cache, start = make_cache(model, p, **settings[p], **mask(p)), time.perf_counter()
                said = answer(model, tokenizer, example, cache, config.max_new_tokens or example.max_new_tokens)
                metrics = score(name, said, example)
                done[key] = {"key": key, "task": name, "length": length, "policy": p, "settings": settings[p], "i": i,
                             "prompt_tokens": len(example.prompt), "cut_tokens": example.n_cut, "prediction": said, "score": metrics["score"],
                             "metrics": metrics, "footprint": float(cache.footprint()), "peak": float(cache.peak()),
                             "seconds": time.perf_counter() - start}
                append_line(config.out, done[key])
            keys.append(key)
    for name in names:
        if name.startswith("litsearch:"):
            keys += run_search(config, name, model, tokenizer, done, who)
    if not keys:
        raise ValueError("nothing to run: every task was skipped")
    wait_for_all()
    done = read_results(config.out) if size > 1 else done
    return [done[key] for key in keys]


def behind_host(example, tokenizer, host) -> Example:
    """The example with MeCo's "URL: host" and an empty line once before the whole prompt (arXiv:2501.01956)."""
    return replace(example, prompt=[*meco.prompt(tokenizer, "", host), *example.prompt[int(tokenizer.add_bos):]])


def tokenizer_for(tasks, model, path):
    """The tokenizer of folder `path`; None for the fact stream, which is token ids. Raises ValueError if `model` is none that reads those."""
    if tasks != ["facts"]:
        return load_tokenizer(path)
    if model.config.vocab_size not in (TINY.vocab_size, TOPICAL.vocab_size):
        raise ValueError(f"{path}: task facts is made of token ids for the tiny model, of vocabulary {VOCAB}, not {model.config.vocab_size}")
    return None


def examples_of(config, name, length, policies, tokenizer):
    """Yield (i, policy, example) of one task and length; built ones one at a time."""
    official, chat = ":" in name, config.chat if config.prefix_host is None else False
    if config.prefix_host is not None:
        length -= len(meco.prompt(tokenizer, "", config.prefix_host)) - int(tokenizer.add_bos)
    loaded = load(name, config.data, config.n, tokenizer=tokenizer, length=None if name.startswith("longproc:") else length, chat=chat) \
        if official else build(name, config.n, length, config.seed, tokenizer) if name == "facts" else None
    for i in range(config.n if loaded is None else len(loaded)):
        example = build_one(name, i, length, config.seed, tokenizer, bool(chat)) if loaded is None else loaded[i]
        if config.prefix_host is not None:
            example = behind_host(example, tokenizer, config.prefix_host)
        for p in policies:
            yield i, p, example


def run_search(config, name, model, tokenizer, done, who):
    """Run a LitSearch task's queries that are not done yet. Returns the keys of all."""
    data = litsearch_data(config.data)
    corpus = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
    chosen = random.Random(42).sample(range(len(data[2])), min(config.n, len(data[2])))
    keys = {i: json.dumps([*who, name, corpus, i]) for i in chosen}

    def ask(prompt):
        return tokenizer.decode(generate(model, to_ids(tokenizer, prompt, "", bool(config.chat)), 60, stop_ids=tokenizer.eos_ids))
    todo, start = dealt([i for i in chosen if keys[i] not in done]), time.perf_counter()
    for i, metrics in search(name.removeprefix("litsearch:"), model, tokenizer, data, todo, ask) if todo else ():
        done[keys[i]] = {"key": keys[i], "task": name, "length": 0, "policy": "full", "i": i, "score": metrics["recall@5"], "metrics": metrics,
                         "footprint": 1.0, "peak": 1.0, "seconds": time.perf_counter() - start}
        append_line(config.out, done[keys[i]])
        start = time.perf_counter()
    return [keys[i] for i in chosen]


def report(rows):
    """A Markdown table by task, length and policy; returns it as records too."""
    groups, records = {}, []
    for row in rows:
        groups.setdefault((row["task"], row["length"], row["policy"]), []).append(row)
    print("| task | tokens | policy | score | 95 % ± | n | empty | KV footprint | peak | seconds each |\n|---|---|---|---|---|---|---|---|---|---|")
    for (task, length, policy), group in groups.items():
        scores = [row["score"] for row in group]
        mean = lambda name: sum(row.get(name, row.get("metrics", {}).get(name)) for row in group) / len(group)
        half, empty = confidence(scores), sum(row.get("prediction", "x") in ("", []) for row in group)
        print(f"| {task} | {length or '-'} | {policy} | {mean('score'):.3f} | {half:.3f} | {len(group)} | {empty} | {mean('footprint'):.3f} | "
              f"{mean('peak'):.3f} | {mean('seconds'):.2f} |")
        extra = {k: round(mean(k), 4) for k in ("recall@5", "recall@20", "ndcg@10", "mrr") if k in group[0]["metrics"]}
        records.append({"task": task, "length": length, "policy": policy, "score": round(mean("score"), 4),
                        "half_interval": round(half, 4) if half < math.inf else None, "n": len(group), "empty": empty, **extra})
        if extra:
            print(f"|  |  |  | {', '.join(f'{k} {v:.3f}' for k, v in extra.items())} |  |  |  |  |  |  |")
    return records


def tiny_table(config):
    """Recall of the tiny model on the fact stream by distance."""
    model = tiny_model(config.seed, f"out/tiny-seed{config.seed}")
    print("| tokens | facts | queries | recall | facts up to 32 back | 33 to 128 | beyond |\n|---|---|---|---|---|---|---|")
    rows = []
    for length, n_fact, n_query, *_ in CURRICULUM:
        facts = fact_stream(np.random.default_rng([config.seed, 2 ** 31]), max(64, config.n), length, n_fact, n_query)
        back = facts.query - facts.fact
        bands = [None, back <= 32, (back > 32) & (back <= 128), back > 128]
        rows.append([None if band is not None and not band.any() else recall(model, facts, which=band) for band in bands])
        print(f"| {length} | {n_fact} | {n_query} | " + " | ".join("-" if x is None else f"{x:.3f}" for x in rows[-1]) + " |")
    print(json.dumps({"seed": config.seed, "recall": {row[0]: scores[0] for row, scores in zip(CURRICULUM, rows)}}))


def check_flags(config):
    """Raises ValueError for flags that cannot be, or cannot be together."""
    if not re.fullmatch(r"[1-9]\d{0,8}(,[1-9]\d{0,8})*", config.lengths):
        raise ValueError(f"--lengths must be positive numbers, comma-separated, got {config.lengths!r}")
    names, policies = config.tasks.split(","), config.policy.split(",")
    for flag_name in ("tasks", "lengths", "policy"):
        given = getattr(config, flag_name).split(",")
        if len(set(given)) < len(given):
            raise ValueError(f"--{flag_name} names something twice: {getattr(config, flag_name)}")
    for name in names:
        if name.split(":")[-1] in NEEDS_JUDGE:
            raise ValueError(f"task {name} is not scored here: needs a judge (a large model)")
        known = name in TASKS or name in ("litsearch:bm25", "litsearch:dense", "litsearch:rerank") or \
            name.startswith(("helmet:", "longproc:")) and name.split(":", 1)[1] in OFFICIAL
        if not known:
            raise ValueError(f"--tasks: unknown task {name!r} (built ones: {', '.join(TASKS)}; helmet:NAME, longproc:NAME; "
                             "litsearch:bm25, :dense, :rerank)")
        if name.startswith(("helmet:", "longproc:")) and config.data is None:
            raise ValueError(f"task {name} needs --data with the benchmark's own files")
    if any(int(x) > LONGEST for x in config.lengths.split(",")):
        raise ValueError(f"--lengths: at most {LONGEST} tokens, got {config.lengths}")
    for p in policies:
        if p not in POLICIES or p == "locret":
            raise ValueError(f"--policy: {p!r} is none of {', '.join(x for x in POLICIES if x != 'locret')}")
    if ("heads" in policies) != (config.heads is not None) or config.sparsity is not None and config.heads is None:
        raise ValueError("policy heads, and no other, needs --heads (and may take --sparsity)")
    taken = set().union(*(policy_settings(config, p) for p in policies))
    for name in ("budget", "keep", "window", "patch"):
        if getattr(config, name) not in (None, False) and name not in taken:
            raise ValueError(f"--{name} means nothing to policy {config.policy}")
    if policies != ["full"] and any(name.startswith("litsearch:") for name in names):
        raise ValueError("litsearch tasks take no eviction policy")
    if config.prefix_host is not None and (config.chat or any(name == "facts" or name.startswith("litsearch:") for name in names)):
        raise ValueError("--prefix_host is for prompts of plain text: not with --chat, facts or litsearch")
    if config.allow_code_exec and not shutil.which("g++"):
        raise ValueError("--allow_code_exec: there is no g++ here")
    if config.out == "" or os.path.exists(config.out) and not os.path.isfile(config.out):
        raise ValueError(f"--out {config.out!r} is not a file")


def main():
    config, = parse([Config], description="Long-context tasks: score, KV footprint and time of a Llama, for several policies at once.")
    if config.model is None:
        if given := [f.name for f in fields(config) if f.name not in ("n", "seed") and getattr(config, f.name) != f.default]:
            raise ValueError(f"--{given[0]} wants --model DIR")
        return tiny_table(config)
    check_flags(config)
    join_processes(config.device)
    check_device(config.device)
    model = load_model(config.model, config.device, DTYPES[config.dtype])
    tokenizer = tokenizer_for(config.tasks.split(","), model, config.model)
    os.makedirs(os.path.dirname(os.path.abspath(config.out)), exist_ok=True)
    rows = evaluate(config, model, tokenizer, lambda line: print(line, file=sys.stderr))
    records = report(rows)
    print(json.dumps({"model": config.model, "seed": config.seed, "dtype": config.dtype, "results": records}, allow_nan=False))


if __name__ == "__main__":
    run(main)
