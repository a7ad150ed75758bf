"""VLoRP: gradients projected at any granularity, and ProjFactor, which keeps only projections.

A gradient G (n, m) is read as n c rows of m / c numbers; each is projected by one random P:
    Gt = reshape(G, (n c, m / c)),    Gs = Gt P  (n c, r),    P (m / c, r) ~ N(0, 1 / r),
    G ~ Go = reshape(Gs P^T, (n, m)).
What is stored has n M numbers, M = c r, whatever the granularity c is: c = 1 is the row of GaLore
and FLORA, c > 1 cuts a row in pieces, c < 1 glues rows together. A wide matrix (m, n) is projected
from the left, as released: Gt = reshape(G, (m / c, n c)), Gs = P^T Gt. P is never stored: it is
drawn again from (seed, epoch, parameter).

ProjFactor keeps Adam's first moment as a projection and its second as row and column sums:
    ms <- b1 ms + (1 - b1) Gs,   R, C <- b2 R, C + (1 - b2) (row, column sums of Go^2),
    V = R C^T / sum(R),
    W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) reshape(ms P^T, (n, m)) / (sqrt(V) + eps).

Paper: "Memory-Efficient LLM Training by Various-Grained Low-Rank Projection of Gradients",
arXiv:2505.01744; the update as its released code has it. Each gradient is projected as soon as the
backward pass has it, and freed: one full gradient exists at a time.

    python train.py --method vlorp --beside vlorp:granularity=1,rank=8 --beside lm
    python train.py --method vlorp --model DIR --data CHATS.jsonl --rank 1 --granularity 64
"""
import functools
import hashlib
import math
import weakref
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import distributed

from model import Method, flag, world_size

SCHEMES = ("projfactor", "subspace", "original")
BASES = ("normal", "rademacher", "svd")
AT_REFRESH = ("keep", "reset")


