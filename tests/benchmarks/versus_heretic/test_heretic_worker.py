"""The peer's side of the comparison."""

import subprocess
import sys

from benchmarks.harness.worker_process import ROOT


def test_the_peers_side_imports_nothing_of_ours():
    program = (
        "import sys; import benchmarks.versus_heretic.heretic_worker; "
        "print(any(name.split('.')[0] in ('ray_abliterate', 'torch') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr
