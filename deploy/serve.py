"""`slipstream serve MODEL --nodes N`: a large model as one OpenAI-compatible endpoint, for analysis.

Invariant: only files are written, and every word in them is quoted for the shell: `serve.sh` starts one node (by
hand or under Slurm), `serve.sbatch` starts them all.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import UserError

PORT = 8000
_FOLDER = re.compile(r"[A-Za-z0-9._/+-]+")


def serve(
    model: Annotated[str, typer.Argument(help="Hub id or folder, e.g. deepseek-ai/DeepSeek-V3-Base.")],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that share the model.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of each node.")] = 8,
    precision: Annotated[
        str, typer.Option(help="auto: as stored (DeepSeek-V3: FP8, Hopper or newer); bf16: for A100.")
    ] = "auto",
    max_context: Annotated[int, typer.Option(min=1, help="Tokens of prompt + response.")] = 8192,
    host: Annotated[
        str | None,
        typer.Option(
            help="Address that the endpoint listens on; default: the first node's, as serve.sh is given it, or "
            "loopback where it is given none."
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the endpoint, on the first node.")] = PORT,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    time: Annotated[str | None, typer.Option(help="Slurm time limit.")] = None,
    setup: Annotated[str | None, typer.Option(help="Shell commands that each node runs first.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the files; default: serve/NAME.")] = None,
) -> None:
    """Write the vLLM command and the Slurm file that serve a large model on several nodes.

    DeepSeek-V3-Base and R1-Zero (671 B parameters): 2 nodes of 8 x H100-80GB as stored (FP8), or 4 nodes of
    8 x A100-80GB with --precision bf16 and a checkpoint converted to BF16. Then:
    slipstream study reflection --full --endpoint http://NODE:8000 --endpoint-model MODEL

    An endpoint that is not on loopback needs a key: set VLLM_API_KEY before sbatch or serve.sh, and OPENAI_API_KEY to
    the same for the study.
    """
    name = model.rstrip("/").rsplit("/", 1)[-1]
    folder = (out or Path("serve") / name).resolve()
    _check(name, folder, precision, partition, time, host)
    command = serve_command(
        model,
        tensor_parallel=nodes * gpus,
        precision=precision,
        max_context=max_context,
        port=port,
        trust_remote_code=trust_remote_code,
    )
    texts = render(
        name=name,
        nodes=nodes,
        gpus=gpus,
        host=host,
        port=port,
        partition=partition,
        time=time,
        setup=setup,
        folder=str(folder),
        command=shlex.join(command),
    )
    _write(folder, texts)
    typer.echo(shlex.join(command))
    typer.echo(f"\non Slurm:       sbatch {folder}/serve.sbatch")
    typer.echo(f"without Slurm:  on each node, bash {folder}/serve.sh RANK ADDRESS-OF-RANK-0")


def serve_command(
    model: str, *, tensor_parallel: int, precision: str, max_context: int, port: int, trust_remote_code: bool
) -> list[str]:
    """Argument vector of vLLM's server, without the words that differ from node to node.

    All GPUs form one tensor-parallel group, as in the paper's serving script (8 × nodes).
    """
    command = ["vllm", "serve", model, "--tensor-parallel-size", str(tensor_parallel)]
    command += ["--distributed-executor-backend", "mp"]
    command += ["--max-model-len", str(max_context), "--port", str(port)]
    if precision == "bf16":
        command += ["--dtype", "bfloat16"]
    if trust_remote_code:
        command.append("--trust-remote-code")
    return command


def render(**values: Any) -> dict[str, str]:
    """File name -> text of the two scripts."""
    from deploy.templates import templates_in

    environment = templates_in(Path(__file__).parent / "serving")
    values |= {"job": f"serve-{values['name']}", "master_port": values["port"] + 1}
    return {
        name: environment.get_template(f"{name}.jinja").render(values)
        for name in ("serve.sh", "serve.sbatch")
    }


def _check(
    name: str, folder: Path, precision: str, partition: str | None, time: str | None, host: str | None
) -> None:
    from deploy.slurm.plan import NAME, TIME

    if precision not in ("auto", "bf16"):
        raise UserError(f"'{precision}' is unknown; valid ones: auto, bf16", setting="--precision")
    if not NAME.fullmatch(name):
        raise UserError(f"'{name}' cannot name a job", setting="MODEL")
    if not _FOLDER.fullmatch(str(folder)):
        raise UserError(f"'{folder}' holds characters that a batch file cannot", setting="--out")
    if partition is not None and not NAME.fullmatch(partition):
        raise UserError(f"'{partition}' is not a name that Slurm accepts", setting="--partition")
    if host is not None and not NAME.fullmatch(host):
        raise UserError(f"'{host}' is not an address", setting="--host")
    if time is not None and not TIME.fullmatch(time):
        raise UserError(f"'{time}' is not a time limit: write MINUTES or HH:MM:SS", setting="--time")


def _write(folder: Path, texts: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write '{folder}': {error.strerror}", setting="--out") from error
