"""How a memory lies in the engine: a chain of records, the first a whole state, each later one a call to repeat."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..backends.errors import PerdureError
from .engine import MODULUS, Engine, row_digest
from .guard import Guard
from .record import STATE, Record, decode, digest, encode_state, link


@dataclass(frozen=True)
class Place:
    """Where a memory stands on the disk: its id, the commit that wrote its state, and how far its chain goes."""

    id: int
    epoch: int
    records: int = 0
    size: int = 0
    stale: bool = False  # its calls hold what was cleared since
    chain: bytes = b""
    state_bytes: int = 0  # of `size`, those of the first record; 0 where not known


def put_state(engine: Engine, place: Place, guard: Guard) -> Place:
    """Replace all records of a memory by its state as it is now."""
    engine.drop_records(place.id)
    head, parts = encode_state(guard.state())
    written = _put(engine, place, head, parts, None)
    return replace(written, state_bytes=written.size)


def put_call(engine: Engine, place: Place, record: Record) -> Place:
    """Append one call."""
    written = _put(engine, place, record.head, record.parts(), record.content)
    return replace(written, stale=place.stale or record.forgets)


def _put(engine: Engine, place: Place, head: bytes, parts: Iterable[memoryview], content: bytes | None) -> Place:
    summed, size, number = digest(head, ()), len(head), place.records
    for part, body in enumerate(parts):
        if content is None:
            summed.update(body)
        size += len(body)
        engine.put_part(place.id, number, part, None if part else head, body)
    chain = link(place.chain, place.id, place.epoch, number, content or summed.digest())
    return replace(place, records=number + 1, size=place.size + size, chain=chain)


def put_entry(engine: Engine, facts: dict[str, int], name: bytes, about: dict[str, Any], place: Place) -> None:
    """Write a memory's entry into the catalogue, in place of the one it had."""
    drop_entry(engine, facts, place.id)
    text = json.dumps(about, sort_keys=True).encode()
    row = (place.id, name, text, place.epoch, place.records, place.size, int(place.stale), place.chain)
    made = row_digest(*row)
    engine.connection.execute("INSERT INTO memories VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, made))
    facts["memories"] += 1
    facts["catalog"] = (facts["catalog"] + int.from_bytes(made, "little")) % MODULUS


def drop_entry(engine: Engine, facts: dict[str, int], memory: int) -> None:
    """Take a memory out of the catalogue; its records stay."""
    found = engine.connection.execute("SELECT digest FROM memories WHERE id = ?", (memory,)).fetchone()
    if found is not None:
        engine.connection.execute("DELETE FROM memories WHERE id = ?", (memory,))
        facts["memories"] -= 1
        facts["catalog"] = (facts["catalog"] - int.from_bytes(found[0], "little")) % MODULUS


def revive(engine: Engine, place: Place, kind: str, options: dict[str, Any]) -> tuple[Guard, Place]:
    """A memory from its records, and its place with `state_bytes` known.

    Raises
    ------
    FileError
        A record is missing, altered, or does not belong there.
    """
    guard: Guard | None = None
    for end, verb, arguments in _verified(engine, replace(place, records=0, size=0, chain=b""), place):
        if (verb == STATE) is not (guard is None):
            raise engine.damaged("a state, then calls")
        try:
            if guard is None:
                guard = Guard.revive(arguments, kind, options["clip"], options["source_quota"])
                place = replace(place, state_bytes=end.size)
            else:
                repeat(guard, verb, arguments)
        except (PerdureError, TypeError, ValueError, KeyError, IndexError, MemoryError) as error:
            raise engine.damaged("records that can be repeated") from error
    if guard is None:
        raise engine.damaged("a state")
    return guard, place


def catch_up(engine: Engine, guard: Guard, seen: Place, place: Place) -> None:
    """Repeat on a memory that stands at `seen` the calls up to `place`, of the same epoch."""
    for _, verb, arguments in _verified(engine, seen, place):
        repeat(guard, verb, arguments)


def repeat(guard: Guard, verb: str, arguments: dict[str, Any]) -> None:
    """Make a recorded call."""
    if verb == "write":
        guard.write(arguments["call"], arguments["source"])
    else:
        guard.clear(arguments["rows"])


def _verified(engine: Engine, seen: Place, place: Place) -> Iterator[tuple[Place, str, dict[str, Any]]]:
    """The records after `seen`, decoded, with the place after each; the chain must end at `place`."""
    while seen.records < place.records:
        head, body = engine.get(place.id, seen.records)
        content = digest(head, (body.data,)).digest()
        chain = link(seen.chain, place.id, place.epoch, seen.records, content)
        seen = replace(seen, records=seen.records + 1, size=seen.size + len(head) + body.size, chain=chain)
        if seen.records == place.records and (seen.chain, seen.size) != (place.chain, place.size):
            raise engine.damaged("records that match their checksum")
        try:
            verb, arguments = decode(head, body)
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise engine.damaged("a readable record") from error
        yield seen, verb, arguments
