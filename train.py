"""Train a Llama, or learn which of its KV heads need the full cache: one loop, every method.

    python train.py --method prulong                             # embedded: tiny model, fact stream, no download
    python train.py --method prulong --model DIR --data SRC      # a real Llama (Hugging Face layout) and real text
    python train.py --method lm --model DIR --data code=0.6:DIR,web=0.4:FILE.jsonl
    python train.py --method sft --model DIR --data CHATS.jsonl  # loss on the assistant's words
    python train.py --method vlorp --model DIR --data SRC --rank 1 --granularity 64
    python train.py --method cepe --model DIR --data SRC --context 2048 --seq_len 4096      # or ceped; embedded: --data entities or facts
    python train.py --method meco --model DIR --data FILE.jsonl  # lines {"text", "url"}; without --model and --data, site tables
    torchrun --nproc_per_node 8 train.py ...                     # the same run, by several processes; --seq_parallel 8 for long documents

A method is a class with param_groups, lr_scale, batch and loss, and what its report asks for: attend (see LM here), or scores and mask where
heads are learned (PruLong in prulong.py). METHODS names them, and main takes others. Batch t is a pure function of (seed, t), and a
checkpoint holds all there is to a run: after --resume it ends in the same bits.

Source of the recipe (packing, label rule, blockwise loss, token averaging): ProLong, arXiv:2410.02660.
"""
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
import typing
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed, nn
from tqdm import tqdm

import cepe
import meco
import prulong
import vlorp
from eval_tasks import CURRICULUM, TINY, TOPICAL, fact_stream, final_answer, recall, skill_stream, tiny_model, tiny_start, word_problem
from model import (DTYPES, Batch, Llama, SequenceParallel, append_line, byte_tokenizer, causal, check_device, collate, dealt, divide,
                   first_alone, flag, footprint, generate, join_processes, load_config, load_model, load_tokenizer, parse, peak_memory,
                   processes, read_json, replacing, run, save_model, save_plot, summed, wait_for_all, warmup_cosine, write_tensors)


@dataclass
class Config:
    method: str = flag("lm", "what to train: lm, sft, vlorp, meco, cepe, ceped, prulong or duo")
    model: str | None = flag(None, "folder of a Llama; by default a tiny one (vocabulary of the data)")
    data: str | None = flag(None, "facts (embedded stream), topics (with a second skill, for prulong and duo), stdlib (Python's own sources), "
                                  "a folder, text or jsonl file, or a mixture name=weight:PATH,...; for conversations a .jsonl or .json file, "
                                  "or problems (made-up word problems); for meco a .jsonl file, or sites (site tables); cepe: also entities "
                                  "(entity stream) (default: facts, for meco sites, for cepe entities; with --model stdlib)")
    out_dir: str | None = flag(None, "where results go (default: out/METHOD)")
    steps: int | None = flag(None, "optimizer steps (default: 100)", low=1)
    stages: str | None = flag(None, "lm: instead of --steps and --seq_len LENGTH:STEPS[:ROPE_BASE[:LR]],...: the context grows, a micro-batch keeps its "
                                    "tokens, the schedule starts anew, the optimizer goes on; with ; in --data each stage has its own")
    seq_len: int | None = flag(None, "tokens per sequence (default: facts 128, for cepe 256; sites 64, entities 80, text 1024)", low=8)
    batch: int | None = flag(None, "sequences per micro-batch (default: facts 8, for cepe 16; sites 16, entities 32, text 1)", low=1, high=10 ** 6)
    grad_accum: int = flag(1, "micro-batches per step; every target of a step weighs the same", low=1)
    lr: float | None = flag(None, "peak learning rate of the weights (default: 1e-5, for cepe 3e-4; without --model 4e-3, meco 3e-3, cepe 6e-3, "
                               "with facts 5e-3)", low=0)
    min_lr: float | None = flag(None, "end of the cosine, as a share of the peak (default: 0.1, masks alone 0.01)", low=0, high=1)
    warmup: float | None = flag(None, "share of the steps that warms up (default: 0.1, meco 0.05, cepe 0.04)", low=0, high=1)
    weight_decay: float | None = flag(None, "of the weights' matrices (default: 0.1, meco 0.033, cepe 0)", low=0)
    clip: float = flag(1.0, "largest gradient norm; 0 clips nothing", low=0)
    seed: int = flag(0, "of data, gates and fresh weights", low=0, high=2 ** 31)
    save_every: int = flag(50, "steps between checkpoints; the last step is always saved", low=1)
    eval_seqs: int = flag(16, "held-out sequences of the final evaluation", low=1, high=10 ** 6)
    n_random: int = flag(8, "random masks of the same sparsity to compare with", low=1)
    baseline: bool | None = flag(None, "prulong: train DuoAttention too and compare (default: on the embedded stream)")
    device: str = flag("cpu", "torch device")
    dtype: str = flag("auto", "of the products; auto: bfloat16 where it is measured to be faster", choices=("auto", *DTYPES))
    seq_parallel: int = flag(1, "processes that share every sequence (torchrun; divides their number and the KV heads; not for cepe)", low=1)
    deterministic: bool = flag(False, "the same bits again on a GPU too; torch refuses operations that cannot")
    checkpointing: bool | None = flag(None, "recompute layers in the backward pass (default: from 8192 tokens on)")
    resume: bool = flag(False, "go on from the checkpoint in --out_dir")
    overwrite: bool = flag(False, "empty --out_dir first")


class LM:
    """Plain language modelling: all weights, mean loss over the targets. settings: vlorp's, for projected gradients."""

    def __init__(self, model, settings, seed: int):
        self.settings = settings

    def param_groups(self):
        return []

    def lr_scale(self, step, steps, warmup, min_lr):
        return warmup_cosine(step, steps, warmup, min_lr)

    def batch(self, data, rng, step, steps):
        return data.batch(rng)

    def loss(self, model, batch, step, steps):
        return model.loss(batch.tokens, batch.targets, self.attend(batch.cu_seqlens), weights=batch.weights), {}

    def attend(self, cu_seqlens):
        """How the model attends, in training and evaluation: see Llama.forward."""
        return causal(cu_seqlens)


class Stage(typing.NamedTuple):
    """A part of a run with its own context length [tokens]; rope_base None: the model's, or the stage's before; lr None: --lr."""
    length: int
    steps: int
    rope_base: float | None
    lr: float | None
    data: object = None


def parse_stages(spec) -> list:
    """Stages of --stages: 64K:5000:8e6:1e-5,512K:2500:1.28e8:5e-6 is ProLong's. Raises ValueError naming what is none."""
    stages = []
    for part in spec.split(","):
        found = re.fullmatch(r"([1-9]\d{0,8})(K?):([1-9]\d{0,8})(?::([\d.e+]+))?(?::([\d.e+-]+))?", part)
        try:
            length, steps = int(found[1]) * (1024 if found[2] else 1), int(found[3])
            base, lr = (x and float(x) for x in (found[4], found[5]))
            good = 8 <= length <= 2 ** 30 and (base is None or 1 < base < 1e15) and (lr is None or 0 < lr < 1e3)
        except (TypeError, ValueError):
            good = False
        if not good:
            raise ValueError(f"--stages: want LENGTH:STEPS[:ROPE_BASE[:LR]],... with LENGTH like 512 or 64K, got {part!r}")
        stages.append(Stage(length, steps, base, lr))
    return stages


METHODS = {"lm": (LM, None), "sft": (LM, None), "vlorp": (LM, vlorp.Config), "meco": (meco.MeCo, meco.Config),
           "cepe": (cepe.Expand, cepe.Config), "ceped": (functools.partial(cepe.Expand, distil=True), cepe.Config),
           "prulong": (prulong.PruLong, prulong.Config), "duo": (prulong.Duo, prulong.DuoConfig)}


# --- data: batch(rng) -> Batch; where a method or report asks for it passkeys(rng, needles, words) -> Batch, documents(rng, context) ->
# [(what comes before, main text)], held_out: [Batch] --------------------------------------------------------------------

EMBEDDED = ("facts", "topics", "sites", "entities")  # streams of token ids: no tokenizer