class ProjFactor(torch.optim.Optimizer):
    """AdamW whose matrices see only projections of their gradients.

    params: parameters or groups, as for any torch optimizer. Matrices of groups with a rank are
    projected; all else, and groups with rank None, gets plain AdamW.
    rank r and granularity c: m / c and n c must be integers, m the smaller side.
    betas, eps, weight_decay (decoupled): Adam's. proj_every [steps]: a new P; at_refresh keeps the
    old first moment, which is noise in the new basis for some ten steps, or resets it.
    basis: normal or rademacher; svd takes the r leading right singular vectors of the window's
    first micro-batch and stores them (with scheme subspace that is GaLore, arXiv:2403.03507).
    scheme: projfactor; subspace keeps both moments projected; original keeps both in full size.
    max_norm clips the norm of all gradients, of projected ones that of their projection.

    After step(), `norm` is the gradients' norm; a step that is not finite is skipped. Several
    processes average projections: n M numbers instead of n m. Raises ValueError naming a shape
    that does not fit. Source: arXiv:2505.01744 and its released code (eps outside the root);
    weight decay comes before the update here, after it there."""

    def __init__(self, params, lr=1e-4, rank=1, granularity=64, betas=(0.9, 0.999), eps=1e-6,
                 weight_decay=0.0, proj_every=200, seed=0, basis="normal", scheme="projfactor",
                 at_refresh="keep", max_norm=None):
        self.max_norm, self.norm, self.index = max_norm, 0.0, {}
        defaults = dict(lr=lr, rank=rank, granularity=granularity, betas=betas, eps=eps,
                        weight_decay=weight_decay, proj_every=proj_every, seed=seed, basis=basis,
                        scheme=scheme, at_refresh=at_refresh)
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        """As torch's; __init__ adds its groups by it."""
        super().add_param_group(param_group)
        group, take = self.param_groups[-1], weakref.WeakMethod(self.take)
        choices = {"basis": BASES, "scheme": SCHEMES, "at_refresh": AT_REFRESH}
        for name, allowed in choices.items():
            if group[name] not in allowed:
                raise ValueError(f"{name} {group[name]!r}: one of {', '.join(allowed)}")

        def project_and_free(p):  # must not keep a deleted optimizer alive
            if take() is not None:
                take()(p)
        for p in group["params"]:
            self.index[p] = len(self.index), len(self.param_groups) - 1
            if projected(p, group):
                view_shape(p, group)  # refuses what does not fit
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(project_and_free)

    @torch.no_grad()
    def take(self, p):
        """Project p.grad, add it to what this step has of it so far, and free it."""
        group, state = self.param_groups[self.index[p][1]], self.state[p]
        if group["basis"] == "svd" and "sum" not in state and self.refreshes(p, group):
            units = as_units(p.grad, group)
            state["basis"] = leading_directions(units if is_tall(p) else units.T, group["rank"])
        small = project(p.grad, self.projection(p, group, self.steps(p)), group)
        state["sum"] = state["sum"].add_(small) if "sum" in state else small
        p.grad = None

    def steps(self, p) -> int:
        return int(self.state[p].get("step", 0))

    def refreshes(self, p, group) -> bool:
        """Does a new P begin with this step?"""
        return self.steps(p) % group["proj_every"] == 0

    def projection(self, p, group, step):
        """P (m / c, r) of a step: the same on every machine and device, or the stored one."""
        if group["basis"] == "svd":
            return self.state[p]["basis"]
        text = f"{group['seed']} {step // group['proj_every']} {self.index[p][0]}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        rng = torch.Generator().manual_seed(seed)
        shape = view_shape(p, group)[1], group["rank"]
        if group["basis"] == "normal":
            draw = torch.randn(shape, generator=rng)
        else:
            draw = torch.randint(2, shape, generator=rng).mul_(2).sub_(1).float()
        return draw.mul_(group["rank"] ** -0.5).to(p.device, wide(p))

    @torch.no_grad()
    def step(self, closure=None):
        """One update from all that came since the last one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {}
        for group in self.param_groups:
            for p in group["params"]:
                small = projected(p, group)
                if small and p.grad is not None:  # not from a backward pass
                    self.take(p)
                grad = self.state[p].pop("sum", None) if small else p.grad
                if grad is None:
                    continue
                if small and world_size() > 1:  # what is not projected is averaged by the caller
                    distributed.all_reduce(grad)
                    grad /= world_size()
                gradients[p] = grad
        norms = [grad.float().norm() for grad in gradients.values()]
        self.norm = torch.stack(norms).norm().item() if norms else 0.0
        if not math.isfinite(self.norm):
            return loss
        scale = min(1.0, self.max_norm / (self.norm + 1e-6)) if self.max_norm else 1.0
        for p, grad in gradients.items():
            group = self.param_groups[self.index[p][1]]
            if group["weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            update = self.projected_update if projected(p, group) else self.plain_update
            update(p, group, grad.to(wide(p)) * scale)
            self.state[p]["step"] += 1
        return loss

    def projected_update(self, p, group, small):
        """Update a matrix and its state by the projection `small` of its gradient."""
        state, (b1, b2), eps = self.state[p], group["betas"], group["eps"]
        basis, t = self.projection(p, group, self.steps(p)), self.steps(p) + 1
        refreshed = t > 1 and self.refreshes(p, group)
        rate = group["lr"] * math.sqrt(1 - b2 ** t) / (1 - b1 ** t)
        state.setdefault("step", torch.zeros(()))
        if group["scheme"] == "original":
            full = torch.cat([block for _, block in estimate(small, basis, p)])
            m, v = moments(state, full, b1, b2)
            return descend(p, rate, m, v.sqrt().add_(eps))
        if refreshed and group["at_refresh"] == "reset":
            state["m"].zero_()
        if group["scheme"] == "subspace":
            m, v = moments(state, small, b1, b2)
            for rows, block in estimate(m / (v.sqrt() + eps), basis, p):
                p[rows].sub_(block.to(p.dtype), alpha=rate)
            return
        row, column = small.new_empty(len(p)), small.new_zeros(p.shape[1])
        for rows, block in estimate(small, basis, p):
            block.square_()
            row[rows] = block.sum(1)
            column += block.sum(0)
        for name, sums in (("row", row), ("column", column)):
            running(state, name, sums).lerp_(sums, 1 - b2)
        m = running(state, "m", small).lerp_(small, 1 - b1)
        row = (state["row"] / state["row"].sum().clamp_min(1e-30)).sqrt()
        column = state["column"].sqrt()
        floor = torch.full_like(column, eps)
        for rows, block in estimate(m, basis, p):  # sqrt(V) + eps = sqrt(R / sum R) sqrt(C)^T + eps
            descend(p[rows], rate, block, torch.addr(floor, row[rows], column))

    def plain_update(self, p, group, grad):
        """AdamW (arXiv:1711.05101)."""
        state, (b1, b2), t = self.state[p], group["betas"], self.steps(p) + 1
        state.setdefault("step", torch.zeros(()))
        m, v = moments(state, grad, b1, b2)
        root = (v / (1 - b2 ** t)).sqrt_().add_(group["eps"])
        descend(p, group["lr"] / (1 - b1 ** t), m, root)

    def zero_grad(self, set_to_none=True):
        """Forget this step's gradients, the projected sums too."""
        super().zero_grad(set_to_none)
        for state in self.state.values():
            state.pop("sum", None)

    def load_state_dict(self, state_dict):
        """As torch does, but float32 state of bfloat16 parameters stays float32."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for i, values in state_dict["state"].items():
            p = params[i]
            copies = {k: v.clone() if k == "step" else v.to(p.device, copy=True)
                      for k, v in values.items()}
            self.state[p] = copies


def state_bytes(optimizer) -> int:
    """Bytes of an optimizer's state, but for its counts of steps."""
    tensors = [x for state in optimizer.state.values() for k, x in state.items() if k != "step"]
    return sum(x.nbytes for x in tensors)


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
    m, v = running(state, "m", g), running(state, "v", g)
    return m.lerp_(g, 1 - b1), v.mul_(b2).addcmul_(g, g, value=1 - b2)


