"""Kill a command, resume it, compare: python evidence/kill.py --kills 200 --out kills.json

`cr` on the micro model, two seeds of 24 updates with a checkpoint after each, is started, killed
and resumed until it ends. Its files must then be those of a command that nobody disturbed, byte for
byte (seconds and what shows them aside). Again, until there were enough kills:

instant   SIGKILL after a random time
write     SIGKILL inside a write: in the middle of the content, before or after the rename
boundary  SIGKILL at a growth: before the larger model, after it, or in its first update
signal    SIGTERM or SIGINT after a random time; the command must save and exit with 143 or 130
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402, F401  here, so that the forked lives need not

import fpt  # noqa: E402

FLAGS = ("--schedule cr --seed 0 1 --steps 24 --eval-every 5 --dev 20 --limit 40 --batch 8 "
         "--score-examples 16 --save-seconds 0 --threads 1 --device cpu").split()
KINDS = ("instant", "write", "boundary", "signal")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm_write(draw) -> None:
    """Die inside one of the next writes."""
    countdown, point = draw.randint(1, 12), draw.choice(["content", "sync", "rename", "renamed"])
    sync, rename = os.fsync, os.replace

    class Half:
        """A file that stops halfway."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            nonlocal countdown
            countdown -= 1
            if countdown == 0 and point == "content":
                self.file.write(content[:len(content) // 2])
                self.file.flush()
                die()
            return self.file.write(content)

    def fsync(number):
        if countdown <= 0 and point == "sync":
            die()
        sync(number)

    def replace(*paths):
        if countdown <= 0 and point == "rename":
            die()
        rename(*paths)
        if countdown <= 0 and point == "renamed":
            die()

    fpt.open, os.fsync, os.replace = lambda *how: Half(open(*how)), fsync, replace


def arm_boundary(draw) -> None:
    """Die at a growth: the third model of a life, after the final and the first."""
    build, compute, built = fpt.partial_t5, fpt.gradient, []
    at, point = draw.randint(3, 5), draw.choice(["before", "after", "update"])

    def partial_t5(*how):
        built.append(1)
        if len(built) == at and point == "before":
            die()
        model = build(*how)
        if len(built) == at and point == "after":
            die()
        return model

    def gradient(*how):
        found = compute(*how)
        if len(built) == at:
            die()
        return found

    fpt.partial_t5, fpt.gradient = partial_t5, gradient


def life(folder: Path, kind: str, draw, longest: float) -> tuple[int, float]:
    """Start or resume the command in `folder`, and end it. -> its exit code, its seconds."""
    begun = (folder / "run" / "command.json").exists()
    flags = ["--resume", "run"] if begun else [*FLAGS, "--out", "run"]
    start, seed = time.monotonic(), draw.random()
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        with open("output.txt", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        arm = {"write": arm_write, "boundary": arm_boundary}.get(kind)
        if arm:
            arm(random.Random(seed))
        fpt.report = lambda *_: None  # a second of matplotlib in every life
        try:
            fpt.main(flags)
        except SystemExit as stop:
            os._exit(stop.code)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(99)
        os._exit(0)
    if kind in ("instant", "signal"):
        end, done = start + longest * draw.random() ** 2, (0, 0)  # one that is nearly done is short
        while time.monotonic() < end and done == (0, 0):
            time.sleep(0.002)
            done = os.waitpid(child, os.WNOHANG)
        if done != (0, 0):  # it ended before
            return os.waitstatus_to_exitcode(done[1]), time.monotonic() - start
        os.kill(child, signal.SIGKILL if kind == "instant" else
                draw.choice([signal.SIGTERM, signal.SIGINT]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, time.monotonic() - start


def content(folder: Path) -> dict:
    """{file: what it holds}, without what tells the time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not name.startswith(("comparison", ".lock")) and (
                path.name != "seconds.json"):
            found[name] = path.read_bytes()
            if path.name == "checkpoint.safetensors":
                tensors, facts = fpt.unsealed(found[name])
                found[name] = fpt.sealed(tensors, {**facts, "seconds": None})
    return found


def main(args) -> None:
    if args.kills < 1:
        raise fpt.UserError("--kills must be at least 1")
    if args.out and Path(args.out).exists():
        raise fpt.UserError(f"--out {args.out} exists, and nothing is overwritten: name another")
    torch.set_num_threads(1)
    draw, scratch = random.Random(args.seed), Path(tempfile.mkdtemp())
    counts, different, lives, commands = dict.fromkeys(KINDS, 0), [], 0, 0
    (scratch / "calm").mkdir()
    code, longest = life(scratch / "calm", "none", draw, 0)
    assert code == 0, (scratch / "calm" / "output.txt").read_text()
    wanted = content(scratch / "calm" / "run")
    while (sum(counts[kind] for kind in KINDS[:3]) < args.kills
           or min(counts.values()) < 0.15 * args.kills):
        folder, code = scratch / f"storm{commands}", -9
        folder.mkdir()
        while code != 0:
            kind = draw.choice(KINDS)
            code, _ = life(folder, kind, draw, 1.2 * longest)
            lives += 1
            if code in (-9, 143, 130, -15):  # the last: when all was done
                counts[kind] += 1
            elif code != 0:
                raise SystemExit(f"exit code {code}: {(folder / 'output.txt').read_text()}")
        found = content(folder / "run")
        different += [name for name in {*wanted, *found} if wanted.get(name) != found.get(name)]
        commands += 1
        shutil.rmtree(folder)
        print(f"{commands} commands, {lives} lives, {counts}, different: {different}", flush=True)
    shutil.rmtree(scratch)
    record = {"kills": counts, "lives": lives, "commands": commands, "seed": args.seed,
              "different_files": different, "files_compared": len(wanted),
              "versions": fpt.versions()}
    if args.out:
        fpt.write(Path(args.out), json.dumps(record, indent=1))
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser("kill.py", description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"kill.py: error: {message}; see --help\n")
    parser.add_argument("--kills", type=int, default=200, help="at least so many (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (default: 0)")
    parser.add_argument("--out", default="", help="new json file for the counts")
    try:
        main(parser.parse_args())
    except fpt.UserError as error:
        print(f"kill.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
