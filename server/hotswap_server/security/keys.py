"""API keys: `hs_ID_SECRET`, of which a server keeps the id and a hash.

The secret is 32 random bytes, so nobody finds it by guessing, whatever the hash costs: SHA-256 is enough, and
a slow hash (as passwords need) would only let strangers keep the server busy.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from typing import Final

_KEY: Final = re.compile(r"hs_(?P<id>[0-9a-f]{16})_(?P<secret>[A-Za-z0-9_-]{43})", re.ASCII)
_HASH: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NO_HASH: Final = "0" * 64


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key in full. `text` is what a caller sends; it stays out of the `repr`."""

    id: str
    text: str = field(repr=False)

    @classmethod
    def create(cls) -> ApiKey:
        """A fresh random key."""
        id_ = secrets.token_hex(8)
        return cls(id_, f"hs_{id_}_{secrets.token_urlsafe(32)}")

    @classmethod
    def parse(cls, text: str) -> ApiKey | None:
        """The key that `text` has the form of, or None."""
        match = _KEY.fullmatch(text)
        return None if match is None else cls(match["id"], text)

    @property
    def hash(self) -> str:
        """SHA-256 of the whole text, in lower-case hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def matches(self, stored_hash: str | None) -> bool:
        """Whether this is the key with that hash; takes the same time if not, or if there is none (None)."""
        same = hmac.compare_digest(self.hash, _NO_HASH if stored_hash is None else stored_hash)
        return same and stored_hash is not None


def is_hash(text: str) -> bool:
    """Whether `text` has the form of `ApiKey.hash`."""
    return _HASH.fullmatch(text) is not None
