"""The command line: ``python -m workbench COMMAND``. Each command prints text for people, or with ``--json`` one object or list.

Exit codes: 0 done, 1 failed, 2 bad input with one sentence on stderr. Nothing here imports torch; what computes runs in
processes of its own.
"""

from __future__ import annotations

import argparse
import os
import sys

from engines.errors import FettleError, InputError
from workbench.cli_shared import complain, spec_flags


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of printing the usage."""

    def error(self, message: str):
        raise InputError(
            "command",
            " ".join(sys.argv[1:]) if self.prog.endswith("__main__.py") else self.prog,
            message,
            f"See `{self.prog} --help`",
        )


def build() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from workbench import cli_commands as commands
    from workbench import cli_run

    top = Parser(prog="python -m workbench", description="Fit a neural model to a budget: adapt, prune, quantize, compare.")
    sub = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def add(name: str, help: str, act, spec: bool = False, **more):
        p = sub.add_parser(name, help=help, description=help, **more)
        p.add_argument("--json", action="store_true", help="print one JSON object or list")
        p.set_defaults(act=act)
        if spec:
            spec_flags(p)
        return p

    p = add("models", "the bundled models, or the profile of one", commands.models)
    p.add_argument("model", nargs="?", help="bundled id, folder or hub id")
    p = add("data", "the bundled data, or a preview of one", commands.data)
    p.add_argument("data", nargs="?", help="bundled id, file, folder or hub id")
    p.add_argument("--text", help="text column")
    p.add_argument("--label", help="label column")
    p.add_argument("--task", help="causal-lm, text-classification or image-classification")
    p.add_argument("--rows", type=int, default=5, help="example rows to show")
    p = add("methods", "the methods, or the card of one", commands.methods)
    p.add_argument("method", nargs="?", help="method id")
    p.add_argument("--family", help="only this family")
    p = add("plan", "forecast a run without starting it", commands.plan, spec=True)
    p.add_argument("--probe", action="store_true", help="measure first: two real steps and an evaluation batch, a minute at the most")
    p = add("run", "start a run and follow it", cli_run.run, spec=True)
    p.add_argument("--detach", action="store_true", help="return as soon as it is started")
    p = add("runs", "list the runs", commands.runs)
    p.add_argument("--status", help="queued, starting, running, paused, finished, stopped, failed or lost")
    p.add_argument("--search", help="words in name, note, tags or spec")
    p.add_argument("--tag")
    p.add_argument("--limit", type=int, default=20)
    p = add("show", "everything about a run", commands.show)
    p.add_argument("run", help="id or name")
    p = add("points", "one series of a run", commands.points)
    p.add_argument("run", help="id or name")
    p.add_argument("series", nargs="?", help="its name; without it the series are listed")
    p.add_argument("--since", type=int, help="only steps after this one")
    p.add_argument("--buckets", type=int, help="at most this many minimum and maximum pairs")
    p = add("compare", "several runs side by side", commands.compare)
    p.add_argument("run", nargs="+", help="ids or names")
    p.add_argument("--at", action="append", default=[], metavar="AXIS=VALUE",
                   help="read every run at the same expenditure: seconds=60, step, tokens, joules, trainable or size (MB); repeat for more")
    p.add_argument("--y", default="quality", metavar="QUANTITY", help="with --at: quality, loss_eval or loss")
    for name, help in (
        ("stop", "end a run at the next step; what it has learnt is evaluated and saved"),
        ("pause", "checkpoint a run and free its memory"),
        ("resume", "go on from the last checkpoint"),
    ):
        p = add(name, help, commands.control)
        p.add_argument("run", help="id or name")
    p = add("try", "one prompt or example through several variants", commands.tryout)
    p.add_argument("variant", nargs="+", help="run id or name, or a model")
    p.add_argument("--prompt", help="text to continue or to classify")
    p.add_argument("--data", metavar="SOURCE", help="image classifiers: the data set whose held-out item is shown (digits)")
    p.add_argument("--item", type=int, default=0, help="image classifiers: number of the held-out item")
    p.add_argument("--image", metavar="FILE", help="image classifiers: a file of your own")
    p.add_argument("--top-p", type=float, default=0.95)
    p.add_argument("--new-tokens", type=int, default=64)
    p.add_argument("--temperature", type=float, default=0.7)
    p.add_argument("--seed", type=int, default=0)
    p = add("export", "write a run's model into a folder", commands.export)
    p.add_argument("run", help="id or name")
    p.add_argument("folder")
    p.add_argument("--format", default="transformers", help="transformers, peft or native")
    p = add("report", "one self-contained HTML page about runs", commands.report)
    p.add_argument("run", nargs="+", help="ids or names, then the file to write")
    p = add("doctor", "check this installation", commands.doctor)
    p.add_argument("--measure", action="store_true", help="measure this machine's rates again (about ten seconds)")
    from workbench import commands as further

    further.register(add)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        the exit code.
    """
    try:
        args = build().parse_args(argv)
        return args.act(args) or 0
    except SystemExit as e:  # --help
        return int(e.code or 0)
    except FettleError as e:
        return complain(e, e.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return complain("Interrupted.", 1)
    except Exception as e:
        if os.environ.get("FETTLE_DEBUG"):
            raise
        if hasattr(e, "exit_code"):  # storage's errors know theirs
            return complain(e, e.exit_code)
        return complain(
            f"Unexpected {type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else 'no message'}. "
            "Set FETTLE_DEBUG=1 to see where",
            1,
        )


