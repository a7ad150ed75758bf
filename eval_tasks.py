"""Long-context tasks and their scores: HELMET, LongProc and LitSearch.

build(task, n, length, seed, tokenizer) makes examples of any length without a download.
load(task, path) reads the files that the benchmarks released.
score(task, prediction, example) scores a prediction as the benchmarks do.

From top to bottom: text metrics, the scorers, how an example gets its length, HELMET's kinds of
task, LongProc's procedures, the official files, LitSearch, word problems, the fact stream on which
the tiny model lives, and the evaluation of a model. A task that is built here resembles a
benchmark's task, but its scores are not that benchmark's scores.

Papers: HELMET arXiv:2410.02694, LongProc arXiv:2501.05414, LitSearch arXiv:2407.18940.

    python eval_tasks.py     # trains the tiny model if need be and shows its recall by distance
    python eval_tasks.py --model DIR --tasks niah_s,icl --lengths 1024 --policy snapkv --keep 0.25
"""
import ast
import bisect
import contextlib
import csv
import gzip
import hashlib
import inspect
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
import tempfile
import time
import uuid
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cache, lru_cache, partial, reduce
from itertools import combinations, islice, pairwise, product
from operator import contains, eq
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import cepe
import meco
from evict import RULES, Flags, advice
from model import (CHAT_CHOICES, DTYPES, Batch, Llama, LlamaConfig, append_line, barrier,
                   beyond_training, byte_tokenizer, causal, collate, cross_entropy, fingerprint,
                   flag, generate, join, load_model, load_tokenizer, parse, rank, read_json, run,
                   save_model, world_size, write_json)

