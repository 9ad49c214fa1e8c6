"""Errors that a client sees, in the shape of OpenAI's API: what is wrong and where, and nothing of the insides."""

from typing import Any

INTERNAL = "the server failed on this request; its log has the details"


class APIError(Exception):
    """A refusal with an HTTP status.

    Parameters
    ----------
    status : int
        HTTP status.
    message : str
        For people: the option, the value and what is accepted.
    code : str
        For programs.
    param : str or None
        Field of the request that is wrong.
    retry_after : int or None
        Seconds after which the same request may succeed.
    """

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after: int | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        """OpenAI's error type of the status."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that go with it."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> APIError:
    """A 400: the request is wrong."""
    return APIError(400, message, code=code, param=param)


def not_found(what: str, name: str) -> APIError:
    """A 404: unknown, or another key's, which must look the same."""
    return APIError(404, f"{what} {name!r} is not known", code=f"{what.replace(' ', '_')}_not_found")


def stopping() -> APIError:
    """A 503: the server is going down."""
    return APIError(503, "the server is stopping", code="server_stopping", retry_after=10)


def busy(message: str, retry_after: int) -> APIError:
    """A 429: the same request may succeed later."""
    return APIError(429, message, code="server_busy", retry_after=retry_after)
