"""The recipe of `oapl sft`: a micro model and its supervised warm start."""

from pathlib import Path

from pydantic.dataclasses import dataclass

from oapl_engine.config import DataConfig, RunConfig
from oapl_engine.config_file import STRICT, apply_overrides, build, read_toml, setting
from oapl_engine.errors import ConfigError


@dataclass(frozen=True, config=STRICT)
class MicroModelConfig:
    """The Llama that `oapl sft` makes from nothing."""

    out: str = setting("", "folder to write (Hugging Face layout); required")
    hidden: int = setting(64, "hidden size", ge=32)
    layers: int = setting(3, "decoder layers", ge=1)
    heads: int = setting(2, "attention heads; vLLM's CPU attention needs head sizes from 32", ge=1)


@dataclass(frozen=True, config=STRICT)
class SftTrainConfig:
    """Supervised warm start."""

    steps: int = setting(100, "optimizer steps", ge=1)
    batch_size: int = setting(64, "examples per step", ge=1)
    learning_rate: float = setting(3e-3, "peak, linear decay to zero", gt=0)


@dataclass(frozen=True, config=STRICT)
class SftRecipe:
    """One `oapl sft`: a micro model warmed up on generated examples."""

    run: RunConfig = RunConfig()
    model: MicroModelConfig = MicroModelConfig()
    data: DataConfig = DataConfig(source="micro", task="sort")
    train: SftTrainConfig = SftTrainConfig()


def load_sft_recipe(path: str | Path, overrides: list[str] | None = None) -> SftRecipe:
    """SftRecipe from a TOML file, validated. Raises ConfigError."""
    tables = apply_overrides(read_toml(path), overrides or [], SftRecipe)
    tables.setdefault("data", {}).setdefault("source", "micro")
    recipe: SftRecipe = build(SftRecipe, tables, str(path))
    if not recipe.model.out:
        raise ConfigError("model.out is empty: name the folder that the model is written to, e.g. models/micro")
    if recipe.data.source != "micro":
        raise ConfigError(f'data.source = "{recipe.data.source}": oapl sft generates its own examples, use "micro"')
    for section, field in (("run", "dir"), ("data", "path")):
        if value := getattr(getattr(recipe, section), field):
            raise ConfigError(f"{section}.{field} = {value!r} has no effect in oapl sft: remove it")
    if recipe.model.hidden % recipe.model.heads:
        raise ConfigError(
            f"model.hidden = {recipe.model.hidden} is not a multiple of model.heads = {recipe.model.heads}"
        )
    return recipe
