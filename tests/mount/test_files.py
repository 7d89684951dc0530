"""`/files` of a real mount: what the tools and the calls of engines do there, and what they get."""

import errno
import fcntl
import mmap
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.mounting import Mount, mounted

pytestmark = [pytest.mark.fuse, pytest.mark.root]

KIB = 1 << 10
MIB = 1 << 20
# Prints what is left of standard input, and ends with the errno that it meets.
READ_ALL = """
import os, sys
try:
    while some := os.read(0, 1 << 20):
        sys.stdout.buffer.write(some)
except OSError as error:
    sys.exit(error.errno)
"""


@pytest.fixture(scope="module")
def home() -> Iterator[Mount]:
    """One mount for all tests of this module, each in a directory of its own."""
    scratch = Path(tempfile.mkdtemp(prefix="twfs-tests-files-"))  # where other users may pass
    scratch.chmod(0o755)
    options = "allow_other,dir_mode=0755"
    with mounted(scratch / "warehouse", scratch / "mnt", options) as mount:
        yield mount
    shutil.rmtree(scratch)


@pytest.fixture
def place(home: Mount, request: pytest.FixtureRequest) -> Path:
    """A directory for one test."""
    path = home.path / "files" / str(request.node.name)
    path.mkdir()
    return path


def refused(call: Callable[[], object]) -> str:
    """The name of the errno that *call* ends with."""
    with pytest.raises(OSError, match=r".") as caught:
        call()
    return errno.errorcode[caught.value.errno or 0]


def elsewhere(code: str, *arguments: object) -> str:
    """What another process prints that runs *code*."""
    done = subprocess.run(
        [sys.executable, "-c", f"import os, sys\n{code}", *map(str, arguments)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def seen_elsewhere(path: Path) -> str:
    """The bytes that another process reads there, or the name of its error."""
    return elsewhere(
        "import errno\n"
        "try: print(open(sys.argv[1], 'rb').read().decode())\n"
        "except OSError as error: print(errno.errorcode[error.errno])",
        path,
    )


def listed(path: Path) -> list[str]:
    """The names in a directory, in their order there: by their bytes."""
    return [found.name for found in path.iterdir()]


def aligned(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size)
    memory[:] = os.urandom(size)
    return memory


def test_a_file_is_seen_by_others_once_it_is_closed(place: Path) -> None:
    path = place / "f"
    with path.open("wb", buffering=0) as file:
        file.write(b"one")
        assert path.read_bytes() == b"one"  # its own process sees what it wrote
        assert path.stat().st_size == 3
        assert seen_elsewhere(path) == "ENOENT"
        assert elsewhere("print(os.listdir(sys.argv[1]))", place) == "[]"
    assert seen_elsewhere(path) == "one"
    with path.open("wb", buffering=0) as file:
        file.write(b"other")
        assert seen_elsewhere(path) == "one"
        assert path.read_bytes() == b"other"
    assert seen_elsewhere(path) == "other"


def test_a_descriptor_that_a_child_closes_publishes_nothing(place: Path) -> None:
    """What fork and exec close is flushed, but it is not the last close."""
    path = place / "f"
    with path.open("wb", buffering=0) as file:
        file.write(b"half")
        subprocess.run(["true"], check=True, pass_fds=[file.fileno()])
        assert seen_elsewhere(path) == "ENOENT"
        file.write(b" and half")
    assert seen_elsewhere(path) == "half and half"
    subprocess.run(f"(echo a; true; /bin/echo b; echo c) > {path}", shell=True, check=True)
    assert seen_elsewhere(path) == "a\nb\nc"


def test_flags_of_open(place: Path) -> None:
    path = place / "f"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert refused(lambda: os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)) == "EEXIST"
    assert refused(lambda: os.open(path, os.O_RDONLY | os.O_DIRECTORY)) == "ENOTDIR"
    assert refused(lambda: os.open(place, os.O_TMPFILE | os.O_RDWR)) == "ENOTSUP"
    assert refused(lambda: os.open(place / "no" / "f", os.O_CREAT | os.O_WRONLY)) == "ENOENT"
    with path.open("ab") as file:
        file.write(b"one")
    with path.open("ab") as file:
        file.write(b"two")
    assert path.read_bytes() == b"onetwo"
    os.close(os.open(path, os.O_RDONLY | os.O_NOATIME))
    os.close(os.open(path, os.O_RDWR))  # changes nothing, so it publishes nothing
    assert path.read_bytes() == b"onetwo"
    with path.open("r+b") as file:
        file.seek(3)
        file.write(b"TWO!")
    assert path.read_bytes() == b"oneTWO!"
    os.truncate(path, 4)
    assert path.read_bytes() == b"oneT"
    os.truncate(path, 6)
    assert path.read_bytes() == b"oneT\0\0"


def test_a_lock_file_has_one_owner(place: Path) -> None:
    """O_EXCL is true between processes, also while the file is being written."""
    path = place / "lock"
    mine = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    code = (
        "import errno\n"
        "try: os.open(sys.argv[1], os.O_CREAT | os.O_EXCL | os.O_WRONLY)\n"
        "except OSError as error: print(errno.errorcode[error.errno])"
    )
    assert elsewhere(code, path) == "EEXIST"
    os.close(mine)
    assert elsewhere(code, path) == "EEXIST"
    path.unlink()
    assert elsewhere(code, path) == ""


def test_direct_io(place: Path) -> None:
    path, memory = place / "f", aligned(3 * MIB)
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_TRUNC | os.O_DIRECT)
    assert os.write(fd, memory) == len(memory)
    os.close(fd)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    back = mmap.mmap(-1, len(memory))
    assert os.preadv(fd, [back], 0) == len(memory)
    assert back[:] == memory[:]
    os.close(fd)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
    for number in reversed(range(3)):  # anywhere, until it is closed
        view = memoryview(memory)[number * MIB : (number + 1) * MIB]
        assert os.pwritev(fd, [view], number * MIB) == MIB
    assert os.pread(fd, 10, 2 * MIB) == memory[2 * MIB : 2 * MIB + 10]
    os.fsync(fd)
    os.close(fd)
    assert path.read_bytes() == memory[:]


