"""Which role each call of the API needs, and which field of its request names an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hotswap_server.security.principals import Role


@dataclass(frozen=True, slots=True)
class Rule:
    """`adapter_field` is the request's field with an adapter's name; None for calls that are about none.

    To a caller that may not use the adapter, the call behaves as if there were none of that name. A call that
    lists adapters has no such field, and leaves out by itself what the caller may not use.
    """

    role: Role
    adapter_field: str | None = None

    @property
    def audited(self) -> bool:
        return self.role > Role.USER


RULES: Final[dict[str, Rule]] = {
    "/hotswap.v1.InferenceService/Generate": Rule(Role.USER, "adapter"),
    "/hotswap.v1.InferenceService/GenerateStream": Rule(Role.USER, "adapter"),
    "/hotswap.v1.InferenceService/Score": Rule(Role.USER, "adapter"),
    "/hotswap.v1.InferenceService/Tokenize": Rule(Role.USER),
    "/hotswap.v1.AdapterService/ListAdapters": Rule(Role.USER),
    "/hotswap.v1.AdapterService/GetAdapter": Rule(Role.USER, "name"),
    "/hotswap.v1.AdapterService/LoadAdapter": Rule(Role.PUBLISHER, "name"),
    "/hotswap.v1.AdapterService/UnloadAdapter": Rule(Role.PUBLISHER, "name"),
    # These take memory or time from everybody.
    "/hotswap.v1.AdapterService/PinAdapter": Rule(Role.ADMIN, "name"),
    "/hotswap.v1.AdapterService/UnpinAdapter": Rule(Role.ADMIN, "name"),
    "/hotswap.v1.AdapterService/MergeAdapter": Rule(Role.ADMIN, "name"),
    "/hotswap.v1.AdapterService/UnmergeAdapter": Rule(Role.ADMIN, "name"),
    "/hotswap.v1.AdapterService/CalibrateMethods": Rule(Role.ADMIN),
}
"""By the call's full name. A call without a rule is refused as soon as callers are told apart."""
