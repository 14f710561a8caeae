"""The recipes in configs/ are settings that parse, name families that we have, and fit where they say."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from compresso import PruneConfig
from compresso.config import read_yaml
from compresso.estimate import estimate

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "demo")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_by_its_own_estimate(recipe):
    name, _, percent = recipe.stem.rpartition("-")
    settings = read_yaml(recipe)
    assert settings["target_sparsity"] == int(percent) / 100
    config = PruneConfig(**{**settings, "model": str(CONFIGS / "architectures" / name)})
    found = estimate(config, processes=8 if config.sharded else 1)
    billions = float(name.rpartition("-")[2].removesuffix("b"))
    assert found.parameters / 1e9 == pytest.approx(billions, rel=0.05)
    assert found.peak < 70e9, "80 GB, less an eighth for gaps"


def test_every_recipe_of_the_issue_is_there():
    models = ("llama-2-7b", "llama-3.1-8b", "qwen3-8b", "llama-3.1-70b")
    assert {path.stem for path in RECIPES} == {f"{model}-{percent}" for model in models for percent in (20, 50)}


@pytest.mark.parametrize("file", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_files(file):
    found = load_config_from_file(str(file))
    assert found.num_processes == int(file.stem.partition("-")[0])
    assert (str(found.distributed_type).endswith("FSDP")) == ("sharded" in file.stem)
    assert not set(yaml.safe_load(file.read_text())) - set(vars(found)), "settings that accelerate does not know"


def test_splitting_saves_what_it_splits():
    model = str(CONFIGS / "architectures" / "llama-3.1-70b")
    whole, eight, sixteen = (
        estimate(PruneConfig(model=model, sharded=n > 1, precision="bf16"), n).training for n in (1, 8, 16)
    )
    outside = eight["embedding and head"]
    assert eight["part of the layers"] == (whole["weights"] - outside) // 8
    assert sixteen["part of the layers"] == eight["part of the layers"] // 2
    four = estimate(PruneConfig(model=model, precision="4bit")).training
    assert four["matrices in four bits"] < 0.26 * whole["weights"]
    with pytest.raises(ValueError, match="--gpus"):
        estimate(PruneConfig(model=model, sharded=True), 1)
