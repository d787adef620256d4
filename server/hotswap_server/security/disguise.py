"""Adapters that a caller may not use are looked up under names that no store has.

So "forbidden" is not an answer of its own: checks, work, code and message are those of an adapter that is not
there, whatever call it is.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Final

from hotswap_server.errors import HotswapError

# One name stands for another as long as the process lives, so that what is cached of it is, too.
_SECRET: Final = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True)
class Disguise:
    """`name`, as the caller gave it, and the name that stands for it inside the server."""

    name: str
    stand_in: str

    @classmethod
    def of(cls, name: str) -> Disguise:
        """`name` is well-formed; the tenant is made up too, as what the store answers may tell of it."""
        digest = hmac.new(_SECRET, name.encode(), hashlib.sha512).hexdigest()
        return cls(name, f"{digest[:40]}/{digest[40:80]}")

    def reveal(self, text: str) -> str:
        """`text` with the caller's name in it."""
        ours, theirs = self.stand_in.split("/"), self.name.split("/")
        text = text.replace(self.stand_in, self.name)
        return text.replace(ours[0], theirs[0]).replace(ours[1], theirs[1])

    def reveal_error(self, error: HotswapError) -> HotswapError:
        """`error` in the caller's terms; the same object."""
        error.args = tuple(self.reveal(arg) if isinstance(arg, str) else arg for arg in error.args)
        error.metadata = {key: self.reveal(value) for key, value in error.metadata.items()}
        return error
