"""The rights of an authenticated caller: its tenant, the access-control list in force, and administrators.

A denied right overrides an allowed one. A group's own list is in force, else its namespace's. Without any list,
every known caller has every right except ManageAccessControl. Only administrators have that one, whom a setting
names, and they have it whatever a list grants. So nobody can shut the others out by making the first list.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from agent.coordinator.auth.callers import Caller, Subject, user_caller
from agent.coordinator.auth.passwords import Password
from agent.errors import Forbidden, Invalid
from agent.model import AccessList, Right

DEFAULT_TENANT = "default"
"""The tenant of the on-premises paths, which do not name one."""


@dataclass(frozen=True, slots=True)
class Identities:
    """The identities that are configured.

    Attributes:
        administrators: who may always manage access.
        users: of the users file; None without one.
        others: whether callers may exist that no file lists, who come by token or certificate.
        default_tenant: the tenant of tokens that may use DEFAULT_TENANT; None: every one.
    """

    administrators: frozenset[Subject] = frozenset()
    users: Mapping[str, Password] | None = None
    others: bool = False
    default_tenant: str | None = None


@dataclass(slots=True)  # one for each request
class Rights:
    """The rights of one caller in the tenant of a path. ``caller`` None: authentication is off."""

    caller: Caller | None
    tenant: str
    identities: Identities

    @property
    def administers(self) -> bool:
        """Whether the caller may always manage access."""
        caller = self.caller
        return caller is None or not caller.trustees.isdisjoint(self.identities.administrators)

    def may(self, acl: AccessList | None, right: Right) -> bool:
        """Whether the list in force (or None) gives the caller a right."""
        if self.caller is None:
            return True
        if right is Right.MANAGE and (acl is None or self.administers):
            return self.administers
        return allowed(acl, self.caller, self.tenant, right)

    def may_read(self, acl: AccessList | None) -> bool:
        """Whether the caller may read a group with this list of its own."""
        return self.may(acl, Right.READ)

    def check_tenant(self) -> None:
        """Raise Forbidden if the caller belongs to another tenant than the path."""
        if self.caller is None or self.caller.tenant in {None, self.tenant}:
            return
        if self.tenant == DEFAULT_TENANT:
            if self.identities.default_tenant in {None, self.caller.tenant}:
                return
            resolution = "token_tenant names the tenant that may use these paths."
        else:
            resolution = "Use the paths of the tenant in the token's claim tid."
        raise Forbidden(
            f'"{self.caller.name}" is of the tenant "{self.caller.tenant}", and the path is of the tenant'
            f' "{self.tenant}".',
            resolution,
        )

    def check_manager_remains(self, acl: AccessList) -> None:
        """Raise Invalid if no existing identity would have ManageAccessControl by a new list."""
        if self.caller is None or self._has_manager(acl):
            return
        raise Invalid(
            "RoleTrusteeAccessControlEntries would allow ManageAccessControl (8) to no existing identity.",
            "Allow it to a user or a role of the users file, or to an identity of the setting"
            " administrator.",
        )

    def _has_manager(self, acl: AccessList) -> bool:
        allows, denies = (
            {
                Subject(entry.trustee.kind, entry.trustee.object_id)
                for entry in acl.entries
                if entry.denied is denied
                and entry.rights & Right.MANAGE
                and self._fits_tenant(entry.trustee.tenant_id)
            }
            for denied in (False, True)
        )
        known = self.identities
        left = allows - denies
        if known.others and left:
            return True
        return any(
            not caller.trustees.isdisjoint(allows) and caller.trustees.isdisjoint(denies)
            for caller in (
                user_caller(name, user.roles) for name, user in (known.users or {}).items()
            )
        )

    def _fits_tenant(self, tenant: str | None) -> bool:
        """Whether an entry for this tenant can match a caller that may use the path's tenant."""
        if tenant in {None, self.tenant}:
            return True
        accepted = self.identities.default_tenant in {None, tenant}
        return self.identities.others and self.tenant == DEFAULT_TENANT and accepted


def allowed(acl: AccessList | None, caller: Caller, tenant: str, right: Right) -> bool:
    """Whether a list grants ``caller`` a right in ``tenant``. Without a list (None) every right is granted."""
    if acl is None:
        return True
    given = False
    for entry in acl.entries:
        who = entry.trustee
        if (who.kind, who.object_id) not in caller.trustees or not entry.rights & right:
            continue
        if who.tenant_id not in {None, caller.tenant or tenant}:
            continue
        if entry.denied:
            return False
        given = True
    return given
