"""A rollout in a process of its own, to be killed; arguments: weights, staging, log file."""

import sys
from pathlib import Path

from pipelines.engines.local import LocalEngine
from pipelines.rollouts import RolloutSettings, SamplingSettings, rollout
from tests.pipelines import tiny_policy

PROMPTS = 60
SETTINGS = RolloutSettings(samples=3, batch_size=10, sampling=SamplingSettings(max_tokens=24))


class Logged(LocalEngine):
    """Writes down the ids of each batch before it is made."""

    log = Path()

    def generate(self, requests):
        with self.log.open("a") as file:
            file.writelines(f"{request.trajectory_id.hex()}\n" for request in requests)
        return super().generate(requests)


def run(weights: Path, staging: Path, log: Path):
    engine = Logged(weights)
    engine.log = log
    prompts = tiny_policy.prompts_table(tiny_policy.texts(PROMPTS))
    return rollout(tiny_policy.policy(), prompts, engine, SETTINGS, staging, set())


if __name__ == "__main__":
    run(*map(Path, sys.argv[1:4]))