def test_mapped_memory(place: Path) -> None:
    path = place / "f"
    data = os.urandom(5 * MIB)
    path.write_bytes(data)
    with path.open("rb") as file, mmap.mmap(
        file.fileno(), 0, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ
    ) as view:  # fmt: skip
        assert view[:] == data
    with (place / "g").open("w+b") as made:
        os.ftruncate(made.fileno(), 2 * MIB)
        with mmap.mmap(made.fileno(), 0) as view:
            view[MIB : MIB + 5] = b"there"
    assert (place / "g").read_bytes() == bytes(MIB) + b"there" + bytes(MIB - 5)


def test_names_change(place: Path) -> None:
    one, two, below = place / "one", place / "two", place / "a/b/c"
    (place / "d").mkdir()
    below.mkdir(parents=True)
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    one.rename(below / "deep")
    assert refused(one.stat) == "ENOENT"
    (place / "a").rename(place / "z")
    assert (place / "z/b/c/deep").read_bytes() == b"1"
    two.replace(place / "z/b/c/deep")
    assert (place / "z/b/c/deep").read_bytes() == b"2"
    assert refused((place / "z/b").rmdir) == "ENOTEMPTY"
    assert refused(lambda: (place / "z/b/c/deep").rename(place / "d")) == "EISDIR"
    assert refused(lambda: (place / "z").rename(place / "z/b/c/in")) == "EINVAL"
    assert refused((place / "z").unlink) == "EISDIR"
    assert refused((place / "none").unlink) == "ENOENT"
    with (place / "d/new").open("wb") as file:
        for remove in ((place / "d").rmdir, lambda: (place / "z/b").rename(place / "d")):
            assert refused(remove) == "ENOTEMPTY"
            file.write(b"written")
    assert refused(lambda: (place / "z/b").rename(place / "d")) == "ENOTEMPTY"
    assert (place / "d/new").read_bytes() == b"written" * 2
    assert refused((place / "z").mkdir) == "EEXIST"
    assert refused(lambda: (place / "l").symlink_to("z")) == "EPERM"
    assert refused(lambda: os.link(place / "z/b/c/deep", place / "l")) == "EPERM"
    assert refused(lambda: os.mkfifo(place / "p")) == "ENOTSUP"
    assert refused((place / ("n" * 256)).touch) == "ENAMETOOLONG"
    assert os.access(place / "z/b/c/deep", os.F_OK | os.R_OK)
    assert not os.access(place / "none", os.F_OK)
    assert os.statvfs(place).f_bsize == 4096
    (place / "z/b/c/deep").unlink()
    os.removedirs(place / "z/b/c")


