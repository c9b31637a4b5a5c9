"""The one error a user can cause; everything that catches it prints the message without a traceback, exit code 2."""


class UserError(ValueError):
    """A wrong call, file or value. The message names the value and the fix."""


def missing_extra(package: str, extra: str) -> UserError:
    """The error for an optional package that is not installed, with the line that installs it."""
    return UserError(f"{package} is not installed; install it with: pip install 'lilliput[{extra}]'")
