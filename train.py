"""Train a Llama, or what a technique adds to one: one loop, every technique.

    python train.py --method prulong                             # embedded: tiny model, fact stream
    python train.py --method prulong --model DIR --data SRC      # a real Llama, real text
    python train.py --method lm --model DIR --data code=0.6:DIR,web=0.4:FILE.jsonl
    python train.py --method sft --model DIR --data CHATS.jsonl  # loss on the assistant's words
    torchrun --nproc_per_node 8 train.py ...                     # the same run by eight processes

A technique is a subclass of model.Method in a file of its own; METHODS names them, and nothing else
here does. Micro-batch i is a pure function of (seed, i) and a checkpoint holds all there is to a
run: --resume ends in the same bits.

Source of the recipe (packing, label rule, averaging over tokens): ProLong, arXiv:2410.02660.
"""
import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import distributed
from tqdm import tqdm

import cepe
import evict
import hamiltonian
import meco
import prulong
import ptp
import vlorp
from eval_tasks import TINY, FactData, final_answer, tiny_model, tiny_start, word_problem
from model import (CHAT_FORMATS, DTYPES, TOKENIZER_FILES, Llama, Method, Parser, Trunk, all_reduce,
                   append_line, barrier, byte_tokenizer, collate, fingerprint, flag,
                   generate, join, load_config, load_model, load_tokenizer, parse, peak_memory,
                   permutation, rank, read_json, replacing, run, shuffled, to_device, world_size,
                   write_tensors)

METHODS = {
    "lm": Method, "sft": Method, "prulong": prulong.PruLong, "duo": prulong.Duo,
    "locret": evict.LocretTraining, "cepe": cepe.Expand, "ceped": cepe.Distil, "meco": meco.MeCo,
    "vlorp": vlorp.VLoRP, "ptp": ptp.Pretraining, "screenshot": ptp.Screenshot,
    "hamiltonian": hamiltonian.TwoStage}
STREAMS = {"facts": FactData}  # embedded data of token ids, for the tiny model


@dataclass
class Config:
    method: str = flag("lm", "what to train; each adds flags: --method NAME --help")
    beside: list | None = flag(None, "another method, or a variant of this one, as "
                                     "NAME[:flag=value,...], trained the same way", free=True)
    model: str | None = flag(None, "folder of a Llama (default: a tiny one)")
    from_scratch: bool | None = flag(None, "fresh weights, the folder's shapes and tokenizer")
    chat: str | None = flag(None, "format of conversations (default: the folder's own)",
                            choices=tuple(CHAT_FORMATS))
    data: str | None = flag(None, "facts (embedded), stdlib (Python's own sources), problems (word "
                                  "problems), a folder, a file, or name=weight:PATH,...")
    data_tokenizer: str | None = flag(None, "folder of the tokenizer that made an MDS folder's ids")
    min_length: str | None = flag(None, "leave out shorter documents [tokens]: N, or NAME=N,... "
                                        "for sources of a mixture")
    out_dir: str | None = flag(None, "where results go (default: out/METHOD)", free=True)
    steps: int | None = flag(None, "optimizer steps (default: 100)", least=1)
    seq_len: int | None = flag(None, "tokens per sequence (default: 1024, facts 128)", least=8)
    batch: int | None = flag(None, "sequences per micro-batch (default: 1, facts 8)", least=1)
    grad_accum: int = flag(1, "micro-batches per step, all processes together", least=1)
    lr: float | None = flag(None, "peak learning rate (default: 1e-5, fresh models 4e-3)", least=0)
    min_lr: float | None = flag(None, "end of the cosine, share of lr (default: 0.1)", least=0)
    warmup: float | None = flag(None, "share of the steps that warms up (default: 0.1)", least=0)
    weight_decay: float | None = flag(None, "of matrices (default: 0.1)", least=0)
    clip: float | None = flag(None, "largest gradient norm, 0: any (default: 1)", least=0)
    rope_base: float | None = flag(None, "new RoPE base, written into config.json", least=1)
    optimizer: str | None = flag(None, "folder of a run whose optimizer state goes on here")
    seed: int = flag(0, "of data, gates and fresh weights", least=0)
    save_every: int = flag(50, "steps between checkpoints", least=1, free=True)
    eval_every: int = flag(0, "steps between held-out scores, 0: none", least=0, free=True)
    eval_seqs: int | None = flag(None, "held-out sequences (default: 16)", least=1)
    device: str = flag("cpu", "torch device", free=True)
    dtype: str = flag("float32", "of the products", choices=("float32", "bfloat16"))
    checkpointing: bool | None = flag(None, "recompute layers in the backward pass (default: from "
                                            "8192 tokens on)", free=True)
    seq_parallel: int = flag(1, "processes that share every sequence", least=1, free=True)
    resume: bool = flag(False, "go on from the checkpoint in --out_dir", free=True)
    overwrite: bool = flag(False, "remove what a run left in --out_dir first", free=True)


# --- flags: the user's word, else the method's, else the data's, else these ----------------------

def plain(args) -> dict:
    return dict(
        data="stdlib" if args.model else "facts", from_scratch=args.model is None, steps=100,
        eval_seqs=16, seq_len=1024, batch=1, lr=1e-5 if args.model else 4e-3, min_lr=0.1,
        warmup=0.1, weight_decay=0.1, clip=1.0, out_dir=os.path.join("out", args.method))


