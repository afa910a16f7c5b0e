"""What the errors of the storage libraries mean, and calling again after a fault."""

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
# A bucket that has not answered for so long counts as lost.
LIMIT_SECS = 300.0
_FIRST_WAIT_SECS, _LONGEST_WAIT_SECS = 0.5, 20.0
# Libraries whose own errors are of the network, or of a server that is busy.
_NETWORK = ("aiohttp", "aiobotocore", "botocore", "requests", "urllib3", "fsspec")
_TRANSIENT_CODES = {408, 429, *range(500, 505)}
_TRANSIENT_ERRNOS = {
    errno.EBUSY, errno.ECONNRESET, errno.ETIMEDOUT, errno.ECONNREFUSED,
    errno.EHOSTUNREACH, errno.ENETUNREACH,
    getattr(errno, "EREMOTEIO", errno.EIO),  # what s3fs makes of a server's error
}  # fmt: skip
# What TensorStore says, of which every error is a ValueError.
_TRANSIENT_WORDS = (
    "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED: ", "CURL error", "Timed out",
)  # fmt: skip
_FORBIDDEN_WORDS = ("Forbidden", "PERMISSION_DENIED", "AccessDenied", "Access Denied")
_LOGIN_WORDS = (
    "Anonymous caller", "UNAUTHENTICATED", "Invalid Credentials", "Unauthorized",
    "Unable to locate credentials", "InvalidAccessKeyId", "ExpiredToken",
    "security token", "could not find default credentials",
)  # fmt: skip


def chain(error: BaseException) -> list[BaseException]:
    """The error and its causes, the outermost first."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__
    return found


def is_login(error: BaseException) -> bool:
    """Whether it says that there are no credentials, or none that hold."""
    return any(
        _code_of(each) == 401
        or "NoCredentials" in type(each).__name__
        or "DefaultCredentialsError" in type(each).__name__
        or any(word in str(each) for word in _LOGIN_WORDS)
        for each in chain(error)
    )


def is_forbidden(error: BaseException) -> bool:
    """Whether it says that these credentials may not do this."""
    return any(
        isinstance(each, PermissionError)
        or _code_of(each) == 403
        or any(word in str(each) for word in _FORBIDDEN_WORDS)
        for each in chain(error)
    )


def is_network(error: BaseException) -> bool:
    """Whether it is a fault of the network or of a busy server, and may pass."""
    if is_login(error) or is_forbidden(error):
        return False
    return any(_is_network(each) for each in chain(error))


def _is_network(error: BaseException) -> bool:
    if isinstance(error, FileNotFoundError | FileExistsError):
        return False
    if type(error).__module__.startswith("jax"):  # jaxlib too
        return False  # of devices and of the run's other processes, in the same words
    code = _code_of(error)
    if code is not None:
        return code in _TRANSIENT_CODES
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    if any(word in str(error) for word in _TRANSIENT_WORDS):
        return True
    library = type(error).__module__.partition(".")[0]
    return library in _NETWORK and type(error).__name__ != "ParamValidationError"


def _code_of(error: BaseException) -> int | None:
    """The HTTP status that an error of gcsfs or of botocore carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code: Any = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        code = getattr(error, "code", None)
    try:
        return int(code)
    except (TypeError, ValueError):
        return None


def one_line(error: BaseException, longest: int = 200) -> str:
    """What an error says, on one line that names its kind."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return f"{kind}: {text}"[:longest] if text else kind


def retrying(call: Callable[[], _T], what: str, limit_secs: float | None = None) -> _T:
    """Call until it succeeds, again and again while the network is at fault.

    Args:
        what: what is tried, for the log.
        limit_secs: from the first fault on; LIMIT_SECS if None.

    Raises:
        Exception: the error of the last try.
    """
    limit = LIMIT_SECS if limit_secs is None else limit_secs
    wait, until = _FIRST_WAIT_SECS, None
    while True:
        try:
            return call()
        except Exception as error:
            now = time.monotonic()
            until = now + limit if until is None else until
            if not is_network(error) or now + wait > until:
                raise
            logger.debug("%s: %s; again in %.1f s", what, one_line(error), wait)
        time.sleep(wait * random.uniform(0.5, 1.0))
        wait = min(2 * wait, _LONGEST_WAIT_SECS)
