"""The explorers as a web page: one notebook, served by Voila without its code."""

from __future__ import annotations

import re
import secrets
import signal
import socket
import tempfile
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from pdiff_lib.base.records import digest
from pdiff_lib.base.storage import root, write_text

# A browser loads nothing from another host. Voila's templates name two style sheets of Font Awesome on a CDN, and bring the
# same icons with them; widgets and plotly write code and styles into the page.
HEADERS = {"Content-Security-Policy": "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'"}


def page(notebook: Path, parameters: Mapping[str, Any]) -> Path:
    """A copy of the notebook with these parameters and without outputs, under `runs/app`.

    Args:
        notebook: with a cell tagged `parameters`.
        parameters: checked values (`jobs.check`).
    """
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    copy = parameterize_notebook(load_notebook_node(str(notebook)), dict(parameters))
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # A kernel starts in its notebook's folder; paths among the parameters are meant from here.
    copy.cells.insert(0, nbformat.v4.new_code_cell(f"import os\n\nos.chdir({str(Path.cwd())!r})"))
    copy.metadata.pop("papermill", None)
    path = root() / "app" / f"{notebook.stem}-{digest(dict(parameters))}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_text(path, nbformat.writes(copy))


def serve(notebook: Path, parameters: Mapping[str, Any], host: str = "127.0.0.1", port: int = 8866,
          open_browser: bool = True, token: str = "") -> None:
    """Serve the notebook until interrupted; each visitor gets a kernel of their own.

    Args:
        notebook: with a cell tagged `parameters`.
        parameters: checked values (`jobs.check`).
        host: address to listen on.
        port: 0 = any that is free.
        open_browser: open the page.
        token: what a visitor must bring (`?token=...`, or typed in): who reaches the page runs code as this user, and
            127.0.0.1 is reached by everyone on this machine. Without one it is drawn, and printed with the address.

    Raises:
        ValueError: the port is taken, the host is no address of this machine, or the token is too simple.
    """
    from tornado.ioloop import IOLoop
    from voila.app import Voila

    token = token or secrets.token_urlsafe(24)
    if not re.fullmatch(r"[\w.~-]{8,}", token, re.ASCII):
        raise ValueError("the token is too short, or holds what an address cannot: expected 8 or more of A-Z, a-z, 0-9, _.~-")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as free:
            port = free.getsockname()[1]
    except OSError as e:
        raise ValueError(f"cannot listen on {host}, port {port}: {e.strerror or e}; expected an address of this machine "
                         "and a free port (0: any)") from e
    copy = page(notebook, parameters)
    name = socket.gethostname() if host in ("", "0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    address = f"http://{name}:{port}/?token={token}"

    class Page(Voila):
        """Voila, whose own way to open a browser knows no token."""

        def init_settings(self):
            return {**super().init_settings(), "headers": HEADERS}

        def listen(self):
            # Ctrl-C ends the loop. As an exception it is lost where Python calls from within, as when an object is forgotten.
            self.ioloop = IOLoop.current()
            signal.signal(signal.SIGINT, self._handle_signal_stop)
            super().listen()

        def launch_browser(self):
            # In a file that this user alone can read: everyone sees the command line of a browser.
            descriptor, path = tempfile.mkstemp(suffix=".html")
            with open(descriptor, "w") as file:
                file.write(f'<meta http-equiv="refresh" content="0; url={address}">')
            webbrowser.open(Path(path).as_uri())

    print(f"{address} shows {notebook.name}; Ctrl-C ends it", flush=True)
    Page.launch_instance([str(copy), f"--Voila.ip={host}", f"--port={port}", "--Voila.port_retries=0",
                          f"--Voila.open_browser={open_browser}", "--show_tracebacks=True", "--strip_sources=True",
                          f"--Voila.token={token}"])
