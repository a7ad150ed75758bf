"""Two-stage regression of Hamiltonians: first covariant, then expressive.

Each atom i of a molecule has shells of 2 a + 1 orbitals. If the molecule is turned by R, so is the
block of every two shells:
    H_ij^{ab} -> D^a(R) H_ij^{ab} D^b(R)^T.

Stage 1 obeys this by construction. Atoms have features x_i^a of 2 a + 1 numbers a channel, and
gather what their neighbours have and where they are, by Clebsch-Gordan products with harmonics:
    x_i^c += sum_j w_abc(|r_ij|) (x_j^a * Y^b(r_ij))^c.
Pairs of atoms do the same, and linear maps of a pair's features are the parts of its blocks, which
have degrees |a - b| .. a + b. Only gates are not linear in what turns: this limits the stage.

Stage 2 corrects it: a graph Transformer over each molecule's atoms, whose attention falls with the
distance as exp(-s |r_i - r_j|^2), with any non-linearity.
  free    (the paper) reads stage 1's features as numbers: that it is covariant is learnt, not given
  strict  (ours) reads what no turn changes, and weighs stage 1's features: covariant

Paper: "Towards Harmonization of SO(3)-Equivariance and Expressiveness", arXiv:2401.00744, of which
only the idea is taken: sizes, losses and data are ours. Does stage 2 help? See results/.

    python train.py --method hamiltonian                        # embedded: tight-binding clusters
    python train.py --method hamiltonian --data results/molecules.safetensors
    python hamiltonian.py --model out/hamiltonian --data FILE   # errors on another file
"""
import functools
import itertools
import json
import os
from dataclasses import dataclass
from math import factorial, pi
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.polynomial import Polynomial
from safetensors import SafetensorError, safe_open
from torch import nn

from attention_triton import attention
from model import (LlamaConfig, Method, Trunk, assign, flag, init_matrices, join, parse, read_json,
                   read_weights, run, shuffled, to_device, warmup_cosine, write_json, write_tensors)

# --- turns ---------------------------------------------------------------------------------------

def harmonics(l, u):
    """Real spherical harmonics (..., 2 l + 1) of unit vectors u (..., 3), orders m = -l .. l, mean
    square 1 over the sphere: for l = 1 sqrt(3) (y, z, x)."""
    x, y, z = u.unbind(-1)
    columns, plane = [], torch.complex(x, y)
    legendre = Polynomial([-1, 0, 1]) ** l / (2 ** l * factorial(l))  # (z^2 - 1)^l / 2^l l!
    for m in range(-l, l + 1):
        k = abs(m)
        coefficients = legendre.deriv(l + k).coef.tolist()
        polar = sum(c * z ** power for power, c in enumerate(coefficients))
        around = (plane ** k).imag if m < 0 else (plane ** k).real
        square = (2 * l + 1) * factorial(l - k) / factorial(l + k)
        norm = (2 * square if m else square) ** 0.5
        columns.append(norm * polar * around)
    return torch.stack(columns, -1)


def random_turns(n, rng):
    """Rotations (n, 3, 3), float64, every one equally likely. rng: a numpy Generator."""
    q, r = np.linalg.qr(rng.standard_normal((n, 3, 3)))
    q = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
    q[:, :, 0] *= np.sign(np.linalg.det(q))[:, None]
    return torch.from_numpy(q)


@functools.cache
def sampled(l):
    """(unit vectors, the pseudo-inverse of their harmonics)."""
    points = np.random.default_rng(0).standard_normal((8 * l + 4, 3))
    u = F.normalize(torch.from_numpy(points), dim=1)
    return u, torch.linalg.pinv(harmonics(l, u))


def wigner(l, R):
    """D (..., 2 l + 1, 2 l + 1), float64: harmonics(l, R u) = D harmonics(l, u), by least squares
    over some u. R (..., 3, 3): turns or mirrors."""
    u, inverse = sampled(l)
    R = torch.as_tensor(R, dtype=torch.float64)
    return (inverse @ harmonics(l, u @ R.mT)).mT


@functools.lru_cache(None)
def clebsch_gordan(a, b, c):
    """C (2a + 1, 2b + 1, 2c + 1), float64, which no turn changes: sum_ij C[i, j] x_i y_j turns as
    degree c if x and y do as a and b. C[:, :, k] are orthonormal. Raises ValueError unless
    |a - b| <= c <= a + b."""
    if not abs(a - b) <= c <= a + b:
        raise ValueError(f"degrees {a} and {b} have no product of degree {c}")
    shape, equations = (2 * a + 1, 2 * b + 1, 2 * c + 1), []
    for R in random_turns(3, np.random.default_rng(1)):
        turn = functools.reduce(torch.kron, (wigner(l, R) for l in (a, b, c)))
        equations.append(turn - torch.eye(len(turn)))
    _, size, vectors = torch.linalg.svd(torch.cat(equations), full_matrices=False)
    assert size[-1] < 1e-9 and (len(size) == 1 or size[-2] > 1e-3), "one solution"
    C = vectors[-1] * (2 * c + 1) ** 0.5
    largest = C.abs() > 0.999 * C.abs().max()  # the first of these is positive
    return (C * C[largest][0].sign()).view(shape)


# --- orbitals and blocks -------------------------------------------------------------------------

