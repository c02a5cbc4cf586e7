"""The settings of a night."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from xmc_ray import storage
from xmc_ray.data.documents import DocumentsConfig
from xmc_ray.data.filters import FiltersConfig
from xmc_ray.data.rejects import MAX_REJECT_SHARE
from xmc_ray.data.tag_hierarchy import HierarchyConfig
from xmc_ray.metrics.drift import DriftConfig
from xmc_ray.on_ray.evaluate import GateConfig
from xmc_ray.on_ray.pool import PoolConfig, ScoringConfig
from xmc_ray.on_ray.tag.nights import Day
from xmc_ray.on_ray.tag.rerank import RerankConfig
from xmc_ray.on_ray.tag.retention import KeepConfig
from xmc_ray.on_ray.tag.tables import TableConfig
from xmc_ray.settings import MAY_CHANGE_ON_RESUME, Bounds, OpenShare, PositiveInt, Settings, Share
from xmc_ray.storage.address import PreviousNight


@dataclass(frozen=True, kw_only=True)
class TagConfig(Settings):
    """Tag a catalogue with a bundle, or with an ensemble of them."""

    essentials: ClassVar = (
        "documents.uri",
        "bundle",
        "output",
        "date",
        "previous",
        "k",
        "min_precision",
        "documents.text",
        "pool.max",
        "pool.gpu",
    )

    documents: DocumentsConfig
    """The catalogue."""
    bundle: storage.Address | list[storage.Address]
    """Bundle folder, local or s3://, or a list of them whose scores are averaged."""
    output: storage.Address = field(metadata=MAY_CHANGE_ON_RESUME)
    """Folder of all nights: a day's tags lie in its `tags/dt=<day>`, all else of a night in its `_nights/dt=<day>`."""
    date: Day | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """The day, YYYY-MM-DD or dt=YYYY-MM-DD, that names the folder; today (UTC) if not given."""
    previous: PreviousNight | None = None
    """A finished night whose tags are reused for unchanged documents: its folder, that of its tags, or `last`."""
    k: PositiveInt = 10
    """Maximum number of tags per document, at most all labels."""
    min_score: Share = 0.0
    """Minimum score of a tag."""
    min_precision: OpenShare | None = None
    """Drop tags below the threshold at which their label reaches this precision; needs calibrated bundles."""
    filters: FiltersConfig = field(default_factory=FiltersConfig)
    max_reject_share: Share = field(default=MAX_REJECT_SHARE, metadata=MAY_CHANGE_ON_RESUME)
    """Share of rejected documents above which the night fails."""
    overwrite: bool = field(default=False, metadata=MAY_CHANGE_ON_RESUME)
    """Tag again even if the day's folder holds another run, which stays until it is replaced at the end."""
    commit_rows: Annotated[int, Bounds(ge=2)] = field(default=20_000, metadata=MAY_CHANGE_ON_RESUME)
    """Maximum number of documents per actor that are lost when the job is killed."""
    target_bytes: PositiveInt = field(default=128 << 20, metadata=MAY_CHANGE_ON_RESUME)
    """Approximate size of the files of tags."""
    hierarchy: HierarchyConfig | None = None
    """What broader and narrower labels do to tags."""
    model: ScoringConfig = field(default_factory=ScoringConfig)
    rerank: RerankConfig | None = None
    pool: PoolConfig = field(default_factory=PoolConfig, metadata=MAY_CHANGE_ON_RESUME)
    gate: GateConfig = field(default_factory=GateConfig, metadata=MAY_CHANGE_ON_RESUME)
    drift: DriftConfig = field(default_factory=DriftConfig, metadata=MAY_CHANGE_ON_RESUME)
    table: TableConfig = field(default_factory=TableConfig, metadata=MAY_CHANGE_ON_RESUME)
    keep: KeepConfig = field(default_factory=KeepConfig, metadata=MAY_CHANGE_ON_RESUME)

    def check(self) -> None:
        """Raises ConfigError for settings that do not go together with a hook."""
        if self.rerank is not None:
            self.rerank.check_use(self.k, self.min_precision)

    @property
    def n_listed(self) -> int:
        """How many labels of a document the model lists."""
        return self.k if self.rerank is None else self.rerank.candidates
