"""What control groups leave to a process, on trees as they are mounted, with their files in folders made here."""

from functools import partial

import pytest
import torch

from sparsefw import cgroup, process

GIB = 2**30

# No limit in version 1: the largest multiple of a page.
NONE = 2**63 - 4096


class Machine:
    """A process, and the control groups that it sees.

    Attributes:
        process: its folder in /proc.
    """

    def __init__(self, folder):
        self.folder, self.process = folder, folder / "proc self"
        self.process.mkdir()
        (self.process / "mountinfo").write_text("22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n")
        (self.process / "cgroup").write_text("")

    def is_in(self, *lines):
        """Write /proc/self/cgroup."""
        (self.process / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    def mount(self, point, kind, options="rw", root="/"):
        """Mount a hierarchy."""
        # As the kernel writes it: blanks and backslashes are octal numbers.
        place = str(self.folder / point).replace(" ", "\\040")
        root = root.replace("\\", "\\134")
        with (self.process / "mountinfo").open("a") as lines:
            lines.write(f"35 22 0:32 {root} {place} rw,nosuid shared:9 - {kind} cgroup {options}\n")

    def group(self, path, limit, taken):
        """Make the group of version 2 in a folder."""
        self._write(path, {"memory.max": limit, "memory.current": 2 * taken + 7}, dict(anon=taken, file=taken))

    def group_1(self, path, limit, taken, below=0):
        """Make the group of version 1 in a folder, with what the groups below it have taken."""
        stat = dict(cache=3 * taken, rss=taken, total_cache=5 * taken, total_rss=taken + below)
        self._write(path, {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": 4 * taken}, stat)

    def _write(self, path, files, stat):
        (self.folder / path).mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (self.folder / path / name).write_text(f"{value}\n")
        (self.folder / path / "memory.stat").write_text("".join(f"{name} {size}\n" for name, size in stat.items()))

    def left(self):
        return min(cgroup.left(self.process), default=None)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_version_2_in_a_namespace(machine):
    """As in a container: the root of what is seen is the container's group."""
    machine.is_in("0::/")
    machine.mount("cgroup", "cgroup2")
    machine.group("cgroup", 16 * GIB, 5 * GIB)
    assert machine.left() == 11 * GIB


def test_version_2_with_a_limit_above(machine):
    """As in a job of SLURM: the root has no limit, nor has the group itself, and what others hold in the job counts."""
    job = "cgroup/system.slice/slurmstepd.scope/job_7"
    machine.is_in("0::/system.slice/slurmstepd.scope/job_7/step_0/user")
    machine.mount("cgroup", "cgroup2", "rw,nsdelegate,memory_recursiveprot")
    machine.group(f"{job}/step_0/user", "max", 3 * GIB)
    machine.group(f"{job}/step_0", 70 * GIB, 4 * GIB)
    machine.group(job, 64 * GIB, 9 * GIB)
    assert machine.left() == 55 * GIB
    # The nearest one may be the lowest.
    machine.group(f"{job}/step_0/user", 20 * GIB, 3 * GIB)
    assert machine.left() == 17 * GIB
    # Those beside it do not count.
    machine.group(f"{job}/step_1", GIB, 0)
    assert machine.left() == 17 * GIB


def test_version_1(machine):
    machine.is_in("9:name=systemd:/", "5:cpu,memory:/slurm/uid_0/job_7", "1:cpuset:/other")
    machine.mount("cgroup/cpuset", "cgroup", "rw,cpuset")
    machine.mount("cgroup/memory", "cgroup", "rw,cpu,memory")
    machine.group_1("cgroup/memory", NONE, 0)
    machine.group_1("cgroup/memory/slurm/uid_0/job_7", 32 * GIB, 2 * GIB)
    assert machine.left() == 30 * GIB
    machine.group_1("cgroup/memory/slurm/uid_0", 24 * GIB, 1 * GIB, below=6 * GIB)
    assert machine.left() == 17 * GIB
    # Only where memory is controlled.
    machine.group_1("cgroup/cpuset/slurm/uid_0/job_7", GIB, 0)
    machine.group_1("cgroup/cpuset/other", GIB, 0)
    assert machine.left() == 17 * GIB


def test_version_1_with_a_container_s_group_as_the_root(machine):
    """Docker: the path is the machine's, and only what is below the container's group is mounted."""
    machine.is_in("4:memory:/docker/3f", "0::/docker/3f")
    machine.mount("memory", "cgroup", "rw,memory", root="/docker/3f")
    machine.mount("other", "cgroup", "rw,memory", root="/docker/4a")
    machine.group_1("memory", 8 * GIB, GIB)
    machine.group_1("other", 2 * GIB, GIB)
    assert machine.left() == 7 * GIB


def test_both_versions(machine):
    """Hybrid: version 2 is there, and memory is controlled by version 1."""
    machine.is_in("4:memory:/process/one", "2:cpuset:/", "0::/process/two")
    machine.mount("memory", "cgroup", "rw,memory")
    machine.mount("unified", "cgroup2")
    (machine.folder / "unified/process/two").mkdir(parents=True)
    machine.group_1("memory/process/one", NONE, GIB)
    assert machine.left() > 2**62
    machine.group_1("memory/process", 12 * GIB, 0, below=GIB)
    assert machine.left() == 11 * GIB


def test_names_that_are_escaped(machine):
    r"""systemd names groups with a backslash, which is \134 in mountinfo."""
    machine.is_in(r"0::/my\x2dunit.service/run")
    machine.mount("a b", "cgroup2", root=r"/my\x2dunit.service")
    machine.group("a b/run", 4 * GIB, GIB)
    assert machine.left() == 3 * GIB


def test_no_limit_is_seen(machine):
    assert machine.left() is None
    machine.is_in("4:memory:/a", "0::/b")
    assert machine.left() is None
    machine.mount("memory", "cgroup", "rw,memory")
    machine.mount("unified", "cgroup2")
    assert machine.left() is None
    machine.group("unified/b", "max", GIB)
    assert machine.left() is None
    (machine.process / "cgroup").unlink()
    (machine.process / "mountinfo").unlink()
    assert machine.left() is None


def test_the_limit_is_that_of_the_host_s_memory(machine, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(process, "resident", lambda: 1000)
    machine.is_in("0::/job")
    machine.mount("cgroup", "cgroup2")
    machine.group("cgroup/job", 8000, 2000)
    monkeypatch.setattr(cgroup, "left", partial(cgroup.left, machine.process))
    assert process.free_memory(cpu) == {"host": 7000}
    assert process.free_memory(cpu, 3) == {"host": 3000}
    machine.group("cgroup/job", "max", 2000)
    assert process.free_memory(cpu)["host"] > 2**20
