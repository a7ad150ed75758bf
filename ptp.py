"""PTP: language models that read pictures of text.

A text is drawn with a bitmap font and cut into patches x_1 .. x_n of h x w pixels (ink 1, paper 0),
the last of them all ink. Patches are told apart from their mean and deviation:
    z_i = (x_i - mean(x_i)) / sqrt(var(x_i) + 1e-6).

PTP, an encoder. A quarter of the tokens is drawn as <mask>, a tenth of the patches is left out; the
rest is read in both directions, s = encode(x), and both are recovered:
    loss = mean_t -log p(t | text before t, s)  +  mean_(left out i) |draw(s)_i - z_i|^2 / (h w).
ScreenshotLM, a Llama that goes on behind a picture: x_1 .. x_n t_1 .. t_m, both losses on what
comes next. One linear map brings patches in, another draws them; all else is the Llama's.

Paper: "Improving Language Understanding from Screenshots", arXiv:2402.14073. It says: an encoder of
this kind comes within 2 % of BERT on 6 of 8 GLUE tasks, and screenshots of what came before lower
the perplexity of a text. What came out here, at small sizes, is in results/.

    python train.py --method ptp                                  # embedded: stories
    python train.py --method screenshot
    python train.py --method screenshot --model DIR --data SRC --context 64 --seq_len 128
and what a run with --model left:

    python ptp.py --model out/screenshot --context FILE --prompt TEXT      # go on behind a picture
    python ptp.py --model out/ptp --context FILE --figure FILE.png         # masked, recovered
    python ptp.py --model out/ptp --glue dev.tsv                           # 5-fold accuracy
"""
import collections
import copy
import functools
import gzip
import itertools
import os
import re
import shutil
import struct
import sys
import zlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from attention_triton import attention
from model import (Llama, LlamaConfig, Method, Trunk, assign, checked_config, collate,
                   cross_entropy, flag, generate, init_matrices, join, load_config, load_model,
                   load_tokenizer, parse, read_json, read_weights, replacing, run, save_model,
                   to_device, warmup_cosine, write_json)

# --- drawing text --------------------------------------------------------------------------------

# ASCII 32 .. 126: seven rows of five pixels a character, a row as a digit of base 32
GLYPHS = """
0000000 4444404 aa00000 aavavaa 4fke5u4 op248j3 cik8lid 4400000 2488842 8422248 04lel40 044v440
0000c48 000v000 00000cc 01248g0 ehjlphe 4c4444e eh1248v v2421he 26aiv22 vgu11he 68guhhe v124888
ehhehhe ehhf12c 0cc0cc0 0cc0c48 248g842 00v0v00 8421248 eh12404 eh1dlle ehhvhhh uhhuhhu ehggghe
sihhhis vgguggv vgguggg ehgnhhf hhhvhhh e44444e 72222ic hikokih ggggggv hrllhhh hhpljhh ehhhhhe
uhhuggg ehhhlid uhhukih fgge11u v444444 hhhhhhe hhhhha4 hhhllla hha4ahh hhha444 v1248gv e88888e
0g84210 e22222e 4ah0000 000000v 8420000 00e1fhf ggmphhu 00egghe 11djhhf 00ehvge 698s888 0fhhf1e
ggmphhh 40c444e 20622ic ggikoki c44444e 00qllhh 00mphhh 00ehhhe 00uhugg 00djf11 00mpggg 00fge1u
88s8896 00hhhjd 00hhha4 00hhlla 00ha4ah 00hhf1e 00v248v 2448442 4444444 8442448 0008l20"""
LAYOUTS = ("grid", "words", "proportional")


class Font(NamedTuple):
    """Cells of height x width pixels by character; what has none is drawn as a box. path: the file
    that it was read from."""
    height: int
    width: int
    cells: dict
    path: str | None = None

    def cell(self, character):
        if character in self.cells:
            return self.cells[character]
        box = np.zeros((self.height, self.width), np.uint8)
        box[:-1, :-1] = 1
        box[1:-2, 1:-2] = 0
        return box


@functools.cache
def own_font() -> Font:
    """A font of 95 characters, 5 x 7 pixels in cells of 6 x 8."""
    cells = {}
    for i, code in enumerate(GLYPHS.split()):
        rows = np.array([int(digit, 32) for digit in code])
        pixels = rows[:, None] >> np.arange(4, -1, -1) & 1  # (7, 5)
        cells[chr(32 + i)] = np.pad(pixels, ((0, 1), (0, 1))).astype(np.uint8)
    return Font(8, 6, cells)


def read_psf(path) -> Font:
    """A PC screen font (.psf, .psfu, perhaps gzipped), version 1 or 2. Without a table of
    characters its numbers are ASCII. Raises ValueError for a file that is none."""
    try:
        with open(path, "rb") as f:
            data = f.read()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        if data[:2] == b"\x36\x04":
            (mode, size), start, width = data[2:4], 4, 8
            n, height, has_table = 256 << (mode & 1), size, mode & 6
            table = data[start + n * size:].decode("utf-16-le", "surrogatepass")
            names = [entry.split("\ufffe")[0] for entry in table.split("\uffff")]
        elif data[:4] == b"\x72\xb5\x4a\x86":
            start, has_table, n, size, height, width = struct.unpack("<6I", data[8:32])
            table = data[start + n * size:].split(b"\xff")
            names = [entry.split(b"\xfe")[0].decode() for entry in table]
        else:
            raise ValueError("no magic number")
        rows = np.frombuffer(data, np.uint8, n * size, start).reshape(n, height, -1)
    except (ValueError, EOFError, zlib.error, struct.error) as e:
        raise ValueError(f"{path}: not a PSF font ({e})") from None
    pixels = np.unpackbits(rows, axis=2)[:, :, :width]
    names = names[:n] if has_table else [chr(i) if 32 <= i < 127 else "" for i in range(n)]
    cells = {c: cell for name, cell in zip(names, pixels) for c in name}
    return Font(height, width, cells, os.fspath(path))


