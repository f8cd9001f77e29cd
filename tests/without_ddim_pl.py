"""Running what was exported in a process that cannot import `ddim_pl`."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

FIRST = """
import sys

for name in ("ddim_pl", "callbacks", "lightning"):
    sys.modules[name] = None  # an import of it is an error
try:
    import ddim_pl
except ImportError:
    pass
else:
    raise SystemExit("ddim_pl can be imported")
import torch

given = torch.load("given.pt")
"""
PIPELINES = """
from diffusers import DDIMPipeline
from diffusers.pipelines.ddim import pipeline_ddim
from diffusers.schedulers import scheduling_ddim

result = {}
for folder, (z, call, noise) in given.items():
    pipeline_ddim.randn_tensor = lambda *_, **__: z.clone()
    scheduling_ddim.randn_tensor = lambda *_, **__: noise.pop(0)
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    result[folder] = pipeline(batch_size=len(z), output_type="pt", **call).images
"""
LAST = """
torch.save(result, "result.pt")
"""


def run(code, given=None, *, places=()):
    """What the code leaves in `result`.

    Args:
        code: Python, which finds `given`.
        given: What `torch.save` can write.
        places: Folders with more packages.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(given, Path(folder, "given.pt"))
        Path(folder, "code.py").write_text(
            f"import sys\nsys.path += {[*map(str, places)]}\n{FIRST}{code}{LAST}"
        )
        done = subprocess.run(
            [sys.executable, "-I", "code.py"], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return torch.load(Path(folder, "result.pt"))


def pipeline_images(calls):
    """What `DDIMPipeline` draws, in [0, 1], by folder.

    Args:
        calls: For each folder the start noise, the arguments of the call, and the noise of each
            step of a stochastic sampler.
    """
    return run(PIPELINES, {str(folder): call for folder, call in calls.items()})
