"""The recipe: what a run does, checked once."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from quantlib.errors import RecipeError, suggest
from quantlib.recipe.branches import PTQRecipe, QATRecipe
from quantlib.recipe.fields import LINE, BranchName, Line
from quantlib.recipe.sections import (
    _MAX_BRANCHES,
    BenchmarkRecipe,
    CalibrationRecipe,
    DataRecipe,
    EngineName,
    EvaluationRecipe,
    ExportRecipe,
    GateRecipe,
    ModelRecipe,
    SearchRecipe,
    Section,
)

_MAX_TOLD = 100


class Recipe(Section):
    """A run: one float model, one dataset, and the variants to try."""

    name: BranchName
    """Names the run in reports and on the dashboard."""
    description: Line = ""
    """One line for `quantflow recipes`."""
    seed: Annotated[int, Field(ge=0, lt=2**31, strict=True)] = 191009
    """Seeds every random choice: initial weights, data order, crops."""
    engine: EngineName = "auto"
    """torch's int8 engine; auto: x86 on x86-64 CPUs, else qnnpack."""
    model: ModelRecipe
    """The float model."""
    data: DataRecipe
    """The images."""
    evaluation: EvaluationRecipe = EvaluationRecipe()
    """How accuracy is measured."""
    calibration: CalibrationRecipe = CalibrationRecipe()
    """Where activation ranges come from."""
    ptq: Annotated[tuple[PTQRecipe, ...], Field(max_length=_MAX_BRANCHES)] = ()
    """Post-training quantization branches."""
    qat: Annotated[tuple[QATRecipe, ...], Field(max_length=_MAX_BRANCHES)] = ()
    """Quantization-aware training branches."""
    search: SearchRecipe | None = None
    """Variants found by trial, in addition to these branches or alone; absent: none."""
    export: ExportRecipe = ExportRecipe()
    """What the exported files take and give."""
    benchmark: BenchmarkRecipe = BenchmarkRecipe()
    """What is timed."""
    gate: GateRecipe = GateRecipe()
    """How much accuracy the winner may lose."""

    @property
    def may_stop(self) -> bool:
        """Whether the evaluation of some variant may end before it has seen all validation images."""
        stop, by_default = self.evaluation.stop, self.search is not None and self.evaluation.select_on == "held_out"
        return stop == "certain" or (stop is None and by_default)

    def stops(self, variant: str) -> bool:
        """Whether a variant's evaluation ends once it is certain on which side of the gate it lies."""
        return self.may_stop and (self.evaluation.stop == "certain" or variant.startswith("search-"))

    @property
    def has_torchscript(self) -> bool:
        """Whether TorchScript files are written."""
        named = self.benchmark.runtimes or self.gate.runtimes
        return named is None or "torchscript" in named

    @model_validator(mode="before")
    @classmethod
    def _share_budget(cls, tables: Any) -> Any:
        """Give [search] or [gate] the other's budget if it has none of its own."""
        search = tables.get("search") if isinstance(tables, Mapping) else None
        gate = tables.get("gate", {}) if isinstance(tables, Mapping) else None
        if not isinstance(search, Mapping) or not isinstance(gate, Mapping):
            return tables
        budget = {"max_top1_drop": SearchRecipe.model_fields["max_top1_drop"].default}
        budget |= {name: value for table in (gate, search) for name, value in table.items() if name in budget}
        return {**tables, "search": budget | dict(search), "gate": budget | dict(gate)}

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        # With a wider gate, the fastest trial inside it would win: one that the search was meant to improve on.
        if self.search is not None and self.search.max_top1_drop != self.gate.max_top1_drop:
            raise ValueError(
                f"search.max_top1_drop = {self.search.max_top1_drop} and gate.max_top1_drop = "
                f"{self.gate.max_top1_drop} are one budget: remove one of them, or give both the same value"
            )
        return self

    @model_validator(mode="after")
    def _gate_is_timed(self) -> Self:
        timed = self.benchmark.runtimes
        untimed = [name for name in self.gate.runtimes or () if timed is not None and name not in timed]
        if untimed:
            raise ValueError(
                f"gate.runtimes names {untimed[0]}, which benchmark.runtimes leaves out: add it there, or remove it "
                "here"
            )
        return self

    @model_validator(mode="after")
    def _branches(self) -> Self:
        names = [branch.name for branch in self.ptq] + [branch.name for branch in self.qat]
        if not names and self.search is None:
            raise ValueError("there is nothing to quantize: add a [[ptq]] or a [[qat]] branch, or [search]")
        if self.search is not None and any(name.startswith("search-") for name in names):
            raise ValueError("names that begin with 'search-' are reserved for the search's trials: choose another")
        repeated = sorted({name for name in names if names.count(name) > 1} | ({"float"} & set(names)))
        if repeated:
            raise ValueError(
                f"branch name {repeated[0]!r} is taken: each [[ptq]] and [[qat]] needs a name of its own, "
                "and 'float' is the baseline's"
            )
        return self


def parse_recipe(tables: Mapping[str, Any]) -> Recipe:
    """Check the tables of a recipe.

    Raises:
        RecipeError: With one line for each key or value that is not allowed.
    """
    try:
        return Recipe.model_validate(tables)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(details) for details in error.errors())) from None


def _explain(details: Any) -> str:
    """One line for a pydantic error: where, what was given, what is allowed."""
    where = ".".join(str(part) for part in details["loc"]) or "recipe"
    if details["type"] == "extra_forbidden":
        allowed = _fields_at(details["loc"][:-1])
        return f"Unknown key {where!r}{suggest(str(details['loc'][-1]), allowed)} Allowed here: {', '.join(allowed)}."
    if details["type"] == "missing":
        return f"Missing key {where!r}: the recipe must set it."
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "literal_error":
        got = details["input"]
        allowed = re.findall(r"'([^']*)'", details["ctx"]["expected"])
        return f"{where} = {got!r} is unknown{suggest(str(got), allowed)} Allowed: {', '.join(allowed)}."
    if details["type"] == "string_unicode" or details.get("ctx", {}).get("pattern") == LINE:
        message = "text must be a single line, without control characters or half characters"
    if details["type"] == "value_error" and not isinstance(details["input"], (str, int, float, list, tuple)):
        return f"{where}: {message}."
    got = repr(details["input"])
    got = got if len(got) <= _MAX_TOLD else f"{got[:_MAX_TOLD]}… ({len(got)} characters)"
    return f"{where} = {got} is not allowed: {message}."


def _fields_at(location: Sequence[str | int]) -> list[str]:
    """The keys that the table at `location` may have."""
    section: Any = Recipe
    for part in location:
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            section = next((a for a in getattr(annotation, "__args__", ()) if isinstance(a, type)), annotation)
    return list(section.model_fields)