class Screen(NamedTuple):
    """How a text becomes patches: each shows `lines` pieces of `columns` characters.

    layout: grid, a cell for each character; words, each word and the space before it filled up to
    whole pieces, so that equal words look equal (arXiv:2311.00522); proportional, cells without
    their empty columns, as the paper's font."""
    columns: int = 2
    lines: int = 1
    layout: str = "grid"
    font: Font = own_font()

    @property
    def shape(self):
        """(height, width) of a patch [pixels]."""
        return self.lines * self.font.height, self.columns * self.font.width

    @property
    def size(self):
        return self.shape[0] * self.shape[1]

    def draw(self, text):
        """Patches (n, size), uint8, of a text laid out as one long line."""
        text = text.expandtabs(4).replace("\n", "//")  # a line's end: as released, it saves room
        if self.layout == "words":
            text = re.sub(r"\s*\S+", lambda m: m[0].ljust(-len(m[0]) % self.columns + len(m[0])),
                          text)
        cells = [self.font.cell(character) for character in text]
        if self.layout == "proportional":
            cells = [trimmed(cell) for cell in cells]
        (height, width), empty = self.shape, np.zeros((self.font.height, 0), np.uint8)
        line = np.concatenate([empty, *cells], axis=1)  # (font.height, W)
        n = -(-line.shape[1] // (self.lines * width))
        line = np.pad(line, ((0, 0), (0, n * self.lines * width - line.shape[1])))
        pieces = line.reshape(self.font.height, n, self.lines, width)
        return pieces.transpose(1, 2, 0, 3).reshape(n, height * width)

    def picture(self, text):
        """Patches (n + 1, size), float, of a text; the last one is all ink: here it ends."""
        patches = np.pad(self.draw(text), ((0, 1), (0, 0)), constant_values=1)
        return torch.from_numpy(patches).float()


def trimmed(cell):
    """A cell's inked columns and one more; of an empty one three."""
    inked = np.flatnonzero(cell.any(0))
    if len(inked) == 0:
        return cell[:, :3]
    return np.pad(cell[:, inked[0]:inked[-1] + 1], ((0, 0), (0, 1)))


def render(text, font=None, columns=2, lines=1, layout="grid"):
    """(patches (n, h w) float in 0 .. 1, h, w): a text as pictures of lines x columns characters,
    ink 1 on paper 0. See Screen; a text's end is not marked."""
    screen = Screen(columns, lines, layout, font or own_font())
    return torch.from_numpy(screen.draw(text)).float(), *screen.shape


def without_glyph(text, font) -> collections.Counter:
    """Characters that are drawn as boxes, and how often."""
    return collections.Counter(c for c in text if c not in font.cells and c not in "\n\t")


def warn_of_boxes(text, font):
    missing = without_glyph(text, font)
    if missing:
        some = "".join(c for c, _ in missing.most_common(10))
        print(f"no glyph for {missing.total()} of {len(text)} characters, drawn as boxes: {some}",
              file=sys.stderr)


def image(patches, shape, per_row=24):
    """Patches (n, h w) side by side as pixels (H, W), per_row in a row, parted by lines of 0.5."""
    height, width = shape
    tiles = F.pad(patches.unflatten(1, shape), (0, 1, 0, 1), value=0.5)  # (n, h + 1, w + 1)
    tiles = F.pad(tiles, (0, 0, 0, 0, 0, -len(tiles) % per_row), value=0.5)
    tiles = tiles.unflatten(0, (-1, per_row)).transpose(1, 2)  # (rows, h + 1, per_row, w + 1)
    return tiles.reshape(-1, per_row * (width + 1))


def write_png(path, pixels, scale=3):
    """Pixels (H, W), ink 1 to paper 0, as a grey PNG."""
    grey = (255 * (1 - pixels.clamp(0, 1))).byte().numpy().repeat(scale, 0).repeat(scale, 1)
    height, width = grey.shape
    rows = np.pad(grey, ((0, 0), (1, 0))).tobytes()  # each begins with its filter, 0

    def part(kind, data):
        size, check = (struct.pack(">I", x) for x in (len(data), zlib.crc32(kind + data)))
        return size + kind + data + check
    head = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    with replacing(path) as name, open(name, "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows))
                + part(b"IEND", b""))


# --- losses and masks ----------------------------------------------------------------------------

def standardised(patches):
    """z of patches (n, h w): mean 0, deviation 1; 0 where all pixels are equal."""
    var, mean = torch.var_mean(patches, dim=1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


def patch_loss(drawn, patches):
    """Mean squared error per pixel of drawn (n, h w) against standardised patches; 0 if n = 0."""
    if len(patches) == 0:
        return drawn.sum()
    return (drawn.float() - standardised(patches)).square().mean()


def span_mask(n, share, rng):
    """bool (n,): the round(share n) patches to leave out, in spans of 1 to 6, each at least its own
    length from those before it; the rest at random."""
    out, left = np.zeros(n, bool), round(share * n)
    spans = 1 + rng.choice(6, 100, p=(0.2, 0.2, 0.2, 0.2, 0.1, 0.1))
    for span in spans:
        span = min(span, left)
        start = rng.integers(n - span + 1)
        if not out[max(0, start - span):start + 2 * span].any():
            out[start:start + span] = True
            left -= span
        if left == 0:
            break
    out[rng.permutation(np.flatnonzero(~out))[:left]] = True
    return out


def mask_text(ids, tokenizer, share, rng) -> str:
    """The text of token ids, each of which is drawn as <mask> with probability `share`; neighbours
    share one."""
    masked, text, end = rng.random(len(ids)) < share, "", 0
    for is_masked, group in itertools.groupby(masked):
        start, end = end, end + len(list(group))
        text += " <mask>" if is_masked else text_between(ids, tokenizer, start, end)
    return text


def text_between(ids, tokenizer, start, end):
    """Of ids[start:end], as it stands in all of it: some tokenizers drop a text's first space."""
    before, all_ = (tokenizer.decode(ids[:i], marks=False) for i in (start, end))
    return all_[len(before):]


# --- the models ----------------------------------------------------------------------------------

class ScreenshotLM(Llama):
    """A Llama that reads patches and tokens. Parameter names are a Llama's, read.* and draw.*."""

    def __init__(self, config: LlamaConfig, screen: Screen):
        super().__init__(config)
        self.screen = screen
        self.read = nn.Linear(screen.size, config.n_embd)
        self.draw = nn.Linear(config.n_embd, screen.size)

    def hidden(self, tokens, attend=None, positions=None, patches=None, at=None):
        """As Llama's; patches (n, h w) stand in the places at (n,) of tokens (N,)."""
        if patches is not None:
            x = self.model.embed_tokens(tokens)  # (N, n_embd)
            tokens = x.index_copy(0, at, self.read(patches).to(x.dtype))
        return super().hidden(tokens, attend, positions)


class BehindPicture:
    """A ScreenshotLM with a picture at hand, for model.generate: the prompt is one token, a token
    for each patch, and a text."""

    def __init__(self, model: ScreenshotLM, patches):
        self.model, self.config, self.head = model, model.config, model.head
        self.picture = model.read(patches)  # (n, n_embd)

    def hidden(self, tokens, attend=None, positions=None):
        n, x = len(self.picture), self.model.model.embed_tokens(tokens)  # (N, n_embd)
        is_patch = (positions > 0) & (positions <= n)
        patch = self.picture[(positions - 1).clamp(0, n - 1)].to(x.dtype)
        return self.model.hidden(torch.where(is_patch[:, None], patch, x), attend, positions)


class PTP(Llama):
    """An encoder of pictures with two decoders: a Llama, which has the encoder's states before its
    text, and a painter. config.n_layer is the text decoder's; all have its width.

    The released text decoder cross-attends to the states; here they are its prefix."""

    def __init__(self, config: LlamaConfig, screen: Screen, enc_layers=2, draw_layers=1):
        super().__init__(config)
        self.screen, self.enc_layers, self.draw_layers = screen, enc_layers, draw_layers
        own = replace(config, vocab_size=1)  # whose one vector is [CLS], and the painter's the mask
        self.encoder = Trunk(replace(own, n_layer=enc_layers))
        self.painter = Trunk(replace(own, n_layer=draw_layers))
        self.read = nn.Linear(screen.size, config.n_embd)
        self.draw = nn.Linear(config.n_embd, screen.size)

    def encode(self, patches, left_out, cu):
        """States (M, n_embd) of what is not left out: for each picture cu[b]:cu[b+1] of patches
        (P, h w) its [CLS], then its patches. left_out bool (P,). Returns also the pictures'
        Places."""
        places = Places.of(left_out, cu)
        x = self.encoder.embed_tokens.weight.expand(len(places.kept), -1)
        x = x.index_copy(0, places.at, self.read(patches).to(x.dtype))[places.kept]
        positions = places.positions[places.kept]
        return self.encoder(x, both_ways(places.cu_kept), positions), places

    def paint(self, states, places):
        """Patches (P, h w), standardised, of all places."""
        x = self.painter.embed_tokens.weight.expand(len(places.kept), -1)
        x = x.index_copy(0, places.kept.nonzero()[:, 0], states.to(x.dtype))
        x = self.painter(x, both_ways(places.cu), places.positions)
        return self.draw(x[places.at])

    def tell(self, states, places, tokens, cu_tokens):
        """States (N, n_embd) of the text decoder, causally over each picture's states and then its
        text, cu_tokens[b]:cu_tokens[b+1] of tokens (N,)."""
        n_states, n_tokens = np.diff(places.cu_kept).tolist(), np.diff(cu_tokens).tolist()
        texts = self.model.embed_tokens(tokens).split(n_tokens)
        x, cu, at = [], [0], []
        for prefix, text in zip(states.split(n_states), texts):
            x += [prefix.to(text.dtype), text]
            at.append(torch.arange(len(text)) + cu[-1] + len(prefix))
            cu.append(cu[-1] + len(prefix) + len(text))
        hidden = super().hidden(torch.cat(x), self.causal(cu))
        return hidden[torch.cat(at).to(hidden.device)]


class Places(NamedTuple):
    """Where [CLS] and patches of several pictures stand, end to end."""
    at: torch.Tensor  # (P,): of the patches; the others are [CLS]
    kept: torch.Tensor  # bool (P + pictures,)
    positions: torch.Tensor  # (P + pictures,), in its picture
    cu: list  # bounds of the pictures, with all patches
    cu_kept: list  # and without those left out

    @staticmethod
    def of(left_out, cu):
        cu, device = torch.as_tensor(cu).tolist(), left_out.device
        lengths = [b - a for a, b in zip(cu, cu[1:])]
        at = torch.cat([torch.arange(n) + a + b + 1 for b, (a, n) in enumerate(zip(cu, lengths))])
        positions = torch.cat([torch.arange(n + 1) for n in lengths])
        kept = torch.ones(len(positions), dtype=torch.bool, device=device)
        kept[at] = ~left_out
        bounds = [a + b for b, a in enumerate(cu)]
        before = F.pad(kept.cumsum(0), (1, 0)).tolist()
        kept_bounds = [before[b] for b in bounds]
        return Places(at.to(device), kept, positions.to(device), bounds, kept_bounds)


def both_ways(cu):
    """An `attend` in both directions inside each picture."""
    return lambda layer, q, k, v: attention(q, k, v, cu, cu, causal=False)


# --- files: a Llama's folder and how its pictures are drawn --------------------------------------

KINDS = {"screenshot": ScreenshotLM, "ptp": PTP}


def save_reader(model, path) -> list:
    """A Llama's folder; config.json also says how text is drawn, and a font that was read from a
    file is copied. Returns the paths."""
    paths, config = save_model(model, path), os.path.join(path, "config.json")
    about = {name: getattr(model.screen, name) for name in ("columns", "lines", "layout")}
    if isinstance(model, PTP):
        about |= dict(enc_layers=model.enc_layers, draw_layers=model.draw_layers)
    kind, = (kind for kind in KINDS if type(model) is KINDS[kind])
    write_json(config, read_json(config) | {kind: about})
    if model.screen.font.path:
        paths.append(shutil.copy(model.screen.font.path, os.path.join(path, "font.psf")))
    return paths


def load_reader(path, device="cpu", dtype=torch.float32):
    """The PTP or ScreenshotLM in folder `path`. Raises ValueError for another folder."""
    file, font = (os.path.join(path, name) for name in ("config.json", "font.psf"))
    hf = read_json(file)
    kind = kind_of(path)
    if kind is None:
        raise ValueError(f"{file}: neither a PTP nor a ScreenshotLM")
    about = dict(hf[kind])
    try:
        drawn = {name: about.pop(name) for name in ("columns", "lines", "layout")}
        screen = Screen(**drawn, font=read_psf(font) if os.path.exists(font) else own_font())
        with torch.device("meta"):
            model = KINDS[kind](checked_config(hf, file), screen, **about)
    except (KeyError, TypeError) as e:
        raise ValueError(f"{file}: unsupported {kind} ({type(e).__name__}: {e})") from None
    return assign(model, read_weights(path, device, dtype), path)


# --- what both methods share ---------------------------------------------------------------------

def kind_of(path):
    """The key of KINDS of a folder, None for another folder."""
    hf = read_json(os.path.join(path, "config.json"))
    return next((kind for kind in KINDS if isinstance(hf.get(kind), dict)), None)


class Reader(Method):
    """Flags of the picture, and the data: pairs of what comes before a text, and the text. A
    subclass says its `kind` of folder."""

    @dataclass
    class Config:
        columns: int = flag(2, "characters that a patch is wide", least=1)
        lines: int = flag(1, "rows of --columns characters in a patch", least=1)
        layout: str | None = flag(None, "grid, words (filled up to whole rows), proportional "
                                        "(default: grid, stories: words)", choices=LAYOUTS)
        font: str | None = flag(None, "a PC screen font, .psf (default: 5 x 7 pixels)")
        context: int | None = flag(None, "tokens of each sequence that come before the text "
                                         "(default: half)", least=1)
        patch_weight: float = flag(1.0, "of the patches' loss", least=0)

    @classmethod
    def defaults(cls, args, config):
        if args.model is None and args.data in (None, "stories"):
            return cls.on_stories
        return dict(layout="grid", context=(args.seq_len or 1024) // 2, warmup=0.02)

    @classmethod
    def data(cls, args, config, tokenizer, rows):
        if args.seq_parallel > 1 or args.rope_base:
            raise ValueError(f"--method {args.method} takes no --seq_parallel, --rope_base")
        if any(name.partition(":")[0] != args.method for name in args.beside or ()):
            raise ValueError(f"only variants of {args.method} can stand beside it")
        if args.seq_len - config.context < 4:
            raise ValueError(f"--context {config.context} leaves fewer than 4 of --seq_len "
                             f"{args.seq_len} tokens")
        if args.eval_seqs < 2:
            raise ValueError("--eval_seqs must be at least 2, for another text's picture")
        if args.data == "stories":
            if args.model or (args.seq_len, config.context) != (64, 32):
                raise ValueError("stories have their own words and lengths: no --model, --seq_len, "
                                 "--context")
            return Stories(args.batch, args.seed, args.eval_seqs)
        if tokenizer is None:
            raise ValueError(f"--data {args.data} has no text to draw")

    @classmethod
    def load(cls, args, config):
        """A folder of this kind, a Llama with fresh maps around it, or a tiny one."""
        screen, kind = screen_of(config), args.model and kind_of(args.model)
        if not kind:
            return cls.build(args, config, screen)
        if kind != cls.kind or args.from_scratch:
            raise ValueError(f"{args.model} is a trained {kind}: --method {kind} goes on with it, "
                             "without --from_scratch")
        model = load_reader(args.model, args.device)
        text = "a bb ccc" + "".join(own_font().cells)  # drawn alike: the same layout and font
        asked = screen if config.font else screen._replace(font=model.screen.font)
        if not np.array_equal(asked.draw(text), model.screen.draw(text)):
            raise ValueError(f"{args.model} reads {model.screen[:3]}: --columns, --lines, "
                             "--layout and --font must be the same")
        return model

    def __init__(self, model, config, seed=0):
        super().__init__(model, config)
        self.screen = model.screen

    def pairs(self, data, i) -> list:
        """(context, text) of micro-batch i, lists of token ids."""
        if hasattr(data, "pairs"):
            return data.pairs(i)
        return [self.cut(part) for part in data.batch(i).tokens.tensor_split(data.n_seq)]

    def cut(self, tokens):
        return tokens[:self.config.context].tolist(), tokens[self.config.context:].tolist()

    def held_out(self, data) -> list:
        if hasattr(data, "held_out_pairs"):
            return data.held_out_pairs
        if any(int((b.targets == -100).sum()) >= len(b.cu_seqlens) for b in data.held_out):
            raise ValueError(f"{type(self).__name__} learns every token: no data with a mask, and "
                             "no conversations")
        return [self.cut(b.tokens) for b in data.held_out]

    def before(self, model, data):
        ids = [i for pair in self.held_out(data) for part in pair for i in part]
        warn_of_boxes(data.tokenizer.decode(ids, marks=False), self.screen.font)
        return self.evaluate(model, data)

    def save(self, model, out_dir):
        return save_reader(model, out_dir)


def screen_of(config) -> Screen:
    font = read_psf(config.font) if config.font else own_font()
    return Screen(config.columns, config.lines, config.layout, font)


def first_token(tokenizer) -> int:
    """What stands before a picture or a text: BOS, else an end."""
    return next((i for i in (tokenizer.bos_id, *tokenizer.eos_ids) if i is not None), 0)


# --- a Llama that goes on behind a picture -------------------------------------------------------

class Page(NamedTuple):
    """A Batch with pictures: patches (n, h w) stand in the places at (n,) of tokens."""
    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    patches: torch.Tensor
    at: torch.Tensor
    weights: torch.Tensor | None = None


def page(triples, first) -> Page:
    """Of (picture (n, h w) or None, token ids to read, token ids to learn) each: the token `first`,
    the picture, then tokens; the token before the learned ones predicts the first of them."""
    docs, targets, places, pictures, start = [], [], [], [], 0
    for picture, given, text in triples:
        n = 0 if picture is None else len(picture)
        before = [first] + [0] * n + list(given)
        docs.append(before + list(text))
        targets.append([-100] * (len(before) - 1) + list(text) + [-100])
        places.append(torch.arange(start + 1, start + 1 + n))
        pictures += [] if picture is None else [picture]
        start += len(docs[-1])
    batch = collate(docs, [torch.tensor(t) for t in targets])
    patches = torch.cat(pictures) if pictures else torch.zeros(0, 1)
    return Page(*batch[:3], patches, torch.cat(places))


def states_of(model, batch):
    """States (N, n_embd) of a Page."""
    pictures = dict(patches=batch.patches, at=batch.at) if len(batch.at) else {}
    return model.hidden(batch.tokens, model.causal(batch.cu_seqlens), **pictures)


@torch.no_grad()
def start_reading(model, tokenizer, n=20000):
    """Set a Llama's read map by least squares: a token drawn by itself reads as its embedding.

    Tokens are weighted by 1 / (id + 10): a BPE's ids roughly rank frequency (Zipf's law). The fit
    shrinks what it cannot tell apart; it is rescaled to the embeddings' variance."""
    screen, patches, ids = model.screen, [], []
    letter = tokenizer.encode("a")[-1]
    for i, line in itertools.product(range(min(n, model.config.vocab_size)), range(screen.lines)):
        text = text_between([letter, i], tokenizer, 1, 2)
        patches.append(screen.draw(" " * line * screen.columns + text if text else ""))
        ids += [i] * len(patches[-1])
    x, ids = torch.from_numpy(np.concatenate(patches)).float(), torch.tensor(ids)
    y, weight = model.model.embed_tokens.weight.cpu()[ids].float(), 1 / (ids[:, None] + 10.0)
    weight = weight / weight.sum()
    x_mean, y_mean = (weight * x).sum(0), (weight * y).sum(0)
    x, y = x - x_mean, y - y_mean
    square = x.T @ (weight * x)
    ridge = 0.01 * square.diagonal().mean() * torch.eye(len(square))
    best = torch.linalg.solve(square + ridge, x.T @ (weight * y))  # (h w, n_embd)
    best = best * ((weight * y * y).sum() / (weight * (x @ best).square()).sum()).sqrt()
    model.read.weight.copy_(best.T)
    model.read.bias.copy_(y_mean - x_mean @ best)


class Screenshot(Reader):
    """Predicts a text behind the picture of what comes before it."""

    kind = "screenshot"
    on_stories = dict(data="stories", seq_len=64, batch=32, steps=900, lr=3e-3, min_lr=0.02,
                      warmup=0.05, weight_decay=0.01, eval_seqs=256, context=32, layout="words",
                      reading=0.0, beside=["screenshot:shown=none"])

    @dataclass
    class Config(Reader.Config):
        shown: str = flag("picture", "what comes before the text, as a picture, as text, or not at "
                                     "all (none)", choices=("picture", "text", "none"))
        reading: float | None = flag(None, "share of the steps, at the start, that learn to read: "
                                           "the target is the pictured text itself (default: 0.5, "
                                           "stories: 0)", least=0)
        maps_lr: float = flag(3.0, "learning rate of the two maps of patches, times --lr", least=0)

    @classmethod
    def defaults(cls, args, config):
        return dict(reading=0.5, lr=3e-4) | super().defaults(args, config)

    @classmethod
    def build(cls, args, config, screen):
        if args.model is None:
            return ScreenshotLM(tiny_config(args), screen).init_weights(args.seed)
        model = ScreenshotLM(load_config(args.model), screen).init_weights(args.seed)
        if not args.from_scratch:
            llama = load_model(args.model)
            model.load_state_dict(llama.state_dict(), strict=False)
            start_reading(model, load_tokenizer(args.model))
        return model

    def param_groups(self, model, args):
        maps = [*model.read.parameters(), *model.draw.parameters()]
        own = {id(p) for p in maps}
        groups = super().param_groups(model, args)
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in own]
        return [*groups, dict(params=maps, lr=self.config.maps_lr * args.lr, weight_decay=0.0)]

    def batch(self, data, i, step, steps):
        pairs, reads = self.pairs(data, i), self.config.reading * steps
        if self.config.shown == "picture" and step < reads:
            pairs = self.to_read(pairs, step / reads)
        return self.page(pairs, data.tokenizer)

    def to_read(self, pairs, progress):
        """Pieces of the contexts, each to be repeated behind its own picture: 16 tokens long in
        the first half of the reading phase, then longer."""
        n = max(16, round((2 * progress - 1) * self.config.context))
        pieces = [context[i:i + n] for context, _ in pairs for i in range(0, len(context), n)]
        return [(piece, piece) for piece in pieces]

    def page(self, pairs, tokenizer):
        triples, shown = [], self.config.shown
        for context, text in pairs:
            picture = None
            if shown == "picture":
                picture = self.screen.picture(tokenizer.decode(context, marks=False))
            triples.append((picture, context if shown == "text" else [], text))
        return page(triples, first_token(tokenizer))

    def loss(self, model, batch, step, steps):
        states = states_of(model, batch)
        loss = cross_entropy(states, model.head, batch.targets)
        if len(batch.at) == 0:
            return loss, {}
        drawn = patch_loss(model.draw(states[batch.at - 1]), batch.patches)
        return loss + self.config.patch_weight * drawn, {"text": loss.item(), "patch": drawn.item()}

    def before(self, model, data):
        """The model as it is, which sees no picture."""
        blind = Screenshot(model, replace(self.config, shown="none"))
        return Reader.before(blind, model, data)

    @torch.no_grad()
    def evaluate(self, model, data):
        """Loss [nats / token] of held-out texts behind what comes before them, and behind what
        comes before another text; and of what comes before itself, shown or not: does it read?"""
        pairs = self.held_out(data)
        others = [(context, text) for (context, _), (_, text) in zip(pairs[1:] + pairs[:1], pairs)]
        copies = [(context, context) for context, _ in pairs]
        found = {}
        for name, these in ("own", pairs), ("another's", others), ("reading", copies):
            found[name] = self.mean_loss(model, data, these)
        return found

    def mean_loss(self, model, data, pairs) -> float:
        total, n = 0.0, 0
        for i in range(0, len(pairs), data.n_seq):
            batch = self.page(pairs[i:i + data.n_seq], data.tokenizer)
            batch = to_device(batch, model.head.device)
            loss = cross_entropy(states_of(model, batch), model.head, batch.targets).item()
            n_targets = int((batch.targets != -100).sum())
            total += loss * n_targets
            n += n_targets
        return total / n

    def rows(self, model, data, before, runs, out_dir):
        """A model that did not learn to read counts as untrained: a line says so."""
        yield "before, no context", before
        blind, read = before["reading"], []
        for name, (method, m) in runs.items():
            found = method.evaluate(m, data)
            yield name, found
            if method.config.shown == "none":
                blind = min(blind, found["reading"])
            if method.config.shown == "picture" and method.config.reading:
                read.append((name, found["reading"]))
        for name, loss in read:
            verdict = "it reads" if loss < blind / 2 else "NOT TRAINED, it does not read"
            print(f"\n{name}: {verdict}: loss of the pictured text {loss:.3f}, without a picture "
                  f"{blind:.3f}")


def tiny_config(args) -> LlamaConfig:
    """0.1M parameters, for stories; for text with bytes as tokens."""
    vocab_size = Stories.vocab_size if args.data == "stories" else 258
    return LlamaConfig(vocab_size, n_layer=2, n_head=4, n_kv_head=4, n_embd=64, n_ff=192,
                       head_dim=16, tie_embeddings=True)


# --- an encoder ----------------------------------------------------------------------------------

class Masked(NamedTuple):
    """A Batch of pictures, patches (P, h w) with bounds cu, of which left_out are not shown, and
    their texts: tokens to read, targets to learn, bounds cu_seqlens."""
    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    patches: torch.Tensor
    left_out: torch.Tensor
    cu: torch.Tensor
    weights: torch.Tensor | None = None


class Pretraining(Reader):
    """Recovers masked text and left-out patches."""

    kind, own_attention = "ptp", True  # the encoder's has no window
    on_stories = dict(data="stories", seq_len=64, batch=32, steps=600, lr=3e-3, min_lr=0.02,
                      warmup=0.05, weight_decay=0.01, eval_seqs=256, context=32, layout="words",
                      beside=["ptp:text_weight=0"])

    @dataclass
    class Config(Reader.Config):
        text_weight: float = flag(1.0, "of the text's loss", least=0)
        mask: float = flag(0.25, "share of the tokens drawn as <mask>", least=0)
        left_out: float = flag(0.1, "share of the patches left out", least=0)
        text_layers: int = flag(1, "of a new text decoder (official: 12)", least=1)
        draw_layers: int = flag(1, "of a new painter (official: 8)", least=1)

    @classmethod
    def defaults(cls, args, config):
        fresh = args.model is not None and kind_of(args.model) is None
        rate = dict(from_scratch=True, lr=1e-3) if fresh else {}
        return rate | super().defaults(args, config)

    @classmethod
    def build(cls, args, config, screen):
        """--model gives shapes and tokenizer: the weights are fresh, its encoder as deep as it."""
        shape = load_config(args.model) if args.model else tiny_config(args)
        text = replace(shape, n_layer=config.text_layers)
        model = PTP(text, screen, shape.n_layer, config.draw_layers)
        return model.init_weights(args.seed)

    def batch(self, data, i, step, steps):
        rng = np.random.default_rng((data.seed, i, 1))
        texts = [context + text for context, text in self.pairs(data, i)]
        return self.masked(texts, data.tokenizer, rng)

    def masked(self, texts, tokenizer, rng) -> Masked:
        first, pictures, left_out = first_token(tokenizer), [], []
        for ids in texts:
            text = mask_text(ids, tokenizer, self.config.mask, rng)
            pictures.append(self.screen.picture(text))
            out = span_mask(len(pictures[-1]) - 1, self.config.left_out, rng)
            left_out.append(torch.from_numpy(np.append(out, False)))  # the end is always shown
        docs = [[first, *ids[:-1]] for ids in texts]
        batch = collate(docs, [torch.tensor(ids) for ids in texts])
        cu = torch.tensor([0, *map(len, pictures)]).cumsum(0)
        return Masked(*batch[:3], torch.cat(pictures), torch.cat(left_out), cu)

    def losses(self, model, batch):
        """Of the text [nats / token] and of the left-out patches."""
        states, places = model.encode(batch.patches, batch.left_out, batch.cu)
        told = model.tell(states, places, batch.tokens, batch.cu_seqlens.tolist())
        text = cross_entropy(told, model.head, batch.targets)
        drawn = model.paint(states, places)[batch.left_out]
        return text, patch_loss(drawn, batch.patches[batch.left_out])

    def loss(self, model, batch, step, steps):
        text, drawn = self.losses(model, batch)
        loss = self.config.text_weight * text + self.config.patch_weight * drawn
        return loss, {"text": text.item(), "patch": drawn.item()}

    @torch.no_grad()
    def evaluate(self, model, data):
        """Both losses of held-out texts, means over micro-batches."""
        pairs, rng = self.held_out(data), np.random.default_rng((data.seed, 2 ** 31))
        found = []
        for i in range(0, len(pairs), data.n_seq):
            texts = [context + text for context, text in pairs[i:i + data.n_seq]]
            batch = self.masked(texts, data.tokenizer, rng)
            batch = to_device(batch, model.head.device)
            found.append([loss.item() for loss in self.losses(model, batch)])
        text, patch = np.mean(found, 0)
        return {"text": text, "patch": patch}

    def before(self, model, data):
        return super().before(model, data) | self.probe(model, data)

    def probe(self, model, data):
        return data.probe(model) if hasattr(data, "probe") else {}

    def rows(self, model, data, before, runs, out_dir):
        yield "untrained", before
        for name, (method, m) in runs.items():
            yield name, method.evaluate(m, data) | self.probe(m, data)
        context, text = self.held_out(data)[0]
        with torch.no_grad():
            pixels = recovered(model, context + text, data.tokenizer)
        write_png(os.path.join(out_dir, "recovered.png"), pixels)


# --- stories: text in which what came before says what comes -------------------------------------

class Words:
    """A tokenizer of known words; each is drawn with a space before it."""

    bos_id, eos_ids = 0, ()

    def __init__(self, words):
        self.words = ["<s>", *words]
        self.ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, text):
        return [self.ids[word] for word in text.split()]

    def decode(self, ids, marks=True):
        return "".join(f" {self.words[i]}" for i in ids)


class Stories:
    """Endless stories of six sentences about one person, thing, place and food, which repeat, in a
    good or a bad mood, which chooses the adjectives. Three sentences come before the text."""

    names = "Ann Bob Eve Ian Joe Kim".split()
    things = "boat book clock lamp ring tent".split()
    places = "barn city field garden house school".split()
    foods = "bread cake fish pear rice soup".split()
    good = "bright clean fine fresh lovely merry neat nice".split()
    bad = "awful broken dirty dull grim nasty poor rotten".split()
    templates = [sentence.split() for sentence in (
        "NAME saw a ADJ THING in the PLACE .", "the THING was ADJ and ADJ .",
        "NAME likes the ADJ FOOD .", "in the PLACE NAME ate ADJ FOOD .",
        "the FOOD tasted ADJ and ADJ .", "a ADJ THING stood near the PLACE .")]
    function_words = "saw a in the . was and likes ate tasted stood near".split()
    tokenizer = Words([*names, *things, *places, *foods, *good, *bad, *function_words])
    vocab_size, seq_len = len(tokenizer.words), 64

    def __init__(self, n_seq=32, seed=0, n_held_out=256):
        self.n_seq, self.seed = n_seq, seed
        rng = np.random.default_rng((seed, 2 ** 31))
        self.held_out_pairs = [self.story(rng)[:2] for _ in range(n_held_out)]

    def story(self, rng, n_sentences=6, adjectives=slice(None)):
        """(ids before, ids after, is it good?)."""
        chosen = {kind: words[rng.integers(6)] for kind, words in (
            ("NAME", self.names), ("THING", self.things), ("PLACE", self.places),
            ("FOOD", self.foods))}
        is_good = bool(rng.integers(2))
        moods, parts = (self.good if is_good else self.bad)[adjectives], ([], [])
        for i in range(n_sentences):
            for word in self.templates[rng.integers(len(self.templates))]:
                word = moods[rng.integers(len(moods))] if word == "ADJ" else chosen.get(word, word)
                parts[2 * i // n_sentences].append(self.tokenizer.ids[word])
        return *parts, is_good

    def pairs(self, i) -> list:
        rng = np.random.default_rng((self.seed, i))
        return [self.story(rng)[:2] for _ in range(self.n_seq)]

    def probe(self, model, n_train=128, n_test=256) -> dict:
        """Accuracy at telling good from bad stories, after learning it from 128 in which half of
        the adjectives occur: with the same adjectives, and with the other half, which only the
        unlabelled stories of the pre-training had."""
        rng, sets = np.random.default_rng((self.seed, 3)), []
        for n, adjectives in ((n_train, slice(4)), (n_test, slice(4)), (n_test, slice(4, 8))):
            stories = [self.story(rng, 4, adjectives) for _ in range(n)]
            texts = [self.tokenizer.decode(a + b) for a, b, _ in stories]
            sets.append((texts, [int(is_good) for _, _, is_good in stories]))
        found = []
        for seed in range(3):
            classify = fine_tuned(model, *sets[0], epochs=15, seed=seed)
            found.append([accuracy(classify(texts), labels) for texts, labels in sets[1:]])
        return dict(zip(("seen words", "new words"), np.mean(found, 0)))


# --- fine-tuning the encoder ---------------------------------------------------------------------

class Classifier(nn.Module):
    """The encoder of a PTP and a head on its [CLS]."""

    def __init__(self, model, n_class, seed):
        super().__init__()
        self.model, width = copy.deepcopy(model), model.config.n_embd
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, n_class))
        init_matrices(self.head, seed)
        self.head.to(model.head.device)

    def forward(self, texts):
        """Logits (len(texts), n_class)."""
        pictures = [self.model.screen.picture(text) for text in texts]
        patches = torch.cat(pictures).to(self.model.head.device)
        cu = [0, *itertools.accumulate(map(len, pictures))]
        shown = torch.zeros(len(patches), dtype=torch.bool, device=patches.device)
        states, places = self.model.encode(patches, shown, cu)
        return self.head(states[places.cu_kept[:-1]].float())


