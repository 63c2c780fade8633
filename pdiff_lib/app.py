"""The explorers as a web page: one notebook, served by Voila without its code."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from pdiff_lib import runs


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
    path = runs.root() / "app" / f"{notebook.stem}-{runs.digest(dict(parameters))}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    return runs.write_text(path, nbformat.writes(copy))


def serve(notebook: Path, parameters: Mapping[str, Any], host: str = "127.0.0.1", port: int = 8866,
          open_browser: bool = True) -> None:
    """Serve the notebook until interrupted; each visitor gets a kernel of their own.

    Args:
        notebook: with a cell tagged `parameters`.
        parameters: checked values (`jobs.check`).
        host: address to listen on. There is no password: whoever reaches it can use the explorers.
        port: 0 = any that is free.
        open_browser: open the page.

    Raises:
        ValueError: the port is taken, or the host is no address of this machine.
    """
    from voila.app import Voila

    try:
        with socket.create_server((host, port)) as free:
            port = free.getsockname()[1]
    except OSError as e:
        raise ValueError(f"cannot listen on {host}, port {port}: {e.strerror or e}; expected an address of this machine "
                         "and a free port (0: any)") from e
    copy = page(notebook, parameters)
    print(f"http://{host}:{port}/ shows {notebook.name}; Ctrl-C ends it", flush=True)
    Voila.launch_instance([str(copy), f"--Voila.ip={host}", f"--port={port}", "--Voila.port_retries=0",
                           f"--Voila.open_browser={open_browser}", "--show_tracebacks=True", "--strip_sources=True"])
