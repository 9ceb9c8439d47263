"""The sweep's configuration (``SweepSpec``) and that of one trial (``TrialConfig``)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
)

from cluster.rules import Broken, BrokenRules, StrictModel, rule, validated
from cluster.schema import Reference, is_local
from cluster.spec import ClusterSpec
from tuning.space import Domain, Value, draw_trials, grid, grid_size, space_size
from tuning.tracking import TrackSpec

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
MAX_TRIALS = 100_000
MAX_SLOTS = 256
MAX_THREADS = 1024
"""More than any node has cores."""
Share = Annotated[float, Field(gt=0, lt=1)]
FILE_SUFFIXES = (".jsonl", ".csv", ".parquet")
"""Files that rows are read from."""
TargetGroup = Literal["attention", "mlp", "all-linear"]


def _sweep_name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", value):
        raise ValueError("must be 1 to 63 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit")
    return value


def _output(value: str) -> str:
    if "://" in value:
        raise ValueError("must be a folder of this machine (object stores are not supported)")
    return value


def _slots(value: object, handler: ValidatorFunctionWrapHandler) -> int | Literal["auto"]:
    """One rule for the two types that it may have."""
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(f"must be a whole number from 1 to {MAX_SLOTS}, or auto") from None


class BaseSpec(StrictModel):
    """The frozen model that all trials share."""

    model: Reference
    """Folder or hub id of a Hugging Face causal language model."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    compute_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of activations and of the dequantised weights; ``auto`` is bfloat16, and float32 on CPUs that have no
    instructions for bfloat16 (no AVX-512), which would take many times as long."""
    gradient_checkpointing: bool = False
    """Keep only each decoder layer's input for the backward pass and compute the rest again: one more
    forward pass for a fraction of the activations' memory."""
    cache: bool = True
    """Keep the quantised base on this node's disk (XDG_CACHE_HOME/loraloom/bases, the four used last), so that the next
    host reads a quarter of the bytes and quantises nothing."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""

    @rule
    def _revision_of_a_hub_id(self) -> Iterator[Broken]:
        if self.revision is not None and is_local(self.model):
            yield "revision", "has no effect: model is no hub id"


class DataSpec(StrictModel):
    """Training and evaluation rows, tokenised once per sweep."""

    train: Reference
    """A .jsonl, .csv or .parquet file, a folder written by `datasets.save_to_disk`, or a hub id."""
    eval: Reference | None = None
    """Rows for the evaluation loss, in the same forms. Without it, `eval_fraction` of `train` is held out."""
    eval_fraction: Share | None = None
    """Share of the training rows to hold out (default 0.1); only without `eval`."""
    train_split: str = "train"
    """Split to read where `train` is a hub id or a saved dataset with several splits; of a hub id also a part, such as
    train[:90%]."""
    train_config: str | None = None
    """Configuration of the hub id `train`, such as main of openai/gsm8k; null: its default one."""
    train_revision: str | None = None
    """Branch, tag or commit of the hub id `train`."""
    eval_split: str = "test"
    """Split to read where `eval` is a hub id or a saved dataset with several splits; of a hub id also a part."""
    eval_config: str | None = None
    """Configuration of the hub id `eval`; null: its default one."""
    eval_revision: str | None = None
    """Branch, tag or commit of the hub id `eval`."""
    format: Literal["text", "prompt_completion", "messages"] = "messages"
    """`text`: a column `text`; `prompt_completion`: columns `prompt` and `completion`; `messages`: a column
    `messages` of {role, content}, put through the tokenizer's chat template."""
    loss_on: Literal["completion", "all"] = "completion"
    """Tokens that count in the loss: the completions (assistant turns) only, or all. `text` has no completions: say
    `all`."""
    max_length: int = Field(default=1024, ge=8)
    """Longest row in tokens; longer rows are cut at the end, counted and reported."""
    packing: bool = False
    """Lay the rows of a batch end to end instead of padding them to one length. Losses and results are the same, for
    attention stays within each row; the more the rows' lengths differ, the more time it saves."""
    max_eval_rows: int | None = Field(default=None, ge=1)
    """Evaluate on the first so many rows only."""

    @rule
    def _one_evaluation(self) -> Iterator[Broken]:
        if self.eval is not None and self.eval_fraction is not None:
            yield "eval_fraction", "has no effect beside eval: give one of them"

    @rule
    def _parts_of_train(self) -> Iterator[Broken]:
        yield from self._parts_of("train", self.train)

    @rule
    def _parts_of_eval(self) -> Iterator[Broken]:
        yield from self._parts_of("eval", self.eval)

    def _parts_of(self, name: str, source: str | None) -> Iterator[Broken]:
        for field in (f"{name}_config", f"{name}_revision"):
            if getattr(self, field) is not None and (source is None or is_local(source)):
                yield field, f"has no effect: {name} is no hub id"
        field = f"{name}_split"
        if getattr(self, field) != type(self).model_fields[field].default:
            if source is None:
                yield field, f"has no effect without {name}"
            elif is_local(source) and source.lower().endswith(FILE_SUFFIXES):
                yield field, f"has no effect: {name} is a file, which has no splits"

    @rule
    def _completions(self) -> Iterator[Broken]:
        if self.format == "text" and self.loss_on == "completion":
            yield "loss_on", "must be all with the format text, whose rows have no completion"

    @property
    def held_out(self) -> float:
        """Share of the training rows to hold out; 0 where evaluation rows are given."""
        return 0.0 if self.eval is not None else (self.eval_fraction or 0.1)


