"""The rows of results/screenshots.md, each a run of train.py: a JSON line in raw/screenshots.jsonl.

    python results/screenshots.py stories               # embedded data, three seeds: 30 min
    python results/screenshots.py real DIR              # SmolLM2-135M in DIR: 3 h; resumes
"""
import sys

from cells import cell

READERS = [f"screenshot:{change}" for change in (
    "shown=none", "shown=text", "patch_weight=0", "layout=grid", "layout=proportional")]
ENCODERS = ["ptp:text_weight=0", "ptp:patch_weight=0"]
REAL = ("--method screenshot --data stdlib --context 64 --seq_len 128 --batch 8 --steps 250 "
        "--reading 0.6 --patch_weight 0.1 --eval_seqs 64 --layout words --seed 0")
ROWS = {"8": "--columns 8", "none": "--shown none", "text": "--shown text",
        "16": "--columns 4 --lines 4", "2": "--columns 2"}  # characters of a patch


if sys.argv[1:] == ["stories"]:
    for seed in range(3):
        for method, beside in ("screenshot", READERS), ("ptp", ENCODERS):
            others = " ".join(f"--beside {name}" for name in beside)
            cell("screenshots", f"{method} {seed}", f"--method {method} --seed {seed} {others}")
elif sys.argv[1:2] == ["real"] and len(sys.argv) == 3:
    for name, flags in ROWS.items():
        cell("screenshots", f"real {name}", f"{REAL} --model {sys.argv[2]} {flags}")
else:
    sys.exit(__doc__)