class FactData:
    """The embedded stream: filler, facts and queries; topics and their cues if wanted (eval_tasks.py)."""

    def __init__(self, seq_len, n_seq, topics=False):
        self.seq_len, self.n_seq, self.topics = seq_len, n_seq, topics
        self.vocab_size = (TOPICAL if topics else TINY).vocab_size
        fits = [row for row in CURRICULUM if row[0] <= seq_len]
        if not fits:
            raise ValueError(f"the fact stream needs --seq_len >= {CURRICULUM[0][0]}, got {seq_len}")
        self.n_fact, self.n_query = fits[-1][1:3]

    def batch(self, rng):
        return skill_stream(rng, self.n_seq, self.seq_len, self.n_fact, self.n_query, self.topics)["facts"].batch

    def passkeys(self, rng, needles, words):
        """Facts first and as many queries at the very end; only their answers are targets, whatever else the stream has."""
        facts = skill_stream(rng, self.n_seq, self.seq_len, needles, needles, self.topics, queries_last=True)["facts"]
        targets = torch.full_like(facts.batch.targets, -100)
        targets[facts.query] = facts.batch.targets[facts.query]
        return facts.batch._replace(targets=targets)

    def documents(self, rng, context, n_seq=None):
        """n_seq pairs of facts and filler (`context` tokens) and the queries with their answers. Raises ValueError unless that is all else."""
        if context + 2 * self.n_query != self.seq_len:
            raise ValueError(f"--context {context}: of --seq_len {self.seq_len} tokens the last {2 * self.n_query} are the queries")
        facts = fact_stream(rng, n_seq or self.n_seq, self.seq_len, self.n_fact, self.n_query, queries_last=True)
        return [(row[:context], row[context:]) for row in facts.batch.tokens.view(-1, self.seq_len).numpy()]


class TextData:
    """Documents shuffled, laid end to end and cut into packs of seq_len tokens; a pack keeps its document bounds.

    sources: name -> (weight, documents as token arrays). A batch draws each pack's source by weight, then the pack."""

    def __init__(self, sources, tokenizer, seq_len, n_seq, n_held_out, seed):
        self.seq_len, self.n_seq, self.tokenizer = seq_len, n_seq, tokenizer
        self.vocab_size = 1 + max(int(doc.max()) for _, docs in sources.values() for doc in docs)
        total = sum(weight for weight, _ in sources.values())
        self.shares, self.packs, self.held_out = [], [], []
        for i, (name, (weight, docs)) in enumerate(sources.items()):
            docs = [docs[j] for j in np.random.default_rng([seed, i]).permutation(len(docs)) if len(docs[j]) > 1]
            held = math.ceil(n_held_out * weight / total)
            tokens, bounds = np.concatenate(docs or [np.zeros(0, np.int32)]), np.cumsum([len(d) for d in docs])
            n_train = len(tokens) // seq_len - held  # the last packs are held out
            if n_train < 1:
                raise ValueError(f"data {name} has {len(tokens)} tokens: too few for {held} held-out packs and one to train on "
                                 f"of {seq_len}")
            self.shares.append(weight / total)
            self.packs.append((tokens, bounds, n_train))
            self.held_out += [collate(self.pack(i, n_train + j)) for j in range(held)]

    def pack(self, source, index):
        """The documents, or parts of them, in pack `index` of a source: token arrays of two tokens or more, for one alone
        predicts nothing."""
        tokens, bounds, _ = self.packs[source]
        start, end = index * self.seq_len, (index + 1) * self.seq_len
        inside = bounds[np.searchsorted(bounds, start, "right"):np.searchsorted(bounds, end, "left")]
        return [part for part in np.split(tokens[start:end], inside - start) if len(part) > 1]

    def draw(self, rng):
        source = rng.choice(len(self.shares), p=self.shares)
        return self.pack(source, rng.integers(self.packs[source][2]))

    def batch(self, rng):
        return collate([doc for _ in range(self.n_seq) for doc in self.draw(rng)])

    def documents(self, rng, context):
        """n_seq pairs of (first `context` tokens, the rest) of a pack, whatever documents they are of."""
        packs = [np.concatenate(self.draw(rng)) for _ in range(self.n_seq)]
        return [(pack[:context], pack[context:]) for pack in packs]

    def passkeys(self, rng, needles, words):
        """One passkey sample per sequence, of 50 lengths between a third of seq_len (or what the passkeys need) and seq_len;
        officially 1000 to 32000. Raises ValueError if they do not fit into seq_len."""
        room = 2 * needles + prulong.passkeys_room(self.tokenizer, needles, words)
        if room > self.seq_len:
            raise ValueError(f"--needles {needles} of --words {words} need --seq_len {room} or more, got {self.seq_len}")
        samples = []
        for _ in range(self.n_seq):
            length = int(rng.choice(np.linspace(max(room, self.seq_len / 3), self.seq_len, 50)))
            haystack = np.concatenate([doc for _ in range(2) for doc in self.draw(rng)])
            samples.append(prulong.passkeys(self.tokenizer, haystack, length, rng, needles, words))
        return collate([tokens for tokens, _ in samples], [targets for _, targets in samples])


class ChatData:
    """Conversations, of which only the assistant's words are targets; a sequence packs whole ones up to seq_len tokens.

    exams: of each held-out conversation the prompt of its last turn and what that turn says in the end, if it says so checkably."""

    def __init__(self, conversations, tokenizer, seq_len, n_seq, n_held_out, seed):
        self.seq_len, self.n_seq, self.tokenizer = seq_len, n_seq, tokenizer
        if len(conversations) <= n_held_out:
            raise ValueError(f"--data has {len(conversations)} conversations: too few to hold out {n_held_out} (--eval_seqs) and train on the rest")
        shuffled = [conversations[i] for i in np.random.default_rng(seed).permutation(len(conversations))]
        chats = [encode_chat(messages, tokenizer) for messages in shuffled]
        self.vocab_size = 1 + max(int(tokens.max()) for tokens, _ in chats)
        self.held_out = [collate([tokens], [targets]) for tokens, targets in chats[:n_held_out]]
        self.chats = chats[n_held_out:]
        self.exams = [(tokenizer.encode(tokenizer.chat(messages[:-1])), final_answer(messages[-1]["content"])) for messages in shuffled[:n_held_out]]

    def batch(self, rng):
        docs = []
        for _ in range(self.n_seq):
            room = self.seq_len
            while len((chat := self.chats[rng.integers(len(self.chats))])[0]) <= room:
                docs.append(chat)
                room -= len(chat[0])
        return collate([tokens for tokens, _ in docs], [targets for _, targets in docs])


def read_chats(path, tokenizer, seq_len):
    """Conversations of a file, as lists of {"role", "content"} that end with the assistant; `problems` makes 4000 word problems.

    Lines of .jsonl, or the list of a .json file, in any of these forms: {"messages": [...]}; {"question", "answer"} (GSM8K);
    {"instruction", "input", "output"} (the commonsense sets of LLM-Adapters); {"question": {"stem", "choices": [{"label", "text"}, ...]},
    "answerKey"} (CommonsenseQA). Raises ValueError naming a row that is none of them, has no assistant's turn or is longer than
    seq_len tokens."""
    if path == "problems":
        rng = np.random.default_rng(0)
        rows = {question: {"question": question, "answer": answer} for question, answer in (word_problem(rng) for _ in range(4000))}
        rows = [(f"problem {i}", lambda row=row: row) for i, row in enumerate(rows.values(), 1)]
    elif path.endswith(".json"):
        whole = read_json(path, list)
        rows = [(f"{path}, row {i}", lambda row=row: row) for i, row in enumerate(whole, 1)]
    else:
        with open(path, encoding="utf-8") as f:
            rows = [(f"{path}, line {i}", lambda line=line: json.loads(line)) for i, line in enumerate(f, 1)]
    conversations = []
    for where, read in rows:
        try:
            conversations.append(as_messages(read()))
            size = len(encode_chat(conversations[-1], tokenizer)[0])
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise ValueError(f"{where}: want messages, question and answer, or instruction and output ({e})") from None
        if size > seq_len:
            raise ValueError(f"{where}: {size} tokens, more than --seq_len {seq_len}")
    if not conversations:
        raise ValueError(f"{path}: no conversations")
    return conversations


