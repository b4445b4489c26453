"""Weights into a running vLLM engine: the worker extension, and the driver beside the engine.

`WEIGHT_WORKER_EXTENSION` goes into `AsyncEngineArgs(worker_extension_cls=...)`; a `WeightReceiver` per engine
then follows the learner. Importing this package does not import vLLM.
"""

from actors.weights.receiver import EngineDamagedError, WeightReceiver
from actors.weights.versions import TokenVersions, VersionSpan

WEIGHT_WORKER_EXTENSION = "actors.weights.worker.WeightReceiverExtension"

__all__ = ["WEIGHT_WORKER_EXTENSION", "EngineDamagedError", "TokenVersions", "VersionSpan", "WeightReceiver"]
