"""What tests share: a real S3 server and one local Ray, each started once a session and only if a test asks for it."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkout import ROOT
from fruit import options, write_catalogue
from seaweed import S3, ports_of, weed_command

# Set before anything imports ray or torch, and inherited by every process that a test starts.
os.environ |= {
    "RAY_AUTH_MODE": "disabled",  # otherwise ray.init() leaves a token behind that changes how later clusters start
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "RAY_worker_niceness": "0",  # not starved by whatever else runs here
    "RAY_prestart_worker_first_driver": "0",  # as a job has it, see `session.connect`
    "OMP_NUM_THREADS": "1",  # many processes share few cores
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # 2 by default: as long as each validation and the end of a run wait for it
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH")])),
}

# The files that take longest, first: whichever worker is free takes the next one, and none is left with a long one at the end.
LONGEST_FIRST = [
    "on_ray/tag/test_faults.py",
    "on_ray/tag/test_job.py",
    "cluster/test_cluster.py",
    "on_ray/train/test_faults.py",
    "on_ray/train/test_job_end_to_end.py",
    "cluster/test_policies.py",
    "cluster/test_autoscaling.py",
    "test_readme.py",
    "on_ray/tag/test_tables.py",
    "on_ray/tag/test_stage.py",
    "model/test_device.py",
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # only under pytest-xdist: one process does better with the quick files first
        order = {name: number for number, name in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: order.get(item.path.relative_to(ROOT / "tests").as_posix(), len(order)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Whoever waits for a long run hears at once what has failed, and why: all is told again at its end."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        lines = report.longreprtext.splitlines()
        told = [line for line in lines if line.startswith("E ")] or lines
        print(f"\nfailed in {report.when} after {report.duration:.0f} s: {report.nodeid}", *told[:3], sep="\n", flush=True)


@pytest.fixture(scope="session", autouse=True)
def float32() -> Iterator[None]:
    """What computes in the process of the tests takes its CPU for one without bfloat16, so that they are alike on all CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xmc_ray.model.precision.cpu_has_bfloat16", lambda: False)
        yield


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A running S3 server with an empty bucket; the ``AWS_*`` variables point to it for the whole session."""
    folder = tmp_path_factory.mktemp("s3")
    parts = ("master", "volume", "filer", "s3")
    ports = ports_of(*(f"{part}.{port}" for part in parts for port in ("port", "port.grpc")))
    server = S3(endpoint=f"http://127.0.0.1:{ports['s3.port']}", folder=folder)
    server.command = weed_command(folder, server, ports)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        try:
            server.start()
            yield server
        finally:
            server.stop()
            for part in parts:
                Path(f"/tmp/seaweedfs-{part}-grpc-{ports[f'{part}.port.grpc']}.sock").unlink(missing_ok=True)


@pytest.fixture(scope="session")
def ray_session(s3: S3) -> Iterator[None]:
    """A local Ray; it starts after the S3 server, because its workers inherit the environment of that moment."""
    import ray

    from xmc_ray.on_ray.session import set_up_streams

    ray.shutdown()  # of one that a night without this fixture has started, in whatever order tests are run
    # Ray Data needs more slots than a small machine has cores, else its stages wait for each other.
    ray.init("local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="warning")
    set_up_streams()  # as a job does: by itself Ray Data keeps an error of ours as text alone
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Fills a folder of that name, unless this run of the tests has it: the workers of pytest-xdist share what they make."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder = root / name
        with (root / f"{name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.fstat(lock.fileno()).st_size:
                folder.mkdir(exist_ok=True)
                fill(folder)
                lock.write("made")
        return folder

    return make


@pytest.fixture(scope="session")
def fruit(make_once: Callable[..., Path]) -> Path:
    """A folder with ``train.parquet``, ``test.parquet`` and ``labels.parquet``, quickly learnt."""
    return make_once("fruit", write_catalogue)


@pytest.fixture(scope="session")
def trained(request: pytest.FixtureRequest, fruit: Path, tiny_encoder: Path, make_once: Callable[..., Path]) -> Path:
    """The run folder of a model trained by one worker; nobody writes to it."""
    from xmc_ray import command
    from xmc_ray.on_ray.train import job

    def train(runs: Path) -> None:
        request.getfixturevalue("ray_session")
        kept = f"--cache={runs / 'cache'}", "--checkpoints.keep=true"
        job.run(command.parse(job.TrainConfig, options(fruit, tiny_encoder, runs / "one", *kept)))

    return make_once("runs", train) / "one"


@pytest.fixture(scope="session")
def bundles(fruit: Path, trained: Path, other_encoder: Path, make_once: Callable[..., Path]) -> list[str]:
    """The trained bundle, and one of another kind, half trained.

    It has another encoder and tokenizer, shorter texts, no groups, a lexical branch and a linear ranker.
    """
    import pyarrow.parquet as pq

    from xmc_ray.classifier import XMCClassifier
    from xmc_ray.data.groups import GroupsConfig
    from xmc_ray.model.encoder import EncoderConfig
    from xmc_ray.model.lexical import LexicalConfig
    from xmc_ray.model.linear import LinearConfig
    from xmc_ray.model.tokenizer import TextConfig
    from xmc_ray.training.fit import FitConfig
    from xmc_ray.training.loop import LoopConfig
    from xmc_ray.training.optim import OptimConfig

    train = pq.read_table(fruit / "train.parquet")
    config = FitConfig(
        encoder=EncoderConfig(name=str(other_encoder), feature_layers=2, pooling="mean"),
        text=TextConfig(max_tokens=8),
        groups=GroupsConfig(max_size=1),
        lexical=LexicalConfig(width=8, columns=512, rarest=1),
        linear=LinearConfig(candidates=8),
        optim=OptimConfig(encoder_lr=2e-3, head_lr=2e-2),
        loop=LoopConfig(epochs=2, batch_size=8),
    )

    def fit(folder: Path) -> None:
        classifier = XMCClassifier.fit(train["text"].to_pylist(), train["labels"].to_pylist(), config=config)
        classifier.save(str(folder / "other"))

    return [str(trained / "bundle"), str(make_once("bundles", fit) / "other")]


WORDS = ["a", "an", "the", "red", "green", "yellow", "blue", "apple", "pear", "plum", "grape", "fruit", "number", "text"]


@pytest.fixture(scope="session")
def tiny_encoder(make_once: Callable[..., Path]) -> Path:
    """A folder with a BERT of two layers and width 32, random weights, and a tokenizer of a few words and all letters."""
    return make_once("tiny-encoder", lambda folder: save_encoder(folder, WORDS[1:], 32))


@pytest.fixture(scope="session")
def other_encoder(make_once: Callable[..., Path]) -> Path:
    """A narrower one, whose tokenizer gives every word another id."""
    return make_once("other-encoder", lambda folder: save_encoder(folder, WORDS[:0:-1], 16))


def save_encoder(folder: Path, words: list[str], width: int) -> Path:
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: place for place, word in enumerate([*special, *words, *letters, *(f"##{x}" for x in letters)])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    around = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}

    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, **names).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=128, **shape)).save_pretrained(folder)
    return folder