def as_messages(row):
    """One row of a file of conversations, in any of `read_chats`' forms, as messages."""
    if "messages" in row:
        return row["messages"][:1 + max((i for i, m in enumerate(row["messages"]) if m["role"] == "assistant"), default=-1)]
    if "answerKey" in row:
        choices = [f"{choice['label']}: {choice['text']}" for choice in row["question"]["choices"]]
        question, answer = "\n".join((row["question"]["stem"], *choices)), f"the correct answer is {row['answerKey']}"
    elif "instruction" in row:
        question, answer = "\n".join(filter(None, (row["instruction"], row.get("input")))), row["output"]
    else:
        question, answer = row["question"], row["answer"]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def encode_chat(messages, tokenizer):
    """Token ids of a conversation and its targets, both (n,): the prompt of each assistant's turn, then the turn."""
    end = "<|im_end|>" if "<|im_end|>" in tokenizer.special else "<|eot_id|>"
    ids, said, text = [], [], ""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.chat(messages[:i])
            before = tokenizer.encode(prompt[len(text):])
            content = message["content"].strip() if end == "<|eot_id|>" else message["content"]  # as its chat format has it
            turn = tokenizer.encode(content + end)
            ids += before + turn
            said += [False] * len(before) + [True] * len(turn)
            text = prompt + content + end
    if not any(said):
        raise ValueError("no turn of the assistant")
    tokens, mask = torch.tensor(ids), torch.tensor(said[1:] + [False])
    return tokens, torch.where(mask, tokens.roll(-1), -100)