def read_flags(argv, methods, variant=None):
    """(args, config) of a command line, or of a --beside variant NAME[:flag=value,...] of it."""
    name, changes = method_of(argv), []
    if variant is not None:
        name, _, rest = variant.partition(":")
        changes = [change for change in rest.split(",") if change]
        argv = [*argv, "--method", name, *(f"--{change}" for change in changes)]
    if name not in methods:
        raise ValueError(f"unknown method {name!r}: one of {', '.join(methods)}")
    method = methods[name]
    names = {f.name for f in (*fields(Config), *fields(method.Config))}
    for change in changes:  # a flag that only this run's own method has is passed over below
        if change.partition("=")[0].removeprefix("no-") not in names:
            raise ValueError(f"--beside {variant}: {name} has no flag --{change}")
    args, config = parse([Config, method.Config], argv, __doc__.split("\n")[0],
                         known_only=variant is not None)
    known = plain(args)
    known |= getattr(STREAMS.get(args.data or known["data"]), "defaults", {})
    known |= {k: v for k, v in method.defaults(args, config).items() if v is not None}
    n_tokens = (args.seq_len or known["seq_len"]) * (args.batch or known["batch"])
    known.setdefault("checkpointing", n_tokens >= 8192)
    return fill(args, known), fill(config, known)


def method_of(argv) -> str:
    """The word after --method, which decides what other flags there are."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", default=Config.method)
    return parser.parse_known_args(argv)[0].method


def fill(flags, known):
    """A dataclass of flags with known values where it has None."""
    open_ = [f.name for f in fields(flags) if getattr(flags, f.name) is None and f.name in known]
    return replace(flags, **{name: known[name] for name in open_})


def bound(args, config) -> dict:
    """The flags that a run's numbers depend on."""
    return {f.name: getattr(flags, f.name) for flags in (args, config) for f in fields(flags)
            if not f.metadata["free"]}


# --- data: batch(i), scores(model, attend, beyond), vocab_size, seed, seq_len --------------------

class Rows:
    """The dicts of --data, read as they are asked for: lines of .jsonl, the list of a .json, the
    samples of an MDS folder and {"text"} of any other file. sources: name -> (weight, path).
    Weights are relative, by tokens. writer: the tokenizer of --data_tokenizer."""

    def __init__(self, spec, writer=None):
        self.writer = writer
        self.sources = {"data": (1.0, spec)}
        if "=" in spec and not os.path.exists(spec):
            self.sources = {}
            for part in spec.split(","):
                name, _, rest = part.partition("=")
                weight, _, path = rest.partition(":")
                self.sources[name] = float(weight), path
                if not (path and float(weight) > 0):
                    raise ValueError(f"--data: expected name=weight:PATH, got {part!r}")

    def __iter__(self):
        """Dicts with a text, also where a folder has token ids alone."""
        for row in itertools.chain(*(self.read(path) for _, path in self.sources.values())):
            if "input_ids" in row and "text" not in row:
                row["text"] = self.writer.decode(row["input_ids"], marks=False)
            yield row

    def read(self, path):
        """The dicts of a path; a pack of token ids is taken apart into its documents."""
        for row in read_path(path):
            if "input_ids" not in row or "text" in row:
                yield row
                continue
            if self.writer is None:
                where = row.get("where", path)
                raise ValueError(f"{where}: token ids need --data_tokenizer, the folder of the "
                                 "tokenizer that made them")
            for a, b in row.get("indices", [(0, len(row["input_ids"]))]):
                names = [name for name in ("input_ids", "mask") if name in row]
                parts = {name: np.asarray(row[name])[a:b] for name in names}
                yield row | parts


def read_path(path):
    """The dicts of a file, a folder, `stdlib` or `problems`."""
    if path == "problems":
        rng = np.random.default_rng(0)
        made = dict(word_problem(rng) for _ in range(4000))  # a few come twice
        yield from ({"question": question, "answer": answer} for question, answer in made.items())
    elif path == "stdlib":
        yield from read_folder(sysconfig.get_paths()["stdlib"], ".py", ("test", "site-packages"))
    elif os.path.isdir(path):
        mds = os.path.exists(os.path.join(path, "index.json"))
        yield from (read_mds if mds else read_folder)(path)
    elif path.endswith(".parquet"):
        raise ValueError(f"{path}: parquet is not read; pandas.read_parquet(FILE).to_json(OUT, "
                         "orient='records', lines=True) makes a jsonl file of it")
    elif path.endswith(".json"):
        rows = read_json(path)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path}: expected a list of objects")
        yield from rows
    elif path.endswith(".jsonl"):
        yield from read_lines(path)
    else:
        with open(path, encoding="utf-8-sig") as f:
            try:
                text = f.read()
            except UnicodeDecodeError as e:
                raise ValueError(f"{path}: not UTF-8 text ({e.reason})") from None
        yield {"text": text, "where": path}


def read_lines(path):
    """The objects of a .jsonl file, each with "where" it stands for error messages."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as e:
                raise ValueError(f"{path}, line {number}: {e}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object")
            yield row | {"where": f"{path}, line {number}"}


def read_folder(path, ending="", skip=()):
    """The files of a folder in sorted order. What cannot be read is passed over and counted."""
    wrong = []
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith((".", "__")))
        for file in sorted(f for f in files if f.endswith(ending)):
            try:
                yield from read_path(os.path.join(folder, file))
            except ValueError as e:
                wrong.append(e)
    if wrong:
        print(f"{path}: {len(wrong)} files passed over, or their rest; {wrong[0]}", file=sys.stderr)


# --- MDS folders, as mosaicml-streaming writes them: index.json with shards ----------------------

def read_mds(path):
    """The samples of a folder. Raises ValueError for a shard that is cut short or compressed."""
    index = os.path.join(path, "index.json")
    try:
        shards = [(s["raw_data"]["basename"], s["raw_data"]["bytes"], int(s["samples"]), list(zip(
            s["column_names"], s["column_encodings"], s["column_sizes"])))
            for s in read_json(index)["shards"]]
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{index}: not an MDS index ({type(e).__name__}: {e})") from None
    for name, size, n, columns in shards:
        file = os.path.join(path, os.path.basename(name))
        if not os.path.exists(file) and os.path.exists(file + ".zstd"):
            raise ValueError(f"{file}.zstd is compressed: zstd -d {file}.zstd -o {file}")
        if os.path.getsize(file) != size:
            raise ValueError(f"{file} has {os.path.getsize(file)} bytes, its index says {size}")
        data = np.memmap(file, np.uint8, "r")
        bounds = data[4:4 * (n + 2)].view("<u4")  # behind the number of samples
        for i, (a, b) in enumerate(itertools.pairwise(bounds.tolist())):
            yield mds_sample(data[a:b], columns) | {"where": f"{file}, sample {i}"}


def mds_sample(data, columns) -> dict:
    """A sample's bytes as a dict. First come the sizes of those columns that have no fixed one."""
    open_ = [name for name, _, size in columns if size is None]
    sizes = dict(zip(open_, data[:4 * len(open_)].view("<u4").tolist()))
    row, at = {}, 4 * len(open_)
    for name, encoding, size in columns:
        size = sizes.get(name, size)
        row[name] = mds_value(data[at:at + size], *encoding.split(":"))
        at += size
    return row


