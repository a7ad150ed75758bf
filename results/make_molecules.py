"""Molecules with their Hamiltonians, computed by pyscf (pip install pyscf safetensors).

    python results/make_molecules.py results/molecules.safetensors water=100 ammonia=100 \\
        methane=100 benzene=15                                             # 20 s
    python results/make_molecules.py waters.safetensors water=500

Restricted Hartree-Fock in the STO-3G basis: the converged Fock matrix and the overlap. Every atom
is moved from its place by noise of 0.1 Angstrom (benzene 0.05). The file is one that hamiltonian.py
reads, and ends in the first molecule turned and computed anew.
"""
import json
import sys

import numpy as np
from pyscf import gto, scf
from safetensors.numpy import save_file
from tqdm import tqdm

EV = 27.211386245988  # a Hartree (CODATA 2018)
SHELLS = {1: [0], 6: [0, 0, 1], 7: [0, 0, 1], 8: [0, 0, 1]}  # STO-3G: 1s; 1s, 2s, 2p
ring = np.arange(6) * np.pi / 3
circle = np.stack([np.cos(ring), np.sin(ring), 0 * ring], 1)
cube = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 3 ** 0.5
PLACES = {  # atomic numbers, positions [Angstrom]
    "water": ([8, 1, 1], np.array([[0, 0, 0], [0.757, 0.586, 0], [-0.757, 0.586, 0]])),
    "ammonia": ([7, 1, 1, 1], np.concatenate([
        np.zeros((1, 3)), 0.939 * circle[::2] + np.array([0, 0, -0.381])])),
    "methane": ([6, 1, 1, 1, 1], np.concatenate([np.zeros((1, 3)), 1.087 * cube])),
    "benzene": ([6] * 6 + [1] * 6, np.concatenate([1.395 * circle, 2.482 * circle]))}


def matrices(numbers, positions):
    """(upper triangle of H [eV], of S), orbitals in pyscf's order: p as x, y, z."""
    atoms = [(int(z), tuple(r)) for z, r in zip(numbers, positions)]
    mol = gto.M(atom=atoms, basis="sto-3g", unit="Angstrom", verbose=0)
    field = scf.RHF(mol)
    field.conv_tol = 1e-11
    field.kernel()
    assert field.converged, positions
    upper = np.triu_indices(mol.nao)
    return EV * field.get_fock()[upper], mol.intor("int1e_ovlp")[upper]


def main(path, wanted):
    rng, molecules = np.random.default_rng(0), []
    for name, n in (word.split("=") for word in wanted):
        numbers, places = PLACES[name]
        for _ in range(int(n)):
            noise = (0.05 if name == "benzene" else 0.1) * rng.standard_normal(places.shape)
            molecules.append((numbers, places + noise))
    rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    rotation *= np.linalg.det(rotation)
    molecules.append((molecules[0][0], molecules[0][1] @ rotation.T))
    h, s = zip(*(matrices(*molecule) for molecule in tqdm(molecules)))
    numbers, positions = zip(*molecules)
    save_file({
        "species": np.concatenate(numbers), "rotation": rotation,
        "positions": np.concatenate(positions).astype(np.float32),
        "cu_seqlens": np.cumsum([0, *map(len, numbers)]),
        "n_occupied": np.array([sum(z) // 2 for z in numbers]),
        "h": np.concatenate(h).astype(np.float32), "s": np.concatenate(s).astype(np.float32)},
        path, {"order": "xyz", "shells": json.dumps(SHELLS)})


main(sys.argv[1], sys.argv[2:])