def read_documents(path, ending=""):
    """Texts under a path: of each line of a .jsonl file its "text", any other file as a whole; folders in sorted order,
    of theirs only files with that ending.

    Raises ValueError for a line that is not a JSON object with "text", naming it. Hidden folders are left out; what else in a folder
    is not a file of UTF-8 text is passed over, and that is said."""
    if not os.path.isdir(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: neither a file nor a folder")
    if path.endswith(".jsonl") and not os.path.isdir(path):
        yield from (row["text"] for row in read_lines(path, "text"))
        return
    if not os.path.isdir(path):
        with open(path, "rb") as f:
            text = f.read()
        try:
            yield text.decode("utf-8")
        except UnicodeDecodeError as e:
            raise NotText(f"{path}: not UTF-8 text (byte {e.start})") from None
        return
    passed_over = 0
    for folder, folders, files in os.walk(path):
        left_out = ("__pycache__", "site-packages", "test") if ending else ()  # of Python's own library
        folders[:] = sorted(f for f in folders if f not in left_out and not f.startswith("."))
        for file in sorted(f for f in files if f.endswith(ending)):
            try:
                if os.path.isfile(os.path.join(folder, file)):
                    yield from read_documents(os.path.join(folder, file))
                else:
                    passed_over += 1
            except NotText:
                passed_over += 1
    if passed_over:
        print(f"{path}: passed over {passed_over} entries that are no files of UTF-8 text", file=sys.stderr)


def read_lines(path, *fields):
    """Of each line of a jsonl file the strings of these fields, as a dict. Raises ValueError naming a line that lacks one."""
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                yield {name: row[name] + "" for name in fields}
            except (ValueError, TypeError, KeyError, RecursionError):
                names = " and ".join(f'"{name}"' for name in fields)
                raise ValueError(f"{path}, line {number}: want a JSON object with a string {names}, got {line.strip()[:60]!r}") from None


class NotText(ValueError):
    """A file that is not UTF-8."""


def load_text(spec, tokenizer, seq_len, n_seq, n_held_out, seed):
    """TextData of --data: stdlib, a path, or name=weight:PATH,name=weight:PATH,... (weights are relative, by tokens)."""
    parts = {"data": (1.0, spec)}
    if "=" in spec and not os.path.exists(spec):
        parts = {}
        for part in spec.split(","):
            name, _, rest = part.partition("=")
            weight, _, path = rest.partition(":")
            try:
                good = 0 < float(weight) < 1e9 and path and name not in parts
            except ValueError:
                good = False
            if not good:
                raise ValueError(f"--data: want name=weight:PATH with new names and weights above 0, got {part!r}")
            parts[name] = float(weight), path
    sources = {}
    for name, (weight, path) in parts.items():
        folder, ending = (sysconfig.get_paths()["stdlib"], ".py") if path == "stdlib" else (path, "")
        if not os.path.exists(folder):
            raise FileNotFoundError(f"--data: no file or folder {folder}")
        docs = [np.array(tokenizer.document(text), dtype=np.int32)
                for text in tqdm(read_documents(folder, ending), desc=f"tokens of {name}", unit=" documents", disable=None) if text]
        if not docs:
            raise ValueError(f"--data: no text in {folder}")
        sources[name] = weight, docs
    return TextData(sources, tokenizer, seq_len, n_seq, n_held_out, seed)


# --- one run: loop, checkpoint, log -------------------------------------------------------------------------------------

# what a run may leave in its out_dir, besides the tokenizer's files and shards of a large model
OUTPUTS = ("log.jsonl", "checkpoint.safetensors", "heads.tsv", "scores.tsv", "heads.svg", "config.json", "model.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "generation_config.json")


class Diverged(SystemExit):
    """The loss or its gradient is not finite: ends a script with this message and exit 1."""


class Log:
    """log.jsonl: a JSON object per event. The first process writes."""

    def __init__(self, path):
        self.path = path

    def write(self, event, **values):
        if processes().rank == 0:
            append_line(self.path, {"event": event, **values})

    def forget(self, step):
        """Drop the steps from `step` on, which come again after --resume, and a line that a crash cut short."""
        if processes().rank or not os.path.exists(self.path):
            return
        with open(self.path, "rb") as f:
            complete = [line for line in f if line.endswith(b"\n")]
        kept = [line for line in complete if json.loads(line).get("step", -1) < step and json.loads(line)["event"] != "end"]
        with replacing(self.path) as part, open(part, "wb") as f:
            f.writelines(kept)


def learned(model, method):
    """Everything that training changes, by name: trained weights and the method's own parameters."""
    own = method.named_parameters(prefix="method") if isinstance(method, nn.Module) else ()
    return dict(own) | {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(path, model, method, optimizer, about):
    """One safetensors file: learned tensors, optimizer state ("optimizer.INDEX.KEY"), and `about` as JSON in its header. The same
    whatever the number of processes: all gather, the first writes."""
    state, first = optimizer.state_dict()["state"], processes().rank == 0
    parts = {name: p.detach() for name, p in learned(model, method).items()}
    parts |= {f"optimizer.{i}.{key}": torch.as_tensor(value) for i, values in state.items() for key, value in values.items()}
    tensors = {}
    for name, part in parts.items():
        tensor = whole(part)
        if first:
            tensors[name] = tensor.cpu() if is_part(part) else tensor
    if first:
        write_tensors(path, tensors, {"about": json.dumps(about)})


def load_checkpoint(path, model, method, optimizer):
    """Put a checkpoint's tensors back; returns its `about`. Raises ValueError if it is not exactly what such a run saves."""
    about, tensors = read_checkpoint(path), read_tensor_file(path)
    own = learned(model, method)
    want, likes = {name: (p.shape, p.dtype) for name, p in own.items()}, dict(enumerate(state_like(optimizer)))
    likes = {i: keys for i, keys in likes.items() if any(f"optimizer.{i}.{key}" in tensors for key in keys)}  # none before its first gradient
    for i, keys in likes.items():
        want |= {f"optimizer.{i}.{key}": like for key, like in keys.items()}
    got = {name: (t.shape, t.dtype) for name, t in tensors.items()}
    if odd := sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name)):
        raise ValueError(f"{path}: {odd[0]} is missing, unexpected or of another shape")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(as_part(tensors[name], p))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: {key: as_part(tensors[f"optimizer.{i}.{key}"], params[i]) for key in keys} for i, keys in likes.items()}
    if isinstance(optimizer, vlorp.ProjFactor):
        state = {i: values | {"step": values["step"].item()} for i, values in state.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return about


def state_like(optimizer):
    """Shape and dtype of each parameter's state after a step, by name, in the optimizer's order."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if isinstance(optimizer, vlorp.ProjFactor):
                yield {"step": (torch.Size([]), torch.int64)} | {
                    key: (torch.Size(shape), vlorp.wide(p)) for key, shape in optimizer.state_like(p, group).items()}
            else:
                yield {"step": (torch.Size([]), torch.float32), "exp_avg": (p.shape, p.dtype), "exp_avg_sq": (p.shape, p.dtype)}


# --- several processes: micro-batches are dealt out to them, weights and their optimizer state are spread over them ------------

def spread(model, method, config):
    """Begin on all processes with the first one's weights and keep a share of them on each (FSDP2); vlorp keeps all on each."""
    rank, size = processes()
    if size == 1:
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    for p in [*model.parameters(), *(method.parameters() if isinstance(method, nn.Module) else ())]:
        distributed.broadcast(p.data, 0)
    if config.seq_parallel > 1:
        groups = [distributed.new_group(range(i, i + config.seq_parallel)) for i in range(0, size, config.seq_parallel)]
        model.sequence = SequenceParallel(groups[rank // config.seq_parallel], model.config)
    if config.method == "vlorp":
        return
    mesh = distributed.init_device_mesh(torch.device(config.device).type, (size,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # the rest, CEPE's encoder too, is gathered once a step: slices of chunks differ between processes
    for name in ("hidden", "encode"):
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def is_part(tensor) -> bool:
    """Whether a tensor's parts lie with all processes: a DTensor, whose import takes half a second of every start."""
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    """A tensor whose parts lie with all processes, gathered; others as they are."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def as_part(tensor, like):
    """What this process holds of a whole tensor that is to lie as `like` does."""
    if not is_part(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gathered(model):
    """The model as one process has it, every weight whole: what several train together cannot be called by one."""
    if processes().size == 1:
        return model
    with torch.device("meta"):
        plain = cepe.CEPE(model.config, model.encoder_config, model.last_n) if isinstance(model, cepe.CEPE) else Llama(model.config)
    plain.load_state_dict({name: nn.Parameter(whole(p.detach())) for name, p in model.named_parameters()}, assign=True)
    return plain


def my_share(batches, config):
    """What this process learns from of a step's micro-batches: [(part, weight)], equally many on all processes.

    As many groups as --seq_parallel leaves take whole micro-batches in turn if there are enough of them, else parts of them, the
    heavy ones first on all (ProLong). The weights make every target of the step count the same (or as its own weight says)."""
    rank, size = processes()
    group, groups = rank // config.seq_parallel, size // config.seq_parallel
    parts = [part for batch in batches for part in divide(batch, groups // math.gcd(groups, len(batches)))]
    filler = next(part for part in parts if part is not None)  # too few documents: some processes compute one for nothing
    parts = [(filler if part is None else part, share) for part, share in zip(parts, target_shares(parts))]
    parts.sort(key=lambda part: -part[0].cu_seqlens.diff().double().square().sum().item())
    return parts[group::groups]


def average_gradients(optimizer):
    """Mean over the processes of the gradients that FSDP does not see, the method's own."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if p.grad is not None and not is_part(p):
            distributed.all_reduce(p.grad)
            p.grad /= processes().size


def gradient_norm(optimizer):
    """Norm of all gradients together."""
    gradients = [[p.grad for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
    return torch.stack([whole(nn.utils.get_total_norm(g)) for g in gradients if g] or [torch.zeros(())]).norm()


def make_optimizer(method, model, config):
    """AdamW on a method's own parameters, then the weights, decay on matrices only; or what vlorp makes."""
    if config.method == "vlorp":
        return vlorp.make_optimizer(model, method.settings, config.lr, config.weight_decay, config.clip, config.seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = method.param_groups() + [
        dict(params=[p for p in weights if (p.dim() > 1) == matrix], lr=config.lr, weight_decay=config.weight_decay * matrix)
        for matrix in (True, False)]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(0.9, 0.95))


def clip_and_step(optimizer, clip) -> float:
    """One update with clipped gradients, none if they are not finite; the gradients' norm before."""
    if isinstance(optimizer, vlorp.ProjFactor):  # its gradients are projections by now: it clips them itself
        optimizer.step()
        return optimizer.norm
    if processes().size > 1:
        average_gradients(optimizer)
    norm = gradient_norm(optimizer)
    if torch.isfinite(norm):
        for group in optimizer.param_groups:
            nn.utils.clip_grads_with_norm_(group["params"], clip or math.inf, norm)
        optimizer.step()
    return norm.item()


def read_checkpoint(path):
    """The `about` of a checkpoint. Raises ValueError if the file is broken or none of ours."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="pt") as f:
            about = json.loads(f.metadata()["about"])
        if type(about["step"]) is int and about["step"] > 0 and isinstance(about["settings"], dict) and about["dtype"] in DTYPES \
                and isinstance(about["cpu_seconds"], float):
            return about
        raise ValueError("its header is not ours")
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not a whole checkpoint ({e})") from None


def read_tensor_file(path):
    """All tensors of a safetensors file by name."""
    from safetensors import safe_open
    with safe_open(path, framework="pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}


def target_shares(batches):
    """What each micro-batch's mean loss counts, so that every target of a step counts the same (or as its weight says)."""
    sizes = [0.0 if b is None else float(((b.targets != -100) * (1.0 if b.weights is None else b.weights)).sum()) for b in batches]
    return [size / (sum(sizes) or 1) for size in sizes]


@contextlib.contextmanager
def interrupts():
    """A list that gets an entry at the first Ctrl-C (SIGINT); a second one, without torchrun, ends the process at once."""
    caught = []

    def note(number, frame):
        if caught and processes().size == 1:  # torchrun sends another one itself
            raise KeyboardInterrupt
        caught.append(number)
    before = signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def stage_at(stages, step):
    """(number of the stage that a step of the run belongs to, the step inside it)."""
    number = 0
    while step >= stages[number].steps:
        step, number = step - stages[number].steps, number + 1
    return number, step


def at_stage(config, stage):
    """The LlamaConfig of a model that a stage trains: its RoPE base, and a context at least as long."""
    return dataclasses.replace(config, rope_base=stage.rope_base or config.rope_base, max_seq_len=max(config.max_seq_len, stage.length))


def fit(method, model, stages, config, out_dir, about, autocast):
    """Train `method` through its stages, from its checkpoint in out_dir if there is one. Returns its CPU seconds.

    SIGINT ends the step at hand, saves and raises KeyboardInterrupt. Raises Diverged, naming the step and the last good
    checkpoint, before a non-finite gradient is applied."""
    optimizer = make_optimizer(method, model, config)
    peaks = [group["lr"] for group in optimizer.param_groups]
    checkpoint, log = os.path.join(out_dir, "checkpoint.safetensors"), Log(os.path.join(out_dir, "log.jsonl"))
    done, seconds = 0, 0.0
    if os.path.exists(checkpoint):
        saved = load_checkpoint(checkpoint, model, method, optimizer)
        done, seconds = saved["step"], saved["cpu_seconds"]
    log.forget(done)
    for stage in stages[:stage_at(stages, done - 1)[0] + 1] if done else ():
        model.config = at_stage(model.config, stage)
    start = time.process_time() - seconds
    steps, (rank, size) = sum(stage.steps for stage in stages), processes()
    bar = tqdm(range(done, steps), initial=done, total=steps, desc=about["method"], unit="step", disable=rank > 0 or None)
    with interrupts() as caught:
        for step in bar:
            tick = time.perf_counter()
            number, local = stage_at(stages, step)  # local: the step inside its stage
            stage = stages[number]
            model.config = at_stage(model.config, stage)
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = (stage.lr or peak) * method.lr_scale(local, stage.steps, config.warmup, config.min_lr)
            rngs = [np.random.default_rng([config.seed, step, micro]) for micro in range(config.grad_accum)]
            batches = [method.batch(stage.data, rng, local, stage.steps) for rng in rngs]
            total, shown = learn_from(my_share(batches, config), method, model, local, stage, config, autocast)
            total, stop, *values = (x / size for x in summed([total, len(caught), *shown.values()]))
            shown = dict(zip(shown, values))
            norm = clip_and_step(optimizer, config.clip) if math.isfinite(total) else math.nan
            if not math.isfinite(total) or not math.isfinite(norm):
                last = f"the last good checkpoint is step {done} in {checkpoint}" if done else "there is no checkpoint yet"
                raise Diverged(f"{os.path.basename(sys.argv[0])}: loss {total}, gradient norm {norm} at step {step}; {last}")
            optimizer.zero_grad(set_to_none=True)
            log.write("step", step=step, loss=total, grad_norm=norm, lr=optimizer.param_groups[0]["lr"], tokens=sum(len(b.tokens) for b in batches),
                      targets=sum(int((b.targets != -100).sum()) for b in batches), seconds=round(time.perf_counter() - tick, 4), **shown)
            if config.stages and local + 1 == stage.steps:
                log.write("stage", step=step, length=stage.length, scores=length_scores(gathered(model), stages, config, autocast))
            bar.set_postfix({"loss": f"{total:.3f}"} | {k: f"{v:.2f}" for k, v in shown.items() if k in ("sparsity", "target")})
            if (step + 1) % config.save_every == 0 or step + 1 == steps or stop:
                done = step + 1
                save_checkpoint(checkpoint, model, method, optimizer,
                                about | {"step": done, "cpu_seconds": time.process_time() - start})
                log.write("checkpoint", step=step)
            if stop:
                bar.close()
                print(f"stopped after step {step}; --resume goes on from there", file=sys.stderr if rank == 0 else sys.stdout)
                raise KeyboardInterrupt
    held = vlorp.state_bytes(optimizer)
    peak = peak_memory()
    log.write("memory", optimizer_bytes=held, peak_resident_bytes=peak)
    print(f"{about['method']}: optimizer state {held / 1e6:.2f} MB, peak resident memory {peak / 1e6:.0f} MB")
    return time.process_time() - start


def learn_from(share, method, model, step, stage, config, autocast):
    """Add up the gradients of this process's share of a step. Returns (loss, metrics), to be averaged over the processes as gradients are."""
    total, shown, groups = 0.0, {}, processes().size // config.seq_parallel
    for batch, weight in share:
        batch = type(batch)(*(x if x is None else x.to(config.device) for x in batch))
        with autocast():
            loss, metrics = method.loss(model, batch, step, stage.steps)
        (loss * (weight * groups)).backward()
        total += loss.item() * weight * groups
        shown = {k: shown.get(k, 0.0) + v * weight * groups for k, v in metrics.items()}
    return total, shown


# --- what came out ------------------------------------------------------------------------------------------------------

def head_map(mask):
    """Layer by KV head, # = full cache, . = sink and window only."""
    rows = [f"layer {layer:3d}  " + " ".join("#" if full else "." for full in row) for layer, row in enumerate(mask.tolist())]
    return "\n".join(rows)


def streaming_footprint(mask, n, sink, window) -> float:
    """KV footprint of n tokens, one at a time, when a streaming head keeps sink + window - 1 past entries."""
    kept = [(1, torch.tensor([[min(t, sink + window - 1)]])) for t in range(n)]
    full = mask.double().mean().item()
    return full + (1 - full) * float(footprint(kept))


def score_masks(model, data, masks, sink, window, config, autocast):
    """`scores_of` hard masks (n_layer, n_kv_head) with their sink and window."""
    ways = [lambda cu_seqlens, mask=mask: prulong.by_mask(mask, cu_seqlens, sink, window) for mask in masks]
    return scores_of(model, data, ways, config, autocast, (window, sink))


@torch.no_grad()
def scores_of(model, data, ways, config, autocast, beyond=None):
    """({name: a score per way of attending}, tokens): recall of each skill of the fact stream at 512 tokens, higher is better, of facts
    beyond (window, sink) alone if these are given; or held-out loss [nats / token]. ways: functions of cu_seqlens that give an `attend`."""
    if isinstance(data, FactData):
        label = "far recall" if beyond else "recall"
        skills, named = skill_stream(np.random.default_rng([config.seed, 2 ** 31]), config.eval_seqs, *CURRICULUM[-1][:3], data.topics), {}
        for skill, facts in skills.items():
            scores = [0.0] * len(ways)
            for i in tqdm(dealt(range(len(ways))), desc="recall", unit="mask", disable=None, leave=False):
                scores[i] = recall(model, facts, ways[i](facts.batch.cu_seqlens), facts.far(*beyond) if beyond else None)
            named[f"{label} of {skill}" if data.topics else label] = summed(scores)
        return named, CURRICULUM[-1][0]
    scores = [0.0] * len(ways)
    shares = target_shares(data.held_out)
    jobs = [(i, b, share) for i in range(len(ways)) for b, share in zip(data.held_out, shares)]
    for i, b, share in tqdm(dealt(jobs), desc="held-out loss", unit="sequence", disable=None, leave=False):
        b = Batch(*(x if x is None else x.to(config.device) for x in b))
        with autocast():
            scores[i] += share * model.loss(b.tokens, b.targets, ways[i](b.cu_seqlens)).item()
    return {"held-out loss": summed(scores)}, data.seq_len


def random_masks(shape, sparsity, n, seed):
    rng = torch.Generator().manual_seed(seed)
    return [prulong.discretise(torch.rand(shape, generator=rng), sparsity) for _ in range(n)]


def report_heads(results, model, data, settings, config, autocast):
    """Table and JSON of learned masks beside the full cache and random masks. results: name -> (method, CPU seconds)."""
    sink, window = settings.sink, settings.window
    masks = {name: method.mask().cpu() for name, (method, _) in results.items()}
    sparsity = 1 - next(iter(masks.values())).double().mean().item()
    shape = next(iter(masks.values())).shape
    drawn = random_masks(shape, sparsity, config.n_random, config.seed)
    full = torch.ones(shape, dtype=torch.bool)
    columns, n = score_masks(model, data, [full, *masks.values(), *drawn], sink, window, config, autocast)
    scores = list(zip(*columns.values()))  # a tuple of the columns' scores per mask
    rows = [("full cache", full, scores[0], 0.0)]
    rows += [(name, mask, score, results[name][1]) for (name, mask), score in zip(masks.items(), scores[1:])]
    others = scores[1 + len(masks):]
    rows.append((f"random, mean of {len(others)}", drawn[0], tuple(sum(column) / len(others) for column in zip(*others)), 0.0))
    held = {mask: streaming_footprint(mask, n, sink, window) for _, mask, _, _ in rows}  # by identity
    for name, mask in masks.items():
        print(f"\n{name}: {int(mask.sum())} of {mask.numel()} KV heads keep the full cache (#)\n{head_map(mask)}")
    print(f"\n| heads | full of {full.numel()} | {' | '.join(columns)} | KV footprint at {n} tokens | CPU seconds |\n|---|---|---|---|"
          + "---|" * len(columns))
    for name, mask, score, seconds in rows:
        print(f"| {name} | {int(mask.sum())} | {' | '.join(format(x, '.3f') for x in score)} | {held[mask]:.3f} | {seconds:.1f} |")
    if processes().rank == 0:
        curves = {name: list(enumerate(mask.sum(1).tolist())) for name, mask in masks.items()}
        title = f"KV heads that keep the full cache, {sparsity:.0%} of {full.numel()} do not"
        save_plot(os.path.join(config.out_dir, "heads.svg"), curves, title, "layer", "heads", y_most=full.shape[1])
    print(f"\nrandom masks range from {' and '.join(f'{min(x):.3f} to {max(x):.3f}' for x in zip(*others))}; sink {sink}, window {window}\n")
    plain = lambda score: score[0] if len(columns) == 1 else dict(zip(columns, score))
    return {"score": ", ".join(columns), "tokens": n, "sink": sink, "window": window, "random": [plain(score) for score in others],
            "rows": [{"heads": name, "full": int(mask.sum()), "score": plain(score), "cpu_seconds": round(seconds, 2),
                      "footprint": held[mask]} for name, mask, score, seconds in rows],
            "masks": {name: mask.int().tolist() for name, mask in masks.items()}}


def score_weights(model, method, data, config, dtype, autocast):
    """Held-out loss, or recall, of a model that attends as its method says; where conversations have checkable ends, also the share
    of right ones, with the full cache."""
    columns, n = scores_of(model, data, [method.attend], config, autocast)
    (name, (score,)), = columns.items()
    exams = getattr(data, "exams", [])
    checkable = bool(exams) and all(answer is not None for _, answer in exams)
    return {"score": name, "tokens": n, name: score, "accuracy": answer_accuracy(model, data, config.device, dtype) if checkable else None}


@torch.no_grad()
def answer_accuracy(model, data, device, dtype):
    """Share of held-out conversations whose last turn, decoded greedily to 1.5 times the longest true one, ends in the right answer."""
    max_new_tokens = 3 * max(int((b.targets != -100).sum()) for b in data.held_out) // 2
    narrow = copy.deepcopy(model).to(DTYPES[dtype])  # cast once and not for every token
    right = 0
    for prompt, answer in tqdm(dealt(data.exams), desc="answers", unit="exam", disable=None, leave=False):
        said = generate(narrow, torch.tensor(prompt, device=device), max_new_tokens, stop_ids=data.tokenizer.eos_ids)
        right += final_answer(data.tokenizer.decode(said)) == answer
    return summed([right])[0] / len(data.exams)


def length_scores(model, stages, config, autocast):
    """{length: score} of the model as it is: recall at 1, 2 and 4 times the first stage's length, or held-out loss at every stage's."""
    if isinstance(stages[0].data, FactData):
        lengths = [stages[0].length * k for k in (1, 2, 4)]
        facts = [fact_stream(np.random.default_rng([config.seed, 2 ** 31]), config.eval_seqs, n, *CURRICULUM[0][1:3]) for n in lengths]
        return {n: recall(model, f, causal(f.batch.cu_seqlens)) for n, f in zip(lengths, facts)}
    return {stage.length: scores_of(model, stage.data, [causal], config, autocast)[0]["held-out loss"][0] for stage in stages}


def report_stages(log_path, name):
    """Table and rows of what the run's log says of its stages."""
    with open(log_path, encoding="utf-8") as f:
        rows = [row for row in map(json.loads, f) if row["event"] == "stage"]
    print(f"\n| {name} after the stage of | " + " | ".join(f"at {n} tokens" for n in rows[0]["scores"]) + " |\n|---|" + "---|" * len(rows[0]["scores"]))
    for row in rows:
        print(f"| {row['length']} tokens | " + " | ".join(f"{score:.3f}" for score in row["scores"].values()) + " |")
    return [{"length": row["length"], "scores": row["scores"]} for row in rows]


def report_lm(before, model, method, data, config, seconds, dtype, autocast):
    """Table and JSON of the score before and after."""
    after, score_name = score_weights(model, method, data, config, dtype, autocast), before["score"]
    shown = lambda row: f"{row[score_name]:.3f} | {'-' if row['accuracy'] is None else format(row['accuracy'], '.3f')}"
    print(f"\n| | {score_name} at {before['tokens']} tokens | right answers of {config.eval_seqs} | CPU seconds |\n|---|---|---|---|\n"
          f"| before | {shown(before)} | 0.0 |\n| after | {shown(after)} | {seconds:.1f} |\n")
    return {"score": score_name, "tokens": before["tokens"], "before": before[score_name], "after": after[score_name],
            "accuracy_before": before["accuracy"], "accuracy_after": after["accuracy"], "cpu_seconds": round(seconds, 2)}


def report_chunks(model, data, config, settings, seconds, autocast):
    """Table and JSON of the perplexity of the last 256 tokens against the number of chunks, and its controls."""
    size = settings.chunk_size
    if config.data == "entities":
        counts = [0, 1, 2, 4, 8, 16]
        documents = data.documents(np.random.default_rng([config.seed, 2 ** 31]), 16 * size, 16 * config.eval_seqs)
    else:
        counts = sorted({0, *(settings.context // size // 2 ** k for k in range(6))})
        documents = [(b.tokens[:settings.context].numpy(), b.tokens[settings.context:].numpy()) for b in data.held_out]
    rows = {"best possible": data.best(documents, counts, size)} if config.data == "entities" else {}
    rows |= cepe.perplexities(model, documents, counts, size, 256, autocast)
    print(f"\nperplexity of the last {min(256, config.seq_len - settings.context - 1)} tokens\n")
    print(f"| chunks of {size} | " + " | ".join(map(str, counts)) + " |\n|---|" + "---|" * len(counts))
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{x:.2f}" for x in values) + " |")
    print()
    return {"score": "perplexity", "chunk_size": size, "chunks": counts, "rows": rows, "cpu_seconds": round(seconds, 2)}


def report_answers(model, data, config, settings, seconds):
    """Table and JSON of the share of right first answers, where the facts stand in the context."""
    documents = data.documents(np.random.default_rng([config.seed, 2 ** 31]), settings.context, 4 * config.eval_seqs)
    sources = {"own": "in its encoder", "others": "of others in its encoder", "prepended": "prepended to the decoder", "none": "nowhere"}
    rows = {name: cepe.first_answers(model, documents, settings.chunk_size, name) for name in sources}
    print("\n| facts | right first answers |\n|---|---|\n" + "".join(f"| {sources[name]} | {share:.3f} |\n" for name, share in rows.items()))
    return {"score": "right first answers", "chunk_size": settings.chunk_size, "rows": rows, "cpu_seconds": round(seconds, 2)}


def report_conditions(before, after, first, seconds):
    """Table and JSON of losses with no, the right and the wrong metadata, on the same document tokens."""
    print(f"\n| loss per token, of the first {first} | {' | '.join(after)} |\n|---|" + "---|" * len(after))
    for name, losses in (("before", before), ("after", after)):
        print(f"| {name} | " + " | ".join(f"{loss:.3f}, {early:.3f}" for loss, early in losses.values()) + " |")
    print()
    return {"score": "loss, loss of the first tokens", "before": before, "after": after, "cpu_seconds": round(seconds, 2)}


def save_learned(model, method, config):
    """Leave in --out_dir a model, if one was trained, with its tokenizer's files, and heads if some were chosen."""
    if model is not None:
        (cepe.save_cepe if isinstance(model, cepe.CEPE) else save_model)(model, config.out_dir)
        for name in TOKENIZER_FILES:
            if config.model and os.path.exists(os.path.join(config.model, name)):
                shutil.copy(os.path.join(config.model, name), config.out_dir)
    if config.method in ("prulong", "duo"):
        prulong.save_heads(os.path.join(config.out_dir, "heads.tsv"), method.mask())
        prulong.save_heads(os.path.join(config.out_dir, "scores.tsv"), method.scores())


def score_before(model, method, data, settings, config, dtype, autocast):
    """What `report` compares with; None for learned heads and for CEPE, whose tables have the untouched model in them."""
    if config.method in ("prulong", "duo", "cepe", "ceped"):
        return None
    if config.method == "meco":
        return meco.conditioned_losses(model, data.exams, settings.first_tokens, autocast)
    return score_weights(model, method, data, config, dtype, autocast)


def report(results, before, model, data, settings, config, dtype, autocast):
    """Print what came out, in the method's own way; returns it for the log. results: name -> (method, CPU seconds), config.method's first."""
    method, seconds = results[config.method]
    if config.method in ("prulong", "duo"):
        return report_heads(results, model, data, settings, config, autocast)
    if config.method in ("cepe", "ceped") and config.data == "facts":
        return report_answers(model, data, config, settings, seconds)
    if config.method in ("cepe", "ceped"):
        return report_chunks(model, data, config, settings, seconds, autocast)
    if config.method == "meco":
        after = meco.conditioned_losses(model, data.exams, settings.first_tokens, autocast)
        return report_conditions(before, after, settings.first_tokens, seconds)
    return report_lm(before, model, method, data, config, seconds, dtype, autocast)


# --- command line -------------------------------------------------------------------------------------------------------

def check_out_dir(out_dir, config, settings):
    """Check out_dir against the flags; returns the saved `about` with --resume, None for a run that starts at step 0.

    Raises ValueError if it is not what the flags expect, or a folder that the run reads from."""
    heads = getattr(settings, "heads", None)
    read = [config.model, heads and os.path.dirname(heads), *([] if config.data in (*EMBEDDED, "stdlib", "problems") else
            [part.rpartition(":")[2] for part in re.split("[,;]", config.data)])]
    own = os.path.realpath(out_dir)
    for path in read:
        if path is not None and os.path.commonpath([own, os.path.realpath(path)]) == own:
            raise ValueError(f"--out_dir {out_dir} holds what the run reads ({path or '.'}): name another")
    checkpoint, log = os.path.join(out_dir, "checkpoint.safetensors"), os.path.join(out_dir, "log.jsonl")
    if config.resume and config.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if not config.resume:
        if not config.overwrite and os.path.isdir(out_dir) and os.listdir(out_dir):
            raise ValueError(f"--out_dir {out_dir} is not empty: add --resume or --overwrite, or name another")
        return None
    if not os.path.exists(checkpoint):
        if not os.path.exists(log):
            raise ValueError(f"--resume: no checkpoint in {out_dir}")
        return None  # stopped before the first checkpoint
    about = read_checkpoint(checkpoint)
    for name, value in run_settings(config, settings).items():
        if about["settings"].get(name) != value:
            raise ValueError(f"--resume: --{name} was {about['settings'].get(name)}, now {value}")
    return about


def empty(out_dir):
    """Remove what a run writes, and nothing else."""
    for folder in (out_dir, os.path.join(out_dir, "duo")):
        for name in OUTPUTS:
            if os.path.exists(os.path.join(folder, name)):
                os.remove(os.path.join(folder, name))


def run_settings(config, settings):
    """The flags that a run's numbers depend on."""
    free = {"out_dir", "resume", "overwrite", "save_every", "n_random", "baseline", "seq_parallel", "deterministic"}
    values = dataclasses.asdict(config) | (dataclasses.asdict(settings) if settings else {})
    return {name: value for name, value in values.items() if name not in free}


def bf16_speedup(n_embd, n_ff):
    """How many times faster this processor multiplies bfloat16 than float32, at the model's own width (best of 5)."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(1024, n_embd, dtype=dtype), torch.ones(n_embd, n_ff, dtype=dtype)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        best[dtype] = min(times[1:])
    return best[torch.float32] / best[torch.bfloat16]


def choose_dtype(config, llama):
    """The dtype of the products and the reason for it."""
    if config.dtype != "auto":
        return config.dtype, "asked for"
    if config.device != "cpu":
        return "bfloat16", "device is not the CPU"
    if llama.n_embd < 256:
        return "float32", f"a width of {llama.n_embd} is too small to gain"
    speedup = bf16_speedup(llama.n_embd, llama.n_ff)
    return ("bfloat16" if speedup > 1.5 else "float32"), f"bfloat16 products measured {speedup:.1f}x as fast as float32"


def build_model(config, settings, dtype):
    """The model to start from."""
    if config.method in ("cepe", "ceped"):
        return build_cepe(config, settings)
    frozen = config.method == "duo" or getattr(settings, "train", "") == "masks"
    if config.model:
        return load_model(config.model, config.device, DTYPES[dtype] if frozen else torch.float32)
    if config.data == "sites":
        model = meco.small_model(config.seed)
    elif config.data == "facts" and config.method in ("lm", "vlorp"):
        model = tiny_start(config.seed)
    elif config.data == "facts":
        model = tiny_model(config.seed, f"out/tiny-seed{config.seed}")
    elif config.data == "topics":
        model = tiny_model(config.seed, f"out/topics-seed{config.seed}", topics=True)
    else:
        model = Llama(dataclasses.replace(TINY, vocab_size=258)).init_weights(config.seed)
    return model.to(config.device)


def build_cepe(config, settings):
    """A folder that holds a CEPE, or a Llama with a fresh encoder around it."""
    if config.model and isinstance(read_json(os.path.join(config.model, "config.json")).get("encoder_config"), dict):
        return cepe.load_cepe(config.model, config.device)
    if config.model:
        llama = load_model(config.model, config.device)
    elif config.data == "facts":
        llama = tiny_model(config.seed, f"out/tiny-seed{config.seed}").to(config.device)
    else:
        llama = cepe.small_decoder(cepe.Entities(), settings.decoder_steps, config.seed).to(config.device)
    if settings.enc_init == "decoder":
        if settings.enc_layers > llama.config.n_layer:
            raise ValueError(f"--enc_layers {settings.enc_layers}: the decoder has {llama.config.n_layer} to begin as")
        return cepe.extend(llama, cepe.first_layers(llama.config, settings.enc_layers), settings.init, settings.last_n, config.seed, "decoder")
    width = settings.enc_width
    head_dim = 64 if width >= 128 else width // 2
    if width % head_dim or head_dim % 2:
        raise ValueError(f"--enc_width {width}: want a multiple of 64, or below 128 one of 4")
    encoder = dataclasses.replace(llama.config, vocab_size=llama.config.vocab_size + 1, n_layer=settings.enc_layers, n_embd=width, head_dim=head_dim,
                                  n_head=width // head_dim, n_kv_head=width // head_dim, n_ff=4 * width, tie_embeddings=True)
    return cepe.extend(llama, encoder, settings.init, settings.last_n, config.seed)


def build_data(config, settings, vocab_size):
    """Data in sequences of config.seq_len tokens. Raises ValueError for tokens that a model of that vocabulary does not have."""
    shape = config.seq_len, config.batch, config.eval_seqs, config.seed
    tokenizer = None if config.data in EMBEDDED else load_tokenizer(config.model) if config.model else byte_tokenizer()
    if config.data in ("facts", "topics"):
        data = FactData(config.seq_len, config.batch, config.data == "topics")
    elif config.data == "entities":
        data = cepe.Entities(config.seq_len - settings.context, config.batch)
    elif config.data == "sites":
        data = meco.SiteData(n_seq=config.batch, seq_len=config.seq_len, n_held_out=config.eval_seqs, seed=config.seed)
    elif config.method == "meco":
        data = meco.UrlData(list(read_lines(config.data, "text", "topic" if settings.metadata == "topic" else "url")), tokenizer, settings, *shape)
    elif config.method == "sft" or getattr(settings, "chat", False):
        data = ChatData(read_chats(config.data, tokenizer, config.seq_len), tokenizer, *shape)
    else:
        data = load_text(config.data, tokenizer, *shape)
    if data.vocab_size > vocab_size:
        raise ValueError(f"token {data.vocab_size - 1} of the data is outside the model's vocabulary of {vocab_size}")
    return data


def build_stages(config, settings, vocab_size) -> list:
    """The run's stages with their data: one, or those of --stages, whose micro-batches hold as many tokens as the first's."""
    if config.stages is None:
        length = config.seq_len - (settings.context if config.method in ("cepe", "ceped") else 0)  # that the decoder reads
        return [Stage(length, config.steps, None, None, build_data(config, settings, vocab_size))]
    stages, specs, base = parse_stages(config.stages), config.data.split(";"), None
    if len(specs) not in (1, len(stages)):
        raise ValueError(f"--data has {len(specs)} parts for {len(stages)} stages")
    built = []
    for stage, spec in zip(stages, specs * (len(stages) if len(specs) == 1 else 1)):
        if config.batch * stages[0].length % stage.length:
            raise ValueError(f"--stages: a micro-batch of {config.batch} x {stages[0].length} tokens is not a number of sequences of "
                             f"{stage.length}: set --batch")
        longest = max(s.length for s in stages)
        own = dataclasses.replace(config, data=spec, seq_len=stage.length, batch=config.batch * stages[0].length // stage.length,
                                  eval_seqs=-(-config.eval_seqs * longest // stage.length))  # the same end of the text is held out in every stage
        base = stage.rope_base or base
        built.append(stage._replace(rope_base=base, data=build_data(own, settings, vocab_size)))
    if ("facts" in specs) != (set(specs) == {"facts"}):
        raise ValueError("--data: the fact stream does not mix with text")
    return built


def cepe_defaults(config, settings):
    """Defaults of cepe.Config that depend on the data."""
    defaults = dict(context=config.seq_len // 2, chunk_size=256, enc_layers=6, enc_width=256, enc_init="fresh", init="copy", mlm=0.2, duplicate=0.2)
    if config.data == "entities":
        defaults |= dict(context=64, chunk_size=16, enc_layers=2, enc_width=48, init="zero", mlm=0.0, duplicate=0.05)
    elif config.data == "facts":
        defaults |= dict(context=192, chunk_size=32, enc_layers=1, enc_width=48, enc_init="decoder", mlm=0.0, duplicate=0.0)
    if (settings.enc_init or defaults["enc_init"]) == "decoder" and settings.enc_width is not None:
        raise ValueError("--enc_width means nothing with --enc_init decoder: the decoder's is taken")
    return dataclasses.replace(settings, **{k: v for k, v in defaults.items() if getattr(settings, k) is None})


def check_cepe(config, settings):
    """Raises ValueError for flags of cepe or ceped that cannot be together."""
    if config.seq_parallel > 1:
        raise ValueError("--seq_parallel means nothing to CEPE, whose contexts are parallel already")
    if settings.context + 4 > config.seq_len:
        raise ValueError(f"--context {settings.context} leaves the decoder fewer than 4 of --seq_len {config.seq_len} tokens")
    if settings.context % settings.chunk_size:
        raise ValueError(f"--context {settings.context} is not a multiple of --chunk_size {settings.chunk_size}")
    if config.eval_seqs < 2:
        raise ValueError("--eval_seqs 1: other documents' chunks need another document")
    if settings.mlm + settings.duplicate >= 1:
        raise ValueError(f"--mlm {settings.mlm} and --duplicate {settings.duplicate} leave no step to read what came before")


def check_used(config, settings):
    """Raises ValueError for a flag that was set and that this run would not look at. Both as they were parsed."""
    get = lambda name: getattr(settings, name, None)
    has_encoder = config.method in ("cepe", "ceped") and config.model and "encoder_config" in read_json(os.path.join(config.model, "config.json"))
    rules = ((config, ("n_random", "baseline"), config.method in ("prulong", "duo"), "--method prulong or duo"),
             (settings, ("kl", "top_k"), config.method == "ceped", "--method ceped"),
             (settings, ("decoder_steps",), not config.model and config.data != "facts", "the entity stream, without --model"),
             (settings, ("enc_init", "enc_layers", "enc_width", "init", "last_n"), not has_encoder, "a model that has no encoder yet"),
             (settings, ("top_share",), get("metadata") == "topk", "--metadata topk"),
             (settings, ("cooldown",), get("mode") in ("meco", "mix"), "--mode meco or mix"),
             (settings, ("at_refresh",), get("scheme") != "original", "a --scheme that keeps projections"))
    for flags, names, used, wanted in rules:
        fields = {f.name: f.default for f in dataclasses.fields(flags)} if flags else {}
        for name in names:
            if name in fields and not used and getattr(flags, name) != fields[name]:
                raise ValueError(f"--{name} means nothing here: it is for {wanted}")


def fill_defaults(config, settings):
    """Defaults that depend on other flags. Raises ValueError for flags that cannot be together."""
    if config.stages is not None:
        if config.method != "lm" or config.steps is not None or config.seq_len is not None:
            raise ValueError("--stages is for --method lm, and takes the place of --steps and --seq_len")
        stages = parse_stages(config.stages)
        config = dataclasses.replace(config, steps=sum(s.steps for s in stages), seq_len=stages[0].length)
    expands = config.method in ("cepe", "ceped")
    data = "stdlib" if config.model else "sites" if config.method == "meco" else "entities" if expands else "facts"
    data = data if config.data is None else config.data
    facts, sites, entities = data in ("facts", "topics"), data == "sites", data == "entities"
    masks_only = config.method == "duo" or getattr(settings, "train", "") == "masks"
    unused = ("lr", "weight_decay", *(("warmup", "min_lr") if config.method == "duo" else ())) if masks_only else ()
    for name in unused:
        if getattr(config, name) is not None:
            raise ValueError(f"--{name} means nothing where only masks learn (see --mask_lr)")
    defaults = dict(steps=100, data=data, out_dir=os.path.join("out", config.method), seq_len=1024, batch=1, lr=1e-5 if config.model else 4e-3,
                    baseline=facts, weight_decay=0.1, warmup=0.1, min_lr=0.01 if masks_only else 0.1)
    defaults |= dict(seq_len=128, batch=8) if facts else dict(seq_len=64, batch=16) if sites else dict(seq_len=80, batch=32) if entities else {}
    if config.method == "meco":
        defaults |= dict(weight_decay=0.033, warmup=0.05) | ({} if config.model else dict(lr=3e-3))
    elif expands:
        defaults |= dict(weight_decay=0.0, warmup=0.04, lr=3e-4 if config.model else 6e-3) | (dict(seq_len=256, batch=16, lr=5e-3) if facts else {})
    config = dataclasses.replace(config, **{k: v for k, v in defaults.items() if getattr(config, k) is None})
    if config.checkpointing is None:
        longest = max(s.length for s in stages) if config.stages else 0
        config = dataclasses.replace(config, checkpointing=max(config.seq_len * config.batch, longest) >= 8192)
    check_data(config, settings)
    return config


def check_data(config, settings):
    """Raises ValueError for --data or --model that the method does not take."""
    facts, sites, entities = config.data in ("facts", "topics"), config.data == "sites", config.data == "entities"
    expands = config.method in ("cepe", "ceped")
    if config.data == "topics" and config.method not in ("prulong", "duo"):
        raise ValueError("--data topics is for --method prulong and duo")
    chats = config.data == "problems" or config.data.endswith((".json", ".jsonl"))
    if (config.method == "sft" or getattr(settings, "chat", False)) and not (config.model and chats):
        raise ValueError("conversations want --model DIR and --data FILE.jsonl, FILE.json or problems")
    if config.method == "meco" and not (sites and not config.model or config.data.endswith(".jsonl")) or sites and config.method != "meco":
        raise ValueError("--method meco wants --data FILE.jsonl, or no --model and --data sites, which no other method takes")
    if entities and not expands or expands and bool(config.model) == (entities or facts):
        raise ValueError("--method cepe and ceped want --model DIR and text, or no --model and --data entities, which no other method takes, or facts")
    if config.method in ("prulong", "duo") and not facts and not config.model:
        raise ValueError(f"--method {config.method} on text needs a trained model: --model DIR")


def read_flags(argv, methods):
    """(Config, the method's settings or None, what builds the method) of a command line, defaults filled in. Raises ValueError for flags
    that cannot be together."""
    named = [b for a, b in zip(argv, argv[1:]) if a == "--method"] + [a[9:] for a in argv if a.startswith("--method=")]
    build_method, method_config = methods.get(named[-1] if named else "lm", methods["lm"])
    parsed = parse([Config, method_config] if method_config else [Config], argv, __doc__.split("\n")[0] +
                   " More flags come with each --method but lm and sft.")
    settings = parsed[1] if method_config else None
    if parsed[0].method not in methods:
        raise ValueError(f"--method: {parsed[0].method!r} is none of {', '.join(methods)}")
    check_used(parsed[0], settings)
    config = fill_defaults(parsed[0], settings)
    if config.method in ("cepe", "ceped"):
        settings = cepe_defaults(config, settings)
        check_cepe(config, settings)
    if config.method in ("prulong", "duo") and settings.window + settings.sink >= config.seq_len:
        raise ValueError(f"--sink {settings.sink} and --window {settings.window} show a streaming head all of --seq_len {config.seq_len}")
    return config, settings, build_method


def main(argv=None, methods=METHODS):
    config, settings, build_method = read_flags(sys.argv[1:] if argv is None else argv, methods)
    join_processes(config.device)
    check_device(config.device)
    if processes().size % config.seq_parallel:
        raise ValueError(f"--seq_parallel {config.seq_parallel} does not divide the number of processes, {processes().size}")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as torch.use_deterministic_algorithms wants it
        torch.use_deterministic_algorithms(True)
    llama = load_config(config.model) if config.model else TINY
    if llama.n_kv_head % config.seq_parallel:
        raise ValueError(f"--seq_parallel {config.seq_parallel} does not divide the model's {llama.n_kv_head} KV heads")
    about = check_out_dir(config.out_dir, config, settings)
    dtype, reason = (about["dtype"], "as before") if about else choose_dtype(config, llama)
    if not summed([dtype == "float32"])[0] in (0, processes().size):  # measured to differ; from here on all have looked at --out_dir
        dtype, reason = "float32", "not every process gains from less"
    model = first_alone(lambda: build_model(config, settings, dtype))
    stages = build_stages(config, settings, model.config.vocab_size)
    data = stages[-1].data
    model.checkpointing = config.checkpointing
    kind = torch.device(config.device).type
    whole_model = not config.checkpointing and processes().size == 1  # else casts of all layers' weights would be held at once
    autocast = lambda: torch.autocast(kind, DTYPES[dtype], enabled=dtype != "float32", cache_enabled=whole_model)
    print(f"{config.method}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {config.steps} steps of "
          f"{config.grad_accum * config.batch} x {config.seq_len} tokens{f' and on, {config.stages},' if config.stages else ''} of {config.data}; "
          f"{dtype} ({reason}), {config.device}", flush=True)
    about = {"method": config.method, "settings": run_settings(config, settings), "dtype": dtype}
    method = build_method(model, settings or config, config.seed)
    for stage in stages:
        method.batch(stage.data, np.random.default_rng(config.seed), 0, config.steps)  # what cannot be is found out before anything is written
    os.makedirs(config.out_dir, exist_ok=True)
    log, first = Log(os.path.join(config.out_dir, "log.jsonl")), processes().rank == 0
    if first and not config.resume:
        empty(config.out_dir)
        log.write("config", **about, reason=reason, torch=torch.__version__, threads=torch.get_num_threads())

    before = score_before(model, method, data, settings, config, dtype, autocast)
    spread(model, method, config)
    wait_for_all()  # until the first has emptied --out_dir
    results = {config.method: (method, fit(method, model, stages, config, config.out_dir, about, autocast))}
    trained_weights = any(p.requires_grad for p in model.parameters())
    if config.method == "prulong" and config.baseline and not trained_weights:
        duo_settings = prulong.DuoConfig(settings.target_sparsity, settings.sink, settings.window)
        duo, out_dir = prulong.Duo(model, duo_settings, config.seed), os.path.join(config.out_dir, "duo")
        os.makedirs(out_dir, exist_ok=True)
        about |= {"method": "duo", "settings": run_settings(config, duo_settings)}
        results["duo"] = duo, fit(duo, model, stages, config, out_dir, about, autocast)
    model = gathered(model)
    if first:
        save_learned(model if trained_weights else None, method, config)
    outcome = report(results, before, model, data, settings, config, dtype, autocast)
    if config.stages:
        outcome["stages"] = report_stages(log.path, outcome["score"])
    outcome = {"method": config.method, "seed": config.seed, "steps": config.steps, "dtype": dtype, **outcome}
    log.write("end", **outcome)
    wait_for_all()
    print(json.dumps(outcome, allow_nan=False))


if __name__ == "__main__":
    run(main)
