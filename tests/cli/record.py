"""Record anew what configs come to, once they are meant to change.

python tests/cli/record.py lsun_bedroom/teacher.yaml ...
"""

import contextlib
import io
import json
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from ddim_pl.cli import main  # noqa: E402

FILE = Path(__file__).with_name("resolved_configs.json")


def resolved(config: Path) -> object:
    """What `--print_config` shows."""
    command = "fit" if "\nmodel:" in config.read_text() else "sweep"
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([command, "--config", str(config), "--print_config"])
    return yaml.safe_load(output.getvalue())


if __name__ == "__main__":
    recorded = json.loads(FILE.read_text())
    for name in sys.argv[1:]:
        recorded[name] = resolved(ROOT / "configs" / name)
        assert recorded[name]
    lines = [f"{json.dumps(name)}: {json.dumps(recorded[name])}" for name in sorted(recorded)]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