# --- text metrics --------------------------------------------------------------------------------

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text):
    """SQuAD's normal form: lower case, no ASCII punctuation, no articles, single spaces."""
    text = text.lower().translate(NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def parse_output(text, prefix):
    """What follows `prefix` (a regular expression, in any case) on its line, or the first line."""
    found = re.search(f"(?:{prefix})(.*)(?:\n|$)", text, re.IGNORECASE)
    line = found[1] if found else text.split("\n")[0]
    return re.sub(f"^(?:{prefix})", "", line.strip(), flags=re.IGNORECASE).strip()


def f_measure(precision, recall):
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def word_f1(prediction, gold):
    """F1 of the multisets of normalised words; yes, no and noanswer only match themselves."""
    prediction, gold = normalize(prediction), normalize(gold)
    if prediction != gold and {prediction, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    a, b = prediction.split(), gold.split()
    same = (Counter(a) & Counter(b)).total()
    return 2 * same / (len(a) + len(b)) if same else 0.0


def mapping(text):
    """{a: b, c: d} of the text "a:b c:d"."""
    return dict(pair.split(":") for pair in text.split())


IRREGULAR = mapping(
    "skies:sky sky:sky dying:die lying:lie tying:tie news:news innings:inning inning:inning "
    "outings:outing outing:outing cannings:canning canning:canning howe:howe proceed:proceed "
    "exceed:exceed succeed:succeed")
STEP_2 = mapping(
    "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble alli:al entli:ent eli:e "
    "ousli:ous ization:ize ation:ate ator:ate alism:al iveness:ive fulness:ful ousness:ous "
    "aliti:al iviti:ive biliti:ble fulli:ful")
STEP_3 = mapping("icate:ic ative: alize:al iciti:ic ical:ic ful: ness:")
STEP_4 = mapping(
    "al: ance: ence: er: ic: able: ible: ant: ement: ment: ent: ion: ou: ism: ate: iti: ous: ive: "
    "ize:")


def consonants(word):
    """The word with c for consonants and v for vowels; y is a vowel after a consonant."""
    kinds = ""
    for letter in word:
        vowel = letter in "aeiou" or letter == "y" and kinds.endswith("c")
        kinds += "v" if vowel else "c"
    return kinds


def measure(word):
    """Porter's m: how often a consonant follows a vowel."""
    return consonants(word).count("vc")


def ends_cvc(word):
    kinds = consonants(word)
    return kinds == "vc" or kinds.endswith("cvc") and word[-1] not in "wxy"


def replace_suffix(word, rules, above=0):
    """The first rule that fits is the only one. It applies if the rest has m > above."""
    for suffix, new in rules.items():
        if word.endswith(suffix):
            rest = word.removesuffix(suffix)
            return rest + new if measure(rest) > above else word
    return word


def past_and_gerund(word):
    """Porter's step 1b for -ed and -ing."""
    rest = re.sub("(ed|ing)$", "", word)
    kinds = consonants(rest)
    if rest == word or "v" not in kinds:
        return word
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if len(rest) > 1 and rest[-1] == rest[-2] and kinds[-1] == "c":
        return rest if rest[-1] in "lsz" else rest[:-1]
    return rest + "e" if measure(rest) == 1 and ends_cvc(rest) else rest


@lru_cache(maxsize=2 ** 18)
def stem(word):
    """Porter's stemmer (1980) with NLTK's extensions, as in the usual implementation of ROUGE."""
    if word in IRREGULAR or len(word) <= 2:
        return IRREGULAR.get(word, word)
    ie = "ie" if len(word) == 4 else "i"  # step 1a: plurals
    word = replace_suffix(word, {"sses": "ss", "ies": ie, "ss": "ss", "s": ""}, above=-1)
    if word.endswith("ied"):  # step 1b
        word = word[:-1] if len(word) == 4 else word[:-2]
    elif word.endswith("eed"):
        word = replace_suffix(word, {"eed": "ee"})
    else:
        word = past_and_gerund(word)
    if len(word) > 2 and word.endswith("y") and consonants(word)[-2] == "c":  # step 1c
        word = word[:-1] + "i"
    word = replace_suffix(word, {"alli": "al"})  # step 2
    if word.endswith("logi") and measure(word[:-3]) > 0:
        word = word[:-1]
    word = replace_suffix(word, STEP_2)
    word = replace_suffix(word, STEP_3)
    if not word.endswith("ion") or word.endswith(("sion", "tion")):
        word = replace_suffix(word, STEP_4, above=1)
    m = measure(word[:-1])  # step 5
    if word.endswith("e") and (m > 1 or m == 1 and not ends_cvc(word[:-1])):
        word = word[:-1]
    if word.endswith("ll") and measure(word[:-1]) > 1:
        word = word[:-1]
    return word


def rouge_words(text):
    """The words; those with more than three letters as stems."""
    words = re.findall("[a-z0-9]+", text.lower())
    return [stem(w) if len(w) > 3 else w for w in words]


def rouge_lines(text, by_line):
    """The words of each line, or of the whole text; nothing for a line without words."""
    parts = text.split("\n") if by_line else [text]
    return list(filter(None, map(rouge_words, parts)))


def common_subsequence(a, b):
    """Indices into a of one longest common subsequence of the lists a and b."""
    table = [[0] * (len(b) + 1)]  # table[i][j]: its length for a[:i] and b[:j]
    for x in a:
        above, row = table[-1], [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
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


def rouge_l(prediction, gold, by_line=False):
    """ROUGE-L: (F1, recall), each 0..1.

    by_line is ROUGE-Lsum: a gold line's matches are the union of its common subsequences with all
    predicted lines. Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries",
    sections 3.1 and 3.2."""
    predicted, golds = rouge_lines(prediction, by_line), rouge_lines(gold, by_line)
    unused, unused_gold = Counter(sum(predicted, [])), Counter(sum(golds, []))
    n_predicted, n_gold, same = unused.total(), unused_gold.total(), 0
    if not n_predicted or not n_gold:
        return 0.0, 0.0
    for words in golds:
        matches = set()
        for other in predicted:
            matches.update(common_subsequence(words, other))
        for i in sorted(matches):
            if unused[words[i]] and unused_gold[words[i]]:  # a word counts once an occurrence
                unused[words[i]] -= 1
                unused_gold[words[i]] -= 1
                same += 1
    recall = same / n_gold
    return f_measure(same / n_predicted, recall), recall


# --- HELMET's scorers: text is the answer prefix and the prediction, example has the gold --------

K_VALUES = (1, 5, 10, 20, 50, 100, 200, 500, 1000)


def flat(answers):
    """All strings of an answer: a string, a list, or a list of lists of aliases."""
    return [answers] if isinstance(answers, str) else sum(map(flat, answers), [])


def best(a, b):
    """The better value of each metric of two dicts."""
    return {name: max(a[name], b[name]) for name in a}


def gold_metrics(prediction, gold):
    """The metrics of a text against one gold, 0..1."""
    words, gold_words = normalize(prediction), normalize(gold)
    l_f1, l_recall = rouge_l(prediction, gold)
    sum_f1, sum_recall = rouge_l(prediction, gold, by_line=True)
    return {
        "exact_match": float(words == gold_words),
        "f1": word_f1(prediction, gold),
        "substring_exact_match": float(gold_words in words),
        "rougeL_f1": l_f1,
        "rougeL_recall": l_recall,
        "rougeLsum_f1": sum_f1,
        "rougeLsum_recall": sum_recall,
    }


def text_metrics(prediction, answers):
    """Each metric's best value over all gold answers, 0..1."""
    return reduce(best, [gold_metrics(prediction, gold) for gold in flat(answers)])


def score_qa(text, example, prefix="Answer:"):
    """The better, metric by metric, of the whole text and its rest after the prefix."""
    answers = example["answer"]
    return best(text_metrics(text, answers), text_metrics(parse_output(text, prefix), answers))


def score_icl(text, example):
    return text_metrics(parse_output(text, "label:"), example["answer"])


def score_choice(text, example):
    """Multiple choice: the golds are the letter and the whole option."""
    scores = score_qa(text, example)
    option = float(example["answer"][1].lower() in text.lower())
    exact = max(option, scores["exact_match"])
    return scores | {"substring_exact_match": option, "exact_match": exact}


def score_ruler(text, example):
    """RULER: the part of the golds that the text contains."""
    golds = flat(example.get("answer", example.get("outputs")))
    return {"ruler_recall": sum(g.lower() in text.lower() for g in golds) / len(golds)}


def parse_ranking(text):
    """{id: score} of the longest `1 > 2 > 3` in a text; the first id has the highest score."""
    text = re.sub(r"[\[\]:]", "", text).lower().replace("id", "")
    chains = re.findall(r"\d+(?:\s*>\s*\d+)*", text)
    ids = re.split(r"\s*>\s*", max(chains, key=len)) if chains else [text]
    scores = {}
    for i, x in enumerate(ids):
        scores.setdefault(x, len(ids) - i)
    return scores


def dcg(gains):
    """Discounted cumulative gain: the discount of rank 1, 2, ... is log2(rank + 1)."""
    return sum(gain / math.log2(i + 2) for i, gain in enumerate(gains))


def reciprocal_rank(hits):
    return 1 / (1 + hits.index(True)) if True in hits else 0.0


def ranking_metrics(scores, labels, k_values):
    """NDCG, MAP, recall and precision at k, and MRR, as trec_eval computes them to 5 decimals.

    scores {id: float}, labels {id: relevance}; NDCG's gain is the label. Of equal scores the
    greater id comes first."""
    ranked = sorted(scores, key=lambda i: (scores[i], i), reverse=True)
    gains = [max(0, labels.get(i, 0)) for i in ranked]
    ideal = sorted((max(0, label) for label in labels.values()), reverse=True)
    hits = [gain > 0 for gain in gains]
    n_relevant = sum(gain > 0 for gain in ideal) or 1  # without a relevant document all is 0
    precisions = [hit * sum(hits[:i]) / i for i, hit in enumerate(hits, 1)]  # 0 without a hit
    out = {}
    for k in k_values:
        out[f"NDCG@{k}"] = dcg(gains[:k]) / (dcg(ideal[:k]) or 1)
        out[f"MAP@{k}"] = sum(precisions[:k]) / n_relevant
        out[f"Recall@{k}"] = sum(hits[:k]) / n_relevant
        out[f"P@{k}"] = sum(hits[:k]) / k
    out["MRR"] = reciprocal_rank(hits)
    return {name: round(value, 5) for name, value in out.items()}


def score_ndcg(text, example):
    return ranking_metrics(example["scores"], example["qrel"], example["k_values"])


def score_rerank(text, example):
    """A ranking in words, of documents with labels [[id, label]]."""
    scores = parse_ranking(text)
    labels = {i: int(label) for i, label in example["qrel"]}
    k_values = example.get("k_values") or [k for k in K_VALUES if k <= len(labels)]
    return ranking_metrics(scores, labels, k_values) | {"num_preds": len(scores)}


def remove_citations(text):
    return re.sub(r" ?\[\d+", "", text).replace(" |", "").replace("]", "")


def alce_text(text):
    """An answer in one line, without citations."""
    return remove_citations(re.sub("\n+", " ", text).replace("<|im_end|>", ""))


def score_asqa(text, example):
    """ALCE's ASQA without citations, 0..100: sub-questions with a short answer in the text."""
    text, hits = alce_text(text), []
    for question in example.get("qa_pairs") or []:
        hits.append(any(normalize(a) in normalize(text) for a in question["short_answers"]))
    n = len(hits) or 1
    return {"length": float(len(text.split())), "str_em": 100 * sum(hits) / n,
            "str_hit": 100.0 * (sum(hits) == n)}


def score_qampari(text, example):
    """ALCE's QAMPARI, 0..100: a comma list against gold entities with aliases.

    top5: five of the entities are enough."""
    parts = alce_text(text).rstrip().rstrip(".").rstrip(",").split(",")
    found = list(filter(None, map(normalize, parts)))
    golds = [set(map(normalize, aliases)) for aliases in example["answers"]]
    known = set().union(*golds)
    precision = sum(x in known for x in found) / (len(found) or 1)
    n_hit = sum(not aliases.isdisjoint(found) for aliases in golds)
    recall = n_hit / len(golds)
    top5 = min(5, n_hit) / min(5, len(golds))
    return score_asqa(text, {}) | {
        "num_preds": float(len(found)),
        "qampari_prec": 100 * precision,
        "qampari_rec": 100 * recall,
        "qampari_rec_top5": 100 * top5,
        "qampari_f1": 100 * f_measure(precision, recall),
        "qampari_f1_top5": 100 * f_measure(precision, top5),
    }


# --- LongProc's scorers --------------------------------------------------------------------------

def tagged(text, tag):
    """The text from the first <tag> to the first </tag>, or None."""
    start, end = text.find(f"<{tag}>"), text.find(f"</{tag}>")
    if start < 0 or end < 0:
        return None
    return text[start + len(tag) + 2:end].strip()


def procedure_scores(accuracy, credit, extracted):
    return {"accuracy": float(accuracy), "partial_accuracy": float(credit),
            "extraction_rate": float(extracted)}


def n_right(lines, golds, same=eq):
    """How many lines come before the first one that is not as in the gold."""
    compared = list(zip(lines, golds))
    for i, (line, gold) in enumerate(compared):
        if not same(line, gold):
            return i
    return len(compared)


def read_table(text):
    """The rows after the header of a TSV text; an empty list if the text is no table.

    A row of another width becomes N/A; the last one is dropped."""
    header, *rows = csv.reader(text.strip().split("\n"), delimiter="\t")
    if not rows or len(set(header)) < len(header):
        return []
    if len(rows[-1]) != len(header):
        rows.pop()
    normalized = []
    for row in rows:
        if len(row) != len(header):
            row = ["N/A"] * len(header)
        normalized.append([normalize(cell).replace(" ", "") for cell in row])
    return normalized


def table_scores(precision, recall, extracted):
    f1 = f_measure(precision, recall)
    return {"f1": f1, "precision": precision, "recall": recall, "extraction_rate": extracted}


def score_table(text, example):
    """HTML to TSV: predicted rows in the gold, and gold rows in the prediction, in any order."""
    fence = re.search("(?s)```tsv(.*)```", text) or re.search("(?s)```tsv(.*)", text)
    try:
        rows = read_table(fence[1] if fence else text)
        golds = read_table(example["reference_output"])
    except csv.Error:
        return table_scores(0.0, 0.0, 0.0)
    if not rows or len(rows[0]) != len(golds[0]):
        return table_scores(0.0, 0.0, 0.0)
    precision = sum(row in golds for row in rows) / len(rows)
    recall = sum(row in rows for row in golds) / len(golds)
    return table_scores(precision, recall, 1.0)


def score_path(text, example):
    """Path traversal: the route must be the gold one. The first wrong line has partial credit."""
    route, gold = tagged(text, "Route"), example["reference_output"].strip()
    if route is None:
        return procedure_scores(0, 0, 0)
    lines, golds = route.split("\n"), gold.split("\n")
    n = min(n_right(lines, golds) + 1, len(lines), len(golds))
    return procedure_scores(route == gold, n / len(golds), 1)


BELIEF_FILLERS = re.compile(r"\b(an?|the|on|in|at|step|thinks?|believes?|is|are|of|location|knows?|"
                            r"belief)\b")


def belief_lines(text):
    """The words, without fillers, of each line that begins with a dash; only the first such line
    may be indented."""
    dashed = [line for line in text.splitlines() if line.strip().startswith("-")]
    lines = []
    for line in "\n".join(dashed).strip().split("\n"):
        if line.startswith("-"):
            plain = line.lower().replace("\u2019", "").translate(NO_PUNCTUATION)
            lines.append(BELIEF_FILLERS.sub(" ", plain).split())
    return list(filter(None, lines))


def score_beliefs(text, example):
    """Theory of mind: the trace, one line a step, must be the gold one."""
    lines, golds = belief_lines(text), belief_lines(example["reference_output"])
    return procedure_scores(lines == golds, n_right(lines, golds) / len(golds), 1)


OPERAND = r"(?a:\s*(-?(?:0|[1-9](?:_?\d){0,8}))\s*)"
EQUATION = re.compile(rf"{OPERAND}([-+*/]){OPERAND}=\s*([-+]?\d(?:_?\d){{0,17}})\s*")


def arithmetic(a, op, b):
    """a op b, exactly; None for a division by zero."""
    if op == "/":
        return Fraction(a, b) if b else None
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def solves(lines, numbers, target):
    """Whether three equations `a op b = c` use each number once and end at the target.

    Nothing is evaluated as code. A minus sign before an operand is allowed in sums only."""
    unused = Counter(numbers)
    if len(lines) != 3:
        return False
    for line in lines:
        found = EQUATION.fullmatch(line)
        if not found:
            return False
        a, op, b, c = found.groups()
        if op != "+" and "-" in a + b:
            return False
        a, b, c = int(a), int(b), int(c)
        used = Counter((a, b))
        if arithmetic(a, op, b) != c or not used <= unused:
            return False
        unused = unused - used + Counter((c,))
    return c == target


def search_lines(text):
    """The lines from the last `# Search Procedure` to the next empty line, or None."""
    _, mark, rest = text.rpartition("# Search Procedure")
    return rest.strip().split("\n") if mark else None


def same_search_line(line, gold):
    if line == gold or "|- Try" not in gold:
        return line == gold
    same_result = ("drop this branch" in line) == ("drop this branch" in gold)
    return same_result and line.split("=")[0] == gold.split("=")[0]


def score_countdown(text, example):
    """Countdown: any right solution counts.

    Without one, partial credit is the index of the first line of the search that differs from the
    gold, or of the last compared line, over the number of lines. It is -1 / n where no line could
    be compared, as in the released code."""
    item, solution = example["item"], tagged(text, "Solution")
    extracted = solution is not None
    if extracted and solves(solution.split("\n"), item["nums"], item["target"]):
        return procedure_scores(1, 1, 1)
    lines = search_lines(text)
    golds = search_lines(example["reference_output"].partition("\n\n")[0])
    if lines is None or lines[0] != golds[0]:
        return procedure_scores(0, 0, extracted)
    last = min(len(lines), len(golds)) - 2
    n = min(n_right(lines[1:], golds[1:], same_search_line), last)
    return procedure_scores(0, n / (len(golds) - 1), extracted)


def parse_plan(plan):
    """[(city, days)] of a travel plan's lines; the days between two flights are a stay."""
    cities, days, end, total = [], [1], None, None
    for line in plan.split("\n"):
        title = re.search(r"European cities for (\d{1,9}) days", line)
        total = int(title[1]) if title else total
        stay = re.search(r"(?<!\d)\d{1,9}-(\d{1,9})(?!\d)", line)
        if stay:
            end = int(stay[1])
            if end == total:  # what follows is another plan
                break
        flight = re.match(r".*Day (\d{1,9})(?!\d).*from (\w+) to (\w+)", line)
        if flight:
            cities = cities or [flight[2]]
            cities.append(flight[3])
            days.append(int(flight[1]))
    if end is None:
        return []
    stays = [last - first + 1 for first, last in pairwise([*days, end])]
    return list(zip(cities, stays))


def procedure_lines(text):
    """Normalised lines of a travel procedure and its plan, without the sentence between them."""
    text = text.replace("Output the plan in the required format:", "")
    _, tag, rest = text.partition("<Solving Procedure>")
    text = tag + rest.split(tag)[0] if tag else text
    return [normalize(line) for line in text.split("\n") if line.strip()]


def score_travel(text, example):
    """Travel planning: all cities and stays in order; partial credit along the gold procedure."""
    item, plan = example["item"], tagged(text, "Plan")
    cities = item["ground_truth_cities"].split("**")
    stays = map(int, item["ground_truth_durations"].split("**"))
    if plan is not None and parse_plan(plan)[:len(cities)] == list(zip(cities, stays)):
        return procedure_scores(1, 1, 1)
    lines, golds = procedure_lines(text), procedure_lines(example["reference_output"])
    if not lines:
        return procedure_scores(0, 0, plan is not None)
    n = min(n_right(lines, golds, contains), len(lines) - 1, len(golds) - 1)
    return procedure_scores(0, n / len(golds), plan is not None)


INCLUDED = (
    "cstdio iostream vector algorithm numeric cmath cstring set map queue stack list fstream "
    "climits cassert iomanip sstream bitset").split()
CPP_HEADERS = "".join(f"#include <{name}>\n" for name in INCLUDED) + "using namespace std;\n"
# A Python program that sets limits and becomes a command: python -c LIMITER CPU_SECONDS COMMAND...
LIMITER = """
import os, resource, sys
limits = {"AS": 2 ** 30, "FSIZE": 2 ** 24, "NPROC": 256, "NOFILE": 64, "CORE": 0}
limits["CPU"] = int(sys.argv[1])
for name, n in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (n, n))
os.execvp(sys.argv[2], sys.argv[2:])
"""
# No network; all processes end with the first one
ALONE = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]


@cache
def has_namespaces():
    """Whether the kernel lets this user run a command alone."""
    if not shutil.which("unshare"):
        return False
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.run([*ALONE, "true"], **quiet).returncode == 0


def run_limited(command, folder, stdin, seconds):
    """Output (str) of a command that runs in `folder`, or None after `seconds`.

    Memory, CPU time, file size, processes and open files are limited; the environment is empty.
    Where the kernel lets a user have namespaces, there is no network and no process outlives the
    command; elsewhere only its process group is killed. This limits the damage that a model's code
    can do. It is not a sandbox."""
    command = [sys.executable, "-I", "-c", LIMITER, str(seconds + 1), *command]
    if has_namespaces():
        command = ALONE + command
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen(
            command, cwd=folder, env={"PATH": os.environ.get("PATH", "")}, stdout=out,
            stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
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


def compiles(folder):
    """Whether g++ makes main of main.cpp, within the limits."""
    run_limited(["g++", "-std=c++11", "-O", "main.cpp", "-o", "main"], folder, "", 60)
    return Path(folder, "main").exists()


def score_code(text, example):
    """Pseudo-code to C++: compiled and run on the first ten tests; every byte of the output counts.

    Runs what a model wrote, so the command line asks for --allow_code_exec. Raises ValueError where
    there is no g++, or it compiles nothing."""
    if not shutil.which("g++"):
        raise ValueError("pseudo_to_code needs g++")
    fence = re.search(r"(?s)```(?:cpp|c\+\+)(.*)```", text)
    if not fence:
        return procedure_scores(0, 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "main.cpp")
        source.write_text(CPP_HEADERS + fence[1], encoding="utf-8", errors="replace")
        right = compiles(folder)
        if not right:
            source.write_text(CPP_HEADERS + "int main() {}")
            if not compiles(folder):
                raise ValueError("g++ does not run here within the limits of processes and memory")
        for given, expected in example["item"]["testcases"][:10]:
            stdin, stdout = "\n".join(given) + "\n", "\n".join(expected) + "\n"
            right = right and run_limited(["./main"], folder, stdin, 3) == stdout
    return procedure_scores(right, right, 1)


SCORERS = {
    "qa": score_qa,
    "ruler_qa": score_qa,
    "json_kv": partial(score_qa, prefix="corresponding value:"),
    "lexsum_rouge": partial(score_qa, prefix="Summary:"),
    "icl": score_icl,
    "choice": score_choice,
    "ruler_recall": score_ruler,
    "rerank": score_rerank,
    "ndcg": score_ndcg,
    "alce_asqa": score_asqa,
    "alce_qampari": score_qampari,
    "parse_output": lambda text, example: {"parsed": parse_output(text, example["prefix_arg"])},
    "normalize_answer": lambda text, example: {"normalized": normalize(text)},
    "remove_citations": lambda text, example: {"text": remove_citations(text)},
    "html_to_tsv": score_table,
    "path_traversal": score_path,
    "tom_tracking": score_beliefs,
    "countdown": score_countdown,
    "travel_planning": score_travel,
    "pseudo_to_code": score_code,
}


# --- examples ------------------------------------------------------------------------------------

class Draft(NamedTuple):
    """A prompt in parts. Only the context, which the parts make, may be cut."""
    before: str
    parts: list  # documents or demonstrations in order; running text is one part
    after: str
    prefix: str  # of the answer
    gold: dict | None  # for the scorer; its "answer" or "reference_output" is the right answer
    separator: str = "\n\n"
    n_near: int = 10  # of several parts, those that a CEPE's decoder reads itself

    @property
    def context(self):
        return self.separator.join(self.parts)

    @property
    def user(self):
        return self.before + self.context + self.after

    @property
    def answer(self):
        return self.gold.get("reference_output", self.gold.get("answer"))

    def cut(self, context):
        """The same with the beginning `context` of its context."""
        parts, at = [], 0
        for part in self.parts:
            end = at + len(part + self.separator)
            if at < len(context):
                parts.append(part if end < len(context) else context[at:])
            at = end
        return self._replace(parts=parts)


@dataclass(frozen=True)
class Example:
    """A prompt and what the scorer compares an answer with.

    The fact stream has no text: there user, prefix, gold and parts are empty."""
    task: str
    prompt: list  # token ids
    answer: object  # the right answer or the reference output
    max_new_tokens: int
    draft: Draft = Draft("", [], "", "", None)
    chat: bool = False
    n_cut: int = 0  # context tokens that did not fit into the length
    chunks: tuple = ()  # token ids that a CEPE's encoder reads, list by list

    @property
    def user(self):
        """The prompt's text."""
        return self.draft.user

    @property
    def prefix(self):
        """Of the answer; it ends the prompt, but not in a chat."""
        return "" if self.chat else self.draft.prefix

    @property
    def gold(self):
        """What the scorer takes."""
        return self.draft.gold

    @property
    def parts(self):
        """Documents or demonstrations in order; running text is one part."""
        return self.draft.parts

    def sha(self):
        """Of all that its result depends on."""
        parts = self.prompt, self.chunks, self.gold, self.answer
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class Task(NamedTuple):
    """A task that is built: make(rng, m) is a Draft with m items of context."""
    make: object
    scorer: str
    main: str  # the metric that is the task's score
    max_new_tokens: int
    least: int = 1  # items


def to_ids(tokenizer, user, prefix, chat):
    """Prompt ids: one user turn, or the text and the answer prefix on the next line."""
    if chat:
        return tokenizer.encode(tokenizer.chat([{"role": "user", "content": user}]))
    return tokenizer.document(user + "\n" + prefix if prefix else user)


def to_example(task, draft, tokenizer, chat, max_new_tokens, length=None):
    """The Example of a Draft. A prompt of more than `length` tokens loses its context's end.

    Raises ValueError if even the prompt without its context is too long."""
    if chat:  # as released: no line's end before the end of the turn
        draft = draft._replace(after=draft.after.rstrip("\n"))
    ids, n_cut = to_ids(tokenizer, draft.user, draft.prefix, chat), 0
    while length is not None and len(ids) > length:
        tokens, n_over = tokenizer.encode(draft.context), len(ids) - length
        if n_over >= len(tokens):
            raise ValueError(f"task {task}: the prompt takes {len(ids) - len(tokens)} tokens "
                             f"without its context, more than {length}")
        context = tokenizer.decode(tokens[:-n_over]).rstrip("\ufffd")
        draft, n_cut = draft.cut(context), n_cut + n_over
        ids = to_ids(tokenizer, draft.user, draft.prefix, chat)
    return Example(task, ids, draft.answer, max_new_tokens, draft, bool(chat), n_cut)


def for_encoder(example, tokenizer, chunk_size=256, n_near=2048, share=None):
    """The Example as a CEPE reads it: the first documents (10) or demonstrations (2) stay in the
    prompt, each further one is a chunk of the encoder; of running text the last n_near tokens stay.

    chunk_size [tokens]: what is longer takes several chunks. share: how much of the context stays
    instead, 0..1. Source: CEPE's evaluation, arXiv:2402.16617."""
    draft, encode = example.draft, tokenizer.encode
    if len(draft.parts) > 1:
        n = draft.n_near if share is None else round(share * len(draft.parts))
        near, far = draft.parts[:n], [encode(part) for part in draft.parts[n:]]
    else:
        ids = encode(draft.context)
        first = max(0, len(ids) - n_near) if share is None else round((1 - share) * len(ids))
        near, far = [tokenizer.decode(ids[first:]).lstrip("\ufffd")], [ids[:first]]
    chunks = [ids[i:i + chunk_size] for ids in far for i in range(0, len(ids), chunk_size)]
    if not chunks:
        return example
    prompt = to_ids(tokenizer, draft._replace(parts=near).user, draft.prefix, example.chat)
    return replace(example, prompt=prompt, chunks=tuple(chunks))


LONGEST = 2 ** 21  # tokens of a prompt


def largest(fits, low):
    """The largest m >= low with fits(m), by doubling and halving; fits(low) must be true."""
    step = 1
    while fits(low + step):
        step *= 2
    high = low + step  # does not fit
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def padding(rng, n):
    """n letters that mean nothing, in a separate paragraph: a token or two each."""
    letters = [rng.choice(string.ascii_lowercase) for _ in range(n)]
    return " ".join(letters) + "\n\n" if letters else ""


def build_one(name, i, length, seed, tokenizer, chat=False):
    """Example i of a built task: as many items as fit into `length` tokens, then padding.

    Raises ValueError if the least number of items does not fit."""
    task = TASKS[name]

    def make(m):  # the same for a given i, however many examples there are
        return task.make(random.Random(f"{name}-{seed}-{i}"), m)

    def pad(draft, n):
        return draft._replace(before=padding(random.Random(i), n) + draft.before)

    def size(draft):
        return len(to_ids(tokenizer, draft.user, draft.prefix, chat))

    n_least = size(make(task.least))
    if n_least > length:
        raise ValueError(f"task {name} needs prompts of at least {n_least} tokens, got {length}")
    draft = make(largest(lambda m: size(make(m)) <= length, task.least))
    draft = pad(draft, largest(lambda n: size(pad(draft, n)) <= length, 0))
    example = to_example(name, draft, tokenizer, chat, task.max_new_tokens)
    n_reference = len(tokenizer.encode(draft.gold.get("reference_output", "")))
    room = 11 * n_reference // 10  # a small vocabulary takes more tokens than the task's limit
    return replace(example, max_new_tokens=max(room, task.max_new_tokens))


def build(task, n, length, seed, tokenizer=None, chat=False):
    """n Examples of a built task, the same on every machine.

    length: of the prompts [tokens], met within 2 %. tokenizer: the model's; raw bytes by default.
    chat: use the tokenizer's chat format. Raises ValueError if the length is too short for the task
    or above LONGEST, KeyError for an unknown task."""
    if length > LONGEST:
        raise ValueError(f"a prompt has at most {LONGEST} tokens, not {length}")
    if task == "facts":
        return build_facts(n, length, seed, tokenizer)
    tokenizer = tokenizer or byte_tokenizer()
    return [build_one(task, i, length, seed, tokenizer, chat) for i in range(n)]


def task_of(name):
    """The Task of a built task, or the Official of NAME, helmet:NAME or longproc:NAME."""
    return TASKS.get(name) or OFFICIAL[name.split(":")[-1]]


def needs_judge(name) -> bool:
    """Whether a large model scores it in HELMET, where here only its ROUGE is computed."""
    return name.startswith("helmet:") and task_of(name).is_judged


def score(task, prediction, example):
    """All metrics of a prediction (text; ids for task facts) and "score", the main one, in 0..1."""
    if task == "facts":
        return {"score": float(prediction == example.answer)}
    kind = task_of(task)
    metrics = SCORERS[kind.scorer](example.prefix + prediction, example.gold)
    highest = 100 if kind.scorer.startswith("alce") else 1
    return {"score": metrics[kind.main] / highest, **metrics}


# --- invented words ------------------------------------------------------------------------------

NOUNS = (
    "river lamp garden bridge window castle forest candle market ladder harbor mirror basket "
    "meadow anchor pillow violin kettle tunnel island saddle curtain pepper rocket blanket compass "
    "hammer tower valley lantern button carpet feather marble orchard pocket ribbon shovel statue "
    "thread wagon whistle cabin dragon engine").split()
ADJECTIVES = (
    "amber brave calm dusty eager faint gentle hollow icy jolly keen lively mellow narrow odd pale "
    "quiet rapid silent tall urban vivid warm young zesty bold crisp dim early fresh").split()
ENDINGS = "a e i o u an el or".split()
SYLLABLES = [a + b for a, b in product("bdfgklmnprstvz", ENDINGS)]
RELATIONS = (
    ("was born in", "Where was {} born?"),
    ("works as a", "What does {} work as?"),
    ("keeps a", "What does {} keep?"),
    ("collects old", "What does {} collect?"),
    ("lives beside the", "What does {} live beside?"),
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def distinct(draw, n):
    """n different results of draw()."""
    found = {}
    while len(found) < n:
        found[draw()] = None
    return list(found)


def names(rng, n):
    """n distinct invented names of one word."""
    return distinct(lambda: "".join(rng.choice(SYLLABLES) for _ in range(3)).capitalize(), n)


def thing(rng, separator=" "):
    """An adjective and a noun."""
    return rng.choice(ADJECTIVES) + separator + rng.choice(NOUNS)


def keys(rng, n):
    """n distinct keys such as brave-lamp, or brave-lamp-271 if they are many."""
    if n > 500:
        return distinct(lambda: f"{thing(rng, '-')}-{rng.randrange(1000)}", n)
    return distinct(lambda: thing(rng, "-"), n)


def number7(rng):
    return str(rng.randrange(10 ** 6, 10 ** 7))


def new_uuid(rng):
    return str(uuid.UUID(int=rng.getrandbits(128)))


def sentence(rng):
    """One of many plain sentences that say nothing."""
    subject, verb = thing(rng), rng.choice(("stood", "lay", "waited", "was left"))
    place = rng.choice(("near", "behind", "under", "beside"))
    return f"The {subject} {verb} {place} a {thing(rng)}."


# --- HELMET's kinds of task ----------------------------------------------------------------------

def hide(rng, lines, line):
    """Insert a line at a random place."""
    lines.insert(rng.randrange(len(lines) + 1), line)


def needle(kind, key, value):
    return f"One of the special magic {kind}s for {key} is: {value}."


def ask_needle(kind, key, values, lines):
    """RULER's question about the values of a key in a haystack of lines (arXiv:2404.06654)."""
    are, the, s = ("is", "the", "") if len(values) == 1 else ("are", "all the", "s")
    what = f"special magic {kind}{s} for {key} mentioned in the provided text"
    before = (f"Special magic {kind}s are hidden in the text below. Remember them: you will be "
              "asked about them.\n")
    after = f"\nWhat {are} {the} {what}?"
    return Draft(before, ["\n".join(lines)], after, f"The {what} {are}", {"answer": values})


def niah_single(rng, m):
    """One needle in noise."""
    key, value, lines = keys(rng, 1)[0], number7(rng), [NOISE] * m
    hide(rng, lines, needle("number", key, value))
    return ask_needle("number", key, [value], lines)


def ask_one(rng, kind, pairs):
    """A haystack of needles; the question is about one of them."""
    key, value = rng.choice(pairs)
    return ask_needle(kind, key, [value], [needle(kind, *pair) for pair in pairs])


def niah_multikey(rng, m):
    """m needles; the keys are words."""
    return ask_one(rng, "number", [(key, number7(rng)) for key in keys(rng, m)])


def uuid_pairs(rng, n):
    return [(new_uuid(rng), new_uuid(rng)) for _ in range(n)]


def niah_uuid(rng, m):
    """m needles; keys and values are UUIDs."""
    return ask_one(rng, "uuid", uuid_pairs(rng, m))


def niah_multivalue(rng, m):
    """Four values of one key among plain sentences."""
    key, values = keys(rng, 1)[0], [number7(rng) for _ in range(4)]
    lines = [sentence(rng) for _ in range(m)]
    for value in values:
        hide(rng, lines, needle("number", key, value))
    return ask_needle("number", key, values, lines)


def kv_draft(before, context, instruction, demos, key, answer):
    """Find a key's value in a JSON object; demos are other keys and values."""
    shown = "".join(f"Key: {k}\nCorresponding value: {v}\n\n" for k, v in demos)
    after, gold = f"\n\n{instruction}\n\n{shown}Key: {key}", {"question": key, "answer": answer}
    return Draft(before, [context], after, "Corresponding value:", gold)


def json_kv(rng, m):
    """A JSON object of m UUIDs and the question about one value, after two worked examples."""
    demos, pairs = uuid_pairs(rng, 2), uuid_pairs(rng, m)
    key, value = rng.choice(pairs)
    data = ",\n ".join(f'"{k}": "{v}"' for k, v in pairs)
    instruction = "Find the value that belongs to a key of the JSON object above."
    return kv_draft("JSON data:\n", "{" + data + "}", instruction, demos, key, [value])


def passages(documents):
    """The texts of documents {title, text}."""
    return ["Document (Title: {title}): {text}".format_map(d) for d in documents]


def qa_demo(documents, question, answer):
    """A worked example."""
    shown = "\n\n".join(passages(documents))
    return f"{shown}\n\nQuestion: {question}\nAnswer: {answer}\n\n"


def qa_draft(instruction, demos, documents, question, answers):
    """A question about documents after some worked examples."""
    gold = {"question": question, "answer": answers}
    return Draft(f"{instruction}\n\n{''.join(demos)}", passages(documents),
                 f"\n\nQuestion: {question}", "Answer:", gold)


def invented_people(rng, n):
    """n pairs of a name and three facts {index into RELATIONS: thing}."""
    people = []
    for person in names(rng, n):
        relations = rng.sample(range(len(RELATIONS)), 3)
        people.append((person, {r: thing(rng) for r in relations}))
    return people


def statement(person, r, what):
    return f"{person} {RELATIONS[r][0]} {what}."


def ask_fact(rng, person, facts):
    """A question about one fact and its answer."""
    r = rng.choice(sorted(facts))
    return RELATIONS[r][1].format(person), facts[r]


def about(rng, person, facts):
    """A document with facts about a person among sentences that say nothing."""
    text = []
    for r, what in facts.items():
        text += [statement(person, r, what), sentence(rng)]
    return {"title": person, "text": " ".join(text)}


def rag(rng, m):
    """Documents about m invented people and a question about a fact, after two worked examples."""
    people = invented_people(rng, m + 4)
    documents = [about(rng, *person) for person in people]
    demos = []
    for i in (0, 2):
        question, answer = ask_fact(rng, *people[i])
        demos.append(qa_demo(documents[i:i + 2], question, answer))
    question, answer = ask_fact(rng, *people[4 + rng.randrange(m)])
    instruction = "Answer the question with the given documents, in a few words and nothing else."
    return qa_draft(instruction, demos, documents[4:], question, [answer])


def passages_with_ids(documents):
    """The texts of documents {id, text, perhaps title}."""
    shown = []
    for d in documents:
        title = f" (Title: {d['title']})" if "title" in d else ""
        shown.append(f"[ID: {d['id']}] Document{title}: {d['text']}")
    return shown


def best_ranking(documents):
    """The ids of documents {id, label} by falling label, as text."""
    ordered = sorted(documents, key=lambda d: d["label"], reverse=True)
    return " > ".join(d["id"] for d in ordered)


def rank_demo(documents, query):
    shown, ranking = "\n\n".join(passages_with_ids(documents)), best_ranking(documents)
    return f"{shown}\n\nQuery: {query}\nRanking: {ranking}\n\n"


def rank_draft(instruction, demos, documents, query, k_values, **gold):
    """A task to rank documents {id, text, label} after some worked examples."""
    gold["answer"] = best_ranking(documents)
    gold["qrel"] = [[d["id"], str(d["label"])] for d in documents]
    gold["k_values"] = k_values
    return Draft(f"{instruction}\n\n{''.join(demos)}", passages_with_ids(documents),
                 f"\n\nQuery: {query}", "Ranking:", gold)


def rank_documents(rng, n):
    """n documents and a query of three words; a document's label says how many of them it has."""
    words = rng.sample(NOUNS, 6)
    ids = rng.sample(range(100, 100 + 20 * n + 20), n)
    labels = [rng.choice((0, 0, 0, 1, 2, 3)) for _ in range(n)]
    labels[rng.randrange(n)] = 3
    documents = []
    for i, label in zip(ids, labels):
        used = rng.sample(words[:3], label) + rng.sample(words[3:], 3 - label)
        text = []
        for word in rng.sample(used, 3):
            text.append(f"The {rng.choice(ADJECTIVES)} {word} is described at length.")
        documents.append({"id": str(i), "text": " ".join(text), "label": label})
    return documents, " ".join(words[:3])


def rerank(rng, m):
    """Documents to rank by how many of a query's words they have."""
    demos = [rank_demo(*rank_documents(rng, 4)) for _ in range(2)]
    documents, query = rank_documents(rng, m)
    instruction = ("Rank the documents by how much they have to do with the query, the best first: "
                   "ID > ID > ID. Write at most ten IDs and nothing else.")
    return rank_draft(instruction, demos, documents, query, [1, 5, 10])


def icl_draft(instruction, shots, text, answer):
    """Find the label of a text; shots are texts and labels."""
    shown = [f"{shot}\nlabel: {label}" for shot, label in shots]
    instruction += ' Write only "label: {label}" and nothing else.\n\n'
    gold = {"answer": str(answer)}
    return Draft(instruction, shown, f"\n\n{text}", "label:", gold, n_near=2)


def icl(rng, m, n_label=12):
    """Texts of invented classes, which differ in their nouns; the labels are shuffled numbers."""
    words = rng.sample(NOUNS, 3 * n_label)
    labels = rng.sample(range(n_label), n_label)

    def text(c):
        noun = rng.choice(words[3 * c:3 * c + 3])
        a, b, of_part = (rng.choice(ADJECTIVES) for _ in range(3))
        part = rng.choice(("edge", "colour", "sound", "smell"))
        return f"{a} {b} {noun} with a {of_part} {part}"

    classes = []
    while len(classes) < m:  # balanced rounds
        classes += rng.sample(range(n_label), n_label)
    shots = [(text(c), labels[c]) for c in classes[:m]]
    last = rng.choice(sorted(set(classes[:m])))
    instruction = "Use the examples to find the label of the last text."
    return icl_draft(instruction, shots, text(last), labels[last])


def longqa(rng, m):
    """A long tale in chapters and a question about a fact that stands in it once."""
    people = invented_people(rng, 6)
    lines = [sentence(rng) for _ in range(m)]
    for person, facts in people:
        for r, what in facts.items():
            hide(rng, lines, statement(person, r, what))
    chapters = []
    for i in range(0, len(lines), 40):
        chapters.append(f"Chapter {i // 40 + 1}\n{' '.join(lines[i:i + 40])}")
    question, answer = ask_fact(rng, *people[rng.randrange(6)])
    before = "Read the story and answer the question in as few words as you can.\n\n"
    return Draft(before, ["\n\n".join(chapters)], f"\n\nQuestion: {question}", "Answer:",
                 {"answer": [answer]})


def many_documents(rng, m):
    """m short documents, each with a code; the question is about the codes of three of them."""
    codes = [number7(rng) for _ in range(m)]
    documents = []
    for i, code in enumerate(codes, 1):
        documents.append(f"Document {i}. {sentence(rng)} Its code is {code}. {sentence(rng)}")
    chosen = sorted(rng.sample(range(m), 3))
    listed = ", ".join(str(i + 1) for i in chosen)
    return Draft("Remember the code of every document.\n\n", documents,
                 f"\n\nWhat are the codes of documents {listed}?",
                 f"The codes of documents {listed} are", {"answer": [codes[i] for i in chosen]})


# --- LongProc's procedures: the model must write the whole trace ---------------------------------

class Tier(NamedTuple):
    """How long the output of a procedure is."""
    edges: tuple  # of the route, least and most
    steps: int  # of the story
    search: tuple  # characters of a search, least and most
    rows: int  # of the table
    lines: int  # of the program
    max_new_tokens: int


TIERS = {
    "0.5k": Tier((24, 39), 10, (600, 1500), 20, 10, 1024),
    "2k": Tier((96, 156), 40, (2500, 5500), 70, 40, 3072),
    "8k": Tier((384, 624), 150, (10000, 20000), 280, 160, 10240),
}


def path_traversal(rng, m, tier):
    """A route through cities; m more cities lead elsewhere (city counts as in LongProc's 0.5k)."""
    n_route = rng.randint(*tier.edges) + 1
    cities = names(rng, n_route + m)
    route = cities[:n_route]
    way = dict(pairwise(route))
    for city in cities[n_route:]:
        way[city] = rng.choice([c for c in rng.sample(cities, 2) if c != city])
    by = {city: rng.choice(("bus", "train", "plane", "ferry")) for city in way}
    lines = []
    for a, b in way.items():
        lines.append(f"{a} is a lively city. You can travel from {a} to {b} by {by[a]}.")
    rng.shuffle(lines)
    after = (f"\n\nFind the way from {route[0]} to {route[-1]}. Write every step as a line of its "
             "own, like this:\n<Route>\nFrom Xo, take a bus to Yu.\nFrom Yu, take a train to Za.\n"
             "</Route>")
    gold = "\n".join(f"From {a}, take a {by[a]} to {b}." for a, b in pairwise(route))
    return Draft("From each city below you can travel to one other city.\n\n", ["\n".join(lines)],
                 after, "", {"reference_output": gold})


ROOMS = ("attic", "kitchen", "cellar", "study", "porch", "pantry", "workshop", "bedroom")
SURFACES = ("table", "shelf", "crate", "stool", "drawer", "rug", "chest", "desk")


def room_of(place):
    """attic of attic's table."""
    return place.split("'")[0]


def changed(before, after):
    return "unchanged" if before == after else "changed"


def tom_story(rng, n_steps):
    """Two agents move themselves and two objects between two rooms.

    Returns (sentences, agent, object, the trace of what the agent believes about the object)."""
    agents = names(rng, 2)
    objects = [f"{rng.choice(ADJECTIVES)} {noun}" for noun in rng.sample(NOUNS, 2)]
    rooms, surfaces = rng.sample(ROOMS, 2), rng.sample(SURFACES, 2)
    places = [f"{room}'s {surface}" for room, surface in product(rooms, surfaces)]
    at = {a: rng.choice(rooms) for a in agents}
    lies = {o: rng.choice(places) for o in objects}
    who, what = rng.choice(agents), rng.choice(objects)
    story = [f"{a} is in the {at[a]}." for a in agents]
    story += [f"The {o} is on the {lies[o]}." for o in objects]
    other, actor = agents
    belief, change, trace = None, "initial state", [f"{who}'s belief on the {what}:"]
    for step in range(n_steps + 1):
        if step > 0:
            was_at, lay = at[who], lies[what]
            if at[other] is None or rng.random() >= 0.12:
                actor, other = other, actor
            story.append(f"Step {step}: {tom_act(rng, actor, at, lies, rooms, places)}")
            change = (f"{who} location {changed(was_at, at[who])}; "
                      f"{what} location {changed(lay, lies[what])}")
        sees = at[who] == room_of(lies[what])
        belief = lies[what] if sees else belief
        trace.append(
            f"- Step {step}: ({change}) {{{who} location: {at[who]}; {what} location: "
            f"{lies[what]}; {who} sees {what}: {sees}; {who}'s belief on {what}: {belief}}}")
    trace.append(f"Final Answer: the {belief}")
    return story, who, what, "\n".join(trace)


def tom_act(rng, actor, at, lies, rooms, places):
    """The sentence of one action; at and lies change with it."""
    room = at[actor]
    if room is None:
        at[actor] = rng.choice(rooms)
        return f"{actor} enters the {at[actor]}."
    other = rooms[1 - rooms.index(room)]
    here = [o for o in lies if room_of(lies[o]) == room]
    kind = rng.randrange(4) if here else 0
    if kind == 0:
        at[actor] = other
        return f"{actor} moves to the {other}."
    if kind == 3:
        at[actor] = None
        return f"{actor} leaves the {room}."
    item = rng.choice(here)
    at[actor] = room if kind == 1 else other
    targets = [p for p in places if room_of(p) == at[actor] and p != lies[item]]
    lies[item] = rng.choice(targets)
    if kind == 1:
        return f"{actor} moves the {item} to the {lies[item]}."
    return f"{actor} moves to the {other} with the {item} and puts it on the {lies[item]}."


def tom_question(story, who, what):
    return "\n".join([*story, f"Where does {who} believe the {what} is? Follow every step."])


def tom_tracking(rng, m, tier):
    """A story with a question after a worked example and m sentences about other people."""
    *story, trace = tom_story(rng, tier.steps)
    *shown, shown_trace = tom_story(rng, 3)
    others = [f"In another house, {a} looks after the {thing(rng)}." for a in names(rng, m)]
    before = ("Follow what a person believes about an object, who sees only what is in the same "
              f"room. An example:\n\n{tom_question(*shown)}\n{shown_trace}\n\nNow the story to "
              "follow.\n\n")
    after = "\n" + tom_question(*story)
    return Draft(before, [" ".join(others)], after, "", {"reference_output": trace})


def pair_options(numbers):
    shown = ", ".join(map(str, combinations(numbers, 2)))
    return f"Options for choosing two numbers: [{shown}]."


def operate(a, op, b):
    """(a op b, the text after `a op b`); the number is None if the search must drop it."""
    c = arithmetic(a, op, b)
    if c is None:
        return None, " (invalid operation). drop this branch."
    if c.denominator > 1:
        return None, f" = {a / b:.1f}. {a / b:.1f} is a decimal, drop this branch."
    if c >= 2000:
        return None, f" = {c}. {c} exceeds the maximum intermediate result, drop this branch."
    return int(c), f" = {c}. "


def countdown_trace(numbers, target, longest=math.inf):
    """LongProc's depth-first search for a target from four numbers, as text with its solution.

    None if there is no solution or the search takes more than `longest` characters."""
    lines, steps = ["# Search Procedure"], []
    write = lines.append
    write(f"Initial number set: {numbers}, target: {target}. {pair_options(numbers)}")

    def search(left, depth):
        """True once the target is reached; lines and steps grow."""
        if sum(map(len, lines)) > longest:
            raise OverflowError
        for i, j in combinations(range(len(left)), 2):
            rest = left[:i] + left[i + 1:j] + left[j + 1:]
            if rest:
                write(f"{' ' * depth}|- Pick two numbers ({left[i]}, {left[j]}) (numbers left: "
                      f"{rest}). Try possible operations.")
            b, a = sorted((left[i], left[j]))
            for op in "+-*/":
                if attempt(a, op, b, rest, depth + bool(rest)):
                    return True
        return False

    def attempt(a, op, b, rest, depth):
        c, result = operate(a, op, b)
        text, left = f"{' ' * depth}|- Try {a} {op} {b}{result}", [c, *rest]
        if c is None:
            write(text)
            return False
        steps.append(f"{a} {op} {b} = {c}")
        if rest:
            more = f". {pair_options(left)}" if len(left) > 2 else ", just two numbers left."
            write(f"{text}Add {c} to the number set. Current number set: {left}, target: "
                  f"{target}{more}")
            found = search(left, depth + 1)
        else:
            found = c == target
            verdict = "== {}, target found!" if found else "!= {}, drop this branch."
            write(f"{text}Evaluate {c} {verdict.format(target)}")
        if not found:
            steps.pop()
        return found

    try:
        if not search(numbers, 1):
            return None
    except OverflowError:
        return None
    first, second, third = steps
    lines += ["", "Now we have found the target, let's trace back the solution:",
              f"Final step: {third}", f"The step before: {second}", f"The first step: {first}", "",
              "Output the solution in the required format:", "<Solution>", *steps,
              "</Solution>", ""]
    return "\n".join(lines)


def countdown_puzzle(rng, search):
    """(numbers, target, trace) with a trace of search[0] to search[1] characters."""
    while True:
        numbers = [rng.randint(1, 49) for _ in range(4)]
        target = rng.randint(10, 50)
        trace = countdown_trace(numbers, target, search[1])
        if trace and search[0] <= len(trace) <= search[1]:
            return numbers, target, trace


def countdown(rng, m, tier):
    """A puzzle after m solved ones."""
    numbers, target, trace = countdown_puzzle(rng, tier.search)
    solved = []
    for _ in range(m):
        puzzle = countdown_puzzle(rng, TIERS["0.5k"].search)
        solved.append("Numbers: {}\nTarget: {}\n{}".format(*puzzle))
    before = ("Use four numbers, each once, with +, -, * and / to reach a target. Search depth "
              "first, write down the search and end with three equations between <Solution> and "
              "</Solution>.\n\n")
    gold = {"reference_output": trace, "item": {"nums": numbers, "target": target}}
    after = f"\n\nNumbers: {numbers}\nTarget: {target}"
    return Draft(before, solved, after, "", gold, n_near=2)


class Trip:
    """A travel problem: stays of some days in cities, some with fixed dates, between flights."""

    def __init__(self, item):
        self.days, self.fixed = {}, {}  # {city: days}, {city: (first day, last day)}
        self.flights = set(map(tuple, item["connected_cities"]))
        for c in item["constraints"]:
            if c["type"] == "duration":
                self.days[c["city"]] = c["num_days"]
            elif c["type"] == "fixed":
                self.fixed[c["city"]] = c["start_day"], c["end_day"]
        self.by_arrival = sorted(self.fixed, key=self.fixed.get)
        self.free = [c for c in self.days if c not in self.fixed]

    def plans(self, day=1, visited=()):
        """Yield every order of the cities that is a plan."""
        if len(visited) == len(self.days):
            yield visited
        for city in self.days.keys() - visited:
            in_time = city not in self.fixed or self.fixed[city][0] == day
            if in_time and (not visited or (visited[-1], city) in self.flights):
                yield from self.plans(day + self.days[city] - 1, (*visited, city))

    def requirements(self):
        """The lines of a trace before the search."""
        dates = {c: f", Fixed Schedule: Day {a} - {b}" for c, (a, b) in self.fixed.items()}
        stays = {c: f"* City: {c}, Duration: {n} days" for c, n in self.days.items()}
        lines = ["<Solving Procedure>",
                 "Read the requirements and identify the cities that have fixed schedules and the "
                 "cities that need to be arranged."]
        lines += [f"{stay}{dates.get(c, '')}." for c, stay in stays.items()]
        fixed = [f"* City: {c}{dates[c]}." for c in self.by_arrival]
        kinds = (("that have fixed schedules", " (sorted by their arrival days):", fixed),
                 ("needing arrangement", ":", [f"{stays[c]}." for c in self.free]))
        for kind, order, listed in kinds:
            lines += ["", f"Cities {kind}{order if listed else ': None.'}", *listed]
        return [*lines, ""]

    def check(self, city, day, plan):
        """(whether a plan can go on with a city on a day, the lines that find it out)."""
        last = day + self.days[city] - 1
        origin = plan[-1][0] if plan else "the starting point"
        lines = [f"Try arranging to visit {city} from Day {day}. Duration: {self.days[city]} days. "
                 f"Schedule: Day {day} - {last}.",
                 f"Check for direct flight from {origin} to {city}."]
        if plan and (origin, city) not in self.flights:
            return False, [*lines, "No. Drop this branch."]
        check = ("Check whether this arrangement is compatible with the next fixed schedule after "
                 f"Day {day}:")
        coming = [c for c in self.by_arrival if self.fixed[c][0] > day]
        if not coming:
            lines += ["Yes.", f"{check} None.",
                      "No following fixed schedules. This arrangement is compatible."]
        else:
            start, end = self.fixed[coming[0]]
            late = last > start
            order = "later than (>)" if late else "not later than (<=)"
            result = "incompatible. Drop this branch." if late else "compatible."
            lines += ["Yes.", f"{check} {coming[0]} (Day {start} - {end}).",
                      f"The departure day of {city} is Day {last}. The arrival day of {coming[0]} "
                      f"is Day {start}. Day {last} is {order} Day {start}. This arrangement is "
                      f"{result}"]
            if late:
                return False, lines
        return True, [*lines, "This arrangement is feasible for now. Continue to arrange the rest "
                      "of the plan."]

    def search(self, write, day=1, plan=()):
        """The first plan [(city, first day, last day)] that begins with `plan`, or None.

        write(line) takes the trace."""
        visited = [city for city, _, _ in plan]
        head = "  " * len(plan) + "|- " if plan else ""
        body = "  " * len(plan) + " |- "
        write(f"{head}Current day: {day}. Current plan: [{', '.join(visited)}].")
        if len(plan) == len(self.days):
            write(f"{head}All {len(plan)} cities are arranged. Complete plan is found!")
            return plan
        write(f"{head}Check whether the city with an arrival day of Day {day} - is fixed.")
        options = [c for c in self.by_arrival if self.fixed[c][0] == day and c not in visited]
        if options:
            write(f"{head}Yes. The city with an arrival day of Day {day} - is fixed: {options[0]}.")
        else:
            options = [c for c in self.free if c not in visited]
            write(f"{head}No. Consider possible options from cities needing arrangement: "
                  f"[{', '.join(options)}] and explore these options in order.")
        for city in options:
            feasible, lines = self.check(city, day, plan)
            for line in lines:
                write(body + line)
            if feasible:
                last = day + self.days[city] - 1
                found = self.search(write, last, (*plan, (city, day, last)))
                if found:
                    return found
        write(f"{body}Fail to arrange any option on day {day} in the current arrangement. Drop "
              "this branch.")
        return None


def travel_trace(item):
    """LongProc's depth-first search for a travel plan as text with the plan, or None."""
    trip = Trip(item)
    lines = trip.requirements()
    plan = trip.search(lines.append)
    if plan is None:
        return None
    city, _, last = plan[0]
    lines += ["</Solving Procedure>", "", "Output the plan in the required format:", "<Plan>",
              f"**Day 1-{last}:** Arriving in {city} and visit {city} for {trip.days[city]} days."]
    for (origin, _, day), (city, first, last) in pairwise(plan):
        lines += [f"**Day {day}:** Fly from {origin} to {city}.",
                  f"**Day {first}-{last}:** Visit {city} for {trip.days[city]} days."]
    return "\n".join([*lines, "</Plan>"])


def travel_problem(rng, search):
    """(item, trace): a problem with one plan and a trace of search[0] to search[1] characters."""
    while True:
        cities = names(rng, rng.randint(4, 9))
        n = len(cities)
        stays = [rng.randint(2, 7) for _ in cities]
        fixed = rng.sample(range(n), rng.randint(1, max(1, n // 3)))
        constraints = []
        for i in rng.sample(range(n), n):
            city, days, first = cities[i], stays[i], 1 + sum(stays[:i]) - i
            constraints.append({"type": "duration", "city": city, "num_days": days})
            if i in fixed:
                dates = {"start_day": first, "end_day": first + days - 1}
                constraints.append({"type": "fixed", "city": city, **dates})
        flights = set(pairwise(cities))
        for _ in range(rng.randint(n, 3 * n)):
            flights.add(tuple(rng.sample(cities, 2)))
        item = {
            "ground_truth_cities": "**".join(cities),
            "ground_truth_durations": "**".join(map(str, stays)),
            "constraints": constraints,
            "connected_cities": rng.sample(sorted(flights), len(flights)),
            "total_days": sum(stays) - n + 1,
        }
        trace = travel_trace(item)
        one_plan = len(list(islice(Trip(item).plans(), 2))) == 1
        if one_plan and search[0] <= len(trace) <= search[1]:
            return item, trace


def travel_question(item):
    """The problem in words."""
    stays = []
    for c in item["constraints"]:
        if c["type"] == "duration":
            stays.append("You stay in {city} for {num_days} days.".format_map(c))
        else:
            stays.append("You are in {city} from day {start_day} to day {end_day}.".format_map(c))
    n = len(item["ground_truth_cities"].split("**"))
    flights = ", ".join(f"from {a} to {b}" for a, b in item["connected_cities"])
    return (f"Plan a trip through {n} cities in {item['total_days']} days. A day of flight counts "
            f"for both cities. {' '.join(stays)}\nThe direct flights: {flights}.")


def travel_planning(rng, m, tier):
    """A problem after m solved ones."""
    item, trace = travel_problem(rng, tier.search)
    solved = []
    for _ in range(m):
        other, other_trace = travel_problem(rng, (1500, 5500))
        solved.append(f"{travel_question(other)}\n{other_trace}")
    before = ("Plan trips as in the examples: write the search between <Solving Procedure> and "
              "</Solving Procedure>, then the plan between <Plan> and </Plan>.\n\n")
    gold = {"reference_output": trace, "item": item}
    return Draft(before, solved, f"\n\n{travel_question(item)}", "", gold, n_near=2)


def goods_row(rng, brand):
    item, price = thing(rng), f"${rng.randint(5, 400)}.{rng.randrange(100):02d}"
    return item, brand, price, str(rng.randrange(90))


def html_row(cells, tag):
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>\n"


def html_to_tsv(rng, m, tier):
    """A page with a table of goods, of which one brand counts; m notes stand around the table."""
    brand, *others = names(rng, 5)
    brands = [brand] * tier.rows + rng.choices(others, k=tier.rows // 2)
    rows = [goods_row(rng, b) for b in brands]
    rng.shuffle(rows)
    head = ("item", "brand", "price", "stock")
    table = html_row(head, "th") + "".join(html_row(row, "td") for row in rows)
    parts = [f'<div class="note"><p>{sentence(rng)}</p></div>\n' for _ in range(m)]
    hide(rng, parts, f"<table>\n{table}</table>\n")
    context = "<html><body>\n" + "".join(parts) + "</body></html>"
    after = (f"\n\nList all items of the brand {brand} as tab-separated values with the header "
             f"{' '.join(head)}, in a block that begins with ```tsv and ends with ```.")
    rows = [head] + [row for row in rows if row[1] == brand]
    gold = {"reference_output": "".join("\t".join(row) + "\n" for row in rows)}
    return Draft("Extract a table from this page.\n\n", [context], after, "", gold)


def remainder(v, x, y, n):
    return {x: int(math.fmod(v[x] + n * v[y], 1000))}  # C++'s remainder has the sum's sign


def swap(v, x, y, n):
    low, high = sorted((v[x], v[y]))
    return {x: low, y: high}


STATEMENTS = (  # pseudo-code, C++ and new values of the variables v
    ("set {x} to the remainder of {x} + {n} * {y} divided by 1000, with the sign of the sum",
     "{x} = ({x} + {n} * {y}) % 1000;", remainder),
    ("subtract {n} from {x}",
     "{x} -= {n};", lambda v, x, y, n: {x: v[x] - n}),
    ("if {x} is greater than {y}, swap {x} and {y}",
     "if ({x} > {y}) swap({x}, {y});", swap),
    ("repeat {n} times: increase {x} by 2",
     "for (int i = 0; i < {n}; i++) {x} += 2;", lambda v, x, y, n: {x: v[x] + 2 * n}),
)


def program(rng, n_lines):
    """(pseudo-code, C++, tests) of a program that reads two numbers and changes them."""
    pseudo, code = ["read integers a and b", "set c to 0"], ["c = 0;"]
    steps, tests = [], []
    for _ in range(n_lines):
        words, statement, effect = rng.choice(STATEMENTS)
        names = {"x": rng.choice("abc"), "y": rng.choice("abc")}
        names["n"] = rng.randint(1, 9)
        pseudo.append(words.format_map(names))
        code.append(statement.format_map(names))
        steps.append((effect, names))
    for _ in range(5):
        v = {"a": rng.randrange(50), "b": rng.randrange(50), "c": 0}
        stdin = "{a} {b}".format_map(v)
        for effect, names in steps:
            v.update(effect(v, **names))
        tests.append([[stdin], ["{a} {b} {c}".format_map(v)]])
    pseudo = "\n".join([*pseudo, "print a, b and c"])
    code = "\n".join(["```cpp", "int main() { long long a, b, c; cin >> a >> b;", *code,
                      'cout << a << " " << b << " " << c << endl; }', "```"])
    return pseudo, code, tests


def pseudo_to_code(rng, m, tier):
    """A program after m translated ones."""
    pseudo, code, tests = program(rng, tier.lines)
    shown = ["Pseudo-code:\n{}\nC++:\n{}".format(*program(rng, 6)) for _ in range(m)]
    before = ("Translate pseudo-code to C++, line by line, in a block that begins with ```cpp and "
              "ends with ```.\n\n")
    after = f"\n\nPseudo-code:\n{pseudo}\nC++:"
    gold = {"reference_output": code, "item": {"testcases": tests}}
    return Draft(before, shown, after, "", gold, n_near=2)


TASKS = {
    "facts": Task(None, None, "score", 1),
    "niah_s": Task(niah_single, "ruler_recall", "ruler_recall", 50),
    "niah_mk2": Task(niah_multikey, "ruler_recall", "ruler_recall", 50),
    "niah_mk3": Task(niah_uuid, "ruler_recall", "ruler_recall", 100),
    "niah_mv": Task(niah_multivalue, "ruler_recall", "ruler_recall", 50),
    "json_kv": Task(json_kv, "json_kv", "substring_exact_match", 100),
    "rag": Task(rag, "qa", "substring_exact_match", 20),
    "rerank": Task(rerank, "rerank", "NDCG@10", 200, least=4),
    "icl": Task(icl, "icl", "exact_match", 20),
    "longqa": Task(longqa, "qa", "rougeL_f1", 20),
    "docs": Task(many_documents, "ruler_recall", "ruler_recall", 60, least=3),
}
PROCEDURES = (  # name, function, main metric, least items, tiers as released
    ("path", path_traversal, "accuracy", 0, ("0.5k", "2k", "8k")),
    ("tom", tom_tracking, "accuracy", 0, ("0.5k", "2k", "8k")),
    ("countdown", countdown, "accuracy", 1, ("0.5k", "2k", "8k")),
    ("travel", travel_planning, "accuracy", 1, ("2k", "8k")),
    ("html", html_to_tsv, "f1", 0, ("0.5k", "2k", "8k")),
    ("code", pseudo_to_code, "accuracy", 1, ("0.5k", "2k")),
)
for name, make, metric, least, tiers in PROCEDURES:
    for key in tiers:
        tier = TIERS[key]
        TASKS[f"{name}_{key}"] = Task(
            partial(make, tier=tier), make.__name__, metric, tier.max_new_tokens, least)


# --- the benchmarks' files -----------------------------------------------------------------------

class Official(NamedTuple):
    """A benchmark's task.

    read(rows, folder, n, seed, size, option) yields the Drafts of n questions."""
    read: object
    file: str  # in the data folder; {k} stands for the size
    option: object  # what else `read` needs
    scorer: str
    main: str  # the metric that is the task's score
    max_new_tokens: int
    chat: bool = False  # the benchmark's default
    sizes: tuple = (8192, 16384, 32768, 65536, 131072)  # for lengths 8K, 16K, 32K, 64K, 128K
    is_judged: bool = False  # HELMET's score is a large model's; here it is ROUGE


def read_text(folder, file):
    """Raises FileNotFoundError with the file and where the data comes from."""
    path = Path(folder, file)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}: HELMET's data.tar.gz (princeton-nlp/HELMET on the Hugging Face hub) "
            "and the prompts in its repository, the rows and prompts.yaml of LongProc's data "
            "folder (princeton-pli/LongProc on GitHub) or your JSON lines of a hub's data set "
            "belong there")
    return path.read_text(encoding="utf-8")


def read_rows(folder, file):
    """Objects of a .json or .jsonl file."""
    text = read_text(folder, file)
    if file.endswith(".jsonl"):
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    rows = json.loads(text)
    return rows["data"] if isinstance(rows, dict) else rows


def shuffled(rows, seed):
    """In the order that Hugging Face's Dataset.shuffle(seed) gives."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def digest(text):
    return int(hashlib.sha256(str(text).encode()).hexdigest(), 16) % 2 ** 31


def pick_questions(rows, key, n, seed):
    """All rows of n questions, drawn as HELMET draws them."""
    values = sorted({row[key] for row in rows})
    keep = random.Random(seed).sample(values, min(n, len(values)))
    return [row for row in rows if row[key] in keep]


def pick_demos(rows, key, value):
    """The two worked examples of a question: always the same ones, with different keys."""
    found = {}
    for row in shuffled(rows, digest(value)):
        found.setdefault(row[key], row)
    return list(found.values())[:2]


def rare(rows):
    """PopQA's rows about unpopular subjects."""
    return [row for row in rows if math.log10(row["s_pop"]) < 3]


def read_kilt(rows, folder, n, seed, size, demo_file):
    demo_rows, popqa = read_rows(folder, demo_file), "popqa" in demo_file
    if popqa:
        rows, demo_rows = rare(rows), rare(demo_rows)
    key = "id" if "id" in rows[0] else "question"
    instruction = ("Answer the question briefly with the help of the given documents, in this "
                   "format:\nAnswer: [answer]")
    for row in pick_questions(rows, key, n, seed):
        candidates = demo_rows
        if popqa:  # its worked examples come from the test rows
            candidates = [r for r in demo_rows if r[key] != row[key]]
        demos = pick_demos(candidates, key, row[key])
        demos = [qa_demo(d["ctxs"], d["question"], d["answers"][0]) for d in demos]
        yield qa_draft(instruction, demos, row["ctxs"], row["question"], row["answers"])


def read_json_kv(rows, folder, n, seed, size, option):
    instruction = "Extract the value corresponding to the specified key in the JSON object below."
    for row in shuffled(rows, seed)[:n]:
        demos, key = row["demos"][:2], row["question"]
        yield kv_draft("", row["context"], instruction, demos, key, row["answer"])


MEMORIZE = ("hidden within the following text. Make sure to memorize it. I will quiz you about the "
            "{type} afterwards.\n")
ONLY_ANSWER = ("Answer the question based on the given documents. Only give me the answer and do "
               "not output any other words.\n\n")
RULER = {  # the text before and after the context, and the answer prefix
    "niah": (
        "A special magic {type} is " + MEMORIZE,
        "\nWhat is the special magic {type} for {query} mentioned in the provided text?",
        "The special magic {type} for {query} mentioned in the provided text is"),
    "niah_mv": (
        "Some special magic {type} are " + MEMORIZE,
        "\nWhat are all the special magic {type} for {query} mentioned in the provided text?",
        "The special magic {type} for {query} mentioned in the provided text are"),
    "vt": (
        "{example}Memorize and track the chain(s) of variable assignment hidden in the "
        "following text.\n\n",
        "\nQuestion: Find all variables that are assigned the value {query} in the text above.",
        "Answer: According to the chain(s) of variable assignment in the text above, {num_v} "
        "variables are assigned the value {query}, they are:"),
    "cwe": (
        "{example}Below is a numbered list of words. In these words, some appear more often than "
        "others. Memorize the ones that appear most often.\n",
        "\nQuestion: What are the 10 most common words in the above list?",
        "Answer: The top 10 words that appear most often in the list are:"),
    "fwe": (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        "most frequently appeared coded words.\n",
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text?",
        "Answer: According to the coded text above, the three most frequently appeared words are:"),
    "qa": (
        ONLY_ANSWER + "The following are given documents.\n\n",
        "\n\n" + ONLY_ANSWER + "Question: {query}",
        "Answer:"),
}


def read_ruler(rows, folder, n, seed, size, kind):
    for row in shuffled(rows, seed)[:n]:
        example = row.get("example")
        fields = row | {"type": row.get("type_needle_v", ""),
                        "query": row.get("query", row.get("question")),
                        "example": f"{example}\n\n" if example else ""}
        before, after, prefix = (part.format_map(fields) for part in RULER[kind])
        gold = row | {"answer": row.get("answer", row.get("outputs"))}
        yield Draft(before, [row["context"]], after, prefix, gold)


def read_rerank(rows, folder, n, seed, size, demo_file):
    rows, demo_rows = pick_questions(rows, "qid", n, seed), read_rows(folder, demo_file)
    k_values = [k for k in K_VALUES if k <= max(10, len(rows[0]["ctxs"]))]
    tested = {row["qid"] for row in rows}
    many = len(demo_rows) > 2 * len(rows)
    instruction = ("Each document below has an ID. Rank all of them by their relevance to the "
                   "query, the most relevant first, in this format:\nRanking: ID3 > ID1 > ID2")
    for row in rows:
        excluded = tested if many else {row["qid"]}
        candidates = [r for r in demo_rows if r["qid"] not in excluded]
        demos = pick_demos(candidates, "qid", row["qid"])
        demos = [rank_demo(d["ctxs"], d["query"]) for d in demos]
        yield rank_draft(instruction, demos, row["ctxs"], row["query"], k_values, qid=row["qid"])


def balanced(rows, label, n, seed):
    """n rows in rounds of one row per label; each round is shuffled."""
    rng, by_label, out = random.Random(seed), defaultdict(list), []
    for row in rows:
        by_label[row[label]].append(row)
    n_round, columns = math.ceil(n / len(by_label)), []
    for members in by_label.values():
        column = rng.sample(members, n_round % len(members))
        while len(column) < n_round:
            column += rng.sample(members, len(members))
        columns.append(column)
    for one_of_each in map(list, zip(*columns)):
        rng.shuffle(one_of_each)
        out += one_of_each
    return out[:n]


def read_icl(rows, folder, n, seed, shots, option):
    train_file, label = option
    train = read_rows(folder, train_file)
    n_label = 1 + max(row[label] for row in train)
    if min(row[label] for row in rows) < 0:  # a hidden label would count as the last class
        raise ValueError(f"field {label!r} has labels below 0")
    instruction = "Assign a label to the last text with the help of the examples."
    asked = rows if n >= len(rows) else balanced(shuffled(rows, seed), label, n, seed)
    for row in asked:
        row_seed = (digest(row["text"]) + seed) % 2 ** 31
        numbers = list(range(n_label))
        random.Random(row_seed).shuffle(numbers)
        chosen = balanced(train, label, shots, row_seed)
        chosen = [(r["text"], numbers[r[label]]) for r in chosen]
        yield icl_draft(instruction, chosen, row["text"], numbers[row[label]])


def infbench_row(row, kind):
    """(question, gold answers) of InfiniteBench; a choice has four options."""
    question, answers = f"Question: {row['input']}", row["answer"]
    if kind == "qa":
        return question, answers
    options = [f"{letter}. {option}" for letter, option in zip("ABCD", row["options"])]
    right = options[row["options"].index(answers[0])]
    return "\n".join([question, "Options:", *options]), [right[0], right]


def read_infbench(rows, folder, n, seed, size, kind):
    """Rows {id, context, input, answer, options}; the contexts must already have their length."""
    how = " with a letter" if kind == "choice" else ""
    instruction = f"Answer the question about the story as briefly as possible{how}.\n\n"
    for row in shuffled(rows, seed)[:n]:
        demos, (question, answers) = "For example:\n\n", infbench_row(row, kind)
        others = [r for r in rows if r["id"] != row["id"]]
        for other in shuffled(others, seed)[:2]:
            shown, golds = infbench_row(other, kind)
            demos += f"[story text]\n{shown}\nAnswer: {golds[0]}\n\n"
        yield Draft(f"{instruction}{demos}Now, read the following story:\n\n", [row["context"]],
                    f"\n\n{question}\n", "Answer:", {"answer": answers})


def read_narrativeqa(rows, folder, n, seed, size, demo_file):
    """Rows of the hub: {document: {text}, question: {text}, answers: [{text}]}."""
    demos = ""
    for row in shuffled(read_rows(folder, demo_file), seed)[:2]:
        demos += f"Question: {row['question']['text']}\nAnswer: {row['answers'][0]['text']}\n\n"
    before = ("Answer the question about the story, a novel or the script of a film, with a phrase "
              f"as short as you can.\n\nFor example:\n\n{demos}Now the story to use:\n\n")
    for row in shuffled(rows, seed)[:n]:
        question, answers = row["question"]["text"], [a["text"] for a in row["answers"]]
        yield Draft(before, [row["document"]["text"]], f"\n\nQuestion: {question}", "Answer:",
                    {"question": question, "answer": answers})


def read_books(rows, folder, n, seed, size, option):
    """InfiniteBench's summaries: rows {id, context, answer}."""
    for row in shuffled(rows, seed)[:n]:
        demos, others = "For example:\n\n", [r for r in rows if r["id"] != row["id"]]
        for other in shuffled(others, seed)[:2]:
            demos += f"[story text]\nSummary: {other['answer'][0].strip()}\n\n"
        before = ("Summarize a book in 1000 to 1200 words: its plot and characters, without "
                  "themes, background or comments.\n\n"
                  f"{demos}Now, read the following story:\n\n")
        gold = {"id": row["id"], "question": "", "answer": row["answer"]}
        yield Draft(before, [row["context"]], "\n\nNow summarize the book.\n", "Summary:", gold)


def read_cases(rows, folder, n, seed, size, demo_file):
    """Multi-LexSum: rows {id, sources, summary/short, summary/long} of its version 20230518."""
    demos, rows = "", [row for row in rows if row["summary/short"] is not None]
    told = [row for row in read_rows(folder, demo_file) if row["summary/short"] is not None]
    for row in shuffled(told, seed)[:2]:
        demos += f"Summary: {row['summary/short']}\n\n"
    before = ("Summarize a civil rights lawsuit from its legal documents in one paragraph of 200 "
              "to 250 words: the background, the parties and the outcome.\n\n"
              f"Example summaries:\n\n{demos}"
              "Now, write a summary of the following legal documents.\nLegal documents:\n")
    for row in shuffled(rows, seed)[:n] if len(rows) > n else rows:
        gold = {"id": row["id"], "question": "", "answer": row["summary/short"],
                "summary/long": row["summary/long"]}
        after = "\n\nNow please summarize the case.\n"
        yield Draft(before, ["\n\n".join(row["sources"])], after, "Summary:", gold)


def numbered_passages(documents):
    shown = []
    for i, d in enumerate(documents, 1):
        shown.append(f"Document [{i}](Title: {d['title']}): {d['text']}")
    return shown


def read_alce(rows, folder, n, seed, k, prompts):
    """Two worked examples of five documents from a prompt file, then a question's k documents."""
    spec, rng = json.loads(read_text(folder, prompts)), random.Random(seed)
    drawn = [(row, rng.sample(spec["demos"], 2)) for row in rows]  # in the file's order
    for row, demos in shuffled(drawn, seed)[:n]:
        before = ""
        for demo in demos:
            shown = "\n\n".join(numbered_passages(demo["docs"][:5]))
            fields = demo | {"instruction": spec["instruction"], "context": shown}
            before += spec["demo_prompt"].format_map(fields) + spec["demo_sep"]
        before += f"{spec['instruction']}\n\nQuestion: {row['question']}\n\n"
        yield Draft(before, numbered_passages(row["docs"][:k]), "\n", "Answer:", row)


def longproc_prompt(folder):
    """The template in a LongProc task's prompts.yaml: one block, indented by two."""
    first, *lines = read_text(folder, "prompts.yaml").split("\n")
    if first.strip() != "USER_PROMPT: |-":
        raise ValueError(f"{folder}/prompts.yaml does not begin with USER_PROMPT: |-")
    return "\n".join(line[2:] for line in lines).rstrip("\n")


COUNTDOWN_DEMOS = (
    ([40, 19, 23, 7], 29),
    ([9, 16, 6, 18], 12),
)


def longproc_demos(task, folder):
    """The worked examples in a task's prompt; only the searches have some."""
    demos = []
    if task == "countdown":
        for numbers, target in COUNTDOWN_DEMOS:
            puzzle = f"Numbers: {numbers}\nTarget: {target}"
            demos.append(f"# Example\n{puzzle}\n\n{countdown_trace(numbers, target)}")
    if task == "travel_planning":
        for item in read_rows(folder, "travel_planning_icl_examples.json"):
            demos.append(f"# Example\n{item['disambig_question_text']}\n\n{travel_trace(item)}")
    return "\n\n".join(demos)


def longproc_row(task, row, folder):
    """(a row with what its template needs, the reference output)."""
    if task == "path_traversal":
        src, dst = row["question_repr"][:2]
        fields = {"city_context": row["context_nl"], "src_city": src, "dst_city": dst}
        return fields, row["answer_nl"]
    if task == "tom_tracking":
        return row, row["solution"]
    if task == "countdown":
        return row, countdown_trace(row["nums"], row["target"])
    if task == "travel_planning":
        return {"problem": row["disambig_question_text"]}, travel_trace(row)
    if task == "pseudo_to_code":
        return {"pseudocode": "\n".join(row["pseudocode_lines"])}, "\n".join(row["code_lines"])
    return row | {"html_str": read_text(folder, row["html_path"])}, row["gt"]


TRAVEL_TOKENS = {"2k": (0, 2048), "8k": (4096, 8192)}  # of the reference


def read_longproc(rows, folder, n, seed, size, option):
    """The released prompts, without a context to cut, and the references for the scorers."""
    task, tier = option
    folder = f"{folder}/{task}"
    template, demos = longproc_prompt(folder), longproc_demos(task, folder)
    if task == "travel_planning":
        low, high = TRAVEL_TOKENS[tier]
        rows = [row for row in rows if low <= row["estimated_output_tokens"] < high]
    for row in shuffled(rows, seed)[:n]:
        fields, reference = longproc_row(task, row, folder)
        prompt = template.format_map(fields | {"demonstration": demos})
        yield Draft(prompt, [], "", "", {"reference_output": reference, "item": row})


def table(text):
    """A list of the words of each line."""
    return [line.split() for line in text.strip().split("\n")]


OFFICIAL = {
    "json_kv": Official(
        read_json_kv, "json_kv/test_k{k}_dep6.jsonl", None, "json_kv", "substring_exact_match", 100,
        sizes=(105, 220, 440, 900, 1800)),
    "msmarco_rerank_psg": Official(
        read_rerank, "msmarco/test_reranking_data_k{k}_dep3.jsonl",
        "msmarco/test_reranking_data_k10_dep3.jsonl", "rerank", "NDCG@10", 200,
        sizes=(50, 130, 285, 600, 1000)),
}
KILT = table("""
    nq        nq-dev-multikilt_1000_k{k}_dep6        nq-train-multikilt_1000_k3_dep6
    triviaqa  triviaqa-dev-multikilt_1000_k{k}_dep6  triviaqa-train-multikilt_1000_k3_dep6
    hotpotqa  hotpotqa-dev-multikilt_1000_k{k}_dep3  hotpotqa-train-multikilt_1000_k3_dep3
    popqa_3   popqa_test_1000_k{k}_dep6              popqa_test_1000_k3_dep6
    """)
for name, file, demo_file in KILT:
    OFFICIAL[f"kilt_{name}"] = Official(
        read_kilt, f"kilt/{file}.jsonl", f"kilt/{demo_file}.jsonl", "qa", "substring_exact_match",
        20, sizes=(50, 105, 220, 440, 1000))
RULER_TASKS = table("""
    niah_mk_2  niah_multikey_2  niah     ruler_recall  ruler_recall            50
    niah_mk_3  niah_multikey_3  niah     ruler_recall  ruler_recall           100
    niah_mv    niah_multivalue  niah_mv  ruler_recall  ruler_recall            50
    vt         vt               vt       ruler_recall  ruler_recall            50
    cwe        cwe              cwe      ruler_recall  ruler_recall           100
    fwe        fwe              fwe      ruler_recall  ruler_recall            50
    qa_1       qa_1             qa       ruler_qa      substring_exact_match   50
    qa_2       qa_2             qa       ruler_qa      substring_exact_match   50
    """)
for name, folder, template, scorer, metric, max_new_tokens in RULER_TASKS:
    OFFICIAL[f"ruler_{name}"] = Official(
        read_ruler, f"ruler/{folder}/validation_{{k}}.jsonl", template, scorer, metric,
        int(max_new_tokens))
ICL = table("""
    trec_coarse  coarse_label  400  800  1600  3300  6600
    trec_fine    fine_label    400  800  1600  3200  6400
    banking77    label         360  720  1450  2900  5900
    clinic150    intent        440  880  1750  3525  7050
    nlu          label         510  1020 2040  4080  8296
    """)
for name, label, *shots in ICL:
    OFFICIAL[f"icl_{name}"] = Official(
        read_icl, f"icl/{name}_test.jsonl", (f"icl/{name}_train.jsonl", label), "icl",
        "exact_match", 20, sizes=tuple(map(int, shots)))
for kind, metric in (("qa", "rougeL_f1"), ("choice", "exact_match")):
    OFFICIAL[f"infbench_{kind}_eng"] = Official(
        read_infbench, f"infbench/longbook_{kind}_eng.jsonl", kind, kind, metric, 10, chat=True)
JUDGED = {  # reader, files, scorer, metric, longest answer [tokens]
    "narrativeqa": (read_narrativeqa, "narrativeqa/narrativeqa_test.jsonl",
                    "narrativeqa/narrativeqa_train.jsonl", "qa", "rougeL_f1", 100),
    "infbench_sum_eng": (read_books, "infbench/longbook_sum_eng.jsonl", None, "qa", "rougeLsum_f1",
                         1200),
    "multi_lexsum": (read_cases, "multi_lexsum/multi_lexsum_val.jsonl",
                     "multi_lexsum/multi_lexsum_train.jsonl", "lexsum_rouge", "rougeLsum_f1", 400)}
for name, settings in JUDGED.items():
    OFFICIAL[name] = Official(*settings, chat=True, is_judged=True)
for kind, metric in (("asqa", "str_em"), ("qampari", "qampari_rec_top5")):
    OFFICIAL[f"alce_{kind}"] = Official(
        read_alce, f"alce/{kind}_eval_gtr_top2000.json", f"prompts/{kind}_revised.json",
        f"alce_{kind}", metric, 300, chat=True, sizes=(30, 75, 165, 345, 700))
for _, make, metric, _, tiers in PROCEDURES:
    for key in tiers:
        task = make.__name__
        part = "all" if task == "travel_planning" else key
        OFFICIAL[f"{task}_{key}"] = Official(
            read_longproc, f"{task}/{task}_{part}.json", (task, key), task, metric,
            TIERS[key].max_new_tokens, chat=True)


def check_draft(spec, draft):
    """Raises what the scorer raises, or ValueError where a score would mean nothing."""
    gold, scorer = draft.gold, spec.scorer
    if not draft.user or not scorer.startswith("alce") and not any(flat(draft.answer)):
        raise ValueError("a prompt or an answer is empty")
    if scorer == "html_to_tsv" and not read_table(draft.answer):
        raise ValueError("the reference table has no rows")
    if scorer != "pseudo_to_code":
        SCORERS[scorer]("", gold)
    elif not gold["item"]["testcases"]:
        raise ValueError("without tests every program would be right")


def load(task, path, n=100, seed=42, tokenizer=None, length=None, chat=None):
    """Examples of a benchmark's task from its files, with their rows, order and worked examples.

    task: a key of OFFICIAL, perhaps with "helmet:" or "longproc:" before it. path: HELMET's or
    LongProc's data folder, or one file in it. length: of prompt and answer [tokens]; picks HELMET's
    file (8192 by default) and cuts the context's end. chat: None is the benchmark's default where
    the tokenizer has a chat format. Without a tokenizer, prompts are the ids of raw bytes.

    Raises ValueError or FileNotFoundError with the file."""
    name = task.split(":")[-1]
    if name not in OFFICIAL:
        raise ValueError(f"unknown benchmark task {task!r}: one of {', '.join(OFFICIAL)}")
    spec, tokenizer = OFFICIAL[name], tokenizer or byte_tokenizer()
    size = spec.sizes[bisect.bisect_left((8192, 16384, 32768, 65536), length or 8192)]
    folder, file = path, spec.file.replace("{k}", str(size))
    if os.path.isfile(path):  # every file lies one folder below the root
        folder = os.path.dirname(os.path.dirname(os.path.abspath(path)))
        file = os.path.relpath(path, folder)
    if chat is None:
        chat = spec.chat and tokenizer.template is not None
    try:
        rows = read_rows(folder, file)
        drafts = list(spec.read(rows, folder, n, seed, size, spec.option))
        for draft in drafts:
            check_draft(spec, draft)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as e:
        why = f"{type(e).__name__}: {e}"
        raise ValueError(f"{folder}/{file}: not {name}'s rows ({why})") from None
    if not drafts:
        raise ValueError(f"{folder}/{file}: no row for {name}")
    limit = None if length is None else length - spec.max_new_tokens
    examples = []
    for draft in drafts:
        room = limit if draft.context else None
        examples.append(to_example(task, draft, tokenizer, chat, spec.max_new_tokens, room))
    return examples


# --- OLMES: multiple choice by log-likelihood (arXiv:2406.08446), MeCo's evaluation --------------

OLMES_METRICS = {  # of a choice: (log-likelihood [nats], tokens, letters) -> what is compared
    "acc_raw": lambda total, n_token, n_char: total,
    "acc_per_token": lambda total, n_token, n_char: total / n_token,
    "acc_per_char": lambda total, n_token, n_char: total / n_char}


def olmes_questions(task, folder, n):
    """(primary metric, [(right choice, [(context, continuation)])]) of the first n questions of
    TASK or TASK/SUBSET, as OLMES ships them: requests.jsonl.gz beside config.json.

    The subset is test_rc_5shot, else val_rc_5shot, else rc_5shot. Requests without a context,
    whose doc_id is 1,000,000 or more, are left out. Raises ValueError with the file, and for a
    metric that is no choice's."""
    name, _, subset = task.removeprefix("olmes:").partition("/")
    asked = [subset] if subset else ["test_rc_5shot", "val_rc_5shot", "rc_5shot"]
    folders = [os.path.join(folder, name, x) for x in asked]
    path = next((x for x in folders if os.path.isdir(x)), folders[-1])
    file, questions = os.path.join(path, "requests.jsonl.gz"), {}
    about = read_json(os.path.join(path, "config.json"))
    metric = (about.get("task_config") or {}).get("primary_metric")
    if metric not in OLMES_METRICS:
        raise ValueError(f"{path}: its metric is {metric}: only {', '.join(OLMES_METRICS)}")
    try:
        with gzip.open(file, "rt", encoding="utf-8") as f:
            for row in map(json.loads, f):
                if row["doc_id"] < 10 ** 6:
                    request = row["request"]["context"] + "", row["request"]["continuation"] + ""
                    if not all(request):
                        raise ValueError(f"question {row['doc_id']} has an empty part")
                    questions.setdefault(row["doc_id"], (row["label"], []))[1].append(request)
    except (KeyError, TypeError, ValueError, EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise ValueError(f"{file}: not OLMES's requests ({type(e).__name__}: {e})") from None
    if not questions:
        raise ValueError(f"{file}: no questions")
    return metric, list(questions.values())[:n]


def choice_ids(tokenizer, context, continuation):
    """Ids of a context and of what follows: those of both together, cut where the context's end."""
    bare = context.rstrip(" ")
    before = tokenizer.document(bare)
    return before, tokenizer.document(context + continuation)[len(before):]


@torch.no_grad()
def log_likelihoods(model, tokenizer, pairs, make, prefix=()):
    """(log-likelihood [nats], tokens, letters) of each continuation behind its context, and the
    first cache. make() is an empty cache; equal contexts are read once."""
    def ids(x):
        return torch.tensor(x, device=model.head.device)
    found, read = [], {}
    for context, continuation in pairs:
        before, after = choice_ids(tokenizer, context, continuation)
        before = [*prefix, *before[len(prefix) > 0 and tokenizer.add_bos:]]
        if tuple(before) not in read:
            cache = make()
            read[tuple(before)] = cache, cache.prefill(model, ids(before))
        cache, state = read[tuple(before)]
        states = state[None]
        if len(after) > 1:
            more = cache.fork(1).prefill(model, ids(after[:-1]), len(after), every=True)
            states = torch.cat((states, more))
        logits = F.linear(states, model.head).float().log_softmax(-1)
        total = logits.gather(1, ids(after)[:, None]).sum().item()
        found.append((total, len(after), len(continuation)))
    return found, next(iter(read.values()))[0]


def run_olmes(config, policy, name, model, tokenizer, done, about):
    """Run an OLMES task's questions that are not done yet. Returns the keys of all."""
    metric, questions = olmes_questions(name, config.data, config.examples)
    prefix = meco.prompt(tokenizer, "", config.prefix_host) if config.prefix_host else []
    shas = [hashlib.sha256(repr(question).encode()).hexdigest()[:16] for question in questions]
    keys = [json.dumps({"task": name, "i": i, "sha": sha, "host": config.prefix_host, **about})
            for i, sha in enumerate(shas)]
    todo = [i for i, key in enumerate(keys) if key not in done][rank()::world_size()]
    for i in tqdm(todo, name, disable=None if rank() == 0 else True):
        start, (label, pairs) = time.perf_counter(), questions[i]
        make = partial(policy.cache, model, config.seed)
        found, cache = log_likelihoods(model, tokenizer, pairs, make, prefix)
        metrics = {}
        for key, value in OLMES_METRICS.items():
            values = [value(*choice) for choice in found]
            metrics[key] = float(values.index(max(values)) == label)
        done[keys[i]] = {
            "key": keys[i], "task": name, "length": 0, "policy": policy.policy, "i": i,
            "score": metrics[metric], "metrics": metrics | {"log_likelihoods": found},
            "footprint": float(cache.footprint()), "peak": float(cache.peak()),
            "seconds": time.perf_counter() - start}
        append_line(config.out, done[keys[i]])
    return keys


# --- LitSearch: retrieval (arXiv:2407.18940) -----------------------------------------------------

STOP_WORDS = frozenset((
    "a about above after again against all am an and any are as at be because been before being "
    "below between both but by can did do does doing don down during each few for from further "
    "had has have having he her here hers him his how i if in into is it its itself just me more "
    "most my no nor not now of off on once only or other our out over own s same she so some such "
    "t than that the their them then there these they this those through to too under until up "
    "very was we were what when where which while who whom why will with you your").split())


def plain_words(text):
    return re.findall(r"\w+", text.lower())


def search_words(text):
    """Words nearly as in LitSearch's BM25: stems without stop words. It also keeps punctuation."""
    words = re.findall("[a-z0-9]+", text.lower())
    return [stem(word) for word in words if word not in STOP_WORDS]


class BM25:
    """Okapi BM25 over texts, as rank_bm25's BM25Okapi.

    score(d) = sum over the query's words, with repetitions, of
    idf tf (k1 + 1) / (tf + k1 (1 - b + b |d| / mean |d|)), idf = ln(N - df + 0.5) - ln(df + 0.5).
    A negative idf becomes epsilon times the vocabulary's mean idf. Raises ValueError if no document
    has a word."""

    def __init__(self, docs, words=plain_words, k1=1.5, b=0.75, epsilon=0.25):
        lengths, where, counts = [], defaultdict(list), defaultdict(list)
        for i, doc in enumerate(docs):
            terms = Counter(words(doc))
            lengths.append(terms.total())
            for word, tf in terms.items():
                where[word].append(i)
                counts[word].append(tf)
        if not where:
            raise ValueError("BM25: the documents have no words")
        lengths = np.array(lengths)
        norm = k1 * (1 - b + b * lengths / lengths.mean())
        df = np.array(list(map(len, where.values())))
        idf = np.log(len(docs) - df + 0.5) - np.log(df + 0.5)
        idf = np.where(idf < 0, epsilon * idf.mean(), idf)
        self.words, self.n, self.postings = words, len(docs), {}
        for word, weight in zip(where, idf):  # postings: word -> its documents, its scores there
            i, tf = np.array(where[word]), np.array(counts[word])
            self.postings[word] = i, weight * tf * (k1 + 1) / (tf + norm[i])

    def scores(self, query):
        """Scores (n documents,) of a query text."""
        total = np.zeros(self.n)
        for word, times in Counter(self.words(query)).items():
            if word in self.postings:
                i, scores = self.postings[word]
                total[i] += times * scores
        return total

    def top(self, query, k):
        """The best k documents [(index, score)] of a query text, as in top_k."""
        return top_k(self.scores(query), k)


def top_k(scores, k):
    """[(index, score)] of the k highest; of equal scores the later one comes first."""
    order = np.argsort(scores, kind="stable")[::-1][:k]
    return [(int(i), float(scores[i])) for i in order]


@torch.no_grad()
def embed(model, tokenizer, texts, longest=512):
    """The normalised mean of a Llama's last states over a text's first `longest` tokens.

    Returns (len(texts), n_embd) float32."""
    out = []
    for text in tqdm(texts, desc="embedding", unit="text", disable=None, leave=False):
        ids = tokenizer.document(text)[:longest] or [0]
        states = model.hidden(torch.tensor(ids, device=model.head.device))
        out.append(torch.nn.functional.normalize(states.float().mean(0), dim=0))
    return torch.stack(out).cpu().numpy()


def parse_order(reply, n):
    """The numbers 0 .. n - 1 in the order of a reply such as "[2] > [1]", which counts from 1.

    Repeated and impossible numbers do not count; the others follow in their old order."""
    numbers = [int(x) - 1 for x in re.findall(r"\d+", reply) if len(x) < 10]
    found = [i for i in dict.fromkeys(numbers) if 0 <= i < n]
    return found + [i for i in range(n) if i not in found]


def listwise(ask, query, texts, window=10, stride=5):
    """The order of texts, best first, by a model that ranks `window` of them at a time.

    It begins with the last ones. ask(prompt) -> reply. Source: RankGPT, arXiv:2304.09542."""
    order = list(range(len(texts)))
    for end in range(len(order), 0, -stride):
        start, listed = max(0, end - window), ""
        part = order[start:end]
        for i, d in enumerate(part, 1):
            listed += f"[{i}] {' '.join(texts[d].split()[:300])}\n"
        reply = ask(f"Rank the passages by how well they answer the query.\n\n{listed}\n"
                    f"Query: {query}\nAnswer with all numbers, the best first, like [2] > [1].")
        order[start:end] = [part[i] for i in parse_order(reply, len(part))]
        if start == 0:
            break
    return order


def retrieval_metrics(ranked, gold, k_values=(5, 20)):
    """Recall at k, NDCG@10 and MRR of ranked ids against a set of gold ids."""
    hits = [x in gold for x in ranked]
    metrics = {f"recall@{k}": sum(hits[:k]) / len(gold) for k in k_values}
    metrics["ndcg@10"] = dcg(hits[:10]) / dcg([1] * min(10, len(gold)))
    metrics["mrr"] = reciprocal_rank(hits)
    return metrics


def litsearch_data(path=None):
    """LitSearch: (ids, texts, queries {query, corpusids, part}). part: specific or broad, and
    whether the query was written from a citation or by an author; the paper reports these apart.

    path is a folder with query.jsonl (query, corpusids, specificity, query_set) and corpus.jsonl
    (corpusid, title, abstract), converted once from the hub's parquet (princeton-nlp/LitSearch).
    Papers of the same text count as one, the last. Without a path: the docstrings of Python's
    standard library; the query is a docstring's first sentence, the document is the rest. Raises
    ValueError if the corpus lacks every query's papers."""
    queries, by_text = [], {}
    if path is None:
        for i, (first, rest) in enumerate(docstrings()):
            queries.append({"query": first, "corpusids": [i], "part": "specific"})
            by_text[rest] = i
        return list(by_text.values()), list(by_text), queries
    try:
        for row in read_rows(path, "query.jsonl"):
            search_words(row["query"])  # refuses what is no text
            origin = str(row.get("query_set")).partition("_")[0]
            part = ("specific" if row["specificity"] == 1 else "broad") + {
                "inline": ", from citations", "manual": ", by authors"}.get(origin, "")
            queries.append({"query": row["query"], "corpusids": row["corpusids"], "part": part})
        for row in read_rows(path, "corpus.jsonl"):
            by_text["Title: {title}\nAbstract: {abstract}".format_map(row)] = row["corpusid"]
        golds = [set(query["corpusids"]) for query in queries]
        known = set(by_text.values())
    except (LookupError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"{path}: not LitSearch's rows ({type(e).__name__}: {e})") from None
    if not all(golds) or known.isdisjoint(set().union(*golds)):  # it would score 0, or nothing
        raise ValueError(f"{path}: a query has no corpusids, or the corpus has none of them")
    return list(by_text.values()), list(by_text), queries


def docstrings():
    """[(first sentence, rest)] of the standard library's docstrings, in a fixed order."""
    found = {}
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
                first, rest = first.split(), rest.split()
                if len(first) >= 4 and len(rest) >= 10:
                    found.setdefault(" ".join(rest), " ".join(first))
    return [(first, rest) for rest, first in found.items()]


def search(kind, model, tokenizer, data, chosen, ask):
    """Yield (query index, metrics) of the chosen queries with one retriever.

    kind: bm25, dense, or rerank (the model ranks BM25's best 20). data: of litsearch_data.
    ask(prompt) -> reply."""
    ids, texts, queries = data
    if kind == "dense":
        vectors = embed(model, tokenizer, texts)
        scores_of = lambda query: vectors @ embed(model, tokenizer, [query])[0]
    else:
        scores_of = BM25(texts, search_words).scores
    for i in chosen:
        query, gold = queries[i]["query"], set(queries[i]["corpusids"])
        ranked = [d for d, _ in top_k(scores_of(query), 200)]
        if kind == "rerank":
            order = listwise(ask, query, [texts[d] for d in ranked[:20]])
            ranked[:20] = [ranked[j] for j in order]
        yield i, retrieval_metrics([ids[d] for d in ranked], gold)


# --- word problems: a small instruction set with answers that can be checked ---------------------

PEOPLE = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
GOODS = ("apples", "books", "coins", "eggs", "pens", "shells", "stamps", "toys")
PROBLEMS = (  # question, two steps
    ("{one} has {many} {goods}. {two} brings {few} {goods} a day for {times} days. How many "
     "{goods} does {one} have then?",
     "{few} * {times} = {product}\n{many} + {product} = {many_product}"),
    ("{one} fills {times} boxes with {few} {goods} each and has {more} {goods} left over. How many "
     "{goods} are there?",
     "{times} * {few} = {product}\n{product} + {more} = {product_more}"),
    ("{one} has {many_more} {goods}, gives {more} of them to {two} and finds {few} more. How many "
     "{goods} does {one} have now?",
     "{many_more} - {more} = {many}\n{many} + {few} = {many_few}"),
    ("{one} has {many} {goods}. {two} has {few} times as many. How many {goods} do they have "
     "together?",
     "{few} * {many} = {fold}\n{fold} + {many} = {fold_many}"),
    ("{one} has {many_product} {goods} and gives {few} to each of {times} friends. How many "
     "{goods} are left?",
     "{few} * {times} = {product}\n{many_product} - {product} = {many}"),
)


def word_problem(rng):
    """(question, answer) of two steps of arithmetic; the answer ends as in GSM8K (2110.14168)."""
    one, two = rng.permutation(PEOPLE)[:2]
    values = {"one": one, "two": two, "goods": rng.choice(GOODS)}
    many, more = rng.integers(10, 60, 2)
    few, times = rng.integers(2, 10, 2)
    product, fold = few * times, few * many
    values |= dict(
        many=many, more=more, few=few, times=times, product=product, fold=fold,
        many_product=many + product, product_more=product + more, many_more=many + more,
        many_few=many + few, fold_many=fold + many)
    question, steps = PROBLEMS[rng.integers(len(PROBLEMS))]
    steps = steps.format_map(values)
    return question.format_map(values), f"{steps}\n#### {steps.split()[-1]}"


def final_answer(text):
    """What an answer ends with, or None.

    This is the number after GSM8K's ####, or in lower case the word after "the correct answer is"
    (the commonsense sets of LLM-Adapters, arXiv:2304.01933)."""
    found = re.search(r"####\s*\$?(-?[\d,]{0,40}\.?\d{1,40})", text)
    if found:
        return str(Fraction(found[1].replace(",", "")))
    found = re.search(r"the correct answer is\W*(\w+)", text, re.IGNORECASE)
    return found[1].lower() if found else None


# --- fact stream ---------------------------------------------------------------------------------

BOS, FILLER, FACT, QUERY, ANSWER = 0, 1, 17, 145, 161  # first token of each kind
N_FILLER, N_KEY, N_VALUE = 16, 16, 8
VOCAB = ANSWER + N_VALUE  # 169
# length, facts, queries, sequences per step, recall (moving average) that ends the stage
CURRICULUM = ((64, 8, 16, 32, 0.97), (128, 10, 24, 16, 0.97), (256, 12, 32, 8, 0.97),
              (512, 12, 48, 6, 0.985))


@dataclass(frozen=True)
class Facts:
    """A batch of fact streams. query, fact (n,): index of each query token in batch.tokens, and of
    the fact that it asks for."""
    batch: Batch
    query: torch.Tensor
    fact: torch.Tensor


@cache
def filler_tables():
    """Three successors of each filler token after one and after two tokens, always the same."""
    rng = np.random.default_rng(0)
    rows = [[rng.choice(N_FILLER, 3, replace=False) for _ in range(N_FILLER)] for _ in range(2)]
    return [np.stack(table) for table in rows]


def fact_stream(rng, n_seq, length, n_fact, n_query, queries_last=False) -> Facts:
    """n_seq sequences of `length` tokens: n_fact facts with distinct keys in the first half,
    n_query queries after the first fact about facts already told (queries_last: all at the end).

    Raises ValueError if that does not fit."""
    n_filler = length - 1 - n_fact - 2 * n_query
    slots = n_fact + n_query + n_filler
    room = slots - slots // 2 >= n_query and 0 < n_fact <= min(N_KEY, slots // 2)
    if n_filler < 0 or not room:
        raise ValueError(f"{n_fact} facts, {n_query} queries do not fit into {length} tokens")
    tables, tokens = filler_tables(), np.zeros((n_seq, length), dtype=np.int64)
    query, fact = [], []
    for s in range(n_seq):
        kind = np.zeros(slots, dtype=np.int64)  # 0 filler, 1 fact, 2 query
        kind[rng.choice(slots // 2, n_fact, replace=False)] = 1
        free = np.flatnonzero(kind == 0)
        free = free[free > np.flatnonzero(kind)[0]]
        last = free[len(free) - n_query:]
        kind[last if queries_last else rng.choice(free, n_query, replace=False)] = 2
        keys, values = rng.permutation(N_KEY)[:n_fact], rng.integers(N_VALUE, size=n_fact)
        told, at = [], 1
        a, b = rng.integers(N_FILLER), rng.integers(N_FILLER)  # the last two filler tokens
        chances = rng.integers(2, size=slots), rng.integers(3, size=slots)
        for choice, table, pick in zip(kind, *chances):
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
    return Facts(with_targets(tokens), torch.tensor(query), torch.tensor(fact))


def with_targets(tokens) -> Batch:
    """A Batch of streams (n_seq, length). Facts and queries are pure chance and weigh nothing."""
    batch = collate(tokens)
    rest = torch.where(batch.targets < FACT, 0.3, 0.0)
    return batch._replace(weights=torch.where(batch.targets >= ANSWER, 1.0, rest))


@torch.no_grad()
def recalled(model, facts: Facts, attend=causal):
    """Whether the likeliest token after each query is the right one: float (n,) of 0 and 1."""
    tokens = facts.batch.tokens.to(model.head.device)
    return right_answers(model, facts, model.hidden(tokens, attend(facts.batch.cu_seqlens)))


def right_answers(model, facts, hidden):
    """The same, of the states (N, n_embd) of a batch."""
    best = (hidden[facts.query] @ model.head.T).argmax(1).cpu()
    return (best == facts.batch.targets[facts.query]).float()


class FactData:
    """The fact stream as data to train on (train.py). Scores: recall on streams of 512 tokens."""
    defaults = dict(seq_len=128, batch=8)
    vocab_size, tokenizer = VOCAB, None

    def __init__(self, seq_len, n_seq, seed=0, n_eval=16):
        self.seq_len, self.n_seq, self.seed, self.n_eval = seq_len, n_seq, seed, n_eval
        fits = [row for row in CURRICULUM if row[0] <= seq_len]
        if not fits:
            raise ValueError(f"the fact stream needs --seq_len >= {CURRICULUM[0][0]}")
        self.n_fact, self.n_query = fits[-1][1:3]

    def batch(self, i):
        rng = np.random.default_rng((self.seed, i))
        return fact_stream(rng, self.n_seq, self.seq_len, self.n_fact, self.n_query).batch

    def passkeys(self, i, needles):
        """Facts first and as many queries at the very end; only their answers are targets."""
        rng = np.random.default_rng((self.seed, i))
        facts = fact_stream(rng, self.n_seq, self.seq_len, needles, needles, queries_last=True)
        targets = torch.full_like(facts.batch.targets, -100)
        targets[facts.query] = facts.batch.targets[facts.query]
        return facts.batch._replace(targets=targets)

    def scores(self, model, attend=causal, beyond=0) -> dict:
        """Recall, of facts at least `beyond` tokens back."""
        rng = np.random.default_rng((self.seed, 2 ** 31))
        facts = fact_stream(rng, self.n_eval, *CURRICULUM[-1][:3])
        far = facts.query - facts.fact >= beyond
        name = "far recall" if beyond else "recall"
        return {name: recalled(model, facts, attend)[far].mean().item()}


def build_facts(n, length, seed, tokenizer=None):
    """Fact streams of `length` tokens that end in a query; the answer is the next token."""
    if tokenizer is not None:
        raise ValueError("task facts is made of token ids for the tiny model, not of text")
    n_fact = FactData(length, n).n_fact
    rng = np.random.default_rng([seed, length])
    tokens = fact_stream(rng, n, length + 1, n_fact, 1, queries_last=True).batch.tokens
    rows = tokens.view(n, -1).tolist()
    return [Example("facts", row[:-1], row[-1:], 1) for row in rows]


# --- tiny model ----------------------------------------------------------------------------------

TINY = LlamaConfig(
    vocab_size=VOCAB, n_layer=3, n_head=8, n_kv_head=4, n_embd=64, n_ff=128, head_dim=16,
    max_seq_len=2048, rope_base=1e6, tie_embeddings=True, bos_id=BOS)


@torch.no_grad()
def tiny_start(seed) -> Llama:
    """The tiny Llama before training."""
    model, rng = Llama(TINY).init_weights(seed), torch.Generator().manual_seed(seed)
    noise = torch.randn(TINY.n_embd, generator=rng)
    model.model.embed_tokens.weight += 0.5 * noise * TINY.n_embd ** -0.5
    for p in model.model.layers.parameters():
        if p.dim() == 2:  # small projections: the lookup settles in few heads (at full size the
            p *= 0.25     # best 3 of 12 recall .93 to .96 of far facts, at a quarter .98 to 1)
    return model


def tiny_model(seed=0, path=None, max_steps=1200) -> Llama:
    """The tiny Llama that knows the fact stream up to 512 tokens: read from folder `path`, by
    default out/tiny-seedN, or trained (about a CPU minute) and kept there. Raises ValueError if
    path holds another model, or the stages are not through after max_steps steps."""
    path = path or os.path.join("out", f"tiny-seed{seed}")
    if os.path.exists(os.path.join(path, "config.json")):  # written last
        model = load_model(path)
        if model.config != TINY:
            raise ValueError(f"{path} holds another model than the tiny one")
        return model
    model = tiny_start(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01)
    step, bar = 0, tqdm(desc="tiny model", unit="step", disable=None, leave=False)
    for stage, (length, n_fact, n_query, n_seq, goal) in enumerate(CURRICULUM):
        average, peak = 0.0, 4e-3 * (0.5 if stage else 1.0)
        while average < goal:
            if step == max_steps:
                raise ValueError(f"the tiny model (seed {seed}) is at recall {average:.2f} of "
                                 f"length {length} after {step} steps")
            rng = np.random.default_rng([seed, step])
            facts = fact_stream(rng, n_seq, length, n_fact, n_query)
            batch = facts.batch
            hidden = model.hidden(batch.tokens, causal(batch.cu_seqlens))
            loss = cross_entropy(hidden, model.head, batch.targets, batch.weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 30)
            optimizer.step()
            optimizer.zero_grad()
            right = right_answers(model, facts, hidden.detach()).mean().item()
            average += 0.1 * (right - average)
            step += 1
            bar.update()
            bar.set_postfix(length=length, loss=f"{loss.item():.3f}", recall=f"{average:.3f}")
    bar.close()
    save_model(model, path)
    print(f"tiny model, seed {seed}: trained in {step} steps, saved in {path}")
    return model


# --- evaluation: one JSON line per example as it is done -----------------------------------------

@dataclass
class Config:
    model: str | None = flag(None, "folder of a Llama (default: the tiny model's recall is shown)")
    tasks: str = flag("niah_s,niah_mv,icl", "comma-separated: built ones, helmet:NAME, "
                                            "longproc:NAME or olmes:NAME (with --data), "
                                            "litsearch:bm25, :dense or :rerank")
    lengths: str = flag("1024", "of the prompts, comma-separated [tokens]; longproc and litsearch "
                                "have their own")
    examples: int = flag(20, "of each task and length", least=1)
    batch: int = flag(1, "prompts that decode together", least=1)
    chunk_size: int = flag(256, "CEPE: tokens that its encoder reads at once", least=1)
    n_near: int = flag(2048, "CEPE: last tokens of a running text that its decoder reads itself "
                             "(10 documents, 2 demonstrations)", least=0)
    seed: int = flag(0, "of the built examples, and of the tiny model", least=0)
    data: str | None = flag(None, "folder with the benchmark's own files")
    chat: str | None = flag(None, "the prompts' format (default: the folder's own, where it has "
                                  "one and the benchmark uses it; not for built tasks)",
                            choices=CHAT_CHOICES, bare="own")
    prefix_host: str | None = flag(None, "host before every prompt, for models trained with MeCo")
    max_new_tokens: int | None = flag(None, "longest answer (default: the task's)", least=1)
    out: str = flag("out/eval.jsonl", "results, one line an example")
    helmet_dir: str | None = flag(None, "folder for helmet tasks' results in HELMET's own format, "
                                        "for its judges")
    resume: bool = flag(False, "keep what --out holds and run the rest")
    overwrite: bool = flag(False, "begin --out anew")
    allow_code_exec: bool = flag(False, "let pseudo_to_code compile and run what the model wrote")
    device: str = flag("cpu", "torch device")
    dtype: str = flag("bfloat16", "of weights and cache", choices=tuple(DTYPES))


def answer(model, tokenizer, examples, cache, max_new_tokens=None, cache_kv=False):
    """What the model writes after several prompts: texts, for task facts lists of ids. An answer
    ends at a stop id, its task's limit, or a line's end where the scorer reads no further.

    A CEPE takes one example; cache_kv: it projects its context's keys and values once."""
    if examples[0].chunks:
        model = cepe.reading(model, examples[0].chunks, cache_kv)
    spec = task_of(examples[0].task)
    limits = [max_new_tokens or example.max_new_tokens for example in examples]
    one_line = spec.scorer == "icl"

    def until(b, ids):
        ended = one_line and "\n" in tokenizer.decode(ids).lstrip()
        return ended or len(ids) == limits[b]
    stop_ids = () if tokenizer is None else tokenizer.eos_ids
    prompts = [example.prompt for example in examples]
    answers = generate(model, prompts, max(limits), cache, stop_ids=stop_ids, until=until)
    if tokenizer is None:
        return answers
    return [tokenizer.decode(ids, marks=False) for ids in answers]


def held(model, cache, b, example, cache_kv=False):
    """(KV footprint, peak) of one example."""
    if example.chunks:
        return cepe.footprint(model, cache, sum(map(len, example.chunks)), cache_kv)
    return cache.footprint(b), cache.peak(b)


def read_results(path) -> dict:
    """Results in `path` by their key; the torn last line of a killed run is cut off."""
    if not os.path.exists(path):
        return {}
    with open(path, "rb") as f:
        lines = f.read().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        os.truncate(path, sum(map(len, lines)))  # the same from every process
    try:
        return {row["key"]: row for row in map(json.loads, lines)}
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: not a file of results ({type(e).__name__}: {e})") from None


def open_results(path, config) -> dict:
    """The finished results in `path`, which --resume keeps and --overwrite removes. Raises
    ValueError where there is a file and neither is said."""
    if os.path.exists(path) and config.resume == config.overwrite:
        raise ValueError(f"{path} is there: add --resume or --overwrite, or name another")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    barrier()
    if config.overwrite and rank() == 0:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
    barrier()
    done = read_results(path)
    barrier()  # all have read before one writes
    return done


def by(rows, *names):
    """(values of these fields, rows) in the order of first appearance."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups.items()


def is_docstring(node) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def code_fingerprint(*files) -> str:
    """Of what computes a result: syntax trees without docstrings, so that a comment changes
    nothing."""
    here, digest = os.path.dirname(os.path.abspath(__file__)), hashlib.sha256()
    names = ("model.py", "attention_triton.py", "evict.py", "cepe.py", "eval_tasks.py")
    for path in [*(os.path.join(here, name) for name in names), *files]:
        with open(path, encoding="utf-8") as f:
            tree = ast.parse(f.read())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and is_docstring(body[0]):
                body.pop(0)
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def run_key(config, policy) -> dict:
    """What all results of a run depend on."""
    settings = {name: value for name, value in asdict(policy).items() if value is not None}
    for name in ("heads", "scorer"):
        if name in settings:
            with open(settings[name], "rb") as f:
                settings[name] = hashlib.sha256(f.read()).hexdigest()[:16]
    rule = inspect.getsourcefile(RULES[policy.policy])
    return {"weights": fingerprint(config.model), "code": code_fingerprint(rule), **settings,
            "seed": config.seed, "dtype": config.dtype, "device": config.device,
            "batch": config.batch, "chat": config.chat, "max_new_tokens": config.max_new_tokens}


def evaluate(config, policy, model, tokenizer, done):
    """Run what is not done yet, an equal share in each process. Returns the keys asked for."""
    about, keys = run_key(config, policy), []
    for name, length in jobs(config):
        if name.startswith("litsearch:"):
            keys += run_search(config, name, model, tokenizer, done, about)
            continue
        if name.startswith("olmes:"):
            keys += run_olmes(config, policy, name, model, tokenizer, done, about)
            continue
        examples = examples_of(config, name, length, tokenizer)
        longest = max(len(example.prompt) for example in examples)
        if rank() == 0:
            print(beyond_training(model.config, longest), end="", file=sys.stderr)
            if cepe.is_cepe(config.model) and not any(example.chunks for example in examples):
                print(f"{name}, {length} tokens: all fits into the decoder, nothing is left for "
                      "the encoder", file=sys.stderr)
        own = [json.dumps({"task": name, "length": length, "i": i, "sha": example.sha(), **about})
               for i, example in enumerate(examples)]
        keys += own
        todo = [i for i, key in enumerate(own) if key not in done][rank()::world_size()]
        todo.sort(key=lambda i: len(examples[i].prompt))
        batches = [todo[i:i + config.batch] for i in range(0, len(todo), config.batch)]
        for batch in tqdm(batches, f"{name} {length}", disable=None if rank() == 0 else True):
            start, cache = time.perf_counter(), policy.cache(model, config.seed, len(batch))
            chosen = [examples[i] for i in batch]
            texts = answer(model, tokenizer, chosen, cache, config.max_new_tokens)
            seconds = (time.perf_counter() - start) / len(batch)
            for b, (i, example, text) in enumerate(zip(batch, chosen, texts)):
                metrics = score(name, text, example)
                footprint, peak = held(model, cache, b, example)
                done[own[i]] = {
                    "key": own[i], "task": name, "length": length, "policy": policy.policy, "i": i,
                    "prompt_tokens": len(example.prompt), "cut_tokens": example.n_cut,
                    "prediction": text, "score": metrics["score"], "metrics": metrics,
                    "footprint": float(footprint), "peak": float(peak), "seconds": seconds}
                append_line(config.out, done[own[i]])
    return keys


def jobs(config) -> list:
    """(task, length) of what is asked for."""
    out = []
    for name in config.tasks.split(","):
        fixed = name.startswith(("longproc:", "litsearch:", "olmes:"))
        lengths = ["0"] if fixed else config.lengths.split(",")
        out += [(name, int(length)) for length in lengths]
    return list(dict.fromkeys(out))  # what is asked for twice is counted once


def chosen_chat(config):
    """Whether prompts are turns of a chat; None where that was not said."""
    return None if config.chat is None else config.chat != "none"


def examples_of(config, name, length, tokenizer) -> list:
    """The examples of a task and length, behind --prefix_host if there is one."""
    host, chat = config.prefix_host, chosen_chat(config)
    before = [] if host is None else meco.prompt(tokenizer, "", host)
    bos = int(tokenizer.add_bos) if before else 0  # gives way to the one in `before`
    length -= len(before) - bos
    if ":" in name:
        length = None if name.startswith("longproc:") else length
        examples = load(name, config.data, config.examples, tokenizer=tokenizer, length=length,
                        chat=False if before else chat)
    else:
        examples = build(name, config.examples, length, config.seed, tokenizer, bool(chat))
    if cepe.is_cepe(config.model):
        examples = [for_encoder(e, tokenizer, config.chunk_size, config.n_near) for e in examples]
    if not before:
        return examples
    return [replace(e, prompt=[*before, *e.prompt[bos:]]) for e in examples]


def run_search(config, name, model, tokenizer, done, about):
    """Run a LitSearch task's queries that are not done yet. Returns the keys of all."""
    data = litsearch_data(config.data)
    corpus = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
    n = min(config.examples, len(data[2]))
    chosen = random.Random(42).sample(range(len(data[2])), n)
    keys = {i: json.dumps({"task": name, "corpus": corpus, "i": i, **about}) for i in chosen}

    def ask(prompt):
        ids = to_ids(tokenizer, prompt, "", bool(chosen_chat(config)))
        longest = config.max_new_tokens or 60
        new = generate(model, ids, longest, stop_ids=tokenizer.eos_ids)
        return tokenizer.decode(new, marks=False)
    todo = [i for i in chosen if keys[i] not in done][rank()::world_size()]
    start, kind = time.perf_counter(), name.removeprefix("litsearch:")
    for i, metrics in search(kind, model, tokenizer, data, todo, ask) if todo else ():
        seconds, start = time.perf_counter() - start, time.perf_counter()
        done[keys[i]] = {"key": keys[i], "task": name, "length": 0, "policy": "full", "i": i,
                         "part": data[2][i]["part"], "score": metrics["recall@5"],
                         "metrics": metrics, "footprint": 1.0,
                         "peak": 1.0, "seconds": seconds}
        append_line(config.out, done[keys[i]])
    return list(keys.values())


def confidence(scores) -> float:
    """Half a 95 % interval of the mean: Wilson's for 0/1 scores, else 1.96 standard errors."""
    n, mean, z = len(scores), sum(scores) / len(scores), 1.96
    if set(scores) <= {0.0, 1.0}:
        return z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    if n == 1:
        return math.inf
    return z * math.sqrt(sum((s - mean) ** 2 for s in scores) / (n - 1) / n)


def report(rows) -> list:
    """A Markdown table by task, length and policy; returns it as records too."""
    records = []
    print("\n| task | tokens | policy | score | 95 % ± | n | footprint | peak | s each |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (task, length, policy), group in by(rows, "task", "length", "policy"):
        half = confidence([row["score"] for row in group])
        means = {name: sum(row[name] for row in group) / len(group)
                 for name in ("score", "footprint", "peak", "seconds")}
        shown = f"{task} (ROUGE; needs a judge)" if needs_judge(task) else task
        print(f"| {shown} | {length or '-'} | {policy} | {means['score']:.3f} | {half:.3f} | "
              f"{len(group)} | {means['footprint']:.3f} | {means['peak']:.3f} | "
              f"{means['seconds']:.2f} |")
        records.append({"task": task, "length": length, "score": round(means["score"], 4),
                        "n": len(group)})
        for name in ("recall@5", "recall@20", "ndcg@10", "mrr"):
            if name in group[0]["metrics"]:
                mean = sum(row["metrics"][name] for row in group) / len(group)
                print(f"| | | {name} | {mean:.3f} | | | | | |")
        for (part,), rows_of in by([row for row in group if "part" in row], "part"):
            name = "recall@5" if part.startswith("specific") else "recall@20"  # as the paper
            values = [row["metrics"][name] for row in rows_of]
            print(f"| | | {name}, {part} | {sum(values) / len(values):.3f} | "
                  f"{confidence(values):.3f} | {len(values)} | | | |")
    for (policy, length), group in by(rows, "policy", "length"):
        said = advice(policy, sum(row["footprint"] for row in group) / len(group))
        if said:
            print(f"{length} tokens: {said}", file=sys.stderr)
    return records


def write_helmet(config, name, length, examples, rows):
    """A task's results as HELMET's eval.py writes them, so that its own scripts, the judges among
    them, read the file. Returns the path."""
    data, metrics = [], defaultdict(list)
    for example, row in zip(examples, rows):
        own = row["metrics"] | {"input_len": row["prompt_tokens"]}
        gold = {key: value for key, value in example.gold.items() if key != "context"}
        output = example.prefix + row["prediction"]
        parsed = parse_output(output, "Answer:")
        data.append(gold | own | {"output": output, "parsed_output": parsed})
        for key, value in own.items():
            metrics[key].append(value)
    scale = {key: 1 if "_len" in key else 100 for key in metrics}
    averages = {key: scale[key] * sum(x) / len(x) for key, x in metrics.items()}
    task, chat = name.removeprefix("helmet:"), examples[0].chat
    about = {"model_name_or_path": config.model, "datasets": task, "input_max_length": length,
             "use_chat_template": chat, "tag": "v1", "seed": 42}
    path = os.path.join(config.helmet_dir,
                        f"{task}_{length}_v1_in{length}_size{len(rows)}_chat{chat}_42.json")
    os.makedirs(config.helmet_dir, exist_ok=True)
    write_json(path, {"args": about, "data": data, "metrics": metrics,
                      "averaged_metrics": averages})
    return path


def tiny_table(config):
    """Recall of the tiny model on the fact stream by distance."""
    model, rows = tiny_model(config.seed), {}
    print("| tokens | recall | facts up to 32 back | 33 to 128 | beyond |\n|---|---|---|---|---|")
    for length, n_fact, n_query, *_ in CURRICULUM:
        rng = np.random.default_rng([config.seed, 2 ** 31])
        facts = fact_stream(rng, max(64, config.examples), length, n_fact, n_query)
        back = facts.query - facts.fact
        bands = [back > 0, back <= 32, (back > 32) & (back <= 128), back > 128]
        right = recalled(model, facts)
        scores = [right[band].mean().item() if band.any() else None for band in bands]
        cells = ["-" if x is None else f"{x:.3f}" for x in scores]
        print(f"| {length} | " + " | ".join(cells) + " |", flush=True)
        rows[length] = scores[0]
    print(json.dumps({"seed": config.seed, "recall": rows}))


def check_tasks(config, policy):
    """Refuse tasks that are unknown, or that nothing here can score."""
    for name, _ in jobs(config):
        bare = name.split(":")[-1]
        if name.startswith("olmes:") and config.data is not None and not chosen_chat(config):
            continue
        official = name.startswith(("helmet:", "longproc:"))
        search_kinds = ("litsearch:bm25", "litsearch:dense", "litsearch:rerank")
        if not (name in TASKS or name in search_kinds or official and bare in OFFICIAL):
            raise ValueError(f"unknown task {name!r}: {', '.join(TASKS)}, helmet:NAME, "
                             f"longproc:NAME, olmes:NAME (with --data, without --chat), "
                             f"{', '.join(search_kinds)}")
        if official and config.data is None:
            raise ValueError(f"task {name} needs --data with the benchmark's own files")
        if name in search_kinds and (policy.policy != "full" or config.prefix_host):
            raise ValueError("litsearch tasks take no eviction policy and no --prefix_host")
        runs_code = name not in search_kinds and task_of(name).scorer == "pseudo_to_code"
        if runs_code and not config.allow_code_exec:
            raise ValueError(f"{name} compiles and runs what the model wrote: --allow_code_exec")
    if cepe.is_cepe(config.model):
        if config.batch > 1:
            raise ValueError("--batch: a CEPE reads the context of one prompt at a time")
        if any(name.startswith(("olmes:", "litsearch:")) for name, _ in jobs(config)):
            raise ValueError("olmes and litsearch tasks have no context for a CEPE's encoder")
    if config.prefix_host and chosen_chat(config):
        raise ValueError("--prefix_host is for prompts of plain text, not with --chat")


def tokenizer_for(tasks, model, path, chat=None):
    """The tokenizer of folder `path`; None for the fact stream, which is token ids."""
    if tasks != ["facts"]:
        return load_tokenizer(path, chat)
    if model.config.vocab_size != VOCAB:
        raise ValueError(f"task facts is made of token ids for the tiny model, of {VOCAB} words")
    return None


def main():
    config, policy = parse([Config, Flags], description="Long-context tasks: score, KV footprint "
                                                        "and time of a Llama under a policy.")
    if config.model is None:
        return tiny_table(config)
    check_tasks(config, policy)
    join(config.device)
    load_folder = cepe.load_cepe if cepe.is_cepe(config.model) else load_model
    model = load_folder(config.model, config.device, DTYPES[config.dtype])
    tokenizer = tokenizer_for(config.tasks.split(","), model, config.model, config.chat)
    policy.cache(model)  # refuse what does not fit before anything runs
    if config.overwrite and os.path.exists(config.out):  # and before anything is removed
        for name, length in jobs(config):
            if name.startswith("litsearch:"):
                litsearch_data(config.data)
            elif name.startswith("olmes:"):
                olmes_questions(name, config.data, 1)
            else:
                examples = examples_of(config, name, length, tokenizer)
                policy.cache(model).check_window(max(len(e.prompt) for e in examples))
    done = open_results(config.out, config)
    before = set(done)
    keys = evaluate(config, policy, model, tokenizer, done)
    barrier()
    if rank() == 0:
        done = read_results(config.out)
        reused = len(before.intersection(keys))
        records = report([done[key] for key in keys])
        print(f"\n{reused} of {len(keys)} results reused; all are in {config.out}")
        for (name, length), group in by([done[key] for key in keys], "task", "length"):
            if config.helmet_dir and name.startswith("helmet:"):
                examples = examples_of(config, name, length, tokenizer)
                print(f"saved {write_helmet(config, name, length, examples, group)}")
        print(json.dumps({"model": config.model, "policy": policy.policy, "results": records}))


if __name__ == "__main__":
    run(main)
