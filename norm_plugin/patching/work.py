"""Does the work of `norm-plugin patch`: list, check, apply and revert."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from norm_plugin.patching import PatchError, catalog, diff
from norm_plugin.patching.catalog import Patch, sha256
from norm_plugin.patching.record import Change, Record
from norm_plugin.patching.site import Site
from norm_plugin.patching.store import Store


@dataclass(frozen=True)
class State:
    """One patch and the engine's files: applied, ready, or refused with a reason."""

    patch: Patch
    state: str
    reason: str = ""


#: A record to make true, and the text of every file that it needs, by its hash.
Plan = tuple[Record, dict[str, bytes]]


def states(site: Site) -> list[State]:
    """The state of every patch of the engine's version, each by itself."""
    store = Store(site.folder, site.engine)
    record = _recorded(store, site)
    if store.interrupted():
        reason = "a run was killed half-way here: apply or revert, whichever comes next, begins by taking that back"
        return [State(patch, "interrupted", reason) for patch in catalog.of(site.engine, site.version)]
    return [_state(store, site, record, patch) for patch in catalog.of(site.engine, site.version)]


def _state(store: Store, site: Site, record: Record, patch: Patch) -> State:
    if patch.name in record.patches:
        return State(patch, "applied")
    try:
        if _has(patch, store.current):
            return State(patch, "refused", "its lines are in the files already, and were not put there by this tool")
        plan(store, site, record, [patch.name])
    except PatchError as reason:
        return State(patch, "refused", str(reason))
    return State(patch, "ready")


def stands(folder: Path, patch: Patch) -> bool:
    """Whether the files have every line that a patch adds, whoever put it there."""
    places = {path: folder / path for path in patch.files}
    return _has(patch, lambda path: places[path].read_bytes() if places[path].is_file() else None)


def _has(patch: Patch, read: Callable[[str], bytes | None]) -> bool:
    texts = {path: read(path) or b"" for path in patch.diff.files}
    return all(b"".join(hunk.added) in texts[path] for path, hunks in patch.diff.files.items() for hunk in hunks)


def links(site: Site, names: Collection[str]) -> dict[str, str]:
    """The files of these patches that are links, and the path in the tree that each leads to."""
    tree = Store(site.folder, site.engine).tree
    chosen = [patch for patch in catalog.patches() if patch.is_for(site.engine, site.version) and patch.name in names]
    found = {path: tree.real(path) for patch in chosen for path in patch.files}
    return {path: real for path, real in found.items() if path != real}


def check(site: Site, names: Iterable[str]) -> Record:
    """The record that `apply` would write. Nothing is written here."""
    store = Store(site.folder, site.engine)
    if store.interrupted():
        raise PatchError("a run was killed half-way here: apply or revert, whichever comes next, takes that back first")
    return plan(store, site, _recorded(store, site), list(names))[0]


def apply(site: Site, names: Iterable[str]) -> tuple[str, ...]:
    """Apply all of the patches or none. Returns the names of those that are new."""
    store = Store(site.folder, site.engine)
    with store.changing():
        record = _settled(store, site)
        wanted, texts = plan(store, site, record, list(names))
        new = tuple(name for name in wanted.patches if name not in record.patches)
        if new:
            store.change(wanted, texts)
    return new


def revert(site: Site, names: Iterable[str] | None = None) -> tuple[str, ...]:
    """Take these patches back, or all that are applied. Returns their names."""
    store = Store(site.folder, site.engine)
    with store.changing():
        record = _settled(store, site)
        going = record.patches if names is None else tuple(dict.fromkeys(names))
        for name in going:
            if name not in record.patches:
                raise PatchError(f"{name} is not applied here; applied are: {', '.join(record.patches) or 'none'}")
        if going:
            _unchanged(store, record)
            left = [name for name in record.patches if name not in going]
            store.change(*(_plan(store, site, record, left) if left else (Record(record.version), {})))
    return going


def plan(store: Store, site: Site, record: Record, names: list[str]) -> Plan:
    """The record with these patches added; raises with the reason if that cannot be."""
    _unchanged(store, record)
    return _plan(store, site, record, [*record.patches, *(name for name in names if name not in record.patches)])


def _plan(store: Store, site: Site, record: Record, names: list[str]) -> Plan:
    chosen = catalog.named(catalog.of(site.engine, site.version), names)
    catalog.together(chosen)
    changes, texts = {}, {}
    for path in dict.fromkeys(path for patch in chosen for path in patch.files):
        expected = next(patch.files[path] for patch in chosen if path in patch.files)
        before = _original(store, site, record, path, expected)
        hunks = [hunk for patch in chosen for hunk in patch.hunks(path)]
        after = diff.apply(before, hunks, path)
        try:
            compile(after, path, "exec", dont_inherit=True)
        except SyntaxError as wrong:
            raise PatchError(f"{path} would not compile with {', '.join(names)}: {wrong}") from None
        changes[path] = Change(sha256(before), sha256(after))
        texts[sha256(before)], texts[sha256(after)] = before, after
    return Record(site.version, tuple(patch.name for patch in chosen), changes), texts


def _original(store: Store, site: Site, record: Record, path: str, expected: str) -> bytes:
    text = store.original(path, record)
    if text is None:
        raise PatchError(f"{site.folder / path} does not exist, which {site.engine} {site.version} should have")
    if sha256(text) != expected:
        raise PatchError(
            f"{site.folder / path} is not the file of {site.engine} {site.version}: its sha256 is {sha256(text)[:12]}, "
            f"not {expected[:12]}. Somebody changed it, or it is another build; patch it by hand or install it again"
        )
    return text


def _unchanged(store: Store, record: Record) -> None:
    for path, change in record.files.items():
        text = store.current(path)
        if text is None or sha256(text) != change.after:
            raise PatchError(
                f"{store.tree.root / path} was changed after {', '.join(record.patches)} had been applied: "
                f"its original is {store.kept / change.before}"
            )


def _settled(store: Store, site: Site) -> Record:
    record = _recorded(store, site)
    if not record.patches:
        store.forget()
    return record


def _recorded(store: Store, site: Site) -> Record:
    """What is applied; nothing, if the engine was installed anew since."""
    record = store.record()
    if not store.interrupted() and record.files and all(_is_new(store, site, record, path) for path in record.files):
        return Record()
    return record


def _is_new(store: Store, site: Site, record: Record, path: str) -> bool:
    text, change = store.current(path), record.files[path]
    if text is None:
        return site.version != record.version
    return sha256(text) == change.before or (site.version != record.version and sha256(text) != change.after)
