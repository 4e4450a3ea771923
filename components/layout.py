"""How a page is put together. Read this before writing a page.

**A page** is a module ``components/<page>.py`` with ``build(home) -> None``; ``app.py`` calls it inside the page's route, after
the app bar. ``home`` is a ``workbench.home.Home`` (``home.store`` reads and writes runs). Pages call ``workbench`` only.

**A component of ours** is one file of JavaScript and, when it has markup of its own, one of HTML::

    component("live", server_functions=[since, stop], elem_id="live")

makes a ``gr.HTML`` from ``assets/js/live.js`` and ``assets/html/live.html`` (or pass ``template="<div class='ft'></div>"``).
The template's root carries ``class="ft"`` (plus ``ft-page`` when it is the whole page); never put ``ft`` around native controls.

The JavaScript file is the body of a function called once, when the element is on the page. In scope:

========== =====================================================================================================================
element    the gr.HTML's node; query inside it, never ``document``
props      ``props.value`` is the component's value. Assigning it does not run ``watch``; it is what Python handlers then receive
watch      ``watch('value', () => paint(props.value))`` runs when *Python* (an event handler's output) changes the value
trigger    ``trigger('select', {id: 3})`` fires the Gradio event: in Python ``box.select(fn, box, out)``; ``gr.EventData`` has the
           data. Any event name works if it stands in quotes in the file (``box.my_event(...)``). Call ``trigger('change')``
           after assigning ``props.value``
server     the server functions; call them through ``fettle.call`` below, not directly
fettle     the shared library, assets/js/fettle.js (already loaded): formats, tokens, charts, states, storage
========== =====================================================================================================================

Value is a JSON-able Python object (dict, list, str). Keep ``${...}``, ``{{...}}``, back-quotes and backslashes out of templates:
Gradio would evaluate them and re-render the whole node at every change, losing focus, scroll and zoom. ``component`` refuses them.

**Server functions** take exactly one JSON object and return one JSON-able value::

    def since(given: dict) -> dict: ...                       # Python
    const answer = await fettle.call(server, 'since', {run: 3});   // JavaScript

``fettle.call`` retries while the server does not answer (idempotent reads: forever, with the "connection lost" banner; pass
``{retry: false}`` for actions such as start and stop). A user error (InputError, StorageError: anything with a remedy) comes back
as a rejected promise whose ``error.text`` is the sentence, with ``error.field`` and ``error.remedy`` where known; show it with
``fettle.note(node, 'bad', error.text)``. The wrapping is done here; write plain functions that raise.

**Native controls**: inside ``with gr.Column(elem_classes="ft-page")`` use ``with panel("Model", sub="...", step=1):`` and put
Gradio controls in it. ``elem_classes`` of a gr.HTML land on two nested elements, so classes with a border or padding go in templates.
Pass ``concurrency_limit=None, queue=False, show_progress="hidden"`` to light handlers so that they answer at once.

**JavaScript library** (window.fettle), by example::

    fettle.fig(1.0674) '1.07'   fettle.unit(1.07,'GB')   fettle.size(bytes)   fettle.gb(bytes)   fettle.count(482000) '482 k'
    fettle.clock(97) '1:37'     fettle.percent(.0481)    fettle.interval(1.369,1.355,1.383,'bits/byte')    fettle.moment(unix)
    fettle.el('div', {class:'ft-note', onclick: fn}, 'text or nodes', ...)   // strings become text nodes: never escaped by hand
    fettle.icon('copy')  fettle.icon('f-prune')  fettle.family('pruning')    // SVG from assets/icons.svg (ids i-*, f-*, s-*)
    fettle.state('running', 'Running')           // badge: glyph + word; fettle.verdict('yes'|'noise'|'no'|'na', word)
    fettle.text(node, 'string')                  // writes only when it differs
    fettle.token('run-1'), fettle.token('ink')   // a colour for Plotly; fettle.onTheme(repaint) when light/dark changes
    fettle.run(slot) -> {css, color, dash, symbol}   // identity of a run from its stored slot (0..9)
    fettle.layout({...}), fettle.CONFIG, fettle.hatch(xs, ys), fettle.plotly()  // Plotly basics; await fettle.plotly() first
    fettle.query.get('run'), fettle.query.set({run: 3})   // state that can be shared lives in the URL
    fettle.keep('key', default), fettle.keep.set('key', value)  // per-tab state (sessionStorage)
    fettle.table(columns, rows), fettle.csv('file.csv', columns, rows), fettle.copy(text), fettle.download(name, text, type)
    fettle.toast('Copied')  fettle.note(node, 'warn', text)  fettle.debounce(fn, 40)  fettle.confirm(button, 'Delete it')
    fettle.go('/live', {run: 3})                 // to another page
    new fettle.Chart(node, {...})                // streaming Plotly chart with zoom kept and an overlay: see assets/js/chart.js

**Links between pages**: ``/?clone=3`` (New run with the settings of run 3), ``/?preset=example``, ``/live?run=3``,
``/compare?runs=3,4``, ``/try?runs=3``, ``/library?method=lora``. After starting, stopping or deleting a run call
``dispatchEvent(new Event('fettle-changed'))`` so that the app bar counts again.
"""

from __future__ import annotations

import functools
import html
import importlib.util
import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

ASSETS = Path(__file__).resolve().parent.parent / "assets"
PLAIN_HTML = '<div class="ft"></div>'
log = logging.getLogger("fettle")


