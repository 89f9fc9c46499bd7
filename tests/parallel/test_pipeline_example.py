"""Start examples/pipeline.py as a user does."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_pipeline_example(tmp_path):
    """Two replicas of two stages save, and one pipeline resumes from that."""
    text = tmp_path / "text"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog; " * 100)
    losses = []
    for num_ranks in (4, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        command += [str(ROOT / "examples" / "pipeline.py"), "--data", str(text), "--steps", "4"]
        done = subprocess.run(
            [*command, "--checkpoint", str(tmp_path / "saved")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stdout
        losses += [(int(step), float(loss)) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", done.stdout)]
    assert [step for step, _ in losses] == [0, 3, 4, 7]
    assert losses[0][1] > losses[1][1] > losses[3][1] and losses[2][1] < losses[0][1]
