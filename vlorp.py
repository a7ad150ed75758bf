"""VLoRP: gradients projected at any granularity, and ProjFactor, the optimizer that keeps only projections of them.

A gradient G (n, m) is read as n c rows of m / c numbers, and each row is projected by one random P (m / c, r):
    Gt = reshape(G, (n c, m / c)),   Gs = Gt P  (n c, r),   G ~ Go = reshape(Gs P^T, (n, m)),   P ~ N(0, 1 / r).
What is stored has n M numbers, M = c r, whatever the granularity c is: c = 1 is the row of GaLore and FLORA, c > 1 cuts a row in
pieces, c < 1 glues rows together. A wide matrix (m, n) is projected from the left, without being transposed, as released:
Gt = reshape(G, (m / c, n c)), Gs = P^T Gt. P is never stored: it is drawn again from (seed, epoch, parameter) whenever it is needed.

ProjFactor keeps Adam's first moment as a projection and its second moment as row and column sums (Adafactor's factors):
    ms <- b1 ms + (1 - b1) Gs,   R, C <- b2 R, C + (1 - b2) (row, column sums of Go^2),   V = R C^T / sum(R),
    W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) reshape(ms P^T, (n, m)) / (sqrt(V) + eps).

Paper: "Memory-Efficient LLM Training by Various-Grained Low-Rank Projection of Gradients", arXiv:2505.01744; the update as its
released code has it. Each gradient is projected as soon as the backward pass has it, and freed: one full gradient exists at a time.

    python vlorp.py --model DIR    # memory of training steps with AdamW and with projections
    python vlorp.py                # AdamW and projections of three granularities on a small language model (half a minute)
"""
import functools
import hashlib
import math
import multiprocessing
import os
import sysconfig
import time
import weakref
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import distributed

from model import Llama, LlamaConfig, flag, load_model, parse, peak_memory, processes, run

SCHEMES = ("projfactor", "subspace", "original")
BASES = ("normal", "rademacher", "svd")