class Orbitals:
    """The shells of each species, in common slots: every pair of atoms has one (n, n) block, in
    which what a species lacks is 0. shells: {atomic number: [degree of each shell]}."""

    def __init__(self, shells):
        self.shells = {int(z): list(degrees) for z, degrees in shells.items()}
        self.species = sorted(self.shells)
        top, self.slots = max(map(max, self.shells.values())), []
        for l in range(top + 1):
            most = max(degrees.count(l) for degrees in self.shells.values())
            self.slots += [l] * most
        self.starts = np.cumsum([0] + [2 * l + 1 for l in self.slots]).tolist()
        self.n, self.degree = self.starts[-1], 2 * top  # the features' highest
        self.places = [self.place(self.shells[z]) for z in self.species]
        self.exists = torch.zeros(len(self.species), self.n, dtype=torch.bool)
        for row, places in zip(self.exists, self.places):
            row[places] = True

    def place(self, degrees) -> list:
        """Where in the slots a species' orbitals stand, in its own order."""
        found, used = [], set()
        for l in degrees:
            slot = next(s for s, d in enumerate(self.slots) if d == l and s not in used)
            used.add(slot)
            found += range(self.starts[slot], self.starts[slot + 1])
        return found

    def turn(self, R):
        """(..., n, n): how the slots of an atom turn with R (..., 3, 3)."""
        D = torch.zeros(*R.shape[:-2], self.n, self.n, dtype=torch.float64)
        for l, start, end in zip(self.slots, self.starts, self.starts[1:]):
            D[..., start:end, start:end] = wigner(l, R)
        return D

    def frames(self):
        """(parts (K, M, n, n), flips (K,)): parts[k, m] is component m of degree c in one pair of
        slots, m in c^2 .. (c + 1)^2 - 1 of M; flips[k] is 1 if it is odd beyond (-1)^c."""
        parts, flips = [], []
        for (s, a), (t, b) in itertools.product(enumerate(self.slots), repeat=2):
            rows, columns = (slice(self.starts[x], self.starts[x + 1]) for x in (s, t))
            for c in range(abs(a - b), a + b + 1):
                part = torch.zeros((self.degree + 1) ** 2, self.n, self.n)
                C = clebsch_gordan(a, b, c).permute(2, 0, 1)  # (2 c + 1, 2 a + 1, 2 b + 1)
                part[degree_slice(c), rows, columns] = C.float()
                parts.append(part)
                flips.append((a + b + c) % 2)
        return torch.stack(parts), torch.tensor(flips)


