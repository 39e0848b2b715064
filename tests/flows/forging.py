"""foldin as processes that are cheap to start, and that kill themselves, or stand still, at a named point."""

import json
import signal
import subprocess
import sys

# A process that has everything imported and nothing open. For every order on its input it forks a child that is
# `foldin` from there on and sends itself signals, each before or after the k-th call of one function; the answer is how
# that child ended. Starting Python once for all children saves most of the time that a life would take.
FORGE = """
import functools, importlib, json, os, signal, sys

for name in sys.argv[1:]:
    importlib.import_module(name)
sys.modules["sqlalchemy.orm"].configure_mappers()

def arm(number, module, path, when, count):
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, sys.modules[module])
    original, calls = getattr(owner, name), []
    def counted(*arguments, **keywords):
        calls.append(name)
        if (when, len(calls)) == ("before", count):
            os.kill(os.getpid(), number)
        answer = original(*arguments, **keywords)
        if (when, len(calls)) == ("after", count):
            os.kill(os.getpid(), number)
        return answer
    setattr(owner, name, counted)

def live(folder, said, verb, points):
    os.chdir(folder)
    words = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(words, 1), os.dup2(words, 2)
    for point in points:
        arm(*point)
    from flows.cli import main
    try:
        main(verb)
    except SystemExit as end:
        return int(end.code or 0)
    return 0

for line in sys.stdin:
    order = json.loads(line)
    pid = order["wake"] if "wake" in order else os.fork()
    if not pid:
        code = live(**order)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    if "wake" in order:
        os.kill(pid, signal.SIGCONT)
    status = os.waitpid(pid, os.WUNTRACED)[1]
    print(json.dumps([pid, None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)]), flush=True)
"""
IMPORTS = (
    "flows.cli flows.watch flows.rollback flows.collecting flows.thinning flows.merge flows.search "
    "flows.starting flows.publishing flows.scoring "
    "registry.ledger registry.store registry.mlflow_store registry.mlflow_files registry.mlflow_runs "
    "registry.weights evaluation.models evaluation.score evaluation.gate evaluation.page "
    "evaluation.pictures evaluation.report merging.fold merging.measure "
    "mlflow.store.tracking.sqlalchemy_store mlflow.store.model_registry.sqlalchemy_store "
    "torch transformers.models.bert.modeling_bert transformers.models.bert.tokenization_bert"
)


class Forge:
    """The process above: starts lives, tells how they ended and keeps what they said."""

    def __init__(self, folder):
        self._folder, self._lives = folder, 0
        command = [sys.executable, "-c", FORGE, *IMPORTS.split()]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def life(self, folder, number=None, point=(), verb=("watch", "tiny"), then=()):
        """(process id, exit status: None when it stands still, negative when a signal ended it) of one verb.

        It sends itself the signal `number` at one point; `then`, woken up, SIGKILL at another.
        """
        self._lives += 1
        points = [*([[number, *point]] if point else []), *([[signal.SIGKILL, *then]] if then else [])]
        order = {"folder": str(folder), "said": str(self._words(self._lives)), "verb": list(map(str, verb))}
        return self._ask({**order, "points": points})

    def wake(self, pid):
        """The same for a life that stood still."""
        return self._ask({"wake": pid})

    def said(self, back=0):
        """What the newest life wrote, or one so many lives back."""
        return self._words(self._lives - back).read_text()

    def close(self):
        """End it."""
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait() == 0

    def _words(self, number):
        return self._folder / f"{number}.txt"

    def _ask(self, order):
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def set_lease(folder, seconds):
    toml = folder / "foldin.toml"
    head, _, tail = toml.read_text().partition("lease_seconds = ")
    toml.write_text(f"{head}lease_seconds = {seconds}\n{tail.partition(chr(10))[2]}")