def test_open_files_outlive_their_names(place: Path) -> None:
    path, data = place / "f", os.urandom(5 * MIB)
    path.write_bytes(data)
    with path.open("rb") as old:
        path.unlink()
        assert refused(path.stat) == "ENOENT"
        path.write_bytes(b"new")
        assert old.read() == data
        assert os.fstat(old.fileno()).st_size == len(data)
    with (place / "tmp").open("w+b", buffering=0) as made:  # as KVBM has its files
        made.write(data)
        (place / "tmp").unlink()
        assert os.pread(made.fileno(), 100, MIB) == data[MIB : MIB + 100]
    assert listed(place) == ["f"]
    with path.open("rb") as old:
        (place / "g").write_bytes(b"over")
        (place / "g").rename(path)
        assert old.read() == b"new"
    assert path.read_bytes() == b"over"


def test_attributes(place: Path) -> None:
    path = place / "f"
    path.write_bytes(b"x")
    path.chmod(0o600)
    os.chown(path, 12, 34)
    os.utime(path, ns=(1, 1_234_567_890_123_456_789))
    found = path.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o600, 12, 34)
    assert found.st_mtime_ns == 1_234_567_890_123_456_789
    os.setxattr(path, "user.vllm.kv_crc32c", b"12345678")
    os.setxattr(place, "user.note", b"a directory")
    assert os.getxattr(path, "user.vllm.kv_crc32c") == b"12345678"
    assert os.listxattr(path) == ["user.vllm.kv_crc32c"]
    assert os.listxattr(place) == ["user.note"]
    assert refused(lambda: os.getxattr(path, "user.none")) == "ENODATA"
    assert refused(lambda: os.removexattr(path, "user.none")) == "ENODATA"
    assert refused(lambda: os.setxattr(path, "trusted.x", b"")) == "ENOTSUP"
    assert refused(lambda: os.setxattr(path, "user.x", bytes(60_000))) == "ENOSPC"
    assert refused(lambda: os.setxattr(path, "user.twfs.extents", b"")) == "EPERM"
    os.removexattr(path, "user.vllm.kv_crc32c")
    assert os.listxattr(path) == []
    with (place / "g").open("wb") as file:
        os.setxattr(file.fileno(), "user.k", b"v")
        os.fchmod(file.fileno(), 0o604)
        file.write(b"y")
    assert os.getxattr(place / "g", "user.k") == b"v"
    assert stat.S_IMODE((place / "g").stat().st_mode) == 0o604
    device = os.getxattr(path, "user.twfs.extents").decode()
    assert device.startswith("0:")
    assert os.getxattr(path, "user.twfs.class") == b"standard"
    os.setxattr(path, "user.twfs.class", b"durable")
    os.setxattr(place, "user.twfs.class", b"ephemeral")
    (place / "h").write_bytes(b"")
    assert [os.getxattr(place / name, "user.twfs.class") for name in "fh"] == [
        b"durable", b"ephemeral",
    ]  # fmt: skip
    assert refused(lambda: os.setxattr(path, "user.twfs.class", b"eternal")) == "EINVAL"