class ProjFactor(torch.optim.Optimizer):
    """AdamW whose matrices see only projections of their gradients.

    params: parameters or groups, as for any torch optimizer. Matrices (2-D) of groups with a rank are projected; all others, and
    groups with rank None, are updated by plain AdamW: embeddings and the output matrix belong there (see param_groups).
    rank r and granularity c: m / c and n c must be integers, m the smaller side; the budget M = c r is what counts in memory.
    betas, eps, weight_decay (decoupled): Adam's. proj_every [steps]: a new P; at_refresh keeps the old first moment, which is noise in
    the new basis for some ten steps, or resets it. basis: normal or rademacher; svd takes the r leading right singular vectors of the
    window's first micro-batch and stores them (with scheme subspace that is GaLore, arXiv:2403.03507). scheme: projfactor; subspace
    keeps both moments projected; original keeps both in full size (a reference that saves nothing).
    max_norm clips the norm of all gradients, the projected ones by their projection (its expected square is the gradient's).

    After step(), `norm` is the gradients' norm. A step with a non-finite gradient is skipped and counted in `skipped`. With
    torch.distributed the projections are averaged over processes (the same seed everywhere): n M numbers instead of n m. Every
    backward until step() adds one micro-batch.
    State: tensors and ints only, so a checkpoint loads with weights_only=True; per matrix 4 (n M + n + m) bytes.
    Raises ValueError naming the shape that does not fit.
    Source: arXiv:2505.01744 and its released code (eps outside the root, against the second moment as it is); weight decay comes before
    the update, released after it."""

    def __init__(self, params, lr=1e-4, rank=1, granularity=64, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, proj_every=200, seed=0,
                 basis="normal", scheme="projfactor", at_refresh="keep", max_norm=None):
        self.max_norm, self.norm, self.skipped, self.index = max_norm, 0.0, 0, {}
        super().__init__(params, dict(lr=lr, rank=rank, granularity=granularity, betas=betas, eps=eps, weight_decay=weight_decay,
                                      proj_every=proj_every, seed=seed, basis=basis, scheme=scheme, at_refresh=at_refresh))

    def add_param_group(self, param_group):
        """As torch's; __init__ adds its groups by it. Raises ValueError for settings or shapes that cannot be."""
        check_group(self.defaults | param_group)
        super().add_param_group(param_group)
        group, take = self.param_groups[-1], weakref.WeakMethod(self.take)
        for p in group["params"]:
            self.index[p] = len(self.index), len(self.param_groups) - 1  # groups by number: loading a state makes new ones
            if projected(p, group):
                view_shape(p, group)  # refuses what does not fit
                if p.requires_grad:  # an optimizer that is gone takes nothing more
                    p.register_post_accumulate_grad_hook(lambda p: take() and take()(p))

    def groups(self):
        """Each parameter with its group."""
        return ((p, group) for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def take(self, p):
        """Project p.grad, add it to what this step has of it so far, and free it."""
        group = self.param_groups[self.index[p][1]]
        state = self.state[p]
        if group["basis"] == "svd" and "sum" not in state and state.get("step", 0) % group["proj_every"] == 0:
            units = as_units(p.grad, group)
            state["basis"] = leading_directions(units if is_tall(p) else units.T, group["rank"])
        small = project(p.grad, self.projection(p, group, state.get("step", 0)), group)
        state["sum"] = state["sum"].add_(small) if "sum" in state else small
        p.grad = None

    def projection(self, p, group, step):
        """P (m / c, r) of the window that holds this step: the same on every machine and device, or the stored one."""
        if group["basis"] == "svd":
            return self.state[p]["basis"]
        text = f"{group['seed']} {step // group['proj_every']} {self.index[p][0]}"
        rng = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1)
        shape, scale = (view_shape(p, group)[1], group["rank"]), group["rank"] ** -0.5
        draw = torch.randn(shape, generator=rng) if group["basis"] == "normal" else torch.randint(2, shape, generator=rng).mul_(2).sub_(1).float()
        return draw.mul_(scale).to(p.device, wide(p))

    @torch.no_grad()
    def step(self, closure=None):
        """One update from all that came since the last one. closure, if given, recomputes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p, group in self.groups():
            if projected(p, group) and p.grad is not None:  # a gradient that no backward pass brought
                self.take(p)
        gradients = {p: self.state[p].pop("sum", None) if projected(p, group) else p.grad for p, group in self.groups()}
        gradients = {p: g for p, g in gradients.items() if g is not None}
        if processes().size > 1:
            for g in gradients.values():
                distributed.all_reduce(g)
                g /= processes().size
        self.norm = torch.stack([g.float().norm() for g in gradients.values()]).norm().item() if gradients else 0.0
        if not math.isfinite(self.norm):
            self.skipped += 1
            return loss
        scale = 1.0 if self.max_norm is None else min(1.0, self.max_norm / (self.norm + 1e-6))
        for p, group in self.groups():
            if p in gradients:
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                update = self.projected_update if projected(p, group) else self.plain_update
                update(p, group, gradients[p].to(wide(p)) if scale == 1 else gradients[p].to(wide(p)) * scale)
        return loss

    def projected_update(self, p, group, small):
        """Update a matrix and its state by the projection `small` of its gradient."""
        state, (b1, b2), eps = self.state[p], group["betas"], group["eps"]
        basis = self.projection(p, group, state.get("step", 0))
        refreshed = state.get("step", 0) and state["step"] % group["proj_every"] == 0
        state["step"] = state.get("step", 0) + 1
        correction = math.sqrt(1 - b2 ** state["step"]) / (1 - b1 ** state["step"])
        if group["scheme"] == "original":
            full = torch.cat([block for _, block in estimate(small, basis, p)])
            m, v = moments(state, full, b1, b2)
            return descend(p, group["lr"] * correction, m, v.sqrt().add_(eps))
        if refreshed and group["at_refresh"] == "reset":
            state["m"].zero_()
        if group["scheme"] == "subspace":
            m, v = moments(state, small, b1, b2)
            for rows, block in estimate(m / (v.sqrt() + eps), basis, p):
                p[rows].sub_(block.to(p.dtype), alpha=group["lr"] * correction)
            return
        for name, sums in zip(("row", "column"), square_sums(small, basis, p)):
            running(state, name, sums).lerp_(sums, 1 - b2)
        m = running(state, "m", small).lerp_(small, 1 - b1)
        row, column = (state["row"] / state["row"].sum().clamp_min(1e-30)).sqrt_(), state["column"].sqrt()
        floor = column.new_full(column.shape, eps)
        for rows, block in estimate(m, basis, p):  # sqrt(V) + eps, V = R C^T / sum(R), a block at a time too
            descend(p[rows], group["lr"] * correction, block, torch.addr(floor, row[rows], column))

    def plain_update(self, p, group, grad):
        """AdamW (arXiv:1711.05101)."""
        state, (b1, b2) = self.state[p], group["betas"]
        state["step"] = state.get("step", 0) + 1
        m, v = moments(state, grad, b1, b2)
        root = (v / (1 - b2 ** state["step"])).sqrt_().add_(group["eps"])
        descend(p, group["lr"] / (1 - b1 ** state["step"]), m, root)

    def zero_grad(self, set_to_none=True):
        """Forget this step's gradients, the projected sums too."""
        super().zero_grad(set_to_none)
        for state in self.state.values():
            state.pop("sum", None)

    def load_state_dict(self, state_dict):
        """As torch does, but float32 state of bfloat16 parameters stays float32."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, (p, _) in zip(ids, self.groups()):
            if i in state_dict["state"]:
                self.state[p] = {k: v.to(p.device, copy=True) if torch.is_tensor(v) else v for k, v in state_dict["state"][i].items()}

    def state_like(self, p, group) -> dict:
        """Shapes of the float state of a parameter that has been updated, by name; besides it has an int, `step`."""
        full = tuple(p.shape)
        if not projected(p, group):
            return {"m": full, "v": full}
        (n_units, width), r = view_shape(p, group), group["rank"]
        rows = (n_units, r) if is_tall(p) else (r, n_units)
        basis = {"basis": (width, r)} if group["basis"] == "svd" else {}
        if group["scheme"] == "original":
            return {"m": full, "v": full} | basis
        if group["scheme"] == "subspace":
            return {"m": rows, "v": rows} | basis
        return {"m": rows, "row": full[:1], "column": full[1:]} | basis


def state_bytes(optimizer) -> int:
    """Bytes of all tensors of an optimizer's state, but for its count of steps."""
    return sum(x.nbytes for state in optimizer.state.values() for name, x in state.items() if torch.is_tensor(x) and name != "step")


