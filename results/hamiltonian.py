"""The rows of results/hamiltonian.md, each a run of train.py: JSON lines in raw/hamiltonian.jsonl.

    python results/hamiltonian.py clusters       # embedded data, three seeds: 1 h on one core
    python results/hamiltonian.py molecules      # results/molecules.safetensors, three seeds: 1 h
    python results/hamiltonian.py curve          # errors by the number of molecules learnt: 2 h
"""
import sys

from cells import cell

DATA = {"clusters": "", "molecules": "--data results/molecules.safetensors --eval_seqs 60"}
BESIDE = ["stages=1", "stages=1,channels=60", "strict", "no-joint", "no-joint,strict"]

if sys.argv[1:] in (["clusters"], ["molecules"]):
    others = " ".join(f"--beside hamiltonian:{flags}" for flags in BESIDE)
    for seed in range(3):
        flags = DATA[sys.argv[1]]
        cell("hamiltonian", f"{sys.argv[1]} {seed}", f"--method hamiltonian {flags} --seed {seed} "
                                                     f"{others}")
elif sys.argv[1:] == ["curve"]:
    others = "--beside hamiltonian:stages=1 --beside hamiltonian:strict"
    for n in (25, 50, 100, 200, 300):
        for seed in range(3):
            cell("hamiltonian", f"curve {n} {seed}", f"--method hamiltonian --n_train {n} --seed "
                                                     f"{seed} {others}")
else:
    sys.exit(__doc__)
