"""Look at runs and nights in a browser: a page on this machine, for this machine alone.

python jobs/show.py FOLDER [--port 8080] [--open]        --help lists every setting
"""

from xmc_ray.cli import run

if __name__ == "__main__":
    run("show")
