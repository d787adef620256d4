"""Keys files of tests."""

from pathlib import Path
from typing import Any

from hotswap_server.security.access import Access
from hotswap_server.security.keys import ApiKey
from hotswap_server.security.keys_file import CertificateEntry, KeyEntry, KeysDocument, rewriting
from hotswap_server.security.setup import Security


class Keyring:
    """A keys file; `add` gives the metadata that a call with the new key carries."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ids: dict[str, str] = {}
        with rewriting(path):
            pass

    def add(self, principal: str, role: str = "user", *adapters: str, **fields: Any) -> tuple[Any, ...]:
        key = ApiKey.create()
        self.ids[principal] = key.id
        entry = KeyEntry(
            id=key.id, hash=key.hash, principal=principal, role=role, adapters=adapters, **fields
        )
        self.change(lambda old: old.model_copy(update={"keys": (*old.keys, entry)}))
        return bearer(key.text)

    def add_certificate(self, subject: str, principal: str, role: str = "user", *adapters: str) -> None:
        entry = CertificateEntry(subject=subject, principal=principal, role=role, adapters=adapters)
        self.change(lambda old: old.model_copy(update={"certificates": (*old.certificates, entry)}))

    def revoke(self, principal: str) -> None:
        gone = self.ids[principal]
        self.change(
            lambda old: old.model_copy(update={"keys": tuple(key for key in old.keys if key.id != gone)})
        )

    def change(self, how: Any) -> None:
        with rewriting(self.path) as documents:
            changed: KeysDocument = how(documents[0])
            documents.append(changed)

    def security(self, **options: Any) -> Security:
        return Security(Access(self.path), **options)


def bearer(text: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {text}"),)
