"""The process groups that norms are reduced over, by their names: an op takes a name, not an object."""

from __future__ import annotations

from torch.distributed import ProcessGroup

_groups: dict[str, ProcessGroup] = {}


def enter(group: ProcessGroup) -> str:
    """Make a group known. Returns its name."""
    _groups[group.group_name] = group
    return group.group_name


def find(name: str) -> ProcessGroup:
    """The group of this name."""
    if name not in _groups:
        known = ", ".join(sorted(_groups)) or "none"
        raise ValueError(
            f"group is {name!r}; the groups that norm_plugin knows are: {known}. Call norm_plugin.ranks.prepare first."
        )
    return _groups[name]


def leave(name: str) -> None:
    """Forget a group."""
    _groups.pop(name, None)
