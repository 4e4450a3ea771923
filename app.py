"""Builds the pages and launches; nothing else.

Environment: HOST (127.0.0.1), PORT (7860), WORKBENCH_HOME (~/.fettle). Exit code 2 with one sentence when it cannot start.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from workbench import machine, space

if machine.zero_gpu():
    # ZeroGPU patches torch when it is imported, and looks for decorated functions when the app starts.
    space.decorated()

import gradio as gr

from components import api, layout, shell, theme


def pages(home) -> gr.Blocks:
    """The pages, each at its own address, and the named endpoints."""
    gr.set_static_paths(layout.static_paths())
    demo = gr.Blocks(title="Fettle", analytics_enabled=False)
    for number, (title, path, module) in enumerate(shell.PAGES):
        with demo if number == 0 else demo.route(title, path):
            shell.bar(home)
            page = _page(module)
            if page is not None:
                page.build(home)
            if number == 0:
                api.endpoints(home)
    return demo


def _page(module: str):
    try:
        return importlib.import_module(f"components.{module}")
    except ModuleNotFoundError as error:
        if error.name != f"components.{module}":
            raise
        return None


def address() -> tuple[str, int]:
    """Where to listen, from HOST and PORT; a Space is reached from outside its container.

    Raises:
        SystemExit: PORT is not a port, or another program listens there.
    """
    host = os.environ.get("HOST") or ("0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1")
    given = os.environ.get("PORT") or "7860"
    if not given.isdigit() or not 1 <= int(given) <= 65535:
        refuse(f"PORT = {given}: not a port number. Choose one from 1024 to 65535, for example PORT=7861.")
    port = int(given)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            refuse(f"Port {port} is reserved for the system. Choose one above 1023, for example PORT=7861.")
        except socket.gaierror:
            refuse(f"HOST = {host}: there is no such address on this machine. Use HOST=127.0.0.1, or HOST=0.0.0.0 for all.")
        except OSError as error:
            if error.errno == 99:
                refuse(f"HOST = {host}: not an address of this machine. Use HOST=127.0.0.1, or HOST=0.0.0.0 for all.")
            refuse(f"Port {port} on {host} is in use. Stop the program that holds it, or choose another, for example PORT={port + 1}.")
    return host, port


def refuse(sentence: str) -> None:
    """One sentence on stderr and exit code 2."""
    print(sentence, file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    host, port = address()
    try:
        from workbench.home import Home
        home = Home.open()
        _ = home.store  # a damaged or newer database is refused here, not on the page
    except Exception as error:
        found = layout.user_error(error)
        if found is None:
            raise
        refuse(found["text"])
    demo = pages(home)
    demo.queue(default_concurrency_limit=None, api_open=True)
    demo.launch(server_name=host, server_port=port, theme=theme.theme(), css_paths=theme.stylesheets(), head=layout.head(),
                footer_links=[], quiet=True, ssr_mode=False, prevent_thread_lock=True, share=False, show_error=True)
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    print(f"Fettle is at http://{shown}:{port}  (home: {home.path})", flush=True)
    from workbench.dispatcher import Dispatcher
    dispatcher = Dispatcher(home)
    dispatcher.start()
    from workbench.sweeps import service
    service.keep(home)
    # Measured once, when nothing else runs: the seconds of a forecast rest on it.
    machine.calibrate_when_idle(home.store)
    try:
        demo.block_thread()
    finally:
        stop = getattr(dispatcher, "stop", None)
        if stop:
            stop()


if __name__ == "__main__":
    main()
