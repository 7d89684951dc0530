"""The main paths on a real NVMe driver: a QEMU guest with emulated namespaces and dm-flakey.

    python tests/vm/run.py [--cuts 5] [--seed 1]        # 3 to 6 minutes; needs root, apt and no KVM

Boots Debian's kernel with this machine's files (read-only, over 9p, with an overlay in memory) and
runs inside.py there: the command line, the mount and clients on /dev/nvme0n1, then the same device
behind dm-flakey that drops writes, fails writes, fails all. Then guests that write are killed like
machines that lose their power, and the next one looks whether all they reported is there.

What it needs is put below --cache: the kernel's package, an initramfs, two disk images. Prints one
JSON document; the exit code is 0 if there are no problems. Not part of CI: emulation is slow.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
PACKAGES: Final = ("qemu-system-x86", "busybox-static", "kmod", "cpio", "dmsetup")
MODULES: Final = (
    "virtio_pci", "9pnet_virtio", "9p", "overlay", "nvme", "ext4", "fuse", "dm-flakey", "loop",
)  # fmt: skip
DISK_MIB: Final = (256, 128)  # the device, and the filesystem of the metadata
BOOT_S_MAX: Final = 120.0
RUN_S_MAX: Final = 600.0

INIT: Final = """#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc proc /proc; $B mount -t sysfs sys /sys; $B mount -t devtmpfs dev /dev
for m in $($B cat /modules); do $B insmod /lib/$m || echo "VM-NO-MODULE $m"; done
$B mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,ro,cache=loose host /host
$B mount -t tmpfs -o size=50% tmpfs /top; $B mkdir -p /top/upper /top/work
$B mount -t overlay -o lowerdir=/host,upperdir=/top/upper,workdir=/top/work root /new
for d in proc sys dev; do $B mount --move /$d /new/$d; done
$B mkdir -p /new/dev/shm; $B mount -t tmpfs shm /new/dev/shm
command=$($B sed -n 's/.*vmcmd=\\([^ ]*\\).*/\\1/p' /new/proc/cmdline | $B tr '^' ' ')
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH
echo VM-UP
$B chroot /new /bin/sh -c "$command"
echo "VM-EXIT $?"
$B sync; $B poweroff -f
"""


class Guest:
    """How to boot; made once."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        cache.mkdir(parents=True, exist_ok=True)
        self.disks = [cache / f"disk{number}.img" for number in range(len(DISK_MIB))]
        self.kernel = self._kernel()
        self.initramfs = self._initramfs()

    def _kernel(self) -> Path:
        """Unpack Debian's kernel, fetched once."""
        root = self.cache / "kernel"
        if not root.exists():
            missing = [p for p in PACKAGES if subprocess.run(["dpkg", "-s", p], capture_output=True,
                                                             check=False).returncode]  # fmt: skip
            if missing:
                subprocess.run(["apt-get", "-qq", "install", "-y", "--no-install-recommends",
                                *missing], check=True)  # fmt: skip
            depends = subprocess.run(
                ["apt-cache", "depends", "linux-image-amd64"], capture_output=True, text=True,
                check=True,
            ).stdout  # fmt: skip
            name = depends.split("Depends: ")[1].split()[0]
            subprocess.run(["apt-get", "-qq", "download", name], cwd=self.cache, check=True)
            (package,) = self.cache.glob("linux-image-*.deb")
            subprocess.run(["dpkg", "-x", package, root], check=True)
        return next((root / "boot").glob("vmlinuz-*"))

    def _initramfs(self) -> Path:
        """Pack busybox, the modules and INIT."""
        made = self.cache / "initramfs.gz"
        root = self.cache / "initramfs"
        shutil.rmtree(root, ignore_errors=True)
        for folder in ("bin", "lib", "proc", "sys", "dev", "host", "top", "new"):
            (root / folder).mkdir(parents=True)
        shutil.copy("/bin/busybox", root / "bin" / "busybox")
        order: list[str] = []
        base = self.cache / "kernel"
        version = self.kernel.name.removeprefix("vmlinuz-")
        subprocess.run(["depmod", "-b", base, version], check=True)
        for module in MODULES:
            shown = subprocess.run(
                ["modprobe", "-d", base, "-S", version, "--show-depends", module],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
            paths = [line.split()[1] for line in shown.splitlines() if line.startswith("insmod")]
            for path in map(Path, paths):
                if path.name not in order:
                    order.append(path.name)
                    shutil.copy(path, root / "lib" / path.name)
        (root / "modules").write_text("\n".join(order))
        (root / "init").write_text(INIT)
        (root / "init").chmod(0o755)
        with made.open("wb") as file:
            find = subprocess.Popen(["find", "."], cwd=root, stdout=subprocess.PIPE)
            cpio = subprocess.Popen(["cpio", "--quiet", "-o", "-H", "newc"], cwd=root,
                                    stdin=find.stdout, stdout=subprocess.PIPE)  # fmt: skip
            subprocess.run(["gzip", "-1"], stdin=cpio.stdout, stdout=file, check=True)
        return made

    def fresh_disks(self) -> None:
        """Make the disks empty."""
        for disk, size in zip(self.disks, DISK_MIB, strict=True):
            with disk.open("wb") as file:
                file.truncate(size << 20)

    def boot(self, *arguments: str) -> "Booted":
        """Start a guest that runs inside.py with *arguments*."""
        python = sys.executable
        words = [python, str(REPOSITORY / "tests" / "vm" / "inside.py"), *arguments]
        drives = []
        for number, disk in enumerate(self.disks):
            drives += [
                "-drive", f"file={disk},if=none,id=n{number},format=raw,cache=writeback",
                "-device", f"nvme,drive=n{number},serial=tw{number}",
            ]  # fmt: skip
        command = [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "3072",
            "-smp", "2", "-nographic", "-no-reboot", "-kernel", str(self.kernel),
            "-initrd", str(self.initramfs),
            "-append", "console=ttyS0 quiet panic=-1 vmcmd=" + "^".join(words),
            "-virtfs",
            "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
            *drives,
        ]  # fmt: skip
        return Booted(command)


class Booted:
    """One guest that runs; its lines as they come."""

    def __init__(self, command: list[str]) -> None:
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            self.lines.append(raw.decode(errors="replace").strip())

    def wait(self, seconds: float) -> int | None:
        """Wait for the guest's end; the exit code of inside.py, None if there was none."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join()
        codes = [line.split()[1] for line in self.lines if line.startswith("VM-EXIT")]
        return int(codes[-1]) if codes else None

    def kill(self) -> None:
        """Take its power."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def said(self, word: str) -> list[str]:
        """What followed *word* at the beginning of a line."""
        return [line[len(word) :].strip() for line in self.lines if line.startswith(word)]

    def await_word(self, word: str, count: int, seconds: float) -> bool:
        """Wait until so many lines begin with *word*; False if that does not come."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            if len(self.said(word)) >= count:
                return True
            time.sleep(0.05)
        return False


def run_paths(guest: Guest, problems: list[Any]) -> dict[str, Any]:
    """The main paths, and dm-flakey."""
    guest.fresh_disks()
    booted = guest.boot("paths")
    code = booted.wait(RUN_S_MAX)
    if code != 0:
        problems.append({"phase": "paths", "exit": code, "log": booted.lines[-60:]})
    steps = [json.loads(line) for line in booted.said("STEP")]
    return {"steps": steps, "driver": booted.said("DRIVER")}


def run_cuts(guest: Guest, cuts: int, seed: int, problems: list[Any]) -> dict[str, Any]:
    """Guests that write lose their power; the next one looks."""
    chance = random.Random(seed)
    guest.fresh_disks()
    durable: list[str] = []
    verified = 0
    for number in range(cuts):
        booted = guest.boot("write", str(seed * 1000 + number), *durable[-400:])
        if not booted.await_word("PUT", chance.randrange(1, 40), BOOT_S_MAX):
            problems.append({"phase": "cut", "number": number, "log": booted.lines[-40:]})
            booted.kill()
            break
        time.sleep(chance.random() * 0.2)
        booted.kill()
        durable += booted.said("PUT")
        verified += sum(map(int, booted.said("VERIFIED")))
        problems += [{"phase": "cut", "said": said} for said in booted.said("PROBLEM")]
    last = guest.boot("verify", *durable[-400:])
    if last.wait(RUN_S_MAX) != 0:
        problems.append({"phase": "verify", "log": last.lines[-60:]})
    verified += sum(map(int, last.said("VERIFIED")))
    return {"cuts": cuts, "chains_reported": len(durable), "chains_verified": verified}


def main() -> int:
    """Run all, print the report, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--cuts", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("/var/tmp/twfs-vm"))
    given = parser.parse_args()
    began = time.monotonic()
    problems: list[Any] = []
    guest = Guest(given.cache)
    report: dict[str, Any] = {"paths": run_paths(guest, problems)}
    if given.cuts:
        report["power"] = run_cuts(guest, given.cuts, given.seed, problems)
    report |= {"problems": problems, "seconds": round(time.monotonic() - began, 1)}
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
