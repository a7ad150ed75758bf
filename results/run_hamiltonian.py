"""The rows of results/README.md, each a run of train.py: JSON lines in raw/hamiltonian.jsonl.

    python results/run_hamiltonian.py clusters    # embedded data, three seeds: 35 min on one core
    python results/run_hamiltonian.py molecules   # molecules.safetensors, three seeds
    python results/run_hamiltonian.py curve       # errors by the number of molecules learnt
    python results/run_hamiltonian.py figure      # hamiltonian-curve.svg from what the curve left
    python results/run_hamiltonian.py cost        # time by the molecules of a pack, prints a table
"""
import json
import math
import os
import statistics
import sys
import time

from cells import HERE, cell

sys.path.insert(0, os.path.dirname(HERE))
import torch

import hamiltonian
from model import write_svg

DATA = {"clusters": "", "molecules": "--data results/molecules.safetensors --eval_seqs 60"}
BESIDE = ["stages=1", "stages=1,channels=60", "strict", "no-joint", "no-joint,strict"]
SIZES = (25, 50, 100, 200, 300)
CURVES = {"hamiltonian": ("both stages, free", "#1f77b4"),
          "hamiltonian:strict": ("both stages, strict", "#2ca02c"),
          "hamiltonian:stages=1": ("stage 1 alone", "#d62728")}


def beside(variants):
    return " ".join(f"--beside hamiltonian:{flags}" for flags in variants)


def curve():
    for n in SIZES:
        for seed in range(3):
            line = f"--method hamiltonian --n_train {n} --seed {seed} "
            cell("hamiltonian", f"curve {n} {seed}", line + beside(["stages=1", "strict"]))


def figure():
    """Error of H against the molecules learnt, both on logarithmic axes; a thin line a seed."""
    with open(os.path.join(HERE, "raw", "hamiltonian.jsonl")) as f:
        cells = {row["cell"]: row["rows"] for row in map(json.loads, f)}

    def at(n, error):
        right, up = math.log(n / 20) / math.log(20), math.log(error / 0.5) / math.log(40)
        return 70 + 420 * right, 330 - 290 * up
    out = ['<text x="70" y="22" font-size="14">Error of H on held-out clusters</text>',
           '<text x="280" y="370" text-anchor="middle">clusters learnt</text>',
           '<text transform="translate(20 190) rotate(-90)" text-anchor="middle">meV</text>']
    for n in SIZES:
        x, y = at(n, 0.5)
        out += [f'<path d="M{x} {y}V40" stroke="#e5e5e5"/>',
                f'<text x="{x}" y="{y + 18}" text-anchor="middle">{n}</text>']
    for error in (0.5, 1, 2, 5, 10, 20):
        x, y = at(20, error)
        out += [f'<path d="M{x} {y}H490" stroke="#e5e5e5"/>',
                f'<text x="62" y="{y + 4}" text-anchor="end">{error:g}</text>']
    for i, (name, (label, colour)) in enumerate(CURVES.items()):
        errors = [[cells[f"curve {n} {seed}"][name]["H"] for n in SIZES] for seed in range(3)]
        middle = [statistics.mean(column) for column in zip(*errors)]
        for line, width in [*((line, 0.6) for line in errors), (middle, 2)]:
            points = "L".join("{:.1f} {:.1f}".format(*at(*p)) for p in zip(SIZES, line))
            stroke = f'fill="none" stroke="{colour}" stroke-width="{width}"'
            out.append(f'<path d="M{points}" {stroke}/>')
        y = 60 + 18 * i
        out += [f'<path d="M510 {y}h18" stroke="{colour}" stroke-width="3"/>',
                f'<text x="534" y="{y + 4}">{label}</text>']
    write_svg(os.path.join(HERE, "hamiltonian-curve.svg"), 700, 390, out)


@torch.no_grad()
def cost():
    """Nothing is padded: time follows the pairs of atoms, whatever the molecules' sizes."""
    orbitals, molecules = hamiltonian.read_molecules(os.path.join(HERE, "molecules.safetensors"))
    model = hamiltonian.GraphTransformer(hamiltonian.Covariant(orbitals)).init_weights(0)
    order = torch.randperm(len(molecules), generator=torch.Generator().manual_seed(0)).tolist()
    print("| molecules | atoms | pairs | of a padded batch | ms |\n|---|---|---|---|---|")
    for n in (1, 10, 100):
        batch = hamiltonian.pack([molecules[i] for i in order[:n]])
        times = []
        for _ in range(10):
            begun = time.perf_counter()
            model(batch.positions, batch.tokens, batch.cu_seqlens)
            times.append(1000 * (time.perf_counter() - begun))
        most = int(batch.cu_seqlens.diff().max())
        print(f"| {n} | {len(batch.tokens)} | {len(batch.blocks)} | {n * most ** 2} | "
              f"{statistics.median(times):.1f} |")


if sys.argv[1:] in (["clusters"], ["molecules"]):
    for seed in range(3):
        line = f"--method hamiltonian {DATA[sys.argv[1]]} --seed {seed} "
        cell("hamiltonian", f"{sys.argv[1]} {seed}", line + beside(BESIDE))
elif sys.argv[1:] in (["curve"], ["figure"], ["cost"]):
    {"curve": curve, "figure": figure, "cost": cost}[sys.argv[1]]()
else:
    sys.exit(__doc__)
