"""The errors a person sees: one sentence that says what is wrong and what to do.

Anything else that escapes is a defect of the program and is shown by the failure doctor with the
last lines of the log.
"""


def ended(text: str) -> str:
    """``text`` with the full stop that it needs, or the mark that it has."""
    text = text.rstrip()
    return text if text.endswith(("?", "!", ".")) else text + "."


class FettleError(Exception):
    """Base of every error meant for people; ``str()`` is one sentence with the remedy."""

    exit_code = 1


class InputError(FettleError):
    """What was asked for cannot be done; nothing was started, nothing is lost.

    Args:
        field: the setting at fault, dotted (``budget.minutes``, ``pipeline[1].rank``).
        value: what was given.
        problem: why it cannot be used, a clause without full stop.
        remedy: what to do instead, an imperative sentence.
    """

    exit_code = 2

    def __init__(self, field: str, value, problem: str, remedy: str):
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field} = {shown}: {ended(problem)} {ended(remedy)}")


class RunFailed(FettleError):
    """A run cannot go on; ``cause`` and ``remedy`` are each one sentence."""

    def __init__(self, cause: str, remedy: str):
        self.cause, self.remedy = cause, remedy
        super().__init__(f"{ended(cause)} {ended(remedy)}")


class StopRequested(Exception):
    """The person asked the run to stop or to pause; raised at a step boundary after a checkpoint."""

    def __init__(self, kind: str):
        self.kind = kind
        super().__init__(kind)
