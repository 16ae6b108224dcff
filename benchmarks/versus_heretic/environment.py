"""The peer's own environment: Heretic 1.4 with the torch that this environment has.

    python -m benchmarks.versus_heretic.environment [--peer-env FOLDER]

It is made once. Heretic's release asks for packages that text models don't need (torchvision among
them), so what it needs is installed by name and the release itself without its dependencies.
"""

import argparse
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

RELEASE = "1.4.0"
NEEDS = (
    "transformers~=5.6",
    "accelerate~=1.13",
    "bitsandbytes~=0.49",
    "datasets~=4.7",
    "huggingface-hub~=1.7",
    "optuna~=4.7",
    "peft~=0.19",
    "rich~=14.3",
    "questionary~=2.1",
    "tomli-w",
    "pydantic-settings~=2.13",
    "immutabledict",
    "langdetect",
    "psutil",
    "py-cpuinfo",
    "numpy~=2.2",
    "lm-eval~=0.4",
)
DEFAULT = Path("~/.cache/ray_abliterate/heretic-env")


def python_of(folder: Path) -> Path:
    """Return the environment's interpreter."""
    return folder.expanduser() / "bin" / "python"


def install(folder: Path) -> Path:
    """Return the interpreter of an environment with the release; install what is not there."""
    python = python_of(folder)
    if python.exists() and _holds_release(python):
        return python
    venv.create(folder.expanduser(), with_pip=True)
    torch = version("torch").partition("+")[0]
    for wanted in ([f"torch=={torch}"], list(NEEDS), [f"heretic-llm=={RELEASE}", "--no-deps"]):
        print(f"{folder}: installing {' '.join(wanted)}", file=sys.stderr)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    """Return the versions of what matters in the peer's environment."""
    names = ("heretic-llm", "torch", "transformers", "peft", "optuna")
    program = "import sys; from importlib.metadata import version; " + (
        "print(*[version(name) for name in sys.argv[1:]])"
    )
    done = subprocess.run(
        [python, "-c", program, *names], check=True, capture_output=True, text=True
    )
    return dict(zip(names, done.stdout.split(), strict=True))


def _holds_release(python: Path) -> bool:
    program = "from importlib.metadata import version; print(version('heretic-llm'))"
    done = subprocess.run([python, "-c", program], check=False, capture_output=True, text=True)
    return done.stdout.strip() == RELEASE


def main() -> None:
    """Install the environment, and print its interpreter and versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-env", type=Path, default=DEFAULT, help="folder of the environment")
    python = install(parser.parse_args().peer_env)
    print(python, versions(python))


if __name__ == "__main__":
    main()