def descend(p, rate, numerator, denominator):
    """p <- p - rate numerator / denominator, in one pass where the dtypes allow."""
    if p.dtype == numerator.dtype:
        p.addcdiv_(numerator, denominator, value=-rate)
    else:
        p.sub_((numerator / denominator).to(p.dtype), alpha=rate)


# --- views of a gradient -------------------------------------------------------------------------

def is_tall(p) -> bool:
    return p.shape[0] >= p.shape[1]


def view_shape(p, group):
    """(n c, m / c) of a matrix (n, m) or (m, n), m <= n. Raises ValueError if not integers."""
    return units_of(tuple(p.shape), group["granularity"], group["rank"], group["basis"])


@functools.lru_cache(maxsize=1024)  # asked for several times a step and matrix
def units_of(shape, granularity, r, basis):
    n, m, c = max(shape), min(shape), Fraction(granularity).limit_denominator(10 ** 6)
    if c <= 0 or r < 1 or (m / c).denominator != 1 or (n * c).denominator != 1:
        raise ValueError(f"a matrix of shape {shape} cannot be projected with rank {r} and "
                         f"granularity {c}: {m} / {c} and {n} * {c} must be integers")
    if basis == "svd" and r > min(m / c, n * c):
        raise ValueError(f"a matrix of shape {shape} has fewer than {r} singular vectors at "
                         f"granularity {c}")
    return int(n * c), int(m / c)


def as_units(grad, group):
    """G with the m / c numbers that are projected together in a row; of a wide G in a column."""
    n_units, width = view_shape(grad, group)
    return grad.to(wide(grad)).reshape((n_units, width) if is_tall(grad) else (width, n_units))


def project(grad, basis, group):
    """Gs (n c, r) of a tall gradient, (r, n c) of a wide one."""
    units = as_units(grad, group)
    return units @ basis if is_tall(grad) else basis.T @ units


BLOCK = 2 ** 18  # numbers of an estimate at a time: they stay in the processor's cache


def estimate(small, basis, p):
    """Go a block of rows at a time: yields (slice of p's rows, estimate of these rows)."""
    left, right = (small, basis.T) if is_tall(p) else (basis, small)
    whole = len(p) // math.gcd(len(p), len(left))  # so many rows of p are whole rows of left
    step = whole * max(1, BLOCK // (whole * p.shape[1]))  # and a block has a multiple of them
    for start in range(0, len(p), step):
        end = min(start + step, len(p))
        part = left[start * len(left) // len(p):end * len(left) // len(p)]
        yield slice(start, end), (part @ right).view(-1, p.shape[1])


def leading_directions(rows, r):
    """The r leading right singular vectors of rows (N, k), summed over processes: (k, r). From the
    smaller Gram matrix: a full SVD takes several times as long."""
    rows = rows.nan_to_num(0.0, 0.0, 0.0)  # such a step is skipped later, but must get there
    if world_size() > 1:
        distributed.all_reduce(rows)
    if rows.shape[0] >= rows.shape[1]:
        basis = torch.linalg.eigh(rows.T @ rows)[1][:, -r:]
    else:
        left = torch.linalg.eigh(rows @ rows.T)[1][:, -r:]
        basis = torch.linalg.qr(rows.T @ left)[0]
    basis = basis.contiguous()
    if world_size() > 1:
        distributed.broadcast(basis, 0)
    return basis


# --- the method ----------------------------------------------------------------------------------

class VLoRP(Method):
    """Language modelling by ProjFactor: matrices of the layers projected, all else by AdamW."""

    shard = False  # every process keeps all weights and averages projections

    @dataclass
    class Config:
        rank: int = flag(1, "rank r of each projected row; granularity * rank is stored", least=1)
        granularity: float = flag(64.0, "pieces that a row is cut into; 0.25 glues four", least=0)
        proj_every: int = flag(30, "steps between two draws of the projections", least=1)
        basis: str = flag("normal", "of the projections", choices=BASES)
        scheme: str = flag("projfactor", "what of the moments is projected", choices=SCHEMES)
        at_refresh: str = flag("keep", "the first moment at a new draw", choices=AT_REFRESH)

    @classmethod
    def defaults(cls, args, config):
        return dict(weight_decay=0.0, warmup=0.0)

    def param_groups(self, model, args):
        inside = [p for p in model.model.layers.parameters() if p.dim() == 2]
        known = {id(p) for p in inside}
        rest = [p for p in model.parameters() if id(p) not in known]
        return [dict(params=inside, weight_decay=args.weight_decay, lr=args.lr),
                dict(params=rest, rank=None, weight_decay=0.0, lr=args.lr)]

    def optimizer(self, groups, args):
        c = self.config
        return ProjFactor(groups, args.lr, c.rank, c.granularity, proj_every=c.proj_every,
                          seed=args.seed, basis=c.basis, scheme=c.scheme, at_refresh=c.at_refresh)

    def update(self, optimizer, max_norm):
        """Its gradients are projections by now: the optimizer clips them itself."""
        optimizer.max_norm = max_norm
        optimizer.step()
        return optimizer.norm
