"""What the system lets us have, and what becomes of the gateway where that is little."""

from __future__ import annotations

import resource
from pathlib import Path

from gateway import limits


def test_as_many_open_files_as_allowed_are_taken() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        wanted = min(before[1], limits.OPEN_FILES_WANTED)
        assert limits.raise_open_files() == wanted
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted, before[1])
        assert limits.raise_open_files() == wanted  # twice is harmless
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def proc(root: Path, group: str = "", **files: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(group)
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_the_kernels_kills_are_counted_in_our_group_or_else_on_the_machine(tmp_path: Path) -> None:
    vmstat = {"proc/vmstat": "nr_free_pages 7\noom_kill 5\n"}
    events = {"sys/fs/cgroup/ours/memory.events": "low 0\nhigh 0\nmax 48\noom 1\noom_kill 2\noom_group_kill 0\n"}
    control = {"sys/fs/cgroup/memory/ours/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"}
    assert limits.oom_kills(proc(tmp_path / "v2", "0::/ours\n", **vmstat, **events)) == 2
    assert limits.oom_kills(proc(tmp_path / "v1", "4:memory:/ours\n0::/\n", **vmstat, **control)) == 3
    assert limits.oom_kills(proc(tmp_path / "no group", "0::/ours\n", **vmstat)) == 5
    assert limits.oom_kills(tmp_path / "nothing") is None


def test_the_kernel_of_this_machine_counts() -> None:
    assert limits.oom_kills() is not None
