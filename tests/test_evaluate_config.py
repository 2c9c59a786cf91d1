"""Settings are those of LMMs-Engine's users; what nobody knows is refused with what is near."""

from __future__ import annotations

from pathlib import Path

import pytest

from reshard.errors import InputError, NotFound
from reshard.evaluate.config import config_of, read_settings, settings_of

LMMS = """\
eval_strategy: "steps"
eval_steps: 500
eval_config:
  server_url: "http://127.0.0.1:8000"
  poll_interval: 10.0
  checkpoint_key: "model"
  checkpoint_type: regular
  model: "qwen2_5_vl"
  tasks: ["mmmu_val", "textvqa_val"]
  model_args: {num_gpus: 8, batch_size: 256}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "eval.yaml"
    path.write_text(text)
    return path


def test_the_block_of_lmms_engine_is_taken_as_it_is(tmp_path: Path) -> None:
    settings = read_settings(written(tmp_path, LMMS))
    config = settings.evaluation
    assert (settings.schedule.steps, config.backend, config.kinds) == (500, "lmms_eval", ("regular",))
    assert config.tasks == ("mmmu_val", "textvqa_val")
    assert config.model_args == {"num_gpus": 8, "batch_size": 256}


def test_it_may_stand_under_trainer_args_among_a_trainers_other_settings(tmp_path: Path) -> None:
    inner = "".join(f"    {line}\n" for line in LMMS.splitlines())
    component = "- type: trainer\n  config:\n    trainer_args:\n" + inner.replace("    ", "      ")
    assert read_settings(written(tmp_path, component)).schedule.steps == 500
    assert read_settings(written(tmp_path, f"trainer_args:\n{inner}    learning_rate: 1e-4\n")).schedule.steps == 500


@pytest.mark.parametrize(
    "text, where",
    [
        ("eval_config: {tasks: [a", ":1:24"),
        ("a: 1\n b: 2\n", ":2:3"),
        ("eval_config:\n  limit: 1\n  limit: 2\n", ":3:3"),
    ],
)
def test_broken_yaml_is_named_with_line_and_column(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(InputError, match=rf"eval\.yaml{where}: "):
        read_settings(written(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "born: 2020-13-45\n", f"eval_steps: {'9' * 5000}\n", "&a trainer_args: &b\n  trainer_args: *b\n",
        "eval_config: {tasks: [a], loggers: [[a]]}\n",
    ],
)  # fmt: skip
def test_yaml_that_is_valid_and_means_nothing_is_an_error_of_the_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"eval\.yaml"):
        read_settings(written(tmp_path, text))


def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown key poll_intervall; did you mean poll_interval\?"):
        config_of({"tasks": ["a"], "poll_intervall": 3})
    with pytest.raises(InputError, match=r"unknown key eval_step; did you mean eval_steps\?"):
        settings_of({"eval_step": 5, "eval_config": {"tasks": ["a"]}})
    for key, known in (("evaluation_strategy", "eval_strategy"), ("evalsteps", "eval_steps")):
        with pytest.raises(InputError, match=rf"unknown key {key}; did you mean {known}\?"):
            settings_of({key: 5, "eval_config": {"tasks": ["a"]}})
    trainers = dict.fromkeys(("save_strategy", "save_steps", "max_steps", "model_config", "dataset_config"), 5)
    assert settings_of({**trainers, "eval_config": {"tasks": ["a"]}}).schedule.steps is None
    with pytest.raises(InputError, match=r"did you mean eval_config\?"):
        settings_of({"eval_confg": {"tasks": ["a"]}})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"tasks": ["a"], "checkpoint_type": "emma"}, "checkpoint_type: one of regular, ema, both"),
        ({"tasks": ["a"], "poll_interval": "often"}, "poll_interval"),
        ({"tasks": ["a"], "poll_interval": 0}, "more than 0"),
        ({"tasks": ["a"], "backend": "lm-eval"}, r"none of .*did you mean lm_eval\?"),
        ({"backend": "command"}, "wants a command"),
        ({"backend": "lm_eval"}, "at least one task"),
        ({"tasks": ["a"], "keep_merged": "best"}, "wants best_metric"),
        ({"tasks": ["a"], "loggers": ["tensorbord"]}, r"did you mean tensorboard\?"),
        ({"tasks": ["a"], "retry_on": ["never"]}, "retry_on: never"),
        ({"tasks": ["a"], "max_merged_size": "many"}, "many"),
        ({"tasks": ["a"], "dtype": "bf17"}, "bf17"),
        ({"tasks": ["a"], "poll_interval": float("nan")}, "poll_interval: nan"),
        ({"tasks": ["a"], "poll_interval": float("inf")}, "poll_interval: inf"),
        ({"tasks": ["a"], "retry_wait": float("nan")}, "retry_wait: nan"),
        ([1], "settings are expected"),
    ],
)  # fmt: skip
def test_values_that_mean_nothing_are_refused(values: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_of(values)


@pytest.mark.parametrize(
    "block, wanted",
    [
        ({"eval_steps": 200}, [200, 400]), ({}, [100, 200, 300, 400]), ({"eval_strategy": False}, []),
        ({"eval_strategy": "epoch"}, [100, 200, 300, 400]), ({"eval_strategy": "no", "eval_steps": 100}, []),
    ],
)  # fmt: skip
def test_the_schedule_says_which_steps(block: dict[str, object], wanted: list[int]) -> None:
    schedule = settings_of({**block, "eval_config": {"tasks": "a,b"}}).schedule
    assert [step for step in (100, 200, 300, 400) if schedule.wants(step)] == wanted


@pytest.mark.parametrize("steps", [0, -5, 0.1, 2.5, "many", True, float("inf"), float("nan")])
def test_a_number_of_steps_is_a_number_of_steps(steps: object) -> None:
    with pytest.raises(InputError, match="eval_steps"):
        settings_of({"eval_steps": steps, "eval_config": {"tasks": ["a"]}})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"none\.yaml"):
        read_settings(tmp_path / "none.yaml")


def test_loggers_are_names_or_names_with_settings() -> None:
    assert config_of({"tasks": ["a"], "loggers": "wandb"}).loggers == {"wandb": {}}
    assert config_of({"tasks": ["a"], "loggers": {"wandb": {"project": "p"}, "trackio": None}}).loggers == {
        "wandb": {"project": "p"}, "trackio": {},
    }  # fmt: skip
