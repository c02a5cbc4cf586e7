"""Tags over HTTP under load: how many documents a second, and how long an answer takes at half of that.

The application is that of `serve run xmc_ray.serve:app`, on a Ray of its own on this machine, with a model of words alone: the
lexical branch of the small recipe over tate's labels, trained for seconds only, which changes no speed. Requests are texts of
tate's test split. First as many clients as given ask without pause; then requests come at random times at half the rate that
this has reached, whether or not earlier ones are answered, and their durations count. Clients share the machine with the
service. Both once with one document a request, and once with eight. The bar is for the latter.

Bar, on two cores: 500 documents a second; 95 of 100 answers within 50 ms at half load.
"""

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import aiohttp
import numpy as np
import pyarrow.parquet as pq

from benchmarks.frame import verdict
from benchmarks.inputs import DATA, minilm
from cluster.local import free_ports

RATE_BAR, LATENCY_BAR, BARRED = 500, 50, 8
QUIET = {"RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
QUIET |= {"RAY_worker_niceness": "0"}  # as docs/serve.md advises


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--replicas", type=int, default=1)
    arguments = parser.parse_args()
    texts = pq.read_table(DATA / "tate" / "test.parquet", columns=["text"])["text"].to_pylist()
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("w+") as log:
        bundle = write_bundle(Path(folder))
        (port,) = free_ports(1)
        service = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.tagging.serve_load", "--serve", str(bundle), str(port), str(arguments.replicas)],
            cwd=Path(__file__).parents[2],
            env=os.environ | QUIET,
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            if not asyncio.run(answers(f"{address}/health", service)):
                log.seek(0)
                raise SystemExit(f"serve-load: the service has ended\n{log.read()[-3000:]}")
            print("| documents a request | documents/s | p50 ms | p95 ms | p99 ms |\n| ---: | ---: | ---: | ---: | ---: |")
            found = {}
            for size in (1, BARRED):
                rate, durations = asyncio.run(load(f"{address}/tag", texts, size, arguments.clients, arguments.seconds))
                p50, p95, p99 = np.percentile(durations, [50, 95, 99]) * 1000
                print(f"| {size} | {rate:,.0f} | {p50:.1f} | {p95:.1f} | {p99:.1f} |", flush=True)
                found[size] = rate, p95
        finally:
            service.terminate()
            service.wait()
    rate, p95 = found[BARRED]
    figure = f"{rate:,.0f} documents/s, p95 {p95:.1f} ms at half load"
    holds = rate >= RATE_BAR and p95 <= LATENCY_BAR
    verdict("serve-load", figure, f"{RATE_BAR} and {LATENCY_BAR}", holds)
    return 0 if holds else 1


def write_bundle(folder: Path) -> Path:
    from xmc_ray import FitConfig, XMCClassifier
    from xmc_ray.command import parse

    settings = ["--loop.minutes=0.2", "--model.lift=0", "--linear.candidates=0"]
    config = parse(FitConfig, ["--config=small-cpu", f"--encoder.name={minilm()}", *settings])
    table = pq.read_table(DATA / "tate" / "train.parquet", columns=["text", "labels"])
    XMCClassifier.fit(table["text"].to_pylist(), table["labels"].to_pylist(), config=config).save(folder / "bundle")
    return folder / "bundle"


def run_service(bundle: str, port: str, replicas: str) -> None:
    import signal

    from ray import serve

    from xmc_ray.serve import ServeConfig, app

    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(app(ServeConfig(bundle=bundle, replicas=int(replicas))))
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    serve.shutdown()


async def answers(address: str, service: "subprocess.Popen[bytes]") -> bool:
    """Waits until the service answers; False if it ends before."""
    async with aiohttp.ClientSession() as session:
        while service.poll() is None:
            try:
                async with session.get(address) as answer:
                    if answer.status == 200:
                        return True
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.5)
    return False


async def load(address: str, texts: list[str], size: int, clients: int, seconds: float) -> tuple[float, list[float]]:
    """Documents a second that so many clients get, and the seconds of each answer at half that rate."""
    rng = random.Random(0)
    headers = {"Content-Type": "application/json"}

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask() -> float:
            body = json.dumps({"texts": rng.sample(texts, size)})
            began = time.perf_counter()
            async with session.post(address, data=body, headers=headers) as answer:
                answer.raise_for_status()
                await answer.read()
            return time.perf_counter() - began

        async def client(end: float) -> int:
            count = 0
            while time.perf_counter() < end:
                await ask()
                count += size
            return count

        await asyncio.gather(*(client(time.perf_counter() + 3) for _ in range(clients)))  # to warm up
        counts = await asyncio.gather(*(client(time.perf_counter() + seconds) for _ in range(clients)))
        rate = sum(counts) / seconds
        tasks, next_at, end = [], time.perf_counter(), time.perf_counter() + seconds
        while next_at < end:
            await asyncio.sleep(max(0.0, next_at - time.perf_counter()))
            tasks.append(asyncio.create_task(ask()))
            next_at += rng.expovariate(rate / 2 / size)
        return rate, list(await asyncio.gather(*tasks))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        run_service(*sys.argv[2:])
    else:
        sys.exit(main())
