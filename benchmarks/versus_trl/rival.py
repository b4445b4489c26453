"""TRL's side; runs in TRL's own environment.

    python -m benchmarks.versus_trl.rival RECIPE OUT --target 0.8 --seed 1 --micro-batch 128 [--set key=value ...]

Model, questions, template, group size, batch, optimizer, temperature, budget and verifier are those of the recipe.
A response that is cut at the budget earns 0, as in ours. Writes one JSON object to OUT.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import psutil
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.curve import Curve
from common.recipe import Recipe, find_recipe, load_recipe
from common.tasks.from_recipe import training_questions
from common.tasks.templates import get_template
from common.verifier import Outcome, grade


class Clock(TrainerCallback):
    """Notes when each step had been trained on, and ends the training at the target."""

    def __init__(self, updates: int, target: float) -> None:
        self.started = 0.0
        self.ended: list[float] = []
        self.rewards: list[float] = []
        self._updates, self._target = updates, target

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._updates == 0:
            self.ended.append(time.time())
            control.should_training_stop = self.curve(0.0).steps_to(self._target) is not None

    def curve(self, launched: float) -> Curve:
        """What was seen so far."""
        return Curve(self.started, self.ended, self.rewards[: len(self.ended)], self.started - launched)


def main() -> None:
    """Train until the target or the recipe's last step."""
    launched = psutil.Process().create_time()
    options = _options()
    recipe = load_recipe(find_recipe(options.recipe), options.set)
    clock = Clock(recipe.batch.optimizer_steps, options.target)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path, padding_side="left")
    trainer = GRPOTrainer(
        model=recipe.model.path,
        reward_funcs=_reward(recipe, clock, tokenizer.eos_token_id),
        args=_arguments(recipe, options),
        train_dataset=_questions(recipe),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    options.out.write_text(json.dumps(vars(clock.curve(launched))))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=128, help="responses per forward pass")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


def _arguments(recipe: Recipe, options: argparse.Namespace) -> GRPOConfig:
    responses = recipe.batch.questions_per_step * recipe.rollout.group_size
    per_update = responses // recipe.batch.optimizer_steps
    micro = min(options.micro_batch, per_update)
    learner = recipe.learner
    return GRPOConfig(
        output_dir=str(options.out.parent / "trl"),
        seed=options.seed,
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": recipe.model.dtype},
        # one batch of responses per generation, shared by `optimizer_steps` updates
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=per_update // micro,
        generation_batch_size=responses,
        num_generations=recipe.rollout.group_size,
        max_completion_length=recipe.rollout.max_tokens,
        temperature=recipe.rollout.temperature,
        loss_type="dr_grpo",
        scale_rewards="none",
        beta=0.0,
        gradient_checkpointing=False,
        learning_rate=learner.lr,
        lr_scheduler_type="constant",
        adam_beta1=learner.betas[0],
        adam_beta2=learner.betas[1],
        adam_epsilon=learner.eps,
        weight_decay=learner.weight_decay,
        max_grad_norm=learner.max_grad_norm,
        max_steps=recipe.run.steps * recipe.batch.optimizer_steps,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_steps=recipe.batch.optimizer_steps,
        report_to="none",
        disable_tqdm=True,
    )


def _questions(recipe: Recipe) -> Dataset:
    template = get_template(recipe.data.template, model=recipe.model.path)
    rows = training_questions(recipe)
    return Dataset.from_list(
        [{"prompt": template.render(row["problem"]), "answer": row["answer"]} for row in rows]
    )


def _reward(recipe: Recipe, clock: Clock, end: int) -> Any:
    extraction = get_template(recipe.data.template, model=recipe.model.path).extraction

    def reward(
        completions: list[str], completion_ids: list[list[int]], answer: list[Any], **_: Any
    ) -> list[float]:
        finished = [bool(ids) and ids[-1] == end for ids in completion_ids]
        rewards = [
            float(
                done
                and grade(text, gold, level=recipe.verifier.level, template=extraction).verdict
                is Outcome.CORRECT
            )
            for text, gold, done in zip(completions, answer, finished, strict=True)
        ]
        clock.rewards.append(sum(rewards) / len(rewards))
        return rewards

    return reward


if __name__ == "__main__":
    main()