def fine_tuned(model, texts, labels, epochs=10, seed=0, lr=1e-3, batch=32):
    """texts -> classes, by a copy of the encoder trained on texts and their labels 0 .. n - 1."""
    with torch.enable_grad(), torch.autocast(model.head.device.type, enabled=False):
        classifier, rng = Classifier(model, max(labels) + 1, seed), np.random.default_rng(seed)
        weights = [p for name, p in classifier.named_parameters()
                   if name.startswith(("head", "model.encoder", "model.read"))]
        optimizer = torch.optim.AdamW(weights, lr, weight_decay=0.01)
        per_epoch = -(-len(texts) // batch)
        for step in range(epochs * per_epoch):
            if step % per_epoch == 0:
                order = rng.permutation(len(texts))
            chosen = order[step % per_epoch * batch:][:batch]
            optimizer.param_groups[0]["lr"] = lr * warmup_cosine(step, epochs * per_epoch, 0.1, 0.0)
            logits = classifier([texts[i] for i in chosen])
            target = torch.tensor([labels[i] for i in chosen], device=logits.device)
            F.cross_entropy(logits, target).backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def classify(texts):
        parts = [texts[i:i + batch] for i in range(0, len(texts), batch)]
        return torch.cat([classifier(part).argmax(-1) for part in parts]).tolist()
    return classify


def accuracy(found, labels) -> float:
    return sum(a == b for a, b in zip(found, labels)) / len(labels)


# --- GLUE (arXiv:1804.07461): its TSV files, 5-fold ----------------------------------------------

TEXT_COLUMNS = ("sentence", "sentence1", "question", "question1", "#1 String", "sentence2",
                "question2", "#2 String")
LABEL_COLUMNS = ("label", "gold_label", "Quality", "is_duplicate")


def read_glue(path):
    """(texts, labels 0 .., names of the labels) of a GLUE task's TSV file, whose header names the
    columns; quotation marks are plain text. A pair of sentences is two lines. Raises ValueError."""
    with open(path, encoding="utf-8-sig") as f:  # MRPC's begins with a byte order mark
        header, *rows = [line.rstrip("\n").split("\t") for line in f] or [[]]
    shown = [i for i, name in enumerate(header) if name in TEXT_COLUMNS]
    label = next((i for i, name in enumerate(header) if name in LABEL_COLUMNS), None)
    if not shown or label is None:
        raise ValueError(f"{path}: its first line names no sentence and label: {header[:8]}")
    for i, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(f"{path}, line {i}: {len(row)} columns, its first line has "
                             f"{len(header)}")
    names = sorted({row[label] for row in rows})
    if len(names) < 2 or len(rows) < 5:
        raise ValueError(f"{path}: {len(rows)} rows with the labels {names}: too few to learn from")
    texts = ["\n".join(row[i] for i in shown) for row in rows]
    return texts, [names.index(row[label]) for row in rows], names


def bag_of_words(texts, labels):
    """texts -> classes, by naive Bayes over words (one added to every count)."""
    counts = [collections.Counter() for _ in range(max(labels) + 1)]
    for text, label in zip(texts, labels):
        counts[label].update(text.lower().split())
    prior, words = collections.Counter(labels), set().union(*counts)

    def log_probability(label, text):
        count, n = counts[label], counts[label].total() + len(words)
        seen = [count[word] + 1 for word in text.lower().split()]
        return np.log(prior[label]) + np.log(seen).sum() - len(seen) * np.log(n)

    def classify(texts):
        classes = range(len(counts))
        return [max(classes, key=lambda label: log_probability(label, text)) for text in texts]
    return classify


def cross_validated(fit, texts, labels, folds=5, seed=0) -> float:
    """Accuracy on all texts, each classified by what fit(texts, labels) learnt from the other
    folds."""
    order, found = np.random.default_rng(seed).permutation(len(texts)), {}
    for part in tqdm(np.array_split(order, folds), "folds", disable=None, leave=False):
        rest = np.setdiff1d(order, part)
        classify = fit([texts[i] for i in rest], [labels[i] for i in rest])
        found |= zip(part.tolist(), classify([texts[i] for i in part]))
    return accuracy([found[i] for i in range(len(texts))], labels)


def print_glue(model, path, epochs, lr):
    texts, labels, names = read_glue(path)
    warn_of_boxes("".join(texts), model.screen.font)
    fresh = PTP(model.config, model.screen, model.enc_layers, model.draw_layers).init_weights(0)
    fits = {"bag of words": bag_of_words}
    for name, encoder in ("untrained", fresh.to(model.head.device)), ("pre-trained", model):
        fits[name] = functools.partial(fine_tuned, encoder, epochs=epochs, lr=lr)
    print(f"{path}: {len(texts)} rows, {len(names)} labels, 5-fold\n")
    print("| | accuracy | +- |\n|---|---|---|")
    most = max(collections.Counter(labels).values()) / len(labels)
    print(f"| the commonest label | {most:.3f} | |")
    for name, fit in fits.items():
        found = cross_validated(fit, texts, labels)
        half = 1.96 * (found * (1 - found) / len(texts)) ** 0.5  # 95 %, over the rows
        print(f"| {name} | {found:.3f} | {half:.3f} |", flush=True)


# --- pictures for people -------------------------------------------------------------------------

def recovered(model, ids, tokenizer, mask=0.25, left_out=0.1, seed=0):
    """Pixels (H, W) for write_png, three pictures of a text one above the other: drawn; as the
    encoder sees it, what is left out grey; as the painter recovers that.

    The painter knows a patch up to its brightness and contrast: it lends them from the original."""
    masker = Pretraining(model, Pretraining.Config(mask=mask, left_out=left_out))
    batch = masker.masked([ids], tokenizer, np.random.default_rng(seed))
    batch = to_device(batch, model.head.device)
    states, places = model.encode(batch.patches, batch.left_out, batch.cu)
    out, patches = batch.left_out[:, None], batch.patches
    var, mean = torch.var_mean(patches, dim=1, keepdim=True)
    drawn = model.paint(states, places).float() * var.sqrt() + mean
    whole = model.screen.picture(tokenizer.decode(ids, marks=False))
    pictures = whole, patches.where(~out, torch.tensor(0.3)), drawn.where(out, patches)
    images = [image(picture.cpu(), model.screen.shape) for picture in pictures]
    return torch.cat([F.pad(pixels, (0, 0, 0, model.screen.font.height)) for pixels in images])


# --- a trained folder in use ---------------------------------------------------------------------

@dataclass
class Flags:
    model: str | None = flag(None, "folder of a PTP or a ScreenshotLM, as train.py writes it")
    context: str | None = flag(None, "text file to show as a picture")
    prompt: str | None = flag(None, "text that a ScreenshotLM continues behind the picture")
    max_new_tokens: int = flag(64, "longest continuation [tokens]", least=1)
    figure: str | None = flag(None, "PNG to write: --context drawn, masked, and recovered by a PTP")
    glue: str | None = flag(None, "TSV file of a GLUE task to fine-tune a PTP's encoder on, 5-fold")
    epochs: int = flag(10, "of fine-tuning", least=1)
    lr: float = flag(1e-3, "of fine-tuning", least=0)
    device: str = flag("cpu", "torch device")


def main():
    config, = parse([Flags], description="Screenshot language models in use.")
    if not config.model or not (config.glue or config.context and (config.prompt or config.figure)):
        raise ValueError("--model and --context with --prompt or --figure, or --glue, are needed; "
                         "train.py --method ptp or screenshot trains")
    join(config.device)
    model, needs_ptp = load_reader(config.model, config.device), config.glue or config.figure
    if bool(needs_ptp) == bool(config.prompt) or bool(needs_ptp) != isinstance(model, PTP):
        raise ValueError("--prompt needs a ScreenshotLM, --figure and --glue a PTP")
    if config.glue:
        return print_glue(model, config.glue, config.epochs, config.lr)
    tokenizer = load_tokenizer(config.model)
    with open(config.context, encoding="utf-8") as f, torch.no_grad():
        text = f.read()
        warn_of_boxes(text, model.screen.font)
        if config.figure:
            return write_png(config.figure, recovered(model, tokenizer.encode(text), tokenizer))
        picture = model.screen.picture(text).to(config.device)
        prompt = [first_token(tokenizer), *[0] * len(picture), *tokenizer.encode(config.prompt)]
        new = generate(BehindPicture(model, picture), torch.tensor(prompt), config.max_new_tokens,
                       stop_ids=tokenizer.eos_ids)
        print(tokenizer.decode(new, marks=False))


if __name__ == "__main__":
    run(main)
