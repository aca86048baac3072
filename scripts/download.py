"""Download and check a corpus: `python scripts/download.py data=cr [data.root=DIR] [data.vectors=NAME]`."""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # data/ and tasks/ are not installed

from tasks.run import config_checks, config_hints, console, errors


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    config_checks.check(cfg)
    data = hydra.utils.instantiate(cfg.data)
    data.prepare_data()
    data.setup()  # reads everything, so that errors in the data show now
    print(f"{HydraConfig.get().runtime.choices['data']}: ready")


def command() -> None:
    sys.argv[1:] = config_hints.drop_empty_words(sys.argv[1:])
    main()


if __name__ == "__main__":
    console.use_utf8()
    sys.argv.append("hydra.run.dir=.")  # no folder for a run
    errors.guard(command)
