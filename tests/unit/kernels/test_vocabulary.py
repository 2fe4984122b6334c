import os
import subprocess
import sys

from tests.conftest import PROGRAMS


def test_vocabulary_over_two_ranks_gives_the_same_results(tmp_path):
    """Loss, log-probs and gradients of a sharded head."""
    script = PROGRAMS / "vocabulary_rank.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), "2", str(tmp_path / "rendezvous")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)
    assert [output.strip().splitlines()[-1] for output in outputs] == ["rank 0 agrees", "rank 1 agrees"]
