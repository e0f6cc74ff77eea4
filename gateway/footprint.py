"""What running engines hold of the machine's memory, each with all its processes."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator

import msgspec

STATUS = re.compile(rb"^(VmHWM|RssAnon|RssFile|RssShmem):\s+(\d+) kB", re.MULTILINE)


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a family of processes.

    `own_bytes` would be free if it ended. `file_bytes` are pages of files that it maps, such as a model's weights: the
    system may drop them, but it is slow without. `peak_bytes` is the most that both were at once, as far as is known,
    in a process' life or since `forget_peaks`.
    """

    own_bytes: int = 0
    file_bytes: int = 0
    peak_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Both."""
        return self.own_bytes + self.file_bytes


def families(leaders: Collection[int]) -> dict[int, int]:
    """pid -> the leader whose group, session or descendant it is, of all processes that are of any."""
    found = {leader: leader for leader in leaders}
    if not found:
        return {}
    children: dict[int, list[int]] = defaultdict(list)
    for pid, parent, group, session in _relations():
        children[parent].append(pid)
        if leader := next((one for one in (group, session) if one in leaders), None):
            found.setdefault(pid, leader)
    to_see = list(found)
    while to_see:
        pid = to_see.pop()
        for child in children[pid]:
            if child not in found:
                found[child] = found[pid]
                to_see.append(child)
    return found


def _relations() -> Iterator[tuple[int, int, int, int]]:
    """Of each process its pid, its parent's, its group and its session."""
    import psutil

    for pid in psutil.pids():
        try:
            facts = _told(pid, "stat").rpartition(b")")[2].split()
            yield pid, int(facts[1]), int(facts[2]), int(facts[3])
        except (OSError, IndexError):
            try:  # gone, or a system without /proc
                yield pid, psutil.Process(pid).ppid(), os.getpgid(pid), os.getsid(pid)
            except (psutil.Error, OSError):
                continue


def _told(pid: int, name: str) -> bytes:
    """What the system tells of a process. A Path would intern the name of each."""
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()


def footprint(pids: Iterable[int]) -> Footprint:
    """Of these processes together. Files that several of them map, and what they share, count once."""
    own, shared, file, peak = 0, 0, 0, 0
    for pid in pids:
        seen = _read(pid)
        own += seen["RssAnon"]
        shared = max(shared, seen["RssShmem"])
        file = max(file, seen["RssFile"])
        peak = max(peak, seen["VmHWM"])
    return Footprint(own_bytes=own + shared, file_bytes=file, peak_bytes=max(peak, own + shared + file))


def forget_peaks(pids: Iterable[int]) -> bool:
    """Have the system measure their peaks anew from now on; whether it does for all of them that are there."""
    for pid in pids:
        try:
            with open(f"/proc/{pid}/clear_refs", "w") as file:
                file.write("5")  # of all that can be cleared, the peak of resident memory
        except OSError:
            if os.path.exists(f"/proc/{pid}") or not os.path.exists("/proc/self"):
                return False
    return True


def _read(pid: int) -> dict[str, int]:
    seen = dict.fromkeys(("RssAnon", "RssShmem", "RssFile", "VmHWM"), 0)
    try:
        text = _told(pid, "status")
    except OSError:
        import psutil

        try:  # gone, or a system without /proc
            rss = psutil.Process(pid).memory_info().rss
        except psutil.Error:
            return seen
        return seen | {"RssAnon": rss, "VmHWM": rss}
    return seen | {name.decode(): int(kilobytes) * 1024 for name, kilobytes in STATUS.findall(text)}
