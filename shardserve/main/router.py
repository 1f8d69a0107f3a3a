"""From a servable's name, version and method to the Worker that runs it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from shardserve.errors import (
    InvalidInput,
    MessageTooLarge,
    NotFound,
    Overloaded,
    ShardserveError,
    StartError,
    Unavailable,
    shown,
)
from shardserve.main.servable import Result, ServableVersion
from shardserve.settings import Settings
from shardserve.wire.frames import Buffer
from shardserve.wire.messages import front

Decoded = tuple[front.Instance, list[Buffer]] | ShardserveError
"""One instance of a request as a front end read it, or what is wrong with it."""


MAX_STRINGS = 1 << 20
"""Of one request, str and bytes: the event loops that they pass take a microsecond for each, whatever it holds."""


def check_count(instances: int, limit: int) -> None:
    """Before they are decoded, which takes its time. MessageTooLarge for more than `limit` (max_instances)."""
    if instances > limit:
        raise MessageTooLarge(f"a request has at most {limit} instances (max_instances), got {instances}")


def check_strings(instances: Iterable[Decoded]) -> None:
    """MessageTooLarge for more than MAX_STRINGS."""
    strings = 0
    for instance in instances:
        if not isinstance(instance, ShardserveError):
            for meta in instance[0].values():
                if meta.lengths:
                    strings += len(meta.lengths)
    if strings > MAX_STRINGS:
        raise too_many_strings(strings)


def too_many_strings(strings: int) -> MessageTooLarge:
    return MessageTooLarge(f"a request has at most {MAX_STRINGS} elements of type str or bytes, got {strings}")


class Intake:
    """The bytes of REST bodies that are being received or read, which nobody else bounds: a request counts in the
    servable's bounds once it is decoded."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.nbytes = 0

    @contextlib.contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """For one body: gives what is called with the size of each piece that came, and raises Overloaded over the
        limit, unless nothing else is being received."""
        size = 0

        def came(count: int) -> None:
            nonlocal size
            if self.nbytes > size and self.nbytes + count > self._limit:
                raise Overloaded(
                    f"bodies of {self.nbytes} bytes are being received already, at most {self._limit} at once "
                    "(max_receiving_bytes)"
                )
            size += count
            self.nbytes += count

        try:
            yield came
        finally:
            self.nbytes -= size


class Router:
    """The attached servables; `listeners` are called whenever the state of one may have changed."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings.from_environment()
        self.intake = Intake(self.settings.max_receiving_bytes)
        self.listeners: list[Callable[[], None]] = []
        self._versions: dict[str, dict[int, ServableVersion]] = {}
        self._stopping = False

    @property
    def servables(self) -> list[ServableVersion]:
        return [versions[version] for _, versions in sorted(self._versions.items()) for version in sorted(versions)]

    @property
    def ready(self) -> bool:
        """Whether every servable answers at once, and there is one."""
        return (
            bool(self._versions)
            and not self._stopping
            and all(servable.state == "ready" for servable in self.servables)
        )

    async def attach(self, name: str, version: int, address: str) -> None:
        """Takes a servable version in, or hears that its Worker was respawned; StartError if nobody listens there."""
        if self._stopping:
            raise StartError("the server is stopping")
        versions = self._versions.setdefault(name, {})
        servable = versions.get(version)
        if servable is None:
            servable = versions[version] = ServableVersion(name, version, self.settings, self._changed)
        try:
            await servable.attach(address)
        finally:
            self._changed()

    def detach(self, name: str, version: int) -> None:
        """Forgets a servable version, if it is here; its requests end with Unavailable."""
        servable = self._versions.get(name, {}).pop(version, None)
        if servable is None:
            return
        if not self._versions[name]:
            del self._versions[name]
        servable.close()
        servable.fail_all(Unavailable(f"{servable} was not started"))
        self._changed()

    def resolve(self, name: str, version: int, method: str) -> tuple[ServableVersion, front.MethodInfo]:
        """Who answers, and what the method takes. version 0: the latest that was ready, or the latest.

        NotFound says what there is instead; Unavailable if it can't answer now.
        """
        if self._stopping:
            raise Unavailable("the server is stopping")
        servable = self.find(name, version)
        announce = servable.check_available()
        info = announce.methods.get(method)
        if info is None:
            there = ", ".join(sorted(announce.methods)) or "none"
            raise NotFound(f"{servable} has no method {shown(method)}; it has: {there}")
        return servable, info

    def find(self, name: str, version: int) -> ServableVersion:
        """version 0: the latest that was ready, or the latest. NotFound says what there is instead; Unavailable if
        there is nothing so far."""
        if not self._versions:
            raise Unavailable(f"servable {shown(name)} is not available yet: the server has no servable so far")
        versions = self._versions.get(name)
        if versions is None:
            there = ", ".join(f"{servable.name!r} version {servable.version}" for servable in self.servables)
            raise NotFound(f"no servable {shown(name)} here; there are: {there}")
        if version == 0:
            ready = [number for number, servable in versions.items() if servable.was_ready]
            return versions[max(ready or versions)]
        if version not in versions:
            raise NotFound(
                f"servable {name!r} has no version {version}; it has: {', '.join(map(str, sorted(versions)))}"
            )
        return versions[version]

    async def stop(self, grace: float) -> None:
        """Refuses what is new, waits up to `grace` seconds for what is under way, then fails it with Unavailable."""
        self._stopping = True
        self._changed()
        under_way = [answer for servable in self.servables for answer in servable.waiting]
        if under_way:
            await asyncio.wait(under_way, timeout=grace)
        for servable in self.servables:
            servable.fail_all(Unavailable(f"the server stopped; it waited {grace:g} s for this request"))

    def close(self) -> None:
        for servable in self.servables:
            servable.close()

    def _changed(self) -> None:
        for listener in self.listeners:
            listener()


async def infer(
    servable: ServableVersion, method: str, info: front.MethodInfo, instances: Sequence[Decoded], deadline: float | None
) -> list[Result]:
    """One result per instance: bad ones get their error in their place, the others run.

    InvalidInput if there is no instance; one that is bad never fails the request, even if all of them are.
    MessageTooLarge for too many strings.
    """
    if not instances:
        raise InvalidInput("a request has at least one instance, got none")
    check_strings(instances)
    wanted = set(info.inputs)
    good: list[front.Instance] = []
    buffers: list[Buffer] = []
    bad: dict[int, ShardserveError] = {}
    for index, instance in enumerate(instances):
        if isinstance(instance, ShardserveError):
            bad[index] = instance
        elif instance[0].keys() != wanted:
            bad[index] = _wrong_names(index, method, info, set(instance[0]))
        else:
            good.append(instance[0])
            buffers += instance[1]
    places = tuple(index for index in range(len(instances)) if index not in bad) if bad else None
    answered = iter(await servable.infer(method, good, buffers, deadline, places) if good else ())
    return [bad[index] if index in bad else next(answered) for index in range(len(instances))]


def _wrong_names(index: int, method: str, info: front.MethodInfo, names: set[str]) -> InvalidInput:
    missing = [name for name in info.inputs if name not in names]
    unknown = sorted(names.difference(info.inputs))
    parts = [
        f"{kind} {', '.join(map(shown, which))}"
        for kind, which in (("missing", missing), ("unknown", unknown))
        if which
    ]
    takes = ", ".join(map(repr, info.inputs)) or "none"
    return InvalidInput(f"instance {index}: {' and '.join(parts)}; method {method!r} takes the inputs {takes}")