MDS_DTYPES = {8: "u1", 9: "i1", 16: "u2", 17: "i2", 18: "f2", 32: "u4", 33: "i4", 34: "f4",
              64: "u8", 65: "i8", 66: "f8"}


def mds_value(data, kind, dtype=None, shape=None):
    """A column's bytes as what its encoding says. Nothing is unpickled."""
    if kind == "str":
        return data.tobytes().decode()
    if kind == "bytes":
        return data.tobytes()
    if kind == "int":
        return int(data.view("<i8")[0])
    if kind != "ndarray":
        if kind in np.sctypeDict and np.dtype(kind).kind in "iuf":
            return data.view(kind)[0].item()
        raise ValueError(f"MDS columns of {kind} are not read")
    if dtype is None:
        dtype, data = MDS_DTYPES[int(data[0])], data[1:]
    if shape is not None:
        return data.view(dtype).reshape([int(n) for n in shape.split(",")])
    ndim, width = int(data[0]) >> 2, 1 << (int(data[0]) & 3)  # bytes of each number of the shape
    end = 1 + ndim * width
    shape = data[1:end].view(f"<u{width}").tolist()
    return np.frombuffer(data[end:].tobytes(), dtype).reshape(shape)


def own_data(args, tokenizer, rows):
    """The data of methods that bring none: the fact stream, text or conversations."""
    shape = args.seq_len, args.batch, args.eval_seqs, args.seed
    if args.data in STREAMS:
        return STREAMS[args.data](args.seq_len, args.batch, args.seed, args.eval_seqs)
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"--data {args.data}: no documents")
    if "text" in first:
        return TextData(read_text(rows, tokenizer, args.min_length), tokenizer, *shape)
    return ChatData([as_messages(row) for row in rows], tokenizer, *shape)


def read_text(rows, tokenizer, min_length=None) -> dict:
    """name -> (weight, [token ids of each document, BOS before and EOS behind]). A token that is
    not to be learned, t, stands there as ~t, a negative number."""
    sources, least = {}, least_lengths(min_length, rows.sources)
    for name, (weight, path) in rows.sources.items():
        docs = []
        for row in tqdm(rows.read(path), f"tokens of {name}", unit=" documents", disable=None):
            where = row.get("where", path)
            if "input_ids" not in row and not isinstance(row.get("text"), str):
                raise ValueError(f'{where}: expected an object with a "text"')
            try:
                tokens = document_ids(row, tokenizer, rows.writer)
            except ValueError as e:
                raise ValueError(f"{where}: {e}") from None
            if len(tokens) >= least[name]:
                docs.append(tokens)
        sources[name] = weight, docs
    return sources


def least_lengths(spec, names) -> dict:
    """--min_length by source."""
    if spec is None or spec.isdigit():
        return dict.fromkeys(names, int(spec or 0))
    given = dict(part.partition("=")[::2] for part in spec.split(","))
    if not given.keys() <= set(names) or not all(n.isdigit() for n in given.values()):
        raise ValueError(f"--min_length {spec}: expected N, or NAME=N of {', '.join(names)}")
    return dict.fromkeys(names, 0) | {name: int(n) for name, n in given.items()}


def document_ids(row, tokenizer, writer):
    """A document's ids, int32 (n,): of its text, or those that it came with, if the tokenizer that
    made them is the model's, else of their text."""
    end = list(tokenizer.eos_ids[:1])
    if "text" not in row and writer.bytes == tokenizer.bytes:
        ids = row["input_ids"].astype(np.int32)
        if len(ids) == 0:
            return np.array(tokenizer.document("") + end, dtype=np.int32)
        if "mask" in row:
            ids = np.where(row["mask"].astype(bool), ids, ~ids)
        first, last = (int(ids[i]) if ids[i] >= 0 else ~int(ids[i]) for i in (0, -1))
        begin = [tokenizer.bos_id] if tokenizer.add_bos and first != tokenizer.bos_id else []
        end = [] if last in tokenizer.eos_ids else end
        return np.concatenate((begin, ids, end)).astype(np.int32)
    if "text" not in row and "mask" in row:
        raise ValueError("a mask of tokens needs ids of the model's own tokenizer")
    text = row["text"] if "text" in row else writer.decode(row["input_ids"], marks=False)
    return np.array(tokenizer.document(text) + end, dtype=np.int32)


def learned_pack(docs):
    """A Batch of documents in which ~t stands for a token t that is no target."""
    docs = [torch.from_numpy(np.asarray(doc)).long() for doc in docs]
    targets = [F.pad(doc[1:].where(doc[1:] >= 0, -100), (0, 1), value=-100) for doc in docs]
    return collate([doc.where(doc >= 0, ~doc) for doc in docs], targets)


