#!/usr/bin/env python3
"""Stands in for the `ray` command: notes how it is called, and answers as the job server would.

Its folder, $STUB, holds `calls` (one JSON list a line), `plan` (how each submission goes, one word
a line) and `job-ID` (the state of a job).
"""

import json
import os
import signal
import sys
from pathlib import Path

STUB = Path(os.environ["STUB"])
WORDS = {
    "succeeded": "Job '{}' succeeded",
    "failed": "Job '{}' failed\nStatus message: Job entrypoint command failed with exit code 1",
    "stopped": "Job '{}' was stopped",
    "RUNNING": "Status for job '{}': RUNNING\nStatus message: Job is currently running.",
}


def main(arguments: list[str]) -> int:
    with (STUB / "calls").open("a") as calls:
        print(json.dumps(arguments), file=calls)
    if (STUB / "away").exists():
        print("ConnectionError: Failed to connect to Ray at address", file=sys.stderr)
        return 1
    command = arguments[1]
    if command == "submit":
        return submit(arguments[arguments.index("--submission-id") + 1])
    job = STUB / f"job-{arguments[-1]}"
    if command == "stop":
        job.write_text("stopped")
    elif command == "logs":
        ended = job.with_name(job.name + ".ends")
        if ended.exists():
            job.write_text(ended.read_text())
    elif command == "status":
        if not job.exists():
            print(f"RuntimeError: status code 404: Job {arguments[-1]} does not exist.")
            return 1
        print(WORDS[job.read_text()].format(arguments[-1]))
    return 0


def submit(job: str) -> int:
    plan = (STUB / "plan").read_text().split()
    (STUB / "plan").write_text(" ".join(plan[1:]))
    if plan[0] == "refused":
        return 1
    (STUB / f"job-{job}").write_text("RUNNING" if plan[0] == "goes-on" else plan[0])
    if plan[0] == "goes-on":
        print("the job is going", flush=True)
        signal.pause()
    return int(plan[0] == "failed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
