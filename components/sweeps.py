"""Sweeps: the list, the setting up of one with its forecast, and the view of one as it goes on."""

from __future__ import annotations

import hashlib
import json

from components.layout import component

PARTS = ("interval", "sweeps_front", "sweeps_more", "sweeps_trials", "sweeps_setup")
"""Files of assets/js that make the page, besides its entry sweeps.js."""


def build(home) -> None:
    """The whole page is one component."""
    component("sweeps", scripts=PARTS, server_functions=functions(home))


def functions(home) -> list:
    """What the page asks for; each takes one JSON object and returns one."""

    def boot(given: dict) -> dict:
        from workbench import catalog
        from workbench.sweeps import view
        presets = catalog.presets()
        return view.choices() | {"presets": [{"id": p["id"], "title": p["title"], "yaml": p["yaml"]} for p in presets]}

    def base(given: dict) -> dict:
        """The text of a run's or a list's spec: ``{run}`` or ``{specs}``."""
        from workbench import runs
        from workbench.spec import RunSpec
        if given.get("run"):
            return {"yaml": RunSpec.from_dict(runs.clone(given["run"], home=home)).to_yaml()}
        return {"yaml": RunSpec.from_dict(given["specs"][0]).to_yaml(),
                "specs": [" + ".join(m.card.name for m in RunSpec.from_dict(s).pipeline) or "evaluate" for s in given["specs"]]}

    def fields(given: dict) -> dict:
        """The fields of a spec that may be varied, each with a proposal."""
        from workbench.spec import RunSpec
        from workbench.sweeps.proposals import proposals
        return {"fields": proposals(RunSpec.from_yaml(given["yaml"]))}

    def forecast(given: dict) -> dict:
        """What the sweep in the form is expected to take, and its command."""
        from workbench.sweeps import service
        spec, section = asked(given)
        plan, found = service.prepare(spec, section, home)
        return found | {"sampler": plan.sampler, "command": command(given)}

    def start(given: dict) -> dict:
        from workbench.sweeps import service
        spec, section = asked(given)
        row = service.start(spec, section, name=given.get("name"), home=home)
        return {"sweep": row["id"], "name": row["name"]}

    def listing(given: dict) -> dict:
        from workbench.sweeps import view
        return unless(given, {"sweeps": view.listing(home)})

    def status(given: dict) -> dict:
        from workbench.sweeps import view
        return unless(given, view.status(given["sweep"], home=home))

    def stop(given: dict) -> dict:
        from workbench.sweeps import service
        return service.stop(given["sweep"], home=home)

    def resume(given: dict) -> dict:
        from workbench.sweeps import service
        return service.resume(given["sweep"], home=home)

    def delete(given: dict) -> dict:
        from workbench.sweeps import service
        service.delete(given["sweep"], home=home)
        return {"deleted": given["sweep"]}

    return [boot, base, fields, forecast, start, listing, status, stop, resume, delete]


def unless(given: dict, answer: dict) -> dict:
    """The answer, or only its mark when the page has it already."""
    mark = hashlib.md5(json.dumps(answer, sort_keys=True, default=str).encode()).hexdigest()
    return {"same": mark} if given.get("seen") == mark else json.loads(json.dumps(answer, default=str)) | {"mark": mark}


def asked(given: dict) -> tuple[dict, dict]:
    """The base spec and the ``sweep:`` section that the form describes.

    Raises:
        InputError: the text is no spec, or a range cannot be read.
    """
    from workbench.commands.sweep import over
    from workbench.spec import RunSpec
    section = {k: given[k] for k in ("objectives", "sampler", "pruner", "trials", "minutes", "on") if given.get(k)}
    if given.get("specs"):
        return given["specs"][0], section | {"specs": given["specs"]}
    rows = [r for r in given.get("over") or () if (r.get("path") or "").strip() and (r.get("values") or "").strip()]
    section["over"] = dict(over(f"{r['path'].strip()}={r['values']}") for r in rows)
    return RunSpec.from_yaml(given["yaml"]).to_dict(), section


def command(given: dict) -> str:
    """The same sweep on the command line; the base is a file of the text in the form."""
    import shlex
    if given.get("specs"):
        return "python -m workbench sweep sweep.yaml"
    parts = ["python -m workbench sweep spec.yaml"]
    for row in given.get("over") or ():
        if row.get("path") and row.get("values"):
            parts.append("--over " + shlex.quote(f"{row['path'].strip()}={row['values'].replace(', ', ',')}"))
    parts += [f"--objective {name}" for name in given.get("objectives") or ()]
    parts += [f"--{name} {given[name]}" for name in ("sampler", "pruner", "trials", "on") if given.get(name)]
    return " ".join(parts + ([f"--minutes-total {given['minutes']}"] if given.get("minutes") else []))