class Packs:
    """Sequences of several sources, in shuffled epochs. batch(i) is sequences i * n_seq and on.

    packs[k]: (weight, n): source k has n sequences. Of every 1000 in a row each source gives its
    share; each goes through a permutation by (seed, source, epoch)."""

    def __init__(self, packs, seed):
        self.seed, self.sizes = seed, [n for _, n in packs]
        total = sum(weight for weight, _ in packs)
        ends = np.cumsum([weight / total for weight, _ in packs])
        self.pattern = np.searchsorted(ends[:-1], (np.arange(1000) + 0.5) / 1000)

    def pick(self, j):
        """(source, its sequence) of sequence j of the run."""
        block, at = divmod(j, 1000)
        order = self.pattern[permutation(1000, self.seed, block)]
        source = int(order[at])
        before = block * int((order == source).sum()) + int((order[:at] == source).sum())
        return source, shuffled(before, self.sizes[source], self.seed, source)


class TextData:
    """Documents shuffled, laid end to end and cut into packs of seq_len tokens that keep their
    document bounds. sources: name -> (weight, [token ids of each document])."""

    def __init__(self, sources, tokenizer, seq_len, n_seq, n_held_out, seed):
        self.tokenizer, self.seq_len, self.n_seq, self.seed = tokenizer, seq_len, n_seq, seed
        total = sum(weight for weight, _ in sources.values())
        self.tokens, self.bounds, self.held_out, packs = [], [], [], []
        for i, (name, (weight, docs)) in enumerate(sources.items()):
            order = np.random.default_rng((seed, i)).permutation(len(docs))
            docs = [docs[j] for j in order if len(docs[j]) > 1] or [np.zeros(0, np.int32)]
            self.tokens.append(np.concatenate(docs))
            self.bounds.append(np.cumsum([len(doc) for doc in docs]))
            held = math.ceil(n_held_out * weight / total)
            n = len(self.tokens[i]) // seq_len - held  # the last packs are held out
            if n < 1:
                raise ValueError(f"--data {name}: {len(self.tokens[i])} tokens are too few for "
                                 f"{held} held-out sequences of {seq_len} and one to train on")
            packs.append((weight, n))
            self.held_out += [learned_pack(self.pack(i, n + j)) for j in range(held)]
        self.order = Packs(packs, seed)
        self.vocab_size = 1 + max(int(np.maximum(t, ~t).max()) for t in self.tokens)

    def pack(self, source, index) -> list:
        """The documents, or parts of them, in a pack; one token alone predicts nothing."""
        bounds, start = self.bounds[source], index * self.seq_len
        first = np.searchsorted(bounds, start, "right")
        last = np.searchsorted(bounds, start + self.seq_len, "left")
        tokens = self.tokens[source][start:start + self.seq_len]
        return [part for part in np.split(tokens, bounds[first:last] - start) if len(part) > 1]

    def batch(self, i):
        docs = []
        for j in range(i * self.n_seq, (i + 1) * self.n_seq):
            docs += self.pack(*self.order.pick(j))
        return learned_pack(docs)

    def scores(self, model, attend=None, beyond=0) -> dict:
        return {"held-out loss": held_out_loss(model, self.held_out, attend)}


@torch.no_grad()
def held_out_loss(model, batches, attend=None) -> float:
    """Mean loss [nats / token] over all targets of batches."""
    total, n, attend = 0.0, 0, attend or model.causal
    for batch in batches:
        tokens, targets = (x.to(model.head.device) for x in batch[:2])
        targets_here = int((targets != -100).sum())
        loss = model.loss(tokens, targets, attend(batch.cu_seqlens)).item()
        total, n = total + loss * targets_here, n + targets_here
    return total / n


