"""From what a request calls an adapter to the version that it means now."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

from hotswap.aliases import LATEST, MAX_ALIASES_BYTES, AliasFileError, AliasTable
from hotswap.layout import ALIASES_FILE
from hotswap.names import AdapterName

from hotswap_server.adapters.checkpoint import file_error
from hotswap_server.adapters.files import FileInfo, StoreFiles
from hotswap_server.adapters.listing import Fingerprint, Listing, fingerprint
from hotswap_server.errors import AdapterNotFoundError

_MAX_TABLES: Final = 4096


class StoreAliases:
    """Alias tables by adapter, read again when their file changes."""

    def __init__(self, files: StoreFiles) -> None:
        self._files = files
        self._tables: OrderedDict[AdapterName, tuple[Fingerprint, AliasTable]] = OrderedDict()
        self._lock = threading.Lock()

    def choose(self, listing: Listing, name: AdapterName, alias: str | None, key: str | None) -> int | None:
        """The version behind an alias, None for the highest. No alias is the adapter's default one.

        `key` chooses between a version and its canary; without one it is never the canary.

        Raises:
            AdapterNotFoundError: there is no such alias.
            AdapterInvalidError: the file is damaged.
        """
        table = self._table(listing, name)
        wanted = table.default if alias is None else alias
        target = table.targets.get(wanted)
        if target is not None:
            return target.choose(key, f"{name}@{wanted}")
        if wanted != LATEST:
            known = ", ".join(sorted({LATEST, *table.targets}))
            raise AdapterNotFoundError(
                f"{name} has no alias {wanted}; it has {known}", adapter=f"{name}@{wanted}"
            )
        return None

    def _table(self, listing: Listing, name: AdapterName) -> AliasTable:
        if ALIASES_FILE not in listing.names:
            return AliasTable()
        path = f"{name}/{ALIASES_FILE}"
        info = self._files.info(path, str(name)) if self._files.local else listing.entries(None)[ALIASES_FILE]
        mark = fingerprint(info)
        with self._lock:
            known = self._tables.get(name)
        if known is not None and mark is not None and known[0] == mark:
            return known[1]
        table = self._read(path, info, name)
        if mark is not None:
            with self._lock:
                self._tables[name] = (mark, table)
                self._tables.move_to_end(name)
                if len(self._tables) > _MAX_TABLES:
                    self._tables.popitem(last=False)
        return table

    def _read(self, path: str, info: FileInfo, name: AdapterName) -> AliasTable:
        size = info.get("size")
        if info["type"] != "file" or not isinstance(size, int) or size > MAX_ALIASES_BYTES:
            raise file_error(str(name), ALIASES_FILE, f"must be a file of at most {MAX_ALIASES_BYTES} bytes")
        try:
            return AliasTable.parse(b"".join(self._files.read(path, info, str(name))))
        except AliasFileError as error:
            raise file_error(
                str(name), ALIASES_FILE, f"{error}; set the aliases again with `hotswap adapters alias`"
            ) from None
