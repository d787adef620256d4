"""Reads a server's metrics endpoint."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from prometheus_client.parser import text_string_to_metric_families

_MAX_BYTES: Final = 32 * 2**20
_TIMEOUT_S: Final = 5.0

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine, or near


class ScrapeError(Exception):
    """The endpoint cannot be read. The message is one line with the remedy."""


@dataclass(frozen=True, slots=True)
class Sample:
    labels: dict[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Scrape:
    """What an endpoint said: samples by name, `hotswap_` left out, at the time `at` of a monotonic clock."""

    at: float
    samples: dict[str, list[Sample]]

    def of(self, name: str) -> list[Sample]:
        return self.samples.get(name, [])

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        return sum(s.value for s in self.of(name) if labels.items() <= s.labels.items())


def endpoint(text: str) -> str:
    """The full address of `HOST:PORT`, or of a URL with or without its path.

    Raises:
        ScrapeError: it is neither.
    """
    url = urllib.parse.urlsplit(text if "://" in text else f"http://{text}")
    try:
        valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ScrapeError(f"{text}: is no address; give HOST:PORT or http://HOST:PORT/metrics")
    return url._replace(path=url.path if url.path.strip("/") else "/metrics").geturl()


def scrape(url: str) -> Scrape:
    """Raises ScrapeError."""
    try:
        with _opener.open(url, timeout=_TIMEOUT_S) as reply:
            body = reply.read(_MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:  # it holds the connection
            problem = f"{url}: answers {error.code} {error.reason}; is it a metrics endpoint?"
        raise ScrapeError(problem) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        cause = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise ScrapeError(
            f"{url}: cannot be read ({cause}); does a server run with this --metrics-port?"
        ) from None
    if len(body) > _MAX_BYTES:
        raise ScrapeError(f"{url}: answers more than {_MAX_BYTES >> 20} MiB; is it a metrics endpoint?")
    return parse(body.decode(errors="replace"), url)


def parse(text: str, url: str = "the text") -> Scrape:
    """Raises ScrapeError if there is nothing of hotswap in it."""
    samples: dict[str, list[Sample]] = {}
    try:
        for name, sample in _read(text):
            samples.setdefault(name, []).append(sample)
    except (ValueError, LookupError):  # which of them depends on how the text is broken
        samples = {}
    if "build_info" not in samples:
        raise ScrapeError(
            f"{url}: answers no metrics of hotswap; give the address of a server's --metrics-port"
        )
    return Scrape(time.monotonic(), samples)


def _read(text: str) -> Iterator[tuple[str, Sample]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("hotswap_"):
                yield sample.name.removeprefix("hotswap_"), Sample(dict(sample.labels), float(sample.value))
