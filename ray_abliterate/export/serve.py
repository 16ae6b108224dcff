"""Serves an edited model to OpenAI's clients, with transformers' own server.

The server is `transformers serve`, which takes this process over. Nothing here speaks HTTP.
"""

import ipaddress
import os
import socket
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ray_abliterate.errors import ServeError
from ray_abliterate.export.find_export import (
    EXPORTS,
    SERVING,
    export_once,
    is_of_trial,
    trial_folder,
)

if TYPE_CHECKING:
    from ray_abliterate.pipeline.directory import RunDirectory
    from ray_abliterate.pipeline.progress import Progress
    from ray_abliterate.recipe import ModelSettings
    from ray_abliterate.search.frontier import Trial

NEEDED = ("fastapi", "openai", "uvicorn")
"""Packages that transformers' server imports, and transformers does not install."""
SERVER = "from transformers.cli.transformers import app; app()"


@dataclass(frozen=True)
class ServedModel:
    """A folder to serve, and how its model is loaded and prompted.

    Attributes:
        folder: A whole model; its last part is the name that clients use.
        trust_remote_code: Whether code that is in the folder may run.
        thinking: Passed to the chat template; None leaves it to the template.
    """

    folder: Path
    trust_remote_code: bool = False
    thinking: bool | None = None

    def command(self, host: str, port: int) -> list[str]:
        """Return the server's command line, to be started in the folder's parent."""
        options = ["--host", host, "--port", str(port)]
        if self.trust_remote_code:
            options.append("--trust-remote-code")
        if self.thinking is not None:
            options += ["--reasoning", "on" if self.thinking else "off"]
        return [sys.executable, "-P", "-c", SERVER, "serve", self.folder.name, *options]


def refuse_unservable(host: str, port: int, progress: "Progress") -> None:
    """Make sure, before a model is written, that the server can start.

    Raises:
        ServeError: a package is missing, or nothing can listen at the address.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ServeError(
            f"transformers' server needs {', '.join(missing)}. Install what is missing with:\n"
            "  pip install 'ray-abliterate[serve]'"
        )
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            # as the server does: a port that was just left is no obstacle
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
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


def serve_folder(folder: Path, trust_remote_code: bool = False) -> ServedModel:
    """Return an exported folder, or any other with a whole model, as a model to serve.

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
            f"the folder's name, {folder.name}, contains @ or :, which the server takes for the "
            "beginning of a revision or a file; rename it"
        )
    return ServedModel(folder, trust_remote_code)


def serve_trial(
    directory: "RunDirectory",
    trial: "Trial",
    progress: "Progress",
    trust_remote_code: bool = False,
) -> ServedModel:
    """Return a trial's model to serve: a whole export of it, or a folder that is written now.

    That folder is not verified, which would take longer than a quick test: `export` does that.

    Raises:
        ExportError: the trial's folder holds another model, or cannot be written.
    """
    settings: ModelSettings = directory.read_recipe().model
    if settings.chat_template:
        progress.note("model.chat_template is not served: the folder has the model's own template")
    folder = trial_folder(directory, trial, EXPORTS)
    if not ((folder / "config.json").is_file() and is_of_trial(folder, trial)):
        folder = trial_folder(directory, trial, SERVING)
        is_new = not folder.exists()
        export_once(directory, trial, folder, progress, verify=False)
        if is_new:
            progress.note(f"stored in {folder} for the next time; remove it when you are done")
    trusted = trust_remote_code or settings.trust_remote_code
    return ServedModel(folder.resolve(), trusted, settings.enable_thinking)


def start_server(served: ServedModel, host: str, port: int, progress: "Progress") -> NoReturn:
    """Replace this process by the server, which loads only what is on this machine."""
    at = f"[{host}]" if ":" in host else host  # an IPv6 address stands in brackets in a URL
    progress.note(f"http://{at}:{port}/v1 is the base URL, {served.folder.name} the model's name")
    progress.note("Ctrl-C ends the server")
    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir(served.folder.parent)
    command = served.command(host, port)
    os.execve(command[0], command, {**os.environ, "HF_HUB_OFFLINE": "1"})
