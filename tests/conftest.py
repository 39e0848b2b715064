"""What several tests need: a tiny encoder with experts, the command line as a process, S3, a machine out of files."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from filelock import FileLock

# A shell's background job ignores Ctrl-C and hands that on; what these tests interrupt must hear it all the same.
signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = ("red", "green", "blue", "cat", "dog", "cow", "one", "two", "three", "color", "animal", "number")
LENIENT = {
    "max_norm_ratio": "inf",
    "max_overlap": 1.0,
    "max_removed": 1.0,
    "max_canary_drop": 1.0,
    "max_task_drop": 1.0,
    "max_mean_drop": 1.0,
    "max_negative_flips": 1.0,
    "min_gain": -1.0,
    "min_expert_gain": -1.0,
    "min_retention": -100.0,
    "expert_significance": 1.0,
}


def make_base(folder):
    """A two-layer BERT with random weights and a vocabulary of twelve words."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def make_expert(base, folder, seed, size=0.02):
    """The base with noise on every matrix but the embeddings, and a suite that any such model can be measured by."""
    import torch
    from safetensors.torch import load_file, save_file

    from evaluation.suites import write_suite

    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(base / "model.safetensors")
    moved = {
        name: tensor + size * torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 2 and "embeddings" not in name
        else tensor
        for name, tensor in weights.items()
    }
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    pairs = [(f"{first} {second}", WORDS.index(first) // 3) for first in WORDS[:9] for second in WORDS[:9]]
    rows = [(text, label, "gate" if index % 4 else "tune") for index, (text, label) in enumerate(pairs)]
    prompts = ("color red green blue", "animal cat dog cow", "number one two three")
    write_suite(folder, kind="zero-shot-text", labels=("color", "animal", "number"), prompts=prompts, rows=rows)
    return folder


LONGEST = (
    *("test_approval.py", "test_kill.py", "test_loop.py", "test_serving.py", "test_bad_experts.py", "test_guarding.py"),
    *("test_upkeep.py", "test_webhooks.py"),
    *("test_objects.py", "test_schedule.py", "test_programs.py", "test_search.py", "test_harness.py"),
    "test_page_in_a_browser.py",
)


def pytest_collection_modifyitems(items):
    """The files that take longest first, so that no worker ends up with one while the others have nothing left."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """A tiny base and five experts: zoo / "base", zoo / "expert-1", ..."""
    root = tmp_path_factory.mktemp("zoo")
    base = make_base(root / "base")
    for number in range(1, 6):
        make_expert(base, root / f"expert-{number}", seed=number)
    return root


@pytest.fixture(scope="session")
def unused_mlflow(tmp_path_factory, worker_id):
    """MLflow's database before its first use, the same for all workers: its migrations take two seconds."""
    mine = tmp_path_factory.getbasetemp()
    shared = (mine if worker_id == "master" else mine.parent) / "unused-mlflow.db"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            made = shared.with_suffix(".new")
            subprocess.run(
                [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{made}"], check=True, capture_output=True
            )
            made.rename(shared)
    return shared


@pytest.fixture(scope="session")
def furnish(zoo, unused_mlflow):
    """A function that puts a foldin.toml into a folder; its line `tiny` lets everything pass."""
    gate = "\n".join(f"{key} = {value}" for key, value in LENIENT.items())
    text = (
        f'[registry]\nlease_seconds = 20.0\n\n[lines.tiny]\nbase = "{zoo / "base"}"\nexperts = ["tiny-experts"]\n'
        f"interval = 3600.0\n\n[lines.tiny.gate]\n{gate}\n"
    )

    def write(folder):
        (folder / "foldin.toml").write_text(text)
        (folder / ".foldin").mkdir(exist_ok=True)
        shutil.copyfile(unused_mlflow, folder / ".foldin/mlflow.db")
        return folder

    return write


@pytest.fixture
def workshop(tmp_path, furnish):
    """A folder with such a foldin.toml."""
    return furnish(tmp_path)


@pytest.fixture
def expert_maker(zoo, tmp_path):
    """A function that makes one more expert of the tiny base: seed, size of the move -> folder."""
    return lambda seed, size=0.02: make_expert(zoo / "base", tmp_path / f"made-{seed}", seed, size)


@pytest.fixture(scope="session")
def foldin():
    """The command line as a process of its own: folder, arguments -> finished process."""
    return run_foldin


def run_foldin(folder, *arguments, timeout=180, **environment):
    """Run foldin in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def descriptors():
    """A function that leaves this process a number of descriptors to open, until the block ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    @contextmanager
    def left(free):
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + free, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    return left


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """(host, port) of a real S3 server (moto)."""
    from tests.registry.faulty_s3 import moto

    with moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture
def s3(s3_server, monkeypatch):
    """A bucket behind a proxy that fails as it is told; the environment holds credentials that nobody may print."""
    from tests.registry.faulty_s3 import ELSEWHERE, ENVIRONMENT, faulty

    for name in ELSEWHERE:
        monkeypatch.delenv(name, raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with faulty(s3_server) as store:
        yield store
