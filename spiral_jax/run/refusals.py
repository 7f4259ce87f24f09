"""Errors of a read that say nothing about what was read: the machine has refused something."""

from __future__ import annotations

import errno
import re

import jax

_CODES = {
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
    errno.EIO,
    errno.ENODEV,
    errno.ENXIO,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.ETIMEDOUT,
}
_CODE_IN_TEXT = re.compile(r"os_error_code='(\d+)'")  # TensorStore's errors have no errno


def refusal(error: BaseException | None) -> BaseException | None:
    """What the machine has refused, among `error` and its causes; None: nothing.

    Memory, one more open file, permission, a disk or a mount that answers.
    """
    while error is not None and not _is_refusal(error):
        error = error.__cause__ or error.__context__
    return error


def _is_refusal(error: BaseException) -> bool:
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):  # host and device
        return True
    codes = {int(code) for code in _CODE_IN_TEXT.findall(str(error))}
    return bool(_CODES & (codes | {getattr(error, "errno", None)}))
