"""Optional packages that are merely installed are imported only by what needs them."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_python(code: str, *arguments: str, folder: Path) -> str:
    """Run code in a process of its own, and return the last line that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_a_command_imports_no_package_that_its_model_does_not_need(
    planted_folder: Path, recipe_file: Path
) -> None:
    """`doctor` builds the model's classes, with which transformers imports torchao."""
    code = (
        "import sys\n"
        "from ray_abliterate.cli.app import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "names = ('torchao', 'bitsandbytes', 'peft')\n"
        "print([name for name in names if sys.modules.get(name)], 'transformers' in sys.modules)\n"
    )
    last = run_python(code, "doctor", str(recipe_file), folder=recipe_file.parent)
    assert last == "[] True"


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
def test_a_hidden_package_can_be_imported_once_a_checkpoint_needs_it(
    package: str, tmp_path: Path
) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    code = (
        "import importlib.util, sys\n"
        "from ray_abliterate.model.optional_packages import hide_optional_packages\n"
        "from ray_abliterate.model.quantization import refuse_missing_packages\n"
        "hide_optional_packages()\n"
        "hidden = importlib.util.find_spec(sys.argv[1]) is None\n"
        "refuse_missing_packages('a model', sys.argv[1])\n"
        "print(hidden, importlib.util.find_spec(sys.argv[1]) is not None)\n"
    )
    assert run_python(code, package, folder=tmp_path) == "True True"


def test_a_package_that_is_imported_already_is_not_hidden(tmp_path: Path) -> None:
    code = (
        "import sys, types\n"
        "sys.modules['torchao'] = loaded = types.ModuleType('torchao')\n"
        "from ray_abliterate.model.optional_packages import hide_optional_packages\n"
        "hide_optional_packages()\n"
        "print(sys.modules['torchao'] is loaded)\n"
    )
    assert run_python(code, folder=tmp_path) == "True"
