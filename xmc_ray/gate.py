"""A test that a bundle has to pass before it tags anything."""

from dataclasses import dataclass, field

from xmc_ray import evaluation
from xmc_ray.documents import DocumentsConfig
from xmc_ray.errors import ConfigError, ModelError
from xmc_ray.predictor import PoolConfig, ScoringConfig


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """The least that a bundle has to reach on documents whose labels are known."""

    documents: DocumentsConfig | None = None
    """Documents whose labels are known; no gate, if not given."""
    at_least: dict[str, float] = field(default_factory=dict)
    """Metrics, such as P@1, and the least value of each, 0 to 1."""

    def __post_init__(self) -> None:
        if (self.documents is None) != (not self.at_least):
            raise ConfigError("gate.documents and gate.at_least go together", found="only one of them")


def pass_gate(gate: GateConfig, bundle: str | list[str], pool: PoolConfig, model: ScoringConfig) -> None:
    """ModelError unless the bundle reaches what the gate asks for; ConfigError for a metric that there is not."""
    if gate.documents is None:
        return
    total = evaluation.measure(gate.documents, bundle, pool, model)["total"]
    for name, least in gate.at_least.items():
        if name not in total:
            raise ConfigError("no such metric", where="gate.at_least", found=name, expected=", ".join(total))
        if total[name] < least:
            raise ModelError(
                "the bundle does not pass the gate",
                where=bundle,
                found=f"{name} {total[name]:.4f}",
                expected=f"at least {least}",
                way_out="give the bundle of the night before, or train again",
            )
    shown = ", ".join(f"{name} {total[name]:.4f}" for name in gate.at_least)
    print(f"the bundle passes the gate: {shown}", flush=True)