def check_group(group):
    """Raises ValueError for settings of a parameter group that cannot be."""
    lr, eps, weight_decay, betas, proj_every = (group[name] for name in ("lr", "eps", "weight_decay", "betas", "proj_every"))
    if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas) or proj_every < 1:
        raise ValueError(f"want lr, weight_decay >= 0, eps > 0, betas in [0, 1), proj_every >= 1, got {lr}, {weight_decay}, {eps}, "
                         f"{betas}, {proj_every}")
    for name, known in (("basis", BASES), ("scheme", SCHEMES), ("at_refresh", ("keep", "reset"))):
        if group[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {group[name]!r}")


def projected(p, group) -> bool:
    return group["rank"] is not None and p.dim() == 2


def wide(x):
    """The dtype that an optimizer computes in: float32, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def running(state, name, like):
    """A running mean in the state, from 0 on."""
    if name not in state:
        state[name] = torch.zeros_like(like)
    return state[name]


def moments(state, g, b1, b2):
    """Adam's running means of g and g^2, updated in place."""
    m, v = (running(state, name, g) for name in "mv")
    return m.lerp_(g, 1 - b1), v.mul_(b2).addcmul_(g, g, value=1 - b2)


def descend(p, lr, above, below):
    """p <- p - lr above / below, in one pass where the dtypes allow."""
    if p.dtype == above.dtype:
        p.addcdiv_(above, below, value=-lr)
    else:
        p.sub_((above / below).to(p.dtype), alpha=lr)


def is_tall(p) -> bool:
    return p.shape[0] >= p.shape[1]


def view_shape(p, group):
    """(n c, m / c) of a matrix (n, m) or (m, n), m <= n. Raises ValueError where these are no integers, or the basis would be absurd."""
    return units_of(tuple(p.shape), group["granularity"], group["rank"], group["basis"])


@functools.lru_cache(maxsize=1024)  # asked for three times a step and matrix
def units_of(shape, granularity, r, basis):
    n, m, c = max(shape), min(shape), Fraction(granularity).limit_denominator(10 ** 6)
    if c <= 0 or type(r) is not int or r < 1 or (m / c).denominator != 1 or (n * c).denominator != 1:
        raise ValueError(f"a matrix of shape {shape} cannot be projected with rank {r} and granularity {c}: {m} / {c} and {n} * {c} must be integers")
    if basis == "svd" and r > min(m / c, n * c):
        raise ValueError(f"a matrix of shape {shape} has only {min(m / c, n * c)} singular vectors at granularity {c}, not {r}")
    if (m / c) * r > 2 ** 28:
        raise ValueError(f"the basis of a matrix of shape {shape} with rank {r} and granularity {c} has {m / c * r} numbers: too many")
    return int(n * c), int(m / c)


def as_units(grad, group):
    """G with a unit, that is m / c numbers that are projected together, in each row (n c, m / c); of a wide G in each column."""
    n_units, width = view_shape(grad, group)
    return grad.to(wide(grad)).reshape((n_units, width) if is_tall(grad) else (width, n_units))


def project(grad, basis, group):
    """Gs (n c, r) of a tall gradient, (r, n c) of a wide one."""
    return as_units(grad, group) @ basis if is_tall(grad) else basis.T @ as_units(grad, group)


BLOCK = 2 ** 18  # numbers of an estimate at a time: they stay in the processor's cache until the weights have taken them


def estimate(small, basis, p):
    """The rows of Go, a block at a time: yields (slice of p's rows, estimate of these rows)."""
    left, right = (small, basis.T) if is_tall(p) else (basis, small)
    whole = len(p) // math.gcd(len(p), len(left))  # so many rows of p make whole rows of left
    step = whole * max(1, BLOCK // (whole * p.shape[1]))
    for start in range(0, len(p), step):
        end = min(start + step, len(p))
        part = left[start * len(left) // len(p):end * len(left) // len(p)]
        yield slice(start, end), (part @ right).view(-1, p.shape[1])


def leading_directions(rows, r):
    """The r leading right singular vectors of rows (N, k), summed over processes: (k, r), the same on all. From the smaller Gram matrix:
    a full SVD takes several times as long."""
    rows = rows.nan_to_num(0.0, 0.0, 0.0)  # such a step is skipped later, but must get there
    several = processes().size > 1
    if several:
        distributed.all_reduce(rows)
    if rows.shape[0] >= rows.shape[1]:
        basis = torch.linalg.eigh(rows.T @ rows)[1][:, -r:]
    else:
        left = torch.linalg.eigh(rows @ rows.T)[1][:, -r:]
        basis = torch.linalg.qr(rows.T @ left)[0]
    basis = basis.contiguous()
    if several:
        distributed.broadcast(basis, 0)
    return basis


def gram(x):
    """x^T x of each matrix of a batch (c, n, r)."""
    return x.square().sum(1, keepdim=True) if x.shape[2] == 1 else x.mT @ x  # many products of vectors are slow as matrix products


def square_sums(small, basis, p):
    """Sums of Go^2 over columns and over rows, (p.shape[0],) and (p.shape[1],), without forming Go where every unit lies in one row of p
    (wide: in one column): (Gs P^T)^2 summed over a unit is Gs (P^T P) Gs^T, and summed over units P (Gs^T Gs) P^T."""
    r, n = basis.shape[1], max(p.shape)
    tall = small if is_tall(p) else small.T  # (n c, r)
    if len(tall) % n:  # units of more than one row
        rows, columns = zip(*((block.square().sum(1), block.square().sum(0)) for _, block in estimate(small, basis, p)))
        return torch.cat(rows), torch.stack(columns).sum(0)
    per_unit = ((tall @ (basis.T @ basis)) * tall).sum(1)  # (n c,)
    if is_tall(p):  # units (n, c): unit (i, a) is piece a of row i
        units = small.view(n, -1, r).transpose(0, 1)  # (c, n, r)
        grams = gram(units)  # (c, r, r)
        return per_unit.view(n, -1).sum(1), torch.einsum("kr,crs,ks->ck", basis, grams, basis).flatten()  # (n,), (m,)
    units = small.view(r, -1, n).permute(1, 2, 0)  # unit (a, j): the rows a, a + c, a + 2 c ... of column j; (c, n, r)
    grams = gram(units)  # (c, r, r)
    return torch.einsum("kr,crs,ks->kc", basis, grams, basis).flatten(), per_unit.view(-1, n).sum(0)  # (m,), (n,)


def param_groups(model):
    """The matrices of a Llama's layers, to be projected, and the rest (embeddings, output, norms) for AdamW without decay."""
    inside = [p for p in model.model.layers.parameters() if p.dim() == 2]
    known = {id(p) for p in inside}
    return [{"params": inside}, {"params": [p for p in model.parameters() if id(p) not in known], "rank": None, "weight_decay": 0.0}]


# --- fine-tuning with it: train.py --method vlorp -----------------------------------------------------------------------------

@dataclass
class Config:
    rank: int = flag(1, "rank r of each projected row; what is stored is granularity times rank per row", low=1, high=10 ** 6)
    granularity: float = flag(64.0, "rows that a gradient's row is cut into; below 1 rows are glued (0.25: four)", low=1e-6, high=1e6)
    proj_every: int = flag(30, "steps between two draws of the projections", low=1)
    basis: str = flag("normal", "of the projections", choices=BASES)
    scheme: str = flag("projfactor", "what of the moments is projected", choices=SCHEMES)
    at_refresh: str = flag("keep", "the first moment when the projections are drawn anew", choices=("keep", "reset"))
    chat: bool = flag(False, "data are conversations, as for --method sft")


def make_optimizer(model, config: Config, lr, weight_decay, clip, seed) -> ProjFactor:
    """ProjFactor for a Llama: matrices of the layers projected, all else by AdamW; clip 0 clips nothing."""
    return ProjFactor(param_groups(model), lr, config.rank, config.granularity, weight_decay=weight_decay, proj_every=config.proj_every,
                      seed=seed, basis=config.basis, scheme=config.scheme, at_refresh=config.at_refresh, max_norm=clip or None)


# --- demo ---------------------------------------------------------------------------------------------------------------

@dataclass
class Demo:
    steps: int = flag(60, "of each fine-tuning run", low=1)
    lr: float = flag(1e-2, "of the projected runs; AdamW takes a third", low=0)
    seed: int = flag(0, "of weights, data and projections", low=0)
    model: str | None = flag(None, "folder of a Llama: show the memory of two training steps with each optimizer instead")
    tokens: int = flag(512, "with --model: tokens of each step", low=2)


def measure_memory(folder, settings, n_tokens):
    """Two steps of a Llama in float32 with AdamW (settings None) or ProjFactor, in a process of its own: bytes of optimizer state, of
    gradients when a step begins, and peak resident bytes."""
    model = load_model(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if settings is None else ProjFactor(param_groups(model), 1e-5, **settings)
    tokens = torch.arange(n_tokens + 1) % model.config.vocab_size
    for _ in range(2):
        model.loss(tokens[:-1], tokens[1:]).backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        gradients += sum(state["sum"].nbytes for state in optimizer.state.values() if "sum" in state)
        optimizer.step()
        optimizer.zero_grad()
    return state_bytes(optimizer), gradients, peak_memory()


def memory_table(folder, n_tokens):
    print(f"two steps of {n_tokens} tokens, float32, each in a process of its own; embeddings and norms are AdamW's in every row\n")
    print("| optimizer | granularity c | rank r | optimizer state, MB | gradients, MB | peak resident, MB |\n|---|---|---|---|---|---|")
    rows = {"AdamW": None, "ProjFactor": dict(rank=1, granularity=64), "ProjFactor, rows": dict(rank=64, granularity=1),
            "ProjFactor, four rows": dict(rank=256, granularity=0.25), "GaLore-like (SVD)": dict(rank=64, granularity=1, scheme="subspace", basis="svd")}
    for name, settings in rows.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            sizes = pool.apply(measure_memory, (folder, settings, n_tokens))
        c, r = (settings["granularity"], settings["rank"]) if settings else ("-", "-")
        print(f"| {name} | {c} | {r} | " + " | ".join(f"{size / 1e6:.0f}" for size in sizes) + " |", flush=True)


def source_bytes(folders):
    """Python sources of the standard library as one byte tensor."""
    root, texts = sysconfig.get_paths()["stdlib"], []
    for folder in folders:
        for name in sorted(os.listdir(os.path.join(root, folder))):
            if name.endswith(".py"):
                with open(os.path.join(root, folder, name), "rb") as f:
                    texts.append(f.read())
    return torch.frombuffer(bytearray(b"\n".join(texts)), dtype=torch.uint8).long()


def run_steps(model, optimizer, data, steps, rng, n_seq=8, length=64):
    """Train on random windows with a cosine down to a tenth; returns the mean loss of the last ten steps."""
    peaks, losses = [group["lr"] for group in optimizer.param_groups], []
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        starts = torch.randint(len(data) - length - 1, (n_seq,), generator=rng)
        windows = torch.stack([data[s:s + length + 1] for s in starts])  # (n_seq, length + 1)
        loss = model.loss(windows[:, :-1].flatten(), windows[:, 1:].flatten(), cu_seqlens=torch.arange(n_seq + 1) * length)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


def main():
    config, = parse([Demo], description="Fine-tune a small byte model with AdamW and with projected gradients of equal budget M = 8.")
    if config.model:
        return memory_table(config.model, config.tokens)
    llama = LlamaConfig(vocab_size=256, n_layer=2, n_head=4, n_kv_head=4, n_embd=64, n_ff=128, head_dim=16, tie_embeddings=True)
    base, rng = Llama(llama).init_weights(config.seed), torch.Generator().manual_seed(config.seed)
    run_steps(base, torch.optim.Adam(base.parameters(), lr=3e-3), source_bytes(["asyncio", "email", "http"]), 300, rng)
    start, data = base.state_dict(), source_bytes(["json", "unittest", "xml/dom"])
    print("| optimizer | granularity c | rank r | loss of the last 10 steps | state bytes | gradient bytes | seconds |\n|---|---|---|---|---|---|---|")
    for name, scheme, basis, c, r in (("AdamW", None, None, None, None), ("ProjFactor", "projfactor", "normal", 8, 1),
                                      ("ProjFactor", "projfactor", "normal", 1, 8), ("ProjFactor", "projfactor", "normal", Fraction(1, 8), 64),
                                      ("both moments projected", "subspace", "normal", 1, 8), ("the same, SVD (GaLore)", "subspace", "svd", 1, 8)):
        model = Llama(llama).requires_grad_(False)
        model.load_state_dict(start)
        matrices = [p.requires_grad_(True) for p in param_groups(model)[0]["params"]]
        if c is None:
            optimizer = torch.optim.AdamW(matrices, lr=config.lr / 3, weight_decay=0.0)
        else:
            optimizer = ProjFactor(matrices, lr=config.lr, rank=r, granularity=c, proj_every=30, scheme=scheme, basis=basis, seed=config.seed)
        begun = time.perf_counter()
        loss = run_steps(model, optimizer, data, config.steps, torch.Generator().manual_seed(config.seed + 1))
        held = sum(p.nbytes for p in matrices) if c is None else sum(4 * max(p.shape) * int(c * r) for p in matrices)
        print(f"| {name} | {c or '-'} | {r or '-'} | {loss:.3f} | {state_bytes(optimizer):,} | {held:,} | {time.perf_counter() - begun:.1f} |")


if __name__ == "__main__":
    run(main)
