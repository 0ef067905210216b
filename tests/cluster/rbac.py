"""Who may do what: ServiceAccounts by the Roles that RoleBindings of a namespace give them, and the tests' own token everything.

No ClusterRoles, as no chart of ours has one: what they grant to every account of a real cluster (discovery) is granted here by itself.
Source: k8s.io/kubernetes, plugin/pkg/auth/authorizer/rbac, and k8s.io/apiserver, pkg/endpoints/handlers/responsewriters/errors.go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.cluster.faults import Fault, qualified
from tests.cluster.paths import Asked
from tests.cluster.store import Object, Store

GROUP = "rbac.authorization.k8s.io"
EVERYONES = ("/api", "/apis", "/openapi", "/version", "/healthz", "/livez", "/readyz")
"""Paths, with what is below them where it is no resource, that the role system:discovery opens to every account."""


@dataclass(frozen=True)
class Account:
    """A ServiceAccount that asks."""

    namespace: str
    name: str
    uid: str

    @property
    def user(self) -> str:
        """What it is called in a refusal."""
        return f"system:serviceaccount:{self.namespace}:{self.name}"

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that it is in."""
        return "system:serviceaccounts", f"system:serviceaccounts:{self.namespace}", "system:authenticated"


def live_account(store: Store, namespace: str, name: str) -> Account | None:
    """The account of that name, None where there is none."""
    found = store.get(("", "serviceaccounts"), (namespace, name))
    return Account(namespace, name, found["metadata"]["uid"]) if found else None


def require(store: Store, account: Account | None, verb: str, asked: Asked, name: str) -> None:
    """Raises Fault where the account may not do that; the tests' own token (None) may do everything."""
    if account is None:
        return
    allowed, reasons = _look(store, account, verb, asked, name)
    if not allowed:
        place = f'in the namespace "{asked.namespace}"' if asked.namespace else "at the cluster scope"
        what = f'User "{account.user}" cannot {verb} resource "{_combined(asked)}" in API group "{asked.group}" {place}'
        raise forbidden(asked, name, ": ".join([what, *reasons]))


def require_create(store: Store, account: Account | None, asked: Asked) -> None:
    """The same for an apply or a replace that makes a new object, of which the server says nothing but that it is forbidden."""
    if account is None:
        return
    allowed, reasons = _look(store, account, "create", asked, asked.name)
    if not allowed:
        raise forbidden(asked, asked.name, "".join(reasons))


def require_path(account: Account | None, path: str, method: str) -> None:
    """The same for a path that names no resource."""
    if account is not None and not (method == "GET" and any(path == open_ or path.startswith(f"{open_}/") for open_ in EVERYONES)):
        verb = method.lower()
        raise Fault(403, "Forbidden", f'forbidden: User "{account.user}" cannot {verb} path "{path}"')


def forbidden(asked: Asked, name: str, why: str) -> Fault:
    """The refusal, in the server's words."""
    shown = qualified(asked.group, asked.plural) + (f' "{name}"' if name else "")
    return Fault(403, "Forbidden", f"{shown} is forbidden: {why}", {"name": name, "group": asked.group, "kind": asked.plural})


def _look(store: Store, account: Account, verb: str, asked: Asked, name: str) -> tuple[bool, list[str]]:
    """Whether any rule allows it, and else which Roles that should say so are not there."""
    missing = []
    for role_name, role in _roles(store, account, asked.namespace):
        if role is None:
            missing.append(f'role.{GROUP} "{role_name}" not found')
        elif any(_allows(rule, verb, asked, name) for rule in role.get("rules") or ()):
            return True, []
    several = missing[0] if len(missing) == 1 else f"[{', '.join(missing)}]"
    return False, [f"RBAC: {several}"] if missing else []


def _roles(store: Store, account: Account, namespace: str) -> Iterator[tuple[str, Object | None]]:
    """Name of each Role that is bound to the account in a namespace, and the Role where it is there."""
    bindings, _ = (
        store.find((GROUP, "rolebindings"), namespace, lambda binding: binding["roleRef"]["kind"] == "Role") if namespace else ([], 0)
    )
    for binding in bindings:
        if any(_is(subject, account, namespace) for subject in binding.get("subjects") or ()):
            name = binding["roleRef"]["name"]
            yield name, store.get((GROUP, "roles"), (namespace, name))


def _is(subject: Mapping[str, Any], account: Account, namespace: str) -> bool:
    if subject["kind"] == "ServiceAccount":
        return (subject.get("namespace") or namespace, subject["name"]) == (account.namespace, account.name)
    return subject["name"] == account.user if subject["kind"] == "User" else subject["name"] in account.groups


def _allows(rule: Mapping[str, Any], verb: str, asked: Asked, name: str) -> bool:
    resources, names = rule.get("resources") or (), rule.get("resourceNames") or ()
    is_of_any = asked.subresource and f"*/{asked.subresource}" in resources
    return (
        _has(rule.get("verbs"), verb)
        and _has(rule.get("apiGroups"), asked.group)
        and bool(is_of_any or _has(resources, _combined(asked)))
        and (not names or name in names)
    )


def _has(granted: Any, wanted: str) -> bool:
    return "*" in (granted or ()) or wanted in (granted or ())


def _combined(asked: Asked) -> str:
    return f"{asked.plural}/{asked.subresource}" if asked.subresource else asked.plural
