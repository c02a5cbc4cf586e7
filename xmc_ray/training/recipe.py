"""Recipes by rule: from what kind of data a training split is to the settings that suit it, before anything is tried.

`candidates` is a small ladder. Its first is what ``recipe = "auto"`` trains; the tuning job tries the others as well. The
measurements behind each rule are in docs/quality.md.
"""

import math
from dataclasses import dataclass, replace

from xmc_ray.data.groups import GroupsConfig
from xmc_ray.data.profile import Profile
from xmc_ray.errors import ConfigError
from xmc_ray.model.encoder import EncoderConfig, check_encoder, try_encoder
from xmc_ray.model.lexical import LexicalConfig
from xmc_ray.model.lightxml import ModelConfig
from xmc_ray.model.linear import LinearConfig
from xmc_ray.model.precision import Precision
from xmc_ray.model.tokenizer import TextConfig, Tokenizer
from xmc_ray.settings import difference, fixed_settings
from xmc_ray.training.fit import FitConfig
from xmc_ray.training.loop import LoopConfig
from xmc_ray.training.optim import OptimConfig

LENGTH = 2048  # tokens: reading whole documents costs the lexical branch little, and cutting long ones costs quality

_FREE = ("minutes", "accumulate", "precision", "token_budget", "seed")  # settings of the loop that no recipe decides
_FREQUENT = 10  # documents of the median label, from which on labels count as frequent
_FEW, MANY = 10_000, 300_000  # documents
_STEPS = {True: 2_000, False: 4_000}  # at least, by whether labels are frequent: few documents want dozens of passes
_PASSES = {"words": (4, 64), "transformer": (2, 16)}  # at least, but for many documents, and at most
_PASSES_OF_MANY = 2
_FLAT = 50_000  # labels up to which every label is scored for every document
_FLAT_AT_ALL = 200_000  # labels up to which that is tried: a step takes memory for each label and document
_READ = 64  # tokens that the transformer reads


@dataclass(frozen=True)
class Candidate:
    """A recipe: its name, why it might be the best, and its settings."""

    name: str
    why: str
    config: FitConfig


def free_settings(config: FitConfig) -> FitConfig:
    """Those of ``config`` that no recipe decides; the others at their defaults.

    These are the encoder's name, the fields, the feedback, the seeds, and the loop's time, precision and memory.
    """
    return FitConfig(
        encoder=EncoderConfig(name=config.encoder.name),
        text=TextConfig(fields=config.text.fields, first=config.text.first),
        groups=GroupsConfig(seed=config.groups.seed),
        loop=LoopConfig(**{name: getattr(config.loop, name) for name in _FREE}),
        feedback=config.feedback,
    )


def undecided(config: FitConfig) -> FitConfig:
    """The settings to read documents by before a recipe is chosen: `free_settings`.

    Raises ConfigError for any other that is not at its default.
    """
    free = free_settings(config)
    given = FitConfig(**{name: getattr(config, name) for name in vars(free)})
    other = difference(fixed_settings(free), fixed_settings(given))
    if other is not None:
        name, default, found = other
        way_out = "leave it out, or start from a recipe's file with --config"
        raise ConfigError(f"an automatic recipe decides {name}", found=found, expected=default, way_out=way_out)
    return replace(free, text=replace(free.text, max_tokens=LENGTH), groups=replace(free.groups, max_size=1))


def pretrained_layers(name: str, tokenizer: Tokenizer, precision: Precision = "float32") -> int:
    """The layers of the encoder ``name``, which is to compute in this ``precision``.

    Raises ModelError if it has no weights, or does not work (`encoder.try_encoder`), ConfigError if it cannot be used as in
    recipes: if it reads fewer tokens, its lower half cannot be frozen, or it cannot compute so.
    """
    depth = int(check_encoder(EncoderConfig(name=name, feature_layers=1)).num_hidden_layers)
    try_encoder(_upper_half(name, depth), tokenizer, precision)
    return depth


