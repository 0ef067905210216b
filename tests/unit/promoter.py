"""A process that moves aliases and is killed on the way, or meets another that does the same."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from infra import aliases, registry, tracking
from infra.errors import SlipwayError

NOTE = "slipway.promoted.by"


class Mortal:
    """An MLflow client whose process is killed right before its call number `num_calls`."""

    def __init__(self, client: Any, num_calls: int) -> None:
        self.client, self.left = client, num_calls

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            return found(*arguments, **named)

        return call


def seen(client: Any, name: str) -> dict[str, str]:
    """Champion and previous, as Slipway reads them."""
    found = aliases.read(client, name)
    return {alias: found[alias] for alias in (registry.CHAMPION, registry.PREVIOUS) if alias in found}


def promote_until_call(uri: str, name: str, version: str, num_calls: int) -> int:
    """What a forked process that promotes ends with: its exit code, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        client = tracking.client(uri)
        registry.promote(Mortal(client, num_calls), registry.lookup(client, name, version), {NOTE: "test"})  # type: ignore[arg-type]
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_every_call(uri: str, watch_uri: str, name: str, first: str, last: str) -> list[dict[str, Any]]:
    """Promotes `last` in processes killed one call later each time, until one survives; what each of them left.

    `before` is what was there, `left` what was read after the kill, `raw` MLflow's own aliases then, `after` what a promotion of `first`
    made of it, and `noted` whether who promoted `last` is known by then.
    """
    # MLflow keeps one pool of connections an address, which a forked process must not share: so the parent's is written another way.
    client = tracking.client(watch_uri)
    outcomes: list[dict[str, Any]] = []
    while not outcomes or outcomes[-1]["code"]:
        before = seen(client, name)
        code = promote_until_call(uri, name, last, num_calls=len(outcomes))
        left, raw = seen(client, name), {alias: str(at) for alias, at in client.get_registered_model(name).aliases.items()}
        registry.promote(client, registry.lookup(client, name, first))
        noted = NOTE in client.get_model_version(name, last).tags
        outcomes.append({"code": code, "before": before, "left": left, "raw": raw, "after": seen(client, name), "noted": noted})
        if noted:
            client.delete_model_version_tag(name, last, NOTE)
    return outcomes


def meet(uri: str, name: str, version: str) -> None:
    """Gets ready to promote, does it when told to, and tells how it went."""
    client = tracking.client(uri)
    found, expected = registry.lookup(client, name, version), seen(client, name).get(registry.CHAMPION, "")
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        registry.promote(client, found, expected=expected)
        print(json.dumps({"won": True}))
    except SlipwayError as error:
        print(json.dumps({"won": False, "message": error.message, "exit_code": error.exit_code}))


if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    if task == "kill":
        print(json.dumps(kill_at_every_call(*arguments)))
    else:
        meet(*arguments)
