"""Runs checks by name and count, and prints a line of JSON for each: what was done, and with which seed."""

from __future__ import annotations

import argparse
import importlib
import json
import secrets
import sys
import time

from .inject import preloaded

CHECKS = {  # name: (module, fast count, long count)
    "kill": ("kill", 300, 10_000),
    "inject": ("inject", 300, 0),  # 0: every point
    "trace": ("inject", 40, 400),
    "mutate_files": ("mutate", 8000, 800_000),
    "mutate_stores": ("mutate", 2000, 200_000),
    "hostile": ("hostile", 1, 1),
    "readers": ("readers", 500, 20_000),
    "isolation": ("isolation", 20_000, 200_000),
    "threads": ("threads", 5, 600),
    "soak": ("soak", 15, 7200),
}
PRELOADED = ("inject", "trace")


def main():
    """One process a check, so that a crash of one is seen and stops none."""
    parser = argparse.ArgumentParser(prog="python -m reliability", description=__doc__)
    parser.add_argument("checks", nargs="*", choices=[*CHECKS, []], help="all of them by default")
    parser.add_argument("--count", type=int, help="how many; the long count by default")
    parser.add_argument("--share", type=float, default=1.0, help="of the long count")
    parser.add_argument("--seed", type=int, help="drawn by default")
    parser.add_argument("--under", default="durable", help="which store: one of those in workload.py")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    seed = secrets.randbits(31) if given.seed is None else given.seed
    failed = []
    for name in given.checks or CHECKS:
        module, _, long = CHECKS[name]
        count = given.count if given.count is not None else max(int(long * given.share), 1 if long else 0)
        if name in PRELOADED and not given.inside:
            arguments = [name, "--count", str(count), "--seed", str(seed), "--under", given.under, "--inside"]
            done = preloaded(arguments)
            if done is None:
                print(f"{name}: not run, it needs Linux and a C compiler", flush=True)
                continue
            print(done.stdout, done.stderr, sep="", end="", flush=True)
            failed += [name] if done.returncode else []
            continue
        started = time.monotonic()
        more = {} if given.under == "durable" else {"under": given.under}
        check = getattr(importlib.import_module(f".{module}", __package__), name)
        seen = check(count, seed, **more)
        seconds = round(time.monotonic() - started, 1)
        print(json.dumps({"check": name, "count": count, "seed": seed, "seconds": seconds, **seen}), flush=True)
    return f"failed: {', '.join(failed)}" if failed else 0


if __name__ == "__main__":
    sys.exit(main())
