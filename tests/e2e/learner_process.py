"""A pretended learner in a process of its own, which tests may freeze and kill: publishes tiny models in turn.

    python learner_process.py RUN FIRST_VERSION MODEL_SEEDS...     (seeds separated by commas)

Prints the publisher's address, then publishes one model for each line that it reads.
"""

from __future__ import annotations

import sys

from push_engine import tiny_model

from common.weights import Publisher, Snapshot


def main() -> None:
    run, first, seeds = sys.argv[1], int(sys.argv[2]), [int(seed) for seed in sys.argv[3].split(",")]
    models = [tiny_model(seed, tied=True) for seed in seeds]
    publisher = Publisher(run_id=run, deadline_s=5.0)
    print(publisher.address, flush=True)
    for version, model in enumerate(models, start=first):
        if not sys.stdin.readline():
            return
        publisher.publish(version, Snapshot.from_tensors(model.named_parameters(), bucket_bytes=1 << 16))
        print(version, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
