"""VLoRP: gradients projected at any granularity, and ProjFactor, the optimizer that keeps only projections of them.

A gradient G (n, m) is read as n c rows of m / c numbers, and each row is projected by one random P (m / c, r):
    Gt = reshape(G, (n c, m / c)),   Gs = Gt P  (n c, r),   G ~ Go = reshape(Gs P^T, (n, m)),   P ~ N(0, 1 / r).
What is stored has n M numbers, M = c r, whatever the granularity c is: c = 1 is the row of GaLore and FLORA, c > 1 cuts a row in
pieces, c < 1 glues rows together. P is never stored: it is drawn again from (seed, epoch, parameter) whenever it is needed.

ProjFactor keeps Adam's first moment as a projection and its second moment as row and column sums (Adafactor's factors):
    ms <- b1 ms + (1 - b1) Gs,   R, C <- b2 R, C + (1 - b2) (row, column sums of Go^2),   V = R C^T / sum(R),
    W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) reshape(ms P^T, (n, m)) / (sqrt(V) + eps).

Paper: "Memory-Efficient LLM Training by Various-Grained Low-Rank Projection of Gradients", arXiv:2505.01744; the update as its
released code has it. Each gradient is projected as soon as the backward pass has it, and freed: one full gradient exists at a time.

    python vlorp.py                # AdamW and projections of three granularities on a small language model (half a minute)
"""
import hashlib
import math
import os
import sysconfig
import time
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import distributed

from model import Llama, LlamaConfig, flag, parse, run

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
    Raises ValueError naming the parameter whose shape does not fit.
    Source: arXiv:2505.01744 and its released code (eps outside the root, against the second moment as it is)."""

    def __init__(self, params, lr=1e-4, rank=1, granularity=64, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, proj_every=200, seed=0,
                 basis="normal", scheme="projfactor", at_refresh="keep", max_norm=None):
        if lr < 0 or eps <= 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas) or proj_every < 1:
            raise ValueError(f"want lr, weight_decay >= 0, eps > 0, betas in [0, 1), proj_every >= 1, got {lr}, {weight_decay}, {eps}, {betas}, {proj_every}")
        for name, value, known in (("basis", basis, BASES), ("scheme", scheme, SCHEMES), ("at_refresh", at_refresh, ("keep", "reset"))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        super().__init__(params, dict(lr=lr, rank=rank, granularity=granularity, betas=betas, eps=eps, weight_decay=weight_decay,
                                      proj_every=proj_every, seed=seed, basis=basis, scheme=scheme, at_refresh=at_refresh))
        self.max_norm, self.norm, self.skipped, self.index = max_norm, 0.0, 0, {}
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                self.index[p] = len(self.index), number  # groups by number: loading a state makes new ones
                if projected(p, group):
                    view_shape(p, group)  # refuses what does not fit
                    p.register_post_accumulate_grad_hook(self.take)

    def groups(self):
        """Each parameter with its group."""
        return ((p, group) for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def take(self, p):
        """Project p.grad, add it to what this step has of it so far, and free it."""
        group = self.param_groups[self.index[p][1]]
        state, rows = self.state[p], as_rows(p.grad, group)  # (n c, m / c)
        if group["basis"] == "svd" and "sum" not in state and state.get("step", 0) % group["proj_every"] == 0:
            state["basis"] = leading_directions(rows, group["rank"])
        small = rows @ self.basis(p, group, state.get("step", 0))
        state["sum"] = state["sum"].add_(small) if "sum" in state else small
        p.grad = None

    def basis(self, p, group, step):
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
        gradients = {p: self.state[p].pop("sum") if projected(p, group) else p.grad for p, group in self.groups()
                     if ("sum" in self.state[p] if projected(p, group) else p.grad is not None)}
        if distributed.is_available() and distributed.is_initialized():
            for g in gradients.values():
                distributed.all_reduce(g)
                g /= distributed.get_world_size()
        self.norm = torch.stack([g.float().norm() for g in gradients.values()]).norm().item() if gradients else 0.0
        if not math.isfinite(self.norm):
            self.skipped += 1
            return loss
        scale = 1.0 if self.max_norm is None else min(1.0, self.max_norm / (self.norm + 1e-6))
        for p, group in self.groups():
            if p in gradients:
                update = self.projected_update if projected(p, group) else self.plain_update
                above, below = update(p, group, gradients[p].to(wide(p)) * scale)
                if group["weight_decay"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                if p.dtype == above.dtype:
                    p.addcdiv_(above, below, value=-group["lr"])  # one pass instead of two
                else:
                    p.add_((above / below).to(p.dtype), alpha=-group["lr"])
        return loss

    def projected_update(self, p, group, small):
        """The change of a matrix per unit of learning rate as a fraction, the state updated by small (n c, r)."""
        state, (b1, b2), eps = self.state[p], group["betas"], group["eps"]
        basis = self.basis(p, group, state.get("step", 0))
        refreshed = state.get("step", 0) and state["step"] % group["proj_every"] == 0
        state["step"] = state.get("step", 0) + 1
        correction = math.sqrt(1 - b2 ** state["step"]) / (1 - b1 ** state["step"])
        back = lambda x: from_rows(x @ basis.T, p)
        if group["scheme"] == "original":
            full = back(small)
            m, v = moments(state, full, full.square(), b1, b2)
            return correction * m, v.sqrt().add_(eps)
        if refreshed and group["at_refresh"] == "reset":
            state["m"].zero_()
        if group["scheme"] == "subspace":
            m, v = moments(state, small, small.square(), b1, b2)
            return back(correction * m / (v.sqrt() + eps)), torch.ones((), device=p.device)
        for name, sums in zip(("row", "column"), square_sums(small, basis, p)):
            state.setdefault(name, torch.zeros_like(sums)).mul_(b2).add_(sums, alpha=1 - b2)
        row, column = state["row"], state["column"]
        m = state.setdefault("m", torch.zeros_like(small)).mul_(b1).add_(small, alpha=1 - b1)
        root = torch.addr(row.new_full((1, 1), eps), (row / row.sum().clamp_min(1e-30)).sqrt_(), column.sqrt())
        return back(m * correction), root  # sqrt(V) + eps, V = R C^T / sum(R)

    def plain_update(self, p, group, grad):
        """AdamW's change per unit of learning rate as a fraction (arXiv:1711.05101)."""
        state, (b1, b2) = self.state[p], group["betas"]
        state["step"] = state.get("step", 0) + 1
        m, v = moments(state, grad, grad.square(), b1, b2)
        return m / (1 - b1 ** state["step"]), (v / (1 - b2 ** state["step"])).sqrt_().add_(group["eps"])

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
        (n_rows, width), r = view_shape(p, group), group["rank"]
        basis = {"basis": (width, r)} if group["basis"] == "svd" else {}
        if group["scheme"] == "original":
            return {"m": full, "v": full} | basis
        if group["scheme"] == "subspace":
            return {"m": (n_rows, r), "v": (n_rows, r)} | basis
        return {"m": (n_rows, r), "row": full[:1], "column": full[1:]} | basis

    def state_bytes(self) -> int:
        """Bytes of all state tensors."""
        return sum(x.nbytes for state in self.state.values() for x in state.values() if torch.is_tensor(x))


