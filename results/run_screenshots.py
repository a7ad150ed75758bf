"""The rows of results/README.md, each a run of train.py: a JSON line in raw/screenshots.jsonl.

    python results/run_screenshots.py stories        # embedded data, three seeds: about 1 h
    python results/run_screenshots.py real DIR       # SmolLM2-135M in DIR: about 30 min a row
"""
import sys

from cells import cell

READERS = [f"screenshot:{change}" for change in (
    "shown=none", "shown=text", "patch_weight=0", "layout=grid", "layout=proportional")]
ENCODERS = ["ptp:text_weight=0", "ptp:patch_weight=0"]
REAL = ("--method screenshot --data stdlib --context 64 --seq_len 128 --batch 8 "
        "--patch_weight 0.1 --eval_seqs 64 --layout words --seed 0")
ONE, TWO = "--steps 250 --reading 0.6", "--steps 300 --reading 0.7"
ROWS = {  # a picture's rows are named by the characters of a patch; they go on in a second run
    "8": f"{ONE} --columns 8", "none": f"{ONE} --shown none", "text": f"{ONE} --shown text",
    "8 on": f"{TWO} --columns 8", "16": f"{ONE} --columns 4 --lines 4",
    "16 on": f"{TWO} --columns 4 --lines 4", "2": f"{ONE} --columns 2",
    "2 on": f"{TWO} --columns 2"}

if sys.argv[1:] == ["stories"]:
    for seed in range(3):
        for method, beside in ("screenshot", READERS), ("ptp", ENCODERS):
            others = " ".join(f"--beside {name}" for name in beside)
            cell("screenshots", f"{method} {seed}", f"--method {method} --seed {seed} {others}")
elif sys.argv[1:2] == ["real"] and len(sys.argv) == 3:
    for name, flags in ROWS.items():
        first = f"out/screenshots/real-{name.removesuffix(' on')}"
        model = first if name.endswith(" on") else sys.argv[2]
        cell("screenshots", f"real {name}", f"{REAL} --model {model} {flags}")
else:
    sys.exit(__doc__)
