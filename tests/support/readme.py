"""The commands and examples of README.md."""

import json
import re

from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.S | re.M)  # (language, text)
LINES = [line for language, block in BLOCKS if not language for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith(("oapl ", "torchrun ", "make ", "python -m "))]
OWN_RUN = next(line for line in COMMANDS if "my_reward:score" in line)


def write_own_files(folder):
    """problems.jsonl, with further problems like the one shown, and my_reward.py. Returns the shown problem."""
    shown, reward = (next(block for language, block in BLOCKS if language == kind) for kind in ("json", "python"))
    problem = json.loads(shown)
    others = [{"question": f"{a} + {b}", "answer": str(a + b)} for a in range(10) for b in range(10)]
    rows = [problem, *(other for other in others if other != problem)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "my_reward.py").write_text(reward, encoding="utf-8")
    return problem
