"""What the system lets us have: open files, memory, room on disks. Reads it, raises what may be raised.

Knows nothing of models.
"""

from __future__ import annotations

import errno
import logging
import resource
import shutil
from pathlib import Path

logger = logging.getLogger("hostler.limits")

OPEN_FILES_WANTED = 65_536  # no more: some programs walk over all the numbers that there could be
OPEN_FILES_LOW = 4096
FULL_BYTES = 64 * 1024
# Errors that say nothing of who gets them: the machine, or what we may have of it, is used up.
OUT_OF_FILES = frozenset({errno.EMFILE, errno.ENFILE})
OUT_OF_MEMORY = frozenset({errno.ENOMEM, errno.ENOBUFS})
OUT_OF_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_NEW_THREAD = "can't start new thread"


def raise_open_files() -> int:
    """As many open files as the system lets us have, within reason; how many that are. Children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_WANTED)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        logger.info("Open files: %d instead of %d", most, soft)
        soft = most
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES_LOW:
        logger.warning(
            "Only %d files may be open here, which is enough for about %d requests at once. Raise the limit where the "
            "gateway is started: `ulimit -Hn`, LimitNOFILE= of systemd, --ulimit nofile= of Docker.",
            soft,
            soft // 2,
        )
    return soft


def oom_kills(root: Path = Path("/")) -> int | None:
    """How many processes of our control group, or else of the machine, the kernel has ended for want of memory.

    None where the system does not count.
    """
    for path in (*_counters_of_group(root), root / "proc/vmstat"):
        try:
            words = path.read_text().split()
            return int(words[words.index("oom_kill") + 1])
        except (OSError, ValueError, IndexError):
            continue
    return None


def _counters_of_group(root: Path) -> list[Path]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            found.append(root / f"sys/fs/cgroup/memory{group}/memory.oom_control")
        elif not controllers:
            found.append(root / f"sys/fs/cgroup{group}/memory.events")
    return found


def is_disk_full(folder: Path) -> bool:
    """Whether next to nothing can be written there."""
    try:
        return shutil.disk_usage(folder).free < FULL_BYTES
    except OSError:
        return False
