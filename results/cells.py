"""A cell of a table: a run of train.py, kept as a JSON line once it has ended."""
import json
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def cell(table, name, line):
    """Run `train.py line`, unless raw/TABLE.jsonl has the cell `name`; it resumes one that was
    stopped."""
    raw = os.path.join(HERE, "raw", f"{table}.jsonl")
    with open(raw, "a+") as f:
        f.seek(0)
        if any(json.loads(row)["cell"] == name for row in f):
            return
    root, out = os.path.dirname(HERE), os.path.join("out", table, name.replace(" ", "-"))
    log = os.path.join(root, out, "log.jsonl")
    begun = ["--resume"] if os.path.exists(log) else []
    command = [sys.executable, "train.py", *line.split(), "--out_dir", out, *begun]
    subprocess.run(command, check=True, cwd=root)
    with open(log) as f:
        found = [json.loads(row) for row in f]
    rows, = (row["rows"] for row in found if row["event"] == "end")
    with open(raw, "a") as f:
        f.write(json.dumps({"cell": name, "command": f"train.py {line}", "rows": rows}) + "\n")
