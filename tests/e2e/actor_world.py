"""A tiny policy with a character tokenizer, and a scripted broker: all that an actor needs around it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from common.codec import decode, encode
from common.messages import Ack, Assignment, EvalJob, Grant, GroupId, Message, Publish, Pulse, Status, Welcome
from tests.scripted import wait

EOS = 0
PATIENCE_S = 120.0


def write_policy(folder: Path, *, seed: int = 0, end_bias: float = 0.0) -> Path:
    """A random Qwen2 in float32 over printable characters, in Hugging Face format.

    Args:
        folder: where to.
        seed: of the weights.
        end_bias: how much likelier the end of the sequence is made (added to its logit, on average).
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = _character_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.2,
        eos_token_id=EOS,
        pad_token_id=EOS,
        bos_token_id=None,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    if end_bias:
        with torch.no_grad():  # the last layer's norm makes the hidden state's mean square 1
            model.model.norm.weight[0] = 0.0
            model.lm_head.weight[EOS] *= end_bias
    model.save_pretrained(folder)
    return folder


def _character_tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<|endoftext|>", "\n", *map(chr, range(32, 127))]
    vocabulary = {character: index for index, character in enumerate(characters)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def small_recipe(policy: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe for the tiny policy as a broker sends it; `sections` replace settings."""
    recipe: dict[str, Any] = {
        "run": {"name": "test"},
        "model": {"path": str(policy), "dtype": "float32", "max_context": 256},
        "data": {"train": "gsm-mini", "template": "no", "max_prompt_tokens": 64},
        "rollout": {"group_size": 4, "max_tokens": 32, "temperature": 1.0},
        "batch": {"questions_per_step": 4, "optimizer_steps": 1},
        "actor": {"max_sequences": 16, "kv_cache_mb": 64, "threads": 1},
        "broker": {"heartbeat_s": 0.2, "dead_after_s": 30.0},
    }
    for name, settings in sections.items():
        recipe[name] = recipe.get(name, {}) | settings
    return recipe


class ScriptedBroker:
    """Answers an actor from a script, in a thread; keeps what it was sent.

    Attributes:
        received: messages by kind.
        groups: (header, payload) of published groups, in order.
        to_lease: questions to hand out; group index = number handed out before.
        evaluation: sent with the next grant.
        command, dump_stacks: of the next pulses.
        publish_reply: the answer to a published group.
    """

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.recipe = recipe
        self.received: dict[str, list[Message]] = defaultdict(list)
        self.groups: list[tuple[Any, list[np.ndarray]]] = []
        self.to_lease: deque[dict[str, Any]] = deque()
        self.evaluation: EvalJob | None = None
        self.command = "run"
        self.dump_stacks: str | None = None
        self.version = 0
        self.publish_reply: Callable[[Publish], Message | None] = lambda message: Ack(status="accepted")
        self._given = 0
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"127.0.0.1:{port}"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._closing.is_set():
            if not self._socket.poll(20):
                continue
            identity, header, *payload = self._socket.recv_multipart()
            message, number = decode(header)
            self.received[message.kind].append(message)
            reply = getattr(self, f"_{message.kind}")(message, payload)
            if reply is not None:
                self._socket.send_multipart([identity, encode(reply, number)])
        self._socket.close()

    def _hello(self, message: Any, payload: list[bytes]) -> Message:
        return Welcome(
            run="test",
            recipe=self.recipe,
            folder="",
            step=0,
            next_step=0,
            version=0,
            era=0,
            weights=None,
            heartbeat_s=self.recipe["broker"]["heartbeat_s"],
            resumed=False,
        )

    def _status_query(self, message: Any, payload: list[bytes]) -> Message:
        return Status(status={"peers": {}})

    def _heartbeat(self, message: Any, payload: list[bytes]) -> Message:
        return Pulse(
            step=0,
            version=self.version,
            era=0,
            weights=None,
            command=self.command,
            dump_stacks=self.dump_stacks,
        )

    def _lease(self, message: Any, payload: list[bytes]) -> Message:
        groups = []
        while self.to_lease and len(groups) < message.capacity:
            groups.append(
                Assignment(
                    group=GroupId(0, self._given),
                    lease=1,
                    question=self.to_lease.popleft(),
                    samples=self.recipe["rollout"]["group_size"],
                    deadline_s=600.0,
                )
            )
            self._given += 1
        evaluation, self.evaluation = self.evaluation, None
        if not groups and evaluation is None:
            time.sleep(0.02)  # stands in for the long poll
        return Grant(groups=groups, evaluation=evaluation, reason=None if groups else "nothing to do")

    def _publish(self, message: Publish, payload: list[bytes]) -> Message | None:
        reply = self.publish_reply(message)
        if isinstance(reply, Ack) and reply.status == "accepted":
            dtypes = (np.int32, np.int32, np.float32)
            arrays = [np.frombuffer(part, dtype) for part, dtype in zip(payload, dtypes, strict=True)]
            self.groups.append((message.header, arrays))
        return reply

    def _release(self, message: Any, payload: list[bytes]) -> Message:
        return Ack()

    _goodbye = _eval_result = _stacks = _release

    def close(self) -> None:
        self._closing.set()
        self._thread.join()


class ActorProcess:
    """`python -m actors.main` in a session of its own, as the launcher starts it."""

    def __init__(self, address: str, log: Path, name: str = "actor") -> None:
        self.log = log
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "VLLM_LOGGING_LEVEL": "WARNING"}
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "actors.main", address, name],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=environment,
            )

    def family(self) -> set[int]:
        """Process ids of the actor and all its descendants."""
        import psutil

        me = psutil.Process(self.process.pid)
        return {me.pid, *(child.pid for child in me.children(recursive=True))}

    def wait(self, seconds: float = PATIENCE_S) -> int:
        return self.process.wait(seconds)

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def until(
    condition: Callable[[], Any], actor: ActorProcess | None = None, seconds: float = PATIENCE_S
) -> None:
    """Wait for a condition; a dead actor or too long a wait fails the test with the actor's log."""

    def log() -> str:
        return actor.log.read_text(errors="replace")[-6000:] if actor else ""

    def happened() -> bool:
        if condition():
            return True
        assert actor is None or actor.process.poll() is None, f"the actor died\n{log()}"
        return False

    wait.until(happened, log, seconds, every=0.01)
