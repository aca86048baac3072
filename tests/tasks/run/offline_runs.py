"""Reads an offline run of wandb: wandb's own records, in the blocks of LevelDB's log format.

wandb 0.31 has the messages (wandb.proto) but reads the file in compiled code that Python cannot call.
"""

import json
from pathlib import Path
from typing import Any


def read_offline_run(folder: Path) -> dict[str, Any]:
    """The records of the last offline run below a run folder; `summary` is its final summary."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its other process writes the last records when it ends
    path = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))[-1]
    content, place, parts = path.read_bytes(), 7, []
    run: dict[str, Any] = {"config": {}, "summary": {}, "rows": [], "metrics": {}, "artifacts": {}}
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind not in (1, 4):  # a whole record, or the last part of one
            continue
        record = Record.FromString(b"".join(parts))
        parts = []
        if record.HasField("run"):
            said = record.run
            run |= {"id": said.run_id, "tags": list(said.tags), "group": said.run_group, "name": said.display_name}
            run |= {"job_type": said.job_type, "project": said.project, "entity": said.entity, "sweep": said.sweep_id}
            run["notes"] = said.notes
        elif record.HasField("history"):
            run["rows"].append(values(record.history.item))
        elif record.HasField("metric"):
            metric = record.metric
            best = [name for name in ("min", "max") if getattr(metric.summary, name)]
            run["metrics"][metric.name or metric.glob_name] = (metric.step_metric, *best)
        elif record.HasField("artifact"):
            artifact = record.artifact
            run["artifacts"][artifact.type] = {file.path: file.local_path for file in artifact.manifest.contents}
        elif record.HasField("exit"):
            run["exit_code"] = record.exit.exit_code
        run["config"] |= values(record.config.update) | values(record.run.config.update)
        run["summary"] |= values(record.summary.update)
    return run


def values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
