"""What runs inside each vLLM worker: stages a version beside the model and swaps it in on command.

Invariant: until `commit` the engine's own weights are untouched, whatever happens to the transfer; no method
here waits for the network, so the engine's loop never does. If `commit` raises, the weights are undefined and
the engine must be restarted.

vLLM mixes this class into its worker (`worker_extension_cls`); names are prefixed because they must not
collide with the worker's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch

from actors.weights.adapters import load_adapter, load_neutral_adapter
from actors.weights.prepared import PreparedModel, prepare
from common.weights.protocol import LinkSpec
from common.weights.stager import Staged, Stager
from common.weights.store import Address

_ON_DEVICE = ("nccl", "ipc")  # routes that stage in GPU memory; the others stage in host memory


class WeightReceiverExtension:
    """Mixed into vLLM's worker, whose `rank`, `device`, `vllm_config` and `model_runner` it uses."""

    rank: int
    device: torch.device
    vllm_config: Any
    model_runner: Any
    _slipstream_stager: Stager | None

    def slipstream_weights_connect(self, spec: dict[str, Any]) -> None:
        """Opens a link under a new name; a former one is given up."""
        self.slipstream_weights_disconnect()
        link = LinkSpec(**spec)
        on_device = Address.parse(link.address).route in _ON_DEVICE
        device = self.device if on_device else torch.device("cpu")
        if self.device.type == "cuda":
            self.synchronize_device = self._slipstream_await_model
        prepare = self._slipstream_prepare if self.device.type == "cpu" else None
        self._slipstream_stager = Stager(link, self.rank, device, prepare)

    def slipstream_weights_stage(self, offer: dict[str, Any]) -> None:
        """Starts to receive; the outcome appears in the store."""
        assert self._slipstream_stager is not None  # connected before
        self._slipstream_stager.stage(offer)

    def slipstream_weights_commit(self, version: int) -> bool:
        """Swaps in the staged version; the engine must be paused. True when it had been prepared."""
        assert self._slipstream_stager is not None  # staged before
        staged = self._slipstream_stager.take(version)
        prepared = staged.prepared is not None
        try:
            if staged.manifest.kind == "adapter":
                config = cast("dict[str, Any]", dict(staged.manifest.meta)["adapter_config"])
                load_adapter(self, dict(staged.tensors()), config)
            elif prepared:
                staged.prepared.swap()
            else:
                self._slipstream_reload(staged)
        finally:
            staged.prepared = None
            staged.release()
        return prepared

    def slipstream_weights_neutral_adapter(self, layer: str, shape: list[int]) -> None:
        """Loads an adapter that changes nothing, for requests to carry until one is pushed."""
        load_neutral_adapter(self, layer, shape)

    def slipstream_weights_disconnect(self) -> None:
        """Gives up the link; threads stuck in a transfer end at their own deadline."""
        stager = getattr(self, "_slipstream_stager", None)
        if stager is not None:
            stager.close()
        self._slipstream_stager = None

    def _slipstream_prepare(self, staged: Staged) -> PreparedModel | None:
        if staged.manifest.kind == "adapter":
            return None
        return prepare(self.model_runner.get_model(), staged.tensors(), self.vllm_config)

    def _slipstream_reload(self, staged: Staged) -> None:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config), torch.device(self.device):
            self.model_runner.reload_weights(weights_iterator=self._slipstream_on_device(staged))
            if self.device.type == "cpu":
                _repack_tied_heads(self.model_runner.get_model())
        if self.device.type == "cuda":
            self._slipstream_await_model()

    def _slipstream_await_model(self) -> None:
        """Waits for the model's stream, on which weights are read and written.

        Also stands in for the worker's own `synchronize_device`, which each pause calls (vLLM 0.32): that waits for the
        whole device, and a relay whose child is dead or frozen occupies it, while generation stands still.
        """
        torch.cuda.current_stream(self.device).synchronize()

    def _slipstream_on_device(self, staged: Staged) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in staged.tensors():
            yield name, tensor.to(self.device, non_blocking=True)


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """Packs again the output heads that share their weight with the embedding (CPU).

    On the CPU vLLM multiplies with a packed copy of each weight. A reload refreshes the copies of the layers
    that it loads, but a tied head is never loaded by name: it would silently keep the old weights
    (seen on 0.32; the same in the source of 0.28 to 0.33).
    """
    for module in model.modules():
        quantisation = getattr(module, "quant_method", None)
        if hasattr(module, "cpu_linear") and module.weight.numel() and quantisation is not None:
            quantisation.process_weights_after_loading(module)
