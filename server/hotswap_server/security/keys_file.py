"""The keys file: YAML or JSON with the keys and client certificates that may call."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Final, TypeVar

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, field_validator

from hotswap_server.security.keys import is_hash
from hotswap_server.security.principals import AdapterPatterns, Limits, Principal, Role

MAX_BYTES: Final = 16 << 20
_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._@:/-]{0,127}$"


E = TypeVar("E")


class KeysFileError(ValueError):
    """The keys file cannot be used. The message is one line that names the file, the entry and the remedy."""


class _Entry(BaseModel):
    """What keys and certificates have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    principal: str = Field(pattern=_NAME)
    role: str = "user"
    adapters: tuple[str, ...] = ()
    requests_per_second: float | None = Field(None, gt=0, allow_inf_nan=False)
    tokens_per_minute: int | None = Field(None, gt=0)
    concurrent_requests: int | None = Field(None, gt=0)

    @field_validator("role")
    @classmethod
    def _known_role(cls, value: str) -> str:
        return str(Role.of(value))

    @field_validator("adapters")
    @classmethod
    def _well_formed(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return AdapterPatterns(value).patterns

    def to_principal(self) -> Principal:
        limits = Limits(self.requests_per_second, self.tokens_per_minute, self.concurrent_requests)
        return Principal(self.principal, Role.of(self.role), AdapterPatterns(self.adapters), limits)


class KeyEntry(_Entry):
    """An API key: its id, and the SHA-256 of the whole key."""

    id: str = Field(pattern=r"^[0-9a-f]{16}$")
    hash: str
    created: AwareDatetime | None = None
    expires: AwareDatetime | None = None

    @field_validator("hash")
    @classmethod
    def _is_hash(cls, value: str) -> str:
        if not is_hash(value):
            raise ValueError("must be a SHA-256 in lower-case hexadecimal")
        return value

    def expired(self, now: datetime) -> bool:
        return self.expires is not None and now >= self.expires


class CertificateEntry(_Entry):
    """A client certificate by one of its names: a DNS name or URI of its SAN, or its common name."""

    subject: str = Field(min_length=1, max_length=1024)


class KeysDocument(BaseModel):
    """A whole keys file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[KeyEntry, ...] = ()
    certificates: tuple[CertificateEntry, ...] = ()

    @field_validator("keys")
    @classmethod
    def _unique_ids(cls, value: tuple[KeyEntry, ...]) -> tuple[KeyEntry, ...]:
        return _unique(value, lambda key: key.id, "id")

    @field_validator("certificates")
    @classmethod
    def _unique_subjects(cls, value: tuple[CertificateEntry, ...]) -> tuple[CertificateEntry, ...]:
        return _unique(value, lambda certificate: certificate.subject, "subject")


def read_keys(path: Path) -> KeysDocument:
    """The content of a keys file.

    Raises:
        KeysFileError: it cannot be read, others may write it, or an entry is wrong.
    """
    try:
        with open(path, "rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & stat.S_IWOTH:
                raise KeysFileError(f"{path}: everybody may write it; chmod 600 it")
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise KeysFileError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise KeysFileError(f"{path}: has over {MAX_BYTES} bytes")
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        content = json.loads(data) if path.suffix == ".json" else yaml.load(data, loader)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        # Not its text, which quotes the file.
        where = getattr(error, "problem_mark", None)
        at = f" at line {where.line + 1}" if where is not None else ""
        raise KeysFileError(f"{path}: is not {'JSON' if path.suffix == '.json' else 'YAML'}{at}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise KeysFileError(f"{path}: must map `keys` and `certificates` to lists of entries")
    try:
        return KeysDocument.model_validate(
            {key: value for key, value in content.items() if value is not None}
        )
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        rule = str(problem["msg"]).removeprefix("Value error, ")
        raise KeysFileError(f"{path}: {place}: {rule[0].lower()}{rule[1:]}") from None


@contextmanager
def rewriting(path: Path) -> Iterator[list[KeysDocument]]:
    """The content of a keys file in a list, whose last item replaces it at the end; others wait meanwhile.

    The file is replaced by a rename, and is then its owner's alone to read and write. One that is not there
    is empty.

    Raises:
        KeysFileError: it cannot be read or written.
    """
    from filelock import FileLock

    target = Path(os.path.realpath(path))
    try:
        with FileLock(target.with_name(f".{target.name}.lock"), mode=0o600):
            documents = [read_keys(target) if target.exists() else KeysDocument()]
            yield documents
            _replace(target, documents[-1])
    except OSError as error:
        raise KeysFileError(f"{path}: cannot be written: {error.strerror or error}") from None


def _replace(path: Path, document: KeysDocument) -> None:
    content = document.model_dump(mode="json", exclude_defaults=True)
    text = (
        json.dumps(content, indent=2) + "\n"
        if path.suffix == ".json"
        else yaml.safe_dump(content, sort_keys=False)
    )
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _unique(entries: tuple[E, ...], key: Callable[[E], str], field: str) -> tuple[E, ...]:
    repeated = [name for name, count in Counter(map(key, entries)).items() if count > 1]
    if repeated:
        raise ValueError(f"{field} {repeated[0]!r} appears twice")
    return entries