def projected(p, group) -> bool:
    return group["rank"] is not None and p.dim() == 2


def wide(x):
    """The dtype that an optimizer computes in: float32, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def moments(state, first, second, b1, b2):
    """Adam's running means, updated in place."""
    m, v = state.setdefault("m", torch.zeros_like(first)), state.setdefault("v", torch.zeros_like(second))
    return m.mul_(b1).add_(first, alpha=1 - b1), v.mul_(b2).add_(second, alpha=1 - b2)


def view_shape(p, group):
    """(n c, m / c) of a matrix (n, m) or (m, n), m <= n."""
    n, m, c, r = max(p.shape), min(p.shape), Fraction(group["granularity"]).limit_denominator(10 ** 6), group["rank"]
    if c <= 0 or type(r) is not int or r < 1 or (m / c).denominator != 1 or (n * c).denominator != 1:
        raise ValueError(f"a matrix of shape {tuple(p.shape)} cannot be projected with rank {r} and granularity {c}: {m} / {c} and "
                         f"{n} * {c} must be integers")
    if group["basis"] == "svd" and r > min(m / c, n * c):
        raise ValueError(f"a matrix of shape {tuple(p.shape)} has only {min(m / c, n * c)} singular vectors at granularity {c}, not {r}")
    if (m / c) * r > 2 ** 28:
        raise ValueError(f"the basis of a matrix of shape {tuple(p.shape)} with rank {r} and granularity {c} has {m / c * r} numbers: too many")
    return int(n * c), int(m / c)


def as_rows(grad, group):
    """G as n c rows of m / c numbers, at least float32; the longer side comes first."""
    tall = grad if grad.shape[0] >= grad.shape[1] else grad.T
    return tall.to(wide(grad)).reshape(view_shape(grad, group))


def leading_directions(rows, r):
    """The r leading right singular vectors of rows (N, k), (k, r); the same on all processes. From the smaller Gram matrix: a full
    SVD takes several times as long."""
    rows = rows.nan_to_num(0.0, 0.0, 0.0)  # such a step is skipped later, but must get there
    if rows.shape[0] >= rows.shape[1]:
        basis = torch.linalg.eigh(rows.T @ rows)[1][:, -r:]
    else:
        left = torch.linalg.eigh(rows @ rows.T)[1][:, -r:]
        basis = torch.linalg.qr(rows.T @ left)[0]
    basis = basis.contiguous()
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast(basis, 0)
    return basis


def from_rows(rows, p):
    """The inverse of as_rows: (n c, m / c) -> the shape of p."""
    n, m = max(p.shape), min(p.shape)
    return rows.reshape(n, m) if p.shape[0] >= p.shape[1] else rows.reshape(n, m).T


def square_sums(small, basis, p):
    """Sums of Go^2 over columns and over rows, (p.shape[0],) and (p.shape[1],), without forming Go where every unit lies in one row:
    (Gs P^T)^2 summed over a unit is Gs (P^T P) Gs^T, and summed over rows P (Gs^T Gs) P^T."""
    n, m, r = max(p.shape), min(p.shape), small.shape[1]
    if len(small) % n:  # units of more than one row
        square = (small @ basis.T).reshape(n, m).square_()
        sums = square.sum(1), square.sum(0)
    else:
        flat = small.view(n, -1)  # (n, c r)
        grams = (flat.T @ flat).unflatten(0, (-1, r)).unflatten(2, (-1, r)).diagonal(dim1=0, dim2=2)  # Gs^T Gs of each unit, (r, r, c)
        sums = ((small @ (basis.T @ basis)) * small).view(n, -1).sum(1), torch.einsum("kr,rsc,ks->ck", basis, grams, basis).flatten()
    return sums if p.shape[0] >= p.shape[1] else sums[::-1]


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
        state = sum(x.nbytes for s in optimizer.state.values() for k, x in s.items() if torch.is_tensor(x) and k != "step")
        held = sum(p.nbytes for p in matrices) if c is None else sum(4 * max(p.shape) * int(c * r) for p in matrices)
        print(f"| {name} | {c or '-'} | {r or '-'} | {loss:.3f} | {state:,} | {held:,} | {time.perf_counter() - begun:.1f} |")


if __name__ == "__main__":
    run(main)