def test_what_files_here_cannot_do(place: Path) -> None:
    with (place / "f").open("w+b", buffering=0) as file:
        fd = file.fileno()
        command = ["fallocate", "--length", "1M", f"/proc/{os.getpid()}/fd/{fd}"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        assert "not supported" in said
        assert refused(lambda: os.ftruncate(fd, 100 << 30)) in {"EFBIG", "ENOTSUP"}
        assert refused(lambda: os.ftruncate(fd, 8 << 30)) == "ENOTSUP"
        assert refused(lambda: os.pwrite(fd, b"x", 8 << 30)) == "ENOTSUP"
        os.ftruncate(fd, MIB)
        os.pwrite(fd, b"end", MIB)
    assert (place / "f").read_bytes() == bytes(MIB) + b"end"


def test_tools_copy_trees_there_and_back(place: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub/empty").mkdir(parents=True)
    for number, size in enumerate((0, 1, 70_000, 5 * MIB)):
        path = source / "sub" / f"file {number}"
        path.write_bytes(os.urandom(size))
        os.setxattr(path, "user.k", b"%d" % number)
        path.chmod(0o600 + number)
        os.utime(path, ns=(0, 10**18 + number))
    os.utime(source / "sub", ns=(0, 10**18))

    def run(command: str) -> str:
        return subprocess.run(
            command, shell=True, check=True, capture_output=True, text=True, cwd=place
        ).stdout

    run(f"cp -a {source} cp && rsync -aX {source}/ rsync/")
    run(f"mkdir tar && tar --xattrs -C {source} -cf - . | tar --xattrs -C tar -xf -")
    listing = "find . -mindepth 1 -type f -printf '%P %s %m %T@\\n' | sort"
    wanted = subprocess.run(
        listing, shell=True, check=True, capture_output=True, text=True, cwd=source
    ).stdout
    for name in ("cp", "rsync", "tar"):
        run(f"diff -r {source} {name}")
        assert run(f"cd {name} && {listing}") == wanted
        assert os.getxattr(place / name / "sub/file 3", "user.k") == b"3"
    assert (place / "cp/sub").stat().st_mtime_ns == 10**18
    assert run(f"rsync -aX --itemize-changes {source}/ rsync/") == ""
    run(f"cp -a cp {tmp_path}/back && diff -r {source} {tmp_path}/back")
    run("rm -r cp rsync tar")
    assert listed(place) == []


def test_permissions_are_the_kernels(home: Mount, place: Path) -> None:
    (home.path / "files").chmod(0o755)
    private = place / "private"
    private.write_bytes(b"secret")
    private.chmod(0o600)
    shared = place / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    code = "import errno\nos.setgroups([]); os.setgid(0); os.setuid(4242)\n" + (
        "def act(call):\n"
        "    try: return call() and 'done'\n"
        "    except OSError as error: return errno.errorcode[error.errno]\n"
        "at = sys.argv[1]\n"
        "print(act(lambda: open(at + '/private').read()), act(lambda: open(at + '/no', 'w')),\n"
        "      act(lambda: open(at + '/shared/mine', 'w').write('x')),\n"
        "      os.stat(at + '/shared/mine').st_uid)"
    )
    assert elsewhere(code, place) == "EACCES EACCES done 4242"


def test_a_killed_writer_leaves_nothing(place: Path) -> None:
    code = (
        "fd = os.open(sys.argv[1] + '/f', os.O_CREAT | os.O_WRONLY)\n"
        "os.write(fd, b'x' * 100000)\n"
        "print('written', flush=True)\n"
        "import time; time.sleep(600)"
    )
    command = [sys.executable, "-c", f"import os, sys\n{code}", str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    assert listed(place) == []
    assert refused((place / "f").stat) == "ENOENT"
    with pytest.raises(subprocess.CalledProcessError):
        elsewhere("open(sys.argv[1], 'w').write('whole'); os.abort()", place / "g")
    assert (place / "g").read_bytes() == b"whole"  # it was closed before


def test_many_threads_write_and_rename_at_once(home: Mount, place: Path) -> None:
    """As vLLM's fs tier does: 32 threads, each a temporary name, one write, a rename."""
    memory, commits = aligned(16 * KIB), home.statistics()["metadata"]["commits"]

    def store(number: int) -> None:
        for turn in range(4):
            temporary = place / f"t{number}.tmp"
            fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_TRUNC | os.O_DIRECT)
            assert os.write(fd, memory) == len(memory)
            os.close(fd)
            temporary.rename(place / f"{number}-{turn}")

    threads = [threading.Thread(target=store, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(listed(place)) == 128
    assert all((place / f"{number}-3").read_bytes() == memory[:] for number in range(32))
    assert home.statistics()["metadata"]["commits"] - commits < 2 * 128


def await_names(place: Path, names: set[str]) -> None:
    """Wait until just *names* are listed: the kernel tells of a last close when it likes."""
    while set(listed(place)) != names:
        time.sleep(0.01)


def test_listings_go_on_while_names_come_and_go(place: Path) -> None:
    for number in range(300):
        (place / f"{number:03d}").touch()
    await_names(place, {f"{number:03d}" for number in range(300)})
    with os.scandir(place) as rows:
        seen = {next(rows).name for _ in range(10)}
        for number in range(0, 300, 2):
            (place / f"{number:03d}").unlink()
        (place / "new").touch()
        seen |= {row.name for row in rows}
    odd = {f"{number:03d}" for number in range(1, 300, 2)}
    assert odd <= seen
    await_names(place, odd | {"new"})
    assert [row.name for row in sorted(os.scandir(place), key=lambda row: row.name)][-1] == "new"


def test_fio_verifies_what_it_wrote(place: Path, tmp_path: Path) -> None:
    subprocess.run(
        ["fio", "--name=v", f"--directory={place}", "--rw=write", "--bs=64k", "--size=8m",
         "--numjobs=2", "--verify=crc32c", "--do_verify=0", "--fallocate=none"],
        check=True, cwd=tmp_path, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    subprocess.run(
        ["fio", "--name=v", f"--directory={place}", "--rw=read", "--bs=64k", "--size=8m",
         "--numjobs=2", "--verify=crc32c", "--verify_only=1"],
        check=True, cwd=tmp_path, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def test_everything_is_there_after_restarts(scratch: Path, tmp_path: Path) -> None:
    data = os.urandom(3 * MIB)
    for turn in range(2):
        with mounted(scratch, tmp_path / "mnt") as mount:
            root = mount.path / "files"
            if not turn:
                (root / "empty/dir").mkdir(parents=True)
                (root / "f").write_bytes(data)
                os.setxattr(root / "f", "user.k", b"v")
                open_one = (root / "never closed").open("wb", buffering=0)
                open_one.write(b"x")
                mount.kill()
                with pytest.raises(OSError, match=r"."):
                    open_one.close()
            else:
                assert sorted(listed(root)) == ["empty", "f"]
                assert listed(root / "empty") == ["dir"]
                assert (root / "f").read_bytes() == data
                assert os.getxattr(root / "f", "user.k") == b"v"


def test_a_full_warehouse_evicts_files_and_refuses_what_cannot_fit(
    scratch: Path, tmp_path: Path
) -> None:
    with mounted(scratch, tmp_path / "mnt") as mount:  # of 64 MiB
        root = mount.path / "files"
        data = {f"f{number:02d}": os.urandom(9 * MIB) for number in range(12)}
        for name, each in data.items():
            (root / name).write_bytes(each)
        left = listed(root)
        assert 3 <= len(left) < 8
        assert "f11" in left
        for name in left:
            assert (root / name).read_bytes() == data[name]
        with (root / "f11").open("rb", buffering=0) as file:
            assert file.read(10) == data["f11"][:10]
            for number in range(12):
                (root / f"more{number}").write_bytes(bytes(9 * MIB))
            done = subprocess.run(
                [sys.executable, "-c", READ_ALL], stdin=file, capture_output=True, check=False
            )
            rest = data["f11"][10:]
            assert rest.startswith(done.stdout), "never wrong bytes"
            assert done.returncode == (0 if done.stdout == rest else errno.ESTALE)

        def write() -> None:
            with (root / "large").open("wb") as file:
                for _ in range(80):
                    file.write(bytes(MIB))

        assert refused(write) == "ENOSPC"
        assert "large" not in listed(root)
