"""Known faults in the packages of constraints.txt, by pip-audit: ends with 1 if there are any.

An index that has no such data answers for none of the packages; the line says for how many it did.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
_SECONDS = 180


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner=off", "--format=json"]
    command.append(f"--requirement={ROOT / 'constraints.txt'}")
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
        packages = json.loads(finished.stdout)["dependencies"]
    except (ValueError, subprocess.TimeoutExpired) as error:  # nobody to ask
        print(f"audit: not made, the index does not answer ({type(error).__name__})")
        return 0
    known = [package for package in packages if "vulns" in package]
    faults = [(package["name"], package["version"], fault["id"]) for package in known for fault in package["vulns"]]
    for fault in faults:
        print(*fault)
    print(f"audit: {len(faults)} known faults; data on {len(known)} of {len(packages)} packages")
    return min(len(faults), 1)


if __name__ == "__main__":
    raise SystemExit(main())
