"""docs/checkpoints.md, typed as it stands: its programs are saved under their names, its commands run in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
BLOCK = re.compile(r"^```(\S+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_every_command_of_the_page_works(tmp_path: Path) -> None:
    commands = []
    for kind, name, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if kind == "python":
            (tmp_path / name).write_text(text, encoding="utf-8")
        elif kind == "sh":
            commands.append(f"if {text.strip()}; then exit 9; fi" if name == "exits-with-2" else text)
    assert len(commands) > 5
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment.pop("DEEPWRIGHT_ROOT", None)
    environment.pop("DEEPWRIGHT_CONF", None)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "num_nextn_predict_layers is 1, but no tensor of these modules" in done.stderr
    assert "Every tensor fits. Nothing was written." in done.stdout
    assert "largest difference of any logit" in done.stdout
    exported = {path.name for path in (tmp_path / "exported").iterdir()}
    assert exported >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert exported >= {"tokenizer_config.json", "chat_template.jinja"}
