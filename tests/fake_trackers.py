"""Stand-ins for wandb and mlflow that record what Lightning's loggers call.

They refuse what the real ones refuse: to change a parameter, an unknown run, a file that is not
there.
"""

import itertools
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

from PIL import Image


def module(monkeypatch, name, **contents):
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None, is_package=True)
    made.__path__ = []
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)
    return made


class WandbRun:
    def __init__(self, **arguments):
        self.arguments, self.id, self.name = arguments, arguments["id"], arguments["name"]
        self.logged, self.settings = [], {}
        self.config = SimpleNamespace(update=self._update)

    def _update(self, settings, *, allow_val_change):
        self.settings |= settings

    def log(self, values):
        self.logged.append(dict(values))


def install_wandb(monkeypatch):
    """Returns the list of runs that are begun."""
    runs, numbers = [], itertools.count()

    def init(**arguments):
        arguments["id"] = arguments["id"] or f"abc{next(numbers)}"
        runs.append(WandbRun(**arguments))
        return runs[-1]

    def image(path):
        with Image.open(path) as picture:
            return picture.size

    module(monkeypatch, "wandb", init=init, Image=image, run=None)
    module(monkeypatch, "wandb.sdk")
    module(monkeypatch, "wandb.sdk.lib", RunDisabled=type("RunDisabled", (), {}))
    module(monkeypatch, "wandb.wandb_run", Run=WandbRun)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    return runs


class MlflowStore:
    """Runs by their id, as a server keeps them beyond a process."""

    def __init__(self):
        self.runs = {}

    def client(self, uri):
        return MlflowClient(self.runs)


class MlflowClient:
    def __init__(self, runs):
        self.runs = runs

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id="1", lifecycle_stage="active")

    def create_run(self, experiment_id, tags):
        run_id = f"run{len(self.runs)}"
        info = SimpleNamespace(run_id=run_id, experiment_id=experiment_id)
        data = SimpleNamespace(params={}, metrics={}, tags=dict(tags), images=[])
        self.runs[run_id] = SimpleNamespace(info=info, data=data, status="RUNNING")
        return self.runs[run_id]

    def get_run(self, run_id):
        return self.runs[run_id]

    def log_batch(self, run_id, metrics=(), params=()):
        data = self.runs[run_id].data
        for each in params:
            assert data.params.get(each.key, each.value) == each.value, "changing a parameter"
            data.params[each.key] = each.value
        for each in metrics:
            data.metrics[each.key] = each.value

    def log_image(self, run_id, image, *, key, step):
        self.runs[run_id].data.images.append((key, step, image.size))

    def set_tag(self, run_id, key, value):
        self.runs[run_id].data.tags[key] = value

    def set_terminated(self, run_id, status):
        self.runs[run_id].status = status


def install_mlflow(monkeypatch):
    """Returns the runs by their id."""
    store = MlflowStore()
    module(monkeypatch, "mlflow", set_tracking_uri=lambda uri: None)
    module(monkeypatch, "mlflow.entities", Param=SimpleNamespace, Metric=SimpleNamespace)
    context = module(monkeypatch, "mlflow.tracking.context")
    module(monkeypatch, "mlflow.tracking", MlflowClient=store.client, context=context)
    registry = {"resolve_tags": lambda tags: tags or {}}
    context.registry = module(monkeypatch, "mlflow.tracking.context.registry", **registry)
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", True)
    return store.runs


def files_below(folder: Path, pattern: str) -> list[str]:
    return sorted(each.name for each in folder.rglob(pattern))