class TrainSpec(StrictModel):
    """How a trial trains. Defaults are QLoRA's (Dettmers et al. 2023, appendix B; https://arxiv.org/abs/2305.14314)."""

    rank: int = Field(default=16, ge=1, le=1024)
    """Rank of the adapter."""
    alpha: Positive | None = None
    """LoRA's alpha: the update is scaled by alpha / rank."""
    alpha_over_rank: Positive | None = None
    """Alpha as a multiple of the rank (default 2), so that the scaling stays when the rank varies; not beside
    `alpha`."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023; https://arxiv.org/abs/2312.03732)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: TargetGroup | list[str] = "all-linear"
    """Linear layers that get an adapter: `attention`, `mlp`, `all-linear` (all but the output head), or names such as
    [q_proj, v_proj]."""
    learning_rate: Positive = 2e-4
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up: constant, or falling to 0 at the last step."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from 0."""
    batch_size: int = Field(default=4, ge=1)
    """Rows in one micro-batch."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches in one optimizer step."""
    max_grad_norm: Positive | None = 0.3
    """Clip the gradient to this norm; null does not clip."""
    optimizer: Literal["paged_adamw_32bit", "paged_adamw_8bit"] = "paged_adamw_32bit"
    """bitsandbytes' paged AdamW, with 32-bit or 8-bit state."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Decoupled weight decay."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's first moment decay."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """AdamW's second moment decay."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of a trial's initial weights, data order and dropout."""
    steps: int = Field(default=100, ge=1)
    """Optimizer steps of a whole trial."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations, each of which is also a report and a checkpoint (default: a fifth of `steps`)."""
    eval_batch_size: int = Field(default=16, ge=1)
    """Rows of one evaluation batch of a trial."""

    @rule
    def _one_alpha(self) -> Iterator[Broken]:
        if self.alpha is not None and self.alpha_over_rank is not None:
            yield "alpha_over_rank", "excludes alpha: give one of them"

    @rule
    def _some_target(self) -> Iterator[Broken]:
        if isinstance(self.target_modules, list) and not self.target_modules:
            yield "target_modules", "must name at least one layer"

    @rule
    def _warmup_ends(self) -> Iterator[Broken]:
        if self.warmup_steps >= self.steps:
            yield "warmup_steps", f"must be below steps ({self.steps}), got {self.warmup_steps}"

    @rule
    def _reports_come(self) -> Iterator[Broken]:
        if self.eval_every is not None and self.eval_every > self.steps:
            yield "eval_every", f"must not be above steps ({self.steps}), got {self.eval_every}"

    @property
    def report_every(self) -> int:
        """Steps between two reports."""
        return self.eval_every or max(1, math.ceil(self.steps / 5))