def _upper_half(name: str, depth: int) -> EncoderConfig:
    return EncoderConfig(name=name, freeze=depth // 2, max_tokens=_READ, feature_layers=1, pooling="mean")


def candidates(profile: Profile, config: FitConfig, depth: int, device: str = "cpu") -> list[Candidate]:
    """Recipes worth trying on a ``device``, the best by rule first; ``config`` as `undecided` returns it.

    ``depth``: layers of the pretrained encoder, 0 where there is only a tokenizer. Many documents leave no time to try what
    costs a CPU far more than words in groups do.
    """
    frequent, pressed = profile.typical >= _FREQUENT, profile.documents > MANY and device == "cpu"
    kind, other = ("frequent", "rare") if frequent else ("rare", "frequent")
    words = _words(profile, config, frequent)
    ladder = [Candidate("words", f"labels are {kind}: the median one has {profile.typical:,.0f} documents", words)]
    if depth and (frequent or not pressed):
        why = "a pretrained encoder knows words that are too rare to learn here"
        ladder.insert(0 if frequent else 1, Candidate("transformer", why, _with_transformer(profile, words, depth)))
    if 1_000 < profile.labels <= (_FLAT if pressed else _FLAT_AT_ALL):
        groups, why = (1, "no label is lost to the shortlist") if words.groups.max_size > 1 else (32, "more passes in a time")
        ladder.append(Candidate("words, in groups" if groups > 1 else "words, flat", why, _heads(words, groups)))
    turned = replace(words, optim=_rates(words.optim, not frequent), lexical=_lexical(profile, not frequent))
    ladder.append(Candidate(f"words, as for {other} labels", "the data may lie between the two kinds", turned))
    return ladder


def _words(profile: Profile, config: FitConfig, frequent: bool) -> FitConfig:
    """The lexical branch alone."""
    few = profile.documents < _FEW
    batch_size = 32 if few else 256 if profile.documents > MANY else 64
    optim = OptimConfig(weight_decay=0.0, warmup=(0.3 if frequent else 0.1) if few else 0.02)
    return _heads(
        replace(
            config,
            encoder=replace(config.encoder, layers=0),
            lexical=_lexical(profile, frequent),
            linear=LinearConfig(
                candidates=25, depth=2 if profile.documents > MANY else 4, weight=1.0 if profile.labels <= _FLAT else 2.0
            ),
            model=ModelConfig(dropout=0.3 if few or profile.labels > 20_000 else 0.5, lift=1.0),
            optim=_rates(optim, frequent),
            loop=replace(config.loop, batch_size=batch_size, epochs=_passes("words", profile, batch_size)),
        ),
        1 if profile.labels <= _FLAT else 32,
    )


def _with_transformer(profile: Profile, words: FitConfig, depth: int) -> FitConfig:
    """The upper half of the encoder beside the words (decision 0017)."""
    loop = replace(words.loop, batch_size=32, epochs=_passes("transformer", profile, 32))
    encoder = _upper_half(words.encoder.name, depth)
    optim = replace(words.optim, encoder_lr=1e-4, rows_lr=0.32)
    return replace(words, encoder=encoder, optim=optim, loop=loop, linear=replace(words.linear, weight=0.25))


def _lexical(profile: Profile, frequent: bool) -> LexicalConfig:
    columns = 2**21 if profile.documents > MANY else 2**20
    return LexicalConfig(width=512 if profile.labels <= 20_000 else 256, columns=columns, rarest=3 if frequent else 2)


def _rates(optim: OptimConfig, frequent: bool) -> OptimConfig:
    """Frequent labels want one rate for all terms, rare ones a rate of each term's own (decision 0012)."""
    return replace(optim, lexical_lr=0.2, lexical_power=0.0) if frequent else replace(optim, lexical_lr=0.1, lexical_power=0.5)


def _heads(config: FitConfig, max_size: int) -> FitConfig:
    model = replace(config.model, shortlist=16, bottleneck=256) if max_size > 1 else config.model
    return replace(config, groups=replace(config.groups, max_size=max_size), model=model)


def _passes(kind: str, profile: Profile, batch_size: int) -> int:
    least, most = _PASSES[kind]
    least = _PASSES_OF_MANY if profile.documents > MANY else least
    return min(most, max(least, math.ceil(_STEPS[profile.typical >= _FREQUENT] * batch_size / profile.documents)))
