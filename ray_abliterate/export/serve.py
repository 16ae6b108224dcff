"""Serves an edited model to OpenAI's clients: writes its folder, and starts transformers' server.

The server is `transformers serve`, which takes this process over. Nothing here speaks HTTP.
"""

import ipaddress
import json
import os
import socket
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ray_abliterate.errors import ServeError

if TYPE_CHECKING:
    from ray_abliterate.pipeline.directory import RunDirectory
    from ray_abliterate.pipeline.progress import Progress
    from ray_abliterate.recipe import ModelSettings
    from ray_abliterate.search.frontier import Trial

NEEDED = ("fastapi", "openai", "uvicorn")
"""Packages that transformers' server imports, and transformers does not install."""
KEPT = "serving"
"""Folder of a run with the models that were written to be served."""
SERVER = "from transformers.cli.transformers import app; app()"


@dataclass(frozen=True)
class Served:
    """A folder to serve, and how its model is loaded and asked.

    Attributes:
        folder: A whole model; its last part is the name that clients use.
        trust_remote_code: Run code that is in the folder.
        thinking: Passed to the chat template; the template's own choice if None.
    """

    folder: Path
    trust_remote_code: bool = False
    thinking: bool | None = None

    def command(self, host: str, port: int) -> list[str]:
        """The server's command line, to be started beside the folder."""
        options = ["--host", host, "--port", str(port)]
        if self.trust_remote_code:
            options.append("--trust-remote-code")
        if self.thinking is not None:
            options += ["--reasoning", "on" if self.thinking else "off"]
        return [sys.executable, "-P", "-c", SERVER, "serve", self.folder.name, *options]


def refuse_early(host: str, port: int, progress: "Progress") -> None:
    """What can be told before a model is written.

    Raises:
        ServeError: a package is missing, or the address can't be listened at.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ServeError(
            f"transformers' server needs {', '.join(missing)}. Install what is missing with:\n"
            "  pip install 'ray-abliterate[serve]'"
        )
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ServeError(
            f"nothing can listen at {host}, port {port} ({error.strerror}); choose another --port, "
            "or --host 127.0.0.1"
        ) from None
    if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        progress.note(
            f"warning: {host} is open to other machines. The server asks for no password: whoever "
            "reaches it can use the model, and have it load others that are on this machine."
        )


def is_export(place: Path) -> bool:
    """Whether a folder is a model's, not a run's."""
    return any((place / name).is_file() for name in ("config.json", "adapter_config.json"))


def exported(folder: Path, trust_remote_code: bool = False) -> Served:
    """A folder that was exported, or any other with a whole model.

    Raises:
        ServeError: it holds an adapter, or has a name that the server takes for something else.
    """
    if not (folder / "config.json").is_file():
        raise ServeError(
            f"{folder} is an adapter, and transformers' server loads whole models.\n"
            "  Serve the run's trial instead:  ray-abliterate serve RUN --trial N"
        )
    folder = folder.resolve()
    if "@" in folder.name or ":" in folder.name:
        raise ServeError(
            f"the folder's name, {folder.name}, holds @ or :, behind which the server looks for a "
            "revision or a file; rename it"
        )
    return Served(folder, trust_remote_code)


def of_trial(
    directory: "RunDirectory", trial: "Trial", progress: "Progress", trust_remote_code: bool = False
) -> Served:
    """The model of a trial: what was written for it before, or a folder that is written now.

    Not verified, which would take longer than a quick test: `export` does that.

    Raises:
        ServeError: a folder for the trial is there, but is another's.
        ExportError: it can't be written.
    """
    from ray_abliterate.export.export import export_trial

    settings: ModelSettings = directory.read_recipe().model
    if settings.chat_template:
        progress.note("model.chat_template is not served: the folder has the model's own template")
    name = f"trial-{trial.number}"
    folder = directory.path / KEPT / name
    verified = directory.path / "exports" / name
    if (verified / "config.json").is_file() and _plan_of(verified) == _values(trial):
        folder = verified
    elif folder.exists():
        if _plan_of(folder) != _values(trial):
            raise ServeError(f"{folder} is not of this trial {trial.number}; remove it first")
    else:
        export_trial(directory, trial, folder, progress, verify=False)
        progress.note(f"kept in {folder} for the next time; remove it when you are done")
    trusted = trust_remote_code or settings.trust_remote_code
    return Served(folder.resolve(), trusted, settings.enable_thinking)


def start(served: Served, host: str, port: int, progress: "Progress") -> NoReturn:
    """Become the server. Only what is on this machine is loaded."""
    at = f"[{host}]" if ":" in host else host
    progress.note(f"http://{at}:{port}/v1 is the base URL, {served.folder.name} the model's name")
    progress.note("Ctrl-C ends the server")
    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir(served.folder.parent)
    command = served.command(host, port)
    os.execve(command[0], command, {**os.environ, "HF_HUB_OFFLINE": "1"})


def _plan_of(folder: Path) -> object:
    from ray_abliterate.export.bundle import read_bundle

    return read_bundle(folder)[0].plan


def _values(trial: "Trial") -> object:
    return json.loads(trial.plan.to_json())
