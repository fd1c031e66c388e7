"""lm-eval's own command scores pruned folders as `secateur eval` does, without importing secateur."""

import json
import subprocess
import sys
from typing import Any

from conftest import LLAMA, MIXTURE
from secateur.measure.evaluation import evaluate

ITEMS = [{"query": f"w{i} w{i + 1}", "choices": ["w3 w4", "w50", f"w{i} w9 w9"], "gold": i % 3} for i in range(10, 60)]
YAML = """\
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
SCRIPT = """
import sys
from lm_eval.__main__ import cli_evaluate
where, folders = sys.argv[1], sys.argv[2:]
for index, folder in enumerate(folders):
    sys.argv = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True", "--tasks",
                "mine", "--include_path", where, "--device", "cpu", "--output_path", f"{where}/{index}"]
    cli_evaluate()
assert not [name for name in sys.modules if name.partition(".")[0] == "secateur"]
"""


def test_scores_equal_those_of_secateur_eval(folders, tmp_path):
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (tmp_path / "mine.yaml").write_text(YAML.format(file=tmp_path / "items.jsonl"))
    # One process for both folders, as lm-eval reads all its tasks at every start.
    paths = [str(folders(case)) for case in ((LLAMA, "hf"), (MIXTURE, "stock"))]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for index, path in enumerate(paths):
        (file,) = (tmp_path / str(index)).rglob("results_*.json")
        found: dict[str, Any] = json.loads(file.read_text())["results"]["mine"]
        (task_score,) = evaluate(path, texts=[], tasks=["mine"], task_path=tmp_path).models[0].tasks
        assert found["acc,none"] == task_score.acc.value
