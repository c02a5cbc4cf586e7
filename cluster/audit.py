"""Looks up known vulnerabilities of the packages in constraints.txt with pip-audit; exits with 1 if there are any.

Not every package index serves vulnerability data; the closing line says for how many packages it did. Run it on a schedule
(`make audit`, weekly, say): vulnerabilities become known without a change to the code, so CI has no reason to ask.
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
    except (ValueError, subprocess.TimeoutExpired) as error:
        print(f"audit: skipped, the index does not answer ({type(error).__name__})")
        return 0
    known = [package for package in packages if "vulns" in package]
    found = [(package["name"], package["version"], entry["id"]) for package in known for entry in package["vulns"]]
    for vulnerability in found:
        print(*vulnerability)
    print(f"audit: {len(found)} known vulnerabilities; data on {len(known)} of {len(packages)} packages")
    return min(len(found), 1)


if __name__ == "__main__":
    raise SystemExit(main())