class ChatData:
    """Conversations of which only the assistant's words are targets; none is cut by a pack.

    Where all held-out ones end in an answer that can be checked, scores count the right ones."""

    def __init__(self, conversations, tokenizer, seq_len, n_seq, n_held_out, seed):
        self.tokenizer, self.seq_len, self.n_seq, self.seed = tokenizer, seq_len, n_seq, seed
        order = np.random.default_rng(seed).permutation(len(conversations))
        chats = [(encode_chat(conversations[i], tokenizer), conversations[i]) for i in order]
        fitting = [(chat, messages) for chat, messages in chats if len(chat[0]) <= seq_len]
        if len(fitting) < len(chats):
            print(f"{len(chats) - len(fitting)} of {len(chats)} conversations are longer than "
                  f"--seq_len {seq_len} and left out", file=sys.stderr)
        if len(fitting) <= n_held_out:
            raise ValueError(f"--data has {len(fitting)} conversations of at most --seq_len "
                             f"{seq_len} tokens: too few to hold out --eval_seqs {n_held_out}")
        chats, conversations = zip(*fitting)
        self.held_out = [collate([ids], [targets]) for ids, targets in chats[:n_held_out]]
        self.exams = [(messages[:-1], final_answer(messages[-1]["content"]))
                      for messages in conversations[:n_held_out]]
        self.packs, room = [], 0
        for chat in chats[n_held_out:]:
            if len(chat[0]) > room:
                self.packs.append([])
                room = seq_len
            self.packs[-1].append(chat)
            room -= len(chat[0])
        self.order = Packs([(1.0, len(self.packs))], seed)
        self.vocab_size = 1 + max(int(ids.max()) for ids, _ in chats)

    def batch(self, i):
        chats = []
        for j in range(i * self.n_seq, (i + 1) * self.n_seq):
            chats += self.packs[self.order.pick(j)[1]]
        return collate([ids for ids, _ in chats], [targets for _, targets in chats])

    def scores(self, model, attend=None, beyond=0) -> dict:
        scores = {"held-out loss": held_out_loss(model, self.held_out, attend)}
        sharded = hasattr(model.head, "full_tensor")  # a part of the weights writes no answers
        if not sharded and all(answer is not None for _, answer in self.exams):
            scores["right answers"] = self.right_answers(model)
        return scores

    def right_answers(self, model) -> float:
        """Share of last turns that, decoded greedily with the full cache, end in the answer."""
        longest = max(int((b.targets != -100).sum()) for b in self.held_out)
        chat, right = self.tokenizer.chat, 0
        with torch.autocast(model.head.device.type, enabled=False):
            for messages, answer in tqdm(self.exams, "answers", disable=None, leave=False):
                prompt = self.tokenizer.encode(chat(messages))
                ids = generate(model, prompt, 3 * longest // 2, stop_ids=self.tokenizer.eos_ids)
                right += final_answer(self.tokenizer.decode(ids, marks=False)) == answer
        return right / len(self.exams)


def as_messages(row) -> list:
    """A row of conversations as messages that end with the assistant: {"messages"}; {"question",
    "answer"} (GSM8K); {"instruction", "input", "output"} (LLM-Adapters' commonsense sets);
    {"question": {"stem", "choices"}, "answerKey"} (CommonsenseQA)."""
    try:
        if "messages" in row:
            roles = [m["role"] for m in row["messages"]]
            texts = [m["content"] + "" for m in row["messages"]]
            return row["messages"][:len(texts) - roles[::-1].index("assistant")]
        if "answerKey" in row:
            choices = [f"{c['label']}: {c['text']}" for c in row["question"]["choices"]]
            question = "\n".join((row["question"]["stem"], *choices))
            answer = f"the correct answer is {row['answerKey']}"
        elif "instruction" in row:
            question = "\n".join(filter(None, (row["instruction"], row.get("input"))))
            answer = row["output"]
        else:
            question, answer = row["question"] + "", row["answer"] + ""
    except (KeyError, TypeError, ValueError):
        where = row.get("where", str(row)[:60])
        raise ValueError(f"{where}: neither text nor a conversation with an answer") from None
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def encode_chat(messages, tokenizer):
    """Token ids of a conversation and its targets, both (n,): the prompt of each of the assistant's
    turns, then the turn and its end. Raises ValueError if its chat format does not end a turn, or
    writes a turn otherwise once it is past."""
    whole, end = tokenizer.chat(messages, answering=False), tokenizer.end_of_turn
    ids, learned, at = [], [], 0
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.chat(messages[:i])
            if end is None or not whole.startswith(prompt) or end not in whole[len(prompt):]:
                raise ValueError("the tokenizer's chat format cannot be trained on: an answer must "
                                 "follow its prompt and end in a special token")
            start, stop = len(prompt), whole.index(end, len(prompt)) + len(end)
            before = tokenizer.encode(whole[at:start], begins=at == 0)
            turn = tokenizer.encode(whole[start:stop], begins=False)
            ids += before + turn
            learned += [False] * len(before) + [True] * len(turn)
            at = stop
    tokens, mask = torch.tensor(ids), torch.tensor(learned[1:] + [False])
    return tokens, torch.where(mask, tokens.roll(-1), -100)


# --- checkpoints ---------------------------------------------------------------------------------

def learned(model, method) -> dict:
    """Everything that training changes, by name."""
    named = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    return named | {f"method.{name}": p for name, p in method.named_parameters()}


def save_checkpoint(path, model, method, optimizer, about):
    """One safetensors file: learned tensors, the optimizer's state ("optimizer.INDEX.KEY") and
    `about`. The same whatever the number of processes: all gather, rank 0 writes."""
    tensors = learned(model, method)
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
    tensors = {name: full_tensor(t.detach()).contiguous() for name, t in tensors.items()}
    if rank() == 0:
        write_tensors(path, tensors, {"about": json.dumps(about)})


def read_about(path) -> dict:
    """What a checkpoint says of its run."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {})["about"])


def steps_done(path) -> int:
    """Steps in the checkpoint at `path`, 0 where there is none. Asked of the file, because an
    interrupt may fall between writing it and noting that it is written."""
    return read_about(path)["step"] if os.path.exists(path) else 0


def load_checkpoint(path, model, method, optimizer):
    """Put a checkpoint's tensors back. model None: only the optimizer's state."""
    with safe_open(path, "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    mine = learned(model, method) if model is not None else {}
    state = {}
    for name, tensor in saved.items():
        kind, rest = name.split(".", 1)
        if kind == "optimizer":
            i, key = rest.split(".")
            state.setdefault(int(i), {})[key] = local(tensor, params[int(i)])
        elif name in mine:
            p = mine.pop(name)
            p.data.copy_(local(tensor, p))
    if mine:
        raise ValueError(f"{path}: {next(iter(mine))} is missing")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


# --- the loop ------------------------------------------------------------------------------------

def fit(method, model, data, args, out_dir, about):
    """Train one method, from its checkpoint in out_dir if there is one. A loss or gradient that is
    not finite ends the run before it is stepped on."""
    optimizer = method.optimizer(method.param_groups(model, args), args)
    peaks = [group["lr"] for group in optimizer.param_groups]
    path, log = (os.path.join(out_dir, x) for x in ("checkpoint.safetensors", "log.jsonl"))
    done = steps_done(path)
    if done:
        load_checkpoint(path, model, method, optimizer)
    elif args.optimizer:
        other = os.path.join(args.optimizer, "checkpoint.safetensors")
        load_checkpoint(other, None, method, optimizer)
    forget(log, done)
    bar = tqdm(range(done, args.steps), about["name"], initial=done, total=args.steps,
               disable=None if rank() == 0 else True)
    try:
        for step in bar:
            begun = time.perf_counter()
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * method.lr_scale(step, args.steps, args)
            loss, metrics, n_tokens = learn(method, model, data, step, args)
            average_gradients(optimizer)
            norm = method.update(optimizer, args.clip) if math.isfinite(loss) else math.nan
            if not math.isfinite(norm):
                raise SystemExit(f"train.py: loss {loss}, gradient norm {norm} at step {step}; "
                                 f"the last good checkpoint is step {steps_done(path)}")
            optimizer.zero_grad(set_to_none=True)
            seconds, lr = time.perf_counter() - begun, optimizer.param_groups[0]["lr"]
            speed, peak = round(n_tokens / seconds, 1), peak_memory(args.device)
            row = dict(step=step, loss=loss, grad_norm=norm, lr=lr, tokens=n_tokens,
                       tokens_per_s=speed, peak_bytes=peak)
            write_log(log, event="step", **row, **metrics)
            show(bar, row, metrics)
            if args.eval_every and (step + 1) % args.eval_every == 0:
                with autocast(args):
                    scores = method.evaluate(model, data)
                write_log(log, event="eval", step=step, **scores)
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                save_checkpoint(path, model, method, optimizer, about | {"step": step + 1})
    except KeyboardInterrupt:
        bar.close()
        print(f"stopped; --resume goes on from step {steps_done(path)}", file=sys.stderr)
        raise


def show(bar, row, metrics):
    """A step in the progress bar: also tokens a second, peak memory, the method's numbers."""
    shown = {"loss": f"{row['loss']:.3f}", "tok/s": f"{row['tokens_per_s']:.0f}",
             "MB": f"{row['peak_bytes'] / 1e6:.0f}"}
    bar.set_postfix(shown | {name: f"{value:.2f}" for name, value in metrics.items()})


def learn(method, model, data, step, args):
    """Add up the gradients of a step. Returns (loss, metrics, tokens) of all processes.

    Every micro-batch weighs what the method says: by default each target of the step the same."""
    batches = [method.batch(data, i, step, args.steps) for i in my_micro_batches(step, args)]
    n_tokens = sum(len(batch.tokens) for batch in batches)
    batches = [my_stretch(batch, args) for batch in batches]
    weights = [method.weight(batch) for batch in batches]
    total, n_tokens = all_reduce([sum(weights), n_tokens])
    if not total > 0:
        raise ValueError(f"step {step} has nothing to predict")
    sums = {"loss": 0.0}
    for batch, weight in zip(batches, weights):
        batch = to_device(batch, args.device)
        share_sequence(model, batch, args)
        with autocast(args):
            loss, metrics = method.loss(model, batch, step, args.steps)
        (loss * (weight / total * world_size())).backward()
        for name, value in {"loss": loss.item(), **metrics}.items():
            sums[name] = sums.get(name, 0.0) + value * weight / total
    model.share, model.kv_heads = None, slice(None)
    values = dict(zip(sums, all_reduce(list(sums.values()))))
    return values.pop("loss"), values, int(n_tokens) // args.seq_parallel


def autocast(args):
    kind, dtype = torch.device(args.device).type, DTYPES[args.dtype]
    return torch.autocast(kind, dtype, enabled=args.dtype != "float32")


def write_log(path, **values):
    if rank() == 0:
        append_line(path, values)


def forget(path, step):
    """Drop the log's steps from `step` on, which come again, and a line that a crash cut short."""
    if rank() or not os.path.exists(path):
        return
    with open(path, "rb") as f:
        rows = [line for line in f if line.endswith(b"\n")]
    kept = [line for line in rows if json.loads(line).get("step", -1) < step]
    with replacing(path) as part, open(part, "wb") as f:
        f.writelines(kept)


# --- one run -------------------------------------------------------------------------------------

def main(argv=None, methods=METHODS):
    argv = sys.argv[1:] if argv is None else list(argv)
    args, config = read_flags(argv, methods)
    join(args.device)
    check_processes(args)
    check_out_dir(args, config)
    runs = {args.method: (methods[args.method], args, config)}
    for variant in args.beside or ():
        other = methods.get(variant.partition(":")[0])
        runs[variant] = (other, *read_flags(argv, methods, variant))
    tokenizer = None
    if args.chat and not args.model:
        raise ValueError("--chat is the format of a --model's tokenizer")
    if args.data not in STREAMS:
        tokenizer = load_tokenizer(args.model, args.chat) if args.model else byte_tokenizer()
    writer = load_tokenizer(args.data_tokenizer) if args.data_tokenizer else None
    rows, kind = Rows(args.data, writer), methods[args.method]
    data = kind.data(args, config, tokenizer, rows) or own_data(args, tokenizer, rows)
    model = build_model(kind, args, config)
    for each, _, _ in runs.values():
        check_fits(each, model, data, args)
    print(describe(model, data, args), flush=True)
    with autocast(args):  # scores of the model as it is, which may take as long as the report
        before = kind(model, config, args.seed).before(model, data)
    begin(args, config, runs)
    finished = fit_all(runs, model, data, args)
    leave()
    report(finished, before, data, args)


def fit_all(runs, model, data, args) -> dict:
    """Train the method and those beside it, and save what they learned: name -> (method, model).
    Where weights are trained, each run begins with a fresh model."""
    frozen = all(kind.frozen(config) for kind, _, config in runs.values())
    finished = {}
    for name, (kind, run_args, config) in runs.items():
        out_dir = folder_of(args, name)
        if finished and not frozen:
            model = build_model(kind, run_args, config)
        method = kind(model, config, args.seed)
        about = dict(name=name, flags=bound(run_args, config), weights=weights_of(run_args))
        shard(model, method, args)
        fit(method, model, data, run_args, out_dir, about)
        model = gathered(model, functools.partial(build_model, kind, run_args, config))
        if rank() == 0:
            save(method, model, args, out_dir)
        finished[name] = method, model
    return finished


def build_model(method_class, args, config):
    """The method's model, or the folder's, or a tiny one."""
    frozen = method_class.frozen(config)
    dtype = DTYPES[args.dtype] if frozen else torch.float32
    model = method_class.load(args, config)
    if model is None and args.model and args.from_scratch:
        model = Llama(load_config(args.model)).init_weights(args.seed)
    elif model is None and args.model:
        model = load_model(args.model, args.device, dtype)
    elif model is None and args.data not in STREAMS:
        model = Llama(replace(TINY, vocab_size=258)).init_weights(args.seed)
    elif model is None:
        model = tiny_start(args.seed) if args.from_scratch else tiny_model(args.seed)
    if args.rope_base:
        if model.config.rope_scaling:
            print(f"--rope_base {args.rope_base:g} and the model's own RoPE scaling "
                  f"({model.config.rope_scaling['rope_type']}) both apply", file=sys.stderr)
        longest = max(model.config.max_seq_len, args.seq_len)
        changed = replace(model.config, rope_base=args.rope_base, max_seq_len=longest)
        model.config = model.model.config = changed
    for module in model.modules():
        if isinstance(module, Trunk):
            module.checkpointing = args.checkpointing
    return model.to(args.device)


def describe(model, data, args):
    n = sum(p.numel() for p in model.parameters()) / 1e6
    where = args.model or f"a tiny {type(model).__name__}"
    each = getattr(data, "unit", f"x {args.seq_len} tokens")
    fresh = "fresh weights" if args.from_scratch else "trained"
    return (f"{args.method}: {where} ({n:.2f}M parameters, {fresh}), {args.steps} steps of "
            f"{args.grad_accum} x {args.batch} {each} of {args.data} ({type(data).__name__}), "
            f"{args.dtype} on {args.device}")


def check_fits(kind, model, data, args):
    """Refuse tokens that the model lacks, and a technique that would undo its sliding window."""
    if kind.own_attention and 0 < model.config.window < args.seq_len:
        raise ValueError(f"{kind.__name__} replaces attention: --seq_len {args.seq_len} "
                         f"must fit into the model's sliding window of {model.config.window}")
    if args.min_length and not isinstance(data, TextData):
        raise ValueError("--min_length is for documents of plain text")
    if data.vocab_size is not None and data.vocab_size > model.config.vocab_size:
        raise ValueError(f"token {data.vocab_size - 1} of the data is outside the model's "
                         f"vocabulary of {model.config.vocab_size}")


def weights_of(args):
    return fingerprint(args.model, weights=not args.from_scratch) if args.model else None


def check_out_dir(args, config):
    """Refuse to mix runs, to change a resumed one, and to write where the run reads."""
    log = os.path.join(args.out_dir, "log.jsonl")
    if args.resume and args.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    sources = [path for _, path in Rows(args.data).sources.values()]
    mask = getattr(config, "heads", None)
    for path in filter(None, (args.model, args.optimizer, mask, *sources)):
        out, path = os.path.realpath(args.out_dir), os.path.realpath(path)
        if os.path.exists(path) and os.path.commonpath((out, path)) == out:
            raise ValueError(f"--out_dir {args.out_dir} holds what the run reads ({path})")
    if not (args.resume or args.overwrite):
        if os.path.isdir(args.out_dir) and os.listdir(args.out_dir):
            raise ValueError(f"--out_dir {args.out_dir} is not empty: add --resume or --overwrite")
    if not args.resume:
        return
    checkpoint = os.path.join(args.out_dir, "checkpoint.safetensors")
    if not os.path.exists(log):
        raise ValueError(f"--resume: no run in {args.out_dir}")
    if os.path.exists(checkpoint):
        about = read_about(checkpoint)
        now = json.loads(json.dumps(bound(args, config)))
        for name, value in {**now, "weights": weights_of(args)}.items():
            old = about["weights"] if name == "weights" else about["flags"].get(name)
            if old != value:
                raise ValueError(f"--resume: {name} was {old}, now {value}")


def folder_of(args, name):
    """Where a run or a variant beside it writes."""
    if name == args.method:
        return args.out_dir
    return os.path.join(args.out_dir, name.replace(":", "-").replace("/", "-"))


def begin(args, config, names):
    """Remove exactly the files that an earlier run says it wrote, and start the log."""
    barrier()
    if rank() == 0 and not args.resume:
        log = os.path.join(args.out_dir, "log.jsonl")
        with contextlib.suppress(FileNotFoundError), open(log, encoding="utf-8") as f:
            rows = [json.loads(line) for line in f if line.endswith("\n")]
            for path in itertools.chain(*(row.get("paths", ()) for row in rows)):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(args.out_dir, path))
        folders = [folder_of(args, name) for name in names]
        for folder in folders:
            os.makedirs(folder, exist_ok=True)
        paths = [os.path.join(folder, file) for folder in folders
                 for file in ("checkpoint.safetensors", "log.jsonl")]
        about = bound(args, config) | dict(device=args.device, torch=torch.__version__)
        write_log(log, event="config", paths=inside(args, paths), **about)
    barrier()