class Pairs(NamedTuple):
    """All ordered pairs of atoms of each molecule, an atom with itself too."""
    i: torch.Tensor  # (P,)
    j: torch.Tensor
    back: torch.Tensor  # the place of (j, i)

    @staticmethod
    def of(cu_seqlens):
        cu, parts, start = torch.as_tensor(cu_seqlens).tolist(), [], 0
        for a, b in zip(cu, cu[1:]):
            n = b - a
            places = torch.arange(n * n).view(n, n)
            each = torch.stack((places // n + a, places % n + a, places.T + start))
            parts.append(each.flatten(1))  # (3, n n)
            start += n * n
        device = cu_seqlens.device if torch.is_tensor(cu_seqlens) else "cpu"
        return Pairs(*torch.cat(parts, 1).to(device))


def matrices(blocks, species, cu_seqlens, orbitals) -> list:
    """The whole matrix (m, m) of each molecule, from blocks (P, n, n)."""
    lengths = torch.as_tensor(cu_seqlens).diff().tolist()
    each = zip(lengths, species.split(lengths), blocks.split([n * n for n in lengths]))
    found = []
    for n, kinds, part in each:
        full = part.unflatten(0, (n, n)).transpose(1, 2)  # (n, orbitals, n, orbitals)
        exists = orbitals.exists.to(kinds.device)[kinds].flatten()
        found.append(full.flatten(2).flatten(0, 1)[exists][:, exists])
    return found


# --- stage 1: covariant --------------------------------------------------------------------------
# Features are (..., 2, channels, M): even or odd under reflection beyond (-1)^degree, and degrees
# 0, 1, .. side by side, M = (degree + 1)^2.

def degree_slice(l):
    return slice(l * l, (l + 1) ** 2)


class Product(nn.Module):
    """Clebsch-Gordan products of features with harmonics, weighted by what no turn changes."""

    def __init__(self, degree, n_known, channels):
        super().__init__()
        self.degree = degree
        degrees = range(degree + 1)
        self.paths = [(a, b, c) for a, b, c in itertools.product(degrees, repeat=3)
                      if abs(a - b) <= c <= a + b]
        self.weights = nn.Sequential(nn.Linear(n_known, 32), nn.SiLU(),
                                     nn.Linear(32, len(self.paths) * channels))

    def forward(self, x, y, known):
        """x (E, 2, C, M), y (E, M), known (E, n_known) -> (E, 2, C, M)."""
        w = self.weights(known).unflatten(1, (len(self.paths), -1))  # (E, paths, C)
        found = [0.0] * (self.degree + 1)
        for p, (a, b, c) in enumerate(self.paths):
            C = clebsch_gordan(a, b, c).to(x)
            by_y = torch.einsum("en,mnk->emk", y[:, degree_slice(b)], C)
            step = x[..., degree_slice(a)].flatten(1, 2) @ by_y  # (E, 2 C, 2 c + 1)
            step = step.unflatten(1, (2, -1))
            step = step.flip(1) if (a + b + c) % 2 else step
            found[c] = found[c] + w[:, p, None, :, None] * step
        return torch.cat(found, -1)


class Mix(nn.Module):
    """A linear map of channels for each parity and degree; features of degree > 0 are gated by
    those of degree 0."""

    def __init__(self, degree, channels):
        super().__init__()
        self.degrees = [l for l in range(degree + 1) for _ in range(2 * l + 1)]
        self.weight = nn.Parameter(torch.empty(2, degree + 1, channels, channels))
        self.gates = nn.Linear(channels, 2 * (degree + 1) * channels)

    def forward(self, x):
        y = torch.einsum("npcm,pmcd->npdm", x, self.weight[:, self.degrees])
        gates = torch.sigmoid(self.gates(y[:, 0, :, 0]))  # of even scalars
        gates = gates.unflatten(1, (2, -1, x.shape[2]))[:, :, self.degrees]  # (N, 2, M, C)
        return y * gates.transpose(2, 3)


class Covariant(nn.Module):
    """Stage 1. Its blocks [units of the data] turn with the molecule; a reflection mirrors them."""

    def __init__(self, orbitals: Orbitals, channels=16, layers=2, reach=6.0, n_radial=8):
        """reach [positions' unit]: how far atoms see each other."""
        super().__init__()
        self.orbitals, self.reach, self.n_radial = orbitals, reach, n_radial
        self.settings = dict(channels=channels, layers=layers, reach=reach, n_radial=n_radial)
        n_species, degree = len(orbitals.species), orbitals.degree
        n_known = n_radial + 2 * n_species + 1
        self.embed = nn.Embedding(n_species, channels)
        self.gather = nn.ModuleList(Product(degree, n_known, channels) for _ in range(layers))
        self.mix = nn.ModuleList(Mix(degree, channels) for _ in range(layers))
        self.of_i, self.of_j = (Product(degree, n_known, channels) for _ in range(2))
        parts, flips = orbitals.frames()
        self.readout = nn.Parameter(torch.zeros(2 * n_species ** 2, len(parts), channels))
        self.register_buffer("parts", parts, persistent=False)
        self.register_buffer("flips", flips, persistent=False)
        self.register_buffer("exists", orbitals.exists, persistent=False)
        self.register_buffer("mean", torch.zeros(n_species, orbitals.n, orbitals.n))
        self.register_buffer("scale", torch.ones(()))

    def init_weights(self, seed):
        init_matrices(self, seed)
        rng = torch.Generator().manual_seed(seed + 1)
        for p in (self.readout, *(mix.weight for mix in self.mix)):
            nn.init.normal_(p, std=p.shape[-1] ** -0.5, generator=rng)
        return self

    def forward(self, positions, species, cu_seqlens):
        """Blocks (P, n, n), in the order of Pairs.of(cu_seqlens). positions (N, 3), species (N,):
        places in orbitals.species; cu_seqlens: the molecules' bounds."""
        return self.features(positions, species, cu_seqlens)[0]

    def features(self, positions, species, cu_seqlens):
        """(blocks, atoms (N, 2, C, M), pairs (P, 2, C, M), their Pairs, what is known of them)."""
        pairs = Pairs.of(cu_seqlens)
        y, known = self.geometry(positions, species, pairs)
        x = self.start(species)
        near = (pairs.i != pairs.j).nonzero()[:, 0]
        for gather, mix in zip(self.gather, self.mix):
            messages = gather(x[pairs.j[near]], y[near], known[near])
            gathered = torch.zeros_like(x).index_add(0, pairs.i[near], messages)
            x = x + mix(x + gathered)
        edges = self.of_i(x[pairs.i], y, known) + self.of_j(x[pairs.j], y, known)
        kinds = self.kinds(species, pairs)
        blocks = self.blocks(edges, self.readout[kinds], species, pairs)
        is_self = (pairs.i == pairs.j)[:, None, None]
        return blocks + is_self * self.mean[species[pairs.i]], x, edges, pairs, known

    def start(self, species):
        x = self.embed(species)  # (N, C)
        others = x.new_zeros(*x.shape, (self.orbitals.degree + 1) ** 2 - 1)
        even = torch.cat((x[..., None], others), -1)  # (N, C, M)
        return torch.stack((even, torch.zeros_like(even)), 1)

    def geometry(self, positions, species, pairs):
        """(harmonics (P, M), which fade at `reach`; what no turn changes (P, n_known)) of pairs."""
        between = positions[pairs.j] - positions[pairs.i]
        is_self = pairs.i == pairs.j
        distance = (between.square().sum(1) + is_self).sqrt()  # 1 for an atom itself
        u = between / distance[:, None]
        fade = 0.5 + 0.5 * torch.cos(pi * (distance / self.reach).clamp(max=1.0))
        y = torch.cat([harmonics(l, u) for l in range(self.orbitals.degree + 1)], 1) * fade[:, None]
        nowhere = F.one_hot(torch.zeros_like(pairs.i), y.shape[1]).to(y)  # no direction: degree 0
        y = torch.where(is_self[:, None], nowhere, y)
        centres = torch.linspace(0.5, self.reach, self.n_radial, device=positions.device)
        radial = torch.exp(-((distance[:, None] - centres) * self.n_radial / self.reach) ** 2)
        kinds = F.one_hot(species, len(self.orbitals.species))
        self_too = is_self[:, None]
        known = (radial * ~self_too, kinds[pairs.i], kinds[pairs.j], self_too)
        return y, torch.cat(known, 1).to(y.dtype)

    def kinds(self, species, pairs):
        """A number for each pair: its species, and whether it is one atom."""
        n = len(self.orbitals.species)
        is_self = (pairs.i == pairs.j).long()
        return (is_self * n + species[pairs.i]) * n + species[pairs.j]

    def blocks(self, edges, weights, species, pairs):
        """Blocks (P, n, n) of the pairs' features by weights (P, K, C); hermitian."""
        parities = edges[:, self.flips]  # (P, K, C, M)
        parts = torch.einsum("pkc,pkcm->pkm", weights, parities) / weights.shape[2] ** 0.5
        blocks = torch.einsum("pkm,kmab->pab", parts, self.parts)
        blocks = (blocks + blocks[pairs.back].transpose(1, 2)) / 2
        return self.scale * blocks * self.there(species, pairs)

    def there(self, species, pairs):
        """bool (P, n, n): where both atoms have the orbital."""
        exists = self.exists[species]  # (N, n)
        return exists[pairs.i].unsqueeze(2) & exists[pairs.j].unsqueeze(1)


# --- stage 2: a graph Transformer ----------------------------------------------------------------

def attention_by_distance(q, k, v, positions, sharpness, cu):
    """Attention inside molecules with scores lowered by sharpness (n_head,) |r_i - r_j|^2, by the
    plain one: q' = (q, 2 s r, -s |r|^2, -s), k' = (k, r, 1, |r|^2), where s = sharpness sqrt(D),
    because scores are divided by sqrt(D). q, k, v (N, n_head, D)."""
    n, n_head, D = q.shape
    s = sharpness[:, None] * D ** 0.5
    r = positions[:, None].expand(n, n_head, 3)
    square, one = r.square().sum(-1, keepdim=True), torch.ones_like(r[..., :1])
    q = torch.cat((q, 2 * s * r, -s * square, -s * one), -1)
    k = torch.cat((k, r, one, square), -1)
    width = 1 << (D + 4).bit_length()  # kernels want a power of 2, here of at least D + 5
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return attention(q, k, v, cu, cu, causal=False, scale=D ** -0.5)[..., :D]


class GraphTransformer(nn.Module):
    """Stage 2 on a stage 1: its blocks corrected. At the start the correction is 0."""

    def __init__(self, first: Covariant, strict=False, joint=True, n_embd=64, layers=2, heads=4):
        """joint: stage 1 is trained on with stage 2."""
        super().__init__()
        self.first, self.strict, self.joint = first, strict, joint
        orbitals, channels = first.orbitals, first.settings["channels"]
        self.settings = dict(strict=strict, joint=joint, n_embd=n_embd, layers=layers, heads=heads)
        width = 2 * channels * (orbitals.degree + 1 if strict else (orbitals.degree + 1) ** 2)
        self.trunk = Trunk(LlamaConfig(len(orbitals.species), layers, heads, heads, n_embd,
                                       3 * n_embd, n_embd // heads))
        self.sharpness = nn.Parameter(torch.full((layers, heads), -3.0))  # its logarithm
        self.read = nn.Linear(width, n_embd)
        n_known = first.n_radial + 2 * len(orbitals.species) + 1
        n_out = len(first.parts) * channels if strict else orbitals.n ** 2
        n_in = 2 * n_embd + width + n_known + (0 if strict else orbitals.n ** 2 + 3)
        self.pair = nn.Sequential(nn.Linear(n_in, 2 * n_embd), nn.SiLU(),
                                  nn.Linear(2 * n_embd, n_out))

    def init_weights(self, seed):
        self.first.init_weights(seed)
        for part in (self.trunk, self.read, self.pair):
            init_matrices(part, seed)
        nn.init.zeros_(self.pair[2].weight)
        return self

    def forward(self, positions, species, cu_seqlens):
        """Blocks (P, n, n), as Covariant's."""
        with torch.set_grad_enabled(self.joint and torch.is_grad_enabled()):
            blocks, atoms, edges, pairs, known = self.first.features(positions, species, cu_seqlens)
        numbers = self.invariants if self.strict else (lambda x: x.flatten(1))
        states = self.attended(numbers(atoms), positions, species, cu_seqlens)
        about = [states[pairs.i], states[pairs.j], numbers(edges), known]
        if self.strict:
            weights = self.pair(torch.cat(about, 1)).unflatten(1, (len(self.first.parts), -1))
            return blocks + self.first.blocks(edges, weights, species, pairs)
        between = positions[pairs.j] - positions[pairs.i]
        about += [blocks.flatten(1) / self.first.scale, between]
        more = self.pair(torch.cat(about, 1)).view_as(blocks)
        more = (more + more[pairs.back].transpose(1, 2)) / 2
        return blocks + self.first.scale * more * self.first.there(species, pairs)

    def invariants(self, x):
        """What no turn or mirror changes: each channel's norm, (.., 2 C (degree + 1))."""
        norms = [(x[..., degree_slice(l)].square().sum(-1) + 1e-6).sqrt()
                 for l in range(self.first.orbitals.degree + 1)]
        return torch.cat(norms, -1).flatten(1)

    def attended(self, numbers, positions, species, cu_seqlens):
        cu = torch.as_tensor(cu_seqlens).tolist()
        lengths = torch.tensor(cu, device=positions.device).diff()
        molecule = torch.arange(len(lengths), device=positions.device).repeat_interleave(lengths)
        sums = positions.new_zeros(len(lengths), 3).index_add(0, molecule, positions)
        centred = positions - (sums / lengths[:, None])[molecule]

        def attend(layer, q, k, v):
            s = self.sharpness[layer].exp()
            return attention_by_distance(q, k, v, centred, s, cu)
        x = self.trunk.embed_tokens(species) + self.read(numbers)
        nowhere = torch.zeros(len(x), dtype=torch.long, device=x.device)  # RoPE turns nothing
        return self.trunk(x, attend, nowhere)


# --- data ----------------------------------------------------------------------------------------

class Structures(NamedTuple):
    """A Batch of molecules: species (N,) as `tokens`, bounds cu_seqlens, positions (N, 3), blocks
    of H and of the overlap S (P, n, n), occupied orbitals n_occupied (B,)."""
    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    positions: torch.Tensor
    blocks: torch.Tensor
    overlap: torch.Tensor
    n_occupied: torch.Tensor

    def turned(self, orbitals, rng):
        """(each molecule turned at random, with its blocks; how the blocks of each pair turned,
        (P, n, n))."""
        pairs, cu = Pairs.of(self.cu_seqlens), self.cu_seqlens.tolist()
        R = random_turns(len(cu) - 1, rng)
        D = orbitals.turn(R).float().to(self.blocks.device)
        molecule = torch.arange(len(R)).repeat_interleave(self.cu_seqlens.diff().cpu())
        of_pair = molecule[pairs.i.cpu()]
        R = R.float().to(self.positions.device)
        positions = torch.einsum("nab,nb->na", R[molecule], self.positions)
        blocks, overlap = (D[of_pair] @ x @ D[of_pair].transpose(1, 2)
                           for x in (self.blocks, self.overlap))
        return self._replace(positions=positions, blocks=blocks, overlap=overlap), D[of_pair]


class Molecules:
    """Molecules with their Hamiltonians, in memory; a random n_held_out of them are held out."""

    vocab_size, unit = None, "molecules"

    def __init__(self, orbitals, molecules, n_seq, n_held_out, seed):
        """molecules: [Structures of one]."""
        order = np.random.default_rng((seed, 7)).permutation(len(molecules))
        self.orbitals, self.n_seq, self.seed = orbitals, n_seq, seed
        self.train = [molecules[i] for i in order[n_held_out:]]
        self.test = pack([molecules[i] for i in order[:n_held_out]])

    def batch(self, i, n_train=None):
        """Of the first n_train molecules."""
        n, places = n_train or len(self.train), range(i * self.n_seq, (i + 1) * self.n_seq)
        return pack([self.train[shuffled(j, n, self.seed)] for j in places])


def pack(molecules) -> Structures:
    lengths = torch.tensor([0] + [len(m.tokens) for m in molecules])
    parts = [torch.cat(x) for x in zip(*molecules)]
    return Structures(*parts)._replace(cu_seqlens=lengths.cumsum(0))


def molecule(orbitals, species, positions, h, s, n_occupied) -> Structures:
    """One molecule of whole matrices h, s (m, m), its orbitals atom by atom in the slots' order."""
    n, where = len(species), []
    for i, kind in enumerate(species.tolist()):
        where += [i * orbitals.n + place for place in orbitals.places[kind]]
    found = []
    for matrix in (h, s):
        full = torch.zeros(n * orbitals.n, n * orbitals.n, dtype=matrix.dtype)
        full[torch.tensor(where)[:, None], torch.tensor(where)] = matrix
        blocks = full.view(n, orbitals.n, n, orbitals.n).transpose(1, 2)
        found.append(blocks.reshape(n * n, orbitals.n, orbitals.n).float())
    return Structures(species, torch.tensor([0, n]), positions.float(), *found,
                      torch.tensor([n_occupied]))


ORDERS = {"yzx": [0, 1, 2], "xyz": [1, 2, 0]}  # where a file's l = 1 has y, z, x


def read_molecules(path):
    """(Orbitals, [Structures]) of a safetensors file. Its tensors: species (N,), atomic numbers;
    positions (N, 3) [Angstrom]; cu_seqlens; n_occupied (B,); h and s, the upper triangles of each
    molecule's matrices, row by row [eV]; its metadata: shells {"8": [0, 0, 1], ..}, the degrees of
    each atom's orbitals, and order, in which it has those of l = 1 (higher ones as harmonics has
    them, m = -l .. l). If rotation (3, 3) is there, the last molecule is the first one so turned,
    and must have its blocks so turned.

    Raises ValueError for what does not fit."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        orbitals = Orbitals(json.loads(about["shells"]))
        order, cu = ORDERS[about["order"]], tensors["cu_seqlens"].tolist()
        numbers, positions = tensors["species"].tolist(), tensors["positions"]
        h, s, n_occupied = tensors["h"].double(), tensors["s"].double(), tensors["n_occupied"]
        kinds = torch.tensor([orbitals.species.index(z) for z in numbers])
    except (KeyError, ValueError, TypeError, SafetensorError) as e:
        raise ValueError(f"{path}: not a file of molecules ({type(e).__name__}: {e})") from None
    shapes = positions.shape, kinds.shape, n_occupied.shape
    if shapes != ((cu[-1], 3), (cu[-1],), (len(cu) - 1,)):
        raise ValueError(f"{path}: cu_seqlens, species, positions and n_occupied do not fit")
    molecules, start = [], 0
    for b, (first, last) in enumerate(zip(cu, cu[1:])):
        places = ours_in_file(numbers[first:last], orbitals, order)
        end = start + len(places) * (len(places) + 1) // 2
        if end > len(h):
            raise ValueError(f"{path}: molecule {b} has {len(places)} orbitals, more than its "
                             "matrix")
        whole = [unpacked(x[start:end], len(places))[places][:, places] for x in (h, s)]
        molecules.append(molecule(orbitals, kinds[first:last], positions[first:last], *whole,
                                  int(n_occupied[b])))
        start = end
    if not start == len(h) == len(s) or not torch.cat((h, s)).isfinite().all():
        raise ValueError(f"{path}: its shells have {start} numbers, h {len(h)} and s {len(s)}, all "
                         "of which must be finite")
    if "rotation" in tensors:
        check_turned(molecules[0], molecules.pop(), orbitals, tensors["rotation"], path)
    return orbitals, molecules


def ours_in_file(numbers, orbitals, order) -> list:
    """Where a file has each orbital of a molecule, those of l = 1 being y, z, x."""
    places, at = [], 0
    for l in (l for z in numbers for l in orbitals.shells[z]):
        places += [at + x for x in (order if l == 1 else range(2 * l + 1))]
        at += 2 * l + 1
    return places


def unpacked(triangle, m):
    """The symmetric matrix (m, m) of its upper triangle, row by row."""
    matrix, (i, j) = triangle.new_zeros(m, m), torch.triu_indices(m, m)
    matrix[i, j] = matrix[j, i] = triangle
    return matrix


def check_turned(one, other, orbitals, R, path):
    """Are H and S of a molecule that was computed again, turned, those of the first one turned?"""
    D = orbitals.turn(R).float()
    for name in ("blocks", "overlap"):
        want, got = D @ getattr(one, name) @ D.T, getattr(other, name)
        error = ((want - got).abs().max() / want.abs().max()).item()
        if error > 1e-5:  # float32 keeps 6e-8
            raise ValueError(f"{path}: {name} do not turn with the molecule (error {error:.1e} of "
                             "the largest): is the order of orbitals as it says?")


class TightBinding:
    """Clusters of five atoms of two species with an s and a p shell, whose Hamiltonian is made by
    rules (Slater and Koster's two-centre integrals, which its neighbours screen)."""

    orbitals = Orbitals({1: [0, 1], 2: [0, 1]})
    onsite = np.array([[-8.0, -2.0], [-6.0, 0.5]])  # s, p of each species [eV]
    strength = np.array([[-1.4, 1.8, 2.2, -0.7], [-1.2, 1.5, 1.9, -0.6], [-1.0, 1.3, 1.6, -0.5]])

    def __init__(self, n, seed):
        rng = np.random.default_rng((seed, 11))
        self.molecules = []
        for _ in range(n):
            positions, species = self.cluster(rng), rng.integers(2, size=5)
            h = torch.from_numpy(self.matrix(positions, species))
            s = torch.eye(len(h), dtype=h.dtype)
            self.molecules.append(molecule(self.orbitals, torch.from_numpy(species),
                                           torch.from_numpy(positions), h, s, 10))

    @staticmethod
    def cluster(rng, n=5, size=2.2, least=1.5):
        """Positions (n, 3) [Angstrom], no two nearer than `least`."""
        while True:
            positions = rng.uniform(-size, size, (n, 3))
            apart = np.linalg.norm(positions[:, None] - positions, axis=2) + 9 * np.eye(n)
            if apart.min() > least:
                return positions

    def matrix(self, positions, species):
        """H (4 n, 4 n) [eV], orbitals s, y, z, x of each atom; symmetric, and turns with it."""
        n, between = len(positions), positions - positions[:, None]
        r = np.linalg.norm(between, axis=2) + np.eye(n)
        u = (between / r[..., None])[..., [1, 2, 0]]  # from i to j, as y, z, x
        others = 1 - np.eye(n)
        smooth = 0.5 + 0.5 * np.cos(np.pi * np.minimum(r / 5.0, 1))
        near = np.exp(-r / 1.2) * others  # how much atoms crowd each other
        crowd = near.sum(1)
        screen = np.einsum("ik,jk->ij", near, near) * 8  # a third atom near both
        f = np.exp(-(r - 1.8) / 0.9) * smooth * others * (1 - np.tanh(screen))
        f = f * (1 + 0.5 * np.tanh(crowd[:, None] + crowd - 1.5))
        strength = self.strength[species[:, None] + species]  # (n, n, 4)
        ss, sp, pp_sigma, pp_pi = np.moveaxis(strength, 2, 0) * f
        h = np.zeros((n, 4, n, 4))
        h[:, 0, :, 0] = ss
        h[:, 0, :, 1:] = sp[..., None] * u
        h[:, 1:, :, 0] = -(sp[..., None] * u).transpose(0, 2, 1)
        along = u[..., :, None] * u[..., None, :]  # (i, j, 3, 3)
        across = np.eye(3) - along
        p = pp_sigma[..., None, None] * along + pp_pi[..., None, None] * across
        h[:, 1:, :, 1:] = p.transpose(0, 2, 1, 3)
        for i, (s_level, p_level) in enumerate(self.onsite[species]):
            field = np.einsum("j,ja->a", np.tanh(near[i]), u[i]) / (1 + crowd[i])
            tensor = np.einsum("j,ja,jb->ab", near[i], u[i], u[i]) / (1 + crowd[i])
            p_level += 0.5 * np.tanh(2 * crowd[i])
            h[i, 0, i, 0] = s_level + np.tanh(crowd[i])
            h[i, 0, i, 1:] = h[i, 1:, i, 0] = 0.8 * field  # mixes s and p
            h[i, 1:, i, 1:] = p_level * np.eye(3) + tensor
        return h.reshape(4 * n, 4 * n)


# --- the technique -------------------------------------------------------------------------------

class TwoStage(Method):
    """Stage 1 alone for the first steps, then stage 2 on it. Each stage has its own warm-up and
    cosine. With stages=1 the schedule restarts too, so that it is a fair control."""

    shard = False

    @dataclass
    class Config:
        stages: int = flag(2, "1: the covariant stage alone, for all steps", choices=(1, 2))
        strict: bool = flag(False, "stage 2 covariant by construction")
        joint: bool = flag(True, "train stage 1 on while stage 2 is trained")
        first: float = flag(0.6, "share of the steps that train stage 1 alone", least=0)
        channels: int = flag(16, "of stage 1", least=1)
        reach: float = flag(6.0, "how far atoms see each other [Angstrom]", least=0.1)
        turn: bool = flag(True, "turn every molecule at random while training")
        n_train: int | None = flag(None, "molecules to learn (default: all that are not held out)",
                                   least=1)

    @classmethod
    def defaults(cls, args, config):
        control = None if config.stages == 1 or args.beside else ["hamiltonian:stages=1"]
        return dict(data="clusters", seq_len=8, batch=16, steps=1000, lr=5e-3, min_lr=0.01,
                    warmup=0.05, weight_decay=0.0, eval_seqs=100, beside=control,
                    from_scratch=True)

    @classmethod
    def data(cls, args, config, tokenizer, rows):
        if args.model:
            raise ValueError("--method hamiltonian has no --model: it begins anew")
        if args.dtype != "float32" or args.rope_base or args.seq_parallel > 1:
            raise ValueError("--method hamiltonian takes no --dtype, --rope_base, --seq_parallel")
        if config.stages > 1 and config.first >= 1:
            raise ValueError("--first must be below 1: stage 2 is to be trained")
        orbitals, molecules = molecules_of(args.data, args.seed)
        left = len(molecules) - args.eval_seqs
        if left < (config.n_train or 1):
            raise ValueError(f"{len(molecules)} molecules are too few to hold {args.eval_seqs} out "
                             f"and learn {config.n_train or 1}")
        return Molecules(orbitals, molecules, args.batch, args.eval_seqs, args.seed)

    @classmethod
    def load(cls, args, config):
        data = cls.data(args, config, None, None)
        model = Covariant(data.orbitals, config.channels, reach=config.reach)
        if config.stages > 1:
            model = GraphTransformer(model, config.strict, config.joint)
        model.init_weights(args.seed)
        set_scale(first_stage(model), pack(data.train[:config.n_train]))
        return model

    def __init__(self, model, config, seed=0):
        nn.Module.__init__(self)
        self.config, self.orbitals, self.seed = config, first_stage(model).orbitals, seed

    def switch(self, steps):
        """The step at which stage 2 begins."""
        return round(self.config.first * steps)

    def lr_scale(self, step, steps, args):
        switch = self.switch(steps)
        if step < switch:
            return warmup_cosine(step, switch, args.warmup, args.min_lr)
        return warmup_cosine(step - switch, steps - switch, args.warmup, args.min_lr)

    def batch(self, data, i, step, steps):
        batch = data.batch(i, self.config.n_train)
        if self.config.turn:
            batch, _ = batch.turned(self.orbitals, np.random.default_rng((data.seed, i, 5)))
        return batch

    def weight(self, batch):
        return float(len(batch.blocks))

    def loss(self, model, batch, step, steps):
        """Mean absolute error and root of the mean square, in units of H's deviation."""
        first = first_stage(model)
        trained = first if step < self.switch(steps) else model
        blocks = trained(batch.positions, batch.tokens, batch.cu_seqlens)
        error = (blocks - batch.blocks)[first.there(batch.tokens, Pairs.of(batch.cu_seqlens))]
        mean = error.abs().mean()
        loss = (mean + error.square().mean().sqrt()) / first.scale
        return loss, {"meV": 1000 * mean.item()}

    def before(self, model, data):
        """The training set's mean block for each two species."""
        first = first_stage(model)
        train = to_device(pack(data.train[:self.config.n_train]), first.scale.device)
        means = mean_blocks(first, train)

        def mean(positions, species, cu_seqlens):
            return means[first.kinds(species, Pairs.of(cu_seqlens))]
        return self.errors(mean, model, data)

    def evaluate(self, model, data):
        return self.errors(model, model, data)

    @torch.no_grad()
    def errors(self, predict, model, data):
        """Mean absolute errors [meV] on the held-out molecules: of H; of H of turned molecules; how
        much the prediction does not turn with them; of the orbitals' energies, all and occupied."""
        first = first_stage(model)
        test = to_device(data.test, first.scale.device)
        there = first.there(test.tokens, Pairs.of(test.cu_seqlens))
        turned, D = test.turned(first.orbitals, np.random.default_rng(self.seed))
        found = predict(test.positions, test.tokens, test.cu_seqlens)
        found_turned = predict(turned.positions, turned.tokens, turned.cu_seqlens)
        want = D @ found @ D.transpose(1, 2)
        both = (energies(blocks, test, first.orbitals) for blocks in (found, test.blocks))
        wrong = [a - b for a, b in zip(*both)]
        occupied = [x[:n] for x, n in zip(wrong, test.n_occupied.tolist())]
        in_eV = {
            "H": (found - test.blocks)[there], "turned": (found_turned - turned.blocks)[there],
            "covariance": (found_turned - want)[there], "energies": torch.cat(wrong),
            "occupied": torch.cat(occupied)}
        return {name: 1000 * x.abs().mean().item() for name, x in in_eV.items()}

    def rows(self, model, data, before, runs, out_dir):
        """A second stage that left the first as it was also gets a row for the first alone."""
        yield "mean of the training set", before
        for name, (method, m) in runs.items():
            if method.config.stages > 1 and not method.config.joint:
                yield f"{name}, its stage 1", method.evaluate(m.first, data)
            yield name, method.evaluate(m, data)

    def save(self, model, out_dir):
        return save_stages(model, out_dir)


@functools.lru_cache(1)
def molecules_of(data, seed):
    """(Orbitals, [Structures]) of --data."""
    if data == "clusters":
        return TightBinding.orbitals, TightBinding(400, seed).molecules
    return read_molecules(data)


def first_stage(model) -> Covariant:
    return getattr(model, "first", model)


def energies(blocks, batch, orbitals) -> list:
    """Each molecule's energies, rising: H c = e S c."""
    found = []
    whole = (matrices(x, batch.tokens, batch.cu_seqlens, orbitals) for x in (blocks, batch.overlap))
    for h, s in zip(*whole):
        root = torch.linalg.cholesky(s.double())
        half = torch.linalg.solve_triangular(root, h.double(), upper=False)
        plain = torch.linalg.solve_triangular(root, half.T, upper=False)
        found.append(torch.linalg.eigvalsh(plain))
    return found


def mean_blocks(first, batch):
    """The mean block of each of first.kinds, (kinds, n, n)."""
    kinds = first.kinds(batch.tokens, Pairs.of(batch.cu_seqlens))
    n = 2 * len(first.orbitals.species) ** 2
    sums = torch.zeros_like(batch.blocks[:1]).expand(n, -1, -1).index_add(0, kinds, batch.blocks)
    return sums / kinds.bincount(minlength=n).clamp(min=1)[:, None, None]


def set_scale(first, batch):
    """Stage 1's constants: what no turn changes of each species' mean block, and the deviation
    from it."""
    n, means = len(first.orbitals.species), mean_blocks(first, batch)
    scalars = first.parts[:, 0]  # (K, n, n)
    alone = means[n * n::n + 1]  # an atom with itself, (species, n, n)
    amounts = torch.einsum("kab,sab->sk", scalars, alone)
    first.mean.copy_(torch.einsum("kab,sk->sab", scalars, amounts))
    pairs = Pairs.of(batch.cu_seqlens)
    is_self = (pairs.i == pairs.j)[:, None, None]
    rest = batch.blocks - is_self * first.mean[batch.tokens[pairs.i]]
    first.scale.copy_(rest[first.there(batch.tokens, pairs)].std())


# --- files ---------------------------------------------------------------------------------------

def save_stages(model, path) -> list:
    """Weights and what shapes them; returns the paths."""
    first = first_stage(model)
    about = {"shells": first.orbitals.shells, "first": first.settings,
             "second": model.settings if model is not first else None}
    paths = [os.path.join(path, name) for name in ("config.json", "model.safetensors")]
    write_json(paths[0], {"hamiltonian": about})
    write_tensors(paths[1], model.state_dict())
    return paths


def load_stages(path, device="cpu"):
    """The Covariant or GraphTransformer in folder `path`. Raises ValueError for another folder."""
    file = os.path.join(path, "config.json")
    about = read_json(file).get("hamiltonian")
    if about is None:
        raise ValueError(f"{file}: no model of Hamiltonians")
    try:
        model = Covariant(Orbitals(about["shells"]), **about["first"])
        if about["second"]:
            model = GraphTransformer(model, **about["second"])
    except (KeyError, TypeError) as e:
        raise ValueError(f"{file}: unsupported ({type(e).__name__}: {e})") from None
    return assign(model, read_weights(path, "cpu", torch.float32), path).to(device)


@dataclass
class Flags:
    model: str | None = flag(None, "folder that train.py --method hamiltonian wrote")
    data: str | None = flag(None, "file of molecules, none of which was learnt")
    device: str = flag("cpu", "torch device")


def main():
    config, = parse([Flags], description="Errors of a trained model on a file of molecules.")
    if not (config.model and config.data):
        raise ValueError("--model and --data are needed; train.py --method hamiltonian trains")
    join(config.device)
    model = load_stages(config.model, config.device)
    orbitals, molecules = read_molecules(config.data)
    if orbitals.shells != first_stage(model).orbitals.shells:
        raise ValueError(f"{config.data} has the shells {orbitals.shells}, the model "
                         f"{first_stage(model).orbitals.shells}")
    data = SimpleNamespace(test=pack(molecules))
    method = TwoStage(model, TwoStage.Config())
    for name, value in method.evaluate(model, data).items():
        print(f"{name}: {value:.3f} meV")


if __name__ == "__main__":
    run(main)
