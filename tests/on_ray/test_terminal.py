"""Lines of Ray's that nobody needs on a terminal."""

import os
import subprocess
import sys

CODE = """
import os, sys
from xmc_ray.on_ray.terminal import without_lines_of_ray

end = without_lines_of_ray()
print("of Python", file=sys.stderr)
os.write(2, b"[2026-11-29 01:44:28,102 E 17129 17129] core_worker.cc:2465: Actor with class name\\n")
os.write(2, b"[2026-11-29 01:44:28,102 F 17129 17129] raylet.cc:1: Check failed\\n")
os.write(2, b"of a library\\n")
sys.stderr.write("half a ")
sys.stderr.write("line\\n")
end()
os.write(2, b"[2026-11-29 01:44:28,102 E 1 1] afterwards\\n")
print("the end", file=sys.stderr)
"""


def shown(**variables: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=os.environ | variables)
    return done.stderr.splitlines()


def test_only_lines_of_ray_are_left_out() -> None:
    """Two ways lead to the terminal, so their order is not that of writing."""
    lines = shown(RAY_BACKEND_LOG_LEVEL="")
    check, afterwards = ("[2026-11-29 01:44:28,102 F 17129 17129] raylet.cc:1: Check failed", lines[-2])
    assert sorted(lines[:-2]) == sorted(["of Python", check, "of a library", "half a line"])
    assert afterwards.endswith("afterwards") and lines[-1] == "the end"


def test_who_asks_for_a_level_sees_them() -> None:
    assert any("Actor with class name" in line for line in shown(RAY_BACKEND_LOG_LEVEL="error"))