def component(name: str, *, value: Any = None, server_functions: Sequence[Callable] = (), js: str | None = None,
              template: str | None = None, elem_id: str | None = None, visible: bool | str = True, scripts: Sequence[str] = (),
              **props: Any) -> gr.HTML:
    """A ``gr.HTML`` from assets/js/``name``.js and assets/html/``name``.html; conventions in the module's docstring.

    Args:
        value: initial value, JSON-able.
        server_functions: each takes one JSON object and returns one JSON-able value.
        js: JavaScript text in place of the file.
        template: HTML text in place of the file.
        scripts: more files of assets/js (names without .js) that are loaded, in order, before the component's own.

    Raises:
        ValueError: the template holds something that Gradio would evaluate.
        FileNotFoundError: there is no such JavaScript file.
    """
    if js is None:
        js = (ASSETS / "js" / f"{name}.js").read_text()
    if template is None:
        file = ASSETS / "html" / f"{name}.html"
        template = file.read_text() if file.is_file() else PLAIN_HTML
    for bad in ("${", "{{", "`", "\\"):
        if bad in template:
            raise ValueError(f"template of {name} holds {bad!r}, which Gradio would evaluate")
    box = gr.HTML(value=value, html_template=template, js_on_load=f"{js}\n//# sourceURL=fettle/{name}.js",
                  apply_default_css=False, server_functions=[_guard(fn) for fn in server_functions], elem_id=elem_id or name,
                  visible=visible, head="".join(script(name) for name in scripts) or None, **props)
    return box


def user_error(error: BaseException) -> dict | None:
    """What a page shows for an error meant for people, or None when it is a defect of the program."""
    names = {c.__name__ for c in type(error).__mro__}
    if not names & {"FettleError", "StorageError"}:
        return None
    found = {"text": str(error)}
    for key in ("field", "problem", "remedy"):
        if hasattr(error, key):
            found[key] = str(getattr(error, key))
    return found


def _guard(fn: Callable) -> Callable:
    """The function with its errors turned into ``{"error": {...}}`` for ``fettle.call``."""
    def failed(error: Exception) -> dict:
        found = user_error(error)
        if found is None:
            log.exception("%s failed", fn.__name__)
            found = {"text": f"The workbench failed at {fn.__name__} ({type(error).__name__}: {error}). "
                             "The server's log has the details."}
        return {"error": found}

    if functools.partial is type(fn):
        raise ValueError("give a named function, not a partial")
    if inspect.iscoroutinefunction(fn):
        @functools.wraps(fn)
        async def guarded(given):
            try:
                return await fn(given)
            except Exception as error:
                return failed(error)
    else:
        @functools.wraps(fn)
        def guarded(given):
            try:
                return fn(given)
            except Exception as error:
                return failed(error)
    # the name is what the page calls; typing would make Gradio look for special arguments
    guarded.__wrapped__ = None
    del guarded.__wrapped__
    guarded.__annotations__ = {}
    return guarded


def panel(title: str, sub: str = "", *, step: int | None = None, elem_id: str | None = None, scale: int | None = None):
    """A panel around native controls: a context manager. ``step`` is the circled number in front of the title."""
    outer = gr.Column(elem_classes="ft-panel", elem_id=elem_id, scale=scale, min_width=0)

    class Panel:
        def __enter__(self):
            outer.__enter__()
            number = f'<span class="ft-step">{step}</span>' if step else ""
            gr.HTML(f'<div class="ft"><header class="ft-head">{number}<h2>{html.escape(title)}</h2>'
                    f'<span class="sub">{html.escape(sub)}</span></header></div>', apply_default_css=False, js_on_load=None)
            self.body = gr.Column(elem_classes="ft-body")
            self.body.__enter__()
            return outer

        def __exit__(self, *details):
            self.body.__exit__(*details)
            outer.__exit__(*details)
    return Panel()


def plotly_js() -> Path:
    """plotly.min.js of the installed plotly package, found without importing it."""
    where = importlib.util.find_spec("plotly").submodule_search_locations[0]
    return Path(where) / "package_data" / "plotly.min.js"


def url(path: Path) -> str:
    """Address of a static file; the query changes with the file so that no stale copy is used."""
    return f"/gradio_api/file={path}?v={int(path.stat().st_mtime)}"


def static_paths() -> list[Path]:
    """What the server may serve as it is."""
    return [ASSETS / "js", ASSETS / "css", plotly_js()]


def script(name: str) -> str:
    """Script tag of assets/js/``name``.js."""
    return f'<script src="{url(ASSETS / "js" / f"{name}.js")}"></script>'


SHARED = ("fettle", "fettle_page", "chart_draw", "chart")
"""Libraries of assets/js that every page loads; the rest belong to one component each."""


def head() -> str:
    """The document head: theme before first paint, shared libraries, where plotly.js is (loaded only by pages with charts)."""
    # Written into the page: Gradio adds what it finds here while it starts, and a script by address may arrive after the first component has run.
    text = {name: (ASSETS / "js" / f"{name}.js").read_text() for name in ("early", *SHARED)}
    shared = "".join(f"<script>{text[name]}\n//# sourceURL=fettle/{name}.js</script>" for name in SHARED)
    return (f'<meta name="color-scheme" content="light dark"><script>{text["early"]}</script>'
            f'<script>window.FETTLE_PLOTLY = "{url(plotly_js())}";</script>{shared}')
