"""The same job in both programs' terms: options, prompts, models, settings, recipes."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.record import cores
from benchmarks.versus_heretic import environment
from benchmarks.versus_heretic.shared_plans import NORMALISATION

KL, RATE = "kl-divergence", "keyword-rate"
"""Kinds of the two scorers, and names of their prompt sets."""
BUILT_MODELS = ("answers", "declines")
"""The demo's model before and after it was taught to decline; built from what is installed."""


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every comparison with the peer has."""
    add = parser.add_argument
    add("--peer", choices=["heretic"], default="heretic")
    add(
        "--peer-env",
        type=Path,
        default=environment.DEFAULT,
        help="folder of the peer's environment; installed from the package index if absent",
    )
    add("--prompts", type=int, default=64, help="prompts of each of the two scored sets")
    add(
        "--direction-prompts",
        type=int,
        default=128,
        help="prompts of each of the two sets that directions come from",
    )
    add("--tokens", type=int, default=40, help="tokens of an answer")
    add(
        "--batch-size",
        type=int,
        default=64,
        help="prompts of a forward pass in both; 0: the peer searches, ours follows",
    )
    add("--norm", choices=list(NORMALISATION), default="row")
    add("--threads", type=int, default=0, help="threads of each process; 0: all cores")


def check_model(parser: argparse.ArgumentParser, model: str) -> None:
    """End with a usage error if a model is neither built nor a folder."""
    if model not in BUILT_MODELS and not Path(model).is_dir():
        parser.error(f"{model}: neither {' nor '.join(BUILT_MODELS)}, nor a folder")


class ComparisonSetup:
    """What all measurements of a comparison share.

    Attributes:
        options: The parsed command line.
        peer_python: Interpreter of the peer's environment.
        folder: Folder for logs and files.
        threads: Threads of each process.
        prompts: Prompts by set: `behaviour`, `neutral` and one for each scorer.
        files: The same as text files.
        models: Folders of the models by name.
    """

    def __init__(
        self, options: argparse.Namespace, models: list[str], peer_python: Path, folder: Path
    ) -> None:
        """Write the prompts to files, and build the models that are not there.

        Args:
            options: The parsed command line.
            models: Names of built models, or folders.
            peer_python: Interpreter of the peer's environment.
            folder: An empty folder.
        """
        self.options, self.peer_python, self.folder = options, peer_python, folder
        self.threads = options.threads or cores()
        self.prompts = load_prompts(options.prompts, options.direction_prompts)
        self.files = {name: folder / f"{name}.txt" for name in self.prompts}
        for name, users in self.prompts.items():
            self.files[name].write_text("\n".join(users) + "\n", encoding="utf-8")
        self.models = {name: model_folder(name) for name in models}

    @property
    def about(self) -> dict[str, Any]:
        """Settings, and versions of the peer: what every saved file says."""
        settings = {k: v for k, v in vars(self.options).items() if not isinstance(v, Path)}
        return {"settings": settings, "peer": environment.versions(self.peer_python)}

    def peer_settings(
        self, model: str, dtype: str, norm: str, search_prefix: bool = False
    ) -> dict[str, Any]:
        """Return settings of the peer's release, with prompt sets as text files.

        Args:
            model: Name of the model.
            dtype: `bfloat16` or `float32`.
            norm: Norm mode as a recipe names it.
            search_prefix: Let the peer look for a response prefix, too.
        """
        sets = {
            "good_prompts": "neutral",
            "bad_prompts": "behaviour",
            "good_evaluation_prompts": KL,
            "bad_evaluation_prompts": RATE,
        }
        return {
            "model": str(self.models[model]),
            "dtypes": [dtype],
            "batch_size": self.options.batch_size,
            "max_response_length": self.options.tokens,
            "response_prefix": None if search_prefix else "",
            "row_normalization": NORMALISATION[norm],  # type: ignore[index]
            **{name: {"dataset": str(self.files[ours])} for name, ours in sets.items()},
        }

    def our_recipe(self, model: str, dtype: str, norm: str, peer: dict[str, Any]) -> dict[str, Any]:
        """Return the same job as a recipe's values, with the same text files.

        Args:
            model: Name of the model.
            dtype: `bfloat16` or `float32`.
            norm: Norm mode as a recipe names it.
            peer: The peer's `markers`, `system_prompt` and `batch_size`.
        """
        system = peer["system_prompt"]
        source = {n: {"file": str(file), "system": system} for n, file in self.files.items()}
        rate = {"kind": RATE, "prompts": source[RATE], "markers": peer["markers"]}
        return {
            "model": {"name": str(self.models[model]), "dtype": dtype},
            "prompts": {"behaviour": source["behaviour"], "neutral": source["neutral"]},
            "edit": {"norm": norm},
            "scorers": [
                {"kind": KL, "prompts": source[KL], "tokens": 1},
                {**rate, "max_new_tokens": self.options.tokens},
            ],
            "run": {"batch_size": peer["batch_size"]},
        }


def load_prompts(scored: int, extracted: int) -> dict[str, list[str]]:
    """Return the demo's prompt sets: two scored (held out), two that directions come from.

    Args:
        scored: Prompts of each of the first two.
        extracted: Prompts of each of the others.
    """
    from ray_abliterate.data.prompt_sources import load_prompt_set
    from ray_abliterate.recipe import PromptSource

    sources = {
        KL: ("other-heldout", scored),
        RATE: ("cooking-heldout", scored),
        "behaviour": ("cooking-train", extracted),
        "neutral": ("other-train", extracted),
    }
    return {
        name: [
            " ".join(prompt.user.split())  # a text file has one prompt per line
            for prompt in load_prompt_set(
                name, PromptSource(builtin=builtin, split=f"[:{count}]"), Path()
            ).prompts
        ]
        for name, (builtin, count) in sources.items()
    }


def model_folder(name: str) -> Path:
    """Return a model's folder; a process that then gives its memory back builds the demo's."""
    from ray_abliterate.data.builtin import demo_model

    if name not in BUILT_MODELS:
        return Path(name)
    if name == "declines":
        folder, build = demo_model.demo_folder(), demo_model.build_demo_model.__name__
    else:
        folder, build = demo_model.demo_base_folder(), demo_model.build_base_model.__name__
    program = (
        "import sys, pathlib; from ray_abliterate.data.builtin import demo_model; "
        "getattr(demo_model, sys.argv[1])(pathlib.Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", program, build, folder], check=True)
    return folder
