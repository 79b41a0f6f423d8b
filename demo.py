"""Web demo: a page that samples from a model, in the browser.

    python demo.py                        best.pt of the newest run
    python demo.py checkpoints/mine/best.pt --port 7861

It serves, to this machine only, the page that `python export.py CHECKPOINT page.html` writes: text
as it is sampled with the probabilities of its tokens, conversations, and the loss curve. To show it
to others, send them that file.
"""

import contextlib
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from system.start import run

from exporting.web_page import export_page
from system.command_line import parse_args
from system.settings import UserError, setting
from utils import newest_checkpoint


@dataclass
class DemoConfig:
    checkpoint: str = setting("", "the model; default: best.pt of the newest run", positional=True)
    port: int = setting(7860, "the page is at http://127.0.0.1:PORT; 0: any", low=0, high=65535)


def main(argv: list[str] | None = None) -> int:
    config = parse_args(DemoConfig, argv, __doc__)
    checkpoint = Path(config.checkpoint or newest_checkpoint(Path("checkpoints")))
    with tempfile.TemporaryDirectory() as folder:
        handler = partial(SimpleHTTPRequestHandler, directory=folder)
        ThreadingHTTPServer.allow_reuse_address = os.name == "posix"  # Windows would share the port
        try:
            server = ThreadingHTTPServer(("127.0.0.1", config.port), handler)
        except OSError as error:
            raise UserError(f"port {config.port}: {error.strerror}; try another --port") from error
        with server, contextlib.suppress(KeyboardInterrupt):
            export_page(checkpoint, Path(folder, "index.html"), "auto")
            print(f"open http://127.0.0.1:{server.server_port}/ ; Ctrl-C ends the demo", flush=True)
            server.serve_forever()
    return 0


if __name__ == "__main__":
    run(main)