SEARCHABLE = frozenset(TrainSpec.model_fields) - {"steps", "eval_every", "eval_batch_size"}
"""Knobs that may stand in `space`. Trials of different lengths cannot be compared at equal steps, so `steps` cannot."""


class TrialConfig(TrainSpec):
    """One trial's configuration with nothing left open: ``alpha`` is a number."""

    alpha: Positive  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    alpha_over_rank: None = None  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def scaling(self) -> float:
        """Factor of the low-rank update: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class SchedulerSpec(StrictModel):
    """ASHA: asynchronous successive halving (Li et al. 2020; https://arxiv.org/abs/1810.05934)."""

    grace_steps: int = Field(ge=1)
    """Steps that every trial may take before it can be stopped; a multiple of those between two reports."""
    reduction_factor: int = Field(default=3, ge=2)
    """Of this many trials that reach a rung, one goes on."""


class SearchSpec(StrictModel):
    """Which configurations are tried, and which are stopped early."""

    algorithm: Literal["grid", "random", "tpe"] = "random"
    """`grid`: every combination of the choices; `random`; `tpe`: Optuna's tree-structured Parzen estimator."""
    trials: int | None = Field(default=None, ge=1, le=MAX_TRIALS)
    """Number of trials, for random and tpe, at most as many as there are combinations; a grid has them all."""
    asha: SchedulerSpec | None = None
    """Stop trials that fall behind; null trains all to the end."""
    time_budget_s: Positive | None = None
    """Stop the whole sweep after so many seconds, keeping what is there."""
    metric: Literal["eval_loss", "train_loss"] = "eval_loss"
    """What is minimised."""
    keep_adapters: int | None = Field(default=100, ge=1)
    """Keep the adapters of the best so many trials on the disk, and of the others their configuration and numbers only;
    null keeps all."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seed of the search. A grid and a random search are the same trials each time. What tpe proposes, and whom ASHA
    stops, also depends on the order in which results arrive: with `resources.max_concurrent: 1` that repeats too."""


class ResourcesSpec(StrictModel):
    """What trials run on."""

    slots: Annotated[Annotated[int, Field(ge=1, le=MAX_SLOTS)] | Literal["auto"], WrapValidator(_slots)] = 4
    """Trials that share one base, on one GPU or on a node without GPUs: a number, or `auto`, which is as many of the
    largest trials as fit the memory of the smallest one (`loraloom estimate` shows the number). A value above the
    estimate logs a warning; a value that cannot fit even with one row at a time is an error. Where nodes without GPUs
    differ in CPUs, the largest gets this many trials and a smaller one proportionally fewer."""
    reuse_processes: bool = False
    """Let the process of a trial that has ended take the next one, which then starts in milliseconds, not in a second
    or two. Ray names a process once: its dashboard and logs then show the first trial of each, not every trial as
    itself. Results are the same."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Most trials that run at once in the whole cluster; null: as many as there are slots."""
    threads: int | None = Field(default=None, ge=1, le=MAX_THREADS)
    """CPU threads of a host on a node without GPUs; null: all cores while nothing else is busy there, else one less (in
    float32 always one less, so that a resumed trial is the same bit for bit)."""
    idle_host_s: Positive = 60.0
    """Seconds after which a base that no trial uses is unloaded, and its GPU free."""


class SweepSpec(StrictModel):
    """A sweep: `loraloom sweep FILE`."""

    name: Annotated[str, AfterValidator(_sweep_name)]
    """Name of the sweep; its folder is `output`/`name` unless --dir says otherwise."""
    base: BaseSpec
    """The frozen model."""
    data: DataSpec
    """What is learnt."""
    space: dict[str, Domain] = Field(default_factory=dict[str, Domain])
    """Knobs of `train` that vary between trials, each with its domain."""
    train: TrainSpec = TrainSpec()
    """Knobs that all trials share."""
    search: SearchSpec = SearchSpec()
    """How the space is searched."""
    resources: ResourcesSpec = ResourcesSpec()
    """What trials run on."""
    track: TrackSpec = TrackSpec()
    """Trackers that hear of the trials."""
    cluster: ClusterSpec = ClusterSpec()
    """Where work runs; by default Ray is started on this machine for the time of the sweep."""
    output: Annotated[str, Field(min_length=1), AfterValidator(_output)] = "runs/sweeps"
    """Folder of sweep folders; a relative one is below the current folder."""

    @rule
    def _driver_is_here(self) -> Iterator[Broken]:
        # Joined as ray://, Ray Tune runs its search in the cluster, where nobody keeps this machine's folder.
        if (self.cluster.address or "").startswith("ray://"):
            rule = "must be auto or HOST:PORT for a sweep, which writes its folder from here; ray:// runs it elsewhere"
            yield "cluster.address", f"{rule}, got {self.cluster.address!r}"

    @rule
    def _known_knobs(self) -> Iterator[Broken]:
        for knob in self.space:
            if knob not in SEARCHABLE:
                yield f"space.{knob}", f"must be a knob that can vary: {', '.join(sorted(SEARCHABLE))}"

    @rule
    def _knobs_given_once(self) -> Iterator[Broken]:
        for knob in self.space:
            if knob in SEARCHABLE and knob in self.train.model_fields_set:
                yield f"space.{knob}", "also stands in train, where it would have no effect: give it once"

    @rule
    def _values_of_knobs(self) -> Iterator[Broken]:
        for knob, domain in self.space.items():
            if knob in SEARCHABLE and knob not in self.train.model_fields_set and domain.is_whole:
                faults = dict.fromkeys(fault for value in domain.examples() for fault in _knob_faults(knob, value))
                yield from ((f"space.{knob}", fault) for fault in faults)

    @rule
    def _warmups_end(self) -> Iterator[Broken]:
        # The one knob that another bounds; the trials of tpe are not known beforehand.
        domain, steps = self.space.get("warmup_steps"), self.train.steps
        for value in domain.examples() if domain else []:
            if isinstance(value, int) and value >= steps:
                yield "space.warmup_steps", f"must be below train.steps ({steps}), got {value}"

    @rule
    def _alpha_or_its_ratio(self) -> Iterator[Broken]:
        pair = {"alpha", "alpha_over_rank"}
        if pair & set(self.space) and all(knob in self.space or getattr(self.train, knob) is not None for knob in pair):
            yield "space.alpha_over_rank", "excludes alpha, in space and in train: give one of them"

    @rule
    def _grid(self) -> Iterator[Broken]:
        if self.search.algorithm != "grid":
            return
        ranges = [knob for knob, domain in self.space.items() if domain.choice is None and domain.examples()]
        if ranges:
            yield "search.algorithm", f"grid needs choices, but these are ranges: {', '.join(ranges)}"
        elif grid_size(self.space) > MAX_TRIALS:
            yield "search.algorithm", f"grid has {grid_size(self.space)} combinations, more than {MAX_TRIALS}"

    @rule
    def _number_of_trials(self) -> Iterator[Broken]:
        search = self.search
        if search.algorithm == "grid" and search.trials is not None:
            yield "search.trials", "has no effect with grid, which tries every combination: leave it out"
        if search.algorithm != "grid" and search.trials is None:
            yield "search.trials", f"is required with {search.algorithm}"

    @rule
    def _different_trials(self) -> Iterator[Broken]:
        search, most = self.search, space_size(self.space)
        if search.algorithm == "grid" or search.trials is None or most is None or search.trials <= most:
            return
        if self.space:
            yield "search.trials", f"must be at most {most}, the different combinations in space, got {search.trials}"
        elif search.algorithm == "random":
            yield (
                "search.trials",
                f"must be 1 where space is empty, for all trials would be the same, got {search.trials}",
            )

    @rule
    def _something_to_model(self) -> Iterator[Broken]:
        if self.search.algorithm == "tpe" and not self.space:
            yield "space", "must hold at least one knob for tpe"

    @rule
    def _stops_at_a_report(self) -> Iterator[Broken]:
        if self.search.asha is None:
            return
        grace, steps, every = self.search.asha.grace_steps, self.train.steps, self.train.report_every
        if grace >= steps:
            least = f"must be below train.steps ({steps}), or no trial is ever stopped, got {grace}"
            yield "search.asha.grace_steps", least
        elif grace % every:
            step = f"must be a multiple of the steps between reports ({every}), got {grace}"
            yield "search.asha.grace_steps", step

    @rule
    def _combinations(self) -> Iterator[Broken]:
        # What is wrong with one knob is not told again with every combination.
        singles = (self._known_knobs, self._knobs_given_once, self._values_of_knobs, self._warmups_end)
        several = (self._alpha_or_its_ratio, self._grid, self._number_of_trials, self._different_trials)
        if any(broken for check in (*singles, *several) for broken in check()):
            return
        if self.train.broken() or any(domain.broken() for domain in self.space.values()):
            return
        try:
            self.planned()
        except BrokenRules as error:
            yield from error.rules

    @model_serializer(mode="wrap")
    def _without_shadowed_knobs(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A dump reads back: `train` leaves out what `space` sets."""
        document = handler(self)
        for knob in self.space:
            document["train"].pop(knob, None)
        return document

    def trial(self, knobs: Mapping[str, Value]) -> TrialConfig:
        """The configuration of the trial that sets ``knobs``.

        Raises:
            ValueError: the knobs do not fit each other or the fixed ones (pydantic's ValidationError is a ValueError).
        """
        fields: dict[str, Any] = {name: getattr(self.train, name) for name in TrainSpec.model_fields} | dict(knobs)
        ratio = fields.pop("alpha_over_rank", None)
        if fields.get("alpha") is None:
            fields["alpha"] = float(fields["rank"] * (2.0 if ratio is None else ratio))
        return TrialConfig.model_validate(fields)

    def planned(self) -> list[TrialConfig] | None:
        """All trials of a grid or random search, in order; None for a search that decides as it goes.

        Raises:
            BrokenRules: combinations of knobs that are impossible, all of them.
        """
        if self.search.algorithm == "tpe":
            return None
        if self.search.algorithm == "grid":
            draws = list(grid(self.space))
        else:
            draws = draw_trials(self.space, self.num_trials, self.search.seed)
        trials: list[TrialConfig] = []
        faults: list[tuple[str, str]] = []
        for knobs in draws:
            try:
                trials.append(self.trial(knobs))
            except ValidationError as error:
                rules = "; ".join(str(detail["msg"]).removeprefix("Value error, ") for detail in error.errors())
                faults.append(("space", f"the combination {knobs} is impossible: {rules}"))
        if faults:
            raise BrokenRules(faults)
        return trials

    @property
    def num_trials(self) -> int:
        """How many trials the sweep has, if it is not cut short."""
        if self.search.algorithm == "grid":
            return grid_size(self.space)
        return self.search.trials or 1


def _knob_faults(knob: str, value: Value) -> list[str]:
    """What is wrong with one value of one knob, on its own."""
    try:
        validated(TrainSpec.model_fields[knob], value)
    except ValidationError as error:
        rules = sorted({str(detail["msg"]).removeprefix("Input should be ") for detail in error.errors()})
        return [f"must be {' or '.join(rules)}, got {value!r}"]
    return []
