"""Recipes by rule: each kind of data gets what suits it, and what a user has decided is not decided again."""

from dataclasses import replace
from pathlib import Path

import pytest
from families import SHAPE, save_family, save_model

from xmc_ray.command import parse
from xmc_ray.data.profile import Profile
from xmc_ray.errors import ConfigError
from xmc_ray.model.encoder import EncoderConfig
from xmc_ray.model.lexical import LexicalConfig
from xmc_ray.model.tokenizer import Tokenizer
from xmc_ray.on_ray.train.config import TrainConfig
from xmc_ray.training.fit import FitConfig
from xmc_ray.training.loop import LoopConfig
from xmc_ray.training.recipe import LENGTH, candidates, pretrained_layers, undecided

GIT_PATHS = Path(__file__).resolve().parents[2] / "xmc_ray" / "recipes" / "git-paths.toml"
FREQUENT = Profile(
    documents=16_000,
    labels=629,
    tokens=100.0,
    longest=200,
    labels_per_document=6.0,
    rare=0.01,
    typical=32.0,
    single=0.0,
    everywhere=0,
    repeated=0.0,
)
RARE = replace(FREQUENT, documents=45_000, labels=35_000, rare=0.5, typical=1.0, single=0.5)
FEW = replace(RARE, documents=2_400, labels=6_000)
HUGE = replace(RARE, documents=750_000, labels=167_000)


def ladder(profile: Profile, depth: int = 6, device: str = "cpu") -> dict[str, FitConfig]:
    return {candidate.name: candidate.config for candidate in candidates(profile, undecided(FitConfig()), depth, device)}


def first(profile: Profile, depth: int = 6) -> str:
    return next(iter(ladder(profile, depth)))


def test_frequent_labels_want_the_pretrained_encoder_first_and_rare_ones_words() -> None:
    assert first(FREQUENT) == "transformer" and first(RARE) == "words"
    assert first(FREQUENT, depth=0) == "words"
    assert all(recipe.encoder.layers == 0 for recipe in ladder(FREQUENT, depth=0).values())


@pytest.mark.parametrize(
    ("kind", "told"), [("albert", "encoder.freeze cannot freeze some layers"), ("short", "encoder.max_tokens is out of range")]
)
def test_an_encoder_that_no_recipe_can_use_is_known_before_a_recipe_is_chosen(
    kind: str, told: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    """Else the job would end with an error of settings that the user has not given, and may not give."""
    if kind == "albert":
        save_family(tmp_path / "encoder", kind, tiny_encoder)
    else:
        save_model(tmp_path / "encoder", "bert", SHAPE | {"max_position_embeddings": 32}, tiny_encoder)
    encoder = str(tmp_path / "encoder")
    with pytest.raises(ConfigError, match=told):
        pretrained_layers(encoder, Tokenizer.load(encoder, LENGTH))
    assert pretrained_layers(str(tiny_encoder), Tokenizer.load(str(tiny_encoder), LENGTH)) > 0


def test_terms_have_one_rate_where_labels_are_frequent() -> None:
    assert ladder(FREQUENT)["words"].optim.lexical_power == 0
    assert ladder(RARE)["words"].optim.lexical_power == 0.5


def test_few_documents_get_steps_and_many_get_passes() -> None:
    """A set of some thousand documents that is passed four times has not been learnt."""
    few, rare, huge = (ladder(profile)["words"].loop for profile in (FEW, RARE, HUGE))
    assert few.epochs * FEW.documents / few.batch_size >= 2_000 and few.batch_size < rare.batch_size
    assert huge.epochs < 4 <= rare.epochs < few.epochs <= 64


def test_hundreds_of_thousands_of_labels_are_grouped() -> None:
    assert ladder(HUGE)["words"].groups.max_size > 1 == ladder(RARE)["words"].groups.max_size
    assert ladder(HUGE, device="cuda")["words, flat"].groups.max_size == 1 < ladder(RARE)["words, in groups"].groups.max_size


def test_of_many_documents_a_cpu_tries_only_what_it_has_time_for() -> None:
    assert [*ladder(HUGE)] == ["words", "words, as for frequent labels"]
    assert {"transformer", "words, flat"} <= {*ladder(HUGE, device="cuda")}
    frequent = replace(FREQUENT, documents=750_000, labels=3_000)
    assert [*ladder(frequent)] == ["transformer", "words", "words, in groups", "words, as for rare labels"]


def test_the_config_of_git_paths_is_what_the_rule_gives() -> None:
    config = parse(TrainConfig, [f"--config={GIT_PATHS}", "--documents.uri=x", "--output=y"])
    rule = ladder(HUGE)["words"]
    assert FitConfig(**{name: getattr(config, name) for name in vars(rule)}) == rule


def test_the_ranker_of_many_documents_learns_from_fewer_candidates_of_each() -> None:
    """Its work is documents times candidates, and nothing else bounds it."""
    assert {ladder(profile)["words"].linear.depth for profile in (FREQUENT, RARE, FEW)} == {4}
    assert {recipe.linear.depth for recipe in ladder(HUGE).values()} == {2}


def test_half_of_the_encoder_is_trained_and_words_are_read_to_the_end() -> None:
    recipe = ladder(RARE)["transformer"]
    assert recipe.encoder.layers is None and recipe.encoder.freeze == 3
    assert recipe.encoder.max_tokens is not None and recipe.encoder.max_tokens < recipe.text.max_tokens == LENGTH


def test_every_recipe_differs_and_all_read_the_same_tokens() -> None:
    for profile in (FREQUENT, RARE, FEW, HUGE):
        recipes = ladder(profile).values()
        assert len(set(map(repr, recipes))) == len(recipes)
        assert {recipe.text.max_tokens for recipe in recipes} == {LENGTH}


def test_what_the_user_decides_stays() -> None:
    given = FitConfig(encoder=EncoderConfig(name="mine"), loop=LoopConfig(minutes=3.0, seed=1, precision="float32"))
    for candidate in candidates(RARE, undecided(given), 6):
        loop = candidate.config.loop
        assert (candidate.config.encoder.name, loop.minutes, loop.seed, loop.precision) == ("mine", 3.0, 1, "float32")


def test_a_setting_that_a_recipe_decides_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"lexical\.width; found 64; expected 0"):
        undecided(FitConfig(lexical=LexicalConfig(width=64)))
    with pytest.raises(ConfigError, match=r"loop\.epochs"):
        undecided(FitConfig(loop=LoopConfig(epochs=3)))


def test_millions_of_labels_are_never_tried_flat() -> None:
    fewer = replace(HUGE, documents=200_000)
    assert "words, flat" in ladder(replace(fewer, labels=200_000))
    assert "words, flat" not in ladder(replace(fewer, labels=200_001))
