"""What went wrong at an S3 store, in a few words that name no secret, no address and no server path."""

from __future__ import annotations

import re

from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

_STATUS = re.compile(r"status(?: code)?:? (\d{3})")
_CODES = {
    "<Code>NoSuchBucket<": "there is no such bucket",
    "<Code>InvalidAccessKeyId<": "the credentials were refused",
    "<Code>SignatureDoesNotMatch<": "the credentials were refused",
    "<Code>RequestTimeTooSkewed<": "this machine's clock is wrong",
    "kind: Timeout": "it took too long",
    "kind: Connect": "the endpoint cannot be reached",
    "kind: Request": "the connection broke off",
}


def reason_of(problem: BaseException) -> str:
    """Of what obstore raised: its messages carry URLs and answers, which are not the caller's to see."""
    text = str(problem)
    known = _known(text)
    if known:
        return known
    if isinstance(problem, PermissionDeniedError | UnauthenticatedError):
        return "access was denied"
    found = _STATUS.search(text)
    return reason_of_answer(int(found[1])) if found else "the endpoint did not accept it"


def reason_of_answer(status: int, body: str = "") -> str:
    """Of an answer's status and its XML."""
    known = _known(body)
    if known:
        return known
    if status in (401, 403):
        return "access was denied"
    return f"server error {status}" if status >= 500 else f"the endpoint answered {status}"


def _known(text: str) -> str:
    return next((reason for mark, reason in _CODES.items() if mark in text), "")