def inside(args, paths) -> list:
    """Paths as the log has them: from --out_dir on."""
    return [os.path.relpath(path, args.out_dir) for path in paths]


def save(method, model, args, out_dir):
    """What the method learned, and the tokenizer's files beside weights."""
    paths = method.save(model, out_dir)
    has_weights = any(path.endswith(".safetensors") for path in paths)
    for name in TOKENIZER_FILES if args.model and has_weights else ():
        source = os.path.join(args.model, name)
        if os.path.exists(source):
            paths.append(shutil.copy(source, out_dir))
    if args.chat and has_weights:  # what it was trained on is from now on its own format
        paths.append(os.path.join(out_dir, "chat_template.jinja"))
        with replacing(paths[-1]) as part, open(part, "w", encoding="utf-8") as f:
            f.write(CHAT_FORMATS[args.chat])
    log = os.path.join(args.out_dir, "log.jsonl")
    write_log(log, event="saved", paths=inside(args, paths))
    print(f"saved {', '.join(paths)}", flush=True)


def report(finished, before, data, args):
    """The method's table, row by row as it is computed; the last line is a short JSON object. The
    log has the whole table."""
    method, model = finished[args.method]
    before_files, table = set(os.listdir(args.out_dir)), {}
    with autocast(args):
        for name, values in method.rows(model, data, before, finished, args.out_dir):
            if not table:
                columns = list(values)
                print("\n| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
            cells = [f"{values[column]:.3f}" for column in columns]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
            table[name] = {column: round(float(values[column]), 5) for column in columns}
    new = sorted(set(os.listdir(args.out_dir)) - before_files)
    log = os.path.join(args.out_dir, "log.jsonl")
    write_log(log, event="end", rows=table, paths=new)
    for name in new:
        print(f"saved {os.path.join(args.out_dir, name)}")
    about = {"method": args.method, "seed": args.seed, "log": log}
    print(f"\n{json.dumps(about | {'rows': {name: table[name] for name in finished}})}")


# --- several processes ---------------------------------------------------------------------------
# Weights and their optimizer state are sharded (FSDP2), micro-batches dealt out. --seq_parallel P:
# P processes share every sequence. Each holds a stretch of its tokens; in attention it sees all of
# them with a share of the heads (DeepSpeed Ulysses, arXiv:2309.14509).

def check_processes(args):
    groups, rest = divmod(world_size(), args.seq_parallel)
    if rest:
        raise ValueError(f"--seq_parallel {args.seq_parallel} does not divide the number of "
                         f"processes, {world_size()}")
    if args.grad_accum % groups:
        more = -(-args.grad_accum // groups) * groups
        raise ValueError(f"--grad_accum {args.grad_accum} must be divisible by {groups} processes, "
                         f"as {more} is")


def my_micro_batches(step, args):
    """Numbers of this process's micro-batches of a step."""
    groups, group = world_size() // args.seq_parallel, rank() // args.seq_parallel
    return range(step * args.grad_accum, (step + 1) * args.grad_accum)[group::groups]


def shard(model, method, args):
    """Begin everywhere with rank 0's weights, and keep a shard of them on each process."""
    if world_size() == 1:
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    for p in itertools.chain(model.parameters(), method.parameters()):
        distributed.broadcast(p.data, 0)
    if not (method.shard and any(p.requires_grad for p in model.parameters())):
        return
    mesh = distributed.init_device_mesh(torch.device(args.device).type, (world_size(),))
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in ("hidden", "encode", "loss"):
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def full_tensor(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor, like):
    """This process's shard of a full tensor, placed like `like`."""
    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def average_gradients(optimizer):
    """Mean over the processes of the gradients that FSDP does not see."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if world_size() > 1 and p.grad is not None and not hasattr(p, "full_tensor"):
            distributed.all_reduce(p.grad)
            p.grad /= world_size()


def gathered(model, build):
    """A model with full weights, on rank 0: one process cannot call what several share."""
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        return model
    weights = {name: full_tensor(p.detach()) for name, p in model.named_parameters()}
    if rank():
        return model
    plain_model = build()
    plain_model.load_state_dict(weights)
    return plain_model


def leave():
    if world_size() > 1:
        is_first = rank() == 0
        distributed.destroy_process_group()
        if not is_first:
            sys.exit(0)


def my_stretch(batch, args):
    """This process's stretch of a micro-batch: its tokens and targets, the bounds of all."""
    if args.seq_parallel == 1:
        return batch
    n, size, at = len(batch.tokens), args.seq_parallel, rank() % args.seq_parallel
    mine = slice(n * at // size, n * (at + 1) // size)
    cut = {name: getattr(batch, name)[mine] for name in ("tokens", "targets", "weights")
           if getattr(batch, name) is not None}
    return batch._replace(**cut)


def share_sequence(model, batch, args):
    """Let the model attend to the full sequence of which this process has a stretch."""
    if args.seq_parallel > 1:
        model.share = Share(sequence_group(args.seq_parallel), int(batch.cu_seqlens[-1]))
        n = model.config.n_kv_head // model.share.size
        model.kv_heads = slice(n * model.share.rank, n * (model.share.rank + 1))


@functools.lru_cache(1)
def sequence_group(size):
    """The processes that share this one's sequences."""
    groups = [distributed.new_group(range(i, i + size)) for i in range(0, world_size(), size)]
    return groups[rank() // size]


class Share:
    """A sequence of n tokens in stretches. Two exchanges a layer: q, k, v, and the outputs."""

    def __init__(self, group, n):
        self.group, self.n = group, n
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        self.bounds = [n * i // self.size for i in range(self.size + 1)]

    def positions(self):
        """Of this process's tokens."""
        return torch.arange(self.bounds[self.rank], self.bounds[self.rank + 1])

    def attend(self, attend):
        lengths = [b - a for a, b in zip(self.bounds, self.bounds[1:])]
        mine = [lengths[self.rank]] * self.size

        def all_tokens(x):  # (n_mine, H, D) -> (n, H / size, D)
            if x.shape[1] % self.size:
                raise ValueError(f"{x.shape[1]} heads do not divide among {self.size} processes")
            by_head = x.unflatten(1, (self.size, -1)).transpose(0, 1).flatten(0, 1)
            return Exchange.apply(by_head, mine, lengths, self.group)

        def all_heads(x):  # (n, H / size, D) -> (n_mine, H, D)
            by_head = Exchange.apply(x, lengths, mine, self.group).unflatten(0, (self.size, -1))
            return by_head.transpose(0, 1).flatten(1, 2)
        return lambda layer, q, k, v: all_heads(attend(layer, *map(all_tokens, (q, k, v))))


class Exchange(torch.autograd.Function):
    """Send sizes_out[i] rows to process i and get sizes_in[i]; gradients go the way back."""

    @staticmethod
    def forward(ctx, x, sizes_out, sizes_in, group):
        ctx.sizes_out, ctx.sizes_in, ctx.group = sizes_out, sizes_in, group
        out = x.new_empty(sum(sizes_in), *x.shape[1:])
        distributed.all_to_all_single(out, x.contiguous(), sizes_in, sizes_out, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return Exchange.apply(grad, ctx.sizes_in, ctx.sizes_out, ctx.group), None, None, None


if __name__ == "__main__":
    run(main)
