"""Errors with an HTTP response, as the Hub's client raises them."""

from huggingface_hub import errors as hub_errors


def http_error(kind: type, status: int, text: str = "no") -> Exception:
    client = hub_errors.HTTPError.__module__.partition(".")[0]
    http = __import__(client)
    url = "https://huggingface.co/api/datasets/owner/name?token=abc"
    return kind(text, response=http.Response(status, request=http.Request("GET", url)))
