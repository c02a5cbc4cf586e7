"""Everything that xmc_ray raises on purpose.

XmcError
├── ConfigError   a setting, an option or a place to write to is wrong
│   └── UnavailableError   storage or a cluster does not answer at the moment, and may be asked again
├── DataError     documents, labels or their files are wrong
└── ModelError    a bundle, a checkpoint, an encoder or a training run is wrong

Each is one line that says what is wrong, where, what was found, what was expected, and the way out.
"""

import os
import re
import sys
import warnings

# Neither HTML nor UTF-8 can hold these, and a terminal obeys some of them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_BYTE = re.compile("[\udc80-\udcff]")  # of a file name that is not UTF-8, as Python reads it
_SECRET = "KEY|TOKEN|SECRET|PASS|CREDENTIAL"  # in the name of a variable, or of a parameter in an address
_PARAMETER = re.compile(rf"(?<=[?&])([^=&\s]*(?:{_SECRET}|SIG)[^=&\s]*=)[^&\s]+", re.IGNORECASE)
_USER = re.compile(r"(?<=://)\S+@")  # up to the last @, since passwords may hold any character
_LEAST = 8  # characters of the value of such a variable


def scrubbed(text: str) -> str:
    """The text of somebody else's error, without what looks like a credential."""
    text = _PARAMETER.sub(r"\1***", _USER.sub("***@", text))
    for name, value in os.environ.items():
        if len(value) >= _LEAST and re.search(_SECRET, name, re.IGNORECASE):
            text = text.replace(value, "***")
    return text


def printable(text: str) -> str:
    """The text with U+FFFD in place of control codes and lone surrogates; tabs and ends of lines stay.

    Bytes of a file name that is not UTF-8 are shown as ``\\xff``, so that the file can be found.
    """
    text = _BYTE.sub(lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", text)
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def one_line(text: str) -> str:
    """The text `printable`, with spaces in place of ends of lines: for data among the words of a job."""
    return printable(" ".join(text.splitlines()))


class XmcError(Exception):
    """Base of all errors raised on purpose; ``str()`` is one line fit for a terminal."""

    def __init__(
        self, what: str, *, where: object = None, found: object = None, expected: object = None, way_out: str | None = None
    ) -> None:
        self.what, self.where, self.found, self.expected, self.way_out = what, where, found, expected, way_out
        parts = [what if where is None else f"{what}: {where}"]
        parts += [f"found {found}"] if found is not None else []
        parts += [f"expected {expected}"] if expected is not None else []
        parts += [way_out] if way_out is not None else []
        super().__init__(" ".join(printable("; ".join(parts)).split()))  # data are in it: labels, names of columns and files

    def __reduce__(self) -> tuple[object, ...]:
        # Crosses process borders (a Ray worker to its driver), where the default would lose the keyword arguments.
        return _rebuild, (type(self), self.what, self.where, self.found, self.expected, self.way_out)


class ConfigError(XmcError):
    """A setting, an option or a place to write to is wrong. Told before anything is written, unless another job takes the place
    over in the middle."""


class UnavailableError(ConfigError):
    """Storage or a cluster does not answer: no connection, a time-out, a lost machine. Asking again later may help."""


class DataError(XmcError):
    """Documents, labels or their files are wrong."""


class ModelError(XmcError):
    """A bundle, a checkpoint, an encoder or a training run is wrong."""


def _rebuild(kind: type[XmcError], what: str, where: object, found: object, expected: object, way_out: str | None) -> XmcError:
    return kind(what, where=where, found=found, expected=expected, way_out=way_out)


def warn_caller(line: str) -> None:
    """A warning at the line that has called this library, however deep within it the reason was found."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "xmc_ray":
        level, frame = level + 1, frame.f_back
    warnings.warn(line, stacklevel=level)
