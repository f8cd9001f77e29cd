"""How fast is this package, next to others and to what the machine can do?

    .venv/bin/python benchmarks/speed.py   # about ten minutes on one thread of a CPU
    .venv/bin/python benchmarks/speed.py --stage sampling --threads 2 --out runs/speed-2

What a stage needs and how it measures is in the modules of the stages. Each stage ends in a table;
all are in OUT/speed.json and OUT/speed.md. A case that is there is not measured again: what was
stopped goes on with the same command, another OUT begins anew. `gpu.py` is the same for a GPU.
"""

from distillation_speed import distillation
from limits import limits
from measuring import command
from peak_memory import memory
from sampling_speed import deq, loop, sampling
from threads import threads
from training_speed import training

STAGES = {  # each with the seconds after which it begins nothing new
    "limits": (limits, 60.0),
    "sampling": (sampling, 200.0),
    "loop": (loop, 40.0),
    "training": (training, 180.0),
    "distillation": (distillation, 150.0),
    "deq": (deq, 60.0),
    "memory": (memory, 300.0),
    "threads": (threads, 60.0),
}

if __name__ == "__main__":
    text = __doc__.splitlines()[0]
    raise SystemExit(command(STAGES, text, name="speed", device="cpu", threads=1))
